"""Every layout under real ``torchrun``: restored at 1, 2, 3 and 4 ranks, and opened by tools that are not this package."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from stoker.checkpoint import open_zarr
from stoker.checkpoint.verify import verify
from stoker.checkpoint.zarr import write_references
from tests.checkpoint import without_stoker
from tests.checkpoint.layout_ranks import LAYOUTS, STEP, WORLD_SIZES, full_tensors, seed_of


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What four ranks did: each of 24 jobs saved, and each step was restored by four others, bit for bit."""
    root = tmp_path_factory.mktemp("layouts")
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=4"),
            *("-m", "tests.checkpoint.layout_ranks", str(root)),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return root


def data_of(root: Path) -> Path:
    (data,) = root.glob(f"step-{STEP:012d}-*/data")
    return data


def expected(layout: str, world_size: int) -> dict[str, dict[str, Any]]:
    """What a step holds, as the tools' program wants it."""
    return {
        name: {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "bytes": without_stoker.bytes_of(tensor),
        }
        for name, tensor in full_tensors(seed_of(layout, world_size)).items()
    }


def test_every_layout_is_restored_at_every_world_size(saved: Path) -> None:
    """The ranks compared what they hold; here is that they all have saved, and shared the work."""
    for layout in LAYOUTS:
        for world_size in WORLD_SIZES:
            root = saved / f"{layout}-{world_size}"
            assert verify(root).steps == (STEP,)
            assert len({path.name.split("-")[0] for path in data_of(root).iterdir()}) == world_size
            assert not list(root.glob("step-*/frag/*.json"))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_safetensors_and_stock_dcp_open_every_layout(saved: Path, layout: str) -> None:
    for world_size in (3, 4):
        data, tensors = data_of(saved / f"{layout}-{world_size}"), expected(layout, world_size)
        assert without_stoker.with_safetensors(data, tensors) == len(tensors)
        assert without_stoker.with_dcp(data, tensors) == len(tensors)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_zarr_opens_what_has_a_regular_grid_and_lists_the_rest(saved: Path, layout: str, tmp_path: Path) -> None:
    tensors = full_tensors(seed_of(layout, 4))
    root = saved / f"{layout}-4"
    write_references(root, tmp_path / "refs.json")
    checked: Any = zarr.open_group(open_zarr(root), mode="r")
    plain: Any = zarr.open_group("reference://", storage_options={"fo": str(tmp_path / "refs.json")}, mode="r")
    for group in (checked, plain):
        left_out = group.attrs["stoker"]["left_out"]
        for name, tensor in tensors.items():
            if name not in left_out:
                assert np.array_equal(np.asarray(group[name.replace(".", "/")][...]), tensor.numpy()), name
        # References can't name a chunk that is short in another dimension than the first; the store fills it up.
        assert not left_out or (group is plain and layout in ("tp", "fsdp2_tp"))
        assert all("down.weight" in name and "edge" in reason for name, reason in left_out.items())
