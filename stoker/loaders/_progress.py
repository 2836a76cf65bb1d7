"""What a writer leaves behind for its successor: one small record for each finished shard, gone with the manifest."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import AlreadyExists, ConfigError, CorruptBlock, CorruptRecord, UnknownVersion
from ..storage._checksums import crc32c
from ..storage._units import Buffer
from ..storage.store import ObjectStore
from .format import MAJOR, PROGRESS_PREFIX, TokenDtype, shard_key

__all__ = ["OpenDocument", "ShardRecord", "WriterOptions", "clear_progress", "create_once", "load_progress"]

_OPTIONS_KEY = f"{PROGRESS_PREFIX}writer.json"
_RECORD = re.compile(re.escape(PROGRESS_PREFIX) + r"(\d{8})\.json")


class OpenDocument(NamedTuple):
    """A document that goes on after the end of a shard.

    Attributes:
        tokens: all its tokens. written: those in shards so far. crc32c: of those, as stored.
    """

    tokens: int
    written: int
    crc32c: int


@dataclass(frozen=True, kw_only=True)
class WriterOptions:
    """What must stay the same when another writer goes on."""

    dtype: TokenDtype
    eos_id: int | None
    block_tokens: int
    shard_tokens: int
    tokenizer: str | None


@dataclass(frozen=True, kw_only=True)
class ShardRecord:
    """All that the tables need to know of a finished shard, but the document lengths, which its file holds.

    Attributes:
        tokens, file_bytes, sha256: of the data file. tokens_start: byte offset of its first token.
        documents: that start in it. continued: whether the first row belongs to a document of the shard before.
        offsets_start, offsets_crc32c: byte offset and checksum of the row offsets, ``rows + 1`` int64.
        crcs, first_tokens: of each block.
        open_document: the document of the last row, if it goes on in the next shard.
    """

    tokens: int
    file_bytes: int
    sha256: str
    tokens_start: int
    documents: int
    continued: bool
    offsets_start: int
    offsets_crc32c: int
    crcs: list[int]
    first_tokens: list[int]
    open_document: OpenDocument | None

    def encode(self) -> bytes:
        return _encode(asdict(self) | {"open_document": self.open_document and self.open_document._asdict()})

    @classmethod
    def decode(cls, data: Buffer, place: str) -> Self:
        body = _decode(data, place)
        if body["open_document"] is not None:
            body["open_document"] = OpenDocument(**body["open_document"])
        return cls(**body)

    def read_offsets(self, store: ObjectStore, number: int) -> NDArray[np.int64]:
        """Where each row of the shard starts, in tokens from its first, and where the last ends; from its file."""
        start, end = self.offsets_start, self.offsets_start + 8 * (self.documents + self.continued + 1)
        data = store.get(shard_key(number), start, end)
        got = crc32c(data)
        if got != self.offsets_crc32c:
            raise CorruptBlock(store.place(shard_key(number)), start, end, self.offsets_crc32c, got)
        return np.frombuffer(data, "<i8")

    def lengths(self, offsets: NDArray[np.int64]) -> NDArray[np.uint32]:
        """Tokens of each document that starts in the shard, also those that stand in later shards."""
        lengths = np.diff(offsets)[int(self.continued) :].astype(np.uint32)
        if self.open_document is not None and self.documents:
            lengths[-1] = self.open_document.tokens
        return lengths


def _encode(body: dict[str, Any]) -> bytes:
    body = {"version": MAJOR, **body}
    return json.dumps({**body, "sha256_of_this": _digest(body)}).encode()


def _decode(data: Buffer, place: str) -> dict[str, Any]:
    try:
        body = json.loads(bytes(data))
        digest, version = body.pop("sha256_of_this"), body["version"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptRecord("a progress record must be JSON with a digest", value=str(error), place=place) from error
    if version != MAJOR:
        raise UnknownVersion(
            f"this version of stoker goes on with progress of version {MAJOR}", value=version, place=place
        )
    if digest != _digest(body):
        raise CorruptRecord("a progress record must match its own SHA-256", value=str(digest), place=place)
    del body["version"]
    return dict(body)


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def record_key(number: int) -> str:
    """The progress record of shard `number`."""
    return f"{PROGRESS_PREFIX}{number:08d}.json"


def create_once(store: ObjectStore, key: str, data: bytes) -> None:
    """Create an object; one's own from an attempt whose reply was lost is success.

    Raises:
        AlreadyExists: there is another one.
    """
    try:
        store.create(key, data)
    except AlreadyExists:
        if bytes(store.get(key)) != data:
            raise


def claim(store: ObjectStore, options: WriterOptions, *, resume: bool) -> list[ShardRecord]:
    """Take a root for writing; returns what an earlier writer has finished there.

    Raises:
        AlreadyExists: an unfinished data set, and `resume` is False.
        ConfigError: the options differ from those it was begun with.
    """
    data = _encode(asdict(options))
    try:
        store.create(_OPTIONS_KEY, data)
        return []
    except AlreadyExists as error:
        if not resume:
            raise AlreadyExists(
                "another writer is at work here or was stopped",
                place=store.url,
                hint="if it was stopped, go on with resume=True (--resume), or delete the directory to start over",
            ) from error
    before = _decode(store.get(_OPTIONS_KEY), store.place(_OPTIONS_KEY))
    for name, value in asdict(options).items():
        if before.get(name) != value:
            raise ConfigError(
                f"{name} must be the {before.get(name)!r} that writing began with", value=str(value), place=store.url
            )
    return load_progress(store, options.shard_tokens)


def load_progress(store: ObjectStore, shard_tokens: int) -> list[ShardRecord]:
    """The records of finished shards, in order; an unfull last shard, which more documents would fill, is not one."""
    records: list[ShardRecord] = []
    for info in store.list(PROGRESS_PREFIX):
        match = _RECORD.fullmatch(info.key)
        if match is None:
            continue
        if int(match[1]) != len(records):
            raise CorruptRecord("progress records must follow each other", value=info.key, place=store.url)
        record = ShardRecord.decode(store.get(info.key), store.place(info.key))
        if record.tokens < shard_tokens:
            store.delete(info.key)
            break
        records.append(record)
    return records


def clear_progress(store: ObjectStore) -> None:
    """Remove all records."""
    for info in list(store.list(PROGRESS_PREFIX)):
        store.delete(info.key)
