"""Where blocks of tokens lie in this process's memory: local files mapped in place, or blocks held by the cache."""

import mmap
import os
import resource
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptBlock, ObjectChanged
from ..metrics import counters
from ..storage._checksums import crc32c
from ..storage._posix import translate_os_errors
from ..storage.cache import Block, CacheReader, TieredCache
from ._gather import row_index
from ._tables import Tables
from .format import shard_key

__all__ = ["CachedSource", "LocalSource", "Source", "cache_blocks"]


# Guarantees: one thread at a time; TokenDataset's lock sees to that. prefetch may be called from any thread.
class Source(ABC):
    """Makes blocks resident and verified, and says where they lie.

    Attributes:
        rows: for each block of the set, the row number of its first token (see :mod:`._gather`) while the block is
            resident and checked, else 0. Valid as long as what :meth:`hold` returned for the block is alive.
    """

    def __init__(self, tables: Tables) -> None:
        self.tables = tables
        self.rows = _zeros(tables.manifest.blocks, np.intp)
        self._dtype = np.dtype(tables.manifest.dtype)

    @abstractmethod
    def acquire(self, blocks: NDArray[np.int64]) -> None:
        """Make `blocks` (sorted, unique) resident and verified. Others may be let go, these not before the next call.

        Raises:
            CorruptBlock: a block differs from its checksum at its origin.
            ObjectChanged: a data file is truncated.
        """

    @abstractmethod
    def hold(self, blocks: NDArray[np.int64]) -> list[object]:
        """What keeps the memory of these resident blocks mapped."""

    @abstractmethod
    def tokens(self, block: int) -> NDArray[Any]:
        """The tokens of a resident block, without a copy."""

    @abstractmethod
    def prefetch(self, blocks: NDArray[np.int64]) -> None:
        """Start to bring `blocks` near, in the background."""

    @abstractmethod
    def share(self, parts: int) -> None:
        """Hold at most a `parts`-th of what one source alone may: of maps, or of the cache."""

    def cache_bytes(self) -> int | None:
        """Capacity of the largest tier; None where there is no cache."""
        return None

    def reader(self) -> CacheReader | None:
        """What tells a cache the future; None where there is no cache."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Let everything go that nobody holds."""


def _zeros(count: int, dtype: type) -> NDArray[Any]:
    """Zeros of which only touched pages take memory: 2 x 10^13 tokens have 80 MB of rows, and few blocks are resident."""
    # numpy asks for huge pages: 2 MiB to be cleared for each of the far-apart blocks of a shuffle, 0.2 ms and more.
    memory = mmap.mmap(-1, max(1, count * np.dtype(dtype).itemsize), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, dtype, count)


class _Map(NamedTuple):
    memory: mmap.mmap
    tokens: NDArray[Any]  # all tokens of the shard
    stamp: tuple[int, int]  # inode and mtime: which file it was whose blocks were checked


