"""What a restore does to the live objects of a tree: which memory it fills, what it refuses first, what it leaves alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stoker.checkpoint import CheckpointManager
from stoker.errors import ConfigError, SaveFailed, TreeMismatch, UnsupportedState


def save(root: Path, tree: dict[str, Any], step: int = 1) -> None:
    with CheckpointManager(root) as ckpt:
        ckpt.save(step, tree).wait("committed")


class Keeping(nn.Module):
    """A layer that keeps something besides its parameters."""

    def __init__(self, kept: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


class Copying(nn.Module):
    """A layer whose state holds a copy of what it has."""

    def __init__(self) -> None:
        super().__init__()
        self.kept = torch.ones(3)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[prefix + "kept"] = self.kept.clone()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch.compile's own
@pytest.mark.parametrize(
    "kept", [torch.arange(5.0), {"scale": torch.arange(3.0), "n": 2}, 7], ids=["tensor", "dict", "int"]
)
@pytest.mark.parametrize("wrap", [lambda m: m, nn.DataParallel, torch.compile], ids=["plain", "parallel", "compiled"])
def test_extra_state_of_any_kind_goes_back_through_any_wrapper(tmp_path: Path, kept: Any, wrap: Any) -> None:
    save(tmp_path, {"model": wrap(nn.Sequential(Keeping(kept)))})
    fresh = nn.Sequential(Keeping(torch.zeros(1) if isinstance(kept, torch.Tensor) else None))
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.restore({"model": wrap(fresh)})
    assert str(fresh[0].kept) == str(kept)


def test_extra_state_that_only_one_side_has_is_told_before_anything_is_written(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Sequential(Keeping(7))})
    plain = nn.Sequential(nn.Module())
    plain[0].weight = nn.Parameter(torch.ones(3))
    with CheckpointManager(tmp_path) as ckpt:
        with pytest.raises(TreeMismatch, match=r"model\.0\._extra_state: only in the checkpoint"):
            ckpt.restore({"model": plain})
        assert torch.equal(plain[0].weight, torch.ones(3))
        report = ckpt.restore({"model": plain}, strict=False)
    assert report.unexpected == ("model.0._extra_state",)
    assert torch.equal(plain[0].weight, torch.zeros(3))


@pytest.mark.parametrize(
    "kind", [int, torch.tensor, lambda number: {"n": torch.tensor(number)}], ids=["int", "tensor", "dict"]
)
def test_names_choose_extra_state_too(tmp_path: Path, kind: Any) -> None:
    save(tmp_path, {"model": nn.Sequential(Keeping(kind(7)), Keeping(kind(8)))})
    fresh = nn.Sequential(Keeping(kind(1)), Keeping(kind(2)))
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.restore({"model": fresh}, names=["model.0.*"])
    assert [str(layer.kept) for layer in fresh] == [str(kind(7)), str(kind(2))]


def test_a_module_whose_state_holds_copies_is_refused_when_it_is_saved(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(UnsupportedState, match=r"model\.0\.kept"):
        ckpt.save(1, {"model": nn.Sequential(Copying())})


def test_tied_weights_get_the_bytes_of_the_last_name_as_with_load_state_dict(tmp_path: Path) -> None:
    size = 1 << 19  # several blocks, so that two readers would mix
    save(tmp_path, {"x": torch.zeros(size), "y": torch.ones(size)})
    tied = torch.full((size,), 2.0)
    with CheckpointManager(tmp_path) as ckpt:
        report = ckpt.restore({"x": tied, "y": tied})
    assert torch.equal(tied, torch.ones(size))
    assert report.num_bytes < 4 * size + (1 << 20), "the first was not read in vain"


@pytest.mark.parametrize(
    ("saved", "mine"),
    [
        (3, torch.optim.lr_scheduler.StepLR(torch.optim.SGD([torch.zeros(1)], lr=1), 1)),
        (nn.Linear(2, 2), torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)),
        ({"a": 1}, torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1)),
        (nn.Linear(2, 2), {"weight": torch.ones(2, 2)}),
    ],
    ids=["value into scheduler", "module into optimizer", "value into optimizer", "module into value"],
)
def test_an_item_of_another_kind_is_refused_before_anything_is_written(tmp_path: Path, saved: Any, mine: Any) -> None:
    save(tmp_path, {"first": torch.zeros(4), "thing": saved})
    first = torch.ones(4)
    before = str(mine if isinstance(mine, dict) else mine.state_dict())
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(TreeMismatch, match=r"thing: \w+ in the tree, \w+ in the"):
        ckpt.restore({"first": first, "thing": mine})
    assert torch.equal(first, torch.ones(4))
    assert str(mine if isinstance(mine, dict) else mine.state_dict()) == before


def test_a_part_of_an_older_step_is_no_return_to_it(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": torch.full((4,), step), "n": step}).wait("committed")
        x = torch.zeros(4, dtype=torch.int64)
        tree = {"x": x, "n": 0}
        ckpt.restore(tree, step=1, names=["x"])
        assert x.tolist() == [1, 1, 1, 1]
        assert tree["n"] == 0
        ckpt.save(4, tree).wait("committed")
        assert ckpt.steps() == [1, 2, 3, 4]


def test_a_pattern_that_matches_nothing_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Linear(2, 2)})
    fresh = nn.Linear(2, 2)
    before = fresh.weight.clone()
    with CheckpointManager(tmp_path) as ckpt:
        with pytest.raises(TreeMismatch, match=r"names: 'modle\.\*' matches nothing"):
            ckpt.restore({"model": fresh}, names=["model.*", "modle.*"])
        with pytest.raises(ConfigError, match="names must be a list"):
            ckpt.restore({"model": fresh}, names="model")  # a str is a sequence of str
    assert torch.equal(fresh.weight, before)


def test_a_pattern_of_weights_takes_no_other_items_along(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Linear(2, 2), "epoch": 5})
    tree = {"model": nn.Linear(2, 2), "epoch": 0}
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.restore(tree, names=["*.weight"])
    assert tree["epoch"] == 0


def test_without_strict_what_only_the_tree_has_stays(tmp_path: Path) -> None:
    save(tmp_path, {"x": {"a": 1, "inner": {"b": 2}}})
    new = torch.ones(2)
    tree = {"x": {"a": 0, "new": new, "inner": {"b": 0, "c": 3}}}
    with CheckpointManager(tmp_path) as ckpt:
        report = ckpt.restore(tree, strict=False)
    assert tree == {"x": {"a": 1, "new": new, "inner": {"b": 2, "c": 3}}}
    assert report.missing == ("x.new",)


def test_a_default_device_does_not_move_what_is_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    save(tmp_path, {"x": whole})
    target = torch.zeros(4, 3).t()
    with CheckpointManager(tmp_path) as ckpt, torch.device("meta"):
        ckpt.restore({"x": target})
    assert torch.equal(target, whole)


def test_state_of_an_optimizer_that_belongs_to_no_parameter_is_refused(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.ones(2))
    more = torch.optim.SGD([weight], lr=1)
    more.state["global"] = {"n": 3}  # type: ignore[index]
    with CheckpointManager(tmp_path) as ckpt:
        with pytest.raises(UnsupportedState, match="state of 'global'"):
            ckpt.save(1, {"optimizer": more})
        with pytest.raises(UnsupportedState, match="slow"):
            ckpt.save(1, {"optimizer": Slow(torch.optim.SGD([weight], lr=1))})


class Slow(torch.optim.Optimizer):
    """One that wraps another and has state of its own."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__([parameter for group in inner.param_groups for parameter in group["params"]], {})
        self.inner = inner

    def state_dict(self) -> dict[str, Any]:
        return {**self.inner.state_dict(), "slow": 1}


