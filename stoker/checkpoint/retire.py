"""What is deleted under a root, and when: retired steps and what dead runs left, after their grace, never during a save.

Deleting is slow (0.2 s for each GB on a disk that is mounted with discard), so it has a thread of its own and stops
between two objects as soon as a save begins.
"""

import logging
import threading
from collections.abc import Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from time import monotonic, time

from ..errors import StokerError
from ..storage.store import ObjectStore
from .log import CheckpointLog, collect_record, parse_step_directory, step_directory

__all__ = ["Retirement"]

logger = logging.getLogger(__name__)


# Guarantees: add(), pause() and resume() may be called from any thread; `_lock` guards `_doomed`. Only directories that
# a log record has announced as dead are deleted.
class Retirement:
    """Deletes the data of retired steps under one root once `grace_s` has passed."""

    def __init__(self, store: ObjectStore, log: CheckpointLog, *, grace_s: float) -> None:
        self._store, self._log, self._grace_s = store, log, grace_s
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="stoker-retire")
        self._lock = threading.Lock()
        self._doomed: list[tuple[float, str]] = []
        self._saving = threading.Event()
        self._swept = False

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
        self._thread.submit(self._work, own_nonces)

    def _work(self, own_nonces: Collection[str]) -> None:
        try:
            if not self._swept:
                self._swept = True
                self._sweep(own_nonces)
            self._delete_due()
        except StokerError as error:  # what is left is found again by the next run
            logger.warning("could not delete retired data under %s: %s", self._store.url, error)

    def _sweep(self, own_nonces: Collection[str]) -> None:
        """Announce attempts of dead runs that were never committed, and steps retired long ago.

        Their writers are fenced by this run's term.
        """
        newest: dict[str, float] = {}
        for info in self._store.list("step-"):
            directory = info.key.split("/", 1)[0]
            newest[directory] = max(newest.get(directory, 0.0), info.modified_s)
        head = self._log.head()
        if head is not None:
            self._log.truncate(head)
        live = set() if head is None else {step_directory(step, entry.nonce) for step, entry in head.live.items()}
        left: dict[str, str] = {}
        for directory, modified_s in newest.items():
            parsed = parse_step_directory(directory)
            if parsed is None or directory in live or parsed[1] in own_nonces:
                continue
            if time() - modified_s >= self._grace_s:
                left[directory] = parsed[1]
        if left:
            record = self._log.append(lambda head: collect_record(head, nonces=sorted(left.values())))
            # What the record announces, not what was listed: an attempt may have become live in between.
            dead = sorted(directory for directory, nonce in left.items() if nonce in record.dead)
            logger.info("deleting what %d attempts of earlier runs left under %s", len(dead), self._store.url)
            with self._lock:
                self._doomed = [(0.0, directory) for directory in dead] + self._doomed

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
