"""From a committed step back into live objects, for any world size and sharding.

Every rank works out which bytes its own chunks need (:mod:`._select`), after all differences between tree and checkpoint
are known and before anything is written.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from ..errors import StokerError, TreeMismatch
from . import values
from ._select import select
from .blob import Chunk
from .handover import Handover, node_id
from .manifest import TensorInfo
from .plan import dtype_name, local_part, local_pieces
from .reader import StepReader
from .tree import (
    EXTRA_STATE,
    Stateful,
    TreeView,
    empty_state,
    group_differences,
    is_extra_state,
    names_of_parameters,
    own_part,
    parameter_names,
    put_at,
    restore_extra_state,
    restore_optimizer,
    state_path,
    unite_documents,
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
        bytes_from: `num_bytes` by the tier they came from: ``"arena"``, ``"local"``, ``"root"``, or ``"node"``: another
            rank of this node had read them.
        num_healed: blocks that were damaged in a nearer tier and came from the next one.
    """

    step: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    num_bytes: int = 0
    seconds: float = 0.0
    bytes_from: dict[str, int] = field(default_factory=dict)
    num_healed: int = 0


# -------------------------------------------------------------------------------------------------------------- tensors


def read_tensors(reader: StepReader, targets: Mapping[str, torch.Tensor]) -> int:
    """Fill `targets` (name to plain tensor or DTensor, in place) from a step. Returns the bytes read.

    Names, shapes and dtypes must match the manifest: the caller has checked them.
    """
    return read_boxes(
        reader,
        (
            (piece.chunk, piece.memory(tensor))
            for name, tensor in targets.items()
            for piece in local_pieces(name, tensor, 1)
        ),
    )


def read_boxes(reader: StepReader, boxes: Iterable[tuple[Chunk, torch.Tensor]]) -> int:
    """Fill the memory of each box: (its place in its tensor, its memory). Returns the bytes read."""
    selection = select(reader.manifest, boxes)
    num_bytes = reader.read(selection.wanted)
    with torch.no_grad():
        for copy in selection.copies:
            copy()
    return num_bytes


# ----------------------------------------------------------------------------------------------------------------- tree


def restore_tree(
    tree: dict[str, Any],
    reader: StepReader,
    *,
    rank: int,
    step: int,
    names: Sequence[str] | None,
    strict: bool,
    of_all_ranks: Callable[[Any], list[Any]],
    handover: Callable[[Collection[int] | None], Handover | None] = lambda neighbours: None,
) -> RestoreReport:
    """Restore `tree` in place from the step behind `reader`, as rank `rank`.

    `of_all_ranks` gives each rank the values of all: what one rank of a job can't restore, no rank does. `handover` gets
    the ranks of this node, or None if they are not known, and makes what they share blocks by.

    Raises:
        TreeMismatch: names, shapes or dtypes differ; all of them in one message, and nothing was written.
    """
    try:
        job = _Restore(tree, reader, rank=rank, step=step, names=names, strict=strict)
        own = job.compare()
    except Exception as error:
        # The others wait for this rank.
        told = error if isinstance(error, StokerError) else TreeMismatch("a tree is taken apart", value=repr(error))
        of_all_ranks(told)
        raise
    everybody: list[tuple[_Differences, str]] = of_all_ranks((own, node_id()))
    differences = _Differences.of_job([compared for compared, _ in everybody], own=own)
    differences.check(strict=strict)
    targets = job.targets()
    to_read = _last_in_each_place(targets)
    nodes = [node for _, node in everybody]
    same = [other for other, node in enumerate(nodes) if node and node == nodes[rank]] if len(nodes) > 1 else None
    reader.handover = handover(same)
    num_bytes = read_tensors(reader, to_read)
    job.apply(targets)
    plain = {
        name: tree[name] for name, item in job.view.items.items() if item.kind == "value" and name in job.documents
    }
    return RestoreReport(
        step=step,
        missing=tuple(differences.missing),
        unexpected=tuple(differences.unexpected),
        values=plain,
        num_bytes=num_bytes,
    )


@dataclass(frozen=True, kw_only=True)
class _Differences:
    """Between tree and checkpoint: sentences on what does not fit, and names that only one of them has."""

    wrong: list[str]
    missing: list[str]
    unexpected: list[str]

    @classmethod
    def of_job(cls, of_ranks: list["_Differences"], *, own: "_Differences") -> "_Differences":
        """Those of all ranks; unexpected is only what no rank has, since pipeline stages have a part each."""
        if len(of_ranks) == 1:
            return own
        nobody = set.intersection(*(set(one.unexpected) for one in of_ranks))
        return cls(
            wrong=list(dict.fromkeys(sentence for one in of_ranks for sentence in one.wrong)),
            missing=list(dict.fromkeys(name for one in of_ranks for name in one.missing)),
            unexpected=[name for name in own.unexpected if name in nobody],
        )

    def check(self, *, strict: bool) -> None:
        """Raise TreeMismatch unless they are allowed."""
        if not self.wrong and not (strict and (self.missing or self.unexpected)):
            return
        parts = [*self.wrong, *(f"{n}: not in the checkpoint" for n in self.missing)]
        parts += [f"{n}: only in the checkpoint" for n in self.unexpected]
        shown = "; ".join(parts[:50]) + (f"; and {len(parts) - 50} more" if len(parts) > 50 else "")
        hint = "" if self.wrong else "names= restores a part, strict=False what both have"
        raise TreeMismatch("tree and checkpoint must have the same names and shapes", value=shown, hint=hint)


