"""Objects behind any other fsspec URL: ``memory://``, ``hf://``, ``github://``, whatever is installed.

fsspec promises less than the stores that stoker speaks to itself, so this uses the few calls that are safe. Files are
written whole (``pipe_file``, ``put_file``) and never with ``open(url, "wb")``, which publishes the half-written file when
an exception leaves its ``with`` block. Create-if-absent is offered only where it is one operation of the store.
"""

import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

from ..errors import (
    AccessDenied,
    AlreadyExists,
    ConfigError,
    KeyNotFound,
    MissingExtra,
    ObjectChanged,
    StokerError,
    StoreUnavailable,
    UnsupportedError,
)
from ..metrics import counters
from ._coverage import Coverage
from ._posix import pwrite_all, translate_os_errors
from ._units import Buffer
from .store import ObjectInfo, ObjectStore, ObjectWriter, check_range, is_key, safe_key

__all__ = ["FsspecStore", "version_of"]

_memory_lock = threading.RLock()
"""Every write to ``memory://``, which has one tree for the whole process, so that look-and-write is one operation."""

_EXCLUSIVE = ("s3fs.", "gcsfs.", "adlfs.")  # their mode="create" is a conditional request
_TIME_FIELDS = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")
_VERSION_FIELDS = ("ETag", "etag", "e_tag", "generation", "md5", "checksum", "sha256", "blob_id")


