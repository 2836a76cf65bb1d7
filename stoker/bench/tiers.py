"""How fast is each place that bytes come from, and how much of it does stoker hand on?

Command: ``stoker bench tiers [--size 256MB] [--runs 3] [--dir DIR] [--url URL -o NAME=VALUE …] [--json]``.

The same random bytes, in blocks of 4 MiB, pass through memory, shared memory, a disk, an object store and the block cache
above them. Every number is 10^9 bytes/s.

``copy in memory, crc32c, shared memory, disk …``
    what the machine gives, bare: the ceilings of what follows.
``ranged GET``
    one block a request, each checked. Limit: ``obstore.get_range`` and crc32c in threads.
``upload``
    a quarter of the bytes, but 128 MiB at least, in objects of 16 MiB. Limit: ``obstore.put`` of each in one request.
``RAM tier, disk tier``
    ``TieredCache.get`` of blocks that are there: opened for the first time (and so checked), or kept mapped (limit and
    stoker both read every byte once more). Limits: open, mmap and crc32c of bare files; O_DIRECT reads.
``S3 into the RAM tier, the disk tier``
    ``TieredCache.get`` of blocks that no tier has. Limit: ``get_range``, crc32c and one plain write to the same file
    system.

How many requests at once serve a network row best, of 1, 2, 4, 8, 16 and 32, is found for each variant alone, on a part
of the bytes, before its runs; its note says what it was. Without ``--url`` the store is a SeaweedFS on this machine: the
same processor serves and asks, so those rows compare, and say little about a network.

Every byte is checked: by the checksum of its block, in the run or right after it. A row is cold only if no page of its
file was in memory; what a store keeps in its own caches is not known, so rows of the network are called warm. Not
measured here: data sets, several processes, forked workers, hedging.
"""

import logging
import mmap
import os
import shutil
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from ..errors import ConfigError, CorruptionError, MissingExtra, StokerError, StoreError, StoreFull, UnsupportedError
from ..storage import Block, CacheStats, ObjectStore, TieredCache, open_store
from ..storage._checksums import crc32c
from ..storage._posix import aligned_buffer, pread_into, pwrite_all, shared_memory_directory
from ..storage._units import format_bytes
from .frame import Cache, Case, Kind, Outcome, Question, Report, Sample, Scalar, Variant, drop_page_cache, measure

__all__ = ["run_tiers"]

COPY, CRC = "copy in memory", "crc32c, one core"
SHM_WRITE, SHM_READ = "shared memory, write", "shared memory, map and read"
DISK_WARM, DISK_READ, DISK_WRITE = "disk, buffered read", "disk, O_DIRECT read", "disk, O_DIRECT write + fsync"
GET, UPLOAD = "ranged GET", "upload"
RAM_FIRST, RAM_KEPT, DISK_TIER = "RAM tier, first opened", "RAM tier, kept mapped", "disk tier"
INTO_RAM, INTO_DISK = "S3 into the RAM tier", "S3 into the disk tier"

_MIB = 1 << 20
BLOCK_BYTES = 4 * _MIB
_BLOCKS_PER_OBJECT = 16
_UPLOAD_BYTES = 16 * _MIB
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
_DISK_THREADS = 4
_DISK_BYTES = 8 * _MIB
"""For the disk's rows: the knee of threads x size on the disk that this was written on."""
_SWEEP_BYTES = 128 * _MIB
"""Of which the concurrency is chosen: one block for each of 32 threads."""
_LEAST_BYTES = 2 * BLOCK_BYTES
_STOP_S = 5.0
"""After Ctrl-C, as long as one block may take to arrive; a thread that takes longer ends with the process."""

T = TypeVar("T")

logger = logging.getLogger(__name__)


