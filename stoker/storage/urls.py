"""Which store a URL names: the one place that knows them all."""

import os
import re
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .store import ObjectStore, redact_url

__all__ = ["OBSTORE_SCHEMES", "is_local_url", "open_store", "scheme_of"]

OBSTORE_SCHEMES = frozenset({"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "http", "https"})
"""Those of the stores whose requests go by a :class:`~stoker.storage.NetworkPolicy`."""

_ALMOST_URL = re.compile(r"[a-z][a-z0-9+.-]+:/", re.IGNORECASE)


def is_local_url(url: str) -> bool:
    """Whether `url` is a plain path or a ``file://`` URL.

    >>> is_local_url("/data/web"), is_local_url("file:///data/web"), is_local_url("s3://bucket/web")
    (True, True, False)
    """
    return "://" not in url or url.startswith("file://")


def scheme_of(url: str) -> str:
    """The scheme of `url` in lower case; ``"file"`` for a plain path.

    >>> scheme_of("S3://bucket/web"), scheme_of("/data/web")
    ('s3', 'file')
    """
    return url.split("://", 1)[0].lower() if "://" in url else "file"


def open_store(url: str | Path, **storage_options: Any) -> ObjectStore:
    """Open the store that a URL or a plain path names. Makes no request.

    ===========================  ===============================================================================
    plain path, ``file://``      POSIX with fsync, exclusive link and O_DIRECT for large objects
    ``s3 gs az abfs http(s)``    obstore (Rust); option names and credential lookup as fsspec users know them:
                                 ``key, secret, token, endpoint_url, region, anon`` and the ``AWS_*`` variables
    any other fsspec URL         its fsspec file system, which gets `storage_options` as they are
    ===========================  ===============================================================================

    Those of the second line also take ``network=NetworkPolicy(...)``: time-outs, retries, requests at once.

    Raises:
        ConfigError: an unknown option, or a URL that is none or lacks a bucket.
        MissingExtra: the library for that protocol is not installed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as directory, open_store(directory) as store:
    ...     info = store.put("greeting", b"hello")
    ...     bytes(store.get("greeting", 1, 4)), info.size
    (b'ell', 5)
    """
    if not isinstance(url, str | os.PathLike):
        raise ConfigError("a URL or a path must be text or a Path", value=repr(url), place="open_store")
    url = str(url)
    if not url:
        raise ConfigError("a URL or a path must not be empty", value=url, place="open_store")
    if "\0" in url:
        raise ConfigError("a URL or a path has no NUL character", value=redact_url(url), place="open_store")
    if "://" not in url and _ALMOST_URL.match(url):
        raise ConfigError(
            "a URL has :// behind its scheme",
            value=f"{url.partition('/')[0]}/...",
            place="open_store",
            hint="pass a URL as text, not as a Path; a directory of that name is ./NAME",
        )
    scheme = scheme_of(url)
    if scheme == "file":
        if storage_options:
            names = ", ".join(sorted(storage_options))
            raise ConfigError("a local store takes no storage options", value=names, place=redact_url(url))
        from .local import LocalStore

        return LocalStore(url)
    if scheme in OBSTORE_SCHEMES:
        from .remote import RemoteStore

        return RemoteStore(url, **storage_options)
    from .fsspec import FsspecStore

    return FsspecStore(url, **storage_options)
