"""Bytes: object stores, tiers, the block cache, checksums. Knows nothing of tokens or tensors.

Importing this package pulls neither torch nor pyarrow.
"""

from .blocks import Block
from .cache import CacheReader, CacheStats, TieredCache
from .network import NetworkPolicy
from .store import ObjectInfo, ObjectStore, ObjectWriter
from .urls import open_store

__all__ = [
    "Block",
    "CacheReader",
    "CacheStats",
    "NetworkPolicy",
    "ObjectInfo",
    "ObjectStore",
    "ObjectWriter",
    "TieredCache",
    "open_store",
]
