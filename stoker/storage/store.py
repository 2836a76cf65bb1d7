"""The seam to all bytes that outlive a process: one small class, blocking calls, typed errors.

A store is a flat map from keys (``"a/b/c"``, no leading slash) to immutable-by-convention objects below one root URL.
Everything above this line (cache, data sets, checkpoints) uses only what stands here, so a new back end is one class
that passes :class:`stoker.testing.store.StoreTests`.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from ..errors import ConfigError, KeyNotFound, UnsafeName
from ._units import Buffer

__all__ = [
    "ObjectInfo",
    "ObjectStore",
    "ObjectWriter",
    "check_range",
    "is_key",
    "redact_url",
    "safe_key",
]

_SEGMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.=+@~ -]{0,254}")


def safe_key(key: str) -> str:
    """`key` itself if it can't leave its root: ``/``-separated names of plain characters, none starting with a dot.

    >>> safe_key("step-000000000001-ab/data/00000-0.safetensors")
    'step-000000000001-ab/data/00000-0.safetensors'
    >>> safe_key("../etc/passwd")
    Traceback (most recent call last):
        ...
    stoker.errors.UnsafeName: key: must be plain names joined by '/', none starting with a dot, got '../etc/passwd'
    """
    if not is_key(key):
        raise UnsafeName("must be plain names joined by '/', none starting with a dot", value=key[:200], place="key")
    return key


def is_key(key: str) -> bool:
    """Whether `key` is a safe key; what is none is no object of a store, and no listing shows it.

    >>> is_key("log/000000000001.json"), is_key(".stoker/probe"), is_key("a//b")
    (True, False, False)
    """
    return len(key) <= 1024 and all(_SEGMENT.fullmatch(part) for part in key.split("/"))


def check_range(start: int, end: int | None, place: str) -> None:
    """Raise ConfigError unless ``0 <= start <= end``."""
    if start < 0 or (end is not None and end < start):
        raise ConfigError("a byte range needs 0 <= start <= end", value=f"[{start}, {end})", place=place)


def redact_url(url: str) -> str:
    """`url` without user, password, query and fragment, so that it may stand in logs and errors.

    >>> redact_url("s3://key:secret@bucket/prefix?X-Amz-Signature=abc")
    's3://bucket/prefix'
    """
    if "://" not in url:
        return url
    try:
        parts = urlsplit(url)
    except ValueError:  # no URL after all: show nothing that could be a secret
        return f"{url.partition('://')[0]}://..."
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectInfo:
    """What a store knows about one object.

    Attributes:
        key: name below the store's root.
        size: bytes.
        version: changes whenever the content is replaced (ETag, generation; inode and mtime on POSIX).
        modified_s: seconds since the epoch, by the store's own clock; in what a write returns, by this machine's.
    """

    key: str
    size: int
    version: str
    modified_s: float


class ObjectWriter(ABC):
    """One large object that becomes visible, whole and durable, at :meth:`commit` and not before.

    :meth:`write_at` may be called from several threads at once; each byte of ``[0, size_bytes)`` must be written
    exactly once. The memory behind `data` must stay unchanged until :meth:`commit` or :meth:`abort` returns. Leaving
    the ``with`` block without a commit, by an exception or not, aborts: nothing is published. After a method has
    raised, only :meth:`abort` does anything.
    """

    @abstractmethod
    def write_at(self, offset: int, data: Buffer) -> None:
        """Write `data` at `offset`. Raises ConfigError outside of ``[0, size_bytes)`` or where it was written before."""

    @abstractmethod
    def commit(self) -> ObjectInfo:
        """Make the object visible. Returns after it is durable (POSIX: fsync of file and directory).

        Raises:
            ConfigError: some byte was never written; nothing is published.
        """

    @abstractmethod
    def abort(self) -> None:
        """Throw away what was written. Harmless after :meth:`commit` and when called twice."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.abort()


class ObjectStore(ABC):
    """Objects below one root. Instances may be used from any thread; after a fork, open a new one in the child.

    Errors of every method: :class:`~stoker.errors.KeyNotFound`, :class:`~stoker.errors.BucketNotFound`,
    :class:`~stoker.errors.AccessDenied`, :class:`~stoker.errors.StoreFull`,
    :class:`~stoker.errors.StoreUnavailable`, :class:`~stoker.errors.UnsafeName` for a bad key.
    """

    def __init__(self, url: str) -> None:
        self.url = redact_url(url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.url!r})"

    def place(self, key: str) -> str:
        """`key` with its root, for messages."""
        return f"{self.url.rstrip('/')}/{key}"

    @abstractmethod
    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        """Bytes ``[start, end)`` of an object, to its end if `end` is None; never fewer, never of two versions.

        The view is read-only and keeps its memory alive. With `version`, an object that was replaced since raises
        :class:`~stoker.errors.ObjectChanged`, as does an object that ends before `end` or `start`.
        """

    @abstractmethod
    def get_into(self, key: str, buffer: memoryview, start: int = 0, *, version: str | None = None) -> None:
        """Fill the writable `buffer` with the bytes from `start` on. The rules of :meth:`get` hold."""

    @abstractmethod
    def put(self, key: str, data: Buffer) -> ObjectInfo:
        """Store an object, replacing one of that name as a whole. Returns when it is durable."""

    @abstractmethod
    def create(self, key: str, data: Buffer) -> ObjectInfo:
        """Store an object if there is none of that name; of any number of racing creators, exactly one succeeds.

        Raises:
            AlreadyExists: there is one. It may be one's own, if an earlier reply was lost: read it back and compare.
            UnsupportedError: this store can't promise that exactly one succeeds.
        """

    @abstractmethod
    def open_writer(self, key: str, size_bytes: int) -> ObjectWriter:
        """A writer for one large object of `size_bytes`; space is reserved first where the store can do so."""

    @abstractmethod
    def head(self, key: str) -> ObjectInfo:
        """Size and version of an object."""

    @abstractmethod
    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        """Objects whose key starts with `prefix` and comes after `start_after`, in lexical order, at most `limit`.

        `prefix` is compared as text (``"log/"`` lists a folder, ``"log"`` also ``"log-old/x"``). Half-written objects
        are never among them, nor is what :func:`safe_key` would refuse (hidden files of other programs).
        """

    @abstractmethod
    def delete(self, key: str) -> None:
        """Remove an object. No error if there is none."""

    def exists(self, key: str) -> bool:
        """Whether there is an object of that name."""
        try:
            self.head(key)
        except KeyNotFound:
            return False
        return True

    def local_path(self, key: str) -> Path | None:
        """The file that holds an object, where the store is a local directory; None elsewhere."""
        return None

    def close(self) -> None:  # noqa: B027 - most stores hold nothing
        """Release connections. The store can't be used afterwards."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
