"""The functions of :mod:`os` that change what a later process finds: those at which programs are killed or refused."""

import os

__all__ = ["CHANGING_CALLS", "OPENS_FOR_WRITING"]

CHANGING_CALLS = (
    "open",
    "write",
    "writev",
    "pwrite",
    "pwritev",
    "truncate",
    "ftruncate",
    "posix_fallocate",
    "copy_file_range",
    "sendfile",
    "fsync",
    "fdatasync",
    "link",
    "symlink",
    "rename",
    "replace",
    "unlink",
    "remove",
    "mkdir",
    "rmdir",
)
"""``open`` only with a flag of :data:`OPENS_FOR_WRITING`."""

OPENS_FOR_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
