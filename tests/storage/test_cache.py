"""The block cache: right bytes always, bounded always, shared by processes, harmless to everything else."""

import errno
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stoker.errors import AccessDenied, ConfigError, CorruptBlock, KeyNotFound, UnknownVersion
from stoker.metrics import counters
from stoker.storage import Block, TieredCache, _layout, _locks, _open_tiers, cache, tiers
from stoker.storage._checksums import crc32c
from stoker.storage._memory import MemoryLimit
from stoker.storage.local import LocalStore

SIZE = 8192
FILE = SIZE + 4096  # a block's file: one page of header


class Origin(LocalStore):
    """A store that counts what is fetched, and waits or fails or lies when a test asks it to."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.fetched: list[tuple[str, int]] = []
        self.gate: Callable[[str], None] = lambda key: None
        self.lie: Callable[[bytes], bytes] = lambda data: data

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        self.fetched.append((key, start))
        self.gate(key)
        return memoryview(self.lie(bytes(super().get(key, start, end, version=version))))


def make_blocks(store: LocalStore, count: int, key: str = "object", size: int = SIZE) -> list[Block]:
    data = random.Random(key).randbytes(count * size)
    store.put(key, data)
    edges = range(0, len(data), size)
    return [Block(key=key, version="1", start=a, end=a + size, crc32c=crc32c(data[a : a + size])) for a in edges]


def content(store: LocalStore, block: Block) -> bytes:
    return (store.root / block.key).read_bytes()[block.start : block.end]


def overwrite(path: Path, data: bytes | bytearray) -> None:
    """Change a file in place, later than it was written, whatever the clock's ticks are."""
    path.write_bytes(data)
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))


def files(directory: Path) -> list[Path]:
    return sorted(path for path in (directory / "blocks").glob("*/*") if path.is_file())


def python(program: str, *args: object) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, args)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin(tmp_path / "origin")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "tier"


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    # Any file system does for what is tested here; it needs no shared memory.
    return tmp_path / "ram"


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """The log, with a process that has not warned yet."""
    monkeypatch.setattr(tiers, "_warned", set())
    caplog.set_level("WARNING")
    return caplog


# --- one process, straight ahead ------------------------------------------------------------------------------------


def test_a_block_is_fetched_once_and_then_served_from_shared_memory(origin: Origin, node_cache: TieredCache) -> None:
    (block,) = make_blocks(origin, 1)
    views = [node_cache.get(origin, block) for _ in range(3)]
    assert [bytes(view) for view in views] == [content(origin, block)] * 3
    assert all(view.readonly and view.format == "B" for view in views)
    assert origin.fetched == [("object", 0)]
    stats = node_cache.stats()
    assert (stats.misses, stats.ram_hits, stats.fetched_bytes, stats.ram_hit_bytes) == (1, 2, SIZE, 2 * SIZE)
    assert (stats.ram_bytes, stats.disk_bytes) == (FILE, 0)


def test_the_tiers_fill_in_order_and_then_blocks_pass_through(origin: Origin, ram: Path, disk: Path) -> None:
    blocks = make_blocks(origin, 7)
    with TieredCache(ram=3 * FILE, ram_path=ram, disk=disk, disk_capacity=2 * FILE + FILE - 1) as tested:
        for _ in range(2):
            for block in blocks:
                assert tested.get(origin, block) == content(origin, block)
        stats = tested.stats()
    assert (len(files(ram)), len(files(disk))) == (3, 2)
    assert (stats.ram_hits, stats.disk_hits, stats.misses, stats.pass_through) == (3, 2, 9, 4)
    assert (stats.ram_bytes, stats.disk_bytes) == (3 * FILE, 2 * FILE)


def test_blocks_of_one_scan_stay_when_newcomers_find_no_room(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 10)
    with TieredCache(ram=0, disk=disk, disk_capacity=5 * FILE) as tested:
        for _ in range(4):
            for block in blocks:
                tested.get(origin, block)
        # The best that any cache can do for repeated scans: half of the blocks, half of the hits from epoch 2 on.
        assert tested.stats().disk_hits == 3 * 5


def test_blocks_outlive_the_cache_and_are_checked_when_opened_again(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 3)
    for _ in range(2):
        with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
            assert [tested.get(origin, block) for block in blocks] == [content(origin, block) for block in blocks]
    assert len(origin.fetched) == 3
    assert tested.stats().disk_hits == 3


def test_what_makes_a_block_another_one_is_not_mixed_up(origin: Origin, disk: Path) -> None:
    one, two = make_blocks(origin, 2)
    other = Origin(origin.root.parent / "other")
    (elsewhere,) = make_blocks(other, 1)
    other.put("object", b"x" * SIZE)
    elsewhere = Block(key="object", version="1", start=0, end=SIZE, crc32c=crc32c(b"x" * SIZE))
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        assert tested.get(origin, one) == content(origin, one)
        assert tested.get(origin, two) == content(origin, two)
        assert tested.get(other, elsewhere) == b"x" * SIZE
        origin.put("object", b"y" * SIZE)
        newer = Block(key="object", version="2", start=0, end=SIZE, crc32c=crc32c(b"y" * SIZE))
        assert tested.get(origin, newer) == b"y" * SIZE
        part = Block(key="object", version="2", start=0, end=10, crc32c=crc32c(b"y" * 10))
        assert tested.get(origin, part) == b"y" * 10
        origin.put("object", b"z" * SIZE)  # under a version that was given out before
        same = Block(key="object", version="2", start=0, end=SIZE, crc32c=crc32c(b"z" * SIZE))
        assert tested.get(origin, same) == b"z" * SIZE
        assert (tested.stats().corrupt, len(files(disk))) == (0, 6)


