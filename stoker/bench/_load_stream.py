"""What every variant of ``stoker bench load`` shares: the tokens, the shape of a batch, how a run is timed."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptionError
from ..loaders import TokenWriter
from .frame import Cache, Kind, Outcome, Sample, Variant, resident_bytes

__all__ = ["BATCH", "DTYPES", "SEQ_LEN", "Arrays", "Loader", "Stepper", "Stream", "batches_of", "cpu_s_per_gtoken"]

BATCH, SEQ_LEN = 16, 2048
DTYPES = ("uint16", "uint32")
_BATCHES_PER_RUN = 2048
_DOCUMENT_TOKENS = 1000  # on average; lengths are uniform on [1, 1999]
_PEER_SLOWER = 8  # so many times fewer batches in a peer's run: it takes as long all the same

Arrays: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


class Stream:
    """The tokens that every variant loads, and where its documents end."""

    def __init__(self, count: int, dtype: str) -> None:
        generator = np.random.default_rng(0)
        self.tokens = generator.integers(0, 65_536, count, dtype=dtype)
        lengths = generator.integers(1, 2 * _DOCUMENT_TOKENS, 2 * count // _DOCUMENT_TOKENS)
        ends = np.cumsum(lengths)
        self.ends = np.append(ends[ends < count], count)

    def document(self, number: int) -> NDArray[Any]:
        """The tokens of one document."""
        return self.tokens[self.ends[number - 1] if number else 0 : self.ends[number]]

    def write(self, url: str | Path, first: int = 0, end: int | None = None, **options: Any) -> None:
        """Store documents [first, end) as a data set; `options` are those of the writer."""
        with TokenWriter(url, dtype=str(self.tokens.dtype), eos_id=None, **options) as writer:
            for number in range(first, len(self.ends) if end is None else end):
                writer.write(self.document(number))

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


def batches_of(stream: Stream) -> int:
    """Batches of a run: as many as `stream` has, but no more than say enough."""
    return min(_BATCHES_PER_RUN, len(stream.tokens) // (BATCH * SEQ_LEN))


def cpu_s_per_gtoken(cpu_seconds: float, tokens: int) -> float:
    """Seconds of processors for 10^9 tokens.

    >>> cpu_s_per_gtoken(0.5, 250_000_000)
    2.0
    """
    return cpu_seconds / tokens * 1e9


class Loader(ABC):
    """One way to load, which answers `cases`. `files` is what it wrote."""

    name: str
    kind: Kind = "peer"
    cases: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def __init__(self, stream: Stream, directory: Path, cases: tuple[str, ...]) -> None:
        self.stream, self.cases = stream, cases
        self.dtype = str(stream.tokens.dtype)
        batches = batches_of(stream)
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
    def verify(self) -> None:
        """Compare the next batches with the stream."""

    @abstractmethod
    def timed(self) -> tuple[float, float]:
        """Seconds, and seconds of processors, that the batches of one run took."""

    def close(self) -> None:
        """Remove the files."""
        shutil.rmtree(self.files, ignore_errors=True)

    def run(self) -> Outcome:
        seconds, cpu_seconds = self.timed()
        tokens = self.batches * BATCH * SEQ_LEN
        sample = self.sample(tokens / seconds, cpu_s_per_gtoken(cpu_seconds, tokens))
        return dict.fromkeys(self.cases, sample)

    def sample(self, value: float, cpu: float) -> Sample:
        """A value with the state of the page cache that it was measured in."""
        if not self.files.is_dir():
            return Sample(value=value, origin="process memory", cpu_s_per_gtoken=cpu)
        size = sum(file.stat().st_size for file in self.files.rglob("*") if file.is_file())
        cache: Cache | None = None if resident_bytes(self.files) >= 0.99 * size else "cold"
        return Sample(value=value, cache=cache, cpu_s_per_gtoken=cpu)


class Stepper(Loader):
    """A loader whose batches are made in this process."""

    @abstractmethod
    def stepper(self) -> Callable[[], Any]:
        """What makes the next batch at each call, with nothing around it: a step costs what it costs a user."""

    def timed(self) -> tuple[float, float]:
        step, held = self.stepper(), list[Any]()
        cpu, started = process_time(), perf_counter()
        for _ in range(self.batches):
            held[:] = [step()]  # the batch before is let go only now
        return perf_counter() - started, process_time() - cpu
