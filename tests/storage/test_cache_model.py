"""The cache beside a dictionary with a capacity: whatever is asked, damaged or removed, they agree."""

import os
import random
import shutil
import tempfile
from pathlib import Path
from typing import Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from stoker.storage import Block, TieredCache, cache
from stoker.storage._checksums import crc32c
from stoker.storage.local import LocalStore

SIZES = [1, 4096, 4097, 9000, 20_000, 3000, 8192, 12_288]
CAPACITY = {"ram": 40_000, "disk": 50_000}
Kind = Literal["ram", "disk"]


class Origin(LocalStore):
    fetched = 0

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        self.fetched += 1
        return super().get(key, start, end, version=version)


def file_size(size: int) -> int:
    return 4096 + -(-size // 4096) * 4096


class CacheMachine(RuleBasedStateMachine):
    numbers = st.integers(0, len(SIZES) - 1)
    sides = st.integers(0, 1)

    @initialize()
    def start(self) -> None:
        # With one thread the order of prefetches, which decides who finds room, is the order that they were asked in.
        self.threads, cache._PREFETCH_THREADS = cache._PREFETCH_THREADS, 1
        self.directory = Path(tempfile.mkdtemp(prefix="stoker-model-"))
        self.origin = Origin(self.directory / "origin")
        data = random.Random(0).randbytes(sum(SIZES))
        self.origin.put("object", data)
        self.want, self.blocks = [], []
        for number, size in enumerate(SIZES):
            start = sum(SIZES[:number])
            self.want.append(data[start : start + size])
            crc = crc32c(self.want[-1])
            self.blocks.append(Block(key="object", version="1", start=start, end=start + size, crc32c=crc))
        # The model: where each block is, what the tiers count, what each cache holds for want of room.
        self.where: dict[int, Kind] = {}
        self.damaged: set[int] = set()
        self.used: dict[Kind, int] = {"ram": 0, "disk": 0}
        self.held: list[set[int]] = [set(), set()]
        self.corrupt = [0, 0]
        self.fetched = 0
        self.open()

    def open(self) -> None:
        """Two caches on the same tiers, as two processes would have them."""
        self.caches = [
            TieredCache(
                ram=CAPACITY["ram"],
                ram_path=self.directory / "ram",
                disk=self.directory / "disk",
                disk_capacity=CAPACITY["disk"],
            )
            for _ in range(2)
        ]

    def teardown(self) -> None:
        cache._PREFETCH_THREADS = self.threads
        for one in self.caches:
            one.close()
        shutil.rmtree(self.directory)

    def expect_load(self, side: int, number: int) -> bool:
        """What bringing in a block does to the model; whether a tier has it afterwards."""
        if number in self.where and number not in self.damaged:
            return True
        size = file_size(SIZES[number])
        if number in self.damaged:
            self.damaged.discard(number)
            self.used[self.where.pop(number)] -= size
            self.corrupt[side] += 1
        self.fetched += 1
        kinds: tuple[Kind, Kind] = ("ram", "disk")
        for kind in kinds:
            if self.used[kind] + size <= CAPACITY[kind]:
                self.used[kind] += size
                self.where[number] = kind
                return True
        return False

    @rule(side=sides, number=numbers)
    def get(self, side: int, number: int) -> None:
        if number in self.where and number not in self.damaged:
            pass
        elif number in self.held[side] and number not in self.where:
            self.held[side].discard(number)
        else:
            # A damaged copy is found first; only then is what a prefetch holds looked for.
            if number in self.held[side] and number in self.damaged:
                self.damaged.discard(number)
                self.used[self.where.pop(number)] -= file_size(SIZES[number])
                self.corrupt[side] += 1
                self.held[side].discard(number)
            else:
                self.expect_load(side, number)
        assert self.caches[side].get(self.origin, self.blocks[number]) == self.want[number]

    @rule(side=sides, chosen=st.lists(numbers, max_size=4))
    def prefetch(self, side: int, chosen: list[int]) -> None:
        tested = self.caches[side]
        for number in dict.fromkeys(chosen):
            if number not in self.held[side] and not self.expect_load(side, number):
                self.held[side].add(number)
        tested.prefetch(self.origin, [self.blocks[number] for number in chosen])
        with tested._lock:
            tested._lock.wait_for(lambda: not tested._queue and not tested._flights)

    @rule(number=numbers, where=st.integers(0, 2**20), bit=st.integers(0, 7))
    def flip_a_bit(self, number: int, where: int, bit: int) -> None:
        path = self.path(number)
        if path is None or number in self.damaged:  # the same bit twice would heal it
            return
        data = bytearray(path.read_bytes())
        # Behind the text of the header and behind the payload there is padding that means nothing.
        used = [*range(48), *range(4096, 4096 + SIZES[number])]
        data[used[where % len(used)]] ^= 1 << bit
        damaged = path.with_name("damaged")
        damaged.write_bytes(data)
        os.replace(damaged, path)
        self.damaged.add(number)

    @rule(number=numbers)
    def lose_a_file(self, number: int) -> None:
        path = self.path(number)
        if path is not None:
            path.unlink()  # the count stays as it is until someone counts anew: fuller than it is, never emptier
            del self.where[number]
            self.damaged.discard(number)

    def path(self, number: int) -> Path | None:
        if number not in self.where:
            return None
        name = cache._block_file(self.origin, self.blocks[number]).name
        path = self.directory / self.where[number] / "blocks" / name[:2] / name
        assert path.exists()
        return path

    @rule()
    def clear(self) -> None:
        expected = sum(file_size(SIZES[number]) for number in self.where)
        assert self.caches[0].clear() == expected
        for number, kind in self.where.items():
            self.used[kind] -= file_size(SIZES[number])
        self.where.clear()
        self.damaged.clear()

    @rule()
    def restart(self) -> None:
        for one in self.caches:
            one.close()
        self.open()
        self.held, self.corrupt = [set(), set()], [0, 0]
        self.used = {"ram": 0, "disk": 0}
        for number, kind in self.where.items():
            self.used[kind] += file_size(SIZES[number])

    @invariant()
    def they_agree(self) -> None:
        if not hasattr(self, "caches"):
            return
        assert self.origin.fetched == self.fetched
        for side, tested in enumerate(self.caches):
            stats = tested.stats()
            assert (stats.ram_bytes, stats.disk_bytes) == (self.used["ram"], self.used["disk"])
            assert stats.ram_bytes <= CAPACITY["ram"] and stats.disk_bytes <= CAPACITY["disk"]
            assert stats.corrupt == self.corrupt[side]
            assert stats.prefetch_bytes == sum(SIZES[number] for number in self.held[side])
        kinds: tuple[Kind, Kind] = ("ram", "disk")
        for kind in kinds:
            found = sum(path.stat().st_size for path in (self.directory / kind / "blocks").glob("*/*"))
            assert found == sum(file_size(SIZES[number]) for number, at in self.where.items() if at == kind)
            assert found <= self.used[kind]


TestCacheModel = CacheMachine.TestCase
TestCacheModel.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
