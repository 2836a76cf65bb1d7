"""The block cache of a node: RAM tier, disk tier, origin; shared by all processes, without a daemon.

The unit is the immutable :class:`Block`. A block is fetched once for all threads and processes, checked against the
checksum that its data set carries, kept in the first tier that has room and handed out as a view of the cached file.
Once the tiers are full, what is there stays and newcomers pass through: in scans that read every block once an epoch,
recency says nothing, and evicting by it drops to 0 % hits where keeping any fixed half gets 50 %. For other traffic there
is SIEVE.
"""

import atexit
import hashlib
import logging
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Literal, NamedTuple, Self, get_args

from ..errors import AccessDenied, ConfigError, CorruptBlock, StokerError, UnknownVersion, UnsupportedError
from ..metrics import counters
from ._checksums import crc32c
from ._posix import shared_memory_directory
from ._units import parse_bytes
from .eviction import Sieve
from .store import ObjectStore
from .tiers import BlockFile, Tier, warn_once

__all__ = ["Block", "CacheStats", "TieredCache"]

logger = logging.getLogger(__name__)

Eviction = Literal["keep", "sieve"]

_DEFAULT_RAM_BYTES = 8 * 2**30
_PREFETCH_BYTES = 256 * 2**20
_PREFETCH_THREADS = 8  # a guess: enough to overlap round trips to a store, few enough for two cores
_FLIGHT_TIMEOUT_S = 5.0  # I6: a process that was stopped while it fetches holds up the others no longer
_FREE_SHARE = 0.8  # of what is free, the most a tier takes: tmpfs pages count against the job's own memory limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One immutable byte range of an object, and what its bytes must be.

    Attributes:
        key: the object, below its store's root.
        version: what tells this content from another under the same key: a store's version or a manifest's digest.
            It names the block; the store is not asked for it.
        start, end: byte range, end exclusive.
        crc32c: CRC32C of the bytes, from a manifest, never from beside the block.
    """

    key: str
    version: str
    start: int
    end: int
    crc32c: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ConfigError("a block needs 0 <= start < end", value=f"[{self.start}, {self.end})", place=self.key)
        if not 0 <= self.crc32c < 2**32:
            raise ConfigError("crc32c must be an unsigned 32-bit integer", value=self.crc32c, place=self.key)

    @property
    def size_bytes(self) -> int:
        """Length of the range."""
        return self.end - self.start


class CacheStats(NamedTuple):
    """What a :class:`TieredCache` has done in this process, and what its tiers hold on this node, at one moment."""

    ram_hits: int
    """Blocks that :meth:`TieredCache.get` returned from the RAM tier."""
    disk_hits: int
    """Blocks that it returned from the disk tier."""
    prefetch_hits: int
    """Blocks that it returned from a prefetch for which no tier had room."""
    misses: int
    """Blocks that came from their origin, for a get or a prefetch."""
    pass_through: int
    """Misses that no tier kept."""
    corrupt: int
    """Copies, of tiers or from origins, that differed from their checksum and were thrown away."""
    ram_hit_bytes: int
    """Bytes of the hits in the RAM tier."""
    disk_hit_bytes: int
    """Bytes of the hits in the disk tier."""
    fetched_bytes: int
    """Bytes of the misses."""
    ram_bytes: int
    """Bytes in the RAM tier, of all processes, headers and what is being written included."""
    ram_capacity_bytes: int
    """The limit in force; 0 without such a tier."""
    disk_bytes: int
    """Bytes in the disk tier, counted like `ram_bytes`."""
    disk_capacity_bytes: int
    """The limit in force; 0 without such a tier."""
    prefetch_bytes: int
    """Bytes of this process's prefetches that are under way, or held until their get for want of room in the tiers."""


class _Flight:
    """A block on its way: one thread fetches, the others wait."""

    __slots__ = ("admitted", "done", "error", "view", "waiters")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.view: memoryview | None = None
        self.error: BaseException | None = None
        self.admitted = False
        self.waiters = 0


class _Wanted(NamedTuple):
    """A prefetch in the queue; `order` counts them."""

    store: ObjectStore
    block: Block
    file: BlockFile
    order: int


