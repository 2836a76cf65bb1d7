"""verify: every byte of data and tables is looked at, and all damage is listed."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stoker.errors import BucketNotFound, CorruptBlock, StokerError
from stoker.loaders import TokenDataset
from stoker.loaders.format import shard_key
from stoker.loaders.verify import verify
from stoker.storage import open_store
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import files_in, flip_bit, random_documents, write_set


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a set of several shards, with documents that reach over their borders."""
    root = tmp_path_factory.mktemp("whole")
    write_set(root, [*random_documents(12), np.arange(1, 700), *random_documents(3)], eos_id=0)
    return files_in(root)


@pytest.fixture
def root(tmp_path: Path, whole: dict[str, bytes]) -> Path:
    return restored(tmp_path, whole)


def restored(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(data)
    return root


def test_a_whole_set_is_right_and_every_byte_was_counted(root: Path, whole: dict[str, bytes]) -> None:
    read: list[int] = []
    report = verify(root, progress=read.append)
    assert report.ok and report.damage == ()
    assert report.shards == len([name for name in whole if name.startswith("data/")]) > 3
    assert report.checked_bytes == sum(len(data) for name, data in whole.items() if name != "manifest.json")
    assert sum(read) == report.checked_bytes


@given(data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_flipped_bit_anywhere_is_found(data: st.DataObject, tmp_path: Path, whole: dict[str, bytes]) -> None:
    name = data.draw(st.sampled_from(sorted(whole.keys() - {"manifest.json"})))
    root = restored(tmp_path, whole)
    flip_bit(root / name, data.draw(st.integers(0, len(whole[name]) - 1)))
    try:
        report = verify(root)
    except CorruptBlock as error:  # of what says where tokens are
        assert name == "shards.arrow"
        assert name in str(error)
    else:
        assert not report.ok
        assert name in {damage.key for damage in report.damage}


def test_all_damage_is_listed_by_shard_and_block(root: Path) -> None:
    with TokenDataset(root, seq_len=8) as dataset:
        tables = dataset._tables
        ranges = {block: tables.byte_range(block // 4, block) for block in (1, 2, 9)}
    for block, (start, _) in ranges.items():
        flip_bit(root / shard_key(block // 4), start)
    (root / shard_key(1)).unlink()
    size = os.path.getsize(root / shard_key(3))
    os.truncate(root / shard_key(3), tables.byte_range(3, 14)[1])
    report = verify(root)
    assert [(d.shard, d.block, d.start, d.end) for d in report.damage] == [
        (0, 1, *ranges[1]),
        (0, 2, *ranges[2]),
        (1, None, None, None),
        (2, 9, *ranges[9]),
        (3, None, None, None),
        (3, 15, *tables.byte_range(3, 15)),
    ]
    problems = [damage.problem for damage in report.damage]
    assert problems[0].startswith("bytes must have CRC32C 0x")
    assert problems[2] == "no such file"
    assert problems[4].startswith(f"the data file must have {size} bytes, got ")
    assert problems[5] == "bytes are missing"


def test_a_damaged_slice_of_a_table_leaves_the_other_shards_checked(root: Path) -> None:
    with TokenDataset(root, seq_len=8) as dataset:
        shards = dataset._tables.shards
    flip_bit(root / "blocks.arrow", int(shards.blocks_start[2]) + 1)
    flip_bit(root / shard_key(0), int(shards.tokens_start[0]))
    report = verify(root)
    assert [damage.key for damage in report.damage] == ["blocks.arrow", shard_key(0), shard_key(2)]
    assert report.damage[2].problem.startswith("can't be checked: ")


def test_missing_tables_are_damage_and_a_missing_set_is_an_error(root: Path, tmp_path: Path) -> None:
    (root / "lengths.arrow").unlink()
    report = verify(root)
    assert report.damage[0].key == "lengths.arrow"
    assert report.damage[0].problem == "no such file"
    (root / "shards.arrow").unlink()
    with pytest.raises(StokerError, match="shards.arrow"):
        verify(root)
    with pytest.raises(BucketNotFound):
        verify(tmp_path / "nowhere")


def test_a_remote_set_is_verified_too(s3_server: S3Server, tmp_path: Path, whole: dict[str, bytes]) -> None:
    url = s3_server.url("stoker", f"verify/{tmp_path.name}")
    with open_store(url, **s3_server.storage_options) as store:
        for name, data in whole.items():
            store.put(name, data)
        assert verify(url, storage_options=s3_server.storage_options).ok
        damaged = bytearray(whole[shard_key(0)])
        damaged[-20] ^= 1  # in the Arrow footer: no block's checksum covers it
        store.put(shard_key(0), damaged)
        store.delete(shard_key(1))
    report = verify(url, storage_options=s3_server.storage_options)
    assert [(damage.shard, damage.block) for damage in report.damage] == [(0, None), (1, None)]
    assert report.damage[0].problem.startswith("the data file must have SHA-256")