def test_the_first_save_may_happen_in_inference_mode(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        with torch.inference_mode():
            ckpt.save(1, {"x": torch.zeros(4)}).wait("committed")
        ckpt.save(2, {"x": torch.ones(4)}).wait("committed")
        assert ckpt.steps() == [1, 2]


def test_a_run_id_that_was_used_before_harms_no_step(tmp_path: Path) -> None:
    """As of a scheduler's job that is requeued."""
    how: dict[str, Any] = {"rank": 0, "world_size": 1, "run_id": "job-42"}
    with CheckpointManager(tmp_path, **how) as ckpt:
        for step in (10, 20):
            ckpt.save(step, {"x": torch.full((1000,), step)}).wait("committed")
    with CheckpointManager(tmp_path, **how) as ckpt:
        ckpt.restore({"x": torch.zeros(1000, dtype=torch.int64)}, step=10)
        with pytest.raises(SaveFailed, match="a run_id must be new at each start"):
            ckpt.save(20, {"x": torch.full((1000,), 21)}).wait("committed")
    with CheckpointManager(tmp_path) as ckpt:
        tree = {"x": torch.zeros(1000, dtype=torch.int64)}
        ckpt.restore(tree, step=ckpt.steps()[-1])
        assert set(tree["x"].tolist()) == {ckpt.steps()[-1]}
