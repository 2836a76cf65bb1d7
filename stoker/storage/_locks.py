"""Locks between processes that a killed holder gives back: open-file-description byte-range locks (Linux, ``fcntl(2)``).

Unlike ``flock`` one file holds as many as it has byte offsets; unlike POSIX record locks they belong to the open file,
not to the process, so that two caches in one process exclude each other too. They belong to *every* copy of the file
descriptor, so a forked child must close its copy or it keeps the lock when its parent dies.
"""

import errno
import fcntl
import os
import struct
import time

from ..errors import DeadlineExceeded

__all__ = ["lock", "try_lock", "unlock"]

_SETLK = getattr(fcntl, "F_OFD_SETLK", None)
_FLOCK = struct.Struct("hhqqi")
"""``struct flock`` of 64-bit Linux: type, whence, start, length, pid (which must be 0 here)."""


def _set(fd: int, kind: int, byte: int) -> None:
    if _SETLK is None:
        raise OSError(errno.ENOTSUP, "this system has no open-file-description locks")
    fcntl.fcntl(fd, _SETLK, _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0))


def try_lock(fd: int, byte: int, *, shared: bool = False) -> bool:
    """Lock one byte of the file, changing a lock that is held; False if another open file is in the way.

    Raises:
        OSError: the file system has no working locks.
    """
    try:
        _set(fd, fcntl.F_RDLCK if shared else fcntl.F_WRLCK, byte)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def lock(fd: int, byte: int, *, timeout_s: float, place: str) -> None:
    """Lock one byte of the file exclusively.

    Polls, since the kernel's own waiting has no deadline and a stopped holder must not stop us.

    Raises:
        DeadlineExceeded: another process held it for `timeout_s`.
    """
    deadline = time.monotonic() + timeout_s
    pause_s = 0.0001
    while not try_lock(fd, byte):
        if time.monotonic() > deadline:
            raise DeadlineExceeded(f"a lock must become free within {timeout_s:g} s", place=place)
        time.sleep(pause_s)
        pause_s = min(pause_s * 2, 0.005)


def unlock(fd: int, byte: int) -> None:
    """Give up the lock on one byte of the file."""
    _set(fd, fcntl.F_UNLCK, byte)
