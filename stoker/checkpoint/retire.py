"""What is deleted under a root, and when: retired steps and what dead runs left, after their grace, never during a save.

Deleting is slow (0.2 s for each GB on a disk that is mounted with discard), so it has a thread of its own and stops
between two objects as soon as a save begins.
"""

import logging
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from math import inf
from time import monotonic

from ..errors import StokerError
from ..storage.store import ObjectStore
from .garbage import announce, find_leftovers
from .log import CheckpointLog

__all__ = ["Retirement"]

logger = logging.getLogger(__name__)


# Guarantees: add(), pause() and resume() may be called from any thread; `_lock` guards `_doomed`. Only directories that
# a log record has announced as dead are deleted.
class Retirement:
    """Deletes the data of retired steps under one root once `grace_s` has passed.

    Args:
        run_note: the note of this run that must stay.
    """

    def __init__(self, store: ObjectStore, log: CheckpointLog, *, grace_s: float, run_note: str) -> None:
        self._store, self._log, self._grace_s, self._run_note = store, log, grace_s, run_note
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stoker-retire")
        self._lock = threading.Lock()
        self._doomed: list[tuple[float, str]] = []
        self._saving = threading.Event()
        self._sweep_due = 0.0

    def add(self, directories: Iterable[str]) -> None:
        """Delete these step directories, which the log has just announced, after the grace."""
        due = monotonic() + self._grace_s
        with self._lock:
            self._doomed += [(due, directory) for directory in directories]

    def pause(self) -> None:
        """A save begins."""
        self._saving.set()

    def resume(self, own_nonces: Collection[str]) -> None:
        """No save is under way: delete what is due. The first time, look for what dead runs left, too."""
        self._saving.clear()
        # The set itself, not a copy: the next save may begin before the sweep, which must know that save's nonce.
        with suppress(RuntimeError):  # the interpreter is exiting: what is left is found again by the next run
            self._thread.submit(self._work, own_nonces)

    def _work(self, own_nonces: Collection[str]) -> None:
        try:
            if monotonic() >= self._sweep_due:
                self._sweep_due = inf
                self._sweep(own_nonces)
            self._delete_due()
        except StokerError as error:  # what is left is found again by the next run
            logger.warning("could not delete retired data under %s: %s", self._store.url, error)

    def _sweep(self, own_nonces: Collection[str]) -> None:
        """Announce attempts of dead runs that were never committed, and steps retired long ago.

        Their writers are fenced by this run's term.
        """
        found = find_leftovers(self._store, self._log, grace_s=self._grace_s, spare=own_nonces, run_note=self._run_note)
        head = self._log.head()
        if head is not None:
            self._log.truncate(head)
        for key in found.notes:
            self._store.delete(key)
        dead = announce(self._log, found.attempts)
        if dead:
            logger.info("deleting what %d attempts of earlier runs left under %s", len(dead), self._store.url)
            with self._lock:
                self._doomed = [(0.0, one.directory) for one in dead] + self._doomed
        if found.in_grace:  # what the run before left a moment ago: no other run may ever come to look
            self._sweep_due = monotonic() + self._grace_s

    def _delete_due(self) -> None:
        while True:
            with self._lock:
                if not self._doomed or self._doomed[0][0] > monotonic():
                    return
                directory = self._doomed[0][1]
            for info in list(self._store.list(f"{directory}/")):
                if self._saving.is_set():
                    return
                self._store.delete(info.key)
            with self._lock:
                self._doomed.pop(0)

    def close(self) -> None:
        """Finish what is due now and stop."""
        self._thread.shutdown(wait=True)
