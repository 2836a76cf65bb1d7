"""Azure Blob Storage: the contract against a real server, its options, and whole files."""

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.errors import AccessDenied, BucketNotFound, MissingExtra, ObjectChanged, StokerError
from stoker.storage import ObjectStore, open_store
from stoker.storage._checksums import crc32c
from stoker.storage.drain import download, upload
from stoker.storage.remote import RemoteStore
from stoker.testing.azure import AzureServer
from stoker.testing.store import StoreTests

PART = 5 * 2**20


@pytest.fixture(scope="module")
def server() -> Iterator[AzureServer]:
    try:
        with AzureServer() as server:
            yield server
    except MissingExtra as error:
        pytest.skip(str(error))


@pytest.fixture
def store(server: AzureServer) -> Iterator[ObjectStore]:
    with open_store(server.url("stoker", uuid.uuid4().hex), **server.storage_options) as store:
        yield store


class TestAzure(StoreTests):
    races = 2
    large_bytes = 20 * 2**20 + 12345  # three parts

    @pytest.fixture
    def store(self, server: AzureServer) -> Iterator[ObjectStore]:
        url = server.url("stoker", f"{uuid.uuid4().hex}/root")
        with open_store(url, **server.storage_options) as store:
            assert isinstance(store, RemoteStore)
            yield store


def test_an_empty_object_has_no_range_but_the_empty_one(store: ObjectStore) -> None:
    store.put("empty", b"")
    assert bytes(store.get("empty")) == bytes(store.get("empty", 0, 0)) == b""
    with pytest.raises(ObjectChanged):
        store.get("empty", 0, 1)


def test_a_missing_container_is_named(server: AzureServer) -> None:
    with open_store(server.url("missing"), **server.storage_options) as store:
        for call in (lambda: store.get("object"), lambda: store.head("object"), lambda: store.put("object", b"1")):
            with pytest.raises(BucketNotFound):
                call()
        with pytest.raises(BucketNotFound):
            list(store.list())


def test_a_wrong_key_is_access_denied_and_is_not_shown(server: AzureServer) -> None:
    wrong = "CANARY00" * 8
    options = {**server.storage_options, "account_key": wrong}
    with open_store(server.url("stoker"), **options) as store:
        for call in (lambda: store.get("object"), lambda: store.head("object"), lambda: store.put("object", b"1")):
            with pytest.raises(AccessDenied) as caught:
                call()
            assert "CANARY" not in str(caught.value)


def test_a_key_that_is_no_base64_is_refused_without_showing_it(server: AzureServer) -> None:
    options = {**server.storage_options, "account_key": "CANARY, no base64"}
    with pytest.raises(StokerError) as caught, open_store(server.url("stoker"), **options) as store:
        store.head("object")
    assert "CANARY" not in str(caught.value)


def test_the_azure_variables_are_honoured(server: AzureServer, monkeypatch: pytest.MonkeyPatch) -> None:
    options = server.storage_options
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", options["account_name"])
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", options["account_key"])
    with open_store(server.url("stoker", uuid.uuid4().hex), endpoint_url=options["endpoint_url"]) as store:
        store.put("object", b"1")
        assert store.head("object").size == 1


@pytest.mark.parametrize("scheme", ["az", "abfs", "abfss"])
def test_every_spelling_of_the_scheme_is_the_same_store(server: AzureServer, scheme: str) -> None:
    prefix = uuid.uuid4().hex
    account = server.storage_options["account_name"]
    with open_store(f"{scheme}://stoker/{prefix}", **server.storage_options) as store:
        store.put("object", b"12")
    options = {name: value for name, value in server.storage_options.items() if name != "account_name"}
    with open_store(f"{scheme}://stoker@{account}.dfs.core.windows.net/{prefix}", **options) as store:
        assert bytes(store.get("object")) == b"12"


def test_a_spawned_process_opens_the_same_store(server: AzureServer, store: ObjectStore) -> None:
    store.put("object", b"12")
    program = """
import json, sys
from stoker.storage import open_store
with open_store(sys.argv[1], **json.loads(sys.stdin.read())) as store:
    print(bytes(store.get("object")))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, store.url],
        input=json.dumps(server.storage_options),
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "b'12'\n"


def test_whole_files_go_there_and_back(store: ObjectStore, tmp_path: Path) -> None:
    files = {"empty": tmp_path / "empty", "small": tmp_path / "small", "large": tmp_path / "large"}
    for path, size in zip(files.values(), (0, 1000, 4 * PART + 7), strict=True):
        path.write_bytes(os.urandom(size))
        os.utime(path, (1e9, 1e9))
    expected = {key: crc32c(path.read_bytes()) for key, path in files.items()}
    sent = upload(files, store, checksums=expected, part_bytes=PART, budget_bytes=3 * PART)
    assert sent.moved_files == 3
    assert upload(files, store, part_bytes=PART).kept_files == 3
    download(store, files, tmp_path / "to", checksums=expected, part_bytes=PART, budget_bytes=3 * PART)
    for key, path in files.items():
        assert (tmp_path / "to" / key).read_bytes() == path.read_bytes()
