"""Ranks that are told to stop, one or all of them and at any moment, agree on the step at which all of them save.

Who hears first creates one small object that names a step a little ahead, exclusively: that is the compare-and-set. The
others look for it every `margin` steps. Ranks that exchange gradients are never `margin` steps apart, so each of them
looks once more before that step is done, and no collective is needed.
"""

import hashlib
import json
import logging
import os
import signal
import socket
import threading
from collections.abc import Collection
from types import FrameType
from typing import Any

from ..errors import AlreadyExists, ConfigError, FormatError, KeyNotFound, StoreError
from ..storage.store import ObjectStore

__all__ = ["StopRequest"]

logger = logging.getLogger(__name__)


# Guarantees: request() and the signal handler only set `requested`, so they may run at any moment, on any thread;
# reached() is called by the trainer's thread alone.
class StopRequest:
    """One run's agreement about where it stops, as seen by one rank.

    Args:
        store: of the root.
        run_id, rank, world_size: of the job.
        margin: look for the others' request every so many steps; the job stops up to twice that after the first hears.
    """

    def __init__(self, store: ObjectStore, *, run_id: str, rank: int, world_size: int, margin: int) -> None:
        if margin < 1:
            raise ConfigError("stop_margin must be >= 1", value=margin, place="CheckpointManager")
        # Not the id itself: users choose it, and it may hold anything.
        self.key = f"stop/{hashlib.blake2b(run_id.encode(), digest_size=16).hexdigest()}.json"
        self.requested = False
        self._store, self._rank, self._world_size, self._margin = store, rank, world_size, margin
        self._stop_step: int | None = None
        self._looked_at: int | None = None
        self._before: dict[int, Any] = {}
        self._pid = os.getpid()
        self._closed = False

    def request(self) -> None:
        """Ask all ranks to stop soon."""
        self.requested = True

    def reached(self, step: int) -> bool:
        """Whether `step` is the one, or is past it. Every rank asks after each step, and gets the same answer."""
        if self._world_size == 1:
            return self.requested
        if self._stop_step is None:
            stretch = step // self._margin
            try:
                if self.requested:
                    self._stop_step = self._post((stretch + 2) * self._margin)
                elif stretch != self._looked_at:
                    self._stop_step = self._read()
                    self._looked_at = stretch
            except StoreError as error:  # training goes on; the next step tries again
                logger.warning("could not agree on where to stop: %s", error)
        return self._stop_step is not None and step >= self._stop_step

    def _post(self, step: int) -> int | None:
        note = {"step": step, "rank": self._rank, "host": socket.gethostname()}
        try:
            self._store.create(self.key, json.dumps(note).encode())
        except AlreadyExists:
            return self._read()
        logger.info("rank %d asks all ranks to stop at step %d", self._rank, step)
        return step

    def _read(self) -> int | None:
        try:
            note = json.loads(bytes(self._store.get(self.key)))
            return int(note["step"])
        except KeyNotFound:
            return None
        except (ValueError, KeyError, TypeError) as error:
            raise FormatError("must name the step to stop at", value=str(error), place=self.key) from error

    def listen(self, signals: Collection[signal.Signals]) -> None:
        """From now on the first of these signals is a request; a second one does what it did before."""
        if signals and threading.current_thread() is not threading.main_thread():
            raise ConfigError(
                "only the main thread can listen to signals",
                place="CheckpointManager(stop_on=)",
                hint="leave stop_on= out and call request_stop() from a handler of your own",
            )
        for number in signals:
            self._before[number] = signal.signal(number, self._hear) or signal.SIG_DFL

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        # A forked DataLoader worker has this handler too: it must die of what is sent to it. So must a process whose
        # manager was closed on another thread, which can't take handlers away.
        if os.getpid() != self._pid or self._closed:
            signal.raise_signal(number)
        else:
            self.requested = True

    def _restore(self) -> None:
        for number, handler in self._before.items():
            if signal.getsignal(number) == self._hear:
                signal.signal(number, handler)

    def close(self) -> None:
        """Listen no longer."""
        self._closed = True
        if threading.current_thread() is threading.main_thread():
            self._restore()
