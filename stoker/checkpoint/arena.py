"""The staging arena: one block of shared memory for each rank that *is* the image of the files to be written.

Tensors are copied once, to the place they have in the blob; checksums, local writes and uploads read from there. The
memory is a file in ``/dev/shm``, so its pages stay with the node when the process dies: the next process of the same
root adopts them and saves the seconds that first touch costs (1.8-7.8 s for 2 GiB of tmpfs against 0.2 s warm).

The first 4 KiB are a header: who owns the arena and what it holds. ``FILLING`` is written before the first byte of a
save and ``FULL`` after its last checksum, since a kill in between leaves a mixture of two saves.
"""

import hashlib
import json
import logging
import mmap
import os
import weakref
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import StoreFull
from ..storage._checksums import crc32c
from ..storage._posix import shared_memory_directory

__all__ = ["HEADER_BYTES", "Arena", "ArenaState"]

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096
_FORMAT = 1
ArenaState = Literal["EMPTY", "FILLING", "FULL"]


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_time(pid: int) -> str:
    """The kernel's start time of a process: with the pid and the boot id it names one process for ever."""
    with suppress(OSError):
        # The command name may hold spaces and brackets: fields count from the last bracket (proc(5), field 22).
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    return ""


# Guarantees: one owner process; used by one save at a time (the manager sees to that). Views handed out by tensor() and
# view() are valid until close().
class Arena:
    """Memory for `size_bytes` of file image, zeroed or left over from the last save of the same root.

    Falls back to anonymous memory, with one warning, where /dev/shm is missing or too small: then a save that is staged
    does not survive its process.
    """

    def __init__(self, *, root_id: str, rank: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.path: Path | None = None
        self._fd = -1
        self._header: dict[str, Any] = {
            "format": _FORMAT,
            "boot_id": _boot_id(),
            "pid": os.getpid(),
            "start_time": _start_time(os.getpid()),
            "root_id": root_id,
            "generation": 0,
        }
        try:
            self._memory = self._map_shared(root_id, rank)
        except OSError as error:
            logger.warning(
                "staging in anonymous memory, which does not survive the process: %s (asked for %d bytes of /dev/shm)",
                error,
                size_bytes,
            )
            self._close_fd()
            try:
                self._memory = mmap.mmap(-1, HEADER_BYTES + size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            except (OSError, MemoryError) as failed:
                raise StoreFull(
                    "staging needs memory for one copy of this rank's state",
                    value=f"{size_bytes} bytes",
                    place="staging arena",
                    hint="shard the state over more ranks or free memory",
                ) from failed
        # A forked DataLoader worker must not hold (or copy) gigabytes of staging memory.
        self._memory.madvise(mmap.MADV_DONTFORK)
        self._view = memoryview(self._memory)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.mark("EMPTY")
        # A process that ends without close() leaves nothing either; only a killed one leaves its arena to the next.
        self._unlink = weakref.finalize(self, _unlink_own, self.path, os.getpid())

    def _map_shared(self, root_id: str, rank: int) -> mmap.mmap:
        directory = shared_memory_directory()
        path = directory / f"arena-{root_id}-{rank:05d}-0"
        length = HEADER_BYTES + self.size_bytes
        self._fd = _open_own_arena(path)
        # fallocate, or a write beyond what tmpfs can hold would be a SIGBUS in the middle of training.
        try:
            os.posix_fallocate(self._fd, 0, length)
        except OSError:
            with suppress(FileNotFoundError):
                path.unlink()
            raise
        os.ftruncate(self._fd, length)
        self.path = path
        return mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)

    def mark(self, state: ArenaState, **facts: Any) -> None:
        """Write the header: `state` and what the arena holds (step, nonce, length)."""
        self._header = {**self._header, **facts, "state": state, "generation": self._header["generation"] + 1}
        body = json.dumps(self._header, separators=(",", ":")).encode()
        frame = len(body).to_bytes(4, "little") + crc32c(body).to_bytes(4, "little") + body
        self._view[: len(frame)] = frame

    def view(self, start: int, end: int) -> memoryview:
        """Bytes ``[start, end)`` of the image, writable."""
        return self._view[HEADER_BYTES + start : HEADER_BYTES + end]

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """The image at `start` as a tensor of `shape`; `start` is a multiple of the item size."""
        count = dtype.itemsize
        for extent in shape:
            count *= extent
        at = HEADER_BYTES + start
        return self._bytes[at : at + count].view(dtype).view(shape)

    def close(self) -> None:
        """Unmap and unlink. Call when no save uses it; a process that dies instead leaves it to the next one."""
        self._unlink()
        self.path = None
        del self._bytes
        self._view.release()
        # A view that somebody still holds keeps the mapping alive; it goes with the view.
        with suppress(BufferError):
            self._memory.close()
        self._close_fd()

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _unlink_own(path: Path | None, pid: int) -> None:
    if path is not None and os.getpid() == pid:  # not in a forked child, whose parent still uses it
        with suppress(FileNotFoundError):
            path.unlink()


def read_header(data: bytes) -> dict[str, Any] | None:
    """The header of an arena file, or None if it is torn or no arena."""
    length = int.from_bytes(data[:4], "little")
    body = data[8 : 8 + length]
    if not 0 < length <= HEADER_BYTES - 8 or crc32c(body) != int.from_bytes(data[4:8], "little"):
        return None
    header = json.loads(body)
    return header if isinstance(header, dict) and header.get("format") == _FORMAT else None


def is_alive(header: dict[str, Any]) -> bool:
    """Whether the process that wrote the header still runs."""
    started = _start_time(int(header["pid"]))
    return bool(started) and (header["boot_id"], header["start_time"]) == (_boot_id(), started)


def _open_own_arena(path: Path) -> int:
    """Open the arena of this root and rank: a dead owner's is adopted, a living one's left alone."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        fd = os.open(path, flags)
        header = read_header(os.pread(fd, HEADER_BYTES, 0))
        if header is None or not is_alive(header):
            return fd
        os.close(fd)
        # Two managers of one root in this moment (a zombie job): take a new file; the other keeps its own, unnamed.
        path.unlink()
    return os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)


def sweep_dead_arenas(*, keep_root_id: str) -> None:
    """Unlink the arenas of processes that no longer run, but for those of one root, which its manager adopts."""
    try:
        directory = shared_memory_directory()
    except OSError:
        return
    for path in directory.glob("arena-*"):
        if path.name.startswith(f"arena-{keep_root_id}-"):
            continue
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                header = read_header(os.pread(fd, HEADER_BYTES, 0))
            finally:
                os.close(fd)
            if header is not None and not is_alive(header):
                path.unlink()


def root_id_of(url: str) -> str:
    """A short name for a checkpoint root, the same in every process."""
    return hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
