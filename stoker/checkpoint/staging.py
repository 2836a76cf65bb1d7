"""A stager for ``dcp.async_save`` that copies tensors once, to the place that they will have in the file.

::

    writer = StokerWriter("s3://bucket/run")
    stager = StokerStager(writer)
    future = dcp.async_save(state, storage_writer=writer, async_stager=stager)

torch's own stagers copy the state to host memory, from where the writer would copy it once more into its staging arena.
This one knows the layout of the files beforehand: it asks torch's planner what this rank holds, and remembers from the
save before which part of that torch made this rank write. What the memory turns out to be wrong for, the first save of
tensors that several ranks hold for instance, the writer copies as if this stager were any other.
"""

import copy
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Self

import torch
import torch.distributed as dist
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.checkpoint.planner import WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, DeadlineExceeded
from .arena import Arena, root_id_of
from .blob import Chunk
from .dcp import StokerWriter, chunk_of, close_arena, plan_of_chunks
from .plan import Signature, local_part, plan_signature
from .stage import StagedLayout

__all__ = ["StokerStager"]

_NUM_SLOTS = 2
_ALIGN_BYTES = 64


class _StagedState(dict[str, Any]):
    """A staged state dict; its slot is free again when nobody has it any more."""

    __slots__ = ("__weakref__",)


