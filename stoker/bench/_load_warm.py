"""``stoker bench load --only warm``: batches of local files in the page cache, of one data set and of two.

A run makes 2,048 (a peer's: 256) shuffled batches of (16, 2048) int64 ``input_ids`` and ``labels`` in the trainer's
process, holding each until the next is there, as a training loop does. The number is tokens/s: rows of ``input_ids``,
labels not counted twice.

Limit: ``numpy.take(out=)`` of random rows of 2,049 tokens from one array in memory, and two copies into contiguous int64
arrays that were made before: nothing is allocated, looked up, ordered or checked. What it shares with the others is the
memory traffic.

All files are in the page cache, and the rows say if they were not. Every variant's batches are compared with the tokens
before anything is timed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import CorruptionError
from ..loaders import Mixture, TokenDataset, TokenLoader
from ._load_peers import Elsewhere, Megatron, NanoGPT
from ._load_stream import BATCH, DTYPES, SEQ_LEN, Arrays, Loader, Stepper, Stream
from .frame import Case, Question, Report, Row, Scalar, measure
from .peers import LOAD_PEERS

__all__ = ["MIXED", "WARM", "Documents", "Stoker", "TakeOut", "run_warm"]

WARM, MIXED = "warm local batches", "batches of two sources"


def run_warm(
    *,
    size_bytes: int,
    runs: int,
    warmup: int,
    directory: Path,
    peers: Sequence[str] = tuple(LOAD_PEERS),
    progress: Callable[[], None] | None = None,
) -> Report:
    """Measure loaders over `size_bytes` of tokens, for each token width in turn; see :mod:`stoker.bench.load`."""
    reports = []
    for dtype in DTYPES:
        stream = Stream(size_bytes // np.dtype(dtype).itemsize, dtype)
        warm, mixed = f"{WARM}, {dtype}", f"{MIXED}, {dtype}"
        cases = [
            Case(name=warm, unit="tokens/s", goal_ratio=0.7, goal_peer_ratio=3.0, cache="warm", origin="page cache"),
            Case(name=mixed, unit="tokens/s", cache="warm", origin="page cache"),
        ]
        loaders: list[Loader] = [
            TakeOut(stream, directory, (warm, mixed)),
            Stoker(stream, directory, (warm,)),
            _Mixed(stream, directory, (mixed,)),
            NanoGPT(stream, directory, (warm,)),
            Megatron(stream, directory, (warm,)),
        ]
        elsewhere = [Elsewhere(stream, directory, (warm,), package=package) for package in peers]
        params: dict[str, Scalar] = {"size_bytes": size_bytes, "dtype": dtype, "batch_size": BATCH, "seq_len": SEQ_LEN}
        question = Question(bench="load", cases=cases, params=params)
        variants = [loader.variant() for loader in (*loaders, *elsewhere)]
        report = measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)
        reports.append(replace(report, rows=tuple(_with_version(row, elsewhere) for row in report.rows)))
    return sum(reports[1:], reports[0])


def _with_version(row: Row, elsewhere: Sequence[Elsewhere]) -> Row:
    """The row of a library with what it found out in its own process: its version, and its fastest way to read."""
    for loader in elsewhere:
        if loader.found and loader.name == row.variant:
            version, way = loader.found["version"], loader.found["way"]
            notes = (f"{version}, {way}, in a process of its own",)
            return replace(row, params={**row.params, "version": version}, notes=notes)
    return row


class TakeOut(Stepper):
    """The limit: what memory allows."""

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

    def stepper(self) -> Callable[[], Arrays]:
        return self._step

    def _step(self) -> Arrays:
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
            batch = self._step()
            self.stream.require(self._chosen[self._next] * (SEQ_LEN + 1), *batch, place=self.name)


class Stoker(Stepper):
    """One data set, windowed shuffle."""

    name = "stoker TokenLoader"
    kind = "stoker"

    def open(self) -> None:
        self._sources = [self.write("set", 0, len(self.stream.ends))]
        self._loader = TokenLoader(self._sources[0], batch_size=BATCH, epochs=None)

    def write(self, name: str, first: int, end: int, **options: Any) -> TokenDataset:
        """A data set of the stream's documents [first, end)."""
        url = str(self.files / name)
        self.stream.write(url, first, end)
        return TokenDataset(url, seq_len=SEQ_LEN, **options)

    def stepper(self) -> Callable[[], Any]:
        return self._loader.__next__

    def verify(self) -> None:
        for _ in range(len(self._sources[0]) // BATCH + 1):  # a whole epoch: every sample that the runs will see
            batch = next(self._loader)
            first = self._loader.order(batch["position"].numpy()) * SEQ_LEN
            self.stream.require(first, batch["input_ids"], batch["labels"], place=self.name)

    def close(self) -> None:
        if hasattr(self, "_loader"):
            self._loader.close()
        for dataset in getattr(self, "_sources", ()):
            dataset.close()
        super().close()


class Documents(Stoker):
    """Rows whose tokens are compared with the documents that the loader names."""

    _first_document: dict[str | None, int]
    """Of each source, the number that its first document has in the stream."""

    def verify(self) -> None:
        for step in range(8):
            batch = next(self._loader)
            for origin in self._loader.explain(step):
                parts = [
                    self.stream.document(self._first_document[origin.source] + span.document)[span.start : span.end]
                    for span in origin.spans
                ]
                expected = np.concatenate(parts)[:SEQ_LEN]
                if not np.array_equal(batch["input_ids"][origin.row, : len(expected)].numpy(), expected):
                    raise CorruptionError(
                        f"row {origin.row} must hold the documents that explain names", place=self.name
                    )


class _Mixed(Documents):
    """Two data sets, each half of the documents, at 7 to 3."""

    name = "stoker TokenLoader, two sources"
    notes = ("rows of two data sets at 7 to 3",)

    def open(self) -> None:
        middle, end = len(self.stream.ends) // 2, len(self.stream.ends)
        self._sources = [self.write("a", 0, middle), self.write("b", middle, end)]
        mixture = Mixture({"a": (self._sources[0], 0.7), "b": (self._sources[1], 0.3)}, stop="never")
        self._loader = TokenLoader(mixture, batch_size=BATCH)
        self._first_document = {"a": 0, "b": middle}
