"""A tiny size of ``stoker bench tiers``: every row there, every byte compared, nothing left behind, also on Ctrl-C."""

import importlib.util
import json
import os
import signal
import sysconfig
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stoker.bench import _tiers_node
from stoker.bench._tiers_content import (
    COPY,
    CRC,
    DISK_READ,
    DISK_TIER,
    DISK_WARM,
    DISK_WRITE,
    GET,
    GET_LEAN,
    INTO_DISK,
    INTO_RAM,
    NODE,
    RAM_FIRST,
    RAM_KEPT,
    SHM_READ,
    SHM_WRITE,
    STREAM,
    THROTTLED,
    UPLOAD,
    Content,
    each,
)
from stoker.bench.cli import app
from stoker.bench.frame import Report
from stoker.bench.tiers import run_tiers
from stoker.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    CorruptionError,
    StoreFull,
    UnsupportedError,
)
from stoker.storage import ObjectStore, open_store
from stoker.testing import S3Server

SIZE = (20 << 20) + 17
BARE = [COPY, CRC, SHM_WRITE, SHM_READ, DISK_WARM, DISK_READ, DISK_WRITE]
GOALS = {
    GET: 0.95,
    UPLOAD: 0.85,
    GET_LEAN: 0.95,
    RAM_FIRST: 0.9,
    RAM_KEPT: 0.95,
    DISK_TIER: 0.9,
    INTO_RAM: 0.9,
    INTO_DISK: None,
    THROTTLED: 0.97,
    NODE: 4.0,
    STREAM: 1.0,
}


@pytest.fixture
def place(s3_server: S3Server) -> Iterator[tuple[str, ObjectStore]]:
    """An empty prefix, which must be empty again at the end."""
    url = s3_server.url("stoker", uuid.uuid4().hex)
    with open_store(url, **s3_server.storage_options) as store:
        yield url, store
        assert list(store.list()) == [], "a bench leaves no object behind"


@pytest.fixture(scope="module")
def report(s3_server: S3Server, tmp_path_factory: pytest.TempPathFactory) -> Report:
    directory = tmp_path_factory.mktemp("tiers")
    bucket = f"tiers-{uuid.uuid4().hex[:8]}"  # its own, since others' unfinished uploads can't be told apart
    url = s3_server.create_bucket(bucket)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_tiers_node, "PROCESSES", 3)
        report = run_tiers(
            size_bytes=SIZE, runs=1, directory=directory, url=url, storage_options=s3_server.storage_options
        )
    assert list(directory.iterdir()) == [], "a bench leaves no file behind"
    with open_store(url, **s3_server.storage_options) as store:
        assert list(store.list()) == []
    assert s3_server.unfinished_uploads(bucket) == 0
    return report


def test_every_tier_has_its_limit_and_stoker_its_goal(report: Report) -> None:
    assert list(dict.fromkeys(row.case for row in report.rows)) == [*BARE, *GOALS]
    for case in BARE:
        assert [row.kind for row in report.rows if row.case == case] == ["limit"]
    for case, goal in GOALS.items():
        kinds = [row.kind for row in report.rows if row.case == case]
        assert kinds[:2] == ["limit", "stoker"]
        assert {row.goal_ratio for row in report.rows if row.case == case} == {goal}
        assert all(row.ratio_to_limit is not None for row in report.rows if row.case == case)


def test_every_row_compared_its_bytes_and_moved_whole_blocks(report: Report) -> None:
    assert all(row.verified for row in report.rows)
    assert {row.bytes for row in report.rows if row.case != STREAM} == {20 << 20}
    assert {row.unit for row in report.rows if row.case != STREAM} == {"GB/s"}


