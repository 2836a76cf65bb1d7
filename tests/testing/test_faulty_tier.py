"""The faulty directory: each fault strikes what it says, nothing else, and leaves no trace after its block."""

import errno
import fcntl
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stoker.errors import ConfigError
from stoker.storage._locks import try_lock
from stoker.testing import FaultyTier, TierCrash, TierFault


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "tier" / "blocks").mkdir(parents=True)
    (tmp_path / "tier" / "blocks" / "one").write_bytes(b"0123456789")
    return tmp_path / "tier"


@pytest.fixture
def tier(place: Path) -> Iterator[FaultyTier]:
    with FaultyTier(place, seed=1) as tier:
        yield tier


def read(path: Path) -> bytes:
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, 100, 0)
    finally:
        os.close(fd)


def write(path: Path, data: bytes = b"new") -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT)
    try:
        os.pwrite(fd, data, 0)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("kind", "number"), [("full", errno.ENOSPC), ("read_only", errno.EROFS)])
def test_a_device_that_takes_nothing_is_read_and_not_written(
    tier: FaultyTier, place: Path, tmp_path: Path, kind: Any, number: int
) -> None:
    rule = tier.add(TierFault(kind))
    with pytest.raises(OSError) as caught:
        write(place / "two")
    assert caught.value.errno == number
    assert read(place / "blocks" / "one") == b"0123456789"
    write(tmp_path / "elsewhere")
    assert (rule.hits, rule.seen) == (1, 1)
    rule.remove()
    rule.remove()
    write(place / "two")


def test_a_small_device_is_full_when_its_space_is_taken(tier: FaultyTier, place: Path) -> None:
    tier.add(TierFault("full", capacity_bytes=100_000))
    fd = os.open(place / "two", os.O_RDWR | os.O_CREAT)
    try:
        os.posix_fallocate(fd, 0, 60_000)
        os.pwrite(fd, bytes(60_000), 0)  # takes no more
        with pytest.raises(OSError, match="No space left"):
            os.pwrite(fd, bytes(60_000), 61_440)
        with pytest.raises(OSError, match="No space left"):
            os.ftruncate(fd, 200_000)
        (place / "blocks" / "one").unlink()
        os.posix_fallocate(fd, 0, 90_000)
    finally:
        os.close(fd)


def test_an_io_error_strikes_the_calls_it_is_for(tier: FaultyTier, place: Path) -> None:
    rule = tier.add(TierFault("error"), calls=("read",), path="blocks/")
    with pytest.raises(OSError, match="Input/output error"):
        read(place / "blocks" / "one")
    write(place / "blocks" / "one")
    rule.remove()
    tier.add(TierFault("error"), calls=("write",), path=re.compile(r"one$"))
    assert read(place / "blocks" / "one") == b"new3456789"
    write(place / "blocks" / "two")
    blocks = os.open(place / "blocks", os.O_RDONLY)
    try:
        with pytest.raises(OSError, match="Input/output error"):
            os.unlink("one", dir_fd=blocks)
    finally:
        os.close(blocks)


def test_a_flipped_bit_is_in_the_file_from_its_next_opening_on(tier: FaultyTier, place: Path) -> None:
    path = place / "blocks" / "one"
    before = path.stat().st_mtime_ns
    rule = tier.add(TierFault("flip", at_byte=3), times=1)
    found = read(path)
    assert [number for number in range(10) if found[number] != b"0123456789"[number]] == [3]
    assert (found[3] ^ b"3"[0]).bit_count() == 1
    assert read(path) == found and rule.hits == 1
    assert path.stat().st_mtime_ns > before
    tier.add(TierFault("flip", at_byte=1000), times=1)
    assert read(path)[9] != b"9"[0]


def test_a_delay_holds_the_call_back(tier: FaultyTier, place: Path) -> None:
    tier.add(TierFault("delay", delay_s=0.02), calls=("read",), times=2)
    began = time.monotonic()
    assert read(place / "blocks" / "one") == b"0123456789"
    assert time.monotonic() - began >= 0.04


