"""The golden checkpoint: today's code reads it, and so do tools that know nothing of this package."""

import json
import math
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import zarr

from stoker.checkpoint import CheckpointManager, open_zarr
from stoker.checkpoint.dcp import StokerReader
from stoker.checkpoint.log import CheckpointLog
from stoker.checkpoint.verify import verify
from stoker.checkpoint.zarr import write_references
from stoker.storage.local import LocalStore
from tests.data import make_checkpoint as golden

Expected = dict[str, dict[str, Any]]


def expected(step: int) -> Expected:
    found: Expected = json.loads((golden.GOLDEN / "expected.json").read_text())[str(step)]
    return found


def assert_tensors(found: dict[str, torch.Tensor], step: int) -> None:
    assert {f"model.{name}" for name in found} == set(expected(step))
    for name, tensor in found.items():
        one = expected(step)[f"model.{name}"]
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert (str(tensor.dtype), list(tensor.shape)) == (f"torch.{one['dtype']}", one["shape"])
        assert raw.hex() == one["bytes"], name


def zeros(step: int) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in golden.tensors(step).items()}


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# --------------------------------------------------------------------------------------------------------- this package


@pytest.mark.parametrize("step", golden.STEPS)
@pytest.mark.parametrize("rank", range(golden.WORLD_SIZE))
def test_the_manager_restores_it_and_writes_nothing(step: int, rank: int) -> None:
    before = contents(golden.GOLDEN)
    tree: dict[str, Any] = {"model": zeros(step), "progress": {}, "mine": golden.PerRank(-1)}
    with CheckpointManager(golden.GOLDEN, rank=rank, world_size=golden.WORLD_SIZE, run_id="reader") as ckpt:
        assert ckpt.steps() == list(golden.STEPS)
        ckpt.restore(tree, step=step)
    assert_tensors(tree["model"], step)
    assert tree["mine"].rank == rank
    plain = golden.plain(step)
    array, progress_array = plain.pop("array"), tree["progress"].pop("array")
    assert tree["progress"] == plain
    assert all(type(tree["progress"][name]) is type(value) for name, value in plain.items())
    assert np.array_equal(array, progress_array) and array.dtype == progress_array.dtype
    assert contents(golden.GOLDEN) == before


@pytest.mark.parametrize("step", golden.STEPS)
def test_stock_dcp_loads_it_through_our_reader(step: int) -> None:
    state: dict[str, Any] = {"model": zeros(step), "progress": dict.fromkeys(("step", "big", "rate", "pair", "size"))}
    load: Any = torch.distributed.checkpoint.load  # type: ignore[attr-defined]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load(state, storage_reader=StokerReader(golden.GOLDEN, step=step))
    assert_tensors(state["model"], step)
    assert state["progress"] == {name: golden.plain(step)[name] for name in state["progress"]}


@pytest.mark.parametrize("step", golden.STEPS)
def test_zarr_opens_it_through_our_store(step: int) -> None:
    group = zarr.open_group(open_zarr(golden.GOLDEN, step), mode="r")
    for name, one in expected(step).items():
        array: Any = group[name.replace(".", "/")]
        assert (array.attrs["torch_dtype"], list(array.shape)) == (one["dtype"], one["shape"])
        assert np.asarray(array[...]).tobytes().hex() == one["bytes"], name


def test_every_byte_of_it_is_verified() -> None:
    report = verify(golden.GOLDEN, all_steps=True)
    assert report.ok and report.steps == golden.STEPS
    assert report.num_bytes == sum(len(data) for name, data in contents(golden.GOLDEN).items() if "/" in name)


def test_the_metrics_of_its_steps_are_read() -> None:
    with LocalStore(golden.GOLDEN) as store:
        head = CheckpointLog(store).head()
    assert head is not None
    assert {step: one.metrics["loss"] for step, one in head.live.items()} == {10: 0.1, 20: 0.05}
    assert all(math.isnan(one.metrics["grad_norm"]) for one in head.live.values())


def test_one_tensor_is_cut_unevenly_between_two_ranks() -> None:
    """Or the tests here would show less than they seem to."""
    array: Any = zarr.open_group(open_zarr(golden.GOLDEN), mode="r")["model/embed"]
    assert (array.shape, array.chunks) == ((5, 8), (3, 8))


def test_todays_code_writes_the_same_files_and_documents(tmp_path: Path) -> None:
    golden.write(tmp_path)
    # Tables are compressed by pyarrow, whose bytes may differ from one version to the next.
    mine, theirs = ({n: d for n, d in contents(root).items() if "/data/" in n or "/state/" in n}
                    for root in (tmp_path, golden.GOLDEN))  # fmt: skip
    assert len(theirs) == 12
    assert mine == theirs


# ------------------------------------------------------------------------------------------------------- without stoker


def open_without_stoker(tool: str, where: Path, step: int, tmp_path: Path) -> int:
    (tmp_path / "expected.json").write_text(json.dumps(expected(step)))
    program = Path(__file__).parent / "without_stoker.py"
    done = subprocess.run(
        [sys.executable, str(program), tool, str(where), str(tmp_path / "expected.json")],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize(("tool", "count"), [("safetensors", 12), ("dcp", 11)])
def test_plain_safetensors_and_stock_dcp_open_the_files(tmp_path: Path, tool: str, count: int) -> None:
    (data,) = golden.GOLDEN.glob("step-000000000020-*/data")
    assert open_without_stoker(tool, data, 20, tmp_path) == count


def test_plain_zarr_opens_the_references(tmp_path: Path) -> None:
    write_references(golden.GOLDEN, tmp_path / "refs.json", 10)
    assert open_without_stoker("zarr", tmp_path / "refs.json", 10, tmp_path) == 12
