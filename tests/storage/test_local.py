"""Local stores beyond the contract: full disks, file systems that lack something, other names for the same place."""

import errno
import itertools
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from stoker.errors import (
    AccessDenied,
    BucketNotFound,
    ConfigError,
    ObjectChanged,
    StoreError,
    StoreFull,
    UnsupportedError,
)
from stoker.storage import ObjectStore, open_store
from stoker.storage._locks import try_lock
from stoker.storage._posix import aligned_buffer
from stoker.storage.local import LocalStore
from stoker.testing.store import StoreTests

MIB = 2**20


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "root")


def names(store: LocalStore) -> list[str]:
    """Everything below the root, hidden or not."""
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if not path.is_dir())


@pytest.fixture
def no_tmpfile(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without O_TMPFILE, as NFS and FUSE are."""
    real = os.open

    def without(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without)


@pytest.mark.usefixtures("no_tmpfile")
class TestWithoutTmpfile(StoreTests):
    """The whole contract once more, by named temporary files."""

    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[ObjectStore]:
        with open_store(tmp_path / "root") as store:
            yield store
        assert isinstance(store, LocalStore)
        assert not any(".stoker-tmp-" in name for name in names(store))


# --- places ---------------------------------------------------------------------------------------------------------


def test_a_path_and_its_file_url_are_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    root = tmp_path / "a root"
    same = [open_store(url) for url in (root, str(root), "a root", "~/a root", f"file://{tmp_path}/a%20root")]
    same[0].put("object", b"1")
    monkeypatch.chdir("/")
    assert all(bytes(store.get("object")) == b"1" for store in same)


def test_a_file_url_of_another_host_and_options_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="names no host"):
        open_store("file://host/path")
    with pytest.raises(ConfigError, match="takes no storage options, got 'key'"):
        open_store(tmp_path, key="k")
    with pytest.raises(ConfigError, match="must not be empty"):
        open_store("")


def test_what_is_neither_a_path_nor_a_url_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for almost in ("s3:/bucket/path", Path("s3://bucket/path"), "File:/data"):
        with pytest.raises(ConfigError, match="has :// behind its scheme.*hint"):
            open_store(almost)
    for url in ("a\0b", "file:///a%00b"):
        with pytest.raises(ConfigError, match="no NUL"):
            open_store(url)
    for nothing in (None, 5, b"data"):
        with pytest.raises(ConfigError, match="text or a Path"):
            open_store(nothing)  # type: ignore[arg-type]
    assert open_store("./s3:/bucket").local_path("a") == tmp_path / "s3:/bucket/a"


def test_files_and_directories_are_private(store: LocalStore) -> None:
    store.put("folder/object", b"1")
    with store.open_writer("folder/large", 1) as writer:
        writer.write_at(0, b"1")
        writer.commit()
    assert {path.stat().st_mode & 0o777 for path in store.root.rglob("*") if path.is_file()} == {0o600}
    assert {path.stat().st_mode & 0o777 for path in (store.root, store.root / "folder")} == {0o700}


def test_a_name_is_an_object_or_a_folder_and_not_both(store: LocalStore) -> None:
    store.put("object", b"1")
    for key in ("object/below", "object/far/below"):
        with pytest.raises(StoreError, match="never both"):
            store.put(key, b"2")
        with pytest.raises(StoreError, match="never both"):
            store.open_writer(key, 1)
    store.put("folder/object", b"1")
    with pytest.raises(StoreError, match="never both"):
        store.put("folder", b"2")
    assert names(store) == ["folder/object", "object"]


def test_what_is_no_regular_file_is_no_object(store: LocalStore) -> None:
    store.put("object", b"1")
    os.mkfifo(store.root / "fifo")
    (store.root / "link").symlink_to(store.root)
    (store.root / ".hidden").write_bytes(b"1")
    assert [info.key for info in store.list()] == ["object"]
    assert not store.exists("link")
    assert not store.exists("fifo")


def test_what_can_not_be_listed_is_a_typed_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.put("folder/object", b"1")
    (store.root / "loop").symlink_to(store.root / "loop")
    with pytest.raises(StoreError, match=r"/loop: .*symbolic links"):
        list(store.list())
    (store.root / "loop").unlink()

    def refuse(path: Path) -> Any:  # a folder that can't be read, which there is none for root
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(AccessDenied):
        list(store.list())


def test_a_root_that_is_not_there_is_empty_and_can_be_asked_for(store: LocalStore) -> None:
    assert list(store.list()) == []
    with pytest.raises(BucketNotFound, match="no such directory"):
        store.check_root()
    assert not store.root.exists()
    store.put("object", b"1")
    store.check_root()


def test_deleting_removes_empty_folders_but_never_the_root(store: LocalStore) -> None:
    store.put("a/b/c/object", b"1")
    store.put("a/other", b"1")
    store.delete("a/b/c/object")
    assert sorted(path.name for path in (store.root / "a").iterdir()) == ["other"]
    store.delete("a/other")
    assert store.root.is_dir() and list(store.root.iterdir()) == []


def test_a_folder_that_a_deleter_removes_comes_back_for_a_writer(store: LocalStore) -> None:
    def work(thread: int) -> None:
        for number in range(60):
            key = f"folder/{thread}-{number % 2}"
            store.put(key, b"1")
            store.create(f"{key}-created", b"2")
            with store.open_writer(f"{key}-written", 1) as writer:
                writer.write_at(0, b"3")
                writer.commit()
            for name in (key, f"{key}-created", f"{key}-written"):
                store.delete(name)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert names(store) == []


# --- bytes ----------------------------------------------------------------------------------------------------------


def test_aligned_and_odd_pieces_make_one_object(store: LocalStore) -> None:
    data = aligned_buffer(9 * MIB + 777)
    data[:] = random.Random(1).randbytes(len(data))
    edges = [0, 4096, MIB, MIB + 1, 2 * MIB - 4096, 5 * MIB, 5 * MIB + 512, len(data)]
    with store.open_writer("object", len(data)) as writer:
        for start, end in itertools.pairwise(edges):
            writer.write_at(start, data[start:end])
        writer.commit()
    assert store.get("object") == data
    back = aligned_buffer(8 * MIB)
    store.get_into("object", back)  # around the page cache, where the file system can
    assert back == data[: 8 * MIB]
    store.get_into("object", back[: 4 * MIB], 4096)
    assert back[: 4 * MIB] == data[4096 : 4096 + 4 * MIB]
    with pytest.raises(ObjectChanged):
        store.get_into("object", back, 2 * MIB)


def test_short_writes_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.pwrite, []

    def short(fd: int, data: memoryview, offset: int) -> int:
        calls.append(len(data))
        return real(fd, data[: max(1, len(data) // 2)], offset)

    monkeypatch.setattr(os, "pwrite", short)
    data = aligned_buffer(MIB)
    data[:] = random.Random(2).randbytes(MIB)
    store.put("put", data)
    with store.open_writer("written", MIB) as writer:
        # Half a write leaves an odd offset, where O_DIRECT refuses: the rest goes through the page cache.
        writer.write_at(0, data)
        writer.commit()
    assert store.get("put") == data and store.get("written") == data
    assert len(calls) > 30


def test_a_write_that_writes_nothing_is_an_error(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: 0)
    with pytest.raises(StoreError, match="Input/output error"):
        store.put("object", b"1")
    assert names(store) == []


def test_short_reads_are_continued(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(3).randbytes(MIB)
    store.put("object", data)
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: real(fd, [buffers[0][:1000]], offset))
    assert store.get("object") == data


def test_a_failed_fsync_publishes_nothing_and_is_not_asked_again(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put("object", b"old")
    real, synced = os.fsync, []

    def failing(fd: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            return real(fd)
        synced.append(fd)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(StoreError, match="Input/output error"):
        store.put("object", b"new")
    assert len(synced) == 1
    with store.open_writer("object", 3) as writer:
        writer.write_at(0, b"new")
        with pytest.raises(StoreError, match="Input/output error"):
            writer.commit()
        with pytest.raises(ConfigError):
            writer.commit()
    assert len(synced) == 2
    assert bytes(store.get("object")) == b"old" and names(store) == ["object"]


def test_a_writer_whose_write_failed_can_not_commit(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    with store.open_writer("object", 2) as writer:
        writer.write_at(0, b"1")
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", lambda fd, data, offset: 0)
            with pytest.raises(StoreError):
                writer.write_at(1, b"2")
        with pytest.raises(ConfigError):
            writer.commit()
    assert names(store) == []


def test_without_hard_links_create_is_refused_by_name(
    store: LocalStore, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refuse)
    store.put("put", b"1")
    with pytest.raises(UnsupportedError, match="hard links"):
        store.create("created", b"1")
    assert names(store) == ["put"]


# --- a full disk ----------------------------------------------------------------------------------------------------

FULL = """
import resource, sys
from stoker.errors import StoreFull
from stoker.storage import open_store
store = open_store(sys.argv[1])
store.put("old", b"x" * 20_000)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
def write():
    with store.open_writer("old", 20_000) as writer:
        writer.write_at(0, b"y" * 20_000)
        writer.commit()
for call in (lambda: store.put("new", b"y" * 20_000), lambda: store.put("old", b"y" * 20_000),
             lambda: store.create("new", b"y" * 20_000), write, lambda: store.open_writer("new", 10_001)):
    try:
        call()
    except StoreFull as error:
        print(error)
assert bytes(store.get("old")) == b"x" * 20_000
store.put("small", b"z" * 10_000)
"""


def test_a_full_disk_is_one_clear_error_and_loses_nothing(store: LocalStore) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, store.root], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    assert all("needs more space than is left" in line and "free space" in line for line in lines)
    assert names(store) == ["old", "small"]


def test_space_is_reserved_before_the_first_byte(store: LocalStore) -> None:
    with pytest.raises(StoreFull) as caught:
        store.open_writer("object", 2**60)
    assert "free)" in str(caught.value)
    assert names(store) == []


# --- killed writers -------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from stoker.storage import open_store
store = open_store(sys.argv[1])
os.rename = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
store.put("folder/object", b"new")
"""


def test_what_a_killed_writer_left_is_removed_by_the_next_one(store: LocalStore) -> None:
    store.put("folder/object", b"old")
    done = subprocess.run([sys.executable, "-c", KILLED, store.root], check=False)
    assert done.returncode == -9
    assert len(names(store)) == 2  # the second name, without which nothing can be replaced
    assert [info.key for info in store.list()] == ["folder/object"]
    subprocess.run([sys.executable, "-c", KILLED.replace("os.rename =", "unused ="), store.root], check=True)
    assert names(store) == ["folder/object"]
    assert bytes(store.get("folder/object")) == b"new"


def test_what_a_living_writer_has_is_left_alone(store: LocalStore, no_tmpfile: None) -> None:
    with store.open_writer("folder/object", 1) as writer:
        (temporary,) = names(store)
        sweep = "import sys; from stoker.storage._posix import *; remove_leftovers(Path(sys.argv[1]))"
        sweep = f"from pathlib import Path; {sweep}"
        subprocess.run([sys.executable, "-c", sweep, store.root / "folder"], check=True)
        assert names(store) == [temporary]
        writer.write_at(0, b"1")
        writer.commit()
    assert names(store) == ["folder/object"]


def test_a_file_that_is_swept_before_it_is_locked_begins_again(
    store: LocalStore, no_tmpfile: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[int] = []

    def late(fd: int, byte: int) -> bool:
        if len(swept) < 2:
            swept.append(fd)
            if len(swept) == 1:  # by one that is done with it
                os.unlink(os.readlink(f"/proc/self/fd/{fd}"))
            else:  # by one that holds its lock at this moment
                return False
        return try_lock(fd, byte)

    monkeypatch.setattr("stoker.storage._posix.try_lock", late)
    store.put("object", b"1")
    assert bytes(store.get("object")) == b"1"
    assert len(swept) == 2


def test_replacers_at_once_publish_whole_objects(store: LocalStore) -> None:
    contents = [bytes([number]) * 5000 for number in range(4)]
    done = threading.Event()

    def replace(data: bytes) -> None:
        for _ in range(100):
            store.put("object", data)

    def read() -> int:
        reads = 0
        while not done.is_set():
            reads += 1
            assert bytes(store.get("object")) in contents
        return reads

    store.put("object", contents[0])
    with ThreadPoolExecutor(6) as pool:
        reading = [pool.submit(read) for _ in range(2)]
        for writing in [pool.submit(replace, data) for data in contents]:
            writing.result()
        done.set()
        assert all(one.result() for one in reading)
    assert names(store) == ["object"]
