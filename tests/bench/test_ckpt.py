"""A tiny size of ``stoker bench ckpt``: every row there, every byte compared, nothing left behind."""

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stoker.bench._ckpt_first import FIRST, PREWARMED
from stoker.bench._ckpt_scale import MEMORY, MERGE, PLAN, PLAN_BY_HASH, run_scale
from stoker.bench._ckpt_training import BEYOND, LOST, STEP, WRITING_CPU, WRITING_WALL
from stoker.bench._ckpt_upload import UPLOAD
from stoker.bench.ckpt import DURABLE, FROM_STAGED, RESTORE, STALL, WARM, _in_turns, check_equal, run_ckpt
from stoker.bench.cli import app
from stoker.bench.frame import Report, Sample, Variant
from stoker.errors import ConfigError, CorruptionError, StoreFull, UnsupportedError

MIB = 1 << 20
ASYNC = {"torch DCP async", "torch DCP async, default"}
if find_spec("torch_checkpointing"):
    ASYNC |= {"torch_checkpointing"}
PEERS = {"torch DCP", "safetensors", "torch.save"} | ASYNC


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    directory = tmp_path_factory.mktemp("ckpt")
    report = run_ckpt(size_bytes=(6 << 20) + 17, runs=1, directory=directory)
    assert list(directory.iterdir()) == [], "a bench leaves no file behind"
    return report


def test_every_case_has_its_limit_stoker_and_all_peers(report: Report) -> None:
    limits = {STALL: "copy_ into views", DURABLE: "O_DIRECT write + fsync", RESTORE: "O_DIRECT read"}
    limits |= {FROM_STAGED: "O_DIRECT write + fsync", WARM: "O_DIRECT read"}
    peers = {FROM_STAGED: ASYNC, WARM: set()}
    for case, limit in limits.items():
        rows = [row for row in report.rows if row.case == case]
        assert {row.variant for row in rows} == {limit, "stoker"} | peers.get(case, PEERS)
        assert report.row(case, limit).ratio_to_limit == 1.0
        assert set(report.row(case, "stoker").ratio_to) == peers.get(case, PEERS)
    left_out = [] if "torch_checkpointing" in PEERS else ["torch_checkpointing was not measured"]
    assert [note.partition(":")[0] for note in report.notes] == left_out


def test_every_row_compared_its_bytes_and_restores_were_cold(report: Report) -> None:
    assert all(row.verified for row in report.rows)
    assert {row.cache for row in report.rows if row.case == RESTORE} == {"cold"}
    assert report.row(WARM, "stoker").cache == "warm" and report.row(WARM, "stoker").origin == "arena"
    assert {row.bytes for row in report.rows} == {6 << 20}
    assert {(row.runs, len(row.warmup)) for row in report.rows} == {(1, 1)}


def test_the_goals_stand_in_the_rows(report: Report) -> None:
    goals = {row.case: (row.goal_ratio, row.better) for row in report.rows}
    assert goals == {
        STALL: (1.3, "lower"),
        DURABLE: (0.85, "higher"),
        FROM_STAGED: (0.9, "higher"),
        RESTORE: (0.85, "higher"),
        WARM: (3 * 0.85, "higher"),
    }


def test_small_tensors_uploads_and_training_are_parts_of_their_own(tmp_path: Path) -> None:
    report = run_ckpt(
        size_bytes=MIB, runs=1, warmup=0, directory=tmp_path, only=["training", "tiny", "first", "upload"]
    )
    cases = {row.case: row for row in report.rows if row.kind == "stoker"}
    assert set(cases) == {f"{name}, 52 x 20 kB" for name in (STALL, DURABLE, FROM_STAGED, RESTORE, WARM)} | {
        *(FIRST, PREWARMED, UPLOAD, STEP, LOST, BEYOND, WRITING_CPU, WRITING_WALL)
    }
    assert cases[f"{STALL}, 52 x 20 kB"].goal_ratio is None
    limits = {"bare concurrent put", "the loop alone", "first touch and copy"}
    assert limits <= {row.variant for row in report.rows}
    assert set(cases[LOST].ratio_to) == {"torch DCP async"} and cases[LOST].goal_peer_ratio == 1.0
    assert (cases[BEYOND].goal_value, cases[PREWARMED].goal_value, cases[FIRST].goal_ratio) == (1.02, 2.0, 1.1)
    assert all(row.verified for row in report.rows)
    assert list(tmp_path.iterdir()) == []


