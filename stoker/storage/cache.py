"""The block cache of a node: RAM tier, disk tier, origin; shared by all processes, without a daemon.

The unit is the immutable :class:`Block`. A block is fetched once for all threads and processes, checked against the
checksum that its data set carries, kept in a tier and handed out as a view of the cached file.

What stays once the tiers are full follows from what readers say that they will read (:class:`CacheReader`): the block
that is needed last goes first, and one that will not be read again is not kept at all. Where nobody says, what is there
stays and newcomers pass through: in scans that read every block once an epoch, recency says nothing, and evicting by it
drops to 0 % hits where keeping any fixed half gets 50 %. For other traffic there is SIEVE.
"""

import atexit
import logging
import os
import re
import threading
import weakref
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Literal, NamedTuple, Self, get_args

from ..errors import ConfigError, CorruptBlock
from ..metrics import counters
from ._checksums import crc32c
from ._layout import BlockFile
from ._open_tiers import Policy, open_disk_tier, open_ram_tier
from ._prefetch import Pace, PrefetchQueue, Wanted
from ._units import parse_bytes
from .blocks import Block, block_file
from .eviction import NextUse, Sieve
from .near import Near
from .store import ObjectStore
from .tiers import Tier

__all__ = ["Block", "CacheReader", "CacheStats", "TieredCache"]

logger = logging.getLogger(__name__)

Eviction = Literal["plan", "keep", "sieve"]
_POLICIES: Mapping[str, Policy | None] = {"plan": NextUse, "keep": None, "sieve": Sieve}

_TELL_EVERY_S = 30.0  # some 10 ms for 30,000 blocks
_PREFETCH_BYTES = 256 * 2**20
_PREFETCH_THREADS = 8  # a guess: enough to overlap round trips to a store, few enough for two cores
_CLOSE_TIMEOUT_S = 5.0
_FLIGHT_TIMEOUT_S = 5.0  # I6: a process that was stopped while it fetches holds up the others no longer


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
    prefetch_fetches: int
    """Most prefetches that may be under way at once just now: fewer while there is much slack."""
    slack_s: float
    """Seconds of data ahead of the readers: until the first block is needed that was asked for and is not there yet; if
    all are there, until the last one is. 0 if that is past, or nobody said when."""
    near_hits: int
    """Blocks that came from the cluster's cache instead of their origin; they count as no misses."""
    near_hit_bytes: int
    """Bytes of these."""


