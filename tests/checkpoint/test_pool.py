"""A pool of threads that nobody waits for but by its futures."""

import gc
import subprocess
import sys
import threading

import pytest

from stoker.checkpoint._pool import Pool


def test_tasks_are_taken_in_order_and_their_results_and_errors_come_back() -> None:
    with Pool(1, "test") as pool:
        done: list[int] = []
        futures = [pool.submit(done.append, i) for i in range(100)]
        failing = pool.submit(int, "x")
        assert [future.result() for future in futures] == [None] * 100
        with pytest.raises(ValueError, match="invalid literal"):
            failing.result()
    assert done == list(range(100))


def test_what_is_cancelled_before_its_turn_is_not_done() -> None:
    let_go = threading.Event()
    with Pool(1, "test") as pool:
        first = pool.submit(let_go.wait, 60)
        second = pool.submit(pytest.fail, "was cancelled")
        assert second.cancel()
        let_go.set()
        assert first.result()


def test_a_pool_that_was_shut_down_finishes_and_takes_no_more() -> None:
    pool = Pool(2, "test")
    futures = [pool.submit(pow, 2, i) for i in range(10)]
    pool.shutdown()
    assert [future.result() for future in futures] == [2**i for i in range(10)]
    with pytest.raises(RuntimeError, match="after shutdown"):
        pool.submit(pow, 2, 2)
    pool.shutdown()


def test_the_threads_of_a_forgotten_pool_end() -> None:
    pool = Pool(2, "test-forgotten")
    pool.submit(pow, 2, 2).result()
    (thread,) = (thread for thread in threading.enumerate() if thread.name.startswith("test-forgotten"))
    del pool
    gc.collect()
    thread.join(60)
    assert not thread.is_alive()


def test_tasks_can_be_submitted_while_the_interpreter_ends_and_a_hanging_one_does_not_hold_it_up() -> None:
    program = """
import atexit, threading
from stoker.checkpoint._pool import Pool
pool = Pool(2, "test")
pool.submit(threading.Event().wait)
atexit.register(lambda: print(pool.submit(pow, 2, 5).result(60)))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "32\n", "")
