"""A few kills of the saving process at each run of the suite, and proof that its check sees what must not be."""

import json
import shutil
from pathlib import Path
from typing import Literal

import pytest

from stoker.checkpoint import CheckpointManager
from stoker.errors import KeyNotFound
from stoker.testing.kill import Death
from tests.faults.prove import KILLS, main, prove
from tests.faults.saving import Check, differences, tree_at, tree_with_base_at


def death(acknowledged: int = -1) -> Death:
    return Death(number=0, killed=True, in_flight=True, acknowledged=acknowledged, passes=0, moment="by hand")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with steps 0, 1 and 2."""
    with CheckpointManager(tmp_path / "root", keep_last=3, grace_s=0.0) as manager:
        for step in range(3):
            manager.save(step, tree_at(step)).wait("committed")
    return tmp_path / "root"


def test_a_saving_process_that_is_killed_at_random_tears_nothing(memory: Path) -> None:
    report = prove("saving", "moments", 12, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


def test_a_saving_process_that_is_killed_between_calls_tears_nothing(memory: Path) -> None:
    report = prove("saving", "calls", 12, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


@pytest.mark.parametrize("at", ["moments", "calls"])
def test_a_process_whose_steps_refer_to_older_ones_tears_nothing_when_it_is_killed(
    memory: Path, at: Literal["moments", "calls"]
) -> None:
    report = prove("saving incremental", at, 12, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


def test_a_file_that_is_missing_in_a_retired_home_is_seen(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root", keep_last=3, grace_s=0.0, incremental=True) as manager:
        for step in range(5):
            manager.save(step, tree_with_base_at(step)).wait("committed")
    check = Check(incremental=True)
    check(tmp_path, death(acknowledged=4))
    (home,) = (tmp_path / "root").glob("step-000000000000-*/data/*")
    home.unlink()
    with pytest.raises(KeyNotFound, match="step-000000000000-"):
        check(tmp_path, death(acknowledged=4))


def test_the_ranks_of_a_job_that_are_killed_at_once_tear_nothing(memory: Path) -> None:
    report = prove("saving ranks", "moments", 4, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


def test_whole_steps_pass_the_check(root: Path) -> None:
    Check()(root.parent, death(acknowledged=2))


def test_an_acknowledged_step_must_be_there(root: Path) -> None:
    with pytest.raises(AssertionError, match="step 3 was acknowledged, the newest is 2"):
        Check()(root.parent, death(acknowledged=3))


def test_the_newest_step_must_not_go_backwards(root: Path) -> None:
    check = Check()
    check(root.parent, death())
    newest = min((root / "log").iterdir(), key=lambda path: path.name)
    newest.unlink()
    with pytest.raises(AssertionError, match="step 2 was the newest once, now 1 is"):
        check(root.parent, death())


def test_a_flipped_bit_in_any_live_step_is_seen(root: Path) -> None:
    blob = next(root.glob("step-000000000001-*/data/*.safetensors"))
    data = bytearray(blob.read_bytes())
    data[-5000] ^= 1
    blob.write_bytes(data)
    with pytest.raises(AssertionError, match="step 1 is damaged under its root"):
        Check()(root.parent, death())


def test_a_step_that_holds_another_steps_state_is_seen(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path / "root") as manager:
        manager.save(5, tree_at(4)).wait("committed")
    with pytest.raises(AssertionError, match="step 5 came back with other bits in .*embedding"):
        Check()(tmp_path, death())


def test_what_a_killed_save_left_is_gone_after_a_quiet_moment(root: Path) -> None:
    live = next(root.glob("step-000000000002-*"))
    shutil.copytree(live, root / f"step-000000000007-{'0' * len(live.name.split('-')[2])}")
    last = Death(number=1, killed=False, in_flight=False, acknowledged=2, passes=1, moment="left to finish")
    Check()(root.parent, last)
    assert not list(root.glob("step-000000000007-*"))


def test_differences_names_what_differs() -> None:
    assert differences(tree_at(3), 3) == []
    assert set(differences(tree_at(3), 4)) >= {"embedding", "scale", "step", "tokens", "note"}


def test_prove_prints_one_json_object(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(KILLS, "change", (2, 2))
    monkeypatch.setattr("tests.faults.prove.MIN_IN_FLIGHT", {"moments": 0.0, "calls": 0.0})
    assert main(["--level", "change", "--trial", "packing", "--seed", "5", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is True
    assert [(t["trial"], t["at"], t["kills"], t["seed"]) for t in report["trials"]] == [
        ("packing", "moments", 2, 5),
        ("packing", "calls", 2, 5),
    ]
