"""Arrow IPC files written straight into an object, with the byte offset of every column known and a digest."""

import hashlib
import io
from collections.abc import Iterable
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..storage.store import ObjectStore, ObjectWriter
from .format import TableInfo

__all__ = ["ArrowFile", "column", "measure"]

_PIECE_BYTES = 8 << 20


class _Sink(io.RawIOBase):
    """What pyarrow takes for a file: counts, notes where each buffer goes, and passes on whole pieces."""

    def __init__(self, out: ObjectWriter | None) -> None:
        super().__init__()
        self.position = 0
        self.at: dict[int, int] = {}  # address of a buffer in memory -> its offset in the file
        self.digest = hashlib.sha256()
        self._out = out
        self._piece = bytearray()

    def write(self, data: Any) -> int:
        if isinstance(data, pa.Buffer):
            self.at[data.address] = self.position
        size = len(memoryview(data))
        if self._out is not None:
            if size >= _PIECE_BYTES:
                self.flush_piece()
                self._pass_on(memoryview(data).cast("B"), self.position)
            else:
                self._piece += memoryview(data)
        self.position += size
        if len(self._piece) >= _PIECE_BYTES:
            self.flush_piece()
        return size

    def flush_piece(self) -> None:
        if self._piece:
            piece, self._piece = memoryview(self._piece), bytearray()
            self._pass_on(piece, self.position - len(piece))

    def _pass_on(self, data: memoryview, offset: int) -> None:
        assert self._out is not None
        self.digest.update(data)
        self._out.write_at(offset, data)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position


def measure(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> int:
    """The size in bytes of the Arrow file that holds `batches`; only the lengths of their columns matter."""
    sink = _Sink(None)
    with pa.ipc.new_file(pa.PythonFile(sink, mode="w"), schema) as file:
        for batch in batches:
            file.write_batch(batch)
    return sink.position


class ArrowFile:
    """One Arrow IPC file of `size_bytes`, visible, whole and durable at :meth:`commit`.

    The arrays of a batch must not change before that. Leaving the block without a commit publishes nothing.
    """

    def __init__(self, store: ObjectStore, key: str, schema: pa.Schema, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        self._out = store.open_writer(key, size_bytes)
        self._sink = _Sink(self._out)
        self._file = pa.ipc.new_file(pa.PythonFile(self._sink, mode="w"), schema)

    def write(self, batch: pa.RecordBatch) -> None:
        """Add a record batch."""
        self._sink.at.clear()
        self._file.write_batch(batch)

    def offset_of(self, column: NDArray[Any]) -> int:
        """Where the memory of `column`, an array of the batch written last, stands in the file; 0 if it is empty."""
        address = column.__array_interface__["data"][0]
        return self._sink.at[address] if column.size else 0

    def commit(self) -> TableInfo:
        """Publish; returns size and SHA-256 of the file."""
        self._file.close()
        self._sink.flush_piece()
        assert self._sink.position == self._size_bytes, "an Arrow file must have the size that was measured"
        self._out.commit()
        return TableInfo(self._size_bytes, self._sink.digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._out.abort()


def column(array: NDArray[Any]) -> Any:
    """A numpy array as an Arrow column that shares its memory, so that :meth:`ArrowFile.offset_of` finds it."""
    return pa.array(np.ascontiguousarray(array))
