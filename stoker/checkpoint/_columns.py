"""Tables of tensors, chunks, byte ranges, blobs and states: as numpy matrices in memory, as Arrow columns in files.

Sizes and offsets are matrices of one row a tensor or chunk, filled up with size 1 and offset 0 beyond its own dimensions.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ..errors import ConfigError, FormatError, UnsafeName
from ._arrow import Column, columns_of, row_of
from ._cover import Ints, sort_order
from .blob import DTYPES, Chunk
from .log import parse_step_directory

__all__ = [
    "BLOBS_TYPE",
    "CHUNKS_TYPE",
    "CRC_BLOCK_BYTES",
    "HELD_TYPE",
    "ORIGINS_TYPE",
    "STATES_TYPE",
    "TENSORS_TYPE",
    "BlobInfo",
    "Boxes",
    "Spans",
    "StateInfo",
    "TensorInfo",
    "Tensors",
    "WrittenChunk",
    "blob_path",
    "blobs_row",
    "check_order",
    "chunk_objects",
    "chunks_row",
    "held_row",
    "ints",
    "matrix_of_tuples",
    "origins_row",
    "read_blobs",
    "read_boxes",
    "read_origins",
    "read_spans",
    "read_states",
    "read_tensors",
    "states_row",
    "tensors_row",
    "widen",
    "writer_of",
    "written_objects",
    "wrong_span",
]

CRC_BLOCK_BYTES = 1 << 20
"""Bytes of a blob under one CRC32C: a read by name checks little more than it needs (8 MiB blocks read 7.3 times it)."""

_BLOB_PATH = re.compile(r"data/([0-9]{5,8})-(0|[1-9][0-9]{0,5})\.safetensors")
_STATE_PATH = re.compile(r"state/[A-Za-z0-9_][A-Za-z0-9_.=+@~-]{0,199}\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_DIMENSIONS = 64  # as torch
_MAX_TENSOR_BYTES = 1 << 62

_SIZES = pa.list_(pa.int64())
TENSORS_TYPE = pa.large_list(pa.struct([("name", pa.string()), ("dtype", pa.string()), ("shape", _SIZES)]))
HELD_TYPE = pa.large_list(pa.struct([("tensor", pa.int32()), ("offsets", _SIZES), ("shape", _SIZES)]))
CHUNKS_TYPE = pa.large_list(
    pa.struct(
        [
            ("tensor", pa.int32()),
            ("offsets", _SIZES),
            ("shape", _SIZES),
            ("blob", pa.int32()),
            ("byte_offset", pa.int64()),
            ("byte_length", pa.int64()),
        ]
    )
)
BLOBS_TYPE = pa.large_list(
    pa.struct([("path", pa.string()), ("size_bytes", pa.int64()), ("crc32c", pa.list_(pa.uint32()))])
)
ORIGINS_TYPE = pa.large_list(pa.struct([("blob", pa.int32()), ("sha256", pa.string()), ("home", pa.string())]))
STATES_TYPE = pa.large_list(pa.struct([("path", pa.string()), ("size_bytes", pa.int64()), ("sha256", pa.string())]))


def blob_path(writer: int, n: int) -> str:
    """Path of a writer's n-th blob below its step's directory.

    >>> blob_path(3, 0)
    'data/00003-0.safetensors'
    """
    return f"data/{writer:05d}-{n}.safetensors"


def writer_of(path: str) -> int:
    """The writer of a blob.

    >>> writer_of("data/00003-0.safetensors")
    3
    """
    match = _BLOB_PATH.fullmatch(path)
    if match is None:
        raise UnsafeName("a blob's path is data/{writer:05d}-{n}.safetensors", value=path[:200])
    return int(match[1])


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class BlobInfo:
    """One file of tensors.

    Attributes:
        path: below the step's directory, as :func:`blob_path` makes it.
        size_bytes: of the file.
        crcs: CRC32C of each :data:`CRC_BLOCK_BYTES` of the file; the last block may be shorter.
        sha256: of the file, 64 hexadecimal digits, if a later step may refer to it; else empty.
        home: the step directory where it lies under the same path; empty if it is the step's own.

    Raises:
        UnsafeName: another path, or a home that is no step directory.
        ConfigError: another number of checksums than the size asks for, or no SHA-256.
    """

    path: str
    size_bytes: int
    crcs: NDArray[np.uint32]
    sha256: str = ""
    home: str = ""

    def __post_init__(self) -> None:
        writer_of(self.path)
        if self.home and parse_step_directory(self.home) is None:
            raise UnsafeName("a blob's home is a step directory", value=self.home[:200], place=self.path)
        if (self.sha256 or self.home) and not _SHA256.fullmatch(self.sha256):
            raise ConfigError("a SHA-256 has 64 hexadecimal digits", value=self.sha256[:80], place=self.path)
        blocks = -(-self.size_bytes // CRC_BLOCK_BYTES)
        if self.size_bytes < 0 or self.crcs.shape != (blocks,) or self.crcs.dtype != np.uint32:
            raise ConfigError(
                f"{self.size_bytes} bytes have {blocks} uint32 checksums",
                value=f"{self.crcs.shape} {self.crcs.dtype}",
                place=self.path,
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class StateInfo:
    """One document of plain values.

    Attributes:
        path: below the step's directory: ``state/{name}.json``.
        size_bytes: of the document.
        sha256: of the document, 64 hexadecimal digits.

    Raises:
        UnsafeName: another path.
        ConfigError: no such digest or size.
    """

    path: str
    size_bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _STATE_PATH.fullmatch(self.path):
            raise UnsafeName("a state's path is state/{name}.json, name of plain characters", value=self.path[:200])
        if not _SHA256.fullmatch(self.sha256) or self.size_bytes < 0:
            raise ConfigError("a state has a size and a SHA-256", value=self.sha256[:80], place=self.path)


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorInfo:
    """A tensor of the checkpoint: its dotted name, dtype (a name in :data:`~stoker.checkpoint.blob.DTYPES`), shape."""

    name: str
    dtype: str
    global_shape: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WrittenChunk:
    """Where a chunk is: bytes ``[byte_offset, byte_offset + byte_length)`` of the file `blob` (its path)."""

    chunk: Chunk
    blob: str
    byte_offset: int
    byte_length: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tensors:
    """m tensors. names, dtypes: Arrow columns of text; ndim: (m,); shape: (m, D)."""

    names: Column
    dtypes: Column
    ndim: Ints
    shape: Ints

    def equals(self, other: "Tensors") -> bool:
        same = self.names.equals(other.names) and self.dtypes.equals(other.dtypes)
        return same and np.array_equal(self.ndim, other.ndim) and np.array_equal(self.shape, other.shape)

    def info(self, i: int) -> TensorInfo:
        shape = tuple(self.shape[i, : self.ndim[i]].tolist())
        return TensorInfo(name=self.names[i].as_py(), dtype=self.dtypes[i].as_py(), global_shape=shape)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Boxes:
    """n hyper-rectangles. tensor: (n,) index; offsets, shape: (n, D)."""

    tensor: Ints
    offsets: Ints
    shape: Ints

    def __len__(self) -> int:
        return len(self.tensor)

    def equals(self, other: "Boxes") -> bool:
        mine, others = (self.tensor, self.offsets, self.shape), (other.tensor, other.offsets, other.shape)
        return all(np.array_equal(a, b) for a, b in zip(mine, others, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Spans:
    """n byte ranges. blob: (n,) index."""

    blob: Ints
    byte_offset: Ints
    byte_length: Ints


def ints(values: Sequence[int]) -> Ints:
    return np.array(values, np.int64)


def matrix_of_tuples(rows: Sequence[tuple[int, ...]], width: int, fill: int) -> Ints:
    return np.array([row + (fill,) * (width - len(row)) for row in rows], np.int64).reshape(len(rows), width)


def widen(matrix: Ints, width: int, fill: int) -> Ints:
    if matrix.shape[1] == width:
        return matrix
    return np.pad(matrix, ((0, 0), (0, width - matrix.shape[1])), constant_values=fill)


def _own(ndim: Ints, width: int) -> NDArray[np.bool_]:
    """Which cells of a matrix of that width are a row's own."""
    return np.arange(width) < ndim[:, None]


