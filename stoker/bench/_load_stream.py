"""What every variant of ``stoker bench load`` shares: the tokens, the shape of a batch, how a run is timed."""

import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from time import perf_counter, process_time
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptionError
from .frame import Outcome, Sample, Variant, resident_bytes

__all__ = ["BATCH", "BEST_FIT", "CPU", "MIXED", "SEQ_LEN", "WARM", "Arrays", "Loader", "Stream"]

BATCH, SEQ_LEN = 16, 2048
# The cases, each once for each dtype.
WARM, CPU = "warm local batches", "CPU of warm batches"
BEST_FIT, MIXED = "best_fit batches", "batches of two sources"
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


class Loader(ABC):
    """One way to load. `files` is what it wrote, `step` makes a batch."""

    name: str
    kind: Any = "peer"
    cases: tuple[str, ...] = (WARM, CPU)
    notes: tuple[str, ...] = ()

    def __init__(self, stream: Stream, directory: Path, batches: int) -> None:
        self.stream = stream
        self.dtype = str(stream.tokens.dtype)
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

    def timed(self) -> tuple[float, float]:
        """Seconds, and seconds of processors, that the batches of one run took."""
        step, held = self.step, list[Any]()
        cpu, started = process_time(), perf_counter()
        for _ in range(self.batches):
            held[:] = [step()]  # the batch before is let go only now
        return perf_counter() - started, process_time() - cpu

    def run(self) -> Outcome:
        seconds, cpu_seconds = self.timed()
        tokens = self.batches * BATCH * SEQ_LEN
        outcome = {}
        for case in self.cases:
            if case == CPU:
                outcome[f"{case}, {self.dtype}"] = self.sample(cpu_seconds / tokens * 1e9)
            else:
                outcome[f"{case}, {self.dtype}"] = self.sample(tokens / seconds)
        return outcome

    def sample(self, value: float) -> Sample:
        """A value with the state of the page cache that it was measured in."""
        if not self.files.is_dir():
            return Sample(value=value, origin="process memory")
        size = sum(file.stat().st_size for file in self.files.rglob("*") if file.is_file())
        return Sample(value=value, cache=None if resident_bytes(self.files) >= 0.99 * size else "cold")