class _Flight:
    """A block on its way: one thread fetches, the others wait."""

    __slots__ = ("admitted", "done", "error", "fetch_s", "view", "waiters")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.view: memoryview | None = None
        self.error: BaseException | None = None
        self.admitted = False
        self.fetch_s = 0.0  # how long it took, if it came from elsewhere than a tier
        self.waiters = 0


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
        near: URL of a cluster's shared cache that holds the origins' objects under their own names, asked before the
            origin; see :class:`~stoker.storage.near.Near` for how they are looked for.
        near_options: options of its store, as :func:`~stoker.storage.open_store` takes them.
        near_timeout_s: how long a block may keep us waiting there before it is fetched from its origin; a cache that
            fills itself at the first read takes longer than the origin then.
        min_free: what the file systems of the tiers keep free, whoever fills them; below it blocks pass through until
            there is more. Default: 5 % of each, at most 1 GiB.
        ram_path: directory of the RAM tier. Default: ``cache`` in ``/dev/shm/stoker-<uid>`` (``STOKER_SHM_DIR``).
        prefetch_bytes: most bytes that prefetches may have under way or hold for want of room.
        eviction: ``"plan"``: by what readers have published with :meth:`reader`, as token loaders do; while nobody has,
            what is there stays. ``"keep"`` what is there, whatever is published. ``"sieve"`` makes room for every
            newcomer, in all tiers, by removing what was not read of late, for traffic that reads some blocks again and
            most never. Blocks in use stay. Processes that share a cache should agree on it.

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
        near_options: Mapping[str, Any] | None = None,
        near_timeout_s: float = 2.0,
        min_free: int | str | None = None,
        ram_path: str | Path | None = None,
        prefetch_bytes: int | str = _PREFETCH_BYTES,
        eviction: Eviction = "plan",
    ) -> None:
        if disk is None and disk_capacity is not None:
            raise ConfigError("disk_capacity needs disk", value=disk_capacity, place="TieredCache", hint="disk=PATH")
        if eviction not in get_args(Eviction):
            raise ConfigError("eviction must be 'plan', 'keep' or 'sieve'", value=eviction, place="TieredCache")
        disk, ram_path = _directory(disk, "disk"), _directory(ram_path, "ram_path")
        if near is None and near_options is not None:
            raise ConfigError("near_options need near", place="TieredCache", hint="near=URL")
        self._config: dict[str, Any] = {
            "eviction": eviction,
            "ram": ram,
            "disk": disk,
            "disk_capacity": disk_capacity,
            "near": near,
            "near_options": near_options,
            "near_timeout_s": near_timeout_s,
            "min_free": min_free,
            "ram_path": ram_path,
            "prefetch_bytes": prefetch_bytes,
        }
        self._prefetch_limit = parse_bytes(prefetch_bytes, place="prefetch_bytes")
        ram_bytes = None if ram is None else parse_bytes(ram, place="ram")
        disk_bytes = None if disk_capacity is None else parse_bytes(disk_capacity, place="disk_capacity")
        tiers: dict[str, Any] = {
            "min_free_bytes": None if min_free is None else parse_bytes(min_free, place="min_free"),
            "policy": _POLICIES[eviction],
        }
        self._closed = False
        self._near = (
            None
            if near is None
            else Near(near, storage_options={} if near_options is None else near_options, timeout_s=near_timeout_s)
        )
        self._reset()
        self._ram = None if ram_bytes == 0 else open_ram_tier(ram_path, ram_bytes, **tiers)
        try:
            self._disk = None if disk is None else open_disk_tier(Path(disk), disk_bytes, **tiers)
        except BaseException:
            if self._ram is not None:
                self._ram.close()
            raise
        _live.add(self)

    def _reset(self) -> None:
        self._lock = threading.Condition()
        self._flights: dict[str, _Flight] = {}
        self._queue = PrefetchQueue()
        self._pace = Pace(_PREFETCH_THREADS)
        self._under_way: dict[str, Wanted] = {}  # prefetches that a thread is at
        self._held: dict[str, tuple[memoryview, Wanted]] = {}
        self._failed: dict[str, tuple[BaseException, str | None]] = {}  # with the reader that wanted it
        self._prefetch_bytes = 0
        self._taken: dict[str | None, int] = {}  # of each reader: the latest asked for of the blocks that it took
        self._last_due_s: dict[str | None, float] = {}  # of each reader, and of all: of the blocks that have landed
        self._readers: dict[str, CacheReader] = {}
        self._takes_s: dict[str, float] = {}  # seconds that a unit of each reader's time takes
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
        file = block_file(store, block)
        view = self._resident(file, block, count=True)
        if view is not None:
            return view
        with self._lock:
            self._require_open()
            if (wanted := self._queue.pop(file.name)) is not None:
                self._took(wanted)
            if (failed := self._failed.pop(file.name, None)) is not None:
                raise failed[0]
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
            return self._fly(flight, store, block, file)
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

    def _fly(
        self, flight: _Flight, store: ObjectStore, block: Block, file: BlockFile, ahead: Wanted | None = None
    ) -> memoryview:
        """Bring a block in for everyone who waits for it; `ahead` of its get, or for one."""
        began = monotonic()
        try:
            # Between our first look and taking off, another thread may have landed with it.
            view = self._resident(file, block, count=False)
            if view is not None:
                flight.admitted = True
            else:
                view, flight.admitted = self._fill_once(store, block, file, count=ahead is None)
                flight.fetch_s = monotonic() - began
            flight.view = view
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[file.name]
                if ahead is not None:
                    self._landed_ahead(flight, ahead)
            flight.done.set()
        return view

    def _fill_once(self, store: ObjectStore, block: Block, file: BlockFile, *, count: bool) -> tuple[memoryview, bool]:
        """:meth:`_fill`, or what another process that was at it has put into a tier meanwhile."""
        if not self._tiers:
            return self._fill(store, block, file)
        first, deadline = self._tiers[0], monotonic() + _FLIGHT_TIMEOUT_S
        waited = False
        news, mine = first.news(file), first.take_off(file)
        while mine is False and monotonic() < deadline:
            waited = True
            first.wait_for_news(file, news)
            if (view := self._resident(file, block, count=count)) is not None:
                return view, True
            news, mine = first.news(file), first.take_off(file)
        told = False
        try:
            # The one before us may have landed between our last look and taking off.
            if mine and (view := self._resident(file, block, count=count)) is not None:
                return view, True
            if mine and waited:
                # It brought nothing that a tier kept, and will not for us: nobody has to queue behind us as well.
                first.land(file)
                mine = None
            view, told = self._fill(store, block, file)
            return view, told
        finally:
            if mine:
                first.land(file, tell=not told)

    def _fill(self, store: ObjectStore, block: Block, file: BlockFile) -> tuple[memoryview, bool]:
        """Fetch, check, keep. Returns the bytes and whether a tier holds them."""
        view = self._fetch_near(store, block) or self._fetch(store, block)
        found: memoryview | None = None
        for tier in self._tiers:
            # Where blocks are evicted from shared memory, they must be on disk by then.
            if found is not None and not tier.may_evict:
                break
            # What we return is read back from the tier, so that all processes share its pages.
            if tier.admit(file, view, is_held=found is not None) and found is None:
                self._tiers[0].tell(file)
                found = tier.lookup(file, is_use=False)
        if found is not None:
            return found, True
        with self._lock:
            self._count("pass_through", 1)
        counters.add("cache.pass_through")
        return view.toreadonly(), False

    def _fetch_near(self, store: ObjectStore, block: Block) -> memoryview | None:
        if self._near is None:
            return None
        view = self._near.get(store, block.key, block.start, block.end, block.crc32c)
        if view is not None:
            with self._lock:
                self._count("near_hits", 1)
                self._count("near_hit_bytes", block.size_bytes)
        return view

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

    def prefetch(self, store: ObjectStore, blocks: Iterable[Block], *, due_s: Sequence[float] | None = None) -> None:
        """Fetch `blocks` in the background, those that are needed earliest first, of all callers. Returns at once.

        Args:
            due_s: in how many seconds from now each is needed. None: all at once, in this order.

        At most `prefetch_bytes` are under way, or held for blocks that no tier has room for; those wait for their get,
        and are let go when the reader has gone past them. How many are fetched at once follows from the slack: few
        while the reader needs none of them soon. A failure is raised by the next get of that block.
        """
        self._prefetch(store, blocks, due_s, None)

    def reader(self) -> "CacheReader":
        """A new reader, which says what it will read before it does; see :class:`CacheReader`."""
        with self._lock:
            self._require_open()
            reader = CacheReader(self, os.urandom(8).hex())
            self._readers[reader.name] = reader
        return reader

    def _prefetch(
        self, store: ObjectStore, blocks: Iterable[Block], due_s: Sequence[float] | None, reader: str | None
    ) -> None:
        now = monotonic()
        with self._lock:
            self._require_open()
            for number, block in enumerate(blocks):
                file = block_file(store, block)
                if not any(file.name in names for names in (self._held, self._flights, self._failed)):
                    due = now if due_s is None else now + due_s[number]
                    self._queue.add(Wanted(store=store, block=block, file=file, due_s=due, reader=reader))
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
                self._fly(flight, wanted.store, wanted.block, wanted.file, ahead=wanted)
            del taken, wanted, flight  # while we wait for more, hold no block

    def _landed_ahead(self, flight: _Flight, wanted: Wanted) -> None:
        """Keep what a prefetch brought until its get, unless someone waits for it already."""
        name = wanted.file.name
        del self._under_way[name]
        for reader in {None, wanted.reader}:
            self._last_due_s[reader] = max(self._last_due_s.get(reader, 0.0), wanted.due_s)
        if flight.fetch_s:
            self._pace.landed(slack_s=self._slack_s(), fetch_s=flight.fetch_s)
        if flight.waiters:
            self._note_taken(wanted)
        elif flight.error is not None:
            self._failed[name] = (flight.error, wanted.reader)
        elif flight.view is not None and not flight.admitted and not self._closed:
            self._held[name] = (flight.view, wanted)
        if name not in self._held:
            self._prefetch_bytes -= wanted.block.size_bytes
        self._lock.notify_all()

    def _take(self) -> tuple[Wanted, _Flight] | None:
        """The next block to fetch, as soon as budget and pace allow it; None when the cache is closed."""
        with self._lock:
            while not self._closed:
                wanted = self._queue.first() if len(self._under_way) < self._pace.limit else None
                if wanted is not None:
                    size_bytes, name = wanted.block.size_bytes, wanted.file.name
                    self._make_room(size_bytes)
                    if size_bytes <= self._prefetch_limit - self._prefetch_bytes or not self._prefetch_bytes:
                        self._queue.pop(name)
                        self._under_way[name] = wanted
                        self._prefetch_bytes += size_bytes
                        flight = self._flights[name] = _Flight()
                        return wanted, flight
                self._lock.wait()
            return None

    def _make_room(self, size_bytes: int) -> None:
        """Let go of held blocks that their reader passed by: it has taken one that was asked for later."""
        if self._prefetch_bytes + size_bytes <= self._prefetch_limit:
            return
        for name, (view, wanted) in sorted(self._held.items(), key=lambda item: item[1][1].order):
            if self._prefetch_bytes + size_bytes <= self._prefetch_limit:
                return
            if wanted.order <= self._taken.get(wanted.reader, -1):
                del self._held[name]
                self._prefetch_bytes -= len(view)

    def _took(self, wanted: Wanted) -> None:
        self._note_taken(wanted)
        self._lock.notify_all()

    def _note_taken(self, wanted: Wanted) -> None:
        self._taken[wanted.reader] = max(self._taken.get(wanted.reader, -1), wanted.order)

    def _slack_s(self, reader: str | None = None) -> float:
        """Of all readers, or of one."""
        missing = [wanted.due_s for wanted in self._under_way.values() if reader in (None, wanted.reader)]
        first = self._queue.first(reader)
        if first is not None:
            missing.append(first.due_s)
        return max(0.0, min(missing, default=self._last_due_s.get(reader, 0.0)) - monotonic())

    def _tell_others(self, reader: str, takes_s: float) -> None:
        """Let the node know when blocks are read next, now that a reader's pace is known."""
        with self._lock:
            self._takes_s[reader] = takes_s
            known = dict(self._takes_s)
        for tier in self._tiers:
            tier.tell_others(known)

    def _cancel(self, reader: str) -> None:
        """Drop what only this reader wants and has not got."""
        with self._lock:
            self._queue.cancel(reader)
            for name in [name for name, (_, wanted) in self._held.items() if wanted.reader == reader]:
                view, _ = self._held.pop(name)
                self._prefetch_bytes -= len(view)
            for name in [name for name, (_, wanted_by) in self._failed.items() if wanted_by == reader]:
                del self._failed[name]
            self._taken.pop(reader, None)
            self._last_due_s.pop(reader, None)
            self._takes_s.pop(reader, None)
            self._lock.notify_all()

    # -- the rest

    def stats(self) -> CacheStats:
        """A snapshot of counts and sizes."""
        ram, disk = self._ram, self._disk
        with self._lock:
            counts, prefetch_bytes = dict(self._counts), self._prefetch_bytes
            prefetch_fetches, slack_s = self._pace.limit, self._slack_s()
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
            prefetch_fetches=prefetch_fetches,
            slack_s=slack_s,
            near_hits=counts.get("near_hits", 0),
            near_hit_bytes=counts.get("near_hit_bytes", 0),
        )

    def clear(self) -> int:
        """Remove every block from both tiers, for all processes, and return their bytes. Views stay valid."""
        self._require_open()
        return sum(tier.clear() for tier in self._tiers)

    def close(self) -> None:
        """Stop prefetching and leave the tiers. Views stay valid, blocks stay cached.

        Requests under way are waited for, but not for more than 5 s: a store that is down would hold up the end of a
        program for two minutes. What they bring later is dropped.
        """
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._queue.clear()
            self._readers.clear()
            threads, self._threads = self._threads, []
            self._lock.notify_all()
        deadline = monotonic() + _CLOSE_TIMEOUT_S
        for thread in threads:
            thread.join(max(0.0, deadline - monotonic()))
        with self._lock:
            self._held.clear()
            self._failed.clear()
            self._prefetch_bytes = 0
        for tier in self._tiers:
            tier.close()
        if self._near is not None:
            self._near.close()
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