def _column(values: Any, kind: Any = None) -> Column:
    return pa.array(values, kind)


def _lists(values: Any, lengths: Any) -> Column:
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return pa.ListArray.from_arrays(_column(starts), _column(values))


def _lists_of(matrix: Ints, ndim: Ints) -> Column:
    return _lists(matrix[_own(ndim, matrix.shape[1])], ndim)


def _matrix_of(lists: Column, ndim: Ints, width: int, fill: int) -> Ints:
    matrix = np.full((len(ndim), width), fill, np.int64)
    matrix[_own(ndim, width)] = _numpy(lists.flatten())
    return matrix


def _numpy(column: Column) -> Ints:
    return np.asarray(column.to_numpy(zero_copy_only=True), np.int64)


def chunk_objects(tensors: Tensors, boxes: Boxes, rows: Iterable[int]) -> list[Chunk]:
    infos: dict[int, TensorInfo] = {}
    chunks = []
    for row in rows:
        index = int(boxes.tensor[row])
        if index not in infos:
            infos[index] = tensors.info(index)
        info = infos[index]
        ndim = len(info.global_shape)
        chunks.append(
            Chunk(
                name=info.name,
                dtype=info.dtype,
                shape=tuple(boxes.shape[row, :ndim].tolist()),
                offsets=tuple(boxes.offsets[row, :ndim].tolist()),
                global_shape=info.global_shape,
            )
        )
    return chunks


