"""Packing and saving processes with one rule of theirs broken: the trials must catch each of them."""

import os
from pathlib import Path

from stoker.checkpoint.manager import CheckpointManager
from stoker.errors import AlreadyExists
from stoker.storage import ObjectInfo
from stoker.storage.local import LocalStore
from stoker.testing.kill import Recorder

from . import packing, saving


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
