"""One or two staging arenas for one plan: where memory allows it, a save is staged while the one before still persists.

The second one is made after the first save, in the background, so that no save waits for its first touch. With two, the
newest committed step stays in memory until the next but one save begins: after a crash it is restored from there.

Where memory does not allow even one, two slabs of it stand in the place of an arena (:mod:`.bounce`).
"""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch

from ..errors import StoreFull
from ..storage import _memory
from ..storage._posix import shared_memory_directory
from ..storage._units import format_bytes
from ._pool import Pool
from .arena import Arena, arena_headers, is_alive, sweep_dead_arenas
from .blob import BlobImage
from .bounce import NUM_SLABS, BouncedLayout, slab_bytes_for
from .plan import Plan
from .stage import StagedLayout

__all__ = ["Slots", "memory_allows"]

logger = logging.getLogger(__name__)

_NUM_SLOTS = 2
_KEEP_FREE = 0.25
"""Part of the memory that a second slot leaves to the trainer; a guess, not measured."""


def memory_allows(size_bytes: int, ranks_on_node: int) -> bool:
    """Whether each rank of this node may stage a second copy of its state."""
    available, total = _memory.available_memory()
    try:
        shm = os.statvfs(shared_memory_directory())
    except OSError:
        return False
    wanted = size_bytes * max(1, ranks_on_node)
    return available - wanted >= _KEEP_FREE * total and shm.f_bavail * shm.f_frsize >= wanted


class _Slot:
    def __init__(self, layout: StagedLayout) -> None:
        self.layout = layout
        self.busy = False
        self.used = 0
        """Number of the save that was staged here last; of the free slots the one that was used first is taken."""


# Guarantees: acquire() and prepare() are called by the trainer's thread alone, release() from any. `_changed` guards
# `_slots`, their `busy`, and `_growth`.
class Slots:
    """The arenas of one rank.

    Args:
        root_id, rank, world_size: see :class:`Arena`.
    """

    def __init__(self, *, root_id: str, rank: int, world_size: int) -> None:
        self._root_id, self._rank, self._world_size = root_id, rank, world_size
        self._slots: list[_Slot] = []
        self._changed = threading.Condition()
        self._pool = Pool(1, "stoker-arena")
        self._growth: Future[None] | None = None
        self.num_saves = 0
        self.key: object = None
        """What the slots are laid out for, as :meth:`prepare` was told."""
        self._swept = False
        self._inherited: set[int] = set()

    @property
    def num_slots(self) -> int:
        """Arenas that there are now."""
        return len(self._slots)

    @property
    def num_free(self) -> int:
        """Arenas that no save uses."""
        with self._changed:
            return sum(not slot.busy for slot in self._slots)

    def prepare(self, plan: Plan, key: object) -> None:
        """Lay out the first slot for another plan. No save may be under way."""
        self._end_growth()
        self.key = None
        images = StagedLayout.images_of(plan)
        size_bytes = sum(image.size_bytes for image in images)
        old, self._slots = [slot.layout for slot in self._slots], []
        arenas = [layout.arena for layout in old]
        keep = next((one.arena for one in old if one.staging != "slabs" and one.arena.size_bytes == size_bytes), None)
        del old
        for arena in arenas:
            if arena is not keep:
                arena.close()
        if not self._swept:  # whoever wanted to restore from what other ranks left has done so by the first save
            self._swept = True
            self._inherited = {
                os.fstat(fd).st_ino
                for _, fd, header in arena_headers(self._root_id)
                if header is not None and header["rank"] == self._rank and not is_alive(header)
            }
            if self._rank == 0:
                sweep_dead_arenas(keep_root_id=self._root_id, take_over=lambda rank: rank >= self._world_size)
        with torch.inference_mode(False):  # else its views could be written in that mode alone
            self._slots, self.key = [_Slot(self._lay_out(plan, images, keep))], key

    def _lay_out(self, plan: Plan, images: list[BlobImage], arena: Arena | None) -> StagedLayout:
        size_bytes = sum(image.size_bytes for image in images)
        try:
            arena = arena or Arena(root_id=self._root_id, rank=self._rank, size_bytes=size_bytes)
        except StoreFull as error:
            slabs_bytes = NUM_SLABS * slab_bytes_for(size_bytes)
            if slabs_bytes >= size_bytes:
                raise
            arena = Arena(root_id=self._root_id, rank=self._rank, size_bytes=slabs_bytes, anonymous_only=True)
            logger.warning("save() will return only when all is written, by way of two slabs of memory: %s", error)
            return BouncedLayout(plan, images, arena)
        return StagedLayout(plan, images, arena)

    def grow(self, *, wait: bool = False) -> None:
        """Make the second slot in the background, if memory allows it and there is none."""
        with self._changed:
            if not self._slots:
                return
            first = self._slots[0].layout
            if self._growth is None and len(self._slots) < _NUM_SLOTS and first.arena.path is not None:
                self._growth = self._pool.submit(self._add_slot, first)
            growth = self._growth
        if wait and growth is not None:
            growth.result()

    def _add_slot(self, first: StagedLayout) -> None:
        size_bytes, slot = first.arena.size_bytes, 1 - first.arena.slot
        if not memory_allows(size_bytes, int(os.environ.get("LOCAL_WORLD_SIZE", "1"))):
            logger.info("staging in one arena of %s: memory does not allow two", format_bytes(size_bytes))
            return
        try:
            arena = Arena(root_id=self._root_id, rank=self._rank, size_bytes=size_bytes, slot=slot, shared_only=True)
        except OSError as error:
            logger.info("staging in one arena of %s: no second one: %s", format_bytes(size_bytes), error)
            return
        layout = StagedLayout(first.plan, first.images, arena)
        with self._changed:
            self._slots.append(_Slot(layout))
            self._changed.notify_all()

    def _end_growth(self) -> None:
        with self._changed:
            growth, self._growth = self._growth, None
        if growth is not None:
            growth.result()

    def wait_free(self, timeout_s: float) -> bool:
        """Whether a slot came free in time."""
        with self._changed:
            return self._changed.wait_for(lambda: any(not slot.busy for slot in self._slots), timeout_s)

    def wait_all_free(self, timeout_s: float) -> bool:
        """Whether all slots came free in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not any(slot.busy for slot in self._slots), timeout_s)

    def acquire(self) -> tuple[StagedLayout, Callable[[], None]]:
        """A slot that no save uses, and the call that gives it back. One must be free."""
        with self._changed:
            slot = min((slot for slot in self._slots if not slot.busy), key=lambda one: one.used)
            self.num_saves += 1
            slot.busy, slot.used = True, self.num_saves
        return slot.layout, lambda: self._release(slot)

    def _release(self, slot: _Slot) -> None:
        with self._changed:
            slot.busy = False
            self._changed.notify_all()

    def close(self) -> None:
        """Free the memory. No save may be under way."""
        self._end_growth()
        self._pool.shutdown()
        for slot in self._slots:
            slot.layout.arena.close()
        for path, fd, header in arena_headers(self._root_id):
            # A slot that this run had no use for; not what a later run has left meanwhile.
            if os.fstat(fd).st_ino in self._inherited and header is not None and not is_alive(header):
                path.unlink(missing_ok=True)
        self._slots = []
