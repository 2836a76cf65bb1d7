"""Token data set v1: the names, the manifest and the tables. ``docs/formats.md`` states the bytes.

::

    manifest.json          the only truth, created last and exclusively: totals, geometry, digests of the tables
    shards.arrow           one row per shard: what stands before it, its file's digest, where its slices of tables are
    blocks.arrow           one row per block of 2^k tokens, one record batch per shard
    lengths.arrow          one row per document, one record batch per shard: the shard in which the document starts
    data/{n:08d}.arrow     the tokens: column input_ids, one row one document, one record batch

Everything here is pure: bytes in, values out. Integers are little-endian, as Arrow files are.
"""

import hashlib
import json
from dataclasses import dataclass, fields
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
    "ShardTable",
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


SHARDS_SCHEMA = _table_schema(
    documents_before=pa.int64(),
    tokens_before=pa.int64(),
    continued=pa.bool_(),
    file_bytes=pa.int64(),
    sha256=pa.binary(32),
    tokens_start=pa.int64(),
    blocks_start=pa.int64(),
    blocks_crc32c=pa.uint32(),
    lengths_start=pa.int64(),
    lengths_crc32c=pa.uint32(),
)
BLOCKS_SCHEMA = _table_schema(
    crc32c=pa.uint32(), first_token=pa.uint32(), first_doc=pa.int64(), first_doc_offset=pa.int64()
)
LENGTHS_SCHEMA = _table_schema(length=pa.uint32())


class TableInfo(NamedTuple):
    """Size and SHA-256 (hexadecimal) of a table's file."""

    bytes: int
    sha256: str


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
    shards_table: TableInfo
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
            body[field.name] = value._asdict() if isinstance(value, TableInfo) else value
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
        for name in ("shards_table", "blocks_table", "lengths_table"):
            if not isinstance(body[name], dict) or set(body[name]) != set(TableInfo._fields):
                raise FormatError(f"{name} must have bytes and sha256", value=str(body[name]), place=place)
            body[name] = TableInfo(**body[name])
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
        ):
            raise FormatError("the manifest's numbers must fit together", value=str(counts), place=place)


def _self_digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardTable:
    """``shards.arrow`` in memory. Arrays have one entry per shard; the two `*_before` one more, the total.

    Attributes:
        documents_before: documents that start in earlier shards. tokens_before: tokens in earlier shards.
        continued: whether the first row goes on with a document of the shard before.
        file_bytes, sha256: size and digest of the data file; digests are rows of 32 bytes.
        tokens_start: byte offset of the first token in the data file; the tokens follow without a gap.
        blocks_start, blocks_crc32c: where the shard's rows stand in ``blocks.arrow``, and their checksum.
        lengths_start, lengths_crc32c: the same for ``lengths.arrow``.
    """

    documents_before: NDArray[np.int64]
    tokens_before: NDArray[np.int64]
    continued: NDArray[np.bool_]
    file_bytes: NDArray[np.int64]
    sha256: NDArray[np.uint8]
    tokens_start: NDArray[np.int64]
    blocks_start: NDArray[np.int64]
    blocks_crc32c: NDArray[np.uint32]
    lengths_start: NDArray[np.int64]
    lengths_crc32c: NDArray[np.uint32]

    @classmethod
    def decode(cls, data: Buffer, manifest: Manifest, place: str) -> Self:
        """Parse the table and check it against its digest and the totals of the manifest.

        Raises:
            CorruptRecord: damaged.
            FormatError: another schema, or numbers that don't fit together.
        """
        check_digest(data, manifest.shards_table, place)
        table = read_arrow(data, SHARDS_SCHEMA, place)
        columns = {
            name: table.column(name).to_numpy() for name in SHARDS_SCHEMA.names if name not in ("sha256", "continued")
        }
        for name, total in (("documents_before", manifest.documents), ("tokens_before", manifest.tokens)):
            columns[name] = np.append(columns[name], np.int64(total))
        digests: Any = table.column("sha256").chunk(0)
        shards = cls(
            continued=table.column("continued").to_numpy(),
            sha256=np.frombuffer(digests.buffers()[1], np.uint8, 32 * len(digests)).reshape(-1, 32),
            **columns,
        )
        shards._check(manifest, place)
        return shards

    def _check(self, manifest: Manifest, place: str) -> None:
        tokens = np.diff(self.tokens_before)
        if (
            len(self.sha256) != manifest.shards
            or self.tokens_before[0] != 0
            or self.documents_before[0] != 0
            or (tokens <= 0).any()
            or (np.diff(self.documents_before) < 0).any()
            or (tokens[:-1] % manifest.block_tokens).any()
            or (self.tokens_start < 0).any()
            or (self.tokens_start % 8).any()
            or (self.tokens_start + tokens * manifest.itemsize > self.file_bytes).any()
        ):
            raise FormatError("the shard table must fit the manifest", value=f"{len(self.sha256)} shards", place=place)

    def __len__(self) -> int:
        return len(self.sha256)


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
    def offsets(num_blocks: int) -> tuple[int, int, int, int, int]:
        """Where the four columns start in a shard's record batch, and where it ends: Arrow pads columns to 8 bytes.

        >>> BlockTable.offsets(3)
        (0, 16, 32, 56, 80)
        """
        narrow, wide = -(-num_blocks * 4 // 8) * 8, num_blocks * 8
        return 0, narrow, 2 * narrow, 2 * narrow + wide, 2 * narrow + 2 * wide

    @classmethod
    def decode(cls, data: Buffer, num_blocks: int) -> Self:
        """The columns of one record batch body, as views of `data`."""
        starts = cls.offsets(num_blocks)
        kinds = ("<u4", "<u4", "<i8", "<i8")
        return cls(
            *(np.frombuffer(data, kind, num_blocks, start) for kind, start in zip(kinds, starts[:4], strict=True))
        )


def check_digest(data: Buffer, info: TableInfo, place: str) -> None:
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
