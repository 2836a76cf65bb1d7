"""Opening a data set: what is read then, what only when it is needed, and that nothing grows afterwards."""

import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stoker.loaders._tables as tables_module
import stoker.loaders.dataset as dataset_module
from stoker.errors import CorruptBlock, FormatError, KeyNotFound, ObjectChanged
from stoker.loaders import TokenDataset, TokenLoader
from stoker.loaders._source import _zeros
from stoker.loaders._tables import Tables
from stoker.loaders.format import ShardDocuments, ShardTable
from stoker.metrics import counters
from stoker.storage import TieredCache, open_store
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import files_in, flip_bit, random_documents, write_set

DOCUMENTS = random_documents(400, seed=1)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A set of some 60 shards of 4 blocks."""
    write_set(tmp_path / "set", DOCUMENTS)
    return tmp_path / "set"


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Treat each table as one that is too large to be read whole."""
    monkeypatch.setattr(tables_module, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(tables_module, "_JOINED_BYTES", 0)


@pytest.fixture
def remote(root: Path, s3_server: S3Server, tmp_path: Path) -> tuple[str, dict[str, Any]]:
    url = s3_server.url("stoker", f"open/{tmp_path.name}")
    with open_store(url, **s3_server.storage_options) as store:
        for name, data in files_in(root).items():
            store.put(name, data)
    return url, s3_server.storage_options


def read_since(before: dict[str, float]) -> tuple[int, int]:
    """Requests and bytes of reads."""
    told = counters.since(before)
    return int(told.get("store.get.requests", 0)), int(told.get("store.get.bytes", 0))


# --- what is read -----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("large")
def test_opening_a_large_remote_set_is_two_requests_and_36_bytes_a_shard(
    root: Path, remote: tuple[str, dict[str, Any]], node_cache: TieredCache
) -> None:
    url, options = remote
    manifest_bytes = (root / "manifest.json").stat().st_size
    before = counters.snapshot()
    with TokenDataset(url, seq_len=8, cache=node_cache, storage_options=options) as dataset:
        shards = dataset.manifest.shards
        assert shards > 30
        assert read_since(before) == (2, manifest_bytes + 36 * shards + 4 * (shards % 2))
        before = counters.snapshot()
        dataset.gather(np.arange(16), np.empty((16, 8), np.int64), np.empty((16, 8), np.int64))  # two blocks of a shard
        block_bytes = dataset.manifest.block_bytes
        # Their shard's rows of blocks.arrow and the blocks; the last label stands in the next block's row.
        assert read_since(before) == (1 + 2, (2 * 4 * 4 + 2 * 4 * 8) + 2 * block_bytes)
    before = counters.snapshot()
    with TokenDataset(url, seq_len=8, documents=True, cache=node_cache, storage_options=options):
        size_bytes = ShardTable.size_bytes(shards) + ShardDocuments.size_bytes(shards)
        assert read_since(before) == (2, manifest_bytes + size_bytes)


def test_tables_of_a_remote_set_are_read_at_the_same_time(
    root: Path, remote: tuple[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, options = remote
    together = threading.Barrier(3, timeout=60)

    def opened(url: str, **options: Any) -> Any:
        store = open_store(url, **options)
        get = store.get

        def waiting(key: str, *args: Any, **others: Any) -> memoryview:
            if key.endswith(".arrow"):
                together.wait()
            return get(key, *args, **others)

        monkeypatch.setattr(store, "get", waiting)
        return store

    monkeypatch.setattr(dataset_module, "open_store", opened)
    with TokenDataset(url, seq_len=8, packing="best_fit", storage_options=options) as dataset:
        assert dataset.manifest.tokens == sum(len(document) for document in DOCUMENTS)
        assert not together.broken


def test_a_table_that_is_missing_is_told_where_it_is_needed(
    remote: tuple[str, dict[str, Any]], node_cache: TieredCache
) -> None:
    url, options = remote
    with open_store(url, **options) as store:
        store.delete("blocks.arrow")
    with (
        TokenDataset(url, seq_len=8, cache=node_cache, storage_options=options) as dataset,
        pytest.raises(KeyNotFound, match="blocks.arrow"),
    ):
        dataset[0]


@pytest.mark.usefixtures("large")
def test_large_local_tables_are_mapped_and_let_go(root: Path) -> None:
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None
    stream = np.concatenate(DOCUMENTS)
    with TokenDataset(root, seq_len=8, packing="best_fit") as packed, TokenDataset(root, seq_len=8) as dataset:
        assert dataset[57]["input_ids"].tolist() == stream[57 * 8 : 58 * 8].tolist()
        assert dataset.explain(57) and packed[3]["doc_ids"].shape == (8,)
        assert set(packed._tables._whole) == {"blocks.arrow", "lengths.arrow"}
    if descriptors is not None:
        assert len(os.listdir("/proc/self/fd")) == descriptors


# --- what is damaged --------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("large")
def test_damage_to_a_part_that_is_read_later_is_told_then(root: Path) -> None:
    with TokenDataset(root, seq_len=8) as dataset:
        info, shards = dataset.manifest.shards_table, dataset.manifest.shards
    for offset in range(info.documents_start, info.documents_start + ShardDocuments.size_bytes(shards), 7):
        flip_bit(root / "shards.arrow", offset)
        with TokenDataset(root, seq_len=8) as dataset:
            assert dataset[0]["input_ids"].shape == (8,)
            with pytest.raises(CorruptBlock, match="shards.arrow") as caught:
                dataset.explain(0)
            assert caught.value.start == info.documents_start
        flip_bit(root / "shards.arrow", offset)


@pytest.mark.usefixtures("large")
def test_a_mapped_table_that_was_cut_is_refused(root: Path) -> None:
    whole = (root / "blocks.arrow").stat().st_size
    os.truncate(root / "blocks.arrow", 100)
    with (
        TokenDataset(root, seq_len=8) as dataset,
        pytest.raises(ObjectChanged, match=f"blocks.arrow: the table must have {whole} bytes, got 100"),
    ):
        dataset[0]


@pytest.mark.parametrize("column", ["tokens_before", "documents_before"])
@pytest.mark.parametrize("change", [(0, 64), (5, 0), (-1, 1 << 40)])
def test_shards_out_of_order_are_refused(root: Path, column: str, change: tuple[int, int]) -> None:
    with TokenDataset(root, seq_len=8) as dataset:
        manifest, tables = dataset.manifest, dataset._tables
        kind = ShardTable if column == "tokens_before" else ShardDocuments
        table = tables.shards if column == "tokens_before" else tables.shard_documents
    columns = {name: array.copy() for name, array in table._asdict().items()}
    columns[column][change[0]] = change[1]
    data = b"".join(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0") for array in columns.values())
    with pytest.raises(FormatError, match="must fit the manifest"):
        kind.decode(data, manifest, "shards.arrow")


@pytest.mark.parametrize("start", [-8, 1004, 1 << 40])
def test_tokens_that_do_not_fit_into_their_file_are_refused(root: Path, start: int) -> None:
    with TokenDataset(root, seq_len=8) as dataset:
        tables: Tables = dataset._tables
        tables.shards = tables.shards._replace(tokens_start=np.full(tables.manifest.shards, start))
        with pytest.raises(FormatError, match="tokens must fit into its file, got .shard 0: bytes"):
            dataset[0]


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="needs /proc")
def test_blocks_far_apart_take_a_page_each_and_not_a_huge_one() -> None:
    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    rows = _zeros(48 << 18, np.intp)  # 48 times 2 MiB
    before = resident_bytes()
    rows[1000 :: 1 << 18] = 1
    assert rows.sum() == 48
    assert resident_bytes() - before < 16 << 20


def test_nothing_grows_with_the_number_of_batches(root: Path) -> None:
    with TokenDataset(root, seq_len=16) as dataset, TokenLoader(dataset, batch_size=2, epochs=None) as loader:
        for _ in range(6000):  # what is kept of the latest batches is full then
            next(loader)
        before = sys.getallocatedblocks()
        for _ in range(6000):
            next(loader)
        assert sys.getallocatedblocks() - before < 1500
