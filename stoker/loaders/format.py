"""Token data set v1: the names, the manifest and the tables. ``docs/formats.md`` states the bytes.

::

    manifest.json          the only truth, created last and exclusively: totals, geometry, digests of the tables
    shards.arrow           one row per shard: what stands before it, where its slices of tables are, its file's digest
    blocks.arrow           one row per block of 2^k tokens, one record batch per shard
    lengths.arrow          one row per document, one record batch per shard: the shard in which the document starts
    data/{n:08d}.arrow     the tokens: column input_ids, one row one document, one record batch

Everything here is pure: bytes in, values out. Integers are little-endian, as Arrow files are.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal, NamedTuple, Self, TypeAlias, cast, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import ConfigError, CorruptRecord, FormatError, UnknownVersion
from ..storage._units import Buffer

__all__ = [
    "BLOCKS_KEY",
    "FORMAT",
    "LENGTHS_KEY",
    "MAJOR",
    "MANIFEST_KEY",
    "SHARDS_KEY",
    "BlockTable",
    "Manifest",
    "ShardDocuments",
    "ShardFiles",
    "ShardTable",
    "ShardsInfo",
    "TableInfo",
    "TokenDtype",
    "shard_key",
]

FORMAT = "stoker-token-data-set"
MAJOR = 1
MANIFEST_KEY = "manifest.json"
SHARDS_KEY = "shards.arrow"
BLOCKS_KEY = "blocks.arrow"
LENGTHS_KEY = "lengths.arrow"
DATA_PREFIX = "data/"
PROGRESS_PREFIX = "progress/"

BLOCK_BYTES = 4 << 20
"""Default size of a block: one ranged GET that a store serves at full speed, checked in 0.3 ms."""

MAX_BLOCK_BYTES = 64 << 20
"""Far below the 256 MiB up to which CRC32C keeps its Hamming distance."""

MAX_DOCUMENT_TOKENS = 2**32 - 1

TokenDtype: TypeAlias = Literal["uint16", "uint32"]
"""How tokens are stored."""

ARROW_TOKEN_TYPE = {"uint16": pa.uint16(), "uint32": pa.uint32()}
_MARK: dict[bytes | str, bytes | str] = {b"stoker.token-data-set": str(MAJOR).encode()}


def shard_key(number: int) -> str:
    """The object that holds shard `number`.

    >>> shard_key(7)
    'data/00000007.arrow'
    """
    return f"{DATA_PREFIX}{number:08d}.arrow"


def shard_schema(dtype: TokenDtype) -> pa.Schema:
    """The schema of a data file. `continues` marks a document whose rest is the first row of the next shard."""
    tokens = pa.large_list(pa.field("item", ARROW_TOKEN_TYPE[dtype], nullable=False))
    return pa.schema(
        [pa.field("input_ids", tokens, nullable=False), pa.field("continues", pa.bool_(), nullable=False)],
        metadata=_MARK,
    )


def _table_schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in columns.items()], metadata=_MARK)


# In three parts: what opening a set reads, what the borders of documents take, what only a full check needs.
SHARDS_SCHEMA = _table_schema(
    tokens_before=pa.int64(),
    tokens_start=pa.int64(),
    file_bytes=pa.int64(),
    blocks_start=pa.int64(),
    blocks_crc32c=pa.uint32(),
    documents_before=pa.int64(),
    lengths_start=pa.int64(),
    lengths_crc32c=pa.uint32(),
    continued=pa.bool_(),
    sha256=pa.binary(32),
)
BLOCKS_SCHEMA = _table_schema(
    crc32c=pa.uint32(), first_token=pa.uint32(), first_doc=pa.int64(), first_doc_offset=pa.int64()
)
LENGTHS_SCHEMA = _table_schema(length=pa.uint32())


class TableInfo(NamedTuple):
    """Size and SHA-256 (hexadecimal) of a table's file."""

    bytes: int
    sha256: str


class ShardsInfo(NamedTuple):
    """What the manifest says of ``shards.arrow``, two parts of which are read and checked by themselves.

    Attributes:
        bytes, sha256: of the file, as in :class:`TableInfo`.
        places_start, places_crc32c: byte offset and checksum of the columns of :class:`ShardTable`.
        documents_start, documents_crc32c: the same for those of :class:`ShardDocuments`.
    """

    bytes: int
    sha256: str
    places_start: int
    places_crc32c: int
    documents_start: int
    documents_crc32c: int


