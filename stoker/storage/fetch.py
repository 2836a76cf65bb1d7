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
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
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


def send(pipe: IO[bytes], message: object, data: Buffer = b"") -> None:
    """One message and bytes behind it."""
    head = pickle.dumps(message)
    view = memoryview(data).cast("B")
    pipe.write(_LENGTHS.pack(len(head), len(view)) + head)
    pipe.write(view)
    pipe.flush()


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
        self._process: subprocess.Popen[bytes] | None = None
        self._waiting: dict[int, queue.SimpleQueue[tuple[Any, memoryview]]] = {}
        self._ids = itertools.count()

    def call(self, what: tuple[Any, ...], data: Buffer, *, timeout_s: float, place: str) -> tuple[Any, memoryview]:
        """The helper's reply to `what`; what it raises is raised here."""
        answer: queue.SimpleQueue[tuple[Any, memoryview]] = queue.SimpleQueue()
        with self._lock:
            number = next(self._ids)
            pipe = self._started()
            self._waiting[number] = answer
            with suppress(BrokenPipeError):  # then the reader tells everyone
                send(pipe, (number, what), data)
        try:
            reply, received = answer.get(timeout=timeout_s)
        except queue.Empty:
            raise StoreUnavailable("the store must answer", value="timed out", place=place) from None
        finally:
            self._waiting.pop(number, None)
        if isinstance(reply, BaseException):
            raise reply
        return reply, received

    def _started(self) -> IO[bytes]:
        if self._process is None or self._process.poll() is not None:
            package = str(Path(__file__).resolve().parents[2])
            path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
            self._process = subprocess.Popen(
                [sys.executable, "-m", "stoker.storage.fetch_helper"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": path},
            )
            assert self._process.stdin is not None and self._process.stdout is not None
            for pipe in (self._process.stdin, self._process.stdout):
                with suppress(OSError):
                    fcntl.fcntl(pipe.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            threading.Thread(target=self._read_replies, args=(self._process,), name="stoker-fetch", daemon=True).start()
        assert self._process.stdin is not None
        return self._process.stdin

    def _read_replies(self, process: "subprocess.Popen[bytes]") -> None:
        assert process.stdout is not None
        with suppress(EOFError, OSError, ValueError):
            while True:
                (number, reply), data = receive(process.stdout)
                if (waiting := self._waiting.get(number)) is not None:
                    waiting.put((reply, data))
        ended = StoreUnavailable("the helper that fetches must run", value="it ended", place="stoker-fetch")
        for waiting in list(self._waiting.values()):
            waiting.put((ended, memoryview(b"")))

    def close(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            assert process.stdin is not None and process.stdout is not None
            with suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:  # in a request that hangs
                process.kill()
                process.wait()


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
