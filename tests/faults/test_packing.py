"""A few kills of the packing process at each run of the suite, and proof that its check sees what must not be."""

import json
from pathlib import Path

import pytest

from stoker.testing.kill import Death
from tests.faults.packing import Check, files_in, write_set
from tests.faults.prove import prove


def death(acknowledged: int = -1) -> Death:
    return Death(number=0, killed=True, in_flight=True, acknowledged=acknowledged, passes=0, moment="by hand")


@pytest.fixture
def check(tmp_path: Path) -> Check:
    return Check(tmp_path / "reference")


def test_a_packing_process_that_is_killed_at_random_tears_nothing(memory: Path) -> None:
    report = prove("packing", "moments", 25, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


def test_a_packing_process_that_is_killed_between_calls_tears_nothing(memory: Path) -> None:
    report = prove("packing", "calls", 25, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


def test_a_whole_set_passes_the_check_and_older_ones_are_removed(check: Check, tmp_path: Path) -> None:
    write_set(tmp_path / "work" / "set-00000000")
    write_set(tmp_path / "work" / "set-00000001")
    check(tmp_path / "work", death(acknowledged=1))
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["set-00000001"]


def test_every_file_of_a_set_with_a_manifest_counts(check: Check, tmp_path: Path) -> None:
    root = tmp_path / "work" / "set-00000000"
    write_set(root)
    for name, data in files_in(root).items():
        (root / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(AssertionError, match=f"{name} differs"):
            check(tmp_path / "work", death())
        (root / name).unlink()
        if name != "manifest.json":
            with pytest.raises(AssertionError, match=f"lacks {name}"):
                check(tmp_path / "work", death())
        (root / name).write_bytes(data)
    check(tmp_path / "work", death())


def test_a_set_that_opens_without_a_manifest_file_would_be_seen(check: Check, tmp_path: Path) -> None:
    root = tmp_path / "work" / "set-00000000"
    write_set(root)
    check(tmp_path / "work", death())
    (root / "manifest.json").unlink()
    with pytest.raises(AssertionError, match="was finished and is not any more"):
        check(tmp_path / "work", death())


def test_an_acknowledged_set_must_be_there(check: Check, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    with pytest.raises(AssertionError, match="set 0 was acknowledged and is not there"):
        check(tmp_path / "work", death(acknowledged=0))


def test_notes_of_a_killed_writer_may_stay_only_in_the_newest_set(check: Check, tmp_path: Path) -> None:
    root = tmp_path / "work" / "set-00000000"
    write_set(root)
    (root / "progress").mkdir()
    (root / "progress" / "00000000.json").write_text(json.dumps({}))
    check(tmp_path / "work", death())
    write_set(tmp_path / "work" / "set-00000001")
    with pytest.raises(AssertionError, match="keeps"):
        check(tmp_path / "work", death())
