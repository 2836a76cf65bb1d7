"""Trial "caching": processes that fill and evict the two tiers of one cache directory, killed at any moment.

A life is three processes that read the same blocks: one that opened the cache, one that it forked then, one of its own;
the last is killed by the first in mid-work as well. All compare every byte, and none may wait for a dead one. After each
kill: what stands under a name is whole, the tiers are within their capacity, and the count was never below what is there.
A cache that was open meanwhile in another process goes on; the next sole opener finds no leftovers and counts exactly.
"""

import os
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Literal, NoReturn

from stoker.storage import Block, CacheStats, TieredCache
from stoker.storage._checksums import crc32c
from stoker.storage.local import LocalStore
from stoker.testing.kill import Death, Recorder, Trial

Eviction = Literal["sieve", "plan"]
EVICTIONS: tuple[Eviction, ...] = ("sieve", "plan")
CAPACITY = {"ram": 150_000, "disk": 200_000}
HELD_UP_S = 15.0
"""Thrice what I6 allows for a dead process: a wait that ends by that deadline may take longer on a busy machine."""

_SIZES = [1, 4096, 4097, 100, 40_000, 9_000, 20_000, 3_000, 8_192, 12_288, 33_000, 5_000] * 2
_READS = 12
_REAL = {name: getattr(os, name) for name in dir(os) if callable(getattr(os, name))}
"""As they were imported: a life counts the calls of its first process alone."""


@cache
def _data() -> bytes:
    return random.Random(5).randbytes(sum(_SIZES))


@cache
def blocks() -> list[Block]:
    """Of one object, of many sizes."""
    found, start = [], 0
    for size in _SIZES:
        crc = crc32c(_data()[start : start + size])
        found.append(Block(key="object", version="1", start=start, end=start + size, crc32c=crc))
        start += size
    return found


def make_origin(root: Path) -> LocalStore:
    store = LocalStore(root)
    store.put("object", _data())
    return store


def open_cache(root: Path, eviction: Eviction) -> TieredCache:
    return TieredCache(
        ram=CAPACITY["ram"],
        ram_path=root / eviction / "ram",
        disk=root / eviction / "disk",
        disk_capacity=CAPACITY["disk"],
        eviction=eviction,
    )


def read(cache: TieredCache, origin: LocalStore, chosen: Sequence[Block], *, by_plan: bool = False) -> None:
    """Read blocks, two of them in use at any time: right bytes, without waiting, within the capacity."""
    reader = cache.reader()
    if by_plan:
        reader.publish(origin, chosen, range(len(chosen)), lasts=1.0)
    held: list[memoryview] = []
    for number, block in enumerate(chosen):
        reader.advance(number)
        began = time.monotonic()
        held = [*held[-1:], cache.get(origin, block)]
        seconds = time.monotonic() - began
        assert held[-1] == _data()[block.start : block.end], f"wrong bytes for [{block.start}, {block.end})"
        assert seconds < HELD_UP_S, f"a read was held up for {seconds:.1f} s"
        _check_counts(cache.stats())
    reader.forget()


def _check_counts(stats: CacheStats) -> None:
    for tier, found in (("ram", stats.ram_bytes), ("disk", stats.disk_bytes)):
        assert found <= CAPACITY[tier], f"{found} bytes are counted in the {tier} tier of {CAPACITY[tier]}"


def _some_blocks(count: int) -> list[Block]:
    """The first ones more often, so that SIEVE has something to keep."""
    chance = random.Random()
    return [blocks()[min(chance.randrange(len(_SIZES)), chance.randrange(len(_SIZES)))] for _ in range(count)]


def work(directory: Path, recorder: Recorder) -> None:
    """A job on each of two caches, one that evicts what was not read of late, and one that follows plans."""
    for eviction in EVICTIONS:
        _job(directory, eviction, recorder)


