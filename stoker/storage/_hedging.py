"""When a request that is late is sent a second time, over another connection.

The rule: at the larger of the 95th percentile and 2.5 times the median of what *winners* took. The 99th percentile of
all requests, which is often proposed, defeats itself: with 1 % of requests late, it *is* the lateness. AWS asks clients
to retry the slowest requests (https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html); the
idea is Dean and Barroso's, "The Tail at Scale", CACM 2013.
"""

import threading
from collections import deque

__all__ = ["Hedging"]

_WINDOW = 500
"""Winners that are remembered for each size."""
_LEAST = 30
"""Winners before the first hedge: percentiles of fewer say nothing."""
_TOKENS = 20.0
_TOKENS_PER_FIRST = 0.01
"""Second requests are paid for by those that win, and beyond that one read in a hundred pays for one: where lateness is
only the store's own load, they win nothing and add to it (5 % of the rate of a saturated server, measured)."""
_EVERY = 25
"""Winners between two looks at the percentiles: sorting costs as much as some requests."""


# Guarantees: every method may be called from any thread; `_lock` guards everything.
class Hedging:
    """Latencies of winners by size, and the budget of second requests.

    >>> hedging = Hedging(share=0.05)
    >>> for n in range(100):
    ...     delay_s = hedging.sent(4096)
    ...     hedging.won(4096, 0.010)
    >>> delay_s
    0.025
    >>> [hedging.allow() for _ in range(6)]
    [True, True, True, True, True, False]

    Args:
        share: second requests as a share of first ones, at most.
    """

    def __init__(self, share: float) -> None:
        self._share = share
        self._lock = threading.Lock()
        self._winners: dict[int, deque[float]] = {}
        self._since: dict[int, int] = {}
        self._delays_s: dict[int, float] = {}
        self._firsts = 0
        self._seconds = 0
        self._tokens = _TOKENS

    def sent(self, size: int) -> float | None:
        """A first request, for `size` bytes, is sent. How long to wait before asking again; None for not at all: too
        little is known, or the budget is spent."""
        with self._lock:
            self._firsts += 1
            self._tokens = min(_TOKENS, self._tokens + _TOKENS_PER_FIRST)
            return self._delays_s.get(size.bit_length()) if self._has_budget() else None

    def won(self, size: int, seconds: float) -> None:
        """A request for `size` bytes was the first to succeed, after `seconds`."""
        size = size.bit_length()  # a factor of two in size is about one in time: good enough for a percentile
        with self._lock:
            winners = self._winners.setdefault(size, deque(maxlen=_WINDOW))
            winners.append(seconds)
            self._since[size] = self._since.get(size, 0) + 1
            if len(winners) >= _LEAST and (size not in self._delays_s or self._since[size] >= _EVERY):
                self._since[size] = 0
                ordered = sorted(winners)
                self._delays_s[size] = max(ordered[int(0.95 * len(ordered))], 2.5 * ordered[len(ordered) // 2])

    def _has_budget(self) -> bool:
        return self._seconds + 1 <= self._share * self._firsts and self._tokens >= 1

    def allow(self) -> bool:
        """Whether the budget has room for a second request, which is taken."""
        with self._lock:
            if not self._has_budget():
                return False
            self._seconds += 1
            self._tokens -= 1
            return True

    def paid_off(self) -> None:
        """A second request won."""
        with self._lock:
            self._tokens = min(_TOKENS, self._tokens + 1)