# Guarantees: every public method may be called from any thread, and in a forked child (which has its own queue, and no
# threads until it prefetches). `_lock` guards everything below it in _reset(); it is never held during I/O on a tier or
# a store. Tiers look after themselves.
class TieredCache:
    """A cache of blocks in shared memory and on a local disk, one for each node, used by all its processes.

    Args:
        ram: limit of the RAM tier, as bytes or as text (``"8GiB"``); 0 for none. Default: a quarter of what is free in
            ``/dev/shm``, at most 8 GiB. Never more than 80 % of what is free there and under the cgroup's limit.
        disk: directory of the disk tier, on local storage, empty or made by stoker. Default: none.
        disk_capacity: limit of the disk tier. Default: 80 % of what is free there.
        near: URL of a cluster's shared cache. Not in this version.
        ram_path: directory of the RAM tier. Default: ``cache`` in ``/dev/shm/stoker-<uid>`` (``STOKER_SHM_DIR``).
        prefetch_bytes: most bytes that prefetches may have under way or hold for want of room.
        eviction: ``"keep"`` what is there, for epochs; ``"sieve"`` makes room for every newcomer, in all tiers, by
            removing what was not read of late, for traffic that reads some blocks again and most never. Blocks in
            use stay. Processes that share a cache should agree on it.

    Blocks outlive the process and the object: the next one finds them. The limits of the first process to open a
    directory bind it until the last has closed it; others that ask for different ones are told by a warning. The cache
    may cost time but never correctness: where a tier is full, read-only, missing or damaged, blocks pass through, with
    one warning and the counter ``cache.degraded``.

    :meth:`stats` speaks for this object; :data:`stoker.metrics.counters` sums up the process under ``cache.*``: hits,
    hit_bytes, admitted, reclaimed, corrupt and degraded of each tier, misses and pass_through.

    Pickling (to a worker started by spawn) takes the configuration along, and no state.

    Raises:
        ConfigError: a size that is none, or a disk directory in use for something else.
        AccessDenied: a disk directory that is a link, not ours or open to others.
        UnsupportedError: `near`.

    >>> import tempfile
    >>> from stoker.storage import Block, TieredCache, open_store
    >>> from stoker.storage._checksums import crc32c
    >>> with tempfile.TemporaryDirectory() as directory, open_store(f"{directory}/data") as store:
    ...     _ = store.put("shard", b"some tokens")
    ...     block = Block(key="shard", version="v1", start=5, end=11, crc32c=crc32c(b"tokens"))
    ...     with TieredCache(ram=0, disk=f"{directory}/cache", disk_capacity="1MiB") as cache:
    ...         bytes(cache.get(store, block)), bytes(cache.get(store, block)), cache.stats().disk_hits
    (b'tokens', b'tokens', 1)
    """

    def __init__(
        self,
        *,
        ram: int | str | None = None,
        disk: str | Path | None = None,
        disk_capacity: int | str | None = None,
        near: str | None = None,
        ram_path: str | Path | None = None,
        prefetch_bytes: int | str = _PREFETCH_BYTES,
        eviction: Eviction = "keep",
    ) -> None:
        if near is not None:
            raise UnsupportedError("near= is not in this version", place="TieredCache", hint="leave it out")
        if disk is None and disk_capacity is not None:
            raise ConfigError("disk_capacity needs disk", value=disk_capacity, place="TieredCache", hint="disk=PATH")
        if eviction not in get_args(Eviction):
            raise ConfigError("eviction must be 'keep' or 'sieve'", value=eviction, place="TieredCache")
        self._keeps = eviction == "keep"
        policy = None if self._keeps else Sieve
        self._config: dict[str, Any] = {
            "eviction": eviction,
            "ram": ram,
            "disk": disk,
            "disk_capacity": disk_capacity,
            "ram_path": ram_path,
            "prefetch_bytes": prefetch_bytes,
        }
        self._prefetch_limit = parse_bytes(prefetch_bytes, place="prefetch_bytes")
        ram_bytes = None if ram is None else parse_bytes(ram, place="ram")
        disk_bytes = None if disk_capacity is None else parse_bytes(disk_capacity, place="disk_capacity")
        self._closed = False
        self._reset()
        self._ram = None if ram_bytes == 0 else _ram_tier(ram_path, ram_bytes, policy)
        try:
            self._disk = None if disk is None else _disk_tier(Path(disk), disk_bytes, policy)
        except BaseException:
            if self._ram is not None:
                self._ram.close()
            raise
        _live.add(self)

    def _reset(self) -> None:
        self._lock = threading.Condition()
        self._flights: dict[str, _Flight] = {}
        self._queue: OrderedDict[str, _Wanted] = OrderedDict()
        self._held: dict[str, tuple[memoryview, int]] = {}
        self._failed: dict[str, BaseException] = {}
        self._prefetch_bytes = 0
        self._next_order = 0
        self._taken_order = -1
        self._threads: list[threading.Thread] = []
        self._counts: dict[str, int] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return (partial(TieredCache, **self._config), ())

    def __repr__(self) -> str:
        tiers = ", ".join(f"{tier.kind}={str(tier.path)!r}" for tier in self._tiers)
        return f"TieredCache({tiers})"

    @property
    def _tiers(self) -> list[Tier]:
        return [tier for tier in (self._ram, self._disk) if tier is not None]

    # -- reading

    def get(self, store: ObjectStore, block: Block) -> memoryview:
        """The bytes of `block`, checked, as a read-only view that is valid as long as it is referenced.

        The view is of the cached file, or of anonymous memory if no tier has room. Bytes from a tier are checked when
        this process first opens the file, bytes from the store before anything else is done with them.

        Raises:
            CorruptBlock: the object itself differs from the checksum (fetched twice).
            StokerError: what fetching raised, here or in a prefetch of this block.
        """
        file = _block_file(store, block)
        view = self._resident(file, block, count=True)
        if view is not None:
            return view
        with self._lock:
            self._require_open()
            if (wanted := self._queue.pop(file.name, None)) is not None:
                self._took(wanted.order)
            if (error := self._failed.pop(file.name, None)) is not None:
                raise error
            if (held := self._held.pop(file.name, None)) is not None:
                self._prefetch_bytes -= block.size_bytes
                self._took(held[1])
                self._count("prefetch_hits", 1)
                return held[0]
            flight = self._flights.get(file.name)
            if flight is None:
                flight = self._flights[file.name] = _Flight()
                mine = True
            else:
                flight.waiters += 1
                mine = False
        if mine:
            return self._fly(flight, _Wanted(store, block, file, -1), ahead=False)
        flight.done.wait()
        if flight.error is not None:
            raise flight.error
        assert flight.view is not None
        return flight.view

    def _resident(self, file: BlockFile, block: Block, *, count: bool) -> memoryview | None:
        for tier in self._tiers:
            view = tier.lookup(file, is_use=count)
            if view is not None:
                if count:
                    with self._lock:
                        self._count(f"{tier.kind}_hits", 1)
                        self._count(f"{tier.kind}_hit_bytes", block.size_bytes)
                    counters.add(f"cache.{tier.kind}.hits")
                    counters.add(f"cache.{tier.kind}.hit_bytes", block.size_bytes)
                return view
        return None

    def _fly(self, flight: _Flight, wanted: _Wanted, *, ahead: bool) -> memoryview:
        """Bring a block in for everyone who waits for it; `ahead` of its get, or for one."""
        store, block, file, _ = wanted
        try:
            # Between our first look and taking off, another thread may have landed with it.
            view = self._resident(file, block, count=False)
            if view is not None:
                flight.admitted = True
            else:
                view, flight.admitted = self._fill_once(store, block, file, count=not ahead)
            flight.view = view
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[file.name]
                if ahead:
                    self._landed_ahead(flight, wanted)
            flight.done.set()
        return view

    def _fill_once(self, store: ObjectStore, block: Block, file: BlockFile, *, count: bool) -> tuple[memoryview, bool]:
        """:meth:`_fill`, or what another process that was at it has put into a tier meanwhile."""
        if not self._tiers:
            return self._fill(store, block, file)
        first = self._tiers[0]
        mine = first.take_off(file)
        deadline, pause_s = monotonic() + _FLIGHT_TIMEOUT_S, 0.0005
        while mine is False:
            sleep(pause_s)
            pause_s = min(2 * pause_s, 0.005)
            mine = first.take_off(file)
            if (view := self._resident(file, block, count=count)) is not None:
                if mine:
                    first.land(file)
                return view, True
            if mine:
                # It brought nothing that a tier kept, and will not for us: nobody has to queue behind us as well.
                first.land(file)
                mine = None
            elif monotonic() > deadline:
                break
        try:
            # The one before us may have landed between our last look and taking off.
            if mine and (view := self._resident(file, block, count=count)) is not None:
                return view, True
            return self._fill(store, block, file)
        finally:
            if mine:
                first.land(file)

    def _fill(self, store: ObjectStore, block: Block, file: BlockFile) -> tuple[memoryview, bool]:
        """Fetch, check, keep. Returns the bytes and whether a tier holds them."""
        view = self._fetch(store, block)
        found: memoryview | None = None
        for tier in self._tiers:
            # What we return is read back from the tier, so that all processes share its pages.
            if tier.admit(file, view) and found is None:
                found = tier.lookup(file, is_use=False)
            # Where blocks are evicted from shared memory, they must be on disk by then.
            if found is not None and self._keeps:
                break
        if found is not None:
            return found, True
        with self._lock:
            self._count("pass_through", 1)
        counters.add("cache.pass_through")
        return view.toreadonly(), False

    def _fetch(self, store: ObjectStore, block: Block) -> memoryview:
        for attempts_left in (1, 0):
            view = store.get(block.key, block.start, block.end)
            with self._lock:
                self._count("misses", 1)
                self._count("fetched_bytes", block.size_bytes)
            counters.add("cache.misses")
            got = crc32c(view)
            if got == block.crc32c:
                return view
            # Once more: a bit may have flipped on the way. Twice the same means the object is damaged.
            counters.add("cache.corrupt")
            counters.add("cache.origin.corrupt")
            with self._lock:
                self._count("corrupt", 1)
            logger.warning(
                "%s bytes [%d, %d) differ from their checksum", store.place(block.key), block.start, block.end
            )
            if not attempts_left:
                raise CorruptBlock(store.place(block.key), block.start, block.end, block.crc32c, got)
        raise AssertionError("unreachable")

    # -- prefetching

    def prefetch(self, store: ObjectStore, blocks: Iterable[Block]) -> None:
        """Fetch `blocks` in the background, in this order, behind what was asked for before. Returns at once.

        At most `prefetch_bytes` are under way, or held for blocks that no tier has room for; those wait for their get,
        and are let go when the reader has gone past them. A failure is raised by the next get of that block.
        """
        with self._lock:
            self._require_open()
            for block in blocks:
                file = _block_file(store, block)
                known = (self._queue, self._held, self._flights, self._failed)
                if not any(file.name in names for names in known):
                    self._queue[file.name] = _Wanted(store, block, file, self._next_order)
                    self._next_order += 1
            missing = min(_PREFETCH_THREADS, len(self._queue)) - len(self._threads)
            for _ in range(missing):
                thread = threading.Thread(
                    target=self._prefetch_loop, name=f"stoker-prefetch-{len(self._threads)}", daemon=True
                )
                self._threads.append(thread)
                thread.start()
            self._lock.notify_all()

    def _prefetch_loop(self) -> None:
        while (taken := self._take()) is not None:
            wanted, flight = taken
            with suppress(BaseException):  # handed to whoever gets this block
                self._fly(flight, wanted, ahead=True)
            del taken, wanted, flight  # while we wait for more, hold no block

    def _landed_ahead(self, flight: _Flight, wanted: _Wanted) -> None:
        """Keep what a prefetch brought until its get, unless someone waits for it already."""
        name = wanted.file.name
        if flight.waiters:
            self._taken_order = max(self._taken_order, wanted.order)
        elif flight.error is not None:
            self._failed[name] = flight.error
        elif flight.view is not None and not flight.admitted and not self._closed:
            self._held[name] = (flight.view, wanted.order)
        if name not in self._held:
            self._prefetch_bytes -= wanted.block.size_bytes
        self._lock.notify_all()

    def _take(self) -> tuple[_Wanted, _Flight] | None:
        """The next block to fetch, as soon as the budget allows it; None when the cache is closed."""
        with self._lock:
            while not self._closed:
                if self._queue:
                    name, wanted = next(iter(self._queue.items()))
                    self._make_room(wanted.block.size_bytes)
                    free = self._prefetch_limit - self._prefetch_bytes
                    if wanted.block.size_bytes <= free or not self._prefetch_bytes:
                        del self._queue[name]
                        self._prefetch_bytes += wanted.block.size_bytes
                        flight = self._flights[name] = _Flight()
                        return wanted, flight
                self._lock.wait()
            return None

    def _make_room(self, size_bytes: int) -> None:
        """Let go of held blocks that the reader passed by: it has taken one that was asked for later."""
        while self._held and self._prefetch_bytes + size_bytes > self._prefetch_limit:
            name, (view, order) = min(self._held.items(), key=lambda item: item[1][1])  # they land in any order
            if order > self._taken_order:
                return
            del self._held[name]
            self._prefetch_bytes -= len(view)

    def _took(self, order: int) -> None:
        self._taken_order = max(self._taken_order, order)
        self._lock.notify_all()

    # -- the rest

    def stats(self) -> CacheStats:
        """A snapshot of counts and sizes."""
        ram, disk = self._ram, self._disk
        with self._lock:
            counts, prefetch_bytes = dict(self._counts), self._prefetch_bytes
        damaged = sum(tier.corrupt for tier in self._tiers)
        return CacheStats(
            ram_hits=counts.get("ram_hits", 0),
            disk_hits=counts.get("disk_hits", 0),
            prefetch_hits=counts.get("prefetch_hits", 0),
            misses=counts.get("misses", 0),
            pass_through=counts.get("pass_through", 0),
            corrupt=counts.get("corrupt", 0) + damaged,
            ram_hit_bytes=counts.get("ram_hit_bytes", 0),
            disk_hit_bytes=counts.get("disk_hit_bytes", 0),
            fetched_bytes=counts.get("fetched_bytes", 0),
            ram_bytes=ram.used_bytes if ram else 0,
            ram_capacity_bytes=ram.capacity_bytes if ram else 0,
            disk_bytes=disk.used_bytes if disk else 0,
            disk_capacity_bytes=disk.capacity_bytes if disk else 0,
            prefetch_bytes=prefetch_bytes,
        )

    def clear(self) -> int:
        """Remove every block from both tiers, for all processes, and return their bytes. Views stay valid."""
        return sum(tier.clear() for tier in self._tiers)

    def close(self) -> None:
        """Stop prefetching and leave the tiers; waits for requests under way. Views stay valid, blocks stay cached."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
            threads, self._threads = self._threads, []
            self._lock.notify_all()
        for thread in threads:
            thread.join()
        with self._lock:
            self._held.clear()
            self._failed.clear()
            self._prefetch_bytes = 0
        for tier in self._tiers:
            tier.close()
        _live.discard(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise ConfigError("the cache must not be closed", place=repr(self))

    def _count(self, name: str, amount: int) -> None:
        self._counts[name] = self._counts.get(name, 0) + amount


def _block_file(store: ObjectStore, block: Block) -> BlockFile:
    place = store.place(block.key)
    text = f"{place}\n{block.version}\n{block.start}-{block.end}\n{block.crc32c:08x}\n".encode()
    name = hashlib.blake2b(text, digest_size=16).hexdigest()
    return BlockFile(name, text, block.size_bytes, block.crc32c)


# --- where the tiers are ----------------------------------------------------------------------------------------------


_MISTAKES = (AccessDenied, ConfigError, UnknownVersion)
"""What is wrong about a directory that the user named; what fails otherwise only costs the tier."""


def _ram_tier(path: str | Path | None, asked_bytes: int | None, policy: type[Sieve] | None) -> Tier | None:
    """The RAM tier, or None with a warning: a job must run where shared memory is missing or someone else's."""

    def capacity(available_bytes: int) -> int:
        available_bytes = min(available_bytes, _free_cgroup_bytes())
        wanted = min(available_bytes // 4, _DEFAULT_RAM_BYTES) if asked_bytes is None else asked_bytes
        return min(wanted, int(available_bytes * _FREE_SHARE))

    try:
        directory = shared_memory_directory() / "cache" if path is None else Path(path)
        return Tier(directory, kind="ram", capacity=capacity, asked_bytes=asked_bytes, durable=False, policy=policy)
    except (OSError, StokerError) as error:
        if path is not None and isinstance(error, _MISTAKES):
            raise
        _without_tier("ram", error)
        return None


def _disk_tier(path: Path, asked_bytes: int | None, policy: type[Sieve] | None) -> Tier | None:
    def capacity(available_bytes: int) -> int:
        return int(available_bytes * _FREE_SHARE) if asked_bytes is None else asked_bytes

    try:
        return Tier(path, kind="disk", capacity=capacity, asked_bytes=asked_bytes, durable=True, policy=policy)
    except _MISTAKES:
        raise
    except OSError as error:
        _without_tier("disk", error)
        return None


def _without_tier(kind: str, error: Exception) -> None:
    counters.add("cache.degraded")
    counters.add(f"cache.{kind}.degraded")
    warn_once(f"no {kind} tier ({error}): blocks go to the next tier or pass through")


def _free_cgroup_bytes() -> int:
    """What this process's control group may still take of memory; tmpfs pages count there. Without a limit: a lot."""
    free = 2**62
    with suppress(OSError, ValueError):
        group = Path("/proc/self/cgroup").read_text().rpartition("::")[2].strip().lstrip("/")
        for base in (Path("/sys/fs/cgroup") / group, Path("/sys/fs/cgroup")):
            with suppress(OSError, ValueError):
                limit = int((base / "memory.max").read_text())
                free = min(free, max(0, limit - int((base / "memory.current").read_text())))
    return free


_live: "weakref.WeakSet[TieredCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_live):
        cache._reset()


def _close_all() -> None:
    """At exit, so that no thread of ours is inside a client library when the interpreter goes."""
    for cache in list(_live):
        cache.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)
