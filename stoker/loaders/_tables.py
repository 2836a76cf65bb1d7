"""The tables of an open data set: the shard table in memory, slices of the larger ones read by need, each one checked."""

import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import BucketNotFound, CorruptBlock, KeyNotFound
from ..storage._checksums import crc32c
from ..storage.store import ObjectStore
from .format import (
    BLOCKS_KEY,
    LENGTHS_KEY,
    MANIFEST_KEY,
    PROGRESS_PREFIX,
    SHARDS_KEY,
    BlockTable,
    Manifest,
    ShardTable,
    TableInfo,
)

__all__ = ["Documents", "Span", "Tables"]

_WHOLE_BYTES = 4 << 20  # a table up to this size is one GET, then memory: 170,000 blocks, 0.4 x 10^12 uint16 tokens
_KEPT_SLICES = 4096
_KEPT_LENGTHS_BYTES = 64 << 20  # a window is planned from a part of its shard's lengths, which have one checksum
_DOCUMENTS_PER_PASS = 1 << 15
_CONCURRENT_GETS = 8


class Span(NamedTuple):
    """A run of tokens of one document: tokens ``[start, end)`` of it, read from data file `shard`."""

    shard: int
    document: int
    start: int
    end: int


class Documents(NamedTuple):
    """Consecutive documents: document ``first + i`` is tokens ``[borders[i], borders[i + 1])`` of the set."""

    first: int
    borders: NDArray[np.int64]


