"""The fault proxy: what it lets through is untouched, and every fault is on the wire what its name says."""

import http.client
import itertools
import os
import random
import re
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, get_args
from urllib.parse import urlsplit

import obstore
import pytest
from obstore.store import S3Store

from stoker.errors import ConfigError, DeadlineExceeded, StokerError, StoreError
from stoker.storage import ObjectStore, open_store
from stoker.testing import Fault, FaultProxy, ProxiedRequest, S3Server
from stoker.testing.proxy import FaultKind
from stoker.testing.store import StoreTests

DATA = random.Random(1).randbytes(100_000)
BREAKS: list[tuple[FaultKind, bool]] = [("reset", True), ("close", False)]


@dataclass(frozen=True, kw_only=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


class Wire:
    """One plain connection to the proxy."""

    def __init__(self, proxy: FaultProxy, target: str = "/data") -> None:
        parts = urlsplit(proxy.endpoint_url)
        assert parts.hostname is not None
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=60)
        self.target = target

    def __enter__(self) -> Self:
        self.connection.connect()
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()

    @property
    def sock(self) -> socket.socket:
        assert isinstance(self.connection.sock, socket.socket)
        return self.connection.sock

    def send(self, method: str = "GET", target: str | None = None, **headers: str) -> None:
        self.connection.request(
            method, target or self.target, headers={name.replace("_", "-"): value for name, value in headers.items()}
        )

    def ask(self, method: str = "GET", target: str | None = None, *, body: Any = None, **headers: str) -> Reply:
        fields = {name.replace("_", "-"): value for name, value in headers.items()}
        self.connection.request(method, target or self.target, body=body, headers=fields)
        with self.connection.getresponse() as reply:
            return Reply(
                status=reply.status,
                headers={name.lower(): value for name, value in reply.getheaders()},
                body=reply.read(),
            )

    def raw(self, request: bytes) -> None:
        self.sock.sendall(request)

    def reply(self) -> bytes:
        """The body of the reply to a raw request."""
        with http.client.HTTPResponse(self.sock) as reply:
            reply.begin()
            return reply.read()

    def read_to_the_end(self) -> tuple[bytes, bytes, bool]:
        """Head, body, and whether the connection ended with a reset."""
        read, reset = bytearray(), False
        try:
            while piece := self.sock.recv(65536):
                read += piece
        except ConnectionResetError:
            reset = True
        head, _, body = bytes(read).partition(b"\r\n\r\n")
        return head, body, reset

    def is_silent(self) -> bool:
        """Nothing to read, and no end either."""
        return not select.select([self.sock], [], [], 0.05)[0]


class Server(ThreadingHTTPServer):
    """A plain HTTP/1.1 server which shows what reached it."""

    daemon_threads = False
    allow_reuse_address = True

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        pass  # clients are cut off on purpose


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle_expect_100(self) -> bool:
        if self.path == "/refuses":
            self.close_connection = True
            self._answer(417, b"no", ("Connection", "close"))
            return False
        return super().handle_expect_100()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline().partition(b";")[0], 16):
                body += self.rfile.read(size)
                assert self.rfile.readline() == b"\r\n"
            while (line := self.rfile.readline()) != b"\r\n":
                body += line
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _answer(self, status: int, body: bytes, *headers: tuple[str, str]) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(body)

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path, b""))
        if self.path == "/chunked":
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.send_header("Trailer", "Sum")
            self.end_headers()
            for start in range(0, len(DATA), 30_000):
                piece = DATA[start : start + 30_000]
                self.wfile.write(b"%X;note=1\r\n%s\r\n" % (len(piece), piece))
            self.wfile.write(b"0\r\nSum: 7\r\n\r\n")
        elif self.path == "/endless":  # ends with the connection
            self.close_connection = True
            self.send_response(200)
            self.end_headers()
            self.wfile.write(DATA)
        elif self.path in ("/204", "/304"):
            self._answer(int(self.path[1:]), b"")
        elif self.path == "/lies":  # the server itself breaks off
            self.close_connection = True
            self.send_response(200)
            self.send_header("Content-Length", str(len(DATA)))
            self.end_headers()
            self.wfile.write(DATA[:1000])
        elif self.path == "/leaves":
            self.close_connection = True  # without a word about it
            self._answer(200, DATA)
        else:
            found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if found:
                start, end = int(found[1]), int(found[2]) + 1
                place = f"bytes {start}-{end - 1}/{len(DATA)}"
                self._answer(206, DATA[start:end], ("Content-Range", place), ("ETag", '"1"'))
            else:
                self._answer(200, DATA, ("ETag", '"1"'))

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        if self.path == "/early":
            self.close_connection = True
            self._answer(413, b"too large", ("Connection", "close"))
            with suppress(OSError):  # as Apache and nginx linger
                self.connection.shutdown(socket.SHUT_WR)
                while self.connection.recv(65536):
                    pass
            return
        body = self._body()
        self.server.seen.append((self.command, self.path, body))
        self._answer(200, body)


