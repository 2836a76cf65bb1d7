"""Threads for calls that can't be interrupted: whoever waits for one may stop waiting."""

import queue
import threading
import weakref
from collections.abc import Callable

__all__ = ["Workers"]

Task = Callable[[], None]

_IDLE_S = 5.0


class _Shared:
    """What the threads share with their owner. They keep this alive and not the owner, whose end is theirs."""

    def __init__(self) -> None:
        self.tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self.idle = threading.Semaphore(0)
        """One permit for each thread that waits for a task; who takes it sends one, or None to end it."""
        self.closed = False

    def work(self) -> None:
        while True:
            try:
                task = self.tasks.get(timeout=_IDLE_S)
            except queue.Empty:
                if self.idle.acquire(blocking=False):
                    return
                continue  # somebody took our permit: a task is on its way
            if task is None:
                return
            task()
            if self.closed:
                return
            del task  # what it holds is not ours to keep while we wait
            self.idle.release()

    def end(self) -> None:
        self.closed = True
        while self.idle.acquire(blocking=False):
            self.tasks.put(None)


# Guarantees: run() and close() may be called from any thread.
class Workers:
    """As many daemon threads as there are tasks at once; idle ones take the next task, and end after a while.

    ``concurrent.futures`` joins its threads when the interpreter ends, and would wait there for a request that nobody
    wants any more.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._shared = _Shared()
        weakref.finalize(self, self._shared.end)

    def run(self, task: Task) -> None:
        """Begin `task` at once on some thread. It must not raise."""
        self._shared.closed = False
        if not self._shared.idle.acquire(blocking=False):
            threading.Thread(target=self._shared.work, name=self._name, daemon=True).start()
        self._shared.tasks.put(task)

    def close(self) -> None:
        """End the threads, those that are in a task after it. More tasks start new ones."""
        self._shared.end()
