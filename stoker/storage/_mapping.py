"""Files in memory for as long as somebody looks at them.

Not :mod:`mmap`: before Python 3.13 its objects keep a copy of the file descriptor each. A loader that holds a thousand
blocks would meet the usual limit of 1,024, and a copy of a descriptor keeps its locks.
"""

import ctypes
import mmap
import os
import weakref
from typing import TypeAlias

__all__ = ["MappedFile", "map_file"]

MappedFile: TypeAlias = ctypes.Array[ctypes.c_ubyte]

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
)
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


def map_file(fd: int, length: int) -> MappedFile:
    """The first `length` bytes of a file, for reading, until the last view of the array is gone.

    Raises:
        OSError: the file can't be mapped.
    """
    address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address is None or address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    array = (ctypes.c_ubyte * length).from_address(address)
    # Not at exit: other threads may still read, and the kernel unmaps everything anyway.
    weakref.finalize(array, _libc.munmap, address, length).atexit = False
    return array
