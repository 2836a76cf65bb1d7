"""Durable files: the only module that publishes, syncs and writes around the page cache.

The protocol, each step with the failure that it prevents:

1. write to a file without a name (``O_TMPFILE``) on the target's file system: a killed writer leaves nothing behind;
2. ``posix_fallocate`` before the first byte of a large file: a full disk is an error here, not half-way;
3. loop until every byte is written: ``write`` may be short;
4. ``fsync`` the file once; if it fails the file is thrown away, since a second fsync reports success for lost pages
   (Rebello et al., USENIX ATC 2020);
5. give it its name with ``link`` (exclusive) or by renaming a temporary name (replacing); that one is locked as long
   as its writer lives, so that the next writer in the directory knows which ones to remove;
6. ``fsync`` the directory, or the name may be gone after a power cut.
"""

import ctypes
import errno
import itertools
import mmap
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from ..errors import (
    AccessDenied,
    AlreadyExists,
    KeyNotFound,
    StokerError,
    StoreError,
    StoreFull,
    UnsupportedError,
)
from ._locks import try_lock
from ._units import Buffer, format_bytes

__all__ = [
    "DIRECT_ALIGN_BYTES",
    "UnnamedFile",
    "aligned_buffer",
    "fsync_directory",
    "is_direct",
    "is_private_directory",
    "is_temporary_name",
    "make_directories",
    "pread_into",
    "pwrite_all",
    "remove_leftovers",
    "shared_memory_directory",
    "translate_os_errors",
]

T = TypeVar("T")

DIRECT_ALIGN_BYTES = 4096
"""Offsets, lengths and addresses of O_DIRECT must be multiples of the logical block size: 512 or 4096 on any disk."""

_HUGE_PAGE_BYTES = 2 << 20
"""Of x86-64, and of ARM with 4 KiB pages."""

