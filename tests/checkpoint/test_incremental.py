"""Incremental saves: what is written and what is referred to, retirement of homes, and every reader of such a step."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zarr
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from typer.testing import CliRunner

from stoker.checkpoint import CheckpointManager, load, open_zarr
from stoker.checkpoint.cli import app
from stoker.checkpoint.dcp import StokerReader
from stoker.checkpoint.diff import diff
from stoker.checkpoint.garbage import collect_garbage
from stoker.checkpoint.incremental import settled_groups
from stoker.checkpoint.log import CheckpointLog, LiveStep, Record
from stoker.checkpoint.manifest import Manifest
from stoker.checkpoint.plan import make_plan
from stoker.checkpoint.tree import view_tree
from stoker.checkpoint.verify import verify
from stoker.checkpoint.zarr import write_references
from stoker.errors import CorruptBlock
from stoker.storage.local import LocalStore
from stoker.testing.s3 import S3Server

from .test_garbage import age
from .test_manager import on_every_rank

FROZEN_BYTES = 512 * 600 * 4


class Adapted(nn.Module):
    """A frozen base with a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(512, 600, bias=False).requires_grad_(False)
        self.head = nn.Linear(600, 8)


def job(seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = Adapted()
    return {"model": model, "optimizer": torch.optim.AdamW(model.head.parameters()), "progress": {"step": 0}}


def train(tree: dict[str, Any]) -> dict[str, Any]:
    model = tree["model"]
    model.head(model.base(torch.randn(3, 512))).square().sum().backward()
    tree["optimizer"].step()
    tree["optimizer"].zero_grad()
    tree["progress"]["step"] += 1
    return tree


def same(mine: dict[str, Any], theirs: dict[str, Any]) -> bool:
    one, other = mine["optimizer"].state_dict(), theirs["optimizer"].state_dict()
    states = [(one["state"][k][n], other["state"][k][n]) for k in one["state"] for n in one["state"][k]]
    weights = list(zip(mine["model"].state_dict().values(), theirs["model"].state_dict().values(), strict=True))
    return mine["progress"] == theirs["progress"] and all(torch.equal(a, b) for a, b in weights + states)


def live_of(root: Path) -> dict[int, LiveStep]:
    return dict(head_of(root).live)


def head_of(root: Path) -> Record:
    with LocalStore(root) as store:
        head = CheckpointLog(store).head()
    assert head is not None
    return head


def written(root: Path, step: int) -> int:
    """Bytes of the files of tensors in a step's own directory."""
    return sum(path.stat().st_size for path in root.glob(f"step-{step:012d}-*/data/0*.safetensors"))


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """Steps 1 to 3, all live; 2 and 3 refer to 1. And what step 3 holds."""
    tree = job(0)
    with CheckpointManager(tmp_path / "root", incremental=True) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree)).wait()
    return tmp_path / "root", tree


# --------------------------------------------------------------------------------------------------- what is written


def test_the_second_save_writes_only_what_is_trained(three: tuple[Path, dict[str, Any]]) -> None:
    root, _ = three
    assert written(root, 1) > FROZEN_BYTES
    assert 0 < written(root, 2) < 100_000
    (home,) = root.glob("step-000000000001-*")
    # Step 3 names the first home, not step 2.
    assert [set(one.refs) for one in live_of(root).values()] == [set(), {home.name}, {home.name}]


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_step_that_refers_comes_back_bit_for_bit_at_other_world_sizes(tmp_path: Path, world_size: int) -> None:
    tree = job(0)

    def work(ckpt: CheckpointManager) -> None:
        for step in (1, 2):
            ckpt.save(step, tree).wait()

    train(tree)
    assert on_every_rank(2, tmp_path, "run", work, incremental=True) == [None, None]
    assert written(tmp_path, 1) > FROZEN_BYTES > 10 * written(tmp_path, 2)
    for one in on_every_rank(world_size, tmp_path, "other", lambda ckpt: restored(ckpt, 2)):
        assert same(one, tree)
    fresh = train(job(1))
    load(tmp_path, fresh)
    assert same(fresh, tree)


def restored(ckpt: CheckpointManager, step: int) -> dict[str, Any]:
    tree = train(job(1))
    ckpt.restore(tree, step=step)
    return tree


