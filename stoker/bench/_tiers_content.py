"""What every row of ``stoker bench tiers`` moves: the bytes, their blocks, and the threads that carry them."""

import threading
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import Any, TypeVar

import numpy as np

from ..errors import CorruptionError
from ..storage import Block, ObjectStore
from ..storage._checksums import crc32c
from ..storage._posix import aligned_buffer
from .frame import Cache, Sample

COPY, CRC = "copy in memory", "crc32c, one core"
SHM_WRITE, SHM_READ = "shared memory, write", "shared memory, map and read"
DISK_WARM, DISK_READ, DISK_WRITE = "disk, buffered read", "disk, O_DIRECT read", "disk, O_DIRECT write + fsync"
GET, GET_LEAN, UPLOAD = "ranged GET", "ranged GET, server at no cost", "upload"
RAM_FIRST, RAM_KEPT, DISK_TIER = "RAM tier, first opened", "RAM tier, kept mapped", "disk tier"
INTO_RAM, INTO_DISK = "S3 into the RAM tier", "S3 into the disk tier"
THROTTLED = "S3 over a throttled link into the RAM tier"
NODE = "eight processes on one cold set"
STREAM = "memory of a stream"

MIB = 1 << 20
BLOCK_BYTES = 4 * MIB
BLOCKS_PER_OBJECT = 16
_STOP_S = 5.0
"""After Ctrl-C, as long as one block may take to arrive; a thread that takes longer ends with the process."""

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Piece:
    """One block: its number, where it stands in the whole and in its object, and its checksum."""

    number: int
    key: str
    start: int
    end: int
    crc: int

    @property
    def at(self) -> int:
        return self.number * BLOCK_BYTES

    @property
    def block(self) -> Block:
        return Block(key=self.key, version="bench", start=self.start, end=self.end, crc32c=self.crc)

    def require(self, data: Any, place: str) -> None:
        """Raise CorruptionError unless `data` is this block."""
        if len(data) != BLOCK_BYTES or crc32c(data) != self.crc:
            raise CorruptionError(f"block {self.number} must be the bytes that were written", place=place)


class Content:
    """The bytes that every row moves: random, aligned, in blocks with their checksums."""

    def __init__(self, size_bytes: int) -> None:
        count = size_bytes // BLOCK_BYTES
        self.memory = aligned_buffer(count * BLOCK_BYTES)
        generator = np.random.default_rng()  # other bytes each time, lest a store that keeps old ones looks right
        self.pieces: list[Piece] = []
        for number in range(count):
            at = number * BLOCK_BYTES
            self.memory[at : at + BLOCK_BYTES] = generator.bytes(BLOCK_BYTES)
            start = number % BLOCKS_PER_OBJECT * BLOCK_BYTES
            key = f"read/{number // BLOCKS_PER_OBJECT:05d}"
            self.pieces.append(Piece(number, key, start, start + BLOCK_BYTES, crc32c(self.of(at, BLOCK_BYTES))))

    def of(self, start: int, length: int) -> memoryview:
        return self.memory[start : start + length]

    def put_objects(self, store: ObjectStore) -> None:
        """Store the objects that hold the blocks."""
        step = BLOCKS_PER_OBJECT * BLOCK_BYTES
        for at in range(0, len(self.memory), step):
            store.put(self.pieces[at // BLOCK_BYTES].key, self.of(at, min(step, len(self.memory) - at)))

    def require(self, found: memoryview, place: str) -> None:
        """Raise CorruptionError unless `found` holds all blocks."""
        for piece in self.pieces:
            piece.require(found[piece.at : piece.at + BLOCK_BYTES], place)

    def rate(
        self, seconds: float, *, cache: Cache | None = None, origin: str | None = None, size_bytes: int = 0
    ) -> Sample:
        """All bytes, or so many, in `seconds`, after they were compared."""
        value = (size_bytes or len(self.memory)) / seconds / 1e9
        return Sample(value=value, verified=True, cache=cache, origin=origin)


def timed(act: Callable[[], object]) -> float:
    started = perf_counter()
    act()
    return perf_counter() - started


def each(items: Sequence[T], threads: int, act: Callable[[T], object]) -> float:
    """Seconds that `act` takes for all `items` in so many threads. A first failure ends all, and is raised."""
    left, failures = deque(items), list[BaseException]()

    def work() -> None:
        while left and not failures:
            with suppress(IndexError):  # another thread took the last one
                item = left.popleft()
                try:
                    act(item)
                except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                    failures.append(error)

    # Daemons, since on Ctrl-C a client may go on asking a server that has heard it too.
    workers = [threading.Thread(target=work, name="stoker-bench", daemon=True) for _ in range(threads)]
    started = perf_counter()
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException as error:
        failures.append(error)
        stop_at = perf_counter() + _STOP_S
        for worker in workers:
            if worker.ident is not None:
                worker.join(max(0.0, stop_at - perf_counter()))
        raise
    seconds = perf_counter() - started
    if failures:
        raise failures[0]
    return seconds
