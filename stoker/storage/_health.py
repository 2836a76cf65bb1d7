"""Whether a store answers: the budget of retries, and the breaker that stops asking while nobody is there.

Without it, retries multiply the load on a store that is failing under load. With a store that refuses everything, what
is sent is a few requests until the breaker opens, then one probe at a time. Both ideas are AWS's ("Timeouts, retries
and backoff with jitter", Amazon Builders' Library; the retry quota of its SDKs).
"""

import random
import threading
from collections.abc import Callable
from time import monotonic
from typing import Literal

__all__ = ["Health"]

_TOKENS = 10.0
_TOKENS_PER_SUCCESS = 0.1
"""So that where everything else succeeds, retries are at most a tenth of the requests."""
_TOKENS_PER_S = 1.0
_OPENS_AFTER = 5
"""Failures in a row, of whatever requests."""
_FIRST_PROBE_S, _LAST_PROBE_S = 0.1, 1.0

Turn = Literal["go", "probe"]


# Guarantees: every method may be called from any thread; `_changed` guards everything.
class Health:
    """What the answers of one endpoint say about it. One object for each endpoint and process."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._tokens, self._filled_at = _TOKENS, clock()
        self._failures = 0
        self._open = False
        self._probing = False
        self._probe_at = 0.0
        self._pause_s = _FIRST_PROBE_S

    @property
    def is_open(self) -> bool:
        """Whether requests are held back."""
        return self._open

    def turn(self, deadline: float, *, again: bool) -> Turn | None:
        """Wait until a request may be sent; None if that is not before `deadline`.

        A probe must be followed by :meth:`answered` or :meth:`failed`. `again` says that this is a retry, which needs a
        token while the breaker is closed.
        """
        with self._changed:
            while True:
                now = self._clock()
                wait_s = self._wait_s(now, again)
                if wait_s is None:
                    if self._open:
                        self._probing = True
                        return "probe"
                    self._tokens -= again
                    return "go"
                if now >= deadline:
                    return None
                self._changed.wait(min(wait_s, deadline - now))

    def _wait_s(self, now: float, again: bool) -> float | None:
        """None if it is our turn, else the longest that is worth waiting without news."""
        if self._open:
            if self._probing:
                return 3600.0  # its end is news
            return None if now >= self._probe_at else self._probe_at - now
        self._tokens = min(_TOKENS, self._tokens + _TOKENS_PER_S * (now - self._filled_at))
        self._filled_at = now
        return None if not again or self._tokens >= 1 else (1 - self._tokens) / _TOKENS_PER_S

    def answered(self, turn: Turn) -> None:
        """The store did what it was asked, or said why not: it is there."""
        with self._changed:
            self._failures = 0
            self._tokens = min(_TOKENS, self._tokens + _TOKENS_PER_SUCCESS)
            self._probing = self._probing and turn != "probe"
            if self._open:
                self._open, self._pause_s = False, _FIRST_PROBE_S
                self._changed.notify_all()

    def failed(self, turn: Turn) -> None:
        """No usable answer."""
        with self._changed:
            self._failures += 1
            if turn == "probe":
                self._probing = False
                self._pause_s = min(2 * self._pause_s, _LAST_PROBE_S)
            elif self._open or self._failures < _OPENS_AFTER:
                return
            self._open = True
            # Jitter keeps the processes of a cluster from probing in step.
            self._probe_at = self._clock() + self._pause_s * random.uniform(0.5, 1.0)
            self._changed.notify_all()
