"""Order v1: every sample once per epoch, anywhere in closed form, pinned by golden values, dealt to ranks by lanes."""

import json
from collections import Counter
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import ConfigError
from stoker.loaders import order as order_module
from stoker.loaders.order import ORDER_VERSION, OrderV1, Shuffle, SkipRanges, consecutive_rank_rows, permute, rank_rows

GOLDEN = Path(__file__).parent.parent / "data" / "order-v1.json"

shapes = st.builds(
    OrderV1,
    num_samples=st.integers(1, 5000),
    seed=st.integers(0, 2**63 - 1),
    samples_per_block=st.sampled_from([1, 2, 8, 32, 128]),
    lanes=st.integers(1, 13),
    window_blocks=st.sampled_from([1, 2, 4]),
    shuffle=st.sampled_from(["window", "window", "window", "full", "none"]),
)


def small_order(**changes: Any) -> OrderV1:
    settings: dict[str, Any] = {
        "num_samples": 16 * 6 * 4 * 7 + 5,
        "seed": 3,
        "samples_per_block": 16,
        "lanes": 6,
        "window_blocks": 4,
    }
    return OrderV1(**{**settings, **changes})


# -- every sample once ------------------------------------------------------------------------------------------------


@settings(max_examples=120, deadline=None)
@given(order=shapes, first_epoch=st.integers(0, 10**6), call=st.integers(50, 4000))
def test_each_epoch_holds_every_sample_once_whatever_the_calls(order: OrderV1, first_epoch: int, call: int) -> None:
    n = order.num_samples
    start, end = first_epoch * n, (first_epoch + 3) * n
    # Calls of a length that has nothing to do with the epoch straddle its borders.
    got = np.concatenate([order(np.arange(a, min(a + call, end))) for a in range(start, end, call)])
    for epoch in got.reshape(3, n):
        assert np.array_equal(np.sort(epoch), np.arange(n))


@settings(max_examples=60, deadline=None)
@given(order=shapes, data=st.data())
def test_a_position_has_one_sample_in_whatever_company_it_is_asked(order: OrderV1, data: st.DataObject) -> None:
    positions = data.draw(st.lists(st.integers(0, 5 * order.num_samples), min_size=1, max_size=40))
    together = order(np.array(positions, np.uint64))
    alone = [int(order(np.array([p]))[0]) for p in positions]
    assert together.tolist() == alone
    assert together.dtype == np.int64


@settings(max_examples=80, deadline=None)
@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_bijection_of_any_domain(size: int, key: int) -> None:
    keys = np.array([key], np.uint64)
    values = np.arange(size, dtype=np.uint64)
    got = permute(keys, values, size)
    assert np.array_equal(np.sort(got), values)
    assert np.array_equal(permute(np.repeat(keys, size), values, size), got)  # one key for all or for each


def test_the_order_is_what_it_was_when_version_1_was_made() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["order_version"] == ORDER_VERSION
    assert len(golden["vectors"]) >= 12
    for vector in golden["vectors"]:
        order = OrderV1(**vector["order"])
        got = order(np.array(vector["positions"], np.uint64)).tolist()
        assert got == vector["samples"], vector["order"]


# -- what the shape promises ------------------------------------------------------------------------------------------


def lane_blocks(order: OrderV1, epoch: int) -> list[list[int]]:
    """The blocks of each lane in the order of their first use."""
    start = epoch * order.num_samples
    positions = np.arange(start, start + order.lane_samples)
    blocks = order(positions) // order.samples_per_block
    return [list(dict.fromkeys(blocks[positions % order.lanes == lane].tolist())) for lane in range(order.lanes)]


def test_a_lane_reads_the_same_blocks_every_epoch_in_a_new_order() -> None:
    order = small_order()
    first, second, third = (lane_blocks(order, epoch) for epoch in range(3))
    for lane in range(order.lanes):
        assert len(first[lane]) == order.blocks_per_lane == 28
        assert set(first[lane]) == set(second[lane]) == set(third[lane])
        assert first[lane] != second[lane] != third[lane]
    assert len({b for lane in first for b in lane}) == 6 * 28  # and no block belongs to two lanes


