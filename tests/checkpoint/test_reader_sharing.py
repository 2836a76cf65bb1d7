"""Ranks of one node that restore one step: each block is read from the root once, whatever happens to the others."""

import os
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from stoker.bench._ckpt_reshard import LAYOUTS, reshard
from stoker.checkpoint import CheckpointManager, handover
from stoker.checkpoint.handover import Handover, Shares
from stoker.metrics import counters
from stoker.storage._posix import shared_memory_directory
from stoker.storage.local import LocalStore
from stoker.testing.s3 import S3Server

MIB = 1 << 20
NUM_MIB = 24
RUN = "one run"


def expected() -> torch.Tensor:
    return torch.arange(NUM_MIB * MIB // 4, dtype=torch.int32)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """One step, without a copy in memory."""
    with CheckpointManager(tmp_path / "root") as ckpt:
        ckpt.save(1, {"t": expected()}).wait()
    return tmp_path / "root"


def handovers() -> list[Path]:
    return list(shared_memory_directory().glob("restore-*"))


def restored_by(rank: int, world_size: int, root: Path) -> dict[str, int]:
    """Restore the step as one rank of a job without a process group; returns the bytes by tier."""
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    before = counters.snapshot()
    with CheckpointManager(root, rank=rank, world_size=world_size, run_id=RUN) as ckpt:
        tree = {"t": torch.zeros_like(expected())}
        report = ckpt.restore(tree, step=1)
    assert torch.equal(tree["t"], expected())
    moved = counters.since(before)
    return {**report.bytes_from, "healed": report.num_healed, "gone": int(moved.get("ckpt.restore.node.gone_ranks", 0))}


class Rank:
    """A forked process that restores."""

    alive: ClassVar[set[int]] = set()

    def __init__(self, rank: int, world_size: int, root: Path, *, first: Callable[[], object] = lambda: None) -> None:
        self._read, write = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                torch.set_num_threads(1)  # the threads of OpenMP do not live in a forked process
                first()
                os.write(write, repr(restored_by(rank, world_size, root)).encode())
                status = 0
            except BaseException as error:
                os.write(write, repr(error).encode())
            finally:
                os._exit(status)
        self.alive.add(self.pid)
        os.close(write)

    def result(self) -> dict[str, int]:
        """What it returned; raises what it raised."""
        with os.fdopen(self._read) as pipe:
            text = pipe.read()
        status = self.status()
        assert status == 0, (status, text)
        found: dict[str, int] = eval(text)
        return found

    def status(self) -> int:
        """Its exit status, when it has ended."""
        status = os.waitpid(self.pid, 0)[1]
        self.alive.discard(self.pid)
        return os.waitstatus_to_exitcode(status)

    def was_killed(self) -> None:
        assert self.status() == -signal.SIGKILL
        os.close(self._read)


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    """A stopped process would outlive a test that fails."""
    yield
    while Rank.alive:
        pid = Rank.alive.pop()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def stopping_at(count: int, number: signal.Signals) -> Callable[[], None]:
    """Have this process send itself a signal when it has offered that many blocks."""

    def patch() -> None:
        offer, offered = Shares.offer, [0]

        def patched(self: Shares, block: int, data: Any) -> None:
            offer(self, block, data)
            offered[0] += 1
            if offered[0] == count:
                os.kill(os.getpid(), number)

        Shares.offer = patched  # type: ignore[method-assign]

    return patch


def test_two_nodes_read_what_their_ranks_need_once_in_any_layout(tmp_path: Path) -> None:
    for layout, found in reshard(tmp_path, 24 << 20).items():
        assert layout in LAYOUTS
        assert found["needed"] <= found["read"] <= 1.05 * found["needed"], (layout, found)
        assert found["from"]["node"] >= found["needed"] // 3, (layout, found)


def test_ranks_of_a_node_share_the_reads_of_an_object_store(s3_server: S3Server) -> None:
    url = s3_server.url("stoker", "test-reshard")
    for layout, found in reshard(url, 12 << 20, storage_options=s3_server.storage_options).items():
        assert found["needed"] <= found["read"] <= 1.05 * found["needed"], (layout, found)


def test_ranks_without_a_process_group_share_the_work_and_leave_nothing(root: Path) -> None:
    ranks = [Rank(rank, 3, root) for rank in range(3)]
    found = [rank.result() for rank in ranks]
    total = sum(one["root"] for one in found)
    assert NUM_MIB * MIB < total < (NUM_MIB + 1.1) * MIB
    for one in found:
        assert one["root"] + one["node"] == total
        assert 0.2 * total < one["root"] < 0.5 * total
    assert handovers() == []


def test_a_rank_that_is_killed_in_the_middle_is_waited_for_no_more(root: Path) -> None:
    killed = Rank(0, 2, root, first=stopping_at(2, signal.SIGKILL))
    started = time.monotonic()
    other = Rank(1, 2, root)
    killed.was_killed()
    found = other.result()
    assert time.monotonic() - started < 30
    assert found["gone"] == 1
    assert found["node"] <= 2 * MIB
    assert handovers() == []  # the last to leave removes all


def test_a_rank_that_is_stopped_blocks_the_others_for_five_seconds_at_most_and_restores_later(root: Path) -> None:
    stopped = Rank(0, 2, root, first=stopping_at(2, signal.SIGSTOP))
    started = time.monotonic()
    other = Rank(1, 2, root)
    found = other.result()
    assert time.monotonic() - started < 30  # 5 s, on a machine that does other things
    assert found["gone"] == 1
    assert handovers()  # it may go on
    os.kill(stopped.pid, signal.SIGCONT)
    assert stopped.result()["root"] > 0
    assert handovers() == []


def test_what_killed_ranks_leave_is_reclaimed_by_the_next_start(root: Path, tmp_path: Path) -> None:
    ranks = [Rank(rank, 2, root, first=stopping_at(1, signal.SIGSTOP)) for rank in range(2)]
    for rank in ranks:
        os.waitpid(rank.pid, os.WUNTRACED)
    assert handovers()
    for rank in ranks:
        os.kill(rank.pid, signal.SIGKILL)
        rank.was_killed()
    assert handovers()
    with CheckpointManager(tmp_path / "another"):
        assert handovers() == []


def test_a_rank_that_never_comes_is_waited_for_for_five_seconds_at_most(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "_JOIN_S", 0.05)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert restored_by(0, 2, root).keys() == {"root", "healed", "gone"}
    assert handovers() == []


def test_blocks_that_are_damaged_in_shared_memory_are_read_anew(root: Path) -> None:
    def damage() -> None:
        offer = Shares.offer

        def damaged(self: Shares, block: int, data: Any) -> None:
            copy = data.copy()
            copy[len(copy) // 2] ^= 16
            offer(self, block, copy)

        Shares.offer = damaged  # type: ignore[method-assign]

    bad = Rank(0, 2, root, first=damage)
    good = Rank(1, 2, root)
    found = good.result()
    assert found["healed"] >= NUM_MIB // 2 - 8
    assert found.get("node", 0) == 0
    assert bad.result()["healed"] == 0
    assert handovers() == []


def test_ranks_whose_shared_memory_is_full_read_for_themselves(root: Path) -> None:
    def fill() -> None:
        # A limit on the size of files is an error of write, as a full tmpfs is.
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB // 4, MIB // 4))

    ranks = [Rank(rank, 2, root, first=fill) for rank in range(2)]
    for rank in ranks:
        found = rank.result()
        assert found["root"] > NUM_MIB * MIB
        assert found["gone"] == 0
    assert handovers() == []


def test_a_window_of_eight_blocks_is_enough(root: Path) -> None:
    def narrow() -> None:
        handover._MAX_SLOTS = 8

    ranks = [Rank(rank, 2, root, first=narrow) for rank in range(2)]  # each reads twelve for both
    found = [rank.result() for rank in ranks]
    assert sum(one["root"] for one in found) < (NUM_MIB + 1.1) * MIB
    assert not any(one["gone"] for one in found)
    assert handovers() == []


def test_a_rank_that_fails_does_not_keep_the_others_waiting(root: Path) -> None:
    def fail() -> None:
        def get_into(self: LocalStore, key: str, buffer: memoryview, start: int = 0, **version: Any) -> None:
            raise OSError("this rank has lost its disk")

        LocalStore.get_into = get_into  # type: ignore[method-assign]

    failing = Rank(0, 2, root, first=fail)
    other = Rank(1, 2, root)
    found = other.result()
    assert found["root"] > NUM_MIB * MIB
    assert found["gone"] == 0  # it was told
    with pytest.raises(AssertionError, match="lost its disk"):
        failing.result()
    assert handovers() == []


def test_one_rank_on_a_node_makes_nothing_in_shared_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_: object) -> None:
        raise AssertionError("nobody is there to meet")

    monkeypatch.setattr(Handover, "join", unexpected)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    with CheckpointManager(root, rank=0, world_size=2, run_id=RUN) as ckpt:
        assert ckpt.restore({"t": torch.zeros_like(expected())}, step=1).bytes_from["root"] > 0


def test_owners_are_balanced_and_one_of_those_who_need_the_block(tmp_path: Path) -> None:
    group = np.arange(80) // 8
    needed = np.zeros((4, 80), bool)
    needed[0, :40] = needed[1, 20:] = needed[2, :] = needed[3, 30:32] = True
    for rank in range(4):
        handover._register(tmp_path, rank, needed[rank], num_slots=8 * (rank != 3))
    peers = [handover._Peer(tmp_path, rank, 80) for rank in range(4)]
    masks, owner = handover._owners(peers, group)
    for peer in peers:
        peer.close()
    loads = [int((owner == rank).sum()) for rank in range(4)]
    assert loads[3] == 0  # it has no slots
    assert all(owner[block] == -1 or needed[owner[block], block] for block in range(80))
    assert all((owner[block] == -1) == (needed[:, block].sum() < 2) for block in range(80))
    assert max(loads) <= 1.3 * 80 / 3
    assert [int(mask).bit_count() for mask in masks] == needed.sum(axis=0).tolist()
