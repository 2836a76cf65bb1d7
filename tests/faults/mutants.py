"""Packing, saving and caching processes with one rule of theirs broken: the trials must catch each of them."""

import fcntl
import os
from pathlib import Path
from typing import Any

from stoker.checkpoint.manager import CheckpointManager
from stoker.errors import AlreadyExists
from stoker.storage import ObjectInfo
from stoker.storage.local import LocalStore
from stoker.testing.kill import Recorder

from . import caching, packing, saving


def _create_in_place(store: LocalStore, key: str, data: bytes | bytearray | memoryview) -> ObjectInfo:
    """Broken: the name is there before the bytes."""
    path = store.local_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError as error:
        raise AlreadyExists("must not exist yet", place=str(path)) from error
    view = memoryview(data).cast("B")
    for half in (view[: len(view) // 2], view[len(view) // 2 :]):
        os.write(fd, half)
    os.close(fd)
    return store.head(key)


def pack_in_place(directory: Path, recorder: Recorder) -> None:
    """Packing on a store whose create is not atomic."""
    LocalStore.create = _create_in_place  # type: ignore[assignment]
    packing.work(directory, recorder)


def save_in_place(directory: Path, recorder: Recorder) -> None:
    """Saving on a store whose create is not atomic."""
    LocalStore.create = _create_in_place  # type: ignore[assignment]
    saving.work(directory, recorder)


def save_and_acknowledge_when_staged(directory: Path, recorder: Recorder) -> None:
    """Takes what is staged for what is committed."""
    with CheckpointManager(directory / "root", keep_last=3, grace_s=0.0) as manager:
        newest = manager.latest()
        step = 0 if newest is None else newest + 1
        with recorder.in_flight():
            handle = manager.save(step, saving.tree_at(step))
            recorder.acknowledge(step)
            handle.wait("committed")


def _path_of(fd: int) -> str:
    return os.readlink(f"/proc/self/fd/{fd}")


def cache_names_before_bytes(directory: Path, recorder: Recorder) -> None:
    """A cache whose blocks get their names before their bytes."""
    write, rename = os.pwrite, os.rename
    waiting: list[tuple[int, bytes, int]] = []

    def late(fd: int, data: Any, offset: int) -> int:
        if "/tmp/" not in _path_of(fd).removeprefix(str(directory)):
            return write(fd, data, offset)
        waiting.append((os.dup(fd), bytes(data), offset))
        return len(data)

    def early(source: str, target: str, **kwargs: Any) -> None:
        rename(source, target, **kwargs)
        for fd, data, offset in waiting:
            write(fd, data, offset)
            os.close(fd)
        waiting.clear()

    os.pwrite, os.rename = late, early  # type: ignore[assignment]
    caching.work(directory, recorder)


def cache_without_counting(directory: Path, recorder: Recorder) -> None:
    """A cache that writes its limit down and never what it uses."""
    write = os.pwrite

    def once(fd: int, data: Any, offset: int) -> int:
        if _path_of(fd).endswith("/lock") and os.fstat(fd).st_size:
            return len(data)
        return write(fd, data, offset)

    os.pwrite = once
    caching.work(directory, recorder)


def cache_without_locks(directory: Path, recorder: Recorder) -> None:
    """A cache on a file system that grants every lock to everybody."""
    fcntl.fcntl = lambda *args: b""  # type: ignore[assignment]
    caching.work(directory, recorder)
