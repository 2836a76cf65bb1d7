"""Two slabs of memory in the place of a whole copy: written part by part before save() returns, and a step like any other."""

import itertools
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.checkpoint import CheckpointManager, bounce
from stoker.checkpoint.bounce import copy_elements, slab_bytes_for
from stoker.errors import DeadlineExceeded, StoreError, StoreFull
from stoker.metrics import counters
from stoker.storage import _memory, local
from stoker.testing.s3 import S3Server
from tests.checkpoint.processes import arenas_of, killed_after

MIB = 1 << 20
SLAB = MIB


def tree_at(step: int) -> dict[str, Any]:
    """Tensors that are smaller than a slab, larger than three, cut by a slab's end, empty, and of any strides."""
    base = torch.arange(3 * MIB, dtype=torch.int32) + step * 7919
    return {
        "large": base.clone(),
        "transposed": base[: 1024 * 700].view(700, 1024).clone().t(),
        "strided": base.view(torch.int16).view(3, 1024, 2048)[:, ::2, 1::2].clone()[:, :, ::2],
        "wide": base[:500_000].view(torch.complex64).view(1, -1).clone(),
        "small": [base[i : i + 1000].to(torch.bfloat16) for i in range(40)],
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(step),
        "progress": {"step": step},
    }


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def assert_is(tree: dict[str, Any], step: int) -> None:
    expected = tree_at(step)
    for name, wanted in expected.items():
        for found, one in zip(*((t if isinstance(t, list) else [t]) for t in (tree[name], wanted)), strict=True):
            assert torch.equal(bits(found), bits(one)) if isinstance(one, torch.Tensor) else found == one, name


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine says that it has memory for a part of the state."""
    monkeypatch.setattr(_memory, "available_memory", lambda: (8 * MIB, 64 * MIB))
    monkeypatch.setattr(bounce, "WRITE_BYTES", SLAB)
    monkeypatch.setattr(bounce, "_SLAB_BYTES", SLAB)


@pytest.mark.usefixtures("little_memory")
def test_what_passed_through_slabs_is_restored_bit_for_bit_and_the_report_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = counters.snapshot().get("ckpt.save.blocking", 0)
    with caplog.at_level(logging.WARNING), CheckpointManager(tmp_path, local=tmp_path / "local") as ckpt:
        for step in (1, 2):
            report = ckpt.save(step, tree_at(step)).report()
            assert report.staging == "slabs" and report.staging_slots == 1
            assert not arenas_of(tmp_path)
        for step in (1, 2):
            fresh = tree_at(0)
            assert ckpt.restore(fresh, step=step).step == step
            assert_is(fresh, step)
        shutil.rmtree(tmp_path / "local")
        fresh = tree_at(0)
        assert set(ckpt.restore(fresh, step=2).bytes_from) == {"root"}
        assert_is(fresh, 2)
    assert [r.message for r in caplog.records if "two slabs" in r.message and r.levelname == "WARNING"] != []
    assert sum("two slabs" in r.message for r in caplog.records) == 1
    assert counters.snapshot()["ckpt.save.blocking"] == before + 2


@pytest.mark.usefixtures("little_memory")
def test_save_returns_when_all_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    write_at, let_go = local.LocalWriter.write_at, threading.Event()

    def slow_at_the_end(self: local.LocalWriter, offset: int, data: Any) -> None:
        if offset >= 20 * MIB:
            let_go.wait(60)
        write_at(self, offset, data)
        written.append(len(data))

    monkeypatch.setattr(local.LocalWriter, "write_at", slow_at_the_end)
    with CheckpointManager(tmp_path) as ckpt:
        timer = threading.Timer(0.2, let_go.set)
        timer.start()
        handle = ckpt.save(1, {"t": torch.zeros(20 * MIB, dtype=torch.uint8)})
        assert sum(written) == handle.report().staged_bytes > 20 * MIB
        timer.join()
        handle.wait()


def test_the_files_are_those_that_an_arena_gives_to_the_byte(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    def files(root: Path, staging: str) -> list[bytes]:
        with CheckpointManager(root) as ckpt:
            ckpt.save(1, tree_at(5)).wait()
            handle = ckpt.save(2, tree_at(6))
            handle.wait()
            assert handle.report().staging == staging
        return [path.read_bytes() for path in sorted(root.glob("step-000000000002-*/data/*"))]

    expected = files(tmp_path / "arena", "shared memory")
    request.getfixturevalue("little_memory")
    assert files(tmp_path / "slabs", "slabs") == expected


@pytest.mark.usefixtures("little_memory")
def test_what_an_upload_still_has_to_send_is_not_overwritten(tmp_path: Path, s3_server: S3Server) -> None:
    with CheckpointManager(
        s3_server.url("stoker", f"bounce-{os.urandom(4).hex()}"), storage_options=s3_server.storage_options
    ) as ckpt:
        tree = tree_at(3) | {"much": torch.arange(10 * MIB, dtype=torch.int32)}
        ckpt.save(3, tree).wait()
        fresh = tree_at(0) | {"much": torch.zeros(10 * MIB, dtype=torch.int32)}
        ckpt.restore(fresh)
        assert_is(fresh, 3)
        assert torch.equal(fresh["much"], tree["much"])


@pytest.mark.usefixtures("little_memory")
def test_a_write_that_fails_is_raised_by_save_and_older_steps_stay(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree_at(1)).wait()

        def failing(self: local.LocalWriter, offset: int, data: Any) -> None:
            raise StoreError("the disk is broken")

        with monkeypatch.context() as broken:
            broken.setattr(local.LocalWriter, "write_at", failing)
            with pytest.raises(StoreError, match="the disk is broken"):
                ckpt.save(2, tree_at(2))
        assert ckpt.steps() == [1]
        ckpt.save(3, tree_at(3)).wait()
        fresh = tree_at(0)
        ckpt.restore(fresh)
        assert_is(fresh, 3)


@pytest.mark.usefixtures("little_memory")
def test_a_broken_disk_of_the_node_keeps_no_slab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_at = local.LocalWriter.write_at

    def failing(self: local.LocalWriter, offset: int, data: Any) -> None:
        if "local" in str(self._path):
            raise StoreError("the disk is broken")
        write_at(self, offset, data)

    monkeypatch.setattr(local.LocalWriter, "write_at", failing)
    with CheckpointManager(tmp_path / "root", local=tmp_path / "local") as ckpt:
        handle = ckpt.save(1, tree_at(1))
        handle.wait("committed")
        with pytest.raises(StoreError, match="broken"):
            handle.wait("local")
        fresh = tree_at(0)
        ckpt.restore(fresh)
        assert_is(fresh, 1)


@pytest.mark.usefixtures("little_memory")
def test_a_write_that_hangs_ends_the_save_by_its_deadline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_at, let_go = local.LocalWriter.write_at, threading.Event()
    ended: list[int] = []

    def hanging(self: local.LocalWriter, offset: int, data: Any) -> None:
        let_go.wait(60)
        ended.append(offset)
        write_at(self, offset, data)

    monkeypatch.setattr(local.LocalWriter, "write_at", hanging)
    with CheckpointManager(tmp_path, persist_timeout_s=0.3) as ckpt:
        with pytest.raises(DeadlineExceeded):
            ckpt.save(1, tree_at(1))
        assert not ended
        let_go.set()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_kill_in_the_middle_leaves_the_older_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
    write_at = local.LocalWriter.write_at

    def save_and_die() -> None:
        written = itertools.count()

        def dying(self: local.LocalWriter, offset: int, data: Any) -> None:
            write_at(self, offset, data)
            if next(written) == 5:
                os.kill(os.getpid(), 9)

        monkeypatch.setattr(local.LocalWriter, "write_at", dying)
        CheckpointManager(tmp_path).save(2, tree_at(2))

    monkeypatch.setattr(_memory, "available_memory", lambda: (8 * MIB, 64 * MIB))
    monkeypatch.setattr(bounce, "WRITE_BYTES", SLAB)
    monkeypatch.setattr(bounce, "_SLAB_BYTES", SLAB)
    killed_after(save_and_die)
    monkeypatch.undo()
    with CheckpointManager(tmp_path) as ckpt:
        assert ckpt.steps() == [1]
        fresh = tree_at(0)
        ckpt.restore(fresh)
        assert_is(fresh, 1)
        ckpt.save(2, tree_at(2)).wait()


def test_without_memory_for_slabs_either_nothing_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_memory, "available_memory", lambda: (MIB, 64 * MIB))
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(StoreFull, match="staging needs"):
        ckpt.save(1, tree_at(1))


PROGRAM = """
import resource, sys, torch
from pathlib import Path
from stoker.checkpoint import CheckpointManager
MIB = 1 << 20
state = {f"t{i}": torch.arange(int(sys.argv[3]), dtype=torch.int32) + i for i in range(8)}
with CheckpointManager(sys.argv[1]) as ckpt:
    ckpt.save(0, {"t": torch.zeros(1)}).wait()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 230 * MIB
    if sys.argv[2] == "slabs":
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    handle = ckpt.save(1, state)
    handle.wait()
    print(handle.report().staging)
