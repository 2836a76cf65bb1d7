"""Objects in S3, Google Cloud Storage, Azure Blob Storage and behind plain HTTP, through obstore (Rust).

obstore's runtime does not survive a fork: once a process has used it, any use in a forked child hangs for ever, even
with a new client. So every call first compares process ids, and goes through a helper process after a fork
(:mod:`stoker.storage.fetch`).

Reads are ranged GETs of at most 8 MiB, several at once for more. A range is asked for with the version that the caller
knows or that the first reply had (``If-Match``), and what comes back is compared with what was asked for: version, place
and length. Checksums are the caller's: no client checks the content of a range.

Every request goes through the policy of :mod:`stoker.storage.network`, but for the parts of multipart uploads, which obstore
repeats by itself.
"""

import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from math import inf
from typing import Any, TypeVar

from ..errors import (
    AccessDenied,
    AlreadyExists,
    BadReply,
    ConfigError,
    KeyNotFound,
    ObjectChanged,
    StokerError,
    StoreError,
    StoreUnavailable,
    Throttled,
    UnsupportedError,
)
from ..metrics import counters
from ._coverage import Coverage
from ._listing import in_lexical_order, lowest_offset
from ._remote_errors import RangeNotSatisfiable, WrongRange, typed_error
from ._remote_options import RANGE_BYTES, ClientKind, make_client, obstore, parse
from ._units import Buffer
from .fetch import FetchedStore
from .network import Attempt, NetworkPolicy, use_network
from .store import ObjectInfo, ObjectStore, ObjectWriter, check_range, is_key, safe_key

__all__ = ["RemoteStore"]

T = TypeVar("T")

_PART_BYTES = 8 * 2**20
"""Smallest part of a multipart upload. A guess between S3's minimum of 5 MiB and the memory that parts in flight hold."""

_MAX_PARTS = 10_000  # of one upload, S3's limit: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_PARTS_IN_FLIGHT = 8
_SINGLE_PUT_BYTES = 32 * 2**20
_RANGES_AT_ONCE = 8
_PAGE_KEYS = 1000  # of one LIST request, everywhere

_runtime_pid: int | None = None
"""The process in which obstore's threads run; a forked child inherits the number but not the threads."""


