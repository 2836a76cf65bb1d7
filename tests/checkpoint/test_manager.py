"""The manager in one process, and several ranks without a process group: save, restore, retention, failure."""

import copy
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from stoker.checkpoint import CheckpointManager, RngState, load, save, slots, term
from stoker.checkpoint.log import CheckpointLog
from stoker.errors import (
    ConfigError,
    CorruptBlock,
    CorruptionError,
    DeadlineExceeded,
    Fenced,
    NoCheckpoint,
    SaveFailed,
    StepAlreadyCommitted,
    TreeMismatch,
    UnsupportedState,
)
from stoker.storage import local
from stoker.storage._posix import shared_memory_directory
from stoker.testing.s3 import S3Server


def trained(seed: int, steps: int = 3) -> dict[str, Any]:
    """A tree with everything that a training script has."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for _ in range(steps):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    ema = {"weights": [p.detach().clone() for p in model.parameters()], "decay": 0.99}
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler, "ema": ema, "progress": {"step": steps}}


def assert_same(mine: dict[str, Any], theirs: dict[str, Any]) -> None:
    for a, b in zip(mine["model"].state_dict().values(), theirs["model"].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x, y = mine["optimizer"].state_dict(), theirs["optimizer"].state_dict()
    assert x["param_groups"] == y["param_groups"]
    assert x["state"].keys() == y["state"].keys()
    for key, state in x["state"].items():
        for name, value in state.items():
            assert torch.equal(value, y["state"][key][name]), name
    assert mine["scheduler"].state_dict() == theirs["scheduler"].state_dict()
    assert all(torch.equal(a, b) for a, b in zip(mine["ema"]["weights"], theirs["ema"]["weights"], strict=True))
    assert mine["ema"]["decay"] == theirs["ema"]["decay"]
    assert mine["progress"] == theirs["progress"]


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor, so that any dtype can be compared."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def one_blob(root: Path, step: int) -> Path:
    return next(root.glob(f"step-{step:012d}-*/data/*.safetensors"))


# ------------------------------------------------------------------------------------------------------ straight path


def test_a_fresh_process_state_becomes_the_saved_one_bit_for_bit(tmp_path: Path) -> None:
    tree = trained(0)
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(3, tree).wait("committed")
        fresh = trained(1, steps=0)
        report = ckpt.restore(fresh)
    assert report.step == 3
    assert report.missing == report.unexpected == ()
    assert report.values["progress"] == {"step": 3}
    assert_same(fresh, tree)


def test_training_goes_on_from_a_restored_state_exactly_as_from_the_live_one(tmp_path: Path) -> None:
    tree = trained(0)
    save(tmp_path, tree)
    fresh = trained(1, steps=0)
    load(tmp_path, fresh)
    for t in (tree, fresh):
        torch.manual_seed(5)
        t["model"](torch.randn(5, 8)).square().sum().backward()
        t["optimizer"].step()
        t["scheduler"].step()
    assert_same(fresh, tree)


def test_what_changes_after_save_returns_is_not_in_the_step(tmp_path: Path) -> None:
    tree = trained(0)
    as_saved = copy.deepcopy(tree)
    with CheckpointManager(tmp_path) as ckpt:
        handle = ckpt.save(1, tree)
        with torch.no_grad():
            for parameter in tree["model"].parameters():
                parameter.zero_()
        tree["progress"]["step"] = 99
        handle.wait()
        fresh = trained(1, steps=0)
        ckpt.restore(fresh)
    assert_same(fresh, as_saved)


def test_values_of_nested_dicts_are_updated_in_the_users_own_objects(tmp_path: Path) -> None:
    inner = {"best": 1.5}
    save(tmp_path, {"extra": {"inner": inner, "n": 1}, "epoch": 4})
    mine = {"best": 0.0}
    tree: dict[str, Any] = {"extra": {"inner": mine, "n": 0}, "epoch": 0}
    load(tmp_path, tree)
    assert mine == {"best": 1.5}
    assert tree == {"extra": {"inner": {"best": 1.5}, "n": 1}, "epoch": 4}


@pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex64],
)
def test_every_dtype_comes_back_also_empty_scalar_and_transposed(tmp_path: Path, dtype: torch.dtype) -> None:
    def make(fill: float) -> dict[str, torch.Tensor]:
        whole = (torch.arange(12).view(3, 4) * fill).to(dtype)
        return {
            "whole": whole,
            "transposed": whole.t(),
            "scalar": torch.ones(()).mul(fill).to(dtype),
            "empty": whole[:0],
        }

    tree = {"t": make(1.0)}
    save(tmp_path, tree)
    fresh = {"t": make(0.0)}
    load(tmp_path, fresh)
    for name, value in tree["t"].items():
        assert torch.equal(bits(fresh["t"][name]), bits(value)), name


def test_random_states_come_back(tmp_path: Path) -> None:
    save(tmp_path, {"rng": RngState()})
    expected = (random.random(), float(np.random.rand()), torch.rand(3).tolist())
    load(tmp_path, {"rng": RngState()})
    assert (random.random(), float(np.random.rand()), torch.rand(3).tolist()) == expected


def test_latest_and_steps_see_only_what_is_committed(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.latest() is None
        assert ckpt.steps() == []
        for step in (5, 10):
            ckpt.save(step, {"x": step}).wait()
        assert ckpt.latest() == 10
        assert ckpt.steps() == [5, 10]


def test_keep_last_retires_the_older_steps_and_their_data(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep_last=2, grace_s=0) as ckpt:
        for step in range(5):
            ckpt.save(step, {"t": torch.ones(4), "x": step}).wait()
        assert ckpt.steps() == [3, 4]
    left = {path.name.split("-")[1] for path in tmp_path.glob("step-*") if any(path.rglob("*.safetensors"))}
    assert left == {f"{3:012d}", f"{4:012d}"}


def test_a_report_tells_bytes_and_times_of_every_level(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        handle = ckpt.save(1, {"t": torch.zeros(1000)})
        handle.wait()
        report = handle.report()
    assert report.staged_bytes >= 4000
    assert report.local_s is not None
    assert report.committed_s is not None
    assert 0 < report.stall_s <= report.local_s <= report.committed_s
    assert set(report.bytes_per_s) == {"staged", "local", "committed"}


def test_a_state_without_tensors_is_a_step_too(tmp_path: Path) -> None:
    save(tmp_path, {"x": {"y": [1, 2.5, None, "z"]}})
    tree: dict[str, Any] = {"x": None}
    load(tmp_path, tree)
    assert tree == {"x": {"y": [1, 2.5, None, "z"]}}


def test_prewarm_allocates_before_the_first_save(tmp_path: Path) -> None:
    tree = {"t": torch.ones(1 << 18)}
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.prewarm(tree)
        ckpt.save(0, tree).wait()
        assert ckpt.latest() == 0


def test_a_step_older_than_the_newest_can_be_restored_and_the_next_save_rewinds(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": step}).wait()
        tree = {"x": 0}
        ckpt.restore(tree, step=1)
        assert tree == {"x": 1}
        assert ckpt.steps() == [1, 2, 3]
        ckpt.save(2, {"x": 22}).wait()
        assert ckpt.steps() == [1, 2]
        ckpt.restore(tree)
        assert tree == {"x": 22}


def test_whoever_restores_the_newest_step_after_an_older_one_abandons_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"x": step}).wait()
        tree = {"x": 0}
        ckpt.restore(tree, step=1)
        ckpt.restore(tree)
        assert tree == {"x": 3}
        ckpt.save(4, tree).wait()
        assert ckpt.steps() == [1, 2, 3, 4]


def test_what_an_older_run_still_commits_after_an_explicit_restore_is_abandoned(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as old, CheckpointManager(tmp_path) as new:
        old.save(1, {"x": 1}).wait()
        new.restore({"x": 0}, step=1)
        old.save(2, {"x": 2}).wait()
        new.save(3, {"x": 3}).wait()
        assert new.steps() == [1, 3]


def test_what_a_rewind_abandons_is_deleted_after_its_grace(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, grace_s=0) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, {"t": torch.ones(4)}).wait()
        ckpt.restore({"t": torch.zeros(4)}, step=1)
        ckpt.save(4, {"t": torch.ones(4)}).wait()
        assert ckpt.steps() == [1, 4]
    left = {path.name.split("-")[1] for path in tmp_path.glob("step-*") if any(path.rglob("*.safetensors"))}
    assert left == {f"{1:012d}", f"{4:012d}"}


def test_names_restore_a_part(tmp_path: Path) -> None:
    tree = trained(0)
    save(tmp_path, tree)
    fresh = trained(1)
    untouched = copy.deepcopy(fresh["ema"])
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.restore(fresh, names=["model.0.*", "progress"])
    assert torch.equal(fresh["model"][0].weight, tree["model"][0].weight)
    assert not torch.equal(fresh["model"][2].weight, tree["model"][2].weight)
    assert all(torch.equal(a, b) for a, b in zip(fresh["ema"]["weights"], untouched["weights"], strict=True))


# ---------------------------------------------------------------------------------------------------------- bad input


def test_a_directory_with_no_committed_step_says_so(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "nothing") as ckpt, pytest.raises(NoCheckpoint, match="nothing was saved"):
        ckpt.restore({"x": 1})
    assert not (tmp_path / "nothing").exists()


def test_a_step_that_is_not_committed_is_refused_with_those_that_are(tmp_path: Path) -> None:
    save(tmp_path, {"x": 1})
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(NoCheckpoint, match="committed steps: 0"):
        ckpt.restore({"x": 1}, step=7)


def test_all_differences_are_told_at_once_and_nothing_is_written(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Linear(4, 2), "extra": 1})
    wrong = nn.Sequential(nn.Linear(4, 3))
    wrong.register_parameter("weight", nn.Parameter(torch.zeros(5)))
    before = copy.deepcopy(wrong.state_dict())
    with pytest.raises(TreeMismatch) as caught:
        load(tmp_path, {"model": wrong, "other": 2})
    for part in (
        "model.weight: float32[5]",
        "model.0.weight: not in",
        "model.bias: only in",
        "other: not",
        "extra: only",
    ):
        assert part in str(caught.value)
    assert all(torch.equal(before[k], v) for k, v in wrong.state_dict().items())


def test_strict_false_restores_what_both_have_and_reports_the_rest(tmp_path: Path) -> None:
    save(tmp_path, {"model": nn.Linear(4, 2), "extra": 1})
    model = nn.Linear(4, 2, bias=False)
    with CheckpointManager(tmp_path) as ckpt:
        report = ckpt.restore({"model": model, "other": 2}, strict=False)
    assert report.missing == ("other",)
    assert report.unexpected == ("extra", "model.bias")


def test_an_object_that_cannot_be_represented_raises_with_its_path_and_writes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        with pytest.raises(UnsupportedState, match=r"extra.*thing"):
            ckpt.save(1, {"extra": {"thing": object()}, "t": torch.ones(2)})
        assert ckpt.latest() is None
        ckpt.save(2, {"t": torch.ones(2)}).wait()
        assert ckpt.steps() == [2]


def test_saving_one_step_twice_fails_the_second_time_and_keeps_the_first(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": 1}).wait()
        with pytest.raises(StepAlreadyCommitted):
            ckpt.save(1, {"x": 2}).wait()
        tree = {"x": 0}
        ckpt.restore(tree)
        assert tree == {"x": 1}


def test_an_older_manager_is_fenced_by_a_newer_one(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as old, CheckpointManager(tmp_path) as new:
        old.save(1, {"x": 1}).wait()
        new.save(2, {"x": 2}).wait()
        with pytest.raises(Fenced):
            old.save(3, {"x": 3}).wait()
        assert new.steps() == [1, 2]


def test_a_fenced_manager_stays_fenced_when_its_turn_to_open_again_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(term, "SAVES_IN_A_TERM", 2)
    with CheckpointManager(tmp_path) as old, CheckpointManager(tmp_path) as new:
        old.save(1, {"x": 1}).wait()
        new.save(2, {"x": 2}).wait()
        for step in (3, 4, 5):
            with pytest.raises(Fenced):
                old.save(step, {"x": step}).wait()
        new.save(6, {"x": 6}).wait()
        assert new.steps() == [1, 2, 6]


def test_hundreds_of_saves_leave_a_log_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    defaults = CheckpointLog.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "keep_records", 100)
    with tempfile.TemporaryDirectory(dir=shared_memory_directory()) as directory:
        root = Path(directory)
        longest = 0
        with CheckpointManager(root, keep_last=2, grace_s=0) as ckpt:
            for step in range(250):
                ckpt.save(step, {"x": step}).wait()
                newest = min(root.glob("log/*"))
                longest = max(longest, len(json.loads(newest.read_bytes())["record"]["dead"]))
            assert ckpt.steps() == [248, 249]
        assert 50 < longest <= 101
        sizes = [path.stat().st_size for path in root.glob("log/*")]
        assert len(sizes) <= 200
        assert max(sizes) < 4096
        assert len(list(root.glob("step-*"))) == 2


def test_a_failure_nobody_waited_for_is_raised_by_the_next_save_and_the_one_after_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        slots, "memory_allows", lambda size_bytes, ranks: False
    )  # so that a save waits for the one before
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": 1}).wait()
        ckpt.save(1, {"x": 1})
        with pytest.raises(StepAlreadyCommitted):
            ckpt.save(2, {"x": 2})
        ckpt.save(2, {"x": 2}).wait()


def test_close_raises_a_failure_nobody_waited_for(tmp_path: Path) -> None:
    ckpt = CheckpointManager(tmp_path)
    ckpt.save(1, {"x": 1}).wait()
    ckpt.save(1, {"x": 1})
    with pytest.raises(StepAlreadyCommitted):
        ckpt.close()
    ckpt.close()


def test_a_closed_manager_refuses_to_save(tmp_path: Path) -> None:
    ckpt = CheckpointManager(tmp_path)
    ckpt.close()
    with pytest.raises(ConfigError, match="closed"):
        ckpt.save(1, {"x": 1})


def test_a_flipped_bit_in_a_blob_is_named_and_an_older_step_is_never_taken_instead(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, {"t": torch.arange(1000.0)}).wait()
    blob = one_blob(tmp_path, 2)
    data = bytearray(blob.read_bytes())
    data[5000] ^= 4
    blob.write_bytes(data)
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(CorruptBlock, match=r"00000-0\.safetensors: bytes \[0"):
        ckpt.restore({"t": torch.zeros(1000)})


@pytest.mark.parametrize("which", ["log/*.json", "step-*/manifest.arrow", "step-*/state/*.json"])
def test_a_flipped_bit_in_the_truth_is_an_error(tmp_path: Path, which: str) -> None:
    save(tmp_path, {"t": torch.ones(10)})
    path = min(tmp_path.glob(which))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptionError):
        load(tmp_path, {"t": torch.zeros(10)})


def test_a_truncated_blob_is_refused(tmp_path: Path) -> None:
    save(tmp_path, {"t": torch.ones(1 << 20)})
    blob = one_blob(tmp_path, 0)
    blob.write_bytes(blob.read_bytes()[: 1 << 20])
    with pytest.raises(OSError, match="must hold bytes"):
        load(tmp_path, {"t": torch.zeros(1 << 20)})


def test_a_full_disk_fails_the_save_and_keeps_the_steps_before(tmp_path: Path) -> None:
    program = f"""
