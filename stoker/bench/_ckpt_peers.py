"""The peers of ``stoker bench ckpt``, each used as its own documents say is fastest on host tensors.

Where a peer's own documents leave the sync to the caller, its files are synced here, within the measured time.
"""

import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from time import perf_counter
from typing import Any

from ._ckpt_job import Job, fsync
from .frame import Variant

__all__ = ["dcp_async_saver", "peers"]


@contextmanager
def _quiet() -> Iterator[None]:
    """DCP warns at each call that one process is a single process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _dcp_load(job: Job, path: Path) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with _quiet():
        load({"model": job.target}, storage_reader=FileSystemReader(path))


def _dcp_threads() -> int:
    return min(4, os.cpu_count() or 1)


def _dcp(job: Job) -> Variant:
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


def _dcp_async(job: Job, *, keeps_memory: bool) -> Variant:
    """One with a stager of its own, whose memory is reused, and one as the call comes: new memory at each save."""
    path = job.directory / ("dcp-async" if keeps_memory else "dcp-async-default")
    stager: Any = None

    def require() -> None:
        nonlocal stager
        import torch.distributed.checkpoint.state_dict_saver  # noqa: F401

        stager = _kept_stager() if keeps_memory else None
        path.mkdir()

    def close() -> None:
        if stager is not None:
            stager.close()
        shutil.rmtree(path, ignore_errors=True)

    def save(path: Path) -> tuple[float, float]:
        with _quiet():  # also while its thread writes
            started = perf_counter()
            future = _dcp_async_save({"model": job.state}, path, stager)
            stall_s = perf_counter() - started
            future.result()
            return stall_s, perf_counter() - started

    return Variant(
        name="torch DCP async" if keeps_memory else "torch DCP async, default",
        kind="peer",
        run=lambda: job.round_trip(path, save, lambda path: _dcp_load(job, path)),
        setup=require,
        teardown=close,
        params={"thread_count": _dcp_threads(), "sync_files": True, "single_file_per_rank": True},
        notes=("its stager keeps its shared memory between saves",) if keeps_memory else ("async_save in a thread",),
    )


def _kept_stager() -> Any:
    from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

    # Pinning, streams and asynchronous staging need an accelerator; a stager that is kept reuses its memory.
    return DefaultStager(
        StagingOptions(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
    )


def _dcp_async_save(state: Any, path: Path, stager: Any) -> Any:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter
    from torch.distributed.checkpoint.state_dict_saver import async_save

    writer = FileSystemWriter(path, single_file_per_rank=True, thread_count=_dcp_threads())
    return async_save(state, storage_writer=writer, async_stager=stager)


@contextmanager
def dcp_async_saver(path: Path) -> Iterator[Callable[[Any], Any]]:
    """A function that saves a state below `path` by DCP async with a kept stager, and returns its future."""
    stager = _kept_stager()
    try:
        with _quiet():
            yield lambda state: _dcp_async_save(state, path, stager)
    finally:
        stager.close()


def _torch_save(job: Job) -> Variant:
    path = job.directory / "torch-save"

    def save(path: Path) -> tuple[float, float]:
        import torch

        started = perf_counter()
        torch.save(job.state, path / "model.pt")
        fsync(path / "model.pt")
        fsync(path)
        seconds = perf_counter() - started
        return seconds, seconds

    def restore(path: Path) -> None:
        import torch

        for name, tensor in torch.load(path / "model.pt", weights_only=True, mmap=True).items():
            job.target[name].copy_(tensor)

    return Variant(
        name="torch.save",
        kind="peer",
        run=lambda: job.round_trip(path, save, restore),
        setup=path.mkdir,
        teardown=lambda: shutil.rmtree(path, ignore_errors=True),
        notes=("save, fsync of file and directory; load(mmap=True) and copy_; reads check no checksum",),
    )


def _torch_checkpointing(job: Job) -> Variant:
    path = job.directory / "torch-checkpointing"
    manager: Any = None

    def require() -> None:
        nonlocal manager
        # No dependency of stoker's, also not of its extra [bench]: see bench/peers/requirements-ckpt.txt.
        module = import_module("torch_checkpointing")
        config = import_module("torch_checkpointing.config")
        staging_module = import_module("torch_checkpointing.staging")
        # What its documents ask for on a machine without CUDA.
        staging = staging_module.CheckpointStagerConfig(
            use_pinned_memory=False, use_shared_memory=True, use_async_staging=False, use_non_blocking_copy=False
        )
        saver = config.AsyncCheckpointSaverConfig(staging_config=staging)
        storage = import_module("torch_checkpointing.storage.filesystem").LocalFileSystemStorageConfig(
            use_direct_io=False
        )
        manager = module.CheckpointManager(module.CheckpointManager.Config(save=saver, storage_config=storage))
        path.mkdir()

    def close() -> None:
        if manager is not None:
            manager.close()
        shutil.rmtree(path, ignore_errors=True)

    def save(path: Path) -> tuple[float, float]:
        started = perf_counter()
        future = manager.save(str(path / "step"), {"model": job.state})
        stall_s = perf_counter() - started
        if future is not None:
            future.result()
        for file in sorted(path.rglob("*")):
            fsync(file)
        return stall_s, perf_counter() - started

    def restore(path: Path) -> None:
        manager.load(str(path / "step"), into={"model": job.target})

    return Variant(
        name="torch_checkpointing",
        kind="peer",
        run=lambda: job.round_trip(path, save, restore),
        setup=require,
        teardown=close,
        notes=(
            "shared memory, a process that writes; its files are synced here; reads check no checksum",
            "0.1.1 opens files with O_DIRECT and writes unaligned pieces, which ext4 refuses (EINVAL): here without it",
        ),
    )


def _safetensors(job: Job) -> Variant:
    path = job.directory / "safetensors"

    def require() -> None:
        import safetensors.torch  # noqa: F401

        path.mkdir()

    def save(path: Path) -> tuple[float, float]:
        from safetensors.torch import save_file

        started = perf_counter()
        save_file(job.state, path / "model.safetensors")
        fsync(path / "model.safetensors")
        fsync(path)
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


def peers(job: Job) -> Sequence[Variant]:
    """All of them; one that is not installed is left out with a note by the frame."""
    return [
        _dcp(job),
        _dcp_async(job, keeps_memory=True),
        _dcp_async(job, keeps_memory=False),
        _torch_checkpointing(job),
        _safetensors(job),
        _torch_save(job),
    ]