"""


@pytest.mark.parametrize(("staging", "count"), [("memory", MIB), ("slabs", 8 * MIB)])
def test_small_shared_memory_and_then_little_of_any_are_enough_for_a_save(
    tmp_path: Path, staging: str, count: int
) -> None:
    """A tmpfs of 4 MiB for a state of 32 or 256 MiB; for the slabs a limit that the kernel sets on the process, too."""
    memory = tmp_path / "memory"
    memory.mkdir()
    mount = f'mount -t tmpfs -o size=4m,mode=0700 none {memory} && exec "$@"'
    if (
        shutil.which("unshare") is None
        or subprocess.run(["unshare", "-m", "sh", "-c", mount, "sh", "true"], check=False).returncode
    ):
        pytest.skip("this user may not mount a tmpfs")
    command = ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-c", PROGRAM, str(tmp_path / "root")]
    env = {**os.environ, "STOKER_SHM_DIR": str(memory), "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, staging, str(count)], check=False, env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [staging]
    with CheckpointManager(tmp_path / "root") as ckpt:
        fresh = {f"t{i}": torch.zeros(count, dtype=torch.int32) for i in range(8)}
        ckpt.restore(fresh)
    assert all(torch.equal(t, torch.arange(count, dtype=torch.int32) + int(n[1:])) for n, t in fresh.items())


def test_any_range_of_any_strides_is_copied_as_it_is_read() -> None:
    rng = random.Random(0)
    for source in (
        torch.arange(210).view(5, 6, 7),
        torch.arange(210).view(7, 6, 5).permute(2, 1, 0),
        torch.arange(420).view(5, 6, 14)[:, :, ::2],
        torch.arange(210),
    ):
        flat = source.reshape(-1)
        for _ in range(200):
            first, last = sorted(rng.sample(range(211), 2))
            target = torch.full((last - first,), -1)
            copy_elements(target, source, first, last)
            assert torch.equal(target, flat[first:last])


def test_slabs_are_256_mib_for_large_states_and_take_a_quarter_of_smaller_ones() -> None:
    assert slab_bytes_for(100 << 30) == 256 * MIB
    assert slab_bytes_for(1 << 30) == 128 * MIB
    assert slab_bytes_for(1) == 16 * MIB
