"""A data set in an object store on this machine, and the bare client that limits ask for the same bytes."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from ..errors import CorruptionError, MissingExtra
from ..storage import TieredCache, open_store
from ..storage._checksums import crc32c
from ..storage._posix import shared_memory_directory
from ..storage._units import format_bytes
from ._load_stream import Stream
from ._tiers_content import each
from ._tiers_store import without_secrets

__all__ = [
    "Fetch",
    "ServedSet",
    "best_threads",
    "block_tokens",
    "empty_cache",
    "room_bytes",
    "served",
    "shared_memory_for",
]

_MIB = 1 << 20
_BUCKET = "stoker"
_THREADS = (4, 8, 16, 32)
_LEAST_BLOCK_TOKENS = 1 << 15


def block_tokens(tokens: int, *, parts: int = 64) -> int:
    """Tokens of a block, a power of two: of the usual 4 MiB of uint16, or fewer for at least `parts` blocks.

    >>> block_tokens(1 << 40), block_tokens(1 << 22)
    (2097152, 65536)
    """
    wanted = min(2 << 20, max(_LEAST_BLOCK_TOKENS, tokens // parts))
    return 1 << (wanted.bit_length() - 1)


def room_bytes(size_bytes: int) -> int:
    """A RAM tier for `size_bytes` of tokens: with its headers, and room to spare."""
    return size_bytes + size_bytes // 4 + 16 * _MIB


@dataclass(frozen=True, slots=True)
class Fetch:
    """One ranged GET, and the checksum of what it must bring."""

    key: str
    start: int
    end: int
    crc: int

    def require(self, data: Any, place: str) -> None:
        """Raise CorruptionError unless `data` are these bytes."""
        if len(data) != self.end - self.start or crc32c(data) != self.crc:
            raise CorruptionError(f"{self.key} [{self.start}, {self.end}) must be what was written", place=place)


class ServedSet:
    """A data set in a store, and its files on this machine.

    Attributes:
        stream: its tokens. files: a local copy. url, options: where a loader finds it.
    """

    def __init__(self, stream: Stream, files: Path, url: str, options: Mapping[str, Any]) -> None:
        self.stream, self.files, self.url, self.options = stream, files, url, dict(options)

    def client(self) -> Any:
        """A fresh obstore client with nothing of stoker's around it."""
        from obstore.store import S3Store

        keys = {"key": "access_key_id", "secret": "secret_access_key", "anon": "skip_signature", "region": "region"}
        config = {keys[name]: value for name, value in self.options.items() if name in keys}
        parts = urlsplit(self.url)
        return S3Store(
            parts.netloc,
            prefix=parts.path.strip("/"),
            config={**config, "endpoint": self.options["endpoint_url"]},  # type: ignore[arg-type]
            client_options={"allow_http": True},
        )

    def get(self, client: Any, fetch: Fetch) -> memoryview:
        """The bytes, unchecked."""
        import obstore

        with without_secrets(fetch.key):
            return memoryview(obstore.get_range(client, fetch.key, start=fetch.start, end=fetch.end))

    def fetches(self, act: Callable[[Mapping[str, Any]], object]) -> list[Fetch]:
        """What `act` asks the store for, each range once: it gets storage options that lead through a proxy."""
        from ..testing.proxy import FaultProxy

        with FaultProxy(str(self.options["endpoint_url"])) as proxy:
            act({**self.options, "endpoint_url": proxy.endpoint_url})
            asked = [(request.path, request.byte_range) for request in proxy.requests if request.method == "GET"]
        return [self._fetch(path, span) for path, span in dict.fromkeys(asked)]

    def _fetch(self, path: str, span: tuple[int, int] | None) -> Fetch:
        root = urlsplit(self.url)
        key = unquote(urlsplit(path).path).strip("/").removeprefix(f"{root.netloc}{root.path}".rstrip("/") + "/")
        data = (self.files / key).read_bytes() if span is None else b""
        start, end = span or (0, len(data))
        if span is not None:
            with (self.files / key).open("rb") as file:
                file.seek(start)
                data = file.read(end - start)
        return Fetch(key, start, start + len(data), crc32c(data))


def best_threads(fetches: Sequence[Fetch], act: Callable[[Fetch], object]) -> int:
    """How many threads do all of them fastest."""
    seconds = {}
    for threads in (_THREADS[-1], *_THREADS):  # the first time pays for the connections, and is overwritten
        seconds[threads] = each(fetches, threads, act)
    return min(seconds, key=seconds.__getitem__)


@contextmanager
def served(stream: Stream, directory: Path, **options: Any) -> Iterator[tuple[ServedSet | None, str]]:
    """`stream` as a data set on an S3 server; or None, and the note that says why. `options` are those of the writer."""
    from ..testing.s3 import S3Server

    files = directory / "served"
    with ExitStack() as stack:
        server = S3Server(buckets=(_BUCKET,))
        try:
            stack.enter_context(server)
        except MissingExtra as error:
            yield None, f"was not measured: {error}"
            return
        stack.callback(shutil.rmtree, files, ignore_errors=True)
        stream.write(files, **options)
        url = server.url(_BUCKET, "set")
        with open_store(url, **server.storage_options) as store:
            for path in sorted(path for path in files.rglob("*") if path.is_file()):
                store.put(str(path.relative_to(files)), path.read_bytes())
        yield ServedSet(stream, files, url, server.storage_options), ""


@contextmanager
def shared_memory_for(size_bytes: int) -> Iterator[tuple[Path | None, str]]:
    """A directory in shared memory with so much room, gone afterwards; or None, and the note that says why."""
    try:
        parent = shared_memory_directory()
        free = shutil.disk_usage(parent).free
    except OSError as error:
        yield None, f"was not measured: {error}"
        return
    if free < size_bytes:
        yield None, f"was not measured: {format_bytes(size_bytes)} must be free in {parent}, got {format_bytes(free)}"
        return
    with tempfile.TemporaryDirectory(prefix="bench-", dir=parent) as name:
        yield Path(name), ""


@contextmanager
def empty_cache(tier: Path, ram_bytes: int) -> Iterator[TieredCache]:
    """A cache that holds nothing, gone afterwards with all that came into it."""
    try:
        with TieredCache(ram=ram_bytes, ram_path=tier) as cache:
            yield cache
    finally:
        shutil.rmtree(tier, ignore_errors=True)
