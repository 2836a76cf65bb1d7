"""Two slabs of memory for a state of which there is no room for a whole copy.

The file image passes through them part by part: one is filled while the other one is checksummed and written. So ``save()``
returns when all is written, and what is staged does not survive the process; everything else is as with an arena.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from itertools import cycle
from time import monotonic

import torch

from ..errors import DeadlineExceeded
from ..metrics import counters
from .arena import Arena
from .blob import BlobImage
from .handle import Staging
from .overlap import LateCopy
from .plan import Piece, Plan
from .stage import WRITE_BYTES, BlobSave, StagedLayout, copy_all

__all__ = ["NUM_SLABS", "BouncedLayout", "BouncedSave", "slab_bytes_for"]

_SLAB_BYTES = 256 << 20
NUM_SLABS = 2


def slab_bytes_for(size_bytes: int) -> int:
    """The size of one slab for `size_bytes` of files: an eighth of them, as long as that is worth a write."""
    return min(_SLAB_BYTES, max(WRITE_BYTES, size_bytes // 8 // WRITE_BYTES * WRITE_BYTES))


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """Elements ``[first, last)`` of a piece, in row-major order, and where they go."""

    piece: Piece
    target: torch.Tensor
    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class _Part:
    """Bytes ``[start, end)`` of a blob, which pass through the slab that begins at `slab` of the memory.

    Attributes:
        pieces, targets: the pieces that lie in it whole, and where they go.
        cuts: those that do not.
        constants: (offset in the memory, bytes) of what is the same in every save: the header and the pads.
    """

    blob: int
    start: int
    end: int
    slab: int
    pieces: list[Piece] = field(default_factory=list)
    targets: list[torch.Tensor] = field(default_factory=list)
    cuts: list[_Cut] = field(default_factory=list)
    constants: list[tuple[int, bytes]] = field(default_factory=list)


class BouncedLayout(StagedLayout):
    """A plan laid out for slabs, with one destination view for each piece. Made once for each plan and kept.

    Args:
        arena: :data:`NUM_SLABS` times the size of one slab.
    """

    def __init__(self, plan: Plan, images: Sequence[BlobImage], arena: Arena) -> None:
        self.slab_bytes = arena.size_bytes // NUM_SLABS
        self.parts: list[_Part] = []
        self._next_slab = cycle(range(0, arena.size_bytes, self.slab_bytes))
        super().__init__(plan, images, arena)

    @property
    def staging(self) -> Staging:
        return "slabs"

    @property
    def save_type(self) -> type[BlobSave]:
        return BouncedSave

    def _lay_out(self, blob: int, image: BlobImage) -> None:
        parts = [
            _Part(blob=blob, start=at, end=min(at + self.slab_bytes, image.size_bytes), slab=next(self._next_slab))
            for at in range(0, image.size_bytes, self.slab_bytes)
        ]
        self.parts += parts
        for start, data in [(0, image.header), *((start, bytes(length)) for start, length in image.pads)]:
            for part, begin, end in self._overlaps(parts, start, start + len(data)):
                part.constants.append((part.slab + begin - part.start, data[begin - start : end - start]))
        for place in image.places:
            piece = self.plan.mine[place.chunk_index]
            dtype = getattr(torch, piece.chunk.dtype)
            whole = place.byte_offset, place.byte_offset + place.byte_length
            for part, begin, end in self._overlaps(parts, *whole):
                count = (end - begin) // dtype.itemsize  # a slab ends at a multiple of every item size
                target = self.arena.tensor(part.slab + begin - part.start, (count,), dtype)
                if (begin, end) == whole:
                    part.pieces.append(piece)
                    part.targets.append(target.view(piece.chunk.shape))
                else:
                    first = (begin - place.byte_offset) // dtype.itemsize
                    part.cuts.append(_Cut(piece=piece, target=target, first=first, last=first + count))

    def _overlaps(self, parts: list[_Part], start: int, end: int) -> Iterator[tuple[_Part, int, int]]:
        """The parts that bytes ``[start, end)`` of a blob lie in, with what of these bytes is in each."""
        for part in parts[start // self.slab_bytes : -(-end // self.slab_bytes)]:
            yield part, max(start, part.start), min(end, part.end)


class BouncedSave(BlobSave):
    """One save through the slabs: :meth:`stage` returns when all is written."""

    _gave_up = False

    @torch.no_grad()
    def stage(
        self, memory_of: Callable[[Piece], torch.Tensor], later: LateCopy | None = None, *, deadline: float
    ) -> None:
        """Copy and write every piece. The sources may change once this returns: nothing is left to `later`.

        Raises:
            DeadlineExceeded: it was not written by `deadline` (of :func:`time.monotonic`).
            StoreError: why it can't be written.
        """
        assert isinstance(self.layout, BouncedLayout)
        counters.add("ckpt.save.blocking")
        self._open_targets()
        for target in self._targets:
            target.reused = True
        in_use: dict[int, list[tuple[list[Future[None]], list[Future[None]]]]] = {}
        for part in self.layout.parts:
            self._await(in_use.pop(part.slab, []), deadline)
            _fill(part, self.layout.arena, memory_of)
            data = self.layout.arena.view(part.slab, part.slab + part.end - part.start)
            in_use[part.slab] = [
                self._process(part.blob, part.start + at, data[at : at + WRITE_BYTES])
                for at in range(0, len(data), WRITE_BYTES)
            ]
        for futures in in_use.values():
            self._await(futures, deadline)

    def _await(self, running: list[tuple[list[Future[None]], list[Future[None]]]], deadline: float) -> None:
        """Wait until a slab is free: written to the root and, well or not, to the node's disk."""
        try:
            self._root.await_all([future for needed, _ in running for future in needed], deadline)
            more = [future for _, wanted in running for future in wanted]
            if wait(more, max(0.0, deadline - monotonic())).not_done:
                raise DeadlineExceeded("the node's disk must have taken a slab by the deadline of the save")
        except DeadlineExceeded:
            self._gave_up = True
            raise

    def abort(self) -> None:
        """Throw away what has no name yet. A write that hung until the deadline is not waited for."""
        if self._gave_up:
            threading.Thread(target=super().abort, name="stoker-abort", daemon=True).start()
        else:
            super().abort()


def _fill(part: _Part, arena: Arena, memory_of: Callable[[Piece], torch.Tensor]) -> None:
    for at, constant in part.constants:
        arena.view(at, at + len(constant))[:] = constant
    copy_all(part.targets, [memory_of(piece) for piece in part.pieces])
    for cut in part.cuts:
        copy_elements(cut.target, memory_of(cut.piece), cut.first, cut.last)


def copy_elements(target: torch.Tensor, source: torch.Tensor, first: int, last: int) -> None:
    """Copy elements ``[first, last)`` of `source`, in row-major order, to a flat `target`; `source` has any strides."""
    if last - first == source.numel():
        target.view(source.shape).copy_(source)
        return
    row = source[0].numel()
    while first < last:
        i, skip = divmod(first, row)
        rows = (last - first) // row
        if skip == 0 and rows:
            count = rows * row
            target[:count].view(rows, *source.shape[1:]).copy_(source[i : i + rows])
        else:
            count = min(row - skip, last - first)
            copy_elements(target[:count], source[i], skip, skip + count)
        target, first = target[count:], first + count
