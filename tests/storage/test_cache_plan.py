"""A cache that is told what will be read: what it keeps, what it fetches first, and what wrong advice costs."""

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest

from stoker.metrics import counters
from stoker.storage import Block, TieredCache
from stoker.storage._prefetch import Pace
from tests.storage.test_cache import FILE, SIZE, Origin, content, files, make_blocks, wait_until


@pytest.fixture
def origin(tmp_path: Path) -> Origin:
    return Origin(tmp_path / "origin")


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    return tmp_path / "tier"


def on_disk(disk: Path, blocks: int, **options: object) -> TieredCache:
    return TieredCache(ram=0, disk=disk, disk_capacity=blocks * FILE, **options)  # type: ignore[arg-type]


def read(cache: TieredCache, origin: Origin, blocks: Sequence[Block]) -> int:
    """Reads in order; how many of them were hits."""
    before = cache.stats()
    for block in blocks:
        assert bytes(cache.get(origin, block)) == content(origin, block)
    after = cache.stats()
    return after.disk_hits + after.ram_hits - before.disk_hits - before.ram_hits


def follow(cache: TieredCache, origin: Origin, blocks: Sequence[Block], *, lasts: float = 0.0) -> int:
    """Reads in order by a plan of all of it; how many of them were hits."""
    reader, hits = cache.reader(), 0
    reader.publish(origin, blocks, range(len(blocks)), lasts=lasts)
    for now, block in enumerate(blocks):
        reader.advance(now)
        hits += read(cache, origin, [block])
    reader.close()
    return hits


# --- what stays -----------------------------------------------------------------------------------------------------


def test_in_whole_epochs_the_plan_hits_as_often_as_keeping_any_fixed_part(origin: Origin, tmp_path: Path) -> None:
    epochs = make_blocks(origin, 12) * 4
    with on_disk(tmp_path / "plan", 5) as planned, on_disk(tmp_path / "keep", 5, eviction="keep") as keeping:
        assert follow(planned, origin, epochs) == read(keeping, origin, epochs) == 3 * 5


def test_a_plan_hits_more_where_some_blocks_are_read_more_often(origin: Origin, tmp_path: Path) -> None:
    often, seldom = make_blocks(origin, 3, key="often"), make_blocks(origin, 24, key="seldom")
    mixed = [block for at in range(0, 24, 3) for block in (*seldom[at : at + 3], *often)]
    with on_disk(tmp_path / "plan", 3) as planned, on_disk(tmp_path / "keep", 3, eviction="keep") as keeping:
        assert read(keeping, origin, mixed) == 0  # what came first stays, and is read once
        assert follow(planned, origin, mixed) == 7 * 3


def test_blocks_of_a_set_that_is_read_no_more_make_room(origin: Origin, disk: Path) -> None:
    old, new = make_blocks(origin, 6, key="old"), make_blocks(origin, 4, key="new")
    with on_disk(disk, 6) as cache:
        read(cache, origin, old)
        assert read(cache, origin, new * 2) == 0, "nobody has said that it will be read again"
        before = counters.snapshot()
        assert follow(cache, origin, new * 2) == 4
        assert counters.since(before)["cache.disk.evicted"] == 4
        assert cache.stats().disk_bytes == 6 * FILE


def test_what_will_not_be_read_again_passes_through_though_there_is_room(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 6)
    with on_disk(disk, 10) as cache:
        reader = cache.reader()
        reader.publish(origin, blocks[:3], range(3), final=True)
        reader.advance(-1)
        read(cache, origin, blocks)
        assert (len(files(disk)), cache.stats().pass_through) == (3, 3)
        reader.close()
        read(cache, origin, blocks)
        assert len(files(disk)) == 6


def test_a_block_that_is_in_use_stays_whatever_the_plan_says(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 8)
    with on_disk(disk, 2) as cache:
        held = [cache.get(origin, block) for block in blocks[:2]]
        reader = cache.reader()
        reader.publish(origin, blocks[2:], range(6))
        read(cache, origin, blocks[2:])
        assert len(files(disk)) == 2 and cache.stats().pass_through == 6
        del held
        read(cache, origin, blocks[2:3])
        assert cache.stats().pass_through == 6


def test_the_first_tier_holds_what_is_read_now_and_the_next_what_is_read_later(
    origin: Origin, disk: Path, tmp_path: Path
) -> None:
    blocks = make_blocks(origin, 12)
    tiers = {"ram": 2 * FILE, "ram_path": tmp_path / "ram", "disk": disk, "disk_capacity": 20 * FILE}
    with TieredCache(**tiers) as cache:  # type: ignore[arg-type]
        assert follow(cache, origin, blocks * 2, lasts=1.5) == 12, "what left memory is on disk"
        stats = cache.stats()
        assert (stats.misses, stats.ram_bytes, stats.disk_bytes) == (12, 2 * FILE, 12 * FILE)


