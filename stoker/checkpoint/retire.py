"""What is deleted under a root, and when: retired steps and what dead runs left, after their grace, never during a save.

Deleting is slow (0.2 s for each GB on a disk that is mounted with discard), so it has a thread of its own and stops
between two objects as soon as a save begins.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from math import inf
from time import monotonic

from ..errors import StokerError
from ..storage.store import ObjectStore
from ._pool import Pool
from .garbage import announce, find_leftovers
from .local import LocalTier
from .log import CheckpointLog, LiveStep

__all__ = ["Retirement"]

logger = logging.getLogger(__name__)


# Guarantees: the methods may be called from any thread; `_lock` guards `_doomed`, `_saving` and `_live`. Only
# directories that a log record has announced as dead are deleted under the root.
class Retirement:
    """Deletes the data of retired steps under one root once `grace_s` has passed, and old copies on the node's disk.

    Args:
        is_owner: whether this is rank 0, which looks after the root.
        own_nonces: of this run's attempts; the set itself, not a copy: a sweep must know the save that begins meanwhile.
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
        own_nonces: AbstractSet[str],
        run_note: str,
        local: LocalTier | None,
    ) -> None:
        self._store, self._log, self._grace_s = store, log, grace_s
        self._is_owner, self._own_nonces, self._run_note, self._local = is_owner, own_nonces, run_note, local
        self._thread = Pool(1, "stoker-retire")
        self._lock = threading.Lock()
        self._doomed: list[tuple[float, str]] = []
        self._saving: set[str] = set()
        self._live: Mapping[int, LiveStep] = {}
        self._sweep_due = 0.0

    def add(self, directories: Iterable[str]) -> None:
        """Delete these step directories, which the log has just announced, after the grace."""
        due = monotonic() + self._grace_s
        with self._lock:
            self._doomed += [(due, directory) for directory in directories]

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
                    self._sweep_due = inf
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
            self._store, self._log, grace_s=self._grace_s, spare=self._own_nonces, run_note=self._run_note
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
                if self._is_saving():
                    return
                self._store.delete(info.key)
            with self._lock:
                self._doomed.pop(0)

    def close(self) -> None:
        """Finish what is due now and stop."""
        self._thread.shutdown()
