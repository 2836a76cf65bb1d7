"""A proxy that breaks HTTP on purpose: put it between a job and its object store and see what the job does.

:class:`FaultProxy` listens on 127.0.0.1 and passes every request on to one HTTP/1.1 server, byte for byte, until a
:class:`Fault` is added::

    with S3Server() as server, FaultProxy(server) as proxy:
        store = open_store(server.url(), **proxy.storage_options)
        proxy.add(Fault("status", status=503), times=3)                      # the next three requests
        proxy.add(Fault("reset", at_byte=1000), probability=0.01)            # then one reading in a hundred
        proxy.add(Fault("lost_reply"), methods=("PUT",), path="/log/")       # every commit
        train(store)
        assert sum(request.bytes_sent for request in proxy.requests) < 1.1 * data_set_bytes

=======================  ===============================================================================================
the proxy answers        the server never sees the request
``status``               any status, with S3's XML error as the body: ``status`` (503), ``code`` (the usual one of that
                         status, such as ``SlowDown``), ``headers``. An expired credential is ``status=403,
                         code="ExpiredToken"`` (400 at AWS); ``status=200`` is a success that holds an error
``redirect``             to the same path at another host: ``location="http://host:port"``, ``status`` (307)
-----------------------  -----------------------------------------------------------------------------------------------
the connection breaks    without ``at_byte`` the server never sees the request; with it, after so many bytes of the body
``reset``                TCP RST: "connection reset by peer"
``close``                TCP FIN: a clean end
``stall``                nothing more is sent, and the connection stays open until the client gives up
``lost_reply``           the server does the work and answers, the client gets a reset instead
-----------------------  -----------------------------------------------------------------------------------------------
the body is wrong        the head of the reply says that all is well
``flip``                 one bit differs, in byte ``at_byte`` (drawn at random if not given)
``truncate``             ends after ``at_byte`` bytes (half) and Content-Length says so; Content-Range is left as it was
``wrong_bytes``          begins ``shift_bytes`` (1) further on, where it ends come the bytes that were left out
``wrong_content_range``  the right bytes, but Content-Range names others, ``shift_bytes`` (1) further on
-----------------------  -----------------------------------------------------------------------------------------------
the reply is slow
``delay``                the request is held back for ``delay_s``
``drip``                 the body comes at ``bytes_per_s``
=======================  ===============================================================================================

Any fault takes ``delay_s``: how long the request is held back before it strikes. A request that was held back goes on to
the server even if the client has given up on it, as in a network that was slow.

What it can't: TLS, HTTP/2 and upgrades; faults in the body of a request; lost, doubled or reordered packets. It runs in a
thread of your process and shares its GIL: code that computes in Python beside it slows it down.
"""

import asyncio
import errno
import fcntl
import html
import http.client
import os
import random
import re
import socket
import struct
import termios
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any, Literal, Protocol, Self, get_args
from urllib.parse import urlsplit

from ..errors import ConfigError, DeadlineExceeded, StoreError
from .s3 import S3Server

__all__ = ["Fault", "FaultKind", "FaultProxy", "FaultRule", "ProxiedRequest"]

FaultKind = Literal[
    "status",
    "redirect",
    "reset",
    "close",
    "stall",
    "lost_reply",
    "flip",
    "truncate",
    "wrong_bytes",
    "wrong_content_range",
    "delay",
    "drip",
]

_HOST = "127.0.0.1"
_CHUNK_BYTES = 512 << 10
_HEAD_BYTES = 64 << 10  # more than S3 allows in one head
_FAIR_BYTES = 4 << 20  # after so many, others get their turn; asyncio gives none while a socket is always ready
_BURST_S = 0.025  # makes up for timers that are late: 1 ms by asyncio's own rounding, 10 ms on a busy machine
_DRAIN_S = 5.0  # how long a client may leave the bytes before a reset unread

_FIELDS: dict[str, set[str]] = {
    "status": {"status", "code", "headers"},
    "redirect": {"status", "location"},
    "reset": {"at_byte"},
    "close": {"at_byte"},
    "stall": {"at_byte"},
    "lost_reply": set(),
    "flip": {"at_byte"},
    "truncate": {"at_byte"},
    "wrong_bytes": {"shift_bytes"},
    "wrong_content_range": {"shift_bytes"},
    "delay": set(),
    "drip": {"bytes_per_s"},
}
_NEEDED = {"redirect": "location", "delay": "delay_s", "drip": "bytes_per_s"}
_BREAKS = ("reset", "close", "stall")
_BODY_KINDS = ("flip", "truncate", "wrong_bytes", "wrong_content_range", "drip")