def test_locks_fail_or_are_granted_to_everybody(tier: FaultyTier, place: Path) -> None:
    one, two = (os.open(place / "lock", os.O_RDWR | os.O_CREAT) for _ in range(2))
    try:
        assert try_lock(one, 0)
        assert not try_lock(two, 0)
        rule = tier.add(TierFault("false_locks"))
        assert try_lock(two, 0)
        rule.remove()
        assert not try_lock(two, 0)
        tier.add(TierFault("no_locks"))
        with pytest.raises(OSError) as caught:
            try_lock(two, 0)
        assert caught.value.errno == errno.ENOLCK
    finally:
        os.close(one)
        os.close(two)


def test_a_directory_vanishes_before_the_call(tier: FaultyTier, place: Path) -> None:
    tier.add(TierFault("vanish"), after=1)
    fd = os.open(place / "blocks" / "one", os.O_RDONLY)
    try:
        assert os.pread(fd, 100, 0) == b"0123456789"  # who has it open keeps it
        assert not place.exists()
    finally:
        os.close(fd)


def test_after_a_crash_no_call_does_anything_until_all_is_cleared(tier: FaultyTier, place: Path) -> None:
    tier.add(TierFault("crash"), after=2)
    write(place / "two")
    for act in (lambda: write(place / "three"), lambda: read(place / "two"), lambda: os.unlink(place / "two")):
        with pytest.raises(TierCrash):
            act()
    tier.clear()
    assert sorted(os.listdir(place)) == ["blocks", "two"]
    write(place / "three")


def test_the_seed_decides_which_calls_are_hit(place: Path) -> None:
    def hit(seed: int) -> list[bool]:
        found = []
        with FaultyTier(place, seed=seed) as tier:
            tier.add(TierFault("error"), calls=("read",), probability=0.5)
            for _ in range(30):
                try:
                    os.close(os.open(place / "blocks" / "one", os.O_RDONLY))
                    found.append(False)
                except OSError:
                    found.append(True)
        return found

    assert hit(1) == hit(1) != hit(2)
    assert {*hit(1)} == {True, False}


def test_rules_are_asked_in_order_and_count(tier: FaultyTier, place: Path) -> None:
    first = tier.add(TierFault("error"), calls=("read",), times=1, after=1)
    second = tier.add(TierFault("read_only"))
    for expected in (None, errno.EIO, None):
        try:
            os.close(os.open(place / "blocks" / "one", os.O_RDONLY))
            assert expected is None
        except OSError as error:
            assert error.errno == expected
    assert (first.seen, first.hits, second.seen) == (3, 1, 0)


def test_a_forked_child_meets_the_same_faults(tier: FaultyTier, place: Path) -> None:
    tier.add(TierFault("read_only"))
    pid = os.fork()
    if not pid:
        try:
            write(place / "two")
            os._exit(1)
        except OSError as error:
            os._exit(0 if error.errno == errno.EROFS else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_after_the_block_every_function_is_what_it_was(place: Path) -> None:
    before = {name: getattr(os, name) for name in dir(os)}
    lock = fcntl.fcntl
    with FaultyTier(place) as outer, FaultyTier(place / "blocks") as inner:
        outer.add(TierFault("full"))
        inner.add(TierFault("error"))
        assert os.open is not before["open"]
    assert {name: getattr(os, name) for name in dir(os)} == before
    assert fcntl.fcntl is lock


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kind": "melted"}, "kind must be one of full, error"),
        ({"kind": "delay"}, "needs delay_s"),
        ({"kind": "delay", "delay_s": -1.0}, "delay_s must be >= 0"),
        ({"kind": "full", "at_byte": 1}, "takes no at_byte"),
    ],
)
def test_a_fault_that_is_none_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        TierFault(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"times": 0}, "times must be >= 1"),
        ({"after": -1}, "after must be >= 0"),
        ({"probability": 1.5}, "probability must be in"),
        ({"calls": ("lock",)}, "a 'full' fault can't meet these calls, got 'lock'"),
    ],
)
def test_a_rule_that_is_none_is_refused(tier: FaultyTier, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tier.add(TierFault("full"), **arguments)
