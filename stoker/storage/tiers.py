"""One tier of the block cache: a private directory of immutable, self-describing files, shared by a node's processes.

What lies in the directory is written in :mod:`._layout`. It is the index. What a killed process leaves is an unlocked temporary file, found and removed at the next
start. A block appears whole, by rename, and disappears by unlink, never by truncation: who has it mapped keeps it, and
where blocks are evicted it holds a lock that says so.
Anything else in the directory belongs to someone else and is neither counted nor touched.
"""

import errno
import logging
import os
import re
import stat
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from heapq import nsmallest
from pathlib import Path
from time import monotonic, sleep, time

from ..errors import AccessDenied, ConfigError, DeadlineExceeded
from ..metrics import counters
from ._checksums import crc32c
from ._layout import (
    BLOCK_NAME,
    FOLDER_NAME,
    PRESENCE_BYTE,
    START_BYTE,
    TEMPORARY_NAME,
    USAGE_BYTE,
    BlockFile,
    block_path,
    crc32c_of_file,
    flight_byte,
    has_tag,
    lease_byte,
    may_become_a_tier,
    read_state,
    write_state,
    write_tag,
)
from ._locks import lock, try_lock, unlock
from ._mapping import MappedFile, map_file
from ._plan_file import PlanFile, read_plans, sweep_plans
from ._posix import make_directories, pwrite_all
from ._units import format_bytes
from ._wake import Wake
from .eviction import EvictionPolicy, NextUse

__all__ = ["BlockFile", "Tier", "warn_once"]

logger = logging.getLogger(__name__)

_MOST_TOLD = 1 << 13
_START_TIMEOUT_S = 60.0  # the first opener may have to count a million files
_LOCK_TIMEOUT_S = 5.0  # I6: nobody waits longer for a process that stopped; the cache does without instead
_FIRST_REST_S, _LONGEST_REST_S = 10.0, 600.0
"""How long a tier that failed is asked for no writes: each might cost seconds. A fault that passes must not be for ever."""
_NO_FAULT = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EINTR)
"""Of the process or of the moment, not of the disk: the next write may well succeed."""
_LOOKS = 5  # at a directory that isn't ours, before it is refused: others may be making or removing it meanwhile
_BLIND_PAUSE_S = 0.005  # between two looks at what another process fetches, where nobody can say that it is there
_FLOOR_SHARE, _MOST_FLOOR_BYTES = 0.05, 2**30
"""What the file system keeps free of a tier's blocks, unless the user says how much: others need it to go on working."""


