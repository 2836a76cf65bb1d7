"""Copying parameters and optimizer state beside the next step: what is saved is what there was at ``save``."""

import copy
import os
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.overlap import LateCopy, OptimizerHooks, late_tensors
from stoker.checkpoint.tree import view_tree
from stoker.errors import DeadlineExceeded, SaveFailed
from stoker.metrics import counters

WIDTH = 192  # a weight of 144 KiB: late


class Net(nn.Module):
    """A model with what is easily missed: running statistics, tied weights, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.tied = nn.Linear(WIDTH, WIDTH)
        self.tied.weight = self.first.weight
        self.frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.large: torch.Tensor
        self.register_buffer("large", torch.zeros(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.large += 1
        return self.frozen(self.tied(self.norm(self.first(x))))  # type: ignore[no-any-return]


Step = Callable[[], None]


def one_optimizer(model: Net, **options: Any) -> tuple[dict[str, Any], Step]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, **options)

    def step() -> None:
        model(torch.randn(8, WIDTH)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return {"optimizer": optimizer}, step


def with_scaler(model: Net) -> tuple[dict[str, Any], Step]:
    tree, _ = one_optimizer(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step() -> None:
        scaler.scale(model(torch.randn(8, WIDTH)).square().mean()).backward()
        scaler.step(tree["optimizer"])
        scaler.update()
        tree["optimizer"].zero_grad()

    return {**tree, "scaler": scaler}, step


def in_backward(model: Net) -> tuple[dict[str, Any], Step]:
    own = {
        f"optimizer_{i}": torch.optim.AdamW([p], lr=0.1)
        for i, p in enumerate(p for p in model.parameters() if p.requires_grad)
    }
    for optimizer in own.values():
        (parameter,) = optimizer.param_groups[0]["params"]

        def update(_: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(update)
    return dict(own), lambda: model(torch.randn(8, WIDTH)).square().mean().backward()


KINDS: dict[str, Callable[[Net], tuple[dict[str, Any], Step]]] = {
    "plain": lambda model: one_optimizer(model, foreach=False),
    "foreach": lambda model: one_optimizer(model, foreach=True),
    "fused": lambda model: one_optimizer(model, fused=True),
    "scaler": with_scaler,
    "in_backward": in_backward,
}


def make(kind: str, seed: int) -> tuple[dict[str, Any], Step]:
    torch.manual_seed(seed)
    model = Net()
    tree, step = KINDS[kind](model)
    tree = {"model": model, **tree, "ema": {"weights": [p.detach().clone() for p in model.parameters()]}}

    def train() -> None:
        step()
        for mean, p in zip(tree["ema"]["weights"], model.parameters(), strict=True):
            mean.lerp_(p.detach(), 0.5)

    return tree, train


def tensors_of(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in view_tree(tree).tensors.items()}


@pytest.fixture
def copies_after_the_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Late copies begin only when an optimizer has stepped, or after a while in which none could."""
    stepped = threading.Event()
    run = LateCopy._run

    def slowly(self: LateCopy, copy: Callable[[], None]) -> None:
        stepped.wait(0.3)
        run(self, copy)

    monkeypatch.setattr(LateCopy, "_run", slowly)
    yield stepped


@pytest.mark.parametrize("kind", list(KINDS))
def test_steps_beside_a_running_copy_change_nothing_in_it(
    tmp_path: Path, kind: str, copies_after_the_step: threading.Event
) -> None:
    tree, train = make(kind, 0)
    for _ in range(2):
        train()
    optimizers = [thing for thing in tree.values() if isinstance(thing, torch.optim.Optimizer)]
    for optimizer in optimizers:
        optimizer.register_step_post_hook(lambda *_: copies_after_the_step.set())
    with CheckpointManager(tmp_path, overlap=True) as ckpt:
        expected = tensors_of(tree)
        handle = ckpt.save(1, tree)
        assert not handle.done("staged")
        copies_after_the_step.clear()
        train()
        assert handle.done("staged") or copies_after_the_step.is_set()
        handle.wait("committed")
        changed = tensors_of(tree)
        assert sum(not torch.equal(expected[name], changed[name]) for name in expected) > len(expected) // 2
        fresh, go_on = make(kind, 1)
        ckpt.restore(fresh)
    restored = tensors_of(fresh)
    assert restored.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(restored[name], tensor), name
    go_on()


