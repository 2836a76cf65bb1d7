"""What a process will read when, written down for others: ``plans/{nonce}`` in a tier's directory, locked by its writer.

Advice for two readers: policies of other jobs, which leave blocks alone that a running one needs, and people who ask why
a block is kept. So it holds only blocks that are stored, is as old as its last writing, and nothing depends on it. A file
that nobody holds locked is of a dead process and means nothing.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from math import isnan

from ._checksums import crc32c
from ._layout import PLAN_NAME
from ._locks import try_lock
from ._posix import pwrite_all

__all__ = ["PlanFile", "read_plans", "sweep_plans"]

_HEAD = struct.Struct("<8sII")  # magic, entries, CRC32C of them
_MAGIC = b"STKPLAN1"
_ENTRY = struct.Struct("<16sd")  # name of the block, unix time of its next read or NaN
_MOST_BYTES = 16 << 20


# Guarantees: one thread at a time.
class PlanFile:
    """The plan of this process in the tier whose directory is `directory_fd`, for as long as it is open.

    Raises:
        OSError: it can't be made or locked.
    """

    def __init__(self, directory_fd: int) -> None:
        with suppress(FileExistsError):
            os.mkdir("plans", 0o700, dir_fd=directory_fd)
        self._directory_fd, self._path = directory_fd, f"plans/{os.urandom(8).hex()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        self.fd = os.open(self._path, flags, 0o600, dir_fd=directory_fd)
        try:
            try_lock(self.fd, 0)
        except OSError:
            self.close()
            raise

    def write(self, entries: Iterable[tuple[str, float]]) -> None:
        """Replace what it says: names of blocks, and the unix time at which each is read next, NaN if nobody can tell."""
        body = b"".join(_ENTRY.pack(bytes.fromhex(name), at) for name, at in entries)
        # Not atomic: who reads meanwhile finds that the checksum does not fit, and takes it for no plan.
        pwrite_all(self.fd, _HEAD.pack(_MAGIC, len(body) // _ENTRY.size, crc32c(body)) + body, 0)

    def close(self) -> None:
        """Take it back."""
        with suppress(OSError):
            os.unlink(self._path, dir_fd=self._directory_fd)
        os.close(self.fd)


def read_plans(directory_fd: int, *, own_fd: int = -1) -> dict[str, float | None]:
    """When blocks of a tier are read next, by the processes that are running: unix times, None if they don't know.

    Files of dead processes are removed. `own_fd` is that of the caller's own file, which is left out.
    """
    found: dict[str, float | None] = {}
    own = os.fstat(own_fd) if own_fd >= 0 else None
    for fd in _living(directory_fd):
        try:
            info = os.fstat(fd)
            if (own is None or not os.path.samestat(info, own)) and info.st_size <= _MOST_BYTES:
                for name, at in _entries(os.pread(fd, info.st_size, 0)):
                    known = found.get(name)
                    found[name] = known if isnan(at) else at if known is None else min(known, at)
        finally:
            os.close(fd)
    return found


def sweep_plans(directory_fd: int) -> None:
    """Remove the files of dead processes; for a caller who keeps others from opening the tier meanwhile."""
    for fd in _living(directory_fd, no_new=True):
        os.close(fd)


def _living(directory_fd: int, *, no_new: bool = False) -> Iterator[int]:
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    names: list[str] = []
    with suppress(FileNotFoundError, NotADirectoryError):
        plans_fd = os.open("plans", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=directory_fd)
        try:
            names = [name for name in sorted(os.listdir(plans_fd)) if PLAN_NAME.fullmatch(name)]
        finally:
            os.close(plans_fd)
    for name in names:
        with suppress(OSError):
            fd = os.open(f"plans/{name}", flags, dir_fd=directory_fd)
            try:
                # Made, but not locked yet, is still empty.
                is_dead = (no_new or os.fstat(fd).st_size > 0) and try_lock(fd, 0)
                if is_dead:
                    os.unlink(f"plans/{name}", dir_fd=directory_fd)
            except BaseException:
                os.close(fd)
                raise
            if is_dead:
                os.close(fd)
            else:
                yield fd


def _entries(raw: bytes) -> Iterator[tuple[str, float]]:
    if len(raw) < _HEAD.size:
        return
    magic, count, check = _HEAD.unpack_from(raw)
    body = raw[_HEAD.size : _HEAD.size + count * _ENTRY.size]
    if magic == _MAGIC and len(body) == count * _ENTRY.size and crc32c(body) == check:
        for name, at in _ENTRY.iter_unpack(body):
            yield name.hex(), at
