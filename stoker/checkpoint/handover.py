"""Ranks of one node that restore one step hand blocks to each other, so that the node reads each of them once.

A block that several ranks of a node need (replicas, or a cut through a checksum's block after a change of layout) is read
by one of them, its owner, checked, and put into shared memory; the others take it from there and check it again. No rank
talks to another but through files in one directory of this user's shared memory, made for one restore::

    restore-{name}/00003.wants     rank 3 takes part: its process, its slots, and which blocks it needs (one bit each)
                   00003.row       one word for each block of the step: what this rank did with it; and its heartbeat
                   00003.slots     blocks on offer, 1 MiB each; a slot is used again when all who need the block have passed
                   members         who takes part: made once, by the first that saw all, or that waited long enough

From the members' bits each rank works out the same owners. All walk the blocks in one order and reserve slots in that
order, so the lowest block that is still needed always finds one: nobody waits in a circle. A rank that dies, leaves or
shows no heartbeat for 5 s is waited for no more; what it owned, the others read for themselves.
"""

import hashlib
import json
import logging
import mmap
import os
import shutil
import sys
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..metrics import counters
from ..storage._posix import pread_into, pwrite_all, shared_memory_directory
from .arena import is_alive, this_process
from .manifest import CRC_BLOCK_BYTES

__all__ = ["Handover", "Shares", "node_id", "sweep_dead_handovers"]

logger = logging.getLogger(__name__)

_JOIN_S = 5.0
"""How long the ranks of a node wait for each other before they begin."""
_BEAT_S = 0.25
_SILENT_S = 5.0
"""A rank without a heartbeat for so long is stopped, or might as well be."""
_PATIENCE_S = 60.0
"""The longest wait for a rank that lives: then its reads hang, and others may be luckier."""
_LOOK_S = 0.1
_WINDOW_BYTES = 2 << 30
"""Of all ranks of a node together."""
_MAX_SLOTS = 256
_MIN_SLOTS = 8
"""One coalesced read may hold as many blocks, and reserves for all of them at once."""
_MAX_MEMBERS = 64
"""The bits of one word."""
_TORN_S = 3600.0
_HEADER_WORDS = 16
_BEAT, _LEFT = 0, 1
_LEFT_WORD = (1).to_bytes(4, sys.byteorder)
_PENDING, _PASSED, _OFFERED = 0, 1, 16
"""What a word of a row says. An owner's: nothing yet, passed (all may read for themselves), or on offer in slot word - 16.
That of a rank that needs the block: nothing yet, or passed: the owner may use the slot again."""


def node_id() -> str:
    """The same for two processes if they share memory, so that one can hand a block to the other."""
    try:
        info = shared_memory_directory().stat()
    except OSError:
        return ""
    return f"{this_process()['boot_id']}-{info.st_dev}-{info.st_ino}"