# As in Amazon's list of S3 error responses; 200 is what CompleteMultipartUpload answers when it fails late.
_ERRORS = {
    200: ("InternalError", "We encountered an internal error. Please try again."),
    307: ("TemporaryRedirect", "Please re-send this request to the specified temporary endpoint."),
    400: ("ExpiredToken", "The provided token has expired."),
    403: ("AccessDenied", "Access Denied"),
    404: ("NoSuchKey", "The specified key does not exist."),
    412: ("PreconditionFailed", "At least one of the preconditions you specified did not hold."),
    429: ("TooManyRequests", "Please reduce your request rate."),
    500: ("InternalError", "We encountered an internal error. Please try again."),
    503: ("SlowDown", "Please reduce your request rate."),
}


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request; the module's table says which kind takes which settings.

    A place past the end of a body means its last byte, so the fault strikes whatever the size.

    Attributes:
        kind: one of :data:`FaultKind`.
        status: of the proxy's own answer.
        code: in its XML body.
        headers: added to it, such as ``(("Retry-After", "1"),)``.
        location: scheme, host and port of a redirect.
        at_byte: of the body, from 0.
        shift_bytes: by how much a range is wrong.
        bytes_per_s: of a body that drips.
        delay_s: how long the request is held back first.

    Raises:
        ConfigError: no such kind, a setting that the kind does not have, one that is missing or out of range.
    """

    kind: FaultKind
    _: KW_ONLY
    status: int | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] | None = None
    location: str | None = None
    at_byte: int | None = None
    shift_bytes: int | None = None
    bytes_per_s: float | None = None
    delay_s: float | None = None

    def __post_init__(self) -> None:
        place = f"Fault({self.kind!r})"
        if self.kind not in _FIELDS:
            raise ConfigError(f"kind must be one of {', '.join(get_args(FaultKind))}", value=self.kind, place="Fault")
        given = {f.name for f in fields(self) if f.name != "kind" and getattr(self, f.name) is not None}
        allowed = _FIELDS[self.kind] | {"delay_s"}
        if foreign := sorted(given - allowed):
            raise ConfigError(f"takes only {', '.join(sorted(allowed))}", value=", ".join(foreign), place=place)
        if (needed := _NEEDED.get(self.kind)) and needed not in given:
            raise ConfigError(f"needs {needed}", place=place)
        if self.status is not None and not 200 <= self.status <= 599:
            raise ConfigError("status must be in [200, 599]", value=self.status, place=place)
        if self.location is not None and not re.fullmatch(r"https?://[^/\s]+/?", self.location):
            raise ConfigError("location must be http(s)://host[:port]", value=self.location, place=place)
        for name, least in (("at_byte", 0), ("shift_bytes", 1), ("delay_s", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name} must be >= {least}", value=value, place=place)
        _check_rate(self.bytes_per_s, place)

    @property
    def _own_answer(self) -> bool:
        return self.kind in ("status", "redirect")

    @property
    def _before_reply(self) -> bool:
        return self.kind in _BREAKS and self.at_byte is None

    @property
    def _in_body(self) -> bool:
        return self.kind in _BODY_KINDS or (self.kind in _BREAKS and self.at_byte is not None)


@dataclass(frozen=True, kw_only=True)
class ProxiedRequest:
    """One request that came through, as far as it has come.

    Attributes:
        time_s: when its head had been read, in seconds since the proxy started.
        method: ``GET``, …
        path: with the query, as the client sent it (percent-encoded).
        range: the Range header as it was sent; None without one.
        status: of the reply as the client sees it; None as long as there is none, and if it never came.
        bytes_received: body bytes read from the client.
        bytes_sent: body bytes handed to the client's connection, counted just before: what a client has read is in it,
            what was under way when the connection broke may be too.
        fault: the one that was applied; None if none was.
        ended: the proxy is done with it, whatever the outcome.
    """

    time_s: float
    method: str
    path: str
    range: str | None
    status: int | None
    bytes_received: int
    bytes_sent: int
    fault: Fault | None
    ended: bool

    @property
    def byte_range(self) -> tuple[int, int] | None:
        """Start and exclusive end of ``bytes=a-b``; None for any other Range header and without one."""
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.range or "")
        return (int(found[1]), int(found[2]) + 1) if found else None


class FaultRule:
    """A fault and the requests it is for, as :meth:`FaultProxy.add` made it.

    Attributes:
        fault: what it does.
        seen: requests that matched so far.
        hits: to how many of them the fault was applied.
    """

    def __init__(
        self,
        proxy: "FaultProxy",
        fault: Fault,
        *,
        times: int | None,
        after: int,
        probability: float,
        methods: tuple[str, ...] | None,
        path: "str | re.Pattern[str] | None",
        chance: random.Random,
    ) -> None:
        self.fault = fault
        self.seen = 0
        self.hits = 0
        self._proxy = proxy
        self._times, self._after, self._probability = times, after, probability
        # Only a GET surely has a body to spoil: a fault must not be used up by a HEAD.
        self._methods = methods or (("GET",) if fault._in_body else None)
        self._path = re.compile(re.escape(path)) if isinstance(path, str) else path
        self._chance = chance

    def remove(self) -> None:
        """Take it back. Requests it has hit go on as they are. Harmless when called twice."""
        self._proxy._remove(self)

    def _takes(self, request: "_Head") -> bool:
        if self._methods is not None and request.method not in self._methods:
            return False
        if self._path is not None and not self._path.search(request.target):
            return False
        if self.fault.kind == "wrong_content_range" and request.get("range") is None:
            return False
        self.seen += 1
        if self.seen <= self._after or (self._times is not None and self.hits >= self._times):
            return False
        # Drawn for every request in the span, so that the n-th draw is the n-th request's.
        if self._probability < 1.0 and self._chance.random() >= self._probability:
            return False
        self.hits += 1
        return True


# Guarantees: every public member may be used from any thread. `_changed` guards `_rules`, the counters of the rules,
# `_records` and `_waiting`; records are filled by the proxy's thread alone, to which `_connections` and the sockets belong
# too. `_ending` guards `_thread`.
class FaultProxy:
    """A proxy on a free port of 127.0.0.1, in a thread of its own; see the module for the faults.

    Starts when the ``with`` block is entered; at its end every connection is closed and the thread gone. Each client
    connection gets one connection to the server. The client's Host header is passed on as it is, so signatures (SigV4)
    that the client made for the proxy's address stay valid.

    Args:
        server: an :class:`~stoker.testing.S3Server`, or the URL of any HTTP/1.1 server: ``http://host:port``.
        seed: of every probability and random place. Which of several simultaneous requests comes first is not in it.
        bytes_per_s: limit of all bodies together, in each direction for itself; None is none.
        latency_s: how long each request is held back.

    Raises:
        ConfigError: a URL that is not ``http://host:port``, a rate or latency that is out of range.
        StoreError: the server's host has no address, or no port is free.

    ::

        with FaultProxy("http://127.0.0.1:9000") as proxy:
            proxy.add(Fault("status", status=429), probability=0.5)
            subprocess.run(["python", "train.py"], env={**os.environ, **proxy.env})
            assert all(request.status in (200, 206, 429) for request in proxy.requests)
    """

    def __init__(
        self, server: S3Server | str, *, seed: int = 0, bytes_per_s: float | None = None, latency_s: float = 0.0
    ) -> None:
        self._server = server
        self._seed = seed
        self.bytes_per_s = bytes_per_s
        self.latency_s = latency_s
        self._changed = threading.Condition()
        self._ending = threading.Lock()
        self._rules: list[FaultRule] = []
        self._made = 0
        self._records: list[_Record] = []
        self._waiting = 0
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._listener: socket.socket | None = None
        self._port = 0
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    # -- where it is

    @property
    def endpoint_url(self) -> str:
        """The proxy's address, for the client to use instead of the server's."""
        assert self._port, "the proxy runs inside its with block"
        return f"http://{_HOST}:{self._port}"

    @property
    def storage_options(self) -> dict[str, Any]:
        """The server's options with the proxy's address; of a server given by URL, the address alone."""
        options = self._server.storage_options if isinstance(self._server, S3Server) else {}
        return {**options, "endpoint_url": self.endpoint_url}

    @property
    def env(self) -> dict[str, str]:
        """The same as environment variables, for other processes and other clients."""
        env = self._server.env if isinstance(self._server, S3Server) else {}
        return {**env, "AWS_ENDPOINT_URL": self.endpoint_url}

    # -- what goes wrong

    def add(
        self,
        fault: Fault,
        *,
        times: int | None = None,
        after: int = 0,
        probability: float = 1.0,
        methods: tuple[str, ...] | None = None,
        path: "str | re.Pattern[str] | None" = None,
    ) -> FaultRule:
        """Apply `fault` to requests from now on. Rules are asked in the order in which they were added; the first that
        takes a request keeps it, and later ones do not count it.

        Args:
            times: how many requests it hits at most.
            after: how many that match are let through first.
            probability: of hitting each one after those.
            methods: which it matches; None: all, or GET alone for a fault in a body.
            path: text that must stand in the path or query as it is sent (percent-encoded), or a compiled pattern to
                search there.

        Raises:
            ConfigError: a number out of range.
        """
        return self._add(fault, False, times=times, after=after, probability=probability, methods=methods, path=path)

    def clear(self) -> None:
        """Remove all faults. Requests that one has hit go on as they are: see :meth:`drop_connections`."""
        with self._changed:
            self._rules.clear()

    @contextmanager
    def outage(self, fault: Fault | None = None) -> Iterator[FaultRule]:
        """While the block lasts every request meets `fault` (a reset), whatever else was added; what is under way when
        it begins is cut off.
        """
        rule = self._add(fault or Fault("reset"), True)
        self.drop_connections()
        try:
            yield rule
        finally:
            rule.remove()

    def drop_connections(self) -> None:
        """Reset every connection that is open now, those that stall among them; returns when that is done."""
        with self._ending:  # a loop that has ended would never answer
            if self._thread is not None and self._pid == os.getpid():
                asyncio.run_coroutine_threadsafe(self._drop(), self._loop).result()

    @property
    def bytes_per_s(self) -> float | None:
        """Limit of all bodies together, in each direction for itself; None is none. May be set at any time.

        A token bucket of 25 ms. Heads are not counted. It holds as far as the machine can pass that much at all.
        """
        return self._bytes_per_s

    @bytes_per_s.setter
    def bytes_per_s(self, bytes_per_s: float | None) -> None:
        _check_rate(bytes_per_s, "FaultProxy")
        self._bytes_per_s = bytes_per_s
        self._up = _Pacer(bytes_per_s, burst_s=_BURST_S) if bytes_per_s else None
        self._down = _Pacer(bytes_per_s, burst_s=_BURST_S) if bytes_per_s else None

    @property
    def latency_s(self) -> float:
        """How long each request is held back. May be set at any time."""
        return self._latency_s

    @latency_s.setter
    def latency_s(self, latency_s: float) -> None:
        if latency_s < 0:
            raise ConfigError("latency_s must be >= 0", value=latency_s, place="FaultProxy")
        self._latency_s = latency_s

    # -- what came through

    @property
    def requests(self) -> tuple[ProxiedRequest, ...]:
        """Every request so far, in the order of arrival; readable after the end of the block too."""
        with self._changed:
            return tuple(record.snapshot() for record in self._records)

    def clear_requests(self) -> None:
        """Forget the requests so far."""
        with self._changed:
            self._records.clear()

    def wait_until(
        self, condition: Callable[[tuple[ProxiedRequest, ...]], bool], *, timeout_s: float = 30.0
    ) -> tuple[ProxiedRequest, ...]:
        """Return :attr:`requests` as soon as `condition` holds for them; so no test needs to sleep.

        ::

            proxy.wait_until(lambda requests: any(r.bytes_received > 2**20 for r in requests))   # in mid-upload

        Raises:
            DeadlineExceeded: it does not hold within `timeout_s`.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            self._waiting += 1
            try:
                while not condition(seen := tuple(record.snapshot() for record in self._records)):
                    if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                        error = DeadlineExceeded(
                            f"the condition must hold within {timeout_s} s", place="FaultProxy.wait_until"
                        )
                        error.add_note(f"{len(seen)} requests came through, the last: {seen[-1] if seen else None}")
                        raise error
                return seen
            finally:
                self._waiting -= 1

    # -- start and end

    def __enter__(self) -> Self:
        assert self._thread is None, "a proxy runs once at a time"
        url = self._server.endpoint_url if isinstance(self._server, S3Server) else self._server
        host, port = _origin(url, "FaultProxy", "server")
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        except OSError as error:
            raise StoreError("the server's host must have an address", value=host, place="FaultProxy") from error
        self._family, self._address = found[0], found[4]
        try:
            self._listener = socket.create_server((_HOST, 0), backlog=1024)
        except OSError as error:
            raise StoreError(f"needs a free port on {_HOST}", value=error.strerror, place="FaultProxy") from error
        self._listener.setblocking(False)
        self._port = self._listener.getsockname()[1]
        self._pid = os.getpid()
        self._start_s = time.monotonic()
        self._failure = None
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="stoker-fault-proxy", daemon=True)
        _close_in_forked_children(self)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if self._failure is not None and kind is None:
            raise self._failure

    def close(self) -> None:
        """Close every connection and end the thread. Harmless when called twice."""
        with self._ending:
            thread, self._thread = self._thread, None
            if thread is None or self._pid != os.getpid():
                return
            self._loop.call_soon_threadsafe(self._stop.set)
            thread.join()
            self._loop.close()
            self._port = 0

    def _run(self) -> None:
        self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        assert self._listener is not None
        self._loop.add_reader(self._listener, self._accept, self._listener)
        await self._stop.wait()
        self._loop.remove_reader(self._listener)
        self._listener.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await asyncio.sleep(0)  # the done callbacks of the connections close their sockets

    def _accept(self, listener: socket.socket) -> None:
        # A callback, since a cancelled `sock_accept` can lose the socket that it has just got.
        try:
            sock, _ = listener.accept()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # until others have closed some, the loop must not spin
                self._loop.remove_reader(listener)
                self._loop.call_later(0.01, self._listen_again, listener)
            return
        connection = _Connection(self, sock)
        task = self._loop.create_task(connection.run())
        self._connections[task] = connection
        task.add_done_callback(self._finished)

    def _listen_again(self, listener: socket.socket) -> None:
        if not self._stop.is_set():
            self._loop.add_reader(listener, self._accept, listener)

    def _finished(self, task: "asyncio.Task[None]") -> None:
        # Here and not in the task: one that is cancelled before its first step runs no `finally`.
        self._connections.pop(task).close()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._failure = error
        self._tell()

    async def _drop(self) -> None:
        tasks = list(self._connections)
        for task in tasks:
            self._connections[task].client.reset_on_close()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)

    # -- for the connections

    def _add(
        self,
        fault: Fault,
        first: bool,
        *,
        times: int | None = None,
        after: int = 0,
        probability: float = 1.0,
        methods: tuple[str, ...] | None = None,
        path: "str | re.Pattern[str] | None" = None,
    ) -> FaultRule:
        if times is not None and times < 1:
            raise ConfigError("times must be >= 1", value=times, place="FaultProxy.add")
        if after < 0:
            raise ConfigError("after must be >= 0", value=after, place="FaultProxy.add")
        if not 0.0 <= probability <= 1.0:
            raise ConfigError("probability must be in [0, 1]", value=probability, place="FaultProxy.add")
        with self._changed:
            self._made += 1
            rule = FaultRule(
                self,
                fault,
                times=times,
                after=after,
                probability=probability,
                methods=methods,
                path=path,
                chance=random.Random(f"{self._seed}/{self._made}"),
            )
            self._rules.insert(0 if first else len(self._rules), rule)
        return rule

    def _remove(self, rule: FaultRule) -> None:
        with self._changed, suppress(ValueError):
            self._rules.remove(rule)

    def _arrived(self, request: "_Head") -> "tuple[_Record, random.Random | None]":
        """Log a request and choose what goes wrong with it."""
        record = _Record(
            time_s=time.monotonic() - self._start_s,
            method=request.method,
            path=request.target,
            range=request.get("range"),
        )
        with self._changed:
            rule = next((rule for rule in self._rules if rule._takes(request)), None)
            if rule is not None:
                record.fault = rule.fault
            self._records.append(record)
            self._changed.notify_all()
        return record, None if rule is None else rule._chance

    def _tell(self) -> None:
        # Unlocked look: who waits counts itself before it looks at the records, and they were changed before this.
        if self._waiting:
            with self._changed:
                self._changed.notify_all()