class Fingerprint:
    """What makes two data sets the same: tokens, document lengths and the geometry of blocks, nothing else.

    Neither names, places nor the cut into shards enter. Feed the shards in order.
    """

    def __init__(self) -> None:
        self._blocks, self._lengths = hashlib.sha256(), hashlib.sha256()

    def update(self, crcs: NDArray[np.uint32], lengths: NDArray[np.uint32]) -> None:
        """Add the block checksums and the document lengths of the next shard."""
        self._blocks.update(crcs.astype("<u4").tobytes())
        self._lengths.update(lengths.astype("<u4").tobytes())

    def hexdigest(self, *, dtype: TokenDtype, documents: int, tokens: int, block_tokens: int) -> str:
        header = f"{FORMAT} {MAJOR} {dtype} {documents} {tokens} {block_tokens} "
        text = header + f"{self._blocks.hexdigest()} {self._lengths.hexdigest()}"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """The root of a data set: a few hundred bytes, however large the set.

    Attributes:
        dtype: of the stored tokens.
        eos_id: the token that ends each document, or None if they are stored as given.
        tokenizer: identity of what made the tokens (a digest or a name), if known.
        documents, tokens, shards, blocks: totals.
        block_tokens: tokens in a block, a power of two; each shard but the last holds whole blocks.
        order_blocks: blocks in an order block, the unit that a shuffle window is made of.
        shards_table, blocks_table, lengths_table: size and digest of the tables.
        fingerprint: identity of the content, see :class:`Fingerprint`.
    """

    dtype: TokenDtype
    eos_id: int | None
    tokenizer: str | None
    documents: int
    tokens: int
    shards: int
    blocks: int
    block_tokens: int
    order_blocks: int
    shards_table: ShardsInfo
    blocks_table: TableInfo
    lengths_table: TableInfo
    fingerprint: str

    @property
    def itemsize(self) -> int:
        """Bytes of a stored token."""
        return int(np.dtype(self.dtype).itemsize)

    @property
    def block_bytes(self) -> int:
        """Bytes of a whole block."""
        return self.block_tokens * self.itemsize

    def encode(self) -> bytes:
        """The file: JSON that ends with the SHA-256 of everything else in it."""
        body: dict[str, Any] = {"format": FORMAT, "version": MAJOR}
        for field in fields(self):
            value = getattr(self, field.name)
            body[field.name] = value._asdict() if isinstance(value, TableInfo | ShardsInfo) else value
        return json.dumps({**body, "sha256": _self_digest(body)}, indent=1).encode() + b"\n"

    @classmethod
    def decode(cls, data: Buffer, place: str) -> Self:
        """Parse and check a manifest.

        Raises:
            UnknownVersion: a newer major version.
            CorruptRecord: damaged.
            FormatError: not a manifest of this format.
        """
        try:
            body = json.loads(bytes(data))
        except ValueError as error:
            raise CorruptRecord("a manifest must be JSON", value=str(error), place=place) from error
        if not isinstance(body, dict) or body.get("format") != FORMAT:
            found = body.get("format") if isinstance(body, dict) else type(body).__name__
            raise FormatError(f"the format must be {FORMAT}", value=str(found), place=place)
        if body.get("version") != MAJOR:
            raise UnknownVersion(
                f"this version of stoker reads {FORMAT} version {MAJOR}",
                value=body.get("version"),
                place=place,
                hint="upgrade stoker",
            )
        digest = body.pop("sha256", None)
        if digest != _self_digest(body):
            raise CorruptRecord("the manifest must match its own SHA-256", value=str(digest), place=place)
        del body["format"], body["version"]
        names = {field.name for field in fields(cls)}
        if set(body) != names:
            raise FormatError(
                "a manifest has exactly the fields of its version",
                value=", ".join(sorted(set(body) ^ names)),
                place=place,
            )
        for name, kind in (("shards_table", ShardsInfo), ("blocks_table", TableInfo), ("lengths_table", TableInfo)):
            if not isinstance(body[name], dict) or set(body[name]) != set(kind._fields):
                raise FormatError(f"{name} must have {' and '.join(kind._fields)}", value=str(body[name]), place=place)
            body[name] = kind(**body[name])
        manifest = cls(**body)
        manifest._check(place)
        return manifest

    def _check(self, place: str) -> None:
        # The digest says that the file is what its writer wrote; this, that the writer made sense.
        counts = (self.documents, self.tokens, self.shards, self.blocks, self.block_tokens, self.order_blocks)
        if (
            self.dtype not in get_args(TokenDtype)
            or not all(isinstance(count, int) and count > 0 for count in counts)
            or self.block_tokens & (self.block_tokens - 1)
            or self.blocks != -(-self.tokens // self.block_tokens)
            or not self._parts_fit()
        ):
            raise FormatError("the manifest's numbers must fit together", value=str(counts), place=place)

    def _parts_fit(self) -> bool:
        info = self.shards_table
        numbers = (info.bytes, info.places_start, info.documents_start)
        return (
            all(isinstance(number, int) for number in numbers)
            and info.places_start >= 0
            and info.places_start + ShardTable.size_bytes(self.shards) <= info.documents_start
            and info.documents_start + ShardDocuments.size_bytes(self.shards) <= info.bytes
        )


def _self_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def packed_offsets(kinds: Sequence[str], rows: int) -> tuple[int, ...]:
    """Where columns start in the body of a record batch, and where the last one ends: Arrow pads each to 8 bytes.

    >>> packed_offsets(("<u4", "<i8"), 3)
    (0, 16, 40)
    """
    ends = accumulate(-(-rows * np.dtype(kind).itemsize // 8) * 8 for kind in kinds)
    return (0, *ends)


def _unpacked(data: Buffer, kinds: Sequence[str], rows: int) -> list[NDArray[Any]]:
    starts = packed_offsets(kinds, rows)[:-1]
    return [np.frombuffer(data, kind, rows, start) for kind, start in zip(kinds, starts, strict=True)]


class ShardTable(NamedTuple):
    """Of ``shards.arrow``, what opening a data set reads: where tokens are. Arrays have one entry per shard.

    Attributes:
        tokens_before: tokens in earlier shards.
        tokens_start: byte offset of the first token in the data file; the tokens follow without a gap.
        file_bytes: size of the data file.
        blocks_start, blocks_crc32c: where the shard's rows stand in ``blocks.arrow``, and their checksum.
    """

    tokens_before: NDArray[np.int64]
    tokens_start: NDArray[np.int64]
    file_bytes: NDArray[np.int64]
    blocks_start: NDArray[np.int64]
    blocks_crc32c: NDArray[np.uint32]

    @staticmethod
    def size_bytes(shards: int) -> int:
        """Of the columns, as they stand in the file."""
        return packed_offsets(_SHARD_KINDS, shards)[-1]

    @classmethod
    def decode(cls, data: Buffer, manifest: Manifest, place: str) -> Self:
        """The columns, as views of `data`, which has been checked.

        Raises:
            FormatError: numbers that don't fit together.
        """
        table = cls(*_unpacked(data, _SHARD_KINDS, manifest.shards))
        # All that a search needs to be right. What is read of one shard is looked at when it is.
        before = table.tokens_before
        if (
            before[0] != 0
            or before[-1] >= manifest.tokens
            or int(np.bitwise_or.reduce(before)) & (manifest.block_tokens - 1)
            or not (before[1:] > before[:-1]).all()
        ):
            raise FormatError("the shard table must fit the manifest", value=f"{len(before)} shards", place=place)
        return table


class ShardDocuments(NamedTuple):
    """Of ``shards.arrow``, what the borders of documents take. Arrays have one entry per shard.

    Attributes:
        documents_before: documents that start in earlier shards.
        lengths_start, lengths_crc32c: where the shard's rows stand in ``lengths.arrow``, and their checksum.
    """

    documents_before: NDArray[np.int64]
    lengths_start: NDArray[np.int64]
    lengths_crc32c: NDArray[np.uint32]

    @staticmethod
    def size_bytes(shards: int) -> int:
        """Of the columns, as they stand in the file."""
        return packed_offsets(_DOCUMENT_KINDS, shards)[-1]

    @classmethod
    def decode(cls, data: Buffer, manifest: Manifest, place: str) -> Self:
        """The columns, as views of `data`, which has been checked.

        Raises:
            FormatError: numbers that don't fit together.
        """
        table = cls(*_unpacked(data, _DOCUMENT_KINDS, manifest.shards))
        before = table.documents_before
        if before[0] != 0 or before[-1] > manifest.documents or (before[1:] < before[:-1]).any():
            raise FormatError("the shard table must fit the manifest", value=f"{len(before)} shards", place=place)
        return table


class ShardFiles(NamedTuple):
    """Of ``shards.arrow``, what only a check of whole data files needs. Arrays have one entry per shard.

    Attributes:
        continued: whether the first row goes on with a document of the shard before.
        sha256: digest of the data file; rows of 32 bytes.
    """

    continued: NDArray[np.bool_]
    sha256: NDArray[np.uint8]

    @classmethod
    def decode(cls, data: Buffer, manifest: Manifest, place: str) -> Self:
        """From the whole file, which is checked.

        Raises:
            CorruptRecord: damaged.
            FormatError: another schema.
        """
        check_digest(data, manifest.shards_table, place)
        table = read_arrow(data, SHARDS_SCHEMA, place)
        if table.num_rows != manifest.shards:
            raise FormatError(f"the table must have {manifest.shards} rows", value=table.num_rows, place=place)
        digests: Any = table.column("sha256").chunk(0)
        return cls(
            table.column("continued").to_numpy(),
            np.frombuffer(digests.buffers()[1], np.uint8, 32 * len(digests)).reshape(-1, 32),
        )


_SHARD_KINDS = ("<i8", "<i8", "<i8", "<i8", "<u4")
_DOCUMENT_KINDS = ("<i8", "<i8", "<u4")
_BLOCK_KINDS = ("<u4", "<u4", "<i8", "<i8")


class BlockTable(NamedTuple):
    """The rows of ``blocks.arrow`` for one shard.

    Attributes:
        crc32c: of the block's bytes. first_token: its first token.
        first_doc: the document of that token, counted from 0 over the whole set.
        first_doc_offset: that token's place in the document, in tokens.
    """

    crc32c: NDArray[np.uint32]
    first_token: NDArray[np.uint32]
    first_doc: NDArray[np.int64]
    first_doc_offset: NDArray[np.int64]

    @staticmethod
    def size_bytes(num_blocks: int) -> int:
        """Of a shard's rows, as they stand in the file.

        >>> BlockTable.size_bytes(3)
        80
        """
        return packed_offsets(_BLOCK_KINDS, num_blocks)[-1]

    @classmethod
    def decode(cls, data: Buffer, num_blocks: int) -> Self:
        """The columns of one record batch body, as views of `data`."""
        return cls(*_unpacked(data, _BLOCK_KINDS, num_blocks))


def check_digest(data: Buffer, info: TableInfo | ShardsInfo, place: str) -> None:
    """Raise CorruptRecord unless `data` is the table that the manifest means."""
    if len(data) != info.bytes:
        raise CorruptRecord(f"the table must have {info.bytes} bytes", value=len(data), place=place)
    found = hashlib.sha256(data).hexdigest()
    if found != info.sha256:
        raise CorruptRecord(f"the table must have SHA-256 {info.sha256}", value=found, place=place)


def read_arrow(data: Buffer, schema: pa.Schema, place: str) -> pa.Table:
    """An Arrow file of exactly `schema` from memory, without a copy.

    Raises:
        FormatError: not an Arrow file, or of another schema.
    """
    try:
        table = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        table.validate()
    except (pa.ArrowInvalid, OSError) as error:
        raise FormatError("must be an Arrow IPC file", value=str(error), place=place) from error
    if not table.schema.equals(schema):
        found = ", ".join(f"{field.name}: {field.type}" for field in table.schema)
        raise FormatError("must have the columns of the format", value=found, place=place)
    return table.combine_chunks()


def check_token_dtype(dtype: str, place: str) -> TokenDtype:
    """`dtype` itself if tokens can be stored so."""
    if dtype not in get_args(TokenDtype):
        raise ConfigError("dtype is 'uint16' or 'uint32'", value=dtype, place=place)
    return cast(TokenDtype, dtype)


def default_block_tokens(dtype: TokenDtype) -> int:
    """Tokens of a block of :data:`BLOCK_BYTES`.

    >>> default_block_tokens("uint16")
    2097152
    """
    return BLOCK_BYTES // int(np.dtype(dtype).itemsize)
