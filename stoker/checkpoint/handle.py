"""One save on its way from staged to committed, and what it cost."""

from concurrent.futures import Future
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from ..errors import ConfigError, DeadlineExceeded, SaveSkipped, StokerError

__all__ = ["Level", "SaveHandle", "SaveReport", "Staging"]

Level = Literal["staged", "local", "committed"]
Staging = Literal["shared memory", "memory", "slabs"]
_LEVELS: tuple[Level, ...] = ("staged", "local", "committed")


@dataclass(frozen=True, kw_only=True)
class SaveReport:
    """What a save cost. Times are seconds since ``save()`` was called; None while a level is not reached.

    Attributes:
        step: the step.
        stall_s: how long ``save()`` kept its caller.
        busy_s: the part of `stall_s` that it waited for a save before it.
        plan_s: the part of `stall_s` that it took the tree apart, and saw or decided which bytes go where.
        staged_bytes: bytes that this rank copied into its staging arena.
        staging_slots: arenas that this rank has: with two, the next save need not wait for this one.
        staging: where the state lies until it is written: in ``"shared memory"``; in ``"memory"`` that goes with this
            process, where there is not enough of the former; or it passed through two ``"slabs"``, where no whole copy had
            room: then ``save()`` returned when it was written.
        staged_s: until the state, with its checksums, was complete in the arena and could survive this process; with
            slabs, until it was written.
        local_s: until this rank's bytes were durable on the node's disk (``local=``), or under the root without one.
        committed_s: until the step was visible.
    """

    step: int
    stall_s: float
    busy_s: float
    plan_s: float
    staged_bytes: int
    staging_slots: int
    staging: Staging
    staged_s: float | None
    local_s: float | None
    committed_s: float | None

    @property
    def bytes_per_s(self) -> dict[Level, float]:
        """This rank's bytes per second, counted from ``save()``, at each level that is reached."""
        times = {"staged": self.staged_s, "local": self.local_s, "committed": self.committed_s}
        return {level: self.staged_bytes / t for level in _LEVELS if (t := times[level])}


# Guarantees: wait() and report() may be called from any thread.
class SaveHandle:
    """One save on its way through the levels ``staged``, ``local``, ``committed``."""

    def __init__(self, step: int, started: float, busy_s: float) -> None:
        self.step = step
        self._started, self._busy_s = started, busy_s
        self._stall_s = self._plan_s = 0.0
        self._staged_bytes = self._staging_slots = 0
        self._staging: Staging = "shared memory"
        self._reached: dict[Level, float] = {}
        self._levels: dict[Level, Future[None]] = {level: Future() for level in _LEVELS}
        self._observed = False

    def wait(self, level: Level = "committed", timeout_s: float | None = None) -> None:
        """Return when the save has reached `level`.

        Raises:
            DeadlineExceeded: not within `timeout_s` seconds; the save goes on.
            SaveSkipped: it was not begun, since another one was still under way (``on_busy="skip"``).
            StoreError: for ``"local"``, that the node's disk is full or broken; the save goes on to the root.
            SaveFailed, CommitUnknown, StoreError: why it will not be (or may not be) committed. Older steps are as they
                were.
        """
        if level not in _LEVELS:
            raise ConfigError(f"level must be one of {', '.join(_LEVELS)}", value=level, place="SaveHandle.wait")
        try:
            self._levels[level].result(timeout_s)
        except TimeoutError as error:
            if isinstance(error, StokerError):
                self._note_seen(level)
                raise
            raise DeadlineExceeded(
                f"the save must be {level} in time", value=f"{timeout_s} s", place=f"step {self.step}"
            ) from None
        except Exception:
            self._note_seen(level)
            raise

    def _note_seen(self, level: Level) -> None:
        """The caller got an error: of the whole save, unless it is the node's disk that failed."""
        if level != "local" or self._levels["committed"].done():
            self._observed = True

    @property
    def skipped(self) -> bool:
        """Whether nothing was saved since another save was under way (``on_busy="skip"``), here or on another rank."""
        committed = self._levels["committed"]
        return committed.done() and isinstance(committed.exception(), SaveSkipped)

    def done(self, level: Level = "committed") -> bool:
        """Whether `level` was reached or the save has failed."""
        return self._levels[level].done()

    def report(self) -> SaveReport:
        """What the save cost so far."""
        return SaveReport(
            step=self.step,
            stall_s=self._stall_s,
            busy_s=self._busy_s,
            plan_s=self._plan_s,
            staged_bytes=self._staged_bytes,
            staging_slots=self._staging_slots,
            staging=self._staging,
            staged_s=self._reached.get("staged"),
            local_s=self._reached.get("local"),
            committed_s=self._reached.get("committed"),
        )

    def mark_planned(self) -> None:
        """For the report: what is to be saved is known now."""
        self._plan_s = perf_counter() - self._started - self._busy_s

    def mark_returned(self, num_bytes: int, num_slots: int, staging: Staging) -> None:
        """For the report: ``save()`` returns now."""
        self._staged_bytes, self._staging_slots, self._staging = num_bytes, num_slots, staging
        self._stall_s = perf_counter() - self._started

    def reach(self, level: Level) -> None:
        """The save has reached `level`; who waits for it goes on."""
        self._reached[level] = perf_counter() - self._started
        self._levels[level].set_result(None)

    def fail(self, error: BaseException) -> None:
        """The save will not be committed. The node's own disk may be reached or not: whoever writes there says so."""
        for level in ("staged", "committed"):
            self.fail_level(level, error)

    def fail_level(self, level: Level, error: BaseException) -> None:
        """The save will not reach `level`, unless it has."""
        if not self._levels[level].done():
            self._levels[level].set_exception(error)

    def raise_unobserved(self) -> None:
        """Raise why the save was not committed, once, if nobody has asked; for one that has ended."""
        error = self._levels["committed"].exception()
        if error is not None and not self._observed and not isinstance(error, SaveSkipped):
            self._observed = True
            raise error
