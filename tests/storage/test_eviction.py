from collections.abc import Sequence
from functools import cache
from random import Random

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stoker.errors import ConfigError
from stoker.storage.eviction import EvictionPolicy, KeepFixed, LeastRecent, NextUse, Sieve

NAMES = "abcdef"
SIZES = {"a": 1, "b": 2, "c": 3, "d": 5, "e": 8, "f": 13}

# What happens to a tier, by this process and by others.
ACTS = st.lists(
    st.tuples(st.sampled_from(["read", "read", "read", "lease", "release", "found", "lost"]), st.sampled_from(NAMES)),
    max_size=60,
)
CAPACITIES = st.integers(1, 34)


def nobody(name: str) -> bool:
    return False


class Directory:
    """A tier's directory: what really is there, with a capacity and leases. Other processes change it, too."""

    def __init__(self, policy: EvictionPolicy, capacity: int) -> None:
        self.policy, self.capacity = policy, capacity
        self.blocks: dict[str, int] = {}
        self.leased: set[str] = set()
        self.log: list[object] = []
        self.asked: list[str] = []

    @property
    def free(self) -> int:
        return self.capacity - sum(self.blocks.values())

    def do(self, act: str, name: str, now: float) -> None:
        if act == "read":
            self.log.append(self.read(name, now))
        elif act == "lease" and name in self.blocks:
            self.leased.add(name)
        elif act == "release":
            self.leased.discard(name)
        elif act == "found" and SIZES[name] <= self.free:
            self.blocks.setdefault(name, SIZES[name])
            self.policy.added(name, SIZES[name])
        elif act == "lost":
            self.blocks.pop(name, None)
            self.leased.discard(name)
            self.policy.removed(name)

    def is_leased(self, name: str) -> bool:
        self.asked.append(name)
        return name in self.leased

    def read(self, name: str, now: float) -> bool | tuple[str, ...] | None:
        """True for a hit, else what the policy answered, which is checked and done."""
        if name in self.blocks:
            self.policy.used(name)
            return True
        self.asked.clear()
        free = self.free
        if isinstance(self.policy, NextUse):
            self.policy.advance(now)
        victims = self.policy.admit(name, SIZES[name], free_bytes=free, is_leased=self.is_leased)
        assert len(set(self.asked)) == len(self.asked), "asked twice about one lease"
        if victims is None:
            return None
        assert victims == () or free < SIZES[name], "evicted although there was room"
        assert len(set(victims)) == len(victims)
        assert not self.leased.intersection(victims)
        gained = sum(self.blocks[victim] for victim in victims)
        assert all(free + gained - self.blocks[victim] < SIZES[name] for victim in victims), "evicted one in vain"
        for victim in victims:
            del self.blocks[victim]
            self.policy.removed(victim)
        self.blocks[name] = SIZES[name]
        self.policy.added(name, SIZES[name])
        assert self.free >= 0
        return victims


TWO_SCANS = [("read", name) for name in NAMES] * 2


def make(policy: type[EvictionPolicy], acts: Sequence[tuple[str, str]]) -> EvictionPolicy:
    """A policy that knows, if it is one for plans, which acts will be reads."""
    if policy is not NextUse:
        return policy()
    return planned([name if act == "read" else "" for act, name in acts], final=False)


def run(policy: EvictionPolicy, acts: Sequence[tuple[str, str]], capacity: int) -> Directory:
    directory = Directory(policy, capacity)
    for now, (act, name) in enumerate(acts):
        directory.do(act, name, now)
        assert sum(directory.blocks.values()) <= capacity
        assert {name for name in NAMES if name in policy} == set(directory.blocks)
    return directory


POLICIES: list[type[EvictionPolicy]] = [KeepFixed, LeastRecent, NextUse, Sieve]


