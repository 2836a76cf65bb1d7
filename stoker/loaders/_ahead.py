"""What a loader will read, told to the cache ahead of time: the plan of the node, and the blocks that are due next.

The plan is a function of order and position, so each process tells its cache what *all* ranks of its node will read,
without asking them: order blocks and the positions at which they come up, as far ahead as the cache is large. It costs
a few microseconds for each block, whatever a block's number of samples.
"""

import _thread
import logging
import os
import threading
from collections.abc import Sequence
from contextlib import suppress
from functools import cached_property
from math import gcd
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import StokerError
from ..storage.cache import CacheReader
from ._source import cache_blocks
from .mixed_order import MixedOrder, present
from .order import ENDLESS, OrderV1

if TYPE_CHECKING:
    from ._tables import Tables

__all__ = ["ReadAhead", "SamplesReader", "close_dropped", "lanes_of_ranks", "ranks_of_node"]

logger = logging.getLogger(__name__)

Int64Array = NDArray[np.int64]

_MOST_PLANNED = 1 << 15  # blocks: 128 GiB of the usual 4 MiB; what is needed later is needed last, whatever the order
_RATE_OVER = 1 << 20  # positions over which the rate of a source is taken
_PLANNED_PER_CALL = 256  # some 2 ms in the consumer's thread, between two batches that are thousands of rows apart


