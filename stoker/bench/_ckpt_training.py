"""``stoker bench ckpt --only training``: how much slower a training loop is while a save persists.

One loop (a matrix product that takes some milliseconds, on all processors) runs for as long as a save takes: alone, beside
a save of stoker, and beside one of DCP async with a kept stager.

``step beside a save``
    median seconds of a step while the save persists, its own stall left out. Limit: the same loop alone. Where no
    processor is to spare, checksums and system calls of the writing cost the loop their share.
"""

import os
import shutil
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..checkpoint import CheckpointManager
from ._ckpt_job import Job, large_state
from ._ckpt_peers import dcp_async_saver
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["STEP", "run_training"]

STEP = "step beside a save"
_EDGE = 256
_ALONE_STEPS = 40


def run_training(
    *, size_bytes: int, runs: int, directory: Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Run the loop beside saves of `size_bytes` of tensors below `directory`."""
    loop = _Loop(Job(large_state(size_bytes), directory))
    question = Question(
        bench="ckpt",
        cases=[Case(name=STEP, unit="s", better="lower", goal_ratio=1.02, bytes=loop.job.size_bytes)],
        params={"size_bytes": loop.job.size_bytes, "torch_threads": torch.get_num_threads()},
    )
    variants = [
        Variant(name="the loop alone", kind="limit", run=loop.alone),
        Variant(
            name="stoker",
            kind="stoker",
            run=loop.beside_stoker,
            setup=loop.open_stoker,
            teardown=loop.close,
            notes=("goal: 2 % beyond the share of a processor that the writing needs",),
        ),
        Variant(name="torch DCP async", kind="peer", run=loop.beside_dcp, setup=loop.open_dcp),
    ]
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


class _Loop:
    def __init__(self, job: Job) -> None:
        self.job = job
        self._weights = torch.randn(_EDGE, _EDGE)
        self._resources = ExitStack()
        self._manager: CheckpointManager | None = None
        self._save_dcp: Callable[[Any], Any] | None = None
        self._dcp_path = job.directory / "dcp-training"
        self._step = 0

    def _train(self) -> float:
        started = perf_counter()
        x = self._weights
        for _ in range(4):
            x = torch.tanh(x @ self._weights)
        return perf_counter() - started

    def _until(self, is_done: Callable[[], bool]) -> Sample:
        times = [self._train()]
        while not is_done():
            times.append(self._train())
        return Sample(value=statistics.median(times), verified=True)

    def alone(self) -> Outcome:
        left = iter(range(_ALONE_STEPS))
        return self._until(lambda: next(left, None) is None)

    def open_stoker(self) -> None:
        path = self.job.directory / "training"
        self._resources.callback(shutil.rmtree, path, ignore_errors=True)
        self._manager = self._resources.enter_context(CheckpointManager(path, keep_last=1, grace_s=0.0))
        self._manager.prewarm({"model": self.job.state})

    def beside_stoker(self) -> Outcome:
        assert self._manager is not None
        self._step += 1
        handle = self._manager.save(self._step, {"model": self.job.state})
        sample = self._until(lambda: handle.done("committed"))
        handle.wait("committed")
        return sample

    def open_dcp(self) -> None:
        self._dcp_path.mkdir()
        self._resources.callback(shutil.rmtree, self._dcp_path, ignore_errors=True)
        self._save_dcp = self._resources.enter_context(dcp_async_saver(self._dcp_path))

    def beside_dcp(self) -> Outcome:
        assert self._save_dcp is not None
        future = self._save_dcp({"model": self.job.state})
        sample = self._until(future.done)
        future.result()
        for file in self._dcp_path.iterdir():
            os.unlink(file)
        return sample

    def close(self) -> None:
        self._resources.close()
