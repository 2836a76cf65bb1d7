"""What a loader tells its cache: the plan of the whole node, in time, and windows that the cache has room for."""

import gc
import json
import logging
import os
import weakref
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import ConfigError
from stoker.loaders import Mixture, TokenDataset, TokenLoader
from stoker.loaders._ahead import lanes_of_ranks, ranks_of_node
from stoker.loaders._lookahead import Lookahead
from stoker.loaders._window import CacheRoom, fitting_window
from stoker.loaders.order import OrderV1, Window, consecutive_rank_rows
from stoker.metrics import counters
from stoker.storage import TieredCache
from stoker.storage.eviction import NextUse
from stoker.testing import S3Server
from tests.loaders.token_sets import random_documents, write_set

SEQ_LEN, BLOCK_TOKENS = 16, 64
FILE = 8192  # of a block of 128 bytes in a tier
SMALL = Window(lanes=4, blocks=2)


@pytest.fixture(scope="module")
def sets(s3_server: S3Server) -> list[str]:
    """Two data sets in the store, of some hundred blocks."""
    urls = [s3_server.url("stoker", f"ahead-{number}") for number in range(2)]
    for number, url in enumerate(urls):
        documents = random_documents(300, mean=40, seed=number)
        write_set(
            url, documents, block_tokens=BLOCK_TOKENS, blocks_per_shard=32, storage_options=s3_server.storage_options
        )
    return urls


def opened(url: str, cache: TieredCache, s3_server: S3Server) -> TokenDataset:
    return TokenDataset(url, seq_len=SEQ_LEN, cache=cache, storage_options=s3_server.storage_options)


def planned_names(cache: TieredCache) -> set[str]:
    """What any plan in the disk tier names."""
    assert cache._disk is not None
    policy = cache._disk._policy
    assert isinstance(policy, NextUse)
    return {name for plan in policy._plans.values() for name in plan.uses}


# --- the plan ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(1, 900),
    per_block=st.sampled_from([1, 2, 4, 8]),
    lanes=st.integers(1, 7),
    window=st.sampled_from([1, 2, 4]),
    shuffle=st.sampled_from(["window", "window", "none"]),
    cuts=st.lists(st.integers(0, 2700), max_size=3),
    chosen=st.sets(st.integers(0, 6)),
)
def test_every_block_is_announced_before_its_first_row_and_for_as_long_as_it_is_read(
    num_samples: int, per_block: int, lanes: int, window: int, shuffle: Any, cuts: list[int], chosen: set[int]
) -> None:
    order = OrderV1(
        num_samples=num_samples, seed=3, samples_per_block=per_block, lanes=lanes, window_blocks=window, shuffle=shuffle
    )
    own = np.array(sorted(lane for lane in chosen if lane < lanes), np.int64)
    end = 3 * num_samples
    edges = sorted({0, end, *(cut for cut in cuts if cut < end)})
    parts = [order.blocks_between(a, b, lanes=own) for a, b in pairwise(edges)]
    begins, blocks = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
    assert (np.diff(begins) >= 0).all()
    positions = np.arange(end)
    read = order(positions) // per_block
    mine = np.isin(positions % lanes, own) | (positions % num_samples >= order.lane_samples) | (shuffle == "none")
    announced: dict[int, list[int]] = {}
    for at, block in zip(begins.tolist(), blocks.tolist(), strict=True):
        announced.setdefault(block, []).append(at)
    for position, block in zip(positions[mine].tolist(), read[mine].tolist(), strict=True):
        latest = max(at for at in announced[block] if at <= position)
        assert position - latest < order.block_span + per_block


def test_an_order_without_windows_announces_nothing() -> None:
    order = OrderV1(num_samples=100, seed=0, samples_per_block=4, shuffle="full")
    assert [len(found) for found in order.blocks_between(0, 200, lanes=np.arange(48))] == [0, 0]


