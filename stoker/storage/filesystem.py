"""``stoker::`` before any fsspec URL: reads go through the node's block cache.

::

    fsspec.open("stoker::s3://bucket/key", s3={"key": ..., "secret": ...}, stoker={"disk": "/nvme/stoker"})
    pandas.read_parquet("stoker::s3://bucket/table.parquet")
    zarr.open("stoker::s3://bucket/array.zarr", mode="r")

An object is cut into fixed blocks that the cache keeps under the object's version. There is no manifest that could say
what a block's bytes must be, so its CRC32C is taken when it is first fetched and stored behind the bytes, as the last
four of the cached block. The CRC32C of anything that ends in its own CRC32C is one constant (the residue of a frame check
sequence), and that is what the cache compares: a copy that was damaged later is thrown away and fetched again. What the
target delivers wrong the first time is not found out here; data sets and checkpoints have manifests for that.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NoReturn

from fsspec import filesystem
from fsspec.spec import AbstractBufferedFile

from ..errors import AccessDenied, ConfigError, MissingExtra, ObjectChanged, UnsupportedError
from ..metrics import counters
from ._checksums import crc32c
from ._units import parse_bytes
from .cache import Block, TieredCache
from .fsspec import version_of
from .store import ObjectStore

try:
    from fsspec.implementations.chained import ChainedFileSystem
except ImportError as error:  # only since this version may a library's own protocol stand before "::"
    raise MissingExtra("stoker:: needs fsspec >= 2025.12", hint="pip install --upgrade fsspec") from error

__all__ = ["StokerFileSystem"]

_CRC_BYTES = 4
_RESIDUE = crc32c(bytes(_CRC_BYTES))
"""CRC32C of any bytes with their own CRC32C, little-endian, behind them; here of none with theirs, which is 0."""

_THREADS = 8  # a guess: enough to overlap round trips to a store, few enough for two cores

_LINE_BYTES = 64 << 10  # how far readline looks at once

_FSSPEC_OPTIONS = {"asynchronous", "loop", "batch_size", "use_listings_cache", "listings_expiry_time", "max_paths"}


class StokerFileSystem(ChainedFileSystem):  # type: ignore[misc]  # fsspec has no types
    """A read-only fsspec file system before another one, whose reads go through a :class:`TieredCache`.

    Names are those of the target, without protocol. ``ls``, ``info``, ``glob`` and the like ask the target. ``open`` and
    ``cat_file`` ask it for the object's version first, one request without data, so that an object that was replaced
    since is read anew; a version's bytes are fetched once for each node. A file reads the version that it was opened
    with: :class:`~stoker.errors.ObjectChanged` if it is replaced meanwhile and not all of it is cached. Objects of which
    the target tells neither a tag nor a time have no version, and their blocks serve one open file only.

    Any thread may use it. Forked children open the target anew. Writing raises.

    Args:
        target_protocol, target_options: the file system behind; or `fs`, an instance of it. fsspec fills them in from a
            chained URL.
        ram, disk, disk_capacity, ram_path: of the cache, as :class:`TieredCache` takes them. File systems of a process
            with equal settings share one.
        block_bytes: of an object that are fetched at once.

    Raises:
        ConfigError: an unknown option, or one that breaks its rule.

    >>> import fsspec
    >>> fsspec.filesystem("memory").pipe("/greeting", b"hello")
    >>> with fsspec.open("stoker::memory://greeting", ram=0) as file:
    ...     file.seek(1), file.read(3)
    (1, b'ell')
    >>> StokerFileSystem.clear_instance_cache()
    """

    protocol = "stoker"
    async_impl = False
    root_marker = ""
    _strip_tokenize_options = ("fo",)  # the path of the URL it came from, which the file system does not depend on

    def __init__(
        self,
        target_protocol: str | None = None,
        target_options: dict[str, Any] | None = None,
        fo: str | None = None,
        fs: Any = None,
        *,
        ram: int | str | None = None,
        disk: str | None = None,
        disk_capacity: int | str | None = None,
        ram_path: str | None = None,
        block_bytes: int | str = "4MiB",
        **options: Any,
    ) -> None:
        if unknown := sorted(set(options) - _FSSPEC_OPTIONS):
            raise ConfigError("no such option", value=", ".join(unknown), place="stoker::")
        if (fs is None) == (target_protocol is None):
            raise ConfigError("give a target, as a URL behind stoker:: or as fs=, and not both", place="stoker::")
        super().__init__(**options)
        self._target = _Target(filesystem(target_protocol, **(target_options or {})) if fs is None else fs)
        self._block_bytes = parse_bytes(block_bytes, place="block_bytes")
        if not self._block_bytes:
            raise ConfigError("block_bytes must be >= 1", value=block_bytes, place="stoker::")
        self._cache_options = {"ram": ram, "disk": disk, "disk_capacity": disk_capacity, "ram_path": ram_path}
        self._shared: _SharedCache | None = None
        self._strip_protocol = self._target_name  # instances have different targets, so it can't be a class method

    def _target_name(self, path: Any) -> Any:
        if isinstance(path, list):
            return [self._target_name(one) for one in path]
        path = os.fspath(path) if isinstance(path, os.PathLike) else path
        return self.fs._strip_protocol(path.removeprefix("stoker::"))

    @property
    def fs(self) -> Any:
        """The target, in this process."""
        return self._target.fs

    @property
    def cache(self) -> TieredCache:
        """Where its blocks are kept; :meth:`TieredCache.stats` says what it did."""
        if self._shared is None:
            self._shared = _shared_cache(self._cache_options)
        return self._shared.cache

    # -- names: the target's business

    def unstrip_protocol(self, name: str) -> str:
        return f"stoker::{self.fs.unstrip_protocol(name.removeprefix('stoker::'))}"

    def _parent(self, path: str) -> str:
        return str(self.fs._parent(path))

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self.fs.ls(self._target_name(path), detail=detail, **options)

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return dict(self.fs.info(self._target_name(path), **options))

    def exists(self, path: str, **options: Any) -> bool:
        return bool(self.fs.exists(self._target_name(path), **options))

    def isfile(self, path: str) -> bool:
        return bool(self.fs.isfile(self._target_name(path)))

    def isdir(self, path: str) -> bool:
        return bool(self.fs.isdir(self._target_name(path)))

    def glob(self, path: str, **options: Any) -> Any:
        return self.fs.glob(self._target_name(path), **options)

    def find(self, path: str, **options: Any) -> Any:
        return self.fs.find(self._target_name(path), **options)

    def walk(self, path: str, **options: Any) -> Any:
        return self.fs.walk(self._target_name(path), **options)

    def created(self, path: str) -> Any:
        return self.fs.created(self._target_name(path))

    def modified(self, path: str) -> Any:
        return self.fs.modified(self._target_name(path))

    def checksum(self, path: str) -> Any:
        return self.fs.checksum(self._target_name(path))

    def ukey(self, path: str) -> Any:
        return self.fs.ukey(self._target_name(path))

    def sign(self, path: str, expiration: int = 100, **options: Any) -> Any:
        return self.fs.sign(self._target_name(path), expiration=expiration, **options)

    def invalidate_cache(self, path: str | None = None) -> None:
        """Forget listings of the target. Blocks stay: they belong to versions."""
        self.fs.invalidate_cache(None if path is None else self._target_name(path))

    # -- bytes

    def _open(self, path: str, mode: str = "rb", **options: Any) -> "_CachedFile":
        if mode != "rb":
            self._refuse(path)
        return _CachedFile(self, self._object(path))

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **options: Any) -> bytes:
        """Bytes ``[start, end)`` as Python's slices have them: a negative bound counts from the end."""
        one = self._object(path)
        start, end = one.bounds(start, end)
        blocks = one.blocks(start, end)
        return _assemble(self._views([(one, block) for block in blocks]), blocks, start, end)

    def cat_ranges(
        self,
        paths: list[str],
        starts: Any,
        ends: Any,
        max_gap: int | None = None,
        on_error: str = "return",
        **options: Any,
    ) -> list[Any]:
        """Ranges of objects, as :meth:`cat_file` has them. All missing blocks are fetched together.

        One request for the version of each distinct object. `on_error` as everywhere in fsspec: ``"return"`` puts an
        exception in the place of its range.
        """
        if max_gap is not None:
            raise UnsupportedError("blocks are fetched whole: there are no gaps", value="max_gap", place="stoker::")
        starts = starts if isinstance(starts, list) else [starts] * len(paths)
        ends = ends if isinstance(ends, list) else [ends] * len(paths)
        if not len(paths) == len(starts) == len(ends):
            raise ConfigError("paths, starts and ends must be of one length", value=len(paths), place="cat_ranges")
        found: dict[str, _Object | Exception] = {}
        for path in dict.fromkeys(paths):
            try:
                found[path] = self._object(path)
            except Exception as error:  # noqa: BLE001 - raised below, or returned as fsspec has it
                found[path] = error
        wanted = []
        for path, start, end in zip(paths, starts, ends, strict=True):
            one = found[path]
            wanted.append((one, *((0, 0) if isinstance(one, Exception) else one.bounds(start, end))))
        blocks = [(one, b) for one, *span in wanted if isinstance(one, _Object) for b in one.blocks(*span)]
        views = self._views(blocks)
        out: list[Any] = []
        for one, start, end in wanted:
            try:
                if isinstance(one, Exception):
                    raise one
                out.append(_assemble(views, one.blocks(start, end), start, end))
            except Exception as error:
                if on_error != "return":
                    raise
                out.append(error)
        return out

    def _object(self, path: str) -> "_Object":
        """An object as it is now."""
        return _Object(self._target, self._target_name(path), self._block_bytes)

    def _views(self, wanted: Sequence[tuple["_Object", Block]]) -> dict[Block, "memoryview | Exception"]:
        """Blocks by the cache, missing ones together; an exception stands for what could not be had."""

        def get(pair: tuple[_Object, Block]) -> memoryview | Exception:
            try:
                return cache.get(*pair)
            except Exception as error:  # noqa: BLE001 - raised by whoever needs the block
                return error

        cache = self.cache
        distinct = {block: one for one, block in wanted}
        pairs = [(one, block) for block, one in distinct.items()]
        if len(pairs) < 2:
            return {block: get((one, block)) for one, block in pairs}
        with ThreadPoolExecutor(min(_THREADS, len(pairs)), thread_name_prefix="stoker-read") as pool:
            return dict(zip(distinct, pool.map(get, pairs), strict=True))

    # -- writing: not here

    def makedirs(self, path: Any, exist_ok: bool = False) -> NoReturn:
        # fsspec.open() makes the parent of a file first, and passes over this one: what it then opens tells the file.
        raise AccessDenied("stoker:: only reads", value=str(path), place=f"stoker::{self._target.protocol}")

    def _refuse(self, path: Any = "", *arguments: Any, **options: Any) -> NoReturn:
        raise UnsupportedError(
            "stoker:: only reads", value=str(path), place=f"stoker::{self._target.protocol}", hint="write to the target"
        )

    mkdir = rmdir = touch = pipe_file = put_file = rm = rm_file = _rm = cp_file = mv = _refuse


