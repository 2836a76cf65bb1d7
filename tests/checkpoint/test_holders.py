"""Who has which plain tensors: equal trees, pipeline stages, trees that change, and ranks that say nothing."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn

from stoker.checkpoint import CheckpointManager, load
from stoker.checkpoint.dcp import StokerReader
from stoker.checkpoint.verify import verify
from stoker.errors import ConfigError, SaveFailed, TreeMismatch, UnsupportedState

dcp: Any = torch.distributed.checkpoint  # its functions are not declared as exported


def on_ranks(
    world_size: int, root: Path, run_id: str, work: Callable[[CheckpointManager], Any], options: Any = None
) -> list[Any]:
    """Run `work` on `world_size` managers in threads; each rank's result, or its error."""

    def one(rank: int) -> Any:
        more = {} if options is None else options(rank)
        try:
            with CheckpointManager(root, rank=rank, world_size=world_size, run_id=run_id, **more) as ckpt:
                return work(ckpt)
        except (ConfigError, SaveFailed, TreeMismatch, UnsupportedState) as error:
            return error

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(one, range(world_size)))


def tree_of(layers: str, seed: int, *, steps: int) -> dict[str, Any]:
    """The named layers of a model of that seed, an optimizer after some steps, and values that all ranks share."""
    torch.manual_seed(seed)
    whole = {name: nn.Linear(3, 3) for name in "abcd"}
    model = nn.ModuleDict({name: whole[name] for name in layers})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * seed)
    for _ in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach().clone()
        optimizer.step()
    ema = {name: whole[name].weight.detach() * 2 for name in layers}
    return {"model": model, "optimizer": optimizer, "ema": ema, "progress": {"seed": seed}}


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    for name, tensor in expected["model"].state_dict().items():
        assert torch.equal(found["model"].state_dict()[name], tensor), name
    for mine, theirs in zip(found["optimizer"].param_groups[0]["params"],
                            expected["optimizer"].param_groups[0]["params"], strict=True):  # fmt: skip
        assert found["optimizer"].state[mine].keys() == expected["optimizer"].state[theirs].keys()
        for key, value in expected["optimizer"].state[theirs].items():
            assert torch.equal(found["optimizer"].state[mine][key], value), key
    assert found["optimizer"].param_groups[0]["lr"] == expected["optimizer"].param_groups[0]["lr"]
    assert found["ema"].keys() == expected["ema"].keys()
    assert all(torch.equal(found["ema"][name], tensor) for name, tensor in expected["ema"].items())
    assert found["progress"] == expected["progress"]


STAGES = ("ab", "ab", "cd")  # the layers of each rank: two replicas of the first stage


def save_stages(root: Path, options: Any = None) -> None:
    # Made beforehand: threads share one random generator.
    trees = [[tree_of(layers, step, steps=2 * (step - 1)) for step in (1, 2)] for layers in STAGES]

    def work(ckpt: CheckpointManager) -> None:
        for step, tree in enumerate(trees[ckpt.rank], 1):
            ckpt.save(step, tree).wait()

    assert on_ranks(3, root, "a", work, options) == [None, None, None]


def documents(root: Path, step: int) -> list[str]:
    return sorted(path.name for path in root.glob(f"step-{step:012d}-*/state/*"))


def test_pipeline_stages_save_what_they_have_and_one_rank_restores_all(tmp_path: Path) -> None:
    save_stages(tmp_path)
    parts = [f"{item}.part-0000{rank}.json" for item in ("ema", "model", "optimizer") for rank in (0, 2)]
    assert documents(tmp_path, 1) == documents(tmp_path, 2) == sorted([*parts, "progress.json"])
    assert verify(tmp_path, all_steps=True).ok
    assert not list(tmp_path.glob("step-*/frag/*.json"))
    for step in (1, 2):  # an optimizer without state first
        found = tree_of("abcd", 5, steps=step)
        load(tmp_path, found, step=step)
        assert_same(found, tree_of("abcd", step, steps=2 * (step - 1)))


