"""``stoker bench load --only memory``: what a million batches leave in a process.

A process of its own loads batches of (4, 32) from a small local data set, epoch after epoch.

``memory after 10^6 batches``
    MiB that its RssAnon and RssShmem (what no file gives back) are above what they were after the first hundredth. Limit:
    16 MiB, a bound. One batch in a thousand is compared with the tokens.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from ..errors import CorruptionError, StoreError
from ..loaders import TokenDataset, TokenLoader
from ._load_stream import Stream, cpu_s_per_gtoken
from ._tiers_node import resident_bytes_of
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["BATCHES", "MEMORY", "run_memory"]

BATCHES = 1_000_000
MEMORY = "memory after 10^6 batches"
_BATCH, _SEQ_LEN = 4, 32
_STREAM_TOKENS = 1 << 20
_MOST_MIB = 16.0
_COMPARE_EVERY = 1000
_LEAST_MIB = 4096 / (1 << 20)
"""A value must be above 0: a page."""


def run_memory(
    *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None = None
) -> Report:
    """Measure once, whatever `runs` and `warmup`; `size_bytes` is not used, the data set has 2 MiB."""
    case = Case(name=MEMORY, unit="MiB", better="lower", goal_ratio=1.0, cache="warm", origin="page cache")
    question = Question(
        bench="load", cases=[case], params={"batches": BATCHES, "batch_size": _BATCH, "seq_len": _SEQ_LEN}
    )
    bound = Sample(value=_MOST_MIB, verified=True)
    variants = [
        Variant(name="16 MiB", kind="limit", run=lambda: bound, notes=("a bound, not a measurement",)),
        Variant(name="stoker TokenLoader", kind="stoker", run=lambda: _in_a_process(directory, BATCHES)),
    ]
    return measure(question, variants, runs=1, warmup=0, directory=directory, progress=progress)


def _in_a_process(directory: Path, batches: int) -> Outcome:
    command = [sys.executable, "-m", __name__, str(directory), str(batches)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise StoreError("the loading process must end well", value=done.stderr[-300:], place=MEMORY)
    found: dict[str, float] = json.loads(done.stdout)
    tokens = batches * _BATCH * _SEQ_LEN
    cpu = cpu_s_per_gtoken(found["cpu_seconds"], tokens)
    return Sample(value=max(_LEAST_MIB, found["growth_mib"]), verified=True, cpu_s_per_gtoken=cpu)


def _main(directory: Path, batches: int) -> dict[str, float]:
    stream = Stream(_STREAM_TOKENS, "uint16")
    with tempfile.TemporaryDirectory(prefix="memory-", dir=directory) as url:
        stream.write(url)
        with (
            TokenDataset(url, seq_len=_SEQ_LEN) as dataset,
            TokenLoader(dataset, batch_size=_BATCH, epochs=None) as loader,
        ):
            before = 0
            cpu, started = process_time(), perf_counter()
            for number in range(batches):
                batch = next(loader)
                if number % _COMPARE_EVERY == 0:
                    _require(stream, loader, batch)
                if number == batches // 100:
                    before = resident_bytes_of(os.getpid())
            seconds, cpu_seconds = perf_counter() - started, process_time() - cpu
            growth = resident_bytes_of(os.getpid()) - before
    return {"growth_mib": growth / (1 << 20), "seconds": seconds, "cpu_seconds": cpu_seconds}


def _require(stream: Stream, loader: TokenLoader, batch: dict[str, Any]) -> None:
    for row, sample in enumerate(loader.order(batch["position"].numpy()).tolist()):
        first = sample * _SEQ_LEN
        expected = stream.tokens[first : first + _SEQ_LEN + 1]
        if not (batch["input_ids"][row].numpy() == expected[:-1]).all() or batch["labels"][row, -1] != expected[-1]:
            raise CorruptionError(f"row {row} must be the tokens from {first} on", place=MEMORY)


if __name__ == "__main__":
    sys.stdout.write(json.dumps(_main(Path(sys.argv[1]), int(sys.argv[2]))))
