"""Which block a cache fetches next ahead of need, and how many at once. Without threads, clocks or I/O."""

from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import count

from ..metrics import counters
from ._layout import BlockFile
from .blocks import Block
from .store import ObjectStore

__all__ = ["Pace", "PrefetchQueue", "Wanted"]


@dataclass(kw_only=True, slots=True)
class Wanted:
    """A block that somebody will need.

    Attributes:
        due_s: when, by ``time.monotonic``.
        reader: who; None if several, or nobody in particular.
        order: counts what was asked for.
    """

    store: ObjectStore
    block: Block
    file: BlockFile
    due_s: float
    reader: str | None
    order: int = -1


# Guarantees: none for threads; the cache's lock is held. Each block is in it once.
class PrefetchQueue:
    """Blocks in the order in which they are needed; of those needed at the same time, the one asked for first."""

    def __init__(self) -> None:
        self._wanted: dict[str, Wanted] = {}
        # A block that is needed earlier than was said gets a second entry; entries that are not the block's own order
        # and time any more are dropped when they come up.
        self._heap: list[tuple[float, int, str]] = []
        self._count = count()

    def __len__(self) -> int:
        return len(self._wanted)

    def __contains__(self, name: object) -> bool:
        return name in self._wanted

    def add(self, wanted: Wanted) -> None:
        """Put a block in, or say that one that is in is needed by somebody else, too."""
        name = wanted.file.name
        known = self._wanted.get(name)
        if known is None:
            wanted.order = next(self._count)
            self._wanted[name] = known = wanted
        else:
            if known.reader != wanted.reader:
                known.reader = None
            if known.due_s <= wanted.due_s:
                return
            known.due_s = wanted.due_s
        heappush(self._heap, (known.due_s, known.order, name))

    def first(self, reader: str | None = None) -> Wanted | None:
        """What is needed earliest, by `reader` if given, which takes a look at each; it stays in."""
        if reader is not None:
            own = (wanted for wanted in self._wanted.values() if wanted.reader == reader)
            return min(own, key=lambda wanted: (wanted.due_s, wanted.order), default=None)
        while self._heap:
            due_s, order, name = self._heap[0]
            wanted = self._wanted.get(name)
            if wanted is not None and (wanted.due_s, wanted.order) == (due_s, order):
                return wanted
            heappop(self._heap)
        return None

    def pop(self, name: str) -> Wanted | None:
        """Take a block out, if it is in."""
        return self._wanted.pop(name, None)

    def cancel(self, reader: str) -> None:
        """Take out what nobody but `reader` wants."""
        for name in [name for name, wanted in self._wanted.items() if wanted.reader == reader]:
            del self._wanted[name]

    def clear(self) -> None:
        """Take out everything."""
        self._wanted.clear()
        self._heap.clear()


_SHORT, _LONG = 4.0, 16.0
"""Slack in fetch times: a block that is asked for now lands after one, the slowest of many after a few. Between the two
nothing changes, so that the number of fetches settles where it keeps up with the reader. Guesses, not measured."""
_SMOOTHING = 0.125  # as TCP's round-trip estimate, RFC 6298


# Guarantees: none for threads; the cache's lock is held.
class Pace:
    """How many fetches ahead of need are under way at once: many while the next block is needed soon, few while it is not.

    Fetching faster than the reader reads gains nothing and takes the store, the link and the cores from others. Doubled
    when slack is short, because a stall costs the trainer; lowered by one when it is long, and by no more than one for
    each block that each of them has brought, so that the effect of a change is seen before the next.

    >>> pace = Pace(most=8)
    >>> for _ in range(22):
    ...     pace.landed(slack_s=100.0, fetch_s=0.1)
    >>> pace.limit
    5
    >>> pace.landed(slack_s=0.1, fetch_s=0.1)
    >>> pace.limit
    8
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self.limit = most
        self._fetch_s = 0.0
        self._since_change = 0

    def landed(self, *, slack_s: float, fetch_s: float) -> None:
        """A fetch took `fetch_s`, and then the reader was `slack_s` behind the first block that is missing."""
        self._fetch_s = self._fetch_s + _SMOOTHING * (fetch_s - self._fetch_s) if self._fetch_s else fetch_s
        self._since_change += 1
        limit = self.limit
        if slack_s < _SHORT * self._fetch_s:
            limit = min(self._most, 2 * limit)
        elif slack_s > _LONG * self._fetch_s and self._since_change >= limit:
            limit = max(1, limit - 1)
        if limit != self.limit:
            counters.add("cache.prefetch.raised" if limit > self.limit else "cache.prefetch.lowered")
            self.limit, self._since_change = limit, 0