class FsspecStore(ObjectStore):
    """Objects below an fsspec URL. Its file system gets `storage_options` as they are.

    A put is as atomic and as durable as the file system's ``pipe_file``. Two writes of equal length may get the same
    version if the file system tells neither a tag nor a modification time. After a fork the child opens its own.

    Raises:
        ConfigError: the protocol is unknown, or its file system refuses the options.
        MissingExtra: its library is not installed.
    """

    def __init__(self, url: str, **storage_options: Any) -> None:
        super().__init__(url)
        self._full_url, self._options = url, storage_options
        self._open()
        self._memory = "memory" in _protocols(self._fs)

    def _open(self) -> None:
        import fsspec.core

        self._pid = os.getpid()
        try:
            with self._translated("", passing=(ImportError, TypeError, ValueError)):
                self._fs, root = fsspec.core.url_to_fs(self._full_url, **self._options)
        except ImportError as error:
            package = error.name or str(error)
            raise MissingExtra(
                "this URL needs a library that is not installed", value=package, place=self.url, hint=str(error)
            ) from error
        except (TypeError, ValueError) as error:
            raise ConfigError("fsspec must know the URL and its options", value=str(error), place=self.url) from error
        self._root = str(root).rstrip("/")

    def __reduce__(self) -> tuple[Any, ...]:
        return (_reopen, (self._full_url, self._options))

    def _path(self, key: str) -> str:
        if self._pid != os.getpid():  # its event loop runs in a thread that stayed with the parent
            self._open()
        return f"{self._root}/{key}"

    @contextmanager
    def _translated(self, key: str, *, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
        place = self.place(key) if key else self.url
        try:
            yield
        except StokerError:
            raise
        except passing:
            raise
        except FileNotFoundError:
            raise KeyNotFound("no such object", place=place) from None
        except FileExistsError:
            raise AlreadyExists("must not exist yet", place=place) from None
        except IsADirectoryError:
            raise KeyNotFound("no such object, but a directory", place=place) from None
        except PermissionError:
            raise AccessDenied("the store must accept the credentials", place=place) from None
        except NotImplementedError:
            raise UnsupportedError("the file system must have this operation", place=place) from None
        except OSError as error:
            with translate_os_errors(place):
                raise OSError(error.errno, type(error).__name__) from None
        except Exception as error:  # noqa: BLE001 - raised again, typed; its text may hold URLs with signatures
            raise StoreUnavailable("the store must answer", value=type(error).__name__, place=place) from None

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        place = self.place(safe_key(key))
        check_range(start, end, place)
        if version is not None or end is None or end == start:
            size = self._current(key, version).size
            if max(start, end or 0) > size:
                raise self._too_short(key, start, end)
            end = size if end is None else end
        data = memoryview(b"")
        if end > start:
            counters.add("store.get.requests")
            with self._translated(key):
                data = memoryview(self._fs.cat_file(self._path(key), start=start, end=end)).toreadonly()
            counters.add("store.get.bytes", len(data))
        if len(data) != end - start:
            raise self._too_short(key, start, end)
        if version is not None:
            # A version never comes back: if it is still the current one, it is what was read.
            self._current(key, version)
        return data

    def get_into(self, key: str, buffer: memoryview, start: int = 0, *, version: str | None = None) -> None:
        buffer[:] = self.get(key, start, start + len(buffer), version=version)

    def _current(self, key: str, version: str | None) -> ObjectInfo:
        info = self.head(key)
        if version is not None and info.version != version:
            raise ObjectChanged(f"must still be version {version}", value=info.version, place=self.place(key))
        return info

    def _too_short(self, key: str, start: int, end: int | None) -> ObjectChanged:
        return ObjectChanged(
            f"must hold bytes [{start}, {'its end' if end is None else end})",
            place=self.place(key),
            hint="the object is shorter than its description says: it was replaced or cut",
        )

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        raw, path = bytes(data), self._path(safe_key(key))
        counters.add("store.put.requests")
        with self._translated(key), _memory_lock if self._memory else nullcontext():
            self._fs.pipe_file(path, raw)
        counters.add("store.put.bytes", len(raw))
        return self.head(key)

    def create(self, key: str, data: Buffer) -> ObjectInfo:
        raw, path = bytes(data), self._path(safe_key(key))
        if not self._memory and not type(self._fs).__module__.startswith(_EXCLUSIVE):
            raise UnsupportedError(
                "the file system must be able to create an object exclusively",
                value="/".join(_protocols(self._fs)),
                place=self.place(key),
                hint="use a local path, s3://, gs:// or az:// for data sets and checkpoints that are written",
            )
        counters.add("store.put.requests")
        with self._translated(key):
            if self._memory:
                with _memory_lock:
                    if self._fs.exists(path):
                        raise FileExistsError(path)
                    self._fs.pipe_file(path, raw)
            else:
                self._fs.pipe_file(path, raw, mode="create")
        counters.add("store.put.bytes", len(raw))
        return self.head(key)

    def open_writer(self, key: str, size_bytes: int) -> "FsspecWriter":
        return FsspecWriter(self, safe_key(key), size_bytes)

    def _put_file(self, source: Path, key: str, size_bytes: int) -> ObjectInfo:
        counters.add("store.put.requests")
        path = self._path(key)
        with self._translated(key), _memory_lock if self._memory else nullcontext():
            self._fs.put_file(str(source), path)
        counters.add("store.put.bytes", size_bytes)
        info = self.head(key)
        if info.size != size_bytes:
            raise ObjectChanged(
                f"must hold the {size_bytes} bytes that were written", value=info.size, place=self.place(key)
            )
        return info

    def head(self, key: str) -> ObjectInfo:
        path = self._path(safe_key(key))
        counters.add("store.head.requests")
        with self._translated(key):
            self._fs.invalidate_cache(self._fs._parent(path))  # a listing it remembers would answer with the past
            info = self._fs.info(path)
            if info["type"] != "file":
                raise IsADirectoryError(path)
            return _object_info(key, info)

    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            safe_key(folder)
        return self._list(folder, prefix, start_after, limit)

    def _list(self, folder: str, prefix: str, start_after: str, limit: int | None) -> Iterator[ObjectInfo]:
        counters.add("store.list.requests")
        path = self._path(folder).rstrip("/")
        try:
            with self._translated(folder):
                self._fs.invalidate_cache()
                found = self._fs.find(path, detail=True)
        except KeyNotFound:
            return
        root = f"{self._root}/"
        keys = {name.removeprefix(root): info for name, info in found.items() if name.startswith(root)}
        chosen = sorted(key for key in keys if key.startswith(prefix) and key > start_after and is_key(key))
        for key in chosen[:limit]:
            yield _object_info(key, keys[key])

    def delete(self, key: str) -> None:
        path = self._path(safe_key(key))
        counters.add("store.delete.requests")
        try:
            with self._translated(key), _memory_lock if self._memory else nullcontext():
                self._fs.rm_file(path)
        except KeyNotFound:
            return


# Guarantees: write_at may be called from several threads at once; pwrite needs no lock.
class FsspecWriter(ObjectWriter):
    """A nameless temporary file on this machine that is uploaded whole at commit."""

    def __init__(self, store: FsspecStore, key: str, size_bytes: int) -> None:
        self._store, self._key, self._size_bytes = store, key, size_bytes
        self._coverage = Coverage(store.place(key), size_bytes)
        self._place = tempfile.gettempdir()
        with translate_os_errors(self._place):
            self._file = tempfile.NamedTemporaryFile(prefix="stoker-upload-")  # noqa: SIM115 - closed by abort()
        try:
            if size_bytes:
                with translate_os_errors(self._place):
                    os.posix_fallocate(self._file.fileno(), 0, size_bytes)
        except BaseException:
            self._file.close()
            raise

    def write_at(self, offset: int, data: Buffer) -> None:
        view = memoryview(data).cast("B")
        self._require_open()
        self._coverage.claim(offset, len(view))
        with translate_os_errors(self._place):
            pwrite_all(self._file.fileno(), view, offset)

    def commit(self) -> ObjectInfo:
        self._require_open()
        self._coverage.require_complete()
        try:
            return self._store._put_file(Path(self._file.name), self._key, self._size_bytes)
        finally:
            self.abort()

    def _require_open(self) -> None:
        if self._file.closed:
            raise ConfigError("a writer can't be used after commit or abort", place=self._store.place(self._key))

    def abort(self) -> None:
        self._file.close()


def _reopen(url: str, options: dict[str, Any]) -> FsspecStore:
    return FsspecStore(url, **options)


def _protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def _object_info(key: str, info: dict[str, Any]) -> ObjectInfo:
    size, modified_s = int(info["size"] or 0), _modified_s(info)
    tag = version_of(info) or f"{modified_s:.6f}-{size}"
    return ObjectInfo(key=key, size=size, version=tag, modified_s=modified_s)


def version_of(info: dict[str, Any]) -> str | None:
    """What tells this content of a file from others, by a file system's ``info``; None if it tells no tag and no time."""
    tag = next((str(info[name]) for name in _VERSION_FIELDS if info.get(name)), None)
    if tag is None and (modified_s := _modified_s(info)):
        return f"{modified_s:.6f}-{info['size']}" + (f"-{info['ino']}" if "ino" in info else "")
    return tag


def _modified_s(info: dict[str, Any]) -> float:
    return next((moment for name in _TIME_FIELDS if (moment := _seconds(info.get(name)))), 0.0)


def _seconds(moment: Any) -> float:
    """Seconds since the epoch of what file systems call a time; 0 for what is none."""
    if isinstance(moment, str):
        try:
            moment = datetime.fromisoformat(moment)
        except ValueError:
            return 0.0
    if isinstance(moment, datetime):
        return moment.timestamp()
    return float(moment) if isinstance(moment, int | float) else 0.0
