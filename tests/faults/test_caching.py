"""A few kills of processes that share a cache at each run of the suite, and proof that its check sees what must not be."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.storage.local import LocalStore
from stoker.testing.kill import Death
from tests.faults.caching import CAPACITY, Check, blocks, open_cache, read
from tests.faults.prove import prove


def death(number: int = 1, killed: bool = True) -> Death:
    return Death(number=number, killed=killed, in_flight=True, acknowledged=-1, passes=0, moment="by hand")


@pytest.fixture
def check(tmp_path: Path) -> Iterator[Check]:
    check = Check(tmp_path)
    yield check
    check.close()


@pytest.fixture
def work(tmp_path: Path, check: Check) -> Path:
    """A directory as a job leaves it that was not killed: the tiers of both caches are full."""
    for eviction in ("plan", "sieve"):
        with open_cache(tmp_path / "work", eviction) as cache:
            read(cache, LocalStore(tmp_path / "origin"), blocks())
    return tmp_path / "work"


def test_processes_that_fill_and_evict_are_killed_at_random_and_nothing_is_wrong(memory: Path) -> None:
    report = prove("caching", "moments", 20, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


def test_processes_that_fill_and_evict_are_killed_between_calls_and_nothing_is_wrong(memory: Path) -> None:
    report = prove("caching", "calls", 20, directory=memory, seed=1, min_in_flight=0.25)
    assert report.ok, report


@pytest.mark.parametrize("number", [0, 1, 2])
def test_whole_tiers_pass_the_check(work: Path, check: Check, number: int) -> None:
    check(work, death(number))
    check(work, death(killed=False))


def test_a_flipped_bit_under_a_name_is_seen(work: Path, check: Check) -> None:
    path = next(work.glob("sieve/disk/blocks/*/*"))
    data = bytearray(path.read_bytes())
    data[4096] ^= 1
    path.write_bytes(data)
    with pytest.raises(AssertionError, match="is torn"):
        check(work, death())


def test_bytes_beyond_the_capacity_are_seen(work: Path, check: Check) -> None:
    (work / "plan" / "ram" / "tmp" / f"1-{'0' * 16}").write_bytes(bytes(CAPACITY["ram"]))
    with pytest.raises(AssertionError, match="bytes are in the ram tier"):
        check(work, death())


def test_a_block_that_nobody_counts_is_seen_beside_a_process_that_lives(work: Path, check: Check) -> None:
    check(work, death(2))
    files = sorted(work.glob("plan/disk/blocks/*/*"))
    (work / "plan" / "disk" / "lock").write_bytes((work / "sieve" / "ram" / "lock").read_bytes()[:16] + bytes(8))
    assert files
    with pytest.raises(AssertionError, match="0 bytes are counted where"):
        check(work, death(3))


def test_what_a_process_of_the_job_saw_is_told(work: Path, check: Check) -> None:
    (work / "wrong-123").write_text("AssertionError: wrong bytes for [0, 1)")
    with pytest.raises(AssertionError, match=r"wrong bytes for \[0, 1\)"):
        check(work, death())


def test_a_leftover_that_stays_is_seen(work: Path, check: Check, tmp_path: Path) -> None:
    left = work / "plan" / "ram" / "tmp" / f"4096-{'0' * 16}"
    left.write_bytes(bytes(10))
    check(work, death())  # nobody holds it: the check's own cache has removed it
    assert not left.exists()
    left.mkdir()
    with pytest.raises(AssertionError, match="of dead processes is left"):
        check(work, death())
