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
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigError
from ..storage import _posix
from ..storage.urls import open_store
from ._zarr_view import Piece, TensorArray, ZarrView, padded
from .log import CheckpointLog, step_directory
from .reader import StepReader, read_manifest, resolve_step

if TYPE_CHECKING:
    from zarr.abc.store import Store

__all__ = ["References", "open_zarr", "references", "write_references"]

_MAX_INLINE_BYTES = 1 << 20
"""A short last chunk at the very end of its file goes into the references themselves up to here. A guess."""


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
    templates = _templates(reader)
    for path, array in list(view.arrays.items()):
        chunks: dict[str, Any] = {}
        for index in array.indices():
            piece = array.piece(index)
            reference = _reference(reader, array, piece, templates)
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
    return References(
        step=found,
        document={
            "version": 1,
            "templates": dict(templates.values()),
            "refs": {**{key: json.dumps(document) for key, document in documents.items()}, **refs},
        },
        num_arrays=len(view.arrays),
        num_chunks=len(refs),
        left_out=view.left_out,
    )


def _templates(reader: StepReader) -> dict[str, tuple[str, str]]:
    """For each home of the step's blobs, the step's own being "": a short name, and its URL."""
    root = reader.place.rpartition("/")[0]
    places = {"": reader.place, **{home: f"{root}/{home}" for home in sorted(reader.manifest.refs)}}
    return {
        home: (f"u{n or ''}", place if "://" in place else Path(place).as_uri())
        for n, (home, place) in enumerate(places.items())
    }


def _reference(reader: StepReader, array: TensorArray, piece: Piece, templates: Mapping[str, tuple[str, str]]) -> Any:
    """[URL, offset, length] of a whole zarr chunk, its bytes, or None."""
    if piece.shape[1:] != array.chunk_shape[1:]:
        return None
    blob = reader.manifest.blob(piece.blob)
    if piece.offset + array.full_bytes <= blob.size_bytes:
        return [f"{{{{{templates[blob.home][0]}}}}}/{piece.blob}", piece.offset, array.full_bytes]
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
