"""How close do save and restore come to what memory and disk allow, and how do others do?

Command: ``stoker bench ckpt [--size 2GB] [--runs 5] [--dir DIR] [--json]``.

One state of fp32 tensors (1 to 64 MiB each) in host memory is saved to a directory and restored from it, by each variant
in turn. Three numbers come from one and the same save and its restore:

``save stall``
    seconds for which the caller of save can't train on. Limit: ``copy_`` of the same tensors into views made before.
``durable save``
    10^9 bytes/s from the call of save until the step is durable and visible. Limit: O_DIRECT writes of the same bytes
    from aligned memory in several threads into a fresh, preallocated file, and its fsync.
``cold restore``
    10^9 bytes/s back into the tensors of a running job, files out of the page cache. Limit: O_DIRECT reads of the same
    bytes into aligned memory in several threads. Only stoker checks what it reads.

Every restore is compared with the saved state, bit for bit. A peer's files are synced to disk where its own documents
leave that to the caller. Not measured here: object stores, several ranks, accelerators, training beside a save.
"""

import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from ..checkpoint import CheckpointManager
from ..errors import ConfigError, CorruptionError, StoreFull, UnsupportedError
from ..storage._units import format_bytes
from .frame import Case, Outcome, Question, Report, Sample, Variant, drop_page_cache, measure

__all__ = ["run_ckpt"]

STALL, DURABLE, RESTORE = "save stall", "durable save", "cold restore"

_MIB = 1 << 20
_TENSOR_MIB = (64, 1, 16, 4, 32, 2, 8)
"""Sizes of the tensors, in turn: embeddings, biases and matrices of a model of a few billion parameters."""
_IO_BYTES = 8 * _MIB
_IO_THREADS = 4
"""For the limit: the knee of threads x size on the disk that this was written on."""


