"""The tables of an open data set: the shard table in memory, slices of the larger ones read by need, each one checked."""

import mmap
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import BucketNotFound, CorruptBlock, FormatError, KeyNotFound, ObjectChanged, StokerError
from ..storage._checksums import crc32c
from ..storage._posix import translate_os_errors
from ..storage.store import ObjectStore
from .format import (
    BLOCKS_KEY,
    LENGTHS_KEY,
    MANIFEST_KEY,
    PROGRESS_PREFIX,
    SHARDS_KEY,
    BlockTable,
    Manifest,
    ShardDocuments,
    ShardTable,
    TableInfo,
)

__all__ = ["Documents", "Span", "Tables"]

_WHOLE_BYTES = 4 << 20  # a table up to this size is one GET, then memory: 170,000 blocks, 0.4 x 10^12 uint16 tokens
_JOINED_BYTES = 1 << 20  # parts of the shard table up to this size are one read: 18,000 shards
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


# Guarantees: any thread may call any method. `_lock` guards what is kept; nothing is read from the store under it, so two
# threads may read the same slice twice, which is harmless.
class Tables:
    """Manifest and tables of one data set.

    Opening costs two reads, one after the other: the manifest, and of ``shards.arrow`` what says where tokens are, 36
    bytes a shard. After that, a shard's rows of ``blocks.arrow`` are one range read, kept for later; so are its document
    lengths.

    Attributes:
        shards: where the tokens of each shard are.
        is_local: whether files are mapped in place.
    """

    def __init__(
        self, store: ObjectStore, manifest: Manifest, shards: ShardTable, documents: ShardDocuments | None = None
    ) -> None:
        self.store, self.manifest, self.shards = store, manifest, shards
        self.is_local = store.local_path("x") is not None
        self.block_shift = manifest.block_tokens.bit_length() - 1
        self._lock = threading.Lock()
        self._shard_documents = documents
        self._whole: dict[str, memoryview] = {}
        self._slices: OrderedDict[int, BlockTable] = OrderedDict()
        self._lengths: OrderedDict[int, NDArray[np.uint32]] = OrderedDict()
        self._lengths_bytes = 0

    @classmethod
    def open(cls, store: ObjectStore, *, documents: bool = False, preload: bool = False) -> Self:
        """Read and check the manifest and the shard table.

        Args:
            documents: with what the borders of documents take, which otherwise is read when it is needed first.
            preload: bring in small remote tables at the same time, so that the first batch does not wait for them.

        Raises:
            KeyNotFound: no data set at this URL, or an unfinished one.
            UnknownVersion, FormatError, CorruptRecord: see :class:`~stoker.loaders.format.Manifest`.
            CorruptBlock: the shard table is damaged.
        """
        manifest = Manifest.decode(_read_manifest(store), store.place(MANIFEST_KEY))
        place = store.place(SHARDS_KEY)
        info, size_bytes = manifest.shards_table, ShardTable.size_bytes(manifest.shards)
        start = info.places_start
        end = info.documents_start + ShardDocuments.size_bytes(manifest.shards)
        joined = documents or end - start <= _JOINED_BYTES
        names = [BLOCKS_KEY, LENGTHS_KEY] if documents else [BLOCKS_KEY]
        with _reading(store, manifest, names if preload else []) as coming:
            data = store.get(SHARDS_KEY, start, end if joined else start + size_bytes)
            _check(data[:size_bytes], info.places_crc32c, place, start, start + size_bytes)
            tables = cls(store, manifest, ShardTable.decode(data, manifest, place))
        for name, table in coming.items():
            with suppress(StokerError):  # it is told where the table is needed
                tables._whole[name] = table.result()
        if joined:
            tables._shard_documents = tables._decoded_documents(data[info.documents_start - start :])
        return tables

    def reopened(self, store: ObjectStore) -> "Tables":
        """The same data set through another store, for a child after a fork; nothing is read."""
        return Tables(store, self.manifest, self.shards, self._shard_documents)

    @property
    def shard_documents(self) -> ShardDocuments:
        """Where the documents of each shard are.

        Raises:
            CorruptBlock: the shard table is damaged.
        """
        if self._shard_documents is None:
            start = self.manifest.shards_table.documents_start
            end = start + ShardDocuments.size_bytes(self.manifest.shards)
            self._shard_documents = self._decoded_documents(self.store.get(SHARDS_KEY, start, end))
        return self._shard_documents

    def _decoded_documents(self, data: memoryview) -> ShardDocuments:
        info, place = self.manifest.shards_table, self.store.place(SHARDS_KEY)
        end = info.documents_start + ShardDocuments.size_bytes(self.manifest.shards)
        _check(data, info.documents_crc32c, place, info.documents_start, end)
        return ShardDocuments.decode(data, self.manifest, place)

    def tokens_in(self, shard: int) -> tuple[int, int]:
        """The tokens of the set that a shard holds: the first, and the end."""
        before = self.shards.tokens_before
        return int(before[shard]), int(before[shard + 1]) if shard + 1 < len(before) else self.manifest.tokens

    def blocks_in(self, shard: int) -> tuple[int, int]:
        """The blocks that a shard holds: the first, and the end."""
        # Every shard but the last holds whole blocks, so a shard's first block follows from the tokens before it.
        start, end = self.tokens_in(shard)
        return start >> self.block_shift, -(-end >> self.block_shift)

    def documents_in(self, shard: int) -> tuple[int, int]:
        """The documents that start in a shard: the first, and the end."""
        before = self.shard_documents.documents_before
        return int(before[shard]), int(before[shard + 1]) if shard + 1 < len(before) else self.manifest.documents

    def _home_of(self, document: int) -> int:
        """The shard in which a document starts."""
        return int(np.searchsorted(self.shard_documents.documents_before, document, side="right")) - 1

    def shard_of_block(self, blocks: NDArray[np.int64]) -> NDArray[np.int64]:
        """The shard that holds each block."""
        return np.searchsorted(self.shards.tokens_before, blocks << self.block_shift, side="right") - 1

    def shard_of(self, block: int) -> int:
        """The shard that holds one block."""
        return int(np.searchsorted(self.shards.tokens_before, block << self.block_shift, side="right")) - 1

    def bytes_in(self, shard: int) -> tuple[int, int]:
        """Where the tokens of a shard stand in its data file.

        Raises:
            FormatError: they would not fit into the file.
        """
        start, (first, end) = int(self.shards.tokens_start[shard]), self.tokens_in(shard)
        stop, file_bytes = start + (end - first) * self.manifest.itemsize, int(self.shards.file_bytes[shard])
        if start < 0 or start % 8 or stop > file_bytes:
            raise FormatError(
                "a shard's tokens must fit into its file",
                value=f"shard {shard}: bytes [{start}, {stop}) of {file_bytes}",
                place=self.store.place(SHARDS_KEY),
            )
        return start, stop

    def byte_range(self, shard: int, block: int) -> tuple[int, int]:
        """Where a block stands in its data file."""
        begin, stop = self.bytes_in(shard)
        start = begin + (block - self.blocks_in(shard)[0]) * self.manifest.block_bytes
        return start, min(start + self.manifest.block_bytes, stop)

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
        first, last = self.blocks_in(shard)
        num_blocks = last - first
        start = int(self.shards.blocks_start[shard])
        data = self._read(
            BLOCKS_KEY,
            self.manifest.blocks_table,
            start,
            start + BlockTable.size_bytes(num_blocks),
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
        return int(self.blocks(shard).first_token[block - self.blocks_in(shard)[0]])

    def preload(self, shards: Iterable[int]) -> None:
        """Bring in the block rows of several shards, concurrently where that takes more than one request."""
        with self._lock:
            missing = [shard for shard in shards if shard not in self._slices]
        if len(missing) > 1 and self.manifest.blocks_table.bytes > _WHOLE_BYTES and not self.is_local:
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
        first, last = self.documents_in(shard)
        start = int(self.shard_documents.lengths_start[shard])
        data = self._read(
            LENGTHS_KEY,
            self.manifest.lengths_table,
            start,
            start + 4 * (last - first),
            int(self.shard_documents.lengths_crc32c[shard]),
        )
        return np.frombuffer(data, "<u4")

    def all_lengths(self) -> Iterator[NDArray[np.uint32]]:
        """Document lengths of all shards in order, each once, read a few shards ahead and not kept."""
        with ThreadPoolExecutor(_CONCURRENT_GETS, thread_name_prefix="stoker-tables") as pool:
            coming: deque[Future[NDArray[np.uint32]]] = deque()
            for shard in range(self.manifest.shards):
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
        row = block - self.blocks_in(shard)[0]
        first = int(rows.first_doc[row])
        begin = (block << self.block_shift) - int(rows.first_doc_offset[row])
        borders, document = [np.array([begin])], first
        while begin < end:
            home = self._home_of(document)
            at = document - self.documents_in(home)[0]
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
        row = (start >> self.block_shift) - self.blocks_in(shard)[0]
        document = int(self.blocks(shard).first_doc[row])
        begin = ((start >> self.block_shift) << self.block_shift) - int(self.blocks(shard).first_doc_offset[row])
        spans: list[Span] = []
        while begin < end:
            home = self._home_of(document)
            lengths = self.lengths(home)[document - self.documents_in(home)[0] :]
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
            stop = min(end, self.tokens_in(shard)[1])
            yield Span(shard, document, start - begin, stop - begin)
            start = stop

    def _read(self, key: str, info: TableInfo, start: int, end: int, expected: int) -> memoryview:
        if start == end:
            data = memoryview(b"")
        elif info.bytes <= _WHOLE_BYTES or self.is_local:
            data = self._whole_table(key, info)[start:end]
        else:
            data = self.store.get(key, start, end)
        _check(data, expected, self.store.place(key), start, end)
        return data

    def _whole_table(self, key: str, info: TableInfo) -> memoryview:
        """A table that is in memory, or a local one that is mapped: each slice has a checksum of its own."""
        with self._lock:
            data = self._whole.get(key)
        if data is None:
            data = self.store.get(key) if info.bytes <= _WHOLE_BYTES else self._mapped(key, info)
            with self._lock:
                self._whole[key] = data
        return data

    def _mapped(self, key: str, info: TableInfo) -> memoryview:
        path = self.store.local_path(key)
        assert path is not None
        with translate_os_errors(str(path)), path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != info.bytes:
                raise ObjectChanged(f"the table must have {info.bytes} bytes", value=found, place=str(path))
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    def close(self) -> None:
        """Let go of maps and the store; what was handed out stays readable."""
        with self._lock:
            self._whole.clear()
            self._slices.clear()
            self._lengths.clear()
            self._lengths_bytes = 0
        self.store.close()


@contextmanager
def _reading(store: ObjectStore, manifest: Manifest, names: Sequence[str]) -> Iterator[dict[str, Future[memoryview]]]:
    """Read those tables of `names` that are remote and small while the block runs; they are there at its end."""
    sizes = {BLOCKS_KEY: manifest.blocks_table.bytes, LENGTHS_KEY: manifest.lengths_table.bytes}
    names = [name for name in names if sizes[name] <= _WHOLE_BYTES]
    if not names or store.local_path("x") is not None:
        yield {}
        return
    with ThreadPoolExecutor(len(names), thread_name_prefix="stoker-tables") as pool:
        yield {name: pool.submit(store.get, name) for name in names}


def _check(data: memoryview, expected: int, place: str, start: int, end: int) -> None:
    got = crc32c(data)
    if got != expected or len(data) != end - start:
        raise CorruptBlock(place, start, end, expected, got)


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
