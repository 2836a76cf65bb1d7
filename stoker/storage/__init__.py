"""Bytes: object stores, tiers, the block cache, checksums. Knows nothing of tokens or tensors.

Importing this package pulls neither torch nor pyarrow.
"""

from .cache import Block, CacheStats, TieredCache
from .network import NetworkPolicy
from .store import ObjectInfo, ObjectStore, ObjectWriter
from .urls import open_store

__all__ = [
    "Block",
    "CacheStats",
    "NetworkPolicy",
    "ObjectInfo",
    "ObjectStore",
    "ObjectWriter",
    "TieredCache",
    "open_store",
]