class RemoteStore(ObjectStore):
    """Objects below ``scheme://bucket/prefix``. Makes no request when it is constructed.

    ==============================  ===================================================================================
    ``s3 s3a``                      ``key, secret, token, endpoint_url, region, anon, requester_pays`` and
                                    ``client_kwargs={"endpoint_url", "region_name"}``; the ``AWS_*`` variables
    ``gs gcs``                      ``token`` (path or dict of a service account, or ``"anon"``), ``endpoint_url, anon``;
                                    ``GOOGLE_*`` variables
    ``az abfs abfss``               ``account_name, account_key, sas_token, tenant_id, client_id, client_secret, anon,
                                    endpoint_url``; ``AZURE_*`` variables
    ``http https``                  ``headers``; read-only, without listing
    ==============================  ===================================================================================

    Unencrypted HTTP is used only where the endpoint's URL begins with ``http://``. Time-outs, retries and how many
    requests are under way at once are those of `network`.

    Raises:
        ConfigError: an option that the scheme does not have, or a URL without a bucket, with credentials or a query.
        MissingExtra: obstore is not installed.
    """

    def __init__(self, url: str, *, network: NetworkPolicy | None = None, **storage_options: Any) -> None:
        if network is not None and not isinstance(network, NetworkPolicy):
            raise ConfigError("network must be a NetworkPolicy", value=type(network).__name__, place="open_store")
        self._given = (url, storage_options | ({} if network is None else {"network": network}))
        self._scheme, self._bucket, self._prefix, self._config = parse(url, storage_options)
        place = f"{self._scheme}://{self._bucket}/{self._prefix}".rstrip("/")
        super().__init__(place)
        self._pid = os.getpid()
        self._read_only = self._scheme in ("http", "https")
        self._policy = network or NetworkPolicy()
        self._clients: dict[ClientKind, Any] = {}
        self._client_of("bulk")  # a mistake in the options is told now
        endpoint = self._config.endpoint_url or self._scheme
        self._network, leave = use_network(f"{endpoint} {self._bucket}", self._policy)
        self._leave_network = weakref.finalize(self, leave)
        self._bucket_seen = False
        self._create_lock = threading.Lock()
        self._creates_exclusively: bool | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # To the worker of a data loader, over a pipe; never to a file.
        return (_reopen, self._given)

    @property
    def client(self) -> Any:
        """The obstore client, for whole files: it repeats requests by itself, and knows nothing of the policy."""
        self._refuse_after_fork()
        return self._client_of("bulk")

    def _client_of(self, kind: ClientKind) -> Any:
        client = self._clients.get(kind)
        if client is None:
            place = (self._scheme, self.url, self._bucket, self._prefix)
            client = self._clients[kind] = make_client(*place, self._config, kind=kind, policy=self._policy)
        return client

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        check_range(start, end, self.place(safe_key(key)))
        if other := self._after_fork():
            return other.get(key, start, end, version=version)
        if end == start:
            return self._empty_range(key, start, version)
        if end is None:
            return self._get_to_end(key, start, version)
        if end - start <= RANGE_BYTES:
            return self._get_range(key, start, end, version)[1]
        buffer = memoryview(bytearray(end - start))
        self.get_into(key, buffer, start, version=version)
        return buffer.toreadonly()

    def get_into(self, key: str, buffer: memoryview, start: int = 0, *, version: str | None = None) -> None:
        check_range(start, None, self.place(safe_key(key)))
        if other := self._after_fork():
            other.get_into(key, buffer, start, version=version)
            return
        if not len(buffer):
            self._empty_range(key, start, version)
            return
        end = start + min(len(buffer), RANGE_BYTES)
        info, data = self._get_range(key, start, end, version)
        buffer[: len(data)] = data
        self._get_rest(key, buffer, start, len(data), info.version)

    def _get_to_end(self, key: str, start: int, version: str | None) -> memoryview:
        # Servers of plain HTTP may know no ranges, which whole objects don't need.
        end = None if self._read_only and not start else start + RANGE_BYTES
        try:
            info, data = self._get_range(key, start, end, version, clamped=True)
        except RangeNotSatisfiable:  # from the very end on there is nothing, which is no error
            return self._empty_range(key, start, version)
        if start + len(data) == info.size:
            return data
        buffer = memoryview(bytearray(info.size - start))
        buffer[: len(data)] = data
        self._get_rest(key, buffer, start, len(data), info.version)
        return buffer.toreadonly()

    def _get_rest(self, key: str, buffer: memoryview, start: int, done: int, version: str) -> None:
        """Fill ``buffer[done:]``, several ranges at once, all of one version."""

        def fetch(first: int) -> None:
            part = buffer[first : first + RANGE_BYTES]
            part[:] = self._get_range(key, start + first, start + first + len(part), version)[1]

        firsts = range(done, len(buffer), RANGE_BYTES)

        def lane(number: int) -> None:
            for first in firsts[number::_RANGES_AT_ONCE]:
                fetch(first)

        self._network.map([partial(lane, number) for number in range(min(_RANGES_AT_ONCE, len(firsts)))])

    def _get_range(
        self, key: str, start: int, end: int | None, version: str | None, *, clamped: bool = False
    ) -> tuple[ObjectInfo, memoryview]:
        """One GET of ``[start, end)``, of what there is of it if `clamped`."""
        options: dict[str, Any] = {} if end is None else {"range": (start, end)}
        # A weak tag never matches If-Match (RFC 9110, 8.8.3.2); it is compared with the reply's below.
        if version is not None and version.startswith('"'):
            options["if_match"] = version

        def send(second: bool) -> tuple[ObjectInfo, tuple[int, int], memoryview]:
            result = obstore().get(self._client_of("spare" if second else "read"), key, options=options)
            data = memoryview(result.bytes())
            counters.add("store.get.bytes", len(data))
            if len(data) != result.range[1] - result.range[0]:
                raise BadReply("a reply must be whole", value=f"{len(data)} bytes", place=self.place(key))
            return self._info_of(key, result.meta), result.range, data

        for attempts_left in (1, 0):
            try:
                # How long one takes of which we don't know the size says nothing about others.
                size, hedge = 0 if end is None else end - start, not clamped
                info, place, data = self._request("get", key, send, size=size, hedge=hedge)
                break
            except RangeNotSatisfiable:
                if clamped:
                    raise
                raise self._too_short(key, start, start if end is None else end) from None
            except (WrongRange, UnsupportedError):  # a mistake on the way is not made twice
                if not attempts_left:
                    raise
        if version is not None and info.version != version:
            raise self._changed(key, version, info.version)
        stop = info.size if end is None else min(end, info.size) if clamped else end
        if place != (start, stop) or len(data) != stop - start:
            raise self._too_short(key, start, stop)
        return info, data

    def _info_of(self, key: str, meta: Mapping[str, Any]) -> ObjectInfo:
        """What the reply to a GET or HEAD says; object stores always send a tag, and what stands between does not."""
        if not meta["e_tag"] and not self._read_only:
            raise BadReply("a reply must name the object's version", place=self.place(key))
        return _info(key, meta)

    def _empty_range(self, key: str, start: int, version: str | None) -> memoryview:
        info = self.head(key)
        if version is not None and info.version != version:
            raise self._changed(key, version, info.version)
        if start > info.size:
            raise self._too_short(key, start, start)
        return memoryview(b"")

    def _changed(self, key: str, version: str, found: str) -> ObjectChanged:
        return ObjectChanged(f"must still be version {version}", value=found, place=self.place(key))

    def _too_short(self, key: str, start: int, end: int) -> ObjectChanged:
        return ObjectChanged(
            f"must hold bytes [{start}, {end})",
            place=self.place(key),
            hint="the object is shorter than its description says: it was replaced or cut",
        )

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        if other := self._after_fork():
            return other.put(key, data)
        return self._put(key, memoryview(data).cast("B"), None)

    def create(self, key: str, data: Buffer) -> ObjectInfo:
        if other := self._after_fork():
            return other.create(key, data)
        self._writable(key)
        self._require_exclusive_create()
        view = memoryview(data).cast("B")
        # 409 means that another creator is at work and may still fail: then the name is free and we try again.
        for _ in range(5):
            try:
                return self._put(key, view, "create")
            except AlreadyExists:
                if self.exists(key):
                    raise
        raise StoreUnavailable("creators of one object must come to an end", place=self.place(key))

    def _put(self, key: str, data: memoryview, mode: str | None) -> ObjectInfo:
        self._writable(safe_key(key))
        if mode is None and len(data) > _SINGLE_PUT_BYTES:
            counters.add("store.put.requests", 2 + -(-len(data) // _part_bytes(len(data))))
            reply = self._guarded(key, lambda: self._send_parts(key, data))
        else:
            reply = self._put_at_once(key, data, mode)
        version = reply["e_tag"]
        return (
            ObjectInfo(key=key, size=len(data), version=version, modified_s=time.time()) if version else self.head(key)
        )

    def _send_parts(self, key: str, data: memoryview) -> Mapping[str, Any]:
        part_bytes = _part_bytes(len(data))
        reply: Mapping[str, Any] = obstore().put(
            self.client, key, data, use_multipart=True, chunk_size=part_bytes, max_concurrency=_PARTS_IN_FLIGHT
        )
        counters.add("store.put.bytes", len(data))
        return reply

    def _put_at_once(self, key: str, data: memoryview, mode: str | None) -> Mapping[str, Any]:
        # A request that its deadline cuts off may go on sending when we have returned.
        kept = data if data.readonly else bytes(data)
        unknown = 0

        def send(second: bool) -> Mapping[str, Any]:
            nonlocal unknown
            unknown += 1
            try:
                with self._translated(key):
                    client = self._client_of("write")
                    reply: Mapping[str, Any] = obstore().put(client, key, kept, mode=mode, use_multipart=False)
            except (Throttled, AlreadyExists):
                unknown -= 1  # refused, so it was not done
                raise
            counters.add("store.put.bytes", len(data))
            return reply

        try:
            return self._request("put", key, send, size=len(data))
        except AlreadyExists:
            # An earlier request of this call may have made it, and its reply was lost.
            if unknown and self._holds(key, data):
                return {"e_tag": None}
            raise

    def _holds(self, key: str, data: memoryview) -> bool:
        with suppress(KeyNotFound, ObjectChanged):
            return self.get(key) == data
        return False

    def _require_exclusive_create(self) -> None:
        """Prove once that the endpoint refuses a second creator: some accept the condition and ignore it."""
        with self._create_lock:
            if self._creates_exclusively is None:
                scratch = f".stoker/create-{os.urandom(8).hex()}"
                refused = False
                try:
                    for _ in range(2):
                        try:
                            self._put_at_once(scratch, memoryview(b"probe"), "create")
                        except AlreadyExists:
                            refused = True
                finally:
                    with suppress(StoreError):
                        self._remove(scratch)
                self._creates_exclusively = refused
            if not self._creates_exclusively:
                raise UnsupportedError(
                    "the store must refuse to create an object twice (If-None-Match: *)",
                    value="a second create that replaced the first",
                    place=self.url,
                    hint="use a store with conditional writes: AWS S3, GCS, Azure, MinIO, SeaweedFS",
                )

    def open_writer(self, key: str, size_bytes: int) -> ObjectWriter:
        if other := self._after_fork():
            return other.open_writer(key, size_bytes)
        self._writable(safe_key(key))
        return RemoteWriter(self, key, size_bytes)

    def head(self, key: str) -> ObjectInfo:
        safe_key(key)
        if other := self._after_fork():
            return other.head(key)

        def send(second: bool) -> ObjectInfo:
            return self._info_of(key, obstore().head(self._client_of("spare" if second else "read"), key))

        return self._request("head", key, send, hedge=True)

    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        if self._read_only:
            raise UnsupportedError("an http(s) URL can't be listed", place=self.url)
        if other := self._after_fork():
            return other.list(prefix, start_after=start_after, limit=limit)
        folder = prefix.rpartition("/")[0]
        if folder:
            safe_key(folder)
        return self._list(folder, prefix, start_after, limit)

    def _list(self, folder: str, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        left = limit
        lowest = max(lowest_offset(folder, prefix), lowest_offset(folder, start_after))
        for info in in_lexical_order(self._pages(folder, lowest), len(folder) + 1 if folder else 0):
            if left == 0 or (info.key > prefix and not info.key.startswith(prefix)):
                return
            if info.key.startswith(prefix) and info.key > start_after and is_key(info.key):
                yield info
                left = None if left is None else left - 1
                if left == 0:
                    return

    def _pages(self, folder: str, lowest: str) -> Iterator[ObjectInfo]:
        """All objects of a folder, in the server's order. After a failed page it begins again, behind what it has."""
        idle: list[Iterator[Any]] = []
        """The listing, as long as no request uses it; one that failed or was given up never comes back."""

        def send(second: bool) -> tuple[Iterator[Any], bool, Any]:
            listing, began = (idle.pop(), False) if idle else (self._begin_listing(folder, lowest), True)
            return listing, began, next(listing, None)

        last: str | None = None
        asked_again = False
        while True:
            listing, began, page = self._request("list", folder, send)
            skip = last if began else None
            if page is None:
                if skip is not None:
                    raise StoreUnavailable("a listing must keep its order", value=skip, place=self.place(folder))
                if last is not None or asked_again:
                    return
                # What stands between may answer with a success that holds an error: nothing at all is asked for twice.
                asked_again = True
                continue
            for meta in page:
                if skip is None:
                    last = meta["path"]
                    yield _info(meta["path"], meta)
                elif meta["path"] == skip:
                    skip = None
            idle.append(listing)

    def _begin_listing(self, folder: str, lowest: str) -> Iterator[Any]:
        client = self._client_of("read")
        return iter(obstore().list(client, folder or None, offset=lowest or None, chunk_size=_PAGE_KEYS))

    def delete(self, key: str) -> None:
        if other := self._after_fork():
            other.delete(key)
            return
        self._writable(safe_key(key))
        self._remove(key)

    def _remove(self, key: str) -> None:
        with suppress(KeyNotFound):
            self._request("delete", key, lambda second: obstore().delete(self._client_of("write"), key))

    def close(self) -> None:
        self._leave_network()
        self._clients.clear()

    def _writable(self, key: str) -> None:
        if self._read_only:
            raise UnsupportedError("an http(s) URL is read-only", place=self.place(key), hint="write to its bucket")

    def _request(self, verb: str, key: str, send: Callable[[bool], T], *, size: int = 0, hedge: bool = False) -> T:
        """`send` by the policy, counted, with its errors translated."""
        global _runtime_pid
        self._refuse_after_fork()
        _runtime_pid = self._pid

        def once(second: bool) -> T:
            counters.add(f"store.{verb}.requests")
            try:
                with self._translated(key):
                    return send(second)
            except KeyNotFound:
                if not self._bucket_seen:  # a bare 404, to HEAD, does not say what is missing
                    self._require_bucket(key, second)
                raise

        # The client that reads has a time-out for the whole of a request; after a 404 there may be a second one.
        requests = 1 if self._bucket_seen else 2
        ends_in_s = requests * self._policy.request_timeout_s(RANGE_BYTES) if hedge else inf
        attempt = Attempt(send=once, place=self.place(key), size=size, hedge=hedge, ends_in_s=ends_in_s)
        result = self._network.call(attempt)
        self._bucket_seen = True
        return result

    def _guarded(self, key: str, call: Callable[[], T]) -> T:
        """`call` on this thread, without the policy, with its errors translated."""
        global _runtime_pid
        self._refuse_after_fork()
        _runtime_pid = self._pid
        with self._translated(key):
            return call()

    @contextmanager
    def _translated(self, key: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 - whatever the client raises; its text may hold bodies and dumps
            raise self._typed(error, key) from None

    def _typed(self, error: Exception, key: str) -> Exception:
        return error if isinstance(error, StokerError) else typed_error(error, self.place(key), self.url)

    def _is_forked(self) -> bool:
        pid = os.getpid()
        return pid != self._pid or _runtime_pid not in (None, pid)

    def _after_fork(self) -> FetchedStore | None:
        """The store that does it instead, where this one would hang."""
        return FetchedStore(*self._given, shown_url=self.url) if self._is_forked() else None

    def _refuse_after_fork(self) -> None:
        if self._is_forked():
            raise UnsupportedError(
                "what a process began with an object store can't be finished by a forked child",
                value=f"process {os.getpid()}",
                place=self.url,
                hint='start the process with "spawn" or "forkserver"',
            )

    def _require_bucket(self, key: str, second: bool) -> None:
        if self._read_only:
            return
        counters.add("store.list.requests")
        client = self._client_of("spare" if second else "read")
        try:
            with self._translated(key):
                next(iter(obstore().list(client, chunk_size=1)), None)
        except (AccessDenied, UnsupportedError):  # whoever may not list has had an answer all the same
            return
        self._bucket_seen = True


# Guarantees: write_at may be called from several threads. `_lock` guards `_waiting`, `_next`, `_draining`, `_failure`
# and `_done`; only the one thread that set `_draining` (or the one in commit or abort, when it is not set) uses `_file`.
class RemoteWriter(ObjectWriter):
    """A multipart upload (one PUT if it is small) that grows in order; pieces that come early wait by reference."""

    def __init__(self, store: RemoteStore, key: str, size_bytes: int) -> None:
        self._store, self._key, self._size_bytes = store, key, size_bytes
        self._coverage = Coverage(store.place(key), size_bytes)
        self._lock = threading.Condition()
        self._waiting: dict[int, memoryview] = {}
        self._next = 0
        self._draining = False
        self._done = False
        self._failure: BaseException | None = None
        part_bytes = _part_bytes(size_bytes)
        self._requests = 1 if size_bytes < part_bytes else 2 + -(-size_bytes // part_bytes)
        self._file: Any = store._guarded(
            key,
            lambda: obstore().open_writer(store.client, key, buffer_size=part_bytes, max_concurrency=_PARTS_IN_FLIGHT),
        )

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._coverage.claim(offset, len(view))
        with self._lock:
            self._require_open()
            if len(view):
                self._waiting[offset] = view
            if self._draining or self._next not in self._waiting:
                return
            self._draining = True
        self._drain()

    def _drain(self) -> None:
        """Send all pieces that are next in turn. One thread at a time; it may send what others bring meanwhile."""
        try:
            while True:
                with self._lock:
                    piece = None if self._failure is not None else self._waiting.pop(self._next, None)
                    if piece is None:
                        self._end_draining()  # before the lock is free: whoever brings a piece then sends it
                        return
                # Blocks while enough parts are in flight.
                self._store._guarded(self._key, lambda part=piece: self._file.write(part))  # type: ignore[misc]
                with self._lock:
                    self._next += len(piece)
        except BaseException as error:
            with self._lock:
                self._failure = error
                self._end_draining()
            raise

    def _end_draining(self) -> None:
        self._draining = False
        self._lock.notify_all()

    def commit(self) -> ObjectInfo:
        with self._lock:
            self._require_open()
            self._lock.wait_for(lambda: not self._draining)
            self._require_open()
            self._coverage.require_complete()
            # From here on the object may appear, whatever we hear: there is nothing left to abort.
            self._done = True
        self._store._guarded(self._key, self._file.close)
        counters.add("store.put.requests", self._requests)
        counters.add("store.put.bytes", self._size_bytes)
        info = self._store.head(self._key)
        if info.size != self._size_bytes:
            raise ObjectChanged(
                f"must hold the {self._size_bytes} bytes that were written",
                value=f"{info.size} bytes",
                place=self._store.place(self._key),
                hint="another writer replaced it, or the store lost a part",
            )
        return info

    def _require_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._done:
            raise ConfigError("a writer can't be used after commit or abort", place=self._store.place(self._key))

    def abort(self) -> None:
        with self._lock:
            if self._done:
                return
            self._done = True
            self._failure = self._failure or ConfigError(
                "a writer can't be used after commit or abort", place=self._store.place(self._key)
            )
            self._lock.wait_for(lambda: not self._draining)
            self._waiting.clear()
        cause = RuntimeError("aborted")
        # The parts that were sent are removed as far as the store can be reached; nothing was published either way.
        with suppress(StoreError, UnsupportedError):
            self._store._guarded(self._key, lambda: self._file.__exit__(RuntimeError, cause, None))


def _reopen(url: str, options: dict[str, Any]) -> RemoteStore:
    return RemoteStore(url, **options)


def _part_bytes(size_bytes: int) -> int:
    needed = -(-size_bytes // _MAX_PARTS)
    return max(_PART_BYTES, -(-needed // 2**20) * 2**20)


def _info(key: str, meta: Mapping[str, Any]) -> ObjectInfo:
    modified_s = meta["last_modified"].timestamp()
    # Plain HTTP servers may send no tag. Then time and length are the best there is.
    version = meta["e_tag"] or f"{modified_s:.6f}-{meta['size']}"
    if version.startswith("0x"):  # Azure quotes its tags everywhere but in listings
        version = f'"{version}"'
    return ObjectInfo(key=key, size=meta["size"], version=version, modified_s=modified_s)