def test_a_new_run_refers_to_what_the_run_before_wrote(three: tuple[Path, dict[str, Any]]) -> None:
    root, tree = three
    with CheckpointManager(root, incremental=True) as ckpt:
        ckpt.save(4, train(tree)).wait()
    assert written(root, 4) < 100_000
    assert live_of(root)[4].refs == live_of(root)[2].refs


def test_a_full_save_refers_to_nothing_and_the_next_one_to_it(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree), full=step == 2).wait()
    live = live_of(tmp_path)
    assert live[2].refs == {} and written(tmp_path, 2) > FROZEN_BYTES
    assert [name.split("-")[1] for name in live[3].refs] == ["000000000002"]


def test_without_incremental_nothing_is_referred_to(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, train(tree)).wait()
    assert [one.refs for one in live_of(tmp_path).values()] == [{}, {}]
    assert written(tmp_path, 2) > FROZEN_BYTES


def test_one_changed_bit_is_written_again_also_where_every_checksum_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stoker.checkpoint import stage

    monkeypatch.setattr(stage, "crc32c", lambda data: 7)  # what happens once in 2^32 blocks, at every one
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True) as ckpt:
        ckpt.save(1, train(tree)).wait()
        tree["model"].base.weight.view(-1)[77].neg_()
        ckpt.save(2, train(tree)).wait()
    assert live_of(tmp_path)[2].refs == {}
    assert written(tmp_path, 2) > FROZEN_BYTES


def test_what_changes_with_every_save_is_written_every_time(tmp_path: Path) -> None:
    tree = {**job(0), "ema": {"weight": torch.randn(512, 600)}}
    with CheckpointManager(tmp_path, incremental=True) as ckpt:
        for step in (1, 2, 3):
            tree["ema"]["weight"].mul_(0.9)
            ckpt.save(step, train(tree)).wait()
    # The frozen base stays apart from it.
    assert FROZEN_BYTES < written(tmp_path, 3) < 1.1 * FROZEN_BYTES
    assert live_of(tmp_path)[3].refs
    (path,) = tmp_path.glob("step-000000000003-*/manifest.arrow")
    blobs = Manifest.from_bytes(path.read_bytes(), place="here").blobs.values()
    # Nobody takes a digest of what has other checksums already.
    assert sorted(bool(blob.sha256) for blob in blobs) == [False, False, True]
    expected = tree["ema"]["weight"].clone()
    load(tmp_path, tree)
    assert torch.equal(tree["ema"]["weight"], expected)


def test_what_an_optimizer_steps_is_in_no_group_and_small_things_are_not_worth_one() -> None:
    tree = {**job(0), "table": torch.zeros(1 << 18), "small": torch.zeros(100)}
    assert settled_groups(tree, view_tree(tree)) == {"model.base.weight": "model", "table": "table"}


def test_what_is_trained_is_shared_evenly_for_itself() -> None:
    sizes = {"frozen": 3, "a": 2, "b": 2}
    tensors = {name: torch.zeros(size << 10, 256) for name, size in sizes.items()}
    for rank in range(2):
        plan = make_plan(tensors, rank=rank, world_size=2, settled={"frozen": "model"})
        trained = sum(piece.chunk.nbytes for piece in plan.mine if piece.chunk.name != "frozen")
        assert trained == 2 << 20


def test_a_home_whose_file_is_gone_is_not_referred_to(three: tuple[Path, dict[str, Any]]) -> None:
    root, tree = three
    for path in root.glob("step-000000000001-*/data/00000-0.safetensors"):
        path.unlink()
    with CheckpointManager(root, incremental=True) as ckpt:
        ckpt.save(4, train(tree)).wait()
    assert live_of(root)[4].refs == {}
    assert verify(root, step=4).ok


def test_after_a_rewind_only_what_is_still_live_is_referred_to(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True, grace_s=0.0) as ckpt:
        ckpt.save(1, train(tree)).wait()
        ckpt.save(2, train(tree), full=True).wait()
        ckpt.restore(tree, step=1)
        ckpt.save(3, train(tree)).wait()
        assert [name.split("-")[1] for name in live_of(tmp_path)[3].refs] == ["000000000001"]
    assert verify(tmp_path, all_steps=True).ok
    assert not list(tmp_path.glob("step-000000000002-*"))


