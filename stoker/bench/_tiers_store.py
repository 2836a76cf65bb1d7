"""Rows of ``stoker bench tiers`` that ask an object store, by stoker, by its bare client and by peers."""

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

from ..errors import ConfigError, MissingExtra, StokerError, StoreError, UnsupportedError
from ..storage import open_store
from ._tiers_content import BLOCK_BYTES, MIB, Content, Piece, T, each
from .frame import Kind, Outcome, Scalar, Variant

_UPLOAD_BYTES = 16 * MIB
CONCURRENCIES = (1, 2, 4, 8, 16, 32)
_SWEEP_BYTES = 128 * MIB
"""Of which the concurrency is chosen: one block for each of 32 threads."""

logger = logging.getLogger(__name__)


class Swept:
    """A variant that runs with as many threads as serve it best.

    Args:
        pieces: what to move, `size_bytes` in all.
        go: moves these pieces in so many threads, and returns the seconds.
        check: compares what the last `go` of all pieces left behind, and clears it away.
    """

    def __init__(
        self,
        content: Content,
        pieces: Sequence[T],
        go: Callable[[Sequence[T], int], float],
        check: Callable[[], str | None] = lambda: None,
        *,
        before: Callable[[], None] = lambda: None,
        size_bytes: int = 0,
    ) -> None:
        self._content, self._pieces, self._go, self._check, self._before = content, pieces, go, check, before
        self._size_bytes = size_bytes or len(content.memory)
        self.params: dict[str, Scalar] = {}
        self.notes: list[str] = []

    def setup(self) -> None:
        self._before()
        sample = self._pieces[: max(1, _SWEEP_BYTES * len(self._pieces) // self._size_bytes)]
        choices = [threads for threads in CONCURRENCIES if threads <= len(sample)]
        seconds: dict[int, float] = {}
        for threads in (choices[-1], *choices):  # the first time of all pays for the connections, and is overwritten
            seconds[threads] = self._go(sample, threads)
            self._check()
        best = min(seconds, key=seconds.__getitem__)
        self.params["concurrency"] = best
        self.notes.append(f"{best} at once was the best of {', '.join(map(str, choices))}")

    def run(self) -> Outcome:
        threads = self.params["concurrency"]
        assert isinstance(threads, int)
        seconds = self._go(self._pieces, threads)
        return self._content.rate(seconds, origin=self._check(), size_bytes=self._size_bytes)

    def variant(self, name: str, kind: Kind, *notes: str) -> Variant:
        self.notes.extend(notes)
        return Variant(name=name, kind=kind, run=self.run, setup=self.setup, params=self.params, notes=self.notes)


class Bucket:
    """A random prefix in a store with the objects to read, as stoker, bare obstore and s3fs reach it."""

    def __init__(self, content: Content, url: str, options: Mapping[str, Any], *, prefix: str | None = None) -> None:
        self.content = content
        prefix = f"stoker-bench-{os.urandom(8).hex()}" if prefix is None else prefix
        self.url = f"{url.rstrip('/')}/{prefix}".rstrip("/")
        self.options = dict(options)
        self._bare = _bare_client(self.url, self.options)
        self.store = open_store(self.url, **self.options)
        self._wrote = False

    @property
    def endpoint_url(self) -> str | None:
        """Where a proxy could stand before the store; None where it speaks TLS or has an address of its own."""
        endpoint = _endpoint(self.options)
        return endpoint if endpoint is not None and endpoint.startswith("http://") else None

    def fill(self) -> None:
        self.store.put("begun", b"")  # small: a mistake in the URL or the keys is told at once
        self._wrote = True
        self.content.put_objects(self.store)

    def remove(self) -> None:
        if not self._wrote:
            return
        try:
            each([info.key for info in self.store.list()], 8, self.store.delete)
        except StokerError as error:  # what ended the bench is what its user must read
            logger.warning("what stands below %s could not be removed: %s", self.store.url, error)

    def bare_get(self, piece: Piece) -> memoryview:
        import obstore

        with without_secrets(self.store.place(piece.key)):
            return memoryview(obstore.get_range(self._bare, piece.key, start=piece.start, end=piece.end))

    # -- reading

    def readers(self) -> Sequence[Variant]:
        content = self.content

        def bare_get(piece: Piece) -> None:
            piece.require(self.bare_get(piece), "obstore get_range")

        def get(piece: Piece) -> None:
            piece.require(self.store.get(piece.key, piece.start, piece.end), "stoker get")

        bare = Swept(content, content.pieces, lambda pieces, threads: each(pieces, threads, bare_get))
        ours = Swept(content, content.pieces, lambda pieces, threads: each(pieces, threads, get))
        return [
            bare.variant("obstore get_range + crc32c", "limit"),
            ours.variant("stoker get + crc32c", "stoker"),
            self._s3fs(),
        ]

    def _s3fs(self) -> Variant:
        content = self.content
        file_system: Any = None

        def connect() -> None:
            nonlocal file_system
            try:
                import s3fs
            except ImportError:
                raise MissingExtra("s3fs is not installed", hint="pip install 'stoker[bench]'") from None
            options = {name: value for name, value in self.options.items() if name not in ("region", "anon")}
            client = {"region_name": self.options["region"]} if self.options.get("region") else {}
            file_system = s3fs.S3FileSystem(
                **options,
                anon=str(self.options.get("anon")).lower() in ("true", "1"),
                client_kwargs=client,
                config_kwargs={"max_pool_connections": max(CONCURRENCIES)},  # its 10 would bind
                skip_instance_cache=True,
            )

        def go(pieces: Sequence[Piece], threads: int) -> float:
            root = self.url.partition("://")[2]
            paths = [f"{root}/{piece.key}" for piece in pieces]
            starts, ends = [piece.start for piece in pieces], [piece.end for piece in pieces]
            started = perf_counter()
            blocks = file_system.cat_ranges(paths, starts, ends, batch_size=threads, on_error="raise")
            for piece, data in zip(pieces, blocks, strict=True):
                piece.require(data, "s3fs cat_ranges")
            return perf_counter() - started

        swept = Swept(content, content.pieces, go, before=connect)
        return swept.variant("s3fs cat_ranges + crc32c", "peer")

    # -- writing

    def uploaders(self, size_bytes: int) -> Sequence[Variant]:
        import obstore

        content = self.content
        starts = range(0, size_bytes, _UPLOAD_BYTES)

        def bare_put(key: str, data: memoryview) -> None:
            with without_secrets(self.store.place(key)):
                obstore.put(self._bare, key, data, use_multipart=False)

        def write(key: str, data: memoryview) -> None:
            with self.store.open_writer(key, len(data)) as writer:
                writer.write_at(0, data)
                writer.commit()

        def variant(name: str, kind: Kind, put: Callable[[str, memoryview], object], *notes: str) -> Variant:
            written: list[int] = []

            def go(starts: Sequence[int], threads: int) -> float:
                written[:] = starts
                return each(
                    starts,
                    threads,
                    lambda at: put(f"write/{at:012d}", content.of(at, min(_UPLOAD_BYTES, size_bytes - at))),
                )

            def check() -> None:
                blocks = [p for p in content.pieces if p.at < size_bytes and p.at - p.at % _UPLOAD_BYTES in written]
                each(blocks, 4, lambda piece: self._require_upload(piece, name))
                each(written, 8, lambda at: self.store.delete(f"write/{at:012d}"))

            return Swept(content, starts, go, check, size_bytes=size_bytes).variant(name, kind, *notes)

        return [
            variant("obstore put", "limit", bare_put, "one request for each object"),
            variant("stoker put", "stoker", self.store.put),
            variant("stoker open_writer", "stoker", write, "a multipart upload of each object"),
        ]

    def _require_upload(self, piece: Piece, place: str) -> None:
        start = piece.at % _UPLOAD_BYTES
        key = f"write/{piece.at - start:012d}"
        piece.require(self.bare_get(Piece(piece.number, key, start, start + BLOCK_BYTES, piece.crc)), place)


def upload_bytes(content: Content) -> int:
    """A quarter, since stores are slow to write; eight objects at least, or what there is."""
    whole = len(content.memory)
    return min(whole, max(whole // 4 - whole // 4 % _UPLOAD_BYTES, 8 * _UPLOAD_BYTES))


_OBSTORE_NAMES = {
    "key": "access_key_id",
    "secret": "secret_access_key",
    "token": "session_token",
    "region": "region",
    "endpoint_url": "endpoint",
    "anon": "skip_signature",
}


def _endpoint(options: Mapping[str, Any]) -> str | None:
    found: str | None = (
        options.get("endpoint_url") or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    )
    return found


def _bare_client(url: str, options: Mapping[str, Any]) -> Any:
    """What the limit uses: obstore with nothing of stoker's around it. Reads the ``AWS_*`` variables by itself."""
    try:
        from obstore.store import S3Store
    except ImportError:
        raise MissingExtra("obstore is not installed", hint="pip install obstore") from None
    unknown = sorted(options.keys() - _OBSTORE_NAMES.keys())
    if unknown:
        hint = f"there are {', '.join(sorted(_OBSTORE_NAMES))}"
        raise ConfigError("no such option in this bench", value=unknown[0], place="--option", hint=hint)
    config = {_OBSTORE_NAMES[name]: value for name, value in options.items() if value is not None}
    endpoint = _endpoint(options)
    if endpoint:
        config["endpoint"] = endpoint
    parts = urlsplit(url)
    with without_secrets(f"s3://{parts.netloc}"):
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/"),
            config=config,  # type: ignore[arg-type]
            client_options={"allow_http": str(endpoint or "").startswith("http://")},
            retry_config={"max_retries": 3},
        )


@contextmanager
def without_secrets(place: str) -> Iterator[None]:
    """Name the kind of the bare client's error only: its text may quote what it was made of."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 - whatever the client raises
        raise StoreError("the store must answer the bare client", value=type(error).__name__, place=place) from None


@contextmanager
def open_bucket(content: Content, url: str | None, options: Mapping[str, Any]) -> Iterator[tuple[Bucket | None, str]]:
    """The store to measure, filled; or None, and the note that says why."""
    if url is None and options:
        raise ConfigError("options of a store need its URL", value=", ".join(sorted(options)), place="--option")
    with ExitStack() as stack:
        if url is None:
            from ..testing.s3 import S3Server

            server = S3Server()
            try:
                stack.enter_context(server)
            except MissingExtra as error:
                yield None, f"the network was not measured: {error}"
                return
            # Ends with its directory: nothing to delete, and after Ctrl-C it may not answer any more.
            bucket = Bucket(content, server.url(), server.storage_options)
        else:
            if urlsplit(url).scheme not in ("s3", "s3a"):
                raise UnsupportedError("this bench measures S3 only", value=urlsplit(url).scheme, place="--url")
            bucket = Bucket(content, url, options)
        stack.callback(bucket.store.close)
        if url is not None:
            stack.callback(bucket.remove)
        bucket.fill()
        yield bucket, ""
