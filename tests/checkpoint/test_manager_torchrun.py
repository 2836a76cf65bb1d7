"""The manager under real ``torchrun``: FSDP2 restored at other world sizes, and a rank that fails."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stoker.checkpoint.verify import verify


def torchrun(world_size: int, *acts: str | Path) -> None:
    """Run tests.checkpoint.manager_ranks on `world_size` ranks and raise with their output if one fails."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"),
            *("-m", "tests.checkpoint.manager_ranks", *map(str, acts)),
        ],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]


@pytest.fixture(scope="module")
def saved_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("torchrun") / "one"
    torchrun(1, "save", root)
    return root


@pytest.fixture(scope="module")
def saved_by_two(saved_by_one: Path) -> Path:
    """What two ranks saved, after they had restored what one saved: starting ranks is what takes the time here."""
    root = saved_by_one.with_name("two")
    torchrun(2, "restore", saved_by_one, "save", root)
    return root


def test_two_ranks_restore_what_one_saved(saved_by_one: Path, saved_by_two: Path) -> None:
    """The ranks compared every bit when they made `saved_by_two`; here is what they left."""
    assert len(list(saved_by_one.glob("step-*/data/*.safetensors"))) == 1
    assert len(list(saved_by_two.glob("step-*/data/*.safetensors"))) == 2


def test_one_rank_restores_what_two_saved(saved_by_two: Path) -> None:
    torchrun(1, "restore", saved_by_two)


def test_three_ranks_restore_what_two_saved_name_the_rank_that_fails_and_stop_together(
    saved_by_two: Path, tmp_path: Path
) -> None:
    torchrun(3, "restore", saved_by_two, "fail", tmp_path / "root", "stop", tmp_path / "stopped")
    assert verify(tmp_path / "stopped").steps == (6,)
    assert verify(tmp_path / "root", all_steps=True).ok
