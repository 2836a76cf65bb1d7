"""The log on a real store: records, transitions one by one, failing stores, and two processes that race."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint.log import (
    CheckpointLog,
    LiveStep,
    Record,
    collect_record,
    commit_record,
    keep_last,
    kept_blobs,
    log_key,
    nonce_of,
    open_record,
    parse_log_key,
    parse_step_directory,
    retire_record,
    step_directory,
)
from stoker.errors import (
    AttemptCollected,
    CommitUnknown,
    ConfigError,
    CorruptRecord,
    Fenced,
    FormatError,
    NoCheckpoint,
    SaveFailed,
    StepAlreadyCommitted,
    StoreError,
    StoreFull,
    StoreUnavailable,
    UnknownVersion,
)
from stoker.storage._units import Buffer
from stoker.storage.local import LocalStore
from stoker.storage.store import ObjectInfo

SHA256 = "ab" * 32

nonces = st.text("0123456789abcdef", min_size=16, max_size=16)
live_steps = st.builds(
    LiveStep,
    nonce=nonces,
    manifest_sha256=st.text("0123456789abcdef", min_size=64, max_size=64),
    refs=st.dictionaries(
        st.builds(step_directory, st.integers(0, 10**12 - 1), nonces),
        st.lists(st.text(max_size=5), max_size=2).map(tuple),
        max_size=2,
    ),
    metrics=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False) | st.just(math.nan), max_size=2),
)
records = st.builds(
    Record,
    seq=st.integers(1, 10**12 - 3),
    term=st.integers(1, 10**6),
    run_id=st.text(max_size=10),
    kind=st.sampled_from(["open", "commit", "retire", "rewind", "gc"]),
    live=st.dictionaries(st.integers(0, 10**12 - 1), live_steps, max_size=3),
    dead=st.lists(nonces, max_size=3).map(tuple),
)


def nonce(step: int, nth: int = 0, run_id: str = "a") -> str:
    return nonce_of(run_id, step, nth)


def committed(head: Record | None, step: int, *, term: int = 1, nth: int = 0, **wanted: Any) -> Record:
    return commit_record(head, term=term, step=step, nonce=nonce(step, nth), manifest_sha256=SHA256, **wanted)


def history(*steps: int) -> Record:
    """The newest record after a run opened the root and committed `steps`."""
    head = open_record(None, "a")
    for step in steps:
        head = committed(head, step)
    return head


# ---- records


@settings(max_examples=150)
@given(records)
def test_a_record_reads_back_as_it_was(record: Record) -> None:
    assert Record.from_json(record.to_json(), place="log") == record
    assert json.loads(record.to_json())["record"]["seq"] == record.seq


@settings(max_examples=10)
@given(records)
def test_a_flip_of_any_byte_is_a_corrupt_record(record: Record) -> None:
    data = record.to_json()
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << (at % 8)
        with pytest.raises(CorruptRecord, match=r"log/x\.json"):
            Record.from_json(bytes(broken), place="log/x.json")
    for size in (0, 1, len(data) // 2, len(data) - 1):
        with pytest.raises(CorruptRecord):
            Record.from_json(data[:size], place="log/x.json")


def sealed(body: dict[str, Any]) -> bytes:
    """A record of any content with a right digest."""
    import hashlib

    text = json.dumps(body, separators=(",", ":")).encode()
    return b'{"record":%b,"sha256":"%b"}\n' % (text, hashlib.sha256(text).hexdigest().encode())


def body_of(record: Record, **changes: Any) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(record.to_json())["record"]
    return body | changes


def test_a_newer_version_is_refused_by_name() -> None:
    with pytest.raises(UnknownVersion, match="got 2"):
        Record.from_json(sealed(body_of(history(10), version=2, live="of another kind")), place="log")


def test_a_later_minor_version_may_add_keys() -> None:
    record = history(10)
    assert Record.from_json(sealed(body_of(record, comment="x")), place="log") == record


def test_a_step_that_was_saved_without_metrics_has_none() -> None:
    body = body_of(history(10))
    del body["live"]["10"]["metrics"]
    assert Record.from_json(sealed(body), place="log") == history(10)


LIVE = {"nonce": "0" * 16, "manifest_sha256": SHA256, "refs": {}}


@pytest.mark.parametrize(
    "changes",
    [
        {"kind": "delete"},
        {"seq": "1"},
        {"term": 1.0},
        {"run_id": 1},
        {"live": []},
        {"live": {"x": LIVE}},
        {"live": {"-1": LIVE}},
        {"live": {"1": {"nonce": "../../../etc/a"}}},
        {"live": {"1": LIVE | {"nonce": "../x"}}},
        {"live": {"1": LIVE | {"manifest_sha256": "x"}}},
        {"live": {"1": LIVE | {"refs": {"../x": []}}}},
        {"live": {"1": LIVE | {"refs": {step_directory(1, "0" * 16): [1]}}}},
        {"live": {"1": LIVE | {"metrics": {"loss": "high"}}}},
        {"live": {"1": LIVE | {"metrics": {"loss": True}}}},
        {"live": {"1": LIVE | {"metrics": [1.0]}}},
        {"dead": ["../x"]},
        {"dead": [1]},
        {"dead": None},
    ],
)
def test_an_intact_record_of_nonsense_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="log/x"):
        Record.from_json(sealed(body_of(history(10), **changes)), place="log/x")


def test_names_go_both_ways_and_refuse_the_rest() -> None:
    assert parse_log_key(log_key(123)) == 123
    assert log_key(124) < log_key(123)
    assert parse_log_key("log/0.json") is None
    assert parse_step_directory(step_directory(7, nonce(7))) == (7, nonce(7))
    assert parse_step_directory("step-7") is None
    for bad in (-1, 10**12):
        with pytest.raises(ConfigError):
            step_directory(bad, nonce(7))
    with pytest.raises(ConfigError):
        step_directory(7, "../../etc")
    with pytest.raises(ConfigError):
        log_key(0)


def test_the_nonce_of_an_attempt_is_pinned() -> None:
    # All ranks of a job compute it alone: another value would split them.
    assert nonce_of("run", 100, 0) == "4c548249f15e4ba4"


# ---- transitions


def test_each_opening_takes_the_next_term_and_forgets_the_dead() -> None:
    head = collect_record(history(10), nonces=["f" * 16])
    assert head.dead == ("f" * 16,)
    opened = open_record(head, "b")
    assert (opened.seq, opened.term, opened.run_id, opened.kind) == (head.seq + 1, 2, "b", "open")
    assert opened.live == head.live and opened.dead == ()


def test_a_run_opens_once_and_again_only_above_its_own_term() -> None:
    head = open_record(None, "a")
    assert open_record(head, "a") is head
    again = open_record(collect_record(head, nonces=["f" * 16]), "a", above_term=head.term)
    assert (again.term, again.dead) == (2, ())
    assert open_record(again, "a", above_term=head.term) is again


def test_a_run_that_was_fenced_may_not_open_again() -> None:
    with pytest.raises(Fenced):
        open_record(open_record(history(10), "b"), "a", above_term=1)


def test_going_back_abandons_newer_steps_and_announces_them() -> None:
    head = history(10, 20, 30)
    back = open_record(head, "b", rewind_to=10)
    assert (back.kind, back.steps, back.latest) == ("rewind", [10], 10)
    assert back.dead == (nonce(20), nonce(30))
    assert open_record(head, "b", rewind_to=30).kind == "open"


def test_going_back_to_a_step_that_is_gone_is_refused() -> None:
    with pytest.raises(NoCheckpoint, match="must be live, got 15"):
        open_record(history(10, 20), "b", rewind_to=15)
    with pytest.raises(NoCheckpoint):
        open_record(None, "b", rewind_to=15)


def test_a_commit_adds_its_step_and_is_content_to_find_it() -> None:
    head = history(10)
    assert head.steps == [10] and head.live[10].manifest_sha256 == SHA256
    assert committed(head, 10) is head
    assert committed(open_record(head, "b"), 10).term == 2  # it was committed: that another run opened does not undo it


def test_a_run_that_is_not_the_newest_commits_nothing() -> None:
    for head in (None, open_record(history(10), "b")):
        with pytest.raises(Fenced, match="only one job may save"):
            committed(head, 20)
        with pytest.raises(Fenced):
            retire_record(head, term=1, keep=keep_last(1))


def test_an_attempt_that_was_announced_as_dead_is_never_committed() -> None:
    head = collect_record(history(10), nonces=[nonce(20)])
    with pytest.raises(AttemptCollected, match=nonce(20)):
        committed(head, 20)
    assert committed(head, 20, nth=1).steps == [10, 20]


def test_a_step_is_committed_once() -> None:
    with pytest.raises(StepAlreadyCommitted, match=nonce(10)):
        committed(history(10), 10, nth=1)
    assert issubclass(StepAlreadyCommitted, SaveFailed)


def test_retention_announces_what_it_drops() -> None:
    head = committed(history(10, 20), 30, keep=keep_last(2))
    assert (head.steps, head.dead) == ([20, 30], (nonce(10),))
    assert committed(head, 40, keep=keep_last(2)).dead == (nonce(10), nonce(20))


def test_retention_keeps_the_newest_step_and_the_one_being_committed_whatever_it_is_told() -> None:
    head = committed(history(10, 30), 20, keep=lambda steps: [])
    assert head.steps == [20, 30]
    assert retire_record(head, term=1, keep=lambda steps: []).steps == [30]


def test_retiring_nothing_changes_nothing() -> None:
    head = history(10, 20)
    assert retire_record(head, term=1, keep=keep_last(2)) is head
    retired = retire_record(head, term=1, keep=keep_last(1))
    assert (retired.kind, retired.steps, retired.dead) == ("retire", [20], (nonce(10),))
    with pytest.raises(ConfigError):
        keep_last(0)


def test_a_reference_needs_a_blob_of_a_live_step() -> None:
    blob, first = "data/00000-0.safetensors", step_directory(10, nonce(10))
    head = committed(history(10), 20, refs={first: (blob,)}, keep=keep_last(1))
    assert head.steps == [20] and head.dead == (nonce(10),)
    # The first home is retired, yet the blob stays needed and may be referred to again.
    assert committed(head, 30, refs={first: (blob,)}).live[30].refs == {first: (blob,)}
    for refs in ({first: ("data/00000-1.safetensors",)}, {step_directory(5, nonce(5)): (blob,)}):
        with pytest.raises(AttemptCollected, match="must belong to a live step"):
            committed(head, 30, refs=refs)


def test_a_step_that_goes_announces_the_homes_of_what_it_referred_to() -> None:
    first = step_directory(10, nonce(10))
    head = committed(history(10), 20, refs={first: ("x",)}, keep=keep_last(1))
    again = open_record(head, "a", above_term=1)
    assert again.dead == ()
    assert committed(again, 30, term=2, keep=keep_last(1)).dead == (nonce(20), nonce(10))
    assert committed(again, 30, term=2, refs={first: ("x",)}, keep=keep_last(2)).dead == ()
    two = committed(again, 30, term=2, keep=keep_last(2))
    assert set(open_record(two, "b", rewind_to=20).dead) == {nonce(30)}
    assert set(open_record(committed(two, 15, term=2), "b", rewind_to=15).dead) == {nonce(10), nonce(20), nonce(30)}


def test_clean_up_announces_only_what_no_step_needs() -> None:
    first = step_directory(10, nonce(10))
    head = committed(open_record(history(10), "a", above_term=1), 20, term=2, refs={first: ("x",)}, keep=keep_last(1))
    head = replace(head, dead=())
    garbage = "f" * 16
    collected = collect_record(head, nonces=[nonce(10), nonce(20), garbage])
    # Of step 10 one blob is needed, the rest may go.
    assert (collected.kind, set(collected.dead), collected.live) == ("gc", {nonce(10), garbage}, head.live)
    assert kept_blobs(collected.live.values()) == {first: {"x"}}
    assert (collected.term, collected.run_id) == (head.term, head.run_id)
    assert collect_record(collected, nonces=[garbage, nonce(20)]) is collected
    with pytest.raises(NoCheckpoint):
        collect_record(None, nonces=[garbage])


def test_a_commit_takes_a_sha256_and_nothing_else() -> None:
    with pytest.raises(ConfigError, match="SHA-256"):
        commit_record(history(), term=1, step=1, nonce=nonce(1), manifest_sha256="x")


# ---- on a store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LocalStore]:
    with LocalStore(tmp_path / "root") as store:
        yield store


def append_history(log: CheckpointLog, *steps: int, run_id: str = "a") -> Record:
    record = log.append(lambda head: open_record(head, run_id))
    term = record.term
    for step in steps:
        record = log.append(lambda head, step=step: committed(head, step, term=term))  # type: ignore[misc]
    return record


def test_an_empty_root_has_no_newest_record_and_reading_creates_nothing(store: LocalStore) -> None:
    assert CheckpointLog(store).head() is None
    assert not store.root.exists()


def test_each_append_is_one_object_and_the_newest_sorts_first(store: LocalStore) -> None:
    log = CheckpointLog(store)
    record = append_history(log, 10, 20)
    assert record.steps == [10, 20] and log.head() == record
    assert [info.key for info in store.list("log/")] == [log_key(3), log_key(2), log_key(1)]


def test_a_transition_that_is_content_appends_nothing(store: LocalStore) -> None:
    log = CheckpointLog(store)
    record = append_history(log, 10)
    assert log.append(lambda head: committed(head, 10)) == record
    assert len(list(store.list("log/"))) == 2


def test_a_damaged_newest_record_is_an_error_and_never_an_older_step(store: LocalStore) -> None:
    log = CheckpointLog(store)
    append_history(log, 10, 20)
    path = store.local_path(log_key(3))
    path.write_bytes(path.read_bytes().replace(b'"term":1', b'"term":2'))
    for read in (log.head, lambda: log.append(lambda head: open_record(head, "b"))):
        with pytest.raises(CorruptRecord, match=log_key(3)):
            read()


def test_a_record_under_another_number_is_an_error(store: LocalStore) -> None:
    log = CheckpointLog(store)
    append_history(log, 10)
    store.put(log_key(9), bytes(store.get(log_key(1))))
    with pytest.raises(CorruptRecord, match=log_key(9)):
        log.head()


def test_something_else_in_front_of_the_log_is_an_error(store: LocalStore) -> None:
    log = CheckpointLog(store)
    append_history(log, 10)
    store.put("log/00-readme.txt", b"hello")
    with pytest.raises(CorruptRecord, match="remove what does not belong there"):
        log.head()


def test_old_records_are_removed_and_the_newest_stay(store: LocalStore) -> None:
    log = CheckpointLog(store, keep_records=3)
    record = append_history(log, *range(1, 110))
    assert record.seq == 110
    # Removed when number 100 was appended.
    assert [parse_log_key(info.key) for info in store.list("log/")] == list(range(110, 97, -1))
    assert log.truncate(record) == 10
    assert [parse_log_key(info.key) for info in store.list("log/")] == [110, 109, 108]
    assert log.truncate(record) == 0
    assert log.head() == record


class FailingStore(LocalStore):
    """A store whose next creates fail after (`applied`) or instead of taking effect; its reads may fail then too."""

    def __init__(self, root: Path, error: StoreError, *, applied: bool, times: int = 1, reads: bool = False) -> None:
        super().__init__(root)
        self._error, self._applied, self._times, self._reads = error, applied, times, reads
        self._failing_reads = False

    def create(self, key: str, data: Buffer) -> ObjectInfo:
        if self._times == 0:
            return super().create(key, data)
        self._times -= 1
        if self._applied:
            super().create(key, data)
        self._failing_reads = self._reads
        raise self._error

    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        if self._failing_reads:
            raise self._error
        return super().list(prefix, start_after=start_after, limit=limit)


LOST = StoreUnavailable("no reply")


def commit_on(tmp_path: Path, error: StoreError, **how: Any) -> Record:
    """Commit step 10 on a store that fails from the commit on."""
    with LocalStore(tmp_path) as good:
        append_history(CheckpointLog(good))
    with FailingStore(tmp_path, error, **how) as store:
        return CheckpointLog(store).append(lambda head: committed(head, 10))


def newest(tmp_path: Path) -> Record | None:
    with LocalStore(tmp_path) as store:
        return CheckpointLog(store).head()


@pytest.mark.parametrize("applied", [True, False])
def test_a_lost_reply_is_settled_by_a_look(tmp_path: Path, applied: bool) -> None:
    record = commit_on(tmp_path, LOST, applied=applied)
    assert record.steps == [10] and record.seq == 2 and newest(tmp_path) == record


def test_a_commit_that_can_not_be_looked_up_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(CommitUnknown, match="may still appear"):
        commit_on(tmp_path, LOST, applied=True, reads=True)
    assert newest(tmp_path) == history(10)


def test_a_commit_whose_reply_is_lost_again_and_again_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(CommitUnknown):
        commit_on(tmp_path, LOST, applied=False, times=100)
    assert newest(tmp_path) == history()


def test_a_commit_that_is_there_but_perhaps_not_durable_is_unknown(tmp_path: Path) -> None:
    with pytest.raises(CommitUnknown):
        commit_on(tmp_path, StoreError("fsync of the directory"), applied=True)


def test_a_full_disk_fails_the_commit_and_leaves_the_log_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(StoreFull):
        commit_on(tmp_path, StoreFull("no space"), applied=False)
    assert newest(tmp_path) == history()


def test_an_opening_that_gets_no_reply_is_the_stores_failure(tmp_path: Path) -> None:
    with FailingStore(tmp_path, LOST, applied=False, times=100) as store, pytest.raises(StoreUnavailable):
        CheckpointLog(store).append(lambda head: open_record(head, "a"))


RACER = """
import sys
from stoker.checkpoint.log import CheckpointLog, commit_record, nonce_of
from stoker.errors import StepAlreadyCommitted
from stoker.storage.local import LocalStore

