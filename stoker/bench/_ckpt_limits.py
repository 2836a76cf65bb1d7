"""The limits of ``stoker bench ckpt``: the same bytes, copied into cached views, written and read around the page cache."""

import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from time import perf_counter
from typing import Any

import torch

from ..errors import UnsupportedError
from ._ckpt_job import DURABLE, FROM_STAGED, RESTORE, STALL, WARM, Job, check_equal, fsync
from .frame import Outcome, Sample, Variant, drop_page_cache

__all__ = ["limits"]

_IO_BYTES = 8 << 20
_IO_THREADS = 4
"""For the limit: the knee of threads x size on the disk that this was written on."""


class _Bare:
    """The same bytes in aligned memory, and one file that is written and read around the page cache."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._path = job.directory / "limit"
        self._memory: mmap.mmap | None = None
        self._views: list[torch.Tensor] = []
        self._threads = ThreadPoolExecutor(_IO_THREADS)

    def allocate(self) -> None:
        """Make the memory that is written, and the views that are copied into."""
        # Huge pages where the kernel gives them: the disk takes each as one piece, so the limit is the hardest there is.
        # O_DIRECT moves whole pages; the few bytes more are not counted.
        whole = -(-self._job.size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        self._memory = mmap.mmap(-1, whole, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._memory, dtype=torch.float32)
        at = 0
        for tensor in self._job.state.values():
            self._views.append(flat[at : at + tensor.numel()].view(tensor.shape))
            at += tensor.numel()

    def free(self) -> None:
        self._threads.shutdown()
        self._views.clear()
        self._memory = None
        self._path.unlink(missing_ok=True)

    def copy(self) -> Outcome:
        """The limit of a stall: the same tensors into views that exist."""
        started = perf_counter()
        for view, tensor in zip(self._views, self._job.state.values(), strict=True):
            view.copy_(tensor)
        seconds = perf_counter() - started
        self._check()
        return {STALL: Sample(value=seconds, verified=True)}

    def write(self) -> Outcome:
        with self._open_direct(os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            assert self._memory is not None
            os.posix_fallocate(fd, 0, len(self._memory))
            started = perf_counter()
            self._each_block(lambda block, at: os.pwrite(fd, block, at))
            os.fsync(fd)
            seconds = perf_counter() - started
        # What was written is checked by the reads that follow in the same round.
        rate = Sample(value=self._job.rate(seconds), verified=True)
        return {DURABLE: rate, FROM_STAGED: rate}

    def read(self) -> Outcome:
        """The limit of a restore: bare O_DIRECT reads of the whole file."""
        cache: Any = "cold" if drop_page_cache(self._path) == 0 else "warm"
        for view in self._views:
            view.zero_()
        with self._open_direct(os.O_RDONLY) as fd:
            started = perf_counter()
            self._each_block(lambda block, at: os.preadv(fd, [block], at))
            seconds = perf_counter() - started
        self._check()
        self._path.unlink()
        fsync(self._path.parent)
        rate = Sample(value=self._job.rate(seconds), verified=True, cache=cache)
        return {RESTORE: rate, WARM: rate}

    def _each_block(self, transfer: Callable[[memoryview, int], int]) -> None:
        assert self._memory is not None
        memory = memoryview(self._memory)

        def one(start: int) -> None:
            end = min(start + _IO_BYTES, len(memory))
            while start < end:  # short transfers go on
                start += transfer(memory[start:end], start)

        for _ in self._threads.map(one, range(0, len(memory), _IO_BYTES)):
            pass

    def _check(self) -> None:
        found = dict(zip(self._job.state, self._views, strict=True))
        check_equal(self._job.state, found, place=str(self._path))

    @contextmanager
    def _open_direct(self, flags: int) -> Iterator[int]:
        direct = getattr(os, "O_DIRECT", 0)
        try:
            if not direct:
                raise OSError("this system has no O_DIRECT")
            fd = os.open(self._path, flags | direct | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise UnsupportedError(
                "the limit needs a file system with O_DIRECT",
                value=str(error),
                place=str(self._job.directory),
                hint="--dir on a local disk; tmpfs has none",
            ) from error
        try:
            yield fd
        finally:
            os.close(fd)


def limits(job: Job) -> Sequence[Variant]:
    bare = _Bare(job)
    params = {"io_threads": _IO_THREADS, "io_bytes": _IO_BYTES}
    return [
        Variant(name="copy_ into views", kind="limit", run=bare.copy, setup=bare.allocate, teardown=bare.free),
        Variant(name="O_DIRECT write + fsync", kind="limit", run=bare.write, params=params),
        Variant(name="O_DIRECT read", kind="limit", run=bare.read, params=params),
    ]
