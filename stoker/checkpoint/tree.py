"""The state tree: from live objects to named tensors and plain values, and back in place.

A tree is a dict of *items* (``{"model": model, "optimizer": opt, "loader": loader, "epoch": 3}``). Walking it yields

* **tensors**, each under a dotted name (``model.layers.0.weight``, ``optimizer.state.layers.0.weight.exp_avg``), and
* for each item one **value document**: its plain values, with the places that its tensors take.

The walk is our own: torch's ``get_optimizer_state_dict`` runs ``optimizer.step()`` on a fresh optimizer and so changes
what it should only read. Optimizer state is named by the parameter's name in the tree's modules, so it survives another
order of parameter groups and another world size.
"""

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.parameter import is_lazy

from ..errors import ConfigError, UnsupportedState
from . import values

__all__ = [
    "Documents",
    "Item",
    "Stateful",
    "TreeView",
    "own_part",
    "part_path",
    "state_path",
    "unite_documents",
    "view_tree",
]

# Wrappers that add a component to every name inside them; the names without it are the model's own.
_WRAPPER_COMPONENTS = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"})
_MAX_DEPTH = 64
EXTRA_STATE = "_extra_state"

Path = tuple[Any, ...]
NamesOf = Mapping[int, tuple[str, str]]
"""(item, clean name) of a parameter, by its id."""


