"""How whole objects travel: with obstore's async multipart, or by the blocking calls of any store in threads."""

import asyncio
import hashlib
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import ConfigError, ObjectChanged, StokerError, UnsupportedError
from ..metrics import counters
from ._async import to_the_end
from ._units import Buffer, format_bytes
from .store import ObjectInfo, ObjectStore

if TYPE_CHECKING:
    from .remote import RemoteStore

__all__ = ["MIN_PART_BYTES", "ContentTag", "Transfer", "make_transfer"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

MIN_PART_BYTES = 5 * 2**20
"""S3 refuses a smaller part, but for the last one."""

_MAX_PARTS = 10_000  # of one upload, S3's limit: https://docs.aws.amazon.com/AmazonS3/latest/userguide/qfacts.html
_PARTS_IN_FLIGHT = 8  # of one file. A guess, not measured.
_CONTENT_TAG = re.compile(r'"[0-9a-f]{32}(-(\d+))?"')


class Transfer(ABC):
    """The far end of a drain: sends whole objects to a store and fetches parts of them.

    Attributes:
        part_bytes: how much is read, sent or fetched at a time; more only for objects of more than 10 000 parts.
        parts_in_flight: of one object.
    """

    def __init__(self, store: ObjectStore, *, budget_bytes: int, part_bytes: int) -> None:
        if part_bytes < MIN_PART_BYTES:
            raise ConfigError(f"part_bytes must be >= {MIN_PART_BYTES}", value=part_bytes, place="drain")
        if budget_bytes < 3 * part_bytes:
            raise ConfigError(
                f"budget_bytes must hold three parts of {format_bytes(part_bytes)}", value=budget_bytes, place="drain"
            )
        self._store = store
        self._budget_bytes = budget_bytes
        self.part_bytes = part_bytes
        self.parts_in_flight = min(_PARTS_IN_FLIGHT, budget_bytes // part_bytes - 2)

    def part_bytes_of(self, size_bytes: int) -> int:
        """Bytes of each part but the last of an object that is sent."""
        needed = -(-size_bytes // _MAX_PARTS)
        return max(self.part_bytes, -(-needed // 2**20) * 2**20)

    def window_bytes(self, size_bytes: int) -> int:
        """Most memory that sending an object of `size_bytes` takes at any moment.

        Raises:
            ConfigError: more than the budget.
        """
        part = self.part_bytes_of(size_bytes)
        window = size_bytes if size_bytes <= part else min(size_bytes + part, self._window_parts(part) * part)
        if window > self._budget_bytes:
            raise ConfigError(
                f"an object of {format_bytes(size_bytes)} needs a budget of {format_bytes(window)}",
                value=format_bytes(self._budget_bytes),
                place="drain",
                hint="pass a larger budget_bytes",
            )
        return window

    @abstractmethod
    def _window_parts(self, part_bytes: int) -> int:
        """How many parts of one object are in memory at once, at most."""

    @abstractmethod
    async def send(self, key: str, size_bytes: int, pieces: AsyncIterator[memoryview]) -> None:
        """Store an object of `pieces`, each one part long but the last. An error or a cancellation publishes nothing."""

    @abstractmethod
    async def fetch(self, info: ObjectInfo, start: int, end: int) -> Buffer:
        """Bytes ``[start, end)`` of that very version, or ObjectChanged."""


def make_transfer(store: ObjectStore, *, budget_bytes: int, part_bytes: int) -> Transfer:
    """The best way to `store`.

    Raises:
        UnsupportedError: in a forked child, where obstore's runtime is dead.
        ConfigError: parts that are too small, or a budget that can't hold three of them.
    """
    from .remote import RemoteStore

    if isinstance(store, RemoteStore):
        return _ObstoreTransfer(store, budget_bytes=budget_bytes, part_bytes=part_bytes)
    return _ThreadTransfer(store, budget_bytes=budget_bytes, part_bytes=part_bytes)


class _ThreadTransfer(Transfer):
    def _window_parts(self, part_bytes: int) -> int:
        return 2  # the piece that is written, and one more for a store that buffers

    async def send(self, key: str, size_bytes: int, pieces: AsyncIterator[memoryview]) -> None:
        opening = asyncio.to_thread(self._store.open_writer, key, size_bytes)
        writer = await to_the_end(opening, undo=lambda unused: unused.abort())
        try:
            offset = 0
            async for piece in pieces:
                await to_the_end(asyncio.to_thread(writer.write_at, offset, piece))
                offset += len(piece)
            await to_the_end(asyncio.to_thread(writer.commit))
        finally:
            await to_the_end(asyncio.to_thread(writer.abort))

    async def fetch(self, info: ObjectInfo, start: int, end: int) -> Buffer:
        buffer = bytearray(end - start)
        view = memoryview(buffer)
        await to_the_end(asyncio.to_thread(self._store.get_into, info.key, view, start, version=info.version))
        return view


class _ObstoreTransfer(Transfer):
    """obstore's own runtime does the work, and repeats what fails for a moment."""

    _store: "RemoteStore"

    def __init__(self, store: "RemoteStore", *, budget_bytes: int, part_bytes: int) -> None:
        super().__init__(store, budget_bytes=budget_bytes, part_bytes=part_bytes)
        self._client = store.client  # refused in a forked child

    def _window_parts(self, part_bytes: int) -> int:
        # Those on their way, the one that the client's writer fills, and the one that is copied into it.
        return self._in_flight(part_bytes) + 2

    def _in_flight(self, part_bytes: int) -> int:
        return max(1, min(self.parts_in_flight, self._budget_bytes // part_bytes - 2))

    async def send(self, key: str, size_bytes: int, pieces: AsyncIterator[memoryview]) -> None:
        part = self.part_bytes_of(size_bytes)
        if self._store.url.startswith(("http://", "https://")):
            raise UnsupportedError("an http(s) URL is read-only", place=self._store.place(key))
        if size_bytes <= part:
            await self._send_at_once(key, pieces)
            counters.add("store.put.requests")
        else:
            await self._send_in_parts(key, part, pieces)
            counters.add("store.put.requests", 2 + -(-size_bytes // part))
        counters.add("store.put.bytes", size_bytes)

    async def _send_at_once(self, key: str, pieces: AsyncIterator[memoryview]) -> None:
        import obstore

        whole = [piece async for piece in pieces]  # to the end: its last step checks what was read
        data = whole[0] if whole else b""
        await self._typed(key, to_the_end(obstore.put_async(self._client, key, data, use_multipart=False)))

    async def _send_in_parts(self, key: str, part_bytes: int, pieces: AsyncIterator[memoryview]) -> None:
        import obstore

        file = obstore.open_writer_async(
            self._client, key, buffer_size=part_bytes, max_concurrency=self._in_flight(part_bytes)
        )
        try:
            # To the end each: a write that is cancelled while it begins the upload leaves one that nobody can abort.
            async for piece in pieces:
                await self._typed(key, to_the_end(file.write(piece)))
        except BaseException:
            await self._abort(key, file)
            raise
        await self._typed(key, to_the_end(file.close()))  # aborts by itself what it can't complete

    async def _abort(self, key: str, file: Any) -> None:
        try:
            await to_the_end(file.__aexit__(RuntimeError, RuntimeError("aborted"), None))
        except Exception as error:  # noqa: BLE001 - the error that led here is the one to raise
            logger.warning(
                "%s: parts of an unfinished upload may be left (%s); a lifecycle rule of the bucket removes them",
                self._store.place(key),
                type(error).__name__,
            )

    async def fetch(self, info: ObjectInfo, start: int, end: int) -> Buffer:
        import obstore

        options: Any = {"range": (start, end)}
        # A weak tag never matches If-Match (RFC 9110, 8.8.3.2); it is compared with the reply's below.
        if info.version.startswith('"'):
            options["if_match"] = info.version
        counters.add("store.get.requests")
        result = await self._typed(info.key, obstore.get_async(self._client, info.key, options=options))
        data: Buffer = memoryview(await self._typed(info.key, result.bytes_async()))
        counters.add("store.get.bytes", len(data))
        meta = result.meta
        # Plain HTTP servers may send no tag. Then time and length are the best there is.
        tag = meta["e_tag"]
        same = tag == info.version if tag else meta["last_modified"].timestamp() == info.modified_s
        if not same or meta["size"] != info.size or result.range != (start, end) or len(data) != end - start:
            raise ObjectChanged(
                f"must still be version {info.version}", value=str(tag), place=self._store.place(info.key)
            )
        return data

    async def _typed(self, key: str, request: Awaitable[T]) -> T:
        try:
            return await request
        except (StokerError, asyncio.CancelledError):
            raise
        except Exception as error:  # noqa: BLE001 - whatever the client raises; its text may hold bodies and dumps
            from ._remote_errors import RangeNotSatisfiable, typed_error

            typed = typed_error(error, self._store.place(key), self._store.url)
            if isinstance(typed, RangeNotSatisfiable):
                typed = ObjectChanged("must be as long as it was", place=self._store.place(key))
            raise typed from None


class ContentTag:
    """What S3 answers as ETag for content that it does not encrypt with KMS: its MD5, or the MD5 of its parts' MD5s.

    https://docs.aws.amazon.com/AmazonS3/latest/userguide/checking-object-integrity.html
    """

    def __init__(self, size_bytes: int, part_bytes: int) -> None:
        self._num_parts = max(1, -(-size_bytes // part_bytes))
        self._digests: list[bytes] = []

    def add(self, part: Buffer) -> None:
        """The next part, whole."""
        self.add_digest(hashlib.md5(part, usedforsecurity=False).digest())

    def add_digest(self, digest: bytes) -> None:
        """The MD5 of the next part."""
        self._digests.append(digest)

    def tells(self, version: str) -> bool:
        """Whether an object of that version and of these parts has a tag to compare with."""
        found = _CONTENT_TAG.fullmatch(version)
        return found is not None and int(found[2] or 1) == self._num_parts

    def verdict(self, version: str) -> bool | None:
        """Whether an object of that version holds this content; None if its version does not tell."""
        if not self.tells(version):
            return None
        digests = self._digests or [hashlib.md5(b"", usedforsecurity=False).digest()]
        if "-" not in version:
            return version == f'"{digests[0].hex()}"'
        whole = hashlib.md5(b"".join(digests), usedforsecurity=False).hexdigest()
        return version == f'"{whole}-{len(digests)}"'
