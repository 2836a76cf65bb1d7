"""Which elements of a tensor a rank has, from its placements alone: runs of each dimension, and the boxes that they make.

A mesh dimension that shards a tensor dimension splits what the dimensions before it left over, as ``torch.chunk`` does.
Two kinds of splits leave several runs of rows instead of one: a strided split (FSDP2 above tensor parallelism on the same
dimension) and any split of what is strided already.

A strided placement stands for "split last, though named first": FSDP2 splits the rows that tensor parallelism gave a
rank. torch writes it as a split of each of `factor` parts, from the left, which is the same where all divides evenly, and
for some uneven sizes is not (7 rows over 3 x 2 ranks: the last row lies on rank (2, 1), the placements say (2, 0)). So both
readings are worked out, and the one that has as many rows as the rank is the layout.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import product
from math import prod
from typing import NamedTuple, TypeAlias

__all__ = ["Box", "Run", "Split", "boxes_of", "runs_by_parts", "runs_by_turns"]

Run: TypeAlias = tuple[int, int]
"""Indices ``[start, end)`` of one dimension."""


class Split(NamedTuple):
    """One mesh dimension that shards a tensor dimension.

    Attributes:
        parts: its size.
        place: of this rank in it, from 0.
        factor: of a strided placement; 0 for a plain one.
    """

    parts: int
    place: int
    factor: int = 0


class Box(NamedTuple):
    """One hyper-rectangle of a tensor that a rank has: where in the tensor, how large, where in the rank's own memory."""

    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    at: tuple[int, ...]


def _length(runs: Sequence[Run]) -> int:
    return sum(end - start for start, end in runs)


def _slice(runs: Sequence[Run], start: int, end: int) -> list[Run]:
    """Elements ``[start, end)`` of what `runs` make when put behind each other."""
    found = []
    at = 0
    for first, last in runs:
        low, high = max(first, first + start - at), min(last, first + end - at)
        if low < high:
            found.append((low, high))
        at += last - first
    return found


def _part(runs: Sequence[Run], parts: int, index: int) -> list[Run]:
    size = -(-_length(runs) // parts)
    return _slice(runs, size * index, size * (index + 1))


def _joined(runs: Sequence[Run]) -> tuple[Run, ...]:
    joined: list[Run] = []
    for start, end in runs:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return tuple(joined)


@lru_cache(maxsize=1 << 14)
def runs_by_parts(size: int, splits: tuple[Split, ...]) -> tuple[Run, ...]:
    """The runs of a rank as DTensor reads placements: each split in turn, a strided one within each of its parts.

    >>> runs_by_parts(8, (Split(2, 0, 2),)), runs_by_parts(8, (Split(2, 0, 2), Split(2, 1)))
    (((0, 2), (4, 6)), ((4, 6),))
    """
    runs: list[Run] = [(0, size)] if size else []
    for split in splits:
        if split.factor:
            parts = [_part(runs, split.factor, i) for i in range(split.factor)]
            runs = [run for part in parts for run in _part(part, split.parts, split.place)]
        else:
            runs = _part(runs, split.parts, split.place)
    return _joined(runs)


@lru_cache(maxsize=1 << 14)
def runs_by_turns(size: int, splits: tuple[Split, ...]) -> tuple[Run, ...] | None:
    """The runs of a rank as FSDP2 makes them: a strided split comes after those that are named behind it.

    None where the factor of a strided split is not the number of parts behind it: then it is no such split.

    >>> runs_by_turns(7, (Split(3, 2, 2), Split(2, 1))), runs_by_parts(7, (Split(3, 2, 2), Split(2, 1)))
    (((6, 7),), ())
    """
    order: list[Split] = []
    for i, split in reversed(list(enumerate(splits))):
        if split.factor:
            if split.factor != prod(later.parts for later in splits[i + 1 :]):
                return None
            order.append(split)
        else:
            order.insert(0, split)
    runs: list[Run] = [(0, size)] if size else []
    for split in order:
        runs = _part(runs, split.parts, split.place)
    return _joined(runs)


def _runs(size: int, splits: tuple[Split, ...], local_size: int) -> tuple[Run, ...] | None:
    """The runs that have `local_size` elements in all; None if neither reading has."""
    if any(split.factor for split in splits):
        runs = runs_by_turns(size, splits)
        if runs is not None and _length(runs) == local_size:
            return runs
    runs = runs_by_parts(size, splits)
    return runs if _length(runs) == local_size else None


def boxes_of(shape: Sequence[int], splits: Sequence[tuple[Split, ...]], local_shape: Sequence[int]) -> list[Box] | None:
    """The boxes of a tensor of `shape` that a rank has, in the order of its memory, which has `local_shape`.

    Together they are its memory, each element once. None if `splits` (those of each dimension) do not lead to that shape.

    >>> boxes_of((8, 3), [(Split(2, 1, 2),), ()], (4, 3))
    [Box(offsets=(2, 0), shape=(2, 3), at=(0, 0)), Box(offsets=(6, 0), shape=(2, 3), at=(2, 0))]
    """
    if len(local_shape) != len(shape):
        return None
    by_dimension: list[tuple[Run, ...]] = []
    for size, of_dimension, local_size in zip(shape, splits, local_shape, strict=True):
        runs = _runs(size, of_dimension, local_size)
        if runs is None:
            return None
        by_dimension.append(runs)
    return list(_product(by_dimension))


def _product(by_dimension: Sequence[tuple[Run, ...]]) -> Iterator[Box]:
    if all(len(runs) == 1 for runs in by_dimension):
        offsets = tuple(runs[0][0] for runs in by_dimension)
        yield Box(offsets, tuple(runs[0][1] - runs[0][0] for runs in by_dimension), (0,) * len(offsets))
        return
    placed = []
    for runs in by_dimension:
        at, here = 0, []
        for start, end in runs:
            here.append((start, end - start, at))
            at += end - start
        placed.append(here)
    for corner in product(*placed):
        yield Box(*(tuple(part[i] for part in corner) for i in range(3)))