class LocalSource(Source):
    """Data files mapped in place, at most `max_maps` of them at a time; each block is checked before its first use."""

    def __init__(self, tables: Tables, *, verify: bool) -> None:
        super().__init__(tables)
        self._verify = verify
        self._checked = _zeros(tables.manifest.blocks, np.bool_)
        self._stamps: dict[int, tuple[int, int]] = {}
        self._maps: OrderedDict[int, _Map] = OrderedDict()
        self.share(1)

    def share(self, parts: int) -> None:
        affordable = _affordable_maps(parts * self.tables.manifest.shards)
        self.max_maps = max(min(16, affordable), affordable // parts)

    def acquire(self, blocks: NDArray[np.int64]) -> None:
        missing = blocks[self.rows[blocks] == 0]
        shards = self.tables.shard_of_block(missing)
        wanted = sorted({int(shard) for shard in shards})
        self._trim(keep=set(self.tables.shard_of_block(blocks).tolist()), room_for=len(wanted))
        for shard in wanted:
            self._acquire_in(shard, missing[shards == shard])

    def _trim(self, *, keep: set[int], room_for: int) -> None:
        for shard in list(self._maps):
            if len(self._maps) + room_for <= self.max_maps:
                return
            if shard not in keep:
                self._forget(shard)

    def _forget(self, shard: int) -> None:
        first, end = self.tables.blocks_in(shard)
        self.rows[first:end] = 0
        del self._maps[shard]

    def _acquire_in(self, shard: int, blocks: NDArray[np.int64]) -> None:
        mapped = self._maps.get(shard)
        if mapped is None:
            mapped = self._maps[shard] = self._map(shard)
        self._maps.move_to_end(shard)
        if self._verify:
            self._check(shard, mapped, blocks[~self._checked[blocks]])
        first_block, _ = self.tables.blocks_in(shard)
        self.rows[blocks] = row_index(mapped.tokens) + ((blocks - first_block) << self.tables.block_shift)

    def _map(self, shard: int) -> _Map:
        path = self.tables.store.local_path(shard_key(shard))
        assert path is not None
        with translate_os_errors(str(path)):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            try:
                info = os.fstat(fd)
                check_size(info.st_size, int(self.tables.shards.file_bytes[shard]), str(path))
                memory = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
            finally:
                os.close(fd)
        stamp = (info.st_ino, info.st_mtime_ns)
        if self._stamps.setdefault(shard, stamp) != stamp:  # another file than the one whose blocks were checked
            self._stamps[shard] = stamp
            first, end = self.tables.blocks_in(shard)
            self._checked[first:end] = False
        start, end = self.tables.bytes_in(shard)
        tokens = np.frombuffer(memory, self._dtype, (end - start) // self._dtype.itemsize, start)
        return _Map(memory, tokens, stamp)

    def _check(self, shard: int, mapped: _Map, blocks: NDArray[np.int64]) -> None:
        if not blocks.size:
            return
        rows = self.tables.blocks(shard)
        first_block, _ = self.tables.blocks_in(shard)
        ranges = [self.tables.byte_range(shard, int(block)) for block in blocks]
        for start, end in ranges:  # the disk works on all of them while the first is being checked
            page = start - start % mmap.PAGESIZE
            mapped.memory.madvise(mmap.MADV_WILLNEED, page, end - page)
        for block, (start, end) in zip(blocks.tolist(), ranges, strict=True):
            got = crc32c(memoryview(mapped.memory)[start:end])
            expected = int(rows.crc32c[block - first_block])
            if got != expected:
                raise CorruptBlock(self.tables.store.place(shard_key(shard)), start, end, expected, got)
            self._checked[block] = True
        counters.add("data.checked.bytes", sum(end - start for start, end in ranges))

    def hold(self, blocks: NDArray[np.int64]) -> list[object]:
        shards = np.unique(self.tables.shard_of_block(blocks)).tolist()
        for shard in shards:
            self._maps.move_to_end(shard)
        return [self._maps[shard].tokens for shard in shards]

    def tokens(self, block: int) -> NDArray[Any]:
        shard = self.tables.shard_of(block)
        first = (block - self.tables.blocks_in(shard)[0]) << self.tables.block_shift
        return self._maps[shard].tokens[first : first + self.tables.manifest.block_tokens]

    def prefetch(self, blocks: NDArray[np.int64]) -> None:
        """Nothing: the kernel reads ahead."""

    def close(self) -> None:
        self.rows[:] = 0
        self._maps.clear()


def _affordable_maps(shards: int) -> int:
    # Each map keeps a descriptor (CPython duplicates it) and one of the kernel's vm.max_map_count = 65,530 entries.
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if shards > soft // 4 and (hard == resource.RLIM_INFINITY or hard > soft):
        with suppress(ValueError, OSError):  # a sandbox may forbid it: fewer maps are kept
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1 << 16) if hard > 0 else 1 << 16, hard))
            soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(16, min(4096, soft // 4))


class CachedSource(Source):
    """Blocks leased from a cache, at most `max_views` of them unless one call needs more."""

    def __init__(self, tables: Tables, cache: TieredCache) -> None:
        super().__init__(tables)
        self._cache = cache
        self._views: OrderedDict[int, NDArray[Any]] = OrderedDict()
        self.share(1)

    def share(self, parts: int) -> None:
        # A quarter of the RAM tier is what the loader's window may take. Without such a tier a view may be anonymous
        # memory: 64 MiB of it, and one view at least.
        share_bytes = max(self._cache.stats().ram_capacity_bytes // 4, 64 << 20) // parts
        self.max_views = max(1, min(4096, share_bytes // self.tables.manifest.block_bytes))

    def acquire(self, blocks: NDArray[np.int64]) -> None:
        missing = blocks[self.rows[blocks] == 0]
        keep = set(blocks.tolist())
        for block in list(self._views):
            if len(self._views) + len(missing) <= self.max_views:
                break
            if block not in keep:
                del self._views[block]
                self.rows[block] = 0
        if len(missing) > 1:
            self.prefetch(missing)  # together; the loop below then waits for each in turn
        for block, wanted in zip(missing.tolist(), cache_blocks(self.tables, missing), strict=True):
            data = self._cache.get(self.tables.store, wanted)
            if len(data) != wanted.end - wanted.start:
                raise ObjectChanged(
                    f"must hold bytes [{wanted.start}, {wanted.end})", value=len(data), place=wanted.key
                )
            tokens = np.frombuffer(data, self._dtype)
            if tokens.__array_interface__["data"][0] % 8:
                tokens = tokens.copy()
            self._views[block] = tokens
            self.rows[block] = row_index(tokens)

    def hold(self, blocks: NDArray[np.int64]) -> list[object]:
        unique = np.unique(blocks).tolist()
        for block in unique:
            self._views.move_to_end(block)
        return [self._views[block] for block in unique]

    def tokens(self, block: int) -> NDArray[Any]:
        return self._views[block]

    def prefetch(self, blocks: NDArray[np.int64]) -> None:
        self._cache.prefetch(self.tables.store, list(cache_blocks(self.tables, blocks)))

    def cache_bytes(self) -> int:
        stats = self._cache.stats()
        return max(stats.ram_capacity_bytes, stats.disk_capacity_bytes)

    def reader(self) -> CacheReader:
        return self._cache.reader()

    def close(self) -> None:
        self.rows[:] = 0
        self._views.clear()


def cache_blocks(tables: Tables, blocks: NDArray[np.int64]) -> Iterator[Block]:
    """What the cache knows blocks of a data set as, in the order of `blocks`."""
    shards = tables.shard_of_block(blocks).tolist()
    tables.preload(sorted(set(shards)))
    version = tables.manifest.shards_table.sha256  # over the digests of all data files
    size_bytes = tables.manifest.block_bytes
    known: dict[
        int, tuple[str, int, int, int, NDArray[np.uint32]]
    ] = {}  # a plan names hundreds of blocks between two batches
    for block, shard in zip(blocks.tolist(), shards, strict=True):
        if shard not in known:
            known[shard] = (
                shard_key(shard),
                tables.blocks_in(shard)[0],
                *tables.bytes_in(shard),
                tables.blocks(shard).crc32c,
            )
        key, first, begin, stop, crcs = known[shard]
        start = begin + (block - first) * size_bytes
        end = min(start + size_bytes, stop)
        yield Block(key=key, version=version, start=start, end=end, crc32c=int(crcs[block - first]))


def check_size(found: int, expected: int, place: str) -> None:
    """Raise ObjectChanged unless a data file has the size that its table says."""
    if found != expected:
        raise ObjectChanged(
            f"the data file must have {expected} bytes",
            value=found,
            place=place,
            hint="it was truncated or replaced: restore it from its source",
        )
