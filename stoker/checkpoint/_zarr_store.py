"""The store class of :func:`stoker.checkpoint.zarr.open_zarr`; a module of its own, so that only it imports zarr."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from ..errors import UnsupportedError
from ._zarr_view import Piece, TensorArray, ZarrView, padded
from .reader import StepReader

__all__ = ["CheckpointStore"]


class CheckpointStore(Store):
    """A step's hierarchy over its manifest. Read-only; reads run in threads and are verified."""

    supports_writes: bool = False
    supports_deletes: bool = False
    supports_partial_writes = False
    supports_listing: bool = True

    def __init__(self, view: ZarrView, reader: StepReader) -> None:
        super().__init__(read_only=True)
        self._view, self._reader = view, reader

    def with_read_only(self, read_only: bool = False) -> "CheckpointStore":
        """Another store of the same step; it can't be writable."""
        if not read_only:
            raise self._refused()
        return CheckpointStore(self._view, self._reader)

    def __str__(self) -> str:
        return f"stoker::{self._reader.place}"

    def __repr__(self) -> str:
        return f"CheckpointStore({self._reader.place!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointStore) and other._reader.place == self._reader.place

    def __hash__(self) -> int:
        return hash(self._reader.place)

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """The content of a key, or a part of it. None only for keys that the hierarchy does not have.

        Raises:
            CorruptBlock: stored bytes differ from their checksum.
            KeyNotFound: a file of the step is missing.
        """
        document = self._document(key)
        if document is not None:
            return prototype.buffer.from_bytes(_part(document, byte_range))
        found = self._view.chunk_of(key)
        if found is None:
            return None
        data = await asyncio.to_thread(self._read, *found, byte_range)
        return prototype.buffer.from_bytes(data)

    def _document(self, key: str) -> bytes | None:
        path, _, name = key.rpartition("/")
        node = self._view.metadata(path) if name == "zarr.json" else None
        return None if node is None else json.dumps(node).encode()

    def _read(self, array: TensorArray, piece: Piece, byte_range: ByteRequest | None) -> bytes:
        if byte_range is not None and piece.shape == array.chunk_shape:
            start, end = _bounds(byte_range, piece.length)
            return self._reader.read_bytes(piece.blob, piece.offset + start, piece.offset + end)
        data = self._reader.read_bytes(piece.blob, piece.offset, piece.offset + piece.length)
        return _part(padded(piece, array, data), byte_range)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Several :meth:`get` at once, in order."""
        return list(await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges)))

    async def exists(self, key: str) -> bool:
        """Whether the hierarchy has that key; nothing is read."""
        return self._document(key) is not None or self._view.chunk_of(key) is not None

    async def set(self, key: str, value: Buffer) -> None:
        """Refused."""
        raise self._refused()

    async def delete(self, key: str) -> None:
        """Refused."""
        raise self._refused()

    def _refused(self) -> UnsupportedError:
        return UnsupportedError("a committed step is never changed", place=str(self), hint='open it with mode="r"')

    async def list(self) -> AsyncIterator[str]:
        """All keys."""
        for path in sorted({*self._view.arrays, *self._view.children}):
            yield f"{path}/zarr.json" if path else "zarr.json"
            array = self._view.arrays.get(path)
            for index in array.indices() if array is not None else ():
                yield "/".join((path, "c", *map(str, index)))

    async def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """All keys that start with `prefix`."""
        async for key in self.list():
            if key.startswith(prefix):
                yield key

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Names directly below a node."""
        path = prefix.rstrip("/")
        if path in self._view.arrays:
            names = {"c"}
        elif path in self._view.children:
            names = self._view.children[path]
        else:
            return
        for name in ("zarr.json", *sorted(names)):
            yield name


def _bounds(byte_range: ByteRequest, size: int) -> tuple[int, int]:
    if isinstance(byte_range, RangeByteRequest):
        return min(byte_range.start, size), min(byte_range.end, size)
    if isinstance(byte_range, OffsetByteRequest):
        return min(byte_range.offset, size), size
    assert isinstance(byte_range, SuffixByteRequest)
    return max(0, size - byte_range.suffix), size


def _part(data: bytes, byte_range: ByteRequest | None) -> bytes:
    if byte_range is None:
        return data
    start, end = _bounds(byte_range, len(data))
    return data[start:end]