class Handover:
    """One restore of one step, as far as it concerns the ranks of this node.

    Args:
        names: what all ranks of the job, and nobody else, know: root, run, attempt, which restore of the run it is.
        rank: of this process.
        neighbours: the ranks that share this node's memory, this one included; or how many there are.
    """

    def __init__(self, *, names: Sequence[object], rank: int, neighbours: Collection[int] | int) -> None:
        self._name = hashlib.blake2b(repr(tuple(names)).encode(), digest_size=12).hexdigest()
        self._rank = rank
        self._expected = neighbours if isinstance(neighbours, int) else frozenset(neighbours)

    @classmethod
    def of_rank(
        cls, rank: int, world_size: int, neighbours: Collection[int] | None, *, names: Sequence[object]
    ) -> "Handover | None":
        """None if this rank is alone on its node. Where nobody knows the neighbours, torchrun's LOCAL_WORLD_SIZE counts."""
        if neighbours is not None:
            return cls(names=names, rank=rank, neighbours=neighbours) if len(neighbours) > 1 else None
        told = os.environ.get("LOCAL_WORLD_SIZE", "")
        count = min(int(told), world_size) if told.isdecimal() else 1
        return cls(names=names, rank=rank, neighbours=count) if count > 1 else None

    @property
    def num_neighbours(self) -> int:
        """Ranks that are waited for, this one included."""
        return self._expected if isinstance(self._expected, int) else len(self._expected)

    def join(self, needed: NDArray[np.bool_], group: NDArray[np.int64]) -> "Shares | None":
        """Meet the others and agree who reads what; None if no block is shared, or the ranks did not find each other.

        Waits for them for 5 s at most. Never raises for a lack of shared memory: then each rank reads for itself.

        Args:
            needed: for each block of the step whether this rank needs it.
            group: for each block the number of the read that it belongs to, ascending, the same on each rank.
        """
        if self.num_neighbours < 2:
            return None
        try:
            return self._join(needed, group)
        except OSError as error:
            logger.warning("restoring without the other ranks of this node, whose shared memory fails: %s", error)
            return None

    def _join(self, needed: NDArray[np.bool_], group: NDArray[np.int64]) -> "Shares | None":
        directory = shared_memory_directory() / f"restore-{self._name}"
        with suppress(FileExistsError):
            directory.mkdir(mode=0o700)
        with ExitStack() as stack:
            stack.callback(_leave, directory, self._rank)
            _register(directory, self._rank, needed, num_slots=_num_slots(directory, self.num_neighbours))
            members = self._members(directory)
            if self._rank not in members or not 1 < len(members) <= _MAX_MEMBERS:
                return None
            peers = []
            for rank in members:
                peers.append(_Peer(directory, rank, len(needed)))
                stack.callback(peers[-1].close)
            masks, owner = _owners(peers, group)
            if (owner < 0).all():
                return None
            return Shares(peers, members.index(self._rank), masks, owner, on_close=stack.pop_all())

    def _members(self, directory: Path) -> list[int]:
        """Who takes part, the same for all: agreed by the first that saw all, or that waited long enough."""
        deadline, pause_s = time.monotonic() + _JOIN_S, 0.0005
        path = directory / "members"
        while True:
            with suppress(FileNotFoundError):
                return list(map(int, json.loads(path.read_text())))
            here = {int(entry.name.split(".")[0]) for entry in directory.glob("*.wants")}
            complete = len(here) >= self._expected if isinstance(self._expected, int) else self._expected <= here
            if complete or time.monotonic() > deadline:
                if not complete:
                    logger.warning(
                        "of %d ranks of this node only %s restore together", self.num_neighbours, sorted(here)
                    )
                draft = directory / f"{self._rank:05d}.members"
                draft.write_text(json.dumps(sorted(here)))
                with suppress(FileExistsError):
                    os.link(draft, path)
                draft.unlink()
                continue
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.01)


