"""A token data set as fixed-length samples: random access, batch gather, the way back from a sample to its documents."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import ConfigError, EmptyInput, StateMismatch
from ..storage.cache import TieredCache
from ..storage.store import ObjectStore, redact_url
from ..storage.urls import open_store
from ._ahead import SamplesReader
from ._gather import RowGather, row_index
from ._numbers import whole
from ._packed import DocumentRows, Located, LocatedRows, PackedRows, PackingReport, PieceGather, RowBorders
from ._source import CachedSource, LocalSource, Source
from ._tables import Span, Tables
from ._window import CacheRoom
from .format import Manifest
from .packing import BestFit, Concat, Pad, resolve

__all__ = ["GatherPlan", "Labels", "PackedPlan", "Packing", "PackingReport", "Span", "TokenDataset"]

logger = logging.getLogger(__name__)

Packing: TypeAlias = Literal["concat", "best_fit", "pad"] | BestFit | Pad
Labels = Literal["shifted", "same"]

_BLOCKS_LOOKED_AT = 1 << 14  # order blocks begin at the same places within a block after 2 * seq_len of them
_ROWS_LOCATED = 512  # with borders, in one call: locating 16 rows costs 80 us, 512 rows 400

_default_cache: TieredCache | None = None
_default_cache_lock = threading.Lock()


def _shared_cache() -> TieredCache:
    global _default_cache
    with _default_cache_lock:
        if _default_cache is None:
            _default_cache = TieredCache()
            logger.warning(
                "remote data sets without cache= share one default cache in this process: %r", _default_cache
            )
        return _default_cache


@dataclass(slots=True)
class GatherPlan:
    """Where the rows of many batches lie. Made by :meth:`TokenDataset.plan`; opaque; one thread uses it.

    Keeps the memory of its ready rows mapped as long as it lives.
    """

    _first: NDArray[np.int64]  # of each row: its first token, counted over the whole set
    _block: NDArray[np.int64]  # the block of that token
    _last_block: NDArray[np.int64]  # the block of its last input token
    _rows: NDArray[np.intp]  # row numbers for the gather, valid in [_start, _end)
    _start: int = 0
    _end: int = 0
    _leases: Sequence[object] = ()

    def __len__(self) -> int:
        return len(self._first)


@dataclass(slots=True)
class PackedPlan:
    """Rows made of pieces of documents. Made by :meth:`TokenDataset.plan`; opaque."""

    _samples: NDArray[np.int64]
    _located: LocatedRows | None = None  # rows [_start, _end)
    _start: int = 0
    _end: int = 0

    def __len__(self) -> int:
        return len(self._samples)


# Guarantees: any thread may call any method; `_lock` guards `_source` and what it holds. A gather of rows that are
# ready takes no lock: their memory is held by the plan. After a fork the child opens its own store, lock and source.
class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Map-style view of a token data set as samples of `seq_len` tokens.

    ``ds[i]`` is ``{"input_ids", "labels"}``, two int64 tensors of shape ``(seq_len,)`` in fresh memory that the caller
    owns. Works in a stock ``DataLoader`` with any number of workers (fork, spawn, forkserver): a pickled data set
    reopens from its configuration and refuses another content.

    **Concatenated.** With ``packing="concat"`` sample `i` is the tokens ``[i * seq_len, i * seq_len + seq_len + 1)``,
    across documents and shards. ``len(ds)`` is ``(tokens - 1) // seq_len``; the rest, fewer than ``seq_len + 1`` tokens,
    is in no sample.

    **With the borders of documents.** With ``documents=True``, and always with the other packings, a sample is a row of
    *pieces*, each from one document, and padding at the end if they don't fill it. It has three more tensors of shape
    ``(seq_len,)``: ``position_ids``, int64, which restart at 0 with each piece; ``doc_ids``, int64, the document's
    number in the data set, -1 for padding; ``loss_mask``, bool. Where the mask is False the label is -100: for padding,
    and where the label would be the first token of another document. A document that is cut goes on in another row: the
    last label of its piece is its next token all the same. Padding is a piece of its own, of end tokens (0 without).

    Which pieces make up a row depends on the lengths of the documents alone, window by window (:mod:`.packing`):
    with ``"best_fit"`` nearly all documents stay whole and nothing is lost, with ``"pad"`` each has rows of its own.
    :meth:`packing_report` counts what is kept, padded and cropped.

    Local data is mapped in place. Every block is compared with its CRC32C before its first use in this process; remote
    blocks come through `cache`, which checks them.

    Args:
        url: plain path or URL of the data set's root.
        seq_len: tokens of a sample, at least 1.
        packing: ``"concat"``, ``"best_fit"`` or ``"pad"``; or a :class:`~stoker.loaders.BestFit` or
            :class:`~stoker.loaders.Pad`, which say what becomes of documents longer than a row. All but
            ``"concat"`` and a best fit that splits read the lengths of all documents when the data set is opened.
        labels: ``"shifted"``: labels are the next tokens, for losses that don't shift. ``"same"``: labels equal
            input_ids, as Hugging Face models want them, which shift themselves; with borders of documents, the first
            label of each piece is -100, because the model predicts it from the piece before.
        documents: add the borders of documents to samples of ``"concat"``.
        cache: where remote blocks are kept. Without it, remote data sets of a process share one default
            :class:`~stoker.storage.TieredCache`. Unused by local data.
        storage_options: options of the object store, as :func:`~stoker.storage.open_store` takes them.
        verify: False skips the checks of local blocks. Tables and remote blocks are always checked.

    Raises:
        KeyNotFound, BucketNotFound: no data set there.
        UnknownVersion, FormatError, CorruptRecord: not a data set that this version reads.
        EmptyInput: not a single sample.
        UnsupportedError: a packing that reads all document lengths, and more than 10^8 documents.
        CorruptBlock, ObjectChanged: on access: damaged or truncated data, by file and byte range.

    A file that is truncated while it is mapped ends the process with SIGBUS, as with any mapped file: data sets are
    immutable, replace them under a new name.

    >>> import tempfile
    >>> from stoker.loaders import TokenWriter
    >>> with tempfile.TemporaryDirectory() as url:
    ...     with TokenWriter(url, dtype="uint16", eos_id=0) as writer:
    ...         writer.write([5, 6, 7])
    ...         writer.write([8, 9])
    ...     with TokenDataset(url, seq_len=3) as ds:
    ...         len(ds), ds[0]["input_ids"].tolist(), ds[0]["labels"].tolist(), ds.explain(1)
    (2, [5, 6, 7], [6, 7, 0], [Span(shard=0, document=0, start=3, end=4), Span(shard=0, document=1, start=0, end=3)])

    Best fit keeps both documents whole:

    >>> with tempfile.TemporaryDirectory() as url:
    ...     with TokenWriter(url, dtype="uint16", eos_id=0) as writer:
    ...         writer.write([5, 6, 7])
    ...         writer.write([8])
    ...     with TokenDataset(url, seq_len=6, packing="best_fit") as ds:
    ...         for name, value in ds[0].items():
    ...             print(name, value.int().tolist())
    input_ids [5, 6, 7, 0, 8, 0]
    labels [6, 7, 0, -100, 0, -100]
    position_ids [0, 1, 2, 3, 0, 1]
    doc_ids [0, 0, 0, 0, 1, 1]
    loss_mask [1, 1, 1, 0, 1, 0]
    """

    def __init__(
        self,
        url: str | Path,
        *,
        seq_len: int,
        packing: Packing = "concat",
        labels: Labels = "shifted",
        documents: bool = False,
        cache: TieredCache | None = None,
        storage_options: Mapping[str, Any] | None = None,
        verify: bool = True,
    ) -> None:
        seq_len = whole("seq_len", seq_len, place="TokenDataset", least=1)
        packer = resolve(packing, "TokenDataset")
        if labels not in get_args(Labels):
            raise ConfigError(
                f"labels must be one of {', '.join(get_args(Labels))}", value=labels, place="TokenDataset"
            )
        self._config: dict[str, Any] = {
            "url": str(url),
            "seq_len": seq_len,
            "packing": packing,
            "labels": labels,
            "documents": documents,
            "cache": cache,
            "storage_options": dict(storage_options or {}),
            "verify": verify,
        }
        self.url = redact_url(str(url))
        self.seq_len = seq_len
        self.labels: Labels = labels
        self.packing = packer.name
        self.documents = documents or not isinstance(packer, Concat)
        self._tables = Tables.open(self._open_store(), documents=self.documents, preload=True)
        self.manifest: Manifest = self._tables.manifest
        self._packed = PackedRows(self._tables, packer, seq_len=seq_len) if self.documents else None
        self._length = (self.manifest.tokens - 1) // seq_len if self._packed is None else self._packed.rows
        if not self._length:
            if not isinstance(packer, Concat):
                raise EmptyInput(
                    f"packing {packer.name} must leave a document", value=f"seq_len {seq_len}", place=self.url
                )
            raise EmptyInput(
                f"one sample takes seq_len + 1 = {seq_len + 1} tokens",
                value=f"{self.manifest.tokens} tokens",
                place=self.url,
                hint="choose a smaller seq_len",
            )
        self._dtype = np.dtype(self.manifest.dtype)
        self._shift = self._tables.block_shift
        self._mask = self.manifest.block_tokens - 1
        self._gather = RowGather(self._dtype, seq_len, shifted=labels == "shifted")
        self._gather_pieces = PieceGather(self._tables, seq_len=seq_len, shifted=labels == "shifted")
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._source: Source | None = None
        self._parts = 1  # of a mixture

    def _open_store(self) -> ObjectStore:
        return open_store(self._config["url"], **self._config["storage_options"])

    @property
    def fingerprint(self) -> str:
        """Identity of the content: tokens, document lengths and block geometry, not names or places."""
        return self.manifest.fingerprint

    @property
    def samples_per_block(self) -> int:
        """Samples of an order block, a power of two: what a shuffle window is made of."""
        if self._packed is not None:
            return self._packed.rows_per_window
        samples = self.manifest.order_blocks * self.manifest.block_tokens // self.seq_len
        return 1 << (samples.bit_length() - 1) if samples else 1

    @property
    def is_local(self) -> bool:
        """Whether blocks are mapped in place, without a cache."""
        return self._tables.is_local

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"TokenDataset({self.url!r}, seq_len={self.seq_len}, samples={self._length})"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several samples by one gather; the tensors are views of two fresh arrays."""
        numbers = [whole("a sample index", index, place=self.url) for index in indices]
        numbers = [number + self._length if number < 0 else number for number in numbers]
        if not all(0 <= number < self._length for number in numbers):
            # The builtin, because iteration over a sequence ends with it.
            raise IndexError(f"{self.url}: sample index must be in [0, {self._length}), got {list(indices)}")
        wanted = np.array(numbers, np.int64)
        if self._packed is not None:
            arrays = DocumentRows.empty(len(wanted), self.seq_len)
            self.gather_documents(self.plan(wanted), 0, len(wanted), arrays)
            columns = [torch.from_numpy(array).unbind() for array in arrays]
            return [dict(zip(DocumentRows._fields, row, strict=True)) for row in zip(*columns, strict=True)]
        input_ids = np.empty((len(wanted), self.seq_len), np.int64)
        labels = np.empty_like(input_ids)
        self.gather(wanted, input_ids, labels)
        rows = zip(torch.from_numpy(input_ids).unbind(), torch.from_numpy(labels).unbind(), strict=True)
        return [{"input_ids": x, "labels": y} for x, y in rows]

    def gather(self, samples: NDArray[np.int64], input_ids: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Fill the caller's two C-contiguous ``(n, seq_len)`` arrays with samples by number, any order, repeats allowed."""
        self.gather_planned(self.plan(samples), 0, len(samples), input_ids, labels)

    def plan(self, samples: NDArray[np.int64]) -> GatherPlan | PackedPlan:
        """Locate the rows of many batches in one vectorised pass; no data is read.

        `samples` are ``(n,)`` sample numbers in the order of delivery. Rows whose blocks are resident and checked are
        ready at once; :meth:`gather_planned` fetches and checks the blocks of the others when it comes to them. Rows
        with borders of documents are located then as well, so that a first batch waits for its own windows alone.

        Raises:
            ConfigError: a number outside ``[0, len(self))``.
        """
        samples = np.asarray(samples, np.int64)
        if samples.size and (samples.min() < 0 or samples.max() >= self._length):
            wrong = samples[(samples < 0) | (samples >= self._length)][0]
            raise ConfigError(f"sample numbers are in [0, {self._length})", value=wrong, place=self.url)
        if self._packed is not None:
            return PackedPlan(samples)
        first = samples * self.seq_len
        plan = GatherPlan(
            _first=first,
            _block=first >> self._shift,
            _last_block=(first + (self.seq_len - 1)) >> self._shift,
            _rows=np.empty(len(first), np.intp),
        )
        self._make_ready(plan, 0, 0)
        return plan

    def gather_planned(
        self,
        plan: GatherPlan | PackedPlan,
        start: int,
        end: int,
        input_ids: NDArray[np.int64],
        labels: NDArray[np.int64],
    ) -> None:
        """Fill ``(end - start, seq_len)`` arrays with rows ``[start, end)`` of a plan; cheapest in ascending order."""
        if isinstance(plan, PackedPlan):
            others = DocumentRows.empty(end - start, self.seq_len)
            self.gather_documents(plan, start, end, others._replace(input_ids=input_ids, labels=labels))
            return
        if start < plan._start or end > plan._end:
            self._make_ready(plan, start, end)
        self._gather(plan._rows[start:end], input_ids, labels)

    def ready_rows(self, plan: GatherPlan, start: int, end: int) -> tuple[NDArray[np.intp], int, int]:
        """Row numbers of a plan, of which those in ``[first, end)`` are ready: at least ``[start, end)``; for mixtures.

        They are valid as long as the plan lives and no later call makes others ready.
        """
        if start < plan._start or end > plan._end:
            self._make_ready(plan, start, end)
        return plan._rows, plan._start, plan._end

    def gather_documents(self, plan: GatherPlan | PackedPlan, start: int, end: int, rows: DocumentRows) -> RowBorders:
        """Fill all arrays of rows ``[start, end)`` of a plan, and tell where their pieces end.

        Raises:
            ConfigError: samples of this data set carry no borders.
        """
        located, first, _ = self.located_rows(plan, start, end)
        return self.fill_documents(located.rows(start - first, end - first), rows)

    def fill_documents(self, located: Located, rows: DocumentRows) -> RowBorders:
        """Copy the tokens of located pieces, also of other data sets with the same `seq_len` and `labels`."""
        return self._gather_pieces(located, rows)

    def located_rows(self, plan: GatherPlan | PackedPlan, start: int, end: int) -> tuple[LocatedRows, int, int]:
        """Where the pieces of rows ``[first, last)`` of a plan lie: at least those of ``[start, end)``; for mixtures."""
        if self._packed is None or not isinstance(plan, PackedPlan):
            raise ConfigError("only packed samples and documents=True have borders", value=self.packing, place=self.url)
        if plan._located is None or start < plan._start or end > plan._end:
            self._renew_after_fork()
            self._locate(self._packed, plan, start, end)
        assert plan._located is not None
        return plan._located, plan._start, plan._end

    def _locate(self, packed: PackedRows, plan: PackedPlan, start: int, end: int) -> None:
        """Fetch and check what rows [start, end) need; take rows after them along that are planned and resident."""
        gather, samples = self._gather_pieces, plan._samples
        pieces = packed.pieces(self._tables, samples[start:end])
        further = samples[end : start + _ROWS_LOCATED]
        further_pieces = packed.pieces(self._tables, further[: packed.planned(further)])
        with self._locked_source() as source:
            source.acquire(gather.blocks(pieces))
            rows, count = gather.resident(further_pieces, source)
            pieces = np.concatenate((pieces, further_pieces[:count]))
            plan._located = gather.locate(pieces, gather.blocks(pieces), source, self._tables)
            plan._start, plan._end = start, end + rows

    def _make_ready(self, plan: GatherPlan, start: int, end: int) -> None:
        """Fetch and check what rows [start, end) need; take the rows after them along as far as all is resident."""
        with self._locked_source() as source:
            source.acquire(self._blocks_between(plan._block[start:end], plan._last_block[start:end]))
            ready = (source.rows[plan._block[start:]] != 0) & (source.rows[plan._last_block[start:]] != 0)
            if self.seq_len > self.manifest.block_tokens:  # blocks in between have not been looked at
                ready[end - start :] = False
            absent = np.flatnonzero(~ready)
            end = start + int(absent[0]) if absent.size else len(plan)
            rows, first, blocks = plan._rows[start:end], plan._first[start:end], plan._block[start:end]
            np.add(source.rows[blocks], first & self._mask, out=rows)
            across = np.flatnonzero((first + self.seq_len) >> self._shift != blocks)
            copies = np.empty((len(across), self.seq_len + 1), self._dtype)
            for copy, begin in zip(copies, first[across].tolist(), strict=True):
                self._copy_across(source, begin, copy)
            rows[across] = row_index(copies) + np.arange(len(across)) * (self.seq_len + 1)
            plan._leases = (copies, *source.hold(blocks))
            plan._start, plan._end = start, end

    @staticmethod
    def _blocks_between(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
        most = int((last - first).max()) if first.size else 0
        return np.unique(np.concatenate([np.minimum(first + step, last) for step in range(most + 1)]))

    def _copy_across(self, source: Source, begin: int, copy: NDArray[Any]) -> None:
        """Assemble a row that no single block holds."""
        position, end = begin, begin + self.seq_len
        while position < end:
            block, offset = position >> self._shift, position & self._mask
            count = min(self.manifest.block_tokens - offset, end - position)
            copy[position - begin : position - begin + count] = source.tokens(block)[offset : offset + count]
            position += count
        block, offset = end >> self._shift, end & self._mask
        # The label of the last token often is the first token of the next block. The table of blocks has it, so that
        # no block is fetched for one token: it would double the bytes of a windowed order.
        copy[-1] = source.tokens(block)[offset] if offset else self._tables.first_token(block)

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Start to bring the blocks of `samples` into the cache, in the background; nothing to do for local data."""
        blocks, _ = self.missing_blocks(samples)
        if blocks.size:
            with self._locked_source() as source:
                source.prefetch(blocks)

    def missing_blocks(self, samples: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks of remote samples that are not in this process, in order of need, and which sample needs each first."""
        samples = np.asarray(samples, np.int64)
        if self.is_local or not len(samples):
            return np.empty(0, np.int64), np.empty(0, np.int64)
        if self._packed is not None:  # a window's blocks together: its other rows come up soon
            start, end = self._packed.stretch(samples // self._packed.rows_per_window)
            first, last = start >> self._shift, (end - 1) >> self._shift
        else:
            start = samples * self.seq_len
            first, last = start >> self._shift, (start + (self.seq_len - 1)) >> self._shift
        steps = range(int((last - first).max()) + 1)
        needed = np.stack([np.minimum(first + step, last) for step in steps], axis=1).ravel()
        blocks, at = np.unique(needed, return_index=True)
        with self._locked_source() as source:
            missing = np.flatnonzero(source.rows[blocks] == 0)
        missing = missing[np.argsort(at[missing])]
        return blocks[missing], at[missing] // len(steps)

    def blocks_of(self, order_blocks: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The first and the last block that each order block lies in; see :attr:`samples_per_block`."""
        if self._packed is not None:
            start, end = self._packed.stretch(order_blocks)
        else:
            tokens = self.samples_per_block * self.seq_len
            start = order_blocks * tokens
            end = np.minimum(start + tokens, self._length * self.seq_len)
        return start >> self._shift, (end - 1) >> self._shift

    def cache_room(self) -> CacheRoom | None:
        """What a shuffle's windows need of the cache, and what it has; None for local data. For loaders."""
        if self.is_local:
            return None
        with self._locked_source() as source:
            capacity_bytes = source.cache_bytes()
        blocks = -(-self._length // self.samples_per_block)
        first, last = self.blocks_of(np.arange(min(blocks, _BLOCKS_LOOKED_AT)))
        return CacheRoom(
            place=self.url,
            seq_len=self.seq_len,
            blocks=blocks,
            block_bytes=int((last - first + 1).mean() * self.manifest.block_bytes),
            data_bytes=self.manifest.blocks * self.manifest.block_bytes,
            capacity_bytes=capacity_bytes or 0,
        )

    def reader(self) -> SamplesReader | None:
        """What tells the cache which samples will be read when; None for local data. For loaders."""
        with self._locked_source() as source:
            reader = source.reader()
        return None if reader is None else SamplesReader(self, self._tables, reader)

    def share(self, parts: int) -> None:
        """Keep no more than a `parts`-th of the maps or the cached blocks that a data set alone may; for mixtures."""
        with self._lock:
            self._parts = max(self._parts, parts)
            if self._source is not None:
                self._source.share(self._parts)

    def explain(self, sample: int) -> list[Span]:
        """The documents that a sample's tokens come from, in order. Reads tables, no tokens.

        Without borders of documents these are its ``seq_len + 1`` tokens, else those of its pieces. A document that
        goes on in another data file gives two spans.
        """
        if not 0 <= sample < self._length:
            raise ConfigError(f"sample numbers are in [0, {self._length})", value=sample, place=self.url)
        self._renew_after_fork()
        if self._packed is None:
            return self._tables.spans(sample * self.seq_len, sample * self.seq_len + self.seq_len + 1)
        pieces = self._packed.pieces(self._tables, np.array([sample])).tolist()
        return [
            span for begin, length, *_ in pieces if begin >= 0 for span in self._tables.spans(begin, begin + length)
        ]

    def packing_report(self) -> PackingReport:
        """Count what is kept, padded and cropped of the whole data set; see :class:`PackingReport`.

        With borders of documents this reads all lengths and plans every window: a second or two for 10^9 tokens.
        """
        self._renew_after_fork()
        if self._packed is not None:
            return self._packed.report(self._tables, shifted=self.labels == "shifted")
        kept = self._length * self.seq_len
        return PackingReport(
            rows=self._length,
            kept_tokens=kept,
            padded_tokens=0,
            cropped_tokens=self.manifest.tokens - kept,
            trained_tokens=kept,
            masked_tokens=0,
            max_pieces=1,
        )

    def close(self) -> None:
        """Let go of maps, leases and the store. Harmless when called twice; plans that are alive stay readable."""
        with self._lock:
            self._closed = True
            if self._source is not None:
                self._source.close()
                self._source = None
            self._tables.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @contextmanager
    def _locked_source(self) -> Iterator[Source]:
        self._renew_after_fork()
        with self._lock:
            yield self._open_source()

    def _renew_after_fork(self) -> None:
        if self._pid != os.getpid():
            # Another thread of the parent may have held the lock, and clients of object stores don't survive a fork.
            self._lock, self._pid, self._source = threading.Lock(), os.getpid(), None
            if self._packed is not None:
                self._packed.renew_after_fork()
            if not self.is_local:
                self._tables = self._tables.reopened(self._open_store())

    def _open_source(self) -> Source:
        if self._closed:
            raise ConfigError("the data set is closed", place=self.url)
        if self._source is None:
            if self.is_local:
                self._source = LocalSource(self._tables, verify=self._config["verify"])
            else:
                cache = self._config["cache"]
                cache = _shared_cache() if cache is None else cache
                self._source = CachedSource(self._tables, cache)
            if self._parts > 1:
                self._source.share(self._parts)
        return self._source

    def __getstate__(self) -> dict[str, Any]:
        return {"config": self._config, "fingerprint": self.fingerprint}

    def __setstate__(self, state: dict[str, Any]) -> None:
        config = dict(state["config"])
        self.__init__(config.pop("url"), **config)  # type: ignore[misc]
        if self.fingerprint != state["fingerprint"]:
            raise StateMismatch(
                f"the data set must still have fingerprint {state['fingerprint']}",
                value=self.fingerprint,
                place=self.url,
            )
