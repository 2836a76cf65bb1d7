"""The state tree: what it is taken apart into, and what it refuses."""

import copy
from collections import Counter, OrderedDict, defaultdict
from typing import Any

import pytest
import torch
from torch import nn

from stoker.checkpoint import values
from stoker.checkpoint.tree import Documents, group_differences, names_of_parameters, optimizer_state, put_at, view_tree
from stoker.errors import ConfigError, UnsupportedState


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embed.weight


def test_a_module_gives_parameters_and_buffers_under_dotted_names() -> None:
    view = view_tree({"model": Tied()})
    assert set(view.tensors) == {
        "model.embed.weight",
        "model.head.weight",
        "model.norm.weight",
        "model.norm.bias",
        "model.norm.running_mean",
        "model.norm.running_var",
        "model.norm.num_batches_tracked",
    }


def test_tied_weights_stand_under_each_name_and_share_memory() -> None:
    view = view_tree({"model": Tied()})
    assert view.tensors["model.embed.weight"].data_ptr() == view.tensors["model.head.weight"].data_ptr()


def test_wrappers_leave_no_trace_in_names() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    compiled: Any = torch.compile(module, backend="eager")
    assert set(view_tree({"m": compiled}).tensors) == {"m.0.weight", "m.0.bias"}


def test_optimizer_state_is_named_by_parameter_and_no_step_is_taken() -> None:
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    view = view_tree({"model": model, "optimizer": optimizer})
    assert not any(name.startswith("optimizer.") for name in view.tensors)
    assert not optimizer.state
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    names = set(view_tree({"model": model, "optimizer": optimizer}).tensors)
    assert {"optimizer.state.weight.exp_avg", "optimizer.state.bias.step"} <= names


def test_an_optimizer_without_its_module_names_parameters_by_place() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
    parameter.sum().backward()
    optimizer.step()
    assert set(view_tree({"opt": optimizer}).tensors) == {"opt.state.group0.0.momentum_buffer"}


def test_other_groups_are_told_in_one_sentence() -> None:
    model = nn.Linear(3, 2)
    names_of = names_of_parameters({"model": model})
    both = torch.optim.SGD(model.parameters(), lr=0.1)
    saved = optimizer_state(torch.optim.SGD([model.weight], lr=0.1), names_of)
    told = ["optimizer: 1 groups in the tree, 1 in the checkpoint, differing in parameters bias"]
    assert group_differences("optimizer", both, names_of, saved) == (told, [])
    part = torch.optim.SGD([model.weight], lr=0.1)
    whole = optimizer_state(both, names_of)
    assert group_differences("optimizer", part, names_of, whole) == ([], ["optimizer.bias"])
    split = torch.optim.SGD([{"params": [p]} for p in model.parameters()], lr=0.1)
    wrong, _ = group_differences("optimizer", split, names_of, whole)
    assert wrong == ["optimizer: 2 groups in the tree, 1 in the checkpoint, differing in how they are split"]


def test_plain_values_keep_their_shape_and_tensors_inside_leave_a_gap() -> None:
    view = view_tree({"extra": {"epoch": 3, "ema": [torch.ones(2), {"decay": 0.9}], 7: (1, torch.zeros(1))}})
    item = view.items["extra"]
    assert item.value == {"epoch": 3, "ema": [None, {"decay": 0.9}], 7: (1, None)}
    assert item.tensors == [(("ema", 0), "extra.ema.0"), ((7, 1), "extra.7.1")]


def test_two_places_that_give_one_dotted_name_are_refused() -> None:
    with pytest.raises(UnsupportedState, match=r"extra\.a\.b"):
        view_tree({"extra": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}})


@pytest.mark.parametrize("tree", [{"a b": 1}, {"a.b": 1}, {3: 1}, {"": 1}, {"größe": 1}, {"x" * 65: 1}])
def test_an_item_that_is_no_identifier_is_refused(tree: dict[Any, Any]) -> None:
    with pytest.raises(UnsupportedState, match="identifier"):
        view_tree(tree)


def test_a_tree_that_is_no_dict_is_refused() -> None:
    not_a_dict: Any = [1]
    with pytest.raises(ConfigError, match="dict of named items"):
        view_tree(not_a_dict)