import resource, torch, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
from stoker.checkpoint import CheckpointManager
from stoker.errors import StoreFull
with CheckpointManager({str(tmp_path)!r}) as ckpt:
    ckpt.save(1, {{"t": torch.ones(1000)}}).wait()
    ckpt.prewarm({{"t": torch.ones(1 << 20)}})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    try:
        ckpt.save(2, {{"t": torch.ones(1 << 20)}}).wait()
    except StoreFull as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    ckpt.save(3, {{"t": torch.ones(1 << 20)}}).wait()
    print(ckpt.steps())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    message, steps = done.stdout.splitlines()
    assert "needs more space than is left" in message
    assert steps == "[1, 3]"


@pytest.mark.parametrize(("arguments", "rule"), [({"keep_last": 0}, "keep_last"), ({"rank": 1, "world_size": 2}, "run_id"),
                                                 ({"rank": 2, "world_size": 2, "run_id": "r"}, "rank must be"),
                                                 ({"overlap": "yes"}, "overlap must be"), ({"on_busy": "fail"}, "on_busy")])  # fmt: skip
def test_wrong_arguments_name_their_rule(tmp_path: Path, arguments: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        CheckpointManager(tmp_path, **arguments)


@pytest.mark.parametrize("step", [-1, 10**12, 1.5, True, "3"])
def test_a_step_that_is_no_count_is_refused(tmp_path: Path, step: Any) -> None:
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(ConfigError, match="step is an integer"):
        ckpt.save(step, {"x": 1})


def test_wait_gives_up_at_its_deadline_and_the_save_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_go = threading.Event()
    commit = local.LocalWriter.commit

    def hanging(self: local.LocalWriter) -> Any:
        let_go.wait(60)
        return commit(self)

    monkeypatch.setattr(local.LocalWriter, "commit", hanging)
    with CheckpointManager(tmp_path) as ckpt:
        handle = ckpt.save(1, {"t": torch.ones(4)})
        with pytest.raises(DeadlineExceeded, match="step 1"):
            handle.wait("committed", timeout_s=0.01)
        assert not handle.done()
        let_go.set()
        handle.wait()


# ------------------------------------------------------------------------------------- several ranks, no process group


def on_every_rank(
    world_size: int, root: Path, run_id: str, work: Callable[[CheckpointManager], Any], **options: Any
) -> list[Any]:
    """Run `work` on `world_size` managers in threads; returns each rank's result or error."""

    def one(rank: int) -> Any:
        try:
            with CheckpointManager(root, rank=rank, world_size=world_size, run_id=run_id, **options) as ckpt:
                return work(ckpt)
        except Exception as error:
            return error

    with ThreadPoolExecutor(world_size) as threads:
        return list(threads.map(one, range(world_size)))


def test_ranks_share_the_work_and_one_rank_restores_it(tmp_path: Path) -> None:
    state = {f"w{i}": torch.randn(50 + i, 7) for i in range(12)}
    results = on_every_rank(3, tmp_path, "run", lambda ckpt: ckpt.save(4, {"t": dict(state)}).wait())
    assert results == [None, None, None]
    assert len(list(tmp_path.glob("step-*/data/*.safetensors"))) == 3
    fresh = {"t": {name: torch.zeros_like(value) for name, value in state.items()}}
    load(tmp_path, fresh)
    assert all(torch.equal(fresh["t"][name], value) for name, value in state.items())


def test_every_rank_keeps_its_own_random_state_and_new_ranks_get_new_ones(tmp_path: Path) -> None:
    class Mine:
        rank_local = True

        def __init__(self, value: int) -> None:
            self.value = value

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

        def load_for_new_rank(self, state: dict[str, Any], rank: int, step: int) -> None:
            self.value = -rank - 100 * step

    on_every_rank(2, tmp_path, "a", lambda ckpt: ckpt.save(1, {"mine": Mine(ckpt.rank + 10)}).wait())

    def restored(ckpt: CheckpointManager) -> int:
        mine = Mine(0)
        ckpt.restore({"mine": mine}, step=1)
        return mine.value

    assert on_every_rank(3, tmp_path, "b", restored) == [10, 11, -102]


def test_a_rank_that_fails_is_named_to_all_and_the_next_save_works(tmp_path: Path) -> None:
    def work(ckpt: CheckpointManager) -> list[str]:
        seen = []
        tree: dict[str, Any] = {"t": torch.ones(4)}
        if ckpt.rank == 1:
            tree["bad"] = object()
        try:
            ckpt.save(1, tree).wait()
        except (SaveFailed, UnsupportedState) as error:
            seen.append(str(error))
        ckpt.save(2, {"t": torch.ones(4)}).wait()
        return [*seen, str(ckpt.steps())]

    results = on_every_rank(3, tmp_path, "run", work)
    assert all(result[-1] == "[2]" for result in results), results
    assert all("rank 1" in result[0] for result in (results[0], results[2])), results


def test_rank_0_that_fails_at_the_first_save_is_heard_by_the_others(tmp_path: Path) -> None:
    def work(ckpt: CheckpointManager) -> str:
        with pytest.raises((SaveFailed, UnsupportedState)) as caught:
            ckpt.save(1, {"t": torch.ones(4)} | ({"bad": object()} if ckpt.rank == 0 else {})).wait()
        return str(caught.value)

    results = on_every_rank(2, tmp_path, "run", work, persist_timeout_s=20.0)
    assert all("bad" in result for result in results), results


def test_a_rank_that_never_comes_is_named_at_the_deadline(tmp_path: Path) -> None:
    def work(ckpt: CheckpointManager) -> str:
        if ckpt.rank == 1:
            return "absent"
        with pytest.raises(SaveFailed) as caught:
            ckpt.save(1, {"t": torch.ones(4)}).wait()
        return str(caught.value)

    results = on_every_rank(3, tmp_path, "run", work, persist_timeout_s=1.0)
    assert all("ranks [1] of 3" in results[rank] for rank in (0, 2)), results


def test_ranks_with_different_trees_are_refused(tmp_path: Path) -> None:
    def work(ckpt: CheckpointManager) -> str:
        with pytest.raises(SaveFailed) as caught:
            ckpt.save(1, {"t": torch.ones(4 + ckpt.rank)}).wait()
        return str(caught.value)

    assert all("rank" in result for result in on_every_rank(2, tmp_path, "run", work))


# ------------------------------------------------------------------------------------------------------------ the end


def test_a_process_that_exits_without_close_still_commits_what_it_saved(tmp_path: Path) -> None:
    program = f"""
import torch
from stoker.checkpoint import CheckpointManager
ckpt = CheckpointManager({str(tmp_path)!r})
ckpt.save(1, {{"t": torch.ones(1 << 20)}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.steps() == [1]
    assert not list(shared_memory_directory().glob("arena-*"))


@pytest.mark.parametrize(
    ("ending", "code"), [("sys.exit(3)", 3), ("raise RuntimeError('training broke')", 1), ("ckpt.close()", 0)]
)
@pytest.mark.parametrize("block", ["with ckpt:", "if True:"])
def test_however_a_process_ends_the_save_that_is_pending_is_committed(
    tmp_path: Path, block: str, ending: str, code: int
) -> None:
    program = f"""
import sys, torch
from stoker.checkpoint import CheckpointManager
ckpt = CheckpointManager({str(tmp_path)!r})
{block}
    ckpt.save(1, {{"t": torch.ones(1 << 22)}})
    {ending}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert ("training broke" in done.stderr) == ("broke" in ending)
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.steps() == [1]


def test_a_process_that_exits_without_close_commits_to_an_object_store_too(s3_server: S3Server) -> None:
    url = s3_server.url("stoker", "test-exit")
    program = f"""
import torch
from stoker.checkpoint import CheckpointManager
ckpt = CheckpointManager({url!r}, storage_options={s3_server.storage_options!r})
ckpt.save(1, {{"t": torch.ones(5 << 20)}})
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    with CheckpointManager(url, storage_options=s3_server.storage_options) as ckpt:
        assert ckpt.steps() == [1]


def test_a_killed_save_leaves_the_steps_before_and_the_next_run_clears_up(tmp_path: Path) -> None:
    program = f"""
import os, signal, torch
from stoker.checkpoint import CheckpointManager, persist
ckpt = CheckpointManager({str(tmp_path)!r})
ckpt.save(1, {{"t": torch.ones(1 << 18)}}).wait()
persist.collect_fragments = lambda *a: os.kill(os.getpid(), signal.SIGKILL)
ckpt.save(2, {{"t": torch.ones(1 << 18)}}).wait()
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.glob(f"step-{2:012d}-*/data/*"))
    for arena in shared_memory_directory().glob("arena-*"):  # it was started anew on another node
        arena.unlink()
    with CheckpointManager(tmp_path, grace_s=0) as ckpt:
        assert ckpt.steps() == [1]
        ckpt.save(2, {"t": torch.ones(1 << 18)}).wait()
        ckpt.save(3, {"t": torch.ones(1 << 18)}).wait()
        assert ckpt.steps() == [1, 2, 3]
    assert len(list(tmp_path.glob(f"step-{2:012d}-*/data/*"))) == 1


