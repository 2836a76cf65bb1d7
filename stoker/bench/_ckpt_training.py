"""``stoker bench ckpt --only training``: how much slower a training loop is while a save persists.

One loop (a few matrix products, on all processors) runs alone, then beside a save until that is committed, then alone again;
its pace alone is taken from both sides, so that a machine that gets slower meanwhile does not count.

``step beside a save``
    mean seconds of a step while the save persists, its stall left out. Limit: the same loop alone, in the same round.
``training lost to a save``
    seconds by which all is later for one save: its stall, and what the steps beside it took longer than alone. What costs a
    step little and takes long is seen here.
``beyond the writing's processor``
    seconds that passed while the save persisted / (seconds of these steps alone + seconds of a processor that the writing
    used). 1 means that training lost no more than a processor's time for what the writing had to do; below 1, that some
    of that ran where the loop left a processor idle.
``writing, processor``, ``writing, wall``
    the parts of that: seconds of a processor of all of stoker's threads, by the kernel's account, and seconds of the clock.
"""

import os
import shutil
import statistics
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..checkpoint import CheckpointManager
from ._ckpt_job import Job, large_state
from ._ckpt_peers import dcp_async_saver
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["BEYOND", "LOST", "STEP", "WRITING_CPU", "WRITING_WALL", "run_training"]

STEP, LOST, BEYOND = "step beside a save", "training lost to a save", "beyond the writing's processor"
WRITING_CPU, WRITING_WALL = "writing, processor", "writing, wall"
_EDGE = 256
_ALONE_S = 0.5
"""For how long the loop runs alone before each save and after it."""


def run_training(
    *, size_bytes: int, runs: int, directory: Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Run the loop beside saves of `size_bytes` of tensors below `directory`."""
    loop = _Loop(Job(large_state(size_bytes), directory))
    size_bytes = loop.job.size_bytes
    question = Question(
        bench="ckpt",
        cases=[
            Case(name=STEP, unit="s", better="lower", bytes=size_bytes),
            Case(name=LOST, unit="s", better="lower", goal_peer_ratio=1.0, bytes=size_bytes),
            Case(name=BEYOND, unit="x", better="lower", goal_value=1.02, bytes=size_bytes),
            Case(name=WRITING_CPU, unit="s", better="lower", bytes=size_bytes),
            Case(name=WRITING_WALL, unit="s", better="lower", bytes=size_bytes),
        ],
        params={"size_bytes": size_bytes, "torch_threads": torch.get_num_threads()},
    )
    variants = [
        Variant(name="the loop alone", kind="limit", run=loop.alone),
        Variant(
            name="stoker",
            kind="stoker",
            run=loop.beside_stoker,
            setup=loop.open_stoker,
            teardown=loop.close,
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

    def _train(self) -> None:
        x = self._weights
        for _ in range(4):
            x = torch.tanh(x @ self._weights)

    def _steps_until(self, is_done: Callable[[], bool]) -> tuple[int, float]:
        """Train, one step at least; returns the steps and the seconds."""
        started, steps = perf_counter(), 0
        while not steps or not is_done():
            self._train()
            steps += 1
        return steps, perf_counter() - started

    def _alone(self) -> float:
        """Seconds of a step without anything beside it."""
        end = perf_counter() + _ALONE_S
        steps, seconds = self._steps_until(lambda: perf_counter() >= end)
        return seconds / steps

    def alone(self) -> Outcome:
        return {STEP: Sample(value=self._alone(), verified=True)}

    def _beside(self, save: Callable[[], Callable[[], bool]]) -> tuple[dict[str, Sample], float]:
        """The loop beside one save; also how many seconds its steps would take alone."""
        before_s = self._alone()
        started = perf_counter()
        is_done = save()
        stall_s = perf_counter() - started
        steps, seconds = self._steps_until(is_done)
        alone_s = steps * statistics.mean((before_s, self._alone()))
        found = {
            STEP: Sample(value=seconds / steps, verified=True),
            # Where the noise is larger than what is lost, the stall is what is left.
            LOST: Sample(value=stall_s + max(0.0, seconds - alone_s), verified=True),
            WRITING_WALL: Sample(value=seconds, verified=True),
        }
        return found, alone_s

    def open_stoker(self) -> None:
        path = self.job.directory / "training"
        self._resources.callback(shutil.rmtree, path, ignore_errors=True)
        self._manager = self._resources.enter_context(CheckpointManager(path, keep_last=1, grace_s=0.0))
        self._manager.prewarm({"model": self.job.state})

    def beside_stoker(self) -> Outcome:
        assert self._manager is not None
        manager, used_s = self._manager, 0.0
        self._step += 1

        def save() -> Callable[[], bool]:
            nonlocal used_s
            handle = manager.save(self._step, {"model": self.job.state})
            used_s = _others_cpu_s()  # a thread of stoker's lives as long as its manager

            def is_done() -> bool:
                nonlocal used_s
                if handle.done("committed"):
                    used_s = _others_cpu_s() - used_s
                    return True
                return False

            return is_done

        found, alone_s = self._beside(save)
        found[WRITING_CPU] = Sample(value=max(used_s, 1e-6), verified=True)
        found[BEYOND] = Sample(value=found[WRITING_WALL].value / (alone_s + used_s), verified=True)
        return found

    def open_dcp(self) -> None:
        self._dcp_path.mkdir()
        self._resources.callback(shutil.rmtree, self._dcp_path, ignore_errors=True)
        self._save_dcp = self._resources.enter_context(dcp_async_saver(self._dcp_path))

    def beside_dcp(self) -> Outcome:
        assert self._save_dcp is not None
        save_dcp, future = self._save_dcp, None

        def save() -> Callable[[], bool]:
            nonlocal future
            future = save_dcp({"model": self.job.state})
            return future.done  # type: ignore[no-any-return]

        found, _ = self._beside(save)
        assert future is not None
        future.result()
        for file in self._dcp_path.iterdir():
            os.unlink(file)
        return found

    def close(self) -> None:
        self._resources.close()


def _others_cpu_s() -> float:
    """Seconds of a processor that the Python threads of this process but this one have used; torch's own are no such."""
    used_ns = 0
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            with suppress(OSError):  # it has just ended
                # man 5 proc, schedstat: nanoseconds on a processor come first.
                used_ns += int(Path(f"/proc/self/task/{thread.native_id}/schedstat").read_text().split()[0])
    return used_ns / 1e9
