"""Which blocks of a full tier make room for a newcomer, if any: policies behind one seam, without I/O.

=====================  ==================================================  ==================================
:class:`NextUse`       who is read last goes first, by a published plan    training: the loader knows the order
:class:`KeepFixed`     nobody goes; newcomers only where there is room     epochs without a plan
:class:`Sieve`         who was not read since the hand last came by        traffic that nobody planned
:class:`LeastRecent`   who was read longest ago                            for comparison in simulations only
=====================  ==================================================  ==================================

LRU has no place in training: a scan that reads every block once an epoch hits nothing until all of it fits.

A tier's directory is its index and other processes change it too, so a policy only advises. It knows what it was told
with :meth:`~EvictionPolicy.added` (admitted here, or found by a scan) and :meth:`~EvictionPolicy.removed`; the counter
of the tier, not the policy, knows how many bytes are free. Advice that has become wrong costs a miss and no more:

>>> policy = LeastRecent()
>>> for name in ("a", "b", "c"):
...     policy.added(name, 10)
>>> policy.used("a")
>>> policy.admit("d", 10, free_bytes=0, now=0, is_leased=lambda name: name == "b")
('c',)
>>> policy.removed("c")  # the caller has unlinked it, or found it gone
>>> policy.added("d", 10)
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from heapq import heapify, heappop, heappush
from math import inf, isfinite

from ..errors import ConfigError

__all__ = ["EvictionPolicy", "KeepFixed", "LeastRecent", "NextUse", "Sieve"]


# Guarantees: none for threads; whoever holds the tier's counter holds the policy. The same calls give the same answers:
# no clock, no chance, no order of hashes.
class EvictionPolicy:
    """What a tier asks before it stores a block and has no room.

    ::

        victims = policy.admit(name, size, free_bytes=capacity - used, now=step, is_leased=leased)
        if victims is None: pass the block through
        else: unlink each and tell removed(); count; write; tell added()

    Naming a victim changes nothing: until :meth:`removed` it counts as stored, and may be named again.
    """

    def __init__(self) -> None:
        self._sizes: dict[str, int] = {}
        self._bytes = 0

    def __contains__(self, name: object) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    def names(self) -> tuple[str, ...]:
        """The blocks that it knows of."""
        return tuple(self._sizes)

    def added(self, name: str, size_bytes: int) -> None:
        """A block is in the tier: stored here, or found in its directory. Again for a known one changes nothing."""
        if name not in self._sizes:
            self._sizes[name] = size_bytes
            self._bytes += size_bytes
            self._add(name)

    def removed(self, name: str) -> None:
        """A block is gone, whoever removed it. For an unknown one this changes nothing."""
        if name in self._sizes:
            self._remove(name)
            self._bytes -= self._sizes.pop(name)

    def used(self, name: str) -> None:
        """A block was read from the tier. For an unknown one this changes nothing."""
        if name in self._sizes:
            self._use(name)

    def admit(
        self, name: str, size_bytes: int, *, free_bytes: int, now: float, is_leased: Callable[[str], bool]
    ) -> tuple[str, ...] | None:
        """The blocks to remove so that this one can be stored, none of them in vain; None to pass it through.

        Args:
            name, size_bytes: the newcomer, with its header: what it will take of the capacity.
            free_bytes: what is left of the capacity, by the tier's own counter; negative if it is exceeded.
            now: time in the unit of the plan; only :class:`NextUse` looks at it.
            is_leased: whether a block is in use, so that it must stay. Asked for few blocks, each at most once.
        """
        self.removed(name)  # if it must be stored, it is not there, whatever we were told
        if not self._is_worth_it(name, now):
            return None
        needed = size_bytes - free_bytes
        if needed <= 0:
            return ()
        if needed > self._bytes:
            return None
        victims: list[str] = []
        with closing(self._candidates(name)) as candidates:
            for candidate in candidates:
                if not is_leased(candidate):
                    victims.append(candidate)
                    needed -= self._sizes[candidate]
                    if needed <= 0:
                        break
        if needed > 0:
            return None
        for victim in victims[::-1]:  # of what is more than enough, spare the ones that were chosen last
            if needed + self._sizes[victim] <= 0:
                victims.remove(victim)
                needed += self._sizes[victim]
        return tuple(victims)

    # -- what a policy decides

    def _add(self, name: str) -> None:
        """The block is stored; called once until it is removed."""

    def _remove(self, name: str) -> None:
        """A stored block goes."""

    def _use(self, name: str) -> None:
        """A stored block was read."""

    def _is_worth_it(self, name: str, now: float) -> bool:
        """Whether the newcomer should be stored if there is room."""
        return True

    def _candidates(self, name: str) -> Generator[str]:
        """Blocks that may go for the newcomer, each once, best victim first. Closed as soon as there are enough."""
        yield from ()


class KeepFixed(EvictionPolicy):
    """Keep what is there; newcomers only where there is room.

    In epochs without a plan a fixed part of the data set hits as often as any choice could: capacity over size.
    """


class LeastRecent(EvictionPolicy):
    """LRU: who was read longest ago goes. Hits nothing in scans that are larger than the tier; never the default."""

    def __init__(self) -> None:
        super().__init__()
        self._order: OrderedDict[str, None] = OrderedDict()

    def _add(self, name: str) -> None:
        self._order[name] = None

    def _remove(self, name: str) -> None:
        del self._order[name]

    def _use(self, name: str) -> None:
        self._order.move_to_end(name)

    def _candidates(self, name: str) -> Generator[str]:
        yield from self._order


class _Node:
    __slots__ = ("name", "newer", "older", "visited")

    def __init__(self, name: str) -> None:
        self.name, self.visited = name, False
        self.newer: _Node | None = None
        self.older: _Node | None = None


class Sieve(EvictionPolicy):
    """A queue in order of arrival, over which a hand goes from old to new: a block that was read since it last came by
    is passed once more, any other goes. Newcomers always come in.

    Zhang et al., "SIEVE is simpler than LRU", NSDI 2024, algorithm 1. A victim that could not be removed after all
    (leased, or larger than was needed) stays in its place, and the hand beyond it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._nodes: dict[str, _Node] = {}
        self._newest: _Node | None = None
        self._oldest: _Node | None = None
        self._hand: _Node | None = None  # whom to look at next; None: the oldest

    def _add(self, name: str) -> None:
        node = self._nodes[name] = _Node(name)
        node.older = self._newest
        if self._newest is None:
            self._oldest = node
        else:
            self._newest.newer = node
        self._newest = node

    def _remove(self, name: str) -> None:
        node = self._nodes.pop(name)
        if self._hand is node:
            self._hand = node.newer
        if node.newer is None:
            self._newest = node.older
        else:
            node.newer.older = node.older
        if node.older is None:
            self._oldest = node.newer
        else:
            node.older.newer = node.newer

    def _use(self, name: str) -> None:
        self._nodes[name].visited = True

    def _candidates(self, name: str) -> Generator[str]:
        seen: set[str] = set()
        for _ in range(2 * len(self._nodes)):  # the second time round, nobody is marked any more
            node = self._oldest if self._hand is None else self._hand
            assert node is not None
            self._hand = node.newer
            if node.visited:
                node.visited = False
            elif node.name not in seen:
                seen.add(node.name)
                yield node.name


