"""How fast are warm local batches, beside what memory allows and beside how others load tokens?

Command: ``stoker bench load [--size 256MiB] [--runs 7] [--dir DIR] [--json]``.

Random tokens in documents of about a thousand are written once for each variant's own format, for uint16 and for uint32.
A run makes 2,048 (a peer's: 256) shuffled batches of (16, 2048) int64 ``input_ids`` and ``labels`` in the trainer's process, holding
each until the next is there, as a training loop does. The number is tokens/s: rows of ``input_ids``, labels not counted
twice.

Limit: ``numpy.take(out=)`` of random rows of 2,049 tokens from one array in memory, and two copies into contiguous int64
arrays that were made before: nothing is allocated, looked up, ordered or checked. What it shares with the others is the
memory traffic.

All files are in the page cache, and the rows say if they were not. Every variant's batches are compared with the tokens
before anything is timed. Not measured here: cold reads, object stores, accelerators, small models' steps.
"""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ..errors import ConfigError, CorruptionError
from ..loaders import TokenDataset, TokenLoader, TokenWriter
from .frame import Case, Outcome, Question, Report, Sample, Scalar, Variant, measure, resident_bytes

__all__ = ["run_load"]

BATCH, SEQ_LEN = 16, 2048
_BATCHES_PER_RUN = 2048
_PEER_SLOWER = 8  # so many times fewer batches in a peer's run: it takes as long all the same
_DOCUMENT_TOKENS = 1000  # on average; lengths are uniform on [1, 1999]
_DTYPES = ("uint16", "uint32")

Arrays = tuple[NDArray[np.int64], NDArray[np.int64]]


