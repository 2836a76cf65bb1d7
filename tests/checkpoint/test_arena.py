"""The staging arena: owned, marked, adopted, and gone when it is closed."""

import logging
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

from stoker.checkpoint import arena as arena_module
from stoker.checkpoint.arena import HEADER_BYTES, Arena, is_alive, read_header, sweep_dead_arenas
from stoker.storage._posix import shared_memory_directory

MIB = 1 << 20


@pytest.fixture
def root_id() -> str:
    return uuid.uuid4().hex[:16]


def arena_file(root_id: str) -> Path:
    return shared_memory_directory() / f"arena-{root_id}-00000-0"


def abandoned_arena(root_id: str, size_bytes: int) -> None:
    """An arena whose owner was killed."""
    program = f"""
import os, signal
from stoker.checkpoint.arena import Arena
arena = Arena(root_id={root_id!r}, rank=0, size_bytes={size_bytes})
arena.view(0, 4)[:] = b"left"
arena.mark("FILLING", step=7)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -signal.SIGKILL


def test_tensors_and_bytes_are_the_same_memory(root_id: str) -> None:
    arena = Arena(root_id=root_id, rank=0, size_bytes=MIB)
    arena.tensor(4096, (2, 2), torch.float32).fill_(1.0)
    assert bytes(arena.view(4096, 4100)) == b"\x00\x00\x80?"
    arena.close()
    assert not arena_file(root_id).exists()


def test_the_header_tells_owner_state_and_step(root_id: str) -> None:
    arena = Arena(root_id=root_id, rank=0, size_bytes=MIB)
    arena.mark("FULL", step=3, nonce="ab")
    header = read_header(arena_file(root_id).read_bytes()[:HEADER_BYTES])
    arena.close()
    assert header is not None
    assert (header["state"], header["step"], header["nonce"], header["pid"]) == ("FULL", 3, "ab", os.getpid())
    assert is_alive(header)


def test_a_torn_header_is_no_header(root_id: str) -> None:
    arena = Arena(root_id=root_id, rank=0, size_bytes=MIB)
    data = bytearray(arena_file(root_id).read_bytes()[:HEADER_BYTES])
    arena.close()
    assert read_header(bytes(data)) is not None
    data[20] ^= 1
    assert read_header(bytes(data)) is None
    assert read_header(bytes(HEADER_BYTES)) is None


def test_the_next_start_adopts_the_arena_of_a_killed_owner(root_id: str) -> None:
    abandoned_arena(root_id, MIB)
    inode = arena_file(root_id).stat().st_ino
    arena = Arena(root_id=root_id, rank=0, size_bytes=MIB)
    assert arena_file(root_id).stat().st_ino == inode
    assert bytes(arena.view(0, 4)) == b"left"
    arena.close()


def test_the_sweep_removes_dead_owners_of_other_roots_and_leaves_the_living(root_id: str) -> None:
    abandoned_arena(root_id, MIB)
    living = Arena(root_id=root_id + "f", rank=0, size_bytes=MIB)
    sweep_dead_arenas(keep_root_id=root_id)
    assert arena_file(root_id).exists()
    sweep_dead_arenas(keep_root_id="another")
    assert not arena_file(root_id).exists()
    assert arena_file(root_id + "f").exists()
    living.close()


def test_too_small_shared_memory_falls_back_with_one_warning(
    root_id: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing_there() -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(arena_module, "shared_memory_directory", nothing_there)
    with caplog.at_level(logging.WARNING):
        arena = Arena(root_id=root_id, rank=0, size_bytes=MIB)
    arena.tensor(0, (4,), torch.uint8).fill_(7)
    assert bytes(arena.view(0, 4)) == b"\x07" * 4
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    arena.close()
