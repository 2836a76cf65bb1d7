"""TokenDataset: samples are slices of the stream, wherever shards, blocks and the store cut it; no wrong byte passes."""

import json
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import stoker.loaders._source as source_module
import stoker.loaders.dataset as dataset_module
from stoker.errors import (
    BucketNotFound,
    ConfigError,
    CorruptBlock,
    EmptyInput,
    KeyNotFound,
    ObjectChanged,
    StateMismatch,
)
from stoker.loaders import TokenDataset, TokenLoader, TokenWriter
from stoker.loaders._gather import RowGather, row_index
from stoker.storage import TieredCache, open_store
from stoker.storage._checksums import crc32c
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import Document, files_in, flip_bit, random_documents, stream_of, write_set


def gathered(dataset: TokenDataset, samples: Any) -> tuple[np.ndarray, np.ndarray]:
    """Samples as two arrays; memory that the gather leaves untouched would be seen."""
    input_ids = np.full((len(samples), dataset.seq_len), -7, np.int64)
    labels = np.full_like(input_ids, -7)
    dataset.gather(np.asarray(samples), input_ids, labels)
    return input_ids, labels


def windows(stream: Document, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """All samples of a stream, by definition."""
    count = (len(stream) - 1) // seq_len
    shape = (count, seq_len)
    return stream[: count * seq_len].reshape(shape), stream[1 : count * seq_len + 1].reshape(shape)


# --- samples ----------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=30),
    seq_len=st.integers(1, 50),
    block_tokens=st.sampled_from([1, 2, 8, 32, 64]),
    blocks_per_shard=st.integers(1, 5),
    dtype=st.sampled_from(["uint16", "uint32"]),
    eos_id=st.sampled_from([None, 0]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_samples_are_slices_of_the_concatenated_documents(
    lengths: list[int],
    seq_len: int,
    block_tokens: int,
    blocks_per_shard: int,
    dtype: str,
    eos_id: int | None,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    documents = [random.integers(1, np.iinfo(dtype).max, n, endpoint=True) for n in lengths]
    stream = stream_of(documents, eos_id)
    stored = [stream_of([document], eos_id) for document in documents]
    blocks_per_shard = max(blocks_per_shard, len(stream) // block_tokens // 10)  # each shard costs two fsyncs
    with tempfile.TemporaryDirectory() as root:
        write_set(
            root, documents, block_tokens=block_tokens, blocks_per_shard=blocks_per_shard, dtype=dtype, eos_id=eos_id
        )
        if len(stream) <= seq_len:
            with pytest.raises(EmptyInput):
                TokenDataset(root, seq_len=seq_len)
            return
        input_ids, labels = windows(stream, seq_len)
        with TokenDataset(root, seq_len=seq_len) as dataset:
            assert len(dataset) == len(input_ids)
            samples = random.integers(0, len(dataset), 40)
            got = gathered(dataset, samples)
            assert (got[0] == input_ids[samples]).all()
            assert (got[1] == labels[samples]).all()
            for sample in samples[:5].tolist():
                spans = dataset.explain(sample)
                told = np.concatenate([stored[span.document][span.start : span.end] for span in spans])
                assert (told == stream[sample * seq_len : sample * seq_len + seq_len + 1]).all()
                shard_tokens = block_tokens * blocks_per_shard
                ends = sample * seq_len + np.cumsum([span.end - span.start for span in spans])
                assert [span.shard for span in spans] == ((ends - 1) // shard_tokens).tolist()


def test_a_sample_is_two_fresh_int64_tensors(tmp_path: Path) -> None:
    write_set(tmp_path, [np.arange(1, 100)])
    with TokenDataset(tmp_path, seq_len=8) as dataset:
        sample = dataset[2]
        assert {name: (t.shape, t.dtype) for name, t in sample.items()} == {
            "input_ids": ((8,), torch.int64),
            "labels": ((8,), torch.int64),
        }
        sample["input_ids"].zero_()
        assert dataset[2]["input_ids"].tolist() == list(range(17, 25))
        assert dataset[2]["labels"].tolist() == list(range(18, 26))
        assert dataset[-1]["input_ids"].tolist() == dataset[len(dataset) - 1]["input_ids"].tolist()


def test_labels_same_are_the_input_ids(tmp_path: Path) -> None:
    write_set(tmp_path, random_documents(20))
    with TokenDataset(tmp_path, seq_len=10, labels="same") as same, TokenDataset(tmp_path, seq_len=10) as shifted:
        everything = np.arange(len(same))
        input_ids, labels = gathered(same, everything)
        assert len(same) == len(shifted)
        assert (input_ids == gathered(shifted, everything)[0]).all()
        assert (labels == input_ids).all()


def test_iteration_over_a_data_set_ends(tmp_path: Path) -> None:
    write_set(tmp_path, [np.arange(1, 30)])
    with TokenDataset(tmp_path, seq_len=5) as dataset:
        assert len(list(dataset)) == len(dataset) == 5  # type: ignore[call-overload]
        for far in (5, -6, 2**63, 2**70, np.uint64(2**64 - 1)):
            with pytest.raises(IndexError, match=r"must be in \[0, 5\)"):
                dataset[far]  # type: ignore[index]
        for no_number in (1.7, "1", True, None):
            with pytest.raises(ConfigError, match="a sample index must be a whole number"):
                dataset[no_number]  # type: ignore[index]
        last = dataset[np.int64(-1)]  # type: ignore[index]
        assert torch.equal(last["input_ids"], dataset[4]["input_ids"])
        for wrong in (5, -1):
            with pytest.raises(ConfigError, match=rf"sample numbers are in \[0, 5\), got {wrong}"):
                gathered(dataset, [0, wrong])
            with pytest.raises(ConfigError, match="sample numbers"):
                dataset.explain(wrong)


@pytest.mark.parametrize("seq_len", [4096, 4097, 8192, 10_000])
def test_rows_longer_than_one_pass_are_gathered_whole(tmp_path: Path, seq_len: int) -> None:
    stream = np.random.default_rng(0).integers(1, 60_000, 9 * 10_000 + 1)
    write_set(tmp_path, [stream], block_tokens=2**15, blocks_per_shard=1)
    with TokenDataset(tmp_path, seq_len=seq_len) as dataset:
        for got, expected in zip(gathered(dataset, np.arange(len(dataset))), windows(stream, seq_len), strict=True):
            assert (got == expected).all()


def test_batches_larger_than_one_pass_are_gathered_whole(tmp_path: Path) -> None:
    documents = random_documents(2000, mean=100)
    write_set(tmp_path, documents, block_tokens=2**14)
    with TokenDataset(tmp_path, seq_len=128) as dataset:
        for got, expected in zip(
            gathered(dataset, np.arange(len(dataset))), windows(stream_of(documents), 128), strict=True
        ):
            assert (got == expected).all()


@pytest.mark.parametrize("shifted", [True, False])
def test_a_gather_reads_nothing_beyond_the_row(shifted: bool) -> None:
    # The row ends where the mapping ends: one byte more is a segmentation fault.
    import mmap

    seq_len = 5000
    pages = mmap.mmap(-1, 4 * mmap.PAGESIZE)
    guard = np.frombuffer(pages, np.uint16)
    guard[:] = np.arange(len(guard))
    row = guard[-(seq_len + 1) :]
    input_ids, labels = np.empty((1, seq_len), np.int64), np.empty((1, seq_len), np.int64)
    RowGather(np.dtype(np.uint16), seq_len, shifted=shifted)(np.array([row_index(row)]), input_ids, labels)
    assert (input_ids[0] == row[:-1]).all()
    assert (labels[0] == (row[1:] if shifted else row[:-1])).all()


# --- plans ------------------------------------------------------------------------------------------------------------


def test_a_plan_serves_its_rows_in_any_order_and_again(tmp_path: Path) -> None:
    documents = random_documents(200)
    write_set(tmp_path, documents)
    with TokenDataset(tmp_path, seq_len=10) as dataset:
        samples = np.random.default_rng(1).permutation(len(dataset))
        expected = windows(stream_of(documents), 10)[0][samples]
        plan = dataset.plan(samples)
        assert len(plan) == len(samples)
        input_ids, labels = np.empty((16, 10), np.int64), np.empty((16, 10), np.int64)
        for start in (0, 160, 32, 32, 500, 0, len(samples) - 16):
            dataset.gather_planned(plan, start, start + 16, input_ids, labels)
            assert (input_ids == expected[start : start + 16]).all()


def test_a_plan_keeps_its_rows_mapped_when_the_data_set_closes(tmp_path: Path) -> None:
    documents = random_documents(100)
    write_set(tmp_path, documents)
    dataset = TokenDataset(tmp_path, seq_len=10)
    everything = np.arange(len(dataset))
    expected = gathered(dataset, everything)[0]
    plan = dataset.plan(everything)
    dataset.close()
    input_ids, labels = np.empty_like(expected), np.empty_like(expected)
    dataset.gather_planned(plan, 0, len(plan), input_ids, labels)
    assert (input_ids == expected).all()
    with pytest.raises(ConfigError, match="the data set is closed"):
        dataset[0]
    dataset.close()


def test_more_shards_than_maps_are_read_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = random_documents(200)
    write_set(tmp_path, documents, blocks_per_shard=1)
    monkeypatch.setattr(source_module, "_affordable_maps", lambda shards: 3)
    with TokenDataset(tmp_path, seq_len=10) as dataset:
        assert dataset.manifest.shards > 50
        samples = np.random.default_rng(2).permutation(len(dataset))
        expected = windows(stream_of(documents), 10)[0][samples]
        plan = dataset.plan(samples)
        input_ids, labels = np.empty((8, 10), np.int64), np.empty((8, 10), np.int64)
        for start in range(0, len(samples) - 8, 8):
            dataset.gather_planned(plan, start, start + 8, input_ids, labels)
            assert (input_ids == expected[start : start + 8]).all()
            assert len(os.listdir("/proc/self/fd")) < 200
        source = dataset._source
        assert isinstance(source, source_module.LocalSource)
        assert len(source._maps) <= 3 + 16  # the last batch needed up to 16 at once
        assert (gathered(dataset, samples)[0] == expected).all()


_FEW_FILES = """
import resource, sys
import numpy as np
from stoker.loaders import TokenDataset

soft, hard = (int(argument) for argument in sys.argv[2:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
with TokenDataset(sys.argv[1], seq_len=10) as dataset:
    samples = np.random.default_rng(0).permutation(len(dataset))
    plan = dataset.plan(samples)
    input_ids, labels = np.empty((8, 10), np.int64), np.empty((8, 10), np.int64)
    for start in range(0, len(samples) - 8, 8):
        dataset.gather_planned(plan, start, start + 8, input_ids, labels)
        assert (input_ids[:, 0] == samples[start : start + 8] * 10).all()
print(dataset.manifest.shards, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
"""


def test_a_process_with_few_descriptors_reads_many_shards(tmp_path: Path) -> None:
    write_set(tmp_path, [np.arange(6000)], blocks_per_shard=1)
    for hard in ("80", "4096"):  # where the hard limit allows it, the soft one is raised
        run = subprocess.run(
            [sys.executable, "-c", _FEW_FILES, str(tmp_path), "80", hard], capture_output=True, text=True, check=False
        )
        assert run.stdout.split() == ["94", hard], run.stderr


# --- no wrong byte ----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A set of 2 shards of 4 blocks of 64 uint16 tokens, each token its own number."""
    write_set(tmp_path, [np.arange(500)])
    return tmp_path


def test_a_flipped_bit_is_told_by_file_and_range_and_the_rest_is_read(small: Path) -> None:
    shard = small / "data" / "00000001.arrow"
    with TokenDataset(small, seq_len=8) as dataset:
        start, end = dataset._tables.byte_range(1, 5)
    good = crc32c(shard.read_bytes()[start:end])
    flip_bit(shard, start + 3)
    bad = crc32c(shard.read_bytes()[start:end])
    with TokenDataset(small, seq_len=8) as dataset:
        for sample in (40, 47, 40):
            with pytest.raises(CorruptBlock) as caught:
                dataset[sample]
            assert caught.value.key == str(shard)
            assert (caught.value.start, caught.value.end) == (start, end)
            assert (caught.value.expected, caught.value.got) == (good, bad)
        assert dataset[39]["input_ids"][0] == 312  # its last label is the first token of the damaged block
        assert dataset[39]["labels"][-1] == 320
        assert dataset[48]["input_ids"][0] == 384


def test_verify_false_reads_what_is_there(small: Path) -> None:
    with TokenDataset(small, seq_len=8) as dataset:
        start, _ = dataset._tables.byte_range(0, 0)
    flip_bit(small / "data" / "00000000.arrow", start)
    with TokenDataset(small, seq_len=8, verify=False) as dataset:
        assert dataset[0]["input_ids"][0] == 0x10


@pytest.mark.parametrize("size", [0, 100, 700, -1])
def test_a_truncated_shard_is_refused_by_name(small: Path, size: int) -> None:
    shard = small / "data" / "00000001.arrow"
    whole = shard.stat().st_size
    os.truncate(shard, size % whole)
    with TokenDataset(small, seq_len=8) as dataset:
        assert dataset[0]["input_ids"][0] == 0
        with pytest.raises(ObjectChanged, match=f"00000001.arrow: the data file must have {whole} bytes, got"):
            dataset[40]


def test_a_missing_shard_is_refused_by_name(small: Path) -> None:
    (small / "data" / "00000001.arrow").unlink()
    with TokenDataset(small, seq_len=8) as dataset, pytest.raises(KeyNotFound, match="00000001.arrow"):
        dataset[40]


def test_a_file_that_was_replaced_is_checked_again(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source_module, "_affordable_maps", lambda shards: 1)
    shard = small / "data" / "00000000.arrow"
    with TokenDataset(small, seq_len=8) as dataset:
        start, _ = dataset._tables.byte_range(0, 0)
        dataset[0]
        dataset[40]  # the only map is needed for the other shard
        data = bytearray(shard.read_bytes())
        data[start] ^= 1
        replaced_ns = shard.stat().st_mtime_ns + 1_000_000_000
        shard.unlink()
        shard.write_bytes(data)
        os.utime(shard, ns=(replaced_ns, replaced_ns))  # the inode may be the same, and a clock may be coarse
        with pytest.raises(CorruptBlock, match="00000000.arrow"):
            dataset[0]


def test_damaged_tables_are_refused_where_they_are_read(small: Path) -> None:
    with TokenDataset(small, seq_len=8) as dataset:
        tables = dataset._tables
    flip_bit(small / "blocks.arrow", int(tables.shards.blocks_start[1]) + 5)
    flip_bit(small / "lengths.arrow", int(tables.shard_documents.lengths_start[0]))
    with TokenDataset(small, seq_len=8) as dataset:
        assert dataset[0]["input_ids"][0] == 0
        with pytest.raises(CorruptBlock, match="blocks.arrow"):
            dataset[40]
        with pytest.raises(CorruptBlock, match="lengths.arrow"):
            dataset.explain(0)


def test_what_is_no_data_set_is_told_apart(tmp_path: Path) -> None:
    with pytest.raises(BucketNotFound, match="no such directory"):
        TokenDataset(tmp_path / "nowhere", seq_len=8)
    with pytest.raises(KeyNotFound, match="a token data set has a manifest.json .*hint: check the URL"):
        TokenDataset(tmp_path, seq_len=8)


def test_the_length_of_samples_may_be_a_number_of_numpy(small: Path) -> None:
    with TokenDataset(small, seq_len=np.int64(32)) as dataset:  # type: ignore[arg-type]
        assert type(dataset.seq_len) is int
        with TokenLoader(dataset, batch_size=2) as loader:
            next(loader)
            loader.load_state_dict(json.loads(json.dumps(loader.state_dict())))


def test_wrong_arguments_are_refused(small: Path) -> None:
    with pytest.raises(EmptyInput, match="one sample takes seq_len \\+ 1 = 501 tokens, got '500 tokens'"):
        TokenDataset(small, seq_len=500)
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"seq_len": 0}, ConfigError, "seq_len must be >= 1, got 0"),
        ({"seq_len": 8.0}, ConfigError, "seq_len must be a whole number, got 8.0"),
        ({"seq_len": True}, ConfigError, "seq_len must be a whole number, got True"),
        ({"packing": "tight"}, ConfigError, "packing must be one of concat, best_fit, pad, or a BestFit or Pad, got"),
        ({"labels": "none"}, ConfigError, "labels must be one of shifted, same"),
    ]
    for options, kind, message in cases:
        with pytest.raises(kind, match=message):
            TokenDataset(small, **{"seq_len": 8, **options})


# --- identity ---------------------------------------------------------------------------------------------------------


def test_the_fingerprint_follows_the_content_and_nothing_else(tmp_path: Path) -> None:
    documents = random_documents(50)

    def fingerprint(name: str, documents: list[Document], **options: Any) -> str:
        write_set(tmp_path / name, documents, **options)
        with TokenDataset(tmp_path / name, seq_len=8) as dataset:
            return dataset.fingerprint

    original = fingerprint("original", documents)
    assert fingerprint("elsewhere", documents, blocks_per_shard=7, tokenizer="known") == original
    changed = [documents[0].copy(), *documents[1:]]
    changed[0][0] ^= 1
    merged = [np.concatenate(documents[:2]), *documents[2:]]
    others = {
        "token": fingerprint("token", changed),
        "border": fingerprint("border", merged),
        "dtype": fingerprint("dtype", documents, dtype="uint32"),
        "blocks": fingerprint("blocks", documents, block_tokens=32),
        "fewer": fingerprint("fewer", documents[:-1]),
    }
    assert len({original, *others.values()}) == 6, others


@pytest.mark.parametrize(
    ("block_tokens", "seq_len", "samples"),
    [(64, 8, 8), (64, 64, 1), (64, 100, 1), (64, 10, 4), (64, 1, 64), (64, 3, 16)],
)
def test_an_order_block_holds_a_power_of_two_of_samples(
    tmp_path: Path, block_tokens: int, seq_len: int, samples: int
) -> None:
    write_set(tmp_path, [np.arange(1, 300)], block_tokens=block_tokens)
    with TokenDataset(tmp_path, seq_len=seq_len) as dataset:
        assert dataset.samples_per_block == samples


def test_a_pickled_data_set_reopens_and_refuses_another_content(tmp_path: Path) -> None:
    write_set(tmp_path / "a", random_documents(20))
    write_set(tmp_path / "b", random_documents(20, seed=1))
    with TokenDataset(tmp_path / "a", seq_len=8, labels="same") as dataset:
        data = pickle.dumps(dataset)
        with pickle.loads(data) as again:
            assert (again.labels, again.fingerprint, len(again)) == ("same", dataset.fingerprint, len(dataset))
            assert again[3]["labels"].tolist() == dataset[3]["labels"].tolist()
    (tmp_path / "a").rename(tmp_path / "c")
    (tmp_path / "b").rename(tmp_path / "a")
    with pytest.raises(StateMismatch, match="must still have fingerprint"):
        pickle.loads(data)


# --- in a DataLoader --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_stock_data_loader_with_workers_reads_the_same(tmp_path: Path, start: str) -> None:
    documents = random_documents(60)
    write_set(tmp_path, documents)
    expected = windows(stream_of(documents), 16)
    with TokenDataset(tmp_path, seq_len=16) as dataset:
        dataset[0]  # a fork copies open maps
        loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context=start)
        batches = list(loader)
    assert (torch.cat([b["input_ids"] for b in batches]).numpy() == expected[0]).all()
    assert (torch.cat([b["labels"] for b in batches]).numpy() == expected[1]).all()


def test_a_forked_child_reads_though_a_thread_of_its_parent_held_the_lock(tmp_path: Path) -> None:
    write_set(tmp_path, [np.arange(1, 100)])
    with TokenDataset(tmp_path, seq_len=8) as dataset, multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(len, (dataset,)) == len(dataset)
    dataset = TokenDataset(tmp_path, seq_len=8)
    with dataset._lock:
        pid = os.fork()
        if pid == 0:
            signal.alarm(20)  # a child that waits for the lock must not outlive the test
            os._exit(0 if dataset[1]["input_ids"].tolist() == list(range(9, 17)) else 1)
    assert os.waitpid(pid, 0)[1] == 0
    dataset.close()


# --- remote -----------------------------------------------------------------------------------------------------------


Uploaded = Callable[[Path], tuple[str, dict[str, Any]]]


@pytest.fixture
def uploaded(s3_server: S3Server, tmp_path: Path) -> Uploaded:
    """Copy a local data set into the S3 server; returns url and options."""

    def upload(root: Path) -> tuple[str, dict[str, Any]]:
        url = s3_server.url("stoker", f"sets/{tmp_path.name}")
        with open_store(url, **s3_server.storage_options) as store:
            for name, data in files_in(root).items():
                store.put(name, data)
        return url, {"storage_options": s3_server.storage_options}

    return upload


def test_a_remote_set_written_in_place_reads_as_the_local_one(
    s3_server: S3Server, node_cache: TieredCache, tmp_path: Path
) -> None:
    documents = random_documents(150)
    write_set(tmp_path / "local", documents, eos_id=0)
    url = s3_server.url("stoker", f"written/{tmp_path.name}")
    write_set(url, documents, eos_id=0, storage_options=s3_server.storage_options)
    with open_store(url, **s3_server.storage_options) as store:
        assert {info.key: bytes(store.get(info.key)) for info in store.list()} == files_in(tmp_path / "local")
    with (
        TokenDataset(tmp_path / "local", seq_len=10) as local,
        TokenDataset(url, seq_len=10, cache=node_cache, storage_options=s3_server.storage_options) as remote,
    ):
        assert remote.fingerprint == local.fingerprint
        assert (remote.is_local, local.is_local) == (False, True)
        samples = np.random.default_rng(3).permutation(len(local))
        for got, expected in zip(gathered(remote, samples), gathered(local, samples), strict=True):
            assert (got == expected).all()
        assert remote.explain(7) == local.explain(7)
        stats = node_cache.stats()
        assert stats.misses == remote.manifest.blocks
        assert stats.fetched_bytes == 2 * remote.manifest.tokens
    # Another process, or this one later: nothing is fetched again.
    with TokenDataset(url, seq_len=10, cache=node_cache, storage_options=s3_server.storage_options) as remote:
        remote.prefetch(samples[:100])
        gathered(remote, samples)
        assert node_cache.stats().misses == remote.manifest.blocks


@pytest.mark.parametrize("start", ["fork", "spawn", "forkserver"])
def test_workers_read_cold_blocks_of_a_remote_set_that_their_parent_has_read(
    s3_server: S3Server, node_cache: TieredCache, tmp_path: Path, start: str
) -> None:
    documents = random_documents(500)
    url = s3_server.url("stoker", f"workers/{tmp_path.name}")
    write_set(url, documents, storage_options=s3_server.storage_options)
    with TokenDataset(url, seq_len=64, cache=node_cache, storage_options=s3_server.storage_options) as dataset:
        dataset[0]  # from here on a forked child can't use the client itself
        assert node_cache.stats().misses < dataset.manifest.blocks
        loader = DataLoader(dataset, batch_size=8, num_workers=2, multiprocessing_context=start)
        batches = list(loader)
    assert (torch.cat([b["input_ids"] for b in batches]).numpy() == windows(stream_of(documents), 64)[0]).all()


def test_samples_of_one_block_fetch_one_block(uploaded: Uploaded, node_cache: TieredCache, small: Path) -> None:
    url, options = uploaded(small)
    with TokenDataset(url, seq_len=8, cache=node_cache, **options) as dataset:
        input_ids, labels = gathered(dataset, np.arange(24, 32))  # block 3 ends its shard
        assert (input_ids.ravel() == np.arange(192, 256)).all()
        assert (labels.ravel() == np.arange(193, 257)).all()
        assert node_cache.stats().misses == 1


def test_prefetch_brings_blocks_in_before_they_are_asked_for(
    uploaded: Uploaded, node_cache: TieredCache, small: Path
) -> None:
    url, options = uploaded(small)
    with TokenDataset(url, seq_len=8, cache=node_cache, **options) as dataset:
        dataset.prefetch(np.array([0, 8, 8, 17]))
        while len(node_cache._queue) or node_cache._under_way:  # pytest-timeout guards it
            os.sched_yield()
        assert node_cache.stats().misses == 3
        gathered(dataset, [0, 8, 17])
        gathered(dataset, [1, 9, 18])
        assert node_cache.stats().misses == 3
        gathered(dataset, [30])
        assert node_cache.stats().misses == 4


def test_fewer_views_than_blocks_are_used_in_turns(uploaded: Uploaded, node_cache: TieredCache, small: Path) -> None:
    url, options = uploaded(small)
    with TokenDataset(url, seq_len=8, cache=node_cache, **options) as dataset:
        samples = np.random.default_rng(4).permutation(len(dataset))
        plan = dataset.plan(samples)
        with dataset._locked_source() as source:
            assert isinstance(source, source_module.CachedSource)
            source.max_views = 2
        input_ids, labels = np.empty((2, 8), np.int64), np.empty((2, 8), np.int64)
        for start in range(0, len(plan) - 1, 2):
            dataset.gather_planned(plan, start, start + 2, input_ids, labels)
            assert (input_ids[:, 0] == samples[start : start + 2] * 8).all()
            assert len(source._views) <= 2
        assert node_cache.stats().misses == dataset.manifest.blocks


def test_remote_damage_is_told_by_object_and_range(uploaded: Uploaded, node_cache: TieredCache, small: Path) -> None:
    with TokenDataset(small, seq_len=8) as dataset:
        start, end = dataset._tables.byte_range(0, 1)
    flip_bit(small / "data" / "00000000.arrow", start)
    os.truncate(small / "data" / "00000001.arrow", 650)
    url, options = uploaded(small)
    with TokenDataset(url, seq_len=8, cache=node_cache, **options) as dataset:
        with pytest.raises(CorruptBlock) as caught:
            dataset[8]
        assert (caught.value.key, caught.value.start, caught.value.end) == (f"{url}/data/00000000.arrow", start, end)
        with pytest.raises(ObjectChanged, match="00000001.arrow"):
            dataset[61]
        assert dataset[0]["input_ids"][0] == 0


def test_remote_sets_without_a_cache_share_one_and_say_so_once(
    uploaded: Uploaded,
    node_cache: TieredCache,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(dataset_module, "_default_cache", None)
    monkeypatch.setattr(dataset_module, "TieredCache", lambda: node_cache)  # not the user's own directory
    url, options = uploaded(small)
    with (
        caplog.at_level(logging.WARNING, "stoker.loaders"),
        TokenDataset(url, seq_len=8, **options) as one,
        TokenDataset(url, seq_len=16, **options) as two,
    ):
        assert one[0]["input_ids"][0] == two[0]["input_ids"][0] == 0
    assert node_cache.stats().misses == 1
    assert len([r for r in caplog.records if "share one default cache" in r.getMessage()]) == 1


@pytest.mark.parametrize("seq_len", [10, 64, 100])
@pytest.mark.parametrize("is_local", [True, False])
def test_a_row_that_touches_a_damaged_block_is_never_delivered(
    uploaded: Uploaded, node_cache: TieredCache, small: Path, seq_len: int, is_local: bool
) -> None:
    with TokenDataset(small, seq_len=8) as dataset:
        start, _ = dataset._tables.byte_range(0, 2)
    flip_bit(small / "data" / "00000000.arrow", start + 100)
    url, options = (str(small), {}) if is_local else uploaded(small)
    with TokenDataset(url, seq_len=seq_len, cache=node_cache, **options) as dataset:
        for seed in range(5):
            samples = np.random.default_rng(seed).permutation(len(dataset))
            plan = dataset.plan(samples)
            input_ids, labels = np.empty((1, seq_len), np.int64), np.empty((1, seq_len), np.int64)
            for row, sample in enumerate(samples.tolist()):
                first = sample * seq_len
                try:
                    dataset.gather_planned(plan, row, row + 1, input_ids, labels)
                except CorruptBlock:
                    assert first < 192 and first + seq_len > 128
                else:
                    assert first >= 192 or first + seq_len <= 128
                    assert (input_ids[0] == np.arange(first, first + seq_len)).all()
                    assert (labels[0] == np.arange(first + 1, first + seq_len + 1)).all()


def test_a_missing_bucket_and_a_missing_set_are_told_apart(s3_server: S3Server, tmp_path: Path) -> None:
    options = s3_server.storage_options
    with pytest.raises(BucketNotFound):
        TokenDataset(s3_server.url("no-such-bucket", "set"), seq_len=8, storage_options=options)
    with pytest.raises(BucketNotFound):
        TokenWriter(s3_server.url("no-such-bucket", "set"), storage_options=options)
    with pytest.raises(KeyNotFound, match="a token data set has a manifest.json"):
        TokenDataset(s3_server.url("stoker", "no/set/here"), seq_len=8, storage_options=options)
