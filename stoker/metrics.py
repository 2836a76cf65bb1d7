"""Counters that every layer adds to, and the price table that turns them into money.

Counting is always on: one addition under a lock. Names are dotted, units are part of the name
(``store.get.requests``, ``store.get.bytes``, ``loader.wait_s``), so a snapshot explains itself.
"""

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from time import perf_counter

__all__ = ["Counters", "Prices", "counters"]


# Guarantees: add() and snapshot() may be called from any thread; a snapshot is one consistent moment; a forked child
# starts from a copy of its parent's numbers. `_lock` guards `_values`; a finalizer that counts may run while it is held.
class Counters:
    """A set of named sums.

    >>> c = Counters()
    >>> c.add("store.get.requests"); c.add("store.get.bytes", 4096); c.add("store.get.bytes", 4096)
    >>> c.snapshot()
    {'store.get.bytes': 8192, 'store.get.requests': 1}
    >>> before = c.snapshot(); c.add("store.get.requests", 2); c.since(before)
    {'store.get.requests': 2}
    """

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._values: dict[str, float] = {}

    def add(self, name: str, amount: float = 1) -> None:
        """Add `amount` to the sum called `name`. Thread-safe."""
        with self._lock:
            self._values[name] = self._values.get(name, 0) + amount

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside the block to `name`, also when it raises."""
        start = perf_counter()
        try:
            yield
        finally:
            self.add(name, perf_counter() - start)

    def snapshot(self) -> dict[str, float]:
        """All sums, sorted by name."""
        with self._lock:
            values = self._values.copy()
        return dict(sorted(values.items()))

    def since(self, before: Mapping[str, float]) -> dict[str, float]:
        """What was added after the snapshot `before`; names that did not move are left out."""
        now = self.snapshot()
        return {name: now[name] - before.get(name, 0) for name in now if now[name] != before.get(name, 0)}


counters = Counters()
"""The sums of this process."""


def _renew_lock_in_child() -> None:
    counters._lock = threading.RLock()  # a thread of the parent may have held it, and is not here to let it go


os.register_at_fork(after_in_child=_renew_lock_in_child)


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What a store charges, in US dollars.

    The defaults are the list prices of Amazon S3 Standard in us-east-1 as published in 2025, reads inside the region
    (https://aws.amazon.com/s3/pricing/). Set your own: prices differ by provider, region and contract.

    >>> Prices().usd({"store.get.requests": 1_000_000, "store.put.requests": 1_000})
    0.405
    """

    usd_per_1000_get: float = 0.0004
    usd_per_1000_put: float = 0.005
    usd_per_gb_egress: float = 0.0

    def usd(self, counts: Mapping[str, float]) -> float:
        """The price of what `counts` (a snapshot or a difference of two) holds.

        GET and HEAD cost a read request; PUT, multipart parts and LIST cost a write request; DELETE is free.
        """
        reads = sum(counts.get(f"store.{verb}.requests", 0) for verb in ("get", "head"))
        writes = sum(counts.get(f"store.{verb}.requests", 0) for verb in ("put", "list"))
        egress_gb = counts.get("store.get.bytes", 0) / 1e9
        usd = reads / 1000 * self.usd_per_1000_get + writes / 1000 * self.usd_per_1000_put
        return usd + egress_gb * self.usd_per_gb_egress
