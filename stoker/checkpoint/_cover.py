"""Whether boxes cover tensors exactly: each element in one box, none in two. Vectorised over all tensors at once.

Sizes and offsets are matrices of one row a tensor or box. Beyond a tensor's own dimensions they are filled up with size 1
and offset 0, which changes no volume and no overlap.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

__all__ = ["Flags", "Ints", "first_wrong_region", "sort_order", "uncovered_tensor"]

Ints: TypeAlias = NDArray[np.int64]
Flags: TypeAlias = Any  # arrays of bool; numpy's own types for comparisons differ from version to version

_MAX_CUT_DIMENSIONS = 16
_CORNERS_AT_ONCE = 1 << 19  # bounds the memory of the check: some 30 MB
_MAX_SEARCHED_CELLS = 1 << 22


def sort_order(keys: Sequence[Ints]) -> Ints:
    """The stable order of rows by `keys`, the first one most significant; no key is negative.

    >>> sort_order([np.array([1, 0, 1]), np.array([5, 9, 4])]).tolist()
    [1, 2, 0]
    """
    used = [key for key in keys if len(key) and key.max() > 0]
    if math.prod(int(key.max()) + 1 for key in used) < 1 << 63:
        # One sort of packed keys takes a fraction of what np.lexsort takes for several.
        packed = np.zeros(len(keys[0]), np.int64)
        for key in used:
            packed *= int(key.max()) + 1
            packed += key
        if bool((packed[1:] >= packed[:-1]).all()):
            return np.arange(len(packed))
        return np.argsort(packed, kind="stable")
    return np.lexsort(list(reversed(used)))


def uncovered_tensor(global_shape: Ints, tensor: Ints, offsets: Ints, shape: Ints) -> int | None:
    """The first tensor of which some element is in no box or in several; None if there is none.

    Args:
        global_shape: (m, D), of the tensors.
        tensor: (n,), ascending: whose box it is.
        offsets, shape: (n, D), of the boxes, which lie inside their tensors. Empty ones cover nothing.
    """
    filled: Flags = (global_shape > 0).all(axis=1)
    solid: Flags = (shape > 0).all(axis=1)
    if not solid.all():
        tensor, offsets, shape = tensor[solid], offsets[solid], shape[solid]
    # A dimension that every box of a tensor spans whole says nothing; most tensors are cut in one at most.
    cut: Flags = np.zeros(global_shape.shape, bool)
    for d in range(cut.shape[1]):
        cut[tensor[shape[:, d] != global_shape[tensor, d]], d] = True
    num_cut = cut.sum(axis=1)
    wrong: Flags = num_cut > _MAX_CUT_DIMENSIONS
    uncut = filled & (num_cut == 0)
    wrong |= uncut & (np.bincount(tensor, minlength=len(filled)) != 1)
    lines = np.flatnonzero(num_cut[tensor] == 1)
    along = cut.argmax(axis=1)[tensor[lines]] if len(lines) else lines
    wrong[_broken_lines(global_shape, tensor[lines], along, offsets[lines, along], shape[lines, along])] = True
    many: Flags = (num_cut > 1) & ~wrong
    for pattern in np.unique(cut[many], axis=0):
        dimensions = np.flatnonzero(pattern)
        members: Flags = many & (cut == pattern).all(axis=1)
        rows = np.flatnonzero(members[tensor])
        for part in _batches(rows, tensor, _CORNERS_AT_ONCE >> len(dimensions)):
            own = np.unique(tensor[part])
            # The tensor itself, with the opposite sign, must cancel its boxes.
            low = np.concatenate([offsets[part][:, dimensions], np.zeros((len(own), len(dimensions)), np.int64)])
            size = np.concatenate([shape[part][:, dimensions], global_shape[own][:, dimensions]])
            sign = np.repeat([1, -1], [len(part), len(own)])
            wrong[_unbalanced(np.concatenate([tensor[part], own]), low, size, sign)] = True
    return int(np.argmax(wrong)) if wrong.any() else None


def _broken_lines(global_shape: Ints, tensor: Ints, along: Ints, start: Ints, length: Ints) -> Ints:
    """Tensors, cut along one dimension each, whose intervals do not follow each other from end to end."""
    order = sort_order([tensor, start])
    tensor, along, start, end = tensor[order], along[order], start[order], (start + length)[order]
    first: Flags = np.ones(len(tensor), bool)
    first[1:] = tensor[1:] != tensor[:-1]
    last: Flags = np.ones(len(tensor), bool)
    last[:-1] = first[1:]
    expected = np.zeros(len(tensor), np.int64)
    expected[1:] = end[:-1]
    expected[first] = 0
    return np.concatenate([tensor[start != expected], tensor[last & (end != global_shape[tensor, along])]])


def _batches(rows: Ints, tensor: Ints, size: int) -> Iterator[Ints]:
    """`rows` in runs of about `size` that split no tensor."""
    of = tensor[rows]
    start = 0
    while start < len(rows):
        end = min(start + max(1, size), len(rows))
        end = int(np.searchsorted(of, of[end - 1], side="right"))
        yield rows[start:end]
        start = end


def _unbalanced(tensor: Ints, low: Ints, size: Ints, sign: Ints) -> Ints:
    """Tensors whose signed boxes do not add up to zero everywhere.

    Taking differences along each dimension turns a box into its corners with alternating signs, and is reversible; so the
    boxes cancel exactly if at each point the signs of the corners there add up to zero. No pair of boxes is compared.
    """
    dimensions = low.shape[1]
    uppers = list(product((0, 1), repeat=dimensions))
    corners = np.concatenate([low + size * np.array(upper) for upper in uppers])
    signs = np.concatenate([sign * (-1) ** sum(upper) for upper in uppers])
    of = np.tile(tensor, len(uppers))
    order = sort_order([of, *(corners[:, d] for d in range(dimensions))])
    of, corners = of[order], corners[order]
    new: Flags = np.ones(len(of), bool)
    new[1:] = (of[1:] != of[:-1]) | (corners[1:] != corners[:-1]).any(axis=1)
    starts = np.flatnonzero(new)
    return np.unique(of[starts[np.add.reduceat(signs[order], starts) != 0]])


def first_wrong_region(low: Ints, high: Ints, shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
    """Where in one tensor of `shape` the boxes ``[low, high)`` cover not exactly once: (start, end) by dimension.

    Searches the grid of all borders; None if nothing is wrong there, or if the grid has too many cells to search.

    >>> first_wrong_region(np.array([[0], [3]]), np.array([[2], [5]]), (5,))
    [(2, 3)]
    """
    borders = [np.unique(np.concatenate([[0, size], low[:, d], high[:, d]])) for d, size in enumerate(shape)]
    if math.prod(len(border) for border in borders) > _MAX_SEARCHED_CELLS:
        return None
    cover = np.zeros([len(border) - 1 for border in borders], np.int64)
    for a, b in zip(low, high, strict=True):
        cells = tuple(slice(*np.searchsorted(border, (a[d], b[d]))) for d, border in enumerate(borders))
        cover[cells] += 1
    wrong: Flags = np.asarray(cover != 1)
    if not wrong.any():
        return None
    cell = np.unravel_index(int(np.argmax(wrong)), cover.shape)
    return [(int(border[i]), int(border[i + 1])) for border, i in zip(borders, cell, strict=True)]