def windows_of(order: OrderV1, epoch: int) -> dict[int, list[tuple[int, ...]]]:
    """For each lane, the samples of each of its whole windows as they come."""
    window = order.window_blocks * order.samples_per_block
    start = epoch * order.num_samples
    positions = np.arange(start, start + order.lane_samples)
    windows = {}
    for lane in range(order.lanes):
        samples = order(positions[positions % order.lanes == lane])
        first = (window - lane * window // order.lanes) % window  # lanes join their first window in its middle
        whole = samples[first : first + (len(samples) - first) // window * window]
        windows[lane] = [tuple(w) for w in whole.reshape(-1, window).tolist()]
    return windows


def test_every_epoch_puts_other_blocks_of_a_lane_together() -> None:
    order = small_order()
    first, second = windows_of(order, 0), windows_of(order, 1)
    for lane in range(order.lanes):
        together = [{frozenset(s // 16 for s in w) for w in windows[lane]} for windows in (first, second)]
        assert len(together[0] & together[1]) <= 1


def test_no_two_windows_are_shuffled_alike() -> None:
    order = small_order()
    patterns = []
    for epoch in range(2):
        for windows in windows_of(order, epoch).values():
            for window in windows:
                blocks = {b: i for i, b in enumerate(dict.fromkeys(s // 16 for s in window))}
                patterns.append(tuple((blocks[s // 16], s % 16) for s in window))
    assert len(patterns) >= 72
    assert len(set(patterns)) == len(patterns)


def test_another_seed_deals_the_blocks_anew() -> None:
    assert {tuple(sorted(b)) for b in lane_blocks(small_order(seed=3), 0)} != {
        tuple(sorted(b)) for b in lane_blocks(small_order(seed=4), 0)
    }


def test_a_lane_finishes_a_window_before_it_starts_another_block() -> None:
    order = small_order()
    window = order.window_blocks * order.samples_per_block
    positions = np.arange(order.lane_samples)
    for lane in range(order.lanes):
        blocks = order(positions[positions % order.lanes == lane]) // order.samples_per_block
        ahead = lane * window // order.lanes  # of the other lanes
        for start in range(window - ahead, len(blocks) - window, window):
            assert len(set(blocks[start : start + window].tolist())) == order.window_blocks


def test_lanes_change_windows_at_different_times() -> None:
    order = small_order()
    positions = np.arange(order.lane_samples)
    blocks = order(positions) // order.samples_per_block
    _, first_use = np.unique(blocks, return_index=True)
    first_use = np.sort(first_use)[order.lanes * order.window_blocks :]  # the first windows all start together
    window = order.window_blocks * order.samples_per_block * order.lanes
    # In hard windows all first uses of a window would crowd at its start; staggered, each sixth of it has its share.
    share = np.histogram(first_use % window, bins=order.lanes, range=(0, window))[0] / len(first_use)
    assert share.max() < 0.3


def test_the_rest_of_an_epoch_is_shuffled_as_one() -> None:
    order = small_order(num_samples=16 * 6 * 4 * 7 + 16 * 5 + 5)
    rest = order(np.arange(order.lane_samples, order.num_samples))
    in_lanes = set((order(np.arange(order.lane_samples)) // 16).tolist())
    assert in_lanes.isdisjoint((rest // 16).tolist())
    assert set(range(order.num_samples - 5, order.num_samples)) <= set(rest.tolist())
    again = order(np.arange(order.lane_samples, order.num_samples) + order.num_samples)
    assert set(again.tolist()) == set(rest.tolist())
    assert len({tuple(sorted(rest.tolist())), tuple(rest.tolist()), tuple(again.tolist())}) == 3


def test_a_set_smaller_than_the_windows_is_shuffled_as_one() -> None:
    order = small_order(num_samples=16 * 6 * 4 - 1)
    assert order.lane_samples == 0
    got = order(np.arange(order.num_samples))
    assert sorted(got.tolist()) == list(range(order.num_samples))
    assert len(set(np.diff(got).tolist())) > order.num_samples // 4


def test_none_keeps_the_order_of_the_data_set() -> None:
    order = small_order(shuffle="none")
    n = order.num_samples
    assert np.array_equal(order(np.arange(2 * n)), np.tile(np.arange(n), 2))


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_epochs_and_seeds_differ(shuffle: Shuffle) -> None:
    order = small_order(shuffle=shuffle)
    n = order.num_samples
    orders = {tuple(order(np.arange(e * n, (e + 1) * n)).tolist()) for e in range(4)}
    orders |= {tuple(small_order(shuffle=shuffle, seed=s)(np.arange(n)).tolist()) for s in range(10, 14)}
    assert len(orders) == 8


# -- quality and cost -------------------------------------------------------------------------------------------------


def chi_square_z(values: np.ndarray, size: int, bins: int) -> float:
    """How far `values`, uniform on [0, size) by hypothesis, are from it, in standard deviations of chi-square."""
    counts = np.bincount(values.astype(np.int64) * bins // size, minlength=bins)
    edges = -(-np.arange(bins + 1) * size // bins)
    expected = np.diff(edges) / size * len(values)
    chi = float(((counts - expected) ** 2 / expected).sum())
    return float((chi - (bins - 1)) / (2 * (bins - 1)) ** 0.5)


@pytest.mark.parametrize("size", [12, 48, 200, 255, 300, 1000, 4096, 1 << 20])
def test_images_and_their_differences_are_uniform_over_keys(size: int) -> None:
    rng = np.random.default_rng(size)
    # Below 256 every key makes a table of its own, which costs more than a few rounds.
    keys = rng.integers(0, 2**63, 40_000 if size > 255 else 8_000).astype(np.uint64)
    x = int(rng.integers(0, size))

    def image(of: int) -> np.ndarray:
        return permute(keys, np.full(len(keys), of % size, np.uint64), size).astype(np.int64)

    assert abs(chi_square_z(image(x), size, min(size, 64))) < 4
    for step in (1, 2, size // 4, size // 2):
        apart = (image(x + step) - image(x)) % size - 1
        assert abs(chi_square_z(apart, size - 1, min(size - 1, 64))) < 4, step


def test_four_rounds_leave_no_trace_where_three_do(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, size = np.random.default_rng(1).integers(0, 2**63, 200_000).astype(np.uint64), 1024

    def images(x: int) -> np.ndarray:
        return permute(keys, np.full(len(keys), x, np.uint64), size).astype(np.int64)

    def trace_of(step: int) -> float:
        return chi_square_z((images(313 + step) - images(313)) % size - 1, size - 1, size - 1)

    for step in (1, 7, 16, 64, 512):
        assert abs(trace_of(step)) < 5
    monkeypatch.setattr(order_module, "_ROUNDS", 3)
    assert trace_of(512) > 10


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_neighbours_in_the_order_are_strangers_in_the_data_set(shuffle: Shuffle) -> None:
    order = OrderV1(num_samples=48 * 4 * 64 * 3 + 11, seed=1, samples_per_block=64, shuffle=shuffle)
    got = order(np.arange(order.num_samples))
    apart = np.abs(np.diff(got))
    n = order.num_samples
    # Of two samples drawn at random, the distance exceeds n/4 with probability 9/16.
    assert abs((apart > n / 4).mean() - 9 / 16) < 0.02
    assert (apart == 1).mean() < 5 / n + 0.002
    assert abs(np.corrcoef(got[:-1], got[1:])[0, 1]) < 0.03


@pytest.mark.parametrize("shuffle", ["window", "full"])
def test_the_cost_does_not_grow_with_the_data_set(shuffle: Shuffle, monkeypatch: pytest.MonkeyPatch) -> None:
    mixed: Counter[int] = Counter()
    bijection = order_module._scramble

    def counting(values: Any, *rest: Any) -> Any:
        mixed[size] += values.size
        return bijection(values, *rest)

    monkeypatch.setattr(order_module, "_scramble", counting)
    sizes = [10**6, 10**9, 10**12, 2**48]
    for size in sizes:
        order = OrderV1(num_samples=size, seed=5, samples_per_block=1024, shuffle=shuffle)
        for start in (0, size // 3, size - 2048, 7 * size + 11):
            order(np.arange(start, start + 1024))
    # Three bijections for a windowed sample, each evaluated at most twice on average (a domain is at least half full).
    assert max(mixed.values()) <= 4 * 1024 * 3 * 2.2
    assert all(mixed[size] > 0 for size in sizes)


# -- which rank reads which row ---------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None)
@given(
    start=st.integers(0, 10**12),
    steps=st.integers(1, 5),
    rows=st.integers(1, 12),
    world_size=st.sampled_from([1, 2, 3, 4, 5, 8, 13]),
    lanes=st.sampled_from([1, 2, 6, 7, 48]),
)
def test_ranks_share_each_step_by_lane_groups(start: int, steps: int, rows: int, world_size: int, lanes: int) -> None:
    batch = rows * world_size
    by_rank = [
        consecutive_rank_rows(start, steps=steps, global_batch=batch, lanes=lanes, world_size=world_size, rank=rank)
        for rank in range(world_size)
    ]
    positions = np.arange(start, start + steps * batch).reshape(steps, batch)
    for rank, got in enumerate(by_rank):
        assert got.dtype == np.int64
        assert np.array_equal(got, rank_rows(positions, lanes=lanes, world_size=world_size, rank=rank))
    whole = np.concatenate(by_rank, axis=1)
    assert np.array_equal(np.sort(whole, axis=1), positions)
    groups = whole % gcd(lanes, batch)
    assert (np.diff(groups, axis=1) >= 0).all()  # a rank's rows come from as few lane groups as can be


@pytest.mark.parametrize(("lanes", "batch", "nodes"), [(48, 192, 8), (48, 512, 8), (48, 480, 10), (6, 35, 5)])
def test_nodes_fetch_no_more_than_the_lane_rule_says(lanes: int, batch: int, nodes: int) -> None:
    order = OrderV1(num_samples=16 * lanes * 4 * 6 + 37, seed=7, samples_per_block=16, lanes=lanes)
    steps = order.num_samples // batch
    everywhere: set[int] = set()
    fetched = 0
    for node in range(nodes):
        rows = consecutive_rank_rows(0, steps=steps, global_batch=batch, lanes=lanes, world_size=nodes, rank=node)
        rows = rows[rows < order.lane_samples]
        own = set((order(rows) // 16).tolist())
        fetched += len(own)
        everywhere |= own
    groups = gcd(lanes, batch)
    assert fetched <= len(everywhere) * min(nodes, (groups + nodes - 1) / groups)
    if groups % nodes == 0:
        assert fetched == len(everywhere)


# -- skipped ranges ---------------------------------------------------------------------------------------------------

ranges = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)).map(lambda r: (r[0], r[0] + r[1])), max_size=8)


@settings(max_examples=150, deadline=None)
@given(ranges=ranges, start=st.integers(0, 260), count=st.integers(1, 60))
def test_skip_ranges_count_and_list_the_live_positions(ranges: list[tuple[int, int]], start: int, count: int) -> None:
    skip = SkipRanges(ranges)
    skipped = {p for a, b in ranges for p in range(a, b)}
    live = [p for p in range(500) if p not in skipped]
    assert skip.live_before(start) == sum(p < start for p in live)
    assert skip.live_positions(start, count).tolist() == [p for p in live if p >= start][:count]
    for i in (0, 1, 7, 150):
        assert skip.position_of(i) == live[i]
    first = skip.position_of(skip.live_before(start))
    assert first == min(p for p in live if p >= start)
    assert skip.next_skip(first) == min((p for p in skipped if p >= first), default=None)
    assert SkipRanges(skip.ranges).ranges == skip.ranges


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"num_samples": 0}, "num_samples must be from 1"),
        ({"seed": -1}, "seed must be from 0"),
        ({"seed": 2**63}, "seed must be from 0"),
        ({"samples_per_block": 24}, "samples_per_block must be a power of two"),
        ({"window_blocks": 0}, "window_blocks must be a power of two"),
        ({"lanes": 0}, "lanes must be from 1"),
        ({"shuffle": "block"}, "shuffle must be one of"),
    ],
)
def test_a_parameter_out_of_its_range_is_refused(changes: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        small_order(**changes)


def test_negative_positions_are_refused() -> None:
    with pytest.raises(ConfigError, match="positions must be >= 0, got -1"):
        small_order()(np.array([3, -1]))


@pytest.mark.parametrize("bad", [(3, 3), (-1, 2), (5, 4), (1, 2, 3), 7, ("a", "b")])
def test_a_skip_range_that_is_none_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigError, match="skip"):
        SkipRanges([bad])
