"""Stores behind fsspec beyond the contract: what is not promised is refused, what is missing is named."""

import os
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from stoker.errors import (
    AlreadyExists,
    ConfigError,
    KeyNotFound,
    MissingExtra,
    ObjectChanged,
    StoreFull,
    StoreUnavailable,
    UnsupportedError,
)
from stoker.storage import open_store
from stoker.storage.fsspec import FsspecStore


@pytest.fixture
def memory() -> Iterator[FsspecStore]:
    with FsspecStore(f"memory://{uuid.uuid4().hex}") as store:
        yield store
        for info in list(store.list()):
            store.delete(info.key)


def test_any_protocol_of_fsspec_is_a_store(tmp_path: Path) -> None:
    # A file system without exclusive creation: reads, listings and whole-file puts work all the same.
    with open_store(f"local://{tmp_path}/root", auto_mkdir=True) as store:
        assert isinstance(store, FsspecStore)
        store.put("folder/object", b"0123456789")
        assert bytes(store.get("folder/object", 2, 5)) == b"234"
        assert [info.key for info in store.list()] == ["folder/object"]
        with store.open_writer("folder/large", 3) as writer:
            writer.write_at(0, b"abc")
            version = writer.commit().version
        assert bytes(store.get("folder/large", version=version)) == b"abc"


def test_where_creation_is_not_exclusive_it_is_refused_by_name(tmp_path: Path) -> None:
    with open_store(f"local://{tmp_path}/root", auto_mkdir=True) as store:
        with pytest.raises(UnsupportedError) as caught:
            store.create("object", b"1")
        assert "exclusively" in str(caught.value) and "local" in str(caught.value)
        assert not store.exists("object")


def test_an_unknown_protocol_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="nosuch"):
        open_store("nosuch://host/path")


def test_a_protocol_whose_library_is_missing_names_it() -> None:
    with pytest.raises(MissingExtra) as caught:
        open_store("sftp://host/path")
    assert "paramiko" in str(caught.value)


def test_options_that_the_file_system_refuses_are_a_config_error() -> None:
    with pytest.raises(ConfigError, match="'fo'"):
        open_store("reference://folder")  # of what?


def test_a_file_system_that_does_not_open_is_one_typed_error(tmp_path: Path) -> None:
    with pytest.raises(KeyNotFound):
        open_store("zip://folder", fo=str(tmp_path / "missing.zip"))
    (tmp_path / "bad.zip").write_bytes(b"no archive")
    with pytest.raises(StoreUnavailable, match="BadZipFile"):
        open_store("zip://folder", fo=str(tmp_path / "bad.zip"))


def test_all_stores_in_memory_share_one_tree(memory: FsspecStore) -> None:
    memory.create("object", b"1")
    with FsspecStore(memory._full_url) as other, pytest.raises(AlreadyExists):
        other.create("object", b"2")


def test_an_object_that_is_replaced_while_it_is_read_is_refused(
    memory: FsspecStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = memory.put("object", b"first").version
    real = memory._fs.cat_file

    def late(path: str, start: int, end: int) -> bytes:
        memory.put("object", b"other")
        return bytes(real(path, start=start, end=end))

    monkeypatch.setattr(memory._fs, "cat_file", late)
    with pytest.raises(ObjectChanged):
        memory.get("object", 1, 3, version=version)


def test_a_forked_child_opens_its_own_file_system(memory: FsspecStore) -> None:
    memory.put("object", b"before the fork")
    pid = os.fork()
    if not pid:
        status = 1
        try:
            status = 0 if bytes(memory.get("object")) == b"before the fork" else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_writer_reserves_its_space_first(memory: FsspecStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    with pytest.raises(StoreFull, match="needs more space than is left"):
        memory.open_writer("object", 2**60)
    assert list(memory.list()) == []


def test_the_temporary_file_of_a_writer_is_gone_afterwards(
    memory: FsspecStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with memory.open_writer("object", 3) as writer:
        assert len(os.listdir(tmp_path)) == 1
        writer.write_at(0, b"abc")
        writer.commit()
        assert os.listdir(tmp_path) == []
    with pytest.raises(ZeroDivisionError), memory.open_writer("other", 3):
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []
