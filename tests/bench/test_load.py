"""The load benchmark, at a size that says nothing about speed: every loader is right, and a wrong one is told."""

import json
import os
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from stoker.bench import _load_memory, _load_open, _load_stall, _load_step, peers
from stoker.bench._load_cold import FIRST, STREAMS
from stoker.bench._load_memory import MEMORY
from stoker.bench._load_open import KINDS, OPEN, OPEN_MEMORY, RESUME, STATE
from stoker.bench._load_packed import BEST_FIT
from stoker.bench._load_stall import STALL
from stoker.bench._load_step import SLOWED, STEP
from stoker.bench._load_store import Fetch, ServedSet
from stoker.bench._load_stream import SEQ_LEN, Stream
from stoker.bench._load_warm import MIXED, WARM
from stoker.bench.cli import app
from stoker.bench.frame import Report
from stoker.bench.load import DEFAULT_PARTS, PARTS, run_load
from stoker.errors import ConfigError, CorruptionError, StoreError
from stoker.storage._checksums import crc32c
from stoker.testing import S3Server

SMALL = 4 << 20
LIMIT = "numpy take(out=), two widened outputs"
HERE = ["nanoGPT memmap", "Megatron-style map data set"]
ELSEWHERE = ["LitData", "MosaicML Streaming", "HF datasets"]


def run(tmp_path: Path, *only: str, **options: Any) -> Report:
    report = run_load(size_bytes=SMALL, runs=1, warmup=0, directory=tmp_path, only=only, **options)
    assert list(tmp_path.iterdir()) == [], "a bench leaves no file behind"
    assert list(Path(os.environ["STOKER_SHM_DIR"]).glob("bench-*")) == []
    assert report.machine["cores"]
    return report


def require_goal(report: Report, case: str, goal: float, *, better: str = "lower") -> None:
    """A limit, then stoker, both verified, with this goal, held or missed."""
    rows = [row for row in report.rows if row.case == case]
    assert [row.kind for row in rows] == ["limit", "stoker"]
    assert all(row.verified and row.goal_ratio == goal and row.better == better for row in rows)
    assert rows[1].holds in (True, False)
    assert rows[0].holds is None


def test_every_warm_loader_is_verified_and_set_against_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: False)
    report = run(tmp_path, "warm")
    absent = [note for note in report.notes if "not installed" in note]
    assert [note.partition(" was not measured")[0] for note in absent] == 2 * ELSEWHERE
    assert len(absent) == len(report.notes)
    for dtype in ("uint16", "uint32"):
        for case, ours, compared in (
            (WARM, "stoker TokenLoader", HERE),
            (MIXED, "stoker TokenLoader, two sources", []),
        ):
            rows = [row for row in report.rows if row.case == f"{case}, {dtype}"]
            assert [row.variant for row in rows] == [LIMIT, ours, *compared]
            assert rows[1].ratio_to.keys() == set(compared)
            goals = (rows[1].goal_ratio, rows[1].goal_peer_ratio)
            assert goals == ((0.7, 3.0) if case == WARM else (None, None))
            for row in rows:
                assert row.verified
                assert row.cache == "warm"
                assert row.unit == "tokens/s"
                assert row.ratio_to_limit is not None
                assert row.cpu_s_per_gtoken is not None and row.cpu_s_per_gtoken > 0


def test_packed_batches_have_a_rate_for_their_goal(tmp_path: Path) -> None:
    report = run(tmp_path, "packed")
    for dtype in ("uint16", "uint32"):
        limit, ours = (row for row in report.rows if row.case == f"{BEST_FIT}, {dtype}")
        assert (limit.kind, ours.kind) == ("limit", "stoker")
        assert ours.goal_value == 100e6
        assert ours.holds == (ours.value >= 100e6)
        assert int(str(ours.params["mean_document_tokens"])) >= 500
        assert limit.verified and ours.verified and ours.cpu_s_per_gtoken


def test_a_cold_stream_and_a_first_batch_are_measured_from_a_real_server(tmp_path: Path) -> None:
    report = run(tmp_path, "cold")
    for stream in STREAMS:
        require_goal(report, stream, 0.9, better="higher")
        ours = report.row(stream, "stoker TokenLoader, S3")
        assert "no tier holds a block when a run begins" in ours.notes[0]
        assert ours.origin == "object store, kept in the RAM tier"
    require_goal(report, FIRST, 1.3)
    assert all(row.cpu_s_per_gtoken for row in report.rows if row.case in STREAMS)
    # Manifest and tables, and the blocks of 16 samples.
    assert 3 <= int(str(report.row(stream, "bare GET + crc32c + write").params["first_requests"])) <= 24


def test_a_stall_is_what_the_store_costs_and_not_the_gather(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load_stall, "LINK_BYTES_PER_S", 100e6)
    monkeypatch.setattr(_load_stall, "WINDOWS", 2)
    report = run(tmp_path, "stall")
    require_goal(report, STALL, 1.0)
    assert report.row(STALL, "0.5 %").value == 0.5
    ours = report.row(STALL, "stoker TokenLoader, S3")
    assert float(str(ours.params["ram_bytes"])) < 1.3 * float(str(ours.params["window_bytes"]))
    assert ours.cpu_s_per_gtoken is not None