def _job(directory: Path, eviction: Eviction, recorder: Recorder) -> None:
    origin = LocalStore(directory.parent / "origin")

    by_plan = eviction == "plan"

    def on_its_own() -> None:
        with open_cache(directory, eviction) as own:
            read(own, origin, _some_blocks(10 * _READS), by_plan=by_plan)

    with recorder.in_flight():
        doomed = _fork(directory, on_its_own)
        cache = open_cache(directory, eviction)
        if by_plan:
            cache.clear()  # a plan may find all that is there worth keeping, and then nothing would be written
        heir = _fork(directory, lambda: read(cache, origin, _some_blocks(_READS)))
        cache.prefetch(origin, _some_blocks(4))
        read(cache, origin, _some_blocks(_READS // 2), by_plan=by_plan)
        os.kill(doomed, signal.SIGKILL)
        read(cache, origin, _some_blocks(_READS // 2), by_plan=by_plan)
        cache.close()
        for pid, expected in ((doomed, -signal.SIGKILL), (heir, 0)):
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            assert code in (expected, 0), f"a process of the job ended with {code}"


def _fork(directory: Path, act: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        _live(directory, act)
    return pid


def _live(directory: Path, act: Callable[[], None]) -> NoReturn:
    code = 1
    try:
        for name, real in _REAL.items():
            setattr(os, name, real)
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
        (directory / f"wrong-{os.getpid()}").write_text(traceback.format_exc())
    finally:
        os._exit(code)


class Check:
    """What must hold after each kill.

    Of three kills, the first is left to the next life to recover from; the second is recovered from here; after the third,
    too, and then a cache stays open while the next life works and dies.
    """

    def __init__(self, directory: Path) -> None:
        self._origin = make_origin(directory / "origin")
        self._expected = _reference(directory / "reference", self._origin)
        self._survivors: list[tuple[Eviction, TieredCache]] = []

    def close(self) -> None:
        """Let go of what is open between two kills; only needed where a trial ended early."""
        while self._survivors:
            self._survivors.pop()[1].close()

    def __call__(self, directory: Path, death: Death) -> None:
        for path in sorted(directory.glob("wrong-*")):
            raise AssertionError(path.read_text())
        roots = [(eviction, directory / eviction) for eviction in EVICTIONS if (directory / eviction).exists()]
        for _, root in roots:
            self._check_at_rest(root)
        while self._survivors:
            eviction, survivor = self._survivors.pop()
            with survivor:
                self._check_survivor(directory, eviction, survivor)
        if death.killed and death.number % 3 == 0:
            return
        for eviction, root in roots:
            with open_cache(directory, eviction) as cache:
                assert used_bytes(cache.stats()) == present_bytes(root), f"{eviction}: leaked bytes are counted"
                assert leftovers(root) == [], f"{eviction}: {leftovers(root)} of dead processes is left"
            if death.killed and death.number % 3 == 2:
                self._survivors.append((eviction, open_cache(directory, eviction)))

    def _check_at_rest(self, root: Path) -> None:
        for path in sorted(root.glob("*/blocks/*/*")):
            assert path.name in self._expected, f"{path} is no block"
            assert path.read_bytes() == self._expected[path.name], f"{path} is torn"
        for tier, capacity in CAPACITY.items():
            found = _size(root.glob(f"{tier}/blocks/*/*")) + _size(root.glob(f"{tier}/tmp/*"))
            assert found <= capacity, f"{found} bytes are in the {tier} tier of {capacity}"

    def _check_survivor(self, directory: Path, eviction: Eviction, survivor: TieredCache) -> None:
        root = directory / eviction
        for present, counted in zip(present_bytes(root), used_bytes(survivor.stats()), strict=True):
            assert counted >= present, f"{eviction}: {counted} bytes are counted where {present} are"
        read(survivor, self._origin, [*blocks(), *_some_blocks(6)])
        with open_cache(directory, eviction) as other:
            assert leftovers(root) == [], f"{eviction}: {leftovers(root)} is left beside a process that lives"
            read(other, self._origin, _some_blocks(6))


def _reference(root: Path, origin: LocalStore) -> dict[str, bytes]:
    """Every block's file by its name, as a cache writes it in peace."""
    with TieredCache(ram=0, disk=root, disk_capacity="64MiB") as cache:
        for block in blocks():
            cache.get(origin, block)
        return {path.name: path.read_bytes() for path in root.glob("blocks/*/*")}


def used_bytes(stats: CacheStats) -> tuple[int, int]:
    return stats.ram_bytes, stats.disk_bytes


def present_bytes(root: Path) -> tuple[int, int]:
    return _size((root / "ram").glob("blocks/*/*")), _size((root / "disk").glob("blocks/*/*"))


def leftovers(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.glob("*/tmp/*"))


def _size(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def trial(directory: Path) -> Trial:
    """The trial, with its origin and the reference below `directory`."""
    return Trial(name="caching", program="tests.faults.caching:work", check=Check(directory))
