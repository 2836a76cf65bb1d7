"""The small parts that everything else stands on: sizes, names, coverage, locks, errors of the file system."""

import errno
import math
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import (
    AccessDenied,
    AlreadyExists,
    ConfigError,
    DeadlineExceeded,
    KeyNotFound,
    StoreError,
    StoreFull,
    StoreUnavailable,
)
from stoker.storage._checksums import crc32c, crc32c_blocks
from stoker.storage._coverage import Coverage
from stoker.storage._locks import lock, try_lock, unlock
from stoker.storage._posix import translate_os_errors
from stoker.storage._units import format_bytes, parse_bytes
from stoker.storage.store import is_key, redact_url

# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["", "much", "-1", "1 parsec", "1e9", "0x10", "1GiB2", "GiB", -1])
def test_what_is_no_size_is_refused(size: int | str) -> None:
    with pytest.raises(ConfigError, match="here"):
        parse_bytes(size, place="here")


@pytest.mark.parametrize(
    "size", [1.5e9, math.nan, math.inf, True, None, b"1GiB", [1], 2**63, 10**100, "99999999PiB", "9" * 100]
)
def test_what_no_machine_can_hold_or_is_neither_text_nor_integer_is_no_size(size: Any) -> None:
    with pytest.raises(ConfigError, match=r"here: a size .*hint"):
        parse_bytes(size, place="here")


def test_the_largest_size_is_exact() -> None:
    assert parse_bytes(2**63 - 1) == parse_bytes(str(2**63 - 1)) == 2**63 - 1


@given(st.integers(0, 2**60))
def test_a_printed_size_reads_back_within_a_tenth_of_its_unit(size: int) -> None:
    assert abs(parse_bytes(format_bytes(size)) - size) <= max(0, size * 0.06)


# --- checksums and coverage -----------------------------------------------------------------------------------------


@given(st.binary(max_size=300), st.integers(1, 100))
def test_block_checksums_are_those_of_the_blocks(data: bytes, block_bytes: int) -> None:
    want = [crc32c(data[start : start + block_bytes]) for start in range(0, len(data), block_bytes)]
    assert crc32c_blocks(memoryview(data), block_bytes) == want


def test_every_single_flipped_bit_changes_the_checksum() -> None:
    data = bytearray(random.Random(1).randbytes(512))
    right = crc32c(data)
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        assert crc32c(data) != right
        data[bit // 8] ^= 1 << bit % 8


@given(st.integers(0, 60), st.lists(st.tuples(st.integers(-2, 62), st.integers(0, 20)), max_size=12))
@settings(deadline=None)
def test_coverage_agrees_with_a_set_of_bytes(size: int, claims: list[tuple[int, int]]) -> None:
    covered, taken = Coverage("place", size), set[int]()
    for offset, length in claims:
        wanted = set(range(offset, offset + length))
        if offset < 0 or offset + length > size or wanted & taken:
            with pytest.raises(ConfigError):
                covered.claim(offset, length)
        else:
            covered.claim(offset, length)
            taken |= wanted
    if len(taken) == size:
        covered.require_complete()
    else:
        first_hole = min(set(range(size)) - taken)
        with pytest.raises(ConfigError, match=f"a hole at byte {first_hole}'"):
            covered.require_complete()


# --- names ----------------------------------------------------------------------------------------------------------


@given(st.text(max_size=20))
def test_a_key_never_leaves_its_root(text: str) -> None:
    if is_key(text):
        assert os.path.normpath(f"/root/{text}") == f"/root/{text}"
        assert not any(part.startswith(".") for part in text.split("/"))
        assert text.isprintable()


def test_a_key_has_a_largest_length() -> None:
    assert is_key("a" * 255) and not is_key("a" * 256)
    assert is_key("/".join(["a" * 255] * 4)) and not is_key("/".join(["a" * 255] * 5))


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("s3://key:CANARY@bucket/a?X-Amz-Signature=CANARY#CANARY", "s3://bucket/a"),
        ("https://CANARY@host:8443/a", "https://host:8443/a"),
        ("s3://[CANARY", "s3://..."),
        ("/plain/path", "/plain/path"),
    ],
)
def test_secrets_in_urls_are_not_shown(url: str, shown: str) -> None:
    assert redact_url(url) == shown


# --- locks ----------------------------------------------------------------------------------------------------------


def test_a_lock_belongs_to_one_open_file_and_one_byte(tmp_path: Path) -> None:
    one, two = (os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT, 0o600) for _ in range(2))
    try:
        assert try_lock(one, 5)
        assert not try_lock(two, 5) and not try_lock(two, 5, shared=True)
        assert try_lock(two, 6)
        with pytest.raises(DeadlineExceeded, match="within 0.01 s"):
            lock(two, 5, timeout_s=0.01, place="here")
        assert try_lock(one, 5, shared=True)  # given down
        assert try_lock(two, 5, shared=True) and not try_lock(two, 5)
        unlock(one, 5)
        lock(two, 5, timeout_s=0, place="here")
    finally:
        os.close(one)
        os.close(two)


def test_a_killed_holder_gives_its_lock_back(tmp_path: Path) -> None:
    program = """
import os, sys
from stoker.storage._locks import try_lock
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT, 0o600)
print(try_lock(fd, 1), flush=True)
sys.stdin.read()
"""
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "True\n"
    fd = os.open(path, os.O_RDWR)
    try:
        assert not try_lock(fd, 1)
        holder.kill()
        holder.communicate()
        assert try_lock(fd, 1)
    finally:
        os.close(fd)


# --- errors of the file system --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, StoreFull),
        (errno.EDQUOT, StoreFull),
        (errno.EFBIG, StoreFull),
        (errno.EACCES, AccessDenied),
        (errno.EPERM, AccessDenied),
        (errno.EROFS, AccessDenied),
        (errno.ENOENT, KeyNotFound),
        (errno.EEXIST, AlreadyExists),
        (errno.ENOTDIR, StoreError),
        (errno.EISDIR, StoreError),
        (errno.EIO, StoreError),
        (errno.EMFILE, StoreError),
    ],
)
def test_an_error_of_the_file_system_gets_its_type_and_place(number: int, error: type[StoreError]) -> None:
    with pytest.raises(error) as caught, translate_os_errors("/a/place"):
        raise OSError(number, os.strerror(number))
    assert type(caught.value) is error
    assert str(caught.value).startswith("/a/place: ")


def test_an_error_that_has_its_type_keeps_it() -> None:
    with pytest.raises(StoreUnavailable, match="^of its own$"), translate_os_errors("/a/place"):
        raise StoreUnavailable("of its own")
    with pytest.raises(DeadlineExceeded, match="^of its own$"), translate_os_errors("/a/place"):
        raise DeadlineExceeded("of its own")
