"""A cache that makes room: which blocks go, which stay, and what never happens."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.errors import ConfigError
from stoker.metrics import counters
from stoker.storage import Block, TieredCache
from tests.storage.test_cache import FILE, SIZE, Origin, content, files, make_blocks, said, tell


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin(tmp_path / "origin")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def sieve(disk: Path, blocks: int) -> TieredCache:
    """Room for so many blocks on disk, none in memory."""
    return TieredCache(ram=0, disk=disk, disk_capacity=blocks * FILE, eviction="sieve")


def read(cache: TieredCache, origin: Origin, block: Block) -> None:
    assert bytes(cache.get(origin, block)) == content(origin, block)


def test_every_newcomer_finds_room_and_the_capacity_holds(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with sieve(disk, 5) as cache:
        before = counters.snapshot()
        for block in blocks:
            read(cache, origin, block)
            assert cache.stats().disk_bytes <= 5 * FILE
        assert (len(files(disk)), cache.stats().pass_through) == (5, 0)
        assert counters.since(before)["cache.disk.evicted"] == 15
        read(cache, origin, blocks[-1])
        assert cache.stats().disk_hits == 1


def test_what_is_read_again_stays_and_what_is_not_goes(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 30)
    with sieve(disk, 5) as cache:
        for newcomer in blocks[2:]:
            read(cache, origin, blocks[0])
            read(cache, origin, blocks[1])
            read(cache, origin, newcomer)
        assert origin.fetched.count(("object", 0)) == origin.fetched.count(("object", SIZE)) == 1


def test_a_block_that_is_in_use_stays(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with sieve(disk, 3) as cache:
        held = [cache.get(origin, blocks[0]), cache.get(origin, blocks[1])]
        for block in blocks[2:]:
            read(cache, origin, block)
        for view, block in zip(held, blocks, strict=False):
            assert bytes(view) == content(origin, block)
        assert cache.stats().disk_bytes == 3 * FILE
        assert origin.fetched.count(("object", 0)) == 1
        read(cache, origin, blocks[0])
        assert origin.fetched.count(("object", 0)) == 1
        # All of it in use: the newcomer passes through.
        held.append(cache.get(origin, blocks[19]))
        read(cache, origin, blocks[5])
        assert cache.stats().pass_through == 1


HOLDER = """
import sys
from stoker.storage import Block, TieredCache, open_store
from stoker.storage._checksums import crc32c
root, tier, capacity = sys.argv[1:4]
store = open_store(root)
data = bytes(store.get("object", 0, 8192))
with TieredCache(ram=0, disk=tier, disk_capacity=int(capacity), eviction="sieve") as cache:
    view = cache.get(store, Block(key="object", version="1", start=0, end=8192, crc32c=crc32c(data)))
    print("held", flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def holder(origin: Origin, disk: Path) -> Iterator["subprocess.Popen[str]"]:
    """Another process that has the first block in use."""
    make_blocks(origin, 20)
    command = [sys.executable, "-c", HOLDER, str(origin.root), str(disk), str(3 * FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert said(process) == "held"
        yield process
        process.kill()


def test_a_block_that_another_process_has_in_use_stays_until_it_is_gone(
    origin: Origin, disk: Path, holder: "subprocess.Popen[str]"
) -> None:
    blocks = make_blocks(origin, 20)
    with sieve(disk, 3) as cache:
        for block in blocks[1:12]:
            read(cache, origin, block)
        read(cache, origin, blocks[0])
        assert ("object", 0) not in origin.fetched
    holder.kill()
    holder.wait()
    with sieve(disk, 3) as cache:  # without a memory of who was read
        for block in blocks[12:15]:
            read(cache, origin, block)
        read(cache, origin, blocks[0])
        assert origin.fetched.count(("object", 0)) == 1


def test_what_memory_evicts_is_found_on_disk(origin: Origin, disk: Path, tmp_path: Path) -> None:
    blocks = make_blocks(origin, 12)
    with TieredCache(
        ram=3 * FILE, ram_path=tmp_path / "ram", disk=disk, disk_capacity=20 * FILE, eviction="sieve"
    ) as cache:
        for _ in range(2):
            for block in blocks:
                read(cache, origin, block)
        stats = cache.stats()
        assert stats.misses == 12
        assert stats.ram_bytes == 3 * FILE and stats.disk_bytes == 12 * FILE


def test_blocks_of_an_earlier_run_and_of_other_caches_are_evicted_too(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with sieve(disk, 5) as cache:
        for block in blocks[:5]:
            read(cache, origin, block)
    with sieve(disk, 5) as cache, sieve(disk, 5) as other:
        for block in blocks[5:12]:
            read(cache, origin, block)
        for block in blocks[12:]:
            read(other, origin, block)
        for block in blocks[5:12]:
            read(cache, origin, block)
        assert len(files(disk)) == 5
        assert cache.stats().pass_through == other.stats().pass_through == 0
        assert cache.stats().disk_bytes == 5 * FILE


READER = """
import random, sys
from stoker.storage import Block, TieredCache, open_store
from stoker.storage._checksums import crc32c
root, tier, capacity, eviction, count, seed = sys.argv[1:7]
store = open_store(root)
data = bytes(store.get("object"))
chance = random.Random(seed)
edges = range(0, len(data), 8192)
blocks = [Block(key="object", version="1", start=a, end=a + 8192, crc32c=crc32c(data[a : a + 8192])) for a in edges]
with TieredCache(ram=0, disk=tier, disk_capacity=int(capacity), eviction=eviction) as cache:
    print("open", flush=True)
    sys.stdin.readline()
    held = []
    chosen = [blocks[min(chance.randrange(60), chance.randrange(60))] for _ in range(int(count))]
    reader = cache.reader()
    reader.publish(store, chosen, range(len(chosen)), final=chance.random() < 0.5)  # what the others read, it can't know
    for now, block in enumerate(chosen):
        reader.advance(now)
        held = [*held[-2:], cache.get(store, block)]
        assert held[-1] == data[block.start : block.end]
    print("done", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize(("eviction", "processes", "count"), [("sieve", 4, 300), ("plan", 8, 100)])
def test_processes_that_fill_and_evict_together_keep_to_one_capacity(
    origin: Origin, disk: Path, eviction: str, processes: int, count: int
) -> None:
    make_blocks(origin, 60)
    capacity = 30 * FILE
    command = [sys.executable, "-c", READER, str(origin.root), str(disk), str(capacity), eviction, str(count)]
    running = [
        subprocess.Popen([*command, str(seed)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for seed in range(processes)
    ]
    try:
        assert [said(process) for process in running] == ["open"] * processes
        with sieve(disk, 30) as watcher:
            for process in running:
                tell(process)
            for process in running:
                answers: list[str] = []
                waiting = threading.Thread(target=lambda p=process, a=answers: a.append(said(p)))
                waiting.start()
                while waiting.is_alive():
                    assert watcher.stats().disk_bytes <= capacity
                waiting.join()
                assert answers == ["done"]
            assert sum(path.stat().st_size for path in files(disk)) == watcher.stats().disk_bytes <= capacity
    finally:
        for process in running:
            process.kill()
            process.communicate()


def test_another_word_for_eviction_is_refused(disk: Path) -> None:
    with pytest.raises(ConfigError, match="eviction must be 'plan', 'keep' or 'sieve', got 'lru'"):
        TieredCache(ram=0, disk=disk, eviction="lru")  # type: ignore[arg-type]