class _Record:
    """A :class:`ProxiedRequest` in the making."""

    __slots__ = ("bytes_received", "bytes_sent", "ended", "fault", "method", "path", "range", "status", "time_s")

    def __init__(self, *, time_s: float, method: str, path: str, range: str | None) -> None:
        self.time_s, self.method, self.path, self.range = time_s, method, path, range
        self.status: int | None = None
        self.bytes_received = 0
        self.bytes_sent = 0
        self.fault: Fault | None = None
        self.ended = False

    def snapshot(self) -> ProxiedRequest:
        return ProxiedRequest(**{name: getattr(self, name) for name in self.__slots__})


# --- what goes over one connection ------------------------------------------------------------------------------------


class _Broken(Exception):
    """A peer ended its connection, or sent what is no HTTP/1.1: the other one gets the same end."""

    def __init__(self, stream: "_Stream", *, reset: bool) -> None:
        self.stream, self.reset = stream, reset


class _Strike(Exception):
    """Time for the connection to break."""


class _Connection:
    """One client's connection and the one to the server that belongs to it: request, reply, request, …"""

    def __init__(self, proxy: FaultProxy, sock: socket.socket) -> None:
        self._proxy = proxy
        self.client = _Stream(proxy._loop, sock)
        self.upstream: _Stream | None = None

    def close(self) -> None:
        self.client.close()
        self._close_upstream()

    def _close_upstream(self) -> None:
        if self.upstream is not None:
            self.upstream.close()
            self.upstream = None

    async def run(self) -> None:
        try:
            while (head := await self.client.read_head()) is not None:
                record, chance = self._proxy._arrived(head)
                try:
                    again = await self._exchange(head, record, chance)
                except _Strike:
                    assert record.fault is not None
                    await self._break(record.fault.kind)
                    return
                finally:
                    record.ended = True
                    self._proxy._tell()
                if not again:
                    return
        except _Broken as broken:
            if broken.reset and broken.stream is not self.client:
                self.client.reset_on_close()

    async def _break(self, kind: FaultKind) -> None:
        if kind == "stall":
            await self.client.wait_until_gone()
        elif kind != "close":
            await self.client.wait_until_delivered()
            self.client.reset_on_close()

    async def _exchange(self, request: "_Head", record: _Record, chance: random.Random | None) -> bool:
        """One request and its reply. Returns whether the connection goes on."""
        fault = record.fault
        delay_s = self._proxy.latency_s + (fault.delay_s or 0.0 if fault else 0.0)
        if delay_s:
            await asyncio.sleep(delay_s)
        body = _Body(self.client, request.body_framing(default=0))
        if fault is not None and fault._own_answer:
            return await self._answer(request, body, record, fault)
        if fault is not None and fault._before_reply:
            if fault.kind == "close" and not request.expects_100():
                await self._swallow(body, record)  # unread bytes would turn the FIN into a RST
            raise _Strike
        upstream = await self._connect()
        await upstream.send(request.raw)
        if body.framing == 0:
            return await self._reply(upstream, request, record, chance)
        return await self._duplex(upstream, request, body, record, chance)

    async def _connect(self) -> "_Stream":
        if self.upstream is not None and self.upstream.is_dead():
            self._close_upstream()  # a server may close what is idle
        if self.upstream is None:
            try:
                self.upstream = _Stream(self._proxy._loop, socket.socket(self._proxy._family, socket.SOCK_STREAM))
                await self._proxy._loop.sock_connect(self.upstream.sock, self._proxy._address)
            except OSError:
                self.client.reset_on_close()
                raise _Broken(self.client, reset=True) from None
        return self.upstream

    async def _duplex(
        self, upstream: "_Stream", request: "_Head", body: "_Body", record: _Record, chance: random.Random | None
    ) -> bool:
        """A request with a body. The server may answer (100, or an error) before it has read all of it."""
        sending = asyncio.create_task(self._send_body(upstream, body, record))
        replying = asyncio.create_task(self._reply(upstream, request, record, chance))
        try:
            await asyncio.wait({sending, replying}, return_when=asyncio.FIRST_COMPLETED)
            if not replying.done():
                error = sending.exception()
                # A server that reads no more may still answer; a client that sends no more has gone.
                if error is not None and not (isinstance(error, _Broken) and error.stream is upstream):
                    raise error
            again = await replying
            if not again:
                sending.cancel()
            await asyncio.wait({sending})
            error = None if sending.cancelled() else sending.exception()
            if error is not None and not isinstance(error, _Broken):
                raise error
            if error is None and not sending.cancelled():
                return again
            # To close while the client still sends would reset the connection, and it might lose the reply.
            self.client.finish()
            await self.client.wait_until_gone()
            return False
        finally:
            for task in (sending, replying):
                task.cancel()
            await asyncio.gather(sending, replying, return_exceptions=True)

    async def _send_body(self, upstream: "_Stream", body: "_Body", record: _Record) -> None:
        while piece := await body.read(_piece_bytes(self._proxy._up)):
            record.bytes_received += len(piece)
            self._proxy._tell()
            if (pacer := self._proxy._up) is not None:
                await pacer.take(len(piece))
            await upstream.send(body.framed(piece))
        await upstream.send(body.end())

    async def _swallow(self, body: "_Body", record: _Record) -> None:
        while piece := await body.read(_CHUNK_BYTES):
            record.bytes_received += len(piece)

    async def _answer(self, request: "_Head", body: "_Body", record: _Record, fault: Fault) -> bool:
        """The proxy's own answer, as S3 would word it."""
        waits = request.expects_100()
        if not waits:
            await self._swallow(body, record)
        status = fault.status or (307 if fault.kind == "redirect" else 503)
        code, message = _ERRORS.get(status, ("InternalError" if status >= 500 else "InvalidRequest", "Injected fault."))
        text = (
            f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{html.escape(fault.code or code)}</Code>'
            f"<Message>{html.escape(message)}</Message><RequestId>0000000000000000</RequestId></Error>"
        )
        bodiless = request.method == "HEAD" or status in (204, 304)
        content = b"" if bodiless else text.encode()
        again = request.keeps_alive() and not waits
        lines = [
            f"HTTP/1.1 {status} {http.client.responses.get(status, 'Injected Fault')}",
            "Server: stoker-fault-proxy",
        ]
        if not bodiless:
            lines += ["Content-Type: application/xml", f"Content-Length: {len(content)}"]
        elif status not in (204, 304):
            lines.append("Content-Length: 0")
        if fault.location is not None:
            lines.append(f"Location: {fault.location.rstrip('/')}{request.target}")
        lines += [f"{name}: {value}" for name, value in fault.headers or ()]
        if not again:
            lines.append("Connection: close")
        record.status = status
        record.bytes_sent += len(content)
        await self.client.send("\r\n".join([*lines, "", ""]).encode("latin-1") + content)
        if waits:
            self.client.finish()
            await self.client.wait_until_gone()
        return again

    async def _reply(
        self, upstream: "_Stream", request: "_Head", record: _Record, chance: random.Random | None
    ) -> bool:
        """Pass the server's reply on. Returns whether both connections go on."""
        while True:
            head = await upstream.read_head()
            if head is None:
                raise _Broken(upstream, reset=False)
            if head.status >= 200:
                break
            await self.client.send(head.raw)
        fault = record.fault
        empty = request.method == "HEAD" or head.status in (204, 304)
        body = _Body(upstream, 0 if empty else head.body_framing(default=None))
        if fault is not None and fault.kind == "lost_reply":
            while await body.read(_CHUNK_BYTES):
                pass
            raise _Strike
        again = request.keeps_alive() and head.keeps_alive() and body.framing is not None
        source, cut, pacer = _with_fault(fault, head, body, chance)
        record.status = head.status
        await self.client.send(head.raw)
        sent = 0
        while cut is None or sent < cut:
            piece = await source.read(_piece_bytes(pacer or self._proxy._down))
            if not piece:
                break
            if cut is not None:
                piece = piece[: cut - sent]
            for limit in (pacer, self._proxy._down):
                if limit is not None:
                    await limit.take(len(piece))
            record.bytes_sent += len(piece)
            self._proxy._tell()
            await self.client.send(body.framed(piece))
            sent += len(piece)
        if fault is not None and fault.kind in _BREAKS:
            raise _Strike
        await self.client.send(body.end())
        if cut is not None:
            self._close_upstream()  # what is left of the body would be taken for the next reply
        return again


