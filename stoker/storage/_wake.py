"""Wake the threads of other processes that wait for news about something, without their looking again and again.

A futex (Linux, ``futex(2)``) in a page of a file that all of them have mapped: who waits sleeps in the kernel until
somebody says that there is news. That is a hint and no more. Who wakes looks for itself; and since one that was killed
says nothing, all wake now and then.
"""

import ctypes
import mmap
import os
import platform
import struct
import sys
from time import monotonic_ns, sleep

from ._mapping import map_file

__all__ = ["Wake"]

_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98}
"""Of the system call: the C library has no function for it."""
_FUTEX = _NUMBERS.get(platform.machine()) if sys.platform == "linux" and sys.maxsize > 2**32 else None
_WAIT, _WAKE, _EVERYBODY = 0, 1, 2**31 - 1

_AT, _WORDS = 2048, 512
"""Where its words are: in the second half of the file's first page."""

_NEWS = struct.Struct("=I")

_LONGEST_S, _LONGEST_BLIND_S = 0.05, 0.005
"""Between two looks, with a futex and without."""

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


# Guarantees: any thread may call anything. The page stays mapped as long as one of them is in here.
class Wake:
    """Waiting for news in one file, about things that are told apart by a number.

    Two numbers may share a word; then some wake in vain.

    Args:
        fd: of the file, which is not empty. It may be closed at once; not one that has locks: the mapping would keep
            them as a copy of it would.

    Raises:
        OSError: it can't be mapped.
    """

    def __init__(self, fd: int) -> None:
        self._page = map_file(fd, mmap.PAGESIZE)

    def seen(self, number: int) -> int:
        """What :meth:`wait` needs to know: news after this call are not missed."""
        return int(self._word(number).value)

    def wait(self, number: int, seen: int) -> None:
        """Return when there was news about `number` since `seen`, and after 50 ms anyway."""
        if _FUTEX is None:
            sleep(_LONGEST_BLIND_S)
            return
        word, limit = self._word(number), _Timespec(int(_LONGEST_S), int(_LONGEST_S % 1 * 1e9))
        _libc.syscall(_FUTEX, ctypes.byref(word), _WAIT, ctypes.c_uint32(seen), ctypes.byref(limit), None, 0)

    def tell(self, fd: int, number: int) -> None:
        """There is news.

        Raises:
            OSError: it can't be written, and those who wait wake as late as if nobody had said anything.
        """
        # Not through the mapping: what is a signal there, on a disk that has become read-only, is an error here.
        os.pwrite(fd, _NEWS.pack(monotonic_ns() & 0xFFFFFFFF), _place(number))  # unlike any value before
        if _FUTEX is not None:
            _libc.syscall(_FUTEX, ctypes.byref(self._word(number)), _WAKE, _EVERYBODY, None, None, 0)

    def _word(self, number: int) -> ctypes.c_uint32:
        return ctypes.c_uint32.from_buffer(self._page, _place(number))


def _place(number: int) -> int:
    return _AT + _NEWS.size * (number % _WORDS)