def test_what_is_called_cold_was_cold_and_each_tier_served_what_it_should(report: Report) -> None:
    assert {row.case for row in report.rows if row.cache == "cold"} == {DISK_READ, DISK_TIER}
    assert report.row(RAM_FIRST, "stoker TieredCache, RAM").origin == "RAM tier"
    assert report.row(RAM_KEPT, "stoker TieredCache, RAM").origin == "RAM tier"
    assert report.row(DISK_TIER, "stoker TieredCache, disk").origin == "disk tier"
    assert report.row(INTO_RAM, "stoker TieredCache, S3 into RAM").origin == "object store, kept in the RAM tier"
    assert report.row(INTO_DISK, "stoker TieredCache, S3 into disk").origin == "object store, kept in the disk tier"


def test_a_node_requests_each_block_once_and_a_stream_keeps_to_its_budget(report: Report) -> None:
    # More or fewer requests than blocks would have ended the bench.
    assert report.row(NODE, "stoker TieredCache, 3 processes").params["processes"] == 3
    stream = report.row(STREAM, "stoker TieredCache, peak RssAnon + RssShmem")
    assert stream.bytes == 8 * (20 << 20)
    assert stream.ratio_to_limit is not None and stream.ratio_to_limit <= 1
    link = report.row(THROTTLED, "the link")
    assert 0 < float(str(link.params["link_bytes_per_s"])) <= 300e6
    assert link.value == pytest.approx(float(str(link.params["link_bytes_per_s"])) / 1e9, rel=1e-6)


def test_the_best_number_of_requests_at_once_is_in_row_and_note(report: Report) -> None:
    for case in (GET, UPLOAD, INTO_RAM, INTO_DISK):
        for row in report.rows:
            if row.case == case:
                best = row.params["concurrency"]
                assert best in (1, 2, 4)
                assert any(note.startswith(f"{best} at once was the best of 1, 2") for note in row.notes)


def test_a_peer_that_is_not_installed_is_a_note(report: Report) -> None:
    if importlib.util.find_spec("s3fs") is None:
        assert [note for note in report.notes if "s3fs is not installed" in note]
    else:
        assert report.row(GET, "s3fs cat_ranges + crc32c").verified


def test_no_secret_is_in_the_report(report: Report, s3_server: S3Server) -> None:
    for text in (report.to_text(), json.dumps(report.to_json())):
        assert s3_server.storage_options["secret"] not in text


@pytest.mark.parametrize(
    ("runs_before", "place_of_error"),
    [(1, "obstore get_range"), (9, "stoker get")],  # before the limit is verified; after its first run
)
def test_an_object_that_changes_its_bytes_ends_the_benchmark(
    runs_before: int, place_of_error: str, s3_server: S3Server, place: tuple[str, ObjectStore], tmp_path: Path
) -> None:
    url, store = place
    ticks: list[int] = []

    def damage() -> None:
        ticks.append(1)
        for info in list(store.list()) if len(ticks) == runs_before else []:
            if "/read/" in info.key:
                data = bytearray(store.get(info.key))
                data[-1] ^= 1
                store.put(info.key, data)

    with pytest.raises(CorruptionError, match=f"{place_of_error}: block 1 must be the bytes that were written"):
        run_tiers(
            size_bytes=8 << 20,
            runs=1,
            directory=tmp_path,
            url=url,
            storage_options=s3_server.storage_options,
            progress=damage,
        )


def test_one_other_bit_is_found() -> None:
    content = Content(8 << 20)
    copy = bytearray(content.memory)
    content.require(memoryview(copy), "here")
    copy[5 << 20] ^= 1
    with pytest.raises(CorruptionError, match="here: block 1 must be"):
        content.require(memoryview(copy), "here")
    with pytest.raises(CorruptionError, match="here: block 0 must be"):
        content.pieces[0].require(memoryview(copy)[:-1], "here")


def test_an_interrupt_between_runs_leaves_nothing_behind(
    s3_server: S3Server, place: tuple[str, ObjectStore], tmp_path: Path
) -> None:
    url, store = place
    seen: list[int] = []

    def interrupt() -> None:
        seen.append(len(list(store.list())))
        if len(seen) == 8:  # copy, crc32c, shared memory, disk, each twice: then come the reads
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiers(
            size_bytes=8 << 20,
            runs=1,
            directory=tmp_path,
            url=url,
            storage_options=s3_server.storage_options,
            progress=interrupt,
        )
    assert seen[0] > 0
    assert list(tmp_path.iterdir()) == []
    assert list(Path(os.environ["STOKER_SHM_DIR"]).glob("bench-*")) == []