def test_a_module_below_the_top_level_is_refused_with_its_path() -> None:
    with pytest.raises(UnsupportedState, match=r"extra\.models\.0"):
        view_tree({"extra": {"models": [nn.Linear(1, 1)]}})


def test_a_cycle_is_refused() -> None:
    loop: dict[str, Any] = {}
    loop["self"] = loop
    with pytest.raises(UnsupportedState, match="cycle"):
        view_tree({"extra": loop})


def test_a_sparse_tensor_is_refused_with_its_path() -> None:
    with pytest.raises(UnsupportedState, match=r"extra\.s"):
        view_tree({"extra": {"s": torch.eye(2).to_sparse()}})


class Scaled(torch.Tensor):
    """A tensor that keeps a scale elsewhere and so has operators of its own."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError


@pytest.mark.parametrize(
    "tensor",
    [
        torch.Tensor._make_subclass(Scaled, torch.ones(2)),
        nn.UninitializedParameter(),
        torch.empty(2, device="meta"),
    ],
    ids=["subclass", "lazy", "meta"],
)
def test_a_tensor_whose_elements_are_not_all_of_it_is_refused_with_its_path(tensor: torch.Tensor) -> None:
    with pytest.raises(UnsupportedState, match=r"extra\.w"):
        view_tree({"extra": {"w": tensor}})


def test_subclasses_that_only_add_names_are_tensors() -> None:
    class Named(nn.Parameter):
        pass

    assert set(view_tree({"extra": {"w": Named(torch.ones(2)), "b": nn.Buffer(torch.ones(1))}}).tensors) == {
        "extra.w",
        "extra.b",
    }


def test_dicts_that_hold_tensors_keep_their_type() -> None:
    tree = {"extra": OrderedDict(b=torch.ones(1), a=defaultdict(list, x=torch.ones(1), y=[2]))}
    value = view_tree(tree).items["extra"].value
    assert type(value) is OrderedDict and list(value) == ["b", "a"]
    assert type(value["a"]) is defaultdict and value["a"].default_factory is list and value["a"]["y"] == [2]


def test_a_dict_that_holds_tensors_and_would_come_back_as_another_type_is_refused() -> None:
    one: Any = torch.ones(1)
    with pytest.raises(UnsupportedState, match=r"extra\.counts.*Counter"):
        view_tree({"extra": {"counts": Counter({"a": one})}})


def test_buffers_are_told_from_parameters() -> None:
    names = {"model.norm.running_mean", "model.norm.running_var", "model.norm.num_batches_tracked"}
    assert view_tree({"model": Tied()}).buffers == names


def test_two_modules_under_one_optimizer_may_use_the_same_names() -> None:
    tree: dict[str, Any] = {"one": nn.Linear(2, 1), "two": nn.Linear(2, 1, bias=False)}
    parameters = [*tree["one"].parameters(), *tree["two"].parameters()]
    tree["optimizer"] = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    for n, parameter in enumerate(parameters):
        parameter.grad = torch.full_like(parameter, float(n))
    tree["optimizer"].step()
    view = view_tree(tree)
    assert view.items["optimizer"].value["param_groups"][0]["params"] == ["one.weight", "bias", "two.weight"]
    assert view.tensors["optimizer.state.two.weight.momentum_buffer"].unique().tolist() == [2.0]


def test_an_encoded_document_is_the_document_also_when_a_part_of_it_was_kept() -> None:
    documents = Documents()
    for tree in ({"w": torch.ones(1), "n": 1}, {"w": torch.ones(1), "n": 1.0}, {"v": torch.ones(1), "n": 1.0}, {}):
        item = view_tree({"extra": tree}).items["extra"]
        assert documents.encode(item) == values.dumps(item.document(), place="extra")


def test_put_at_rebuilds_tuples_and_keeps_dicts() -> None:
    inner = {"x": None}
    value = put_at({"a": (inner, 1)}, ("a", 0, "x"), 5)
    assert value == {"a": ({"x": 5}, 1)}
    assert value["a"][0] is inner
