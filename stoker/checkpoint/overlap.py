"""What may be copied after ``save()`` has returned, and the hook that makes it safe.

Parameters and optimizer state change in ``optimizer.step()`` and nowhere else, as long as nobody edits them by hand. So
their copy may run beside the next forward and backward pass, if the optimizer waits for it before it steps: torch calls
the hook for foreach and fused steps, from GradScaler, and for optimizers that step inside backward alike. Everything else
(buffers, moving averages, frozen and plain tensors, small ones) may change at any time, and is copied before ``save()``
returns. No check after the fact could take the hook's place: a tensor's version counter does not move for fused AdamW,
for BatchNorm's running mean, nor for ``p.data.add_``.
"""

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future, wait
from time import monotonic
from typing import Any, Literal, TypeAlias

import torch

from ..errors import DeadlineExceeded, SaveFailed
from ..metrics import counters
from ..storage._checksums import crc32c
from .plan import Piece, local_part
from .tree import TreeView

__all__ = ["LateCopy", "OptimizerHooks", "OverlapMode", "late_tensors"]

logger = logging.getLogger(__name__)

OverlapMode: TypeAlias = Literal["auto", "verify"] | bool
_LATE_BYTES = 64 << 10
"""Smaller tensors are copied at once: they cost more calls than time."""


def _optimizers(tree: Mapping[str, Any]) -> dict[str, torch.optim.Optimizer]:
    return {name: thing for name, thing in tree.items() if isinstance(thing, torch.optim.Optimizer)}


def late_tensors(tree: Mapping[str, Any], view: TreeView, mode: OverlapMode) -> frozenset[str]:
    """Names of the tensors that may be copied late: parameters and state of the tree's own optimizers, if large."""
    if mode is False:
        return frozenset()
    parameters = {
        id(parameter)
        for optimizer in _optimizers(tree).values()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    found = set()
    for item in view.items.values():
        if item.kind == "module":
            prefix = f"{item.name}."
            # By the object, not the storage: another tensor on the same memory may be anything.
            found |= {n for n, t in view.tensors.items() if n.startswith(prefix) and id(t) in parameters}
        elif item.kind == "optimizer":
            found |= {name for path, name in item.tensors if path[0] == "state"}
    late = {name for name in found if local_part(view.tensors[name]).nbytes >= _LATE_BYTES}
    if mode == "auto" and all(view.tensors[name].device.type == "cpu" for name in late):
        return frozenset()  # a copy in host memory takes the cores and the bandwidth that training wants meanwhile
    return frozenset(late)


# Guarantees: made, filled and started by the thread that saves; join() and done() may be called from any.
class LateCopy:
    """The part of one save that is copied by another thread.

    Args:
        names: of the tensors.
        threads: one of them copies.
        deadline: of the save, by :func:`time.monotonic`.
        verify: compare what was copied with checksums of what the tensors held when ``save()`` was called.
    """

    def __init__(self, names: frozenset[str], threads: Executor, *, deadline: float, verify: bool) -> None:
        self._names, self._threads, self._deadline, self._verify = names, threads, deadline, verify
        self._expected: list[tuple[torch.Tensor, int]] = []
        self._ready: list[Any] = []
        self._devices: dict[torch.device, None] = {}
        self._copied: Future[None] | None = None

    def takes(self, piece: Piece) -> bool:
        """Whether a piece is copied late."""
        return piece.chunk.name in self._names

    def note(self, targets: Sequence[torch.Tensor], sources: Sequence[torch.Tensor]) -> None:
        """These will be copied: the memory of the image, and the tensors. They are held until then."""
        for source in sources:
            if source.device.type != "cpu":
                self._devices[source.device] = None
        if self._verify:
            self._expected += [(target, _crc_of(source)) for target, source in zip(targets, sources, strict=True)]

    def start(self, copy: Callable[[], None]) -> Future[None]:
        """Have `copy` run on another thread, after what the devices were told to do so far."""
        for device in self._devices:
            event = torch.Event(device)
            event.record(torch.accelerator.current_stream(device))
            self._ready.append(event)
        self._copied = self._threads.submit(self._run, copy)
        return self._copied

    def _run(self, copy: Callable[[], None]) -> None:
        for event in self._ready:
            event.synchronize()
        for device in self._devices:
            # A stream of its own, or the copy would queue up behind the next step's work. Streams are set by thread.
            torch.accelerator.set_stream(torch.Stream(device))
        copy()
        changed = sum(_crc_of(target) != crc for target, crc in self._expected)
        self._expected.clear()
        if changed:
            raise SaveFailed(
                "nothing but a step of a saved optimizer may change parameters and optimizer state after a save",
                value=f"{changed} tensors changed before they were copied",
                place="overlap='verify'",
                hint="don't edit them by hand between save() and step(), or save with overlap=False",
            )

    def done(self) -> bool:
        """Whether the copy has ended, well or not."""
        return self._copied is None or self._copied.done()

    def join(self) -> None:
        """Wait for the copy. Raises what went wrong, once, or DeadlineExceeded."""
        copied, self._copied = self._copied, None
        if copied is None:
            return
        with counters.timed("ckpt.overlap.wait_s"):
            ended = bool(wait([copied], max(0.0, self._deadline - monotonic())).done)
        if not ended:
            self._copied = copied
            raise DeadlineExceeded("the copy of the last save must end before the optimizer steps", place="overlap")
        copied.result()


def _crc_of(tensor: torch.Tensor) -> int:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return crc32c(flat.numpy().data)


# Guarantees: hook(), expect() and close() are called by the thread that saves; the hook runs on whichever thread steps.
class OptimizerHooks:
    """Pre-step hooks on the optimizers of the saved trees, each added once, that wait for the last late copy."""

    def __init__(self) -> None:
        self._hooked: weakref.WeakKeyDictionary[torch.optim.Optimizer, Any] = weakref.WeakKeyDictionary()
        self._copy: LateCopy | None = None

    def hook(self, tree: Mapping[str, Any]) -> None:
        """Have every optimizer of `tree` wait from now on."""
        own, pid = weakref.ref(self), os.getpid()

        def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
            hooks = own()
            # A forked child has memory of its own, and nobody who copies.
            if hooks is not None and os.getpid() == pid:
                hooks.join()

        for optimizer in _optimizers(tree).values():
            if optimizer not in self._hooked:
                self._hooked[optimizer] = optimizer.register_step_pre_hook(before_step)

    def expect(self, copy: LateCopy) -> None:
        """The copy that the next step waits for."""
        self._copy = copy

    def join(self) -> None:
        """Wait for the last late copy; raises its failure, once."""
        copy = self._copy
        if copy is not None:
            copy.join()
            self._copy = None

    def close(self) -> None:
        """Remove the hooks."""
        for handle in list(self._hooked.values()):
            handle.remove()
        self._hooked.clear()