def test_a_small_lower_tier_is_not_written_over_and_over(origin: Origin, disk: Path, tmp_path: Path) -> None:
    blocks = make_blocks(origin, 12)
    before = counters.snapshot()
    tiers = {"ram": 2 * FILE, "ram_path": tmp_path / "ram", "disk": disk, "disk_capacity": 4 * FILE}
    with TieredCache(**tiers) as cache:  # type: ignore[arg-type]
        assert follow(cache, origin, blocks * 3, lasts=1.5) >= 2 * 4
    counted = counters.since(before)
    assert counted["cache.disk.admitted"] <= 8
    assert counted["cache.ram.admitted"] >= 20


def test_processes_with_one_plan_do_not_take_each_others_blocks(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 12)
    with on_disk(disk, 8) as one, on_disk(disk, 8) as two:
        readers = [one.reader(), two.reader()]
        for reader in readers:
            reader.publish(origin, blocks * 3, range(36))
        hits = 0
        for now, block in enumerate(blocks * 3):
            for reader in readers:
                reader.advance(now)
            hits += read((one, two)[now % 2], origin, [block])
        assert hits == 2 * 8
        assert one.stats().disk_bytes == 8 * FILE


def test_blocks_that_another_running_job_needs_are_spared(origin: Origin, disk: Path) -> None:
    theirs, ours = make_blocks(origin, 4, key="theirs"), make_blocks(origin, 8, key="ours")
    with on_disk(disk, 6) as other, on_disk(disk, 6) as cache:
        reader = other.reader()
        read(other, origin, theirs)
        reader.publish(origin, theirs, [100] * 4)
        reader._measure_for_s = 0.0
        reader.advance(0)
        reader.advance(1)
        assert follow(cache, origin, ours * 3) == 2 * 2, "two places are left for us"
        assert read(other, origin, theirs) == 4
        reader.close()
        assert follow(cache, origin, ours * 3) > 2 * 2


def test_wrong_plans_cost_misses_and_nothing_else(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 12)
    with on_disk(disk, 4) as one, on_disk(disk, 4) as two:
        for cache, order in ((one, blocks[::-1]), (two, blocks[6:] + blocks[:6])):
            reader = cache.reader()
            reader.publish(origin, order * 2, range(24), final=True)
            reader.advance(3.5)
        for cache in (one, two) * 2:
            read(cache, origin, blocks)
            assert cache.stats().disk_bytes == len(files(disk)) * FILE <= 4 * FILE


def test_keep_keeps_whatever_is_published(origin: Origin, disk: Path) -> None:
    old, new = make_blocks(origin, 4, key="old"), make_blocks(origin, 4, key="new")
    with on_disk(disk, 4, eviction="keep") as cache:
        assert cache.reader().capacity_bytes == 0
        read(cache, origin, old)
        assert follow(cache, origin, new * 2) == 0
        assert read(cache, origin, old) == 4


def test_a_reader_that_is_closed_or_whose_cache_is_says_nothing(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 4)
    cache = on_disk(disk, 2)
    reader, other = cache.reader(), cache.reader()
    assert reader.capacity_bytes == 2 * FILE
    reader.close()
    reader.publish(origin, blocks, range(4), final=True)
    reader.prefetch(origin, blocks)
    assert not reader.is_open and other.is_open
    assert read(cache, origin, blocks * 2) == 2
    cache.close()
    for late in (reader, other):
        late.publish(origin, blocks, range(4))
        late.advance(1)
        late.prefetch(origin, blocks)
        late.forget()
        late.close()
        assert not late.is_open


# --- what is fetched first ------------------------------------------------------------------------------------------


class Gate:
    """Holds the first fetch back, so that everything else is asked for before the second begins."""

    def __init__(self, origin: Origin) -> None:
        self.go, self.begun = threading.Event(), threading.Event()
        origin.gate = self.wait

    def wait(self, key: str) -> None:
        self.begun.set()
        self.go.wait()


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.storage.cache._PREFETCH_THREADS", 1)


