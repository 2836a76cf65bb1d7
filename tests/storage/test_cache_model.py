"""The cache beside a dictionary with a capacity: whatever is asked, damaged or removed, and whoever dies, they agree."""

import logging
import os
import random
import shutil
import signal
import tempfile
import warnings
from collections import Counter
from contextlib import suppress
from functools import cache as once
from pathlib import Path
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from stoker.storage import Block, TieredCache
from stoker.storage._checksums import crc32c
from stoker.storage.local import LocalStore
from stoker.testing.faulty_tier import FaultyTier, TierCrash, TierFault

SIZES = [1, 4096, 4097, 9000, 20_000, 3000, 8192, 12_288]
HEADER_BYTES = 4096
FILES = [HEADER_BYTES + -(-size // 4096) * 4096 for size in SIZES]
CAPACITY = {"ram": 40_000, "disk": 50_000}
Kind = Literal["ram", "disk"]
KINDS: tuple[Kind, Kind] = ("ram", "disk")
SIDES = (0, 1)


class Origin(LocalStore):
    """One object in memory, and how often it was asked for."""

    data = random.Random(0).randbytes(sum(SIZES))

    def __init__(self) -> None:
        super().__init__(Path("/nowhere/origin"))
        self.fetched = 0

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        self.fetched += 1
        return memoryview(self.data)[start:end]


STARTS = [sum(SIZES[:number]) for number in range(len(SIZES))]
WANT = [Origin.data[start : start + size] for start, size in zip(STARTS, SIZES, strict=True)]
BLOCKS = [
    Block(key="object", version="1", start=start, end=start + len(data), crc32c=crc32c(data))
    for start, data in zip(STARTS, WANT, strict=True)
]


@once
def pristine() -> list[tuple[str, bytes]]:
    """The name of each block's file, and what is in it but for the padding."""
    found: list[tuple[str, bytes]] = []
    with tempfile.TemporaryDirectory() as directory, TieredCache(ram=0, disk=directory) as one:
        for block in BLOCKS:
            one.get(Origin(), block)
            (name,) = present(Path(directory)).keys() - {name for name, _ in found}
            data = Path(directory, "blocks", name[:2], name).read_bytes()
            found.append((name, data[: HEADER_BYTES + block.size_bytes]))
    return found


@once
def numbers_by_name() -> dict[str, int]:
    return {name: number for number, (name, _) in enumerate(pristine())}


def present(directory: Path) -> dict[str, int]:
    """Blocks that are in a tier: name of the file and its size."""
    found = {}
    for folder in os.scandir(directory / "blocks"):
        for entry in os.scandir(folder):
            found[entry.name] = entry.stat().st_size
    return found


class CacheMachine(RuleBasedStateMachine):
    """Two caches on the same two tiers, as two processes would have them; each rule acts first and is modelled then."""

    numbers = st.integers(0, len(SIZES) - 1)
    sides = st.sampled_from(SIDES)
    kinds = st.sampled_from(KINDS)

    @initialize(keeps=st.booleans())
    def start(self, keeps: bool) -> None:
        self.keeps = keeps
        logging.getLogger("stoker").setLevel(logging.ERROR)  # thousands of damaged blocks are thousands of warnings
        self.directory = Path(tempfile.mkdtemp(prefix="model-", dir=os.environ["STOKER_SHM_DIR"]))
        self.origin = Origin()
        self.caches = [self.open(), self.open()]
        # The model: where each block is, which copies are damaged, bytes that are counted and not there.
        self.where: dict[Kind, set[int]] = {"ram": set(), "disk": set()}
        self.damaged: dict[Kind, set[int]] = {"ram": set(), "disk": set()}
        self.slack: dict[Kind, int] = {"ram": 0, "disk": 0}
        self.fetched = 0
        # Of each cache: what a prefetch holds for want of room, how many copies it found damaged, which it has in use.
        self.held: list[set[int]] = [set(), set()]
        self.corrupt = [0, 0]
        self.in_use: list[Counter[tuple[Kind, int]]] = [Counter(), Counter()]
        self.views: list[tuple[memoryview, int, int, Kind | None]] = []  # the view, its block, cache and tier
        self.forked = False

    def open(self) -> TieredCache:
        return TieredCache(
            ram=CAPACITY["ram"],
            ram_path=self.directory / "ram",
            disk=self.directory / "disk",
            disk_capacity=CAPACITY["disk"],
            eviction="keep" if self.keeps else "sieve",
        )

    def teardown(self) -> None:
        logging.getLogger("stoker").setLevel(logging.NOTSET)
        if hasattr(self, "directory"):
            for one in self.caches:
                one.close()
            self.views.clear()
            shutil.rmtree(self.directory)

    # -- what reading does

    def after_get(self, side: int, number: int) -> Kind | None:
        """What bringing in a block did; the tier that served it."""
        kind = self.looked_up(side, number)
        if kind is None and number in self.held[side]:
            self.held[side].discard(number)
        elif kind is None:
            kind = self.loaded(number)
        return kind

    def looked_up(self, side: int, number: int) -> Kind | None:
        """The tier in which a block was found; a damaged copy on the way was told and is gone."""
        for kind in KINDS:
            if self.in_use[side][kind, number]:
                return kind  # checked when it was mapped, whatever became of the file
            if number in self.damaged[kind]:
                self.damaged[kind].discard(number)
                self.where[kind].discard(number)
                self.corrupt[side] += 1
            elif number in self.where[kind]:
                return kind
        return None

    def loaded(self, number: int) -> Kind | None:
        """A block was fetched; the first tier that has it now."""
        self.fetched += 1
        if not self.keeps:
            kept = [kind for kind in KINDS if self.made_room(kind, number)]
            return kept[0] if kept else None
        for kind in KINDS:
            if self.used(kind) + FILES[number] <= CAPACITY[kind]:
                self.where[kind].add(number)
                return kind
        return None

    def made_room(self, kind: Kind, number: int) -> bool:
        """A newcomer came to a tier that evicts: which ones went is up to it, within bounds."""
        before, after = self.where[kind], self.there(kind)
        gone = before - after
        assert after - before <= {number}
        assert not gone & self.leased(kind), "a block in use was evicted"
        if self.used(kind) + FILES[number] <= CAPACITY[kind]:
            assert not gone, "a block was evicted although there was room"
        if not self.slack[kind] and not self.leased(kind):
            assert number in after, "a newcomer found no room"
        self.where[kind] = after
        self.damaged[kind] &= after
        return number in after

    def used(self, kind: Kind) -> int:
        return self.slack[kind] + sum(FILES[number] for number in self.where[kind])

    def there(self, kind: Kind) -> set[int]:
        return {numbers_by_name()[name] for name in present(self.directory / kind)}

    def leased(self, kind: Kind) -> set[int]:
        return {
            number for side in SIDES for (tier, number), count in self.in_use[side].items() if count and tier == kind
        }

    # -- rules

    @rule(side=sides, number=numbers)
    def get(self, side: int, number: int) -> None:
        assert self.caches[side].get(self.origin, BLOCKS[number]) == WANT[number]
        self.after_get(side, number)

    @precondition(lambda self: len(self.views) < 3)
    @rule(side=sides, number=numbers)
    def get_and_hold(self, side: int, number: int) -> None:
        view = self.caches[side].get(self.origin, BLOCKS[number])
        kind = self.after_get(side, number)
        self.views.append((view, number, side, kind))
        if kind is not None:
            self.in_use[side][kind, number] += 1

    @precondition(lambda self: self.views)
    @rule()
    def let_go(self) -> None:
        _, number, side, kind = self.views.pop(0)
        if kind is not None:
            self.in_use[side][kind, number] -= 1

    @rule(side=sides, number=numbers)
    def prefetch(self, side: int, number: int) -> None:
        self.caches[side].prefetch(self.origin, [BLOCKS[number]])
        settle(self.caches[side])
        if number not in self.held[side] and self.looked_up(side, number) is None and self.loaded(number) is None:
            self.held[side].add(number)

    @rule(kind=kinds, number=numbers, where=st.integers(0, 2**20), bit=st.integers(0, 7))
    def flip_a_bit(self, kind: Kind, number: int, where: int, bit: int) -> None:
        if number not in self.where[kind] or number in self.damaged[kind]:  # the same bit twice would heal it
            return
        path = self.path(kind, number)
        data = bytearray(path.read_bytes())
        data[where % (HEADER_BYTES + SIZES[number])] ^= 1 << bit  # what pads the payload means nothing
        damaged = path.with_name("damaged")
        damaged.write_bytes(data)
        os.replace(damaged, path)
        self.damaged[kind].add(number)

    @rule(kind=kinds, number=numbers)
    def lose_a_file(self, kind: Kind, number: int) -> None:
        if number in self.where[kind]:
            self.path(kind, number).unlink()
            self.slack[kind] += FILES[number]  # the count is fuller than the tier until someone counts anew
            self.where[kind].discard(number)
            self.damaged[kind].discard(number)

    def path(self, kind: Kind, number: int) -> Path:
        name = pristine()[number][0]
        return self.directory / kind / "blocks" / name[:2] / name

    @rule()
    def clear(self) -> None:
        assert self.caches[0].clear() == sum(FILES[number] for kind in KINDS for number in self.where[kind])
        for kind in KINDS:
            self.where[kind].clear()
            self.damaged[kind].clear()

    @rule()
    def restart(self) -> None:
        """All close; who opens first counts anew."""
        for one in self.caches:
            one.close()
        self.caches = [self.open(), self.open()]
        self.forget(0)
        self.forget(1)
        self.slack = {"ram": 0, "disk": 0}

    @rule(side=sides)
    def reopen(self, side: int) -> None:
        """One closes and opens again, beside the other."""
        self.caches[side].close()
        self.caches[side] = self.open()
        self.forget(side)

    @rule(side=sides, number=numbers, calls=st.integers(0, 25))
    def die(self, side: int, number: int, calls: int) -> None:
        """One process dies between two calls of a get; another takes its place."""
        with FaultyTier(self.directory) as disks:
            disks.add(TierFault("crash"), after=calls)
            with suppress(TierCrash):
                assert self.caches[side].get(self.origin, BLOCKS[number]) == WANT[number]
            disks.clear()
            self.caches[side].close()  # as the kernel would: it closes descriptors, and does no more
        self.caches[side] = self.open()
        self.forget(side)
        self.adopt()

    @precondition(lambda self: not self.forked)
    @rule(side=sides, number=numbers)
    def fork(self, side: int, number: int) -> None:
        """A forked child reads through what it inherited, and is gone."""
        self.forked = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside the prefetch thread
            pid = os.fork()
        if not pid:
            signal.alarm(60)
            os._exit(0 if self.caches[side].get(self.origin, BLOCKS[number]) == WANT[number] else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        self.adopt()

    def forget(self, side: int) -> None:
        """A cache has closed or died: its views stay valid, and are leases no more."""
        self.held[side].clear()
        self.corrupt[side] = 0
        self.in_use[side].clear()
        self.views = [(view, n, owner, None if owner == side else kind) for view, n, owner, kind in self.views]

    def adopt(self) -> None:
        """Take what another process has left for right: the count may be above what is there, and never below."""
        self.fetched = self.origin.fetched
        for kind in KINDS:
            files = present(self.directory / kind)
            after = {numbers_by_name()[name] for name in files}
            gone = self.where[kind] - after - self.damaged[kind]
            assert not gone & self.leased(kind), "a block in use was evicted"
            assert not gone or not self.keeps
            self.where[kind] = after
            still = {n for n in after if not self.path(kind, n).read_bytes().startswith(pristine()[n][1])}
            assert still <= self.damaged[kind], "a torn block has a name"
            self.damaged[kind] = still
            self.slack[kind] = self.caches[0].stats()._asdict()[f"{kind}_bytes"] - sum(files.values())
            assert self.slack[kind] >= 0

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "directory"):
            return
        assert self.origin.fetched == self.fetched
        for side, tested in enumerate(self.caches):
            stats = tested.stats()
            assert (stats.ram_bytes, stats.disk_bytes) == (self.used("ram"), self.used("disk"))
            assert stats.ram_bytes <= CAPACITY["ram"] and stats.disk_bytes <= CAPACITY["disk"]
            assert stats.corrupt == self.corrupt[side]
            assert stats.prefetch_bytes == sum(SIZES[number] for number in self.held[side])
        for kind in KINDS:
            assert self.there(kind) == self.where[kind]
            assert os.listdir(self.directory / kind / "tmp") == []
        for view, number, _, _ in self.views:
            assert view == WANT[number]


def settle(tested: TieredCache) -> None:
    """Wait until nothing is being prefetched, and the threads that did so have let go of what they brought."""
    while True:
        with tested._lock:
            idle = len(tested._lock._waiters)  # type: ignore[attr-defined]
            if not tested._queue and not tested._flights and idle == len(tested._threads):
                return
        os.sched_yield()


TestCacheModel = CacheMachine.TestCase
TestCacheModel.settings = settings(max_examples=200, stateful_step_count=75, deadline=None)