def written_objects(
    tensors: Tensors, boxes: Boxes, spans: Spans, blobs: Sequence[BlobInfo], rows: range
) -> list[WrittenChunk]:
    chunks = chunk_objects(tensors, boxes, rows)
    return [
        WrittenChunk(
            chunk=chunk,
            blob=blobs[int(spans.blob[row])].path,
            byte_offset=int(spans.byte_offset[row]),
            byte_length=int(spans.byte_length[row]),
        )
        for chunk, row in zip(chunks, rows, strict=True)
    ]


def _struct_row(columns: dict[str, Column], kind: Any) -> Column:
    arrays = [columns[field.name].cast(field.type) for field in kind.value_type]
    return row_of(pa.StructArray.from_arrays(arrays, fields=list(kind.value_type)))


def tensors_row(tensors: Tensors) -> Column:
    shape = _lists_of(tensors.shape, tensors.ndim)
    return _struct_row({"name": tensors.names, "dtype": tensors.dtypes, "shape": shape}, TENSORS_TYPE)


def _box_columns(tensors: Tensors, boxes: Boxes) -> dict[str, Column]:
    ndim = tensors.ndim[boxes.tensor]
    return {
        "tensor": _column(boxes.tensor),
        "offsets": _lists_of(boxes.offsets, ndim),
        "shape": _lists_of(boxes.shape, ndim),
    }


def held_row(tensors: Tensors, boxes: Boxes) -> Column:
    return _struct_row(_box_columns(tensors, boxes), HELD_TYPE)


def chunks_row(tensors: Tensors, boxes: Boxes, spans: Spans) -> Column:
    columns = _box_columns(tensors, boxes)
    columns["blob"] = _column(spans.blob)
    columns["byte_offset"], columns["byte_length"] = _column(spans.byte_offset), _column(spans.byte_length)
    return _struct_row(columns, CHUNKS_TYPE)


def blobs_row(blobs: Sequence[BlobInfo]) -> Column:
    crcs = np.concatenate([np.zeros(0, np.uint32), *(blob.crcs for blob in blobs)])
    return _struct_row(
        {
            "path": _column([blob.path for blob in blobs], pa.string()),
            "size_bytes": _column([blob.size_bytes for blob in blobs], pa.int64()),
            "crc32c": _lists(crcs, [len(blob.crcs) for blob in blobs]),
        },
        BLOBS_TYPE,
    )


