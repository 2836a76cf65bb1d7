"""Which sample stands at which position: order v1, a pure function of (seed, epoch, position).

Positions count samples over all epochs: position ``P`` is sample number ``P - epoch * num_samples`` of epoch
``P // num_samples``. Nothing here has a size that grows with the data set: a sample id is a few dozen integer operations
away from its position, at 10^3 samples as at 10^12, so a run starts at any position at once.

**Shape of the order.** The ``B = num_samples // S`` blocks of ``S`` samples are dealt to ``L`` lanes by the seed alone,
each lane a part of the data set that stays the same in every epoch. Position ``P`` belongs to lane ``P % L``. A lane
reads its blocks in a new order each epoch, ``w`` at a time, and shuffles the samples of such a window. Lanes change
windows at different times, so that new blocks are needed at an even rate. The samples that do not fill a whole window
in every lane (fewer than ``L * w * S + S``) follow at the end of the epoch in one shuffle of their own. A node that
serves whole lanes reads only its own blocks, in every epoch; :func:`rank_rows` deals the rows of a step accordingly.

The order is a file format: loader states refer to it by :data:`ORDER_VERSION`, and ``tests/data/order-v1.json`` pins it.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal, TypeAlias, get_args

import numpy as np
import numpy.typing as npt

from ..errors import ConfigError
from ._numbers import whole

__all__ = [
    "ENDLESS",
    "ORDER_VERSION",
    "OrderV1",
    "Shuffle",
    "SkipRanges",
    "Window",
    "consecutive_rank_rows",
    "key_of",
    "permute",
    "rank_rows",
]

ORDER_VERSION = 1
"""Stored in every loader state. A change of any sample id at any position needs a new number and a new class."""

ENDLESS = 2**62
"""The end of a stream that has none."""

Shuffle: TypeAlias = Literal["none", "window", "full"]
Int64Array: TypeAlias = npt.NDArray[np.int64]
UInt64Array: TypeAlias = npt.NDArray[np.uint64]

_U = np.uint64
# The golden-ratio increment and the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number
# generators", OOPSLA 2014, with the constants of Stafford's variant 13).
_GAMMA = _U(0x9E3779B97F4A7C15)
_MIX_1 = _U(0xBF58476D1CE4E5B9)
_MIX_2 = _U(0x94D049BB133111EB)

# What a key is for; the first part of every key, so that no two uses share one.
_ROWS_OF_WINDOW, _BLOCKS_OF_LANE, _DEAL, _REST, _FULL = range(1, 6)

_ROUNDS = 4  # three show structure on 1,024 values (chi-square of differences, 2e5 keys: z = 22), four do not (z < 5)
_SORTED_BELOW = 256  # on fewer values even four rounds show structure; sorting hashes is exact, and cheap there


def _mix(x: UInt64Array) -> UInt64Array:
    out: UInt64Array = np.right_shift(x, _U(30))
    out ^= x
    out *= _MIX_1
    out ^= out >> _U(27)
    out *= _MIX_2
    out ^= out >> _U(31)
    return out


def key_of(seed: int, purpose: int, *parts: UInt64Array) -> UInt64Array:
    """A 64-bit key for each element of the broadcast `parts`; shape (1,) where there are none."""
    key = _mix(np.array([seed], dtype=np.uint64) + _GAMMA)
    for part in (np.array([purpose], dtype=np.uint64), *parts):
        key = _mix(key ^ part)
    return key


def permute(keys: UInt64Array, values: UInt64Array, size: int) -> UInt64Array:
    """Where a keyed bijection of ``[0, size)`` sends each of `values`.

    Args:
        keys: uint64, one for all values (shape (1,)) or one for each (shape of `values`). Equal keys, one bijection.
        values: uint64 (n,), each below `size`.
        size: of the domain, 1 to 2^62.

    A domain of 256 or more: four rounds of multiply, add and xor-shift on the bits that hold `size`, walking the cycle
    until the result falls inside (Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002; at most two
    evaluations on average). A smaller one: the rank order of one 64-bit hash for each value.

    >>> permute(np.array([7], np.uint64), np.arange(5, dtype=np.uint64), 5).tolist()
    [1, 0, 4, 3, 2]
    """
    if size == 1:
        return np.zeros_like(values)
    if size < _SORTED_BELOW:
        return _permute_by_sorting(keys, values, size)
    bits = (size - 1).bit_length()
    round_keys = [_mix(keys + _U((i + 1) * int(_GAMMA) & (2**64 - 1))) for i in range(_ROUNDS)]
    factors = [key | _U(1) for key in round_keys]
    addends = [key >> _U(64 - bits) for key in round_keys]
    out = _scramble(values, factors, addends, bits)
    if size == 1 << bits:
        return out
    outside = np.flatnonzero(out >= _U(size))
    while outside.size:
        if keys.size > 1:
            walked = _scramble(out[outside], [f[outside] for f in factors], [a[outside] for a in addends], bits)
        else:
            walked = _scramble(out[outside], factors, addends, bits)
        out[outside] = walked
        outside = outside[walked >= _U(size)]
    return out


def _scramble(
    values: UInt64Array, factors: Sequence[UInt64Array], addends: Sequence[UInt64Array], bits: int
) -> UInt64Array:
    """Each step is invertible modulo 2^bits: an odd factor, an addend, a right shift by at least half of the bits."""
    mask = _U((1 << bits) - 1)
    shift = _U((bits + 1) // 2)
    # Products only carry upwards: without this first shift, values that differ in their highest bits alone would pass
    # the first round with that difference unchanged (chi-square z = 117 against 14 at its worst, size 256, 2e5 keys).
    out = values ^ (values >> shift)
    for factor, addend in zip(factors, addends, strict=True):
        out = out * factor
        out += addend
        out &= mask
        out ^= out >> shift
    return out


def _permute_by_sorting(keys: UInt64Array, values: UInt64Array, size: int) -> UInt64Array:
    # A call touches few distinct keys (one for a data set, one for each live window), so tables are made for each call.
    counters = np.arange(1, size + 1, dtype=np.uint64) * _GAMMA
    if keys.size == 1:
        return np.argsort(_mix(keys + counters), kind="stable").astype(np.uint64)[values]
    distinct, table_of = np.unique(keys, return_inverse=True)
    tables = np.argsort(_mix(distinct[:, None] + counters), axis=1, kind="stable").astype(np.uint64)
    return tables[table_of, values]


def _divmod(x: UInt64Array, divisor: int) -> tuple[UInt64Array, UInt64Array]:
    # numpy divides by one number with a multiplication, but takes a remainder with a slow division for each element.
    quotient = x // _U(divisor)
    return quotient, x - quotient * _U(divisor)


@dataclass(frozen=True, kw_only=True)
class OrderV1:
    """Sample ids by position, as the module describes. Immutable, thread-safe, the same on every machine.

    Args:
        num_samples: N >= 1, at most 2^48.
        seed: 0 <= seed < 2^63.
        samples_per_block: S, samples of one order block, a power of two.
        lanes: L >= 1. Part of the order, so never derived from the world size.
        window_blocks: w, blocks of one lane that are shuffled together, a power of two.
        shuffle: ``"window"``, or ``"full"`` (one shuffle of all samples: every node reads every block), or ``"none"``.

    >>> order = OrderV1(num_samples=10, seed=0, samples_per_block=1)
    >>> order(np.arange(10)).tolist(), order(np.arange(10, 20)).tolist()
    ([4, 5, 3, 9, 0, 8, 7, 1, 2, 6], [1, 9, 2, 3, 6, 5, 4, 7, 0, 8])
    """

    num_samples: int
    seed: int
    samples_per_block: int
    lanes: int = 48
    window_blocks: int = 4
    shuffle: Shuffle = "window"

    def __post_init__(self) -> None:
        _require(1 <= self.num_samples <= 2**48, "num_samples must be from 1 to 2^48", self.num_samples)
        _require(0 <= self.seed < 2**63, "seed must be from 0 to 2^63 - 1", self.seed)
        for name in ("samples_per_block", "window_blocks"):
            value = getattr(self, name)
            _require(value >= 1 and value & (value - 1) == 0, f"{name} must be a power of two", value)
        _require(self.samples_per_block * self.window_blocks <= 2**48, "a window is too large", self.window_blocks)
        _require(1 <= self.lanes <= 2**20, "lanes must be from 1 to 2^20", self.lanes)
        _require(self.shuffle in get_args(Shuffle), f"shuffle must be one of {get_args(Shuffle)}", self.shuffle)

    @property
    def blocks_per_lane(self) -> int:
        """Blocks that each lane reads in windows: the largest multiple of `window_blocks` that all lanes can have."""
        blocks = self.num_samples // self.samples_per_block
        return blocks // (self.lanes * self.window_blocks) * self.window_blocks

    @property
    def lane_samples(self) -> int:
        """Samples of an epoch that come in lanes; the others follow them in one shuffle of their own."""
        return self.blocks_per_lane * self.samples_per_block * self.lanes

    def run_end(self, start: int, epochs: int | None) -> int:
        """Where a run of `epochs` epochs ends that starts at `start`; None never ends."""
        return ENDLESS if epochs is None else start + epochs * self.num_samples

    def epoch(self, position: int) -> int:
        """Whole epochs before `position`."""
        return position // self.num_samples

    @property
    def block_span(self) -> int:
        """How many positions the reading of a block takes: those of a window of all lanes, or of one block."""
        if self.shuffle == "none":
            return self.samples_per_block
        return min(self.num_samples, self.window_blocks * self.samples_per_block * self.lanes)

    def blocks_between(self, start: int, end: int, *, lanes: Int64Array) -> tuple[Int64Array, Int64Array]:
        """The blocks that come up first in positions ``[start, end)``, and where: ``(positions, blocks)``, ascending.

        A block is a number of `samples_per_block` samples from the first on; the last may be short. Costs as much as
        there are blocks. Only those of `lanes`, and those that are in no lane; ``shuffle="full"`` has none, because
        every block comes up all the time. A block of which the window is cut in two by the ends of an epoch comes up
        twice.
        """
        parts: list[tuple[Int64Array, Int64Array]] = []
        size = self.num_samples
        for epoch in range(start // size, -(-end // size)):
            first, last = max(start - epoch * size, 0), min(end - epoch * size, size)
            parts += [(at + epoch * size, blocks) for at, blocks in self._epoch_blocks(epoch, first, last, lanes)]
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        positions, blocks = (np.concatenate([part[i] for part in parts]) for i in (0, 1))
        inside = np.flatnonzero((positions >= start) & (positions < end))
        inside = inside[np.argsort(positions[inside], kind="stable")]
        return positions[inside], blocks[inside]

    def _epoch_blocks(
        self, epoch: int, first: int, last: int, lanes: Int64Array
    ) -> Iterator[tuple[Int64Array, Int64Array]]:
        """Blocks that come up in places [first, last) of an epoch, and where; some others beside them."""
        if self.shuffle == "full":
            return
        if self.shuffle == "none":
            numbers = np.arange(first // self.samples_per_block, -(-last // self.samples_per_block))
            yield numbers * self.samples_per_block, numbers
            return
        window, lane_steps = self.window_blocks * self.samples_per_block, self.blocks_per_lane * self.samples_per_block
        if first < self.lane_samples and lanes.size:
            # Lane l starts l/L of a window ahead, in the middle of window 0, and comes back to its beginning at the end.
            turns = np.arange(first // self.lanes // window, min(last // self.lanes, lane_steps) // window + 2)
            lane, turn = (grid.ravel() for grid in np.meshgrid(lanes, turns, indexing="ij"))
            step = np.maximum(0, turn * window - lane * window // self.lanes)
            lane, turn, step = (values[step < lane_steps] for values in (lane, turn, step))
            windows = turn % (self.blocks_per_lane // self.window_blocks)
            turns_of_window = (windows[:, None] * self.window_blocks + np.arange(self.window_blocks)).ravel()
            of_lane = np.repeat(lane, self.window_blocks).astype(np.uint64)
            keys = key_of(self.seed, _BLOCKS_OF_LANE, np.array([epoch], np.uint64), of_lane)
            block = permute(keys, turns_of_window.astype(np.uint64), self.blocks_per_lane)
            dealt = self._dealt(block * _U(self.lanes) + of_lane).astype(np.int64)
            place = (
                step * self.lanes + (lane - epoch * self.num_samples) % self.lanes
            )  # a lane is a position's, not a place's
            yield np.repeat(place, self.window_blocks), dealt
        if last > self.lane_samples:
            whole = self.num_samples // self.samples_per_block
            rest = self._dealt(np.arange(self.blocks_per_lane * self.lanes, whole, dtype=np.uint64)).astype(np.int64)
            if self.num_samples % self.samples_per_block:
                rest = np.append(rest, whole)
            yield np.full(len(rest), self.lane_samples), rest

    def __call__(self, positions: npt.NDArray[Any]) -> Int64Array:
        """The sample at each position, int64 in the shape of `positions`.

        Args:
            positions: non-negative integers of any shape and order, over any number of epochs.

        A call costs about a millisecond for 4,096 positions and hardly less for 16: ask for many at once.
        """
        positions = np.asarray(positions)
        if positions.size == 0:
            return np.empty(positions.shape, np.int64)
        if positions.dtype.kind == "i" and int(positions.min()) < 0:
            raise ConfigError("positions must be >= 0", value=int(positions.min()), place="order")
        flat = positions.astype(np.uint64).ravel()
        epoch, within = _divmod(flat, self.num_samples)
        if self.shuffle == "none":
            samples = within
        else:
            if epoch[0] == epoch[-1] and (epoch == epoch[0]).all():
                epoch = epoch[:1]  # keys of one epoch are made once for the call
            if self.shuffle == "full":
                samples = permute(key_of(self.seed, _FULL, epoch), within, self.num_samples)
            else:
                samples = self._windowed(flat, epoch, within)
        return samples.astype(np.int64).reshape(positions.shape)

    def _windowed(self, positions: UInt64Array, epoch: UInt64Array, within: UInt64Array) -> UInt64Array:
        in_lanes = within < _U(self.lane_samples)
        if in_lanes.all():
            return self._from_lanes(positions, epoch, within)
        if not in_lanes.any():
            return self._from_rest(epoch, within)
        out = np.empty_like(within)
        for mask, source in ((in_lanes, "lanes"), (~in_lanes, "rest")):
            chosen = epoch if epoch.size == 1 else epoch[mask]
            if source == "lanes":
                out[mask] = self._from_lanes(positions[mask], chosen, within[mask])
            else:
                out[mask] = self._from_rest(chosen, within[mask])
        return out

    def _from_lanes(self, positions: UInt64Array, epoch: UInt64Array, within: UInt64Array) -> UInt64Array:
        window = self.window_blocks * self.samples_per_block
        _, lane = _divmod(positions, self.lanes)
        step = within // _U(self.lanes)  # of its lane, in this epoch
        # Lane l starts l/L of a window ahead: without it all lanes would ask for new blocks in the same step.
        step += lane * _U(window) // _U(self.lanes)
        _, step = _divmod(step, self.blocks_per_lane * self.samples_per_block)
        number, row = _divmod(step, window)
        row = permute(key_of(self.seed, _ROWS_OF_WINDOW, epoch, number, lane), row, window)
        turn, row = _divmod(row, self.samples_per_block)
        turn += number * _U(self.window_blocks)
        block = permute(key_of(self.seed, _BLOCKS_OF_LANE, epoch, lane), turn, self.blocks_per_lane)
        return self._dealt(block * _U(self.lanes) + lane) * _U(self.samples_per_block) + row

    def _from_rest(self, epoch: UInt64Array, within: UInt64Array) -> UInt64Array:
        first = self.lane_samples
        whole_blocks = self.num_samples // self.samples_per_block
        y = permute(key_of(self.seed, _REST, epoch), within - _U(first), self.num_samples - first)
        if whole_blocks == 0:
            return y
        card, row = _divmod(y, self.samples_per_block)
        card += _U(self.blocks_per_lane * self.lanes)
        block = self._dealt(np.minimum(card, _U(whole_blocks - 1)))
        # The part of a block at the end of the data set is no block and was never dealt: it stays where it is.
        return np.where(card < _U(whole_blocks), block, card) * _U(self.samples_per_block) + row

    def _dealt(self, card: UInt64Array) -> UInt64Array:
        """The block that the deal puts at `card`: by the seed alone, so that a lane has the same blocks every epoch."""
        return permute(key_of(self.seed, _DEAL), card, self.num_samples // self.samples_per_block)


def _require(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(rule, value=value, place="order")


def rank_rows(positions: Int64Array, *, lanes: int, world_size: int, rank: int) -> Int64Array:
    """The positions of a step that `rank` reads, in the order of its rows.

    Args:
        positions: int64 (..., global_batch), the step's positions, ascending along the last axis.
        lanes: of the order.
        world_size: divides the global batch.
        rank: 0 <= rank < world_size.

    The step's rows are sorted by (lane group, position), where a lane group is the position modulo
    gcd(lanes, global_batch); the rank takes its slice of the result. A lane group is then read by as few ranks, and
    ranks of one node read as few lanes, as the global batch allows.

    >>> rank_rows(np.arange(8), lanes=4, world_size=4, rank=1).tolist()
    [1, 5]
    """
    global_batch = positions.shape[-1]
    groups = gcd(lanes, global_batch)
    rows = global_batch // world_size
    # Stable: positions ascend, so equal groups keep ascending positions.
    chosen = np.argsort(positions % groups, axis=-1, kind="stable")[..., rank * rows : (rank + 1) * rows]
    return np.take_along_axis(positions, chosen, axis=-1)


def consecutive_rank_rows(
    start: int, *, steps: int, global_batch: int, lanes: int, world_size: int, rank: int
) -> Int64Array:
    """:func:`rank_rows` for `steps` steps of consecutive positions from `start` on: int64 (steps, rows of the rank).

    Closed form: costs as much as the rank has rows, however large the global batch is.

    >>> consecutive_rank_rows(3, steps=2, global_batch=8, lanes=4, world_size=4, rank=1).tolist()
    [[5, 9], [13, 17]]
    """
    groups = gcd(lanes, global_batch)
    rows = global_batch // world_size
    group, turn = np.divmod(np.arange(rank * rows, (rank + 1) * rows), global_batch // groups)
    # Steps are a multiple of `groups` long, so every step starts at the same place within the groups.
    offsets: Int64Array = (group - start) % groups + turn * groups
    starts = start + np.arange(steps, dtype=np.int64) * global_batch
    out: Int64Array = starts[:, None] + offsets
    return out


@dataclass(frozen=True, kw_only=True)
class Window:
    """The ``"window"`` shuffle with settings of its own; both are part of the order, and so of every state.

    Args:
        lanes: parallel streams that the blocks are dealt to. Nodes keep to their own blocks if their number divides
            gcd(lanes, global batch).
        blocks: order blocks of one lane that are shuffled together, a power of two. All windows of a run together hold
            ``lanes * blocks`` blocks, which must fit into a quarter of the cache's largest tier where data is remote.
    """

    lanes: int = 48
    blocks: int = 4

    def __post_init__(self) -> None:
        for name in ("lanes", "blocks"):
            object.__setattr__(self, name, whole(name, getattr(self, name), place="Window", least=1))


class SkipRanges:
    """Positions that a run jumps over: sorted, disjoint ranges, start inclusive, end exclusive. Immutable.

    Positions that are not skipped are called live.

    >>> skip = SkipRanges([(10, 12), (2, 4), (3, 6)])
    >>> skip.ranges, skip.live_before(12), skip.position_of(2)
    (((2, 6), (10, 12)), 6, 6)
    """

    def __init__(self, ranges: Iterable[Sequence[int]] = ()) -> None:
        merged: list[tuple[int, int]] = []
        try:
            given = iter(ranges)
        except TypeError as error:
            raise ConfigError(
                "skip holds (start, end) pairs of positions", value=ranges, place="TokenLoader"
            ) from error
        for start, end in sorted(_checked_range(r) for r in given):
            if merged and start <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
            else:
                merged.append((start, end))
        self.ranges = tuple(merged)
        self._starts = [start for start, _ in merged]
        self._live_starts = []  # live positions before each range
        skipped = 0
        for start, end in merged:
            self._live_starts.append(start - skipped)
            skipped += end - start
        self._skipped = skipped

    def live_before(self, position: int) -> int:
        """How many live positions there are in ``[0, position)``."""
        i = bisect_right(self._starts, position)
        if i == 0:
            return position
        _, end = self.ranges[i - 1]
        return self._live_starts[i - 1] + max(0, position - end)

    def position_of(self, live: int) -> int:
        """The live position that has `live` live ones before it."""
        i = bisect_right(self._live_starts, live)
        return live if i == 0 else self.ranges[i - 1][1] + live - self._live_starts[i - 1]

    def next_skip(self, position: int) -> int | None:
        """The first skipped position at or after `position`, which must itself be live; None if there is none."""
        i = bisect_right(self._starts, position)
        return self._starts[i] if i < len(self._starts) else None

    def live_positions(self, start: int, count: int) -> Int64Array:
        """The first `count` live positions at or after `start`: int64 (count,), ascending."""
        first = self.live_before(start)
        wanted = np.arange(first, first + count, dtype=np.int64)
        shifts = np.array([0] + [end - live for (_, end), live in zip(self.ranges, self._live_starts, strict=True)])
        wanted += shifts[np.searchsorted(np.array(self._live_starts, np.int64), wanted, side="right")]
        return wanted


def _checked_range(given: Sequence[int]) -> tuple[int, int]:
    try:
        first, last = given
    except (TypeError, ValueError) as error:
        raise ConfigError("skip holds (start, end) pairs of positions", value=given, place="TokenLoader") from error
    start, end = (whole("a position of skip", value, place="TokenLoader") for value in (first, last))
    if not 0 <= start < end < ENDLESS:
        raise ConfigError(
            "a skip range is (start, end) with 0 <= start < end < 2^62", value=(start, end), place="TokenLoader"
        )
    return start, end