def _assemble(views: dict[Block, "memoryview | Exception"], blocks: Sequence[Block], start: int, end: int) -> bytes:
    pieces = []
    for block in blocks:
        view = views[block]
        if isinstance(view, Exception):
            raise view
        pieces.append(view[max(0, start - block.start) : min(len(view) - _CRC_BYTES, end - block.start)])
    return b"".join(pieces)


class _Target:
    """The file system behind, in this process."""

    def __init__(self, fs: Any) -> None:
        self._fs, self._pid = fs, os.getpid()
        self.protocol: str = fs.protocol if isinstance(fs.protocol, str) else fs.protocol[0]
        kind = f"{type(fs).__module__}.{type(fs).__qualname__}"
        settings = json.dumps([kind, fs.storage_args, fs.storage_options], sort_keys=True, default=str)
        self.identity = hashlib.sha256(settings.encode()).hexdigest()  # its settings may hold secrets

    @property
    def fs(self) -> Any:
        if self._pid != os.getpid():  # its event loop runs in a thread that stayed with the parent
            self._fs = type(self._fs)(*self._fs.storage_args, **self._fs.storage_options)
            self._pid = os.getpid()
        return self._fs

    def info(self, name: str) -> dict[str, Any]:
        """What the target says now, not the listing that it remembers."""
        self.fs.invalidate_cache(self.fs._parent(name))
        info = self.fs.info(name)
        if info["type"] == "directory":
            raise IsADirectoryError(name)
        return dict(info)


