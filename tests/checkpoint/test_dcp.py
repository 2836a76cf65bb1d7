"""``dcp.save``, ``async_save`` and ``load`` through the storage layer: same format, same log, no pickle at rest."""

import json
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict_from_keys

from stoker.checkpoint import CheckpointManager, RngState, load, save
from stoker.checkpoint.dcp import StokerReader, StokerWriter
from stoker.checkpoint.verify import verify
from stoker.errors import (
    ConfigError,
    CorruptBlock,
    CorruptRecord,
    Fenced,
    NoCheckpoint,
    StepAlreadyCommitted,
    StokerError,
    UnsupportedError,
    UnsupportedState,
)
from stoker.storage import local
from stoker.testing.s3 import S3Server
from tests.checkpoint.dcp_ranks import full_state

dcp: Any = torch.distributed.checkpoint  # its functions are not declared as exported

PARTIAL = DefaultLoadPlanner(allow_partial_load=True)

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is (disabled|unavailable):UserWarning")


def trained(seed: int, steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    for _ in range(steps):
        model(torch.randn(5, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def tree_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {"model": model, "optimizer": get_optimizer_state_dict(model, optimizer)}


def assert_same(mine: tuple[nn.Module, torch.optim.Optimizer], theirs: tuple[nn.Module, torch.optim.Optimizer]) -> None:
    for a, b in zip(mine[0].state_dict().values(), theirs[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    x, y = mine[1].state_dict(), theirs[1].state_dict()
    assert x["param_groups"] == y["param_groups"]
    assert x["state"].keys() == y["state"].keys()
    for key, state in x["state"].items():
        assert all(torch.equal(value, y["state"][key][name]) for name, value in state.items())


def failure(work: Any, *args: Any, **options: Any) -> StokerError:
    """The typed error inside the exception that torch makes of it."""
    with pytest.raises(CheckpointException) as caught:
        work(*args, **options)
    error = caught.value.failures[0][0]
    assert isinstance(error, StokerError), error
    return error


def steps_of(root: Path) -> list[int]:
    with CheckpointManager(root) as ckpt:
        return ckpt.steps()


# -------------------------------------------------------------------------------------------------------- straight path


def test_model_optimizer_and_values_come_back_through_stock_dcp(tmp_path: Path) -> None:
    mine = trained(0)
    values = {
        "big": 2**70,
        "rate": float("inf"),
        "none": None,
        "raw": b"\0\xff",
        "shape": (1, 2),
        "list": [1, [2, "x"]],
    }
    with StokerWriter(tmp_path) as writer:
        dcp.save({**tree_of(*mine), "values": values, "epoch": 7}, storage_writer=writer)
    theirs = trained(1)
    state: dict[str, Any] = {**tree_of(*theirs), "values": dict.fromkeys(values), "epoch": 0}
    reader = StokerReader(tmp_path)
    dcp.load(state, storage_reader=reader)
    set_optimizer_state_dict(theirs[0], theirs[1], state["optimizer"])
    assert_same(mine, theirs)
    assert state["values"] == values
    assert type(state["values"]["shape"]) is tuple
    assert (state["epoch"], writer.step, reader.step) == (7, 0, 0)


def test_nothing_at_rest_is_pickle_and_every_byte_is_under_a_checksum(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({**tree_of(*trained(0)), "values": {"a": [1, (2,)]}}, storage_writer=writer)
    assert {path.suffix for path in tmp_path.rglob("*") if path.is_file()} == {".safetensors", ".arrow", ".json"}
    for path in tmp_path.rglob("*.json"):
        json.loads(path.read_text())
    report = verify(tmp_path)
    assert report.ok
    assert report.num_bytes == sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())


class FoundClasses:
    """Names that pickle looks up, each with whether torch's planner, that reads a stream in memory, asked for it."""

    def __init__(self) -> None:
        self.found: list[tuple[str, bool]] = []
        self.listening = True
        sys.addaudithook(self)  # for the life of the process

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "pickle.find_class" and self.listening:
            frame: Any = sys._getframe()
            callers = set()
            while frame is not None:
                callers.add(frame.f_code.co_name)
                frame = frame.f_back
            self.found.append((".".join(map(str, arguments)), "load_bytes" in callers))


def test_nothing_is_unpickled_but_what_torchs_planner_wants_as_a_stream(tmp_path: Path) -> None:
    classes = FoundClasses()
    try:
        tree = trained(0)
        values = {"shape": torch.Size([1, 2]), "dtype": torch.bfloat16}
        save(tmp_path / "manager", {"model": tree[0], "optimizer": tree[1], "values": dict(values)})
        load(tmp_path / "manager", {"model": tree[0], "optimizer": tree[1], "values": dict(values)})
        with StokerWriter(tmp_path / "dcp") as writer:
            dcp.save({**tree_of(*tree), "values": dict(values)}, storage_writer=writer)
        assert classes.found == []
        state = {**tree_of(*tree), "values": dict.fromkeys(values)}
        dcp.load(state, storage_reader=StokerReader(tmp_path / "dcp"))
    finally:
        classes.listening = False
    assert state["values"] == values
    assert classes.found and all(by_planner for _, by_planner in classes.found), classes.found


def test_tensors_of_every_kind_come_back_and_convert_as_torchs_own_readers_do(tmp_path: Path) -> None:
    state = {
        **full_state(),
        "fp8": torch.arange(8.0).to(torch.float8_e4m3fn),
        "strided": torch.arange(12).view(3, 4).t(),
    }
    with StokerWriter(tmp_path) as writer:
        dcp.save(dict(state), storage_writer=writer)
    fresh = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    dcp.load(fresh, storage_reader=StokerReader(tmp_path))
    assert all(torch.equal(fresh[name].float(), tensor.float()) for name, tensor in state.items())
    double = {"even": torch.zeros(6, 4, dtype=torch.float64), "one_row": torch.zeros(1, 4)}
    dcp.load(double, storage_reader=StokerReader(tmp_path))
    assert all(torch.equal(double[name], state[name].to(double[name].dtype)) for name in double)


def test_a_state_dict_can_be_rebuilt_without_a_template(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({"a": {"w": torch.ones(2), "k": [1, {"x": torch.zeros(1)}]}, "n": 3}, storage_writer=writer)
    found = _load_state_dict_from_keys(storage_reader=StokerReader(tmp_path))
    assert found["n"] == 3 and found["a"]["k"][0] == 1
    assert torch.equal(found["a"]["w"], torch.ones(2)) and torch.equal(found["a"]["k"][1]["x"], torch.zeros(1))
    part = _load_state_dict_from_keys("a.w", storage_reader=StokerReader(tmp_path))
    assert list(part) == ["a"] and list(part["a"]) == ["w"]


def test_names_that_are_no_identifiers_are_kept(tmp_path: Path) -> None:
    odd = {"a/b": "x", "x" * 300: 1, "größe": 2}
    state = {"my-model": {"0.w": torch.ones(2), "n": 4}, "layers.0.w": torch.zeros(2), **odd}
    with StokerWriter(tmp_path) as writer:
        dcp.save(state, storage_writer=writer)
    fresh: dict[str, Any] = {"my-model": {"0.w": torch.zeros(2), "n": 0}, "layers.0.w": torch.ones(2)}
    fresh |= dict.fromkeys(odd)
    dcp.load(fresh, storage_reader=StokerReader(tmp_path))
    assert torch.equal(fresh["my-model"]["0.w"], torch.ones(2)) and fresh["my-model"]["n"] == 4
    assert torch.equal(fresh["layers.0.w"], torch.zeros(2))
    assert {name: fresh[name] for name in odd} == odd


@pytest.mark.parametrize("state", [{}, {"n": 1}, {"w": torch.empty(0)}])
def test_a_state_without_a_byte_of_tensors_is_a_step_too(tmp_path: Path, state: dict[str, Any]) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save(dict(state), storage_writer=writer)
    fresh = dict(state)
    dcp.load(fresh, storage_reader=StokerReader(tmp_path))
    assert fresh.keys() == state.keys() and fresh.get("n") == state.get("n")
    assert verify(tmp_path).ok


def test_async_save_commits_what_the_state_was_when_it_was_called(tmp_path: Path) -> None:
    state: dict[str, Any] = {"w": torch.arange(4.0), "n": 1}
    with StokerWriter(tmp_path) as writer:
        future = dcp.async_save(state, storage_writer=writer)
        state["w"].zero_()
        future.result()
    fresh: dict[str, Any] = {"w": torch.zeros(4), "n": 0}
    dcp.load(fresh, storage_reader=StokerReader(tmp_path))
    assert fresh["w"].tolist() == [0.0, 1.0, 2.0, 3.0]
    assert fresh["n"] == 1


def test_an_object_store_is_a_root_like_any_other(s3_server: S3Server) -> None:
    url, options = s3_server.url("stoker", "test-dcp"), s3_server.storage_options
    with StokerWriter(url, storage_options=options) as writer:
        dcp.save({"w": torch.arange(4.0), "n": 1}, storage_writer=writer)
        assert isinstance(
            failure(dcp.save, {"w": torch.ones(1)}, storage_writer=writer, checkpoint_id=0), StepAlreadyCommitted
        )
    fresh: dict[str, Any] = {"w": torch.zeros(4), "n": 0}
    dcp.load(fresh, storage_reader=StokerReader(url, storage_options=options))
    assert (fresh["w"].tolist(), fresh["n"]) == ([0.0, 1.0, 2.0, 3.0], 1)
    assert verify(url, storage_options=options).ok
    assert options["secret"] not in repr(writer._root)


def test_a_partial_load_takes_what_both_have(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({"a": torch.ones(2), "b": torch.ones(2)}, storage_writer=writer)
    fresh = {"a": torch.zeros(2), "c": torch.zeros(2)}
    dcp.load(fresh, storage_reader=StokerReader(tmp_path), planner=DefaultLoadPlanner(allow_partial_load=True))
    assert (fresh["a"].tolist(), fresh["c"].tolist()) == ([1, 1], [0, 0])


# ---------------------------------------------------------------------------------------------------------------- steps


def test_saves_without_a_step_get_the_next_one(tmp_path: Path) -> None:
    save(tmp_path, {"w": torch.ones(1)})
    with StokerWriter(tmp_path) as writer:
        for n in (1, 2):
            dcp.save({"w": torch.full((1,), float(n))}, storage_writer=writer)
            assert writer.step == n
    assert steps_of(tmp_path) == [0, 1, 2]
    fresh = {"w": torch.zeros(1)}
    dcp.load(fresh, storage_reader=StokerReader(tmp_path, step=1))
    assert fresh["w"].item() == 1


@pytest.mark.parametrize("checkpoint_id", ["100", "step-100", "step_100", 100])
def test_a_checkpoint_id_is_the_step_of_that_one_save_or_load(tmp_path: Path, checkpoint_id: Any) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({"w": torch.ones(1)}, storage_writer=writer, checkpoint_id=checkpoint_id)
        dcp.save({"w": torch.zeros(1)}, storage_writer=writer)
    assert steps_of(tmp_path) == [100, 101]
    fresh = {"w": torch.zeros(1)}
    reader = StokerReader(tmp_path)
    dcp.load(fresh, storage_reader=reader, checkpoint_id=checkpoint_id)
    assert fresh["w"].item() == 1
    dcp.load(fresh, storage_reader=reader)
    assert fresh["w"].item() == 0


@pytest.mark.parametrize("checkpoint_id", ["latest", "/ckpt/step-100", "-1", "1" * 13])
def test_a_checkpoint_id_that_is_no_step_is_refused(tmp_path: Path, checkpoint_id: str) -> None:
    with StokerWriter(tmp_path) as writer, pytest.raises(ConfigError, match="checkpoint_id is a step"):
        dcp.save({"w": torch.ones(1)}, storage_writer=writer, checkpoint_id=checkpoint_id)
    assert not StokerWriter.validate_checkpoint_id(checkpoint_id)
    with pytest.raises(ConfigError, match=r"\[0, 10\^12\)"):
        StokerReader(tmp_path, step=-1)


def test_a_committed_step_is_never_replaced_and_the_writer_goes_on(tmp_path: Path) -> None:
    with StokerWriter(tmp_path, step=5) as writer:
        dcp.save({"w": torch.ones(1)}, storage_writer=writer)
        directories = set(tmp_path.iterdir())
        error = failure(dcp.save, {"w": torch.zeros(1)}, storage_writer=writer)
        assert isinstance(error, StepAlreadyCommitted)
        assert set(tmp_path.iterdir()) == directories  # refused before a byte was written
        dcp.save({"w": torch.zeros(1)}, storage_writer=writer, checkpoint_id="6")
    assert steps_of(tmp_path) == [5, 6]


def test_a_refused_checkpoint_id_is_not_left_to_the_next_save(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({"w": torch.ones(1)}, storage_writer=writer)
        failure(dcp.save, {"w": torch.ones(1)}, storage_writer=writer, checkpoint_id="0")
        dcp.save({"w": torch.ones(1)}, storage_writer=writer)
    assert steps_of(tmp_path) == [0, 1]


def test_a_newer_writer_fences_the_older_one(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as old, StokerWriter(tmp_path) as new:
        dcp.save({"w": torch.ones(1)}, storage_writer=old)
        dcp.save({"w": torch.ones(1)}, storage_writer=new)
        for _ in range(2):
            assert isinstance(failure(dcp.save, {"w": torch.ones(1)}, storage_writer=old), Fenced)
    assert steps_of(tmp_path) == [0, 1]


def test_an_empty_root_is_named(tmp_path: Path) -> None:
    reader = StokerReader(tmp_path)
    with pytest.raises(NoCheckpoint):
        reader.read_metadata()
    with pytest.raises(CheckpointException, match="needs a committed step"):
        dcp.load({"w": torch.ones(1)}, storage_reader=reader)


def test_ranks_that_found_different_steps_do_not_load(tmp_path: Path) -> None:
    plans = []
    with StokerWriter(tmp_path) as writer:
        for _ in range(2):
            dcp.save({"w": torch.ones(1)}, storage_writer=writer)
            reader = StokerReader(tmp_path)
            planner = DefaultLoadPlanner()
            planner.set_up_planner({"w": torch.ones(1)}, reader.read_metadata())
            plans.append(reader.prepare_local_plan(planner.create_local_plan()))
    assert reader.prepare_global_plan(plans[1:]) == plans[1:]
    with pytest.raises(ConfigError, match="same step"):
        reader.prepare_global_plan(plans)


# -------------------------------------------------------------------------------------------------------------- failure


def test_a_value_that_cannot_be_saved_is_named_and_nothing_is_committed(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        error = failure(dcp.save, {"w": torch.ones(1), "args": {"act": len}}, storage_writer=writer)
        assert isinstance(error, UnsupportedState) and error.place == "args.act"
        dcp.save({"w": torch.ones(1)}, storage_writer=writer)
    assert steps_of(tmp_path) == [0]


def test_a_failed_write_commits_nothing_and_the_next_save_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with StokerWriter(tmp_path) as writer:
        with monkeypatch.context() as patched:

            def refuse(self: local.LocalWriter) -> None:
                raise OSError(5, "the disk is gone")

            patched.setattr(local.LocalWriter, "commit", refuse)
            with pytest.raises(CheckpointException, match="the disk is gone"):
                dcp.save({"w": torch.ones(1)}, storage_writer=writer)
        assert steps_of(tmp_path) == []
        dcp.save({"w": torch.ones(1)}, storage_writer=writer)
    assert steps_of(tmp_path) == [0]


@pytest.mark.parametrize(("pattern", "kind"), [("data/*", CorruptBlock), ("state/n.json", CorruptRecord)])
def test_a_flipped_bit_is_never_loaded(tmp_path: Path, pattern: str, kind: type[StokerError]) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({"w": torch.ones(64), "n": 1}, storage_writer=writer)
    path = next(tmp_path.glob(f"step-*/{pattern}"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    if kind is CorruptRecord:
        with pytest.raises(CorruptRecord):
            StokerReader(tmp_path).read_metadata()
    else:
        fresh = {"w": torch.zeros(64), "n": 0}
        assert isinstance(failure(dcp.load, fresh, storage_reader=StokerReader(tmp_path)), kind)


def test_saving_without_collectives_is_refused(tmp_path: Path) -> None:
    writer = StokerWriter(tmp_path)
    with pytest.raises(UnsupportedError, match="use_collectives=False"):
        dcp.save({"w": torch.ones(1)}, storage_writer=writer, use_collectives=False)


class BarePlanner(DefaultSavePlanner):
    """One that has only what torch's interface asks for."""

    lookup_object = None  # type: ignore[assignment]

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self.transform_object(write_item, self.state_dict[write_item.index.fqn])


class HalvingPlanner(DefaultSavePlanner):
    """One that resolves another dtype than it planned."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:
        return super().transform_object(write_item, object).half()


def test_planners_that_would_need_a_pickle_or_a_silent_conversion_are_refused(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        error = failure(dcp.save, {"n": 1}, storage_writer=writer, planner=BarePlanner())
        assert isinstance(error, UnsupportedError) and "lookup_object" in str(error)
        dcp.save({"w": torch.ones(1)}, storage_writer=writer, planner=BarePlanner())
        error = failure(dcp.save, {"w": torch.ones(1)}, storage_writer=writer, planner=HalvingPlanner())
        assert isinstance(error, UnsupportedState) and "float16[1]" in str(error)


# ------------------------------------------------------------------------------------------------------ writers at work


@pytest.fixture
def clean_plan_cache() -> Iterator[None]:
    """torch keeps cached plans on the class, for the whole process."""
    caches = (
        SavePlanner._cached_save_plan,
        SavePlanner._cached_all_plans,
        SavePlanner._cached_global_plan,
        SavePlanner._cached_metadata,
        SavePlanner._cached_final_save_plan,
    )
    for cache in caches:
        cache.clear()
    yield
    for cache in caches:
        cache.clear()


@pytest.mark.usefixtures("clean_plan_cache")
def test_a_planner_that_caches_its_plans_saves_each_step_in_its_own_place(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        for n in range(3):
            state = {"w": torch.full((2,), float(n)), "n": n}
            dcp.save(state, storage_writer=writer, planner=DefaultSavePlanner(enable_plan_caching=True))
    for n in range(3):
        fresh: dict[str, Any] = {"w": torch.zeros(2), "n": -1}
        dcp.load(fresh, storage_reader=StokerReader(tmp_path, step=n))
        assert (fresh["w"].tolist(), fresh["n"]) == ([n, n], n)
    with StokerWriter(tmp_path) as stranger:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        error = failure(dcp.save, state, storage_writer=stranger, planner=planner)
        assert isinstance(error, UnsupportedError) and "keep it" in str(error)


def test_the_staging_memory_is_made_once_and_freed_with_the_writer(tmp_path: Path) -> None:
    writer = StokerWriter(tmp_path)
    state = {"w": torch.ones(1000)}
    dcp.save(state, storage_writer=writer)
    arena = writer._arena
    assert arena is not None and arena.path is not None
    dcp.save(state, storage_writer=writer)
    assert writer._arena is arena
    path = arena.path
    del arena, writer
    assert not path.exists()


def test_a_writer_sent_to_another_process_is_a_writer_of_its_own(tmp_path: Path) -> None:
    with StokerWriter(tmp_path) as writer:
        dcp.save({"w": torch.ones(1)}, storage_writer=writer)
        with pickle.loads(pickle.dumps(writer)) as copy:
            dcp.save({"w": torch.ones(1)}, storage_writer=copy)
        assert isinstance(failure(dcp.save, {"w": torch.ones(1)}, storage_writer=writer), Fenced)
    assert steps_of(tmp_path) == [0, 1]


def test_a_plan_of_another_writer_is_refused(tmp_path: Path) -> None:
    writer = StokerWriter(tmp_path)
    with pytest.raises(ConfigError, match="coordinator"):
        writer.write_data(SavePlan([]), DefaultSavePlanner())


# -------------------------------------------------------------------------------------------------------- cross reading


def test_a_step_of_the_manager_is_read_by_dcp_under_the_same_names(tmp_path: Path) -> None:
    mine = trained(0)
    extra = {"ema": [torch.ones(2), {"w": torch.zeros(3)}], "name": "run", "pair": (1, 2)}
    tree = {"model": mine[0], "optimizer": mine[1], "extra": extra, "rng": RngState()}
    save(tmp_path, tree)
    theirs = trained(1)
    fresh: dict[str, Any] = {
        **tree_of(*theirs),
        "extra": {"ema": [torch.zeros(2), {"w": torch.ones(3)}], "name": "", "pair": None},
    }
    dcp.load(fresh, storage_reader=StokerReader(tmp_path))
    set_optimizer_state_dict(theirs[0], theirs[1], fresh["optimizer"])
    assert_same(mine, theirs)
    assert torch.equal(fresh["extra"]["ema"][1]["w"], torch.zeros(3))
    assert (fresh["extra"]["name"], fresh["extra"]["pair"]) == ("run", (1, 2))


class WithExtraState(nn.Module):
    """A module that keeps something that is no tensor."""

    def __init__(self, note: str) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.note = note

    def get_extra_state(self) -> Any:
        return {"note": self.note}

    def set_extra_state(self, state: Any) -> None:
        self.note = state["note"]


@pytest.mark.parametrize("through", ["manager", "dcp"])
def test_extra_state_of_modules_crosses_over(tmp_path: Path, through: str) -> None:
    mine, theirs = WithExtraState("mine"), WithExtraState("theirs")
    if through == "manager":
        save(tmp_path, {"model": mine})
        state = {"model": theirs.state_dict()}
        dcp.load(state, storage_reader=StokerReader(tmp_path))
        # torch's planner takes dicts apart, so a dict among a module's values comes back inside its own dict.
        theirs.load_state_dict(state["model"])
    else:
        with StokerWriter(tmp_path) as writer:
            dcp.save({"model": mine}, storage_writer=writer)
        load(tmp_path, {"model": theirs})
    assert theirs.note == "mine"
    assert torch.equal(theirs.linear.weight, mine.linear.weight)


def test_a_step_of_dcp_is_restored_by_the_manager(tmp_path: Path) -> None:
    mine = trained(0)
    extra = {"ema": [torch.ones(2)], "name": "run"}
    with StokerWriter(tmp_path) as writer:
        dcp.save({**tree_of(*mine), "extra": extra, "epoch": 3}, storage_writer=writer)
    theirs = trained(1)
    tree: dict[str, Any] = {
        "model": theirs[0], "optimizer": theirs[1], "extra": {"ema": [torch.zeros(2)], "name": ""}, "epoch": 0
    }  # fmt: skip
    load(tmp_path, tree)
    assert_same(mine, theirs)
    assert tree["extra"]["name"] == "run" and torch.equal(tree["extra"]["ema"][0], torch.ones(2))
    assert tree["epoch"] == 3


def test_an_optimizer_without_state_crosses_over(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with StokerWriter(tmp_path) as writer:
        dcp.save(tree_of(model, optimizer), storage_writer=writer)
    fresh = torch.optim.SGD(model.parameters(), lr=0.1)
    load(tmp_path, {"model": model, "optimizer": fresh})
    assert fresh.param_groups[0]["lr"] == 0.5


# --------------------------------------------------------------------------------------------------------- several ranks


def test_dtensors_are_resharded_from_two_ranks_to_one_and_back(tmp_path: Path) -> None:
    with StokerWriter(tmp_path / "one") as writer:
        dcp.save({"model": full_state(), "epoch": 7}, storage_writer=writer)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
            *("-m", "tests.checkpoint.dcp_ranks", str(tmp_path)),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert len(list(tmp_path.glob("two/step-000000000000-*/data/*.safetensors"))) == 2
    state = {"model": {name: torch.zeros_like(t) for name, t in full_state().items()}, "epoch": 0, "lr": {"base": 0.0}}
    dcp.load(state, storage_reader=StokerReader(tmp_path / "two"))
    for name, tensor in full_state().items():
        assert torch.equal(state["model"][name], tensor), name  # type: ignore[index]
    assert (state["epoch"], state["lr"]) == (4, {"base": 0.5})
    for step in (0, 1):
        dcp.load(state, storage_reader=StokerReader(tmp_path / "staged", step=step), planner=PARTIAL)
        for name, tensor in full_state().items():
            assert torch.equal(state["model"][name], tensor + step), name  # type: ignore[index]
        assert state["epoch"] == step + 1
    assert verify(tmp_path / "two", all_steps=True).ok


class MeetingPlanner(DefaultSavePlanner):
    """Looks, while its tensor is being copied, whether another save copies at the same time."""

    def __init__(self, mine: threading.Event, other: threading.Event) -> None:
        super().__init__()
        self.mine, self.other, self.met = mine, other, False

    def resolve_data(self, write_item: WriteItem) -> Any:
        self.mine.set()
        self.met = self.other.wait(0.5)
        self.mine.clear()
        return super().resolve_data(write_item)


def test_two_saves_at_once_with_one_writer_do_not_mix(tmp_path: Path) -> None:
    events = threading.Event(), threading.Event()
    planners = [MeetingPlanner(*events), MeetingPlanner(*reversed(events))]
    errors: list[BaseException] = []

    def saving(writer: StokerWriter, n: int) -> None:
        try:
            dcp.save({"w": torch.full((1000,), float(n))}, storage_writer=writer, planner=planners[n])
        except CheckpointException as error:
            errors.append(error)

    with StokerWriter(tmp_path) as writer:
        threads = [threading.Thread(target=saving, args=(writer, n)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not any(planner.met for planner in planners)
    steps = steps_of(tmp_path)
    assert len(steps) + len(errors) == 2
    for step in steps:
        fresh = {"w": torch.zeros(1000)}
        dcp.load(fresh, storage_reader=StokerReader(tmp_path, step=step))
        assert len(fresh["w"].unique()) == 1
