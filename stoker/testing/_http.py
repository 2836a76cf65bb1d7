"""HTTP/1.1 on sockets of an event loop, byte for byte: what a proxy passes on, it passes on as it came."""

import asyncio
import fcntl
import re
import socket
import struct
import termios
import time
from contextlib import suppress
from typing import Literal, Protocol

__all__ = ["CHUNK_BYTES", "Body", "Broken", "Head", "Source", "Stream"]

CHUNK_BYTES = 512 << 10
_HEAD_BYTES = 64 << 10  # more than S3 allows in one head
_FAIR_BYTES = 4 << 20  # after so many, others get their turn; asyncio gives none while a socket is always ready
_DRAIN_S = 5.0  # how long a client may leave the bytes before a reset unread


class Broken(Exception):
    """A peer ended its connection, or sent what is no HTTP/1.1: the other one gets the same end."""

    def __init__(self, stream: "Stream", *, reset: bool) -> None:
        self.stream, self.reset = stream, reset


class Stream:
    """One socket with the bytes that were read too far. A view that it returns is valid until the next read."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        sock.setblocking(False)
        with suppress(OSError):  # macOS refuses it to a socket whose peer has gone
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self._loop = loop
        self._bytes = bytearray(CHUNK_BYTES)
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
            raise Broken(self, reset=True) from None
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
                raise Broken(self, reset=True)
            if not await self._fill():
                if self._start == self._end:
                    return None
                raise Broken(self, reset=False)

    async def read_head(self) -> "Head | None":
        """The next head; None if the connection ends between two messages."""
        raw = await self._read_to(b"\r\n\r\n")
        try:
            return None if raw is None else Head(raw)
        except ValueError:
            raise Broken(self, reset=True) from None

    async def read_line(self) -> bytes:
        line = await self._read_to(b"\r\n")
        if line is None:
            raise Broken(self, reset=False)
        return line

    async def read_some(self, limit_bytes: int) -> memoryview:
        """What is there, at most `limit_bytes`; empty at the end of the stream."""
        if self._start == self._end:
            self._start = self._end = 0
            try:
                self._end = await self._loop.sock_recv_into(self.sock, self._buffer[:limit_bytes])
            except OSError:
                raise Broken(self, reset=True) from None
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
            raise Broken(self, reset=True) from None

    async def wait_until_gone(self) -> None:
        """Read and forget until the peer ends the connection."""
        with suppress(Broken):
            while await self.read_some(CHUNK_BYTES):
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


class Head:
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


class Source(Protocol):
    async def read(self, limit_bytes: int) -> memoryview:
        """The next bytes, at most `limit_bytes`; empty at the end."""


class Body:
    """The bytes of one body, without the framing of chunks; :meth:`framed` and :meth:`end` put that back."""

    def __init__(self, stream: Stream, framing: "int | Literal['chunked'] | None") -> None:
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
            raise Broken(self._stream, reset=False)
        else:
            self._left -= len(piece)
        return piece

    async def _next_chunk(self) -> None:
        if self._begun:
            await self._stream.read_line()
        self._begun = True
        size = (await self._stream.read_line()).partition(b";")[0].strip()
        if not re.fullmatch(rb"[0-9A-Fa-f]{1,15}", size):
            raise Broken(self._stream, reset=True)
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
