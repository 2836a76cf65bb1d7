"""``stoker bench ckpt --only first``: what the first save of a process costs, and what ``prewarm`` takes off it.

``first save``
    seconds for which the first save of a manager stalls without ``prewarm``. Limit: new shared memory of the same size is
    reserved and touched, and the same tensors are copied there: no save can do without.
``first save after prewarm``
    its stall / the median stall of the next saves of the same manager.

What was saved last is restored and compared, bit for bit.
"""

import mmap
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch

from ..checkpoint import CheckpointManager
from ..errors import UnsupportedError
from ..storage._posix import shared_memory_directory
from ._ckpt_job import Job, check_equal, large_state
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["FIRST", "PREWARMED", "run_first"]

FIRST, PREWARMED = "first save", "first save after prewarm"
_LATER_SAVES = 3


def run_first(
    *, size_bytes: int, runs: int, directory: Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Save `size_bytes` of tensors below `directory` by one new manager after another."""
    job = Job(large_state(size_bytes), directory)
    question = Question(
        bench="ckpt",
        cases=[
            Case(name=FIRST, unit="s", better="lower", goal_ratio=1.1, bytes=job.size_bytes),
            Case(name=PREWARMED, unit="x", better="lower", goal_value=2.0, bytes=job.size_bytes),
        ],
        params={"size_bytes": job.size_bytes, "torch_threads": torch.get_num_threads()},
    )
    variants = [
        Variant(name="first touch and copy", kind="limit", run=lambda: _touch_and_copy(job)),
        Variant(name="stoker", kind="stoker", run=lambda: _first_saves(job)),
    ]
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


def _touch_and_copy(job: Job) -> Outcome:
    fd, path = tempfile.mkstemp(prefix="bench-first-", dir=shared_memory_directory())
    os.unlink(path)
    try:
        flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0)
        started = perf_counter()
        try:
            os.posix_fallocate(fd, 0, job.size_bytes)
        except OSError as error:
            raise UnsupportedError("shared memory must hold the state once", value=str(error), place=path) from error
        flat = torch.frombuffer(mmap.mmap(fd, job.size_bytes, flags=flags), dtype=torch.float32)
        at = 0
        for tensor in job.state.values():
            flat[at : at + tensor.numel()].view(tensor.shape).copy_(tensor)
            at += tensor.numel()
        seconds = perf_counter() - started
    finally:
        os.close(fd)
    return {FIRST: Sample(value=seconds, verified=True)}


def _first_saves(job: Job) -> Outcome:
    first_s = _stalls(job, prewarm=False, num_saves=1)[0]
    warm_s, *later_s = _stalls(job, prewarm=True, num_saves=1 + _LATER_SAVES)
    return {
        FIRST: Sample(value=first_s, verified=True),
        PREWARMED: Sample(value=warm_s / statistics.median(later_s), verified=True),
    }


def _stalls(job: Job, *, prewarm: bool, num_saves: int) -> list[float]:
    """The stalls of the first saves of a new manager; no save has to wait for the one before."""
    path = job.directory / "first"
    stalls = []
    try:
        with CheckpointManager(path, keep_last=1, grace_s=0.0) as manager:
            if prewarm:
                manager.prewarm({"model": job.state})
            for step in range(num_saves):
                handle = manager.save(step, {"model": job.state})
                handle.wait("committed")
                stalls.append(handle.report().stall_s)
            for tensor in job.target.values():
                tensor.zero_()
            manager.restore({"model": job.target})
            check_equal(job.state, job.target, place=str(path))
    finally:
        shutil.rmtree(path, ignore_errors=True)
    return stalls
