"""Which source, and which of its samples, stands at which position of a mixture: a tree of counters, in closed form.

A mixture has the lanes of :mod:`.order`: position ``P`` is row ``q = P // L`` of lane ``l = P % L``. In each lane a
binary tree deals the rows to the sources. A node that has passed on ``m`` rows has given ``(m * share + offset) >> 24``
of them to its left side, so the side that row ``m`` goes to, and its number there, follow from ``m`` alone; at the leaf
that number is how many rows of this lane the source had before. No state is carried from row to row, nothing is rounded
twice, and in every lane each source gets its rows 0, 1, 2, … once each. Row ``c`` of lane ``l`` of a source is the
source's own position ``c * L + l``: the lane is kept, and with it the nodes that read a block (:func:`~.order.rank_rows`).

Weights change at *segments*, which start at whole rows of all lanes. A segment has a tree of its own; what the sources
had before it follows from the trees of the segments before. So a change of weights, or one more source, loses nothing
and repeats nothing. A source that would exceed its cap in some lane leaves the mixture for all lanes at that row: there
a segment without it begins.

The mixture is a file format: loader states refer to it by :data:`MIXTURE_VERSION`, and ``tests/data/mixture-v1.json``
pins it.
"""

import hashlib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from .order import ENDLESS, OrderV1, Shuffle, Window, key_of

__all__ = [
    "MIXTURE_VERSION",
    "WEIGHT_BITS",
    "MixedOrder",
    "MixedSource",
    "SampleIds",
    "Segment",
    "Stop",
    "present",
    "source_seed",
]

MIXTURE_VERSION = 1
"""Stored in every state of a mixture. A change of any source or sample at any position needs a new number."""

Stop: TypeAlias = Literal["first_exhausted", "all_exhausted", "never"]
Int64Array: TypeAlias = NDArray[np.int64]

WEIGHT_BITS = 24
_ONE = 1 << WEIGHT_BITS
_MASK = _ONE - 1
_OFFSETS = 6  # what a key is for; .order has the numbers before it
_SOURCE_SHIFT = 48  # a sample id is the source's number above these bits, and a place in the source below


class MixedSource(NamedTuple):
    """What the order needs to know of a source.

    Attributes:
        name: unique; the seed of its own order follows from it.
        num_samples, samples_per_block: as :class:`~stoker.loaders.order.OrderV1` takes them.
        cap: samples that may be read of it; None for any number.
    """

    name: str
    num_samples: int
    samples_per_block: int
    cap: int | None = None


class Segment(NamedTuple):
    """A stretch of positions with the same weights.

    Attributes:
        row: of every lane, where it starts. digest: 16 hexadecimal digits that tell its names and weights.
        sources: numbers of those that have a weight, in the order of the tree's leaves.
        shares: of each node, what its left side gets of ``2^24``. left, right: the next node. The nodes without a leaf
            come first, parents before their children; a leaf leads to itself.
        offsets: ``(nodes, lanes)``, where in its first ``2^24`` a node's counter starts.
        leaf_source: of each node, the number of the source, -1 if it is no leaf.
        depth: steps from the root to the deepest leaf.
        base: ``(sources, lanes)``, rows of each lane that each source of the mixture had before. All int64.
    """

    row: int
    digest: str
    sources: tuple[int, ...]
    shares: Int64Array
    left: Int64Array
    right: Int64Array
    offsets: Int64Array
    leaf_source: Int64Array
    depth: int
    base: Int64Array