@pytest.mark.parametrize("policy", POLICIES)
class TestEveryPolicy:
    @given(acts=ACTS, capacity=CAPACITIES)
    def test_capacity_holds_leased_blocks_stay_and_nothing_goes_in_vain(
        self, policy: type[EvictionPolicy], acts: list[tuple[str, str]], capacity: int
    ) -> None:
        run(make(policy, acts), acts, capacity)

    @given(acts=ACTS, capacity=CAPACITIES)
    def test_the_same_calls_give_the_same_answers(
        self, policy: type[EvictionPolicy], acts: list[tuple[str, str]], capacity: int
    ) -> None:
        first, second = (run(make(policy, acts), acts, capacity) for _ in range(2))
        assert first.log == second.log

    def test_a_block_larger_than_the_tier_passes_through_and_evicts_nothing(self, policy: type[EvictionPolicy]) -> None:
        one = make(policy, TWO_SCANS)
        one.added("a", 1)
        assert one.admit("f", 13, free_bytes=9, is_leased=nobody) is None
        assert "a" in one

    def test_nothing_is_admitted_when_all_is_leased(self, policy: type[EvictionPolicy]) -> None:
        one = make(policy, TWO_SCANS)
        one.added("a", 1)
        assert one.admit("b", 1, free_bytes=0, is_leased=lambda name: True) is None

    def test_what_is_unknown_may_be_used_and_removed(self, policy: type[EvictionPolicy]) -> None:
        one = policy()
        one.used("a")
        one.removed("a")
        assert len(one) == 0

    def test_a_block_told_of_twice_counts_once(self, policy: type[EvictionPolicy]) -> None:
        one = make(policy, TWO_SCANS)
        one.added("a", 1)
        one.added("a", 1)
        one.removed("a")
        assert one.admit("b", 1, free_bytes=0, is_leased=nobody) is None, "there is nothing to evict"
        one.added("c", 1)
        assert one.admit("b", 1, free_bytes=0, is_leased=nobody) in (None, ("c",))

    def test_a_block_believed_there_but_gone_is_admitted_as_new(self, policy: type[EvictionPolicy]) -> None:
        one = make(policy, TWO_SCANS)
        one.added("a", 1)
        assert one.admit("a", 1, free_bytes=0, is_leased=nobody) is None, "it can't make room for itself"
        assert "a" not in one

    def test_a_victim_that_was_not_removed_may_be_named_again(self, policy: type[EvictionPolicy]) -> None:
        one = policy()
        for name in "abc":
            one.added(name, 1)
        first = one.admit("d", 2, free_bytes=0, is_leased=nobody)
        second = one.admit("d", 3, free_bytes=0, is_leased=nobody)
        assert first is second is None or (first is not None and second is not None and set(first) < set(second))


class TestKeepFixed:
    @given(acts=ACTS, capacity=CAPACITIES)
    def test_it_never_evicts_and_admits_whatever_there_is_room_for(
        self, acts: list[tuple[str, str]], capacity: int
    ) -> None:
        assert set(run(KeepFixed(), acts, capacity).log) <= {True, (), None}

    def test_a_repeated_scan_hits_what_fits(self) -> None:
        assert hits(KeepFixed(), "abcdef" * 5, capacity=3) == 4 * 3


class TestLeastRecent:
    @given(trace=st.text(NAMES, max_size=60), capacity=st.integers(1, 5))
    def test_it_holds_the_blocks_read_last(self, trace: str, capacity: int) -> None:
        policy = LeastRecent()
        hits(policy, trace, capacity=capacity)
        last_first = list(dict.fromkeys(reversed(trace)))
        assert {name for name in NAMES if name in policy} == set(last_first[:capacity])

    def test_a_repeated_scan_hits_nothing(self) -> None:
        assert hits(LeastRecent(), "abcdef" * 5, capacity=5) == 0


