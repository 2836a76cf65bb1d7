"""``stoker cache warm``: a data set is near before the job asks, and what does not fit is told."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stoker.cli import main
from stoker.errors import ConfigError, CorruptBlock
from stoker.loaders import TokenDataset
from stoker.loaders.format import shard_key
from stoker.loaders.warm import warm
from stoker.storage import TieredCache, open_store
from stoker.storage.upkeep import CacheDirectory
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import random_documents, write_set

FILE = 4096 + 4096  # a block of 64 tokens takes a page, and its header one


class Remote(NamedTuple):
    url: str
    options: dict[str, Any]
    blocks: int


@pytest.fixture
def remote(s3_server: S3Server, tmp_path: Path) -> Remote:
    url = s3_server.url("stoker", f"warm/{tmp_path.name}")
    options = s3_server.storage_options
    write_set(url, random_documents(120), eos_id=0, storage_options=options)
    with TokenDataset(url, seq_len=10, storage_options=options, cache=TieredCache(ram=0)) as dataset:
        return Remote(url, options, dataset.manifest.blocks)


@pytest.fixture
def cache(tmp_path: Path) -> Iterator[TieredCache]:
    with TieredCache(ram=0, disk=tmp_path / "cache", disk_capacity="16MiB") as made:
        yield made


def test_every_block_is_there_and_the_job_fetches_none(remote: Remote, cache: TieredCache) -> None:
    assert remote.blocks > 64, "more than two groups"
    totals: list[int] = []
    steps: list[int] = []
    done = warm(remote.url, cache, storage_options=remote.options, set_total=totals.append, progress=steps.append)
    assert (done.blocks, done.resident_blocks) == (remote.blocks, remote.blocks)
    assert done.fetched_bytes == sum(steps) == totals[0] and len(steps) == remote.blocks
    misses = cache.stats().misses
    with TokenDataset(remote.url, seq_len=10, cache=cache, storage_options=remote.options) as dataset:
        for sample in range(len(dataset)):
            dataset[sample]
    assert cache.stats().misses == misses == remote.blocks


def test_what_is_there_already_is_not_fetched_again(remote: Remote, cache: TieredCache) -> None:
    warm(remote.url, cache, storage_options=remote.options)
    again = warm(remote.url, cache, storage_options=remote.options)
    assert (again.resident_blocks, again.fetched_bytes) == (remote.blocks, 0)


def test_a_cache_that_is_too_small_is_filled_and_no_more_is_fetched_than_one_group(
    remote: Remote, tmp_path: Path
) -> None:
    with TieredCache(ram=0, disk=tmp_path / "small", disk_capacity=10 * FILE) as cache:
        done = warm(remote.url, cache, storage_options=remote.options)
        assert done.resident_blocks == 10 and cache.stats().disk_bytes == 10 * FILE
        assert cache.stats().misses <= 32 < remote.blocks


def test_a_local_data_set_is_refused(tmp_path: Path, cache: TieredCache) -> None:
    write_set(tmp_path / "set", random_documents(10), eos_id=0)
    with pytest.raises(ConfigError, match="mapped in place"):
        warm(str(tmp_path / "set"), cache)


def test_a_block_that_is_damaged_at_its_origin_is_an_error(remote: Remote, cache: TieredCache) -> None:
    with open_store(remote.url, **remote.options) as store:
        data = bytearray(store.get(shard_key(1)))
        middle = len(data) // 2
        data[middle] ^= 1
        store.put(shard_key(1), bytes(data))
    with pytest.raises(CorruptBlock):
        warm(remote.url, cache, storage_options=remote.options)


def run(capfd: pytest.CaptureFixture[str], remote: Remote, *arguments: object) -> str:
    capfd.readouterr()
    options = [f"-o{name}={value}" for name, value in remote.options.items()]
    with pytest.raises(SystemExit) as exited:
        main(["cache", "warm", remote.url, "--ram", "0", *options, *(str(argument) for argument in arguments)])
    out, err = capfd.readouterr()
    assert exited.value.code in (0, None), err
    return out


def test_the_command_fills_a_directory_that_ls_then_shows(
    remote: Remote, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = run(capfd, remote, "--disk", tmp_path / "d", "--disk-capacity", "16MiB", "--json")
    assert out.count("\n") == 1
    report = json.loads(out)
    assert (report["ok"], report["complete"], report["resident_blocks"]) == (True, True, remote.blocks)
    with CacheDirectory(tmp_path / "d") as directory:
        assert len(list(directory.blocks())) == remote.blocks
        assert directory.verify().bad == ()


def test_the_command_says_when_not_all_fits(remote: Remote, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = run(capfd, remote, "--disk", tmp_path / "d", "--disk-capacity", 5 * FILE)
    assert f": 5 of {remote.blocks} blocks cached" in out and "no room for more" in out