class _Object(ObjectStore):
    """One version of one object: the store that the cache gets its blocks from, each with its CRC32C behind it."""

    def __init__(self, target: _Target, name: str, block_bytes: int) -> None:
        self._target, self.name, self._block_bytes = target, name, block_bytes
        self.info = target.info(name)
        super().__init__(f"{target.fs.unstrip_protocol(name)}")
        if self.info["size"] is None:
            raise UnsupportedError("the target must tell the size of an object", place=self.place(""))
        self.size = int(self.info["size"])
        self.tag = version_of(self.info)
        # The name may hold more than messages show, and equal names of two servers are two objects.
        told = [target.identity, name, self.size, self.tag or os.urandom(16).hex()]
        self._version = hashlib.sha256(json.dumps(told).encode()).hexdigest()

    def place(self, key: str) -> str:
        return f"stoker::{self.url}"

    def bounds(self, start: int | None, end: int | None) -> tuple[int, int]:
        """A range as Python's slices have it, within the object."""
        return slice(start, end).indices(self.size)[:2]

    def blocks(self, start: int, end: int) -> list[Block]:
        """The blocks that hold ``[start, end)``; each ends four bytes later than its part of the object."""
        if end <= start:
            return []
        size = self._block_bytes
        return [
            Block(
                key=self.name,
                version=self._version,
                start=first,
                end=min(first + size, self.size) + _CRC_BYTES,
                crc32c=_RESIDUE,
            )
            for first in range(start // size * size, end, size)
        ]

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        assert end is not None
        end -= _CRC_BYTES
        counters.add("store.get.requests")
        data = self._target.fs.cat_file(self.name, start=start, end=end)
        counters.add("store.get.bytes", len(data))
        # A version never comes back: if it is still the current one, it is what was read.
        now = None if self.tag is None else version_of(self._target.info(self.name))
        if now != self.tag or len(data) != end - start:
            raise ObjectChanged(
                f"must still be version {self.tag} of {self.size} bytes",
                value=now if now != self.tag else f"{len(data)} bytes of [{start}, {end})",
                place=self.place(key),
                hint="open it again to read what is there now",
            )
        return memoryview(bytes(data) + crc32c(data).to_bytes(_CRC_BYTES, "little"))

    def _unused(self, *arguments: Any, **options: Any) -> NoReturn:
        raise UnsupportedError("the cache only gets blocks", place=self.place(""))

    get_into = put = create = open_writer = head = list = delete = _unused


class _CachedFile(AbstractBufferedFile):  # type: ignore[misc]
    """One version of an object, open for reading."""

    def __init__(self, fs: StokerFileSystem, one: _Object) -> None:
        super().__init__(fs, one.name, "rb", block_size=_LINE_BYTES, cache_type="none", size=one.size)
        self._object = one
        self.details = one.info

        self._held: tuple[Block, memoryview] | None = None  # of small reads, most stay in the block of the one before

    def _fetch_range(self, start: int, end: int) -> bytes:
        end = min(end, self.size)
        if self._held is not None:
            block, view = self._held
            if block.start <= start and end <= block.end - _CRC_BYTES:
                return bytes(view[start - block.start : end - block.start])
        blocks = self._object.blocks(start, end)
        views = self.fs._views([(self._object, block) for block in blocks])
        data = _assemble(views, blocks, start, end)
        self._held = (blocks[-1], views[blocks[-1]]) if blocks else None
        return data

    def close(self) -> None:
        self._held = None
        super().close()

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (self.fs, self.path, self._object.tag, self.size, self.loc)


def _reopen(fs: StokerFileSystem, path: str, tag: str | None, size: int, loc: int) -> _CachedFile:
    file = fs._open(path)
    if (file._object.tag, file.size) != (tag, size):
        raise ObjectChanged(
            f"must still be version {tag} of {size} bytes", value=file._object.tag, place=file._object.place("")
        )
    file.seek(loc)
    return file


class _SharedCache:
    """A cache that closes when no file system of this process uses it any more."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.cache = TieredCache(**options)
        weakref.finalize(self, self.cache.close)


_caches: "weakref.WeakValueDictionary[str, _SharedCache]" = weakref.WeakValueDictionary()


def _shared_cache(options: dict[str, Any]) -> _SharedCache:
    # No lock, which a fork could leave taken: of two that are made at once, one is used and the other closed.
    key = json.dumps(options, sort_keys=True, default=str)
    shared = _caches.get(key)
    return _caches.setdefault(key, _SharedCache(options)) if shared is None else shared