@contextmanager
def running_server() -> Iterator[Server]:
    """Its end waits for all its threads, and those for the end of their connections."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def server() -> Iterator[Server]:
    with running_server() as server:
        yield server


@pytest.fixture
def proxy(server: Server) -> Iterator[FaultProxy]:
    with FaultProxy(server.url) as proxy:
        yield proxy


@pytest.fixture
def wire(proxy: FaultProxy) -> Iterator[Wire]:
    with Wire(proxy) as wire:
        yield wire


def range_of(start: int, end: int) -> str:
    return f"bytes={start}-{end - 1}"


def when(proxy: FaultProxy, condition: Callable[[ProxiedRequest], bool]) -> ProxiedRequest:
    """The last request, once there is one for which `condition` holds."""
    return proxy.wait_until(lambda requests: bool(requests) and condition(requests[-1]))[-1]


def last(proxy: FaultProxy) -> ProxiedRequest:
    return when(proxy, lambda request: request.ended)


# -- what is let through


def test_a_reply_comes_through_untouched_and_is_logged(proxy: FaultProxy, server: Server, wire: Wire) -> None:
    whole = wire.ask()
    part = wire.ask("GET", "/data?x=%20y", Range=range_of(10, 30))
    assert (whole.status, whole.body, whole.headers["etag"]) == (200, DATA, '"1"')
    assert (part.status, part.body, part.headers["content-range"]) == (206, DATA[10:30], "bytes 10-29/100000")
    assert [path for _, path, _ in server.seen] == ["/data", "/data?x=%20y"]
    last(proxy)
    first, second = proxy.requests
    assert 0 < first.time_s < second.time_s
    assert replace(first, time_s=0) == ProxiedRequest(
        time_s=0,
        method="GET",
        path="/data",
        range=None,
        status=200,
        bytes_received=0,
        bytes_sent=len(DATA),
        fault=None,
        ended=True,
    )
    assert (second.path, second.range, second.byte_range) == ("/data?x=%20y", "bytes=10-29", (10, 30))
    assert (first.byte_range, second.status, second.bytes_sent) == (None, 206, 20)
    proxy.clear_requests()
    assert proxy.requests == ()


def test_replies_without_a_body_leave_the_connection_in_step(proxy: FaultProxy, wire: Wire) -> None:
    for _ in range(2):
        head = wire.ask("HEAD")
        assert (head.status, head.headers["content-length"], head.body) == (200, str(len(DATA)), b"")
        assert wire.ask("GET", "/204").status == 204
        assert wire.ask("GET", "/304").status == 304
        assert wire.ask().body == DATA
    assert [request.bytes_sent for request in proxy.requests] == [0, 0, 0, len(DATA)] * 2


def test_chunks_come_through_both_ways_with_their_trailers(proxy: FaultProxy, server: Server, wire: Wire) -> None:
    for _ in range(2):
        wire.raw(b"GET /chunked HTTP/1.1\r\nHost: h\r\nConnection: keep-alive\r\n\r\n")
        raw = b""
        while not raw.endswith(b"\r\n\r\n") or b"Sum: 7" not in raw:
            raw += wire.sock.recv(65536)
        head, _, rest = raw.partition(b"\r\n\r\n")
        body = b""
        while (size := int(rest[: rest.index(b"\r\n")], 16)) > 0:
            start = rest.index(b"\r\n") + 2
            body, rest = body + rest[start : start + size], rest[start + size + 2 :]
        assert b"Transfer-Encoding: chunked" in head
        assert (body, rest) == (DATA, b"0\r\nSum: 7\r\n\r\n")
    wire.connection.request("PUT", "/up", body=iter([b"one", b"two" * 50_000]), encode_chunked=True)
    assert wire.connection.getresponse().read() == b"one" + b"two" * 50_000
    wire.raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3;a=b\r\nabc\r\n0\r\nSum: 7\r\n\r\n")
    assert wire.reply() == b"abcSum: 7\r\n"
    assert wire.ask().body == DATA
    assert server.seen[2][2] == b"one" + b"two" * 50_000
    assert server.seen[3][2] == b"abcSum: 7\r\n"
    assert [request.bytes_received for request in proxy.requests] == [0, 0, 150_003, 3, 0]


def test_a_large_body_goes_up_and_comes_back(proxy: FaultProxy, wire: Wire) -> None:
    data = random.Random(2).randbytes(5_000_000)
    assert wire.ask("PUT", "/up", body=data).body == data
    request = last(proxy)
    assert (request.bytes_received, request.bytes_sent) == (len(data), len(data))


def test_a_client_that_waits_for_100_is_told_to_go_on(server: Server, proxy: FaultProxy, wire: Wire) -> None:
    wire.raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    assert wire.sock.recv(25, socket.MSG_WAITALL) == b"HTTP/1.1 100 Continue\r\n\r\n"
    wire.raw(b"body")
    assert wire.reply() == b"body"
    assert wire.ask().body == DATA
    assert server.seen[0] == ("PUT", "/up", b"body")
    with Wire(proxy) as other:
        other.raw(b"PUT /refuses HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
        head, body, reset = other.read_to_the_end()
        assert head.startswith(b"HTTP/1.1 417") and (body, reset) == (b"no", False)


def test_a_client_that_still_sends_gets_the_early_answer(proxy: FaultProxy, wire: Wire) -> None:
    wire.raw(b"PUT /early HTTP/1.1\r\nHost: h\r\nContent-Length: 3000000\r\n\r\n" + bytes(1000))
    when(proxy, lambda request: request.status == 413)
    wire.raw(bytes(1_000_000))
    head, body, reset = wire.read_to_the_end()
    assert head.startswith(b"HTTP/1.1 413") and (body, reset) == (b"too large", False)


def test_a_body_without_a_length_ends_with_the_connection(wire: Wire) -> None:
    wire.raw(b"GET /endless HTTP/1.1\r\nHost: h\r\n\r\n")
    _, body, reset = wire.read_to_the_end()
    assert (body, reset) == (DATA, False)


def test_what_the_server_breaks_off_breaks_off_for_the_client(wire: Wire) -> None:
    wire.raw(b"GET /lies HTTP/1.1\r\nHost: h\r\n\r\n")
    head, body, reset = wire.read_to_the_end()
    assert b"Content-Length: 100000" in head
    assert (body, reset) == (DATA[:1000], False)


def test_a_connection_outlives_the_servers(proxy: FaultProxy, wire: Wire) -> None:
    for _ in range(3):
        assert wire.ask("GET", "/leaves").body == DATA
        (task,) = proxy._connections.values()
        assert task.upstream is not None
        select.select([task.upstream.sock], [], [])  # the server's FIN has come
    assert wire.ask().body == DATA


def test_requests_may_follow_each_other_without_waiting(proxy: FaultProxy, wire: Wire) -> None:
    wire.raw(
        b"GET /204 HTTP/1.1\r\nHost: h\r\n\r\n" * 3 + b"GET /data HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"
    )
    _, rest, reset = wire.read_to_the_end()
    assert rest.count(b"HTTP/1.1 204") == 2 and rest.endswith(DATA) and not reset
    assert len(proxy.requests) == 4


@pytest.mark.parametrize("size", [b"-5", b"xyz", b""])
def test_chunks_that_are_none_are_cut_off(server: Server, wire: Wire, size: bytes) -> None:
    wire.raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n" + size + b"\r\nabc\r\n0\r\n\r\n")
    assert wire.read_to_the_end()[0] == b""
    assert server.seen == []


@pytest.mark.parametrize("raw", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", b"x" * 100_000])
def test_what_is_no_http_is_cut_off(proxy: FaultProxy, wire: Wire, raw: bytes) -> None:
    with suppress(OSError):
        wire.raw(raw)
    head, _, _ = wire.read_to_the_end()
    assert head == b""
    assert proxy.requests == ()


def test_a_dead_server_is_a_reset(server: Server) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with FaultProxy(f"http://127.0.0.1:{port}") as proxy, Wire(proxy) as wire:
        wire.send()
        assert wire.read_to_the_end() == (b"", b"", True)
        assert last(proxy).status is None
    with pytest.raises(StoreError, match="host must have an address"):
        FaultProxy("http://no-such-host.invalid:80").__enter__()


# -- each fault on the wire


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        (Fault("status"), 503, "SlowDown"),
        (Fault("status", status=429), 429, "TooManyRequests"),
        (Fault("status", status=500), 500, "InternalError"),
        (Fault("status", status=403, code="ExpiredToken"), 403, "ExpiredToken"),
        (Fault("status", status=200), 200, "InternalError"),
        (Fault("status", status=418), 418, "InvalidRequest"),
    ],
)
def test_a_status_is_answered_in_the_servers_place(
    proxy: FaultProxy, server: Server, wire: Wire, fault: Fault, status: int, code: str
) -> None:
    proxy.add(replace(fault, headers=(("Retry-After", "1"),)), times=2)
    got = wire.ask("PUT", "/up", body=b"body")
    assert (got.status, got.headers["retry-after"]) == (status, "1")
    assert got.headers["content-type"] == "application/xml"
    assert f"<Error><Code>{code}</Code>".encode() in got.body
    assert server.seen == []
    bodiless = wire.ask("HEAD")
    assert (bodiless.status, bodiless.body) == (status, b"")
    assert wire.ask().body == DATA
    assert [(request.status, request.bytes_received) for request in proxy.requests[:2]] == [(status, 4), (status, 0)]
    assert proxy.requests[0].fault == replace(fault, headers=(("Retry-After", "1"),))


def test_a_client_that_waits_for_100_gets_the_status_instead(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("status"))
    wire.raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\nExpect: 100-continue\r\n\r\n")
    when(proxy, lambda request: request.status == 503)
    wire.raw(b"body")  # a client may send it all the same
    wire.sock.shutdown(socket.SHUT_WR)
    head, _, reset = wire.read_to_the_end()
    assert head.startswith(b"HTTP/1.1 503") and not reset


def test_a_redirect_names_another_host(proxy: FaultProxy, server: Server, wire: Wire) -> None:
    proxy.add(Fault("redirect", location="http://127.0.0.2:81"), times=1)
    got = wire.ask("GET", "/data?x=1")
    assert (got.status, got.headers["location"]) == (307, "http://127.0.0.2:81/data?x=1")
    assert server.seen == []
    assert wire.ask().body == DATA


@pytest.mark.parametrize("method", ["GET", "PUT"])
@pytest.mark.parametrize(("kind", "reset"), BREAKS)
def test_a_connection_breaks_before_the_reply(
    proxy: FaultProxy, server: Server, wire: Wire, kind: FaultKind, reset: bool, method: str
) -> None:
    proxy.add(Fault(kind), times=1)
    body_bytes = 0 if method == "GET" else 3_000_000  # more than the proxy reads at once
    wire.raw(f"{method} /up HTTP/1.1\r\nHost: h\r\nContent-Length: {body_bytes}\r\n\r\n".encode())
    told = False
    try:
        wire.raw(bytes(body_bytes))
    except ConnectionError:  # a socket tells of its reset once
        told = True
    head, body, was_reset = wire.read_to_the_end()
    assert (head, body, was_reset or told) == (b"", b"", reset)
    assert server.seen == []
    assert (last(proxy).status, last(proxy).bytes_sent) == (None, 0)


@pytest.mark.parametrize("at_byte", [0, 1, 5000, len(DATA) - 1, 10**9])
@pytest.mark.parametrize(("kind", "reset"), BREAKS)
def test_a_connection_breaks_after_exactly_so_many_bytes(
    proxy: FaultProxy, wire: Wire, kind: FaultKind, reset: bool, at_byte: int
) -> None:
    proxy.add(Fault(kind, at_byte=at_byte))
    wire.send()
    head, body, was_reset = wire.read_to_the_end()
    assert b"Content-Length: 100000" in head
    assert (body, was_reset) == (DATA[: min(at_byte, len(DATA) - 1)], reset)
    assert last(proxy).bytes_sent == len(body)


def test_the_bytes_before_a_reset_reach_a_client_that_reads_late(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("reset", at_byte=90_000))
    wire.connection.close()
    wire.connection.sock = socket.socket()
    wire.sock.settimeout(60)
    wire.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # so that most of it waits on the proxy's side
    wire.sock.connect((wire.connection.host, wire.connection.port))
    wire.send()
    when(proxy, lambda request: request.bytes_sent == 90_000)
    assert not proxy.requests[0].ended
    _, body, reset = wire.read_to_the_end()
    assert (len(body), reset) == (90_000, True)


def test_a_stall_before_the_first_byte_ends_when_the_client_gives_up(
    proxy: FaultProxy, server: Server, wire: Wire
) -> None:
    proxy.add(Fault("stall"))
    wire.send()
    when(proxy, lambda request: request.fault is not None)
    assert wire.is_silent()
    assert not proxy.requests[0].ended
    assert server.seen == []
    wire.connection.close()
    assert last(proxy).bytes_sent == 0
    wire.connection.connect()


def test_a_stall_in_mid_body_ends_when_connections_are_dropped(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("stall", at_byte=5000))
    wire.send()
    read = b""
    while b"\r\n\r\n" not in read or len(read) < read.index(b"\r\n\r\n") + 4 + 5000:
        read += wire.sock.recv(65536)
    assert read.partition(b"\r\n\r\n")[2] == DATA[:5000]
    assert wire.is_silent()
    assert not proxy.requests[0].ended
    proxy.drop_connections()
    assert wire.read_to_the_end() == (b"", b"", True)
    assert last(proxy).bytes_sent == 5000


def test_a_lost_reply_is_a_reset_after_the_server_has_done_its_work(
    proxy: FaultProxy, server: Server, wire: Wire
) -> None:
    proxy.add(Fault("lost_reply"), methods=("PUT",))
    wire.raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nContent-Length: 4\r\n\r\nbody")
    assert wire.read_to_the_end() == (b"", b"", True)
    assert server.seen == [("PUT", "/up", b"body")]
    assert (last(proxy).status, last(proxy).bytes_received) == (None, 4)


@pytest.mark.parametrize(("at_byte", "want"), [(0, 0), (777, 777), (len(DATA), len(DATA) - 1), (None, None)])
@pytest.mark.parametrize("target", ["/data", "/chunked"])
def test_a_flip_changes_one_bit_and_nothing_else(
    proxy: FaultProxy, wire: Wire, target: str, at_byte: int | None, want: int | None
) -> None:
    if target == "/chunked" and at_byte == len(DATA):
        want = None  # its length is not known beforehand: nothing to clip to
    proxy.add(Fault("flip", at_byte=at_byte))
    got = wire.ask("GET", target)
    assert got.status == 200 and len(got.body) == len(DATA)
    wrong = [(i, a ^ b) for i, (a, b) in enumerate(zip(got.body, DATA, strict=True)) if a != b]
    if target == "/chunked" and at_byte == len(DATA):
        assert wrong == []
    else:
        ((place, bits),) = wrong
        assert want in (None, place)
        assert bits.bit_count() == 1


def test_the_seed_decides_which_bit_flips(server: Server) -> None:
    def flipped(seed: int) -> list[bytes]:
        with FaultProxy(server.url, seed=seed) as proxy, Wire(proxy) as wire:
            proxy.add(Fault("flip"))
            return [wire.ask().body for _ in range(3)]

    assert flipped(1) == flipped(1)
    assert len({*flipped(1), *flipped(2)}) == 6


@pytest.mark.parametrize(("at_byte", "want"), [(0, 0), (10, 10), (None, 50), (100, 99)])
def test_a_truncated_body_looks_whole(proxy: FaultProxy, wire: Wire, at_byte: int | None, want: int) -> None:
    proxy.add(Fault("truncate", at_byte=at_byte), times=1)
    got = wire.ask("GET", Range=range_of(200, 300))
    assert (got.status, got.headers["content-length"], got.body) == (206, str(want), DATA[200 : 200 + want])
    assert got.headers["content-range"] == "bytes 200-299/100000"
    assert wire.ask().body == DATA  # on the same connection


def test_a_truncated_body_in_chunks_looks_whole(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("truncate", at_byte=40_000), times=1)
    assert wire.ask("GET", "/chunked").body == DATA[:40_000]
    assert wire.ask().body == DATA


@pytest.mark.parametrize("shift", [1, 30])
def test_wrong_bytes_have_the_right_length_and_the_right_head(proxy: FaultProxy, wire: Wire, shift: int) -> None:
    proxy.add(Fault("wrong_bytes", shift_bytes=shift))
    got = wire.ask("GET", Range=range_of(200, 300))
    assert got.headers["content-range"] == "bytes 200-299/100000"
    assert got.body == DATA[200 + shift : 300] + DATA[200 : 200 + shift]
    assert wire.ask().body == DATA[shift:] + DATA[:shift]


def test_a_wrong_content_range_names_other_bytes(proxy: FaultProxy, wire: Wire) -> None:
    rule = proxy.add(Fault("wrong_content_range", shift_bytes=5))
    assert wire.ask().body == DATA
    assert rule.hits == 0  # there is no range to be wrong
    got = wire.ask("GET", Range=range_of(200, 300))
    assert (got.body, got.headers["content-range"]) == (DATA[200:300], "bytes 205-304/100000")


def test_a_body_that_drips_is_right_in_the_end(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("drip", bytes_per_s=100_000), times=1)
    assert wire.ask("GET", Range=range_of(0, 5000)).body == DATA[:5000]
    proxy.add(Fault("drip", bytes_per_s=2))
    wire.send()
    seen = when(proxy, lambda request: request.range is None and request.bytes_sent > 0)
    assert seen.bytes_sent < 100 and not seen.ended


def test_a_request_is_held_back_before_the_server_sees_it(proxy: FaultProxy, server: Server, wire: Wire) -> None:
    proxy.add(Fault("delay", delay_s=0.001), times=1)
    assert wire.ask().body == DATA
    for fault in (Fault("delay", delay_s=3600), Fault("status", delay_s=3600)):
        proxy.clear()
        proxy.clear_requests()
        proxy.add(fault)
        with Wire(proxy) as other:
            other.send()
            when(proxy, lambda request: request.fault is not None)
            assert other.is_silent()
    proxy.clear()
    proxy.clear_requests()
    proxy.latency_s = 3600
    wire.send()
    proxy.wait_until(lambda requests: len(requests) == 1)
    assert wire.is_silent()
    assert len(server.seen) == 1


def test_faults_in_a_body_strike_in_chunks_too(proxy: FaultProxy) -> None:
    for kind, reset in BREAKS:
        proxy.clear()
        proxy.add(Fault(kind, at_byte=40_000))
        with Wire(proxy) as wire:
            wire.send("GET", "/chunked")
            _, body, was_reset = wire.read_to_the_end()
        assert was_reset == reset
        assert 40_000 < len(body) < 40_100 and not body.endswith(b"0\r\n\r\n")


# -- which requests a fault hits


def statuses(wire: Wire, count: int) -> list[int]:
    return [wire.ask().status for _ in range(count)]


def test_times_and_after_count_the_requests_that_match(proxy: FaultProxy, wire: Wire) -> None:
    rule = proxy.add(Fault("status"), times=2, after=1, path="/data")
    wire.ask("GET", "/204")
    assert statuses(wire, 5) == [200, 503, 503, 200, 200]
    assert (rule.seen, rule.hits) == (5, 2)


def test_methods_and_path_choose(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("status", status=500), methods=("PUT", "HEAD"))
    proxy.add(Fault("status", status=502), path="a.*b")
    proxy.add(Fault("status", status=503), path=re.compile(r"^/a.*b$"))
    asked = [("PUT", "/x"), ("HEAD", "/x"), ("GET", "/a.*b"), ("GET", "/a--b"), ("GET", "/a--b/c")]
    assert [wire.ask(method, target).status for method, target in asked] == [500, 500, 502, 503, 200]


def test_the_first_fault_that_takes_a_request_keeps_it(proxy: FaultProxy, wire: Wire) -> None:
    first = proxy.add(Fault("status", status=500), times=1)
    second = proxy.add(Fault("status", status=502))
    assert statuses(wire, 3) == [500, 502, 502]
    assert (first.hits, second.seen) == (1, 2)
    second.remove()
    second.remove()
    assert statuses(wire, 1) == [200]
    proxy.add(Fault("status"))
    proxy.clear()
    assert statuses(wire, 1) == [200]


def test_a_fault_in_a_body_is_not_used_up_by_requests_without_one(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("truncate", at_byte=1), times=1)
    wire.ask("HEAD")
    wire.ask("PUT", "/up", body=b"body")
    assert wire.ask().body == DATA[:1]


def test_the_seed_decides_which_requests_are_hit(server: Server) -> None:
    def hit(seed: int, probability: float) -> list[int]:
        with FaultProxy(server.url, seed=seed) as proxy, Wire(proxy) as wire:
            proxy.add(Fault("status"), probability=probability)
            return statuses(wire, 64)

    assert hit(1, 0.5) == hit(1, 0.5) != hit(2, 0.5)
    assert 16 < hit(1, 0.5).count(503) < 48
    assert set(hit(1, 0.0)) == {200} and set(hit(1, 1.0)) == {503}


def test_an_outage_comes_before_all_faults_and_cuts_off_what_is_under_way(proxy: FaultProxy, wire: Wire) -> None:
    proxy.add(Fault("stall", at_byte=10), times=1)
    proxy.add(Fault("status", status=429))
    wire.send()
    when(proxy, lambda request: request.bytes_sent == 10)
    with proxy.outage() as rule:
        assert wire.read_to_the_end()[2]
        for _ in range(3):
            with Wire(proxy) as other:
                other.send()
                assert other.read_to_the_end() == (b"", b"", True)
        assert rule.hits == 3
    with Wire(proxy) as other, proxy.outage(Fault("status", status=500)):
        other.connection.close()
        assert other.ask().status == 500
    with Wire(proxy) as other:
        assert other.ask().status == 429


def test_faults_may_be_changed_while_requests_pass(proxy: FaultProxy) -> None:
    def ask(_: int) -> set[int]:
        with Wire(proxy) as wire:
            return set(statuses(wire, 25))

    with ThreadPoolExecutor(4) as pool:
        asking = [pool.submit(ask, number) for number in range(4)]
        for _ in range(100):
            rule = proxy.add(Fault("status"), probability=0.5)
            proxy.bytes_per_s = 1e9
            assert len(proxy.requests) <= 100
            rule.remove()
            proxy.bytes_per_s = None
            proxy.clear()
        assert all(one.result() <= {200, 503} for one in asking)
    assert len(proxy.requests) == 100


unknown: Any = "explode"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fault(unknown), "kind must be one of status, redirect"),
        (lambda: Fault("flip", status=500), r"Fault\('flip'\): takes only at_byte, delay_s, got 'status'"),
        (lambda: Fault("drip"), "needs bytes_per_s"),
        (lambda: Fault("delay"), "needs delay_s"),
        (lambda: Fault("redirect"), "needs location"),
        (lambda: Fault("redirect", location="elsewhere"), "location must be"),
        (lambda: Fault("status", status=100), r"status must be in \[200, 599\], got 100"),
        (lambda: Fault("reset", at_byte=-1), "at_byte must be >= 0"),
        (lambda: Fault("wrong_bytes", shift_bytes=0), "shift_bytes must be >= 1"),
        (lambda: Fault("reset", delay_s=-1), "delay_s must be >= 0"),
        (lambda: Fault("drip", bytes_per_s=0), "bytes_per_s must be > 0"),
        (lambda: FaultProxy("http://h:1", bytes_per_s=-1), "bytes_per_s must be > 0"),
        (lambda: FaultProxy("http://h:1", latency_s=-1), "latency_s must be >= 0"),
        (lambda: FaultProxy("https://h:1").__enter__(), "must be http://host:port"),
        (lambda: FaultProxy("http://h:1/path").__enter__(), "must be http://host:port"),
        (lambda: FaultProxy("http://h:x").__enter__(), "must be http://host:port"),
        (lambda: FaultProxy("http://h:1").add(Fault("reset"), times=0), "times must be >= 1"),
        (lambda: FaultProxy("http://h:1").add(Fault("reset"), after=-1), "after must be >= 0"),
        (lambda: FaultProxy("http://h:1").add(Fault("reset"), probability=1.1), r"probability must be in \[0, 1\]"),
    ],
)
def test_a_wrong_setting_is_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# -- the link, the log, the end


def test_a_limit_holds_for_all_connections_until_it_is_lifted(proxy: FaultProxy, server: Server) -> None:
    proxy.bytes_per_s = 1000  # the bodies would take minutes
    with Wire(proxy) as one, Wire(proxy) as two, Wire(proxy) as three:
        one.send()
        two.send()
        three.raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nContent-Length: 100000\r\n\r\n" + DATA)
        seen = proxy.wait_until(
            lambda requests: len(requests) == 3 and all(r.bytes_sent + r.bytes_received > 0 for r in requests)
        )
        assert all(r.bytes_sent + r.bytes_received < 10_000 and not r.ended for r in seen)
        proxy.bytes_per_s = None
        for wire in (one, two, three):
            assert wire.reply() == DATA
    assert [body for method, _, body in server.seen if method == "PUT"] == [DATA]


def test_the_log_shows_that_each_byte_was_asked_for_once(proxy: FaultProxy) -> None:
    edges = list(itertools.pairwise(range(0, len(DATA) + 1, 10_000)))

    def ask(edge: tuple[int, int]) -> bytes:
        with Wire(proxy) as wire:
            return wire.ask("GET", Range=range_of(*edge)).body

    with ThreadPoolExecutor(4) as pool:
        assert b"".join(pool.map(ask, edges)) == DATA
    assert sorted(request.byte_range or (0, 0) for request in proxy.requests) == edges
    assert sum(request.bytes_sent for request in proxy.requests) == len(DATA)


def test_waiting_for_what_does_not_come_is_an_error(proxy: FaultProxy, wire: Wire) -> None:
    wire.ask()
    with pytest.raises(DeadlineExceeded, match="must hold within 0 s") as caught:
        proxy.wait_until(lambda requests: len(requests) > 1, timeout_s=0)
    assert "path='/data'" in caught.value.__notes__[0]


def open_descriptors() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
    return found


def test_the_end_closes_everything_whatever_is_under_way() -> None:
    before, threads = open_descriptors(), set(threading.enumerate())
    wires = []
    with running_server() as server, FaultProxy(server.url) as proxy:
        url = proxy.endpoint_url
        faults = [
            Fault("stall"),
            Fault("stall", at_byte=100),
            Fault("drip", bytes_per_s=1),
            Fault("delay", delay_s=3600),
        ]
        for fault in [*faults, None]:
            if fault is not None:
                proxy.add(fault, times=1)
            wires.append(Wire(proxy).__enter__())
            wires[-1].send()
            proxy.wait_until(lambda requests: len(requests) == len(wires))
        wires.append(Wire(proxy).__enter__())
        wires[-1].raw(b"PUT /up HTTP/1.1\r\nHost: h\r\nContent-Length: 100\r\n\r\nhalf")
        when(proxy, lambda request: request.bytes_received == 4)
        wires.append(Wire(proxy).__enter__())  # idle
    proxy.close()
    assert len(proxy.requests) == 6
    assert set(threading.enumerate()) == threads
    for wire in wires:
        wire.read_to_the_end()
        wire.__exit__()
    parts = urlsplit(url)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((str(parts.hostname), parts.port or 0))
    assert open_descriptors() - before == set()


def test_an_error_in_the_block_is_not_hidden_and_a_proxy_may_run_again(server: Server) -> None:
    proxy = FaultProxy(server.url)
    with pytest.raises(ZeroDivisionError), proxy:
        raise ZeroDivisionError
    with proxy, Wire(proxy) as wire:
        assert wire.ask().body == DATA


def test_a_forked_child_does_not_keep_broken_connections_open() -> None:
    program = """