class _Slot:
    """One staging arena: the image of the files, and memory for what other ranks write."""

    def __init__(
        self, *, key: object, chunks: Sequence[Chunk], mine: Sequence[Chunk], root_id: str, number: int
    ) -> None:
        self.key = key
        self.user: object = None
        """The save that has it; None if it is free."""
        self.close: Callable[[], object] = lambda: None
        plan = plan_of_chunks(mine)
        images = StagedLayout.images_of(plan)
        rank = dist.get_rank() if dist.is_initialized() else 0
        size_bytes = sum(image.size_bytes for image in images)
        self.arena = Arena(root_id=root_id, rank=rank, size_bytes=size_bytes, slot=number)  # 0 is the writer's own
        self.layout = StagedLayout(plan, images, self.arena)
        self.targets: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {
            (piece.chunk.name, piece.chunk.offsets): target
            for copies in self.layout.copies
            for one in copies
            for piece, target in zip(one.pieces, one.targets, strict=True)
        }
        rest = [chunk for chunk in chunks if (chunk.name, chunk.offsets) not in self.targets]
        starts = [0]
        for chunk in rest:
            starts.append(starts[-1] + -(-chunk.nbytes // _ALIGN_BYTES) * _ALIGN_BYTES)
        self._rest = torch.empty(starts[-1], dtype=torch.uint8)
        for chunk, start in zip(rest, starts, strict=False):
            part = self._rest[start : start + chunk.nbytes]
            self.targets[chunk.name, chunk.offsets] = part.view(getattr(torch, chunk.dtype)).view(chunk.shape)


# Guarantees: stage() is called by one thread at a time. `_changed` guards `_slots` and their `user`.
class StokerStager(AsyncStager):
    """Stages the state of ``dcp.async_save`` straight into the memory that a :class:`StokerWriter` writes from.

    Args:
        writer: the one that the same saves use.

    ``async_save`` returns when everything is copied; the state may change from then on. One copy of what this rank holds
    stays in host memory, a second one only while a save is staged before the one before has been written, and a third
    save waits for that.

    Examples:
        >>> import tempfile, warnings, torch, torch.distributed.checkpoint as dcp
        >>> from stoker.checkpoint.dcp import StokerReader
        >>> warnings.simplefilter("ignore")  # torch warns that there is no process group
        >>> root = tempfile.TemporaryDirectory()
        >>> state = {"w": torch.arange(3), "epoch": 7}
        >>> with StokerWriter(root.name) as writer, StokerStager(writer) as stager:
        ...     future = dcp.async_save(state, storage_writer=writer, async_stager=stager)
        ...     _ = state["w"].zero_()
        ...     _ = future.result()
        >>> dcp.load(state, storage_reader=StokerReader(root.name))
        >>> state["w"]
        tensor([0, 1, 2])
        >>> root.cleanup()
    """

    _synchronize_after_execute = False

    def __init__(self, writer: StokerWriter) -> None:
        if not isinstance(writer, StokerWriter):
            raise ConfigError("a stager belongs to a StokerWriter", value=type(writer).__name__, place="StokerStager")
        self._writer = writer
        self._changed = threading.Condition()
        self._slots: list[_Slot] = []
        self._signature: Signature | None = None
        self._chunks: list[Chunk] = []
        self._final: list[Chunk] | None = None
        writer.staged_layout = self._staged_layout

    @torch.no_grad()
    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of `state_dict` whose tensors lie where the files will be written from.

        Raises:
            DeadlineExceeded: two saves before this one are still not written.
        """
        flat, paths = flatten_state_dict(state_dict)
        tensors = {name: value for name, value in flat.items() if isinstance(value, torch.Tensor)}
        signature = plan_signature(tensors, rank=0, world_size=0)
        if signature != self._signature:
            plan = create_default_local_save_plan(tensors, True)
            chunks = [chunk_of(item) for item in plan.items if item.type != WriteItemType.BYTE_IO]
            self._chunks = [chunk for chunk in chunks if chunk.nbytes or 0 in chunk.global_shape]
            self._signature, self._final = signature, None
        slot = self._free_slot()
        user = slot.user
        try:
            slot.arena.mark("FILLING")
            staged = self._copy(slot, tensors)
        except BaseException:
            self._release(slot, user)
            raise
        by_path = {paths[name]: value for name, value in staged.items()}
        state = _StagedState((key, _rebuilt(value, (str(key),), by_path)) for key, value in state_dict.items())
        weakref.finalize(state, self._release, slot, user).atexit = False  # of a save that fails before it writes
        return state

    def _copy(self, slot: _Slot, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors over the slot's memory, filled."""
        targets: list[torch.Tensor] = []
        sources: list[torch.Tensor] = []
        staged: dict[str, torch.Tensor] = {}
        offsets = {chunk.name: chunk.offsets for chunk in self._chunks}
        for name, tensor in tensors.items():
            local = local_part(tensor)
            target = slot.targets[name, offsets[name]] if name in offsets else torch.empty_like(local, device="cpu")
            if local.numel():
                targets.append(target)
                sources.append(local)
            if isinstance(tensor, DTensor):
                mesh, placements = tensor.device_mesh, tensor.placements
                shape, stride = tensor.shape, tensor.stride()
                staged[name] = DTensor.from_local(target, mesh, placements, run_check=False, shape=shape, stride=stride)
            else:
                staged[name] = target
        if targets:
            torch._foreach_copy_(targets, sources)
        return staged

    def _free_slot(self) -> _Slot:
        """A slot for the present tensors, marked busy."""
        mine = self._chunks if self._final is None else self._final
        key = (self._signature, tuple(mine))
        timeout_s = self._writer.persist_timeout_s
        with self._changed:
            if not self._changed.wait_for(
                lambda: sum(slot.user is not None for slot in self._slots) < _NUM_SLOTS, timeout_s
            ):
                raise DeadlineExceeded(
                    "the saves before must have been written", value=f"{timeout_s} s", place="StokerStager.stage"
                )
            slot = next((slot for slot in self._slots if slot.user is None and slot.key == key), None)
            if slot is None:
                for old in [slot for slot in self._slots if slot.user is None]:
                    self._slots.remove(old)
                    old.close()
                taken = {slot.arena.slot for slot in self._slots}
                number = next(n for n in range(1, _NUM_SLOTS + 1) if n not in taken)
                root_id = root_id_of(self._writer.url)
                slot = _Slot(key=key, chunks=self._chunks, mine=mine, root_id=root_id, number=number)
                slot.close = weakref.finalize(self, close_arena, slot.arena, os.getpid())
                self._slots.append(slot)
            slot.user = object()
            return slot

    def _release(self, slot: _Slot, user: object) -> None:
        with self._changed:
            if slot.user is user:
                slot.user = None
                self._changed.notify_all()

    def _staged_layout(
        self, chunks: list[Chunk], sources: Sequence[torch.Tensor]
    ) -> tuple[StagedLayout, Callable[[], None]] | None:
        """The layout that holds just these chunks in just this memory; called by the writer, from its own thread."""
        places = [(chunk.name, chunk.offsets) for chunk in chunks]
        with self._changed:
            if set(places) <= {(chunk.name, chunk.offsets) for chunk in self._chunks}:
                self._final = list(chunks)
            for slot in self._slots:
                if [piece.chunk for piece in slot.layout.plan.mine] == chunks and all(
                    slot.targets[place].data_ptr() == source.data_ptr()
                    for place, source in zip(places, sources, strict=True)
                ):
                    return slot.layout, partial(self._release, slot, slot.user)
        return None

    def synchronize_staging(self) -> None:
        """Nothing to wait for: :meth:`stage` returns when all is copied."""

    def close(self) -> None:
        """Free the memory. A save that is still under way must have ended before."""
        with self._changed:
            slots, self._slots = self._slots, []
        for slot in slots:
            slot.close()
        self._writer.staged_layout = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _rebuilt(value: Any, path: tuple[Any, ...], staged: Mapping[tuple[Any, ...], torch.Tensor]) -> Any:
    """`value` with the staged tensors in it, and a copy of everything else."""
    if path in staged:
        return staged[path]
    if isinstance(value, dict):
        rebuilt = copy.copy(value)
        for key, part in value.items():
            rebuilt[key] = _rebuilt(part, (*path, str(key)), staged)
        return rebuilt
    if type(value) in (list, tuple):
        return type(value)(_rebuilt(part, (*path, i), staged) for i, part in enumerate(value))
    return copy.deepcopy(value)
