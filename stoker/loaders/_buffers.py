"""The memory that batches are delivered in: two sets of arrays, used again only once nobody can see them."""

import mmap
import sys
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError

__all__ = ["DeviceBuffers", "HostBuffers", "usable_device"]

_RING = 2  # the batch that the trainer holds and the one that is being filled

Arrays: TypeAlias = tuple[NDArray[Any], ...]


class HostBuffers:
    """Output arrays in host memory, handed to the trainer itself and used again once nobody can see them."""

    def __init__(self, shape: tuple[int, int], dtypes: Sequence[type]) -> None:
        self._shape, self._dtypes = shape, dtypes
        self._ring = [self._fresh() for _ in range(_RING)]
        self._next = 0
        self.fresh = 0
        # What getrefcount says of an array that only this ring knows, asked the same way as in take(). Tensors and
        # their views, numpy views of those, DLPack capsules: each keeps a reference to the array.
        arrays = self._ring[0]
        self._idle = max(map(sys.getrefcount, arrays))

    def _fresh(self) -> Arrays:
        return tuple(_empty_on_page(self._shape, np.dtype(dtype)) for dtype in self._dtypes)

    def take(self) -> Arrays:
        i = self._next
        self._next = (i + 1) % _RING
        arrays = self._ring[i]
        if max(map(sys.getrefcount, arrays)) != self._idle:
            self.fresh += 1
            arrays = self._ring[i] = self._fresh()
        return arrays

    def deliver(self, arrays: Arrays) -> list[torch.Tensor]:
        return [torch.from_numpy(array) for array in arrays]


def _empty_on_page(shape: tuple[int, int], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Memory that begins with a page.

    Labels are input_ids, one place on. Where the two begin 16 bytes apart, modulo a page, as malloc places them, each
    load of that copy waits for a store that it seems to follow: 78 us instead of 6 for (16, 2048) on an EPYC.
    """
    size_bytes = shape[0] * shape[1] * dtype.itemsize
    memory = np.empty(size_bytes + mmap.PAGESIZE, np.uint8)
    first = -memory.__array_interface__["data"][0] % mmap.PAGESIZE
    return memory[first : first + size_bytes].view(dtype).reshape(shape)


class DeviceBuffers:
    """Pinned output arrays; the trainer gets copies on the device, made in the order of its current stream."""

    def __init__(self, shape: tuple[int, int], dtypes: Sequence[type], device: torch.device) -> None:
        self._device = device
        kinds = [torch.from_numpy(np.empty(0, dtype)).dtype for dtype in dtypes]
        self._pinned = [[torch.empty(shape, dtype=kind, pin_memory=True) for kind in kinds] for _ in range(_RING)]
        self._arrays = [tuple(tensor.numpy() for tensor in tensors) for tensors in self._pinned]
        self._copied: list[torch.Event | None] = [None] * _RING
        self._now = 0
        self.fresh = 0

    def take(self) -> Arrays:
        self._now = (self._now + 1) % _RING
        copied = self._copied[self._now]
        if copied is not None:
            copied.synchronize()  # the copy out of this buffer, two batches ago
        return self._arrays[self._now]

    def deliver(self, arrays: Arrays) -> list[torch.Tensor]:
        tensors = [tensor.to(self._device, non_blocking=True) for tensor in self._pinned[self._now]]
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        self._copied[self._now] = event
        return tensors


def usable_device(device: torch.device | str | None) -> torch.device | None:
    """The accelerator that batches go to; None for host memory."""
    try:
        wanted = torch.device("cpu" if device is None else device)
    except RuntimeError as error:
        raise ConfigError("device must be one that torch knows", value=str(device), place="TokenLoader") from error
    if wanted.type == "cpu":
        return None
    here = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if here is None or here.type != wanted.type:
        raise ConfigError(
            "device must be the CPU or the accelerator of this process",
            value=str(wanted),
            place="TokenLoader",
            hint=f"the accelerator here is {here}",
        )
    return wanted
