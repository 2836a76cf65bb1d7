"""What every variant of ``stoker bench ckpt`` does: one save, one restore, the comparison; and the states to save."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..errors import CorruptionError
from .frame import Sample, drop_page_cache

__all__ = [
    "DURABLE",
    "FROM_STAGED",
    "RESTORE",
    "STALL",
    "WARM",
    "Job",
    "check_equal",
    "fsync",
    "large_state",
    "small_state",
]

STALL, DURABLE, FROM_STAGED = "save stall", "durable save", "durable, from staged"
RESTORE, WARM = "cold restore", "warm restore"

_MIB = 1 << 20
_TENSOR_MIB = (64, 1, 16, 4, 32, 2, 8)
"""Sizes of the tensors, in turn: embeddings, biases and matrices of a model of a few billion parameters."""


def large_state(size_bytes: int) -> dict[str, torch.Tensor]:
    """Tensors of 1 to 64 MiB that add up to `size_bytes`, rounded down to whole MiB."""
    left = size_bytes // _MIB
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    while left:
        mib = min(_TENSOR_MIB[len(state) % len(_TENSOR_MIB)], left)
        state[f"layers.{len(state)}.weight"] = _random(mib * 256, 1024, generator)
        left -= mib
    return state


def small_state(size_bytes: int, tensor_bytes: int) -> dict[str, torch.Tensor]:
    """As many tensors of `tensor_bytes` as make `size_bytes`, at least one."""
    generator = torch.Generator().manual_seed(0)
    count = max(1, size_bytes // tensor_bytes)
    return {f"layers.{number}.weight": _random(1, tensor_bytes // 4, generator)[0] for number in range(count)}


def _random(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    tensor = torch.empty(rows, columns)
    # Random bits, not random numbers: NaNs and denormals must come back as well.
    tensor.view(torch.int32).random_(-(2**31), 2**31 - 1, generator=generator)
    return tensor


class Job:
    """The state to save, the tensors to restore into, and a directory for each variant's files."""

    def __init__(self, state: dict[str, torch.Tensor], directory: Path) -> None:
        self.state, self.directory = state, directory
        self.target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.size_bytes = sum(tensor.nbytes for tensor in state.values())

    def rate(self, seconds: float) -> float:
        return self.size_bytes / seconds / 1e9

    def round_trip(
        self,
        path: Path,
        save: Callable[[Path], tuple[float, float]],
        restore: Callable[[Path], None],
        *,
        warm: Callable[[Path], None] | None = None,
    ) -> dict[str, float | Sample]:
        """One save into `path`, its restore from a cold cache, the comparison; `path` is empty again afterwards.

        `save` returns its stall and its time until durable, both in seconds; `restore` fills :attr:`target`.
        """
        more: dict[str, float | Sample] = {}
        try:
            stall_s, durable_s = save(path)
            if warm is not None:
                more[WARM] = self._restore_warm(path, warm)
            cache: Any = "cold" if drop_page_cache(path) == 0 else "warm"
            for tensor in self.target.values():
                tensor.zero_()
            started = perf_counter()
            restore(path)
            restore_s = perf_counter() - started
            check_equal(self.state, self.target, place=str(path))
        finally:
            remove_files(path)
        if durable_s > stall_s:  # it returned before all was durable
            more[FROM_STAGED] = Sample(value=self.rate(durable_s - stall_s), verified=True)
        return more | {
            STALL: Sample(value=stall_s, verified=True),
            DURABLE: Sample(value=self.rate(durable_s), verified=True),
            RESTORE: Sample(value=self.rate(restore_s), verified=True, cache=cache),
        }

    def _restore_warm(self, path: Path, restore: Callable[[Path], None]) -> Sample:
        for tensor in self.target.values():
            tensor.zero_()
        started = perf_counter()
        restore(path)
        seconds = perf_counter() - started
        check_equal(self.state, self.target, place=str(path))
        return Sample(value=self.rate(seconds), verified=True, cache="warm")


def check_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], *, place: str) -> None:
    """Raise CorruptionError unless both hold the same names with the same bits."""
    if expected.keys() != found.keys():
        raise CorruptionError("must hold the tensors that were saved", value=sorted(found)[:3], place=place)
    for name, tensor in expected.items():
        if not torch.equal(tensor.view(torch.int32), found[name].view(torch.int32)):
            raise CorruptionError(f"{name} must come back bit for bit", value="other bits", place=place)


def remove_files(path: Path) -> None:
    """Remove what a variant wrote, and let the file system finish that before the next variant is timed."""
    for entry in path.iterdir() if path.is_dir() else ():
        # The log of a checkpoint root stays: its manager goes on counting steps from it.
        if entry.is_dir() and entry.name != "log":
            shutil.rmtree(entry)
        elif entry.is_file():
            entry.unlink()
    if path.is_dir():
        fsync(path)


def fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
