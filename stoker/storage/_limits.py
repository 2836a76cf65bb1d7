"""How much may be under way at once: requests to an endpoint, by what it bears; bytes in a process, by its memory."""

import hashlib
import mmap
import os
import struct
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import StoreUnavailable
from ..metrics import counters
from ._locks import try_lock, unlock
from ._posix import is_private_directory, shared_memory_directory

__all__ = ["ByteBudget", "RequestLimit"]

_STATE = struct.Struct("<dd")
"""The window and when it was last halved, by CLOCK_MONOTONIC, which all processes of a machine share."""
_FIRST_SLOT = 64
_POLL_S = 0.005
"""Other processes give back slots without telling us."""
_START = 32.0


# Guarantees: every method may be called from any thread. `_changed` guards everything; two processes may write the
# window at once, and then one of the changes is lost, which the next answers repeat.
class RequestLimit:
    """Requests under way to one endpoint, of all processes of this user on this node.

    A window that grows by one when as many requests as it admits have succeeded, and is halved when the store says that
    it is too much (AIMD, as TCP does; Chiu and Jain 1989). It lies in one small file in shared memory, where each
    request under way is a locked byte: what a killed process held is free at once. Without shared memory each process
    has its own.

    Args:
        name: the endpoint.
        most: the window's upper end.
        path: the file; by default one of this user, by the name's digest.
    """

    def __init__(self, name: str, most: int, *, path: Path | None = None) -> None:
        self._place, self._most = name, most
        self._path = path if path is not None else _default_path(name)
        self._changed = threading.Condition()
        self._mine: set[int] = set()
        self._fd: int | None = None
        self._state: mmap.mmap | bytearray = bytearray(_STATE.pack(_START, 0.0))
        with suppress(OSError):  # no shared memory, or no locks: this process only
            self._share()
        _live.add(self)

    def _share(self) -> None:
        if self._path is None:
            return
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            try_lock(fd, 0, shared=True)  # the file system has locks, or this raises
            os.posix_fallocate(fd, 0, _FIRST_SLOT)
            self._state = mmap.mmap(fd, _FIRST_SLOT)
            if not _STATE.unpack_from(self._state)[0] >= 1:
                _STATE.pack_into(self._state, 0, _START, 0.0)
            unlock(fd, 0)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd
        self._close_file = weakref.finalize(self, os.close, fd)

    @property
    def window(self) -> float:
        """Requests that may be under way at once."""
        window: float = _STATE.unpack_from(self._state)[0]
        return max(1.0, min(float(self._most), window))

    @contextmanager
    def slot(self, deadline: float) -> Iterator[None]:
        """One request's place, inside the block.

        Raises:
            StoreUnavailable: none became free by `deadline`.
        """
        number = self._acquire(deadline)
        try:
            yield
        finally:
            with self._changed:
                self._mine.discard(number)
                if self._fd is not None:
                    unlock(self._fd, _FIRST_SLOT + number)
                self._changed.notify()

    def _acquire(self, deadline: float) -> int:
        with self._changed:
            while True:
                for number in range(int(self.window)):
                    if number not in self._mine and (self._fd is None or try_lock(self._fd, _FIRST_SLOT + number)):
                        self._mine.add(number)
                        return number
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    raise StoreUnavailable(
                        "a request must begin by its deadline",
                        value=f"{int(self.window)} requests under way",
                        place=self._place,
                    )
                self._changed.wait(left_s if self._fd is None else min(left_s, _POLL_S))

    def succeeded(self) -> None:
        """The store bore it."""
        with self._changed:
            window = self.window
            if len(self._mine) >= window / 2:  # a window that nobody fills says nothing about a larger one
                self._set(window + 1 / window)

    def throttled(self, began: float) -> None:
        """The store said, to a request that began at `began`, that it is too much. Halves once for all that were under way."""
        with self._changed:
            halved_at = _STATE.unpack_from(self._state)[1]
            if began > halved_at:
                self._set(self.window / 2, time.monotonic())
                counters.add("store.throttled")

    def _set(self, window: float, halved_at: float | None = None) -> None:
        before = _STATE.unpack_from(self._state)[1]
        clamped = max(1.0, min(float(self._most), window))
        _STATE.pack_into(self._state, 0, clamped, before if halved_at is None else halved_at)

    def close(self) -> None:
        """Give up the file; the limit goes on in this process."""
        with self._changed:
            if self._fd is not None:
                self._state = bytearray(_STATE.pack(*_STATE.unpack_from(self._state)))
                self._close_file()
                self._fd = None


_live: weakref.WeakSet[RequestLimit] = weakref.WeakSet()


def _close_in_child() -> None:
    # A forked child has a copy of each descriptor, which would keep its parent's places after the parent's death.
    for limit in list(_live):
        limit._changed = threading.Condition()
        limit.close()


os.register_at_fork(after_in_child=_close_in_child)


def _default_path(name: str) -> Path | None:
    try:
        directory = shared_memory_directory() / "limits"
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        if not is_private_directory(directory):
            return None
    except OSError:
        return None
    return directory / hashlib.sha256(name.encode()).hexdigest()[:16]


# Guarantees: every method may be called from any thread.
class ByteBudget:
    """Bytes under way in this process. Who comes first is served first; what is larger than all of it goes alone."""

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._changed = threading.Condition()
        self._taken_bytes = 0
        self._queue: list[object] = []

    @contextmanager
    def reserved(self, size: int, deadline: float, place: str) -> Iterator[None]:
        """`size` bytes, inside the block.

        Raises:
            StoreUnavailable: they did not become free by `deadline`.
        """
        ticket = object()
        with self._changed:
            self._queue.append(ticket)
            try:
                if not self._changed.wait_for(lambda: self._fits(ticket, size), max(0.0, deadline - time.monotonic())):
                    raise StoreUnavailable(
                        "memory for a request must become free by its deadline",
                        value=f"{self._taken_bytes} of {self._capacity_bytes} bytes in flight",
                        place=place,
                    )
                self._taken_bytes += size
            finally:
                self._queue.remove(ticket)
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._taken_bytes -= size
                self._changed.notify_all()

    def _fits(self, ticket: object, size: int) -> bool:
        first = self._queue[0] is ticket
        return first and (self._taken_bytes == 0 or self._taken_bytes + size <= self._capacity_bytes)