def run_tiers(
    *,
    size_bytes: int,
    runs: int,
    directory: str | Path,
    url: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    warmup: int = 1,
    progress: Callable[[], None] | None = None,
) -> Report:
    """Measure every tier with `size_bytes` of random bytes, rounded down to whole blocks of 4 MiB.

    Needs three times that much memory, shared memory and disk below `directory`, and twice as much in the store. All
    that it wrote is removed at the end, in the store too, also after an error or Ctrl-C.

    Args:
        url: an S3 URL to write below; None for a SeaweedFS of its own.
        storage_options: as :func:`~stoker.storage.open_store` takes them: ``key, secret, token, endpoint_url, region,
            anon``.

    Raises:
        ConfigError: fewer than two blocks, or an option that the bare client does not have.
        CorruptionError: wrong bytes from a limit or from stoker.
        StoreError: the store refused.
        StoreFull: not enough space below `directory`.
        UnsupportedError: a URL of another kind.
    """
    _check_room(size_bytes, Path(directory))
    content = _Content(size_bytes)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiers-", dir=directory)))
        ask = partial(_ask, content, runs=runs, warmup=warmup, directory=work, progress=progress)
        # Asked first, since a wrong key should be told now and not in half a minute.
        bucket, no_network = stack.enter_context(_bucket(content, url, storage_options or {}))
        shm, no_shm = stack.enter_context(_shared_memory(content))
        no_disk = _no_o_direct(work)
        report = ask([_rate(COPY, "warm", "process memory"), _rate(CRC, "warm", "process memory")], _memory(content))
        if shm is not None:
            cases = [_rate(SHM_WRITE, "not applicable", "process memory"), _rate(SHM_READ, "warm", "shared memory")]
            report += ask(cases, _bare_shared_memory(content, shm))
        if not no_disk:
            cases = [
                _rate(DISK_WARM, "warm", "page cache"),
                _rate(DISK_READ, "cold", "local disk"),
                _rate(DISK_WRITE, "not applicable", "process memory"),
            ]
            report += ask(cases, _bare_disk(content, work))
        if bucket is not None:
            report += ask([_rate(GET, "warm", "object store", goal=0.95)], bucket.readers())
            upload_bytes = _upload_bytes(content)
            cases = [_rate(UPLOAD, "not applicable", "process memory", goal=0.85, size_bytes=upload_bytes)]
            report += ask(cases, bucket.uploaders(upload_bytes))
        with open_store(work / "origin") as origin:
            content.put_objects(origin)
            if shm is not None:
                cases = [
                    _rate(RAM_FIRST, "warm", "RAM tier", goal=0.9),
                    _rate(RAM_KEPT, "warm", "RAM tier", goal=0.95),
                ]
                report += ask(cases, _ram_tier(content, origin, shm))
            if not no_disk:
                report += ask([_rate(DISK_TIER, "cold", "disk tier", goal=0.9)], _disk_tier(content, origin, work))
            if bucket is not None:
                if shm is not None:
                    cases = [_rate(INTO_RAM, "warm", "object store", goal=0.9)]
                    report += ask(cases, _through(bucket, "RAM", shm))
                if not no_disk:
                    report += ask([_rate(INTO_DISK, "warm", "object store")], _through(bucket, "disk", work))
    return report + Report(machine={}, rows=(), notes=tuple(note for note in (no_shm, no_disk, no_network) if note))


def _check_room(size_bytes: int, directory: Path) -> None:
    if size_bytes < _LEAST_BYTES:
        raise ConfigError(f"size must be >= {_LEAST_BYTES} bytes, two blocks", value=size_bytes, place="--size")
    free = shutil.disk_usage(directory).free
    if free < 3 * size_bytes:
        raise StoreFull(f"{format_bytes(3 * size_bytes)} must be free", value=format_bytes(free), place=str(directory))


def _rate(name: str, cache: Cache, origin: str, *, goal: float | None = None, size_bytes: int = 0) -> Case:
    return Case(name=name, unit="GB/s", goal_ratio=goal, cache=cache, origin=origin, bytes=size_bytes)


def _ask(
    content: "_Content",
    cases: Sequence[Case],
    variants: Sequence[Variant],
    *,
    runs: int,
    warmup: int,
    directory: Path,
    progress: Callable[[], None] | None,
) -> Report:
    cases = [Case(**{**vars(case), "bytes": case.bytes or len(content.memory)}) for case in cases]
    params: dict[str, Scalar] = {"size_bytes": len(content.memory), "block_bytes": BLOCK_BYTES}
    question = Question(bench="tiers", cases=cases, params=params)
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


