"""``dcp.async_save`` with our stager: one copy, to the place in the file, of the state as it was."""

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem

from stoker.checkpoint.dcp import StokerReader, StokerWriter
from stoker.checkpoint.staging import StokerStager
from stoker.checkpoint.verify import verify
from stoker.errors import ConfigError, DeadlineExceeded

dcp: Any = torch.distributed.checkpoint  # its functions are not declared as exported

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def state_of(n: int) -> dict[str, Any]:
    """Nested, tied, strided, scalar and empty tensors among plain values."""
    linear = nn.Linear(4, 3)
    for parameter in linear.parameters():
        nn.init.constant_(parameter, n)
    return {
        "model": linear.state_dict(),
        "nested": {"list": [torch.full((2,), n), {"x": torch.tensor(n)}], "pair": (n, "text")},
        "tied": linear.weight,
        "strided": (torch.arange(6).view(2, 3) + n).t(),
        "empty": torch.empty(0, 3),
        "epoch": n,
        "log": [n],
    }


def loaded(root: Path, step: int) -> dict[str, Any]:
    found = state_of(-1)
    dcp.load(found, storage_reader=StokerReader(root, step=step))
    return found


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    else:
        assert found == expected


def spoil(state: Any) -> None:
    """Change everything in it, in place."""
    if isinstance(state, dict):
        for value in state.values():
            spoil(value)
        state["more"] = 1
    elif isinstance(state, (list, tuple)):
        for value in state:
            spoil(value)
    elif isinstance(state, torch.Tensor):
        with torch.no_grad():
            state.zero_()


def test_what_was_there_at_the_call_is_saved_and_copied_once(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer, StokerStager(writer) as stager:
        arenas = set()
        for n in (1, 2, 3):
            state = state_of(n)
            future = dcp.async_save(state, storage_writer=writer, async_stager=stager)
            spoil(state)
            future.result()
            arenas |= {slot.arena.path for slot in stager._slots}
        assert writer._arena is None  # into which the writer would have copied all of it again
        assert len(arenas) == 1
    for n in (1, 2, 3):
        assert_same(loaded(tmp_path, n - 1), state_of(n))
    assert verify(tmp_path, all_steps=True).ok


class WaitingPlanner(DefaultSavePlanner):
    """Plans nothing until it is let go; may fail then."""

    def __init__(self, let_go: threading.Event, *, fails: bool = False) -> None:
        super().__init__()
        self.let_go, self.fails = let_go, fails

    def create_local_plan(self) -> Any:
        assert self.let_go.wait(60)
        if self.fails:
            raise RuntimeError("no plan today")
        return super().create_local_plan()


def test_a_second_save_may_be_staged_before_the_first_is_written_and_a_third_waits(tmp_path: Path) -> None:
    let_go = threading.Event()
    writers = [StokerWriter(tmp_path / str(n), persist_timeout_s=0.2 if n == 0 else 60) for n in (0, 1)]
    stager = StokerStager(writers[0])
    first = dcp.async_save(state_of(0), storage_writer=writers[0], async_stager=stager, planner=WaitingPlanner(let_go))
    second = stager.stage(state_of(1))
    with pytest.raises(DeadlineExceeded, match="must have been written"):
        stager.stage(state_of(2))
    let_go.set()
    writers[0].persist_timeout_s = 60
    first.result()
    third = stager.stage(state_of(2))
    dcp.save(second, storage_writer=writers[0])
    dcp.save(third, storage_writer=writers[0])
    for n in (0, 1, 2):
        assert_same(loaded(tmp_path / "0", n), state_of(n))
    del second, third
    stager.close()
    for writer in writers:
        writer.close()


def test_a_save_that_fails_before_it_writes_gives_its_memory_back(tmp_path: Path) -> None:
    let_go = threading.Event()
    let_go.set()
    with StokerWriter(tmp_path) as writer, StokerStager(writer) as stager:
        future = dcp.async_save(
            state_of(0), storage_writer=writer, async_stager=stager, planner=WaitingPlanner(let_go, fails=True)
        )
        with pytest.raises(CheckpointException, match="no plan today"):
            future.result()
        del future
        for n in (1, 2):
            dcp.async_save(state_of(n), storage_writer=writer, async_stager=stager).result()
    assert_same(loaded(tmp_path, 1), state_of(2))


class Doubling(DefaultSavePlanner):
    """One that saves other values than it was given."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        found = super().transform_object(write_item, object)
        return found * 2 if isinstance(found, torch.Tensor) else found


def test_a_planner_that_changes_tensors_is_heeded(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer, StokerStager(writer) as stager:
        state = {"w": torch.arange(3.0)}
        dcp.async_save(state, storage_writer=writer, async_stager=stager, planner=Doubling()).result()
    dcp.load(state, storage_reader=StokerReader(tmp_path))
    assert state["w"].tolist() == [0, 2, 4]


def test_other_tensors_get_another_layout(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer, StokerStager(writer) as stager:
        for n in (1, 2):
            state = {"w": torch.full((n, 3), float(n)), "n": n}
            dcp.async_save(state, storage_writer=writer, async_stager=stager).result()
        assert len(stager._slots) == 1
    for n in (1, 2):
        found: dict[str, Any] = {"w": torch.zeros(n, 3), "n": 0}
        dcp.load(found, storage_reader=StokerReader(tmp_path, step=n - 1))
        assert torch.equal(found["w"], torch.full((n, 3), float(n))) and found["n"] == n


def test_a_stager_of_no_writer_is_refused() -> None:
    nothing: Any = None
    with pytest.raises(ConfigError, match="StokerWriter"):
        StokerStager(nothing)