class _Stream:
    """One socket with the bytes that were read too far. A view that it returns is valid until the next read."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        sock.setblocking(False)
        with suppress(OSError):  # macOS refuses it to a socket whose peer has gone
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._loop = loop
        self._bytes = bytearray(_CHUNK_BYTES)
        self._buffer = memoryview(self._bytes)
        self._start = self._end = 0  # of what is read and not taken
        self._turn_bytes = 0

    async def _fill(self) -> bool:
        """Read more behind what is there; False at the end of the stream."""
        if self._start:
            self._buffer[: self._end - self._start] = self._buffer[self._start : self._end]
            self._start, self._end = 0, self._end - self._start
        try:
            count = await self._loop.sock_recv_into(self.sock, self._buffer[self._end :])
        except OSError:
            raise _Broken(self, reset=True) from None
        self._end += count
        return count > 0

    async def _read_to(self, mark: bytes) -> bytes | None:
        """All up to `mark`, with it; None if the stream ends first without a byte."""
        while True:
            found = self._bytes.find(mark, self._start, self._end)
            if found >= 0:
                text = bytes(self._buffer[self._start : found + len(mark)])
                self._start += len(text)
                return text
            if self._end - self._start > _HEAD_BYTES:
                raise _Broken(self, reset=True)
            if not await self._fill():
                if self._start == self._end:
                    return None
                raise _Broken(self, reset=False)

    async def read_head(self) -> "_Head | None":
        """The next head; None if the connection ends between two messages."""
        raw = await self._read_to(b"\r\n\r\n")
        try:
            return None if raw is None else _Head(raw)
        except ValueError:
            raise _Broken(self, reset=True) from None

    async def read_line(self) -> bytes:
        line = await self._read_to(b"\r\n")
        if line is None:
            raise _Broken(self, reset=False)
        return line

    async def read_some(self, limit_bytes: int) -> memoryview:
        """What is there, at most `limit_bytes`; empty at the end of the stream."""
        if self._start == self._end:
            self._start = self._end = 0
            try:
                self._end = await self._loop.sock_recv_into(self.sock, self._buffer[:limit_bytes])
            except OSError:
                raise _Broken(self, reset=True) from None
            self._turn_bytes += self._end
            if self._turn_bytes >= _FAIR_BYTES:
                self._turn_bytes = 0
                await asyncio.sleep(0)
        view = self._buffer[self._start : min(self._end, self._start + limit_bytes)]
        self._start += len(view)
        return view

    async def send(self, data: "bytes | memoryview") -> None:
        if not data:
            return
        try:
            await self._loop.sock_sendall(self.sock, data)
        except OSError:
            raise _Broken(self, reset=True) from None

    async def wait_until_gone(self) -> None:
        """Read and forget until the peer ends the connection."""
        with suppress(_Broken):
            while await self.read_some(_CHUNK_BYTES):
                pass

    async def wait_until_delivered(self) -> None:
        """Wait until the peer's kernel has all that was sent: a reset throws away what it has not."""
        deadline = time.monotonic() + _DRAIN_S
        while time.monotonic() < deadline:
            left = bytearray(4)
            try:
                fcntl.ioctl(self.sock, termios.TIOCOUTQ, left)  # man 7 tcp: SIOCOUTQ
            except OSError:
                return
            if not int.from_bytes(left, "little"):
                return
            await asyncio.sleep(0.001)

    def is_dead(self) -> bool:
        """Whether an idle connection can't be used again."""
        try:
            self.sock.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return self._start < self._end
        except OSError:
            return True
        return True

    def finish(self) -> None:
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)

    def reset_on_close(self) -> None:
        with suppress(OSError):
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def close(self) -> None:
        self.sock.close()


