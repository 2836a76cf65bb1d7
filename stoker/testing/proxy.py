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
import html
import http.client
import os
import random
import re
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit

from ..errors import ConfigError, DeadlineExceeded, StoreError
from ._fault import BREAKS, Fault, FaultKind, check_rate
from ._http import CHUNK_BYTES, Body, Broken, Head, Stream
from ._rule import Rule
from ._spoil import Pacer, piece_bytes, with_fault
from .s3 import S3Server

__all__ = ["Fault", "FaultKind", "FaultProxy", "FaultRule", "ProxiedRequest"]

_HOST = "127.0.0.1"
_BURST_S = 0.025  # makes up for timers that are late: 1 ms by asyncio's own rounding, 10 ms on a busy machine


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


class FaultRule(Rule):
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
        super().__init__("FaultProxy.add", times=times, after=after, probability=probability, chance=chance)
        self.fault = fault
        self._proxy = proxy
        # Only a GET surely has a body to spoil: a fault must not be used up by a HEAD.
        self._methods = methods or (("GET",) if fault._in_body else None)
        self._path = re.compile(re.escape(path)) if isinstance(path, str) else path

    def remove(self) -> None:
        """Take it back. Requests it has hit go on as they are. Harmless when called twice."""
        self._proxy._remove(self)

    def _takes(self, request: Head) -> bool:
        if self._methods is not None and request.method not in self._methods:
            return False
        if self._path is not None and not self._path.search(request.target):
            return False
        if self.fault.kind == "wrong_content_range" and request.get("range") is None:
            return False
        return self._strikes()


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
        check_rate(bytes_per_s, "FaultProxy")
        self._bytes_per_s = bytes_per_s
        self._up = Pacer(bytes_per_s, burst_s=_BURST_S) if bytes_per_s else None
        self._down = Pacer(bytes_per_s, burst_s=_BURST_S) if bytes_per_s else None

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

    def _arrived(self, request: Head) -> "tuple[_Record, random.Random | None]":
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


class _Strike(Exception):
    """Time for the connection to break."""


class _Connection:
    """One client's connection and the one to the server that belongs to it: request, reply, request, …"""

    def __init__(self, proxy: FaultProxy, sock: socket.socket) -> None:
        self._proxy = proxy
        self.client = Stream(proxy._loop, sock)
        self.upstream: Stream | None = None

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
        except Broken as broken:
            if broken.reset and broken.stream is not self.client:
                self.client.reset_on_close()

    async def _break(self, kind: FaultKind) -> None:
        if kind == "stall":
            await self.client.wait_until_gone()
        elif kind != "close":
            await self.client.wait_until_delivered()
            self.client.reset_on_close()

    async def _exchange(self, request: Head, record: _Record, chance: random.Random | None) -> bool:
        """One request and its reply. Returns whether the connection goes on."""
        fault = record.fault
        delay_s = self._proxy.latency_s + (fault.delay_s or 0.0 if fault else 0.0)
        if delay_s:
            await asyncio.sleep(delay_s)
        body = Body(self.client, request.body_framing(default=0))
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

    async def _connect(self) -> Stream:
        if self.upstream is not None and self.upstream.is_dead():
            self._close_upstream()  # a server may close what is idle
        if self.upstream is None:
            try:
                self.upstream = Stream(self._proxy._loop, socket.socket(self._proxy._family, socket.SOCK_STREAM))
                await self._proxy._loop.sock_connect(self.upstream.sock, self._proxy._address)
            except OSError:
                self.client.reset_on_close()
                raise Broken(self.client, reset=True) from None
        return self.upstream

    async def _duplex(
        self, upstream: Stream, request: Head, body: Body, record: _Record, chance: random.Random | None
    ) -> bool:
        """A request with a body. The server may answer (100, or an error) before it has read all of it."""
        sending = asyncio.create_task(self._send_body(upstream, body, record))
        replying = asyncio.create_task(self._reply(upstream, request, record, chance))
        try:
            await asyncio.wait({sending, replying}, return_when=asyncio.FIRST_COMPLETED)
            if not replying.done():
                error = sending.exception()
                # A server that reads no more may still answer; a client that sends no more has gone.
                if error is not None and not (isinstance(error, Broken) and error.stream is upstream):
                    raise error
            again = await replying
            if not again:
                sending.cancel()
            await asyncio.wait({sending})
            error = None if sending.cancelled() else sending.exception()
            if error is not None and not isinstance(error, Broken):
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

    async def _send_body(self, upstream: Stream, body: Body, record: _Record) -> None:
        while piece := await body.read(piece_bytes(self._proxy._up)):
            record.bytes_received += len(piece)
            self._proxy._tell()
            if (pacer := self._proxy._up) is not None:
                await pacer.take(len(piece))
            await upstream.send(body.framed(piece))
        await upstream.send(body.end())

    async def _swallow(self, body: Body, record: _Record) -> None:
        while piece := await body.read(CHUNK_BYTES):
            record.bytes_received += len(piece)

    async def _answer(self, request: Head, body: Body, record: _Record, fault: Fault) -> bool:
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

    async def _reply(self, upstream: Stream, request: Head, record: _Record, chance: random.Random | None) -> bool:
        """Pass the server's reply on. Returns whether both connections go on."""
        while True:
            head = await upstream.read_head()
            if head is None:
                raise Broken(upstream, reset=False)
            if head.status >= 200:
                break
            await self.client.send(head.raw)
        fault = record.fault
        empty = request.method == "HEAD" or head.status in (204, 304)
        body = Body(upstream, 0 if empty else head.body_framing(default=None))
        if fault is not None and fault.kind == "lost_reply":
            while await body.read(CHUNK_BYTES):
                pass
            raise _Strike
        again = request.keeps_alive() and head.keeps_alive() and body.framing is not None
        source, cut, pacer = with_fault(fault, head, body, chance)
        record.status = head.status
        await self.client.send(head.raw)
        sent = 0
        while cut is None or sent < cut:
            piece = await source.read(piece_bytes(pacer or self._proxy._down))
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
        if fault is not None and fault.kind in BREAKS:
            raise _Strike
        await self.client.send(body.end())
        if cut is not None:
            self._close_upstream()  # what is left of the body would be taken for the next reply
        return again


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