def test_a_save_that_hangs_does_not_hold_up_the_end_of_the_process_for_ever_and_is_not_lost(tmp_path: Path) -> None:
    program = f"""
import threading, torch
from stoker.checkpoint import CheckpointManager, manager
from stoker.storage import local
manager._EXIT_GRACE_S = 0.2
local.LocalWriter.commit = lambda self: threading.Event().wait()
ckpt = CheckpointManager({str(tmp_path)!r}, persist_timeout_s=0.5)
ckpt.save(1, {{"t": torch.ones(1000)}}).wait("staged")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "1 saves have not ended" in done.stderr
    tree = {"t": torch.zeros(1000)}
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.restore(tree).step == 1
    assert torch.equal(tree["t"], torch.ones(1000))
    for arena in shared_memory_directory().glob("arena-*"):
        arena.unlink()


def test_a_forked_process_can_not_use_its_parents_manager_and_does_it_no_harm(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": 1}).wait()
        pid = os.fork()
        if pid == 0:
            refused = 0
            for act in (lambda: ckpt.save(2, {"x": 2}), lambda: ckpt.restore({"x": 0}), lambda: ckpt.prewarm({"x": 0})):
                try:
                    act()
                except ConfigError as error:
                    refused += "used by the process that made it" in str(error)
            ckpt.close()
            os._exit(refused)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 3
        ckpt.save(2, {"x": 2}).wait()
        assert ckpt.steps() == [1, 2]


def test_close_twice_is_close_once(tmp_path: Path) -> None:
    ckpt = CheckpointManager(tmp_path)
    ckpt.save(1, {"x": 1})
    ckpt.close()
    ckpt.close()
    with CheckpointManager(tmp_path) as again:
        assert again.steps() == [1]


def test_no_file_under_a_root_holds_a_pickle(tmp_path: Path) -> None:
    save(tmp_path, trained(0))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            head = path.read_bytes()[:16]
            assert not head.startswith(b"\x80") and b"PK\x03\x04" not in head, path
    for path in tmp_path.glob("step-*/state/*.json"):
        json.loads(path.read_bytes())
