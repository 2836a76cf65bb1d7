"""Some bits at each run of the suite; `make prove` flips every one."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from stoker.checkpoint import verify as verify_module
from tests.faults.flipping import UNUSED, files_of, flip_bits, save_small


def test_a_flipped_bit_is_named_by_verify_and_by_restore_where_it_uses_the_byte(memory: Path) -> None:
    report = flip_bits(memory, num_flips=150)
    assert report.ok, report
    kinds = {"record", "old record", "manifest", "fragment", "state", "blob"}
    assert report.told_by_verify.keys() == kinds
    assert report.told_by_restore.keys() == kinds - UNUSED and report.unused_by_restore.keys() == UNUSED


def test_every_file_of_the_newest_step_is_among_those_that_are_flipped(tmp_path: Path) -> None:
    save_small(tmp_path)
    older = set(tmp_path.glob("step-000000000001-*/**/*"))
    assert files_of(tmp_path).keys() == {path for path in tmp_path.rglob("*") if path.is_file()} - older


def test_a_verify_that_skips_fragments_is_caught(memory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_module, "Fragment", SimpleNamespace(from_bytes=lambda data, place: None))
    report = flip_bits(memory, num_flips=30)
    assert any("frag/" in violation and "verify says nothing" in violation for violation in report.violations)
