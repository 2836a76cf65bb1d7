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

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, CorruptionError
from ..loaders import Mixture, TokenDataset, TokenLoader, TokenWriter
from ._load_peers import Elsewhere, Megatron, NanoGPT
from ._load_stream import BATCH, BEST_FIT, CPU, MIXED, SEQ_LEN, WARM, Arrays, Loader, Stream
from .frame import Case, Question, Report, Scalar, measure
from .peers import LOAD_PEERS

__all__ = ["run_load"]

_BATCHES_PER_RUN = 2048
_DTYPES = ("uint16", "uint32")


def run_load(
    *,
    size_bytes: int,
    runs: int,
    directory: str | Path,
    warmup: int = 1,
    peers: Sequence[str] = tuple(LOAD_PEERS),
    progress: Callable[[], None] | None = None,
) -> Report:
    """Measure loaders over `size_bytes` of tokens, for each token width in turn.

    Needs three times that much memory and nine times as much space below `directory`, which is left as it was found.
    `peers` are packages of :data:`~stoker.bench.peers.LOAD_PEERS`; one that is not installed becomes a note.

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
        stream = Stream(tokens, dtype)
        batches = min(_BATCHES_PER_RUN, tokens // (BATCH * SEQ_LEN))
        common: dict[str, Any] = {"cache": "warm", "origin": "page cache"}
        cases = [Case(name=f"{WARM}, {dtype}", unit="tokens/s", goal_ratio=0.7, **common)]
        cases += [Case(name=f"{CPU}, {dtype}", unit="CPU-s/Gtoken", better="lower", **common)]
        cases += [Case(name=f"{name}, {dtype}", unit="tokens/s", **common) for name in (BEST_FIT, MIXED)]
        params: dict[str, Scalar] = {
            "size_bytes": size_bytes,
            "dtype": dtype,
            "batch_size": BATCH,
            "seq_len": SEQ_LEN,
        }
        question = Question(bench="load", cases=cases, params=params)
        kinds = (_Limit, _Stoker, _BestFit, _Mixed, NanoGPT, Megatron)
        loaders: list[Loader] = [kind(stream, Path(directory), batches) for kind in kinds]
        elsewhere = [Elsewhere(stream, Path(directory), batches, package=package) for package in peers]
        variants = [loader.variant() for loader in (*loaders, *elsewhere)]
        report = measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)
        found = {loader.name: loader.found for loader in elsewhere if loader.found}
        rows = [
            replace(
                row,
                params={**row.params, "version": found[row.variant]["version"]},
                notes=(f"{found[row.variant]['version']}, {found[row.variant]['way']}, in a process of its own",),
            )
            if row.variant in found
            else row
            for row in report.rows
        ]
        reports.append(replace(report, rows=tuple(rows)))
    return sum(reports[1:], reports[0])


class _Limit(Loader):
    name = "numpy take(out=), two widened outputs"
    kind = "limit"
    cases = (WARM, CPU, BEST_FIT, MIXED)

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


class _Stoker(Loader):
    name = "stoker TokenLoader"
    kind = "stoker"

    def open(self) -> None:
        self._sources = [self.write("set", 0, len(self.stream.ends))]
        self.start(TokenLoader(self._sources[0], batch_size=BATCH, epochs=None))

    def write(self, name: str, first: int, end: int, **options: Any) -> TokenDataset:
        """A data set of the stream's documents [first, end)."""
        url = str(self.files / name)
        with TokenWriter(url, dtype=self.dtype, eos_id=None) as writer:
            for number in range(first, end):
                writer.write(self.stream.document(number))
        return TokenDataset(url, seq_len=SEQ_LEN, **options)

    def start(self, loader: TokenLoader) -> None:
        self._loader = loader
        self.step = loader.__next__  # type: ignore[method-assign]

    def step(self) -> Any:  # replaced by start(), so that a step costs what it costs a user
        raise NotImplementedError

    def verify(self) -> None:
        for _ in range(len(self._sources[0]) // BATCH + 1):  # a whole epoch: every sample that the runs will see
            batch = self.step()
            first = self._loader.order(batch["position"].numpy()) * SEQ_LEN
            self.stream.require(first, batch["input_ids"], batch["labels"], place=self.name)

    def close(self) -> None:
        if hasattr(self, "_loader"):
            self._loader.close()
        for dataset in getattr(self, "_sources", ()):
            dataset.close()
        super().close()


class _BestFit(_Stoker):
    """Whole documents packed by best fit, with all keys of a packed batch."""

    name = "stoker TokenLoader, best_fit"
    cases = (BEST_FIT,)
    notes = ("with position_ids, doc_ids, loss_mask and cu_seqlens, which the limit does not make",)

    def open(self) -> None:
        self._sources = [self.write("set", 0, len(self.stream.ends), packing="best_fit")]
        self.start(TokenLoader(self._sources[0], batch_size=BATCH, epochs=None))
        self._first_document: dict[str | None, int] = {None: 0}

    def verify(self) -> None:
        """Each token of some batches against the documents that explain() names."""
        for step in range(8):
            batch = self.step()
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


class _Mixed(_BestFit):
    """Two data sets, each half of the documents, at 7 to 3."""

    name = "stoker TokenLoader, two sources"
    cases = (MIXED,)
    notes = ("rows of two data sets at 7 to 3",)

    def open(self) -> None:
        middle, end = len(self.stream.ends) // 2, len(self.stream.ends)
        self._sources = [self.write("a", 0, middle), self.write("b", middle, end)]
        mixture = Mixture({"a": (self._sources[0], 0.7), "b": (self._sources[1], 0.3)}, stop="never")
        self.start(TokenLoader(mixture, batch_size=BATCH))
        self._first_document = {"a": 0, "b": middle}
