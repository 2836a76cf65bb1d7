"""Rows of ``stoker bench tiers`` without a cache: memory, shared memory, disk. The ceilings of the others."""

import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

from ..storage._posix import aligned_buffer, pread_into, pwrite_all, shared_memory_directory
from ..storage._units import format_bytes
from ._tiers_content import (
    BLOCK_BYTES,
    COPY,
    CRC,
    DISK_READ,
    DISK_WARM,
    DISK_WRITE,
    MIB,
    SHM_READ,
    SHM_WRITE,
    Content,
    Piece,
    each,
    timed,
)
from .frame import Cache, Outcome, Scalar, Variant, drop_page_cache

DISK_THREADS = 4
DISK_BYTES = 8 * MIB
"""For the disk's rows: the knee of threads x size on the disk that this was written on."""


def memory_variants(content: Content) -> Sequence[Variant]:
    target = aligned_buffer(len(content.memory))

    def copy() -> Outcome:
        for piece in content.pieces:  # other bytes, and the pages there, before the clock starts
            target[piece.at] = content.memory[piece.at] ^ 1
        started = perf_counter()
        target[:] = content.memory
        seconds = perf_counter() - started
        content.require(target, COPY)
        return {COPY: content.rate(seconds)}

    def check() -> Outcome:
        seconds = timed(lambda: content.require(content.memory, CRC))
        return {CRC: content.rate(seconds)}

    return [
        Variant(name="memcpy", kind="limit", run=copy),
        Variant(name="crc32c of each block", kind="limit", run=check),
    ]


class Files:
    """One plain file for each block, in shared memory or on a disk."""

    def __init__(self, content: Content, directory: Path) -> None:
        self._content, self.directory = content, directory

    def path(self, piece: Piece) -> Path:
        return self.directory / f"{piece.number:06d}"

    def make(self) -> None:
        self.directory.mkdir(parents=True)

    def fill(self) -> float:
        def all_blocks() -> None:
            for piece in self._content.pieces:
                self.write(piece, self._content.of(piece.at, BLOCK_BYTES))

        return timed(all_blocks)

    def write(self, piece: Piece, data: Any) -> None:
        fd = os.open(self.path(piece), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            pwrite_all(fd, data, 0)
        finally:
            os.close(fd)

    def map(self, piece: Piece) -> mmap.mmap:
        fd = os.open(self.path(piece), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, BLOCK_BYTES, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def read_into(self, piece: Piece, target: memoryview) -> None:
        """One block to its place, a page first: the kernel reads ahead best from a small beginning."""
        fd = os.open(self.path(piece), os.O_RDONLY | os.O_CLOEXEC)
        try:
            block = target[piece.at : piece.at + BLOCK_BYTES]
            pread_into(fd, block[: mmap.PAGESIZE], 0)
            pread_into(fd, block[mmap.PAGESIZE :], mmap.PAGESIZE)
        finally:
            os.close(fd)

    def read(self) -> float:
        def all_blocks() -> None:
            for piece in self._content.pieces:
                with self.map(piece) as pages:
                    piece.require(pages, str(self.directory))

        return timed(all_blocks)

    def clear(self) -> None:
        for piece in self._content.pieces:
            self.path(piece).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def shared_memory_variants(content: Content, shm: Path) -> Sequence[Variant]:
    files = Files(content, shm / "bare")

    def run() -> Outcome:
        files.clear()
        write_s = files.fill()
        return {SHM_WRITE: content.rate(write_s), SHM_READ: content.rate(files.read())}

    return [
        Variant(
            name="bare files in shared memory",
            kind="limit",
            run=run,
            setup=files.make,
            teardown=files.remove,
            notes=("the read is open, mmap, crc32c and close of each block, page faults included",),
        )
    ]


class DiskFile:
    """All blocks in one file, written and read in several threads, around the page cache or through it."""

    def __init__(self, content: Content, path: Path) -> None:
        self._content, self._path = content, path
        self._target = memoryview(b"")

    def make(self) -> None:
        self._target = aligned_buffer(len(self._content.memory))
        self.write()

    def remove(self) -> None:
        self._target = memoryview(b"")
        self._path.unlink(missing_ok=True)

    def write(self) -> float:
        self._path.unlink(missing_ok=True)
        memory = self._content.memory

        def block(fd: int, at: int) -> None:
            pwrite_all(fd, memory[at : at + DISK_BYTES], at)

        with self._open(os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT) as fd:
            os.posix_fallocate(fd, 0, len(memory))
            seconds = self._blocks(partial(block, fd))
            return seconds + timed(lambda: os.fsync(fd))

    def read(self, *, direct: bool) -> tuple[float, Cache]:
        """Seconds, and what the page cache held of the file when they began."""
        target, left = self._target, 0
        if direct:
            left = drop_page_cache(self._path)

        def block(fd: int, at: int) -> None:
            pread_into(fd, target[at : at + DISK_BYTES], at)

        for piece in self._content.pieces:
            target[piece.at] = self._content.memory[piece.at] ^ 1
        with self._open(os.O_RDONLY | (os.O_DIRECT if direct else 0)) as fd:
            if not direct:
                self._blocks(partial(block, fd))  # brings in what is missing
                for piece in self._content.pieces:
                    target[piece.at] = self._content.memory[piece.at] ^ 1
            seconds = self._blocks(partial(block, fd))
        self._content.require(target, str(self._path))
        return seconds, "cold" if direct and left == 0 else "warm"

    def _blocks(self, act: Callable[[int], object]) -> float:
        return each(range(0, len(self._content.memory), DISK_BYTES), DISK_THREADS, act)

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        fd = os.open(self._path, flags | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)


def no_o_direct(directory: Path) -> str:
    """The note that says why the disk can't be measured; empty where it can."""
    probe = directory / "o-direct"
    try:
        if not hasattr(os, "O_DIRECT"):
            raise OSError("this system has none")
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600))
    except OSError as error:
        return f"the disk and the disk tier were not measured: no O_DIRECT below {directory} ({error})"
    finally:
        probe.unlink(missing_ok=True)
    return ""


def disk_variants(content: Content, directory: Path) -> Sequence[Variant]:
    file = DiskFile(content, directory / "bare")

    def run() -> Outcome:
        write_s = file.write()
        read_s, cache = file.read(direct=True)  # which also compares what was written
        warm_s, _ = file.read(direct=False)
        return {
            DISK_WRITE: content.rate(write_s),
            DISK_READ: content.rate(read_s, cache=cache),
            DISK_WARM: content.rate(warm_s),
        }

    params: dict[str, Scalar] = {"io_threads": DISK_THREADS, "io_bytes": DISK_BYTES}
    return [Variant(name="bare file", kind="limit", run=run, setup=file.make, teardown=file.remove, params=params)]


@contextmanager
def shared_memory(content: Content) -> Iterator[tuple[Path | None, str]]:
    """A directory in shared memory, gone afterwards; or None, and the note that says why."""
    needed = 3 * len(content.memory)
    try:
        parent = shared_memory_directory()
        free = shutil.disk_usage(parent).free
    except OSError as error:
        yield None, f"shared memory and the RAM tier were not measured: {error}"
        return
    if free < needed:
        yield (
            None,
            (
                f"shared memory and the RAM tier were not measured: {format_bytes(needed)} must be free in {parent}, "
                f"got {format_bytes(free)}"
            ),
        )
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as name:
        yield Path(name), ""
