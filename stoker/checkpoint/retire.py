"""What is deleted under a root, and when: retired steps and what dead runs left, after their grace, never during a save.

Deleting is slow (0.2 s for each GB on a disk that is mounted with discard), so it has a thread of its own and stops
between two objects as soon as a save begins.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from time import monotonic

from ..errors import StokerError
from ..storage.store import ObjectStore
from ._pool import Pool
from .garbage import announce, deletable, find_leftovers
from .local import LocalTier
from .log import CheckpointLog, LiveStep, kept_blobs, step_directory

__all__ = ["Retirement"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Doomed:
    """A directory that goes at `due_s` (of :func:`time.monotonic`), and the step that it was, if this run knows it."""

    due_s: float
    directory: str
    step: LiveStep | None = None

    @property
    def directories(self) -> list[str]:
        """Where something may go with it: nobody else may refer any more to what it referred to."""
        return [self.directory, *(self.step.refs if self.step is not None else ())]


# Guarantees: the methods may be called from any thread; `_lock` guards `_doomed`, `_saving` and `_live`. Only
# directories that a log record has announced as dead are deleted under the root.
class Retirement:
    """Deletes the data of retired steps under one root once `grace_s` has passed, and old copies on the node's disk.

    Args:
        is_owner: whether this is rank 0, which looks after the root.
        is_own: whether an attempt, by step and nonce, is this run's, also if only another rank has begun it so far.
        run_note: the note of this run that must stay.
        local: the node's own disk.
    """

    def __init__(
        self,
        store: ObjectStore,
        log: CheckpointLog,
        *,
        grace_s: float,
        is_owner: bool,
        is_own: Callable[[int, str], bool],
        run_note: str,
        local: LocalTier | None,
    ) -> None:
        self._store, self._log, self._grace_s = store, log, grace_s
        self._is_owner, self._is_own, self._run_note, self._local = is_owner, is_own, run_note, local
        self._thread = Pool(1, "stoker-retire")
        self._lock = threading.Lock()
        self._doomed: list[_Doomed] = []
        self._saving: set[str] = set()
        self._live: Mapping[int, LiveStep] = {}
        self._sweep_due = 0.0

    def add(self, retired: Mapping[int, LiveStep]) -> None:
        """Delete the data of these steps, which the log has just announced, after the grace."""
        due_s = monotonic() + self._grace_s
        with self._lock:
            self._doomed += [
                _Doomed(due_s=due_s, directory=step_directory(step, live.nonce), step=live)
                for step, live in retired.items()
            ]

    def committed(self, live: Mapping[int, LiveStep]) -> None:
        """The live steps, by a record that is newer than the last one told."""
        with self._lock:
            self._live = live

    def pause(self, nonce: str) -> None:
        """A save begins. There may be several at once."""
        with self._lock:
            self._saving.add(nonce)

    def resume(self, nonce: str) -> None:
        """A save has ended. If no other is under way: delete what is due. The first time, look for what dead runs left."""
        with self._lock:
            self._saving.discard(nonce)
            if self._saving or not (self._is_owner or self._local is not None):
                return
        self._thread.submit(self._work)

    def _is_saving(self) -> bool:
        with self._lock:
            return bool(self._saving)

    def _work(self) -> None:
        try:
            if self._is_owner:
                if monotonic() >= self._sweep_due:
                    self._sweep_due = monotonic() + self._grace_s  # once more if this one fails
                    self._sweep()
                self._delete_due()
        except StokerError as error:  # what is left is found again by the next run
            logger.warning("could not delete retired data under %s: %s", self._store.url, error)
        if self._local is not None:
            with self._lock:
                live, spare = self._live, frozenset(self._saving)
            self._local.retain(live, spare=spare, stop=self._is_saving)

    def _sweep(self) -> None:
        """Announce attempts of dead runs that were never committed, and steps retired long ago.

        Their writers are fenced by this run's term.
        """
        found = find_leftovers(
            self._store, self._log, grace_s=self._grace_s, spare=self._is_own, run_note=self._run_note
        )
        head = self._log.head()
        if head is not None:
            self._log.truncate(head)
        for key in found.notes:
            self._store.delete(key)
        dead = announce(self._log, found.attempts)
        if dead:
            logger.info("deleting what %d attempts of earlier runs left under %s", len(dead), self._store.url)
            with self._lock:
                self._doomed = [_Doomed(due_s=0.0, directory=one.directory) for one in dead] + self._doomed
        # Again for what the run before left a moment ago: no other run may ever come to look.
        self._sweep_due = monotonic() + self._grace_s if found.in_grace else inf

    def _delete_due(self) -> None:
        while True:
            with self._lock:
                if not self._doomed or self._doomed[0].due_s > monotonic():
                    return
                doomed, *waiting = self._doomed
            for directory in doomed.directories:
                if not self._delete(directory, [one.step for one in waiting if one.step is not None]):
                    return
            with self._lock:
                self._doomed.pop(0)

    def _delete(self, directory: str, waiting: Sequence[LiveStep]) -> bool:
        """Delete what neither a live step nor one that waits for its grace needs; False if a save began meanwhile."""
        head = self._log.head()
        needing = [*(head.live.values() if head is not None else ()), *waiting]
        if any(directory.endswith(f"-{one.nonce}") for one in needing):
            return True
        for info in deletable(self._store, directory, kept_blobs(needing)):
            if self._is_saving():
                return False
            self._store.delete(info.key)
        return True

    def close(self) -> None:
        """Finish what is due now and stop."""
        self._thread.shutdown()