def test_resumes_states_and_openings_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load_open, "SHARDS", 12)
    monkeypatch.setattr(_load_open, "SHARD_BLOCKS", 1)
    report = run(tmp_path, "open")
    for kind in KINDS:
        require_goal(report, f"{RESUME}, {kind}", 1.2)
        require_goal(report, f"{STATE}, {kind}", 1.0)
    require_goal(report, OPEN, 1.2)
    require_goal(report, OPEN_MEMORY, 1.0)
    small, large = (row for row in report.rows if row.case == OPEN)
    assert "4 shards" in small.variant and "12 shards" in large.variant


def test_a_step_is_paired_with_one_on_a_resident_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load_step, "THREES", 2)
    report = run(tmp_path, "step")
    require_goal(report, SLOWED, 1.0)
    assert report.row(SLOWED, "one resident batch").value >= 1.02
    ours = report.row(STEP, "stoker TokenLoader")
    assert ours.verified and ours.unit == "s" and ours.holds is None and ours.cpu_s_per_gtoken


def test_memory_is_measured_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_load_memory, "BATCHES", 2000)
    report = run(tmp_path, "memory")
    require_goal(report, MEMORY, 1.0)
    assert report.row(MEMORY, "16 MiB").value == 16
    assert report.row(MEMORY, "stoker TokenLoader").cpu_s_per_gtoken


def test_a_process_that_fails_ends_the_benchmark(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="(?s)the loading process must end well, got .*FileNotFoundError"):
        _load_memory._in_a_process(tmp_path / "missing", 10)
    with pytest.raises(StoreError, match="(?s)the opening process must end well, got .*KeyNotFound"):
        _load_open._Opening(tmp_path, 1).run()


def test_all_parts_but_memory_run_unasked_and_no_other_part_is_known(tmp_path: Path) -> None:
    assert (*DEFAULT_PARTS, "memory") == PARTS
    for only in (["hot"], []):
        with pytest.raises(ConfigError, match="a part is one of warm, packed, cold, open, stall, step, memory"):
            run_load(size_bytes=SMALL, runs=1, directory=tmp_path, only=only)


def test_what_can_not_be_measured_is_a_note_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tmp_path))
        patch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
        report = run_load(size_bytes=SMALL, runs=1, directory=tmp_path, only=["cold", "stall"])
    assert report.rows == ()
    cold, stall = report.notes
    assert cold.startswith("the cold part was not measured") and "weed" in cold
    assert stall.startswith("the stall was not measured") and "weed" in stall
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path / "missing" / "shm"))
    cold, stall = run_load(size_bytes=SMALL, runs=1, directory=tmp_path, only=["cold", "stall"]).notes
    assert "missing" in cold and "missing" in stall
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_token_is_found() -> None:
    stream = Stream(4 * SEQ_LEN, "uint16")
    first = np.array([5, SEQ_LEN])
    rows = np.stack([stream.tokens[a : a + SEQ_LEN + 1].astype(np.int64) for a in first.tolist()])
    stream.require(first, rows[:, :-1], rows[:, 1:], place="here")
    rows[1, -1] ^= 1
    with pytest.raises(CorruptionError, match=f"here: labels of row 1 must be the tokens from {SEQ_LEN} on"):
        stream.require(first, rows[:, :-1], rows[:, 1:], place="here")


def test_a_limit_asks_for_what_stoker_asked_for_and_checks_it(tmp_path: Path, s3_server: S3Server) -> None:
    from stoker.storage import open_store

    url = s3_server.url("stoker", f"bench-{os.urandom(4).hex()}")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "0").write_bytes(b"0123456789")
    with open_store(url, **s3_server.storage_options) as store:
        store.put("data/0", b"0123456789")
        served = ServedSet(Stream(SEQ_LEN, "uint16"), tmp_path, url, s3_server.storage_options)

        def read(options: Any) -> None:
            with open_store(url, **options) as other:
                other.get("data/0", 2, 5)
                other.get("data/0", 2, 5)
                other.get("data/0")

        part, whole = served.fetches(read)
        assert part == Fetch("data/0", 2, 5, crc32c(b"234"))
        assert whole == Fetch("data/0", 0, 10, crc32c(b"0123456789"))
        client = served.client()
        part.require(served.get(client, part), "here")
        with pytest.raises(CorruptionError, match=r"here: data/0 \[2, 5\) must be what was written"):
            part.require(b"235", "here")
        store.delete("data/0")


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be >= 4194304 bytes, 32 batches, got 4194303"):
        run_load(size_bytes=SMALL - 1, runs=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_one_json_object_that_can_be_rendered(tmp_path: Path) -> None:
    arguments = ["load", "--only", "packed", "--size", "4MiB", "--runs", "1", "--dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {row["holds"] for row in found["rows"]} <= {True, False, None}
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "load.json").write_text(result.stdout)
    rendered = CliRunner().invoke(app, ["report", str(tmp_path / "load.json")])
    assert rendered.exit_code == 0, rendered.output
    lines = [line for line in rendered.stdout.splitlines() if line.startswith("| best_fit")]
    assert len(lines) == len(found["rows"])
    assert all(line.count("|") == rendered.stdout.splitlines()[0].count("|") for line in lines)
    assert "| at least 100 Mtokens/s |" in lines[1]
    both = CliRunner().invoke(app, ["report", *2 * [str(tmp_path / "load.json")], "--json"])
    assert len(json.loads(both.stdout)["rows"]) == 2 * len(found["rows"])


def test_what_is_no_report_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no JSON")
    for path in (tmp_path / "text", tmp_path / "missing"):
        result = CliRunner().invoke(app, ["report", str(path)])
        assert isinstance(result.exception, ConfigError)
        assert "must be a report that a bench printed with --json" in str(result.exception)