class _Head:
    """The head of a request or a reply, its bytes as they came."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        self._first = first.split(" ", 2)
        if len(self._first) < 2:
            raise ValueError(first)
        self.status = int(self._first[1]) if first.startswith("HTTP/") else 0
        self._fields: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            self._fields[name.strip().lower()] = value.strip()
        length = self._fields.get("content-length", "0")
        if not (length.isascii() and length.isdecimal()):
            raise ValueError(length)

    @property
    def method(self) -> str:
        return self._first[0]

    @property
    def target(self) -> str:
        return self._first[1]

    def get(self, name: str) -> str | None:
        return self._fields.get(name)

    def replace(self, name: str, value: str) -> None:
        """Change the value of a field that is there."""
        self.raw = re.sub(
            rb"(?im)^(" + re.escape(name.encode()) + rb"[ \t]*:)[^\r\n]*",
            lambda found: found[1] + b" " + value.encode("latin-1"),
            self.raw,
        )

    def expects_100(self) -> bool:
        """Whether the client may wait for a word before it sends the body."""
        return self._fields.get("expect", "").lower() == "100-continue"

    def keeps_alive(self) -> bool:
        tokens = {token.strip().lower() for token in self._fields.get("connection", "").split(",")}
        old = "HTTP/1.0" in (self._first[0], self._first[-1])
        return "close" not in tokens and (not old or "keep-alive" in tokens)

    def body_framing(self, *, default: int | None) -> "int | Literal['chunked'] | None":
        """How many bytes follow, or in chunks, or `default` (None: until the connection ends)."""
        if self._fields.get("transfer-encoding", "").lower().endswith("chunked"):
            return "chunked"
        length = self._fields.get("content-length")
        return default if length is None else int(length)


class _Source(Protocol):
    async def read(self, limit_bytes: int) -> memoryview:
        """The next bytes, at most `limit_bytes`; empty at the end."""


class _Body:
    """The bytes of one body, without the framing of chunks; :meth:`framed` and :meth:`end` put that back."""

    def __init__(self, stream: _Stream, framing: "int | Literal['chunked'] | None") -> None:
        self._stream = stream
        self.framing = framing
        self._left = framing if isinstance(framing, int) else 0  # of the body or the chunk
        self._trailers = b""
        self._begun = self._ended = False

    async def read(self, limit_bytes: int) -> memoryview:
        if self._ended:
            return memoryview(b"")
        if self.framing == "chunked" and not self._left:
            await self._next_chunk()
        if self.framing is not None and not self._left:
            self._ended = True
            return memoryview(b"")
        piece = await self._stream.read_some(limit_bytes if self.framing is None else min(limit_bytes, self._left))
        if self.framing is None:
            self._ended = not piece
        elif not piece:
            raise _Broken(self._stream, reset=False)
        else:
            self._left -= len(piece)
        return piece

    async def _next_chunk(self) -> None:
        if self._begun:
            await self._stream.read_line()
        self._begun = True
        size = (await self._stream.read_line()).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise _Broken(self._stream, reset=True)
        self._left = int(size, 16)
        while not self._left:
            line = await self._stream.read_line()
            if line == b"\r\n":
                break
            self._trailers += line

    def framed(self, piece: memoryview) -> "bytes | memoryview":
        return b"".join((b"%x\r\n" % len(piece), piece, b"\r\n")) if self.framing == "chunked" else piece

    def end(self) -> bytes:
        return b"0\r\n" + self._trailers + b"\r\n" if self.framing == "chunked" else b""


# --- what is done to a body -------------------------------------------------------------------------------------------


def _with_fault(
    fault: Fault | None, head: _Head, body: _Body, chance: random.Random | None
) -> "tuple[_Source, int | None, _Pacer | None]":
    """Where the body comes from, after how many bytes it ends, and how fast it comes; the head is changed in place."""
    if fault is None or chance is None:
        return body, None, None
    length = body.framing if isinstance(body.framing, int) else None
    last = None if length is None else max(0, length - 1)
    shift = fault.shift_bytes or 1
    match fault.kind:
        case "reset" | "close" | "stall":
            assert fault.at_byte is not None
            return body, fault.at_byte if last is None else min(fault.at_byte, last), None
        case "truncate":
            at_byte = (length or 0) // 2 if fault.at_byte is None else fault.at_byte
            cut = at_byte if last is None else min(at_byte, last)
            if length is not None:
                head.replace("content-length", str(cut))
            return body, cut, None
        case "flip":
            # Of a body without a length only the first byte is sure to be there.
            at_byte = chance.randrange(length or 1) if fault.at_byte is None else fault.at_byte
            return _Flipped(body, at_byte if last is None else min(at_byte, last), chance.randrange(8)), None, None
        case "wrong_bytes":
            return _Rotated(body, shift % length if length else shift), None, None
        case "wrong_content_range":
            if found := re.fullmatch(r"bytes (\d+)-(\d+)/(.+)", head.get("content-range") or ""):
                start, end = int(found[1]) + shift, int(found[2]) + shift
                head.replace("content-range", f"bytes {start}-{end}/{found[3]}")
        case "drip":
            assert fault.bytes_per_s is not None
            return body, None, _Pacer(fault.bytes_per_s, burst_s=0.0)
    return body, None, None


class _Flipped:
    def __init__(self, source: _Source, at_byte: int, bit: int) -> None:
        self._source, self._left, self._bit = source, at_byte, bit

    async def read(self, limit_bytes: int) -> memoryview:
        piece = await self._source.read(limit_bytes)
        if 0 <= self._left < len(piece):
            piece[self._left] ^= 1 << self._bit
        self._left -= len(piece)
        return piece


class _Rotated:
    """The first `shift` bytes come last."""

    def __init__(self, source: _Source, shift: int) -> None:
        self._source, self._left = source, shift
        self._held = bytearray()

    async def read(self, limit_bytes: int) -> memoryview:
        while piece := await self._source.read(limit_bytes):
            held, piece = piece[: self._left], piece[self._left :]
            self._held += held
            self._left -= len(held)
            if piece:
                return piece
        piece = memoryview(bytes(self._held[:limit_bytes]))
        del self._held[:limit_bytes]
        return piece


class _Pacer:
    """A token bucket, kept as the time at which the link will be free."""

    def __init__(self, bytes_per_s: float, *, burst_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._burst_s = burst_s
        self._free_s = time.monotonic()

    async def take(self, count: int) -> None:
        now = time.monotonic()
        self._free_s = max(self._free_s, now - self._burst_s) + count / self.bytes_per_s
        if self._free_s > now:
            await asyncio.sleep(self._free_s - now)


def _piece_bytes(pacer: _Pacer | None) -> int:
    """Small enough that a slow link is not one that stands still, then jumps: 20 pieces a second."""
    return _CHUNK_BYTES if pacer is None else max(1, min(_CHUNK_BYTES, int(pacer.bytes_per_s / 20)))


# --- checks and forks -------------------------------------------------------------------------------------------------


def _origin(url: str, place: str, name: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or 80
    except ValueError:
        host, port = None, 0
    if host is None or parts.scheme != "http" or parts.path.strip("/") or parts.query or parts.username:
        raise ConfigError(f"{name} must be http://host:port", value=url, place=place)
    return host, port


def _check_rate(bytes_per_s: float | None, place: str) -> None:
    if bytes_per_s is not None and bytes_per_s <= 0:
        raise ConfigError("bytes_per_s must be > 0", value=bytes_per_s, place=place)


_running: "weakref.WeakSet[FaultProxy]" = weakref.WeakSet()
_registered = False


def _close_in_forked_children(proxy: FaultProxy) -> None:
    """A forked child holds copies of our sockets, and as long as it does the clients see neither FIN nor RST."""
    global _registered
    if not _registered:
        os.register_at_fork(after_in_child=_close_inherited)
        _registered = True
    _running.add(proxy)


def _close_inherited() -> None:
    for proxy in list(_running):
        for connection in list(proxy._connections.values()):
            connection.close()
        if proxy._listener is not None:
            proxy._listener.close()
