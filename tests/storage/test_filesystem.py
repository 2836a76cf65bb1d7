"""``stoker::`` before fsspec URLs: what the target says, by the cache; the second read asks for no data."""

import gc
import io
import pickle
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet
import pytest
import zarr
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import AccessDenied, ConfigError, ObjectChanged, UnsupportedError
from stoker.storage import open_store
from stoker.storage._checksums import crc32c
from stoker.storage.filesystem import _RESIDUE, StokerFileSystem
from stoker.testing import FaultProxy
from stoker.testing.s3 import S3Server

CONTENT = bytes(range(256)) * 5 + b"a line\nand another\nand the end"
BLOCK = 100


@pytest.fixture(autouse=True)
def own_instances() -> Iterator[None]:
    """File systems live as long as fsspec remembers them, and their caches as long as they do."""
    yield
    forget()


def forget() -> None:
    StokerFileSystem.clear_instance_cache()
    gc.collect()


@pytest.fixture
def url() -> Iterator[str]:
    """A folder in memory with one object, and some smaller ones."""
    folder = f"memory://{uuid.uuid4().hex}"
    target = fsspec.filesystem("memory")
    target.pipe(
        {f"{folder}/one": CONTENT, f"{folder}/two": b"22", f"{folder}/sub/empty": b"", f"{folder}/.zarray": b"{}"}
    )
    yield folder
    target.rm(folder, recursive=True)


def opened(url: str, tmp_path: Path, **options: Any) -> tuple[Any, str]:
    options = {"ram_path": str(tmp_path / "ram"), "ram": "1MiB", "block_bytes": BLOCK, **options}
    fs, path = fsspec.url_to_fs(f"stoker::{url}", **options)
    assert type(fs) is StokerFileSystem
    return fs, path


# -- other people's readers, on S3 -------------------------------------------------------------------------------------

TABLE = pa.table({"x": np.arange(50_000), "y": np.arange(50_000) % 7})


def with_pandas(url: str, options: dict[str, Any]) -> Any:
    return pandas.read_parquet(f"{url}/table/0.parquet", storage_options=options)["x"].sum()


def with_pyarrow(url: str, options: dict[str, Any]) -> Any:
    fs, path = fsspec.url_to_fs(f"{url}/table", **options)
    table = pyarrow.dataset.dataset(path, filesystem=fs, format="parquet").to_table(columns=["x"])
    return table["x"].to_numpy().sum()


def with_zarr(url: str, options: dict[str, Any]) -> Any:
    return np.asarray(zarr.open_array(f"{url}/array", mode="r", storage_options=options)[:]).sum()


def with_open(url: str, options: dict[str, Any]) -> Any:
    with fsspec.open(f"{url}/table/0.parquet", **options) as file:
        return pyarrow.parquet.read_table(io.BytesIO(file.read()))["x"].to_numpy().sum()


def data_requests(proxy: FaultProxy) -> list[Any]:
    return [r for r in proxy.requests if r.method == "GET" and "list-type" not in r.path]


@pytest.mark.parametrize("tier", ["ram", "disk"])
@pytest.mark.parametrize("read", [with_open, with_pandas, with_pyarrow, with_zarr])
def test_the_second_read_makes_no_data_request(
    s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path, read: Callable[..., Any], tier: str
) -> None:
    s3 = {name: fault_proxy.storage_options[name] for name in ("endpoint_url", "key", "secret")}
    bucket = f"{s3_server.url('stoker', 'face')}/{uuid.uuid4().hex}"
    target, folder = fsspec.url_to_fs(bucket, **s3)
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(TABLE, parquet)
    target.pipe_file(f"{folder}/table/0.parquet", parquet.getvalue())
    zarr.save_array(f"{bucket}/array", TABLE["x"].to_numpy(), storage_options=s3)
    options = {"s3": s3, "ram": 0, "block_bytes": "64KiB"}
    if tier == "ram":
        options |= {"ram_path": str(tmp_path / "ram"), "ram": "8MiB"}
    else:
        options |= {"disk": str(tmp_path / "disk"), "disk_capacity": "8MiB"}
    before = len(data_requests(fault_proxy))
    assert read(f"stoker::{bucket}", options) == 50_000 * 49_999 // 2
    first = len(data_requests(fault_proxy))
    assert first > before
    forget()  # as another process would, the second reader finds what lies in the tier
    assert read(f"stoker::{bucket}", options) == 50_000 * 49_999 // 2
    assert len(data_requests(fault_proxy)) == first


