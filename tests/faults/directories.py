"""Trial "directories": cache directories that break, under processes that use them: no wrong byte, no crash, no hang.

Every bit of a block's file is flipped once. A directory is small, full, read-only, slow, failing, removed while it is in
use, shared by jobs with different limits or by a forked worker whose parent was killed, and on a file system whose locks
fail or mean nothing. What needs a file system of its own runs on a real tmpfs in a private mount namespace, where the
system lets us have one, and on :class:`~stoker.testing.FaultyTier` everywhere.
"""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from stoker.metrics import counters
from stoker.storage import Block, TieredCache
from stoker.storage._checksums import crc32c
from stoker.storage.local import LocalStore
from stoker.testing.faulty_tier import FaultyTier, TierFault

from .disks import MIB, Disk, MountedDisk, make_mounts_private, mount

HELD_UP_S = 15.0
HEADER_BYTES = 4096
Facts = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one scenario; `violation` is empty if every promise held."""

    scenario: str
    seconds: float
    facts: Facts = field(default_factory=dict)
    violation: str = ""

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        return f"{'NOT' if self.violation else 'ok '} {self.scenario}: {facts} ({self.seconds:.1f} s)\n{self.violation}"


@dataclass(frozen=True, kw_only=True)
class DirectoriesReport:
    """All that this trial found."""

    outcomes: list[Outcome]

    @property
    def ok(self) -> bool:
        return not any(outcome.violation for outcome in self.outcomes)

    def __str__(self) -> str:
        return "\n".join(["directories:", *(str(outcome).rstrip() for outcome in self.outcomes)])

    def to_json(self) -> dict[str, Any]:
        return {"trial": "directories", "ok": self.ok, "outcomes": [asdict(outcome) for outcome in self.outcomes]}


def tried(name: str, scenario: Callable[[Path], Facts], directory: Path) -> Outcome:
    """Run one scenario in an empty directory of its own."""
    began = time.monotonic()
    directory.mkdir(parents=True)
    facts: Facts = {}
    violation = ""
    try:
        facts = scenario(directory)
    except Exception:
        violation = traceback.format_exc()
    return Outcome(scenario=name, seconds=time.monotonic() - began, facts=facts, violation=violation)


def prove_directories() -> DirectoriesReport:
    """Everything, every bit included."""
    logging.getLogger("stoker").setLevel(logging.CRITICAL)  # each of 100,000 damaged blocks is a warning
    with TemporaryDirectory(prefix="stoker-prove-directories-", dir=_memory_directory()) as name:
        outcomes = [tried("every bit", every_bit, Path(name, "bits"))]
        outcomes += [
            tried(scenario.__name__.replace("_", " "), scenario, Path(name, scenario.__name__))
            for scenario in SCENARIOS
        ]
        return DirectoriesReport(outcomes=[*outcomes, *mounted(Path(name, "mounted"))])


def _memory_directory() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


# --- bytes ------------------------------------------------------------------------------------------------------------


class Origin(LocalStore):
    """Blocks of one size in one object, and how often they were fetched."""

    def __init__(self, root: Path, count: int, size: int) -> None:
        super().__init__(root)
        self.data = random.Random(count).randbytes(count * size)
        self.put("object", self.data)
        self.fetched = 0
        self.blocks = [
            Block(
                key="object", version="1", start=at, end=at + size, crc32c=crc32c(memoryview(self.data)[at : at + size])
            )
            for at in range(0, count * size, size)
        ]

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        self.fetched += 1
        return super().get(key, start, end, version=version)

    def read(self, cache: TieredCache, blocks: Iterable[Block] | None = None) -> None:
        """Read blocks, all by default: every byte is right, and nothing holds us up."""
        for block in self.blocks if blocks is None else blocks:
            began = time.monotonic()
            view = cache.get(self, block)
            seconds = time.monotonic() - began
            assert view == memoryview(self.data)[block.start : block.end], f"wrong bytes at {block.start}"
            assert seconds < HELD_UP_S, f"a read was held up for {seconds:.1f} s"


def _files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "blocks").glob("*/*") if path.is_file())


def _degraded_since(before: Any) -> int:
    return int(counters.since(before).get("cache.degraded", 0))


def _require_clean(directory: Path, used_bytes: int) -> None:
    assert list((directory / "tmp").iterdir()) == [], "a temporary file is left"
    present = sum(path.stat().st_size for path in _files(directory))
    assert used_bytes == present, f"{used_bytes} bytes are counted, {present} are there"


def every_bit(directory: Path, bits: Sequence[int] | None = None) -> Facts:
    """Each bit of a block's file flipped, in both tiers: told and healed, or in the padding behind the payload, which
    no reader is ever given.
    """
    size = 100
    origin = Origin(directory / "origin", 1, size)
    told = harmless = 0
    for tier in ("ram", "disk"):
        root = directory / tier
        with (
            TieredCache(ram=MIB, ram_path=root)
            if tier == "ram"
            else TieredCache(ram=0, disk=root, disk_capacity=MIB) as cache
        ):
            origin.read(cache)
            (path,) = _files(root)
            pristine = path.read_bytes()
            for number, bit in enumerate(range(8 * len(pristine)) if bits is None else bits):
                place, value = bit // 8, pristine[bit // 8] ^ (1 << bit % 8)
                _overwrite(path, place, value, number)
                before = cache.stats()
                origin.read(cache)
                after = cache.stats()
                seen = (after.corrupt - before.corrupt, after.misses - before.misses)
                if place < HEADER_BYTES + size:
                    assert seen == (1, 1), f"{tier}: bit {bit} was not told: {seen}"
                    assert path.read_bytes() == pristine, f"{tier}: bit {bit} was not healed"
                    told += 1
                else:
                    assert seen == (0, 0), f"{tier}: bit {bit} of the padding: {seen}"
                    _overwrite(path, place, pristine[place], number)
                    harmless += 1
            _require_clean(root, used_bytes=after.ram_bytes + after.disk_bytes)
    return {"told and healed": told, "harmless, in the padding behind the payload": harmless}


def _overwrite(path: Path, place: int, value: int, number: int) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.pwrite(fd, bytes([value]), place)
    finally:
        os.close(fd)
    os.utime(path, ns=(0, 10**18 + number * 10**9))  # another time for each, whatever the clock's ticks are


# --- disks that fail, real or not ---------------------------------------------------------------------------------------


def small_shared_memory(disk: Disk) -> Facts:
    """A container's 64 MiB under a job that asks for 1 GiB and reads twice as much as there is."""
    with TemporaryDirectory() as name:
        origin = Origin(Path(name), 128, disk.size_bytes // 64)
        before = counters.snapshot()
        with disk.there():
            for eviction in ("keep", "sieve"):
                with TieredCache(ram="1GiB", ram_path=disk.tier, eviction=eviction) as cache:
                    origin.read(cache)
                    origin.read(cache, reversed(origin.blocks))
                    stats = cache.stats()
                    if disk.real:
                        assert stats.ram_bytes <= stats.ram_capacity_bytes <= 0.8 * disk.size_bytes
                    assert stats.ram_hits > 0 and stats.misses < 2 * len(origin.blocks)
                    cache.clear()
                    with disk.full():  # what fits by our count does not fit: space is taken before it is mapped
                        origin.read(cache)
                    _require_clean(disk.tier, cache.stats().ram_bytes)
        return {"MiB": disk.size_bytes // MIB, "degraded": _degraded_since(before)}


def full_directory(disk: Disk) -> Facts:
    """A disk without a free byte: blocks pass through, and are kept again as soon as there is room."""
    with TemporaryDirectory() as name:
        origin = Origin(Path(name), 8, 100_000)
        before = counters.snapshot()
        with disk.there(), TieredCache(ram=0, disk=disk.tier, disk_capacity="1GiB") as cache:
            origin.read(cache, origin.blocks[:2])
            with disk.full():
                origin.read(cache)
                assert cache.stats().pass_through == 6
                _require_clean(disk.tier, cache.stats().disk_bytes)
            degraded = _degraded_since(before)
            assert degraded >= 6
            origin.read(cache)
            assert len(_files(disk.tier)) == 8, "room that came back is not used"
            _require_clean(disk.tier, cache.stats().disk_bytes)
        return {"degraded": degraded}


def read_only_directory(disk: Disk) -> Facts:
    """A cache that is opened there goes without the tier; in one that was open, hits go on and misses pass through."""
    with TemporaryDirectory() as name:
        origin = Origin(Path(name), 6, 10_000)
        before = counters.snapshot()
        with disk.there():

            def open_cache() -> TieredCache:
                return TieredCache(ram=0, disk=disk.tier, disk_capacity=MIB)

            with open_cache() as cache:
                origin.read(cache, origin.blocks[:3])
            with disk.read_only(), open_cache() as cache:
                origin.read(cache)
                assert cache.stats().disk_capacity_bytes == 0
            with open_cache() as cache:
                fetched = origin.fetched
                if not disk.real:  # a kernel makes nothing read-only that is open for writing
                    with disk.read_only():
                        origin.read(cache)
                        assert origin.fetched == fetched + 3, "what is there must be a hit"
                origin.read(cache)
                _require_clean(disk.tier, cache.stats().disk_bytes)
        return {"degraded": _degraded_since(before)}


ON_DISKS: dict[str, tuple[Callable[[Disk], Facts], int]] = {
    "small shared memory": (small_shared_memory, 64 * MIB),
    "full directory": (full_directory, 16 * MIB),
    "read-only directory": (read_only_directory, 16 * MIB),
}
"""Scenarios and the size of the file system that each wants."""


def mounted(directory: Path, *, divisor: int = 1) -> list[Outcome]:
    """The scenarios on real file systems, in a process with mounts of its own; one outcome says so where it gets none.

    A small form divides their sizes by `divisor`.
    """
    program = "from tests.faults.directories import main; main()"
    command = [sys.executable, "-c", program, str(directory), str(divisor)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    began = time.monotonic()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if done.returncode:
        text = f"exit {done.returncode}: {done.stdout}"
        return [Outcome(scenario="mounted", seconds=time.monotonic() - began, violation=text)]
    found = json.loads(done.stdout)
    if "refused" in found:
        return [Outcome(scenario="mounted", seconds=0.0, facts={"not tried, no mounts here": found["refused"]})]
    return [Outcome(**outcome) for outcome in found["outcomes"]]


def main() -> None:
    """The process with mounts of its own: they are gone when it ends, however it ends."""
    directory, divisor = Path(sys.argv[1]), int(sys.argv[2])
    directory.mkdir(parents=True)
    try:
        make_mounts_private()
        probe = directory / "probe"
        probe.mkdir()
        mount(probe, "size=1m")
    except OSError as error:
        print(json.dumps({"refused": str(error)}))
        return
    logging.getLogger("stoker").setLevel(logging.CRITICAL)
    outcomes = []
    for name, (scenario, size_bytes) in ON_DISKS.items():
        mounted = partial(_on_a_mount, scenario, size_bytes // divisor)
        outcomes.append(tried(f"{name}, mounted", mounted, directory / name.replace(" ", "-")))
    print(json.dumps({"outcomes": [asdict(outcome) for outcome in outcomes]}))


def _on_a_mount(scenario: Callable[[Disk], Facts], size_bytes: int, directory: Path) -> Facts:
    return scenario(MountedDisk(directory, size_bytes))


def _simulated(name: str) -> Callable[[Path], Facts]:
    scenario, size_bytes = ON_DISKS[name]

    def run(directory: Path) -> Facts:
        return scenario(Disk(directory, size_bytes // 8))

    run.__name__ = name.replace(" ", "_").replace("-", "_")
    return run


# --- directories that change hands ------------------------------------------------------------------------------------


def vanishing_directory(directory: Path) -> Facts:
    """The directory is removed, again and again, under threads of two caches."""
    origin, tier = Origin(directory / "origin", 12, 20_000), directory / "tier"
    removed = 0

    def open_cache() -> TieredCache:
        return TieredCache(ram=0, disk=tier, disk_capacity=MIB, eviction="sieve")

    def reader(number: int) -> None:
        for turn in range(4):  # each turn finds, or makes, a directory
            with open_cache() as cache:
                for _ in range(6):
                    origin.read(cache, random.Random(number * 100 + turn).sample(origin.blocks, 12))

    with ThreadPoolExecutor(3) as pool:
        readers = [pool.submit(reader, number) for number in range(3)]
        while not all(one.done() for one in readers):
            shutil.rmtree(tier, ignore_errors=True)
            removed += 1
        for one in readers:
            one.result()
    shutil.rmtree(tier, ignore_errors=True)
    with open_cache() as cache:
        origin.read(cache)
        fetched = origin.fetched
        origin.read(cache)
        assert origin.fetched == fetched, "a new directory is not used"
        _require_clean(tier, cache.stats().disk_bytes)
    return {"times removed": removed}


def jobs_with_different_limits(directory: Path) -> Facts:
    """The first one's limit binds until all have closed; nobody exceeds it."""
    origin, tier = Origin(directory / "origin", 20, 8_192), directory / "tier"
    file = 8_192 + HEADER_BYTES
    limits = []
    for first, second in ((5, 50), (50, 5)):
        with (
            TieredCache(ram=0, disk=tier, disk_capacity=first * file, eviction="sieve") as one,
            TieredCache(ram=0, disk=tier, disk_capacity=second * file, eviction="sieve") as two,
        ):
            one.clear()
            for cache in (two, one):
                origin.read(cache)
                stats = cache.stats()
                assert stats.disk_capacity_bytes == first * file
                assert stats.disk_bytes == min(first, 20) * file
            _require_clean(tier, stats.disk_bytes)
            limits.append(stats.disk_capacity_bytes)
    # What is there may be more than the next one's limit: nothing is added, and with room made it is kept to.
    with TieredCache(ram=0, disk=tier, disk_capacity=3 * file, eviction="sieve") as small:
        origin.read(small)
        assert small.stats().disk_bytes <= 20 * file
    return {"limits in force": limits}


_OUTLIVED = """
import os, sys, threading
from pathlib import Path
from stoker.storage import TieredCache
from tests.faults.directories import MIB, Origin

origin = Origin(Path(sys.argv[1]), 8, 10_000)
cache = TieredCache(ram=0, disk=sys.argv[2], disk_capacity=4 * 16_384, eviction="sieve")
held = cache.get(origin, origin.blocks[0])
fetching = threading.Event()

class Stuck(Origin):
    def __init__(self): self.__dict__.update(origin.__dict__)
    def get(self, *args, **kwargs):
        fetching.set()
        threading.Event().wait()

threading.Thread(target=lambda: cache.get(Stuck(), origin.blocks[1]), daemon=True).start()
fetching.wait()
if os.fork() == 0:
    print("forked", flush=True)
    sys.stdin.readline()
    origin.read(cache)
    print("read", cache.stats().disk_bytes, flush=True)
    sys.stdin.readline()
    os._exit(0)
threading.Event().wait()
"""


def worker_that_outlives_its_parent(directory: Path) -> Facts:
    """A parent is killed while it fetches a block and has another in use; its forked worker and everybody else go on."""
    origin, tier = Origin(directory / "origin", 8, 10_000), directory / "tier"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, "-W", "ignore", "-c", _OUTLIVED, str(directory / "origin"), str(tier)]
    parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    assert parent.stdin is not None and parent.stdout is not None
    try:
        assert parent.stdout.readline() == "forked\n"
        os.kill(parent.pid, signal.SIGKILL)
        parent.wait()
        with TieredCache(ram=0, disk=tier, disk_capacity=MIB, eviction="sieve") as alone:
            # The worker has not touched the cache since: it keeps none of its parent's locks, so we are the only one.
            assert alone.stats().disk_capacity_bytes == MIB
            began = time.monotonic()
            origin.read(alone, [origin.blocks[1], *origin.blocks])
            seconds = time.monotonic() - began
            parent.stdin.write("go\n")
            parent.stdin.flush()
            assert parent.stdout.readline().startswith("read ")
            origin.read(alone)
        with TieredCache(ram=0, disk=tier, disk_capacity=2 * MIB) as late:
            assert late.stats().disk_capacity_bytes == MIB, "the worker that lives has the directory open"
    finally:
        parent.stdin.close()  # the worker reads the end of its input and leaves
        parent.stdout.read()
        parent.stdout.close()
        if parent.poll() is None:
            parent.kill()
            parent.wait()
    return {"first read after s": round(seconds, 3)}


def locks_that_fail(directory: Path) -> Facts:
    """A network file system without a lock service: no tier, or from then on none, and right bytes."""
    origin, tier = Origin(directory / "origin", 10, 10_000), directory / "tier"
    before = counters.snapshot()
    with FaultyTier(tier) as faulty:
        with TieredCache(ram=0, disk=tier, disk_capacity=MIB, eviction="sieve") as cache:
            origin.read(cache, origin.blocks[:3])
            rule = faulty.add(TierFault("no_locks"))
            origin.read(cache)
            fetched = origin.fetched
            origin.read(cache, origin.blocks[:3])
            assert origin.fetched == fetched, "what is there must be a hit"
            with TieredCache(ram=0, disk=tier, disk_capacity=MIB) as late:
                origin.read(late)
                assert late.stats().disk_capacity_bytes == 0
        rule.remove()
        with TieredCache(ram=0, disk=tier, disk_capacity=MIB) as again:
            origin.read(again)
            _require_clean(tier, again.stats().disk_bytes)
    return {"refused locks": rule.hits, "degraded": _degraded_since(before)}


def locks_that_mean_nothing(directory: Path) -> Facts:
    """Every lock is granted to everybody: counts may go wrong, bytes may not, and the next start puts things right."""
    origin, tier = Origin(directory / "origin", 16, 20_000), directory / "tier"
    capacity = 8 * (5 * 4096 + HEADER_BYTES)

    def reader(number: int) -> None:
        with TieredCache(ram=0, disk=tier, disk_capacity=capacity, eviction="sieve") as cache:
            chance = random.Random(number)
            for _ in range(150):
                origin.read(cache, [origin.blocks[min(chance.randrange(16), chance.randrange(16))]])

    with FaultyTier(tier) as faulty:
        rule = faulty.add(TierFault("false_locks"))
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(reader, number) for number in range(4)]:
                done.result()
    with TieredCache(ram=0, disk=tier, disk_capacity=capacity, eviction="sieve") as again:
        _require_clean(tier, again.stats().disk_bytes)
        origin.read(again)
        assert again.stats().disk_bytes <= max(capacity, again.stats().disk_capacity_bytes)
    return {"locks granted": rule.hits}


def disk_that_fails_and_is_slow(directory: Path) -> Facts:
    """One call in ten is an I/O error, one block in ten comes back damaged, reads take their time."""
    origin, tier = Origin(directory / "origin", 20, 10_000), directory / "tier"
    before = counters.snapshot()
    with FaultyTier(tier, seed=3) as faulty:
        for _ in range(12):  # a tier that failed once writes no more: each start tries again
            with TieredCache(ram=0, disk=tier, disk_capacity=MIB) as cache:
                faulty.add(TierFault("flip"), path="blocks/", probability=0.1)
                faulty.add(TierFault("error"), path="blocks/", probability=0.1)
                faulty.add(TierFault("error"), path="tmp/", probability=0.02)
                faulty.add(TierFault("delay", delay_s=0.002), calls=("read",), path="blocks/", probability=0.2)
                origin.read(cache)
                origin.read(cache)
                faulty.clear()
        with TieredCache(ram=0, disk=tier, disk_capacity=MIB) as cache:
            origin.read(cache)
            _require_clean(tier, cache.stats().disk_bytes)
    counted = counters.since(before)
    assert counted["cache.disk.corrupt"] > 0 and counted["cache.degraded"] > 0
    return {"corrupt": int(counted["cache.disk.corrupt"]), "degraded": int(counted["cache.degraded"])}


SCENARIOS: tuple[Callable[[Path], Facts], ...] = (
    *(_simulated(name) for name in ON_DISKS),
    vanishing_directory,
    jobs_with_different_limits,
    worker_that_outlives_its_parent,
    locks_that_fail,
    locks_that_mean_nothing,
    disk_that_fails_and_is_slow,
)
"""Those that run everywhere."""
