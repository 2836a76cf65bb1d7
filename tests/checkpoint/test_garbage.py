"""Clean-up: what goes, what stays and for how long, and a job that goes on saving meanwhile."""

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import time
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.cli import app
from stoker.checkpoint.garbage import GcReport, announce, collect_garbage, find_leftovers
from stoker.checkpoint.log import CheckpointLog, Record, commit_record, nonce_of, step_directory
from stoker.checkpoint.verify import verify
from stoker.errors import AttemptCollected, CorruptRecord, NoCheckpoint
from stoker.storage.local import LocalStore

HOUR = 3600.0


def tree(step: int) -> dict[str, Any]:
    return {"t": torch.full((1000,), step), "x": step}


def age(path: Path, seconds: float) -> None:
    """As if everything below `path` had been written so long ago."""
    for file in [path, *path.rglob("*")]:
        os.utime(file, (time() - seconds, time() - seconds))


def collect(root: Path, *, grace_s: float = 0.0, dry_run: bool = False) -> GcReport:
    with LocalStore(root) as store:
        return collect_garbage(store, grace_s=grace_s, dry_run=dry_run)


def left_over(root: Path, step: int) -> Path:
    """What a killed save of `step` leaves."""
    directory = root / step_directory(step, nonce_of("killed", step, 0))
    (directory / "data").mkdir(parents=True)
    (directory / "data" / "00000-0.safetensors").write_bytes(b"x" * 100)
    return directory


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 2 and 3 live, step 1 retired and still there, and what a killed save left."""
    with CheckpointManager(tmp_path, keep_last=2, grace_s=HOUR) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step, tree(step)).wait()
    left_over(tmp_path, 4)
    return tmp_path


def test_what_no_step_needs_is_deleted_with_its_reason(root: Path) -> None:
    dry = collect(root, dry_run=True)
    assert [(one.step, one.reason) for one in dry.attempts] == [(1, "retired"), (4, "unfinished")]
    assert dry.attempts[1].num_bytes == 100 and dry.num_bytes > 4000
    assert {path.name for path in root.glob("step-*")} > {one.directory for one in dry.attempts}
    done = collect(root)
    assert [one.directory for one in done.attempts] == [one.directory for one in dry.attempts]
    assert sorted(int(path.name.split("-")[1]) for path in root.glob("step-*")) == [2, 3]
    assert verify(root, all_steps=True).ok
    assert collect(root).attempts == ()


def test_every_delete_is_announced_before(root: Path) -> None:
    directory = left_over(root, 5)
    collect(root)
    with LocalStore(root) as store:
        head = CheckpointLog(store).head()
    assert head is not None and head.kind == "gc"
    assert directory.name.rpartition("-")[2] in head.dead


def test_an_attempt_that_became_a_step_after_it_was_found_stays(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree(1)).wait()
    directory = left_over(tmp_path, 4)
    nonce = directory.name.rpartition("-")[2]
    with LocalStore(tmp_path) as store:
        log = CheckpointLog(store)
        found = find_leftovers(store, log, grace_s=0)
        assert [one.nonce for one in found.attempts] == [nonce]
        log.append(lambda head: commit_record(head, term=1, step=4, nonce=nonce, manifest_sha256="0" * 64))
        assert announce(log, found.attempts) == []


def test_young_data_stays_for_its_grace(root: Path) -> None:
    report = collect(root, grace_s=HOUR)
    assert report.attempts == () and [one.step for one in report.in_grace] == [1, 4]
    for path in root.glob("step-*"):
        age(path, 2 * HOUR)
    # Old data, but the log needed step 1 a moment ago: somebody may be reading it.
    report = collect(root, grace_s=HOUR)
    assert [one.step for one in report.attempts] == [4] and [one.step for one in report.in_grace] == [1]
    age(root / "log", 2 * HOUR)
    assert [one.step for one in collect(root, grace_s=HOUR).attempts] == [1]


def test_an_attempt_in_flight_that_is_collected_is_refused_and_the_next_save_works(tmp_path: Path) -> None:
    waits, waiting = threading.Event(), threading.Event()

    class Slow(LocalStore):
        """Stops for a while before a manifest is written."""

        def create(self, key: str, data: Any) -> Any:
            if key.endswith("manifest.arrow") and "000000000002" in key:
                waiting.set()
                waits.wait(60)
            return super().create(key, data)

    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, tree(1)).wait()
        ckpt._persister._store = Slow(tmp_path)
        handle = ckpt.save(2, tree(2))
        assert waiting.wait(60)
        assert [one.step for one in collect(tmp_path).attempts] == [2]
        waits.set()
        with pytest.raises(AttemptCollected):
            handle.wait()
        ckpt.save(3, tree(3)).wait()
        assert ckpt.steps() == [1, 3]
    assert verify(tmp_path, all_steps=True).ok


def test_what_another_rank_of_the_run_has_begun_ahead_of_rank_0_is_spared(tmp_path: Path) -> None:
    begun = threading.Event()

    def rank_1() -> None:
        with CheckpointManager(tmp_path, rank=1, world_size=2, run_id="run", grace_s=0.0) as ckpt:
            ckpt.save(1, tree(1)).wait()
            handle = ckpt.save(2, tree(2))
            while not list(tmp_path.glob("step-000000000002-*/frag/00001.arrow")):
                assert not handle.done()
                handle.wait("staged")
            begun.set()
            handle.wait()

    with ThreadPoolExecutor(1) as threads:
        other = threads.submit(rank_1)
        with CheckpointManager(tmp_path, rank=0, world_size=2, run_id="run", grace_s=0.0) as ckpt:
            ckpt._retirement.pause("until rank 1 is ahead")
            ckpt.save(1, tree(1)).wait()
            assert begun.wait(60)
            ckpt._retirement.resume("until rank 1 is ahead")
            ckpt._retirement._thread.submit(lambda: None).result()
            ckpt.save(2, tree(2)).wait()
            assert ckpt.steps() == [1, 2]
        other.result()
    assert verify(tmp_path, all_steps=True).ok


def test_of_a_retired_step_only_the_blobs_that_another_one_refers_to_stay(root: Path) -> None:
    (needed,) = (path.name for path in root.glob("step-000000000002-*"))
    blob = "data/00000-0.safetensors"

    def commit(head: Record | None) -> Record:
        return commit_record(
            head,
            term=1,
            step=9,
            nonce=nonce_of("r", 9, 0),
            manifest_sha256="0" * 64,
            refs={needed: (blob,)},
            keep=lambda live: [9],
        )

    with LocalStore(root) as store:
        CheckpointLog(store).append(commit)
    assert [one.step for one in collect(root).attempts] == [1, 2, 3, 4]
    assert [path.relative_to(root / needed) for path in (root / needed).rglob("*") if path.is_file()] == [Path(blob)]
    assert collect(root).attempts == ()


def test_without_a_log_or_with_a_damaged_one_nothing_is_deleted(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:  # fmt: skip
    empty = tmp_path_factory.mktemp("empty")
    directory = left_over(empty, 1)
    with pytest.raises(NoCheckpoint, match="only a log says"):
        collect(empty)
    assert directory.exists()
    newest = min(root.glob("log/*"))
    data = bytearray(newest.read_bytes())
    data[30] ^= 1
    newest.write_bytes(data)
    before = sorted(root.rglob("*"))
    with pytest.raises(CorruptRecord):
        collect(root)
    assert sorted(root.rglob("*")) == before


def test_what_a_run_left_in_its_grace_is_deleted_by_the_next_once_it_has_passed(tmp_path: Path) -> None:
    directory = left_over(tmp_path, 7)
    with CheckpointManager(tmp_path, grace_s=HOUR) as ckpt:
        ckpt.save(1, tree(1)).wait()
        ckpt._retirement._thread.submit(lambda: None).result()
        assert directory.exists()
        age(directory, 2 * HOUR)
        ckpt._retirement._sweep_due -= HOUR
        ckpt.save(2, tree(2)).wait()
    assert not directory.exists()


def test_the_command_says_what_goes_and_why(root: Path) -> None:
    def run(*arguments: str) -> str:
        result = CliRunner().invoke(app, ["gc", str(root), *arguments])
        assert result.exit_code == 0, result.output
        return result.stdout

    assert "stays for its grace" in run() and "0 attempts deleted" in run()
    assert "2 attempts would go" in run("--dry-run", "--grace", "0")
    report = json.loads(run("--grace", "0", "--json"))
    assert report["ok"] and [one["reason"] for one in report["attempts"]] == ["retired", "unfinished"]
    assert "0 attempts deleted" in run("--grace", "0")