def test_a_view_stays_valid_when_its_block_is_removed_and_the_cache_closed(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    tested = TieredCache(ram=0, disk=disk, disk_capacity="1MiB")
    view = tested.get(origin, block)
    assert tested.clear() == FILE
    assert files(disk) == [] and tested.stats().disk_bytes == 0
    tested.close()
    shutil.rmtree(disk)
    assert view == content(origin, block)


def test_views_cost_no_file_descriptors(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 50)
    with TieredCache(ram=0, disk=disk, disk_capacity="10MiB") as tested:
        before = len(os.listdir("/proc/self/fd"))
        views = [tested.get(origin, block) for block in blocks]
        assert len(os.listdir("/proc/self/fd")) == before
        assert [bytes(view) for view in views] == [content(origin, block) for block in blocks]


def test_a_closed_cache_says_so(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    tested = TieredCache(ram=0, disk=disk)
    tested.close()
    tested.close()
    with pytest.raises(ConfigError, match="must not be closed"):
        tested.get(origin, block)
    with pytest.raises(ConfigError, match="must not be closed"):
        tested.prefetch(origin, [block])


def test_what_the_store_raises_comes_through_and_is_asked_again(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    data = content(origin, block)
    origin.delete("object")
    with TieredCache(ram=0, disk=disk) as tested:
        with pytest.raises(KeyNotFound):
            tested.get(origin, block)
        origin.put("object", data)
        assert tested.get(origin, block) == data


def test_without_arguments_there_is_a_modest_tier_in_shared_memory() -> None:
    with TieredCache() as tested:
        stats = tested.stats()
        assert 0 < stats.ram_capacity_bytes <= 8 * 2**30
        free = os.statvfs(os.environ["STOKER_SHM_DIR"])
        assert stats.ram_capacity_bytes <= free.f_blocks * free.f_frsize // 4
        assert stats.disk_capacity_bytes == 0
        assert os.environ["STOKER_SHM_DIR"] in repr(tested)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"near_options": {"key": "k"}}, ConfigError, "near_options need near"),
        ({"near": "s3://near/cache", "near_timeout_s": 0}, ConfigError, "near_timeout_s"),
        ({"near": "s3://near/cache", "near_options": {"kye": "k"}}, ConfigError, "kye"),
        ({"ram": 0, "min_free": "some"}, ConfigError, "min_free"),
        ({"disk_capacity": "1GiB"}, ConfigError, "needs disk"),
        ({"ram": "much"}, ConfigError, "ram"),
        ({"ram": -1}, ConfigError, "ram"),
        ({"ram": 0, "disk": "/nonexistent", "disk_capacity": "1 parsec"}, ConfigError, "disk_capacity"),
        ({"ram": 0, "prefetch_bytes": "none"}, ConfigError, "prefetch_bytes"),
    ],
)
def test_arguments_that_break_their_rule_are_named(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        TieredCache(**arguments)


@pytest.mark.parametrize(("start", "end", "crc"), [(-1, 3, 0), (3, 3, 0), (4, 3, 0), (0, 1, -1), (0, 1, 2**32)])
def test_a_block_that_is_none_is_refused(start: int, end: int, crc: int) -> None:
    with pytest.raises(ConfigError):
        Block(key="object", version="1", start=start, end=end, crc32c=crc)


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", [0, 9, 20, 30, 60, 4095, 4096, 4100, FILE - SIZE // 2, FILE - 1])
def test_a_flipped_bit_in_a_cached_block_is_healed(
    origin: Origin, ram: Path, where: int, warnings: pytest.LogCaptureFixture
) -> None:
    (block,) = make_blocks(origin, 1)
    before = counters.snapshot()
    with TieredCache(ram="1MiB", ram_path=ram) as tested:
        tested.get(origin, block)
        (path,) = files(ram)
        damaged = bytearray(path.read_bytes())
        damaged[where] ^= 0x10
        overwrite(path, damaged)
        assert tested.get(origin, block) == content(origin, block)
        assert tested.get(origin, block) == content(origin, block)
        stats = tested.stats()
    assert (stats.corrupt, stats.misses, stats.ram_hits, stats.ram_bytes) == (1, 2, 1, FILE)
    assert counters.since(before)["cache.corrupt"] == 1
    assert "damaged block" in warnings.text
    (healed,) = files(ram)
    assert bytes(healed.read_bytes())[4096:] == content(origin, block)


@pytest.mark.parametrize("damage", ["truncated", "empty", "longer", "zeroed page", "swapped", "a directory"])
def test_a_damaged_file_is_a_miss(origin: Origin, disk: Path, damage: str) -> None:
    blocks = make_blocks(origin, 2)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        for block in blocks:
            tested.get(origin, block)
        one, two = files(disk)
        if damage == "truncated":
            os.truncate(one, FILE - 4096)
        elif damage == "empty":
            os.truncate(one, 0)
        elif damage == "longer":
            os.truncate(one, FILE + 4096)
        elif damage == "zeroed page":
            overwrite(one, one.read_bytes()[:8192] + bytes(FILE - 8192))
        elif damage == "swapped":
            held = one.read_bytes()
            overwrite(one, two.read_bytes())
            overwrite(two, held)
        else:
            one.unlink()
            one.mkdir()
        for _ in range(2):
            for block in blocks:
                assert tested.get(origin, block) == content(origin, block)
        if damage != "a directory":
            assert tested.stats().corrupt == (2 if damage == "swapped" else 1)
            assert len(files(disk)) == 2


def test_a_bit_that_flips_on_the_way_is_fetched_again(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    lies = [lambda data: data[:-1] + bytes([data[-1] ^ 1])]
    origin.lie = lambda data: lies.pop()(data) if lies else data
    with TieredCache(ram=0, disk=disk) as tested:
        assert tested.get(origin, block) == content(origin, block)
        assert (tested.stats().corrupt, len(origin.fetched)) == (1, 2)


def test_an_object_that_is_damaged_is_named_and_not_cached(origin: Origin, disk: Path) -> None:
    one, two = make_blocks(origin, 2)
    data = bytearray((origin.root / "object").read_bytes())
    data[SIZE + 5] ^= 1
    origin.put("object", data)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        tested.get(origin, one)
        for _ in range(2):
            with pytest.raises(CorruptBlock) as caught:
                tested.get(origin, two)
        assert (caught.value.start, caught.value.end) == (SIZE, 2 * SIZE)
        assert caught.value.expected == two.crc32c and caught.value.got == crc32c(data[SIZE:])
        assert f"{two.crc32c:#010x}" in str(caught.value) and "object" in str(caught.value)
        assert len(files(disk)) == 1 and tested.stats().disk_bytes == FILE


# --- threads and prefetch -------------------------------------------------------------------------------------------


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another thread is about to do; pytest-timeout guards it."""
    while not condition():
        os.sched_yield()


def test_threads_that_want_one_block_fetch_it_once(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity=0) as tested, ThreadPoolExecutor(8) as pool:
        # The one that fetches goes on when the seven others wait for it; nothing is kept, so only waiting helps them.
        origin.gate = lambda key: wait_until(lambda: sum(f.waiters for f in tested._flights.values()) == 7)
        views = list(pool.map(lambda _: tested.get(origin, block), range(8)))
        assert all(view == content(origin, block) for view in views)
        assert len(origin.fetched) == 1


def test_threads_that_wait_for_a_block_get_its_error(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    origin.delete("object")
    with TieredCache(ram=0, disk=disk) as tested, ThreadPoolExecutor(4) as pool:
        origin.gate = lambda key: wait_until(lambda: sum(f.waiters for f in tested._flights.values()) == 3)
        failed = [pool.submit(tested.get, origin, block) for _ in range(4)]
        assert [type(one.exception()) for one in failed] == [KeyNotFound] * 4
        assert len(origin.fetched) == 1


def test_prefetched_blocks_are_there_when_they_are_wanted(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with TieredCache(ram=0, disk=disk, disk_capacity="10MiB") as tested:
        tested.prefetch(origin, blocks)
        wait_until(lambda: tested.stats().misses == 20 and not tested.stats().prefetch_bytes)
        assert [bytes(tested.get(origin, block)) for block in blocks] == [content(origin, block) for block in blocks]
        stats = tested.stats()
    assert (stats.disk_hits, stats.misses) == (20, 20)
    assert sorted(origin.fetched) == sorted(("object", block.start) for block in blocks)


def test_prefetched_blocks_without_room_wait_for_their_get(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with TieredCache(ram=0, disk=disk, disk_capacity=0, prefetch_bytes=5 * SIZE) as tested:
        tested.prefetch(origin, blocks)
        for block in blocks:
            assert tested.get(origin, block) == content(origin, block)
        stats = tested.stats()
    assert stats.misses == 20  # each once
    assert len(origin.fetched) == 20


def test_prefetch_keeps_to_its_budget(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 30)
    with TieredCache(ram=0, disk=disk, disk_capacity=0, prefetch_bytes=3 * SIZE + 100) as tested:
        tested.prefetch(origin, blocks)
        wait_until(lambda: len(origin.fetched) == 3)
        for taken, block in enumerate(blocks):
            assert tested.stats().prefetch_bytes <= 3 * SIZE
            assert len(origin.fetched) <= taken + 3 + 1
            tested.get(origin, block)


def test_a_block_above_the_budget_is_prefetched_alone(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 3)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB", prefetch_bytes=1) as tested:
        tested.prefetch(origin, blocks)
        wait_until(lambda: tested.stats().misses == 3)


def test_a_reader_that_jumps_ahead_is_not_kept_waiting_by_what_it_left(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with TieredCache(ram=0, disk=disk, disk_capacity=0, prefetch_bytes=4 * SIZE) as tested:
        tested.prefetch(origin, blocks[:10])
        wait_until(lambda: len(origin.fetched) == 4)  # the budget is held by blocks that nobody will take
        tested.prefetch(origin, blocks[10:])
        assert tested.get(origin, blocks[10]) == content(origin, blocks[10])
        wait_until(lambda: ("object", blocks[13].start) in origin.fetched)


def test_a_failed_prefetch_is_raised_by_the_next_get_and_then_forgotten(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    data = content(origin, block)
    origin.delete("object")
    with TieredCache(ram=0, disk=disk) as tested:
        tested.prefetch(origin, [block])
        wait_until(lambda: bool(tested._failed))
        origin.put("object", data)
        with pytest.raises(KeyNotFound):
            tested.get(origin, block)
        assert tested.get(origin, block) == data


def test_closing_waits_for_requests_under_way_and_drops_the_rest(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 50)
    started, go = threading.Event(), threading.Event()

    events: list[str] = []

    def gate(key: str) -> None:
        started.set()
        go.wait()

    def lie(data: bytes) -> bytes:
        events.append("answered")
        return data

    def close() -> None:
        tested.close()
        events.append("closed")

    origin.gate, origin.lie = gate, lie
    tested = TieredCache(ram=0, disk=disk, disk_capacity="10MiB")
    tested.prefetch(origin, blocks)
    started.wait()
    names = {thread.name for thread in threading.enumerate() if thread.name.startswith("stoker-prefetch-")}
    assert names == {f"stoker-prefetch-{number}" for number in range(8)}
    closer = threading.Thread(target=close)
    closer.start()
    wait_until(lambda: tested._closed)
    go.set()
    closer.join()
    assert not any(thread.name.startswith("stoker-prefetch-") for thread in threading.enumerate())
    assert len(origin.fetched) <= 8
    assert events == ["answered"] * len(origin.fetched) + ["closed"]


def test_many_threads_see_right_bytes_while_blocks_are_removed_and_damaged(
    origin: Origin, ram: Path, disk: Path
) -> None:
    blocks = make_blocks(origin, 24)
    want = [content(origin, block) for block in blocks]
    with TieredCache(ram=8 * FILE, ram_path=ram, disk=disk, disk_capacity=8 * FILE) as tested:

        def read(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(150):
                number = chance.randrange(len(blocks))
                assert tested.get(origin, blocks[number]) == want[number]
                if chance.random() < 0.1:
                    tested.prefetch(origin, chance.sample(blocks, 3))

        def disturb() -> None:
            chance = random.Random(7)
            for turn in range(40):
                for path in chance.sample(sorted((*files(ram), *files(disk))), 1) if files(ram) else []:
                    # A new file under the name: one that is mapped was checked, and nobody writes to it.
                    bad = bytearray(FILE)
                    temporary = path.parent / "damaged"
                    temporary.write_bytes(bad)
                    try:
                        os.stat(path)
                        os.replace(temporary, path)
                    except FileNotFoundError:
                        temporary.unlink()
                if turn % 10 == 9:
                    tested.clear()
                stats = tested.stats()
                assert stats.ram_bytes <= 8 * FILE and stats.disk_bytes <= 8 * FILE

        with ThreadPoolExecutor(6) as pool:
            for done in [*(pool.submit(read, seed) for seed in range(5)), pool.submit(disturb)]:
                done.result()


# --- processes ------------------------------------------------------------------------------------------------------

READER = """
import sys
from pathlib import Path
from stoker.storage import Block, TieredCache, open_store
from stoker.storage._checksums import crc32c
root, tier, capacity, first, count = sys.argv[1:6]
store = open_store(root)
data = bytes(store.get("object"))
with TieredCache(ram=0, disk=tier, disk_capacity=int(capacity)) as cache:
    print("open", flush=True)
    sys.stdin.readline()
    for number in range(int(first), int(first) + int(count)):
        start, end = number * 8192, (number + 1) * 8192
        block = Block(key="object", version="1", start=start, end=end, crc32c=crc32c(data[start:end]))
        assert cache.get(store, block) == data[start:end]
    print(cache.stats().misses, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture
def started() -> Iterator[list["subprocess.Popen[str]"]]:
    """Processes that are ended with the test, whatever happens."""
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


def said(process: "subprocess.Popen[str]") -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def tell(process: "subprocess.Popen[str]") -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_two_processes_keep_to_one_capacity(origin: Origin, disk: Path, started: list["subprocess.Popen[str]"]) -> None:
    make_blocks(origin, 120)
    capacity = 25 * FILE + 100
    for first in (0, 60):
        started.append(python(READER, origin.root, disk, capacity, first, 60))
    for process in started:
        assert said(process) == "open"
    for process in started:
        tell(process)
    with TieredCache(ram=0, disk=disk) as watcher:
        most = 0
        for process in started:
            reader = threading.Thread(target=said, args=(process,))
            reader.start()
            while reader.is_alive():
                on_disk = sum(path.stat().st_size for path in files(disk))
                most = max(most, on_disk, watcher.stats().disk_bytes)
            reader.join()
        assert most <= capacity
        assert len(files(disk)) == 25
        assert watcher.stats().disk_bytes == 25 * FILE


def test_what_one_process_fetched_another_finds(
    origin: Origin, disk: Path, started: list["subprocess.Popen[str]"]
) -> None:
    make_blocks(origin, 10)
    for _ in range(2):
        started.append(python(READER, origin.root, disk, 10 * FILE, 0, 10))
        assert said(started[-1]) == "open"
        tell(started[-1])
        misses = said(started[-1])
    assert misses == "0"


def test_the_first_limit_binds_and_others_are_told(
    disk: Path, started: list["subprocess.Popen[str]"], origin: Origin, warnings: pytest.LogCaptureFixture
) -> None:
    make_blocks(origin, 1)
    started.append(python(READER, origin.root, disk, 1_000_000, 0, 1))
    assert said(started[0]) == "open"
    with TieredCache(ram=0, disk=disk, disk_capacity=2_000_000) as second:
        assert second.stats().disk_capacity_bytes == 1_000_000
        assert "limit in force" in warnings.text and str(disk) in warnings.text
    started[0].communicate("\n\n")
    with TieredCache(ram=0, disk=disk, disk_capacity=2_000_000) as third:
        assert third.stats().disk_capacity_bytes == 2_000_000


KILLED = """
import os, signal, sys
from stoker.storage import Block, TieredCache, open_store, tiers
from stoker.storage._checksums import crc32c
root, tier, when = sys.argv[1:4]
store = open_store(root)
data = bytes(store.get("object"))
cache = TieredCache(ram=0, disk=tier, disk_capacity=1_000_000)
real = getattr(tiers.os, when)
def killed(*args, **kwargs):
    if when != "rename" or "blocks/" in str(args[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
setattr(tiers.os, when, killed)
cache.get(store, Block(key="object", version="1", start=0, end=8192, crc32c=crc32c(data[:8192])))
"""


@pytest.mark.parametrize("when", ["posix_fallocate", "fdatasync", "rename"])
@pytest.mark.parametrize("alone", [True, False])
def test_what_a_killed_process_was_writing_is_reclaimed_at_the_next_start(
    origin: Origin, disk: Path, when: str, alone: bool, started: list["subprocess.Popen[str]"]
) -> None:
    (block,) = make_blocks(origin, 1)
    if not alone:  # then nobody may count anew: what the dead one had reserved is given back
        started.append(python(READER, origin.root, disk, 1_000_000, 0, 1))
        assert said(started[0]) == "open"
    process = python(KILLED, origin.root, disk, when)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(os.listdir(disk / "tmp")) == 1 and files(disk) == []
    with TieredCache(ram=0, disk=disk) as tested:
        assert os.listdir(disk / "tmp") == []
        assert tested.stats().disk_bytes == 0
        assert tested.get(origin, block) == content(origin, block)
        assert tested.stats().disk_bytes == FILE


def test_what_is_being_written_by_a_living_process_is_left_alone(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity=1_000_000) as first:
        assert first._disk is not None
        real = first._disk._publish
        seen: list[list[str]] = []

        def publish(file: tiers.BlockFile, temporary: str) -> bool:
            with TieredCache(ram=0, disk=disk) as second:
                seen.append(os.listdir(disk / "tmp"))
                assert second.stats().disk_bytes == FILE
            return real(file, temporary)

        first._disk._publish = publish  # type: ignore
        assert first.get(origin, block) == content(origin, block)
        assert len(seen) == 1 and len(seen[0]) == 1
        assert first.stats().disk_bytes == FILE


def test_a_lock_file_that_makes_no_sense_is_counted_anew(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 3)
    with TieredCache(ram=0, disk=disk, disk_capacity=1_000_000) as tested:
        for block in blocks:
            tested.get(origin, block)
    (disk / "lock").write_bytes(b"garbage")
    with TieredCache(ram=0, disk=disk, disk_capacity=1_000_000) as tested:
        assert tested.stats().disk_bytes == 3 * FILE
        assert tested.get(origin, blocks[0]) == content(origin, blocks[0])
    assert len(origin.fetched) == 3


def test_a_stopped_process_that_holds_the_counter_costs_time_but_no_bytes(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    blocks = make_blocks(origin, 2)
    monkeypatch.setattr(tiers, "_LOCK_TIMEOUT_S", 0.05)
    with TieredCache(ram=0, disk=disk) as tested, TieredCache(ram=0, disk=disk) as holder:
        assert holder._disk is not None
        with holder._disk._usage():
            for block in blocks:
                assert tested.get(origin, block) == content(origin, block)
        assert tested.stats().pass_through == 2
        assert "lock must become free" in warnings.text


FORKED = """
import os, signal, sys
from stoker.storage import TieredCache
cache = TieredCache(ram=0, disk=sys.argv[1], disk_capacity=1_000_000)
read, write = os.pipe()
if os.fork():
    os.close(write)
    os.read(read, 1)                      # until the child lives
    print("forked", flush=True)
    sys.stdin.readline()
else:
    os.write(write, b"1")
    sys.stdin.readline()                  # stays when its parent is gone
"""


def test_a_forked_child_does_not_keep_its_parents_locks(disk: Path, started: list["subprocess.Popen[str]"]) -> None:
    started.append(python(FORKED, disk))
    assert said(started[0]) == "forked"
    os.kill(started[0].pid, signal.SIGKILL)
    started[0].wait()
    with TieredCache(ram=0, disk=disk, disk_capacity=2_000_000) as tested:
        assert tested.stats().disk_capacity_bytes == 2_000_000  # so it was the only one


def test_a_forked_child_uses_the_cache_on_its_own(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 6)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        tested.prefetch(origin, blocks[:3])
        first = tested.get(origin, blocks[0])
        locked, go = threading.Event(), threading.Event()

        def hold() -> None:
            assert tested._disk is not None
            with tested._lock, tested._disk._mutex:
                locked.set()
                go.wait()

        holder = threading.Thread(target=hold)
        holder.start()
        locked.wait()  # the child gets every lock as another thread of ours holds it
        pid = os.fork()
        if not pid:
            status = 1
            signal.alarm(60)
            try:
                tested.prefetch(origin, blocks[3:5])
                wait_until(lambda: tested.stats().misses == 2)  # by threads of its own
                right = all(tested.get(origin, block) == content(origin, block) for block in blocks)
                status = 0 if right and first == content(origin, blocks[0]) else 2
            finally:
                os._exit(status)
        go.set()
        holder.join()
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        fetched = len(origin.fetched)
        assert tested.get(origin, blocks[5]) == content(origin, blocks[5])
        assert len(origin.fetched) == fetched  # the child's copy was there for us


def test_a_pickled_cache_opens_the_same_tiers(origin: Origin, ram: Path, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram="1MiB", ram_path=ram, disk=disk) as tested:
        tested.get(origin, block)
        with pickle.loads(pickle.dumps(tested)) as other:
            assert other.get(origin, block) == content(origin, block)
            assert (other.stats().ram_hits, other.stats().misses) == (1, 0)
            assert repr(other) == repr(tested)


# --- what is not ours -----------------------------------------------------------------------------------------------


def test_foreign_files_in_the_directory_are_not_touched_and_not_counted(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        tested.get(origin, block)
    (ours,) = files(disk)
    precious = origin.root / "precious"
    precious.write_bytes(b"of someone else")
    foreign = {
        disk / "notes.txt": b"1",
        disk / "blocks" / "README": b"2",
        ours.parent / "not-a-block": b"3",
        ours.parent / (ours.name + ".bak"): b"4",
        disk / "tmp" / "mine": b"5",
        disk / "tmp" / f"{FILE}-short": b"6",
    }
    for path, data in foreign.items():
        path.write_bytes(data)
    links = [
        ours.parent / ("0" * 32),
        disk / "tmp" / f"{FILE}-{'0' * 16}",
        disk / "blocks" / "zz",
        disk / "blocks" / "ff",
    ]
    links = [link for link in links if not link.exists()]
    for link in links:
        link.symlink_to(precious if link.parent != disk / "blocks" else precious.parent)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        assert tested.stats().disk_bytes == FILE
        assert tested.get(origin, block) == content(origin, block)
        assert tested.clear() == FILE
    assert {path: path.read_bytes() for path in foreign} == foreign
    assert all(link.is_symlink() for link in links)
    assert precious.read_bytes() == b"of someone else"
    assert not ours.exists()


def test_a_directory_in_use_for_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "shard").write_bytes(b"1")
    with pytest.raises(ConfigError, match="must be empty or made by stoker"):
        TieredCache(ram=0, disk=tmp_path / "data")
    assert os.listdir(tmp_path / "data") == ["shard"]


def test_a_cache_that_was_emptied_in_use_is_a_cache_again(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 3)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as first:
        first.get(origin, blocks[0])
        for entry in disk.iterdir():
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        for block in blocks:  # it goes on, under a lock file of its own making
            assert first.get(origin, block) == content(origin, block)
        fetched = len(origin.fetched)
        with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as second:
            for block in blocks[1:]:  # the view that `first` held of the other was enough for it
                assert second.get(origin, block) == content(origin, block)
        assert len(origin.fetched) == fetched
    assert (disk / "CACHEDIR.TAG").exists()


def test_a_cache_whose_lock_file_is_replaced_while_it_starts_goes_on(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_state(lock_fd: int, capacity: int, used: int) -> None:
        _layout.write_state(lock_fd, capacity, used)
        (disk / "lock").unlink()  # by someone who empties the directory; another process finds none, and makes one
        (disk / "lock").touch(0o600)

    monkeypatch.setattr("stoker.storage.tiers.write_state", write_state)
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        monkeypatch.undo()
        assert tested.get(origin, block) == content(origin, block)


@pytest.mark.parametrize("removed", [{"CACHEDIR.TAG"}, {"CACHEDIR.TAG", "lock"}, {"CACHEDIR.TAG", "blocks", "tmp"}])
def test_a_cache_whose_removal_stopped_half_way_is_a_cache_again(origin: Origin, disk: Path, removed: set[str]) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        tested.get(origin, block)
    for name in removed:
        shutil.rmtree(disk / name) if (disk / name).is_dir() else (disk / name).unlink()
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        assert tested.get(origin, block) == content(origin, block)
        assert tested.stats().disk_bytes == FILE
    assert len(origin.fetched) == (2 if "blocks" in removed else 1)
    assert (disk / "CACHEDIR.TAG").exists()


@pytest.mark.parametrize("theirs", ["lock", "blocks/README", "tmp/mine", "notes", "blocks", "plans/2026"])
def test_a_directory_that_only_looks_like_a_cache_is_refused(tmp_path: Path, theirs: str) -> None:
    data = tmp_path / "data"
    (data / theirs).parent.mkdir(parents=True)
    (data / theirs).write_bytes(b"of someone else")
    data.chmod(0o700)
    with pytest.raises(ConfigError, match="must be empty or made by stoker"):
        TieredCache(ram=0, disk=data)
    assert (data / theirs).read_bytes() == b"of someone else"


def test_a_directory_of_our_names_that_others_may_open_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data" / "blocks").mkdir(parents=True)
    (tmp_path / "data").chmod(0o755)
    with pytest.raises(ConfigError, match="must be empty or made by stoker"):
        TieredCache(ram=0, disk=tmp_path / "data")


def test_a_link_is_refused_as_a_cache_directory(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(AccessDenied, match="must not be a link"):
        TieredCache(ram=0, disk=tmp_path / "link")
    assert os.listdir(tmp_path / "real") == []


def test_a_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        theirs = tmp_path / "theirs"
        theirs.mkdir()
        os.chown(theirs, 12345, 12345)
    else:
        theirs = Path("/usr")
    with pytest.raises(AccessDenied, match="must belong to this user"):
        TieredCache(ram=0, disk=theirs)


def test_a_directory_that_was_opened_to_others_is_refused(disk: Path) -> None:
    TieredCache(ram=0, disk=disk).close()
    assert disk.stat().st_mode & 0o777 == 0o700
    disk.chmod(0o755)
    with pytest.raises(AccessDenied, match="must have mode 0700"):
        TieredCache(ram=0, disk=disk)


def test_an_empty_directory_is_closed_to_others_when_it_becomes_a_cache(disk: Path) -> None:
    disk.mkdir(mode=0o755)
    TieredCache(ram=0, disk=disk).close()
    assert disk.stat().st_mode & 0o777 == 0o700


def test_a_cache_of_a_newer_version_is_refused_by_name(disk: Path) -> None:
    TieredCache(ram=0, disk=disk).close()
    tag = disk / "CACHEDIR.TAG"
    tag.write_bytes(tag.read_bytes().replace(b"v1", b"v2"))
    with pytest.raises(UnknownVersion, match="version 1"):
        TieredCache(ram=0, disk=disk)


# --- tiers that fail ------------------------------------------------------------------------------------------------


def test_without_shared_memory_blocks_pass_through_with_one_warning(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path / "missing" / "shm"))
    blocks = make_blocks(origin, 3)
    before = counters.snapshot()
    for _ in range(2):
        with TieredCache(ram="1MiB") as tested:
            for block in blocks:
                assert tested.get(origin, block) == content(origin, block)
            assert tested.stats().pass_through == 3
    assert warnings.text.count("no ram tier") == 1
    assert counters.since(before)["cache.ram.degraded"] == 2


def test_shared_memory_of_someone_else_is_not_used(
    origin: Origin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "open").mkdir(mode=0o777)
    (tmp_path / "open").chmod(0o777)
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path / "open"))
    with TieredCache(ram="1MiB") as tested:
        assert tested.stats().ram_capacity_bytes == 0
    assert os.listdir(tmp_path / "open") == []
    assert "no ram tier" in warnings.text


FULL = """
import logging, resource, sys
from stoker.metrics import counters
from stoker.storage import Block, TieredCache, open_store
from stoker.storage._checksums import crc32c
root, tier = sys.argv[1:3]
logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
store = open_store(root)
data = bytes(store.get("object"))
with TieredCache(ram="1MiB", ram_path=tier) as cache:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
    for start in range(0, len(data), 8192):
        block = Block(key="object", version="1", start=start, end=start + 8192, crc32c=crc32c(data[start:start+8192]))
        assert cache.get(store, block) == data[start : start + 8192]
    small = Block(key="object", version="1", start=0, end=100, crc32c=crc32c(data[:100]))
    cache.get(store, small), cache.get(store, small)
    stats = cache.stats()
    print(stats.pass_through, stats.ram_hits, stats.ram_bytes, counters.snapshot()["cache.ram.degraded"])
"""


def test_a_full_tier_degrades_to_pass_through_with_one_warning(
    origin: Origin, ram: Path, started: list["subprocess.Popen[str]"]
) -> None:
    make_blocks(origin, 5)
    started.append(python(FULL, origin.root, ram))
    lines = started[0].communicate()[0].splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("WARNING can't write blocks in the ram tier") and "File too large" in lines[0]
    assert lines[1] == "5 1 8192 5"  # what fits is still admitted, and nothing is counted that is not there
    assert os.listdir(ram / "tmp") == []


def test_a_tier_that_vanishes_costs_time_but_no_bytes(
    origin: Origin, disk: Path, warnings: pytest.LogCaptureFixture
) -> None:
    blocks = make_blocks(origin, 4)
    with TieredCache(ram=0, disk=disk) as tested:
        held = tested.get(origin, blocks[0])
        shutil.rmtree(disk)
        for _ in range(2):
            for block in blocks:
                assert tested.get(origin, block) == content(origin, block)
        assert held == content(origin, blocks[0])
        reader = tested.reader()
        assert (tested.stats().disk_capacity_bytes, reader.capacity_bytes, tested.clear()) == (0, 0, 0)
    assert warnings.text.count("can't write blocks") == 1
    assert warnings.text.count("can't count blocks") == 1


def test_files_that_others_remove_while_a_cache_looks_are_no_error(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As another node's do, in a directory whose file system has locks that each node keeps to itself."""
    blocks = make_blocks(origin, 3)
    files_of = tiers.Tier._files

    def files_that_go(tier: tiers.Tier, folder: str, names: re.Pattern[str]) -> list[tuple[str, int]]:
        found = files_of(tier, folder, names)
        for name, _ in found[:1]:
            (disk / folder / name).unlink()
        return found

    with TieredCache(ram=0, disk=disk) as tested:
        for block in blocks:
            tested.get(origin, block)
    for name in ("1", "2"):
        (disk / "tmp" / f"{FILE}-{name * 16}").touch()
    with monkeypatch.context() as patched:
        patched.setattr(tiers.Tier, "_files", files_that_go)
        with TieredCache(ram=0, disk=disk) as tested:
            assert list((disk / "tmp").iterdir()) == []
            tested.clear()
    assert files(disk) == []


def test_a_ram_tier_larger_than_what_is_free_is_cut_down(ram: Path, warnings: pytest.LogCaptureFixture) -> None:
    with TieredCache(ram="500 PB", ram_path=ram) as tested:
        free = os.statvfs(ram)
        assert 0 < tested.stats().ram_capacity_bytes <= 0.8 * free.f_blocks * free.f_frsize
    assert "limit in force" in warnings.text


def test_the_limit_of_the_control_group_counts_too(
    ram: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    limits = [MemoryLimit(limit_bytes=2**40, used_bytes=0), MemoryLimit(limit_bytes=3_000_000, used_bytes=2_000_000)]
    monkeypatch.setattr(_open_tiers, "memory_limits", lambda: iter(limits))
    with TieredCache(ram="10MB", ram_path=ram) as tested:
        assert tested.stats().ram_capacity_bytes == 800_000
    shutil.rmtree(ram)
    with TieredCache(ram_path=ram) as tested:
        assert tested.stats().ram_capacity_bytes == 250_000


def test_a_copy_that_another_process_healed_meanwhile_is_not_removed(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested, pickle.loads(pickle.dumps(tested)) as other:
        tested.get(origin, block)
        (path,) = files(disk)
        overwrite(path, bytes(FILE))
        assert tested._disk is not None
        real = tested._disk._remove_corrupt

        def late(name: str, info: os.stat_result) -> None:
            with monkeypatch.context() as patch:  # between our finding it damaged and our removing it
                patch.setattr(tested._disk, "_remove_corrupt", real)
                assert other.get(origin, block) == content(origin, block)
            healed.append(path.stat().st_ino)
            real(name, info)

        healed: list[int] = []
        monkeypatch.setattr(tested._disk, "_remove_corrupt", late)
        assert tested.get(origin, block) == content(origin, block)
        assert [path.stat().st_ino] == healed
        assert tested.stats().disk_bytes == FILE
        assert len(origin.fetched) <= 3


def test_a_disk_tier_that_can_not_be_made_costs_no_bytes(
    origin: Origin, tmp_path: Path, warnings: pytest.LogCaptureFixture
) -> None:
    (block,) = make_blocks(origin, 1)
    (tmp_path / "file").write_bytes(b"1")
    with TieredCache(ram=0, disk=tmp_path / "file" / "tier") as tested:
        assert tested.get(origin, block) == content(origin, block)
        assert (tested.stats().pass_through, tested.stats().disk_capacity_bytes) == (1, 0)
    assert warnings.text.count("no disk tier") == 1


def test_where_files_can_not_be_locked_there_is_no_tier(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch, warnings: pytest.LogCaptureFixture
) -> None:
    (block,) = make_blocks(origin, 1)
    monkeypatch.setattr(_locks, "_SETLK", None)
    with TieredCache(ram=0, disk=disk) as tested:
        assert tested.get(origin, block) == content(origin, block)
        assert tested.stats().pass_through == 1
    assert "no open-file-description locks" in warnings.text


# --- faults that pass, and time that passes ---------------------------------------------------------------------------


@pytest.mark.parametrize("error", [errno.EMFILE, errno.EIO], ids=errno.errorcode.get)
def test_a_tier_that_failed_once_is_used_again(
    origin: Origin, disk: Path, error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(origin, 3)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested, monkeypatch.context() as patch:
        patch.setattr(tiers.Tier, "_reserve", failing(OSError(error, "test")))
        tested.get(origin, blocks[0])
        assert files(disk) == []
        patch.undo()
        patch.setattr(tiers, "monotonic", lambda: time.monotonic() + 11)  # a broken disk is left alone for a while
        tested.get(origin, blocks[1])
        assert len(files(disk)) == 1


def failing(error: OSError) -> Callable[..., Any]:
    def fail(*_: object) -> Any:
        raise error

    return fail


def test_what_is_known_of_blocks_goes_with_them(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 40)
    with TieredCache(ram=0, disk=disk, disk_capacity=10 * FILE, eviction="sieve") as tested:
        for block in blocks * 3:
            tested.get(origin, block)
        assert tested._disk is not None and len(tested._disk._verified) <= 10


def test_a_cache_that_is_closed_touches_no_other_directory(origin: Origin, disk: Path, tmp_path: Path) -> None:
    (block,) = make_blocks(origin, 1)
    closed = TieredCache(ram=0, disk=disk, disk_capacity="1MiB")
    tier = closed._disk
    assert tier is not None
    closed.close()
    with TieredCache(ram=0, disk=tmp_path / "other", disk_capacity="1MiB") as other:  # has the same descriptors
        other.get(origin, block)
        with pytest.raises(ConfigError, match="closed"):
            closed.clear()
        with pytest.raises(OSError):
            tier.clear()
        assert len(files(tmp_path / "other")) == 1


def test_a_directory_that_was_emptied_under_a_job_is_counted_anew_with_the_next_one(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 20)
    with TieredCache(ram=0, disk=disk, disk_capacity=10 * FILE) as first:
        for block in blocks:
            first.get(origin, block)
        for path in disk.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        with TieredCache(ram=0, disk=disk, disk_capacity=10 * FILE) as second:
            for block in blocks:
                second.get(origin, block)
                first.get(origin, block)
            assert len(files(disk)) <= 10


def test_a_failed_prefetch_of_a_reader_that_has_left_is_nobody_s(origin: Origin, disk: Path) -> None:
    (block,) = make_blocks(origin, 1)
    with TieredCache(ram=0, disk=disk, disk_capacity="1MiB") as tested:
        tried = threading.Event()

        def down(key: str) -> None:
            tried.set()
            raise KeyNotFound("test", place=key)

        origin.gate = down
        reader = tested.reader()
        reader.prefetch(origin, [block])
        assert tried.wait(60)
        while not tested._failed:
            os.sched_yield()
        reader.close()
        origin.gate = lambda key: None
        assert tested.get(origin, block) == content(origin, block)


def test_the_end_of_a_program_waits_for_a_store_that_hangs_no_longer_than_a_moment(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (block,) = make_blocks(origin, 1)
    monkeypatch.setattr(cache, "_CLOSE_TIMEOUT_S", 0.01)
    began, release = threading.Event(), threading.Event()

    def hang(key: str) -> None:
        began.set()
        release.wait(60)

    origin.gate = hang
    tested = TieredCache(ram=0, disk=disk, disk_capacity="1MiB")
    tested.prefetch(origin, [block])
    assert began.wait(60)
    threads = list(tested._threads)
    tested.close()
    assert threads[0].is_alive()
    release.set()
    for thread in threads:
        thread.join(60)
    assert files(disk) == [], "what came later is dropped"


@pytest.mark.parametrize("wrong", ["s3://bucket/x", "file:///nvme", "a\0b", 5], ids=repr)
def test_a_disk_that_is_no_local_path_is_refused(wrong: Any) -> None:
    with pytest.raises(ConfigError, match="local path"):
        TieredCache(ram=0, disk=wrong)


def test_a_relative_directory_stays_the_same_for_workers_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with TieredCache(ram=0, disk="cache", disk_capacity="1MiB") as tested:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        with pickle.loads(pickle.dumps(tested)) as worker:
            assert worker._disk.path == tmp_path / "cache"


def test_a_file_where_the_cache_should_be_is_told_as_such(tmp_path: Path) -> None:
    (tmp_path / "cache").touch()
    with pytest.raises(ConfigError, match="must be a directory"):
        TieredCache(ram=0, disk=tmp_path / "cache")