class SampleIds:
    """Sample ids of a mixture: ``source << 48`` plus a place in the source.

    Places are spread out so that ``id // samples_per_block`` is one number for each order block of each source.

    Args:
        samples_per_block: of each source, powers of two.

    >>> ids = SampleIds([2, 8]).make(0, np.arange(4))
    >>> ids.tolist(), SampleIds([2, 8]).samples(0, ids).tolist()
    ([0, 1, 8, 9], [0, 1, 2, 3])
    """

    def __init__(self, samples_per_block: Sequence[int]) -> None:
        self.samples_per_block = max(samples_per_block)
        self._masks = [own - 1 for own in samples_per_block]
        self._shifts = [(self.samples_per_block // own).bit_length() - 1 for own in samples_per_block]

    def make(self, source: int, samples: Int64Array) -> Int64Array:
        """Ids of a source's own sample numbers."""
        mask = self._masks[source]
        return (source << _SOURCE_SHIFT) + ((samples & ~mask) << self._shifts[source]) + (samples & mask)

    def samples(self, source: int, ids: Int64Array) -> Int64Array:
        """The source's own sample numbers, of ids that are all its own."""
        mask, places = self._masks[source], ids & ((1 << _SOURCE_SHIFT) - 1)
        return ((places >> self._shifts[source]) & ~mask) + (places & mask)

    @staticmethod
    def sources(ids: Int64Array) -> Int64Array:
        """The number of each id's source."""
        return ids >> _SOURCE_SHIFT


def source_seed(seed: int, name: str) -> int:
    """The seed of a source's own order: of the mixture's seed and the source's name, so that no other source matters.

    >>> source_seed(0, "web") == source_seed(0, "web") != source_seed(0, "code")
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


# Guarantees: immutable, so any number of threads may share one.
class MixedOrder:
    """The order of a mixture, as the module describes; stands in for :class:`~stoker.loaders.order.OrderV1`.

    Args:
        sources: in the order of their numbers.
        schedule: ``(position, {name: weight})`` ascending, the first at 0; weights are integers from 1 to 2^24. A start
            is rounded up to a whole row of all lanes.
        seed: 0 <= seed < 2^63. shuffle, window: of every source's own order; the mixture has the window's lanes.
        stop: what ends a run, see :meth:`run_end`.

    Raises:
        ConfigError: weights so far apart that a source would never come up; segments that start in the same row; caps
            that leave no source before the next segment.

    >>> web, code = MixedSource("web", 100, 1), MixedSource("code", 50, 1)
    >>> order = MixedOrder([web, code], [(0, {"web": 3, "code": 1})], seed=0, shuffle="none", window=Window(lanes=1))
    >>> source, at = order.locate(np.arange(8))
    >>> source.tolist(), at.tolist()
    ([1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 1, 2, 1, 3, 4, 5])
    """

    def __init__(
        self,
        sources: Sequence[MixedSource],
        schedule: Sequence[tuple[int, Mapping[str, int]]],
        *,
        seed: int = 0,
        shuffle: Shuffle = "window",
        window: Window | None = None,
        stop: Stop = "first_exhausted",
    ) -> None:
        if stop not in get_args(Stop):
            raise ConfigError(f"stop must be one of {', '.join(get_args(Stop))}", value=stop, place="Mixture")
        window = window or Window()
        self.sources = tuple(sources)
        self.seed, self.shuffle, self.stop = seed, shuffle, stop
        self.lanes, self.window_blocks = window.lanes, window.blocks
        self.ids = SampleIds([source.samples_per_block for source in sources])
        self.samples_per_block = self.ids.samples_per_block
        self.orders = tuple(
            OrderV1(
                num_samples=source.num_samples,
                seed=source_seed(seed, source.name),
                samples_per_block=source.samples_per_block,
                lanes=window.lanes,
                window_blocks=window.blocks,
                shuffle=shuffle,
            )
            for source in sources
        )
        for source in sources:
            blocks = -(-source.num_samples // source.samples_per_block)
            if blocks * self.samples_per_block > 1 << _SOURCE_SHIFT:
                raise ConfigError(
                    "a source may have 2^48 samples, counted in the largest order blocks of all sources",
                    value=f"{blocks} blocks of up to {self.samples_per_block}",
                    place=source.name,
                )
        self._sizes = np.array([source.num_samples for source in sources], np.int64)
        self._lane_numbers = np.arange(self.lanes, dtype=np.int64)
        self.segments = self._cut(schedule)
        self._rows = [segment.row for segment in self.segments]
        self._starts = np.array(self._rows, np.int64)
        # Where every source has left, nothing is left to deliver.
        self.end = ENDLESS if self.segments[-1].sources else self._rows[-1] * self.lanes

    # -- segments -----------------------------------------------------------------------------------------------------

    def _cut(self, schedule: Sequence[tuple[int, Mapping[str, int]]]) -> tuple[Segment, ...]:
        """The segments of the schedule, and those that begin where a source has reached its cap."""
        numbers = {source.name: i for i, source in enumerate(self.sources)}
        starts = [-(-position // self.lanes) for position, _ in schedule]
        segments: list[Segment] = []
        base = np.zeros((len(self.sources), self.lanes), np.int64)
        gone: set[int] = set()
        for i, (row, (position, weights)) in enumerate(zip(starts, schedule, strict=True)):
            until = starts[i + 1] if i + 1 < len(starts) else ENDLESS // self.lanes
            if until <= row:
                raise ConfigError(
                    f"segments must start {self.lanes} positions apart, one row of all lanes",
                    value=f"{position} and {schedule[i + 1][0]}",
                    place="schedule",
                )
            while row < until:
                gone |= {j for j in range(len(self.sources)) if self._is_capped(j, base[j])}
                left = {name: weight for name, weight in weights.items() if weight and numbers[name] not in gone}
                segment = self._segment(row, {numbers[name]: weight for name, weight in left.items()}, base)
                segments.append(segment)
                if not segment.sources and i + 1 < len(starts):
                    raise ConfigError(
                        f"a source must be left until the next weights begin at position {schedule[i + 1][0]}",
                        value=f"at position {row * self.lanes} the last one has reached its cap",
                        place="Mixture",
                        hint="begin them earlier, or raise a cap",
                    )
                capped = [j for j in segment.sources if self.sources[j].cap is not None]
                row = until if not capped else self._first_row(row, until, self._reaches_cap(segment, capped))
                base = self._counts(segment, row)
        return tuple(segments)

    def _is_capped(self, source: int, rows: Int64Array) -> bool:
        """Whether the next sample of some lane would be beyond the cap."""
        cap = self.sources[source].cap
        return cap is not None and bool((rows * self.lanes + self._lane_numbers >= cap).any())

    def _reaches_cap(self, segment: Segment, capped: list[int]) -> Callable[[int], bool]:
        def reaches(row: int) -> bool:
            counts = self._counts(segment, row)
            return any(self._is_capped(j, counts[j]) for j in capped)

        return reaches

    @staticmethod
    def _first_row(low: int, high: int, holds: Callable[[int], bool]) -> int:
        """The first row after `low` at which something holds that never ceases to; `high` if it does not before."""
        # In growing steps: runs are short beside all that there might be, and so are the ways between caps.
        step = 1
        while low + step < high and not holds(low + step):
            low, step = low + step, 2 * step
        high = min(high, low + step)
        return bisect_left(_Rows(holds), 1, low + 1, high)

    def _segment(self, row: int, weights: Mapping[int, int], base: Int64Array) -> Segment:
        # By name, not by number: sources may be given in any order, and one more changes no segment without it.
        chosen = sorted(weights, key=lambda j: self.sources[j].name)
        told = repr([(self.sources[j].name, weights[j]) for j in chosen]).encode()
        inner = max(len(chosen) - 1, 0)
        nodes = inner + len(chosen)
        shares, left, right = (np.zeros(nodes, np.int64) for _ in range(3))
        leaf_source = np.full(nodes, -1, np.int64)
        shares[inner:] = _ONE  # a leaf is a node whose left side, itself, gets everything
        left[inner:] = right[inner:] = np.arange(inner, nodes)
        leaf_source[inner:] = chosen
        taken = 0

        def build(first: int, end: int) -> int:
            """The node of leaves [first, end); each side gets half of them."""
            nonlocal taken
            if end - first == 1:
                return inner + first
            node, taken = taken, taken + 1
            middle = (first + end) // 2
            parts = [sum(weights[j] for j in chosen[a:b]) for a, b in ((first, middle), (middle, end))]
            share = (2 * _ONE * parts[0] + sum(parts)) // (2 * sum(parts))  # rounded half up, in whole numbers
            if not 0 < share < _ONE:
                rarest = min(chosen[first:end], key=lambda j: weights[j])
                raise ConfigError(
                    "a weight must be 2^-24 of those beside it at least, or 0",
                    value=f"{weights[rarest]} beside {sum(parts) - weights[rarest]}",
                    place=self.sources[rarest].name,
                )
            shares[node] = share
            left[node], right[node] = build(first, middle), build(middle, end)
            return node

        if chosen:
            build(0, len(chosen))
        offsets = np.zeros((nodes, self.lanes), np.int64)
        if inner:
            node_numbers, lanes = np.divmod(np.arange(inner * self.lanes, dtype=np.uint64), np.uint64(self.lanes))
            keys = key_of(self.seed, _OFFSETS, np.array([row], np.uint64), node_numbers, lanes)
            offsets[:inner] = (keys >> np.uint64(64 - WEIGHT_BITS)).astype(np.int64).reshape(inner, -1)
        return Segment(
            row=row,
            digest=hashlib.sha256(told).hexdigest()[:16],
            sources=tuple(chosen),
            shares=shares,
            left=left,
            right=right,
            offsets=offsets,
            leaf_source=leaf_source,
            depth=inner.bit_length(),
            base=base,
        )

    def _counts(self, segment: Segment, row: int) -> Int64Array:
        """``(sources, lanes)``: the rows that each source had before `row`, which is not before the segment's."""
        counts = segment.base.copy()
        if not segment.sources:
            return counts
        passed = np.zeros(segment.offsets.shape, np.int64)
        passed[0] = row - segment.row
        inner = len(segment.sources) - 1
        for node in range(inner):
            rows = passed[node]
            given, _ = _give(rows, int(segment.shares[node]), segment.offsets[node])
            passed[segment.left[node]] = given
            passed[segment.right[node]] = rows - given
        counts[list(segment.sources)] += passed[inner:]
        return counts

    def _rows_before(self, row: int) -> Int64Array:
        return self._counts(self.segments[bisect_right(self._rows, row) - 1], row)

    def segments_before(self, position: int) -> tuple[tuple[int, str], ...]:
        """``(position, digest)`` of the segments that start before `position`: all that made the stream up to there."""
        before = bisect_left(self._rows, -(-position // self.lanes))
        return tuple((segment.row * self.lanes, segment.digest) for segment in self.segments[:before])

    # -- the stream ---------------------------------------------------------------------------------------------------

    def locate(self, positions: NDArray[Any]) -> tuple[Int64Array, Int64Array]:
        """The number of the source at each position, and the source's own position: two int64 arrays.

        `positions` are below :attr:`end`, of any shape and order. Ask for thousands at once.
        """
        flat = np.asarray(positions, np.int64).ravel()
        row = flat // self.lanes
        lane = flat - row * self.lanes
        if len(self.segments) == 1:
            source, at = self._deal(self.segments[0], row, lane)
        else:
            of = np.searchsorted(self._starts, row, side="right") - 1
            source, at = np.empty_like(flat), np.empty_like(flat)
            for i in present(of):
                chosen = np.flatnonzero(of == i)
                source[chosen], at[chosen] = self._deal(self.segments[i], row[chosen], lane[chosen])
        return source.reshape(np.shape(positions)), at.reshape(np.shape(positions))

    def _deal(self, segment: Segment, row: Int64Array, lane: Int64Array) -> tuple[Int64Array, Int64Array]:
        rows = row - segment.row
        if segment.depth == 0:
            source = np.full(len(rows), segment.sources[0], np.int64)
        else:
            given, to_left = _give(rows, int(segment.shares[0]), segment.offsets[0][lane])
            rows = np.where(to_left, given, rows - given)
            node = np.where(to_left, segment.left[0], segment.right[0])
            for _ in range(segment.depth - 1):
                given, to_left = _give(rows, segment.shares[node], segment.offsets[node, lane])
                rows = np.where(to_left, given, rows - given)
                node = np.where(to_left, segment.left[node], segment.right[node])
            source = segment.leaf_source[node]
        return source, (segment.base[source, lane] + rows) * self.lanes + lane

    def __call__(self, positions: NDArray[Any]) -> Int64Array:
        """The sample id at each position, int64 in the shape of `positions`."""
        source, at = self.locate(np.ravel(positions))
        ids = np.empty_like(source)
        for j in present(source):
            chosen = np.flatnonzero(source == j)
            ids[chosen] = self.ids.make(j, self.orders[j](at[chosen]))
        return ids.reshape(np.shape(positions))

    # -- counts -------------------------------------------------------------------------------------------------------

    def samples_before(self, position: int) -> Int64Array:
        """How many of the positions before `position` each source has: int64 (sources,)."""
        row, lanes = divmod(position, self.lanes)
        segment = self.segments[bisect_right(self._rows, row) - 1]
        counts: Int64Array = self._counts(segment, row).sum(axis=1)
        if lanes and segment.sources:
            counts += (self._counts(segment, row + 1) - self._counts(segment, row))[:, :lanes].sum(axis=1)
        return counts

    def unread_before(self, position: int) -> Int64Array:
        """What the caps of sources that have left the mixture before `position` will leave unread: int64 (sources,)."""
        row = -(-position // self.lanes)
        counts = self._rows_before(row)
        totals = counts.sum(axis=1)
        unread = np.zeros(len(self.sources), np.int64)
        for j, source in enumerate(self.sources):
            if source.cap is not None and self._is_capped(j, counts[j]):
                unread[j] = source.cap - totals[j]
        return unread

    def epoch(self, position: int) -> int:
        """How often every source was read whole before `position`; those that leave the mixture for ever don't count."""
        staying = list(self.segments[-1].sources)
        return int((self.samples_before(position) // self._sizes)[staying].min()) if staying else 0

    def run_end(self, start: int, epochs: int | None) -> int:
        """Where a run ends that starts at `start`; a whole row of all lanes.

        A source is exhausted when it was read `epochs` times since `start`. ``"first_exhausted"``: before one of its
        samples comes up once more; what other lanes have not read of it by then, fewer than
        ``lanes * (1 + log2(sources))`` samples, comes first in the next run. ``"all_exhausted"``: as soon as every
        sample of every source came up that often. ``"never"``, and `epochs` None: only where all sources have left the
        mixture. A source that leaves it before it is exhausted, by its cap or by the schedule, ends no run.
        """
        if epochs is None or self.stop == "never" or epochs * int(self._sizes.max()) >= ENDLESS // 2:
            return self.end
        first_row, last_row = -(-start // self.lanes), self.end // self.lanes
        targets = self.samples_before(start) + epochs * self._sizes
        # The first of each lane's own positions, in multiples of the lanes, that is beyond the target.
        beyond = targets[:, None] - self._lane_numbers
        if self.stop == "first_exhausted":
            read = {j for segment in self.segments for j in segment.sources}
            caps = [source.cap for source in self.sources]
            chosen = [j for j, cap in enumerate(caps) if j in read and (cap is None or cap > targets[j])]
            holds: Callable[[NDArray[np.bool_]], np.bool_] = np.any
        else:
            last = self.segments[-1]
            done = (last.base * self.lanes >= beyond).all(axis=1)
            chosen = sorted({*np.flatnonzero(done).tolist(), *last.sources})
            holds = np.all
        if not chosen:
            return self.end
        return self.lanes * self._first_row(
            first_row - 1,
            last_row,
            lambda row: bool(holds(self._rows_before(row)[chosen] * self.lanes >= beyond[chosen])),
        )


class _Rows:
    """A predicate over rows, as a sequence that can be bisected."""

    def __init__(self, holds: Callable[[int], bool]) -> None:
        self._holds = holds

    def __getitem__(self, row: int) -> int:
        return int(self._holds(row))

    def __len__(self) -> int:
        return ENDLESS


def present(numbers: Int64Array) -> list[int]:
    """The different ones of many small numbers, ascending.

    >>> present(np.array([3, 0, 3]))
    [0, 3]
    """
    found: list[int] = np.flatnonzero(np.bincount(numbers)).tolist()
    return found


def _give(rows: Int64Array, share: Any, offset: Int64Array) -> tuple[Int64Array, NDArray[np.bool_]]:
    """Of each number of rows that a node has passed on, how many went to its left side, and whether the next one does.

    Rows are split at 24 bits, so that no product exceeds 63.
    """
    low = rows & _MASK
    low *= share
    low += offset
    given = (rows >> WEIGHT_BITS) * share
    given += low >> WEIGHT_BITS
    low &= _MASK
    low += share
    return given, low >= _ONE
