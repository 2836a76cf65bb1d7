"""asyncio with bytes: a budget in bytes, work that a cancellation does not leave half done, a few workers for many files."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from typing import TypeVar

__all__ = ["ByteBudget", "each", "to_the_end"]

T = TypeVar("T")


# Guarantees: used by the tasks of one event loop only. Whoever asked first gets first: a large request is not overtaken
# for ever by small ones. What is in use never exceeds the limit.
class ByteBudget:
    """So many bytes may be in flight at once; who wants more waits.

    Attributes:
        limit_bytes: the most that is ever handed out.
        used_bytes: handed out now.
        peak_bytes: the most that was handed out at once.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.used_bytes = 0
        self.peak_bytes = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    def try_acquire(self, size: int) -> bool:
        """Take `size` bytes if they are free and nobody waits for them."""
        if self._waiting or self.used_bytes + size > self.limit_bytes:
            return False
        self._take(size)
        return True

    async def acquire(self, size: int) -> None:
        """Take `size` bytes, at most the limit, as soon as they are free."""
        assert size <= self.limit_bytes, "would wait for ever"
        if self.try_acquire(size):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # our turn came in the same moment
                self.release(size)
            else:
                self._waiting.remove((size, turn))
                self._serve()
            raise

    def release(self, size: int) -> None:
        """Give `size` bytes back."""
        self.used_bytes -= size
        self._serve()

    def _take(self, size: int) -> None:
        self.used_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.used_bytes)

    def _serve(self) -> None:
        while self._waiting and self.used_bytes + self._waiting[0][0] <= self.limit_bytes:
            size, turn = self._waiting[0]
            if turn.cancelled():  # it will run in a moment, leave the line and serve the others
                return
            self._waiting.popleft()
            self._take(size)
            turn.set_result(None)


async def to_the_end(work: Awaitable[T], *, undo: Callable[[T], object] | None = None) -> T:
    """Await what must not be left half-way, such as a thread that writes to a file which the caller is about to close.

    A cancellation passes after it has ended. If it ended well, `undo` gets the result that nobody else will see.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        while not task.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([task])
        if not task.cancelled() and task.exception() is None and undo is not None:
            undo(task.result())
        raise


async def each(items: Iterable[T], work: Callable[[T], Awaitable[None]], *, workers: int) -> None:
    """`work` on each item, `workers` of them at once. The first error stops all and is raised when all have ended."""
    left = iter(items)

    async def worker() -> None:
        for item in left:
            await work(item)

    first: BaseException | None = None
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(workers):
                group.create_task(worker())
    except BaseExceptionGroup as errors:
        first = errors.exceptions[0]
        if len(errors.exceptions) > 1:
            first.add_note(f"{len(errors.exceptions) - 1} more failed in the same moment")
    if first is not None:  # out here, where it keeps its own cause
        raise first
