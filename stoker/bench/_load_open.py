"""``stoker bench load --only open``: how soon the first batch is there, fresh or resumed, and however large the data set.

``resume at a far step``
    seconds from opening a local data set until the first batch at the place that a state of step 10^9 names. Limit: the
    same without a state. Of one data set and of a mixture of two.
``state_dict``
    microseconds of a call, of both loaders. Limit: 10, a bound.
``open and first batch``
    seconds in a process that has imported all it needs, of 80,000 shards with 2 x 10^13 tokens. Limit: the same of 4
    shards with 10^9. The tables are synthesised by the writer's own functions from one shard, of which the data files
    that the batch reads are hard links; each shard is one document.
``memory of an open data set``
    MiB that RssAnon and RssShmem have grown by then. Limit: what the small one takes, and 64 MiB.

All files are in the page cache. Batches are compared with the tokens.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptionError, StoreError
from ..loaders import Mixture, TokenDataset, TokenLoader, TokenWriter
from ..loaders._progress import ShardRecord, WriterOptions, load_progress
from ..loaders._table_writer import write_tables
from ..loaders.format import MANIFEST_KEY, shard_key
from ..storage import open_store
from ._load_stream import BATCH, SEQ_LEN, Stream
from ._tiers_node import resident_bytes_of
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["OPEN", "OPEN_MEMORY", "RESUME", "SHARDS", "SHARD_BLOCKS", "STATE", "run_open"]

RESUME, STATE = "resume at a far step", "state_dict"
OPEN, OPEN_MEMORY = "open and first batch", "memory of an open data set"
KINDS = ("one data set", "two sources")

SHARDS, SMALL_SHARDS = 80_000, 4
SHARD_BLOCKS = 120
"""2 x 10^13 tokens in all, and 10^9."""

_FAR_STEP = 10**9
_TIMES = 5  # in a run
_CALLS = 1000
_MOST_STATE_US = 10.0
_MORE_MIB = 64.0
_MIB = 1 << 20
_BLOCK_TOKENS = 2 << 20
_PATTERN = 65_521  # the largest prime that uint16 holds: no block is like another
_MOST_STREAM_TOKENS = 32 << 20
_MOST_PROCESSES = 3
_LEAST_MIB = 4096 / _MIB  # a value must be above 0: a page


def run_open(
    *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None = None
) -> Report:
    """Measure resumes and states over `size_bytes`, 64 MiB at most, and openings in three runs at most."""
    common: dict[str, Any] = {"warmup": warmup, "directory": directory, "progress": progress}
    report = _measure_resumes(size_bytes, runs=runs, **common)
    return report + _measure_openings(runs=min(runs, _MOST_PROCESSES), **common)


# --- resume, and a state ------------------------------------------------------------------------------------------------


def _measure_resumes(size_bytes: int, *, runs: int, directory: Path, **how: Any) -> Report:
    stream = Stream(min(size_bytes // 2, _MOST_STREAM_TOKENS), "uint16")
    starts = _Starts(stream, directory / "resume")
    cases = [
        Case(name=f"{RESUME}, {kind}", unit="s", better="lower", goal_ratio=1.2, cache="warm", origin="page cache")
        for kind in KINDS
    ]
    cases += [
        Case(name=f"{STATE}, {kind}", unit="us", better="lower", goal_ratio=1.0, origin="process memory")
        for kind in KINDS
    ]
    question = Question(
        bench="load",
        cases=cases,
        params={"size_bytes": 2 * len(stream.tokens), "batch_size": BATCH, "seq_len": SEQ_LEN, "step": _FAR_STEP},
    )
    bound = {f"{STATE}, {kind}": Sample(value=_MOST_STATE_US, verified=True) for kind in KINDS}
    variants = [
        Variant(name="fresh start", kind="limit", run=starts.fresh, setup=starts.write, teardown=starts.remove),
        Variant(name="10 us", kind="limit", run=lambda: bound, notes=("a bound, not a measurement",)),
        Variant(name="stoker TokenLoader, resumed", kind="stoker", run=starts.resumed),
        Variant(name="stoker TokenLoader.state_dict", kind="stoker", run=starts.states),
    ]
    return measure(question, variants, runs=runs, directory=directory, **how)


class _Starts:
    """The same data as one set, and as a mixture of two."""

    def __init__(self, stream: Stream, files: Path) -> None:
        self._stream, self._files = stream, files
        self._states: dict[str, dict[str, Any]] = {}

    def write(self) -> None:
        middle = len(self._stream.ends) // 2
        self._stream.write(self._files / "whole")
        self._stream.write(self._files / "a", 0, middle)
        self._stream.write(self._files / "b", middle)
        for kind in KINDS:
            with ExitStack() as stack:
                loader = self._open(kind, stack)
                loader.jump(_FAR_STEP)
                self._states[kind] = loader.state_dict()

    def remove(self) -> None:
        shutil.rmtree(self._files, ignore_errors=True)

    def _open(self, kind: str, stack: ExitStack) -> TokenLoader:
        if kind == KINDS[0]:
            dataset = stack.enter_context(TokenDataset(self._files / "whole", seq_len=SEQ_LEN))
            return stack.enter_context(TokenLoader(dataset, batch_size=BATCH, epochs=None))
        a, b = (stack.enter_context(TokenDataset(self._files / name, seq_len=SEQ_LEN)) for name in "ab")
        mixture = Mixture({"a": (a, 0.7), "b": (b, 0.3)}, stop="never")
        return stack.enter_context(TokenLoader(mixture, batch_size=BATCH))

    def _start(self, kind: str, state: Mapping[str, Any] | None) -> Sample:
        """Seconds until the first batch, which is compared."""
        seconds = []
        for _ in range(_TIMES):
            with ExitStack() as stack:
                began = perf_counter()
                loader = self._open(kind, stack)
                if state is not None:
                    loader.load_state_dict(state)
                batch = next(loader)
                seconds.append(perf_counter() - began)
                self._require(kind, loader, batch, 0 if state is None else _FAR_STEP)
        return Sample(value=statistics.median(seconds), verified=True)

    def _require(self, kind: str, loader: TokenLoader, batch: Mapping[str, Any], step: int) -> None:
        positions = batch["position"].numpy()
        if sorted(positions.tolist()) != list(range(step * BATCH, (step + 1) * BATCH)):
            raise CorruptionError(f"the batch must be step {step}", value=positions.tolist(), place=RESUME)
        if kind == KINDS[0]:
            first = loader.order(positions) * SEQ_LEN
        else:
            middle = int(self._stream.ends[len(self._stream.ends) // 2 - 1])
            origins = {origin.position: origin for origin in loader.explain(step)}
            first = np.array(
                [
                    origins[position].sample * SEQ_LEN + (middle if origins[position].source == "b" else 0)
                    for position in positions.tolist()
                ]
            )
        self._stream.require(first, batch["input_ids"], batch["labels"], place=RESUME)

    def fresh(self) -> Outcome:
        return {f"{RESUME}, {kind}": self._start(kind, None) for kind in KINDS}

    def resumed(self) -> Outcome:
        return {f"{RESUME}, {kind}": self._start(kind, self._states[kind]) for kind in KINDS}

    def states(self) -> Outcome:
        return {f"{STATE}, {kind}": self._state(kind) for kind in KINDS}

    def _state(self, kind: str) -> Sample:
        with ExitStack() as stack:
            loader = self._open(kind, stack)
            loader.load_state_dict(self._states[kind])
            cpu = process_time()
            for _ in range(_CALLS):
                state = loader.state_dict()
            seconds = process_time() - cpu
        if state != self._states[kind]:
            raise CorruptionError("a state that was loaded must come back", value=state, place=STATE)
        return Sample(value=seconds / _CALLS * 1e6, verified=True)


# --- a small and a large data set ---------------------------------------------------------------------------------------


def _measure_openings(*, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None) -> Report:
    small, large = _Opening(directory / "open-small", SMALL_SHARDS), _Opening(directory / "open-large", SHARDS)
    question = Question(
        bench="load",
        cases=[
            Case(name=OPEN, unit="s", better="lower", goal_ratio=1.2, cache="warm", origin="page cache"),
            Case(name=OPEN_MEMORY, unit="MiB", better="lower", goal_ratio=1.0, origin="process memory"),
        ],
        params={"batch_size": BATCH, "seq_len": SEQ_LEN, "block_bytes": 2 * _BLOCK_TOKENS},
    )

    def few() -> Outcome:
        seconds, mib = small.run()
        more = Sample(value=mib + _MORE_MIB, verified=True)
        return {OPEN: Sample(value=seconds, verified=True), OPEN_MEMORY: more}

    def many() -> Outcome:
        seconds, mib = large.run()
        return {OPEN: Sample(value=seconds, verified=True), OPEN_MEMORY: Sample(value=mib, verified=True)}

    variants = [
        Variant(
            name=f"{small.tokens:.1e} tokens, {SMALL_SHARDS} shards",
            kind="limit",
            run=few,
            setup=small.write,
            teardown=small.remove,
            notes=(f"{OPEN_MEMORY}: what it takes and {_MORE_MIB:g} MiB, a bound",),
        ),
        Variant(
            name=f"stoker, {large.tokens:.1e} tokens, {SHARDS:,} shards",
            kind="stoker",
            run=many,
            setup=large.write,
            teardown=large.remove,
            notes=("its tables are synthesised from one shard; of its data files only those of the batch are there",),
        ),
    ]
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


class _SameShard(ShardRecord):
    """One document, the same in each shard: its offsets are known without the file."""

    def read_offsets(self, store: Any, number: int) -> NDArray[np.int64]:
        return np.array([0, self.tokens], np.int64)


class _Opening:
    """A data set of many equal shards, opened in a process of its own."""

    def __init__(self, files: Path, shards: int) -> None:
        self._files, self._shards = files, shards
        self._shard_tokens = SHARD_BLOCKS * _BLOCK_TOKENS
        self.tokens = shards * self._shard_tokens

    def write(self) -> None:
        options = WriterOptions(
            dtype="uint16",
            eos_id=None,
            block_tokens=_BLOCK_TOKENS,
            shard_tokens=self._shard_tokens,
            tokenizer=None,
        )
        writer = TokenWriter(self._files, eos_id=None, shard_bytes=2 * self._shard_tokens, block_tokens=_BLOCK_TOKENS)
        writer.write((np.arange(self._shard_tokens, dtype=np.uint32) % _PATTERN).astype(np.uint16))
        writer.abort()  # the shard and its record are there
        with open_store(self._files) as store:
            (record,) = load_progress(store, self._shard_tokens)
            same = _SameShard(**{name: getattr(record, name) for name in ShardRecord.__dataclass_fields__})
            manifest = write_tables(store, options, [same] * self._shards)
            store.create(MANIFEST_KEY, manifest.encode())
        with TokenDataset(self._files, seq_len=SEQ_LEN) as dataset, TokenLoader(dataset, batch_size=BATCH) as loader:
            shards = set((loader.order(np.arange(BATCH)) * SEQ_LEN // self._shard_tokens).tolist())
        for shard in shards - {0}:
            os.link(self._files / shard_key(0), self._files / shard_key(shard))

    def remove(self) -> None:
        shutil.rmtree(self._files, ignore_errors=True)

    def run(self) -> tuple[float, float]:
        """Seconds and MiB of a fresh process."""
        command = [sys.executable, "-m", __name__, str(self._files), str(self._shard_tokens)]
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode != 0:
            raise StoreError("the opening process must end well", value=done.stderr[-300:], place=OPEN)
        seconds, mib = json.loads(done.stdout)
        return seconds, max(_LEAST_MIB, mib)


def _main(files: Path, shard_tokens: int) -> tuple[float, float]:
    """Open the data set and take a batch, some times: seconds of the median, and MiB of the first."""
    grown, seconds = list[int](), list[float]()
    for _ in range(_TIMES):
        before, began = resident_bytes_of(os.getpid()), perf_counter()
        with TokenDataset(files, seq_len=SEQ_LEN) as dataset, TokenLoader(dataset, batch_size=BATCH) as loader:
            batch = next(loader)
            seconds.append(perf_counter() - began)
            grown.append(resident_bytes_of(os.getpid()) - before)
            _require_pattern(loader.order(batch["position"].numpy()).tolist(), batch, shard_tokens)
    return statistics.median(seconds), grown[0] / _MIB


def _require_pattern(samples: Sequence[int], batch: Mapping[str, Any], shard_tokens: int) -> None:
    for row, sample in enumerate(samples):
        tokens = (sample * SEQ_LEN + np.arange(SEQ_LEN + 1)) % shard_tokens % _PATTERN
        if not (
            np.array_equal(batch["input_ids"][row], tokens[:-1]) and np.array_equal(batch["labels"][row], tokens[1:])
        ):
            raise CorruptionError(f"row {row} must be sample {sample}", place=OPEN)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(Path(sys.argv[1]), int(sys.argv[2]))))