_TEMPORARY_PREFIX = ".stoker-tmp-"
_serial = itertools.count()
_swept: set[Path] = set()
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextmanager
def translate_os_errors(place: str) -> Iterator[None]:
    """Turn an OSError of the block into the typed error that says what to do about it."""
    try:
        yield
    except StokerError:
        raise
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _FULL:
            raise StoreFull(_space_rule(place), value=reason, place=place, hint="free space and run again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise AccessDenied("the file system must allow it", value=reason, place=place) from error
        if error.errno == errno.ENOENT:
            raise KeyNotFound("no such file", place=place) from error
        if error.errno == errno.EEXIST:
            raise AlreadyExists("must not exist yet", place=place) from error
        if error.errno in (errno.ENOTDIR, errno.EISDIR):
            raise StoreError("a name is a file or a directory, never both", value=reason, place=place) from error
        raise StoreError("the file system must do what it is asked", value=reason, place=place) from error


def _space_rule(place: str) -> str:
    with suppress(OSError):
        path = Path(place)
        while not path.exists() and path != path.parent:
            path = path.parent
        free = os.statvfs(path)
        return f"needs more space than is left ({format_bytes(free.f_bavail * free.f_frsize)} free)"
    return "needs more space than is left"


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> None:
    """``mkdir -p`` with mode 0700 whose new names are durable when it returns."""
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    for directory in reversed(missing):
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        fsync_directory(directory.parent)


def pwrite_all(fd: int, data: Buffer, offset: int) -> None:
    """Write every byte of `data` at `offset`; a short write is continued, not ignored."""
    view = memoryview(data).cast("B")
    while view:
        written = os.pwrite(fd, view, offset)
        if written == 0:
            raise OSError(errno.EIO, "pwrite wrote nothing")
        view, offset = view[written:], offset + written


def pread_into(fd: int, buffer: memoryview, offset: int) -> int:
    """Fill `buffer` from `offset`; returns the bytes read, fewer only at the end of the file."""
    done = 0
    while done < len(buffer):
        got = os.preadv(fd, [buffer[done:]], offset + done)
        done += got
        # Asking O_DIRECT again at an unaligned end of file would be EINVAL, not 0.
        if got == 0 or (done < len(buffer) and offset + done >= os.fstat(fd).st_size):
            break
    return done


def aligned_buffer(size: int) -> memoryview:
    """`size` zeroed bytes of anonymous memory that start on a page, as O_DIRECT wants them; freed with the last view.

    From 2 MiB on in huge pages, where the kernel gives them: one piece for the disk instead of 512. On a virtual disk,
    reads of 8 MiB in four threads went from 0.9 to 2.8 GB/s by that.
    """
    if size < _HUGE_PAGE_BYTES or not hasattr(mmap, "MADV_HUGEPAGE"):
        return memoryview(_anonymous(size))[:size]
    pages = _anonymous(size + _HUGE_PAGE_BYTES)
    with suppress(OSError):  # a kernel built without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    start = -ctypes.addressof(ctypes.c_char.from_buffer(pages)) % _HUGE_PAGE_BYTES
    return memoryview(pages)[start : start + size]


def _anonymous(size: int) -> mmap.mmap:
    length = max(1, -(-size // mmap.PAGESIZE)) * mmap.PAGESIZE
    return mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def is_temporary_name(name: str) -> bool:
    """Whether a directory entry is a temporary name of this module: never an object."""
    return name.startswith(_TEMPORARY_PREFIX)


# Guarantees: pwrite may be called from several threads at once; the other methods from one. Nothing is visible before
# link or replace.
class UnnamedFile:
    """A file that gets its name last.

    Uses O_TMPFILE where the file system has it (ext4, xfs, btrfs, tmpfs), else a name that starts with
    ``.stoker-tmp-``, which no listing shows, which is removed on close, and after a kill by the next writer.

    Args:
        directory: where it will get its name; made if it is missing.
        size_bytes: space to reserve before the first byte; 0 for none, which also means no O_DIRECT.
    """

    def __init__(self, directory: Path, *, size_bytes: int = 0) -> None:
        self._directory = directory
        self._temporary: Path | None = None
        self._direct_fd: int | None = None
        self._direct = False
        self.fd = self._open()
        try:
            if size_bytes:
                os.posix_fallocate(self.fd, 0, size_bytes)
                self._open_direct()
        except BaseException:
            self.close()
            raise

    def _open(self) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC
        try:
            return self._in_directory(lambda: os.open(self._directory, flags | os.O_TMPFILE, 0o600))
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL, errno.EPERM):
                raise
        while True:
            path = self._temporary_name()
            fd = self._in_directory(
                lambda path=path: os.open(path, flags | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)  # type: ignore[misc]
            )
            # Between its name and its lock it may be taken for left over, and then it is gone.
            if _lock_if_possible(fd) and _is_named(fd, path):
                self._temporary = path
                return fd
            os.close(fd)

    def _in_directory(self, act: Callable[[], T]) -> T:
        """`act`, with the directory in place: whoever deletes the last object in it removes it, at any moment."""
        for _ in range(100):
            try:
                make_directories(self._directory)
                return act()
            except FileNotFoundError:
                continue
            except PermissionError as error:
                # What ext4 says to O_TMPFILE in a directory that is being removed (seen once in a stress test); a
                # directory that really forbids it says so again below.
                if error.errno != errno.EPERM:
                    raise
        return act()

    def _temporary_name(self) -> Path:
        remove_leftovers(self._directory)
        return self._directory / f"{_TEMPORARY_PREFIX}{os.getpid()}-{next(_serial)}-{os.urandom(6).hex()}"

    def _open_direct(self) -> None:
        with suppress(OSError):  # tmpfs and some network file systems have no O_DIRECT: the page cache will do
            self._direct_fd = os.open(f"/proc/self/fd/{self.fd}", os.O_WRONLY | os.O_DIRECT | os.O_CLOEXEC)
            self._direct = True

    def pwrite(self, data: Buffer, offset: int) -> None:
        """Write `data` at `offset`, around the page cache if size and place allow it."""
        view = memoryview(data).cast("B")
        whole = len(view) - len(view) % DIRECT_ALIGN_BYTES
        if self._direct and self._direct_fd is not None and whole and is_direct(view[:whole], offset):
            try:
                pwrite_all(self._direct_fd, view[:whole], offset)
                view, offset = view[whole:], offset + whole
            except OSError as error:
                # A disk with larger sectors, or a short write that left us between two: once more, through the cache.
                if error.errno != errno.EINVAL:
                    raise
                self._direct = False
        pwrite_all(self.fd, view, offset)

    def sync(self) -> None:
        """fsync, once: after a failure the file must be thrown away."""
        os.fsync(self.fd)

    def link(self, path: Path) -> None:
        """Name it `path` if nothing has that name (FileExistsError otherwise) and fsync the directory.

        Raises:
            UnsupportedError: the file system has no hard links, so it can't do this in one step.
        """
        try:
            if self._temporary is not None:
                os.link(self._temporary, path)
            else:
                self._link_unnamed(path)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            raise UnsupportedError("the file system must have hard links", place=str(path)) from error
        fsync_directory(path.parent)

    def replace(self, path: Path) -> None:
        """Name it `path`, replacing what has that name, and fsync the directory."""
        if self._temporary is None:
            # Mostly there is nothing to replace; then there is no second name either, which a kill would leave behind.
            with suppress(FileExistsError):
                self.link(path)
                return
            # Only a named file can replace another. The name is its own: a file that lost a shared one to another
            # replacer could never be linked again, since O_TMPFILE allows the first link only.
            temporary = self._temporary_name()
            _lock_if_possible(self.fd)
            self._link_unnamed(temporary)
            self._temporary = temporary
        os.rename(self._temporary, path)
        self._temporary = None
        fsync_directory(path.parent)

    def _link_unnamed(self, path: Path) -> None:
        # linkat(AT_EMPTY_PATH) needs a capability; the way through /proc is the one open(2) documents. The directory fd
        # says nothing for an absolute path, but only with one does Python call linkat, which follows the link: its
        # plain link() does not on Linux, and fails with EXDEV.
        os.link(f"/proc/self/fd/{self.fd}", path, src_dir_fd=self.fd, follow_symlinks=True)

    def stat(self) -> os.stat_result:
        return os.fstat(self.fd)

    def close(self) -> None:
        """Close; a file that has no name by now is gone. Harmless when called twice."""
        if self._temporary is not None:
            with suppress(FileNotFoundError):
                self._temporary.unlink()
            self._temporary = None
        for fd in (self._direct_fd, self.fd):
            if fd is not None and fd >= 0:
                os.close(fd)
        self._direct_fd, self.fd, self._direct = None, -1, False


def _lock_if_possible(fd: int) -> bool:
    with suppress(OSError):  # without locks nobody takes a temporary file for left over, and it stays
        return try_lock(fd, 0)
    return True


def _is_named(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.stat(path, follow_symlinks=False), os.fstat(fd))
    return False


def remove_leftovers(directory: Path) -> None:
    """Remove the temporary names in a directory whose writers were killed: those that nobody holds locked.

    Looks once in a process and directory; what is killed later is found by the next process.
    """
    if directory in _swept:
        return
    _swept.add(directory)
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if is_temporary_name(entry.name) and entry.is_file(follow_symlinks=False):
                with suppress(OSError):
                    fd = os.open(entry.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        if os.fstat(fd).st_uid == os.geteuid() and try_lock(fd, 0):
                            os.unlink(entry.path)
                    finally:
                        os.close(fd)


def is_direct(view: memoryview, offset: int) -> bool:
    """Whether O_DIRECT takes this memory at this offset: address, length and offset aligned."""
    if view.readonly or len(view) % DIRECT_ALIGN_BYTES or offset % DIRECT_ALIGN_BYTES:
        return False  # ctypes can't take the address of read-only memory; such data is small or copied anyway
    return ctypes.addressof(ctypes.c_char.from_buffer(view)) % DIRECT_ALIGN_BYTES == 0


def shared_memory_directory() -> Path:
    """This user's directory in shared memory, mode 0700, made if it is missing; all processes of the node share it.

    ``/dev/shm/stoker-<uid>``, or what ``STOKER_SHM_DIR`` names, which must be on a tmpfs to be of use.

    Raises:
        OSError: there is no shared memory, or the directory is a link, not ours or open to others.
    """
    path = Path(os.environ.get("STOKER_SHM_DIR") or f"/dev/shm/stoker-{os.geteuid()}")
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    if not is_private_directory(path):
        raise PermissionError(errno.EPERM, "must be a directory of this user with mode 0700", str(path))
    return path


def is_private_directory(path: Path) -> bool:
    """Whether `path` is a real directory of ours that nobody else can enter."""
    info = path.lstat()
    return stat.S_ISDIR(info.st_mode) and info.st_uid == os.geteuid() and not info.st_mode & 0o077