# Guarantees: one thread at a time; different readers don't know each other.
class CacheReader:
    """One reader of a cache, which says what it will read: :meth:`TieredCache.reader` makes it.

    What is published decides what the tiers keep. It should be what *all* processes of the node will read, as far ahead
    as the tiers are large: what nobody's plan names goes first. A plan that is wrong costs misses, never a wrong byte.

    Time is a number that grows as the reader goes on, in a unit of its choice: positions of a stream, steps, seconds.
    It has nothing to do with the seconds of :meth:`prefetch`. In a forked child, and when the cache is closed, nothing
    that a reader does has an effect.
    """

    def __init__(self, cache: TieredCache, name: str) -> None:
        self.name = name
        self._cache = cache
        self._since: tuple[float, float] | None = None  # when it was at which time of its own
        self._measure_for_s = 1.0

    @property
    def is_open(self) -> bool:
        """Whether what it says still counts."""
        return self._cache._readers.get(self.name) is self

    @property
    def slack_s(self) -> float:
        """Seconds of data ahead of this reader; see :attr:`CacheStats.slack_s`."""
        with self._cache._lock:
            return self._cache._slack_s(self.name)

    @property
    def capacity_bytes(self) -> int:
        """Of the largest tier whose contents follow plans: it is of no use to look further ahead than it can hold."""
        return max((tier.capacity_bytes for tier in self._cache._tiers if tier.follows_plans), default=0)

    def publish(
        self,
        store: ObjectStore,
        blocks: Iterable[Block],
        begins: Iterable[float],
        *,
        lasts: float = 0.0,
        final: bool = False,
    ) -> None:
        """Add reads to the plan, in any order.

        Args:
            begins: when the reading of each block begins. lasts: how long it goes on, the same for all.
            final: nothing is read beyond what has been published; until the next call says otherwise. Blocks that no
                plan names then pass through even where there is room.
        """
        if self.is_open:
            uses = [(time, block_file(store, block).name) for block, time in zip(blocks, begins, strict=True)]
            for tier in self._cache._tiers:
                tier.publish(self.name, uses, lasts=lasts, final=final)

    def advance(self, now: float) -> None:
        """The reader has come to this time; it never goes back."""
        if not self.is_open:
            return
        for tier in self._cache._tiers:
            tier.advance(self.name, now)
        clock = monotonic()
        if self._since is None:
            self._since = clock, now
        elif clock - self._since[0] >= self._measure_for_s and now > self._since[1]:
            takes_s = (clock - self._since[0]) / (now - self._since[1])
            self._since, self._measure_for_s = (clock, now), _TELL_EVERY_S
            self._cache._tell_others(self.name, takes_s)

    def prefetch(self, store: ObjectStore, blocks: Iterable[Block], *, due_s: Sequence[float] | None = None) -> None:
        """:meth:`TieredCache.prefetch`, for this reader: :meth:`forget` cancels it."""
        if self.is_open:
            self._cache._prefetch(store, blocks, due_s, self.name)

    def forget(self) -> None:
        """Take back all that was said: the reader goes elsewhere. Fetches that have begun end."""
        if self.is_open:
            self._since, self._measure_for_s = None, 1.0
            for tier in self._cache._tiers:
                tier.withdraw(self.name)
            self._cache._cancel(self.name)

    def close(self) -> None:
        """:meth:`forget`, for good."""
        self.forget()
        self._cache._readers.pop(self.name, None)


# --- once in a process ------------------------------------------------------------------------------------------------
def _directory(path: str | Path | None, name: str) -> Path | None:
    """Absolute, so that a worker that is started elsewhere opens the same one."""
    if path is None:
        return None
    if not isinstance(path, str | Path) or "\0" in str(path) or re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):
        raise ConfigError(
            f"{name} must be a local path", value=repr(path), place="TieredCache", hint="near= takes the URL of a store"
        )
    return Path(os.path.abspath(Path(path).expanduser()))


_live: "weakref.WeakSet[TieredCache]" = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_live):
        if cache._near is not None:
            cache._near.renew_after_fork()
        cache._reset()


def _close_all() -> None:
    """At exit, so that no thread of ours is inside a client library when the interpreter goes."""
    for cache in list(_live):
        cache.close()


os.register_at_fork(after_in_child=_after_fork_in_child)
atexit.register(_close_all)