class NextUse(EvictionPolicy):
    """By a published plan: the block whose next use is furthest away goes, if that is later than the newcomer's.

    Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966, with the right
    to let a newcomer pass. For blocks of one size no policy misses less. Without a plan it is :class:`KeepFixed`.

    A block that the plan does not name is read later than all that it names; once the plan is `final`, such a block
    will not be read again and passes through even where there is room. The plan must therefore be that of the whole
    node: what only another process will read looks unneeded here. Order is a function of seed and position, so each
    process can compute it.

    >>> policy = NextUse()
    >>> policy.publish([(3, "a"), (7, "b"), (5, "c")])
    >>> policy.added("a", 1)
    >>> policy.added("b", 1)
    >>> policy.admit("c", 1, free_bytes=0, now=2, is_leased=lambda name: False)  # b is not needed before 7
    ('b',)
    >>> policy.admit("d", 1, free_bytes=0, now=2, is_leased=lambda name: False) is None
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[str, list[float]] = {}  # of each block, ascending, after _now
        self._agenda: list[tuple[float, str]] = []  # the same uses, as a heap
        self._now = -inf
        self._final = False
        # Heap of (minus next use, number, name) of the stored blocks. A block whose next use changes gets a new entry
        # and number; entries with an old number are dropped when they come up.
        self._latest: list[tuple[float, int, str]] = []
        self._numbers: dict[str, int] = {}
        self._next_number = 0

    def publish(self, uses: Iterable[tuple[float, str]], *, final: bool = False) -> None:
        """Add planned uses: pairs of time and block.

        Args:
            uses: in any order, and beside what was published before. Time is a finite number in a unit of the caller's
                choice, the same in :meth:`admit`: a step or seconds. What is already past is ignored.
            final: nothing is read beyond what has been published; until the next call says otherwise.
        """
        self._final = final
        for time, name in uses:
            if not isfinite(time):
                raise ConfigError("the time of a planned use must be finite", value=time, place="NextUse.publish")
            if time <= self._now:
                continue
            before = self.next_use(name)
            insort(self._uses.setdefault(name, []), time)
            heappush(self._agenda, (time, name))
            if time < before and name in self:
                self._rank(name)

    def withdraw(self) -> None:
        """Forget the plan and the time: its reader has closed or has gone elsewhere."""
        self._uses.clear()
        self._agenda.clear()
        self._now, self._final = -inf, False
        for name in self._sizes:
            self._rank(name)

    def next_use(self, name: str) -> float:
        """When the plan names the block next, after the latest `now`; infinity if it does not."""
        uses = self._uses.get(name)
        return uses[0] if uses else inf

    def _is_worth_it(self, name: str, now: float) -> bool:
        self._advance(now)
        return not self._final or name in self._uses

    def _advance(self, now: float) -> None:
        """Drop the uses up to `now`. Time never goes back: the furthest reader counts."""
        self._now = max(self._now, now)
        while self._agenda and self._agenda[0][0] <= self._now:
            _, name = heappop(self._agenda)
            uses = self._uses[name]
            del uses[0]
            if not uses:
                del self._uses[name]
            if name in self:
                self._rank(name)

    def _add(self, name: str) -> None:
        self._rank(name)

    def _remove(self, name: str) -> None:
        del self._numbers[name]

    def _rank(self, name: str) -> None:
        self._numbers[name] = self._next_number
        heappush(self._latest, (-self.next_use(name), self._next_number, name))
        self._next_number += 1
        if len(self._latest) > 2 * len(self._sizes) + 64:
            self._latest = [entry for entry in self._latest if self._is_current(entry)]
            heapify(self._latest)

    def _is_current(self, entry: tuple[float, int, str]) -> bool:
        return self._numbers.get(entry[2]) == entry[1]

    def _candidates(self, name: str) -> Generator[str]:
        needed_at = self.next_use(name)
        passed = []
        try:
            while self._latest:
                entry = heappop(self._latest)
                if not self._is_current(entry):
                    continue
                passed.append(entry)
                if -entry[0] <= needed_at:
                    return
                yield entry[2]
        finally:
            for entry in passed:
                heappush(self._latest, entry)
