"""After a crash of the process alone everything is still in memory: nothing is read from the root but what says so."""

import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.nearest import ArenaCopy
from stoker.errors import CorruptBlock
from stoker.storage.local import LocalStore
from stoker.testing.proxy import FaultProxy
from stoker.testing.s3 import S3Server
from tests.checkpoint.processes import arenas_of, flip, flip_image, killed_after


def tree_at(step: int) -> dict[str, Any]:
    return {"model": torch.nn.Linear(64, 64), "t": torch.full((1 << 20,), float(step)), "progress": {"step": step}}


def test_after_a_crash_of_the_process_alone_no_data_is_read_from_the_root(s3_server: S3Server) -> None:
    url = s3_server.url("stoker", "test-crash")
    program = f"""
import os, signal, torch
from stoker.checkpoint import CheckpointManager
from tests.checkpoint.test_nearest import tree_at
ckpt = CheckpointManager({url!r}, storage_options={s3_server.storage_options!r})
for step in (1, 2):
    ckpt.save(step, tree_at(step)).wait()
ckpt._settle()
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL
    with FaultProxy(s3_server) as proxy:
        options = {**s3_server.storage_options, **proxy.storage_options}
        with CheckpointManager(url, storage_options=options) as ckpt:
            tree = tree_at(0)
            report = ckpt.restore(tree)
            asked = [(request.method, request.path) for request in proxy.requests]
    assert (report.step, tree["progress"]) == (2, {"step": 2})
    assert torch.equal(tree["t"], tree_at(2)["t"])
    assert report.num_bytes == report.bytes_from["arena"] > 4 << 20
    assert len(asked) <= 3, asked
    assert all("/log/" in path or "prefix=" in path or path.endswith("manifest.arrow") for _, path in asked), asked


def test_the_arenas_of_all_ranks_of_the_node_are_read(tmp_path: Path) -> None:
    def two_ranks() -> list[CheckpointManager]:
        managers = [CheckpointManager(tmp_path, rank=r, world_size=2, run_id="old") for r in range(2)]
        tree = tree_at(1)
        with ThreadPoolExecutor(2) as threads:
            list(threads.map(lambda ckpt: ckpt.save(1, tree).wait(), managers))
        for ckpt in managers:
            ckpt._settle()
        return managers

    killed_after(two_ranks)
    with CheckpointManager(tmp_path) as ckpt:  # one rank now, which needs what both of them wrote
        tree = tree_at(0)
        report = ckpt.restore(tree)
        assert set(report.bytes_from) == {"arena"}
        assert torch.equal(tree["t"], tree_at(1)["t"])
        ckpt.save(2, tree).wait()
    assert not arenas_of(tmp_path)


def test_a_copy_that_has_nothing_does_not_make_the_reads_of_the_next_one_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, elsewhere = tmp_path / "root", tmp_path / "by another name"
    elsewhere.symlink_to("root", target_is_directory=True)
    with CheckpointManager(root) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
    reads = []
    get_into = LocalStore.get_into

    def counting(self: LocalStore, key: str, buffer: memoryview, start: int = 0, **version: Any) -> None:
        reads.append(len(buffer))
        get_into(self, key, buffer, start, **version)

    monkeypatch.setattr(LocalStore, "get_into", counting)
    with CheckpointManager(elsewhere) as ckpt:  # a root of its own, as far as arenas are concerned
        report = ckpt.restore(tree_at(0))
    assert set(report.bytes_from) == {"root"}
    assert len(reads) == 1  # 4 MiB and some, in blocks of 1 MiB


def test_an_arena_is_used_only_if_it_is_full_and_holds_the_nonce_that_the_log_names(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
        ckpt._settle()
        root_id, live = ckpt._root_id, ckpt._log.head()
        assert live is not None
        nonce = live.live[1].nonce
        buffer = memoryview(bytearray(4096))

        def is_there(nonce: str) -> bool:
            copy = ArenaCopy(root_id, nonce)
            there = copy.fetch("data/00000-0.safetensors", 0, buffer)
            assert (copy.document("state/progress.json") is not None) == there
            copy.close()
            return there

        assert is_there(nonce)
        assert not is_there("0" * 16)
        copy = ArenaCopy(root_id, nonce)
        assert not copy.fetch("data/00000-0.safetensors", 1 << 40, buffer)
        assert not copy.fetch("data/00001-0.safetensors", 0, buffer)
        copy.close()
        arena = ckpt._slots._slots[0].layout.arena
        arena.mark("FILLING", step=2, nonce=nonce)
        assert not is_there(nonce)
        assert set(ckpt.restore(tree_at(0)).bytes_from) == {"root"}


def test_whole_blocks_are_read_from_memory_to_where_they_belong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = {"t": torch.zeros(1 << 20), "u": torch.zeros(3)}
    first = tree["t"].data_ptr()
    inside = []
    fetch = ArenaCopy.fetch

    def noting(self: ArenaCopy, path: str, start: int, buffer: memoryview) -> bool:
        at = np.frombuffer(buffer, np.uint8).ctypes.data
        inside.append(first <= at < first + tree["t"].nbytes)
        return fetch(self, path, start, buffer)

    monkeypatch.setattr(ArenaCopy, "fetch", noting)
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"t": torch.arange(float(1 << 20)), "u": torch.ones(3)}).wait()
        ckpt.restore(tree)
    assert torch.equal(tree["t"], torch.arange(float(1 << 20)))
    assert torch.equal(tree["u"], torch.ones(3))
    assert sorted(inside) == [False, False, True, True, True]  # 4 MiB that begin behind a header


def test_what_no_copy_has_right_fails_the_restore(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
        (arena,) = arenas_of(tmp_path)
        flip_image(arena, 2 << 20)
        (blob,) = tmp_path.glob("step-*/data/*")
        flip(blob, 2 << 20)
        with pytest.raises(CorruptBlock):
            ckpt.restore(tree_at(0))


def test_a_damaged_block_in_memory_is_healed_and_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
        (arena,) = arenas_of(tmp_path)
        flip_image(arena, 2 << 20)
        tree = tree_at(0)
        report = ckpt.restore(tree)
    assert torch.equal(tree["t"], tree_at(1)["t"])
    assert (report.num_healed, report.bytes_from["root"]) == (1, 1 << 20)
    assert "are damaged in tier arena" in caplog.text
