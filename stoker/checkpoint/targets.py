"""Where the blobs of a save go, straight from the arena: the root, and the node's own disk."""

from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from time import monotonic
from typing import Any

from ..errors import DeadlineExceeded, StoreError
from ..storage._units import Buffer
from ..storage.local import LocalStore
from ..storage.store import ObjectStore, ObjectWriter

__all__ = ["BlobTarget"]


class BlobTarget:
    """The blobs of one rank and attempt in one store. Nothing has its name there before :meth:`finish`.

    Args:
        directory: of the attempt, below the store's root.
        threads: open, write and finish; calls return at once.
        may_write: the first byte goes out after it.

    Attributes:
        reused: the memory that is written from holds something else as soon as it is written; set before :meth:`write`.
    """

    def __init__(self, store: ObjectStore, directory: str, threads: Executor, may_write: Future[None]) -> None:
        self._store, self._directory, self._threads, self._may_write = store, directory, threads, may_write
        self.reused = False
        self._writers: dict[str, tuple[Future[ObjectWriter], int]] = {}
        self._writes: list[Future[None]] = []

    def open(self, path: str, size_bytes: int) -> None:
        """Begin a blob."""
        self._writers[path] = self._threads.submit(self._open, path, size_bytes), size_bytes

    def _open(self, path: str, size_bytes: int) -> ObjectWriter:
        self._may_write.result()
        return self._store.open_writer(f"{self._directory}/{path}", size_bytes)

    def write(self, path: str, offset: int, data: Buffer) -> Future[None]:
        """Write `data`, which stays as it is until :meth:`finish` or :meth:`abort` has returned.

        If the memory is `reused`, it need stay only until the future is done.
        """
        written = self._threads.submit(self._write, path, offset, data)
        self._writes.append(written)
        return written

    def _write(self, path: str, offset: int, data: Buffer) -> None:
        writer = self._writers[path][0].result()
        if self.reused and not isinstance(self._store, LocalStore):
            data = bytes(data)  # a file has it when the call returns; an upload may read it later
        writer.write_at(offset, data)

    def await_all(self, running: Sequence[Future[Any]], deadline: float) -> None:
        """Wait for some futures; raises the first error of any of them, or DeadlineExceeded."""
        done, pending = wait(running, timeout=max(0.0, deadline - monotonic()))
        for future in done:
            future.result()
        if pending:
            raise DeadlineExceeded(
                "all writes must end by the deadline of the save",
                value=f"{len(pending)} of {len(running)} pending",
                place=self._store.place(self._directory),
            )

    def written(self, deadline: float) -> None:
        """Wait for every write; raises the first error of any of them.

        Raises:
            DeadlineExceeded: they were not done by `deadline` (of :func:`time.monotonic`).
        """
        self.await_all([self._may_write, *(writer for writer, _ in self._writers.values()), *self._writes], deadline)

    def finish(self) -> None:
        """Make the blobs durable under their names and read back each size. Everything is written by now."""
        for path, (writer, size_bytes) in self._writers.items():
            info = writer.result().commit()
            if info.size != size_bytes:
                place = self._store.place(f"{self._directory}/{path}")
                raise StoreError(f"must have the {size_bytes} bytes that were written", value=info.size, place=place)

    def abort(self) -> None:
        """Stop writing and throw away what has no name yet. Waits for writes that already run; harmless at the end."""
        writers = [writer for writer, _ in self._writers.values()]
        running: list[Future[Any]] = [*self._writes, *writers]
        for future in running:
            future.cancel()
        wait(running)
        for writer in writers:
            if not writer.cancelled() and writer.exception() is None:
                writer.result().abort()