@pytest.mark.usefixtures("one_at_a_time")
def test_of_all_callers_the_block_that_is_needed_earliest_comes_first(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 7)
    gate = Gate(origin)
    with on_disk(disk, 10) as cache:
        one, two = cache.reader(), cache.reader()
        cache.prefetch(origin, blocks[:1])
        gate.begun.wait()
        one.prefetch(origin, blocks[1:4], due_s=[30, 10, 50])
        two.prefetch(origin, blocks[3:6], due_s=[20, 60, 40])  # one of them earlier than the other reader said
        cache.prefetch(origin, blocks[6:])  # now
        gate.go.set()
        wait_until(lambda: cache.stats().misses == 7)
    assert [at // SIZE for _, at in origin.fetched] == [0, 6, 2, 3, 1, 5, 4]


@pytest.mark.usefixtures("one_at_a_time")
def test_a_reader_that_goes_elsewhere_takes_back_what_nobody_else_wants(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 6)
    gate = Gate(origin)
    with on_disk(disk, 10) as cache:
        one, two = cache.reader(), cache.reader()
        one.prefetch(origin, blocks[:4])
        gate.begun.wait()
        two.prefetch(origin, blocks[3:5])
        one.forget()
        one.prefetch(origin, blocks[5:])
        gate.go.set()
        wait_until(lambda: cache.stats().misses == 4 and not cache._flights)
        assert cache.stats().prefetch_bytes == 0
    assert [at // SIZE for _, at in origin.fetched] == [0, 3, 4, 5]


def test_blocks_held_for_a_reader_that_goes_elsewhere_are_let_go(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 4)
    with on_disk(disk, 0, prefetch_bytes=3 * SIZE) as cache:
        reader = cache.reader()
        reader.prefetch(origin, blocks)
        wait_until(lambda: len(origin.fetched) == 3 and not cache._flights)
        assert cache.stats().prefetch_bytes == 3 * SIZE
        reader.close()
        assert cache.stats().prefetch_bytes == 0


@pytest.mark.usefixtures("one_at_a_time")
def test_slack_is_the_time_until_the_first_missing_block_is_due(origin: Origin, disk: Path) -> None:
    blocks = make_blocks(origin, 4)
    gate = Gate(origin)
    with on_disk(disk, 10) as cache:
        one, two = cache.reader(), cache.reader()
        assert cache.stats().slack_s == one.slack_s == 0
        one.prefetch(origin, blocks[:2], due_s=[1000, 3000])
        gate.begun.wait()
        two.prefetch(origin, blocks[2:], due_s=[2000, 2500])
        assert 0 < cache.stats().slack_s <= 1000
        assert 0 < one.slack_s <= 1000 < two.slack_s <= 2000
        gate.go.set()
        wait_until(lambda: cache.stats().misses == 4 and not cache._flights)
        assert 2000 < two.slack_s <= 2500 < cache.stats().slack_s <= 3000, "all are there: until the last one is due"
        one.forget()
        assert one.slack_s == 0


def test_the_number_of_fetches_falls_while_slack_is_long_and_rises_when_it_is_short() -> None:
    before = counters.snapshot()
    pace, limits = Pace(most=8), []
    for slack_s in [100.0] * 40 + [10.0] * 40 + [1.0] * 4:
        pace.landed(slack_s=slack_s, fetch_s=1.0)
        limits.append(pace.limit)
    assert limits[:40] == sorted(limits[:40], reverse=True) and limits[39] == 1
    assert set(limits[40:80]) == {1}, "between the two nothing changes"
    assert limits[80:] == [2, 4, 8, 8]
    counted = counters.since(before)
    assert (counted["cache.prefetch.lowered"], counted["cache.prefetch.raised"]) == (7, 3)


def test_no_more_fetches_are_under_way_than_the_pace_allows(origin: Origin, disk: Path) -> None:
    with on_disk(disk, 100) as cache:
        cache.prefetch(origin, make_blocks(origin, 40), due_s=[1000.0] * 40)
        wait_until(lambda: cache.stats().misses == 40 and not cache._flights)
        limit = cache.stats().prefetch_fetches
        assert 1 <= limit < 8
        gate = Gate(origin)
        cache.prefetch(origin, make_blocks(origin, 10, key="more"), due_s=[1000.0] * 10)
        wait_until(lambda: len(origin.fetched) == 40 + limit)
        assert (len(cache._under_way), len(cache._queue)) == (limit, 10 - limit)
        gate.go.set()
        wait_until(lambda: cache.stats().misses == 50)


# --- a file system that others fill ----------------------------------------------------------------------------------


def test_a_file_system_below_its_floor_takes_nothing_until_there_is_space_again(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    blocks = make_blocks(origin, 6)
    monkeypatch.setattr("stoker.storage.tiers._warned", set())
    before = counters.snapshot()
    with on_disk(disk, 100) as cache:
        assert cache._disk is not None
        free = 2 * FILE
        monkeypatch.setattr(cache._disk, "_bytes_above_floor", lambda: free - len(files(disk)) * FILE)
        for _ in range(2):
            read(cache, origin, blocks[:4])
        assert (len(files(disk)), cache.stats().pass_through) == (2, 4)
        assert caplog.text.count("too little free space") == 1
        assert counters.since(before)["cache.disk.below_floor"] == 4
        free = 100 * FILE
        read(cache, origin, blocks)
        assert len(files(disk)) == 6


def test_the_floor_is_that_of_the_real_file_system(origin: Origin, disk: Path, tmp_path: Path) -> None:
    (block,) = make_blocks(origin, 1)
    with on_disk(tmp_path / "none", 100, min_free="1000 TiB") as cache:
        read(cache, origin, [block])
        assert cache.stats().pass_through == 1
    with on_disk(disk, 100, min_free=0) as cache:
        read(cache, origin, [block])
        assert cache.stats().pass_through == 0


def test_blocks_go_for_newcomers_where_others_fill_the_file_system(
    origin: Origin, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks = make_blocks(origin, 12)
    with on_disk(disk, 100, eviction="sieve") as cache:
        assert cache._disk is not None
        monkeypatch.setattr(cache._disk, "_bytes_above_floor", lambda: (3 - len(files(disk))) * FILE)
        read(cache, origin, blocks)
        assert (len(files(disk)), cache.stats().pass_through) == (3, 0)
        assert cache.stats().disk_bytes == 3 * FILE
