"""Asking for blocks before their rows are due, in the order of need and never too far ahead."""

from collections import OrderedDict, deque
from time import perf_counter
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

__all__ = ["Lookahead"]

_MOST_ROWS = 1024


_SMOOTHING = 0.125  # of the time between batches, as TCP's round-trip estimate, RFC 6298


class _Prefetches(Protocol):
    def prefetch(self, samples: NDArray[np.int64], due_s: NDArray[np.float64]) -> None: ...
    def reached(self, row: int) -> None: ...


# Guarantees: used by the consumer's thread alone. Does no I/O of its own: prefetch() only starts some.
class Lookahead:
    """Walks over the coming rows of one rank and passes them to ``prefetch`` in groups, earliest first, each row with the
    seconds until it is due at the pace at which the consumer took rows so far.

    A block that was asked for is not asked for again while its window lasts, of which the order mixes `open_blocks` at a
    time; later it may be gone from the cache. At most `max_blocks` order blocks that were not asked for lately are under way before the consumer reaches the first
    row that needs them. The first group is one batch, because that batch should not wait for its blocks behind those of
    the hundredth; later ones grow, to cost less.
    """

    def __init__(
        self, source: _Prefetches, *, samples_per_block: int, max_blocks: int, batch_size: int, open_blocks: int = 0
    ) -> None:
        self._source = source
        self._samples_per_block = samples_per_block
        self._max_blocks = max_blocks
        self._group_rows = batch_size
        self._coming: deque[NDArray[np.int64]] = deque()
        self._next_row = 0  # the first row of _coming
        self._under_way: deque[int] = deque()  # for each block: the first row that needs it, ascending
        # Blocks asked for lately, oldest first: a window's blocks come up in thousands of rows and are asked for once.
        self._known: OrderedDict[int, None] = OrderedDict()
        self._known_limit = 4 * max_blocks + 2 * open_blocks
        self._tell_at = 0  # the row from which on the source is told where the consumer is
        self._row, self._row_at_s, self._row_takes_s = 0, 0.0, 0.0  # where the consumer is, since when, and its pace

    def extend(self, samples: NDArray[np.int64]) -> None:
        """Append the rows that come after all those given before."""
        self._coming.append(samples)

    def advance(self, row: int) -> None:
        """The consumer is about to need `row`, counted from the first row ever given: ask for what may now be asked."""
        now = perf_counter()
        if row > self._row:
            if self._row_at_s:
                takes_s = (now - self._row_at_s) / (row - self._row)
                known = self._row_takes_s
                self._row_takes_s = known + _SMOOTHING * (takes_s - known) if known else takes_s
            self._row, self._row_at_s = row, now
        while self._under_way and self._under_way[0] < row:
            self._under_way.popleft()
        # Not one by one, as single blocks come free: a group costs as much as it saves.
        while self._coming and len(self._under_way) <= self._max_blocks // 2:
            samples = self._coming.popleft()
            asked = self._ask(samples[: self._group_rows])
            if asked < len(samples):
                self._coming.appendleft(samples[asked:])
            self._next_row += asked
            self._group_rows = max(self._group_rows, min(2 * self._group_rows, _MOST_ROWS))
        if row >= self._tell_at:
            self._source.reached(row)
            self._tell_at = row + self._samples_per_block

    def _ask(self, samples: NDArray[np.int64]) -> int:
        """Ask for the blocks of `samples`, as many of them as there is room for; returns how many rows that was."""
        blocks, first_rows = np.unique(samples // self._samples_per_block, return_index=True)
        known = np.array([block in self._known for block in blocks.tolist()])
        new_rows = np.sort(first_rows[~known])
        room = self._max_blocks - len(self._under_way)
        if len(new_rows) > room:
            samples, new_rows = samples[: new_rows[room]], new_rows[:room]
            blocks = blocks[first_rows < len(samples)]
        if new_rows.size:
            rows_until = np.arange(
                self._next_row - self._row, self._next_row - self._row + len(samples), dtype=np.float64
            )
            self._source.prefetch(samples, rows_until * self._row_takes_s)
            self._under_way.extend((new_rows + self._next_row).tolist())
        for block in blocks.tolist():
            self._known[block] = None
            self._known.move_to_end(block)
        while len(self._known) > self._known_limit:
            self._known.popitem(last=False)
        return len(samples)