def _num_slots(directory: Path, num_ranks: int) -> int:
    free = os.statvfs(directory)
    room = min(_WINDOW_BYTES, free.f_bavail * free.f_frsize // 4) // num_ranks // CRC_BLOCK_BYTES
    return min(room, _MAX_SLOTS) if room >= _MIN_SLOTS else 0


def _register(directory: Path, rank: int, needed: NDArray[np.bool_], *, num_slots: int) -> None:
    """Make this rank's files; the others see them at once and whole."""
    size = 4 * (_HEADER_WORDS + len(needed))
    draft = directory / f"{rank:05d}.draft"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    row = os.open(directory / f"{rank:05d}.row", flags, 0o600)
    try:
        os.posix_fallocate(row, 0, size)  # a store into a hole that tmpfs can't fill is a SIGBUS
    finally:
        os.close(row)
    os.close(os.open(directory / f"{rank:05d}.slots", flags, 0o600))
    header = json.dumps({**this_process(), "rank": rank, "num_slots": num_slots}).encode()
    draft.write_bytes(len(header).to_bytes(4, "little") + header + np.packbits(needed).tobytes())
    draft.rename(directory / f"{rank:05d}.wants")


def _read_header(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    header: dict[str, Any] = json.loads(data[4 : 4 + int.from_bytes(data[:4], "little")])
    return header


# Guarantees: is_gone() and fetch() may be called from several threads. `_lock` guards what is known of its heartbeat.
class _Peer:
    """The files of one rank that takes part; this rank's own, too."""

    def __init__(self, directory: Path, rank: int, num_blocks: int) -> None:
        self.rank = rank
        data = (directory / f"{rank:05d}.wants").read_bytes()
        at = 4 + int.from_bytes(data[:4], "little")
        self.header: dict[str, Any] = json.loads(data[4:at])
        self.bits = np.frombuffer(data, np.uint8, offset=at)
        if len(self.bits) != -(-num_blocks // 8):
            raise OSError(f"rank {rank} restores another step")
        self.num_slots = int(self.header["num_slots"])
        self._lock = threading.Lock()
        self._gone = False
        self._looked = self._beaten = time.monotonic()
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        self.slots_fd = os.open(directory / f"{rank:05d}.slots", flags)
        try:
            fd = os.open(directory / f"{rank:05d}.row", flags)
            try:
                self._memory = mmap.mmap(fd, 4 * (_HEADER_WORDS + num_blocks))
            finally:
                os.close(fd)
        except BaseException:
            os.close(self.slots_fd)
            raise
        # Aligned words: a store is seen whole or not at all.
        self._words = np.frombuffer(self._memory, np.uint32)
        self.row = self._words[_HEADER_WORDS:]
        self._beat = int(self._words[_BEAT])

    def beat(self) -> None:
        self._words[_BEAT] += 1

    def has_left(self) -> bool:
        return bool(self._words[_LEFT])

    def give_up(self, why: str) -> None:
        """Wait for it no more."""
        with self._lock:
            self._give_up(why)

    def _give_up(self, why: str) -> None:
        if not self._gone:
            self._gone = True
            logger.warning("rank %d %s; going on without it", self.rank, why)
            counters.add("ckpt.restore.node.gone_ranks")

    def is_gone(self) -> bool:
        """Whether nothing more is to be expected of it: it has left, died, or was silent for too long."""
        if self._gone or self.has_left():
            return True
        with self._lock:
            now = time.monotonic()
            if now - self._looked < _LOOK_S:
                return self._gone
            self._looked = now
            beat = int(self._words[_BEAT])
            if beat != self._beat:
                self._beat, self._beaten = beat, now
            if not is_alive(self.header):
                self._give_up("has died")
            elif now - self._beaten > _SILENT_S:
                self._give_up("is silent")
            return self._gone

    def fetch(self, slot: int, buffer: memoryview) -> bool:
        return pread_into(self.slots_fd, buffer, slot * CRC_BLOCK_BYTES) == len(buffer)

    def close(self) -> None:
        del self.row, self._words
        self._memory.close()
        os.close(self.slots_fd)


def _owners(peers: Sequence[_Peer], group: NDArray[np.int64]) -> tuple[NDArray[np.uint64], NDArray[np.int16]]:
    """For each block who needs it, one bit for each peer, and the index of the peer that reads it for all; -1: nobody.

    Neighbouring blocks of one read that the same ranks need have one owner: the one that has least to read so far.
    """
    masks = np.zeros(len(group), np.uint64)
    for index, peer in enumerate(peers):
        masks |= np.unpackbits(peer.bits, count=len(group)).astype(np.uint64) << np.uint64(index)
    owner = np.full(len(group), -1, np.int16)
    is_shared = (masks & (masks - (masks != 0))) != 0  # more than one bit
    load = [int((masks[~is_shared] == np.uint64(1 << index)).sum()) for index in range(len(peers))]
    able = [index for index, peer in enumerate(peers) if peer.num_slots]
    borders = np.flatnonzero((np.diff(masks) != 0) | (np.diff(group) != 0)) + 1
    starts = np.concatenate(([0], borders)) if len(group) else np.zeros(0, np.int64)
    ends = np.append(starts[1:], len(group))
    keep = is_shared[starts] if len(starts) else np.zeros(0, bool)
    for start, end, mask in zip(starts[keep].tolist(), ends[keep].tolist(), masks[starts[keep]].tolist(), strict=True):
        wanters = [index for index in able if mask >> index & 1]
        if wanters:
            best = min(wanters, key=load.__getitem__)
            owner[start:end] = best
            load[best] += end - start
    return masks, owner


# Guarantees: offer(), skip() and take() may be called from several threads, reserve() by each turn once; close() when none
# of them runs. `_changed` guards `_free`, `_reserved`, `_offered`, `_turn`.
class Shares:
    """Who reads which block, and the blocks that change hands. A context manager: leaving it frees what can be freed.

    Attributes:
        owner: for each block: -1 if nobody shares it with this rank or another, else the index of who reads it.
        me: this rank's index.
    """

    def __init__(
        self,
        peers: Sequence[_Peer],
        me: int,
        masks: NDArray[np.uint64],
        owner: NDArray[np.int16],
        *,
        on_close: ExitStack,
    ) -> None:
        self.owner, self.me = owner, me
        self._peers, self._own, self._masks, self._on_close = peers, peers[me], masks, on_close
        own = self._own
        self._free = list(range(own.num_slots))
        self._reserved: dict[int, int] = {}
        self._offered: dict[int, int] = {}
        self._turn = 0
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._is_full = False
        self._heart = threading.Thread(target=self._beat, name="stoker-heartbeat", daemon=True)
        self._heart.start()

    def _beat(self) -> None:
        while not self._stopped.wait(_BEAT_S):
            self._own.beat()

    # ------------------------------------------------------------------------------------------------------ giving

    def gives(self, first: int, end: int) -> list[int]:
        """Blocks in ``[first, end)`` that this rank reads for others."""
        return (np.flatnonzero(self.owner[first:end] == self.me) + first).tolist()

    def reserve(self, turn: int, blocks: Sequence[int]) -> None:
        """Wait for slots for `blocks`: turn after turn, counted from 0, in ascending order of blocks.

        Ranks that hold slots for too long are waited for no more. What finds no slot is passed: each rank reads it itself.
        """
        deadline = time.monotonic() + _PATIENCE_S
        pause_s = 0.0005
        with self._changed:
            while not self._stopped.is_set():
                if self._turn == turn:
                    # Also while there are others: a slot that was used is in memory, a new one costs its first touch.
                    is_late = time.monotonic() > deadline
                    self._collect(too_slow=is_late)
                    if len(self._free) >= len(blocks) or is_late:
                        break
                else:
                    deadline = time.monotonic() + _PATIENCE_S
                # Woken by threads of this process; other processes are looked at.
                self._changed.wait(pause_s)
                pause_s = min(2 * pause_s, 0.005)
            self._turn += 1
            for block in blocks:
                if self._free and not self._stopped.is_set():
                    self._reserved[block] = self._free.pop()
                else:
                    self._own.row[block] = _PASSED
            self._changed.notify_all()

    def _collect(self, *, too_slow: bool) -> None:
        """Free the slots of blocks that all who need them have passed, or will never take."""
        for block, slot in list(self._offered.items()):
            mask = int(self._masks[block])
            late = [
                peer
                for index, peer in enumerate(self._peers)
                if index != self.me and mask >> index & 1 and peer.row[block] == _PENDING and not peer.is_gone()
            ]
            if too_slow:
                for peer in late:
                    peer.give_up(f"takes nothing for {_PATIENCE_S:g} s")
            if too_slow or not late:
                del self._offered[block]
                self._free.append(slot)

    def offer(self, block: int, data: NDArray[np.uint8]) -> None:
        """Put a block that was checked into the slot that is reserved for it; nothing if there is none."""
        with self._changed:
            slot = self._reserved.pop(block, -1)
        if slot < 0:
            return
        try:
            pwrite_all(self._own.slots_fd, data.data, slot * CRC_BLOCK_BYTES)
        except OSError as error:
            if not self._is_full:
                self._is_full = True
                logger.warning(
                    "shared memory can't hold what the ranks of this node share, so they read it each: %s", error
                )
            self._own.row[block] = _PASSED
            with self._changed:
                self._free.insert(0, slot)
                self._changed.notify_all()
            return
        counters.add("ckpt.restore.node.offered_bytes", len(data))
        with self._changed:
            self._offered[block] = slot
            self._own.row[block] = _OFFERED + slot

    def skip(self, blocks: Sequence[int]) -> None:
        """Say of those that were not offered that each rank is to take them from elsewhere."""
        with self._changed:
            for block in blocks:
                slot = self._reserved.pop(block, -1)
                if slot >= 0:
                    self._own.row[block] = _PASSED
                    self._free.append(slot)
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------------------------ taking

    def take(self, block: int, buffer: memoryview) -> bool:
        """Wait for a block that another rank reads, and copy it; False if it does not come. To be checked by the caller."""
        try:
            peer = self._peers[self.owner[block]]
            word = self._await(peer, block)
            return word >= _OFFERED and peer.fetch(word - _OFFERED, buffer)
        finally:
            self._own.row[block] = _PASSED

    def passed(self, first: int, end: int) -> None:
        """Say of blocks that other ranks read that this one does not need them any more."""
        self._own.row[first:end] = _PASSED

    def _await(self, peer: _Peer, block: int) -> int:
        deadline, pause_s = time.monotonic() + _PATIENCE_S, 0.0001
        while True:
            word = int(peer.row[block])
            if word != _PENDING or self._stopped.is_set():
                return word
            if time.monotonic() > deadline:
                peer.give_up(f"reads one block for more than {_PATIENCE_S:g} s")
            if peer.is_gone():
                return int(peer.row[block])  # it may have offered it in between
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.005)

    # ----------------------------------------------------------------------------------------------------- the end

    def stop(self) -> None:
        """This rank failed: end all waiting."""
        self._stopped.set()
        with self._changed:
            self._changed.notify_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """What is on offer stays until the others have it: the last one to leave removes all."""
        self.stop()
        self._heart.join()
        self._on_close.close()


def _leave(directory: Path, rank: int) -> None:
    """Remove all if nobody is left who might still take a block; else only what no other rank may have seen."""
    with suppress(OSError):
        (directory / f"{rank:05d}.draft").unlink()
    with suppress(OSError):
        fd = os.open(directory / f"{rank:05d}.row", os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            pwrite_all(fd, _LEFT_WORD, 4 * _LEFT)
        finally:
            os.close(fd)
    with suppress(OSError, ValueError):
        if all(_has_left(path) for path in directory.glob("*.wants")):
            shutil.rmtree(directory, ignore_errors=True)


def _has_left(wants: Path) -> bool:
    header = _read_header(wants)
    with wants.with_suffix(".row").open("rb") as row:
        row.seek(4 * _LEFT)
        return row.read(4) == _LEFT_WORD or not is_alive(header)


def sweep_dead_handovers() -> None:
    """Remove what the ranks of killed jobs have left."""
    for directory in _directories():
        with suppress(OSError, ValueError):
            headers = [_read_header(path) for path in directory.glob("*.wants")]
            is_old = time.time() - directory.stat().st_mtime > _TORN_S
            if is_old if not headers else not any(map(is_alive, headers)):
                shutil.rmtree(directory, ignore_errors=True)


def _directories() -> list[Path]:
    with suppress(OSError):
        return [path for path in shared_memory_directory().glob("restore-*") if path.is_dir()]
    return []