def test_stages_are_restored_into_other_stages(tmp_path: Path) -> None:
    save_stages(tmp_path)
    others = ("a", "bcd")
    expected = [tree_of(layers, 2, steps=2) for layers in others]

    def work(ckpt: CheckpointManager) -> None:
        with pytest.raises(TreeMismatch, match="only in the checkpoint"):  # without a group nobody knows the others
            ckpt.restore(tree_of(others[ckpt.rank], 5, steps=0), step=2)
        found = tree_of(others[ckpt.rank], 5, steps=0)
        ckpt.restore(found, step=2, strict=False)
        assert_same(found, expected[ckpt.rank])

    assert on_ranks(2, tmp_path, "b", work) == [None, None]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_dcp_reads_the_parts_as_one(tmp_path: Path) -> None:
    save_stages(tmp_path)
    expected = tree_of("abcd", 2, steps=2)
    state: dict[str, Any] = {"model": tree_of("abcd", 5, steps=0)["model"].state_dict(), "progress": {"seed": 0}}
    state["optimizer"] = {"state": {f"{n}.weight": {"exp_avg": torch.zeros(3, 3)} for n in "abcd"}}
    dcp.load(state, storage_reader=StokerReader(tmp_path))
    for name, tensor in expected["model"].state_dict().items():
        assert torch.equal(state["model"][name], tensor)
    for name, parameter in expected["model"].named_parameters():
        if name.endswith("weight"):
            moment = expected["optimizer"].state[parameter]["exp_avg"]
            assert torch.equal(state["optimizer"]["state"][name]["exp_avg"], moment)
    assert state["progress"] == {"seed": 2}


def test_replicas_may_be_told_and_then_nobody_asks(tmp_path: Path) -> None:
    save_stages(tmp_path, lambda rank: {"replicas": (0, 1) if rank < 2 else (2,)})
    found = tree_of("abcd", 5, steps=0)
    load(tmp_path, found)
    assert_same(found, tree_of("abcd", 2, steps=2))


@pytest.mark.parametrize("replicas", [(), (1,), (0, 2), (-1, 0)])
def test_replicas_are_ranks_and_this_one_is_among_them(tmp_path: Path, replicas: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="replicas are ranks"):
        CheckpointManager(tmp_path, rank=0, world_size=2, run_id="a", replicas=replicas)


def test_a_tree_that_changes_on_one_rank_alone_is_saved(tmp_path: Path) -> None:
    """The others leave no note then: what they told before counts, and their fragments say that they have passed."""

    def work(ckpt: CheckpointManager) -> None:
        tree = {"mine": {f"w{ckpt.rank}": torch.ones(3)}, "shared": torch.arange(4)}
        ckpt.save(1, tree).wait()
        if ckpt.rank == 1:
            tree["mine"]["more"] = torch.zeros(2)  # type: ignore[index]
        ckpt.save(2, tree).wait()
        ckpt.save(3, tree).wait()

    assert on_ranks(3, tmp_path, "a", work, lambda _: {"persist_timeout_s": 30.0}) == [None] * 3
    found = {"mine": {f"w{rank}": torch.zeros(3) for rank in range(3)}, "shared": torch.zeros(4, dtype=torch.int64)}
    found["mine"]["more"] = torch.ones(2)  # type: ignore[index]
    load(tmp_path, found)
    assert all(found["mine"][f"w{rank}"].sum() == 3 for rank in range(3))  # type: ignore[index]
    assert verify(tmp_path, all_steps=True).steps == (1, 2, 3)


def test_ranks_that_save_other_items_are_refused(tmp_path: Path) -> None:
    def work(ckpt: CheckpointManager) -> None:
        ckpt.save(1, {"t": torch.ones(4), f"only{ckpt.rank}": 1}).wait()

    results = on_ranks(2, tmp_path, "a", work)
    assert all(isinstance(error, SaveFailed) and "same tree" in str(error) for error in results), results


def test_a_buffer_that_differs_between_ranks_is_the_lowest_ranks(tmp_path: Path) -> None:
    def work(ckpt: CheckpointManager) -> None:
        norm = nn.BatchNorm1d(1000)
        assert norm.running_mean is not None
        norm.running_mean.fill_(ckpt.rank + 5)
        ckpt.save(1, {"norm": norm}).wait()

    assert on_ranks(3, tmp_path, "a", work) == [None] * 3
    norm = nn.BatchNorm1d(1000)
    load(tmp_path, {"norm": norm})
    assert norm.running_mean is not None and norm.running_mean.unique().tolist() == [5.0]
    assert len({path.name[:5] for path in tmp_path.glob("step-*/data/*")}) == 3  # the parameters are shared out
