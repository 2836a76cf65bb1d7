"""Which blocks of a full tier make room for a newcomer, if any: policies behind one seam, without I/O.

=====================  ==================================================  ==================================
:class:`NextUse`       who is read last goes first, by published plans     training: the loader knows the order
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
>>> policy.admit("d", 10, free_bytes=0, is_leased=lambda name: name == "b")
('c',)
>>> policy.removed("c")  # the caller has unlinked it, or found it gone
>>> policy.added("d", 10)
"""

from bisect import insort
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing
from heapq import heapify, heappop, heappush
from math import inf, isfinite, nan

from ..errors import ConfigError

__all__ = ["EvictionPolicy", "KeepFixed", "LeastRecent", "NextUse", "Sieve"]


# Guarantees: none for threads; whoever holds the tier's counter holds the policy. The same calls give the same answers:
# no clock, no chance, no order of hashes.
class EvictionPolicy:
    """What a tier asks before it stores a block and has no room.

    ::

        victims = policy.admit(name, size, free_bytes=capacity - used, is_leased=leased)
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

    @property
    def may_evict(self) -> bool:
        """Whether any block may ever go for a newcomer, as things stand."""
        return True

    def admit(
        self, name: str, size_bytes: int, *, free_bytes: int, is_leased: Callable[[str], bool], is_held: bool = False
    ) -> tuple[str, ...] | None:
        """The blocks to remove so that this one can be stored, none of them in vain; None to pass it through.

        Args:
            name, size_bytes: the newcomer, with its header: what it will take of the capacity.
            free_bytes: what is left of the capacity, by the tier's own counter; negative if it is exceeded.
            is_leased: whether a block is in use, so that it must stay. Asked for few blocks, each at most once.
            is_held: another tier holds the newcomer for its next read: what counts is the one after it. Only
                :class:`NextUse` looks at it.
        """
        self.removed(name)  # if it must be stored, it is not there, whatever we were told
        if not self.is_worth_it(name, is_held=is_held):
            return None
        needed = size_bytes - free_bytes
        if needed <= 0:
            return ()
        if needed > self._bytes:
            return None
        victims: list[str] = []
        with closing(self._candidates(name, is_held=is_held)) as candidates:
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

    def is_worth_it(self, name: str, *, is_held: bool = False) -> bool:
        """Whether the newcomer should be stored if there is room."""
        return True

    # -- what a policy decides

    def _add(self, name: str) -> None:
        """The block is stored; called once until it is removed."""

    def _remove(self, name: str) -> None:
        """A stored block goes."""

    def _use(self, name: str) -> None:
        """A stored block was read."""

    def _candidates(self, name: str, *, is_held: bool) -> Generator[str]:
        """Blocks that may go for the newcomer, each once, best victim first. Closed as soon as there are enough."""
        yield from ()


class KeepFixed(EvictionPolicy):
    """Keep what is there; newcomers only where there is room.

    In epochs without a plan a fixed part of the data set hits as often as any choice could: capacity over size.
    """

    @property
    def may_evict(self) -> bool:
        return False


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

    def _candidates(self, name: str, *, is_held: bool) -> Generator[str]:
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

    def _candidates(self, name: str, *, is_held: bool) -> Generator[str]:
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


class _Plan:
    """What one reader has published, and which stored blocks it says most about."""

    __slots__ = ("agenda", "earliest", "final", "latest", "now", "uses")

    def __init__(self) -> None:
        self.uses: dict[str, list[float]] = {}  # of each block, ascending, those that are not over
        self.agenda: list[tuple[float, str]] = []  # the same uses by their ends, as a heap
        self.now = -inf
        self.earliest = inf  # of all uses: what distances are from until the clock is first set
        self.final = False
        # Heap of (minus next use, number, name) of stored blocks. A block whose next use changes gets a new entry and
        # number; entries with an old number are dropped when they come up.
        self.latest: list[tuple[float, int, str]] = []

    def distance(self, name: str, nth: int = 0) -> float:
        """From now to the block's next use, or to the `nth` after it; infinity if there is none."""
        uses = self.uses.get(name, ())
        return self.until(uses[nth]) if nth < len(uses) else inf

    def until(self, time: float) -> float:
        """From now to a time."""
        return max(0.0, time - (self.earliest if self.now == -inf else self.now))