def origins_row(blobs: Sequence[BlobInfo]) -> Column | None:
    """SHA-256 and home of the blobs that have them; None if none has."""
    known = [(i, blob.sha256, blob.home) for i, blob in enumerate(blobs) if blob.sha256]
    if not known:
        return None
    index, sha256, home = zip(*known, strict=True)
    columns = {
        "blob": _column(index, pa.int32()),
        "sha256": _column(sha256, pa.string()),
        "home": _column(home, pa.string()),
    }
    return _struct_row(columns, ORIGINS_TYPE)


def states_row(states: Sequence[StateInfo]) -> Column:
    return _struct_row(
        {
            "path": _column([state.path for state in states], pa.string()),
            "size_bytes": _column([state.size_bytes for state in states], pa.int64()),
            "sha256": _column([state.sha256 for state in states], pa.string()),
        },
        STATES_TYPE,
    )


def read_tensors(row: Column, place: str) -> Tensors:
    columns = columns_of(row, place)
    unknown = [dtype for dtype in pc.unique(columns["dtype"]).to_pylist() if dtype not in DTYPES]
    if unknown:
        raise FormatError(
            "a dtype must be one that this version knows", value=unknown[0], place=place, hint="update stoker"
        )
    ndim = _numpy(columns["shape"].value_lengths())
    if ndim.max(initial=0) > _MAX_DIMENSIONS:
        raise FormatError(f"a tensor has {_MAX_DIMENSIONS} dimensions at most", value=int(ndim.max()), place=place)
    shape = _matrix_of(columns["shape"], ndim, int(ndim.max(initial=0)), 1)
    if (shape < 0).any() or (shape.prod(axis=1, dtype=np.float64) * 16 > _MAX_TENSOR_BYTES).any():
        raise FormatError(f"a tensor has 0 to {_MAX_TENSOR_BYTES} bytes", place=place)
    if len(pc.unique(columns["name"])) != len(ndim):
        raise FormatError("each tensor has a name of its own", place=place)
    return Tensors(names=columns["name"], dtypes=columns["dtype"], ndim=ndim, shape=shape)


def read_boxes(columns: dict[str, Column], tensors: Tensors, place: str) -> Boxes:
    tensor = _numpy(columns["tensor"])
    if ((tensor < 0) | (tensor >= len(tensors.ndim))).any():
        raise FormatError("a chunk belongs to a tensor", place=place)
    ndim, width = tensors.ndim[tensor], tensors.shape.shape[1]
    for name in ("offsets", "shape"):
        if not np.array_equal(_numpy(columns[name].value_lengths()), ndim):
            raise FormatError("a chunk has as many dimensions as its tensor", value=name, place=place)
    offsets = _matrix_of(columns["offsets"], ndim, width, 0)
    shape = _matrix_of(columns["shape"], ndim, width, 1)
    if ((offsets < 0) | (shape < 0) | (shape > tensors.shape[tensor] - offsets)).any():
        raise FormatError("a chunk lies inside its tensor", place=place)
    return Boxes(tensor=tensor, offsets=offsets, shape=shape)


def read_spans(columns: dict[str, Column], blobs: Sequence[BlobInfo], place: str) -> Spans:
    spans = Spans(
        blob=_numpy(columns["blob"]),
        byte_offset=_numpy(columns["byte_offset"]),
        byte_length=_numpy(columns["byte_length"]),
    )
    if ((spans.blob < 0) | (spans.blob >= len(blobs))).any():
        raise FormatError("a chunk belongs to a blob", place=place)
    return spans


