"""A cluster's shared cache between a node's disk and the origin: read from, never written to, never relied on.

What it holds are the origin's objects under their own names, as the caches that fill themselves keep them: SeaweedFS
with the origin's bucket mounted (``remote.mount``), AIStore with it as a backend, or a shared directory. A block is
asked for by the same key and range as at the origin and compared with the same checksum, so a cache that is empty, old,
damaged, slow or down costs a moment and never a wrong byte.

Stoker does not fill it. Those systems do that themselves, once for all nodes, with limits and eviction of their own; a
second way in would double the bytes that a cold job writes, want credentials that may write, and leave a bucket that
nobody empties.
"""

import logging
import os
import queue
import threading
from collections.abc import Callable, Mapping
from time import monotonic
from typing import Any, Literal
from urllib.parse import urlsplit

from ..errors import ConfigError, KeyNotFound, StokerError, UnsafeName
from ..metrics import counters
from ._checksums import crc32c
from ._units import format_bytes
from ._workers import Workers
from .network import NetworkPolicy
from .store import ObjectStore, redact_url
from .urls import OBSTORE_SCHEMES, open_store, scheme_of

__all__ = ["Near"]

logger = logging.getLogger(__name__)

_LONGEST_CLOSE_S = 30.0
_LONGEST_WAIT_S = 3600
_OPENS_AFTER = 3
"""Failures in a row after which it is not asked for a while."""
_FIRST_PAUSE_S, _LAST_PAUSE_S = 1.0, 60.0
_SLOWEST_BYTES_PER_S = 16 << 20
"""A block may take longer by what its bytes take at this rate; what is slower than that, an origin is not."""