def run_load(
    *, size_bytes: int, runs: int, directory: str | Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Measure loaders over `size_bytes` of tokens, for each token width in turn.

    Needs that much memory and three times as much space below `directory`, which is left as it was found.

    Raises:
        ConfigError: fewer tokens than 32 batches hold.
        CorruptionError: the limit or stoker returned a wrong token.
        StoreFull, OSError: no space.
    """
    least = 32 * BATCH * SEQ_LEN * 4
    if size_bytes < least:
        raise ConfigError(f"size must be >= {least} bytes, 32 batches", value=size_bytes, place="stoker bench load")
    reports = []
    for dtype in _DTYPES:
        tokens = size_bytes // np.dtype(dtype).itemsize
        stream = _Stream(tokens, dtype)
        batches = min(_BATCHES_PER_RUN, tokens // (BATCH * SEQ_LEN))
        case = Case(
            name=f"warm local batches, {dtype}",
            unit="tokens/s",
            goal_ratio=0.7,
            cache="warm",
            origin="page cache",
        )
        params: dict[str, Scalar] = {
            "size_bytes": size_bytes,
            "dtype": dtype,
            "batch_size": BATCH,
            "seq_len": SEQ_LEN,
        }
        question = Question(bench="load", cases=[case], params=params)
        loaders = [kind(stream, Path(directory), batches) for kind in (_Limit, _Stoker, _NanoGPT, _Megatron)]
        variants = [loader.variant() for loader in loaders]
        reports.append(measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress))
    return sum(reports[1:], reports[0])


class _Stream:
    """The tokens that every variant loads, and where its documents end."""

    def __init__(self, count: int, dtype: str) -> None:
        generator = np.random.default_rng(0)
        self.tokens = generator.integers(0, 65_536, count, dtype=dtype)
        lengths = generator.integers(1, 2 * _DOCUMENT_TOKENS, 2 * count // _DOCUMENT_TOKENS)
        ends = np.cumsum(lengths)
        self.ends = np.append(ends[ends < count], count)

    def documents(self) -> Iterator[NDArray[Any]]:
        start = 0
        for end in self.ends.tolist():
            yield self.tokens[start:end]
            start = end

    def require(self, first: NDArray[np.int64], input_ids: Any, labels: Any, *, place: str) -> None:
        """Raise CorruptionError unless row i holds the tokens from ``first[i]`` on, and the labels those after them."""
        for row, start in enumerate(first.tolist()):
            expected = self.tokens[start : start + SEQ_LEN + 1].astype(np.int64)
            for name, got, wanted in (
                ("input_ids", input_ids, expected[:-1]),
                ("labels", labels, expected[1:]),
            ):
                if not np.array_equal(np.asarray(got[row]), wanted):
                    raise CorruptionError(f"{name} of row {row} must be the tokens from {start} on", place=place)


class _Loader(ABC):
    """One way to load. `files` is what it wrote, `step` makes a batch."""

    name: str
    kind: Any = "peer"
    notes: tuple[str, ...] = ()

    def __init__(self, stream: _Stream, directory: Path, batches: int) -> None:
        self.stream = stream
        self.batches = batches if self.kind != "peer" else max(1, batches // _PEER_SLOWER)
        self.files = directory / f"{type(self).__name__.strip('_').lower()}-{stream.tokens.dtype}"

    def variant(self) -> Variant:
        return Variant(
            name=self.name,
            kind=self.kind,
            run=self.run,
            setup=self.open,
            teardown=self.close,
            verify=self.verify,
            params={"batches": self.batches},
            notes=self.notes,
        )

    @abstractmethod
    def open(self) -> None:
        """Write the files and make ready."""

    @abstractmethod
    def step(self) -> Any:
        """The next batch."""

    @abstractmethod
    def verify(self) -> None:
        """Compare the next batches with the stream."""

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.files, ignore_errors=True)

    def run(self) -> Outcome:
        step, held = self.step, list[Any]()
        started = perf_counter()
        for _ in range(self.batches):
            held[:] = [step()]  # the batch before is let go only now
        seconds = perf_counter() - started
        rate = self.batches * BATCH * SEQ_LEN / seconds
        if not self.files.is_dir():
            return Sample(value=rate, origin="process memory")
        size = sum(file.stat().st_size for file in self.files.rglob("*") if file.is_file())
        return Sample(value=rate, cache=None if resident_bytes(self.files) >= 0.99 * size else "cold")


class _Limit(_Loader):
    name = "numpy take(out=), two widened outputs"
    kind = "limit"

    def open(self) -> None:
        tokens = self.stream.tokens
        self._rows = tokens[: len(tokens) // (SEQ_LEN + 1) * (SEQ_LEN + 1)].reshape(-1, SEQ_LEN + 1)
        order = np.random.default_rng(1).permutation(len(self._rows))
        self._chosen = order[: len(order) // BATCH * BATCH].reshape(-1, BATCH)
        self._raw = np.empty((BATCH, SEQ_LEN + 1), tokens.dtype)
        self._out = [tuple(np.empty((BATCH, SEQ_LEN), np.int64) for _ in range(2)) for _ in range(2)]
        self._next = 0

    def step(self) -> Arrays:
        self._next = step = (self._next + 1) % len(self._chosen)
        raw = self._raw
        # "clip" is the mode that does not copy `out` once more; no index is out of range.
        np.take(self._rows, self._chosen[step], 0, out=raw, mode="clip")
        input_ids, labels = self._out[step & 1]
        np.copyto(input_ids, raw[:, :-1], casting="unsafe")
        np.copyto(labels, raw[:, 1:], casting="unsafe")
        return input_ids, labels

    def verify(self) -> None:
        for _ in range(4):
            batch = self.step()
            self.stream.require(self._chosen[self._next] * (SEQ_LEN + 1), *batch, place=self.name)


class _Stoker(_Loader):
    name = "stoker TokenLoader"
    kind = "stoker"

    def open(self) -> None:
        with TokenWriter(str(self.files), dtype=str(self.stream.tokens.dtype), eos_id=None) as writer:
            for document in self.stream.documents():
                writer.write(document)
        self._dataset = TokenDataset(str(self.files), seq_len=SEQ_LEN)
        self._loader = TokenLoader(self._dataset, batch_size=BATCH, epochs=None)
        self.step = self._loader.__next__  # type: ignore[method-assign]

    def step(self) -> Any:  # replaced by open(), so that a step costs what it costs a user
        raise NotImplementedError

    def verify(self) -> None:
        for _ in range(len(self._dataset) // BATCH + 1):  # a whole epoch: every sample that the runs will see
            batch = self.step()
            first = self._loader.order(batch["position"].numpy()) * SEQ_LEN
            self.stream.require(first, batch["input_ids"], batch["labels"], place=self.name)

    def close(self) -> None:
        if hasattr(self, "_loader"):
            self._loader.close()
            self._dataset.close()
        super().close()


class _NanoGPT(_Loader):
    """As nanoGPT's train.py loads: a map opened anew for each batch, random offsets, each row widened, then stacked."""

    name = "nanoGPT memmap"
    notes = ("rows drawn with replacement, as its train.py does; no order, no state",)

    def open(self) -> None:
        self.files.mkdir(parents=True)
        self._path = self.files / "train.bin"
        self.stream.tokens.tofile(self._path)
        self._generator = torch.Generator().manual_seed(1)

    def step(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(self._path, dtype=self.stream.tokens.dtype, mode="r")
        self._starts = starts = torch.randint(len(data) - SEQ_LEN, (BATCH,), generator=self._generator)
        input_ids = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        labels = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
        return input_ids, labels

    def verify(self) -> None:
        for _ in range(16):
            batch = self.step()
            self.stream.require(self._starts.numpy(), *batch, place=self.name)


class _IndexedSamples(Dataset[dict[str, torch.Tensor]]):
    """As Megatron's GPT data set reads: a map of all documents, their offsets, and a table of where samples start."""

    def __init__(self, path: Path, dtype: np.dtype[Any], ends: NDArray[np.int64]) -> None:
        self._buffer: memoryview = np.memmap(path, mode="r").data
        self._dtype = dtype
        self._starts = np.concatenate([[0], ends[:-1]])
        self._lengths = np.diff(ends, prepend=0)
        num_samples = (int(ends[-1]) - 1) // SEQ_LEN
        first = np.arange(num_samples + 1) * SEQ_LEN
        document = np.searchsorted(ends, first, side="right")
        self._sample_index = np.stack([document, first - self._starts[document]], axis=1)
        self._shuffle_index = np.random.default_rng(1).permutation(num_samples)

    def __len__(self) -> int:
        return len(self._shuffle_index)

    def _tokens(self, document: int, offset: int, length: int) -> NDArray[Any]:
        start = (int(self._starts[document]) + offset) * self._dtype.itemsize
        return np.frombuffer(self._buffer, dtype=self._dtype, count=length, offset=start)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._shuffle_index[index]
        (first, start), (last, end) = self._sample_index[sample].tolist(), self._sample_index[sample + 1].tolist()
        if first == last:
            parts = [self._tokens(first, start, end - start + 1)]
        else:
            parts = [self._tokens(first, start, int(self._lengths[first]) - start)]
            parts += [self._tokens(document, 0, int(self._lengths[document])) for document in range(first + 1, last)]
            parts.append(self._tokens(last, 0, end + 1))
        text = torch.from_numpy(np.concatenate(parts)).long()
        return {"tokens": text[:-1].contiguous(), "labels": text[1:].contiguous()}

    def first_tokens(self, indices: list[int]) -> NDArray[np.int64]:
        return self._shuffle_index[indices] * SEQ_LEN


class _Megatron(_Loader):
    name = "Megatron-style map data set"
    notes = (
        "tokens and labels only: no loss mask, position ids or attention mask; documents unshuffled",
        "DataLoader without workers: batches handed over by one or two of them came seven times slower when this was made",
    )

    def open(self) -> None:
        self.files.mkdir(parents=True)
        path = self.files / "text_document.bin"
        self.stream.tokens.tofile(path)
        self._data = _IndexedSamples(path, self.stream.tokens.dtype, self.stream.ends)
        self._drawn: list[int] = []
        self._batches: Iterator[dict[str, torch.Tensor]] = iter(())

    def _epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        sampler = RandomSampler(self._data, generator=torch.Generator().manual_seed(1))
        return iter(DataLoader(self._data, batch_size=BATCH, sampler=sampler, drop_last=True))

    def step(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._epoch()
            batch = next(self._batches)
        return batch

    def verify(self) -> None:
        for start in range(0, 16 * BATCH, BATCH):
            indices = list(range(start, start + BATCH))
            batch = next(iter(DataLoader(self._data, batch_size=BATCH, sampler=indices)))
            first = self._data.first_tokens(indices)
            self.stream.require(first, batch["tokens"], batch["labels"], place=self.name)

    def close(self) -> None:
        if hasattr(self, "_data"):
            self._batches = iter(())
            del self._data  # the map, before its file
        super().close()