import os, socket, sys
from stoker.testing import Fault, FaultProxy
with FaultProxy("http://127.0.0.1:9") as proxy:
    proxy.add(Fault("stall"))
    client = socket.create_connection(("127.0.0.1", proxy._port), timeout=60)
    client.sendall(b"GET / HTTP/1.1\\r\\n\\r\\n")
    proxy.wait_until(lambda requests: len(requests) == 1)
    end, keep = os.pipe()
    if (child := os.fork()) == 0:
        os.close(keep)
        os.read(end, 1)
        proxy.close()
        os._exit(0)
    os.close(end)
    proxy.drop_connections()
    try:
        print(client.recv(1))
    except ConnectionResetError:
        print("reset")
    os.close(keep)
    assert os.waitpid(child, 0)[1] == 0
"""
    command = [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.stdout, done.stderr) == ("reset\n", "")


# -- before a real S3 server


class TestThroughTheProxy(StoreTests):
    """Without faults a store behaves as it does without the proxy."""

    large_bytes = 12 * 2**20
    races = 1
    _numbers = itertools.count()

    @pytest.fixture
    def store(self, s3_server: S3Server, fault_proxy: FaultProxy) -> Iterator[ObjectStore]:
        url = s3_server.url("stoker", f"proxy/contract/{next(self._numbers)}")
        with open_store(url, **fault_proxy.storage_options) as store:
            yield store


@contextmanager
def a_stored_object(server: S3Server, proxy: FaultProxy, name: str) -> Iterator[ObjectStore]:
    url = server.url("stoker", f"proxy/{name}")
    with open_store(url, **server.storage_options) as direct:
        direct.put("object", DATA)
    with open_store(url, **proxy.storage_options) as store:
        yield store


def test_a_signature_made_for_the_proxys_address_is_good_at_the_server(
    s3_server: S3Server, fault_proxy: FaultProxy
) -> None:
    options = fault_proxy.storage_options
    assert options["endpoint_url"] == fault_proxy.endpoint_url == fault_proxy.env["AWS_ENDPOINT_URL"]
    assert {**options, "endpoint_url": s3_server.endpoint_url} == s3_server.storage_options
    with a_stored_object(s3_server, fault_proxy, "signed"):
        signer = S3Store(
            "stoker",
            access_key_id=options["key"],
            secret_access_key=options["secret"],
            region="us-east-1",
            endpoint=options["endpoint_url"],
            client_options={"allow_http": True},
        )
        url = urlsplit(obstore.sign(signer, "GET", "proxy/signed/object", timedelta(minutes=10)))
    with Wire(fault_proxy, f"{url.path}?{url.query}") as wire:
        assert wire.ask().body == DATA
        assert wire.ask("GET", Range=range_of(5, 9)).body == DATA[5:9]
        fault_proxy.add(Fault("flip"), times=1)
        assert wire.ask().body != DATA
        assert wire.ask("GET", wire.target.replace("object", "objekt")).status == 403


# What a store can see through or name, whatever its retry policy.
ONCE = {
    "status": Fault("status"),
    "too many requests": Fault("status", status=429),
    "internal error": Fault("status", status=500),
    "expired token": Fault("status", status=403, code="ExpiredToken"),
    "reset": Fault("reset"),
    "reset in mid-body": Fault("reset", at_byte=5000),
    "close": Fault("close"),
    "close in mid-body": Fault("close", at_byte=5000),
    "lost_reply": Fault("lost_reply"),
    "truncate": Fault("truncate"),
    "wrong_content_range": Fault("wrong_content_range"),
    "delay": Fault("delay", delay_s=0.05),
    "drip": Fault("drip", bytes_per_s=1e6),
}


@pytest.mark.parametrize("name", ONCE)
@pytest.mark.parametrize(("start", "end"), [(0, None), (1000, 91_000)])
def test_a_read_that_meets_a_fault_gives_the_right_bytes_or_a_typed_error(
    s3_server: S3Server, fault_proxy: FaultProxy, name: str, start: int, end: int | None
) -> None:
    with a_stored_object(s3_server, fault_proxy, "read") as store:
        rule = fault_proxy.add(ONCE[name], times=1, methods=("GET",))
        with suppress(StokerError):
            assert bytes(store.get("object", start, end)) == DATA[start:end]
        if ONCE[name].kind != "wrong_content_range" or end is not None:
            assert rule.hits == 1
        assert bytes(store.get("object")) == DATA


@pytest.mark.parametrize("fault", [Fault("flip"), Fault("wrong_bytes"), Fault("status", status=200)])
def test_what_only_a_checksum_can_tell_comes_through_with_its_length(
    s3_server: S3Server, fault_proxy: FaultProxy, fault: Fault
) -> None:
    with a_stored_object(s3_server, fault_proxy, "wrong") as store:
        rule = fault_proxy.add(fault, times=1, methods=("GET",))
        with suppress(StokerError):  # a store may know better
            assert len(store.get("object", 1000, 91_000)) == 90_000
        assert rule.hits == 1
        assert bytes(store.get("object")) == DATA


@pytest.mark.parametrize("at_byte", [None, 5000])
def test_a_read_that_stalls_ends_when_its_connection_is_dropped(
    s3_server: S3Server, fault_proxy: FaultProxy, at_byte: int | None
) -> None:
    with a_stored_object(s3_server, fault_proxy, "stalled") as store, ThreadPoolExecutor(1) as pool:
        fault_proxy.add(Fault("stall", at_byte=at_byte), times=1, methods=("GET",))
        reading = pool.submit(store.get, "object")
        fault_proxy.wait_until(lambda requests: any(r.fault and r.bytes_sent == (at_byte or 0) for r in requests))
        fault_proxy.drop_connections()
        with suppress(StokerError):
            assert bytes(reading.result()) == DATA


def test_a_redirect_is_followed_or_refused_but_gives_no_wrong_bytes(
    s3_server: S3Server, fault_proxy: FaultProxy
) -> None:
    with a_stored_object(s3_server, fault_proxy, "moved") as store:
        rule = fault_proxy.add(Fault("redirect", location=s3_server.endpoint_url), times=1)
        with suppress(StokerError):
            assert bytes(store.get("object")) == DATA
        assert rule.hits == 1


@pytest.mark.parametrize("fault", [Fault("lost_reply"), Fault("reset"), Fault("status"), Fault("close")])
def test_a_write_that_meets_a_fault_is_whole_or_absent(
    s3_server: S3Server, fault_proxy: FaultProxy, fault: Fault
) -> None:
    url = s3_server.url("stoker", f"proxy/written/{fault.kind}")
    with (
        open_store(url, **s3_server.storage_options) as direct,
        open_store(url, **fault_proxy.storage_options) as store,
    ):
        rule = fault_proxy.add(fault, times=1, methods=("PUT", "POST"))
        with suppress(StokerError):
            store.put("object", DATA)
        assert rule.hits == 1
        if fault.kind == "lost_reply" or direct.exists("object"):
            assert bytes(direct.get("object")) == DATA


def test_every_kind_of_fault_is_tried_here() -> None:
    tried = {fault.kind for fault in ONCE.values()} | {"flip", "wrong_bytes", "stall", "redirect"}
    assert tried == set(get_args(FaultKind))
