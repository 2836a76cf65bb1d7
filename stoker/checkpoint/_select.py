"""What to read: which bytes of a step fill which memory, worked out for all tensors at once.

A manifest may hold a million chunks, of which a rank needs a few thousand. Overlaps are computed as columns, in batches that
bound the memory; Python objects are made only for chunks that are needed. An overlap that is one run of bytes on both
sides is read straight to its place; any other goes through one temporary buffer and a strided copy.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch

from ._cover import Flags, Ints
from .blob import DTYPES, Chunk
from .manifest import Manifest
from .reader import Span

__all__ = ["Selection", "select"]

_PAIRS_AT_ONCE = 1 << 17


@dataclass(frozen=True, kw_only=True)
class Selection:
    """What a restore has to do.

    Attributes:
        wanted: by path of the blob, the bytes to read and where to put them.
        copies: to be called when all of `wanted` is filled.
    """

    wanted: dict[str, list[Span]] = field(default_factory=dict)
    copies: list[Callable[[], object]] = field(default_factory=list)

    @property
    def num_bytes(self) -> int:
        """Bytes of all spans."""
        return sum(len(span.sink) for spans in self.wanted.values() for span in spans)


class _Overlaps(NamedTuple):
    """Columns of (box that is wanted, chunk that is stored) pairs that overlap; one row each.

    Attributes:
        box, row: index of the box, and of the chunk in the manifest.
        start: (k, D), of the overlap in the tensor.
        size: (k, D).
        first, last: first and last element of the overlap in the chunk, counted in C order.
        is_run: whether it is all elements from first to last.
        mine: its first element in the box.
        is_mine_run: whether it is one run in the box.
    """

    box: Ints
    row: Ints
    start: Ints
    size: Ints
    first: Ints
    last: Ints
    is_run: Flags
    mine: Ints
    is_mine_run: Flags


def _strides(shape: Ints) -> Ints:
    """Of C order, for each row."""
    strides = np.ones_like(shape)
    if shape.shape[1] > 1:
        np.cumprod(shape[:, :0:-1], axis=1, out=strides[:, -2::-1])
    return strides


def _is_one_run(size: Ints, shape: Ints) -> Flags:
    """Whether a box of `size` is contiguous in an array of `shape` in C order, for each row.

    >>> _is_one_run(np.array([[2, 8], [1, 3], [2, 3]]), np.array([[4, 8]] * 3)).tolist()
    [True, True, False]
    """
    run: Flags = np.ones(len(size), bool)
    partial: Flags = np.zeros(len(size), bool)
    for d in reversed(range(size.shape[1])):
        run &= ~partial | (size[:, d] == 1)
        partial |= size[:, d] != shape[:, d]
    return run


def _overlaps(manifest: Manifest, index: Ints, low: Ints, shape: Ints) -> Iterable[_Overlaps]:
    """For boxes of `shape` at `low` in the tensors `index`: what overlaps with what is stored, in batches."""
    table = manifest.columns
    counts = table.starts[index + 1] - table.starts[index]
    ends = np.cumsum(counts)
    begin = 0
    while begin < len(index):
        done = int(ends[begin - 1]) if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        part = counts[begin:end]
        box = np.repeat(np.arange(begin, end), part)
        row = np.arange(int(part.sum())) - np.repeat(np.cumsum(part) - part, part) + table.starts[index[box]]
        theirs, their_shape = table.boxes.offsets[row], table.boxes.shape[row]
        start = np.maximum(low[box], theirs)
        size = np.minimum((low + shape)[box], theirs + their_shape) - start
        keep: Flags = (size > 0).all(axis=1)
        box, row, start, size = box[keep], row[keep], start[keep], size[keep]
        theirs, their_shape = theirs[keep], their_shape[keep]
        strides = _strides(their_shape)
        first = ((start - theirs) * strides).sum(axis=1)
        yield _Overlaps(
            box=box,
            row=row,
            start=start,
            size=size,
            first=first,
            last=first + ((size - 1) * strides).sum(axis=1),
            is_run=_is_one_run(size, their_shape),
            mine=((start - low[box]) * _strides(shape[box])).sum(axis=1),
            is_mine_run=_is_one_run(size, shape[box]),
        )
        begin = end


def _flat(memory: torch.Tensor) -> Any:
    """The bytes of a contiguous tensor in host memory as an array; None of any other."""
    if memory.device.type != "cpu" or not memory.is_contiguous() or memory.is_conj() or memory.is_neg():
        return None
    # Not view(-1): a contiguous tensor may have any stride in a dimension of one.
    return memory.as_strided((memory.numel(),), (1,)).view(torch.uint8).numpy()


@torch.no_grad()
def select(manifest: Manifest, boxes: Iterable[tuple[Chunk, torch.Tensor]]) -> Selection:
    """What to read to fill the memory of each box.

    A box is (its place in its tensor, its memory, of the tensor's dtype and any strides, on any device). Names, shapes
    and dtypes must match the manifest: the caller has checked them. Some microseconds for each chunk that is needed, and
    a fraction of one for each that is not.
    """
    chunks: list[Chunk] = []
    memories: list[torch.Tensor] = []
    for chunk, memory in boxes:
        if memory.numel():
            chunks.append(chunk)
            memories.append(memory)
    selection = Selection()
    if not chunks:
        return selection
    table = manifest.columns
    width = table.boxes.offsets.shape[1]
    index = np.array([manifest.index_of(chunk.name) for chunk in chunks], np.int64)
    low = _matrix([chunk.offsets for chunk in chunks], width, 0)
    shape = _matrix([chunk.shape for chunk in chunks], width, 1)
    itemsize = [DTYPES[chunk.dtype].itemsize for chunk in chunks]
    flats = [_flat(memory) for memory in memories]
    paths = list(manifest.blobs)
    for found in _overlaps(manifest, index, low, shape):
        rows = found.row
        begins = table.spans.byte_offset[rows].tolist()
        of_blob = table.spans.blob[rows].tolist()
        numbers = (column.tolist() for column in (found.box, found.first, found.last, found.mine))
        straight = (found.is_run & found.is_mine_run).tolist()
        for k, (box, first, last, mine) in enumerate(zip(*numbers, strict=True)):
            width_bytes = itemsize[box]
            start = begins[k] + first * width_bytes
            spans = selection.wanted.setdefault(paths[of_blob[k]], [])
            flat = flats[box]
            if straight[k] and flat is not None:
                at = mine * width_bytes
                spans.append(Span(start=start, sink=flat[at : at + (last - first + 1) * width_bytes]))
                continue
            chunk, memory = chunks[box], memories[box]
            ndim = len(chunk.shape)
            size = found.size[k, :ndim].tolist()
            strides = _strides(table.boxes.shape[rows[k] : rows[k] + 1])[0, :ndim].tolist()
            corner = (found.start[k, :ndim] - low[box, :ndim]).tolist()
            region = memory[tuple(slice(a, a + n) for a, n in zip(corner, size, strict=True))]
            buffer = torch.empty((last - first + 1) * width_bytes, dtype=torch.uint8, device="cpu")
            spans.append(Span(start=start, sink=buffer.numpy()))
            selection.copies.append(_copy(region, torch.as_strided(buffer.view(memory.dtype), size, strides)))
    return selection


def _matrix(rows: Sequence[tuple[int, ...]], width: int, fill: int) -> Ints:
    return np.array([row + (fill,) * (width - len(row)) for row in rows], np.int64).reshape(len(rows), width)


def _copy(target: torch.Tensor, source: torch.Tensor) -> Callable[[], object]:
    return lambda: target.copy_(source)
