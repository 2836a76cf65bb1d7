"""A step's tensors as arrays on regular grids, as zarr wants them: names, metadata and pieces, without reading a byte.

The rules are in :mod:`stoker.checkpoint.zarr`.
"""

import bisect
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from .blob import DTYPES
from .manifest import Manifest, WrittenChunk

__all__ = ["Piece", "TensorArray", "ZarrView", "padded"]

_MAX_SPLIT = 64
"""Zarr chunks for each stored one, on average: a grid finer than that serves nobody. A guess, not measured."""
_NATIVE = {"float16", "float32", "float64", "complex64", "complex128", "bool"} | {
    f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}
_AS_BYTES = {1: "uint8", 2: "uint16", 4: "uint32"}


def _data_type(dtype: str) -> str:
    return dtype if dtype in _NATIVE else _AS_BYTES[DTYPES[dtype].itemsize]


def _fill_value(data_type: str) -> Any:
    if data_type == "bool":
        return False
    if data_type.startswith("complex"):
        return [0.0, 0.0]
    return 0.0 if data_type.startswith("float") else 0


@dataclass(frozen=True, kw_only=True)
class Piece:
    """The stored bytes of one zarr chunk: an array of `shape` at `offset` of a blob; short at an edge of the tensor."""

    blob: str
    offset: int
    length: int
    shape: tuple[int, ...]


class TensorArray:
    """One tensor on its grid."""

    def __init__(self, name: str, dtype: str, shape: tuple[int, ...], chunks: list[WrittenChunk]) -> None:
        self.name, self.dtype, self.shape = name, dtype, shape
        self.itemsize = DTYPES[dtype].itemsize
        chunks = [one for one in chunks if one.byte_length]
        steps = [math.gcd(*(one.chunk.offsets[d] for one in chunks)) for d in range(len(shape))]
        self.chunk_shape = tuple(max(1, step or size) for step, size in zip(steps, shape, strict=True))
        # By column, then by row: the pieces of a column lie one below the other.
        self._chunks = sorted(chunks, key=lambda one: (one.chunk.offsets[1:], one.chunk.offsets[:1]))
        self._order = [(one.chunk.offsets[1:], one.chunk.offsets[:1]) for one in self._chunks]

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of zarr chunks in each dimension."""
        return tuple(-(-size // step) for size, step in zip(self.shape, self.chunk_shape, strict=True))

    @property
    def is_regular(self) -> bool:
        """Whether each zarr chunk lies in one stored chunk, without there being absurdly many."""
        if math.prod(self.grid) > _MAX_SPLIT * max(1, len(self._chunks)):
            return False
        # Rows may be cut, since they follow each other in the file; anything else must be as it was stored.
        return all(
            size == min(step, whole - offset)
            for one in self._chunks
            for size, step, whole, offset in list(
                zip(one.chunk.shape, self.chunk_shape, self.shape, one.chunk.offsets, strict=True)
            )[1:]
        )

    @property
    def full_bytes(self) -> int:
        """Bytes of a zarr chunk, which are the same at the edges."""
        return math.prod(self.chunk_shape) * self.itemsize

    def piece(self, index: tuple[int, ...]) -> Piece:
        """Where the zarr chunk at `index`, which lies inside the grid, is stored."""
        start = tuple(i * step for i, step in zip(index, self.chunk_shape, strict=True))
        one = self._chunks[bisect.bisect_right(self._order, (start[1:], start[:1])) - 1]
        if not self.shape:
            return Piece(blob=one.blob, offset=one.byte_offset, length=one.byte_length, shape=())
        row_bytes = math.prod(one.chunk.shape[1:]) * self.itemsize
        first = start[0] - one.chunk.offsets[0]
        rows = min(self.chunk_shape[0], one.chunk.shape[0] - first)
        return Piece(
            blob=one.blob,
            offset=one.byte_offset + first * row_bytes,
            length=rows * row_bytes,
            shape=(rows, *one.chunk.shape[1:]),
        )

    def indices(self) -> Iterator[tuple[int, ...]]:
        """All places of the grid."""
        return np.ndindex(self.grid)

    def metadata(self) -> dict[str, Any]:
        """The content of the array's ``zarr.json``."""
        data_type = _data_type(self.dtype)
        return {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(self.shape),
            "data_type": data_type,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(self.chunk_shape)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": _fill_value(data_type),
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
            "attributes": {"torch_dtype": self.dtype},
            "storage_transformers": [],
        }


def _node_path(name: str) -> str | None:
    """The path of a tensor's node, or None if zarr has no such names."""
    parts = name.split(".")
    if any(not part or part.startswith("__") or "/" in part or "\\" in part for part in parts):
        return None
    return "/".join(parts)


class ZarrView:
    """The hierarchy of one step, without its bytes: which arrays there are, and what was left out and why.

    Attributes:
        arrays: by path.
        left_out: reason by tensor name.
    """

    def __init__(self, manifest: Manifest, step: int) -> None:
        self.step = step
        self.arrays: dict[str, TensorArray] = {}
        self.left_out: dict[str, str] = {}
        for name in manifest.tensor_names:
            path = _node_path(name)
            if path is None:
                self.left_out[name] = "zarr has no node of that name"
                continue
            if any(path[:at] in self.arrays for at in range(len(path)) if path[at] == "/"):
                self.left_out[name] = "another tensor has the name of its group"
                continue
            info = manifest.tensor(name)
            array = TensorArray(name, info.dtype, tuple(info.global_shape), manifest.chunks_of(name))
            if array.is_regular:
                self.arrays[path] = array
            else:
                self.left_out[name] = "its chunks form no regular grid"

    @cached_property
    def children(self) -> dict[str, set[str]]:
        """Names below each group, the root's is empty."""
        children: dict[str, set[str]] = {"": set()}
        for path in self.arrays:
            while path:
                parent, _, name = path.rpartition("/")
                children.setdefault(parent, set()).add(name)
                path = parent
        return children

    def metadata(self, path: str) -> dict[str, Any] | None:
        """The content of a node's ``zarr.json``; None if there is no such node."""
        if path in self.arrays:
            return self.arrays[path].metadata()
        if path not in self.children:
            return None
        attributes = {} if path else {"stoker": {"step": self.step, "left_out": self.left_out}}
        return {"zarr_format": 3, "node_type": "group", "attributes": attributes}

    def chunk_of(self, key: str) -> tuple[TensorArray, Piece] | None:
        """The array and the stored bytes behind a chunk's key; None if no array has a chunk of that key."""
        if key.endswith("/c"):
            path, _, rest = key.removesuffix("/c"), "", ""
        else:
            path, _, rest = key.rpartition("/c/")
        array = self.arrays.get(path)
        parts = rest.split("/") if rest else []
        if array is None or len(parts) != len(array.shape) or not all(p.isascii() and p.isdigit() for p in parts):
            return None
        index = tuple(map(int, parts))
        if any(i >= extent for i, extent in zip(index, array.grid, strict=True)):
            return None
        return array, array.piece(index)


def padded(piece: Piece, array: TensorArray, data: bytes) -> bytes:
    """`data` of a piece, filled up with zeros to a whole zarr chunk."""
    if piece.shape == array.chunk_shape:
        return data
    full = np.zeros((*array.chunk_shape, array.itemsize), np.uint8)
    full[tuple(slice(size) for size in piece.shape)] = np.frombuffer(data, np.uint8).reshape(
        *piece.shape, array.itemsize
    )
    return full.tobytes()