# Guarantees: any thread may call any method. `_lock` guards `_whole`, `_slices` and `_lengths`; nothing is read from the
# store under it, so two threads may read the same slice twice, which is harmless.
class Tables:
    """Manifest and tables of one data set.

    Opening costs two reads. After that, a shard's rows of ``blocks.arrow`` are one range read, kept for later; so are
    its document lengths.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest, shards: ShardTable) -> None:
        self.store, self.manifest, self.shards = store, manifest, shards
        self.block_shift = manifest.block_tokens.bit_length() - 1
        # Every shard but the last holds whole blocks, so a shard's first block follows from the tokens before it.
        self.blocks_before = -(-shards.tokens_before >> self.block_shift)
        self._lock = threading.Lock()
        self._whole: dict[str, memoryview] = {}
        self._slices: OrderedDict[int, BlockTable] = OrderedDict()
        self._lengths: OrderedDict[int, NDArray[np.uint32]] = OrderedDict()
        self._lengths_bytes = 0

    @classmethod
    def open(cls, store: ObjectStore) -> Self:
        """Read and check the manifest and the shard table.

        Raises:
            KeyNotFound: no data set at this URL, or an unfinished one.
            UnknownVersion, FormatError, CorruptRecord: see :class:`~stoker.loaders.format.Manifest`.
        """
        manifest = Manifest.decode(_read_manifest(store), store.place(MANIFEST_KEY))
        return cls(store, manifest, ShardTable.decode(store.get(SHARDS_KEY), manifest, store.place(SHARDS_KEY)))

    def shard_of_block(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard that holds each block."""
        return np.searchsorted(self.blocks_before, blocks, side="right") - 1

    def shard_of(self, block: int) -> int:
        """The shard that holds one block."""
        return int(np.searchsorted(self.blocks_before, block, side="right")) - 1

    def byte_range(self, shard: int, block: int) -> tuple[int, int]:
        """Where a block stands in its data file."""
        first = block << self.block_shift
        last = min(first + self.manifest.block_tokens, self.manifest.tokens)
        itemsize = self.manifest.itemsize
        start = int(self.shards.tokens_start[shard] - self.shards.tokens_before[shard] * itemsize)
        return start + first * itemsize, start + last * itemsize

    def blocks(self, shard: int) -> BlockTable:
        """The rows of a shard's blocks.

        Raises:
            CorruptBlock, CorruptRecord: the table is damaged.
        """
        with self._lock:
            rows = self._slices.get(shard)
            if rows is not None:
                self._slices.move_to_end(shard)
                return rows
        num_blocks = int(self.blocks_before[shard + 1] - self.blocks_before[shard])
        start = int(self.shards.blocks_start[shard])
        data = self._read(
            BLOCKS_KEY,
            self.manifest.blocks_table,
            start,
            start + BlockTable.offsets(num_blocks)[-1],
            int(self.shards.blocks_crc32c[shard]),
        )
        rows = BlockTable.decode(data, num_blocks)
        with self._lock:
            self._slices[shard] = rows
            if len(self._slices) > _KEPT_SLICES:
                self._slices.popitem(last=False)
        return rows

    def first_token(self, block: int) -> int:
        """A block's first token, from the table, so that no block is fetched for one token."""
        shard = self.shard_of(block)
        return int(self.blocks(shard).first_token[block - int(self.blocks_before[shard])])

    def preload(self, shards: Iterable[int]) -> None:
        """Bring in the block rows of several shards, concurrently where that takes more than one request."""
        with self._lock:
            missing = [shard for shard in shards if shard not in self._slices]
        if len(missing) > 1 and self.manifest.blocks_table.bytes > _WHOLE_BYTES:
            with ThreadPoolExecutor(_CONCURRENT_GETS, thread_name_prefix="stoker-tables") as pool:
                list(pool.map(self.blocks, missing))

    def has_rows(self, shards: Iterable[int]) -> bool:
        """Whether the block rows of all these shards are here, so that nobody waits for a request."""
        with self._lock:
            return BLOCKS_KEY in self._whole or all(shard in self._slices for shard in shards)

    def lengths(self, shard: int) -> NDArray[np.uint32]:
        """Tokens of each document that starts in a shard, also of the last, which may end in a later one.

        Raises:
            CorruptBlock, CorruptRecord: the table is damaged.
        """
        with self._lock:
            kept = self._lengths.get(shard)
            if kept is not None:
                self._lengths.move_to_end(shard)
                return kept
        lengths = self._read_lengths(shard)
        with self._lock:
            if shard not in self._lengths:
                self._lengths[shard] = lengths
                self._lengths_bytes += lengths.nbytes
            while self._lengths_bytes > _KEPT_LENGTHS_BYTES and len(self._lengths) > 1:
                self._lengths_bytes -= self._lengths.popitem(last=False)[1].nbytes
        return lengths

    def _read_lengths(self, shard: int) -> NDArray[np.uint32]:
        count = int(self.shards.documents_before[shard + 1] - self.shards.documents_before[shard])
        start = int(self.shards.lengths_start[shard])
        data = self._read(
            LENGTHS_KEY,
            self.manifest.lengths_table,
            start,
            start + 4 * count,
            int(self.shards.lengths_crc32c[shard]),
        )
        return np.frombuffer(data, "<u4")

    def all_lengths(self) -> Iterator[NDArray[np.uint32]]:
        """Document lengths of all shards in order, each once, read a few shards ahead and not kept."""
        with ThreadPoolExecutor(_CONCURRENT_GETS, thread_name_prefix="stoker-tables") as pool:
            coming: deque[Future[NDArray[np.uint32]]] = deque()
            for shard in range(len(self.shards)):
                coming.append(pool.submit(self._read_lengths, shard))
                if len(coming) > _CONCURRENT_GETS:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def documents(self, start: int, end: int) -> Documents:
        """The documents that have tokens in ``[start, end)`` of the set."""
        block = start >> self.block_shift
        shard = self.shard_of(block)
        rows = self.blocks(shard)
        row = block - int(self.blocks_before[shard])
        first = int(rows.first_doc[row])
        begin = (block << self.block_shift) - int(rows.first_doc_offset[row])
        borders, document = [np.array([begin])], first
        while begin < end:
            home = int(np.searchsorted(self.shards.documents_before, document, side="right")) - 1
            at = document - int(self.shards.documents_before[home])
            lengths = self.lengths(home)[at : at + _DOCUMENTS_PER_PASS]
            borders.append(begin + np.cumsum(lengths, dtype=np.int64))
            document, begin = document + len(lengths), int(borders[-1][-1])
        joined = np.concatenate(borders)
        low = int(np.searchsorted(joined, start, side="right")) - 1
        high = int(np.searchsorted(joined, end, side="left"))
        return Documents(first + low, joined[low : high + 1])

    def spans(self, start: int, end: int) -> list[Span]:
        """The documents that tokens ``[start, end)`` of the set belong to."""
        shard = self.shard_of(start >> self.block_shift)
        row = (start >> self.block_shift) - int(self.blocks_before[shard])
        document = int(self.blocks(shard).first_doc[row])
        begin = ((start >> self.block_shift) << self.block_shift) - int(self.blocks(shard).first_doc_offset[row])
        spans: list[Span] = []
        while begin < end:
            home = int(np.searchsorted(self.shards.documents_before, document, side="right")) - 1
            lengths = self.lengths(home)[document - int(self.shards.documents_before[home]) :]
            ends = begin + np.cumsum(lengths, dtype=np.int64)
            first = int(np.searchsorted(ends, start, side="right"))
            last = min(int(np.searchsorted(ends, end, side="left")) + 1, len(ends))
            for i in range(first, last):
                at = int(ends[i]) - int(lengths[i])
                spans += self._cut(document + i, at, max(start, at), min(end, int(ends[i])))
            document, begin = document + len(ends), int(ends[-1])
        return spans

    def _cut(self, document: int, begin: int, start: int, end: int) -> Iterator[Span]:
        """Tokens [start, end) of the set, all of a document that begins at `begin`, file by file."""
        while start < end:
            shard = int(np.searchsorted(self.shards.tokens_before, start, side="right")) - 1
            stop = min(end, int(self.shards.tokens_before[shard + 1]))
            yield Span(shard, document, start - begin, stop - begin)
            start = stop

    def _read(self, key: str, info: TableInfo, start: int, end: int, expected: int) -> memoryview:
        if start == end:
            data = memoryview(b"")
        elif info.bytes <= _WHOLE_BYTES:
            data = self._read_whole(key)[start:end]
        else:
            data = self.store.get(key, start, end)
        got = crc32c(data)
        if got != expected or len(data) != end - start:
            raise CorruptBlock(self.store.place(key), start, end, expected, got)
        return data

    def _read_whole(self, key: str) -> memoryview:
        with self._lock:
            data = self._whole.get(key)
        if data is None:
            data = self.store.get(key)  # each slice has a checksum of its own
            with self._lock:
                self._whole[key] = data
        return data


def _read_manifest(store: ObjectStore) -> memoryview:
    try:
        return store.get(MANIFEST_KEY)
    except KeyNotFound as error:
        root = store.local_path(MANIFEST_KEY)
        if root is not None and not root.parent.is_dir():
            raise BucketNotFound("no such directory", place=store.url) from error
        unfinished = next(store.list(PROGRESS_PREFIX, limit=1), None) is not None
        raise KeyNotFound(
            f"a token data set has a {MANIFEST_KEY}",
            place=store.url,
            hint="its writer has not finished: go on with resume=True (stoker data pack --resume)"
            if unfinished
            else "check the URL, or write one with TokenWriter or `stoker data pack`",
        ) from error