def ranks_of_node(rank: int, world_size: int) -> range:
    """The data-parallel ranks of this machine, as torchrun tells them; all of the job where it does not.

    More than there are does no harm but that the plan sees less far: this node stores no block that it never reads.
    """
    try:
        told = [int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")]
    except (KeyError, ValueError):
        return range(world_size)
    first, count = told[0] - told[2], told[3]
    if told[:2] != [rank, world_size] or not 0 <= first <= rank < first + count <= world_size:
        return range(world_size)  # ranks of a mesh are none of the launcher's
    return range(first, first + count)


def lanes_of_ranks(ranks: range, *, world_size: int, global_batch: int, lanes: int) -> Int64Array:
    """The lanes that these ranks read from; see :func:`~stoker.loaders.order.rank_rows`.

    >>> lanes_of_ranks(range(2, 4), world_size=4, global_batch=8, lanes=4).tolist()
    [2, 3]
    """
    groups, rows = gcd(lanes, global_batch), global_batch // world_size
    rows_of_group = global_batch // groups
    first, last = ranks.start * rows // rows_of_group, (ranks.stop * rows - 1) // rows_of_group
    every = np.arange(lanes)
    chosen: Int64Array = every[(every % groups >= first) & (every % groups <= last)]
    return chosen


class _Blocks(Protocol):
    """Of a data set, the part that says which blocks samples lie in."""

    def missing_blocks(self, samples: Int64Array) -> tuple[Int64Array, Int64Array]: ...

    def blocks_of(self, order_blocks: Int64Array) -> tuple[Int64Array, Int64Array]: ...


# Guarantees: one thread at a time. Tables are read by a thread of its own where that takes requests.
class SamplesReader:
    """A data set's reader of its cache, in numbers of samples and order blocks."""

    def __init__(self, dataset: _Blocks, tables: "Tables", reader: CacheReader) -> None:
        self._dataset, self._tables, self._reader = dataset, tables, reader
        self._loading: threading.Thread | None = None

    @cached_property  # it is in force as long as the cache is open, and a tier may be busy
    def capacity_blocks(self) -> int:
        """Blocks of this data set that the largest tier could hold."""
        return self._reader.capacity_bytes // self._tables.manifest.block_bytes

    def prefetch(self, samples: Int64Array, due_s: Sequence[float]) -> None:
        """Start to bring the blocks of samples near, each by the time at which the first of them is due."""
        blocks, first = self._dataset.missing_blocks(samples)
        if blocks.size:
            due = np.asarray(due_s)[first].tolist()
            self._reader.prefetch(self._tables.store, cache_blocks(self._tables, blocks), due_s=due)

    def publish(self, order_blocks: Int64Array, begins: NDArray[np.float64], *, lasts: float, final: bool) -> bool:
        """Add order blocks to the plan; False if that must wait for tables that are being read."""
        first, last = self._dataset.blocks_of(order_blocks)
        spans = (last - first).max(initial=0) + 1
        blocks = np.concatenate([first + step for step in range(spans)])
        times = np.tile(begins, spans)
        inside = blocks <= np.tile(last, spans)
        blocks, times = blocks[inside], times[inside]
        if not self._has_tables(blocks):
            return False
        self._reader.publish(
            self._tables.store, cache_blocks(self._tables, blocks), times.tolist(), lasts=lasts, final=final
        )
        return True

    def _has_tables(self, blocks: Int64Array) -> bool:
        shards = sorted(set(self._tables.shard_of_block(blocks).tolist()))
        if self._tables.has_rows(shards):
            return True
        if self._loading is None or not self._loading.is_alive():
            # Far ahead, so nobody waits for it; if it fails, the next call tries again.
            self._loading = threading.Thread(target=self._load, args=(shards,), name="stoker-plan", daemon=True)
            self._loading.start()
        return False

    def _load(self, shards: list[int]) -> None:
        try:
            for shard in shards:
                self._tables.blocks(shard)
        except StokerError as error:
            logger.debug("a plan waits for tables that can't be read: %s", error)

    @property
    def slack_s(self) -> float:
        """See :attr:`CacheReader.slack_s`."""
        return self._reader.slack_s

    def advance(self, now: float) -> None:
        """The loader has come to this time."""
        self._reader.advance(now)

    def forget(self) -> None:
        """Take everything back."""
        self._reader.forget()

    def close(self) -> None:
        """Take everything back, for good."""
        self._reader.close()
        if self._loading is not None:
            self._loading.join()


class _Part:
    """One data set of the stream: how far its plan is told, in its own positions."""

    def __init__(self, number: int, order: OrderV1, reader: SamplesReader) -> None:
        self.number, self.order, self.reader = number, order, reader
        self.published = -1  # the first own position that is not; -1 before the first

    def extend(self, *, own: int, own_end: int, position: int, rate: float, lanes: Int64Array) -> None:
        """Tell some more.

        Args:
            own: this data set's position, when the stream stands at `position`. rate: how much it grows for each
                position of the stream.
        """
        order = self.order
        if order.shuffle == "full" or rate <= 0:
            return
        capacity = min(2 * self.reader.capacity_blocks, _MOST_PLANNED)
        if not capacity:
            return
        share = len(lanes) / order.lanes
        if self.published < 0:
            self.published = max(0, own - order.block_span)
        end = min(own_end, own + int(capacity * order.samples_per_block / share))
        end = min(end, self.published + int(_PLANNED_PER_CALL * order.samples_per_block / share))
        if end <= self.published:
            return
        begins, blocks = order.blocks_between(self.published, end, lanes=lanes)
        times = position + (begins - own) / rate
        if self.reader.publish(blocks, times, lasts=order.block_span / rate, final=end >= own_end):
            self.published = end


# Guarantees: used by the consumer's thread alone.
class ReadAhead:
    """All that one loader tells about its future: of one data set, or of each of a mixture.

    Time is the position of the loader's stream.
    """

    def __init__(
        self,
        source: Any,
        order: "OrderV1 | MixedOrder",
        *,
        rank: int,
        world_size: int,
        global_batch: int,
    ) -> None:
        self._order = order
        self._lanes = lanes_of_ranks(
            ranks_of_node(rank, world_size), world_size=world_size, global_batch=global_batch, lanes=order.lanes
        )
        self._source, self._world_size = source, world_size
        self._at, self._row, self._end = 0, 0, ENDLESS
        self._pid = 0  # opened when it is first needed, in whatever process that is
        self._parts: list[_Part] = []
        self._others: dict[int, Any] = {}  # sources that no cache is told of: local ones, or no data sets

    def _require_open(self) -> None:
        if self._pid != os.getpid():  # a forked child's cache knows none of the parent's readers
            self._open()

    def _open(self) -> None:
        source, order = self._source, self._order
        self._pid = os.getpid()
        self._parts, self._others = [], {}
        datasets = source.sources if isinstance(order, MixedOrder) else (source,)
        orders = order.orders if isinstance(order, MixedOrder) else (order,)
        for number, (dataset, own) in enumerate(zip(datasets, orders, strict=True)):
            make = getattr(dataset, "reader", None)
            reader = None if make is None else make()
            if reader is None:
                self._others[number] = dataset
            else:
                self._parts.append(_Part(number, own, reader))

    def reached(self, row: int) -> None:
        """The consumer is at `row`: the plan goes on from there."""
        self._require_open()
        self._at += max(0, row - self._row) * self._world_size
        self._row = max(row, self._row)
        for part in self._parts:
            part.reader.advance(self._at)
        self._extend()

    def prefetch(self, samples: Int64Array, due_s: NDArray[np.float64]) -> None:
        """Start to bring the blocks of samples near, those due first first."""
        self._require_open()
        if isinstance(self._order, MixedOrder):
            ids = self._order.ids
            sources = ids.sources(samples)
            for number in present(sources):
                chosen = np.flatnonzero(sources == number)
                self._prefetch_of(number, ids.samples(number, samples[chosen]), due_s[chosen])
        else:
            self._prefetch_of(0, samples, due_s)

    def _prefetch_of(self, number: int, samples: Int64Array, due_s: NDArray[np.float64]) -> None:
        for part in self._parts:
            if part.number == number:
                part.reader.prefetch(samples, due_s.tolist())
                return
        self._others[number].prefetch(samples)

    def plan_from(self, position: int, *, row: int, end: int) -> None:
        """The stream stands at `position` when the consumer is at `row`; nothing is read from `end` on."""
        self._at, self._row, self._end = position, row, end

    def _extend(self) -> None:
        """Tell some more of the plan."""
        position, end = self._at, self._end
        if not isinstance(self._order, MixedOrder):
            for part in self._parts:
                part.extend(own=position, own_end=end, position=position, rate=1.0, lanes=self._lanes)
            return
        now, later = (self._order.samples_before(min(at, end)) for at in (position, position + _RATE_OVER))
        last = self._order.samples_before(end) if end < ENDLESS else None
        for part in self._parts:
            own, rate = int(now[part.number]), int(later[part.number] - now[part.number]) / _RATE_OVER
            own_end = ENDLESS if last is None else int(last[part.number])
            part.extend(own=own, own_end=own_end, position=position, rate=rate, lanes=self._lanes)

    def slack_s(self) -> float | None:
        """Seconds of data ahead, of the data set that has least; None where nothing is fetched ahead."""
        return min((part.reader.slack_s for part in self._parts), default=None)

    def forget(self) -> None:
        """The stream goes on elsewhere."""
        for part in self._parts:
            part.reader.forget()
            part.published = -1

    @property
    def is_told(self) -> bool:
        """Whether a cache of this process knows of it."""
        return bool(self._parts) and self._pid == os.getpid()

    def close(self) -> None:
        """Nothing more is read."""
        for part in self._parts:
            part.reader.close()


def close_dropped(ahead: ReadAhead) -> None:
    """Close what a loader leaves that is dropped without a close, soon: for its finalizer."""
    if ahead.is_told:
        # Not here: the garbage collector may run in a thread that holds a lock of the cache. And not by `threading`,
        # which has locks of its own.
        with suppress(RuntimeError):  # the interpreter ends, and the cache with it
            _thread.start_new_thread(_close_quietly, (ahead,))


def _close_quietly(ahead: ReadAhead) -> None:
    try:
        ahead.close()
    except (StokerError, OSError) as error:
        logger.debug("the plan of a dropped loader stays: %s", error)