# ------------------------------------------------------------------------------------------------- homes that retire


def test_of_a_retired_home_only_what_is_referred_to_stays_until_nobody_needs_it(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, grace_s=0.0) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree)).wait()
    (home,) = tmp_path.glob("step-000000000001-*")
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["00000-0.safetensors"]
    assert not list(tmp_path.glob("step-000000000002-*"))
    with LocalStore(tmp_path) as store:
        assert collect_garbage(store, grace_s=0.0, dry_run=False).attempts == ()
    assert verify(tmp_path, all_steps=True).ok
    fresh = train(job(1))
    assert load(tmp_path, fresh).step == 3
    assert same(fresh, tree)
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, grace_s=0.0) as ckpt:
        ckpt.save(4, train(tree), full=True).wait()
    assert [path.name.split("-")[1] for path in tmp_path.glob("step-*")] == ["000000000004"]
    assert verify(tmp_path, all_steps=True).ok


def test_gc_deletes_what_nobody_refers_to_and_spares_the_rest(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, grace_s=3600.0) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree)).wait()
    with LocalStore(tmp_path) as store:
        report = collect_garbage(store, grace_s=0.0, dry_run=False)
    assert [(one.step, one.reason) for one in report.attempts] == [(1, "retired"), (2, "retired")]
    assert report.num_bytes < 300_000
    (home,) = tmp_path.glob("step-000000000001-*")
    assert [path.name for path in home.rglob("*") if path.is_file()] == ["00000-0.safetensors"]
    assert verify(tmp_path, all_steps=True).ok
    fresh = train(job(1))
    load(tmp_path, fresh)
    assert same(fresh, tree)


def test_what_a_step_in_its_grace_refers_to_stays_as_long_as_it(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, grace_s=0.0) as ckpt:
        for step in (1, 2):
            ckpt.save(step, train(tree)).wait()
    age(tmp_path, 7200.0)  # step 1 was retired long ago, step 2 is retired now
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, grace_s=3600.0) as ckpt:
        ckpt.save(3, train(tree), full=True).wait()
        ckpt._retirement._thread.submit(lambda: None).result()
        assert list(tmp_path.glob("step-000000000001-*/data/*"))
        with LocalStore(tmp_path) as store:
            assert collect_garbage(store, grace_s=3600.0, dry_run=False).attempts == ()
    assert list(tmp_path.glob("step-000000000001-*/data/*"))
    with LocalStore(tmp_path) as store:
        collect_garbage(store, grace_s=0.0, dry_run=False)
    assert [path.name.split("-")[1] for path in tmp_path.glob("step-*")] == ["000000000003"]


def test_a_home_that_is_due_waits_for_those_that_refer_to_it_and_are_not(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True, keep_last=1, grace_s=3600.0) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree), full=step == 3).wait()
        retirement = ckpt._retirement

        def pass_grace_of_the_first() -> None:
            retirement._doomed[0] = replace(retirement._doomed[0], due_s=0.0)
            retirement._delete_due()

        retirement._thread.submit(pass_grace_of_the_first).result()
        (home,) = tmp_path.glob("step-000000000001-*")
        assert [path.name for path in home.rglob("*") if path.is_file()] == ["00000-0.safetensors"]
        retirement._thread.submit(pass_grace_of_the_first).result()
        assert [path.name.split("-")[1] for path in tmp_path.glob("step-*")] == ["000000000003"]


def test_ls_and_show_say_what_a_directory_is_kept_for(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path, incremental=True, keep_last=2, grace_s=0.0) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree)).wait()
    (home,) = (path.name for path in tmp_path.glob("step-000000000001-*"))
    told = json.loads(CliRunner().invoke(app, ["ls", str(tmp_path), "--json"]).stdout)
    assert told["kept"] == [{"directory": home, "blobs": ["data/00000-0.safetensors"], "steps": [2, 3]}]
    assert [row["bytes"] - row["new_bytes"] > FROZEN_BYTES for row in told["steps"]] == [True, True]
    assert f"{home}: retired, kept for 1 files of steps 2, 3" in CliRunner().invoke(app, ["ls", str(tmp_path)]).stdout
    assert f"in {home}" in CliRunner().invoke(app, ["show", str(tmp_path)]).stdout
    with CheckpointManager(tmp_path, incremental=True) as ckpt:
        ckpt.save(4, train(tree), full=True).wait()
        ckpt.save(5, train(tree)).wait()
    assert "steps 5 refer to files of it" in CliRunner().invoke(app, ["show", str(tmp_path), "--step", "4"]).stdout


