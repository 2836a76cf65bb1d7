"""Look into a cache directory from outside, check its blocks, remove some. Jobs may go on using it meanwhile.

Only files that :mod:`._layout` describes are looked at; everything else in the directory belongs to someone else. Nothing
here opens the cache: the limit of the next job that does is its own.
"""

import errno
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, Self

from ..errors import AccessDenied, ConfigError, KeyNotFound
from ._layout import (
    BLOCK_NAME,
    FOLDER_NAME,
    START_BYTE,
    USAGE_BYTE,
    BlockFile,
    crc32c_of_file,
    has_tag,
    lease_byte,
    read_state,
    write_state,
)
from ._locks import lock, try_lock, unlock
from ._plan_file import read_plans
from ._posix import translate_os_errors

__all__ = ["BadBlock", "CacheDirectory", "CachedBlock", "Evicted", "Verified"]

_LOCK_TIMEOUT_S = 5.0


@dataclass(frozen=True, kw_only=True)
class CachedBlock:
    """One block file.

    Attributes:
        name: of the file. size_bytes: of the file, its header included.
        object: what it is a part of, as its store names it; None, as the three below, if the header is damaged.
        version: of the object. start, end: byte range of it, end exclusive.
        since_unix_s: when it was written.
        is_leased: a process has it in use now. Caches that never evict don't say so, which costs nothing: what is mapped
            stays readable when its file is removed.
        is_planned: a running job has said that it will read it, when it last wrote that down; None if no job here did.
        next_use_unix_s: when that will be, at the job's pace; None if nobody knows.
    """

    name: str
    size_bytes: int
    object: str | None
    version: str | None
    start: int | None
    end: int | None
    since_unix_s: float
    is_leased: bool
    is_planned: bool | None
    next_use_unix_s: float | None


@dataclass(frozen=True, kw_only=True)
class BadBlock:
    """A block that differs from what its header says, what is wrong with it, and whether it was removed."""

    block: CachedBlock
    problem: str
    removed: bool


class Verified(NamedTuple):
    """What :meth:`CacheDirectory.verify` found."""

    blocks: int
    """All that were looked at."""
    checked_bytes: int
    """Of their files."""
    bad: tuple[BadBlock, ...]


class Evicted(NamedTuple):
    """What :meth:`CacheDirectory.evict` did."""

    blocks: int
    """Those removed."""
    freed_bytes: int
    leased_blocks: int
    """Those that would have gone too, but are in use."""


class _Found(NamedTuple):
    path: str  # below the directory
    name: str
    info: os.stat_result


