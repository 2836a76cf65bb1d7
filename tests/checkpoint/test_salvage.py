"""What a killed job had staged: committed by the next start if it is whole, and left alone if it is not."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from stoker.checkpoint import CheckpointManager, KeepBest, persist
from stoker.checkpoint.arena import HEADER_BYTES, arena_headers, read_header, root_id_of
from stoker.checkpoint.job import Job
from stoker.errors import StokerError
from stoker.metrics import counters
from tests.checkpoint.processes import arenas_of, flip, flip_image, killed_after

SIZE = 1 << 19


def tree_at(step: int) -> dict[str, Any]:
    return {"t": torch.arange(SIZE, dtype=torch.int32) + step, "progress": {"step": step}}


def empty() -> dict[str, Any]:
    return {"t": torch.zeros(SIZE, dtype=torch.int32), "progress": {"step": -1}}


def never(*_: object) -> None:
    threading.Event().wait()


@pytest.fixture(autouse=True)
def no_arena_is_left(tmp_path: Path) -> Iterator[None]:
    yield
    for path in arenas_of(tmp_path / "root"):
        path.unlink()


def save_and_stage(
    root: Path, *, ranks: int = 1, steps: tuple[int, int] = (1, 2), **options: Any
) -> Callable[[], None]:
    """A job that commits one step, stages another on every rank, and commits that one never."""

    def one(rank: int) -> None:
        job: dict[str, Any] = {} if ranks == 1 else {"rank": rank, "world_size": ranks, "run_id": "killed"}
        ckpt = CheckpointManager(root, **job, **options)
        ckpt.save(steps[0], tree_at(steps[0])).wait("committed")
        both.wait()
        vars(persist)["collect_fragments"] = never
        ckpt.save(steps[1], tree_at(steps[1]), metrics={"loss": 0.5}).wait("staged")

    both = threading.Barrier(ranks)

    def job() -> None:
        with ThreadPoolExecutor(ranks) as threads:
            list(threads.map(one, range(ranks)))

    return job


def test_a_step_that_was_staged_when_the_process_was_killed_is_committed_by_the_next_start(tmp_path: Path) -> None:
    root = tmp_path / "root"
    killed_after(save_and_stage(root))
    before = counters.snapshot()
    with CheckpointManager(root, keep_last=9, keep_best=KeepBest(metric="loss")) as ckpt:
        assert ckpt.steps() == [1, 2]
        assert ckpt.best() == 2
        tree = empty()
        report = ckpt.restore(tree)
        assert (report.step, tree["progress"]) == (2, {"step": 2})
        assert torch.equal(tree["t"], tree_at(2)["t"])
        assert set(report.bytes_from) == {"arena"}
        ckpt.save(3, tree_at(3)).wait("committed")
        assert ckpt.steps() == [1, 2, 3]
    assert counters.since(before)["ckpt.salvage.steps"] == 1
    for path in arenas_of(root):
        path.unlink()
    with CheckpointManager(root) as ckpt:  # and all of it is under the root
        tree = empty()
        assert set(ckpt.restore(tree, step=2).bytes_from) == {"root"}
        assert torch.equal(tree["t"], tree_at(2)["t"])


def test_the_first_step_of_a_root_is_salvaged_too(tmp_path: Path) -> None:
    root = tmp_path / "root"

    def job() -> None:
        vars(persist)["collect_fragments"] = never
        CheckpointManager(root).save(7, tree_at(7)).wait("staged")

    killed_after(job)
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [7]


def damage_the_image(arena: Path) -> None:
    flip_image(arena, SIZE)


def damage_the_header(arena: Path) -> None:
    flip(arena, 100)


def damage_the_tail(arena: Path) -> None:
    header = read_header(arena.read_bytes()[:HEADER_BYTES])
    assert header is not None
    flip(arena, header["tail"]["start"] + 100)


@pytest.mark.parametrize("damage", [damage_the_image, damage_the_header, damage_the_tail, Path.unlink])
def test_if_the_arena_of_one_rank_is_torn_or_missing_the_job_starts_from_the_older_step(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    root = tmp_path / "root"
    killed_after(save_and_stage(root, ranks=2))
    newest = {
        header["rank"]: path
        for path, _, header in arena_headers(root_id_of(str(root)))
        if header is not None and header.get("step") == 2
    }
    assert set(newest) == {0, 1}
    damage(newest[1])
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [1]
        tree = empty()
        assert ckpt.restore(tree).step == 1
        assert torch.equal(tree["t"], tree_at(1)["t"])
        ckpt.save(2, tree_at(2)).wait("committed")
        assert ckpt.steps() == [1, 2]
    # A header that nobody can read may be that of a process which is about to write it: it stays for an hour.
    assert len(arenas_of(root)) == (damage is damage_the_header)


def test_one_process_salvages_what_several_ranks_of_its_node_left(tmp_path: Path) -> None:
    root = tmp_path / "root"
    killed_after(save_and_stage(root, ranks=3))
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [1, 2]
        tree = empty()
        ckpt.restore(tree)
        assert torch.equal(tree["t"], tree_at(2)["t"])


class RanksInThreads(Job):
    """Collectives between threads, for a job of several nodes without any."""

    def __init__(self, rank: int, world_size: int, shared: tuple[list[Any], threading.Barrier]) -> None:
        group: Any = object()
        super().__init__(rank=rank, world_size=world_size, run_id="new", group=group)
        object.__setattr__(self, "shared", shared)

    def of_all_ranks(self, value: Any) -> list[Any]:
        values, barrier = self.shared  # type: ignore[attr-defined]
        values[self.rank] = value
        barrier.wait()
        seen = list(values)
        barrier.wait()
        for one in seen:
            if isinstance(one, StokerError):
                raise one
        return seen

    def from_rank_0(self, value: Any) -> Any:
        return self.of_all_ranks(value if self.rank == 0 else None)[0]


def test_ranks_with_a_group_salvage_one_arena_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = tmp_path / "root"
    killed_after(save_and_stage(root, ranks=2))
    shared = [None, None], threading.Barrier(2)
    monkeypatch.setattr(Job, "join", lambda store, rank, world_size, run_id: RanksInThreads(rank, world_size, shared))

    def rank(number: int) -> list[int]:
        with CheckpointManager(root, rank=number, world_size=2) as ckpt:
            tree = empty()
            assert ckpt.restore(tree).step == 2
            assert torch.equal(tree["t"], tree_at(2)["t"])
            ckpt.save(3, tree_at(3)).wait("committed", timeout_s=60)
            return ckpt.steps()

    with ThreadPoolExecutor(2) as threads:
        assert list(threads.map(rank, range(2))) == [[1, 2, 3], [1, 2, 3]]
    blobs = {path.name for path in root.glob(f"step-{2:012d}-*/data/*")}
    assert blobs == {"00000-0.safetensors", "00001-0.safetensors"}


def test_what_a_run_staged_before_another_one_opened_the_root_is_not_salvaged(tmp_path: Path) -> None:
    root = tmp_path / "root"
    with CheckpointManager(root) as other:
        other.save(0, tree_at(0)).wait()
    killed_after(save_and_stage(root, steps=(1, 9)))
    arenas = {path: path.read_bytes() for path in arenas_of(root)}
    assert arenas
    for path in arenas:
        path.unlink()
    with CheckpointManager(root) as newer:  # on another node, which knows nothing of the arenas
        newer.save(3, tree_at(3)).wait()
    for path, data in arenas.items():
        path.write_bytes(data)
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [0, 1, 3]


def test_a_step_that_is_not_newer_than_the_log_is_not_salvaged(tmp_path: Path) -> None:
    root = tmp_path / "root"
    killed_after(save_and_stage(root, steps=(5, 4)))
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [5]


def test_a_save_whose_handle_said_that_it_failed_is_not_brought_back(tmp_path: Path) -> None:
    root = tmp_path / "root"

    def job() -> None:
        ckpt = CheckpointManager(root)
        ckpt.save(1, tree_at(1)).wait()

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        vars(persist)["collect_fragments"] = full
        handle = ckpt.save(2, tree_at(2))
        with pytest.raises(OSError, match="No space"):
            handle.wait()
        ckpt._background.shutdown()

    killed_after(job)
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [1]


def test_a_root_that_can_not_be_written_keeps_nobody_from_restoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "root"
    killed_after(save_and_stage(root))

    def refused(*_: object, **__: object) -> None:
        raise StokerError("not today", place="log")

    monkeypatch.setattr(persist.Persister, "append", refused)
    with CheckpointManager(root) as ckpt:
        assert ckpt.restore(empty()).step == 1
    assert "not salvaged: log: not today" in caplog.text
    monkeypatch.undo()
    with CheckpointManager(root) as ckpt:
        assert ckpt.steps() == [1, 2]
