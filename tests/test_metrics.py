"""Counters lose nothing, and money is what the price table says."""

import itertools
import math
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest

from stoker.metrics import Counters, Prices, counters


def test_no_addition_of_any_thread_is_lost() -> None:
    tested = Counters()

    def add(_: int) -> None:
        for _ in range(1000):
            tested.add("requests")
            tested.add("bytes", 3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(8)))
    assert tested.snapshot() == {"bytes": 24_000, "requests": 8_000}


def test_a_difference_names_what_moved_and_nothing_else() -> None:
    tested = Counters()
    tested.add("still", 5)
    tested.add("moved", 1)
    before = tested.snapshot()
    tested.add("moved", 2.5)
    tested.add("new", -1)
    assert tested.since(before) == {"moved": 2.5, "new": -1}
    assert tested.since({}) == tested.snapshot()


def test_a_snapshot_is_not_changed_by_what_comes_later() -> None:
    tested = Counters()
    tested.add("requests")
    snapshot = tested.snapshot()
    tested.add("requests")
    assert snapshot == {"requests": 1}


def test_seconds_are_counted_also_of_what_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(10, 4)
    monkeypatch.setattr("stoker.metrics.perf_counter", lambda: next(clock))
    tested = Counters()
    with tested.timed("wait_s"):
        pass
    with pytest.raises(ZeroDivisionError), tested.timed("wait_s"):
        raise ZeroDivisionError
    assert tested.snapshot() == {"wait_s": 8}


def test_the_counters_of_the_process_are_one_object() -> None:
    before = counters.snapshot()
    counters.add("test.requests", 2)
    assert counters.since(before)["test.requests"] == 2


def test_each_kind_of_request_has_its_price() -> None:
    prices = Prices(usd_per_1000_get=1, usd_per_1000_put=10, usd_per_gb_egress=100)
    for name, usd in (("get", 1), ("head", 1), ("put", 10), ("list", 10), ("delete", 0)):
        assert math.isclose(prices.usd({f"store.{name}.requests": 1000}), usd)
    assert math.isclose(prices.usd({"store.get.bytes": 2e9}), 200)
    assert prices.usd({"local.get.requests": 1e9, "local.get.bytes": 1e12}) == 0
    assert prices.usd({}) == 0


def test_a_forked_child_counts_whatever_a_thread_of_its_parent_was_doing() -> None:
    with counters._lock:
        forked = ThreadPoolExecutor(1)
        pid = forked.submit(_fork_and_count).result(timeout=60)
    forked.shutdown()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def _fork_and_count() -> int:
    pid = os.fork()
    if not pid:
        signal.alarm(30)  # a lock that nobody lets go would hold it for ever
        counters.add("test.forked")
        os._exit(0)
    return pid
