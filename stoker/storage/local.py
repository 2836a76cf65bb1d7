"""Objects as files below a directory, with the durability protocol of :mod:`stoker.storage._posix`."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

from ..errors import BucketNotFound, ConfigError, KeyNotFound, ObjectChanged
from ..metrics import counters
from ._coverage import Coverage
from ._posix import (
    UnnamedFile,
    fsync_directory,
    is_direct,
    make_directories,
    pread_into,
    pwrite_all,
    remove_leftovers,
    translate_os_errors,
)
from ._units import Buffer
from .store import ObjectInfo, ObjectStore, ObjectWriter, check_range, is_key, safe_key

__all__ = ["LocalStore"]


_DIRECT_READ_BYTES = 1 << 20
"""Aligned reads from here on go around the page cache, which would copy them once more and evict something for it."""


def _version(info: os.stat_result) -> str:
    return f"{info.st_ino:x}-{info.st_mtime_ns:x}-{info.st_size:x}"


def _info(key: str, info: os.stat_result) -> ObjectInfo:
    return ObjectInfo(key=key, size=info.st_size, version=_version(info), modified_s=info.st_mtime)


class LocalStore(ObjectStore):
    """A directory tree. The root itself is created by the first write; directories get mode 0700, files 0600."""

    def __init__(self, url: str | Path) -> None:
        text = str(url)
        if text.startswith("file://"):
            parts = urlsplit(text)
            if parts.netloc not in ("", "localhost"):
                raise ConfigError("a file URL names no host", value=text, place="open_store", hint="file:///path")
            text = unquote(parts.path)
        if "\0" in text:
            raise ConfigError("a path has no NUL character", value=text, place="open_store")
        # Made absolute now: a later chdir of the trainer must not move the store.
        self.root = Path(os.path.abspath(os.path.expanduser(text)))
        super().__init__(str(self.root))

    def local_path(self, key: str) -> Path:
        return self.root / safe_key(key)

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        check_range(start, end, self.place(key))
        fd, info = self._open(key, version)
        try:
            stop = info.st_size if end is None else end
            if max(start, stop) > info.st_size:
                raise self._too_short(key, start, stop, info.st_size)
            buffer = memoryview(bytearray(stop - start))
            self._fill(fd, key, buffer, start)
        finally:
            os.close(fd)
        return buffer.toreadonly()

    def get_into(self, key: str, buffer: memoryview, start: int = 0, *, version: str | None = None) -> None:
        fd, _ = self._open(key, version, direct=len(buffer) >= _DIRECT_READ_BYTES and is_direct(buffer, start))
        try:
            self._fill(fd, key, buffer, start)
        finally:
            os.close(fd)

    def _open(self, key: str, version: str | None, *, direct: bool = False) -> tuple[int, os.stat_result]:
        path = self.local_path(key)
        flags = os.O_RDONLY | os.O_CLOEXEC
        with translate_os_errors(str(path)):
            try:
                fd = os.open(path, flags | (os.O_DIRECT if direct else 0))
            except NotADirectoryError:  # one of the folders in its name is an object
                raise _no_object(path) from None
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                fd = os.open(path, flags)  # a file system without O_DIRECT
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode):
            os.close(fd)
            raise _no_object(path)
        if version is not None and _version(info) != version:
            os.close(fd)
            raise ObjectChanged(f"must still be version {version}", value=_version(info), place=str(path))
        return fd, info

    def _too_short(self, key: str, start: int, end: int, size: int) -> ObjectChanged:
        return ObjectChanged(
            f"must hold bytes [{start}, {end})",
            value=f"{size} bytes",
            place=self.place(key),
            hint="the file is shorter than its description says: it was replaced or cut",
        )

    def _fill(self, fd: int, key: str, buffer: memoryview, start: int) -> None:
        with translate_os_errors(self.place(key)):
            got = pread_into(fd, buffer, start)
        if got < len(buffer):
            raise self._too_short(key, start, start + len(buffer), start + got)
        counters.add("local.get.requests")
        counters.add("local.get.bytes", got)

    def put(self, key: str, data: Buffer) -> ObjectInfo:
        return self._write(key, data, exclusive=False)

    def create(self, key: str, data: Buffer) -> ObjectInfo:
        return self._write(key, data, exclusive=True)

    def _write(self, key: str, data: Buffer, *, exclusive: bool) -> ObjectInfo:
        path = self.local_path(key)
        with translate_os_errors(str(path)):
            file = UnnamedFile(path.parent)
            try:
                pwrite_all(file.fd, data, 0)
                file.sync()
                _name_it(path, lambda: file.link(path) if exclusive else file.replace(path))
                info = file.stat()
            finally:
                file.close()
        counters.add("local.put.requests")
        counters.add("local.put.bytes", info.st_size)
        return _info(key, info)

    def open_writer(self, key: str, size_bytes: int) -> "LocalWriter":
        return LocalWriter(self, key, size_bytes)

    def head(self, key: str) -> ObjectInfo:
        path = self.local_path(key)
        with translate_os_errors(str(path)):
            try:
                info = path.stat()
            except NotADirectoryError:
                raise _no_object(path) from None
        if not stat.S_ISREG(info.st_mode):
            raise _no_object(path)
        return _info(key, info)

    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        folder = prefix.rpartition("/")[0]
        if folder:
            safe_key(folder)
        left = limit
        for key, path in self._walk(self.root / folder, f"{folder}/" if folder else ""):
            if left is not None and left <= 0:
                return
            if key.startswith(prefix) and key > start_after:
                try:
                    with translate_os_errors(str(path)):
                        info = path.stat()
                except KeyNotFound:  # deleted since the directory was read
                    continue
                if stat.S_ISREG(info.st_mode):
                    yield _info(key, info)
                    left = None if left is None else left - 1

    def _walk(self, directory: Path, prefix: str) -> Iterator[tuple[str, Path]]:
        with translate_os_errors(str(directory)):
            try:
                with os.scandir(directory) as entries:
                    # "a/" sorts as a key sorts: by its full text, so that "a-b" comes before "a/b".
                    named = sorted((e.name + "/" if e.is_dir(follow_symlinks=False) else e.name) for e in entries)
            except (FileNotFoundError, NotADirectoryError):
                return
        for name in named:
            if not is_key(name.rstrip("/")):  # hidden files, temporary names: no objects
                continue
            if name.endswith("/"):
                yield from self._walk(directory / name[:-1], prefix + name)
            else:
                yield prefix + name, directory / name

    def delete(self, key: str) -> None:
        path = self.local_path(key)
        with translate_os_errors(str(path)):
            try:
                path.unlink()
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                return
            # Empty directories are not objects: remove them upwards, but never the root.
            parent = path.parent
            remove_leftovers(parent)
            with suppress(OSError):
                while parent != self.root and self.root in parent.parents:
                    parent.rmdir()
                    parent = parent.parent
            with suppress(FileNotFoundError):
                fsync_directory(parent)

    def check_root(self) -> None:
        """Raise BucketNotFound unless the root directory is there."""
        if not self.root.is_dir():
            raise BucketNotFound("no such directory", place=str(self.root))


class LocalWriter(ObjectWriter):
    """A preallocated file without a name; aligned writes go around the page cache."""

    def __init__(self, store: LocalStore, key: str, size_bytes: int) -> None:
        self._path = store.local_path(key)
        self._key, self._size_bytes = key, size_bytes
        self._coverage = Coverage(str(self._path), size_bytes)
        self._open = True
        with translate_os_errors(str(self._path)):
            self._file = UnnamedFile(self._path.parent, size_bytes=size_bytes)

    def write_at(self, offset: int, data: Buffer) -> None:
        self._require_open()
        self._coverage.claim(offset, memoryview(data).nbytes)
        try:
            with translate_os_errors(str(self._path)):
                self._file.pwrite(data, offset)
        except BaseException:
            self._open = False  # the bytes are claimed but not there: this file must never get its name
            raise

    def commit(self) -> ObjectInfo:
        self._require_open()
        self._coverage.require_complete()
        self._open = False  # whatever happens next: fsync is asked once
        try:
            with translate_os_errors(str(self._path)):
                self._file.sync()
                _name_it(self._path, lambda: self._file.replace(self._path))
                info = self._file.stat()
        finally:
            self.abort()
        counters.add("local.put.requests")
        counters.add("local.put.bytes", info.st_size)
        return _info(self._key, info)

    def _require_open(self) -> None:
        if not self._open:
            raise ConfigError("a writer can't be used after commit, abort or a failed write", place=str(self._path))

    def abort(self) -> None:
        self._open = False
        self._file.close()


def _name_it(path: Path, act: Callable[[], None]) -> None:
    """`act`, again if the directory disappears: deleting the last object in it removes it, at any moment."""
    for _ in range(100):
        with suppress(FileNotFoundError):
            return act()
        make_directories(path.parent)
    return act()


def _no_object(path: Path) -> KeyNotFound:
    return KeyNotFound("no such object: a name is a file or a directory, never both", place=str(path))
