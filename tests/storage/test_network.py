"""The policy towards object stores: retries, breaker, hedges, limits; each part alone, then together."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import BadReply, ConfigError, KeyNotFound, StoreUnavailable, Throttled, Unreachable
from stoker.metrics import counters
from stoker.storage import NetworkPolicy, network
from stoker.storage._health import Health
from stoker.storage._hedging import Hedging
from stoker.storage._limits import ByteBudget, RequestLimit
from stoker.storage.network import Attempt, Network, use_network

NEVER = 0.0
"""A deadline in the past: whoever would have to wait does not."""


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


# --- health -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def ill(clock: Clock) -> Health:
    """After five failures in a row."""
    health = Health(clock)
    for _ in range(5):
        assert health.turn(NEVER, again=False) == "go"
        health.failed("go")
    return health


def test_four_failures_in_a_row_are_bad_luck_and_the_fifth_opens_the_breaker(clock: Clock) -> None:
    health = Health(clock)
    for _ in range(3):
        for _ in range(4):
            health.failed("go")
        health.answered("go")
    assert not health.is_open
    for _ in range(5):
        health.failed("go")
    assert health.is_open
    assert health.turn(NEVER, again=False) is None


def test_while_the_breaker_is_open_one_probe_is_under_way_at_a_time(clock: Clock, ill: Health) -> None:
    clock.now += 1
    assert ill.turn(NEVER, again=True) == "probe"
    assert ill.turn(NEVER, again=True) is None
    clock.now += 1000
    assert ill.turn(NEVER, again=False) is None
    ill.failed("probe")
    assert ill.turn(NEVER, again=False) is None
    clock.now += 1
    assert ill.turn(NEVER, again=False) == "probe"


def test_a_probe_that_is_answered_closes_the_breaker_for_all(clock: Clock, ill: Health) -> None:
    clock.now += 1
    assert ill.turn(NEVER, again=False) == "probe"
    ill.answered("probe")
    assert [ill.turn(NEVER, again=False) for _ in range(3)] == ["go", "go", "go"]


def test_who_waits_for_the_store_goes_on_as_soon_as_it_answers(clock: Clock, ill: Health) -> None:
    clock.now += 1
    assert ill.turn(NEVER, again=False) == "probe"
    with ThreadPoolExecutor(4) as threads:
        waiting = [threads.submit(ill.turn, clock.now + 60, again=False) for _ in range(4)]
        ill.answered("probe")
        assert [turn.result(timeout=60) for turn in waiting] == ["go"] * 4


def test_failures_of_requests_that_were_under_way_do_not_delay_the_next_probe(clock: Clock, ill: Health) -> None:
    clock.now += 1
    for _ in range(100):
        ill.failed("go")
    assert ill.turn(NEVER, again=False) == "probe"


def test_probes_come_at_least_once_a_second_however_long_the_outage_is(clock: Clock, ill: Health) -> None:
    for _ in range(50):
        clock.now += 1
        assert ill.turn(NEVER, again=False) == "probe"
        ill.failed("probe")


def test_retries_are_ten_at_first_then_a_tenth_of_the_successes_or_one_a_second(clock: Clock) -> None:
    health = Health(clock)
    assert [health.turn(NEVER, again=True) for _ in range(11)] == ["go"] * 10 + [None]
    assert health.turn(NEVER, again=False) == "go"  # a first try needs no token
    for _ in range(11):
        health.answered("go")
    assert [health.turn(NEVER, again=True) for _ in range(2)] == ["go", None]
    clock.now += 3.01
    assert [health.turn(NEVER, again=True) for _ in range(4)] == ["go"] * 3 + [None]


@given(st.integers(1, 64), st.integers(1, 100))
@settings(deadline=None, max_examples=30)
def test_an_outage_of_ten_seconds_sees_few_requests_however_many_callers_there_are(callers: int, step_ms: int) -> None:
    clock = Clock()
    health, sent = Health(clock), 0
    end = clock.now + 10
    while clock.now < end:
        turns = [turn for _ in range(callers) if (turn := health.turn(NEVER, again=False)) is not None]
        sent += len(turns)
        for turn in turns:
            health.failed(turn)
        clock.now += step_ms / 1000
    # The first burst, then the pauses between probes: 0.1 to 1 s, half of it jitter.
    assert sent <= max(callers, 5) + 5 + 30


# --- hedging ----------------------------------------------------------------------------------------------------------


def test_a_late_percent_does_not_move_the_moment_of_hedging() -> None:
    hedging = Hedging(0.05)
    for number in range(500):
        hedging.sent(1 << 20)
        hedging.won(1 << 20, 1.5 if number % 100 == 50 else 0.010)
    assert hedging.sent(1 << 20) == pytest.approx(0.025)


def test_too_few_winners_say_nothing_and_sizes_are_apart() -> None:
    hedging = Hedging(0.05)
    for _ in range(29):
        assert hedging.sent(1 << 20) is None
        hedging.won(1 << 20, 0.010)
    assert hedging.sent(1 << 20) is None
    hedging.won(1 << 20, 0.010)
    assert hedging.sent(1 << 20) is not None
    assert hedging.sent(1 << 23) is None


def test_without_budget_no_read_waits_for_the_moment_of_its_second_request() -> None:
    hedging = Hedging(0.05)
    for _ in range(100):
        hedging.sent(1 << 20)
        hedging.won(1 << 20, 0.010)
    assert hedging.sent(1 << 20) is not None
    while hedging.allow():
        pass
    assert hedging.sent(1 << 20) is None


@given(st.lists(st.booleans(), max_size=400), st.sampled_from([0.0, 0.02, 0.05]))
def test_second_requests_never_exceed_their_share(asks: list[bool], share: float) -> None:
    hedging, firsts, seconds = Hedging(share), 0, 0
    for ask in asks:
        if ask:
            seconds += hedging.allow()
        else:
            hedging.sent(1)
            firsts += 1
        assert seconds <= share * firsts


def test_second_requests_that_never_win_become_few_and_those_that_win_go_on() -> None:
    losing, winning, sent = Hedging(0.05), Hedging(0.05), [0, 0]
    for number in range(10_000):
        for which, hedging in enumerate((losing, winning)):
            hedging.sent(1)
            if number % 25 == 0 and hedging.allow():
                sent[which] += 1
                if hedging is winning:
                    hedging.paid_off()
    assert sent[1] >= 395
    assert sent[0] <= 20 + 100


# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def limit_path(tmp_path: Path) -> Path:
    return tmp_path / "limit"


@pytest.fixture
def limit(limit_path: Path) -> Iterator[RequestLimit]:
    limit = RequestLimit("endpoint", 64, path=limit_path)
    yield limit
    limit.close()


def hold(limit: RequestLimit, number: int) -> Callable[[], None]:
    """Take so many places; the result gives them back."""
    slots = [limit.slot(time.monotonic() + 60) for _ in range(number)]
    for slot in slots:
        slot.__enter__()

    def give_back() -> None:
        for slot in slots:
            slot.__exit__(None, None, None)

    return give_back


def is_full(limit: RequestLimit) -> bool:
    try:
        with limit.slot(NEVER):
            return False
    except StoreUnavailable:
        return True


def test_no_more_requests_are_under_way_than_the_window_admits(limit: RequestLimit) -> None:
    give_back = hold(limit, int(limit.window) - 1)
    assert not is_full(limit)
    with limit.slot(NEVER):
        assert is_full(limit)
    give_back()
    assert not is_full(limit)


def test_what_the_store_says_to_requests_under_way_together_halves_the_window_once(limit: RequestLimit) -> None:
    before, began = limit.window, time.monotonic()
    for _ in range(8):
        limit.throttled(began)
    assert limit.window == before / 2
    limit.throttled(time.monotonic())
    assert limit.window == before / 4


def test_the_window_never_falls_below_one_and_never_grows_beyond_its_end(limit: RequestLimit) -> None:
    for _ in range(100):
        limit.throttled(time.monotonic())
    assert limit.window == 1
    for _ in range(5000):
        give_back = hold(limit, int(limit.window))
        limit.succeeded()
        give_back()
    assert limit.window == 64


def test_a_window_that_nobody_fills_does_not_grow(limit: RequestLimit) -> None:
    before = limit.window
    for _ in range(100):
        with limit.slot(NEVER):
            limit.succeeded()
    assert limit.window == before


def test_two_openers_of_one_endpoint_share_its_places_and_its_window(limit: RequestLimit, limit_path: Path) -> None:
    other = RequestLimit("endpoint", 64, path=limit_path)
    give_back = hold(other, int(other.window))
    assert is_full(limit)
    give_back()
    assert not is_full(limit)
    other.throttled(time.monotonic())
    assert limit.window == other.window == 16
    other.close()


HOLDER = """
import os, sys, time
from pathlib import Path
from stoker.storage._limits import RequestLimit
limit = RequestLimit("endpoint", 64, path=Path(sys.argv[1]))
slots = [limit.slot(time.monotonic() + 60) for _ in range(int(limit.window))]
for slot in slots:
    slot.__enter__()
