"""Small file systems under a tier, which can be full and read-only: simulated everywhere, or real in mounts of our own."""

import ctypes
import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stoker.testing.faulty_tier import FaultyTier, TierFault

MIB = 2**20


class Disk:
    """A file system of `size_bytes` with one directory for a tier, which can be filled up and be made read-only."""

    real = False

    def __init__(self, root: Path, size_bytes: int) -> None:
        self.tier, self.size_bytes = root / "tier", size_bytes
        self._faulty = FaultyTier(self.tier)

    @contextmanager
    def there(self) -> Iterator[None]:
        with self._faulty:
            self._faulty.add(TierFault("full", capacity_bytes=self.size_bytes))
            yield

    @contextmanager
    def full(self) -> Iterator[None]:
        """Not a byte is free inside the block."""
        rule = self._faulty.add(TierFault("full"))
        yield
        rule.remove()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written inside the block, nor be opened for writing."""
        rule = self._faulty.add(TierFault("read_only"))
        yield
        rule.remove()


class MountedDisk(Disk):
    """The same as a real tmpfs; needs a private mount namespace."""

    real = True

    def __init__(self, root: Path, size_bytes: int) -> None:
        super().__init__(root, size_bytes)
        self._root = root

    @contextmanager
    def there(self) -> Iterator[None]:
        mount(self._root, f"size={self.size_bytes}")
        try:
            yield
        finally:
            _libc.umount2(os.fsencode(self._root), _MNT_DETACH)

    @contextmanager
    def full(self) -> Iterator[None]:
        filler = self._root / "filler"
        fd = os.open(filler, os.O_WRONLY | os.O_CREAT)
        try:
            step, at = MIB, 0
            while step >= 4096:
                try:
                    os.posix_fallocate(fd, at, step)
                    at += step
                except OSError as error:
                    assert error.errno == errno.ENOSPC
                    step //= 2
            yield
        finally:
            os.close(fd)
            filler.unlink()

    @contextmanager
    def read_only(self) -> Iterator[None]:
        mount(self._root, "", _MS_REMOUNT | _MS_BIND | _MS_RDONLY)
        try:
            yield
        finally:
            mount(self._root, "", _MS_REMOUNT | _MS_BIND)


_libc = ctypes.CDLL(None, use_errno=True)
_CLONE_NEWNS, _CLONE_NEWUSER = 0x00020000, 0x10000000
_MS_RDONLY, _MS_REMOUNT, _MS_BIND, _MS_REC, _MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_MNT_DETACH = 2


def mount(target: Path, options: str, flags: int = 0) -> None:
    """A tmpfs, or another view of one."""
    if _libc.mount(b"tmpfs", os.fsencode(target), b"tmpfs", flags, options.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def make_mounts_private() -> None:
    """Give this process mounts of its own, which are gone when it ends; OSError where the system does not allow it."""
    uid, gid = os.getuid(), os.getgid()
    if _libc.unshare(_CLONE_NEWNS | (_CLONE_NEWUSER if uid else 0)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "unshare")
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    if _libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), "/")
