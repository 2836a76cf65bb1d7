"""Threads that the end of the interpreter does not wait for: whoever needs their work waits himself, with a deadline."""

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, ParamSpec, TypeVar

__all__ = ["Pool"]

P = ParamSpec("P")
T = TypeVar("T")
Task = tuple[Future[Any], Callable[[], Any]]


def _work(tasks: "queue.SimpleQueue[Task | None]") -> None:
    """One thread. It knows the queue and not the pool, whose end is its own."""
    while (task := tasks.get()) is not None:
        future, act = task
        if not future.set_running_or_notify_cancel():
            continue
        try:
            result = act()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits for the future
            future.set_exception(error)
        else:
            future.set_result(result)
            del result
        del future, act, task  # what they hold is not ours to keep while we wait


# Guarantees: submit() and shutdown() may be called from any thread, submit() also from the pool's own and while the
# interpreter ends; `_lock` guards `_threads` and `_closed`.
class Pool(Executor):
    """Up to `max_workers` daemon threads that take tasks in the order in which they came.

    ``ThreadPoolExecutor`` refuses work from the moment the interpreter begins to end, and the interpreter waits for its
    threads without a deadline: a save that is pending then could neither be finished nor given up.
    """

    def __init__(self, max_workers: int, name: str) -> None:
        self._max_workers, self._name = max_workers, name
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False
        weakref.finalize(self, _end, self._tasks, max_workers).atexit = False

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Run ``fn(*args, **kwargs)`` on one of the threads."""
        future: Future[T] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"{self._name}: no task can be submitted after shutdown")
            if len(self._threads) < self._max_workers:
                thread = threading.Thread(
                    target=_work, args=(self._tasks,), name=f"{self._name}-{len(self._threads)}", daemon=True
                )
                thread.start()
                self._threads.append(thread)
            self._tasks.put((future, lambda: fn(*args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more tasks; those that were submitted are done first. `cancel_futures` is for the base class."""
        with self._lock:
            if not self._closed:
                self._closed = True
                _end(self._tasks, len(self._threads))
        if wait:
            for thread in self._threads:
                thread.join()


def _end(tasks: "queue.SimpleQueue[Task | None]", num_threads: int) -> None:
    for _ in range(num_threads):
        tasks.put(None)