# --------------------------------------------------------------------------------------------------------- all readers


def test_a_flipped_bit_in_a_file_elsewhere_is_named_with_its_place(three: tuple[Path, dict[str, Any]]) -> None:
    root, tree = three
    (blob,) = root.glob("step-000000000001-*/data/00000-0.safetensors")
    data = bytearray(blob.read_bytes())
    data[100_000] ^= 1
    blob.write_bytes(data)
    (damage,) = verify(root, step=3).damages
    assert damage.key == f"{blob.parent.parent.name}/data/00000-0.safetensors" and damage.step == 3
    assert damage.tensors == ("model.base.weight",)
    with pytest.raises(CorruptBlock, match=blob.parent.parent.name):
        load(root, tree)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_diff_dcp_and_zarr_read_what_lies_elsewhere(three: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    root, tree = three
    weight = tree["model"].base.weight.detach()
    report = diff(root, 2, 3)
    assert "model.base.weight" not in report.other_bytes and "model.head.weight" in report.other_bytes
    state = {"model": {"base.weight": torch.zeros_like(weight)}}
    dcp_load(state, storage_reader=StokerReader(root), no_dist=True)
    assert torch.equal(state["model"]["base.weight"], weight)
    found = zarr.open_group(open_zarr(root), mode="r")["model/base/weight"]
    assert torch.equal(torch.from_numpy(found[:]), weight)  # type: ignore[index]
    write_references(root, tmp_path / "refs.json")
    plain = zarr.open_group("reference://", storage_options={"fo": str(tmp_path / "refs.json")}, mode="r")
    assert torch.equal(torch.from_numpy(plain["model/base/weight"][:]), weight)  # type: ignore[index]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_own_reader_says_that_files_are_elsewhere(three: tuple[Path, dict[str, Any]]) -> None:
    root, tree = three
    (data,) = root.glob("step-000000000003-*/data")
    state = {"model.head.weight": torch.zeros_like(tree["model"].head.weight.detach())}
    with pytest.raises(CheckpointException, match="files in other directories"):
        dcp_load(state, storage_reader=HuggingFaceStorageReader(str(data)), no_dist=True)


def test_a_local_copy_of_a_step_that_refers_is_complete(tmp_path: Path) -> None:
    tree = job(0)
    with CheckpointManager(tmp_path / "root", local=tmp_path / "local", incremental=True) as ckpt:
        for step in (1, 2, 3):
            handle = ckpt.save(step, train(tree))
            handle.wait("local")
            handle.wait()
    with CheckpointManager(tmp_path / "root", local=tmp_path / "local") as ckpt:
        fresh = train(job(1))
        report = ckpt.restore(fresh)
    assert same(fresh, tree)
    assert set(report.bytes_from) == {"local"}


def test_a_manifest_keeps_origins_and_one_without_has_no_such_column(three: tuple[Path, dict[str, Any]]) -> None:
    root, _ = three
    (home,) = root.glob("step-000000000001-*")
    (path,) = root.glob("step-000000000003-*/manifest.arrow")
    manifest = Manifest.from_bytes(path.read_bytes(), place="here")
    blob = manifest.blob("data/00000-0.safetensors")
    assert blob.home == home.name
    assert blob.sha256 == hashlib.sha256((home / blob.path).read_bytes()).hexdigest()
    assert manifest.refs == {home.name: (blob.path,)}
    assert manifest.blob("data/00000-1.safetensors").sha256 == ""


def test_an_object_store_holds_steps_that_refer(s3_server: S3Server) -> None:
    url, options = s3_server.url("stoker", "incremental"), s3_server.storage_options
    tree = job(0)
    with CheckpointManager(url, storage_options=options, incremental=True, keep_last=1, grace_s=0.0) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, train(tree)).wait()
    fresh = train(job(1))
    load(url, fresh, storage_options=options)
    assert same(fresh, tree)
    assert verify(url, all_steps=True, storage_options=options).ok
