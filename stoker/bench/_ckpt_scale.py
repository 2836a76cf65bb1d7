"""``stoker bench ckpt --only scale``: a million chunks and 20,000 sharded tensors, without their data.

``merge``
    seconds for which rank 0 merges the fragments of 512 ranks with 10^6 chunks, checks that every element of every tensor
    is covered exactly once, and makes the manifest's bytes. Its memory is the peak above what the fragments take
    themselves, seen by the process's high-water mark.
``plan, cold``
    seconds of one rank's plan of 20,000 DTensors.
``plan, by hash``
    seconds of a later save of theirs before it copies, by its report: it takes the tree apart, encodes its plain values and
    sees that the plan is the one from the save before.

There is no limit to measure against: the goals are bounds on seconds and bytes.
"""

import mmap
import shutil
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from ..checkpoint import CheckpointManager
from ..checkpoint.blob import Chunk
from ..checkpoint.manifest import BlobInfo, Fragment, Manifest, WrittenChunk, blob_path, merge
from ..checkpoint.plan import make_plan
from ..errors import CorruptionError, UnsupportedError
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["MEMORY", "MERGE", "PLAN", "PLAN_BY_HASH", "run_scale"]

MERGE, MEMORY = "merge of fragments", "memory of the merge"
PLAN, PLAN_BY_HASH = "plan, cold", "plan, by hash"
_ROWS = 4


def run_scale(
    *,
    runs: int,
    directory: Path,
    warmup: int = 1,
    num_ranks: int = 512,
    num_chunks: int = 1_000_000,
    num_tensors: int = 20_000,
    progress: Callable[[], None] | None = None,
) -> Report:
    """Merge `num_chunks` chunks of `num_ranks` fragments, and plan `num_tensors` DTensors."""
    scale = _Merge(num_ranks, num_chunks)
    cases = [
        Case(name=MERGE, unit="s", better="lower", goal_value=2.0),
        Case(name=MEMORY, unit="MB", better="lower", goal_value=300.0),
    ]
    question = Question(
        bench="ckpt", cases=cases, params={"ranks": num_ranks, "chunks": num_ranks * scale.tensors_per_rank}
    )
    variant = Variant(
        name="stoker",
        kind="stoker",
        run=scale.run,
    )
    merged = measure(question, [variant], runs=runs, warmup=warmup, directory=directory, progress=progress)
    plan = _PlanMany(num_tensors, directory)
    cases = [
        Case(name=PLAN, unit="s", better="lower", goal_value=1.0),
        Case(name=PLAN_BY_HASH, unit="s", better="lower", goal_value=0.05),
    ]
    question = Question(bench="ckpt", cases=cases, params={"tensors": num_tensors})
    variant = Variant(
        name="stoker",
        kind="stoker",
        run=plan.run,
        setup=plan.make,
        teardown=plan.close,
    )
    return merged + measure(question, [variant], runs=runs, warmup=warmup, directory=directory, progress=progress)


class _Merge:
    """Fragments of a job that shards every tensor by rows over all ranks, made once, as bytes."""

    def __init__(self, num_ranks: int, num_chunks: int) -> None:
        self._num_ranks = num_ranks
        self.tensors_per_rank = max(1, num_chunks // num_ranks)
        self._fragments = [self._fragment(rank) for rank in range(num_ranks)]

    def _fragment(self, rank: int) -> bytes:
        shape, row_bytes = (_ROWS, 64), 256
        path = blob_path(rank, 0)
        chunks = [
            Chunk(
                name=f"layers.{number}.weight",
                dtype="float32",
                shape=shape,
                offsets=(_ROWS * rank, 0),
                global_shape=(_ROWS * self._num_ranks, 64),
            )
            for number in range(self.tensors_per_rank)
        ]
        length = _ROWS * row_bytes
        size = 4096 + length * len(chunks)
        written = [
            WrittenChunk(chunk=chunk, blob=path, byte_offset=4096 + length * number, byte_length=length)
            for number, chunk in enumerate(chunks)
        ]
        crcs = np.arange(-(-size // (1 << 20)), dtype=np.uint32)
        return Fragment(
            rank=rank,
            world_size=self._num_ranks,
            host=socket.gethostname(),
            plan_hash="",
            held=chunks,
            written=written,
            blobs=[BlobInfo(path=path, size_bytes=size, crcs=crcs)],
        ).to_bytes()

    def run(self) -> Outcome:
        fragments = [Fragment.from_bytes(data, place=f"rank {rank}") for rank, data in enumerate(self._fragments)]
        before = _reset_peak()
        started = perf_counter()
        manifest = merge(fragments, world_size=self._num_ranks, place="bench")
        data = manifest.to_bytes()
        seconds = perf_counter() - started
        peak = max(mmap.PAGESIZE, _peak_bytes() - before)  # a small merge may fit into what was free
        expected = self._num_ranks * self.tensors_per_rank
        if Manifest.from_bytes(data, place="bench").num_chunks != expected:
            raise CorruptionError("the manifest must hold every chunk", value=manifest.num_chunks, place="bench")
        return {MERGE: Sample(value=seconds, verified=True), MEMORY: Sample(value=peak / 1e6, verified=True)}


def _reset_peak() -> int:
    """Forget the process's high-water mark; returns what it uses now. man 5 proc: clear_refs."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) << 10
    raise UnsupportedError("needs Linux's account of a process's memory", value=name, place="stoker bench ckpt")


class _PlanMany:
    """Many small DTensors on a mesh of this process alone."""

    def __init__(self, num_tensors: int, directory: Path) -> None:
        self._num_tensors, self._directory = num_tensors, directory
        self._path = directory / "plan"
        self._tensors: dict[str, torch.Tensor] = {}
        self._owns_group = False
        self._manager: CheckpointManager | None = None
        self._step = 0

    def make(self) -> None:
        import torch.distributed as dist
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        if not dist.is_initialized():
            rendezvous = (self._directory / "rendezvous").absolute()
            dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
            self._owns_group = True
        mesh = init_device_mesh("cpu", (1,))
        for number in range(self._num_tensors):
            local = torch.zeros(2, 2)
            self._tensors[f"layers.{number}.weight"] = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        self._manager = CheckpointManager(self._path, keep_last=1, grace_s=0.0)
        self._save()

    def _save(self) -> float:
        assert self._manager is not None
        self._step += 1
        handle = self._manager.save(self._step, {"model": self._tensors})
        handle.wait("committed")
        return handle.report().plan_s

    def run(self) -> Outcome:
        started = perf_counter()
        plan = make_plan(self._tensors, rank=0, world_size=1)
        cold_s = perf_counter() - started
        by_hash_s = self._save()
        if len(plan.mine) != self._num_tensors:
            raise CorruptionError("the plan must hold every tensor", value=len(plan.mine), place="bench")
        return {PLAN: Sample(value=cold_s, verified=True), PLAN_BY_HASH: Sample(value=by_hash_s, verified=True)}

    def close(self) -> None:
        import torch.distributed as dist

        if self._manager is not None:
            self._manager.close()
        shutil.rmtree(self._path, ignore_errors=True)
        self._tensors.clear()
        if self._owns_group:
            dist.destroy_process_group()
        (self._directory / "rendezvous").unlink(missing_ok=True)
