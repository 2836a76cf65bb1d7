"""From a committed step back into live objects, for any world size and sharding.

Every rank works out which bytes its own chunks need: the overlap of two hyper-rectangles. An overlap that is one run of
bytes on both sides is read straight to its place; any other goes through one temporary buffer and a strided copy.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

import torch
from torch import nn

from ..errors import TreeMismatch
from . import values
from .blob import Chunk
from .manifest import TensorInfo, WrittenChunk
from .plan import dtype_name, local_part, local_pieces
from .reader import Span, StepReader
from .tree import (
    Stateful,
    TreeView,
    empty_state,
    group_differences,
    names_of_parameters,
    parameter_names,
    put_at,
    restore_optimizer,
    state_path,
    update_in_place,
    view_tree,
)

__all__ = ["RestoreReport", "read_boxes", "read_tensors", "restore_tree"]


@dataclass(frozen=True, kw_only=True)
class RestoreReport:
    """What a restore did.

    Attributes:
        step: the step that was restored.
        missing: names in the tree that the checkpoint does not have (with ``strict=False``).
        unexpected: names in the checkpoint that the tree does not have (with ``strict=False``).
        values: the plain values at the top level of the tree, as restored.
        num_bytes: bytes that this rank read, each verified.
        seconds: wall time.
    """

    step: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: float = 0.0


# -------------------------------------------------------------------------------------------------------------- tensors


def read_tensors(reader: StepReader, targets: Mapping[str, torch.Tensor]) -> int:
    """Fill `targets` (name to plain tensor or DTensor, in place) from a step. Returns the bytes read.

    Names, shapes and dtypes must match the manifest: the caller has checked them.
    """
    pieces = (
        (piece.chunk, local_part(tensor)) for name, tensor in targets.items() for piece in local_pieces(name, tensor, 1)
    )
    return read_boxes(reader, ((chunk, memory, reader.manifest.chunks_of(chunk.name)) for chunk, memory in pieces))


@torch.no_grad()
def read_boxes(reader: StepReader, boxes: Iterable[tuple[Chunk, torch.Tensor, Iterable[WrittenChunk]]]) -> int:
    """Fill the memory of each box from the written chunks given with it. Returns the bytes read.

    A box is (its place in its tensor, its memory, of the tensor's dtype and any strides, chunks that cover it).
    """
    wanted: dict[str, list[Span]] = {}
    strided: list[Callable[[], object]] = []
    for mine, memory, chunks in boxes:
        for written in chunks:
            _want(mine, memory, written, wanted, strided)
    num_bytes = reader.read(wanted)
    for copy in strided:
        copy()
    return num_bytes


def _want(
    mine: Chunk,
    memory: torch.Tensor,
    written: WrittenChunk,
    wanted: dict[str, list[Span]],
    strided: list[Callable[[], object]],
) -> None:
    """Add what `mine` needs of a written chunk."""
    theirs = written.chunk
    starts = [max(a, b) for a, b in zip(mine.offsets, theirs.offsets, strict=True)]
    sizes = [
        min(a + m, b + n) - start
        for a, m, b, n, start in zip(mine.offsets, mine.shape, theirs.offsets, theirs.shape, starts, strict=True)
    ]
    if any(size <= 0 for size in sizes):
        return
    strides = _row_major_strides(theirs.shape)
    in_theirs = [start - offset for start, offset in zip(starts, theirs.offsets, strict=True)]
    first = sum(i * stride for i, stride in zip(in_theirs, strides, strict=True))
    region = memory[tuple(slice(s - o, s - o + n) for s, o, n in zip(starts, mine.offsets, sizes, strict=True))]
    itemsize = memory.dtype.itemsize
    byte_start = written.byte_offset + first * itemsize
    if _is_one_run(sizes, theirs.shape) and region.is_contiguous() and region.device.type == "cpu":
        # Not view(-1): a contiguous tensor may have any stride in a dimension of one.
        sink = region.as_strided((region.numel(),), (1,)).view(torch.uint8).numpy()
        wanted.setdefault(written.blob, []).append(Span(start=byte_start, sink=sink))
        return
    last = first + sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    buffer = torch.empty((last - first + 1) * itemsize, dtype=torch.uint8)
    wanted.setdefault(written.blob, []).append(Span(start=byte_start, sink=buffer.numpy()))
    source = torch.as_strided(buffer.view(memory.dtype), sizes, strides)
    strided.append(lambda: region.copy_(source))


def _row_major_strides(shape: Sequence[int]) -> list[int]:
    return [prod(shape[i + 1 :]) for i in range(len(shape))]


def _is_one_run(sizes: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box of `sizes` is contiguous in a row-major array of `shape`.

    >>> _is_one_run([2, 8], [4, 8]), _is_one_run([1, 3], [4, 8]), _is_one_run([2, 3], [4, 8]), _is_one_run([], [])
    (True, True, False, True)
    """
    partial = False
    for size, extent in zip(reversed(sizes), reversed(shape), strict=True):
        if partial and size != 1:
            return False
        partial = partial or size != extent
    return True


# ----------------------------------------------------------------------------------------------------------------- tree


def restore_tree(
    tree: dict[str, Any],
    reader: StepReader,
    *,
    rank: int,
    step: int,
    names: Sequence[str] | None,
    strict: bool,
) -> RestoreReport:
    """Restore `tree` in place from the step behind `reader`, as rank `rank`.

    Raises:
        TreeMismatch: names, shapes or dtypes differ; all of them in one message, and nothing was written.
    """
    job = _Restore(tree, reader, rank, names)
    missing, unexpected = job.compare(strict=strict)
    targets = job.targets()
    num_bytes = read_tensors(reader, targets)
    job.apply(targets)
    plain = {
        name: tree[name] for name, item in job.view.items.items() if item.kind == "value" and name in job.documents
    }
    return RestoreReport(
        step=step, missing=tuple(missing), unexpected=tuple(unexpected), values=plain, num_bytes=num_bytes
    )


class _Restore:
    """The steps of one restore, in order: compare, targets, apply."""

    def __init__(self, tree: dict[str, Any], reader: StepReader, rank: int, names: Sequence[str] | None) -> None:
        self.tree, self.manifest, self._rank, self._names = tree, reader.manifest, rank, names
        self.view: TreeView = view_tree(tree)
        self.names_of = names_of_parameters(tree)
        self.documents: dict[str, dict[str, Any]] = {}
        self._from_another_rank: set[str] = set()
        for name in self.view.items:
            path = self._document_path(name)
            if path is not None:
                self.documents[name] = values.loads(reader.read_state(path), place=path)

    def _document_path(self, name: str) -> str | None:
        of_job, own, first = state_path(name), state_path(name, self._rank), state_path(name, 0)
        if own not in self.manifest.states and first in self.manifest.states:
            self._from_another_rank.add(name)
            return first
        return next((path for path in (of_job, own) if path in self.manifest.states), None)

    def _wanted(self, name: str) -> bool:
        """Whether `names` asks for an item or a tensor. A module goes by tensor, any other item as a whole."""
        if self._names is None:
            return True
        item = name.split(".", 1)[0]
        if item == name or self.view.items[item].kind != "module":
            return any(fnmatchcase(item, pattern.split(".", 1)[0]) for pattern in self._names)
        return any(pattern == item or fnmatchcase(name, pattern) for pattern in self._names)

    def compare(self, *, strict: bool) -> tuple[list[str], list[str]]:
        """All differences between tree and checkpoint; raises unless they are allowed."""
        saved_items = {path.removeprefix("state/").split(".", 1)[0] for path in self.manifest.states}
        missing = [name for name in self.view.items if name not in saved_items and self._wanted(name)]
        unexpected = sorted(name for name in saved_items - set(self.view.items) if self._wanted(name))
        wrong: list[str] = []
        for name, tensor in self.view.tensors.items():
            owner = name.split(".", 1)[0]
            if not self._wanted(name) or owner in missing:
                continue
            if name in self.manifest:
                wrong += _difference(name, tensor, self.manifest.tensor(name))
            elif self.view.items[owner].kind in ("module", "value"):
                # Optimizer and Stateful objects take the saved state as it is: they can't lack a tensor.
                missing.append(name)
        for name in self.manifest.tensor_names:
            item = self.view.items.get(name.split(".", 1)[0])
            if item is not None and item.kind == "module" and name not in self.view.tensors and self._wanted(name):
                unexpected.append(name)
        for name, thing in self.tree.items():
            if isinstance(thing, torch.optim.Optimizer) and name in self.documents and self._wanted(name):
                wrong += group_differences(name, thing, self.names_of, self.documents[name]["value"])
        if wrong or (strict and (missing or unexpected)):
            parts = [*wrong, *(f"{n}: not in the checkpoint" for n in missing)]
            parts += [f"{n}: only in the checkpoint" for n in unexpected]
            shown = "; ".join(parts[:50]) + (f"; and {len(parts) - 50} more" if len(parts) > 50 else "")
            hint = "" if wrong else "names= restores a part, strict=False what both have"
            raise TreeMismatch("tree and checkpoint must have the same names and shapes", value=shown, hint=hint)
        return missing, unexpected

    def targets(self) -> dict[str, torch.Tensor]:
        """The tensor that each saved one goes to; what the tree does not have yet is made here."""
        self._parameters = {
            f"{key}.state.{name}": (parameter, group)
            for key, thing in self.tree.items()
            if isinstance(thing, torch.optim.Optimizer)
            for name, parameter, group in parameter_names(thing, self.names_of)
        }
        targets = {}
        for name in self.manifest.tensor_names:
            item = self.view.items.get(name.split(".", 1)[0])
            if item is None or not self._wanted(name):
                continue
            live = self.view.tensors.get(name)
            if item.kind == "stateful" or (live is None and item.kind != "module"):
                targets[name] = self._new(name, live)
            elif live is not None:
                targets[name] = live
        return targets

    def _new(self, name: str, live: torch.Tensor | None) -> torch.Tensor:
        info = self.manifest.tensor(name)
        dtype, shape = getattr(torch, info.dtype), tuple(info.global_shape)
        if live is not None and tuple(live.shape) == shape:
            return torch.empty_like(live, dtype=dtype, requires_grad=False)
        owner = self._parameters.get(name.rpartition(".")[0])
        if owner is not None:
            return empty_state(*owner, shape, dtype)
        return torch.empty(shape, dtype=dtype)

    def apply(self, targets: Mapping[str, torch.Tensor]) -> None:
        """Put the plain values back; all tensors are filled."""
        for name, document in self.documents.items():
            if not self._wanted(name):
                continue
            value, thing = document["value"], self.tree[name]
            # torch's planner knows no modules: a step saved through it lists their parameters, filled by now, as well.
            filled = {path[0] for path, _ in document["tensors"] if isinstance(thing, nn.Module) and len(path) == 1}
            for path, tensor in document["tensors"]:
                if not path or path[0] not in filled:
                    value = put_at(value, tuple(path), targets[tensor])
            if isinstance(thing, nn.Module):
                _restore_extra_state(thing, {key: state for key, state in value.items() if key not in filled})
            elif isinstance(thing, torch.optim.Optimizer):
                restore_optimizer(thing, self.names_of, value)
            elif name in self._from_another_rank:
                thing.load_for_new_rank(value, self._rank)
            elif isinstance(thing, Stateful):
                thing.load_state_dict(value)
            else:
                self.tree[name] = update_in_place(thing, value)


def _difference(name: str, tensor: torch.Tensor, info: TensorInfo) -> list[str]:
    mine, theirs = (dtype_name(tensor.dtype), tuple(tensor.shape)), (info.dtype, tuple(info.global_shape))
    if mine == theirs:
        return []
    return [f"{name}: {mine[0]}{list(mine[1])} in the tree, {theirs[0]}{list(theirs[1])} in the checkpoint"]


def _restore_extra_state(module: nn.Module, saved: Mapping[str, Any]) -> None:
    for name, value in saved.items():
        owner = module.get_submodule(name.rpartition(".")[0])
        owner.set_extra_state(value)
