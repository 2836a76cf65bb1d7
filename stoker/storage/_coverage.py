"""Which bytes of an object its writer has been given."""

import threading
from bisect import bisect_left

from ..errors import ConfigError

__all__ = ["Coverage"]


# Guarantees: claim() may be called from several threads. `_lock` guards `_spans`.
class Coverage:
    """The rule of :class:`~stoker.storage.store.ObjectWriter`: each byte of ``[0, size_bytes)`` exactly once.

    >>> covered = Coverage("blob", 8)
    >>> covered.claim(4, 4); covered.claim(0, 4); covered.require_complete()
    >>> covered.claim(2, 1)
    Traceback (most recent call last):
        ...
    stoker.errors.ConfigError: blob: each byte must be written once, got '[2, 3) again'
    """

    def __init__(self, place: str, size_bytes: int) -> None:
        if size_bytes < 0:
            raise ConfigError("size_bytes must be >= 0", value=size_bytes, place=place)
        self._place, self._size_bytes = place, size_bytes
        self._lock = threading.Lock()
        self._spans: list[tuple[int, int]] = []  # sorted, disjoint, never touching

    def claim(self, offset: int, length: int) -> None:
        """Take ``[offset, offset + length)``. Raises ConfigError if it is outside or was taken before."""
        end = offset + length
        if offset < 0 or end > self._size_bytes:
            raise ConfigError(
                f"writes must lie in [0, {self._size_bytes})", value=f"[{offset}, {end})", place=self._place
            )
        if not length:
            return
        with self._lock:
            at = bisect_left(self._spans, (offset, end))
            before = self._spans[at - 1] if at else (-1, -1)
            after = self._spans[at] if at < len(self._spans) else (self._size_bytes + 1, self._size_bytes + 1)
            if before[1] > offset or after[0] < end:
                raise ConfigError("each byte must be written once", value=f"[{offset}, {end}) again", place=self._place)
            start = before[0] if before[1] == offset else offset
            stop = after[1] if after[0] == end else end
            self._spans[at - (start != offset) : at + (stop != end)] = [(start, stop)]

    def require_complete(self) -> None:
        """Raise ConfigError, naming the first hole, unless every byte was taken."""
        with self._lock:
            covered = self._spans[0] if self._spans and self._spans[0][0] == 0 else (0, 0)
        if covered[1] != self._size_bytes:
            raise ConfigError(
                f"all {self._size_bytes} bytes must be written before commit",
                value=f"a hole at byte {covered[1]}",
                place=self._place,
            )
