"""One-row Arrow IPC files that carry their own SHA-256: the container of fragments and manifests.

Each table is one column, a list of structs with a single row, so that several tables of different length share a file
that any Arrow tool opens::

    row = pyarrow.ipc.open_file("manifest.arrow").read_all()
    chunks = row.column("chunks").chunk(0).flatten()          # a StructArray, one entry a chunk

The digest is in the schema's metadata, which an IPC file holds twice, before all data and in the footer. It is taken over
the file with both copies set to zeros, so any flipped byte is noticed, the digest's own included.
"""

import hashlib
import re
import struct
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from ..errors import CorruptRecord, FormatError, UnknownVersion
from ..storage._units import Buffer, format_bytes

__all__ = ["MAX_DECODED_BYTES", "MAX_FILE_BYTES", "columns_of", "read_row", "row_of", "write_row"]

MAX_FILE_BYTES = 1 << 30
MAX_DECODED_BYTES = 8 << 30
"""What a file may take once decompressed: room for 10^8 chunks, and no more memory than that for a hostile file."""

Column: TypeAlias = Any
"""A pyarrow array; its own stubs know too few of its methods to be of use."""

_MARK = b"stoker-sha256:"
_DIGEST = re.compile(rb"[0-9a-f]{64}")
_ZEROS = b"0" * 64


def write_row(columns: dict[str, Column], *, kind: str, version: int, compression: Literal["lz4", "zstd"]) -> bytes:
    """An IPC file of `columns`, one row each. Deterministic for one version of pyarrow.

    `compression` is one that Arrow names: ``"zstd"`` halves the file, ``"lz4"`` reads five times as fast.
    """
    metadata: dict[bytes | str, bytes | str] = {
        "stoker.format": kind,
        "stoker.version": str(version),
        "stoker.digest": _MARK + _ZEROS,
    }
    schema = pa.schema([pa.field(name, array.type) for name, array in columns.items()], metadata=metadata)
    batch = pa.record_batch(list(columns.values()), schema=schema)
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(sink, schema, options=options) as writer:
        writer.write_batch(batch)
    data = bytearray(sink.getvalue())
    first, last = data.find(_MARK), data.rfind(_MARK)  # names may hold the mark too: those are between the two
    digest = hashlib.sha256(data).hexdigest().encode()
    for at in (first, last):
        data[at + len(_MARK) : at + len(_MARK) + 64] = digest
    return bytes(data)


def read_row(
    data: Buffer,
    *,
    kind: str,
    version: int,
    types: Mapping[str, Any],
    optional: Mapping[str, Any] = MappingProxyType({}),
    place: str,
) -> dict[str, Column]:
    """The columns that `types` names, and of those that `optional` names the ones that are there.

    Unknown columns, which a later minor version may add, are left alone.

    Raises:
        CorruptRecord: not the bytes that were written.
        FormatError: the digest is right, the content is not what `kind` has.
        UnknownVersion: written by a newer major version.
    """
    if len(data) > MAX_FILE_BYTES:
        raise FormatError(f"a {kind} has {format_bytes(MAX_FILE_BYTES)} at most", value=len(data), place=place)
    data = bytes(data) if not isinstance(data, bytes) else data
    _check_digest(data, kind, place)
    try:
        messages = pa.ipc.MessageReader.open_stream(pa.py_buffer(data)[8:])  # behind the file's magic: a plain stream
        schema = pa.ipc.read_schema(messages.read_next_message())
        metadata = schema.metadata or {}
        if metadata.get(b"stoker.format") != kind.encode():
            raise FormatError(f"must be a {kind}", value=str(metadata.get(b"stoker.format")), place=place)
        found = metadata.get(b"stoker.version", b"").decode("ascii", "replace")
        if found != str(version):
            raise UnknownVersion(
                f"this version of stoker reads a {kind} of version {version}",
                value=found,
                place=place,
                hint="update stoker",
            )
        message = messages.read_next_message()
        decoded: int = sum(_decoded_lengths(message.metadata.to_pybytes(), message.body))
        if decoded > MAX_DECODED_BYTES:
            raise FormatError(
                f"a {kind} decodes to {format_bytes(MAX_DECODED_BYTES)} at most", value=decoded, place=place
            )
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
    except (pa.ArrowException, struct.error, EOFError, AttributeError) as error:
        raise FormatError(f"must be a {kind}", value=str(error)[:200], place=place) from error
    if batch.num_rows != 1:
        raise FormatError(f"a {kind} has one row", value=batch.num_rows, place=place)
    columns = {}
    for name, expected in [*types.items(), *optional.items()]:
        index = batch.schema.get_field_index(name)
        if index < 0 and name in optional:
            continue
        if index < 0 or batch.schema.field(index).type != expected:
            raise FormatError(f"a {kind} has the column {name}: {expected}", place=place)
        columns[name] = batch.column(index)
    return columns