def test_plans_and_merges_are_measured_without_data(tmp_path: Path) -> None:
    report = run_scale(runs=1, directory=tmp_path, num_ranks=4, num_chunks=1000, num_tensors=20)
    assert {row.case for row in report.rows} | {MEMORY} == {MERGE, MEMORY, PLAN, PLAN_BY_HASH}
    assert report.row(MERGE, "stoker").params["chunks"] == 1000
    goals = {row.case: row.goal_value for row in report.rows}
    assert goals.items() <= {MERGE: 2.0, MEMORY: 300.0, PLAN: 1.0, PLAN_BY_HASH: 0.05}.items()
    assert list(tmp_path.iterdir()) == []


def test_a_part_that_there_is_not_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a part is one of large, small"):
        run_ckpt(size_bytes=MIB, runs=1, directory=tmp_path, only=["huge"])


def test_one_other_bit_is_found_and_nan_equals_itself() -> None:
    saved = {"w": torch.full((4,), float("nan"))}
    found = {"w": saved["w"].clone()}
    check_equal(saved, found, place="here")
    found["w"].view(torch.int32)[3] ^= 1
    with pytest.raises(CorruptionError, match="here: w must come back bit for bit"):
        check_equal(saved, found, place="here")
    with pytest.raises(CorruptionError, match="must hold the tensors"):
        check_equal(saved, {}, place="here")


def test_a_state_that_is_too_small_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be >= 1 MiB, got 1000"):
        run_ckpt(size_bytes=1000, runs=1, directory=tmp_path)


def test_a_state_that_disk_or_memory_can_not_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreFull, match=r"\.\d .iB must be free, got"):
        run_ckpt(size_bytes=1 << 60, runs=1, directory=tmp_path)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with pytest.raises((ConfigError, StoreFull), match="fit into the available memory 8 times|must be free"):
        run_ckpt(size_bytes=memory // 4, runs=1, directory=tmp_path)


def test_without_o_direct_there_is_no_limit_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.raises(UnsupportedError, match="needs a file system with O_DIRECT"):
        run_ckpt(size_bytes=1 << 20, runs=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_one_json_object_and_nothing_else(tmp_path: Path) -> None:
    arguments = ["ckpt", "--only", "large", "--size", "1MiB", "--runs", "1", "--dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = Report.from_json(json.loads(result.stdout))
    assert report.row(RESTORE, "stoker").verified
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_table_for_people(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        app, ["ckpt", "--only", "large", "--size", "1MiB", "--runs", "1", "--dir", str(tmp_path)]
    )
    assert result.exit_code == 0, result.output
    assert "durable save, GB/s, goal: at least 0.85 of the limit" in result.stdout


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ckpt", "--dir", str(tmp_path / "missing")])
    assert isinstance(result.exception, ConfigError)
    assert "must be an existing directory" in str(result.exception)


def test_limits_and_stoker_take_turns_and_the_middle_one_counts() -> None:
    order: list[str] = []
    values = {"limit": iter([1.0, 9.0, 2.0]), "stoker": iter([3.0, 4.0, 50.0])}

    def variant(name: str, *, verified: bool) -> Variant:
        def run() -> dict[str, float | Sample]:
            order.append(name)
            return {"case": Sample(value=next(values[name]), verified=verified or len(order) > 4)}

        return Variant(name=name, kind="peer", run=run)

    first, second = _in_turns([variant("limit", verified=True), variant("stoker", verified=False)])
    assert first.run() == {"case": Sample(value=2.0, verified=True)}
    assert second.run() == {"case": Sample(value=4.0, verified=False)}
    assert order == ["limit", "stoker"] * 3