# Guarantees: get() and close() may be called from any thread. `_lock` guards everything below it in _reset().
class Near:
    """Blocks from a cluster's cache, where it has them in time.

    Args:
        url: ``{bucket}`` in it stands for the bucket of the origin. Without, objects lie below ``<bucket>/<path>``:
        with
            ``near="s3://cache"`` the block of ``s3://tokens/web/data/0.arrow`` is looked for in bucket ``cache`` under
            ``tokens/web/data/0.arrow``, with ``near="s3://{bucket}"`` in bucket ``tokens`` under ``web/data/0.arrow``.
        storage_options: of its store, as :func:`~stoker.storage.open_store` takes them.
        timeout_s: after which a block is fetched from its origin instead, and a moment more for large ones. Three
            failures in a row, and it is asked only now and then, by requests that nobody waits for.
        clock: for tests.

    Raises:
        ConfigError: an argument, a URL or an option that breaks its rule.
    """

    def __init__(
        self,
        url: str,
        *,
        storage_options: Mapping[str, Any],
        timeout_s: float,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        if (
            not isinstance(timeout_s, int | float)
            or isinstance(timeout_s, bool)
            or not 0 < timeout_s <= _LONGEST_WAIT_S
        ):
            rule = f"near_timeout_s must be > 0 and at most {_LONGEST_WAIT_S} seconds"
            raise ConfigError(rule, value=repr(timeout_s), place="TieredCache")
        if not isinstance(storage_options, Mapping):
            raise ConfigError("near_options must be a dict", value=type(storage_options).__name__, place="TieredCache")
        if not isinstance(url, str) or not ("://" in url or os.path.isabs(url)):
            raise ConfigError(
                "near must be a URL or an absolute path", value=repr(url), place="TieredCache", hint='near="s3://cache"'
            )
        self.url = redact_url(url)
        self._template, self._options, self._timeout_s, self._clock = url, dict(storage_options), timeout_s, clock
        self._reset()
        # A mistake in URL or options is told at once; this makes no request.
        try:
            self._open("s3://bucket/path").close()
        except (ConfigError, UnsafeName) as error:  # it names the store of an origin that nobody has
            value = {} if error.value is None else {"value": error.value}
            raise type(error)(error.rule, place=f"near={self.url}", hint=error.hint, **value) from None

    def _reset(self) -> None:
        self._lock = threading.Condition(threading.Lock())
        self._under_way = 0
        self._stores: dict[str, ObjectStore] = {}
        self._workers = Workers("stoker-near")
        self._failures = 0
        self._ask_again_at = 0.0
        self._pause_s = _FIRST_PAUSE_S
        self._probing = False
        self._fault: BaseException | None = None

    def _open(self, origin_url: str) -> ObjectStore:
        parts = urlsplit(origin_url)
        bucket, path = parts.netloc.rpartition("@")[2], parts.path.strip("/")
        url = self._template.rstrip("/")
        if "{bucket}" in url:
            below = path
        else:
            below = "/".join(part for part in (bucket, path) if part)
        url = f"{url.replace('{bucket}', bucket)}/{below}".rstrip("/")
        options = dict(self._options)
        if scheme_of(url) in OBSTORE_SCHEMES:
            timeout_s = self._timeout_s
            options.setdefault(
                "network",
                NetworkPolicy(
                    connect_timeout_s=timeout_s,
                    stall_timeout_s=timeout_s,
                    attempt_timeout_s=timeout_s,
                    timeout_s=timeout_s,
                    hedge_share=0.0,
                ),
            )
        return open_store(url, **options)

    def get(self, origin: ObjectStore, key: str, start: int, end: int, expected_crc: int) -> memoryview | None:
        """Bytes ``[start, end)`` of an object of `origin`, checked; None if they did not come from here."""
        if self._fault is not None:
            fault, self._fault = self._fault, None
            raise fault
        turn = self._turn()
        if turn == "go":
            answer: queue.SimpleQueue[memoryview | BaseException] = queue.SimpleQueue()
            self._workers.run(lambda: answer.put(self._ask(origin.url, key, start, end)))
            try:
                got = answer.get(timeout=self._timeout_s + (end - start) / _SLOWEST_BYTES_PER_S)
            except queue.Empty:
                got = TimeoutError(f"no {format_bytes(end - start)} within {self._timeout_s:g} s")
            view = self._judge(got, key, end - start, expected_crc)
            if view is not None:
                counters.add("cache.near.hits")
                counters.add("cache.near.hit_bytes", len(view))
            return view
        counters.add("cache.near.skipped")
        if turn == "probe":  # nobody waits for it
            self._workers.run(lambda: self._probe(origin.url, key, start, end, expected_crc))
        return None

    def _ask(self, origin_url: str, key: str, start: int, end: int) -> memoryview | BaseException:
        try:
            return self._store_for(origin_url).get(key, start, end)
        except BaseException as error:  # noqa: BLE001 - handed to the caller, if it still waits
            return error
        finally:
            with self._lock:
                self._under_way -= 1
                self._lock.notify_all()

    def _probe(self, origin_url: str, key: str, start: int, end: int, expected_crc: int) -> None:
        began = self._clock()
        got = self._ask(origin_url, key, start, end)
        if self._clock() - began > self._timeout_s + (end - start) / _SLOWEST_BYTES_PER_S:
            got = TimeoutError("late")
        try:
            self._judge(got, key, end - start, expected_crc)
        except BaseException as error:  # noqa: BLE001 - a fault of ours: raised by the next get
            self._fault = error

    def _judge(self, answer: "memoryview | BaseException", key: str, size: int, expected_crc: int) -> memoryview | None:
        if isinstance(answer, memoryview):
            self._answered()
            if len(answer) == size and crc32c(answer) == expected_crc:
                return answer
            counters.add("cache.near.corrupt")
            counters.add("cache.corrupt")
            logger.warning("near cache %s: %s differs from its checksum or size", self.url, key)
        elif isinstance(answer, KeyNotFound):
            self._answered()
            counters.add("cache.near.misses")
        else:
            self._failed(answer)
            if not isinstance(answer, StokerError | OSError):
                raise answer
        return None

    def _store_for(self, origin_url: str) -> ObjectStore:
        with self._lock:
            store = self._stores.get(origin_url)
            if store is None:
                store = self._stores[origin_url] = self._open(origin_url)
            return store

    # -- whether it is worth asking

    def _turn(self) -> Literal["go", "probe", "wait"]:
        with self._lock:
            if self._failures >= _OPENS_AFTER:
                if self._probing or self._clock() < self._ask_again_at:
                    return "wait"
                self._probing = True
            self._under_way += 1  # from here on: close() must not miss it
            return "probe" if self._probing else "go"

    def _answered(self) -> None:
        with self._lock:
            if self._failures >= _OPENS_AFTER:
                logger.warning("near cache %s answers again", self.url)
            self._failures, self._pause_s, self._probing = 0, _FIRST_PAUSE_S, False

    def _failed(self, error: BaseException) -> None:
        counters.add("cache.near.failed")
        with self._lock:
            self._failures += 1
            self._probing = False
            if self._failures < _OPENS_AFTER:
                return
            if self._failures == _OPENS_AFTER:
                logger.warning("near cache %s fails (%s): going on without it, asking again later", self.url, error)
            else:
                self._pause_s = min(2 * self._pause_s, _LAST_PAUSE_S)
            self._ask_again_at = self._clock() + self._pause_s

    def renew_after_fork(self) -> None:
        """In a child: stores, threads and locks stayed with the parent."""
        self._reset()

    def close(self) -> None:
        """Let its stores go; waits for requests under way, which end by the deadline that they were given."""
        with self._lock:
            self._lock.wait_for(lambda: not self._under_way, timeout=_LONGEST_CLOSE_S)
            stores, self._stores = list(self._stores.values()), {}
        for store in stores:
            store.close()
        self._workers.close()