if len(sys.argv) == 2 or os.fork() == 0:  # the forked child outlives its parent; it speaks when it has its own process
    print("held", flush=True)
sys.stdin.read()
os._exit(0)
"""


@pytest.mark.parametrize("forked", [[], ["and fork"]], ids=["alone", "with a forked child that lives on"])
def test_the_places_of_a_killed_process_are_free_at_once(
    limit: RequestLimit, limit_path: Path, forked: list[str]
) -> None:
    command = [sys.executable, "-c", HOLDER, str(limit_path), *forked]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert is_full(limit)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not is_full(limit)


def test_without_shared_memory_the_limit_is_the_process_s_own(tmp_path: Path) -> None:
    limit = RequestLimit("endpoint", 64, path=tmp_path / "no" / "such" / "directory")
    give_back = hold(limit, int(limit.window))
    assert is_full(limit)
    give_back()


def test_bytes_in_flight_never_exceed_the_budget() -> None:
    budget, lock, now, most = ByteBudget(1000), threading.Lock(), 0, 0

    def work(number: int) -> None:
        nonlocal now, most
        size = 1 + number * 37 % 600
        with budget.reserved(size, time.monotonic() + 60, "test"):
            with lock:
                now += size
                most = max(most, now)
            with lock:
                now -= size

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(work, range(500)))
    assert 0 < most <= 1000


def test_what_is_larger_than_the_budget_goes_alone_and_nobody_overtakes() -> None:
    budget = ByteBudget(1000)
    full = pytest.raises(StoreUnavailable, match="5000 of 1000 bytes in flight")
    with budget.reserved(5000, NEVER, "test"), full, budget.reserved(1, NEVER, "test"):
        pass
    with ThreadPoolExecutor(1) as threads, budget.reserved(600, NEVER, "test"):
        entered, leave = threading.Event(), threading.Event()

        def large() -> None:
            with budget.reserved(900, time.monotonic() + 60, "test"):
                entered.set()
                leave.wait(60)

        waiting = threads.submit(large)
        while not budget._queue:
            time.sleep(0)
        with pytest.raises(StoreUnavailable), budget.reserved(100, time.monotonic() + 0.01, "test"):
            pass  # it would fit, but the large one came first
        assert not entered.is_set()
        leave.set()
    waiting.result(timeout=60)


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def net(limit_path: Path) -> Iterator[Network]:
    made, leave = use_network(f"test {limit_path}", NetworkPolicy(timeout_s=3.0, attempt_timeout_s=1.0))
    yield made
    leave()


class Script:
    """Requests that end as a list says; what is behind its end succeeds."""

    def __init__(self, *steps: Exception | str) -> None:
        self.steps, self.sent = list(steps), 0
        self.release = threading.Event()

    def __call__(self, second: bool) -> str:
        number, self.sent = self.sent, self.sent + 1
        step = self.steps[number] if number < len(self.steps) else "done"
        if isinstance(step, Exception):
            raise step
        if step == "stuck":
            self.release.wait(60)
            return "too late"
        return "second" if second else step


def test_what_is_worth_another_try_is_tried_again(net: Network) -> None:
    script = Script(StoreUnavailable("x"), Throttled("x"), Unreachable("x"))
    before = counters.snapshot()
    assert net.call(Attempt(send=script, place="a")) == "done"
    assert script.sent == 4
    assert counters.since(before)["store.retries"] == 3


def test_answers_that_make_no_sense_are_asked_for_four_times(net: Network) -> None:
    script = Script(*[BadReply("x")] * 100)
    with pytest.raises(BadReply):
        net.call(Attempt(send=script, place="a"))
    assert script.sent == 4
    assert net.call(Attempt(send=Script(BadReply("x")), place="a")) == "done"


def test_an_answer_stands(net: Network) -> None:
    script = Script(KeyNotFound("no such object"))
    with pytest.raises(KeyNotFound):
        net.call(Attempt(send=script, place="a"))
    assert script.sent == 1


def test_a_mistake_of_ours_is_raised_and_not_repeated(net: Network) -> None:
    with pytest.raises(ZeroDivisionError):
        net.call(Attempt(send=Script(ZeroDivisionError()), place="a"))


def test_only_a_read_that_ends_by_itself_and_gets_no_second_request_stays_on_its_thread(net: Network) -> None:
    def on(attempt: Attempt[int]) -> str:
        return "its own" if net.call(attempt) == threading.get_ident() else "another"

    def send(second: bool) -> int:
        return threading.get_ident()

    soon = Attempt(send=send, place="a", hedge=True, ends_in_s=1.0)
    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(on, soon).result() == "its own"
        assert on(soon) == "another"  # the main thread must hear Ctrl-C
        assert thread.submit(on, Attempt(send=send, place="a", hedge=True)).result() == "another"
        assert thread.submit(on, Attempt(send=send, place="a", hedge=True, ends_in_s=60.0)).result() == "another"
        for _ in range(50):  # from here on a second request may follow
            thread.submit(on, soon).result()
        assert thread.submit(on, soon).result() == "another"


def test_a_request_that_never_ends_is_given_up_by_the_deadline(net: Network) -> None:
    script = Script(*["stuck"] * 100)
    with pytest.raises(StoreUnavailable, match=r"a: the store must answer, got 'timed out, \d+ times in"):
        net.call(Attempt(send=script, place="a"))
    script.release.set()


def test_a_request_that_hangs_once_is_sent_again(net: Network) -> None:
    script = Script("stuck")
    assert net.call(Attempt(send=script, place="a")) == "done"
    script.release.set()


def expect_soon(net: Network) -> None:
    """As 60 reads do that took a millisecond each; real ones would be late themselves on a busy machine."""
    for _ in range(60):
        net._hedging.sent(100)
        net._hedging.won(100, 0.001)


def test_a_late_read_is_sent_a_second_time_over_another_connection_and_the_first_answer_wins(net: Network) -> None:
    expect_soon(net)
    script = Script("stuck")
    before = counters.snapshot()
    assert net.call(Attempt(send=script, place="a", size=100, hedge=True)) == "second"
    script.release.set()
    counted = counters.since(before)
    assert (counted["store.hedges"], counted["store.hedges.won"]) == (1, 1)
    assert "store.retries" not in counted


def test_a_failure_of_the_first_does_not_decide_while_the_second_is_under_way(net: Network) -> None:
    expect_soon(net)
    second_sent = threading.Event()

    def send(second: bool) -> str:
        if second:
            second_sent.set()
            return "second"
        second_sent.wait(60)
        raise StoreUnavailable("the first")

    assert net.call(Attempt(send=send, place="a", size=100, hedge=True)) == "second"


def test_a_write_is_never_sent_twice_at_once(net: Network) -> None:
    for _ in range(60):
        net.call(Attempt(send=Script(), place="a", size=100))
    script = Script("stuck")
    before = counters.snapshot()
    assert net.call(Attempt(send=script, place="a", size=100)) == "done"  # again, after its time-out
    script.release.set()
    assert "store.hedges" not in counters.since(before)


def test_an_endpoint_that_was_never_reached_is_given_up_sooner(net: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_FIRST_CONTACT_S", 0.05)
    wrong = Script(*[Unreachable("x", value="nobody listens there")] * 1000)
    with pytest.raises(Unreachable, match="nobody listens there"):
        net.call(Attempt(send=wrong, place="a"))
    assert wrong.sent < 5


def test_side_by_side_the_first_error_is_raised_after_all_have_ended(net: Network) -> None:
    ended = []

    def fail() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        net.map([fail, *(lambda number=number: ended.append(number) for number in range(20))])
    assert sorted(ended) == list(range(20))


def test_stores_of_one_endpoint_and_policy_share_their_network(limit_path: Path) -> None:
    name = f"test {limit_path}"
    one, leave_one = use_network(name, NetworkPolicy())
    two, leave_two = use_network(name, NetworkPolicy())
    other, leave_other = use_network(name, NetworkPolicy(timeout_s=7))
    assert one is two is not other
    leave_one()
    again, leave_again = use_network(name, NetworkPolicy())
    assert again is two
    for leave in (leave_two, leave_again, leave_other):
        leave()
    new, leave_new = use_network(name, NetworkPolicy())
    assert new is not one
    leave_new()


def test_a_finalizer_that_leaves_while_its_thread_holds_the_lock_waits_for_nobody(limit_path: Path) -> None:
    name = f"test {limit_path}"
    one, leave_one = use_network(name, NetworkPolicy())
    with network._networks_lock:  # as when the garbage collector runs in the middle of use_network()
        leave_one()
    _, leave_two = use_network("another", NetworkPolicy())
    leave_two()
    three, leave_three = use_network(name, NetworkPolicy())
    assert three is not one, "who came next has closed it"
    leave_three()


@pytest.mark.parametrize("hedge", [False, True])
def test_a_call_that_fails_keeps_nothing_alive(net: Network, hedge: bool) -> None:
    def refuse(second: bool) -> str:
        raise StoreUnavailable("x")

    gone = weakref.ref(refuse)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(StoreUnavailable) as raised:
            net.call(Attempt(send=refuse, place="test", hedge=hedge))
        del raised, refuse
        net.workers.close()
        assert gone() is None, "without a collector, which would run a store's finalizer at any moment"
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "wrong", [{"timeout_s": 0}, {"stall_timeout_s": -1}, {"max_requests": 0}, {"hedge_share": 1.0}], ids=str
)
def test_a_policy_that_makes_no_sense_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        NetworkPolicy(**wrong)  # type: ignore[arg-type]


def test_the_descriptors_of_a_limit_are_closed_in_a_forked_child(limit: RequestLimit) -> None:
    pid = os.fork()
    if not pid:
        os._exit(0 if limit._fd is None else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert limit._fd is not None