def test_only_large_parameters_and_their_optimizer_state_are_late() -> None:
    tree, train = make("foreach", 0)
    train()
    tree["alias"] = {"weight": tree["model"].first.weight}
    late = late_tensors(tree, view_tree(tree), True)
    assert late == {
        "model.first.weight",
        "model.tied.weight",
        "optimizer.state.first.weight.exp_avg",
        "optimizer.state.first.weight.exp_avg_sq",
    }
    assert late_tensors({"model": tree["model"]}, view_tree({"model": tree["model"]}), True) == frozenset()


def test_auto_copies_host_memory_before_save_returns(tmp_path: Path) -> None:
    tree, train = make("foreach", 0)
    train()
    assert late_tensors(tree, view_tree(tree), "auto") == frozenset()


def test_the_next_save_and_restore_and_close_wait_for_the_copy(
    tmp_path: Path, copies_after_the_step: threading.Event
) -> None:
    tree, train = make("foreach", 0)
    train()
    with CheckpointManager(tmp_path, overlap=True) as ckpt:
        first = ckpt.save(1, tree)
        second = ckpt.save(2, tree)
        assert first.report().stall_s > 0
        expected = tensors_of(tree)
        ckpt.restore(tree)
        assert second.done("committed")
        assert all(torch.equal(expected[name], tensor) for name, tensor in tensors_of(tree).items())
        last = ckpt.save(3, tree)
    assert last.done("committed")
    before = counters.snapshot()
    train()  # the hooks are gone
    assert "ckpt.overlap.wait_s" not in counters.since(before)


def test_a_copy_that_fails_is_raised_where_the_optimizer_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: LateCopy, copy: Callable[[], None]) -> None:
        raise OSError("the copier died")

    monkeypatch.setattr(LateCopy, "_run", broken)
    tree, train = make("foreach", 0)
    train()
    with CheckpointManager(tmp_path, overlap=True) as ckpt:
        handle = ckpt.save(1, tree)
        with pytest.raises(OSError, match="the copier died"):
            train()
        with pytest.raises(OSError, match="the copier died"):
            handle.wait()
        train()  # once is enough
        monkeypatch.undo()
        ckpt.save(2, tree).wait()
        assert ckpt.steps() == [2]


def test_a_copy_that_hangs_is_an_error_at_the_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    run = LateCopy._run

    def hanging(self: LateCopy, copy: Callable[[], None]) -> None:
        let_go.wait(60)
        run(self, copy)

    monkeypatch.setattr(LateCopy, "_run", hanging)
    tree, train = make("foreach", 0)
    train()
    with CheckpointManager(tmp_path, overlap=True, persist_timeout_s=0.3) as ckpt:
        handle = ckpt.save(1, tree)
        with pytest.raises(DeadlineExceeded, match="before the optimizer steps"):
            train()
        let_go.set()
        with pytest.raises(DeadlineExceeded):
            handle.wait()
        assert ckpt.steps() == []


def test_verify_fails_a_save_whose_tensors_were_edited_by_hand(
    tmp_path: Path, copies_after_the_step: threading.Event
) -> None:
    tree, train = make("foreach", 0)
    train()
    with CheckpointManager(tmp_path, overlap="verify") as ckpt:
        ckpt.save(1, tree).wait()
        copies_after_the_step.clear()
        handle = ckpt.save(2, tree)
        tree["model"].first.weight.data.mul_(2)
        copies_after_the_step.set()
        with pytest.raises(SaveFailed, match="2 tensors changed before they were copied"):
            handle.wait()
        with pytest.raises(SaveFailed):
            train()
        assert ckpt.steps() == [1]


def test_the_sources_are_held_until_they_are_copied(tmp_path: Path, copies_after_the_step: threading.Event) -> None:
    tree, train = make("foreach", 0)
    train()
    expected = tensors_of(tree)
    fresh = copy.deepcopy({"model": tree["model"], "optimizer": tree["optimizer"]})
    with CheckpointManager(tmp_path, overlap=True) as ckpt:
        handle = ckpt.save(1, {"model": tree["model"], "optimizer": tree["optimizer"]})
        tree.clear()
        del train
        handle.wait()
        ckpt.restore(fresh)
    assert all(torch.equal(expected[name], tensor) for name, tensor in tensors_of(fresh).items())


class NeverDone:
    """A copy that only the parent's threads make."""

    def join(self) -> None:
        raise RuntimeError("waits")


def test_a_forked_child_steps_without_waiting_for_its_parents_copy() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1)
    hooks = OptimizerHooks()
    hooks.hook({"optimizer": optimizer})
    hooks.expect(NeverDone())  # type: ignore[arg-type]
    child = os.fork()
    if not child:
        try:
            optimizer.step()
        finally:
            os._exit(1 if sys.exc_info()[0] else 0)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(RuntimeError, match="waits"):
        optimizer.step()
    hooks.close()
