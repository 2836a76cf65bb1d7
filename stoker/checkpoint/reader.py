"""Verified bytes of a committed step: every CRC block that is touched is checked before a byte of it is used.

Needs no torch: the command line verifies a checkpoint with this module alone.
"""

import hashlib
import itertools
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptBlock, CorruptRecord, NoCheckpoint
from ..metrics import counters
from ..storage import _posix
from ..storage._checksums import crc32c
from ..storage.store import ObjectStore
from .log import CheckpointLog, LiveStep
from .manifest import CRC_BLOCK_BYTES, BlobInfo, Manifest

if TYPE_CHECKING:
    from .handover import Handover, Shares
    from .nearest import NearCopy

__all__ = ["Span", "StepReader", "read_manifest", "resolve_step"]

logger = logging.getLogger(__name__)

_READ_BYTES = 8 << 20
"""One read: CRC blocks are coalesced up to here."""
_READ_THREADS = 8
"""While some check and copy, enough others read: on 2 cores, 2.3 GB/s of the disk's 2.8 instead of 1.9 with four."""
_TAKE_THREADS = 2
"""That take from other ranks of the node; they wait more than they work."""


@dataclass(frozen=True, kw_only=True)
class Span:
    """Bytes ``[start, start + len(sink))`` of a blob, wanted in `sink` (uint8, contiguous, writable)."""

    start: int
    sink: NDArray[np.uint8]

    @property
    def end(self) -> int:
        return self.start + len(self.sink)