@runtime_checkable
class Stateful(Protocol):
    """What torch.distributed.checkpoint, torchdata and every scheduler call stateful."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> Any: ...


@dataclass(kw_only=True)
class Item:
    """One entry of the tree, taken apart.

    Attributes:
        name: its key in the tree.
        kind: how it goes back: ``"module" | "optimizer" | "stateful" | "value"``.
        value: its plain values; None stands where a tensor was.
        tensors: (path inside `value`, name of the tensor) for each tensor.
        rank_local: each rank keeps a document of its own (RNG state), instead of rank 0 for all.
    """

    name: str
    kind: str
    value: Any = None
    tensors: list[tuple[Path, str]] = field(default_factory=list)
    rank_local: bool = False

    def document(self) -> dict[str, Any]:
        """What ``state/{name}.json`` holds."""
        return {"kind": self.kind, "value": self.value, "tensors": self._places()}

    def _places(self) -> list[list[Any]]:
        return [[list(path), name] for path, name in self.tensors]


class Documents:
    """Encodes value documents, and keeps what of them is the same from save to save: where the tensors are."""

    def __init__(self) -> None:
        self._places: dict[str, tuple[list[tuple[Path, str]], str]] = {}

    def encode(self, item: Item) -> bytes:
        """The bytes of ``state/{name}.json``; raises UnsupportedState, with the path in the tree."""
        known = self._places.get(item.name)
        if known is None or known[0] != item.tensors:
            known = self._places[item.name] = item.tensors, values.encode(item._places(), place=item.name)
        plain = {"kind": item.kind, "value": item.value}
        return values.dumps(plain, place=item.name, encoded={"tensors": known[1]})


@dataclass(kw_only=True)
class TreeView:
    """A tree taken apart: all tensors by name, and the items. Tensors are the live ones, nothing is copied.

    `buffers` names the tensors that are buffers of modules.
    """

    tree: dict[str, Any]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    items: dict[str, Item] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)

    def add(self, name: str, tensor: torch.Tensor, place: str) -> str:
        """Register a tensor; two paths that give one dotted name are refused, since neither could be restored."""
        if name in self.tensors:
            raise UnsupportedState("two places in the tree must not share a dotted name", value=name, place=place)
        if type(tensor) not in _PLAIN_TENSORS and _is_foreign(tensor):
            raise UnsupportedState(
                "a tensor must be a plain one or a DTensor",
                value=type(tensor).__name__,
                place=place,
                hint="save the tensors that it is made of",
            )
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta:
            raise UnsupportedState(
                "a tensor must be dense and have its data", value=f"{tensor.layout}, {tensor.device}", place=place
            )
        self.tensors[name] = tensor
        return name


_PLAIN_TENSORS = frozenset({torch.Tensor, nn.Parameter, DTensor})


def _is_foreign(tensor: torch.Tensor) -> bool:
    """Whether copying its elements would lose what a subclass keeps elsewhere, scales or shards, or it has none as yet."""
    if isinstance(tensor, DTensor):
        return False
    return is_lazy(tensor) or type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__


def state_path(item: str, rank: int | None = None) -> str:
    """Where an item's value document lies below a step: one for the job, or one for each rank.

    >>> state_path("optimizer"), state_path("rng", 3)
    ('state/optimizer.json', 'state/rng.00003.json')
    """
    return f"state/{item}.json" if rank is None else f"state/{item}.{rank:05d}.json"


def part_path(item: str, rank: int) -> str:
    """Where a part of an item's value document lies, of those ranks that share it; `rank` is their lowest.

    >>> part_path("optimizer", 3)
    'state/optimizer.part-00003.json'
    """
    return f"state/{item}.part-{rank:05d}.json"


def view_tree(tree: dict[str, Any]) -> TreeView:
    """Take a tree apart without changing or copying anything in it.

    Raises:
        UnsupportedState: an object that can't be represented, with its path in the tree.
        ConfigError: the tree is no dict of names.
    """
    if not isinstance(tree, dict):
        raise ConfigError("a state tree is a dict of named items", value=type(tree).__name__, place="tree")
    view = TreeView(tree=tree)
    names_of = names_of_parameters(tree)
    for key, thing in tree.items():
        # It names a document of the step, so it must be a file name anywhere.
        if not isinstance(key, str) or not key.isidentifier() or not key.isascii() or len(key) > 64:
            rule = "an item's name must be an ASCII identifier of 64 characters at most"
            raise UnsupportedState(rule, value=repr(key)[:200], place="tree")
        view.items[key] = _take_apart(view, key, thing, names_of)
    return view


def _take_apart(view: TreeView, key: str, thing: Any, names_of: NamesOf) -> Item:
    if isinstance(thing, nn.Module):
        item = Item(name=key, kind="module", value={})
        buffers = {clean_name(name): buffer for name, buffer in _unwrap(thing).named_buffers(remove_duplicate=False)}
        for name, value in module_state(thing).items():
            if isinstance(value, torch.Tensor) and not is_extra_state(name):
                if not isinstance(value, nn.Parameter) and value is not buffers.get(name):
                    _require_own(thing, value, f"{key}.{name}")
                view.add(f"{key}.{name}", value, f"{key}.{name}")
                if name in buffers:
                    view.buffers.add(f"{key}.{name}")
            else:
                item.value[name] = _split(view, item, f"{key}.{name}", value, (name,), 0)
        return item
    if isinstance(thing, torch.optim.Optimizer):
        item = Item(name=key, kind="optimizer")
        item.value = _split(view, item, key, optimizer_state(thing, names_of), (), 0)
        return item
    if isinstance(thing, Stateful) and not isinstance(thing, type):
        item = Item(name=key, kind="stateful", rank_local=bool(getattr(thing, "rank_local", False)))
        state = thing.state_dict()
        if item.rank_local and _has_tensor(state):
            raise UnsupportedState(
                "state that differs by rank must hold no tensors", place=key, hint="use numpy arrays"
            )
        item.value = _split(view, item, key, state, (), 0)
        return item
    item = Item(name=key, kind="value")
    item.value = _split(view, item, key, thing, (), 0)
    return item


def _require_own(module: nn.Module, tensor: torch.Tensor, place: str) -> None:
    """Refuse a tensor that a module made for its state: filling that in place would restore nothing."""
    own = [*_unwrap(module).parameters(), *_unwrap(module).buffers()]
    if not tensor.numel() or _memory(tensor) in {_memory(one) for one in own}:
        return
    raise UnsupportedState(
        "a module's state_dict must hold its own tensors",
        value="a tensor that shares no memory with its parameters and buffers",
        place=place,
        hint="give that state as get_extra_state, or as an item of its own",
    )


def _memory(tensor: torch.Tensor) -> int:
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return local.untyped_storage().data_ptr()


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_has_tensor(v) for v in value.values())
    if isinstance(value, (list, tuple)):
        return any(_has_tensor(v) for v in value)
    return isinstance(value, torch.Tensor)


def _split(view: TreeView, item: Item, name: str, value: Any, path: Path, depth: int) -> Any:
    """`value` with None for each tensor; the tensors go to `view`, their paths to `item`."""
    if isinstance(value, torch.Tensor):
        item.tensors.append((path, view.add(name, value, name)))
        return None
    if depth > _MAX_DEPTH:
        raise UnsupportedState(f"state may be nested {_MAX_DEPTH} deep at most", place=name, hint="is it a cycle?")
    if type(value) is dict:
        parts_by_key: dict[Any, Any] = {}
        for k, v in value.items():
            place = f"{name}.{k}"
            if isinstance(v, torch.Tensor):  # without another call: there may be very many
                view.add(place, v, place)
                item.tensors.append(((*path, k), place))
                parts_by_key[k] = None
            else:
                parts_by_key[k] = _split(view, item, place, v, (*path, k), depth + 1)
        return parts_by_key
    if type(value) in (list, tuple):
        parts = [_split(view, item, f"{name}.{i}", v, (*path, i), depth + 1) for i, v in enumerate(value)]
        return parts if type(value) is list else tuple(parts)
    if isinstance(value, (nn.Module, torch.optim.Optimizer)) or (depth and isinstance(value, Stateful)):
        raise UnsupportedState(
            "modules, optimizers and stateful objects must be items of the tree themselves",
            value=type(value).__name__,
            place=name,
            hint="move it to the top level of the tree",
        )
    if isinstance(value, dict) and _has_tensor(value):
        # Without tensors it is one value, which values.dumps writes with its type or refuses.
        parts_of = {k: _split(view, item, f"{name}.{k}", v, (*path, k), depth + 1) for k, v in value.items()}
        if type(value) is OrderedDict:
            return OrderedDict(parts_of)
        if type(value) is defaultdict:
            return defaultdict(value.default_factory, parts_of)
        raise UnsupportedState(
            "a dict that holds tensors must be a dict, an OrderedDict or a defaultdict",
            value=type(value).__name__,
            place=name,
            hint="it would come back as another type: store dict(x)",
        )
    return value  # values.dumps refuses, by its path, what can't be represented


def clean_name(name: str) -> str:
    """`name` without the components that wrappers add.

    >>> clean_name("_orig_mod.layers.0._checkpoint_wrapped_module.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPER_COMPONENTS)


def is_extra_state(name: str) -> bool:
    """Whether a name of a module's state_dict is what ``get_extra_state`` gave.

    >>> is_extra_state("layers.0._extra_state"), is_extra_state("layers.0.weight")
    (True, False)
    """
    return name.rpartition(".")[2] == EXTRA_STATE


def _unwrap(module: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, DataParallel and torch.compile."""
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(inner := getattr(module, "_orig_mod", None), nn.Module):
            module = inner
        else:
            return module


def module_state(module: nn.Module) -> dict[str, Any]:
    """A module's parameters, persistent buffers and extra state by clean name; tied weights under each name."""
    return {clean_name(name): value for name, value in _unwrap(module).state_dict(keep_vars=True).items()}


def names_of_parameters(tree: Mapping[str, Any]) -> NamesOf:
    """The item and the first clean name of each parameter in the tree's modules, by id."""
    names: dict[int, tuple[str, str]] = {}
    for key, thing in tree.items():
        if isinstance(thing, nn.Module):
            for name, parameter in _unwrap(thing).named_parameters():
                names.setdefault(id(parameter), (key, clean_name(name)))
    return names


def parameter_names(
    optimizer: torch.optim.Optimizer, names_of: NamesOf
) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
    """(name, parameter, group) in the order of the groups; a parameter of no module is named by its place.

    Where two modules under one optimizer use the same names, those carry the name of their item too.

    Raises:
        UnsupportedState: two parameters would still have one name.
    """
    found = []
    for g, group in enumerate(optimizer.param_groups):
        for i, parameter in enumerate(group["params"]):
            item, name = names_of.get(id(parameter), ("", f"group{g}.{i}"))
            found.append((item, name, parameter, group))
    uses = Counter(name for _, name, _, _ in found)
    seen: set[str] = set()
    for item, name, parameter, group in found:
        if uses[name] > 1 and item:
            name = f"{item}.{name}"
        if name in seen:
            raise UnsupportedState("each parameter of an optimizer must have a name of its own", value=name, place=name)
        seen.add(name)
        yield name, parameter, group


def optimizer_state(optimizer: torch.optim.Optimizer, names_of: NamesOf) -> dict[str, Any]:
    """``{"state": {parameter: {...}}, "param_groups": [...]}`` with names in the place of indices. Calls no step."""
    _require_plain(optimizer)
    state: dict[str, Any] = {}
    groups = [{**group, "params": []} for group in optimizer.param_groups]
    plain_of = {id(group): plain for group, plain in zip(optimizer.param_groups, groups, strict=True)}
    for name, parameter, group in parameter_names(optimizer, names_of):
        plain_of[id(group)]["params"].append(name)
        if optimizer.state.get(parameter):
            state[name] = dict(optimizer.state[parameter])
    return {"state": state, "param_groups": groups}


def _require_plain(optimizer: torch.optim.Optimizer) -> None:
    """Refuse an optimizer that keeps more than state of its parameters and groups, which would be lost."""
    own = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    others = [key for key, value in optimizer.state.items() if value and id(key) not in own]
    value = f"state of {others[0]!r}"[:80] if others else ""
    if not others and type(optimizer).state_dict is not torch.optim.Optimizer.state_dict:
        told = optimizer.state_dict()
        more = sorted(map(str, told.keys() - {"state", "param_groups"}))
        if more or len(told.get("state", ())) != sum(1 for state in optimizer.state.values() if state):
            value = f"{type(optimizer).__name__}.state_dict() has other state, {more}"
    if value:
        raise UnsupportedState(
            "an optimizer's state must belong to its parameters",
            value=value,
            place=type(optimizer).__name__,
            hint="save what else it has as an item of its own, by a Stateful that calls its state_dict",
        )


# ---------------------------------------------------------------------------------------------------- the way back


def put_at(value: Any, path: Path, leaf: Any) -> Any:
    """`value` with `leaf` at `path`; dicts and lists change in place, tuples are rebuilt.

    >>> put_at({"a": (1, [None])}, ("a", 1, 0), "x")
    {'a': (1, ['x'])}
    """
    if not path:
        return leaf
    head, rest = path[0], path[1:]
    if isinstance(value, tuple):
        parts = list(value)
        parts[head] = put_at(parts[head], rest, leaf)
        return tuple(parts)
    value[head] = put_at(value[head], rest, leaf)
    return value


def restore_extra_state(module: nn.Module, saved: Mapping[str, Any]) -> None:
    """Give `saved`, by clean name, to the parts of a module that it came from."""
    # Outermost first: of a compiled module and the one in it, which have one clean name, the inner one stays.
    owners = {clean_name(name): owner for name, owner in _unwrap(module).named_modules()}
    for name, value in saved.items():
        owners[name.rpartition(".")[0]].set_extra_state(value)


def update_in_place(old: Any, new: Any, *, keep: bool = False) -> Any:
    """`new`, but in `old`'s own dict objects where both are dicts, so that the user's references see it; `keep` what
    only they have.

    >>> mine = {"a": {"b": 1}, "gone": 2}; inner = mine["a"]
    >>> _ = update_in_place(mine, {"a": {"b": 5}}); mine, inner
    ({'a': {'b': 5}}, {'b': 5})
    """
    if type(old) is type(new) and type(new) in (dict, OrderedDict, defaultdict):
        for key in [key for key in old if key not in new and not keep]:
            del old[key]
        for key, value in new.items():
            old[key] = update_in_place(old.get(key), value, keep=keep)
        return old
    return new


def empty_state(
    parameter: torch.Tensor, group: Mapping[str, Any], shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """An empty tensor for a piece of optimizer state of `parameter`, made without calling ``step``.

    State of the parameter's own shape takes its sharding and device; a scalar lives on the CPU unless the group is
    fused or capturable, which is where torch's optimizers look for their step counts.
    """
    if shape and shape == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
    on_device = bool(shape) or group.get("fused") or group.get("capturable")
    return torch.zeros(shape, dtype=dtype, device=parameter.device if on_device else "cpu")


def restore_optimizer(optimizer: torch.optim.Optimizer, names_of: NamesOf, saved: Mapping[str, Any]) -> None:
    """Set state and groups to `saved`, whose tensors are the live ones, already filled; other state is dropped."""
    for name, parameter, _ in parameter_names(optimizer, names_of):
        wanted = saved.get("state", {}).get(name)
        if wanted:
            optimizer.state[parameter] = dict(wanted)
        else:
            optimizer.state.pop(parameter, None)
    for group, plain in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        group.update({key: value for key, value in plain.items() if key != "params"})


def group_differences(
    place: str, optimizer: torch.optim.Optimizer, names_of: NamesOf, saved: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """How the parameters of the optimizer's groups differ from the saved ones.

    Returns sentences on those that the saved groups lack, and the dotted names of those that only they have.
    """
    mine = [set(group["params"]) for group in optimizer_state(optimizer, names_of)["param_groups"]]
    theirs = [set(group["params"]) for group in saved["param_groups"]]
    own, known = set().union(*mine), set().union(*theirs)
    wrong = []
    if len(mine) != len(theirs) or any(group - other for group, other in zip(mine, theirs, strict=True)):
        names = sorted(own - known)
        what = f"parameters {', '.join(names[:8])}" if names else "how they are split"
        wrong = [f"{place}: {len(mine)} groups in the tree, {len(theirs)} in the checkpoint, differing in {what}"]
    return wrong, [f"{place}.{name}" for name in sorted(known - own)]


# ------------------------------------------------------------------------------------ documents of several sets of ranks


def unite_documents(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """One document of an item from those of ranks that hold different parts of it (pipeline stages), lowest rank first.

    Dicts are united key by key, parameter groups place by place; of two values in one place the lower rank's stays.

    >>> a = {"kind": "value", "value": {"x": 1, "w": None}, "tensors": [[["w"], "t.w"]]}
    >>> b = {"kind": "value", "value": {"x": 1, "v": None}, "tensors": [[["v"], "t.v"]]}
    >>> unite_documents([a, b])
    {'kind': 'value', 'value': {'x': 1, 'w': None, 'v': None}, 'tensors': [[['w'], 't.w'], [['v'], 't.v']]}
    """
    first, *others = parts
    value = first["value"]
    tensors = {name: path for path, name in first["tensors"]}
    for other in others:
        if first["kind"] == "optimizer":
            _unite_groups(value["param_groups"], other["value"]["param_groups"])
        value = _united(value, other["value"])
        tensors.update({name: path for path, name in other["tensors"] if name not in tensors})
    return {"kind": first["kind"], "value": value, "tensors": [[path, name] for name, path in tensors.items()]}


def _united(mine: Any, theirs: Any) -> Any:
    if isinstance(mine, dict) and isinstance(theirs, dict):
        for key, value in theirs.items():
            mine[key] = _united(mine[key], value) if key in mine else value
    return mine


def _unite_groups(mine: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> None:
    for own, other in zip(mine, theirs, strict=False):
        known = set(own["params"])
        own["params"] += [name for name in other["params"] if name not in known]
    mine += theirs[len(mine) :]


def own_part(document: dict[str, Any], item: Item) -> dict[str, Any]:
    """What of a document belongs to `item`, this rank's part of it: state of its parameters, its keys of a dict."""
    value = document["value"]
    if item.kind == "optimizer":
        own = {name for group in item.value["param_groups"] for name in group["params"]}
        state = {name: state for name, state in value.get("state", {}).items() if name in own}
        value = {**value, "state": state}
        tensors = [(path, name) for path, name in document["tensors"] if path[0] != "state" or path[1] in own]
    elif item.kind == "value":
        value = _like(value, item.value)
        tensors = [(path, name) for path, name in document["tensors"] if _has_path(value, path)]
    else:
        return document
    return {**document, "value": value, "tensors": [[path, name] for path, name in tensors]}


def _like(value: Any, mine: Any) -> Any:
    if isinstance(value, dict) and isinstance(mine, dict):
        for key in [key for key in value if key not in mine]:
            del value[key]
        for key in value:
            value[key] = _like(value[key], mine[key])
    return value


def _has_path(value: Any, path: Path) -> bool:
    for key in path:
        if isinstance(value, dict) and key not in value:
            return False
        value = value[key]
    return True