class NextUse(EvictionPolicy):
    """By published plans: the block whose next use is furthest away goes, if that is later than the newcomer's.

    Belady, "A study of replacement algorithms for a virtual-storage computer", IBM Systems Journal 1966, with the right
    to let a newcomer pass. For blocks of one size and one plan no policy misses less. Without a plan it is
    :class:`KeepFixed`.

    A block that no plan names is read later than all that one names; once all plans are final, such a block will not be
    read again and passes through even where there is room. A plan must therefore be that of the whole node: what only
    another process will read looks unneeded here. Order is a function of seed and position, so each process can compute
    it.

    Each plan has a clock of its own, in a unit of its reader's choice: what counts is the distance from the clock to
    the use. A reader that pauses keeps its next blocks as near as they were.

    >>> policy = NextUse()
    >>> policy.publish([(3, "a"), (7, "b"), (5, "c")])
    >>> policy.added("a", 1)
    >>> policy.added("b", 1)
    >>> policy.advance(2)
    >>> policy.admit("c", 1, free_bytes=0, is_leased=lambda name: False)  # b is not needed before 7
    ('b',)
    >>> policy.admit("d", 1, free_bytes=0, is_leased=lambda name: False) is None
    True
    """

    def __init__(self) -> None:
        super().__init__()
        self._plans: dict[str, _Plan] = {}
        self._ranks: dict[str, tuple[_Plan, int]] = {}  # of each stored block that a plan names
        self._unnamed: OrderedDict[str, None] = OrderedDict()  # the other stored blocks
        self._spared: frozenset[str] = frozenset()
        self._next_number = 0

    @property
    def may_evict(self) -> bool:
        return bool(self._plans)

    def publish(
        self, uses: Iterable[tuple[float, str]], *, plan: str = "", lasts: float = 0.0, final: bool = False
    ) -> None:
        """Add planned uses: pairs of the time at which a use begins, and block.

        Args:
            uses: in any order, and beside what the plan held before. Time is a finite number. What is over is ignored.
            plan: whose it is.
            lasts: how long a use takes, the same for all uses of a plan; a block is needed until its use is over.
            final: nothing is read by this plan beyond what has been published; until the next call says otherwise.
        """
        own = self._plans.setdefault(plan, _Plan())
        own.final = final
        for time, name in uses:
            if not isfinite(time):
                raise ConfigError("the time of a planned use must be finite", value=time, place="NextUse.publish")
            if time + lasts <= own.now:
                continue
            own.earliest = min(own.earliest, time)
            times = own.uses.setdefault(name, [])
            insort(times, time)
            heappush(own.agenda, (time + lasts, name))
            if times[0] == time and name in self:
                self._rank(name)

    def advance(self, now: float, *, plan: str = "") -> None:
        """Drop the uses that are over by `now`. Time never goes back: the furthest reader of a plan counts."""
        own = self._plans.setdefault(plan, _Plan())
        own.now = max(own.now, now)
        while own.agenda and own.agenda[0][0] <= own.now:
            _, name = heappop(own.agenda)
            times = own.uses[name]
            del times[0]
            if not times:
                del own.uses[name]
            if name in self:
                self._rank(name)

    def withdraw(self, *, plan: str = "") -> None:
        """Forget a plan and its time: its reader has closed or has gone elsewhere."""
        own = self._plans.pop(plan, None)
        if own is not None:
            for name in [name for name, (ranked_by, _) in self._ranks.items() if ranked_by is own]:
                self._rank(name)

    def spare(self, names: Iterable[str]) -> None:
        """Blocks that others need: they are no victims while no plan here names them. Replaces what was said before."""
        self._spared = frozenset(names)

    def upcoming(self, takes_s: Mapping[str, float]) -> list[tuple[float, str]]:
        """Stored blocks that a plan names, and in how many seconds they are read next; NaN if nobody can tell.

        `takes_s` is how long each plan's unit of time takes, where that is known.
        """
        seconds = {id(plan): takes_s.get(name, nan) for name, plan in self._plans.items()}
        return [
            (plan.until(plan.uses[name][0]) * seconds[id(plan)], name)
            for name, (plan, _) in self._ranks.items()
            if name in plan.uses
        ]

    def next_use(self, name: str, *, nth: int = 0) -> float:
        """How far away the block's next use is, by the plan that needs it first, or the `nth` use after it."""
        return min((plan.distance(name, nth) for plan in self._plans.values()), default=inf)

    def is_worth_it(self, name: str, *, is_held: bool = False) -> bool:
        if not self._plans or not all(plan.final for plan in self._plans.values()):
            return True
        return self.next_use(name, nth=int(is_held)) < inf

    def _add(self, name: str) -> None:
        self._rank(name)

    def _remove(self, name: str) -> None:
        self._ranks.pop(name, None)
        self._unnamed.pop(name, None)

    def _rank(self, name: str) -> None:
        plan = min(self._plans.values(), key=lambda plan: plan.distance(name), default=None)
        if plan is None or name not in plan.uses:
            self._ranks.pop(name, None)
            self._unnamed[name] = None
            return
        self._unnamed.pop(name, None)
        self._ranks[name] = plan, self._next_number
        heappush(plan.latest, (-plan.uses[name][0], self._next_number, name))
        self._next_number += 1
        if len(plan.latest) > 2 * len(self._sizes) + 64:
            plan.latest = [entry for entry in plan.latest if self._is_current(plan, entry)]
            heapify(plan.latest)

    def _is_current(self, plan: _Plan, entry: tuple[float, int, str]) -> bool:
        return self._ranks.get(entry[2]) == (plan, entry[1])

    def _candidates(self, name: str, *, is_held: bool) -> Generator[str]:
        needed_in = self.next_use(name, nth=int(is_held))
        if needed_in == inf:
            return
        yield from (other for other in self._unnamed if other not in self._spared)
        passed: list[tuple[_Plan, tuple[float, int, str]]] = []
        try:
            while (plan := self._furthest()) is not None:
                entry = heappop(plan.latest)
                passed.append((plan, entry))
                if plan.until(-entry[0]) <= needed_in:
                    return
                yield entry[2]
        finally:
            for plan, entry in passed:
                heappush(plan.latest, entry)

    def _furthest(self) -> _Plan | None:
        """The plan that knows the stored block whose next use is furthest away."""
        for plan in self._plans.values():
            while plan.latest and not self._is_current(plan, plan.latest[0]):
                heappop(plan.latest)
        known = [plan for plan in self._plans.values() if plan.latest]
        return max(known, key=lambda plan: plan.until(-plan.latest[0][0]), default=None)
