"""What a rank is told that waits for rank 0."""

import socket
from pathlib import Path
from time import monotonic

import pytest

from stoker.checkpoint import commit
from stoker.checkpoint.commit import Attempt, wait_for_verdict
from stoker.checkpoint.log import CheckpointLog, collect_record, nonce_of, open_record, step_directory
from stoker.errors import AttemptCollected, CommitUnknown
from stoker.storage.local import LocalStore


def attempt_of(timeout_s: float) -> Attempt:
    nonce = nonce_of("run-a", 1, 0)
    return Attempt(
        step=1,
        nonce=nonce,
        directory=step_directory(1, nonce),
        run_id="run-a",
        rank=1,
        world_size=2,
        deadline=monotonic() + timeout_s,
    )


def test_a_rank_whose_attempt_was_collected_is_told_at_once(tmp_path: Path) -> None:
    attempt = attempt_of(60)
    with LocalStore(tmp_path) as store:
        log = CheckpointLog(store)
        log.append(lambda head: open_record(head, "run-a"))
        log.append(lambda head: collect_record(head, nonces=[attempt.nonce]))
        with pytest.raises(AttemptCollected, match="save again"):
            wait_for_verdict(store, attempt, log)
    assert monotonic() < attempt.deadline


def test_no_word_by_the_deadline_names_the_host_that_waited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commit, "_GRACE_S", 0.0)
    with LocalStore(tmp_path) as store, pytest.raises(CommitUnknown, match=f"rank 0 .* host {socket.gethostname()}"):
        wait_for_verdict(store, attempt_of(0), CheckpointLog(store))