# Guarantees: one thread at a time. What is counted or removed is so under the locks that the tiers of jobs take.
class CacheDirectory:
    """A directory that some :class:`~stoker.storage.TieredCache` has made, for RAM or disk.

    Raises:
        KeyNotFound: there is none.
        AccessDenied: it is a link or another user's.
        ConfigError: not a cache.
        UnknownVersion: a newer stoker made it.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._fd = _open_directory(self.path)
        try:
            self._lock_fd = self._open_lock()
        except BaseException:
            os.close(self._fd)
            raise

    def _open_lock(self) -> int:
        with suppress(FileNotFoundError):  # nobody has used it yet; the tag is made first
            return os.open("lock", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._fd)
        return -1

    def close(self) -> None:
        """Let the directory go."""
        if self._fd >= 0:
            os.close(self._fd)
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
        self._fd = self._lock_fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    @property
    def capacity_bytes(self) -> int:
        """The limit in force, or that of the last job; 0 before the first."""
        return self._state()[0]

    @property
    def used_bytes(self) -> int:
        """What the tiers count, files being written included."""
        return self._state()[1]

    def blocks(self) -> Iterator[CachedBlock]:
        """All blocks, by name of file. Those that appear or go meanwhile may be among them or not."""
        plans = read_plans(self._fd)
        for found in self._files():
            with suppress(FileNotFoundError):
                yield self._describe(found, plans)

    def verify(self, *, repair: bool = False, progress: Callable[[int], None] | None = None) -> Verified:
        """Read every block and compare it with the checksum in its header.

        The checksum of the data set that it came from is not asked: the cache itself does that at each first use.

        Args:
            repair: remove the bad ones; the next reader fetches them again.
            progress: called with the bytes of each block.
        """
        blocks = checked_bytes = 0
        bad = []
        for found in self._files():
            with suppress(FileNotFoundError):
                problem = self._problem(found)
                blocks, checked_bytes = blocks + 1, checked_bytes + found.info.st_size
                if problem:
                    block = self._describe(found, {})
                    removed = repair and self._remove(found, even_if_leased=True)
                    bad.append(BadBlock(block=block, problem=problem, removed=removed))
            if progress is not None:
                progress(found.info.st_size)
        return Verified(blocks, checked_bytes, tuple(bad))

    def evict(self, pattern: str | None = None) -> Evicted:
        """Remove the blocks of objects whose name matches a shell pattern, or all; those in use stay.

        Blocks of which the header does not tell the object go only with all.
        """
        blocks = freed_bytes = leased = 0
        for found in self._files():
            with suppress(FileNotFoundError):
                if pattern is not None:
                    name = self._describe(found, {}).object
                    if name is None or not fnmatchcase(name, pattern):
                        continue
                if self._remove(found, even_if_leased=False):
                    blocks, freed_bytes = blocks + 1, freed_bytes + found.info.st_size
                else:
                    leased += 1
        return Evicted(blocks, freed_bytes, leased)

    # -- files

    def _files(self) -> Iterator[_Found]:
        for folder in self._listed("blocks"):
            if FOLDER_NAME.fullmatch(folder):
                for name in self._listed(f"blocks/{folder}"):
                    path = f"blocks/{folder}/{name}"
                    if BLOCK_NAME.fullmatch(name):
                        with suppress(FileNotFoundError):
                            info = os.stat(path, dir_fd=self._fd, follow_symlinks=False)
                            if stat.S_ISREG(info.st_mode) and info.st_uid == os.geteuid():
                                yield _Found(path, name, info)

    def _listed(self, folder: str) -> list[str]:
        with suppress(FileNotFoundError, NotADirectoryError):
            flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
            fd = os.open(folder, flags, dir_fd=self._fd)
            try:
                return sorted(os.listdir(fd))
            finally:
                os.close(fd)
        return []

    @contextmanager
    def _opened(self, found: _Found) -> Iterator[int]:
        fd = os.open(found.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=self._fd)
        try:
            if not os.path.samestat(os.fstat(fd), found.info):
                raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", found.path)
            yield fd
        finally:
            os.close(fd)

    def _describe(self, found: _Found, plans: Mapping[str, float | None]) -> CachedBlock:
        fields: dict[str, Any] = dict.fromkeys(("object", "version", "start", "end"))
        with self._opened(found) as fd, suppress(ValueError, OSError):
            fields = BlockFile.read(fd, found.name).origin()
        return CachedBlock(
            name=found.name,
            size_bytes=found.info.st_size,
            since_unix_s=found.info.st_mtime,
            is_leased=self._is_leased(found.name),
            is_planned=found.name in plans if plans else None,
            next_use_unix_s=plans.get(found.name),
            **fields,
        )

    def _problem(self, found: _Found) -> str:
        """What is wrong with a block; nothing if it is whole."""
        with self._opened(found) as fd:
            try:
                block = BlockFile.read(fd, found.name)
                if block.size_bytes != found.info.st_size:
                    return f"the file must have {block.size_bytes} bytes, has {found.info.st_size}"
                got = crc32c_of_file(fd, block.header_bytes, block.length)
            except ValueError as error:
                return str(error)
            except OSError as error:
                if error.errno != errno.EIO:
                    raise
                return "the device can't read it"
        return "" if got == block.crc else f"its bytes must have CRC32C {block.crc:#010x}, have {got:#010x}"

    # -- the tiers' locks

    def _state(self) -> tuple[int, int]:
        return (read_state(self._lock_fd) if self._lock_fd >= 0 else None) or (0, 0)

    def _is_leased(self, name: str) -> bool:
        byte = lease_byte(name)
        if self._lock_fd < 0:
            return False
        with suppress(OSError):  # where locks don't work, nobody can say
            if not try_lock(self._lock_fd, byte):
                return True
            unlock(self._lock_fd, byte)
        return False

    def _remove(self, found: _Found, *, even_if_leased: bool) -> bool:
        with self._counting() as count:
            if not os.path.samestat(os.stat(found.path, dir_fd=self._fd, follow_symlinks=False), found.info):
                raise FileNotFoundError(errno.ENOENT, "replaced meanwhile", found.path)
            if not even_if_leased and self._is_leased(found.name):
                return False
            os.unlink(found.path, dir_fd=self._fd)
            count(-found.info.st_size)
        return True

    @contextmanager
    def _counting(self) -> Iterator[Callable[[int], None]]:
        """Exclusive hold of the counter, and of the start: a job that starts counts the files anew."""

        def count(size_bytes: int) -> None:
            capacity, used = self._state()
            if capacity:
                write_state(self._lock_fd, capacity, used + size_bytes)

        if self._lock_fd < 0:
            self._lock_fd = self._open_lock()
        if self._lock_fd < 0:
            yield lambda size_bytes: None
            return
        held = []
        try:
            for byte in (START_BYTE, USAGE_BYTE):
                lock(self._lock_fd, byte, timeout_s=_LOCK_TIMEOUT_S, place=str(self.path))
                held.append(byte)
            yield count
        finally:
            for byte in reversed(held):
                unlock(self._lock_fd, byte)


def _open_directory(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise KeyNotFound("no such directory", place=str(path)) from error
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            raise ConfigError("a cache is a directory, and no link to one", place=str(path)) from error
        with translate_os_errors(str(path)):
            raise
    try:
        owner = os.fstat(fd).st_uid
        if owner != os.geteuid():
            raise AccessDenied("a cache directory must belong to this user", value=f"user {owner}", place=str(path))
        if not has_tag(fd, path):
            raise ConfigError(
                "must be a cache directory made by stoker", place=str(path), hint="what TieredCache got as disk="
            )
    except BaseException:
        os.close(fd)
        raise
    return fd
