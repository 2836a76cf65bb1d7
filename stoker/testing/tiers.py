"""The contract of a cache's tier as tests: what a directory on any file system must keep to serve as one.

::

    class TestMyFileSystem(TierTests):
        kind = "disk"                        # or "ram", where it is memory

        @pytest.fixture
        def directory(self, tmp_path):
            return Path("/mnt/mine") / tmp_path.name     # missing or empty, one of its own for each test

A tier of another make is tested by overriding :meth:`TierTests.open_cache` as well. What no file system promises, that
bytes stay what they were, is damaged here on purpose, by hand and by :class:`~stoker.testing.FaultyTier`.
"""

import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import pytest

from ..storage import Block, TieredCache
from ..storage._checksums import crc32c
from ..storage.local import LocalStore
from .faulty_tier import FaultyTier, TierCrash, TierFault

__all__ = ["TierOrigin", "TierTests"]

SIZE = 20_000
FILE = 4096 + 5 * 4096
"""What a block of :data:`SIZE` takes of the capacity: its header, and itself in whole pages."""


class TierOrigin(LocalStore):
    """Blocks of one size in one object, and how often one was asked for."""

    def __init__(self, root: Path, count: int) -> None:
        super().__init__(root)
        self.data = random.Random(count).randbytes(count * SIZE)
        self.put("object", self.data)
        self.fetched = 0
        self.blocks = [
            Block(key="object", version="1", start=at, end=at + SIZE, crc32c=crc32c(self.data[at : at + SIZE]))
            for at in range(0, count * SIZE, SIZE)
        ]

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        self.fetched += 1
        return super().get(key, start, end, version=version)

    def read(self, cache: TieredCache, *numbers: int) -> int:
        """Read blocks, all by default, compare every byte, and return how many had to be fetched."""
        before = self.fetched
        for number in numbers or range(len(self.blocks)):
            block = self.blocks[number]
            assert cache.get(self, block) == self.data[block.start : block.end]
        return self.fetched - before