@given(
    lanes=st.integers(1, 12),
    rows=st.integers(1, 6),
    world_size=st.integers(1, 8),
    first=st.integers(0, 7),
    data=st.data(),
)
def test_the_lanes_of_some_ranks_are_those_of_their_rows(
    lanes: int, rows: int, world_size: int, first: int, data: st.DataObject
) -> None:
    ranks = range(first % world_size, data.draw(st.integers(first % world_size + 1, world_size)))
    split = {"world_size": world_size, "global_batch": rows * world_size, "lanes": lanes}
    told = lanes_of_ranks(ranks, **split)
    steps = np.concatenate([consecutive_rank_rows(5, steps=lanes, rank=rank, **split).ravel() for rank in ranks])
    assert set(told.tolist()) == set((steps % lanes).tolist())


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, range(8)),
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}, range(4, 8)),
        ({"RANK": 11, "WORLD_SIZE": 16, "LOCAL_RANK": 3, "LOCAL_WORLD_SIZE": 8}, range(8)),  # ranks of a mesh
        ({"RANK": 5, "WORLD_SIZE": 8, "LOCAL_RANK": 1}, range(8)),
        ({"RANK": "five", "WORLD_SIZE": 8, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 4}, range(8)),
    ],
)
def test_the_ranks_of_a_node_are_those_that_the_launcher_tells_or_all(
    environment: dict[str, Any], expected: range, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    assert ranks_of_node(5, 8) == expected


def test_epochs_through_a_small_cache_hit_what_fits_and_deliver_the_same(
    sets: list[str], s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is fetched when, and so what is evicted, must not depend on threads: blocks come by their gets alone.
    monkeypatch.setattr(TieredCache, "_prefetch", lambda *args: None)
    streams, missed = [], []
    for eviction in ("plan", "keep"):
        with (
            TieredCache(
                ram=0,
                disk=tmp_path / eviction,
                disk_capacity=100 * FILE,
                eviction=eviction,
            ) as cache,
            opened(sets[0], cache, s3_server) as dataset,
        ):
            blocks = dataset.manifest.blocks
            assert blocks > 150
            dataset._tables.preload(list(range(dataset.manifest.shards)))  # a plan would wait for them
            dataset._open_source().max_views = 8  # type: ignore[attr-defined]  # the window, and no second cache
            with TokenLoader(dataset, batch_size=8, shuffle=SMALL, epochs=3, prefetch_blocks=4) as loader:
                streams.append([batch["input_ids"].tolist() for batch in loader])
            missed.append(cache.stats().misses)
            assert cache.stats().disk_bytes <= 100 * FILE
    assert streams[0] == streams[1]
    # The windows take their room in the cache: 8 blocks, and 4 ahead, of 100. Else the plan equals the pin.
    assert missed[0] <= missed[1] + 2 * (8 + 4) < 3 * blocks


def wait_until(condition: Callable[[], bool]) -> None:
    """For what another thread is about to do; pytest-timeout guards it."""
    while not condition():
        os.sched_yield()


def test_a_loader_that_is_dropped_without_a_close_takes_its_plan_back(
    sets: list[str], s3_server: S3Server, tmp_path: Path
) -> None:
    cache = TieredCache(ram=0, disk=tmp_path / "cache", disk_capacity="16MiB")
    with cache, opened(sets[0], cache, s3_server) as dataset:
        assert cache._disk is not None
        loader = TokenLoader(dataset, batch_size=4, shuffle=SMALL)
        next(loader)
        assert planned_names(cache)
        kept, dropped = loader._ahead, weakref.ref(loader)
        loader.cycle = loader  # type: ignore[attr-defined]  # only the garbage collector finds it
        del loader
        # It may run in any thread, also in one that holds these locks.
        with cache._lock, cache._disk._policy_lock:
            gc.collect()
        assert dropped() is None
        wait_until(lambda: not cache._readers)
        assert not planned_names(cache)
        assert kept is not None
        with TokenLoader(dataset, batch_size=4, shuffle=SMALL) as other:
            next(other)
            del kept
        assert not cache._readers


def test_the_plan_names_what_all_ranks_of_the_node_will_read(
    sets: list[str], s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    cache = TieredCache(ram=0, disk=tmp_path / "cache", disk_capacity="16MiB")
    with cache, opened(sets[0], cache, s3_server) as dataset:
        split = {"batch_size": 2, "world_size": 4, "shuffle": Window(lanes=8, blocks=2), "seed": 1}
        with TokenLoader(dataset, rank=1, **split) as loader:  # type: ignore[arg-type]
            next(loader)
            told = planned_names(cache)
        assert not planned_names(cache), "a loader that is closed needs nothing"
        names = []
        for rank in range(4):
            other = TieredCache(ram=0, disk=tmp_path / f"rank{rank}", disk_capacity="16MiB", eviction="keep")
            with other, opened(sets[0], other, s3_server) as own:
                for _ in TokenLoader(own, rank=rank, **split):  # type: ignore[arg-type]
                    pass
                names.append({path.name for path in (tmp_path / f"rank{rank}" / "blocks").glob("*/*")})
        assert names[0] | names[1] <= told
        assert len((names[2] | names[3]) - told) > len(told) // 2, "the other node reads blocks of its own"


def test_a_mixture_tells_the_plan_of_each_of_its_sources(sets: list[str], s3_server: S3Server, tmp_path: Path) -> None:
    cache = TieredCache(ram=0, disk=tmp_path / "cache", disk_capacity="16MiB")
    with cache, opened(sets[0], cache, s3_server) as one, opened(sets[1], cache, s3_server) as two:
        mixture = Mixture({"one": (one, 0.75), "two": (two, 0.25)})
        with TokenLoader(mixture, batch_size=8, shuffle=SMALL, epochs=2) as loader:
            next(loader)
            assert cache._disk is not None and isinstance(cache._disk._policy, NextUse)
            plans = list(cache._disk._policy._plans.values())
            assert len(plans) == 2
            assert all(len(plan.uses) > 100 for plan in plans)
            told = planned_names(cache)
            for _ in islice(loader, 40):
                pass
            assert {path.name for path in (tmp_path / "cache" / "blocks").glob("*/*")} <= told


def test_a_loader_that_jumps_forgets_what_it_asked_for(sets: list[str], s3_server: S3Server, tmp_path: Path) -> None:
    cache = TieredCache(ram=0, disk=tmp_path / "cache", disk_capacity="16MiB")
    with cache, opened(sets[0], cache, s3_server) as dataset:
        loader = TokenLoader(dataset, batch_size=8, shuffle=SMALL, epochs=2)
        start = loader.state_dict()
        for _ in islice(loader, 20):
            pass
        assert planned_names(cache)
        loader.load_state_dict(start)
        assert not planned_names(cache)
        with cache._lock:
            assert not any(wanted.reader for wanted in cache._queue._wanted.values())
        next(loader)
        assert planned_names(cache)
        loader.close()


def test_each_row_is_asked_for_with_the_time_until_it_is_due(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[list[int], list[float]]] = []
    told: list[int] = []

    class Asked:
        def prefetch(self, samples: Any, due_s: Any) -> None:
            asked.append((samples.tolist(), due_s.tolist()))

        def reached(self, row: int) -> None:
            told.append(row)

    now = 100.0
    monkeypatch.setattr("stoker.loaders._lookahead.perf_counter", lambda: now)
    ahead = Lookahead(Asked(), samples_per_block=1, max_blocks=12, batch_size=4)
    ahead.extend(np.arange(100))
    ahead.advance(0)
    assert asked[0] == ([0, 1, 2, 3], [0, 0, 0, 0]), "nobody knows the pace yet"
    for row in (4, 8, 12):
        now += 2.0
        before = len(asked)
        ahead.advance(row)
        for samples, due_s in asked[before:]:
            assert due_s == [(sample - row) * 0.5 for sample in samples]
    assert len(asked) == 3
    assert told == [0, 4, 8, 12]


# --- windows and the room for them ------------------------------------------------------------------------------------


def room(capacity_bytes: int, *, blocks: int = 10**6, block_bytes: int = 4 << 20) -> CacheRoom:
    return CacheRoom(
        place="set",
        seq_len=2048,
        blocks=blocks,
        block_bytes=block_bytes,
        data_bytes=blocks * block_bytes,
        capacity_bytes=capacity_bytes,
    )


def test_windows_get_a_quarter_of_the_largest_tier_and_are_made_smaller_for_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for gib, blocks in ((4, 4), (3, 4), (2, 2), (1, 1)):
        assert fitting_window([room(gib << 30)], given=None, world_size=1, place="x") == Window(blocks=blocks)
    assert caplog.text.count("another order") == 1 + 2
    two = [room(3 << 30), room(3 << 30)]
    assert fitting_window(two, given=None, world_size=1, place="x") == Window(blocks=2)
    assert fitting_window([], given=None, world_size=9, place="x") == Window()
    assert fitting_window([room(0, blocks=16)], given=None, world_size=9, place="x") == Window(), "a small set fits"


def test_samples_that_straddle_blocks_count_with_all_of_them_and_are_told_once(
    sets: list[str],
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("stoker.loaders._window._LEAST_BYTES", 0)
    monkeypatch.setattr("stoker.loaders._window._told", set())
    monkeypatch.setattr(TieredCache, "_prefetch", lambda *args: None)  # what is fetched when must not depend on threads
    options = s3_server.storage_options
    for seq_len, factor in ((16, 1.0), (48, 2.0), (24, 2.0), (40, 2.4)):
        caplog.clear()
        with (
            TieredCache(ram=0, disk=tmp_path / str(seq_len), disk_capacity=2 * FILE, eviction="keep") as cache,
            TokenDataset(sets[0], seq_len=seq_len, cache=cache, storage_options=options) as dataset,
        ):
            room = dataset.cache_room()
            assert room is not None
            assert room.fetch_factor == pytest.approx(factor, rel=0.05)
            dataset._open_source().max_views = 8  # type: ignore[attr-defined]  # the window, and no second cache
            with TokenLoader(dataset, batch_size=4, shuffle=Window(lanes=4, blocks=1)) as loader:
                for _ in loader:
                    pass
            # Some neighbours are read soon after each other.
            assert 0.75 * factor < cache.stats().misses / dataset.manifest.blocks < 1.05 * factor
            assert ("a power of two, once" in caplog.text) == (factor > 1)
            assert (f"fetches up to {room.fetch_factor:.2f} times the data set" in caplog.text) == (factor > 1)
            caplog.clear()
            TokenLoader(dataset, batch_size=4, shuffle=Window(lanes=4, blocks=1))
            assert not caplog.text
    large = CacheRoom(place="x", seq_len=48, blocks=400, block_bytes=192, data_bytes=38_400, capacity_bytes=38_400)
    fitting_window([large], given=None, world_size=1, place="x")
    assert "power of two" not in caplog.text, "a cache that holds the set fetches each block once"
    assert large.window_bytes(Window(blocks=8)) == large.data_bytes, "not more than there is"


@pytest.mark.parametrize(
    ("given", "world_size", "told", "hint"),
    [
        (None, 1, "48 lanes of 1 blocks each: 48 blocks of 4.0 MiB = 192.0 MiB, of a tier of 512.0 MiB", "fewer lanes"),
        (None, 2, "48 lanes of 4 blocks each", "fewer lanes"),
        (Window(lanes=24, blocks=2), 1, "24 lanes of 2 blocks each", "shuffle=Window(lanes=24, blocks=1)"),
    ],
)
def test_windows_that_do_not_fit_are_refused_with_all_numbers(
    given: Window | None, world_size: int, told: str, hint: str
) -> None:
    with pytest.raises(ConfigError, match=told) as caught:
        fitting_window([room(512 << 20)], given=given, world_size=world_size, place="TokenLoader")
    assert hint in caught.value.hint


def test_ranks_choose_no_window_by_their_cache_also_on_one_node(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert fitting_window([room(4 << 30)], given=None, world_size=8, place="x") == Window()
    with pytest.raises(ConfigError, match="48 lanes of 4 blocks each") as caught:
        fitting_window([room(2 << 30)], given=None, world_size=8, place="x")
    assert caught.value.hint.endswith("the same on every rank: shuffle=Window(blocks=2)")


def test_a_restored_stream_keeps_its_window_wherever_it_goes_on(
    sets: list[str],
    s3_server: S3Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("stoker.loaders._window._LEAST_BYTES", 0)
    caplog.set_level(logging.WARNING)
    states, streams = [], []
    for name, capacity in (("large", "1MiB"), ("small", "64KiB")):
        with (
            TieredCache(ram=0, disk=tmp_path / name, disk_capacity=capacity) as cache,
            opened(sets[0], cache, s3_server) as dataset,
        ):
            with TokenLoader(dataset, batch_size=8) as loader:
                first = [batch["position"].tolist() for batch in islice(loader, 5)]
                states.append(json.loads(json.dumps(loader.state_dict())))
                streams.append([batch["input_ids"].tolist() for batch in islice(loader, 5)])
            assert first
            with TokenLoader(dataset, batch_size=8) as again:
                again.load_state_dict(states[0])
                assert [batch["input_ids"].tolist() for batch in islice(again, 5)] == streams[0]
    assert [state["window_blocks"] for state in states] == [4, 2]
    assert streams[0] != streams[1]
    assert "too large for the cache" in caplog.text


def test_a_loader_tells_its_slack(sets: list[str], s3_server: S3Server, tmp_path: Path) -> None:
    before = counters.snapshot()
    with (
        TieredCache(ram=0, disk=tmp_path / "cache", disk_capacity="16MiB") as cache,
        opened(sets[0], cache, s3_server) as dataset,
        TokenLoader(dataset, batch_size=8, shuffle=SMALL) as loader,
    ):
        assert loader.stats().slack_s is None, "nothing was asked for"
        for _ in islice(loader, 20):
            pass
        slack_s = loader.stats().slack_s
        assert slack_s is not None and 0 <= slack_s < 60
    assert counters.since(before)["cache.misses"] > 0
