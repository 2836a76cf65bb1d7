"""Every object store keeps one contract."""

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.storage import ObjectStore, open_store
from stoker.storage.fsspec import FsspecStore
from stoker.storage.local import LocalStore
from stoker.storage.remote import RemoteStore
from stoker.testing import S3Server
from stoker.testing.store import StoreTests


class TestLocalStore(StoreTests):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ObjectStore]:
        with open_store(tmp_path / "root") as store:
            assert isinstance(store, LocalStore)
            yield store


class TestMemory(StoreTests):
    @pytest.fixture
    def store(self) -> Iterator[ObjectStore]:
        with open_store(f"memory://{uuid.uuid4().hex}/root") as store:
            assert isinstance(store, FsspecStore)
            yield store
            for info in list(store.list()):
                store.delete(info.key)


class TestS3(StoreTests):
    races = 2
    large_bytes = 20 * 2**20 + 12345  # three parts

    @pytest.fixture
    def store(self, s3_server: S3Server) -> Iterator[ObjectStore]:
        url = s3_server.url("stoker", f"{uuid.uuid4().hex}/root")
        with open_store(url, **s3_server.storage_options) as store:
            assert isinstance(store, RemoteStore)
            yield store