class TierTests:
    """Subclass it, override :meth:`directory`, name the subclass ``Test…``.

    Attributes:
        kind: ``"disk"``: blocks are synced before they have a name, and read, not mapped, when they are checked;
            ``"ram"``: neither.
    """

    kind: Literal["ram", "disk"] = "disk"

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        """Where the tier is to be: missing or empty, on the file system that is tested."""
        raise NotImplementedError

    def open_cache(
        self, directory: Path, *, capacity_bytes: int, eviction: Literal["keep", "sieve"] = "keep"
    ) -> TieredCache:
        """A cache with this tier and no other."""
        if self.kind == "ram":
            return TieredCache(ram=capacity_bytes, ram_path=directory, eviction=eviction)
        return TieredCache(ram=0, disk=directory, disk_capacity=capacity_bytes, eviction=eviction)

    @pytest.fixture
    def origin(self, tmp_path: Path) -> TierOrigin:
        """Twelve blocks."""
        return TierOrigin(tmp_path / "origin", 12)

    def used_bytes(self, cache: TieredCache) -> int:
        """What the tier counts, of all its users."""
        stats = cache.stats()
        return stats.ram_bytes if self.kind == "ram" else stats.disk_bytes

    def _files(self, directory: Path) -> list[Path]:
        return sorted(path for path in (directory / "blocks").glob("*/*") if path.is_file())

    def _require_clean(self, directory: Path, cache: TieredCache) -> None:
        assert list((directory / "tmp").iterdir()) == []
        assert self.used_bytes(cache) == sum(path.stat().st_size for path in self._files(directory))

    # -- keeping

    def test_a_block_is_fetched_once_and_then_served(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            assert [origin.read(cache), origin.read(cache)] == [12, 0]
            assert self.used_bytes(cache) == 12 * FILE
            self._require_clean(directory, cache)

    def test_blocks_are_there_for_other_caches_and_later_ones(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            origin.read(cache)
            with pickle.loads(pickle.dumps(cache)) as other:
                assert origin.read(other) == 0
        with self.open_cache(directory, capacity_bytes=20 * FILE) as later:
            assert origin.read(later) == 0
            self._require_clean(directory, later)

    def test_a_view_is_read_only_and_outlives_block_cache_and_name(self, directory: Path, origin: TierOrigin) -> None:
        cache = self.open_cache(directory, capacity_bytes=20 * FILE)
        view = cache.get(origin, origin.blocks[0])
        assert view.readonly and view.format == "B" and view.contiguous
        assert cache.clear() == FILE
        cache.close()
        assert view == origin.data[:SIZE]

    def test_the_directory_is_closed_to_others(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            origin.read(cache, 0)
        assert directory.stat().st_mode & 0o777 == 0o700
        assert {path.stat().st_mode & 0o077 for path in directory.rglob("*") if path.name != "CACHEDIR.TAG"} == {0}

    def test_what_someone_else_put_there_is_not_counted_and_not_touched(
        self, directory: Path, origin: TierOrigin
    ) -> None:
        with self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve") as cache:
            origin.read(cache, 0)
            foreign = [directory / "notes", directory / "tmp" / "mine", self._files(directory)[0].parent / "other"]
            for path in foreign:
                path.write_bytes(bytes(10 * FILE))
            origin.read(cache)
            assert self.used_bytes(cache) == 3 * FILE
            cache.clear()
        with self.open_cache(directory, capacity_bytes=3 * FILE) as cache:
            assert self.used_bytes(cache) == 0
        assert all(path.stat().st_size == 10 * FILE for path in foreign)

    # -- capacity

    def test_a_full_tier_keeps_what_it_has(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=5 * FILE + FILE - 1) as cache:
            assert [origin.read(cache), origin.read(cache)] == [12, 7]
            assert self.used_bytes(cache) == 5 * FILE
            self._require_clean(directory, cache)

    def test_a_full_tier_that_evicts_makes_room_for_each(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=5 * FILE, eviction="sieve") as cache:
            for number in range(12):
                origin.read(cache, number)
                assert origin.read(cache, number) == 0
                assert self.used_bytes(cache) <= 5 * FILE
            self._require_clean(directory, cache)

    def test_a_block_in_use_is_not_evicted_by_another_cache(self, directory: Path, origin: TierOrigin) -> None:
        with (
            self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve") as one,
            self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve") as two,
        ):
            held = one.get(origin, origin.blocks[0])
            origin.read(two, *range(1, 12))
            assert origin.read(two, 0) == 0
            del held

    def test_the_first_limit_binds_until_all_have_closed(self, directory: Path, origin: TierOrigin) -> None:
        with (
            self.open_cache(directory, capacity_bytes=2 * FILE) as first,
            self.open_cache(directory, capacity_bytes=9 * FILE) as second,
        ):
            origin.read(second)
            origin.read(first)
            assert self.used_bytes(second) == 2 * FILE
        with self.open_cache(directory, capacity_bytes=9 * FILE) as third:
            origin.read(third)
            assert self.used_bytes(third) == 9 * FILE

    # -- damage

    @pytest.mark.parametrize("where", [0, 20, 60, 4095, 4096, 4096 + SIZE - 1])
    def test_a_flipped_bit_is_a_miss_and_healed(self, directory: Path, origin: TierOrigin, where: int) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache, FaultyTier(directory) as faulty:
            origin.read(cache, 0)
            rule = faulty.add(TierFault("flip", at_byte=where), path="blocks/", times=1)
            assert origin.read(cache, 0) == 1
            assert (rule.hits, cache.stats().corrupt) == (1, 1)
            assert origin.read(cache, 0) == 0
            self._require_clean(directory, cache)

    @pytest.mark.parametrize("size", [0, 100, FILE - 4096, FILE + 4096])
    def test_a_block_of_another_length_is_a_miss_and_healed(
        self, directory: Path, origin: TierOrigin, size: int
    ) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            origin.read(cache, 0)
            os.truncate(self._files(directory)[0], size)
            assert [origin.read(cache, 0), origin.read(cache, 0)] == [1, 0]
            assert cache.stats().corrupt == 1

    def test_a_block_under_the_name_of_another_is_a_miss(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            origin.read(cache, 0, 1)
        one, two = self._files(directory)
        one.write_bytes(two.read_bytes())
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            assert origin.read(cache, 0, 1) == 1

    # -- what fails

    def _survives(self, directory: Path, origin: TierOrigin, fault: TierFault, *, path: str | None = None) -> None:
        """Right bytes while the fault lasts, with nothing left or counted; and a working tier after a new start."""
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache, FaultyTier(directory) as faulty:
            origin.read(cache, 0, 1)
            rule = faulty.add(fault, path=path)
            origin.read(cache)
            assert rule.hits > 0
            faulty.clear()
            origin.read(cache)
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            origin.read(cache)
            assert origin.read(cache) == 0
            self._require_clean(directory, cache)

    def test_a_full_device_costs_no_byte_and_leaves_nothing(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache, FaultyTier(directory) as faulty:
            origin.read(cache, 0)
            faulty.add(TierFault("full"))
            assert origin.read(cache) == 11
            self._require_clean(directory, cache)
            faulty.clear()
            assert [origin.read(cache), origin.read(cache)] == [11, 0]

    @pytest.mark.parametrize("part", ["blocks/", "tmp/"])
    def test_a_failing_device_costs_no_byte(self, directory: Path, origin: TierOrigin, part: str) -> None:
        self._survives(directory, origin, TierFault("error"), path=part)

    def test_a_device_that_becomes_read_only_costs_no_byte(self, directory: Path, origin: TierOrigin) -> None:
        self._survives(directory, origin, TierFault("read_only"))

    def test_a_directory_that_vanishes_costs_no_byte(self, directory: Path, origin: TierOrigin) -> None:
        self._survives(directory, origin, TierFault("vanish"), path="tmp/")

    def test_locks_that_fail_cost_no_byte(self, directory: Path, origin: TierOrigin) -> None:
        self._survives(directory, origin, TierFault("no_locks"))

    # -- threads, processes, deaths

    def test_threads_of_two_caches_fill_and_evict_together(self, directory: Path, origin: TierOrigin) -> None:
        with (
            self.open_cache(directory, capacity_bytes=4 * FILE, eviction="sieve") as one,
            self.open_cache(directory, capacity_bytes=4 * FILE, eviction="sieve") as two,
        ):

            def work(seed: int) -> None:
                chance = random.Random(seed)
                for _ in range(60):
                    origin.read((one, two)[seed % 2], chance.randrange(12))
                    assert self.used_bytes(one) <= 4 * FILE

            with ThreadPoolExecutor(4) as pool:
                for done in [pool.submit(work, seed) for seed in range(4)]:
                    done.result()
            self._require_clean(directory, one)

    @pytest.mark.parametrize("calls", range(0, 12, 3))
    @pytest.mark.parametrize("beside", [True, False], ids=["beside another", "alone"])
    def test_whatever_a_dead_process_was_doing_the_next_start_is_clean(
        self, directory: Path, origin: TierOrigin, calls: int, beside: bool
    ) -> None:
        with self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve") as cache:
            origin.read(cache, 0, 1, 2)
        other = self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve") if beside else None
        dying = self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve")
        with FaultyTier(directory) as faulty:
            faulty.add(TierFault("crash"), after=calls)
            with pytest.raises(TierCrash):
                origin.read(dying, 5, 6, 7)
            faulty.clear()
            dying.close()  # closes descriptors, as the kernel would, and does no more
        if other is not None:
            with other:
                assert self.used_bytes(other) >= sum(path.stat().st_size for path in self._files(directory))
                origin.read(other)
                with self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve"):
                    assert list((directory / "tmp").iterdir()) == []
        with self.open_cache(directory, capacity_bytes=3 * FILE, eviction="sieve") as cache:
            self._require_clean(directory, cache)
            origin.read(cache)

    def test_a_killed_process_leaves_no_lock(self, directory: Path, origin: TierOrigin) -> None:
        with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
            pickled = pickle.dumps((cache, origin.root, origin.blocks[3]))
        process = subprocess.Popen(
            [sys.executable, "-c", _STUCK], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(len(pickled).to_bytes(8, "little") + pickled)
            process.stdin.flush()
            assert process.stdout.readline() == b"fetching\n"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        done = threading.Event()

        def read() -> None:
            with self.open_cache(directory, capacity_bytes=20 * FILE) as cache:
                origin.read(cache, 3)
            done.set()

        thread = threading.Thread(target=read)
        thread.start()
        assert done.wait(5), "a dead process holds up the others"
        thread.join()


_STUCK = """
import pickle, sys, threading
from stoker.storage.local import LocalStore
size = int.from_bytes(sys.stdin.buffer.read(8), "little")
cache, root, block = pickle.loads(sys.stdin.buffer.read(size))
class Stuck(LocalStore):
    def get(self, *args, **kwargs):
        print("fetching", flush=True)
        threading.Event().wait()
cache.get(Stuck(root), block)
"""