class SieveOfThePaper:
    """Algorithm 1 of the paper on a list, the newest first, for blocks of size 1."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.queue: list[str] = []
        self.visited: dict[str, bool] = {}
        self.hand: str | None = None

    def read(self, name: str) -> bool:
        if name in self.queue:
            self.visited[name] = True
            return True
        if len(self.queue) == self.capacity:
            self.evict()
        self.queue.insert(0, name)
        self.visited[name] = False
        return False

    def lose(self, name: str) -> None:
        """Not in the paper: another process removes a block. The hand looks at its neighbour next."""
        if name in self.queue:
            index = self.queue.index(name)
            if self.hand == name:
                self.hand = self.queue[index - 1] if index else None
            self.queue.remove(name)

    def evict(self) -> None:
        here = self.queue[-1] if self.hand is None else self.hand
        while self.visited[here]:
            self.visited[here] = False
            index = self.queue.index(here)
            here = self.queue[index - 1] if index else self.queue[-1]
        index = self.queue.index(here)
        self.hand = self.queue[index - 1] if index else None
        self.queue.remove(here)


class TestSieve:
    @given(trace=st.text(NAMES + NAMES.upper(), max_size=80), capacity=st.integers(1, 5))
    @example(trace="abcabdaebfa", capacity=3)
    @example(trace="abcdBCeff", capacity=3)
    def test_it_does_what_the_paper_says(self, trace: str, capacity: int) -> None:
        """Capitals are blocks that another process removes."""
        policy, model = Sieve(), SieveOfThePaper(capacity)
        for name in trace:
            if name.isupper():
                policy.removed(name.lower())
                model.lose(name.lower())
            else:
                assert read(policy, name, capacity=capacity) == model.read(name)
            assert {name for name in NAMES if name in policy} == set(model.queue)

    @given(acts=ACTS, capacity=CAPACITIES)
    def test_it_admits_whatever_leases_leave_room_for(self, acts: list[tuple[str, str]], capacity: int) -> None:
        directory = Directory(Sieve(), capacity)
        for act, name in acts:
            kept = sum(directory.blocks[leased] for leased in directory.leased)
            directory.do(act, name, 0)
            if act == "read" and kept + SIZES[name] <= capacity:
                assert directory.log[-1] is not None

    def test_a_block_that_no_eviction_makes_room_for_changes_nothing(self) -> None:
        policy = Sieve()
        hits(policy, "aab", capacity=2)
        assert policy.admit("f", 13, free_bytes=0, is_leased=nobody) is None
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) == ("b",), "a was read"

    def test_a_block_that_was_read_survives_a_scan_of_others(self) -> None:
        policy = Sieve()
        hits(policy, "aabcdefbcdefa", capacity=3)
        assert "a" in policy


class TestNextUse:
    @settings(max_examples=300)
    @given(trace=st.text("abcde", max_size=12), capacity=st.integers(1, 4))
    def test_no_policy_hits_more_than_the_plan(self, trace: str, capacity: int) -> None:
        """Belady, by trying everything, the right to let a block pass included."""
        assert hits(planned(trace), trace, capacity=capacity) == most_hits(trace, capacity)

    @given(acts=ACTS, capacity=CAPACITIES)
    def test_without_a_plan_it_keeps_what_is_there(self, acts: list[tuple[str, str]], capacity: int) -> None:
        assert run(NextUse(), acts, capacity).log == run(KeepFixed(), acts, capacity).log

    @given(acts=ACTS, capacity=CAPACITIES, order=st.randoms(use_true_random=False), pieces=st.integers(1, 5))
    def test_a_plan_published_in_pieces_and_in_any_order_is_the_same_plan(
        self, acts: list[tuple[str, str]], capacity: int, order: Random, pieces: int
    ) -> None:
        uses = [(float(time), name) for time, (act, name) in enumerate(acts) if act == "read"]
        order.shuffle(uses)
        policy = NextUse()
        for piece in range(pieces):
            policy.publish(uses[piece::pieces])
        assert run(policy, acts, capacity).log == run(make(NextUse, acts), acts, capacity).log

    @given(trace=st.text(NAMES, max_size=60), capacity=st.integers(1, 5))
    def test_every_victim_is_needed_later_than_the_newcomer_and_no_other_later_still(
        self, trace: str, capacity: int
    ) -> None:
        policy = planned(trace, final=False)
        for now, name in enumerate(trace):
            before = {other: next_in(trace, now, other) for other in NAMES if other in policy}
            read(policy, name, capacity=capacity, now=now)
            gone = {other for other in before if other not in policy}
            for victim in gone:
                assert before[victim] == max(before.values()) > next_in(trace, now, name)

    def test_a_block_that_is_not_read_again_passes_through_though_there_is_room(self) -> None:
        policy = planned("ab", final=True)
        policy.advance(0)
        assert policy.admit("a", 1, free_bytes=9, is_leased=nobody) is None
        assert policy.admit("b", 1, free_bytes=9, is_leased=nobody) == ()

    def test_until_the_plan_is_final_a_block_that_it_does_not_name_takes_free_room(self) -> None:
        assert planned("ab", final=False).admit("z", 1, free_bytes=9, is_leased=nobody) == ()

    def test_a_block_stored_before_the_plan_was_published_follows_it(self) -> None:
        policy = NextUse()
        policy.added("a", 1)
        policy.added("b", 1)
        policy.publish([(9, "a"), (5, "c")])
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) == ("b",), "the plan does not name b"
        policy.publish([(7, "b")])
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) == ("a",)

    def test_time_passes_uses_that_nobody_made_here(self) -> None:
        policy = NextUse()
        policy.publish([(1, "a"), (9, "a"), (5, "b"), (6, "c")])
        policy.added("a", 1)
        policy.added("b", 1)
        policy.advance(0.5)
        assert policy.next_use("a") == 0.5
        policy.advance(1)
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) == ("a",), "its use at 1 is over"
        assert policy.next_use("a") == 8

    def test_what_is_past_when_it_is_published_is_no_use(self) -> None:
        policy = NextUse()
        policy.advance(5)
        policy.publish([(5, "a")])
        assert policy.next_use("a") == float("inf")

    def test_a_withdrawn_plan_counts_no_more(self) -> None:
        policy = planned("abab", final=True)
        policy.added("a", 1)
        policy.withdraw()
        assert policy.next_use("b") == float("inf")
        assert policy.admit("b", 1, free_bytes=0, is_leased=nobody) is None
        assert policy.admit("b", 1, free_bytes=1, is_leased=nobody) == (), "no longer final"

    def test_a_block_is_needed_until_its_use_is_over(self) -> None:
        policy = NextUse()
        policy.publish([(1, "a"), (4, "b"), (8, "c")], lasts=3)
        for name in "ab":
            policy.added(name, 1)
        policy.advance(3.5)
        assert policy.next_use("a") == 0
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) is None
        policy.advance(4)
        assert policy.next_use("a") == float("inf")
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) == ("a",)

    def test_a_newcomer_that_another_tier_holds_is_judged_by_its_second_use(self) -> None:
        policy = NextUse()
        policy.publish([(1, "new"), (5, "a"), (9, "new"), (2, "last")], final=True)
        policy.added("a", 1)
        assert policy.admit("new", 1, free_bytes=0, is_leased=nobody) == ("a",)
        assert policy.admit("new", 1, free_bytes=0, is_leased=nobody, is_held=True) is None
        assert policy.admit("new", 1, free_bytes=1, is_leased=nobody, is_held=True) == ()
        assert policy.admit("last", 1, free_bytes=1, is_leased=nobody) == ()
        assert policy.admit("last", 1, free_bytes=1, is_leased=nobody, is_held=True) is None

    def test_two_plans_are_compared_by_the_distance_from_their_own_clocks(self) -> None:
        policy = NextUse()
        for name in "ab":
            policy.added(name, 1)
        policy.publish([(1000, "a"), (1009, "c")], plan="train")
        policy.advance(990, plan="train")
        policy.publish([(5, "b")], plan="eval")
        policy.advance(0, plan="eval")
        assert (policy.next_use("a"), policy.next_use("b"), policy.next_use("c")) == (10, 5, 19)
        policy.publish([(6, "d")], plan="eval")
        assert policy.admit("d", 1, free_bytes=0, is_leased=nobody) == ("a",)
        policy.advance(999, plan="train")  # while the other one pauses
        assert policy.admit("d", 1, free_bytes=0, is_leased=nobody) is None
        policy.publish([], plan="train", final=True)
        assert policy.admit("z", 1, free_bytes=9, is_leased=nobody) == (), "the other plan may still name it"
        policy.withdraw(plan="eval")
        assert policy.admit("z", 1, free_bytes=9, is_leased=nobody) is None
        assert policy.admit("c", 1, free_bytes=0, is_leased=nobody) == ("b",), "no plan names it any more"

    def test_a_time_that_is_none_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="finite"):
            NextUse().publish([(float("nan"), "a")])

    def test_its_memory_follows_the_blocks_and_not_the_reads(self) -> None:
        policy = planned("ab" * 2000, final=False)
        policy.added("a", 1)
        policy.added("b", 1)
        policy.advance(3000)
        assert sum(len(plan.latest) for plan in policy._plans.values()) < 100
        assert sum(len(plan.agenda) for plan in policy._plans.values()) < 1000


def planned(trace: Sequence[str], *, final: bool = True) -> NextUse:
    policy = NextUse()
    policy.publish([(time, name) for time, name in enumerate(trace) if name], final=final)
    return policy


def read(policy: EvictionPolicy, name: str, *, capacity: int, now: float = 0) -> bool:
    """Read a block of size 1 through a tier of so many; whether it was there."""
    if name in policy:
        policy.used(name)
        return True
    if isinstance(policy, NextUse):
        policy.advance(now)
    victims = policy.admit(name, 1, free_bytes=capacity - len(policy), is_leased=nobody)
    if victims is not None:
        for victim in victims:
            policy.removed(victim)
        policy.added(name, 1)
    return False


def hits(policy: EvictionPolicy, trace: str, *, capacity: int) -> int:
    return sum(read(policy, name, capacity=capacity, now=now) for now, name in enumerate(trace))


def most_hits(trace: str, capacity: int) -> int:
    @cache
    def best(at: int, held: frozenset[str]) -> int:
        if at == len(trace):
            return 0
        name = trace[at]
        if name in held:
            return 1 + best(at + 1, held)
        ways = [held]
        ways += [held | {name}] if len(held) < capacity else [held - {victim} | {name} for victim in held]
        return max(best(at + 1, way) for way in ways)

    return best(0, frozenset())


def next_in(trace: str, now: int, name: str) -> float:
    found = trace.find(name, now + 1)
    return float("inf") if found < 0 else found