def _check_digest(data: bytes, kind: str, place: str) -> None:
    first, last = data.find(_MARK), data.rfind(_MARK)
    stored = [data[at + len(_MARK) : at + len(_MARK) + 64] for at in (first, last)]
    whole = first < last and stored[0] == stored[1] and _DIGEST.fullmatch(stored[0]) is not None
    if whole:
        digest = hashlib.sha256()
        at = 0
        for mark in (first, last):
            digest.update(memoryview(data)[at : mark + len(_MARK)])
            digest.update(_ZEROS)
            at = mark + len(_MARK) + 64
        digest.update(memoryview(data)[at:])
        whole = digest.hexdigest().encode() == stored[0]
    if not whole:
        raise CorruptRecord(
            f"must be a {kind} that matches its own SHA-256",
            place=place,
            hint="the stored object is damaged or is another file: restore it from its source",
        )


def _decoded_lengths(metadata: bytes, body: Any) -> Iterator[int]:
    """What each buffer of a record batch takes once decompressed, before it is (Arrow's Message.fbs, flatbuffers).

    A compressed buffer starts with its decoded length, -1 if it is stored as it is.
    """

    def field(table: int, number: int) -> int | None:
        (back,) = struct.unpack_from("<i", metadata, table)
        (size,) = struct.unpack_from("<H", metadata, table - back)
        if 4 + 2 * number >= size:
            return None
        (offset,) = struct.unpack_from("<H", metadata, table - back + 4 + 2 * number)
        return table + offset if offset else None

    def follow(position: int | None) -> int:
        if position is None:
            raise struct.error("a field of the record batch is missing")
        return position + int(struct.unpack_from("<I", metadata, position)[0])

    batch = follow(field(follow(0), 2))
    buffers = follow(field(batch, 2))
    compressed = field(batch, 3) is not None
    (count,) = struct.unpack_from("<I", metadata, buffers)
    view = memoryview(body)
    for i in range(count):
        offset, length = struct.unpack_from("<qq", metadata, buffers + 4 + 16 * i)
        if not 0 <= offset <= offset + length <= len(view):
            raise struct.error("a buffer lies outside the record batch")
        decoded = -1
        if compressed and length >= 8:
            (decoded,) = struct.unpack_from("<q", view, offset)
        yield length if decoded < 0 else decoded


def row_of(array: Column) -> Column:
    """`array` as the single row of a list column."""
    return pa.LargeListArray.from_arrays(pa.array([0, len(array)], pa.int64()), array)


def columns_of(row: Column, place: str) -> dict[str, Column]:
    """The fields of a list of structs that has one row; neither they nor lists in them hold a null."""
    structs = row.flatten()
    columns = {field.name: structs.field(field.name) for field in structs.type}
    inner = [column.flatten() for column in columns.values() if pa.types.is_list(column.type)]
    if any(column.null_count for column in (row, structs, *columns.values(), *inner)):
        raise FormatError("a table must hold no nulls", place=place)
    return columns
