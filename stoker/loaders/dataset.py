"""A token data set as fixed-length samples: random access, batch gather, the way back from a sample to its documents."""

import logging
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..errors import ConfigError, EmptyInput, StateMismatch, UnsupportedError
from ..storage.cache import TieredCache
from ..storage.store import ObjectStore, open_store, redact_url
from ._gather import RowGather, row_index
from ._source import CachedSource, LocalSource, Source
from ._tables import Span, Tables
from .format import Manifest

__all__ = ["GatherPlan", "Labels", "Packing", "Span", "TokenDataset"]

logger = logging.getLogger(__name__)

Packing = Literal["concat", "best_fit", "pad"]
Labels = Literal["shifted", "same"]

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


# Guarantees: any thread may call any method; `_lock` guards `_source` and what it holds. A gather of rows that are
# ready takes no lock: their memory is held by the plan. After a fork the child opens its own store, lock and source.
class TokenDataset(Dataset[dict[str, torch.Tensor]]):
    """Map-style view of a token data set: sample `i` is the tokens ``[i * seq_len, i * seq_len + seq_len + 1)``.

    ``len(ds)`` is ``(tokens - 1) // seq_len``; the rest, fewer than ``seq_len + 1`` tokens, is in no sample. Samples
    cross document and shard borders. ``ds[i]`` is ``{"input_ids", "labels"}``, two int64 tensors of shape
    ``(seq_len,)`` in fresh memory that the caller owns. Works in a stock ``DataLoader`` with any number of workers
    (fork, spawn, forkserver): a pickled data set reopens from its configuration and refuses another content.

    Local data is mapped in place. Every block is compared with its CRC32C before its first use in this process; remote
    blocks come through `cache`, which checks them.

    Args:
        url: plain path or URL of the data set's root.
        seq_len: tokens of a sample, at least 1.
        packing: ``"concat"``; the others are not done yet.
        labels: ``"shifted"``: labels are the next tokens, for losses that don't shift. ``"same"``: labels equal
            input_ids, as Hugging Face models want them, which shift themselves.
        documents: add document borders to samples; not done yet.
        cache: where remote blocks are kept. Without it, remote data sets of a process share one default
            :class:`~stoker.storage.TieredCache`. Unused by local data.
        storage_options: options of the object store, as :func:`~stoker.storage.open_store` takes them.
        verify: False skips the checks of local blocks. Tables and remote blocks are always checked.

    Raises:
        KeyNotFound, BucketNotFound: no data set there.
        UnknownVersion, FormatError, CorruptRecord: not a data set that this version reads.
        EmptyInput: fewer than ``seq_len + 1`` tokens.
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
        if seq_len < 1:
            raise ConfigError("seq_len must be >= 1", value=seq_len, place="TokenDataset")
        if packing not in get_args(Packing):
            raise ConfigError(
                f"packing must be one of {', '.join(get_args(Packing))}", value=packing, place="TokenDataset"
            )
        if labels not in get_args(Labels):
            raise ConfigError(
                f"labels must be one of {', '.join(get_args(Labels))}", value=labels, place="TokenDataset"
            )
        if packing != "concat":
            raise UnsupportedError(
                "this version packs by 'concat' only", value=packing, place="TokenDataset", hint='packing="concat"'
            )
        if documents:
            raise UnsupportedError(
                "this version gives no document borders", value="documents=True", place="TokenDataset"
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
        self._tables = Tables.open(self._open_store())
        self.manifest: Manifest = self._tables.manifest
        self._length = (self.manifest.tokens - 1) // seq_len
        if not self._length:
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
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._closed = False
        self._source: Source | None = None

    def _open_store(self) -> ObjectStore:
        return open_store(self._config["url"], **self._config["storage_options"])

    @property
    def fingerprint(self) -> str:
        """Identity of the content: tokens, document lengths and block geometry, not names or places."""
        return self.manifest.fingerprint

    @property
    def samples_per_block(self) -> int:
        """Samples of an order block, a power of two: what a shuffle window is made of."""
        samples = self.manifest.order_blocks * self.manifest.block_tokens // self.seq_len
        return 1 << (samples.bit_length() - 1) if samples else 1

    @property
    def is_local(self) -> bool:
        """Whether blocks are mapped in place, without a cache."""
        return self._tables.store.local_path("x") is not None

    def __len__(self) -> int:
        return self._length

    def __repr__(self) -> str:
        return f"TokenDataset({self.url!r}, seq_len={self.seq_len}, samples={self._length})"

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, torch.Tensor]]:
        """Several samples by one gather; the tensors are views of two fresh arrays."""
        wanted = np.asarray(indices, np.int64)
        wanted = np.where(wanted < 0, wanted + self._length, wanted)
        if ((wanted < 0) | (wanted >= self._length)).any():
            # The builtin, because iteration over a sequence ends with it.
            raise IndexError(f"{self.url}: sample index must be in [0, {self._length}), got {list(indices)}")
        input_ids = np.empty((len(wanted), self.seq_len), np.int64)
        labels = np.empty_like(input_ids)
        self.gather(wanted, input_ids, labels)
        rows = zip(torch.from_numpy(input_ids).unbind(), torch.from_numpy(labels).unbind(), strict=True)
        return [{"input_ids": x, "labels": y} for x, y in rows]

    def gather(self, samples: NDArray[np.int64], input_ids: NDArray[np.int64], labels: NDArray[np.int64]) -> None:
        """Fill the caller's two C-contiguous ``(n, seq_len)`` arrays with samples by number, any order, repeats allowed."""
        self.gather_planned(self.plan(samples), 0, len(samples), input_ids, labels)

    def plan(self, samples: NDArray[np.int64]) -> GatherPlan:
        """Locate the rows of many batches in one vectorised pass; no data is read.

        `samples` are ``(n,)`` sample numbers in the order of delivery. Rows whose blocks are resident and checked are
        ready at once; :meth:`gather_planned` fetches and checks the blocks of the others when it comes to them.

        Raises:
            ConfigError: a number outside ``[0, len(self))``.
        """
        samples = np.asarray(samples, np.int64)
        if samples.size and (samples.min() < 0 or samples.max() >= self._length):
            wrong = samples[(samples < 0) | (samples >= self._length)][0]
            raise ConfigError(f"sample numbers are in [0, {self._length})", value=wrong, place=self.url)
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
        self, plan: GatherPlan, start: int, end: int, input_ids: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None:
        """Fill ``(end - start, seq_len)`` arrays with rows ``[start, end)`` of a plan; cheapest in ascending order."""
        if start < plan._start or end > plan._end:
            self._make_ready(plan, start, end)
        self._gather(plan._rows[start:end], input_ids, labels)

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
        copy[-1] = source.tokens(block)[offset] if offset else self._first_token(block)

    def _first_token(self, block: int) -> int:
        shard = self._tables.shard_of(block)
        return int(self._tables.blocks(shard).first_token[block - int(self._tables.blocks_before[shard])])

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        """Start to bring the blocks of `samples` into the cache, in the background; nothing to do for local data."""
        if self.is_local or not len(samples):
            return
        first = np.asarray(samples, np.int64) * self.seq_len
        blocks = self._blocks_between(first >> self._shift, (first + (self.seq_len - 1)) >> self._shift)
        with self._locked_source() as source:
            missing = blocks[source.rows[blocks] == 0]
        if missing.size:
            source.prefetch(missing)

    def explain(self, sample: int) -> list[Span]:
        """The documents that a sample's ``seq_len + 1`` tokens come from, in order. Reads tables, no tokens.

        A document that goes on in another data file gives two spans.
        """
        if not 0 <= sample < self._length:
            raise ConfigError(f"sample numbers are in [0, {self._length})", value=sample, place=self.url)
        self._renew_after_fork()
        return self._tables.spans(sample * self.seq_len, sample * self.seq_len + self.seq_len + 1)

    def close(self) -> None:
        """Let go of maps, leases and the store. Harmless when called twice; plans that are alive stay readable."""
        with self._lock:
            self._closed = True
            if self._source is not None:
                self._source.close()
                self._source = None
            self._tables.store.close()

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
            if not self.is_local:
                self._tables = Tables(self._open_store(), self.manifest, self._tables.shards)

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
