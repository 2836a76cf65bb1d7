"""Pytest fixtures for tests that use stoker; installed with the package as the plugin ``stoker``.

================  ======================================================================================================
``s3_server``     one :class:`~stoker.testing.s3.S3Server` for the whole session, started when a test first asks for it;
                  share it by giving each test its own prefix: ``s3_server.url("stoker", prefix)``
``fault_proxy``   a :class:`~stoker.testing.FaultProxy` of its own before that server, without faults to begin with:
                  ``open_store(s3_server.url("stoker", prefix), **fault_proxy.storage_options)``
``node_cache``    a :class:`~stoker.storage.TieredCache` of its own, 64 MiB in shared memory and 64 MiB on disk, gone
                  after the test; the user's own cache is never touched
================  ======================================================================================================

Importing this module imports neither torch nor anything else of stoker, since pytest does so at every start.
"""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from ..storage import TieredCache
    from .proxy import FaultProxy
    from .s3 import S3Server

__all__ = ["fault_proxy", "node_cache", "s3_server"]


@pytest.fixture(scope="session")
def s3_server() -> "Iterator[S3Server]":
    """A running S3 server with the bucket ``stoker``."""
    from .s3 import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def fault_proxy(s3_server: "S3Server") -> "Iterator[FaultProxy]":
    """A proxy before the session's server."""
    from .proxy import FaultProxy

    with FaultProxy(s3_server) as proxy:
        yield proxy


@pytest.fixture
def node_cache(tmp_path: Path) -> "Iterator[TieredCache]":
    """An empty cache with both tiers."""
    from ..storage import TieredCache
    from ..storage._posix import shared_memory_directory

    directory = tempfile.mkdtemp(prefix="test-cache-", dir=shared_memory_directory())
    try:
        with TieredCache(
            ram="64MiB", ram_path=directory, disk=tmp_path / "stoker-cache", disk_capacity="64MiB"
        ) as cache:
            yield cache
    finally:
        shutil.rmtree(directory)
