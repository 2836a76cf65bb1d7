"""A remote store through another process, for forked children of a process that has used obstore.

obstore's threads don't survive a fork, and a child that uses it hangs. So the child starts a helper,
``python -m stoker.storage.fetch_helper``, by exec, which inherits nothing, and sends it what it wants to know through a
pipe. The helper ends when the pipe is closed: when the child ends, however it ends.

What goes through the pipes is pickled, between two processes of one user that hold both ends; nothing of it is stored.
"""

import atexit
import fcntl
import itertools
import os
import pickle
import queue
import select
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic
from typing import IO, Any

from ..errors import StoreUnavailable, UnsupportedError
from ..metrics import counters
from ._units import Buffer
from .network import NetworkPolicy
from .store import ObjectInfo, ObjectStore, ObjectWriter

__all__ = ["FetchedStore", "receive", "send"]

_LENGTHS = struct.Struct("<QQ")  # of the pickled message and of the bytes behind it
_PIPE_BYTES = 1 << 20  # the most that an ordinary user may ask for: /proc/sys/fs/pipe-max-size
_GRACE_S = 10.0
"""How much longer than its policy says a call may take: the helper has to start, and the deadline to come back."""
_CLOSE_S = 5.0
_LONGEST_POLL_S = 86_400.0  # poll() takes no more than 2^31 ms


def send(pipe: IO[bytes], message: object, data: Buffer = b"") -> None:
    """One message and bytes behind it."""
    for part in _parts(message, data):
        pipe.write(part)
    pipe.flush()


def _parts(message: object, data: Buffer) -> tuple[bytes, memoryview]:
    head = pickle.dumps(message)
    view = memoryview(data).cast("B")
    return _LENGTHS.pack(len(head), len(view)) + head, view


def _send_by(deadline: float, fd: int, message: object, data: Buffer) -> None:
    """:func:`send` into a pipe that does not block; TimeoutError if the other end does not read it by `deadline`."""
    room = select.poll()
    room.register(fd, select.POLLOUT)
    for part in _parts(message, data):
        left = memoryview(part)
        while left:
            if not room.poll(1e3 * min(max(0.0, deadline - monotonic()), _LONGEST_POLL_S)):
                raise TimeoutError
            with suppress(BlockingIOError):
                left = left[os.write(fd, left[:_PIPE_BYTES]) :]


def receive(pipe: IO[bytes]) -> tuple[Any, memoryview]:
    """Raises EOFError at the end of the pipe."""
    head_bytes, data_bytes = _LENGTHS.unpack(_read(pipe, _LENGTHS.size))
    message = pickle.loads(_read(pipe, head_bytes))
    return message, _read(pipe, data_bytes)


def _read(pipe: IO[bytes], size: int) -> memoryview:
    buffer = memoryview(bytearray(size))
    done = 0
    while done < size:
        got = pipe.readinto(buffer[done:])  # type: ignore[attr-defined]  # of io.BufferedReader
        if not got:
            raise EOFError
        done += got
    return buffer


# --------------------------------------------------------------------------------------------------------- in the child


# Guarantees: call() may be called from any thread. `_lock` guards the helper's start, its end and the sending.
class _Helper:
    """The helper of this process, started when it is first needed and again if it died."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: _Running | None = None
        self._ids = itertools.count()

    def call(self, what: tuple[Any, ...], data: Buffer, *, timeout_s: float, place: str) -> tuple[Any, memoryview]:
        """The helper's reply to `what`; what it raises is raised here."""
        deadline = monotonic() + timeout_s
        late = StoreUnavailable("the store must answer", value="timed out", place=place)
        answer: queue.SimpleQueue[tuple[Any, memoryview]] = queue.SimpleQueue()
        if not self._lock.acquire(timeout=timeout_s):
            raise late
        try:
            number = next(self._ids)
            running = self._started()
            running.waiting[number] = answer
            try:
                running.send((number, what), data, deadline)
            except BaseException as error:  # in the middle of a message: this one can't be used any more
                running.end()
                if isinstance(error, TimeoutError):
                    raise late from None
                raise
        finally:
            self._lock.release()
        try:
            reply, received = answer.get(timeout=max(0.0, deadline - monotonic()))
        except queue.Empty:
            raise late from None
        finally:
            running.waiting.pop(number, None)
        if isinstance(reply, BaseException):
            raise reply
        return reply, received

    def _started(self) -> "_Running":
        if self._running is not None and self._running.has_ended:
            self._running.end()
            self._running = None
        if self._running is None:
            self._running = _Running()
        return self._running

    def close(self) -> None:
        running = self._running
        if running is None:
            return
        if not self._lock.acquire(timeout=_CLOSE_S):  # one that sends, to a helper that does not read
            running.process.kill()
            return
        try:
            self._running = None
            running.close()
        finally:
            self._lock.release()


