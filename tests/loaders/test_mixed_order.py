"""The order of a mixture: every source's rows once each in every lane, at their rates, over changes, caps and ends."""

import json
from itertools import pairwise
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import ConfigError
from stoker.loaders.mixed_order import MIXTURE_VERSION, MixedOrder, MixedSource, SampleIds, Stop, source_seed
from stoker.loaders.order import ENDLESS, OrderV1, Window

GOLDEN = Path(__file__).parent.parent / "data" / "mixture-v1.json"
NAMES = ["web", "code", "math", "books", "wiki", "chat", "law"]

WEIGHTS = st.one_of(st.integers(1, 9), st.integers(1, 2**24))


@st.composite
def mixtures(
    draw: st.DrawFn, caps: bool = True, weight: st.SearchStrategy[int] = WEIGHTS
) -> tuple[list[MixedSource], list[tuple[int, dict[str, int]]], int]:
    """Sources, a schedule in which some sources come and go, and lanes."""
    lanes = draw(st.integers(1, 7))
    names = NAMES[: draw(st.integers(1, len(NAMES)))]
    sources = [
        MixedSource(
            name,
            draw(st.integers(lanes * 8, 400)),
            1 << draw(st.integers(0, 3)),
            draw(st.none() | st.integers(1, 300)) if caps and i else None,
        )
        for i, name in enumerate(names)
    ]
    starts = [0, *np.cumsum(draw(st.lists(st.integers(lanes, 300), max_size=3))).tolist()]
    schedule = []
    for start in starts:
        present = {name: draw(weight) for name in names[1:] if draw(st.booleans())}
        schedule.append((start, {names[0]: draw(weight), **present}))  # the first has no cap: some source always stays
    return sources, schedule, lanes


def made(mixture: tuple[list[MixedSource], Any, int], **options: Any) -> MixedOrder:
    sources, schedule, lanes = mixture
    return MixedOrder(sources, schedule, window=Window(lanes=lanes, blocks=2), **options)


class Plain:
    """The definition, row after row and node after node, with counters that are carried along."""

    def __init__(self, order: MixedOrder) -> None:
        self.order = order
        self.rows = np.zeros((len(order.sources), order.lanes), int)

    def stream(self, rows: int) -> list[tuple[int, int]]:
        out, segments = [], list(self.order.segments)
        for row in range(rows):
            if segments and segments[0].row == row:
                segment = segments.pop(0)
                passed = np.zeros((len(segment.shares), self.order.lanes), int)  # by each node, and to its left
                left = segment.offsets.copy()
            for lane in range(self.order.lanes):
                node = 0
                while segment.leaf_source[node] < 0:
                    passed[node, lane] += 1
                    left[node, lane] += segment.shares[node]
                    goes_left = left[node, lane] >= 1 << 24
                    left[node, lane] &= (1 << 24) - 1
                    node = int((segment.left if goes_left else segment.right)[node])
                source = int(segment.leaf_source[node])
                out.append((source, int(self.rows[source, lane]) * self.order.lanes + lane))
                self.rows[source, lane] += 1
        return out


def test_the_mixture_is_that_of_version_1() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["mixture_version"] == MIXTURE_VERSION
    sources = [MixedSource(**source) for source in golden["sources"]]
    order = MixedOrder(sources, golden["schedule"], window=Window(**golden["window"]), **golden["options"])
    source, at = order.locate(np.array(golden["positions"]))
    assert source.tolist() == golden["source"]
    assert at.tolist() == golden["own_position"]
    assert order(np.array(golden["positions"])).tolist() == golden["id"]
    assert [list(segment) for segment in order.segments_before(10**18)] == golden["segments"]
    assert [order.run_end(0, epochs) for epochs in (1, 2, 3)] == golden["run_ends"]


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures(), seed=st.integers(0, 2**63 - 1))
def test_the_stream_is_that_of_the_plain_definition_and_loses_and_repeats_nothing(mixture: Any, seed: int) -> None:
    order = made(mixture, seed=seed)
    plain = Plain(order)
    rows = 1200 // order.lanes
    expected = plain.stream(rows)
    positions = np.arange(rows * order.lanes)
    source, at = order.locate(positions)
    assert list(zip(source.tolist(), at.tolist(), strict=True)) == expected
    # In every lane each source's own rows come once each, in order.
    for j in range(len(order.sources)):
        for lane in range(order.lanes):
            of_lane = at[(source == j) & (positions % order.lanes == lane)]
            assert of_lane.tolist() == list(range(lane, len(of_lane) * order.lanes, order.lanes))
    some = np.random.default_rng(seed % 2**32).permutation(positions)[:100].reshape(4, 25)
    assert np.array_equal(order.locate(some)[0], source[some])
    assert np.array_equal(order.locate(some)[1], at[some])
    for position in (0, 1, order.lanes, *some[0].tolist()):
        assert (
            order.samples_before(position).tolist()
            == np.bincount(source[:position], minlength=len(plain.rows)).tolist()
        )


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures(caps=False), start=st.integers(0, 2**55))
def test_far_positions_are_as_exact_as_near_ones(mixture: Any, start: int) -> None:
    order = made(mixture)
    positions = start + np.arange(300)
    source, at = order.locate(positions)
    before = order.samples_before(start)
    counts = order.samples_before(start + 300) - before
    assert counts.tolist() == np.bincount(source, minlength=len(before)).tolist()
    assert len({*zip(source.tolist(), at.tolist(), strict=True)}) == 300
    assert (at % order.lanes == positions % order.lanes).all()


