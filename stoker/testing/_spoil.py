"""What a fault does to the body of a reply: where it ends, what is wrong in it, how fast it comes."""

import asyncio
import random
import re
import time

from ._fault import Fault
from ._http import CHUNK_BYTES, Body, Head, Source

__all__ = ["Pacer", "piece_bytes", "with_fault"]


def with_fault(
    fault: Fault | None, head: Head, body: Body, chance: random.Random | None
) -> "tuple[Source, int | None, Pacer | None]":
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
            return body, None, Pacer(fault.bytes_per_s, burst_s=0.0)
    return body, None, None


class _Flipped:
    def __init__(self, source: Source, at_byte: int, bit: int) -> None:
        self._source, self._left, self._bit = source, at_byte, bit

    async def read(self, limit_bytes: int) -> memoryview:
        piece = await self._source.read(limit_bytes)
        if 0 <= self._left < len(piece):
            piece[self._left] ^= 1 << self._bit
        self._left -= len(piece)
        return piece


class _Rotated:
    """The first `shift` bytes come last."""

    def __init__(self, source: Source, shift: int) -> None:
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


class Pacer:
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


def piece_bytes(pacer: Pacer | None) -> int:
    """Small enough that a slow link is not one that stands still, then jumps: 20 pieces a second."""
    return CHUNK_BYTES if pacer is None else max(1, min(CHUNK_BYTES, int(pacer.bytes_per_s / 20)))
