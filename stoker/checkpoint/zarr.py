"""A step as a Zarr v3 hierarchy: a view made on demand over the bytes that are there, never a second copy.

Two ways in. :func:`open_zarr` is a store over the manifest: every byte is checked before zarr sees it.
:func:`write_references` makes a kerchunk file that plain zarr and fsspec open without this package, and without checks.

A tensor ``model.layers.0.weight`` is the array ``model/layers/0/weight``, its chunks the pieces in which it was saved.
zarr wants chunks on a regular grid, full size at the edges: a short edge chunk is filled up in memory, or, in references,
runs on into the bytes behind it, which zarr cuts off. Pieces that differ in their number of rows are cut to the largest
number of rows that divides all their offsets. What has no such grid is listed in the root's attributes, with the reason.

zarr has no name for ``bfloat16`` and the eight-bit floats: they are ``uint16`` and ``uint8``, and the attribute
``torch_dtype`` says what they are.
"""

import base64
import bisect
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import ConfigError
from ..storage import _posix
from ..storage.store import open_store
from .blob import DTYPES
from .log import CheckpointLog, step_directory
from .manifest import Manifest, WrittenChunk
from .reader import StepReader, read_manifest, resolve_step

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = ["References", "ZarrView", "open_zarr", "references", "write_references"]

_MAX_SPLIT = 64
"""Zarr chunks for each stored one, on average: a grid finer than that serves nobody. A guess, not measured."""
_MAX_INLINE_BYTES = 1 << 20
"""A short last chunk at the very end of its file goes into the references themselves up to here. A guess."""
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


def open_step(
    url: str | os.PathLike[str], step: int | None, storage_options: Mapping[str, Any] | None
) -> tuple[int, StepReader]:
    """The number of a committed step, the newest by default, and a reader of it."""
    store = open_store(os.fspath(url), **(storage_options or {}))
    found, live, _ = resolve_step(CheckpointLog(store), step, store.url)
    directory = step_directory(found, live.nonce)
    return found, StepReader(store, directory, read_manifest(store, directory, live))


def open_zarr(
    url: str | os.PathLike[str], step: int | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> "Store":
    """A committed step, the newest by default, as a read-only store for ``zarr.open_group`` and ``zarr.open_array``.

    One array for each tensor, little-endian and in C order. Whatever is read was checked against its CRC32C; a chunk that
    is missing or damaged raises and never reads as zeros. The store follows the checkpoint's root wherever it is moved.
    The root group's attribute ``stoker`` names the step and the tensors that are left out.

    Raises:
        NoCheckpoint: no committed step, or not that one.

    Examples:
        >>> import tempfile, torch, zarr
        >>> from stoker.checkpoint import save
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     _ = save(directory, {"model": {"w": torch.arange(6.0).view(2, 3)}})
        ...     group = zarr.open_group(open_zarr(directory), mode="r")
        ...     group["model/w"][1].tolist(), group["model/w"].attrs["torch_dtype"]
        ([3.0, 4.0, 5.0], 'float32')
    """
    from ._zarr_store import CheckpointStore

    found, reader = open_step(url, step, storage_options)
    return CheckpointStore(ZarrView(reader.manifest, found), reader)


# ----------------------------------------------------------------------------------------------------------- references


@dataclass(frozen=True, kw_only=True)
class References:
    """A step as kerchunk references.

    Attributes:
        step: the step.
        document: what goes into the file.
        num_arrays, num_chunks: that can be read through it.
        left_out: reason by tensor name.
    """

    step: int
    document: dict[str, Any]
    num_arrays: int
    num_chunks: int
    left_out: dict[str, str]


def references(
    url: str | os.PathLike[str], step: int | None = None, *, storage_options: Mapping[str, Any] | None = None
) -> References:
    """A step as kerchunk references (version 1): what each key of the hierarchy is, or where its bytes lie.

    Bytes are named by absolute URL through the template ``u``, the directory of the step: after a move give
    ``template_overrides={"u": ...}`` to fsspec. Nothing that is read through them is checked.

    Besides what a view leaves out: tensors with short chunks in another dimension than the first, and large ones whose
    short last chunk ends its file.
    """
    found, reader = open_step(url, step, storage_options)
    view = ZarrView(reader.manifest, found)
    refs: dict[str, Any] = {}
    for path, array in list(view.arrays.items()):
        chunks: dict[str, Any] = {}
        for index in array.indices():
            piece = array.piece(index)
            reference = _reference(reader, array, piece)
            if reference is None:
                view.left_out[array.name] = "a short edge chunk can't be referred to"
                del view.arrays[path]
                break
            chunks["/".join((path, "c", *map(str, index)))] = reference
        else:
            refs.update(chunks)
    nodes = {path: view.metadata(path) for path in sorted({*view.arrays, *view.children})}
    root = nodes.pop("")
    assert root is not None
    # One document for all: listing 100,000 arrays one by one would take a minute.
    root["consolidated_metadata"] = {"kind": "inline", "must_understand": False, "metadata": nodes}
    documents = {"zarr.json": root, **{f"{path}/zarr.json": node for path, node in nodes.items()}}
    directory = reader.place
    return References(
        step=found,
        document={
            "version": 1,
            "templates": {"u": directory if "://" in directory else Path(directory).as_uri()},
            "refs": {**{key: json.dumps(document) for key, document in documents.items()}, **refs},
        },
        num_arrays=len(view.arrays),
        num_chunks=len(refs),
        left_out=view.left_out,
    )


def _reference(reader: StepReader, array: TensorArray, piece: Piece) -> Any:
    """[URL, offset, length] of a whole zarr chunk, its bytes, or None."""
    if piece.shape[1:] != array.chunk_shape[1:]:
        return None
    if piece.offset + array.full_bytes <= reader.manifest.blob(piece.blob).size_bytes:
        return [f"{{{{u}}}}/{piece.blob}", piece.offset, array.full_bytes]
    if array.full_bytes > _MAX_INLINE_BYTES:
        return None
    data = reader.read_bytes(piece.blob, piece.offset, piece.offset + piece.length)
    return "base64:" + base64.b64encode(padded(piece, array, data)).decode("ascii")


def write_references(
    url: str | os.PathLike[str],
    output: str | os.PathLike[str],
    step: int | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
) -> References:
    """Write :func:`references` to a local file, durably, and return them.

    Raises:
        ConfigError: the file would be called ``zarr.json``, or nothing that ends in ``.json``.
        NoCheckpoint: no committed step, or not that one.
    """
    path = Path(output).absolute()
    if path.name == "zarr.json" or path.suffix != ".json" or "://" in os.fspath(output):
        raise ConfigError(
            "references go to a local file that ends in .json and is not called zarr.json",
            value=os.fspath(output),
            place="output",
            hint="call it refs.json; zarr would open a directory with a zarr.json as an empty group",
        )
    found = references(url, step, storage_options=storage_options)
    with _posix.translate_os_errors(str(path)):
        file = _posix.UnnamedFile(path.parent)
        try:
            _posix.pwrite_all(file.fd, json.dumps(found.document, separators=(",", ":")).encode(), 0)
            file.sync()
            file.replace(path)
        finally:
            file.close()
    return found