def run_ckpt(
    *, size_bytes: int, runs: int, directory: str | Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Measure save and restore of `size_bytes` of fp32 tensors below `directory`, which is left as it was found.

    Needs memory for five copies of the state (it, the target, the limit's, stoker's and one peer's staging), and disk
    for one at a time.

    Raises:
        ConfigError: a size below 1 MiB, or one that the memory is too small for.
        StoreFull: not enough space below `directory`.
        UnsupportedError: the file system has no O_DIRECT, so there is no limit to measure against.
    """
    _check_room(size_bytes, Path(directory))
    state = _make_state(size_bytes)
    size_bytes = sum(tensor.nbytes for tensor in state.values())
    job = _Job(state, Path(directory))
    cases = [
        Case(name=STALL, unit="s", better="lower", goal_ratio=1.3, origin="host memory", bytes=size_bytes),
        Case(name=DURABLE, unit="GB/s", goal_ratio=0.8, origin="host memory", bytes=size_bytes),
        Case(name=RESTORE, unit="GB/s", goal_ratio=0.75, cache="cold", origin="local disk", bytes=size_bytes),
    ]
    params = {"size_bytes": size_bytes, "tensors": len(state), "torch_threads": torch.get_num_threads()}
    question = Question(bench="ckpt", cases=cases, params=params)
    variants = [*_limits(job), _stoker(job), _dcp(job), _dcp_async(job), _safetensors(job)]
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


def _check_room(size_bytes: int, directory: Path) -> None:
    if size_bytes < _MIB:
        raise ConfigError("size must be >= 1 MiB", value=size_bytes, place="stoker bench ckpt")
    free = shutil.disk_usage(directory).free
    if free < 1.1 * size_bytes:
        raise StoreFull(
            f"{format_bytes(1.1 * size_bytes)} must be free", value=format_bytes(free), place=str(directory)
        )
    # What can be had without swapping, by the kernel's own estimate; other systems just try.
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
        if available is not None and available < 5 * size_bytes:
            raise ConfigError(
                "size must fit into the available memory five times",
                value=f"{format_bytes(size_bytes)} with {format_bytes(available)} available",
                place="stoker bench ckpt",
                hint="choose a smaller --size",
            )


def _make_state(size_bytes: int) -> dict[str, torch.Tensor]:
    """Tensors of mixed sizes that add up to `size_bytes`, rounded down to whole MiB."""
    left = size_bytes // _MIB
    generator = torch.Generator().manual_seed(0)
    state: dict[str, torch.Tensor] = {}
    while left:
        mib = min(_TENSOR_MIB[len(state) % len(_TENSOR_MIB)], left)
        tensor = torch.empty(mib * 256, 1024)
        # Random bits, not random numbers: NaNs and denormals must come back as well.
        tensor.view(torch.int32).random_(-(2**31), 2**31 - 1, generator=generator)
        state[f"layers.{len(state)}.weight"] = tensor
        left -= mib
    return state


class _Job:
    """The state to save, the tensors to restore into, and a directory for each variant's files."""

    def __init__(self, state: dict[str, torch.Tensor], directory: Path) -> None:
        self.state, self.directory = state, directory
        self.target = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        self.size_bytes = sum(tensor.nbytes for tensor in state.values())

    def rate(self, seconds: float) -> float:
        return self.size_bytes / seconds / 1e9

    def round_trip(
        self, path: Path, save: Callable[[Path], tuple[float, float]], restore: Callable[[Path], None]
    ) -> dict[str, float | Sample]:
        """One save into `path`, its restore from a cold cache, the comparison; `path` is empty again afterwards.

        `save` returns its stall and its time until durable, both in seconds; `restore` fills :attr:`target`.
        """
        try:
            stall_s, durable_s = save(path)
            cache: Any = "cold" if drop_page_cache(path) == 0 else "warm"
            for tensor in self.target.values():
                tensor.zero_()
            started = perf_counter()
            restore(path)
            restore_s = perf_counter() - started
            check_equal(self.state, self.target, place=str(path))
        finally:
            _remove_files(path)
        return {
            STALL: Sample(value=stall_s, verified=True),
            DURABLE: Sample(value=self.rate(durable_s), verified=True),
            RESTORE: Sample(value=self.rate(restore_s), verified=True, cache=cache),
        }


def check_equal(expected: dict[str, torch.Tensor], found: dict[str, torch.Tensor], *, place: str) -> None:
    """Raise CorruptionError unless both hold the same names with the same bits."""
    if expected.keys() != found.keys():
        raise CorruptionError("must hold the tensors that were saved", value=sorted(found)[:3], place=place)
    for name, tensor in expected.items():
        if not torch.equal(tensor.view(torch.int32), found[name].view(torch.int32)):
            raise CorruptionError(f"{name} must come back bit for bit", value="other bits", place=place)


def _remove_files(path: Path) -> None:
    """Remove what a variant wrote, and let the file system finish that before the next variant is timed."""
    for entry in path.iterdir() if path.is_dir() else ():
        # The log of a checkpoint root stays: its manager goes on counting steps from it.
        if entry.is_dir() and entry.name != "log":
            shutil.rmtree(entry)
        elif entry.is_file():
            entry.unlink()
    if path.is_dir():
        _fsync(path)


def _fsync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


# -------------------------------------------------------------------------------------------------------------- limits


class _Bare:
    """The same bytes in aligned memory, and one file that is written and read around the page cache."""

    def __init__(self, job: _Job) -> None:
        self._job = job
        self._path = job.directory / "limit"
        self._memory: mmap.mmap | None = None
        self._views: list[torch.Tensor] = []
        self._threads = ThreadPoolExecutor(_IO_THREADS)

    def allocate(self) -> None:
        # Huge pages where the kernel gives them: the disk takes each as one piece, so the limit is the hardest there is.
        self._memory = mmap.mmap(-1, self._job.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
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
        started = perf_counter()
        for view, tensor in zip(self._views, self._job.state.values(), strict=True):
            view.copy_(tensor)
        seconds = perf_counter() - started
        self._check()
        return {STALL: Sample(value=seconds, verified=True)}

    def write(self) -> Outcome:
        with self._open_direct(os.O_WRONLY | os.O_CREAT | os.O_TRUNC) as fd:
            os.posix_fallocate(fd, 0, self._job.size_bytes)
            started = perf_counter()
            self._each_block(lambda block, at: os.pwrite(fd, block, at))
            os.fsync(fd)
            seconds = perf_counter() - started
        # What was written is checked by the reads that follow in the same round.
        return {DURABLE: Sample(value=self._job.rate(seconds), verified=True)}

    def read(self) -> Outcome:
        cache: Any = "cold" if drop_page_cache(self._path) == 0 else "warm"
        for view in self._views:
            view.zero_()
        with self._open_direct(os.O_RDONLY) as fd:
            started = perf_counter()
            self._each_block(lambda block, at: os.preadv(fd, [block], at))
            seconds = perf_counter() - started
        self._check()
        self._path.unlink()
        _fsync(self._path.parent)
        return {RESTORE: Sample(value=self._job.rate(seconds), verified=True, cache=cache)}

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


def _limits(job: _Job) -> Sequence[Variant]:
    bare = _Bare(job)
    params = {"io_threads": _IO_THREADS, "io_bytes": _IO_BYTES}
    return [
        Variant(name="copy_ into views", kind="limit", run=bare.copy, setup=bare.allocate, teardown=bare.free),
        Variant(name="O_DIRECT write + fsync", kind="limit", run=bare.write, params=params),
        Variant(name="O_DIRECT read", kind="limit", run=bare.read, params=params),
    ]


# -------------------------------------------------------------------------------------------------------------- stoker


def _stoker(job: _Job) -> Variant:
    path = job.directory / "stoker"
    manager: CheckpointManager | None = None
    step = 0

    def open_manager() -> None:
        nonlocal manager
        manager = CheckpointManager(path)

    def close_manager() -> None:
        if manager is not None:
            manager.close()
        shutil.rmtree(path, ignore_errors=True)

    def save(_path: Path) -> tuple[float, float]:
        nonlocal step
        assert manager is not None
        step += 1
        handle = manager.save(step, {"model": job.state})
        handle.wait("committed")
        report = handle.report()
        assert report.committed_s is not None
        return report.stall_s, report.committed_s

    def restore(_path: Path) -> None:
        assert manager is not None
        manager.restore({"model": job.target})

    return Variant(
        name="stoker",
        kind="stoker",
        run=lambda: job.round_trip(path, save, restore),
        setup=open_manager,
        teardown=close_manager,
        notes=("durable means committed: every byte fsynced and one log record naming the step",),
    )


# --------------------------------------------------------------------------------------------------------------- peers


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns at each call that one process is a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dcp_load(job: _Job, path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _quiet():
        load({"model": job.target}, storage_reader=FileSystemReader(path))


def _dcp_threads() -> int:
    return min(4, os.cpu_count() or 1)


def _dcp(job: _Job) -> Variant:
    path = job.directory / "dcp"

    def require() -> None:
        import torch.distributed.checkpoint  # noqa: F401

        path.mkdir()

    def timed_save(path: Path) -> tuple[float, float]:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import save

        started = perf_counter()
        with _quiet():
            writer = FileSystemWriter(path, single_file_per_rank=True, thread_count=_dcp_threads())
            save({"model": job.state}, storage_writer=writer)
        seconds = perf_counter() - started
        return seconds, seconds

    return Variant(
        name="torch DCP",
        kind="peer",
        run=lambda: job.round_trip(path, timed_save, lambda path: _dcp_load(job, path)),
        setup=require,
        teardown=lambda: shutil.rmtree(path, ignore_errors=True),
        params={"thread_count": _dcp_threads(), "sync_files": True, "single_file_per_rank": True},
        notes=("the call returns when the files are synced; reads check no checksum",),
    )


def _dcp_async(job: _Job) -> Variant:
    path = job.directory / "dcp-async"
    stager: Any = None

    def require() -> None:
        nonlocal stager
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        # Pinning, streams and asynchronous staging need an accelerator; a stager that is kept reuses its memory.
        stager = DefaultStager(
            StagingOptions(
                use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
            )
        )
        path.mkdir()

    def close() -> None:
        if stager is not None:
            stager.close()
        shutil.rmtree(path, ignore_errors=True)

    def save(path: Path) -> tuple[float, float]:
        from torch.distributed.checkpoint.filesystem import FileSystemWriter
        from torch.distributed.checkpoint.state_dict_saver import async_save

        started = perf_counter()
        with _quiet():
            writer = FileSystemWriter(path, single_file_per_rank=True, thread_count=_dcp_threads())
            future: Any = async_save({"model": job.state}, storage_writer=writer, async_stager=stager)
            stall_s = perf_counter() - started
            future.result()
        return stall_s, perf_counter() - started

    return Variant(
        name="torch DCP async",
        kind="peer",
        run=lambda: job.round_trip(path, save, lambda path: _dcp_load(job, path)),
        setup=require,
        teardown=close,
        params={"thread_count": _dcp_threads(), "sync_files": True, "single_file_per_rank": True},
        notes=("its stager keeps its shared memory between saves",),
    )


def _safetensors(job: _Job) -> Variant:
    path = job.directory / "safetensors"

    def require() -> None:
        import safetensors.torch  # noqa: F401

        path.mkdir()

    def save(path: Path) -> tuple[float, float]:
        from safetensors.torch import save_file

        started = perf_counter()
        save_file(job.state, path / "model.safetensors")
        _fsync(path / "model.safetensors")
        _fsync(path)
        seconds = perf_counter() - started
        return seconds, seconds

    def restore(path: Path) -> None:
        from safetensors.torch import load_file

        # load_file maps the file; the job's own tensors have the bytes only after the copy.
        for name, tensor in load_file(path / "model.safetensors").items():
            job.target[name].copy_(tensor)

    return Variant(
        name="safetensors",
        kind="peer",
        run=lambda: job.round_trip(path, save, restore),
        setup=require,
        teardown=lambda: shutil.rmtree(path, ignore_errors=True),
        notes=("save_file, fsync of file and directory; load_file and copy_; reads check no checksum",),
    )