class _Restore:
    """The steps of one restore, in order: compare, targets, apply."""

    def __init__(
        self,
        tree: dict[str, Any],
        reader: StepReader,
        *,
        rank: int,
        step: int,
        names: Sequence[str] | None,
        strict: bool,
    ) -> None:
        self.tree, self.manifest, self._rank, self._step = tree, reader.manifest, rank, step
        self._names, self._strict = names, strict
        self.view: TreeView = view_tree(tree)
        self.names_of = names_of_parameters(tree)
        self.documents: dict[str, dict[str, Any]] = {}
        self._from_another_rank: set[str] = set()
        self._in_parts: set[str] = set()
        for name, item in self.view.items.items():
            parts = [values.loads(reader.read_state(path), place=path) for path in self._document_paths(name)]
            if parts:
                document = unite_documents(parts)
                part = item.kind == "optimizer" or name in self._in_parts
                self.documents[name] = own_part(document, item) if part else document

    def _document_paths(self, name: str) -> list[str]:
        """The item's document; several where sets of ranks saved a part each; none if the step has no such item."""
        of_job, own, first = state_path(name), state_path(name, self._rank), state_path(name, 0)
        parts = sorted(path for path in self.manifest.states if path.startswith(f"state/{name}.part-"))
        if parts:
            self._in_parts.add(name)
            return parts
        if own not in self.manifest.states and first in self.manifest.states:
            self._from_another_rank.add(name)
            return [first]
        return [path for path in (of_job, own) if path in self.manifest.states][:1]

    def _wanted(self, name: str) -> bool:
        """Whether `names` asks for an item or a tensor."""
        return self._names is None or any(self._matches(name, pattern) for pattern in self._names)

    def _matches(self, name: str, pattern: str) -> bool:
        """A module goes by tensor, any other item as a whole."""
        item, _, rest = name.partition(".")
        first, _, inside = pattern.partition(".")
        if item in self.view.items and self.view.items[item].kind == "module":
            return pattern == item or fnmatchcase(name, pattern) if rest else fnmatchcase(item, first)
        # "*.weight" asks for weights of modules, and for no item that has none.
        return fnmatchcase(item, pattern) or (bool(inside) and first != "*" and fnmatchcase(item, first))

    def compare(self) -> _Differences:
        """All differences between tree and checkpoint."""
        saved_items = {path.removeprefix("state/").split(".", 1)[0] for path in self.manifest.states}
        missing = [name for name in self.view.items if name not in saved_items and self._wanted(name)]
        unexpected = sorted(name for name in saved_items - set(self.view.items) if self._wanted(name))
        known = [*self.view.items, *self.view.tensors, *saved_items, *self.manifest.tensor_names]
        wrong = [
            f"names: {pattern!r} matches nothing"
            for pattern in self._names or ()
            if not any(self._matches(name, pattern) for name in known)
        ]
        for name, tensor in self.view.tensors.items():
            owner = name.split(".", 1)[0]
            if not self._wanted(name) or owner in missing or self._is_extra_state(name):
                continue
            if name in self.manifest:
                wrong += _difference(name, tensor, self.manifest.tensor(name))
            elif self.view.items[owner].kind in ("module", "value"):
                # Optimizer and Stateful objects take the saved state as it is: they can't lack a tensor.
                missing.append(name)
        for name in self.manifest.tensor_names:
            item = self.view.items.get(name.split(".", 1)[0])
            if item is None or item.kind != "module" or self._is_extra_state(name):
                continue
            if name not in self.view.tensors and self._wanted(name):
                unexpected.append(name)
        for name, thing in self.tree.items():
            if name not in self.documents or not self._wanted(name):
                continue
            if told := self._other_kind(name):
                wrong.append(told)
                continue
            if isinstance(thing, nn.Module):
                mine, theirs = self.view.items[name].value.keys(), self._saved_extra_states(name)
                missing += [f"{name}.{key}" for key in sorted(mine - theirs) if self._wanted(f"{name}.{key}")]
                unexpected += [f"{name}.{key}" for key in sorted(theirs - mine) if self._wanted(f"{name}.{key}")]
            if isinstance(thing, torch.optim.Optimizer):
                lacking, others = group_differences(name, thing, self.names_of, self.documents[name]["value"])
                wrong += lacking
                unexpected += others
            elif name in self._from_another_rank and not hasattr(thing, "load_for_new_rank"):
                wrong.append(
                    f"{name}: rank {self._rank} saved none, and {type(thing).__name__} has no load_for_new_rank"
                )
        return _Differences(wrong=wrong, missing=missing, unexpected=unexpected)

    def _other_kind(self, name: str) -> str:
        """What is wrong with the kind of thing that an item was saved as; nothing if it can be restored."""
        mine, document = self.view.items[name].kind, self.documents[name]
        theirs, value = document["kind"], document["value"]
        # torch's planner knows no kinds: what was saved through it is all values. A value may be used to look at state.
        alike = theirs in (mine, "value") or (mine == "value" and theirs == "stateful")
        if mine != "value" and not isinstance(value, dict):
            alike = False
        if mine == "optimizer" and alike and "param_groups" not in value:
            alike = False
        return "" if alike else f"{name}: {mine} in the tree, {theirs} in the checkpoint"

    def _is_extra_state(self, name: str) -> bool:
        item = self.view.items.get(name.split(".", 1)[0])
        return item is not None and item.kind == "module" and EXTRA_STATE in name.split(".")

    def _saved_extra_states(self, item: str) -> set[str]:
        """Names, within a module, of what its parts keep besides tensors, or as a tensor that they make anew."""
        plain = {key for key in self.documents[item]["value"] if is_extra_state(key)}
        tensors = {name.removeprefix(f"{item}.") for name in self.manifest.tensor_names if name.startswith(f"{item}.")}
        return plain | {name for name in tensors if is_extra_state(name)}

    def targets(self) -> dict[str, torch.Tensor]:
        """The tensor that each saved one goes to; what the tree does not have yet is made here."""
        self._parameters = {
            f"{key}.state.{name}": (parameter, group)
            for key, thing in self.tree.items()
            if isinstance(thing, torch.optim.Optimizer)
            for name, parameter, group in parameter_names(thing, self.names_of)
        }
        listed = {tensor for document in self.documents.values() for _, tensor in document["tensors"]}
        targets = {}
        for name in self.manifest.tensor_names:
            item = self.view.items.get(name.split(".", 1)[0])
            if item is None or not self._wanted(name):
                continue
            live = self.view.tensors.get(name)
            if item.kind != "module" and name not in listed:
                continue  # of another pipeline stage, or of a parameter that the optimizer has not
            if item.kind == "stateful" or (live is None and item.kind != "module") or self._is_extra_state(name):
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
            filled: set[Any] = set()
            if isinstance(thing, nn.Module):
                filled = {path[0] for path, _ in document["tensors"] if len(path) == 1 and not is_extra_state(path[0])}
            for path, tensor in document["tensors"]:
                # Of a module's extra state, `names` may ask for a part.
                if (not path or path[0] not in filled) and self._wanted(tensor):
                    value = put_at(value, tuple(path), targets[tensor])
            if isinstance(thing, nn.Module):
                states = {key: state for key, state in value.items() if key not in filled}
                states |= {  # of steps whose documents don't list them
                    key: targets[f"{name}.{key}"]
                    for key in self._saved_extra_states(name)
                    if key not in value and f"{name}.{key}" in targets
                }
                mine = self.view.items[name].value
                restore_extra_state(
                    thing,
                    {key: state for key, state in states.items() if key in mine and self._wanted(f"{name}.{key}")},
                )
            elif isinstance(thing, torch.optim.Optimizer):
                restore_optimizer(thing, self.names_of, value)
            elif name in self._from_another_rank:
                thing.load_for_new_rank(value, self._rank, self._step)
            elif isinstance(thing, Stateful):
                thing.load_state_dict(value)
            else:
                self.tree[name] = update_in_place(thing, value, keep=not self._strict)


def _difference(name: str, tensor: torch.Tensor, info: TensorInfo) -> list[str]:
    mine, theirs = (dtype_name(tensor.dtype), tuple(tensor.shape)), (info.dtype, tuple(info.global_shape))
    if mine == theirs:
        return []
    return [f"{name}: {mine[0]}{list(mine[1])} in the tree, {theirs[0]}{list(theirs[1])} in the checkpoint"]


def _last_in_each_place(targets: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`targets` without those whose memory a later one fills: tied weights get the last, as with load_state_dict."""
    last = {}
    for name, tensor in targets.items():
        memory = local_part(tensor)
        last[memory.data_ptr(), memory.shape, memory.stride()] = name
    kept = set(last.values())
    return {name: tensor for name, tensor in targets.items() if name in kept or not local_part(tensor).numel()}