def test_only_the_blocks_of_a_range_are_fetched_and_each_once(
    s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    s3 = {name: fault_proxy.storage_options[name] for name in ("endpoint_url", "key", "secret")}
    url = f"{s3_server.url('stoker', 'face')}/{uuid.uuid4().hex}"
    with fsspec.open(url, "wb", **s3) as file:
        file.write(CONTENT)
    fs, path = opened(url, tmp_path, s3=s3)
    assert fs.cat_file(path, 250, 420) == CONTENT[250:420]
    assert fs.cat_ranges([path] * 3, [210, 390, 1290], [230, 510, 2000]) == [
        CONTENT[210:230],
        CONTENT[390:510],
        CONTENT[1290:],
    ]
    asked = sorted(request.range for request in data_requests(fault_proxy) if request.range)
    assert asked == [f"bytes={a}-{min(a + 100, len(CONTENT)) - 1}" for a in (1200, 1300, 200, 300, 400, 500)]


# -- the same as the target --------------------------------------------------------------------------------------------


def test_names_are_those_of_the_target(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    target, same = fsspec.url_to_fs(url)
    assert path == same
    assert fs.ls(path, detail=False) == target.ls(path, detail=False)
    assert fs.ls(f"stoker::{url}") == target.ls(path)
    assert fs.info(f"{path}/one") == target.info(f"{path}/one")
    assert fs.glob(f"{path}/**") == target.glob(f"{path}/**")
    assert fs.find(path) == target.find(path)
    assert list(fs.walk(path)) == list(target.walk(path))
    assert fs.size(f"{path}/one") == len(CONTENT) and fs.du(path) == target.du(path)
    for name in ("one", "sub", "gone"):
        for ask in ("exists", "isfile", "isdir"):
            assert getattr(fs, ask)(f"{path}/{name}") == getattr(target, ask)(f"{path}/{name}")
    assert fs.modified(f"{path}/one") == target.modified(f"{path}/one")
    assert fs.ukey(f"{path}/one") == target.ukey(f"{path}/one")
    assert fs.unstrip_protocol(f"{path}/one") == f"stoker::memory://{path}/one"
    assert fs._strip_protocol(fs.unstrip_protocol(f"{path}/one")) == f"{path}/one"


def test_a_file_reads_seeks_and_iterates(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    with fs.open(f"{path}/one") as file:
        assert (file.size, file.tell(), file.readable(), file.seekable(), file.writable()) == (
            len(CONTENT), 0, True, True, False,
        )  # fmt: skip
        assert file.read(5) == CONTENT[:5] and file.tell() == 5
        assert file.seek(-3, 2) == len(CONTENT) - 3 and file.read() == b"end" and file.read(9) == b""
        assert file.seek(95) == 95 and file.seek(1, 1) == 96
        buffer = bytearray(300)
        assert file.readinto(buffer) == 300 and buffer == CONTENT[96:396]
        file.seek(1280)
        assert file.readline() == b"a line\n" and list(file) == [b"and another\n", b"and the end"]
    with pytest.raises(ValueError, match="closed"):
        file.read(1)
    with fs.open(f"{path}/one", "rt", encoding="latin-1", newline="") as text:
        assert text.read() == CONTENT.decode("latin-1")
    with fs.open(f"{path}/sub/empty") as file:
        assert file.read() == b""
    target = fsspec.filesystem("memory")
    assert fs.cat(path, recursive=True, on_error="omit") == target.cat(path, recursive=True, on_error="omit")
    assert fs.head(f"{path}/one", 7) == CONTENT[:7] and fs.tail(f"{path}/one", 7) == CONTENT[-7:]
    fs.get(f"{path}/one", str(tmp_path / "copy"))
    assert (tmp_path / "copy").read_bytes() == CONTENT
    with pytest.raises(FileNotFoundError):
        fs.open(f"{path}/gone")
    with pytest.raises(IsADirectoryError):
        fs.open(f"{path}/sub")


bound = st.none() | st.integers(-len(CONTENT) - 20, len(CONTENT) + 20)


@settings(max_examples=100, deadline=None)
@given(ranges=st.lists(st.tuples(bound, bound), min_size=1, max_size=5), block_bytes=st.sampled_from([31, 100, 4096]))
def test_ranges_are_slices(ranges: list[tuple[int | None, int | None]], block_bytes: int) -> None:
    fsspec.filesystem("memory").pipe("/slices", CONTENT)
    fs = fsspec.filesystem("stoker", target_protocol="memory", ram=0, block_bytes=block_bytes)
    starts, ends = map(list, zip(*ranges, strict=True))
    assert fs.cat_ranges(["/slices"] * len(ranges), starts, ends) == [CONTENT[a:b] for a, b in ranges]
    assert fs.cat_file("/slices", *ranges[0]) == CONTENT[slice(*ranges[0])]


@settings(max_examples=60, deadline=None)
@given(reads=st.lists(st.tuples(st.integers(0, len(CONTENT) + 20), st.integers(-1, 250)), max_size=12))
def test_a_file_reads_like_bytes_in_memory(reads: list[tuple[int, int]]) -> None:
    fsspec.filesystem("memory").pipe("/slices", CONTENT)
    fs = fsspec.filesystem("stoker", target_protocol="memory", ram=0, block_bytes=BLOCK)
    with fs.open("/slices") as file, io.BytesIO(CONTENT) as model:
        for position, length in reads:
            file.seek(position)
            model.seek(position)
            assert file.read(length) == model.read(length)


def test_errors_of_ranges_are_returned_or_raised(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    paths = [f"{path}/one", f"{path}/gone", f"{path}/two"]
    got = fs.cat_ranges(paths, 0, [2, 2, 2])
    assert got[::2] == [CONTENT[:2], b"22"] and isinstance(got[1], FileNotFoundError)
    with pytest.raises(FileNotFoundError):
        fs.cat_ranges(paths, 0, 2, on_error="raise")
    with pytest.raises(ConfigError, match="one length"):
        fs.cat_ranges(paths, [0], 2)
    with pytest.raises(UnsupportedError, match="max_gap"):
        fs.cat_ranges(paths, 0, 2, max_gap=5)


@pytest.mark.parametrize(
    "write",
    [
        lambda fs, path: fs.open(f"{path}/new", "wb"),
        lambda fs, path: fs.open(f"{path}/one", "ab"),
        lambda fs, path: fs.pipe(f"{path}/new", b"x"),
        lambda fs, path: fs.pipe_file(f"{path}/new", b"x"),
        lambda fs, path: fs.put_file(__file__, f"{path}/new"),
        lambda fs, path: fs.touch(f"{path}/new"),
        lambda fs, path: fs.mkdir(f"{path}/new"),
        lambda fs, path: fs.makedirs(f"{path}/new", exist_ok=True),
        lambda fs, path: fs.mv(f"{path}/one", f"{path}/new"),
        lambda fs, path: fs.cp_file(f"{path}/one", f"{path}/new"),
        lambda fs, path: fs.copy(f"{path}/one", f"{path}/new"),
        lambda fs, path: fs.rm(f"{path}/one"),
        lambda fs, path: fs.rm_file(f"{path}/one"),
        lambda fs, path: fs.rmdir(f"{path}/sub"),
    ],
)
def test_writing_raises_and_changes_nothing(url: str, tmp_path: Path, write: Callable[..., Any]) -> None:
    fs, path = opened(url, tmp_path)
    before = fsspec.filesystem("memory").find(path, detail=True)
    with pytest.raises((UnsupportedError, AccessDenied), match="stoker:: only reads"):
        write(fs, path)
    assert fsspec.filesystem("memory").find(path, detail=True) == before


def test_a_file_opened_for_writing_is_told_by_its_own_name(url: str) -> None:
    with (
        pytest.raises(UnsupportedError, match="only reads, got '.*/sub/new'"),
        fsspec.open(f"stoker::{url}/sub/new", "wb"),
    ):
        pass


# -- versions ----------------------------------------------------------------------------------------------------------


def test_a_replaced_object_is_noticed_when_it_is_opened(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    assert fs.cat_file(f"{path}/one") == CONTENT
    other = CONTENT[::-1]  # of the same length
    fs.fs.pipe_file(f"{path}/one", other)
    assert fs.cat_file(f"{path}/one") == other
    assert fs.cat_ranges([f"{path}/one"], [3], [9]) == [other[3:9]]


def test_a_file_that_is_replaced_while_it_is_open_never_mixes_versions(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    with fs.open(f"{path}/one") as file:
        assert file.read(150) == CONTENT[:150]
        fs.fs.pipe_file(f"{path}/one", CONTENT[::-1])
        assert file.read(50) == CONTENT[150:200]  # it is cached
        with pytest.raises(ObjectChanged, match="must still be version"):
            file.read(1)
    with pytest.raises(ObjectChanged):
        pickle.loads(pickle.dumps(file))


def test_a_listing_that_the_target_remembers_does_not_hide_a_new_version(s3_server: S3Server, tmp_path: Path) -> None:
    s3 = {name: s3_server.storage_options[name] for name in ("endpoint_url", "key", "secret")}
    folder = f"{s3_server.url('stoker', 'face')}/{uuid.uuid4().hex}"
    with open_store(folder, **s3_server.storage_options) as store:
        store.put("one", CONTENT)
        fs, path = opened(folder, tmp_path, s3=s3)
        assert fs.cat_file(f"{path}/one") == CONTENT
        before = fs.ls(path)
        store.put("one", CONTENT[::-1])
        assert fs.ls(path) == before
        assert fs.cat_file(f"{path}/one") == CONTENT[::-1]


class Undated(MemoryFileSystem):  # type: ignore[misc]
    """Memory that tells no time."""

    protocol = "undated"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {name: value for name, value in super().info(path, **options).items() if name != "created"}


def test_what_has_no_version_is_read_anew_for_each_file(url: str, tmp_path: Path) -> None:
    options: dict[str, Any] = {"ram": "1MiB", "ram_path": str(tmp_path / "ram")}
    fs = StokerFileSystem(fs=Undated(), **options)
    path = url.removeprefix("memory:/")
    assert fs.cat_file(f"{path}/one") == CONTENT
    Undated().pipe_file(f"{path}/one", CONTENT[::-1])
    assert fs.cat_file(f"{path}/one") == CONTENT[::-1]
    with fs.open(f"{path}/one") as file:
        assert [file.seek(0), file.read(3), file.seek(0), file.read(3)][1::2] == [CONTENT[:-4:-1]] * 2
    assert fs.cache.stats().misses == 3


class Tagged(MemoryFileSystem):  # type: ignore[misc]
    """Memory whose objects all have the same tag."""

    protocol = "tagged"

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        return {**super().info(path, **options), "ETag": "1"}


def test_equal_names_of_two_targets_are_two_objects(url: str, tmp_path: Path) -> None:
    path = url.removeprefix("memory:/")
    Tagged().pipe({f"{path}/a/x": b"a", f"{path}/b/x": b"b"})
    cache: dict[str, Any] = {"ram": "1MiB", "ram_path": str(tmp_path / "ram")}
    folders = [StokerFileSystem("dir", {"path": f"{path}/{name}", "fs": Tagged()}, **cache) for name in ("a", "b")]
    assert [fs.cat_file("x") for fs in folders] == [b"a", b"b"]
    assert folders[0].cache is folders[1].cache


# -- the cache ---------------------------------------------------------------------------------------------------------


@given(st.binary(max_size=200))
def test_bytes_with_their_checksum_behind_them_have_one_checksum(data: bytes) -> None:
    assert crc32c(data + crc32c(data).to_bytes(4, "little")) == _RESIDUE


@pytest.mark.parametrize("offset", [4096, 4096 + BLOCK // 2, 4096 + BLOCK, 4096 + BLOCK + 3])
def test_a_damaged_copy_is_fetched_again(url: str, tmp_path: Path, offset: int) -> None:
    fs, path = opened(url, tmp_path)
    assert fs.cat_file(f"{path}/one", 0, 10) == CONTENT[:10]
    (file,) = (path for path in (tmp_path / "ram" / "blocks").rglob("*") if path.is_file())
    data = bytearray(file.read_bytes())
    data[offset] ^= 1
    file.write_bytes(data)
    del fs
    forget()
    fs, _ = opened(url, tmp_path)
    assert fs.cat_file(f"{path}/one", 0, 10) == CONTENT[:10]
    assert (fs.cache.stats().corrupt, fs.cache.stats().misses) == (1, 1)


def test_options_make_the_instance_and_pickles_find_it(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    assert opened(url, tmp_path)[0] is fs
    assert opened(f"{url}/one", tmp_path)[0] is fs  # whatever the path
    assert opened(url, tmp_path, block_bytes=50)[0] is not fs
    assert opened(url, tmp_path, block_bytes=50)[0].cache is fs.cache
    assert pickle.loads(pickle.dumps(fs)) is fs
    assert fsspec.AbstractFileSystem.from_json(fs.to_json()) is fs
    with fs.open(f"{path}/one") as file:
        file.seek(7)
        with pickle.loads(pickle.dumps(file)) as again:
            assert again == file and again.read(5) == CONTENT[7:12]


def test_a_cache_closes_with_the_last_file_system_that_uses_it(url: str, tmp_path: Path) -> None:
    fs, path = opened(url, tmp_path)
    other, _ = opened(url, tmp_path, block_bytes=50)
    cache = fs.cache
    assert other.cache is cache
    with fs.open(f"{path}/one") as file:
        del fs, other
        forget()
        assert file.read() == CONTENT
    del file
    forget()
    assert cache._closed


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"target_protocol": "memory", "dsk": "/x"}, "no such option, got 'dsk'"),
        ({}, "give a target"),
        ({"target_protocol": "memory", "fs": MemoryFileSystem()}, "give a target"),
        ({"target_protocol": "memory", "block_bytes": 0}, "block_bytes must be >= 1"),
        ({"target_protocol": "memory", "block_bytes": "4 fast"}, "a size is a number with a unit"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        StokerFileSystem(**options)


def test_a_forked_child_reads_on_and_sees_what_the_parent_cached(
    s3_server: S3Server, fault_proxy: FaultProxy, tmp_path: Path
) -> None:
    s3 = {name: fault_proxy.storage_options[name] for name in ("endpoint_url", "key", "secret")}
    url = f"{s3_server.url('stoker', 'face')}/{uuid.uuid4().hex}"
    with fsspec.open(url, "wb", **s3) as file:
        file.write(CONTENT)
    program = (
        "import fsspec, os\n"
        f"fs, path = fsspec.url_to_fs('stoker::{url}', s3={s3!r}, block_bytes=100, ram='1MiB', ram_path={str(tmp_path / 'ram')!r})\n"
        "before = fs.cat_file(path, 0, 150)\n"
        "file = fs.open(path)\n"
        "if os.fork() == 0:\n"
        "    same = fs.cat_file(path, 0, 450) == file.read(450)\n"
        "    os._exit(0 if same else 1)\n"
        "raise SystemExit(os.waitstatus_to_exitcode(os.wait()[1]))\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    asked = sorted(request.range for request in data_requests(fault_proxy) if request.range)
    assert asked == [f"bytes={a}-{a + 99}" for a in (0, 100, 200, 300, 400)]