# ------------------------------------------------------------------------------------------------------- bytes, threads


@dataclass(frozen=True, slots=True)
class _Piece:
    """One block: its number, where it stands in the whole and in its object, and its checksum."""

    number: int
    key: str
    start: int
    end: int
    crc: int

    @property
    def at(self) -> int:
        return self.number * BLOCK_BYTES

    @property
    def block(self) -> Block:
        return Block(key=self.key, version="bench", start=self.start, end=self.end, crc32c=self.crc)

    def require(self, data: Any, place: str) -> None:
        """Raise CorruptionError unless `data` is this block."""
        if len(data) != BLOCK_BYTES or crc32c(data) != self.crc:
            raise CorruptionError(f"block {self.number} must be the bytes that were written", place=place)


class _Content:
    """The bytes that every row moves: random, aligned, in blocks with their checksums."""

    def __init__(self, size_bytes: int) -> None:
        count = size_bytes // BLOCK_BYTES
        self.memory = aligned_buffer(count * BLOCK_BYTES)
        generator = np.random.default_rng()  # other bytes each time, lest a store that keeps old ones looks right
        self.pieces: list[_Piece] = []
        for number in range(count):
            at = number * BLOCK_BYTES
            self.memory[at : at + BLOCK_BYTES] = generator.bytes(BLOCK_BYTES)
            start = number % _BLOCKS_PER_OBJECT * BLOCK_BYTES
            key = f"read/{number // _BLOCKS_PER_OBJECT:05d}"
            self.pieces.append(_Piece(number, key, start, start + BLOCK_BYTES, crc32c(self.of(at, BLOCK_BYTES))))

    def of(self, start: int, length: int) -> memoryview:
        return self.memory[start : start + length]

    def put_objects(self, store: ObjectStore) -> None:
        """Store the objects that hold the blocks."""
        step = _BLOCKS_PER_OBJECT * BLOCK_BYTES
        for at in range(0, len(self.memory), step):
            store.put(self.pieces[at // BLOCK_BYTES].key, self.of(at, min(step, len(self.memory) - at)))

    def require(self, found: memoryview, place: str) -> None:
        """Raise CorruptionError unless `found` holds all blocks."""
        for piece in self.pieces:
            piece.require(found[piece.at : piece.at + BLOCK_BYTES], place)

    def rate(
        self, seconds: float, *, cache: Cache | None = None, origin: str | None = None, size_bytes: int = 0
    ) -> Sample:
        """All bytes, or so many, in `seconds`, after they were compared."""
        value = (size_bytes or len(self.memory)) / seconds / 1e9
        return Sample(value=value, verified=True, cache=cache, origin=origin)


def _timed(act: Callable[[], object]) -> float:
    started = perf_counter()
    act()
    return perf_counter() - started


def _each(items: Sequence[T], threads: int, act: Callable[[T], object]) -> float:
    """Seconds that `act` takes for all `items` in so many threads. A first failure ends all, and is raised."""
    left, failures = deque(items), list[BaseException]()

    def work() -> None:
        while left and not failures:
            with suppress(IndexError):  # another thread took the last one
                item = left.popleft()
                try:
                    act(item)
                except BaseException as error:  # noqa: BLE001 - raised below, in the caller's thread
                    failures.append(error)

    # Daemons, since on Ctrl-C a client may go on asking a server that has heard it too.
    workers = [threading.Thread(target=work, name="stoker-bench", daemon=True) for _ in range(threads)]
    started = perf_counter()
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    except BaseException as error:
        failures.append(error)
        stop_at = perf_counter() + _STOP_S
        for worker in workers:
            if worker.ident is not None:
                worker.join(max(0.0, stop_at - perf_counter()))
        raise
    seconds = perf_counter() - started
    if failures:
        raise failures[0]
    return seconds


# ----------------------------------------------------------------------------------------------- memory, files: ceilings


def _memory(content: _Content) -> Sequence[Variant]:
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
        seconds = _timed(lambda: content.require(content.memory, CRC))
        return {CRC: content.rate(seconds)}

    return [
        Variant(name="memcpy", kind="limit", run=copy),
        Variant(name="crc32c of each block", kind="limit", run=check),
    ]


class _Files:
    """One plain file for each block, in shared memory or on a disk."""

    def __init__(self, content: _Content, directory: Path) -> None:
        self._content, self.directory = content, directory

    def path(self, piece: _Piece) -> Path:
        return self.directory / f"{piece.number:06d}"

    def make(self) -> None:
        self.directory.mkdir(parents=True)

    def fill(self) -> float:
        def all_blocks() -> None:
            for piece in self._content.pieces:
                self.write(piece, self._content.of(piece.at, BLOCK_BYTES))

        return _timed(all_blocks)

    def write(self, piece: _Piece, data: Any) -> None:
        fd = os.open(self.path(piece), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            pwrite_all(fd, data, 0)
        finally:
            os.close(fd)

    def map(self, piece: _Piece) -> mmap.mmap:
        fd = os.open(self.path(piece), os.O_RDONLY | os.O_CLOEXEC)
        try:
            return mmap.mmap(fd, BLOCK_BYTES, access=mmap.ACCESS_READ)
        finally:
            os.close(fd)

    def read(self) -> float:
        def all_blocks() -> None:
            for piece in self._content.pieces:
                with self.map(piece) as pages:
                    piece.require(pages, str(self.directory))

        return _timed(all_blocks)

    def clear(self) -> None:
        for piece in self._content.pieces:
            self.path(piece).unlink(missing_ok=True)

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)


def _bare_shared_memory(content: _Content, shm: Path) -> Sequence[Variant]:
    files = _Files(content, shm / "bare")

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


class _DiskFile:
    """All blocks in one file, written and read in several threads, around the page cache or through it."""

    def __init__(self, content: _Content, path: Path) -> None:
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
            pwrite_all(fd, memory[at : at + _DISK_BYTES], at)

        with self._open(os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT) as fd:
            os.posix_fallocate(fd, 0, len(memory))
            seconds = self._blocks(partial(block, fd))
            return seconds + _timed(lambda: os.fsync(fd))

    def read(self, *, direct: bool) -> tuple[float, Cache]:
        """Seconds, and what the page cache held of the file when they began."""
        target, left = self._target, 0
        if direct:
            left = drop_page_cache(self._path)

        def block(fd: int, at: int) -> None:
            pread_into(fd, target[at : at + _DISK_BYTES], at)

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
        return _each(range(0, len(self._content.memory), _DISK_BYTES), _DISK_THREADS, act)

    @contextmanager
    def _open(self, flags: int) -> Iterator[int]:
        fd = os.open(self._path, flags | os.O_CLOEXEC, 0o600)
        try:
            yield fd
        finally:
            os.close(fd)


def _no_o_direct(directory: Path) -> str:
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


def _bare_disk(content: _Content, directory: Path) -> Sequence[Variant]:
    file = _DiskFile(content, directory / "bare")

    def run() -> Outcome:
        write_s = file.write()
        read_s, cache = file.read(direct=True)  # which also compares what was written
        warm_s, _ = file.read(direct=False)
        return {
            DISK_WRITE: content.rate(write_s),
            DISK_READ: content.rate(read_s, cache=cache),
            DISK_WARM: content.rate(warm_s),
        }

    params: dict[str, Scalar] = {"io_threads": _DISK_THREADS, "io_bytes": _DISK_BYTES}
    return [Variant(name="bare file", kind="limit", run=run, setup=file.make, teardown=file.remove, params=params)]


@contextmanager
def _shared_memory(content: _Content) -> Iterator[tuple[Path | None, str]]:
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


# ------------------------------------------------------------------------------------------------------------- network


class _Swept:
    """A variant that runs with as many threads as serve it best.

    Args:
        pieces: what to move, `size_bytes` in all.
        go: moves these pieces in so many threads, and returns the seconds.
        check: compares what the last `go` of all pieces left behind, and clears it away.
    """

    def __init__(
        self,
        content: _Content,
        pieces: Sequence[T],
        go: Callable[[Sequence[T], int], float],
        check: Callable[[], str | None] = lambda: None,
        *,
        before: Callable[[], None] = lambda: None,
        size_bytes: int = 0,
    ) -> None:
        self._content, self._pieces, self._go, self._check, self._before = content, pieces, go, check, before
        self._size_bytes = size_bytes or len(content.memory)
        self.params: dict[str, Scalar] = {}
        self.notes: list[str] = []

    def setup(self) -> None:
        self._before()
        sample = self._pieces[: max(1, _SWEEP_BYTES * len(self._pieces) // self._size_bytes)]
        choices = [threads for threads in CONCURRENCIES if threads <= len(sample)]
        seconds: dict[int, float] = {}
        for threads in (choices[-1], *choices):  # the first time of all pays for the connections, and is overwritten
            seconds[threads] = self._go(sample, threads)
            self._check()
        best = min(seconds, key=seconds.__getitem__)
        self.params["concurrency"] = best
        self.notes.append(f"{best} at once was the best of {', '.join(map(str, choices))}")

    def run(self) -> Outcome:
        threads = self.params["concurrency"]
        assert isinstance(threads, int)
        seconds = self._go(self._pieces, threads)
        return self._content.rate(seconds, origin=self._check(), size_bytes=self._size_bytes)

    def variant(self, name: str, kind: Kind, *notes: str) -> Variant:
        self.notes.extend(notes)
        return Variant(name=name, kind=kind, run=self.run, setup=self.setup, params=self.params, notes=self.notes)


class _Bucket:
    """A random prefix in a store with the objects to read, as stoker, bare obstore and s3fs reach it."""

    def __init__(self, content: _Content, url: str, options: Mapping[str, Any]) -> None:
        self.content = content
        self._url = f"{url.rstrip('/')}/stoker-bench-{os.urandom(8).hex()}"
        self._options = dict(options)
        self._bare = _bare_client(self._url, self._options)
        self.store = open_store(self._url, **self._options)
        self._wrote = False

    def fill(self) -> None:
        self.store.put("begun", b"")  # small: a mistake in the URL or the keys is told at once
        self._wrote = True
        self.content.put_objects(self.store)

    def remove(self) -> None:
        if not self._wrote:
            return
        try:
            _each([info.key for info in self.store.list()], 8, self.store.delete)
        except StokerError as error:  # what ended the bench is what its user must read
            logger.warning("what stands below %s could not be removed: %s", self.store.url, error)

    def bare_get(self, piece: _Piece) -> memoryview:
        import obstore

        with _without_secrets(self.store.place(piece.key)):
            return memoryview(obstore.get_range(self._bare, piece.key, start=piece.start, end=piece.end))

    # -- reading

    def readers(self) -> Sequence[Variant]:
        content = self.content

        def bare_get(piece: _Piece) -> None:
            piece.require(self.bare_get(piece), "obstore get_range")

        def get(piece: _Piece) -> None:
            piece.require(self.store.get(piece.key, piece.start, piece.end), "stoker get")

        bare = _Swept(content, content.pieces, lambda pieces, threads: _each(pieces, threads, bare_get))
        ours = _Swept(content, content.pieces, lambda pieces, threads: _each(pieces, threads, get))
        return [
            bare.variant("obstore get_range + crc32c", "limit"),
            ours.variant("stoker get + crc32c", "stoker"),
            self._s3fs(),
        ]

    def _s3fs(self) -> Variant:
        content = self.content
        file_system: Any = None

        def connect() -> None:
            nonlocal file_system
            try:
                import s3fs
            except ImportError:
                raise MissingExtra("s3fs is not installed", hint="pip install 'stoker[bench]'") from None
            options = {name: value for name, value in self._options.items() if name not in ("region", "anon")}
            client = {"region_name": self._options["region"]} if self._options.get("region") else {}
            file_system = s3fs.S3FileSystem(
                **options,
                anon=str(self._options.get("anon")).lower() in ("true", "1"),
                client_kwargs=client,
                config_kwargs={"max_pool_connections": max(CONCURRENCIES)},  # its 10 would bind
                skip_instance_cache=True,
            )

        def go(pieces: Sequence[_Piece], threads: int) -> float:
            root = self._url.partition("://")[2]
            paths = [f"{root}/{piece.key}" for piece in pieces]
            starts, ends = [piece.start for piece in pieces], [piece.end for piece in pieces]
            started = perf_counter()
            blocks = file_system.cat_ranges(paths, starts, ends, batch_size=threads, on_error="raise")
            for piece, data in zip(pieces, blocks, strict=True):
                piece.require(data, "s3fs cat_ranges")
            return perf_counter() - started

        swept = _Swept(content, content.pieces, go, before=connect)
        return swept.variant("s3fs cat_ranges + crc32c", "peer")

    # -- writing

    def uploaders(self, size_bytes: int) -> Sequence[Variant]:
        import obstore

        content = self.content
        starts = range(0, size_bytes, _UPLOAD_BYTES)

        def bare_put(key: str, data: memoryview) -> None:
            with _without_secrets(self.store.place(key)):
                obstore.put(self._bare, key, data, use_multipart=False)

        def write(key: str, data: memoryview) -> None:
            with self.store.open_writer(key, len(data)) as writer:
                writer.write_at(0, data)
                writer.commit()

        def variant(name: str, kind: Kind, put: Callable[[str, memoryview], object], *notes: str) -> Variant:
            written: list[int] = []

            def go(starts: Sequence[int], threads: int) -> float:
                written[:] = starts
                return _each(
                    starts,
                    threads,
                    lambda at: put(f"write/{at:012d}", content.of(at, min(_UPLOAD_BYTES, size_bytes - at))),
                )

            def check() -> None:
                blocks = [p for p in content.pieces if p.at < size_bytes and p.at - p.at % _UPLOAD_BYTES in written]
                _each(blocks, 4, lambda piece: self._require_upload(piece, name))
                _each(written, 8, lambda at: self.store.delete(f"write/{at:012d}"))

            return _Swept(content, starts, go, check, size_bytes=size_bytes).variant(name, kind, *notes)

        return [
            variant("obstore put", "limit", bare_put, "one request for each object"),
            variant("stoker put", "stoker", self.store.put),
            variant("stoker open_writer", "stoker", write, "a multipart upload of each object"),
        ]

    def _require_upload(self, piece: _Piece, place: str) -> None:
        start = piece.at % _UPLOAD_BYTES
        key = f"write/{piece.at - start:012d}"
        piece.require(self.bare_get(_Piece(piece.number, key, start, start + BLOCK_BYTES, piece.crc)), place)


def _upload_bytes(content: _Content) -> int:
    """A quarter, since stores are slow to write; eight objects at least, or what there is."""
    whole = len(content.memory)
    return min(whole, max(whole // 4 - whole // 4 % _UPLOAD_BYTES, 8 * _UPLOAD_BYTES))


_OBSTORE_NAMES = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
    "anon": "skip_signature",
}


def _bare_client(url: str, options: Mapping[str, Any]) -> Any:
    """What the limit uses: obstore with nothing of stoker's around it. Reads the ``AWS_*`` variables by itself."""
    try:
        from obstore.store import S3Store
    except ImportError:
        raise MissingExtra("obstore is not installed", hint="pip install obstore") from None
    unknown = sorted(options.keys() - _OBSTORE_NAMES.keys())
    if unknown:
        hint = f"there are {', '.join(sorted(_OBSTORE_NAMES))}"
        raise ConfigError("no such option in this bench", value=unknown[0], place="--option", hint=hint)
    config = {_OBSTORE_NAMES[name]: value for name, value in options.items() if value is not None}
    endpoint = (
        options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    if endpoint:
        config["endpoint"] = endpoint
    parts = urlsplit(url)
    with _without_secrets(f"s3://{parts.netloc}"):
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/"),
            config=config,  # type: ignore[arg-type]
            client_options={"allow_http": str(endpoint or "").startswith("http://")},
            retry_config={"max_retries": 3},
        )


@contextmanager
def _without_secrets(place: str) -> Iterator[None]:
    """Name the kind of the bare client's error only: its text may quote what it was made of."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever the client raises
        raise StoreError("the store must answer the bare client", value=type(error).__name__, place=place) from None


@contextmanager
def _bucket(content: _Content, url: str | None, options: Mapping[str, Any]) -> Iterator[tuple[_Bucket | None, str]]:
    """The store to measure, filled; or None, and the note that says why."""
    if url is None and options:
        raise ConfigError("options of a store need its URL", value=", ".join(sorted(options)), place="--option")
    with ExitStack() as stack:
        if url is None:
            from ..testing.s3 import S3Server

            server = S3Server()
            try:
                stack.enter_context(server)
            except MissingExtra as error:
                yield None, f"the network was not measured: {error}"
                return
            # Ends with its directory: nothing to delete, and after Ctrl-C it may not answer any more.
            bucket = _Bucket(content, server.url(), server.storage_options)
        else:
            if urlsplit(url).scheme not in ("s3", "s3a"):
                raise UnsupportedError("this bench measures S3 only", value=urlsplit(url).scheme, place="--url")
            bucket = _Bucket(content, url, options)
        stack.callback(bucket.store.close)
        if url is not None:
            stack.callback(bucket.remove)
        bucket.fill()
        yield bucket, ""


# --------------------------------------------------------------------------------------------------------------- cache


def _capacity(content: _Content) -> int:
    return len(content.pieces) * (BLOCK_BYTES + (64 << 10)) + _MIB  # headers, and room to spare


def _served(stats: CacheStats, tier: str, wanted: int) -> str:
    """Proof of what served a run: the tier that was meant to, or how many blocks it did."""
    hits = stats.ram_hits if tier == "RAM" else stats.disk_hits
    return f"{tier} tier" if hits == wanted else f"{tier} tier {hits} of {wanted} blocks, origin {stats.misses}"


def _ram_tier(content: _Content, origin: ObjectStore, shm: Path) -> Sequence[Variant]:
    files, tier = _Files(content, shm / "bare"), shm / "tier"
    blocks, maps = [piece.block for piece in content.pieces], list[mmap.mmap]()

    def open_cache() -> TieredCache:
        return TieredCache(ram=_capacity(content), ram_path=tier)

    def make_bare() -> None:
        files.make()
        files.fill()
        maps.extend(files.map(piece) for piece in content.pieces)

    def remove_bare() -> None:
        for pages in maps:
            pages.close()
        files.remove()

    def bare() -> Outcome:
        def kept_blocks() -> None:
            for piece, pages in zip(content.pieces, maps, strict=True):
                piece.require(pages, "kept mappings")

        return {RAM_FIRST: content.rate(files.read()), RAM_KEPT: content.rate(_timed(kept_blocks))}

    def fill() -> None:
        with open_cache() as cache:
            for piece in content.pieces:
                piece.require(cache.get(origin, piece.block), "RAM tier")

    def ours() -> Outcome:
        def first_opened() -> None:
            for block in blocks:
                cache.get(origin, block)  # let go at once, as the limit closes its map

        def kept_mapped() -> None:
            for piece, block in zip(content.pieces, blocks, strict=True):
                piece.require(cache.get(origin, block), RAM_KEPT)

        with open_cache() as cache:
            first_s = _timed(first_opened)
            first = cache.stats()
            kept = [cache.get(origin, block) for block in blocks]
            for piece, view in zip(content.pieces, kept, strict=True):  # the page faults of the new maps
                piece.require(view, RAM_KEPT)
            before = cache.stats().ram_hits
            kept_s = _timed(kept_mapped)
            then = cache.stats()
            del kept
        then = then._replace(ram_hits=then.ram_hits - before)
        return {
            RAM_FIRST: content.rate(first_s, origin=_served(first, "RAM", len(blocks))),
            RAM_KEPT: content.rate(kept_s, origin=_served(then, "RAM", len(blocks))),
        }

    return [
        Variant(
            name="open + mmap + crc32c",
            kind="limit",
            run=bare,
            setup=make_bare,
            teardown=remove_bare,
            notes=("page faults included; the kept mappings have had theirs",),
        ),
        Variant(
            name="stoker TieredCache, RAM",
            kind="stoker",
            run=ours,
            setup=fill,
            teardown=lambda: shutil.rmtree(tier, ignore_errors=True),
            notes=("each run opens the cache anew, so that every block is opened and checked again",),
        ),
    ]


def _disk_tier(content: _Content, origin: ObjectStore, directory: Path) -> Sequence[Variant]:
    file, tier = _DiskFile(content, directory / "bare"), directory / "tier"

    def open_cache() -> TieredCache:
        return TieredCache(ram=0, disk=tier, disk_capacity=_capacity(content))

    def bare() -> Outcome:
        seconds, cache = file.read(direct=True)
        return content.rate(seconds, cache=cache)

    def fill() -> None:
        with open_cache() as cache:
            for piece in content.pieces:
                piece.require(cache.get(origin, piece.block), DISK_TIER)

    def ours() -> Outcome:
        left = drop_page_cache(tier / "blocks")
        with open_cache() as cache:
            seconds = _each(content.pieces, _DISK_THREADS, lambda piece: cache.get(origin, piece.block))
            served = _served(cache.stats(), "disk", len(content.pieces))
            for piece in content.pieces:
                piece.require(cache.get(origin, piece.block), DISK_TIER)
        return content.rate(seconds, cache="cold" if left == 0 else "warm", origin=served)

    return [
        Variant(
            name="O_DIRECT read, no checks",
            kind="limit",
            run=bare,
            setup=file.make,
            teardown=file.remove,
            params={"io_threads": _DISK_THREADS, "io_bytes": _DISK_BYTES},
        ),
        Variant(
            name="stoker TieredCache, disk",
            kind="stoker",
            run=ours,
            setup=fill,
            teardown=lambda: shutil.rmtree(tier, ignore_errors=True),
            params={"io_threads": _DISK_THREADS},
        ),
    ]


def _through(bucket: _Bucket, kind: str, directory: Path) -> Sequence[Variant]:
    """Blocks that are nowhere yet, fetched into shared memory or onto the disk."""
    content = bucket.content
    files, tier = _Files(content, directory / "plain"), directory / "empty"
    last: list[TieredCache] = []

    def plain(pieces: Sequence[_Piece], threads: int) -> float:
        def fetch(piece: _Piece) -> None:
            data = bucket.bare_get(piece)
            piece.require(data, "get_range + crc32c + write")
            files.write(piece, data)

        files.make()
        return _each(pieces, threads, fetch)

    def forget_plain() -> None:
        for path in files.directory.iterdir():
            piece = content.pieces[int(path.name)]
            with files.map(piece) as pages:
                piece.require(pages, str(path))
        files.remove()

    def cached(pieces: Sequence[_Piece], threads: int) -> float:
        room = _capacity(content)
        cache = (
            TieredCache(ram=room, ram_path=tier) if kind == "RAM" else TieredCache(ram=0, disk=tier, disk_capacity=room)
        )
        last.append(cache)
        return _each(pieces, threads, lambda piece: cache.get(bucket.store, piece.block))

    def forget_cached() -> str:
        with last.pop() as cache:
            stats = cache.stats()
            for piece in content.pieces[: stats.misses]:
                piece.require(cache.get(bucket.store, piece.block), "TieredCache")
        shutil.rmtree(tier)
        passed = f", {stats.pass_through} blocks not kept" if stats.pass_through else ""
        return f"object store, kept in the {kind} tier{passed}"

    def close() -> None:
        for cache in last:
            cache.close()
        shutil.rmtree(tier, ignore_errors=True)

    bare = _Swept(content, content.pieces, plain, forget_plain)
    ours = _Swept(content, content.pieces, cached, forget_cached)
    durable = (
        ("each block is synced to the disk before it gets its name; the limit's is not",) if kind == "disk" else ()
    )
    limit = bare.variant(f"get_range + crc32c + write to {kind}", "limit")
    stoker = ours.variant(f"stoker TieredCache, S3 into {kind}", "stoker", *durable)
    return [
        Variant(**{**vars(limit), "teardown": files.remove}),
        Variant(**{**vars(stoker), "teardown": close}),
    ]