@pytest.mark.parametrize("sources", [2, 7, 40])
def test_every_lane_follows_the_weights_to_within_a_few_rows(sources: int) -> None:
    weights = np.random.default_rng(sources).dirichlet(np.full(sources, 0.5))
    whole = {f"s{i}": max(1, round(w * 2**24)) for i, w in enumerate(weights)}
    shares = np.array(list(whole.values())) / sum(whole.values())
    order = MixedOrder([MixedSource(name, 10**6, 1) for name in whole], [(0, whole)])
    lanes, rows = order.lanes, 3000
    source, _ = order.locate(np.arange(rows * lanes))
    taken = (source.reshape(rows, lanes, 1) == np.arange(sources)).cumsum(axis=0)
    ideal = np.arange(1, rows + 1)[:, None, None] * shares
    assert np.abs(taken - ideal).max() < (sources - 1).bit_length()  # a row at each node on the way
    # Lanes are out of step: a global batch of one row of all lanes does not take all of one source.
    of_first = (source.reshape(rows, lanes) == 0).sum(axis=1)
    assert 0 < np.ptp(of_first) < lanes


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures(), at=st.integers(1, 1500), weight=WEIGHTS)
def test_a_new_source_and_new_weights_change_nothing_before_and_no_source_s_own_order(
    mixture: Any, at: int, weight: int
) -> None:
    sources, schedule, lanes = mixture
    old = made(mixture)
    at = max(at, schedule[-1][0] + lanes)
    later = {name: weight + i for i, name in enumerate(schedule[-1][1])}
    new = made(([MixedSource("aaa", 57, 4), *sources], [*schedule, (at, {**later, "aaa": weight})], lanes))
    border = -(-at // lanes) * lanes
    positions = np.arange(border)
    assert np.array_equal(new.locate(positions)[0] - 1, old.locate(positions)[0])
    assert np.array_equal(new.locate(positions)[1], old.locate(positions)[1])
    assert new.segments_before(border) == old.segments_before(border)
    source, own = new.locate(np.arange(border + 600))
    for j in range(len(sources)):
        for lane in range(lanes):
            of_lane = own[(source == j + 1) & (np.arange(len(own)) % lanes == lane)]
            assert of_lane.tolist() == list(range(lane, len(of_lane) * lanes, lanes))
        samples = SampleIds([4, *(s.samples_per_block for s in sources)]).samples(
            j + 1, new(np.flatnonzero(source == j + 1))
        )
        assert np.array_equal(samples, old.orders[j](own[source == j + 1]))
    if "aaa" in new.sources[0].name:
        assert (source[border:] == 0).any()


@settings(max_examples=40, deadline=None)
@given(mixture=mixtures(weight=st.integers(1, 9)))
def test_a_cap_is_never_exceeded_and_what_it_leaves_unread_is_counted(mixture: Any) -> None:
    order = made(mixture)
    end = order.segments[-1].row * order.lanes + 3000
    source, at = order.locate(np.arange(end))
    unread = order.unread_before(end)
    for j, capped in enumerate(order.sources):
        own = at[source == j]
        if capped.cap is None:
            assert unread[j] == 0
            continue
        assert not own.size or own.max() < capped.cap
        if capped.name in mixture[1][-1][1]:
            assert len(own) + unread[j] == capped.cap
            assert 0 <= unread[j] < order.lanes * (1 + log2(max(2, len(order.sources))))


@settings(max_examples=30, deadline=None)
@given(mixture=mixtures(caps=False, weight=st.integers(1, 9)), epochs=st.integers(1, 3))
def test_a_run_ends_with_the_first_or_the_last_source_exhausted(mixture: Any, epochs: int) -> None:
    first, last = (made(mixture, stop=stop) for stop in ("first_exhausted", "all_exhausted"))
    sizes = np.array([source.num_samples for source in first.sources])
    start = np.zeros(len(sizes), int)
    end = 0
    for _ in range(2):
        begin, end = end, first.run_end(end, epochs)
        source, at = first.locate(np.arange(begin, end + first.lanes))
        in_run, own = source[: end - begin], at[: end - begin]
        reads = np.bincount(in_run, minlength=len(sizes))
        goal = start + epochs * sizes
        assert (start + reads <= goal).all() and (own < goal[in_run]).all()
        beyond = first.samples_before(end)  # one row of all lanes more would be too much for one of them, in some lane
        exhausted = [j for j in range(len(sizes)) if goal[j] - beyond[j] < first.lanes * (1 + log2(max(2, len(sizes))))]
        assert exhausted
        start = beyond
    goal_end = last.run_end(0, epochs)
    reads = last.samples_before(goal_end)
    staying = list(last.segments[-1].sources)
    source, at = last.locate(np.arange(goal_end))
    for j in staying:
        assert np.isin(np.arange(epochs * sizes[j]), at[source == j]).all()
    waited = [j for j in range(len(sizes)) if reads[j] >= epochs * sizes[j]]
    source, at = last.locate(np.arange(goal_end - last.lanes))
    assert not all(np.isin(np.arange(epochs * sizes[j]), at[source == j]).all() for j in waited)
    assert made(mixture, stop="never").run_end(0, epochs) == ENDLESS


def test_a_source_with_a_cap_ends_no_run_and_the_stream_ends_where_all_have_left() -> None:
    sources = [MixedSource("a", 100, 1, 150), MixedSource("b", 300, 1, 300)]
    stops: tuple[Stop, ...] = ("first_exhausted", "all_exhausted", "never")
    for stop in stops:
        order = MixedOrder(sources, [(0, {"a": 1, "b": 1})], window=Window(lanes=2), stop=stop)
        assert [segment.sources for segment in order.segments] == [(0, 1), (1,), ()]
        assert 440 < order.end <= 450 and order.end % 2 == 0
        assert tuple(order.samples_before(order.end) + order.unread_before(order.end)) == (150, 300)
        assert order.run_end(0, 3) == order.end
        if stop == "first_exhausted":
            assert 190 < order.run_end(0, 1) <= 200  # the first source is read once before its cap
        else:
            assert order.run_end(0, 1) == order.end
        assert order.run_end(order.end, 1) == order.end


def test_the_order_of_sources_and_of_weights_has_no_effect() -> None:
    sources = [MixedSource(name, 97, 2) for name in NAMES]
    weights = {name: i + 1 for i, name in enumerate(NAMES)}
    turned = dict(reversed(weights.items()))
    one = MixedOrder(sources, [(0, weights)]).locate(np.arange(2000))
    other = MixedOrder(sources[::-1], [(0, turned)]).locate(np.arange(2000))
    assert np.array_equal(one[0], len(NAMES) - 1 - other[0])
    assert np.array_equal(one[1], other[1])


def test_a_source_has_an_order_of_its_own_by_its_name() -> None:
    order = MixedOrder(
        [MixedSource("web", 5000, 4), MixedSource("code", 5000, 4)], [(0, {"web": 1, "code": 1})], seed=3
    )
    for own, name in zip(order.orders, ("web", "code"), strict=True):
        alone = OrderV1(num_samples=5000, seed=source_seed(3, name), samples_per_block=4)
        assert np.array_equal(own(np.arange(6000)), alone(np.arange(6000)))
    assert not np.array_equal(order.orders[0](np.arange(100)), order.orders[1](np.arange(100)))
    assert all(0 <= source_seed(seed, "web") < 2**63 for seed in range(100))


def test_sample_ids_tell_source_sample_and_block() -> None:
    ids = SampleIds([4, 16, 1])
    for source, own in ((0, 4), (1, 16), (2, 1)):
        samples = np.arange(200)
        made_ids = ids.make(source, samples)
        assert (ids.sources(made_ids) == source).all()
        assert np.array_equal(ids.samples(source, made_ids), samples)
        blocks = made_ids // ids.samples_per_block
        assert [int(a) == int(b) for a, b in pairwise(blocks)] == [
            a // own == b // own for a, b in pairwise(range(200))
        ]


@pytest.mark.parametrize(
    ("weights", "told"),
    [
        ([(0, {"a": 1, "b": 2**24, "c": 2**24})], "a: a weight must be 2\\^-24 of those beside it at least, or 0"),
        ([(0, {"a": 1}), (40, {"b": 1}), (48, {"a": 2})], "start 48 positions apart, .* got '40 and 48'"),
        ([(0, {"d": 1}), (4800, {"b": 1})], "got 'at position 96 the last one has reached its cap"),
    ],
)
def test_segments_that_can_t_be_are_refused(weights: Any, told: str) -> None:
    sources = [MixedSource(name, 1000, 1, cap=100 if name == "d" else None) for name in "abcd"]
    with pytest.raises(ConfigError, match=told):
        MixedOrder(sources, weights)


def test_blocks_too_unlike_for_sample_ids_are_refused() -> None:
    sources = [MixedSource("a", 2**40, 1), MixedSource("b", 2**20, 2**10)]
    with pytest.raises(ConfigError, match="a source may have 2\\^48 samples"):
        MixedOrder(sources, [(0, {"a": 1, "b": 1})])
    with pytest.raises(ConfigError, match="stop must be one of first_exhausted"):
        MixedOrder(sources[:1], [(0, {"a": 1})], stop="last")  # type: ignore[arg-type]
