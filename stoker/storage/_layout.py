"""What lies in a tier's directory: names, the header of a block, the state in the lock file. For tiers and for tools.

::

    CACHEDIR.TAG                says that stoker made the directory; backup programs skip what holds it
    lock                        capacity, bytes in use, and the byte offsets that are locked
    blocks/ab/abcdef…           one block: a header that binds it to its object and range, then its bytes
    tmp/{size}-{nonce}          being written, locked by its writer
    plans/{nonce}               what a process will read when, locked by it
"""

import errno
import os
import re
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ..errors import UnknownVersion
from ._checksums import crc32c
from ._posix import UnnamedFile, is_temporary_name, pread_into, pwrite_all

__all__ = [
    "BLOCK_NAME",
    "FOLDER_NAME",
    "PLAN_NAME",
    "PRESENCE_BYTE",
    "START_BYTE",
    "TEMPORARY_NAME",
    "USAGE_BYTE",
    "BlockFile",
    "block_path",
    "crc32c_of_file",
    "flight_byte",
    "has_tag",
    "lease_byte",
    "may_become_a_tier",
    "read_state",
    "write_state",
    "write_tag",
]

_TAG_NAME = "CACHEDIR.TAG"
_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# "  # https://bford.info/cachedir/
_TAG_KIND, _TAG_VERSION = b"stoker block cache v", b"1"

_STATE = struct.Struct("<8sQQ")  # magic, capacity, bytes in use
_STATE_MAGIC = b"STKTIER1"
START_BYTE, PRESENCE_BYTE, USAGE_BYTE = 1024, 1025, 1026
"""Offsets in the lock file that are locked; nothing is stored there."""
_LEASES = 1 << 33  # from here on one byte for each block that a process has mapped, locked by all of them
_FLIGHTS = 1 << 32  # from here on one byte for each block that a process is fetching, by a hash of its name

_HEADER = struct.Struct(
    "<8sIIQ16sII"
)  # magic, header bytes, CRC32C of payload, payload bytes, name, text bytes, CRC32C
_HEADER_MAGIC = b"STKBLK01"
_MOST_HEADER_BYTES = 1 << 20
_PAGE = 4096

BLOCK_NAME = re.compile(r"[0-9a-f]{32}")
FOLDER_NAME = re.compile(r"[0-9a-f]{2}")
TEMPORARY_NAME = re.compile(r"\d{1,15}-[0-9a-f]{16}")
PLAN_NAME = re.compile(r"[0-9a-f]{16}")
_FOLDERS = {"blocks": FOLDER_NAME, "tmp": TEMPORARY_NAME, "plans": PLAN_NAME}


