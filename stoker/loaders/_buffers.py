"""The memory that batches are delivered in: two pairs of arrays, used again only once nobody can see them."""

import sys
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from ..errors import ConfigError

__all__ = ["DeviceBuffers", "HostBuffers", "usable_device"]

_RING = 2  # the batch that the trainer holds and the one that is being filled

Pair: TypeAlias = tuple[NDArray[np.int64], NDArray[np.int64]]


class HostBuffers:
    """Output arrays in host memory, handed to the trainer itself and used again once nobody can see them."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self._shape = shape
        self._pairs = [self._fresh() for _ in range(_RING)]
        self._next = 0
        self.fresh = 0
        # What getrefcount says of an array that only this ring knows, asked the same way as in take(). Tensors and
        # their views, numpy views of those, DLPack capsules: each keeps a reference to the array.
        pair = self._pairs[0]
        self._idle = sys.getrefcount(pair[0])

    def _fresh(self) -> Pair:
        return np.empty(self._shape, np.int64), np.empty(self._shape, np.int64)

    def take(self) -> Pair:
        i = self._next
        self._next = (i + 1) % _RING
        pair = self._pairs[i]
        if sys.getrefcount(pair[0]) != self._idle or sys.getrefcount(pair[1]) != self._idle:
            self.fresh += 1
            pair = self._pairs[i] = self._fresh()
        return pair

    def deliver(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(pair[0]), torch.from_numpy(pair[1])


class DeviceBuffers:
    """Pinned output arrays; the trainer gets copies on the device, made in the order of its current stream."""

    def __init__(self, shape: tuple[int, int], device: torch.device) -> None:
        self._device = device
        self._pinned = [
            (
                torch.empty(shape, dtype=torch.int64, pin_memory=True),
                torch.empty(shape, dtype=torch.int64, pin_memory=True),
            )
            for _ in range(_RING)
        ]
        self._arrays = [(x.numpy(), y.numpy()) for x, y in self._pinned]
        self._copied: list[torch.Event | None] = [None] * _RING
        self._now = 0
        self.fresh = 0

    def take(self) -> Pair:
        self._now = (self._now + 1) % _RING
        copied = self._copied[self._now]
        if copied is not None:
            copied.synchronize()  # the copy out of this buffer, two batches ago
        return self._arrays[self._now]

    def deliver(self, pair: Pair) -> tuple[torch.Tensor, torch.Tensor]:
        x, y = (t.to(self._device, non_blocking=True) for t in self._pinned[self._now])
        event = torch.Event(self._device)
        event.record(torch.accelerator.current_stream(self._device))
        self._copied[self._now] = event
        return x, y


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