log = CheckpointLog(LocalStore(sys.argv[1]))
print("ready", flush=True)
for line in sys.stdin:
    step = int(line)
    nonce = nonce_of(sys.argv[2], step, 0)
    try:
        record = log.append(
            lambda head: commit_record(head, term=1, step=step, nonce=nonce, manifest_sha256="0" * 64)
        )
        print("won" if record.live[step].nonce == nonce else "confused", flush=True)
    except StepAlreadyCommitted:
        print("lost", flush=True)
"""


def test_of_two_processes_that_commit_one_step_exactly_one_wins(tmp_path: Path) -> None:
    rounds = 100
    with LocalStore(tmp_path) as store:
        append_history(CheckpointLog(store))
        racers = [
            subprocess.Popen(
                [sys.executable, "-c", RACER, str(tmp_path), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
            )
            for name in ("first", "second")
        ]
        try:
            pipes = [(racer.stdin, racer.stdout) for racer in racers]
            for _, answers in pipes:
                assert answers is not None and answers.readline() == "ready\n"
            won = []
            for step in range(rounds):
                for orders, _ in pipes[:: 1 if step % 2 else -1]:
                    assert orders is not None
                    orders.write(f"{step}\n")
                results = [answers.readline().strip() for _, answers in pipes if answers is not None]
                assert sorted(results) == ["lost", "won"], (step, results)
                won.append(results.index("won"))
        finally:
            for racer in racers:
                racer.kill()
                racer.communicate()
        head = CheckpointLog(store).head()
        assert head is not None and head.steps == list(range(rounds)) and head.seq == rounds + 1
        for step, winner in enumerate(won):
            assert head.live[step].nonce == nonce_of(("first", "second")[winner], step, 0)


def test_a_file_of_somebody_else_among_the_records_stops_nothing(store: LocalStore) -> None:
    log = CheckpointLog(store)
    log.append(lambda head: open_record(head, "run"))
    store.put("log/README", b"mine")
    head, steps = log.needed_since(0.0)
    assert head.seq == 1
    assert steps == []


def test_a_record_that_nobody_could_read_is_not_written(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    log = CheckpointLog(store)
    first = log.append(lambda head: open_record(head, "run"))
    monkeypatch.setattr("stoker.checkpoint.log._MAX_RECORD_BYTES", len(first.to_json()) + 20)
    with pytest.raises(ConfigError, match="bytes at most"):
        log.append(lambda head: open_record(head, "run" * 50, above_term=1))
    monkeypatch.undo()
    found = log.head()
    assert found is not None
    assert found.seq == 1
