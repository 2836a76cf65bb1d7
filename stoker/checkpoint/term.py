"""This run's term in the log: opened by its first save, opened anew now and then, and the rewind that comes with it."""

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future

from .commit import wait_for_own_term
from .job import Job
from .log import CheckpointLog, LiveStep, Record, Transition, open_record

__all__ = ["Term", "append_noting_retired"]

logger = logging.getLogger(__name__)

SAVES_IN_A_TERM = 100
"""A run opens again above its own term after so many saves, which clears the list of the dead in every record. A number
of saves, not the length of the list, since all ranks must agree without a word."""


def append_noting_retired(log: CheckpointLog, transition: Transition) -> tuple[Record, dict[int, LiveStep]]:
    """Append to the log; returns the record, and the steps that it drops."""
    retired: dict[int, LiveStep] = {}

    def noting(head: Record | None) -> Record:
        record = transition(head)
        if head is not None and record is not head:  # not the second look, which finds the record there
            retired.clear()
            retired.update({step: live for step, live in head.live.items() if step not in record.live})
        return record

    return log.append(noting), retired


# Guarantees: needs_opening(), open(), rewind_to() and stay() are called by the trainer's thread alone; `number` is read by
# any, after the future of open() is done.
class Term:
    """The term of one run, as seen by one rank.

    Args:
        retire: gets the steps that a rewind abandons.
    """

    def __init__(
        self, log: CheckpointLog, job: Job, threads: Executor, *, retire: Callable[[Mapping[int, LiveStep]], None]
    ) -> None:
        self._log, self._job, self._threads, self._retire = log, job, threads, retire
        self.number = 0
        self._opened: Future[None] | None = None
        self._rewind_to: int | None = None
        self._num_saves = 0

    def needs_opening(self) -> bool:
        """Whether the next save opens a term. No save of the term before may be under way then: what clean-up has
        announced in it is forgotten, and such a save could commit what is deleted."""
        due = self._num_saves > 0 and self._num_saves % SAVES_IN_A_TERM == 0
        failed = self._opened is not None and self._opened.done() and self._opened.exception() is not None
        return self._opened is None or failed or due

    def open(self, deadline: float) -> Future[None]:
        """Count a save. The future is done when the log names this run's term; only then may it write."""
        if self.needs_opening() or self._opened is None:
            self._opened = self._threads.submit(self._open, deadline)
        self._num_saves += 1
        return self._opened

    def _open(self, deadline: float) -> None:
        if self._job.rank == 0:
            self.open_now()
        else:
            self.number = wait_for_own_term(self._log, self._job.run_id, self.number, deadline).term
        self._rewind_to = None

    def open_now(self) -> int:
        """On rank 0: open the term, on this thread; the first save then does not open one. Returns its number."""
        record, abandoned = append_noting_retired(
            self._log,
            lambda head: open_record(head, self._job.run_id, rewind_to=self._rewind_to, above_term=self.number),
        )
        self._retire(abandoned)
        self.opened_by_rank_0(record.term)
        return record.term

    def opened_by_rank_0(self, number: int) -> None:
        """The term was opened before any save."""
        self.number = number
        if self._opened is None:
            self._opened = Future()
            self._opened.set_result(None)

    def rewind_to(self, step: int) -> None:
        """The next save opens a term that abandons all steps above this one."""
        self._rewind_to, self._opened = step, None

    @property
    def is_open(self) -> bool:
        """Whether a save has opened it, or is about to."""
        return self._opened is not None

    def stay(self) -> None:
        """Forget a rewind that no save has made yet."""
        self._rewind_to = None