# Guarantees: every method may be called from any thread. `_mutex` guards the lock file's descriptor and with it, through
# `_usage()`, the shared counter. `_policy_lock`, always the inner one, guards `_policy`. `_maps` and `_verified` are only
# touched in single atomic operations.
class Tier:
    """A directory of blocks with a capacity that all processes of the node keep together.

    The limit of the first process to open the directory binds the others until all have closed it.

    Args:
        path: the directory; made with mode 0700 if it is missing.
        kind: ``"ram"`` or ``"disk"``, for counters and messages.
        capacity: bytes, given those that are free in its file system now, and those that the tier uses.
        asked_bytes: what the user asked for, if he did: differing from the limit in force is worth a warning.
        durable: ``fdatasync`` each block before it gets its name.
        min_free_bytes: of the file system, below which nothing is stored, whoever fills it. None: 5 % of it, at most
            1 GiB.
        policy: makes the one that says which blocks go when there is no room; without one, none does.

    Raises:
        AccessDenied: the directory is a link, not ours, or open to others.
        ConfigError: it is in use for something else.
        UnknownVersion: a newer stoker made it.
        OSError: it can't be made or locked.
    """

    def __init__(
        self,
        path: Path,
        *,
        kind: str,
        capacity: Callable[[int, int], int],
        asked_bytes: int | None,
        durable: bool,
        min_free_bytes: int | None = None,
        policy: Callable[[], EvictionPolicy] | None = None,
    ) -> None:
        self.path, self.kind, self._make_policy, self._min_free_bytes = path, kind, policy, min_free_bytes
        self._capacity_rule, self._asked_bytes, self._durable = capacity, asked_bytes, durable
        self._reset()
        self._directory_fd = _open_directory(path)
        try:
            with self._mutex:
                self._attach()
        except BaseException:
            os.close(self._directory_fd)
            raise
        _live.add(self)

    def _reset(self) -> None:
        self._mutex = threading.RLock()
        self._policy_lock = threading.Lock()
        self._policy = None if self._make_policy is None else self._make_policy()
        self._decisions_to_go = 0
        self._lock_fd = -1
        self._wake: Wake | None = None
        self._writing_fds: set[int] = set()
        self._maps: weakref.WeakValueDictionary[str, MappedFile] = weakref.WeakValueDictionary()
        self._verified: dict[str, tuple[int, int]] = {}  # the file of each block that was checked or written here
        self._closed = False
        self._rests_until, self._rest_s = 0.0, _FIRST_REST_S
        self._plan_file: PlanFile | None = None
        self.corrupt = 0

    # -- opening, closing, forking

    def _attach(self) -> None:
        """Open the lock file and announce this process; if it is the only one, tidy up and set the limit."""
        self._lock_fd = os.open(
            "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._directory_fd
        )
        try:
            lock(self._lock_fd, START_BYTE, timeout_s=_START_TIMEOUT_S, place=str(self.path))
            try:
                first = try_lock(self._lock_fd, PRESENCE_BYTE)
                if first or read_state(self._lock_fd) is None:
                    self._begin()
                if not try_lock(self._lock_fd, PRESENCE_BYTE, shared=True):  # pragma: no cover - START is ours
                    raise OSError(errno.EDEADLK, "presence lock refused")
                if not first:
                    self._remove_leftovers(subtract=True)
                with suppress(OSError):
                    self._wake = self._open_wake()
            finally:
                unlock(self._lock_fd, START_BYTE)
        except BaseException:
            os.close(self._lock_fd)
            self._lock_fd = -1
            raise
        limit = self.capacity_bytes
        if self._asked_bytes is not None and limit != self._asked_bytes:
            logger.warning(
                "the limit in force for the %s tier in %s is %s, not the %s asked for",
                self.kind,
                self.path,
                format_bytes(limit),
                format_bytes(self._asked_bytes),
            )

    def _open_wake(self) -> Wake:
        # Opened once more: a mapping of the file that has the locks would keep them after it is closed. Not by its name:
        # that may be an empty file's by now, of a process that found the directory emptied, and whoever reads through
        # a mapping of an empty file dies.
        fd = os.open(f"/proc/self/fd/{self._lock_fd}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            return Wake(fd)
        finally:
            os.close(fd)

    def _begin(self) -> None:
        for folder in ("blocks", "tmp"):
            with suppress(FileExistsError):
                os.mkdir(folder, 0o700, dir_fd=self._directory_fd)
        self._remove_leftovers(subtract=False)
        sweep_plans(self._directory_fd)
        used = sum(size for folder in self._folders() for _, size in self._files(folder, BLOCK_NAME))
        free = os.statvfs(self._directory_fd)
        write_state(self._lock_fd, self._capacity_rule(free.f_bavail * free.f_frsize, used), used)

    def _remove_leftovers(self, *, subtract: bool) -> None:
        """Remove temporary files whose writer is gone: those that nobody holds locked."""
        with self._usage() as state:
            for name, _ in self._files("tmp", TEMPORARY_NAME):
                # Where locks don't work, a process may name or remove its file while we look: then it is no leftover.
                with suppress(FileNotFoundError):
                    fd = os.open(f"tmp/{name}", os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
                    try:
                        if try_lock(fd, 0):
                            os.unlink(f"tmp/{name}", dir_fd=self._directory_fd)
                            counters.add(f"cache.{self.kind}.reclaimed")
                            if subtract:
                                state.add(-int(name.partition("-")[0]))
                    finally:
                        os.close(fd)

    def close(self) -> None:
        """Leave the tier. Blocks stay, views stay valid, nothing can be admitted any more."""
        with self._mutex:
            if not self._closed:
                self._closed = True
                self._drop_plan_file()
                self._drop_descriptors()
                # Its number may be another file's at once: whoever is still in here must not use it.
                directory_fd, self._directory_fd = self._directory_fd, -1
                os.close(directory_fd)
                _live.discard(self)

    def _drop_descriptors(self) -> None:
        self._wake = None
        if self._lock_fd >= 0:
            os.close(self._lock_fd)
            self._lock_fd = -1

    def _after_fork(self) -> None:
        """In a forked child: give up the parent's locks; the first use takes our own."""
        for fd in self._writing_fds:
            with suppress(OSError):
                os.close(fd)
        with suppress(OSError):
            if self._plan_file is not None:
                os.close(self._plan_file.fd)  # the file and the lock on it are the parent's
            self._drop_descriptors()
        closed = self._closed
        self._reset()
        self._closed = closed

    # -- the shared counter

    @contextmanager
    def _usage(self) -> Iterator["_Usage"]:
        """Exclusive hold of the counter, also against the threads of this process.

        Whoever holds it counts before it makes a file and after it removes one: killed between the two, the tier looks
        fuller than it is until the next sole opener counts anew, and never emptier.
        """
        if not self._mutex.acquire(timeout=_LOCK_TIMEOUT_S):
            raise DeadlineExceeded(f"a lock must become free within {_LOCK_TIMEOUT_S:g} s", place=str(self.path))
        try:
            if self._lock_fd >= 0 and self._is_lock_file_gone():
                self._drop_descriptors()
            if self._lock_fd < 0:
                self._attach()
            lock(self._lock_fd, USAGE_BYTE, timeout_s=_LOCK_TIMEOUT_S, place=str(self.path))
            try:
                yield _Usage(self)
            finally:
                unlock(self._lock_fd, USAGE_BYTE)
        finally:
            self._mutex.release()

    def _is_lock_file_gone(self) -> bool:
        """Whether somebody emptied the directory: then processes that came later count in another file."""
        try:
            there = os.stat("lock", dir_fd=self._directory_fd, follow_symlinks=False)
        except FileNotFoundError:
            return True
        return not os.path.samestat(there, os.fstat(self._lock_fd))

    def _state(self) -> tuple[int, int]:
        with self._mutex:
            if self._closed:
                return (0, 0)
            try:
                if self._lock_fd < 0:
                    self._attach()
                return read_state(self._lock_fd) or (0, 0)
            except (DeadlineExceeded, OSError) as error:
                self._degrade(error, "count")
                return (0, 0)

    @property
    def capacity_bytes(self) -> int:
        """The limit in force; 0 after close, and where the directory is gone."""
        return self._state()[0]

    @property
    def used_bytes(self) -> int:
        """Bytes of all blocks of all processes, those being written included."""
        return self._state()[1]

    # -- reading

    def lookup(self, block: BlockFile, *, is_use: bool = True) -> memoryview | None:
        """The payload of a block as a read-only view of its file, or None if there is no healthy copy here.

        The view stays valid as long as it is referenced, also when the block is removed. Checked against `block` when
        this process opens the file for the first time; a copy that differs is removed and counted. `is_use` is whether
        this is somebody's read, which speaks for keeping the block.
        """
        mapped = self._maps.get(block.name)
        if mapped is None:
            if self._closed:
                return None
            try:
                mapped = self._open(block)
            except (FileNotFoundError, NotADirectoryError):
                self._verified.pop(block.name, None)
                return None
            except OSError as error:
                self._degrade(error, "read")
                return None
            if mapped is None:
                return None
            self._maps[block.name] = mapped
        if self._policy is not None and is_use:
            with self._policy_lock:
                self._policy.added(block.name, block.size_bytes)  # another process may have done so
                self._policy.used(block.name)
        start = block.header_bytes
        return memoryview(mapped).cast("B")[start : start + block.length].toreadonly()

    def _open(self, block: BlockFile) -> MappedFile | None:
        path = block_path(block.name)
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
                return None
            identity = _identity(info)
            if info.st_size == block.size_bytes:
                mapped = map_file(fd, info.st_size)
                if self._verified.get(block.name) == identity or self._is_healthy(fd, mapped, block):
                    self._verified[block.name] = identity
                    self._lease(block.name, mapped)
                    return mapped
            self._remove_corrupt(path, info)
            return None
        finally:
            os.close(fd)

    def _lease(self, name: str, mapped: MappedFile) -> None:
        """Tell the other processes that a block is in use here, as long as it is mapped."""
        if self._policy is None:  # a lock for each block is not free, and nobody would ask
            return
        fd, byte = self._lock_fd, lease_byte(name)
        with suppress(OSError):
            if fd >= 0 and try_lock(fd, byte, shared=True):
                weakref.finalize(mapped, _end_lease, weakref.ref(self), fd, byte).atexit = False

    def _is_leased(self, name: str) -> bool:
        """Whether a block is mapped, here or in another process; where locks don't work, only what is mapped here."""
        if name in self._maps:
            return True
        byte = lease_byte(name)
        with suppress(OSError):
            if not try_lock(self._lock_fd, byte):
                return True
            unlock(self._lock_fd, byte)
        return False

    def _is_healthy(self, fd: int, mapped: MappedFile, block: BlockFile) -> bool:
        start = block.header_bytes
        try:
            if os.pread(fd, start, 0) != block.header():
                return False
            if self._durable:
                # Read a disk before touching the mapping: a bad sector is an error here and kills with SIGBUS there.
                return crc32c_of_file(fd, start, block.length) == block.crc
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return crc32c(memoryview(mapped).cast("B")[start : start + block.length]) == block.crc

    def _remove_corrupt(self, path: str, info: os.stat_result) -> None:
        self.corrupt += 1
        counters.add("cache.corrupt")
        counters.add(f"cache.{self.kind}.corrupt")
        logger.warning("removed a damaged block from the %s tier: %s", self.kind, self.path / path)
        with suppress(FileNotFoundError, DeadlineExceeded), self._usage() as state:
            # Another process may have put a healthy copy in its place by now.
            if os.stat(path, dir_fd=self._directory_fd, follow_symlinks=False).st_ino == info.st_ino:
                os.unlink(path, dir_fd=self._directory_fd)
                state.add(-info.st_size)
                self._forget(os.path.basename(path))

    # -- fetching, one process for all

    def take_off(self, block: BlockFile) -> bool | None:
        """Whether this process is the one to fetch a block, until :meth:`land`; None where locks don't work.

        A lock saves work and guards nothing: two processes that fetch one block at once cost a request. A killed holder's
        is free at once.
        """
        with self._mutex:
            if self._closed or self._lock_fd < 0:
                return None
            try:
                return try_lock(self._lock_fd, flight_byte(block.name))
            except OSError:
                return None

    def land(self, block: BlockFile, *, tell: bool = True) -> None:
        """Let others fetch the block, should they still want to; `tell` those who wait, unless they know."""
        with self._mutex, suppress(OSError):
            if self._lock_fd >= 0:
                unlock(self._lock_fd, flight_byte(block.name))
                if tell:
                    self.tell(block)

    def news(self, block: BlockFile) -> int:
        """What :meth:`wait_for_news` needs, asked for before looking for a block."""
        wake = self._wake
        return 0 if wake is None else wake.seen(flight_byte(block.name))

    def wait_for_news(self, block: BlockFile, news: int) -> None:
        """Return when another process has stored a block or given it up since `news`; after 50 ms anyway."""
        wake = self._wake
        if wake is None:
            sleep(_BLIND_PAUSE_S)
        else:
            wake.wait(flight_byte(block.name), news)

    def tell(self, block: BlockFile) -> None:
        """Wake those who wait for a block: it is in a tier, or nobody fetches it any more."""
        with self._mutex, suppress(OSError):
            if self._wake is not None:
                self._wake.tell(self._lock_fd, flight_byte(block.name))

    # -- writing

    def admit(self, block: BlockFile, payload: memoryview, *, is_held: bool = False) -> bool:
        """Store a block if there is room; False if not, or if the file system refuses. Never raises for either.

        `is_held` says that another tier has the block for now, so that only reads after the next one speak for it here.
        """
        if self._closed or monotonic() < self._rests_until or not self._is_worth_it(block, is_held):
            return False
        try:
            fd, temporary = self._reserve(block, is_held)
        except (DeadlineExceeded, OSError) as error:
            self._degrade(error, "write")
            return False
        if fd < 0:
            return False
        try:
            os.posix_fallocate(fd, 0, block.size_bytes)
            if self._bytes_above_floor() < 0:  # others took room since we looked
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            pwrite_all(fd, block.header(), 0)
            pwrite_all(fd, payload, block.header_bytes)
            if self._durable:
                os.fdatasync(fd)
            published = self._publish(block, temporary)
            if self._policy is not None:
                with self._policy_lock:
                    self._policy.added(block.name, block.size_bytes)
            if published:
                # Checked by whoever fetched it, and copied by the kernel: no need to check our own copy at once.
                self._verified[block.name] = _identity(os.fstat(fd))
        except (DeadlineExceeded, OSError) as error:
            self._degrade(error, "write")
            self._discard(block, temporary)
            return False
        except BaseException:
            self._discard(block, temporary)
            raise
        finally:
            self._writing_fds.discard(fd)
            os.close(fd)
        self._rest_s = _FIRST_REST_S
        counters.add(f"cache.{self.kind}.admitted")
        return True

    def _reserve(self, block: BlockFile, is_held: bool) -> tuple[int, str]:
        """Take room for a block and open its temporary file; (-1, "") if there is no room."""
        temporary = f"tmp/{block.size_bytes}-{os.urandom(8).hex()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with self._usage() as state:
            if self._room(state) < block.size_bytes and not self._make_room(block, state, is_held):
                if state.capacity - state.used >= block.size_bytes:
                    self._tell_of_floor()
                return -1, ""
            state.add(block.size_bytes)
            try:
                fd = os.open(temporary, flags, 0o600, dir_fd=self._directory_fd)
            except OSError:
                state.add(-block.size_bytes)
                raise
            self._writing_fds.add(fd)
            try_lock(fd, 0)  # nobody else can hold it: whoever looks for leftovers waits for the counter
        return fd, temporary

    def _room(self, state: "_Usage") -> int:
        """Bytes that may be stored now: what is left of the capacity, and of the file system above its floor."""
        return min(state.capacity - state.used, self._bytes_above_floor())

    def _bytes_above_floor(self) -> int:
        info = os.statvfs(self._directory_fd)
        floor = self._min_free_bytes
        if floor is None:
            floor = min(int(_FLOOR_SHARE * info.f_blocks * info.f_frsize), _MOST_FLOOR_BYTES)
        return info.f_bavail * info.f_frsize - floor

    def _tell_of_floor(self) -> None:
        counters.add("cache.degraded")
        counters.add(f"cache.{self.kind}.below_floor")
        warn_once(
            f"the file system of the {self.kind} tier {self.path} has too little free space: blocks pass through until "
            "there is more"
        )

    def _is_worth_it(self, block: BlockFile, is_held: bool) -> bool:
        if self._policy is None:
            return True
        with self._policy_lock:
            return self._policy.is_worth_it(block.name, is_held=is_held)

    def _make_room(self, block: BlockFile, state: "_Usage", is_held: bool) -> bool:
        """Remove blocks for a newcomer, if the policy says so; whether there is room now."""
        if self._policy is None or not self._policy.may_evict:
            return False
        # What other processes added and removed: at first, then once for as many decisions as there are blocks.
        is_stale = self._decisions_to_go <= 0
        for _ in range(2):
            if is_stale:
                self._learn()
            self._decisions_to_go -= 1
            with self._policy_lock:
                victims = self._policy.admit(
                    block.name,
                    block.size_bytes,
                    free_bytes=self._room(state),
                    is_leased=self._is_leased,
                    is_held=is_held,
                )
            for victim in victims or ():
                self._evict(victim, state)
            if victims is not None and self._room(state) >= block.size_bytes:
                return True
            if is_stale or (victims is None and isinstance(self._policy, NextUse)):
                return False  # a plan lets most newcomers pass: to look through the directory for each costs too much
            is_stale = True
        return False

    def _evict(self, name: str, state: "_Usage") -> None:
        path = block_path(name)
        with suppress(FileNotFoundError):
            size = os.stat(path, dir_fd=self._directory_fd, follow_symlinks=False).st_size
            os.unlink(path, dir_fd=self._directory_fd)
            state.add(-size)
            counters.add(f"cache.{self.kind}.evicted")
        self._forget(name)

    def _forget(self, name: str) -> None:
        self._verified.pop(name, None)
        if self._policy is not None:
            with self._policy_lock:
                self._policy.removed(name)

    # -- plans

    def publish(self, plan: str, uses: Iterable[tuple[float, str]], *, lasts: float, final: bool) -> None:
        """Tell the policy, if it goes by plans, when blocks will be read; see :meth:`.eviction.NextUse.publish`."""
        if isinstance(self._policy, NextUse):
            with self._policy_lock:
                self._policy.publish(uses, plan=plan, lasts=lasts, final=final)

    def advance(self, plan: str, now: float) -> None:
        """The reader of a plan is there now."""
        if isinstance(self._policy, NextUse):
            with self._policy_lock:
                self._policy.advance(now, plan=plan)

    def withdraw(self, plan: str) -> None:
        """Forget a plan."""
        if isinstance(self._policy, NextUse):
            with self._policy_lock:
                self._policy.withdraw(plan=plan)
            if not self._policy.may_evict:
                with self._mutex:
                    self._drop_plan_file()

    def tell_others(self, takes_s: Mapping[str, float]) -> None:
        """Write down when stored blocks are read next, for other jobs and for tools; see :mod:`._plan_file`.

        `takes_s`: seconds that a unit of each plan's time takes.
        """
        if not isinstance(self._policy, NextUse):
            return
        with self._policy_lock:
            upcoming = self._policy.upcoming(takes_s)
        # Those that are read first, of more than anybody needs to know.
        upcoming = nsmallest(_MOST_TOLD, upcoming) if len(upcoming) > _MOST_TOLD else upcoming
        now = time()
        # The reader must not wait here for a thread that waits for another process: next time will do, it is advice.
        if not self._mutex.acquire(blocking=False):
            return
        try:
            with suppress(OSError):
                if not self._closed:
                    if self._plan_file is None:
                        self._plan_file = PlanFile(self._directory_fd)
                    self._plan_file.write((name, now + in_s) for in_s, name in upcoming)
        finally:
            self._mutex.release()

    def _drop_plan_file(self) -> None:
        if self._plan_file is not None:
            self._plan_file.close()
            self._plan_file = None

    @property
    def follows_plans(self) -> bool:
        """Whether what is published decides what stays."""
        return isinstance(self._policy, NextUse)

    @property
    def may_evict(self) -> bool:
        """Whether blocks go for newcomers, as things stand."""
        return self._policy is not None and self._policy.may_evict

    def _learn(self) -> None:
        """Bring the policy up to date with the directory, which is the index."""
        assert self._policy is not None
        found = {name: size for folder in self._folders() for name, size in self._files(folder, BLOCK_NAME)}
        for name in [name for name in list(self._verified) if name not in found]:  # removed by others
            self._verified.pop(name, None)
        with self._policy_lock:
            for name in self._policy.names():
                if name not in found:
                    self._policy.removed(name)
            for name, size in found.items():
                self._policy.added(name, size)
            if isinstance(self._policy, NextUse):
                own_fd = -1 if self._plan_file is None else self._plan_file.fd
                self._policy.spare(read_plans(self._directory_fd, own_fd=own_fd))
        self._decisions_to_go = max(64, len(found))

    def _publish(self, block: BlockFile, temporary: str) -> bool:
        """Give a block its name; False if another process did so first."""
        path = block_path(block.name)
        fds = {"src_dir_fd": self._directory_fd, "dst_dir_fd": self._directory_fd}
        with self._usage() as state:
            with suppress(FileNotFoundError):
                os.stat(path, dir_fd=self._directory_fd, follow_symlinks=False)
                # Its copy is as good, and counted; ours goes.
                os.unlink(temporary, dir_fd=self._directory_fd)
                state.add(-block.size_bytes)
                return False
            try:
                os.rename(temporary, path, **fds)
            except FileNotFoundError:
                os.mkdir(os.path.dirname(path), 0o700, dir_fd=self._directory_fd)
                os.rename(temporary, path, **fds)
        return True

    def _discard(self, block: BlockFile, temporary: str) -> None:
        with suppress(OSError, DeadlineExceeded), self._usage() as state:
            os.unlink(temporary, dir_fd=self._directory_fd)
            state.add(-block.size_bytes)

    def _degrade(self, error: Exception, act: str) -> None:
        if self._closed:  # while this went on
            return
        if act == "write" and not (isinstance(error, OSError) and error.errno in _NO_FAULT):
            self._rests_until = monotonic() + self._rest_s
            self._rest_s = min(2 * self._rest_s, _LONGEST_REST_S)
        counters.add("cache.degraded")
        counters.add(f"cache.{self.kind}.degraded")
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        warn_once(f"can't {act} blocks in the {self.kind} tier {self.path} ({reason}): going on without it for now")

    def clear(self) -> int:
        """Remove all blocks, of all processes; those in use stay valid. Returns the bytes."""
        removed = 0
        try:
            folders = self._folders()
        except FileNotFoundError:  # the directory is gone, and all that was in it
            return 0
        for folder in folders:
            with self._usage() as state:
                for name, size in self._files(folder, BLOCK_NAME):
                    with suppress(FileNotFoundError):  # somebody else's doing, where locks don't work
                        os.unlink(f"{folder}/{name}", dir_fd=self._directory_fd)
                        state.add(-size)
                        removed += size
                    self._forget(name)
        return removed

    def _folders(self) -> list[str]:
        with self._directory("blocks") as fd:
            return [f"blocks/{name}" for name in sorted(os.listdir(fd)) if FOLDER_NAME.fullmatch(name)]

    def _files(self, folder: str, names: re.Pattern[str]) -> list[tuple[str, int]]:
        """Name and size of the files that are ours by name, kind and owner."""
        found = []
        with suppress(FileNotFoundError, NotADirectoryError), self._directory(folder) as fd, os.scandir(fd) as entries:
            for entry in entries:
                if names.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    info = entry.stat(follow_symlinks=False)
                    if info.st_uid == os.geteuid():
                        found.append((entry.name, info.st_size))
        return found

    @contextmanager
    def _directory(self, name: str) -> Iterator[int]:
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=self._directory_fd)
        try:
            yield fd
        finally:
            os.close(fd)


class _Usage:
    """The shared counter while it is held."""

    __slots__ = ("_tier", "capacity", "used")

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.capacity, self.used = read_state(tier._lock_fd) or (0, 0)

    def add(self, size_bytes: int) -> None:
        """Count bytes in, or out if negative, for all processes at once."""
        self.used += size_bytes
        write_state(self._tier._lock_fd, self.capacity, self.used)


def _identity(info: os.stat_result) -> tuple[int, int]:
    return info.st_ino, info.st_mtime_ns


def _end_lease(tier: "weakref.ref[Tier]", fd: int, byte: int) -> None:
    owner = tier()
    # A tier that was closed has given up its locks, and its descriptor's number may be another file's by now.
    with suppress(OSError):
        if owner is not None and owner._lock_fd == fd:
            unlock(fd, byte)


# --- the directory ----------------------------------------------------------------------------------------------------


def _open_directory(path: Path) -> int:
    """Open the tier's directory, making it if it is missing; checked at every start."""
    make_directories(path)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            if not path.is_symlink():
                raise ConfigError("a cache directory must be a directory", place=str(path)) from error
            raise AccessDenied("a cache directory must not be a link", place=str(path)) from error
        raise
    try:
        info = os.fstat(fd)
        if info.st_uid != os.geteuid():
            raise AccessDenied(
                "a cache directory must belong to this user",
                value=f"user {info.st_uid}",
                place=str(path),
                hint="name a directory of your own",
            )
        if not has_tag(fd, path):
            _require_ours_or_empty(fd, path)
            os.fchmod(fd, 0o700)
            write_tag(path)
        elif info.st_mode & 0o077:
            raise AccessDenied(
                "a cache directory must have mode 0700",
                value=f"{stat.S_IMODE(info.st_mode):#o}",
                place=str(path),
                hint="find out who opened it to others, then chmod 700",
            )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _require_ours_or_empty(fd: int, path: Path) -> None:
    """Refuse a directory of someone else's, of which nothing may be touched."""
    for _ in range(_LOOKS):
        if may_become_a_tier(fd) or has_tag(fd, path):
            return
        sleep(_BLIND_PAUSE_S)
    raise ConfigError(
        "a cache directory must be empty or made by stoker",
        value=", ".join(sorted(os.listdir(fd))[:3]),
        place=str(path),
        hint="name a directory of its own",
    )


# --- once in a process ------------------------------------------------------------------------------------------------

_live: "weakref.WeakSet[Tier]" = weakref.WeakSet()
_warned: set[str] = set()


def warn_once(message: str) -> None:
    """Log a warning, the first time in this process."""
    if message not in _warned:
        _warned.add(message)
        logger.warning("%s", message)


def _after_fork_in_child() -> None:
    for tier in list(_live):
        tier._after_fork()


os.register_at_fork(after_in_child=_after_fork_in_child)
