"""Bring a data set into the block cache of this node before a job asks for it."""

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from ..errors import ConfigError
from ..storage.cache import TieredCache
from ..storage.urls import open_store
from ._source import cache_blocks
from ._tables import Tables

__all__ = ["Warmed", "warm"]

_BLOCKS_AHEAD = 32  # 128 MiB of blocks of the usual 4 MiB: half of what a cache may have under way


class Warmed(NamedTuple):
    """What :func:`warm` did."""

    blocks: int
    """Of the data set."""
    resident_blocks: int
    """Blocks that the cache holds now, counted from the first one: all of them, or as many as there was room for."""
    fetched_bytes: int
    """What was not there already."""
    elapsed_s: float


def warm(
    url: str,
    cache: TieredCache,
    *,
    storage_options: Mapping[str, Any] | None = None,
    set_total: Callable[[int], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Warmed:
    """Fetch all blocks of a remote data set into `cache`, in their order, and stop when one finds no room.

    Blocks are checked as in training. What is there already is not fetched again, so that a killed run goes on.

    Args:
        set_total: called once with the bytes of all blocks, before the first. progress: with the bytes of each.

    Raises:
        ConfigError: a local data set, which is mapped in place and never cached.
        CorruptBlock: a block is damaged at its origin.
    """
    began = perf_counter()
    with open_store(url, **(storage_options or {})) as store:
        if store.local_path("x") is not None:
            raise ConfigError("a local data set is mapped in place and needs no cache", value=store.url, place="warm")
        tables = Tables.open(store)
        count = tables.manifest.blocks
        if set_total is not None:
            set_total(tables.manifest.tokens * tables.manifest.itemsize)
        before = cache.stats()
        resident = 0
        groups = np.array_split(np.arange(count), -(-count // _BLOCKS_AHEAD)) if count else []
        for group in groups:
            blocks = list(cache_blocks(tables, group))
            cache.prefetch(store, blocks)
            for block in blocks:
                cache.get(store, block)
                if progress is not None:
                    progress(block.size_bytes)
            # No telling which ones found no room: those under way together race for the last of it.
            if passed := cache.stats().pass_through - before.pass_through:
                resident += len(blocks) - passed
                break
            resident += len(blocks)
        fetched_bytes = cache.stats().fetched_bytes - before.fetched_bytes
    return Warmed(count, resident, fetched_bytes, perf_counter() - began)