class BlockFile:
    """How one block is stored: its file name, its header and its place in the file.

    Args:
        name: 32 hexadecimal digits that identify block, range and checksum.
        text: what the name is the digest of, for people who look into the directory; part of the header.
        length: payload bytes. crc: their CRC32C.
    """

    __slots__ = ("_text", "crc", "header_bytes", "length", "name", "size_bytes")

    def __init__(self, name: str, text: bytes, length: int, crc: int) -> None:
        self.name, self._text, self.length, self.crc = name, text, length, crc
        # The payload starts on a page, so that views of it are aligned and O_DIRECT could read it.
        self.header_bytes = -(-(_HEADER.size + len(text)) // _PAGE) * _PAGE
        self.size_bytes = self.header_bytes + -(-length // _PAGE) * _PAGE

    def header(self) -> bytes:
        """The first `header_bytes` of the file."""
        name = bytes.fromhex(self.name)
        fields = (_HEADER_MAGIC, self.header_bytes, self.crc, self.length, name, len(self._text))
        check = crc32c(self._text, crc32c(_HEADER.pack(*fields, 0)))
        return (_HEADER.pack(*fields, check) + self._text).ljust(self.header_bytes, b"\0")

    @classmethod
    def read(cls, fd: int, name: str) -> Self:
        """The block that a file named `name` says it is.

        Raises:
            ValueError: what is wrong: its header is damaged, or another block's.
            OSError: it can't be read.
        """
        raw = memoryview(bytearray(_HEADER.size))
        if pread_into(fd, raw, 0) != len(raw):
            raise ValueError("the file is shorter than its header")
        magic, header_bytes, crc, length, _, text_bytes, _ = _HEADER.unpack(raw)
        if magic != _HEADER_MAGIC or not len(raw) + text_bytes <= header_bytes <= _MOST_HEADER_BYTES:
            raise ValueError("its header is damaged")
        header = memoryview(bytearray(header_bytes))
        if pread_into(fd, header, 0) != header_bytes:
            raise ValueError("the file is shorter than its header")
        block = cls(name, bytes(header[len(raw) : len(raw) + text_bytes]), length, crc)
        # What it would be if it were whole and under its own name: compares the header's checksum and name, too.
        if header != block.header():
            raise ValueError("its header is damaged, or another block's")
        return block

    def origin(self) -> dict[str, Any]:
        """What the block is a part of: ``object``, ``version``, ``start`` and ``end``; ValueError if it says nothing."""
        place, version, span, _ = self._text.decode().rsplit("\n", 4)[:4]
        start, end = span.split("-")
        return {"object": place, "version": version, "start": int(start), "end": int(end)}


def block_path(name: str) -> str:
    """Of a block's file, below the tier's directory."""
    return f"blocks/{name[:2]}/{name}"


def lease_byte(name: str) -> int:
    """What whoever has a block mapped locks in the lock file, shared."""
    # Two blocks may have one: then the one is taken for leased as long as the other is.
    return _LEASES + int(name[:8], 16)


def flight_byte(name: str) -> int:
    """What whoever fetches a block locks in the lock file."""
    return _FLIGHTS + int(name[:8], 16)


def read_state(lock_fd: int) -> tuple[int, int] | None:
    """Capacity and bytes in use, as the lock file has them; None if it makes no sense."""
    raw = os.pread(lock_fd, _STATE.size, 0)
    if len(raw) != _STATE.size:
        return None
    magic, capacity, used = _STATE.unpack(raw)
    return (capacity, used) if magic == _STATE_MAGIC else None


def write_state(lock_fd: int, capacity: int, used: int) -> None:
    """Set both; for whoever holds the lock on `USAGE_BYTE`."""
    pwrite_all(lock_fd, _STATE.pack(_STATE_MAGIC, capacity, max(0, used)), 0)


def has_tag(directory_fd: int, path: Path) -> bool:
    """Whether stoker made the directory.

    Raises:
        UnknownVersion: a newer one did.
    """
    try:
        fd = os.open(_TAG_NAME, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
    except FileNotFoundError:
        return False
    try:
        raw = os.pread(fd, 256, 0)
    finally:
        os.close(fd)
    if not raw.startswith(_TAG + _TAG_KIND):
        return False
    version = raw[len(_TAG + _TAG_KIND) :].strip()
    if version != _TAG_VERSION:
        raise UnknownVersion(
            "a cache directory must be of version 1",
            value=version.decode(errors="replace"),
            place=str(path),
            hint="name another directory, or remove this one",
        )
    return True


def may_become_a_tier(directory_fd: int) -> bool:
    """Whether a directory without the tag is empty, or holds what only stoker puts into one, under the mode it gives.

    The latter is left when someone emptied a cache in use, or was stopped in the middle of removing it.
    """
    left = {name for name in os.listdir(directory_fd) if not is_temporary_name(name)}  # a tag in the making
    if left and (os.fstat(directory_fd).st_mode & 0o077 or not left <= {"lock", *_FOLDERS}):
        return False
    for name in left:
        try:
            fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory_fd)
        except FileNotFoundError:
            continue  # its removal goes on
        except OSError:
            return False
        try:
            info = os.fstat(fd)
            if name != "lock":
                ours = stat.S_ISDIR(info.st_mode) and all(map(_FOLDERS[name].fullmatch, os.listdir(fd)))
            else:  # empty: of a process that is just starting
                ours = stat.S_ISREG(info.st_mode) and (info.st_size == 0 or read_state(fd) is not None)
        finally:
            os.close(fd)
        if not ours:
            return False
    return True


def write_tag(path: Path) -> None:
    """Mark a directory as stoker's, unless it is."""
    tag = UnnamedFile(path)
    try:
        pwrite_all(tag.fd, _TAG + _TAG_KIND + _TAG_VERSION + b"\n", 0)
        with suppress(FileExistsError):
            tag.link(path / _TAG_NAME)
    finally:
        tag.close()


def crc32c_of_file(fd: int, start: int, length: int) -> int:
    """CRC32C of a part of a file, read piece by piece; OSError with EIO if the file ends early."""
    scratch = memoryview(bytearray(min(length, 2**20)))
    check = done = 0
    while done < length:
        piece = scratch[: length - done]
        if pread_into(fd, piece, start + done) != len(piece):
            raise OSError(errno.EIO, "file ends early")
        check, done = crc32c(piece, check), done + len(piece)
    return check
