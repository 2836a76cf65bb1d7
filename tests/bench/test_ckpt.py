"""A tiny size of ``stoker bench ckpt``: every row there, every byte compared, nothing left behind."""

import json
import os
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from stoker.bench.ckpt import DURABLE, RESTORE, STALL, check_equal, run_ckpt
from stoker.bench.cli import app
from stoker.bench.frame import Report
from stoker.errors import ConfigError, CorruptionError, StoreFull, UnsupportedError

PEERS = {"torch DCP", "torch DCP async", "safetensors"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    directory = tmp_path_factory.mktemp("ckpt")
    report = run_ckpt(size_bytes=(6 << 20) + 17, runs=2, directory=directory)
    assert list(directory.iterdir()) == [], "a bench leaves no file behind"
    return report


def test_every_case_has_its_limit_stoker_and_all_peers(report: Report) -> None:
    limits = {STALL: "copy_ into views", DURABLE: "O_DIRECT write + fsync", RESTORE: "O_DIRECT read"}
    for case, limit in limits.items():
        rows = [row for row in report.rows if row.case == case]
        assert {row.variant for row in rows} == {limit, "stoker"} | PEERS
        assert report.row(case, limit).ratio_to_limit == 1.0
        assert set(report.row(case, "stoker").ratio_to) == PEERS
    assert report.notes == ()


def test_every_row_compared_its_bytes_and_restores_were_cold(report: Report) -> None:
    assert all(row.verified for row in report.rows)
    assert {row.cache for row in report.rows if row.case == RESTORE} == {"cold"}
    assert {row.bytes for row in report.rows} == {6 << 20}
    assert {(row.runs, len(row.warmup)) for row in report.rows} == {(2, 1)}


def test_the_goals_of_the_straight_path_stand_in_the_rows(report: Report) -> None:
    goals = {row.case: (row.goal_ratio, row.better) for row in report.rows}
    assert goals == {STALL: (1.3, "lower"), DURABLE: (0.8, "higher"), RESTORE: (0.75, "higher")}


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
    with pytest.raises((ConfigError, StoreFull), match="fit into the available memory five times|must be free"):
        run_ckpt(size_bytes=memory // 4, runs=1, directory=tmp_path)


def test_without_o_direct_there_is_no_limit_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    with pytest.raises(UnsupportedError, match="needs a file system with O_DIRECT"):
        run_ckpt(size_bytes=1 << 20, runs=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_one_json_object_and_nothing_else(tmp_path: Path) -> None:
    arguments = ["ckpt", "--size", "1MiB", "--runs", "1", "--dir", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    report = Report.from_json(json.loads(result.stdout))
    assert report.row(RESTORE, "stoker").verified
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_a_table_for_people(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ckpt", "--size", "1MiB", "--runs", "1", "--dir", str(tmp_path)])
    assert result.exit_code == 0, result.output
    assert "durable save, GB/s, goal: at least 0.8 of the limit" in result.stdout


def test_a_directory_that_is_not_there_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["ckpt", "--dir", str(tmp_path / "missing")])
    assert isinstance(result.exception, ConfigError)
    assert "must be an existing directory" in str(result.exception)
