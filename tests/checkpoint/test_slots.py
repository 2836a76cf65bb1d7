"""One arena or two: saves beside each other, adoption, and what happens when all are in use."""

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.checkpoint import CheckpointManager, slots
from stoker.checkpoint.arena import arena_headers, root_id_of
from stoker.errors import DeadlineExceeded, SaveSkipped
from stoker.storage import _memory, local
from stoker.storage._posix import shared_memory_directory
from tests.checkpoint.processes import arenas_of, killed_after

SIZE = 1 << 18


def tree_at(step: int) -> dict[str, Any]:
    return {"t": torch.arange(SIZE, dtype=torch.int32) + step}


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is closed, no blob gets its name."""
    commit, let_go = local.LocalWriter.commit, threading.Event()

    def hanging(self: local.LocalWriter) -> Any:
        let_go.wait(60)
        return commit(self)

    monkeypatch.setattr(local.LocalWriter, "commit", hanging)
    yield let_go
    let_go.set()


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "memory_allows", lambda size_bytes, ranks: False)


def test_with_two_arenas_a_save_does_not_wait_for_the_one_before(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.prewarm(tree_at(0))
        handles = [ckpt.save(step, tree_at(step)) for step in (1, 2)]
        assert [handle.report().staging_slots for handle in handles] == [2, 2]
        for handle in handles:
            handle.wait("staged")
        assert not any(handle.done() for handle in handles)
        gate.set()
        for handle in handles:
            handle.wait()
        tree = tree_at(0)
        for step in (1, 2):
            ckpt.restore(tree, step=step)
            assert torch.equal(tree["t"], tree_at(step)["t"])
    assert not arenas_of(tmp_path)


def test_the_second_arena_is_made_by_itself_and_the_newest_step_stays_in_memory(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2):
            ckpt.save(step, tree_at(step)).wait()
        ckpt._settle()
        ckpt._slots.grow(wait=True)
        for step in (3, 4):
            ckpt.save(step, tree_at(step)).wait()
        ckpt._settle()
        held = {h["step"] for _, _, h in arena_headers(root_id_of(str(tmp_path))) if h and h.get("committed")}
        assert held == {3, 4}
        assert set(ckpt.restore(tree_at(0), step=3).bytes_from) == {"arena"}


@pytest.mark.usefixtures("little_memory")
def test_with_one_arena_a_save_waits_and_says_how_long(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.prewarm(tree_at(0))
        ckpt.save(1, tree_at(1))
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        report = ckpt.save(2, tree_at(2)).report()
        timer.join()
        assert report.staging_slots == 1
        assert 0.1 < report.busy_s <= report.stall_s


@pytest.mark.usefixtures("little_memory")
def test_a_save_that_waits_too_long_is_an_error(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointManager(tmp_path, persist_timeout_s=0.3) as ckpt:
        handle = ckpt.save(1, tree_at(1))
        with pytest.raises(DeadlineExceeded, match="still writing"):
            ckpt.save(2, tree_at(2))
        gate.set()
        handle.wait()


@pytest.mark.usefixtures("little_memory")
def test_a_save_may_be_skipped_instead_and_its_handle_says_so(tmp_path: Path, gate: threading.Event) -> None:
    with CheckpointManager(tmp_path, on_busy="skip") as ckpt:
        first = ckpt.save(1, tree_at(1))
        second = ckpt.save(2, tree_at(2))
        assert second.skipped and not first.skipped
        with pytest.raises(SaveSkipped, match="arenas are in use"):
            second.wait("staged")
        gate.set()
        first.wait()
        ckpt.save(3, tree_at(3)).wait()
        ckpt.save(2, tree_at(2)).wait()
        assert ckpt.steps() == [1, 2, 3]


@pytest.mark.usefixtures("little_memory")
def test_if_one_rank_skips_a_save_the_others_hear_of_it_and_the_next_one_works(
    tmp_path: Path, gate: threading.Event
) -> None:
    ranks = [
        CheckpointManager(tmp_path, rank=r, world_size=2, run_id="run", on_busy="skip", persist_timeout_s=60)
        for r in range(2)
    ]
    trees = [{"t": torch.ones(4) * (r + 1)} for r in range(2)]
    gate.set()

    def save(step: int) -> list[Any]:
        handles: list[Any] = [None, None]

        def one(r: int) -> None:
            handles[r] = ranks[r].save(step, {"t": trees[0]["t"]})

        threads = [threading.Thread(target=one, args=(r,)) for r in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return handles

    for handle in save(1):
        handle.wait()
    for rank in ranks:
        rank._settle()
    release = ranks[1]._slots.acquire()[1]  # rank 1 is busy
    skipped = save(2)
    with pytest.raises(SaveSkipped):
        skipped[0].wait(timeout_s=60)
    assert all(handle.skipped for handle in skipped)
    release()
    for handle in save(3):
        handle.wait()
    for rank in ranks:
        assert rank.steps() == [1, 3]
        rank.close()


def test_the_next_start_takes_over_the_pages_and_clears_what_no_rank_of_it_will(tmp_path: Path) -> None:
    def three_ranks() -> list[CheckpointManager]:
        managers = [CheckpointManager(tmp_path, rank=r, world_size=3, run_id="old") for r in range(3)]
        for ckpt in managers:
            ckpt._lay_out(*_planned(ckpt, tree_at(0)))
        return managers

    killed_after(three_ranks)
    inodes = {path.name: path.stat().st_ino for path in arenas_of(tmp_path)}
    assert len(inodes) == 3
    with CheckpointManager(tmp_path, rank=0, world_size=2, run_id="new") as ckpt:
        ckpt._lay_out(*_planned(ckpt, tree_at(0)))
        left = arenas_of(tmp_path)
        assert [path.name[-7:] for path in left] == ["00000-0", "00001-0"]
        assert [path.stat().st_ino for path in left] == [inodes[path.name] for path in left]
    for path in arenas_of(tmp_path):
        path.unlink()


def _planned(ckpt: CheckpointManager, tree: dict[str, Any]) -> Any:
    from stoker.checkpoint.plan import plan_signature
    from stoker.checkpoint.tree import view_tree

    view = view_tree(tree)
    signature = plan_signature(view.tensors, rank=ckpt.rank, world_size=ckpt.world_size)
    return tree, view, signature, ckpt._roster.assumed()


def test_memory_allows_a_second_arena_only_if_enough_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(shared_memory_directory()).f_bavail * 4096
    monkeypatch.setattr(_memory, "available_memory", lambda: (8 << 30, 16 << 30))
    assert slots.memory_allows(min(1 << 20, free), 4)
    assert not slots.memory_allows(5 << 30, 1)
    assert not slots.memory_allows(1 << 30, 5)