# Guarantees: send(), end() and close() are called by one thread at a time. Whoever is in `waiting` when the helper ends,
# or comes later, is told.
class _Running:
    """One helper process and those who wait for its replies: what another one answers is not theirs."""

    def __init__(self) -> None:
        package = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stoker.storage.fetch_helper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env={**os.environ, "PYTHONPATH": path},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self._requests, self._replies = self.process.stdin, self.process.stdout
        for pipe in (self._requests, self._replies):
            with suppress(OSError):
                fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        os.set_blocking(self._requests.fileno(), False)  # of this end only
        self.waiting: dict[int, queue.SimpleQueue[tuple[Any, memoryview]]] = {}
        self._ended = False
        threading.Thread(target=self._read_replies, name="stoker-fetch", daemon=True).start()

    @property
    def has_ended(self) -> bool:
        return self._ended or self.process.poll() is not None

    def send(self, message: object, data: Buffer, deadline: float) -> None:
        """Raises TimeoutError, after part of it, if the helper does not read by `deadline`."""
        try:
            _send_by(deadline, self._requests.fileno(), message, data)
        except BrokenPipeError:
            self._ended = True
        if self._ended:  # perhaps before the thread that reads could know of this call
            self._tell_everyone()

    def _read_replies(self) -> None:
        try:
            with suppress(EOFError):
                while True:
                    (number, reply), data = receive(self._replies)
                    if (waiting := self.waiting.get(number)) is not None:
                        waiting.put((reply, data))
        finally:
            self._ended = True
            self._tell_everyone()
            self.process.kill()
            self.process.wait()
            self._replies.close()

    def _tell_everyone(self) -> None:
        ended = StoreUnavailable("the helper that fetches must run", value="it ended", place="stoker-fetch")
        for waiting in list(self.waiting.values()):
            waiting.put((ended, memoryview(b"")))

    def end(self) -> None:
        """Kill it; the thread that reads tells everyone."""
        self._ended = True
        self.process.kill()
        self._requests.close()

    def close(self) -> None:
        self._requests.close()
        try:
            self.process.wait(_CLOSE_S)
        except subprocess.TimeoutExpired:  # in a request that hangs
            self.process.kill()
            self.process.wait()


_helper: _Helper | None = None
_helper_pid = 0
_helper_lock = threading.Lock()


def _helper_of_this_process() -> _Helper:
    global _helper, _helper_pid
    with _helper_lock:
        if _helper is None or _helper_pid != os.getpid():
            _helper, _helper_pid = _Helper(), os.getpid()
            atexit.register(_helper.close)
        return _helper


def _new_lock_in_child() -> None:
    global _helper_lock
    _helper_lock = threading.Lock()


os.register_at_fork(after_in_child=_new_lock_in_child)


class FetchedStore(ObjectStore):
    """The store of `url` and `storage_options` as :func:`~stoker.storage.open_store` opens it, in the helper process.

    Requests are counted here, one for each call, whatever the helper had to repeat. Large objects can't be written.
    """

    def __init__(self, url: str, storage_options: dict[str, Any], *, shown_url: str) -> None:
        super().__init__(shown_url)
        self._given = (url, tuple(sorted(storage_options.items(), key=lambda item: item[0])))
        policy = storage_options.get("network") or NetworkPolicy()
        self._timeout_s = policy.timeout_s + _GRACE_S

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._given[0], dict(self._given[1]), self.url))

    def _call(self, verb: str, method: str, *arguments: Any, key: str, data: Buffer = b"", size: int = 0) -> Any:
        counters.add(f"store.{verb}.requests")
        return _helper_of_this_process().call(
            (self._given, method, arguments),
            data,
            timeout_s=self._timeout_s + size / 2**20,
            place=self.place(key),
        )

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        size = 0 if end is None else end - start
        data: memoryview = self._call("get", "get", key, start, end, version, key=key, size=size)[1]
        counters.add("store.get.bytes", len(data))
        return data.toreadonly()

    def get_into(self, key: str, buffer: memoryview, start: int = 0, *, version: str | None = None) -> None:
        buffer[:] = self.get(key, start, start + len(buffer), version=version)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        return self._write("put", key, data)

    def create(self, key: str, data: Buffer) -> ObjectInfo:
        return self._write("create", key, data)

    def _write(self, method: str, key: str, data: Buffer) -> ObjectInfo:
        view = memoryview(data).cast("B")
        info: ObjectInfo = self._call("put", method, key, key=key, data=view, size=len(view))[0]
        counters.add("store.put.bytes", len(view))
        return info

    def open_writer(self, key: str, size_bytes: int) -> ObjectWriter:
        raise UnsupportedError(
            "a large object can't be written by a forked process whose parent has used an object store",
            place=self.place(key),
            hint='start the process with "spawn" or "forkserver"',
        )

    def head(self, key: str) -> ObjectInfo:
        info: ObjectInfo = self._call("head", "head", key, key=key)[0]
        return info

    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        while limit is None or limit > 0:
            page_keys = 1000 if limit is None else min(limit, 1000)
            page: list[ObjectInfo] = self._call("list", "list", prefix, start_after, page_keys, key=prefix)[0]
            yield from page
            if len(page) < page_keys:
                return
            start_after = page[-1].key
            limit = None if limit is None else limit - len(page)

    def delete(self, key: str) -> None:
        self._call("delete", "delete", key, key=key)


def _reopen(url: str, storage_options: dict[str, Any], shown_url: str) -> FetchedStore:
    return FetchedStore(url, storage_options, shown_url=shown_url)
