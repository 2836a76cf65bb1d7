"""The staging arena: one block of shared memory for each rank and slot that *is* the image of the files to be written.

Tensors are copied once, to the place they have in the blob; checksums, local writes and uploads read from there. The
memory is a file in ``/dev/shm``, so its pages stay with the node when the process dies: the next process of the same
root restores from them, commits what nobody has committed yet, and then adopts them, which saves the seconds that first
touch costs (1.8-7.8 s for 2 GiB of tmpfs against 0.2 s warm).

::

    0                    header: who owns the arena and what it holds, with its own checksum
    4096                 the image: the blobs, one after the other
    4096 + image         the tail: the rank's fragment (with the CRC of each block) and all documents of plain values

``FILLING`` is written before the first byte of a save and ``FULL`` after its last checksum and its tail, since a kill in
between leaves a mixture of two saves.
"""

import ctypes
import hashlib
import json
import logging
import mmap
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import torch

from ..errors import StoreFull
from ..storage import _memory
from ..storage._checksums import crc32c
from ..storage._locks import try_lock, unlock
from ..storage._posix import pread_into, pwrite_all, shared_memory_directory
from ..storage._units import Buffer

__all__ = [
    "HEADER_BYTES",
    "Arena",
    "ArenaState",
    "arena_headers",
    "arena_path",
    "claim",
    "header_frame",
    "is_alive",
    "read_header",
    "read_tail",
    "root_id_of",
    "sweep_dead_arenas",
    "this_process",
    "write_tail",
]

logger = logging.getLogger(__name__)

HEADER_BYTES = 4096
_FORMAT = 2
_MAX_TAIL_BYTES = 1 << 30
_SPARE_BYTES = 64 << 20
"""An arena of a dead process that is larger than needed by more than this is made anew instead of being kept."""
_SPARE = 1.1
"""How much more must be available than an arena takes: the last byte of memory is not for checkpoints."""
_TORN_S = 3600.0
"""A header that can't be read belongs to nobody after this time: making an arena takes seconds."""
_MADV_POPULATE_WRITE = 23  # Linux 5.14; not in Python's mmap module
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


def this_process() -> dict[str, Any]:
    """The part of a header that names the owner."""
    return {"boot_id": _boot_id(), "pid": os.getpid(), "start_time": _start_time(os.getpid())}