def read_blobs(row: Column, place: str) -> tuple[BlobInfo, ...]:
    columns = columns_of(row, place)
    crcs = columns["crc32c"].flatten().to_numpy(zero_copy_only=True)
    ends = np.cumsum(_numpy(columns["crc32c"].value_lengths())).tolist()
    blobs = []
    start = 0
    try:
        for path, size, end in zip(columns["path"].to_pylist(), columns["size_bytes"].to_pylist(), ends, strict=True):
            blobs.append(BlobInfo(path=path, size_bytes=size, crcs=crcs[start:end]))
            start = end
    except ConfigError as error:
        raise FormatError(error.rule, value=error.value, place=f"{place}: {error.place}") from None
    if len({blob.path for blob in blobs}) != len(blobs):
        raise FormatError("each blob has a path of its own", place=place)
    return tuple(blobs)


def read_origins(row: Column | None, blobs: tuple[BlobInfo, ...], place: str) -> tuple[BlobInfo, ...]:
    """`blobs` with SHA-256 and home of those that have them; `row` is None in a step that was saved without."""
    if row is None:
        return blobs
    columns = columns_of(row, place)
    of_blob = _numpy(columns["blob"])
    if ((of_blob < 0) | (of_blob >= len(blobs))).any() or len(np.unique(of_blob)) != len(of_blob):
        raise FormatError("an origin belongs to a blob, one to each at most", place=place)
    result = list(blobs)
    try:
        for i, sha256, home in zip(of_blob, columns["sha256"].to_pylist(), columns["home"].to_pylist(), strict=True):
            result[i] = replace(result[i], sha256=sha256, home=home)
    except ConfigError as error:
        raise FormatError(error.rule, value=error.value, place=f"{place}: {error.place}") from None
    return tuple(result)


def read_states(row: Column, place: str) -> tuple[StateInfo, ...]:
    columns = columns_of(row, place)
    try:
        states = tuple(
            StateInfo(path=path, size_bytes=size, sha256=sha256)
            for path, size, sha256 in zip(
                *(columns[k].to_pylist() for k in ("path", "size_bytes", "sha256")), strict=True
            )
        )
    except ConfigError as error:
        raise FormatError(error.rule, value=error.value, place=f"{place}: {error.place}") from None
    if len({state.path for state in states}) != len(states):
        raise FormatError("each state has a path of its own", place=place)
    return states


def check_order(tensor: Ints, tensors: Tensors, place: str) -> None:
    names = tensors.names
    in_order = len(names) < 2 or pc.all(pc.less(names[:-1], names[1:])).as_py()
    if not in_order or (np.diff(tensor) < 0).any():
        raise FormatError("tensors are ordered by name and chunks by tensor", place=place)


def wrong_span(tensors: Tensors, boxes: Boxes, spans: Spans, blobs: Sequence[BlobInfo]) -> tuple[int, str] | None:
    """The first row whose bytes can't be the chunk's, and the rule that it breaks."""
    if not len(boxes):
        return None
    itemsizes = {name: dtype.itemsize for name, dtype in DTYPES.items()}
    encoded = tensors.dtypes.dictionary_encode()
    itemsize = ints([itemsizes[name] for name in encoded.dictionary.to_pylist()])[encoded.indices.to_numpy()]
    wrong: Any = boxes.shape.prod(axis=1) * itemsize[boxes.tensor] != spans.byte_length
    if wrong.any():
        return int(np.argmax(wrong)), "a chunk must have the bytes of its shape"
    size = ints([blob.size_bytes for blob in blobs])
    wrong = (spans.byte_offset < 0) | (spans.byte_length > size[spans.blob] - spans.byte_offset)
    if wrong.any():
        return int(np.argmax(wrong)), "a chunk must lie inside its blob"
    rows = np.flatnonzero(spans.byte_length)
    rows = rows[sort_order([spans.blob[rows], spans.byte_offset[rows]])]
    before, after = rows[:-1], rows[1:]
    overlap: Any = spans.blob[before] == spans.blob[after]
    overlap &= spans.byte_offset[before] + spans.byte_length[before] > spans.byte_offset[after]
    if overlap.any():
        return int(after[np.argmax(overlap)]), "two chunks must not share bytes of a blob"
    return None
