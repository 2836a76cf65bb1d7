"""The node's own disk: a level of its own, a copy to restore from, and never a reason for a save to fail."""

import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.checkpoint import CheckpointManager, local
from stoker.checkpoint.arena import root_id_of
from stoker.errors import ConfigError, StoreFull
from stoker.metrics import counters
from stoker.storage import local as local_store
from tests.checkpoint.processes import arenas_of, flip, flip_image, killed_after

SIZE = 3 << 20  # three blocks of checksums


def tree_at(step: int) -> dict[str, Any]:
    return {"t": torch.arange(SIZE // 4, dtype=torch.int32) + step, "progress": {"step": step}}


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "root"
    for path in arenas_of(tmp_path / "root"):
        path.unlink()


@pytest.fixture
def nvme(tmp_path: Path) -> Path:
    return tmp_path / "nvme"


def own(nvme: Path, root: Path) -> Path:
    return nvme / f"root-{root_id_of(str(root))}"


def copies(nvme: Path, root: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in own(nvme, root).glob("step-*"))


def restored(ckpt: CheckpointManager, step: int | None = None) -> dict[str, int]:
    """Restore, compare, and return the tiers that the bytes came from."""
    tree: dict[str, Any] = {"t": torch.zeros(SIZE // 4, dtype=torch.int32), "progress": {"step": -1}}
    report = ckpt.restore(tree, step=step)
    assert torch.equal(tree["t"], tree_at(report.step)["t"])
    assert tree["progress"] == {"step": report.step}
    assert sum(report.bytes_from.values()) == report.num_bytes
    return report.bytes_from


def saved(ckpt: CheckpointManager) -> CheckpointManager:
    ckpt.save(1, tree_at(1)).wait()
    return ckpt


def test_the_node_has_the_same_files_as_the_root_in_a_marked_private_directory(root: Path, nvme: Path) -> None:
    with CheckpointManager(root, local=nvme) as ckpt:
        handle = ckpt.save(1, tree_at(1))
        handle.wait("local")
        handle.wait("committed")
        report = handle.report()
        assert report.staged_s is not None and report.local_s is not None and report.committed_s is not None
        assert report.stall_s > 0 and report.staged_s < min(report.local_s, report.committed_s)
    directory = own(nvme, root)
    assert directory.stat().st_mode & 0o777 == 0o700
    assert (directory / "CACHEDIR.TAG").read_bytes().startswith(b"Signature: 8a477f597d28d172789f06886806bc55")
    (step,) = directory.glob("step-*")
    files = {str(path.relative_to(step)) for path in step.rglob("*") if path.is_file()}
    assert files == {"data/00000-0.safetensors", "state/progress.json", "state/t.json"}
    assert all((step / name).read_bytes() == (root / step.name / name).read_bytes() for name in files)


def test_without_memory_a_step_is_restored_from_the_nodes_disk(root: Path, nvme: Path) -> None:
    with CheckpointManager(root, local=nvme) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
    before = counters.snapshot()
    with CheckpointManager(root, local=nvme) as ckpt:
        assert set(restored(ckpt)) == {"local"}
    assert counters.since(before)["ckpt.restore.local.bytes"] >= SIZE


def test_what_a_nearer_copy_has_wrong_comes_from_the_next_block_by_block(
    root: Path, nvme: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed_after(lambda: saved(CheckpointManager(root, local=nvme)))
    (arena,) = arenas_of(root)
    (copy,) = own(nvme, root).glob("step-*/data/*")
    flip_image(arena, 10)  # the first block of the arena, the second and third of both
    flip_image(arena, 1 << 20)
    flip_image(arena, (2 << 20) + 7)
    flip(copy, (1 << 20) + 5)
    flip(copy, (2 << 20) + 5)
    with CheckpointManager(root, local=nvme) as ckpt:
        tiers = restored(ckpt)
        assert set(tiers) == {"arena", "local", "root"}
        assert (tiers["local"], tiers["root"]) == (1 << 20, 2 << 20)
    assert sum("are damaged in tier arena" in message for message in caplog.messages) == 3
    assert sum("are damaged in tier local" in message for message in caplog.messages) == 2


@pytest.mark.parametrize("lost", ["data", "state", "short"])
def test_a_copy_that_lacks_something_is_made_up_for_by_the_root(root: Path, nvme: Path, lost: str) -> None:
    with CheckpointManager(root, local=nvme) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
    if lost == "short":
        (blob,) = own(nvme, root).glob("step-*/data/*")
        blob.write_bytes(blob.read_bytes()[: 1 << 20])
    else:
        for path in own(nvme, root).glob(f"step-*/{lost}/*"):
            path.unlink()
    with CheckpointManager(root, local=nvme) as ckpt:
        assert set(restored(ckpt)) == ({"local"} if lost == "state" else {"root"})


def test_a_copy_of_an_attempt_that_the_log_does_not_name_is_not_used(root: Path, nvme: Path) -> None:
    with CheckpointManager(root, local=nvme) as ckpt:
        ckpt.save(1, tree_at(1)).wait()
    (copy,) = own(nvme, root).glob("step-*")
    copy.rename(copy.with_name(f"step-{1:012d}-{'0' * 16}"))
    with CheckpointManager(root, local=nvme) as ckpt:
        assert set(restored(ckpt)) == {"root"}


def test_the_newest_two_committed_steps_stay_on_the_nodes_disk(root: Path, nvme: Path) -> None:
    stale = own(nvme, root) / f"step-{3:012d}-{'0' * 16}" / "data" / "00000-0.safetensors"
    stale.parent.mkdir(parents=True, mode=0o700)
    own(nvme, root).chmod(0o700)
    stale.write_bytes(b"of a run that was killed")
    (own(nvme, root) / "notes.txt").write_text("not ours")
    with CheckpointManager(root, local=nvme) as ckpt:
        for step in range(6):
            ckpt.save(step, tree_at(step)).wait()
    assert copies(nvme, root) == [4, 5]
    assert not stale.exists()
    assert (own(nvme, root) / "notes.txt").exists()


def test_old_copies_make_room_for_a_new_one(root: Path, nvme: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with CheckpointManager(root, local=nvme) as ckpt:
        for step in (1, 2):
            ckpt.save(step, tree_at(step)).wait()
    assert copies(nvme, root) == [1, 2]
    with CheckpointManager(root, local=nvme) as ckpt:
        monkeypatch.setattr(local, "_SPARE", 1e12)
        monkeypatch.setattr(local, "_KEEP_STEPS", 9)
        ckpt.save(3, tree_at(3)).wait()
    assert copies(nvme, root) == [2, 3]


def test_a_full_local_disk_fails_that_level_and_not_the_save(
    root: Path, nvme: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    opened = local_store.LocalWriter.__init__

    def full(self: local_store.LocalWriter, store: local_store.LocalStore, key: str, size_bytes: int) -> None:
        if nvme in store.root.parents:
            self._file = None  # type: ignore[assignment]
            raise StoreFull("needs more space than is left", place=str(store.root))
        opened(self, store, key, size_bytes)

    monkeypatch.setattr(local_store.LocalWriter, "__init__", full)
    before = counters.snapshot()
    with caplog.at_level(logging.WARNING), CheckpointManager(root, local=nvme) as ckpt:
        for step in (1, 2):
            handle = ckpt.save(step, tree_at(step))
            with pytest.raises(StoreFull):
                handle.wait("local")
            handle.wait("committed")
            assert handle.report().local_s is None
        monkeypatch.undo()
        handle = ckpt.save(3, tree_at(3))
        handle.wait("local")
        handle.wait("committed")
        assert ckpt.steps() == [1, 2, 3]
    assert sum("no local copies" in message for message in caplog.messages) == 1
    assert counters.since(before)["ckpt.local.failures"] == 2


def test_a_slow_root_does_not_hold_up_the_nodes_disk_nor_the_other_way_round(
    root: Path, nvme: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = local_store.LocalWriter.commit
    let_go = {root: threading.Event(), nvme: threading.Event()}

    def slow(self: local_store.LocalWriter) -> Any:
        next(event for place, event in let_go.items() if place in self._path.parents).wait(60)
        return commit(self)

    monkeypatch.setattr(local_store.LocalWriter, "commit", slow)
    with CheckpointManager(root, local=nvme) as ckpt:
        let_go[nvme].set()
        handle = ckpt.save(1, tree_at(1))
        handle.wait("local", timeout_s=60)
        assert not handle.done("committed")
        let_go[root].set()
        handle.wait("committed", timeout_s=60)
        let_go[nvme].clear()
        handle = ckpt.save(2, tree_at(2))
        handle.wait("committed", timeout_s=60)
        assert not handle.done("local")
        let_go[nvme].set()
        handle.wait("local", timeout_s=60)


def make_public(path: Path) -> None:
    path.mkdir(parents=True)
    path.chmod(0o755)


def make_a_file(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("something else")


@pytest.mark.parametrize("spoil", [make_public, make_a_file])
def test_a_directory_that_is_not_private_is_refused(root: Path, nvme: Path, spoil: Callable[[Path], None]) -> None:
    spoil(own(nvme, root))
    with pytest.raises(ConfigError, match="private directory"):
        CheckpointManager(root, local=nvme)


def test_a_disk_that_is_dead_from_the_start_is_told_and_the_job_runs(
    root: Path, nvme: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def dead(_: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(local, "make_directories", dead)
    with CheckpointManager(root, local=nvme) as ckpt:
        ckpt.save(1, tree_at(1)).wait("committed")
    assert "Input/output error" in caplog.text
