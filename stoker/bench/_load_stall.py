"""``stoker bench load --only stall``: a trainer that needs 80 % of what its store gives, and a small cache.

The store is an S3 server on this machine behind a proxy that carries 4 MB/s. The trainer takes a batch of (16, 2048) and
then computes (sleeps) for as long as its tokens take at 80 % of that. Blocks have 256 KiB and the shuffle 8 lanes of 4, so
that windows pass in seconds; the cache holds 1.25 of them.

``stall at 80 % of a throttled store``
    percent of the time that the trainer spends in ``next``, from when the first window has passed, beyond what ``next``
    takes at the same pace and in the same order where all blocks are local files in memory: that is the gather's. Limit:
    0.5 %, a bound.

Every batch is compared with the tokens while the trainer "computes".
"""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, process_time, sleep

from ..loaders import TokenDataset, TokenLoader
from ..loaders.order import Window
from ._load_store import ServedSet, empty_cache, served, shared_memory_for
from ._load_stream import BATCH, SEQ_LEN, Stream, cpu_s_per_gtoken
from ._tiers_node import Link
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["LINK_BYTES_PER_S", "STALL", "WINDOWS", "run_stall"]

STALL = "stall at 80 % of a throttled store"
LINK_BYTES_PER_S = 4e6
WINDOWS = 4
"""That the trainer passes: the first is not counted."""

_SHARE = 0.8
_WINDOW = Window(lanes=8, blocks=4)
_BLOCK_BYTES = 256 << 10
_FILE_BYTES = _BLOCK_BYTES + 4096
"""Of a block in the tier, with its header."""
_CACHE_WINDOWS = 1.25
_MOST_PERCENT = 0.5
_MOST_RUNS = 2
_LEAST_PERCENT = 0.001
"""A value must be above 0: what can't be told from none."""
_RESIDENT_STEPS = 64
_BATCH_BYTES = BATCH * SEQ_LEN * 2


def run_stall(
    *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None = None
) -> Report:
    """Measure two runs at most, without a warm-up; `size_bytes` is not used, the data set has a window more than a run."""
    blocks = _WINDOW.lanes * _WINDOW.blocks
    window_bytes, ram_bytes = blocks * _BLOCK_BYTES, int(_CACHE_WINDOWS * blocks * _FILE_BYTES)
    stream = Stream((WINDOWS + 1) * window_bytes // 2, "uint16")
    with ExitStack() as stack:
        shm, no_shm = stack.enter_context(shared_memory_for(2 * ram_bytes))
        if shm is None:
            return Report(machine={}, rows=(), notes=(f"the stall {no_shm}",))
        served_set, no_store = stack.enter_context(served(stream, directory, block_tokens=_BLOCK_BYTES // 2))
        if served_set is None:
            return Report(machine={}, rows=(), notes=(f"the stall {no_store}",))
        link = stack.enter_context(_link(str(served_set.options["endpoint_url"])))
        link.limit(LINK_BYTES_PER_S)
        trainer = _Trainer(served_set, link, shm / "tier", ram_bytes, window_bytes)
        case = Case(name=STALL, unit="%", better="lower", goal_ratio=1.0, cache="warm", origin="object store")
        question = Question(
            bench="load",
            cases=[case],
            params={
                "link_bytes_per_s": LINK_BYTES_PER_S,
                "share": _SHARE,
                "block_bytes": _BLOCK_BYTES,
                "window_bytes": window_bytes,
                "ram_bytes": ram_bytes,
                "batch_size": BATCH,
                "seq_len": SEQ_LEN,
            },
        )
        bound = Sample(value=_MOST_PERCENT, verified=True)
        note = "cache of 1.25 windows, empty at the start; the server has the bytes in its memory"
        variants = [
            Variant(name="0.5 %", kind="limit", run=lambda: bound, notes=("a bound, not a measurement",)),
            Variant(name="stoker TokenLoader, S3", kind="stoker", run=trainer.run, notes=(note,)),
        ]
        return measure(question, variants, runs=min(runs, _MOST_RUNS), warmup=0, directory=directory, progress=progress)


@contextmanager
def _link(server_url: str) -> Iterator[Link]:
    """A proxy before the store, in a process of its own, that carries so many bytes a second."""
    command = [sys.executable, "-m", "stoker.bench._tiers_node", "link", server_url]
    with (
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
        ExitStack() as stack,
    ):
        stack.callback(process.kill)
        yield Link(process)


class _Trainer:
    """Takes batches at a steady pace from an empty cache."""

    def __init__(self, served_set: ServedSet, link: Link, tier: Path, ram_bytes: int, window_bytes: int) -> None:
        self._set, self._tier, self._ram_bytes = served_set, tier, ram_bytes
        self._options = {**served_set.options, "endpoint_url": link.endpoint_url}
        self._steps_per_window = window_bytes // _BATCH_BYTES

    def run(self) -> Outcome:
        gather_s = self._resident_s()
        with (
            empty_cache(self._tier, self._ram_bytes) as cache,
            TokenDataset(self._set.url, seq_len=SEQ_LEN, cache=cache, storage_options=self._options) as dataset,
            TokenLoader(dataset, batch_size=BATCH, shuffle=_WINDOW) as loader,
        ):
            for _ in range(self._steps_per_window):
                self._train(loader)
            began = perf_counter()
            steps = [self._train(loader) for _ in range((WINDOWS - 1) * self._steps_per_window)]
            seconds = perf_counter() - began
        stall_s = sum(waited_s for waited_s, _ in steps) - len(steps) * gather_s
        cpu = cpu_s_per_gtoken(sum(cpu_s for _, cpu_s in steps), len(steps) * BATCH * SEQ_LEN)
        return Sample(value=max(_LEAST_PERCENT, 100 * stall_s / seconds), verified=True, cpu_s_per_gtoken=cpu)

    def _resident_s(self) -> float:
        """Mean seconds of ``next`` over local files, after the blocks' first use, at the same pace."""
        with (
            TokenDataset(self._set.files, seq_len=SEQ_LEN) as dataset,
            TokenLoader(dataset, batch_size=BATCH, shuffle=_WINDOW) as loader,
        ):
            for _ in range(self._steps_per_window):
                next(loader)
            waits = [self._train(loader)[0] for _ in range(_RESIDENT_STEPS)]
        return statistics.mean(waits)

    def _train(self, loader: TokenLoader) -> tuple[float, float]:
        """One step: seconds that it waited for the batch, and of processors but for the comparison."""
        cpu, began = process_time(), perf_counter()
        batch = next(loader)
        waited_s = perf_counter() - began
        compared = process_time()
        first = loader.order(batch["position"].numpy()) * SEQ_LEN
        self._set.stream.require(first, batch["input_ids"], batch["labels"], place=STALL)
        compared = process_time() - compared
        ends = began + waited_s + _BATCH_BYTES / (_SHARE * LINK_BYTES_PER_S)
        sleep(max(0.0, ends - perf_counter()))
        return waited_s, process_time() - cpu - compared