@dataclass(frozen=True, kw_only=True)
class _Read:
    """One coalesced read of whole CRC blocks, and the spans that each of them serves.

    Attributes:
        first_block: of the blob, counted through all blobs of the step.
        shares: where other ranks of the node wait for some of the blocks; None if nobody does.
    """

    blob: BlobInfo
    start: int
    end: int
    spans_of_block: Mapping[int, Sequence[Span]]
    first_block: int = 0
    shares: "Shares | None" = None

    def number(self, at: int) -> int:
        """Of the block at byte `at` of the blob, through all blobs of the step."""
        return self.first_block + -(-at // CRC_BLOCK_BYTES)


# Guarantees: read() may be called from several threads; each reader thread has its own aligned buffer. `_lock` guards
# `bytes_from` and `num_healed`.
class StepReader:
    """Reads from the blobs of one step: each block from the nearest copy that has it right.

    Args:
        directory: the step's key below the store's root.
        nearer: copies to ask before the root, the nearest first.

    Attributes:
        handover: between ranks of this node that all :meth:`read` from this step, at the same time; None for nobody.
        bytes_from: bytes of blobs that were delivered, by tier; the store's is called ``"root"``.
        num_healed: blocks that a nearer copy had wrong.
    """

    def __init__(
        self, store: ObjectStore, directory: str, manifest: Manifest, *, nearer: "Sequence[NearCopy]" = ()
    ) -> None:
        self.manifest = manifest
        self.bytes_from: dict[str, int] = {}
        self.num_healed = 0
        self.handover: Handover | None = None
        self._store, self._directory, self._nearer = store, directory, nearer
        self._local = threading.local()
        self._lock = threading.Lock()

    @property
    def place(self) -> str:
        """The step's directory with its root."""
        return self._store.place(self._directory)

    def key(self, path: str) -> str:
        """The store's key of a blob or another file of this step; a blob may lie in an older step's directory."""
        blob = self.manifest.blobs.get(path)
        return f"{(blob.home if blob is not None else '') or self._directory}/{path}"

    def read(self, wanted: Mapping[str, Sequence[Span]]) -> int:
        """Fill every sink; `wanted` maps blob paths to spans. Returns the bytes read, each CRC block once.

        Raises:
            CorruptBlock: a block differs from its checksum also when it is read a second time.
        """
        reads = [read for path, spans in wanted.items() for read in _coalesce(self.manifest.blob(path), spans)]
        if self.handover is None or not self._run_shared(reads, self.handover):
            self._run(reads)
        return sum(read.end - read.start for read in reads)

    def read_bytes(self, path: str, start: int, end: int) -> bytes:
        """Bytes ``[start, end)`` of one blob, verified."""
        sink = np.empty(end - start, np.uint8)
        if end > start:
            self.read({path: [Span(start=start, sink=sink)]})
        return sink.tobytes()

    def read_state(self, path: str) -> bytes:
        """One state file, checked against size and SHA-256 in the manifest."""
        info = self.manifest.states[path]
        for copy in self._nearer:
            near = copy.document(path)
            if near is not None and hashlib.sha256(near).hexdigest() == info.sha256:
                return near
        data = bytes(self._store.get(self.key(path)))
        got = hashlib.sha256(data).hexdigest()
        if got != info.sha256:
            raise CorruptRecord(f"must have SHA-256 {info.sha256}", value=got, place=self._store.place(self.key(path)))
        return data

    def damaged_blocks(self, blobs: Iterable[BlobInfo], *, on_read: Callable[[int], None]) -> list[CorruptBlock]:
        """Read whole blobs, and return an error for each block that differs from its checksum.

        `on_read` gets the bytes of each read, on the reading threads. A missing or short blob raises.
        """

        def damage(read: _Read) -> list[CorruptBlock]:
            found = self._all_damage(read)
            if found:  # a flip on the way is gone the second time; one at rest is not
                found = self._all_damage(read)
            on_read(read.end - read.start)
            return found

        reads = (read for blob in blobs for read in _coalesce(blob, (), whole=True))
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="stoker-verify") as threads:
            return [error for found in threads.map(damage, reads) for error in found]

    def _run(self, reads: list[_Read]) -> None:
        if len(reads) == 1:
            self._serve(reads[0])
            return
        with ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="stoker-restore") as threads:
            for _ in threads.map(self._serve, reads):
                pass

    def _run_shared(self, reads: list[_Read], handover: "Handover") -> bool:
        """Read what this rank owns, take the rest from other ranks of the node; False if they share nothing."""
        first_blocks, groups = _number_blocks(self.manifest.blobs.values())
        # In one order on all ranks.
        reads = sorted(
            (replace(read, first_block=first_blocks[read.blob.path]) for read in reads), key=lambda r: r.number(r.start)
        )
        needed = np.zeros(len(groups), bool)
        for read in reads:
            needed[read.number(read.start) : read.number(read.end)] = True
        shares = handover.join(needed, groups)
        if shares is None:
            return False
        turns = itertools.count()
        with (
            shares,
            ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="stoker-restore") as readers,
            ThreadPoolExecutor(_TAKE_THREADS, thread_name_prefix="stoker-take") as takers,
        ):
            work = []
            for read in itertools.chain.from_iterable(_by_owner(one, shares) for one in reads):
                owner = shares.owner[read.number(read.start)]
                if owner not in (-1, shares.me):
                    work.append(takers.submit(self._take, read, shares))
                elif blocks := shares.gives(read.number(read.start), read.number(read.end)):
                    work.append(readers.submit(self._give, replace(read, shares=shares), blocks, next(turns)))
                else:
                    work.append(readers.submit(self._serve, read))
            try:
                for future in wait(work, return_when=FIRST_EXCEPTION).done:
                    future.result()
            except BaseException:
                shares.stop()
                readers.shutdown(wait=False, cancel_futures=True)
                takers.shutdown(wait=False, cancel_futures=True)
                raise
        return True

    def _give(self, read: _Read, blocks: Sequence[int], turn: int) -> None:
        """Read, with blocks that others wait for."""
        assert read.shares is not None
        read.shares.reserve(turn, blocks)
        try:
            self._serve(read)
        finally:
            read.shares.skip(blocks)

    def _take(self, read: _Read, shares: "Shares") -> None:
        """Have another rank read: only if it does not, or its copy is damaged, this one does."""
        try:
            near = [copy for copy in self._nearer if copy.in_memory]
            far = [copy for copy in self._nearer if not copy.in_memory]
            self._serve(read, [*near, _Taken(shares, read.first_block), *far])
        finally:
            shares.passed(read.number(read.start), read.number(read.end))

    def _serve(self, read: _Read, nearer: "Sequence[NearCopy] | None" = None) -> None:
        reads = [read]
        for copy in self._nearer if nearer is None else nearer:
            reads = [left for one in reads for left in self._serve_from(copy, one)]
        for one in reads:
            damaged = self._deliver(one, self._fetch(one))
            if damaged:  # a flip on the way is gone the second time; one at rest is not
                counters.add("ckpt.restore.rereads")
                damaged = self._deliver(one, self._fetch(one))
            if damaged:
                raise damaged[0]
            self._count("root", one.end - one.start)
        counters.add("ckpt.restore.bytes", read.end - read.start)

    def _serve_from(self, copy: "NearCopy", read: _Read) -> list[_Read]:
        """Deliver what a nearer copy has right; returns the rest."""
        left: list[_Read] = []
        step = copy.read_bytes or read.end - read.start
        for start in range(read.start, read.end, step):
            for one in self._serve_part(copy, replace(read, start=start, end=min(start + step, read.end))):
                if left and left[-1].end == one.start:  # the next copy may be best read in larger pieces
                    left[-1] = replace(left[-1], end=one.end)
                else:
                    left.append(one)
        return left

    def _serve_part(self, copy: "NearCopy", read: _Read) -> list[_Read]:
        sink = _only_sink(read) if copy.in_memory else None
        data = np.frombuffer(self._buffer()[: read.end - read.start], np.uint8) if sink is None else sink
        if not copy.fetch(read.blob.path, read.start, data.data):
            return [read]
        # What is in memory already, the other ranks take from there.
        what = replace(read, shares=None) if copy.in_memory else read
        damaged = self._deliver(what, data, in_place=sink is not None)
        self._count(copy.tier, read.end - read.start - sum(error.end - error.start for error in damaged))
        for error in damaged:
            logger.warning(
                "%s: bytes [%d, %d) are damaged in tier %s; taking them from the next",
                self.key(read.blob.path), error.start, error.end, copy.tier,
            )  # fmt: skip
        if damaged:
            counters.add(f"ckpt.restore.{copy.tier}.bad_blocks", len(damaged))
            with self._lock:
                self.num_healed += len(damaged)
        return [replace(read, start=error.start, end=error.end) for error in damaged]

    def _count(self, tier: str, num_bytes: int) -> None:
        counters.add(f"ckpt.restore.{tier}.bytes", num_bytes)
        with self._lock:
            self.bytes_from[tier] = self.bytes_from.get(tier, 0) + num_bytes

    def _deliver(self, read: _Read, data: NDArray[np.uint8], *, in_place: bool = False) -> list[CorruptBlock]:
        """Check and copy block by block, while the processor's cache holds the block; returns what is bad.

        `in_place`: `data` is the only sink. What is bad there, the next copy replaces, or the restore fails.
        """
        found = []
        for start in range(read.start, read.end, CRC_BLOCK_BYTES):
            damaged = self._damage(read, data, start)
            if damaged is not None:
                found.append(damaged)
                continue
            stop = min(start + CRC_BLOCK_BYTES, read.end)
            if read.shares is not None:
                read.shares.offer(read.number(start), data[start - read.start : stop - read.start])
            for span in () if in_place else read.spans_of_block.get(start // CRC_BLOCK_BYTES, ()):
                first, last = max(span.start, start), min(span.end, stop)
                # numpy lets other threads run while it copies; assigning to a memoryview does not.
                np.copyto(
                    span.sink[first - span.start : last - span.start], data[first - read.start : last - read.start]
                )
        return found

    def _buffer(self) -> memoryview:
        """This thread's."""
        buffer: memoryview | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = _posix.aligned_buffer(_READ_BYTES)
        return buffer

    def _fetch(self, read: _Read) -> NDArray[np.uint8]:
        part = self._buffer()[: read.end - read.start]
        self._store.get_into(self.key(read.blob.path), part, read.start)
        return np.frombuffer(part, np.uint8)

    def _damage(self, read: _Read, data: NDArray[np.uint8], start: int) -> CorruptBlock | None:
        """What is wrong with the CRC block at `start` of a read, if anything."""
        end = min(start + CRC_BLOCK_BYTES, read.end)
        got = crc32c(data[start - read.start : end - read.start].data)
        expected = int(read.blob.crcs[start // CRC_BLOCK_BYTES])
        if got == expected:
            return None
        return CorruptBlock(self._store.place(self.key(read.blob.path)), start, end, expected, got)

    def _all_damage(self, read: _Read) -> list[CorruptBlock]:
        data = self._fetch(read)
        found = (self._damage(read, data, start) for start in range(read.start, read.end, CRC_BLOCK_BYTES))
        return [damaged for damaged in found if damaged is not None]


def _coalesce(blob: BlobInfo, spans: Sequence[Span], *, whole: bool = False) -> list[_Read]:
    """Whole CRC blocks that cover `spans`, each once, joined to reads of at most 8 MiB."""
    blocks_per_read = _READ_BYTES // CRC_BLOCK_BYTES
    num_blocks = -(-blob.size_bytes // CRC_BLOCK_BYTES)
    serving: defaultdict[int, list[Span]] = defaultdict(list)
    needed = np.zeros(num_blocks, bool)
    if whole:
        needed[:] = True
    for span in spans:
        if span.end > span.start:
            first, last = span.start // CRC_BLOCK_BYTES, -(-span.end // CRC_BLOCK_BYTES)
            needed[first:last] = True
            for block in range(first, last):
                serving[block].append(span)
    reads = []
    for group in range(-(-num_blocks // blocks_per_read)):
        base = group * blocks_per_read
        wanted = np.flatnonzero(needed[base : base + blocks_per_read])
        # Runs of neighbouring blocks; a gap is not read.
        for run in np.split(wanted, np.flatnonzero(np.diff(wanted) > 1) + 1) if len(wanted) else []:
            start = (base + int(run[0])) * CRC_BLOCK_BYTES
            end = min((base + int(run[-1]) + 1) * CRC_BLOCK_BYTES, blob.size_bytes)
            reads.append(_Read(blob=blob, start=start, end=end, spans_of_block=serving))
    return reads


class _Taken:
    """What other ranks of the node read of one blob, as a copy that is nearer than the root."""

    tier = "node"
    read_bytes = CRC_BLOCK_BYTES
    in_memory = True

    def __init__(self, shares: "Shares", first_block: int) -> None:
        self._shares, self._first_block = shares, first_block

    def fetch(self, path: str, start: int, buffer: memoryview) -> bool:
        return self._shares.take(self._first_block + start // CRC_BLOCK_BYTES, buffer)

    def document(self, path: str) -> bytes | None:
        return None

    def close(self) -> None:
        pass


def _number_blocks(blobs: Iterable[BlobInfo]) -> tuple[dict[str, int], NDArray[np.int64]]:
    """The number of the first block of each blob, by path, and for each block the number of the 8 MiB that it lies in."""
    first_blocks: dict[str, int] = {}
    groups = [np.zeros(0, np.int64)]
    num_blocks = num_groups = 0
    for blob in blobs:
        first_blocks[blob.path] = num_blocks
        of_blob = np.arange(-(-blob.size_bytes // CRC_BLOCK_BYTES)) // (_READ_BYTES // CRC_BLOCK_BYTES)
        groups.append(of_blob + num_groups)
        num_blocks += len(of_blob)
        num_groups += 1 + int(of_blob[-1]) if len(of_blob) else 0
    return first_blocks, np.concatenate(groups)


def _by_owner(read: _Read, shares: "Shares") -> list[_Read]:
    """Cut where another rank's blocks begin or end."""
    owner = shares.owner[read.number(read.start) : read.number(read.end)]
    mine = np.where(owner == shares.me, -1, owner)
    cuts = [read.start + int(at) * CRC_BLOCK_BYTES for at in np.flatnonzero(np.diff(mine)) + 1]
    return [replace(read, start=start, end=end) for start, end in itertools.pairwise([read.start, *cuts, read.end])]


def _only_sink(read: _Read) -> NDArray[np.uint8] | None:
    """Where all of a read goes, if that is one run of memory: then it needs no buffer."""
    spans = read.spans_of_block.get(read.start // CRC_BLOCK_BYTES, ())
    if read.end - read.start > CRC_BLOCK_BYTES or len(spans) != 1:
        return None
    (span,) = spans
    if span.start > read.start or read.end > span.end:
        return None
    return span.sink[read.start - span.start : read.end - span.start]


def resolve_step(log: CheckpointLog, step: int | None, url: str) -> tuple[int, LiveStep, int]:
    """(step, its live entry, newest step); raises NoCheckpoint."""
    head = log.head()
    steps = [] if head is None else sorted(head.live)
    if head is None or not steps:
        raise NoCheckpoint("needs a committed step", place=url, hint="nothing was saved here, or no save was committed")
    found = steps[-1] if step is None else step
    if found not in head.live:
        shown = ", ".join(map(str, steps[-10:]))
        raise NoCheckpoint("the step must be committed", value=found, place=url, hint=f"committed steps: {shown}")
    return found, head.live[found], steps[-1]


def read_manifest(store: ObjectStore, directory: str, live: LiveStep) -> Manifest:
    """The manifest of a live step, checked against the log's digest."""
    key = f"{directory}/manifest.arrow"
    return Manifest.from_bytes(store.get(key), place=store.place(key), sha256=live.manifest_sha256)