def test_ctrl_c_ends_all_threads_of_a_run() -> None:
    done: list[int] = []
    heard = threading.Event()

    def hear(*_: object) -> None:
        heard.set()
        raise KeyboardInterrupt

    def act(number: int) -> None:
        if number == 3:
            os.kill(os.getpid(), signal.SIGINT)
            assert heard.wait(60)
        done.append(number)

    before = signal.signal(signal.SIGINT, hear)
    try:
        with pytest.raises(KeyboardInterrupt):
            each(range(1_000_000), 2, act)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(done) < 1_000_000
    assert not [thread for thread in threading.enumerate() if thread.name == "stoker-bench"]


def test_a_failure_in_one_thread_ends_the_others_and_is_raised() -> None:
    done: list[int] = []

    def act(number: int) -> None:
        if number == 5:
            raise ConfigError("must not be five", value=number)
        done.append(number)

    with pytest.raises(ConfigError, match="must not be five"):
        each(range(10_000), 4, act)
    assert len(done) < 10_000


def test_what_can_not_be_measured_is_a_note_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path / "missing" / "shm"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    report = run_tiers(size_bytes=8 << 20, runs=1, directory=tmp_path)
    assert {row.case for row in report.rows} == {COPY, CRC}
    shm, disk, network = report.notes
    assert "shared memory and the RAM tier were not measured" in shm
    assert "no O_DIRECT" in disk
    assert "the network was not measured" in network and "weed" in network


def test_wrong_keys_and_a_missing_bucket_are_told_before_anything_is_measured(
    s3_server: S3Server, tmp_path: Path
) -> None:
    ticks: list[int] = []

    def run(url: str, **changed: str) -> None:
        options = {**s3_server.storage_options, **changed}
        run_tiers(
            size_bytes=8 << 20,
            runs=1,
            directory=tmp_path,
            url=url,
            storage_options=options,
            progress=lambda: ticks.append(1),
        )

    with pytest.raises(AccessDenied) as denied:
        run(s3_server.url(), secret="planted-secret")
    assert "planted-secret" not in str(denied.value)
    with pytest.raises(BucketNotFound):
        run("s3://no-such-bucket/run")
    assert ticks == [] and list(tmp_path.iterdir()) == []


def test_what_can_not_be_asked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be >= 8388608 bytes"):
        run_tiers(size_bytes=1000, runs=1, directory=tmp_path)
    with pytest.raises(StoreFull, match="must be free"):
        run_tiers(size_bytes=1 << 60, runs=1, directory=tmp_path)
    with pytest.raises(UnsupportedError, match="measures S3 only, got 'gs'"):
        run_tiers(size_bytes=8 << 20, runs=1, directory=tmp_path, url="gs://bucket")
    with pytest.raises(ConfigError, match="options of a store need its URL"):
        run_tiers(size_bytes=8 << 20, runs=1, directory=tmp_path, storage_options={"key": "k"})
    with pytest.raises(ConfigError, match="no such option in this bench, got 'requester_pays'"):
        run_tiers(size_bytes=8 << 20, runs=1, directory=tmp_path, url="s3://b", storage_options={"requester_pays": "1"})


def test_the_command_prints_one_json_object_and_keeps_the_secret(
    s3_server: S3Server, place: tuple[str, ObjectStore], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tiers_node, "PROCESSES", 2)
    arguments = ["tiers", "--size", "8MiB", "--runs", "1", "--dir", str(tmp_path), "--url", place[0], "--json"]
    for name, value in s3_server.storage_options.items():
        arguments += ["-o", f"{name}={value}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert s3_server.storage_options["secret"] not in result.output
    assert Report.from_json(json.loads(result.stdout)).row(GET, "stoker get + crc32c").verified
    assert list(tmp_path.iterdir()) == []