# Guarantees: one owner process; used by one save at a time (the manager sees to that). Views handed out by tensor() and
# view() are valid until close().
class Arena:
    """Memory for `size_bytes` of file image, zeroed or left over from the last save of the same root.

    Falls back to anonymous memory, with one warning, where /dev/shm is missing or too small: then a save that is staged
    does not survive its process.

    Args:
        root_id: of the checkpoint root, by :func:`root_id_of`.
        rank, slot: which of the root's arenas.
        size_bytes: of the image.
        shared_only: raise OSError instead of falling back.
        anonymous_only: don't try shared memory.

    Raises:
        StoreFull: there is no memory for it. Shared memory may be had beyond what the machine has; then the kernel kills.
    """

    def __init__(
        self,
        *,
        root_id: str,
        rank: int,
        size_bytes: int,
        slot: int = 0,
        shared_only: bool = False,
        anonymous_only: bool = False,
    ) -> None:
        self.size_bytes, self.slot = size_bytes, slot
        self.path: Path | None = None
        self._fd = -1
        self._generation = 0
        self._facts: dict[str, Any] = {}
        self._owner: dict[str, Any] = {
            "format": _FORMAT,
            **this_process(),
            "root_id": root_id,
            "rank": rank,
            "slot": slot,
            "length": size_bytes,
        }
        if anonymous_only:
            self._memory = self._map_anonymous()
        else:
            self._require_memory(root_id, rank)
            try:
                self._memory = self._map_shared(arena_path(root_id, rank, slot))
            except OSError as error:
                self._close_fd()
                if shared_only:
                    raise
                self._memory = self._map_anonymous()
                logger.warning(
                    "staging in anonymous memory, which does not survive the process: %s (asked for %d bytes of "
                    "/dev/shm)",
                    error,
                    size_bytes,
                )
        # A forked DataLoader worker must not hold (or copy) gigabytes of staging memory.
        self._memory.madvise(mmap.MADV_DONTFORK)
        _populate(self._memory)
        self._view = memoryview(self._memory)
        self._bytes = torch.frombuffer(self._memory, dtype=torch.uint8)
        self.mark("EMPTY")
        # The manager unlinks when the interpreter ends, unless a save is unfinished: only then, and after a kill, the
        # arena is left to the next process.
        self._unlink = weakref.finalize(self, _unlink_own, self.path, self._identity(), os.getpid())
        self._unlink.atexit = False

    def _require_memory(self, root_id: str, rank: int) -> None:
        """Raise StoreFull if the machine has less than it takes, what a run before has left of this arena included."""
        held = 0
        with suppress(OSError):
            held = os.stat(arena_path(root_id, rank, self.slot), follow_symlinks=False).st_blocks * 512
        available, total = _memory.available_memory()
        if total and _SPARE * self.size_bytes > available + held:
            raise self._no_memory(f"{available + held} bytes available")

    def _map_anonymous(self) -> mmap.mmap:
        try:
            return mmap.mmap(-1, HEADER_BYTES + self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, MemoryError) as error:
            raise self._no_memory(str(error)) from error

    def _no_memory(self, why: str) -> StoreFull:
        return StoreFull(
            f"staging needs {self.size_bytes} bytes of memory for this rank's state",
            value=why,
            place="staging arena",
            hint="shard the state over more ranks or free memory",
        )

    def _map_shared(self, path: Path) -> mmap.mmap:
        length = HEADER_BYTES + self.size_bytes
        # Whoever finds the file must see an owner at once: reserving gigabytes takes seconds.
        self._fd = _open_own_arena(path, length, self._frame("EMPTY"))
        # fallocate, or a write beyond what tmpfs can hold would be a SIGBUS in the middle of training. The file is
        # never made shorter: who reads it in another process would get the same signal.
        try:
            os.posix_fallocate(self._fd, 0, length)
        except OSError:
            with suppress(FileNotFoundError):
                path.unlink()
            raise
        memory = mmap.mmap(self._fd, length, flags=mmap.MAP_SHARED)
        self.path = path
        return memory

    def _frame(self, state: ArenaState) -> bytes:
        self._generation += 1
        return header_frame({**self._owner, **self._facts, "state": state, "generation": self._generation})

    def mark(self, state: ArenaState, **facts: Any) -> None:
        """Write the header: `state` and what the arena holds (step, nonce, ...); what it held before is forgotten."""
        self._facts = facts
        frame = self._frame(state)
        self._view[: len(frame)] = frame

    def seal(self, tail: Buffer, **facts: Any) -> None:
        """Mark the arena ``FULL``, with what a later process needs besides the image in order to commit or restore it.

        Without room for the tail it is marked full all the same: then only this process can finish the save.
        """
        if self._fd >= 0:
            at = HEADER_BYTES + self.size_bytes
            try:
                # Not by the mapping: beyond what tmpfs can hold, a write is an error and a store is a SIGBUS.
                pwrite_all(self._fd, tail, at)
            except OSError as error:
                logger.warning("%s: a save that is staged does not survive this process: %s", self.path, error)
            else:
                facts["tail"] = {"start": at, "length": memoryview(tail).nbytes, "crc": crc32c(tail)}
        self.mark("FULL", **facts)

    def mark_committed(self) -> None:
        """Note in the header that the log names the step, so that no later process tries to commit it."""
        self.mark("FULL", **{**self._facts, "committed": True})

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

    def _identity(self) -> os.stat_result | None:
        return os.fstat(self._fd) if self._fd >= 0 else None

    def _close_fd(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def arena_path(root_id: str, rank: int, slot: int) -> Path:
    """Where an arena lies. Raises OSError where there is no shared memory."""
    return shared_memory_directory() / f"arena-{root_id}-{rank:05d}-{slot}"


def _populate(memory: mmap.mmap) -> None:
    """Have the kernel map every page now, so that no copy stops for a page fault. Other threads run meanwhile."""
    with suppress(OSError, AttributeError):
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        # Through ctypes, which lets go of the interpreter's lock; mmap.madvise and MAP_POPULATE do not.
        ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(len(memory)), ctypes.c_int(_MADV_POPULATE_WRITE)
        )


def _unlink_own(path: Path | None, own: os.stat_result | None, pid: int) -> None:
    # Not in a forked child, whose parent still uses it, nor a newer manager's file that took over the name.
    if path is not None and own is not None and os.getpid() == pid:
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(path, follow_symlinks=False), own):
                path.unlink()


def header_frame(header: Mapping[str, Any]) -> bytes:
    """A header as it stands at the beginning of the file. See :func:`read_header`."""
    body = json.dumps(header, separators=(",", ":")).encode()
    assert len(body) <= HEADER_BYTES - 8, "an arena's header fits into its page"
    return len(body).to_bytes(4, "little") + crc32c(body).to_bytes(4, "little") + body


def read_header(data: Buffer) -> dict[str, Any] | None:
    """The header of an arena file, or None if it is torn or no arena of this version."""
    length = int.from_bytes(data[:4], "little")
    body = data[8 : 8 + length]
    if not 0 < length <= HEADER_BYTES - 8 or crc32c(body) != int.from_bytes(data[4:8], "little"):
        return None
    header = json.loads(bytes(body))
    return header if isinstance(header, dict) and header.get("format") == _FORMAT else None


def is_alive(header: Mapping[str, Any]) -> bool:
    """Whether the process that wrote the header still runs."""
    started = _start_time(int(header["pid"]))
    return bool(started) and (header["boot_id"], header["start_time"]) == (_boot_id(), started)


def write_tail(documents: Mapping[str, Buffer], index: Mapping[str, Any]) -> bytes:
    """The tail of an arena: `index`, plain values, and documents by name. See :func:`read_tail`."""
    places: dict[str, tuple[int, int]] = {}
    at = 0
    for name, data in documents.items():
        places[name] = (at, at + memoryview(data).nbytes)
        at = places[name][1]
    head = json.dumps({**index, "documents": places}, separators=(",", ":")).encode()
    return b"".join((len(head).to_bytes(8, "little"), head, *documents.values()))


def read_tail(fd: int, header: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]] | None:
    """(index, documents by name) of an open arena file with this header; None if there is none, or it is damaged."""
    tail = header.get("tail")
    if tail is None or not 8 <= tail["length"] <= _MAX_TAIL_BYTES:
        return None
    data = memoryview(bytearray(tail["length"]))
    if pread_into(fd, data, tail["start"]) < len(data) or crc32c(data) != tail["crc"]:
        return None
    at = 8 + int.from_bytes(data[:8], "little")
    index = json.loads(bytes(data[8:at]))
    return index, {name: bytes(data[at + start : at + end]) for name, (start, end) in index["documents"].items()}


def claim(fd: int, frame: bytes) -> bool:
    """Make an open arena file this process's, unless its owner lives or another process is about to claim it."""
    if not try_lock(fd, 0):
        return False
    header = read_header(os.pread(fd, HEADER_BYTES, 0))
    if header is not None and is_alive(header):
        unlock(fd, 0)
        return False
    pwrite_all(fd, frame, 0)
    unlock(fd, 0)
    return True


def _open_own_arena(path: Path, length: int, frame: bytes) -> int:
    """Open the arena of this root and rank: a dead owner's is adopted, a living one's left alone."""
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
    with suppress(FileNotFoundError):
        fd = os.open(path, flags)
        try:
            if os.fstat(fd).st_size <= length + max(length // 4, _SPARE_BYTES) and claim(fd, frame):
                fd, claimed = -1, fd
                return claimed
        finally:
            if fd >= 0:
                os.close(fd)
        # Two managers of one root in this moment (a zombie job): take a new file; the other keeps its own, unnamed.
        path.unlink()
    fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        pwrite_all(fd, frame, 0)
    except BaseException:
        os.close(fd)
        raise
    return fd


def arena_headers(root_id: str = "") -> Iterator[tuple[Path, int, dict[str, Any] | None]]:
    """(path, open descriptor, header) of each arena of a root, or of all. The descriptor is good until the next one."""
    try:
        paths = sorted(shared_memory_directory().glob(f"arena-{root_id}-*" if root_id else "arena-*"))
    except OSError:
        return
    for path in paths:
        with suppress(OSError):
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                yield path, fd, read_header(os.pread(fd, HEADER_BYTES, 0))
            finally:
                os.close(fd)


def sweep_dead_arenas(*, keep_root_id: str, take_over: Callable[[int], bool] = lambda rank: False) -> None:
    """Unlink the arenas of processes that no longer run, but for those of one root, which its manager adopts.

    Args:
        take_over: says of which ranks the arenas of that root go, too.
    """
    for path, fd, header in arena_headers():
        if path.name.startswith(f"arena-{keep_root_id}-") and (header is None or not take_over(header["rank"])):
            continue
        torn = header is None and time.time() - os.fstat(fd).st_ctime > _TORN_S
        if torn or (header is not None and not is_alive(header)):
            with suppress(OSError):
                path.unlink()


def root_id_of(url: str) -> str:
    """A short name for a checkpoint root, the same in every process."""
    return hashlib.blake2b(url.encode(), digest_size=8).hexdigest()
