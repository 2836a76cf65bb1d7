"""Token data set v1: golden files, plain Arrow readers, and what a reader refuses."""

import hashlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import CorruptBlock, CorruptRecord, FormatError, ObjectChanged, StokerError, UnknownVersion
from stoker.loaders import TokenDataset
from stoker.loaders.format import (
    Manifest,
    ShardDocuments,
    ShardFiles,
    ShardsInfo,
    ShardTable,
    TableInfo,
    shard_key,
)
from tests.data import make_token_data_set as golden
from tests.loaders.token_sets import files_in, flip_bit

GOLDEN = golden.GOLDEN


def manifest(**changes: Any) -> Manifest:
    values: dict[str, Any] = {
        "dtype": "uint16",
        "eos_id": 0,
        "tokenizer": "sha256:00",
        "documents": 10,
        "tokens": 1000,
        "shards": 2,
        "blocks": 16,
        "block_tokens": 64,
        "order_blocks": 1,
        "shards_table": ShardsInfo(1000, "aa", 104, 1, 176, 2),
        "blocks_table": TableInfo(200, "bb"),
        "lengths_table": TableInfo(300, "cc"),
        "fingerprint": "ff",
    }
    return Manifest(**{**values, **changes})


def resealed(change: Callable[[dict[str, Any]], None]) -> bytes:
    """A manifest changed by someone who knows how to compute its digest."""
    body = json.loads(manifest().encode())
    del body["sha256"]
    change(body)
    digest = hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}).encode()


def test_the_golden_sets_read_as_they_were_written() -> None:
    tokens = [token for document in golden.documents() for token in (*document, golden.EOS_ID)]
    with TokenDataset(GOLDEN / "uint16", seq_len=7) as dataset:
        assert dataset.manifest.documents == len(golden.LENGTHS)
        assert dataset.manifest.tokenizer == "golden"
        for i in range(len(dataset)):
            assert dataset[i]["input_ids"].tolist() == tokens[7 * i : 7 * i + 7]
            assert dataset[i]["labels"].tolist() == tokens[7 * i + 1 : 7 * i + 8]
    with TokenDataset(GOLDEN / "uint32", seq_len=4) as dataset:
        assert dataset[0]["input_ids"].tolist() == list(golden.WIDE[:4])
        assert dataset[0]["labels"].tolist() == list(golden.WIDE[1:])


def test_the_writer_still_writes_the_golden_bytes(tmp_path: Path) -> None:
    golden.write(tmp_path)
    assert files_in(tmp_path) == files_in(GOLDEN)


_PLAIN_READER = """
import json, sys
from pathlib import Path
import pyarrow as pa, pyarrow.ipc

root = Path(sys.argv[1])
documents, open_document = [], []
for path in sorted(root.glob("data/*.arrow")):
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    for row in table.to_pylist():
        open_document += row["input_ids"]
        if not row["continues"]:
            documents.append(open_document)
            open_document = []
lengths = pa.ipc.open_file(str(root / "lengths.arrow")).read_all()["length"].to_pylist()
blocks = pa.ipc.open_file(str(root / "blocks.arrow")).read_all().to_pylist()
shards = pa.ipc.open_file(str(root / "shards.arrow")).read_all().to_pylist()
assert not open_document and not any(name.startswith("stoker") for name in sys.modules)
print(json.dumps([documents, lengths, [[b["first_doc"], b["first_doc_offset"], b["first_token"]] for b in blocks],
                  [s["tokens_before"] for s in shards]]))
"""


def test_plain_pyarrow_reads_a_data_set_in_a_process_without_stoker() -> None:
    run = subprocess.run(
        [sys.executable, "-c", _PLAIN_READER, str(GOLDEN / "uint16")], capture_output=True, text=True, check=True
    )
    documents, lengths, blocks, tokens_before = json.loads(run.stdout)
    assert documents == [[*document, golden.EOS_ID] for document in golden.documents()]
    assert lengths == [len(document) for document in documents]
    for number, (document, offset, token) in enumerate(blocks):
        assert documents[document][offset] == token
        assert sum(lengths[:document]) + offset == number * golden.BLOCK_TOKENS
    assert tokens_before == [0, 64, 128, 192, 256]


def test_the_shard_table_finds_tokens_and_table_slices_in_the_files() -> None:
    root = GOLDEN / "uint16"
    m = Manifest.decode((root / "manifest.json").read_bytes(), "manifest")
    table = (root / "shards.arrow").read_bytes()
    shards = ShardTable.decode(table[m.shards_table.places_start :], m, "shards")
    starts = ShardDocuments.decode(table[m.shards_table.documents_start :], m, "shards")
    files = ShardFiles.decode(table, m, "shards")
    stream = np.array([token for document in golden.documents() for token in (*document, golden.EOS_ID)], "<u2")
    lengths = np.array(golden.LENGTHS, "<u4") + np.uint32(1)
    for n in range(m.shards):
        begin, end = [*shards.tokens_before, m.tokens][n : n + 2]
        data = (root / shard_key(n)).read_bytes()
        assert hashlib.sha256(data).digest() == files.sha256[n].tobytes()
        assert data[shards.tokens_start[n] :].startswith(stream[begin:end].tobytes())
        assert len(data) == shards.file_bytes[n]
        first, last = [*starts.documents_before, m.documents][n : n + 2]
        mine = lengths[first:last]
        assert (root / "lengths.arrow").read_bytes()[starts.lengths_start[n] :].startswith(mine.tobytes())


def test_a_manifest_stays_small_however_large_the_set() -> None:
    huge = manifest(
        documents=2**62,
        tokens=2**63,
        shards=2**40,
        blocks=2**57,
        tokenizer="x" * 256,
        shards_table=ShardsInfo(2**60, "a" * 64, 2**50, 2**32 - 1, 2**55, 2**32 - 1),
        fingerprint="f" * 64,
    )
    assert len(huge.encode()) < 1500
    assert Manifest.decode(huge.encode(), "manifest") == huge


def test_a_newer_major_version_is_refused_by_name() -> None:
    def change(body: dict[str, Any]) -> None:
        body["version"] = 2
        body["something_new"] = True

    with pytest.raises(UnknownVersion, match="stoker-token-data-set version 1, got 2.*upgrade stoker"):
        Manifest.decode(resealed(change), "s3://b/manifest.json")


def test_another_format_is_refused_by_name() -> None:
    with pytest.raises(FormatError, match="must be stoker-token-data-set, got 'mds'"):
        Manifest.decode(resealed(lambda body: body.update(format="mds")), "manifest.json")
    with pytest.raises(FormatError, match="must be stoker-token-data-set, got 'list'"):
        Manifest.decode(b"[1]", "manifest.json")


def test_a_manifest_has_exactly_its_fields() -> None:
    with pytest.raises(FormatError, match="exactly the fields.*got 'url'"):
        Manifest.decode(resealed(lambda body: body.update(url="s3://elsewhere")), "manifest.json")
    with pytest.raises(FormatError, match="exactly the fields.*got 'tokens'"):
        Manifest.decode(resealed(lambda body: body.pop("tokens")), "manifest.json")
    with pytest.raises(FormatError, match="blocks_table must have bytes and sha256"):
        Manifest.decode(resealed(lambda body: body.update(blocks_table={"bytes": 1})), "manifest.json")


@pytest.mark.parametrize(
    "change",
    [{"dtype": "int64"}, {"tokens": 0}, {"shards": -1}, {"block_tokens": 48}, {"blocks": 15}, {"documents": "10"}],
    ids=str,
)
def test_a_manifest_whose_numbers_do_not_fit_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match="numbers must fit together"):
        Manifest.decode(resealed(lambda body: body.update(change)), "manifest.json")


def test_a_torn_manifest_is_refused() -> None:
    data = manifest().encode()
    with pytest.raises(CorruptRecord, match="manifest.json: a manifest must be JSON"):
        Manifest.decode(data[: len(data) // 2], "manifest.json")


@given(st.integers(0, len(manifest().encode()) - 1), st.integers(0, 7))
@settings(max_examples=150, deadline=None)
def test_no_flipped_bit_of_a_manifest_changes_what_is_read(position: int, bit: int) -> None:
    data = bytearray(manifest().encode())
    data[position] ^= 1 << bit
    try:
        read = Manifest.decode(data, "manifest.json")
    except StokerError:
        return
    assert read == manifest()


@pytest.mark.parametrize("change", [{"places_start": -8}, {"documents_start": 160}, {"bytes": 200}], ids=str)
def test_parts_of_the_shard_table_that_do_not_fit_are_refused(change: dict[str, int]) -> None:
    with pytest.raises(FormatError, match="numbers must fit together"):
        Manifest.decode(resealed(lambda body: body["shards_table"].update(change)), "manifest.json")


@pytest.mark.parametrize("documents", [False, True])
def test_each_flipped_byte_of_the_shard_table_that_is_read_is_told_by_name(tmp_path: Path, documents: bool) -> None:
    golden.write(tmp_path)
    root = tmp_path / "uint16"
    m = Manifest.decode((root / "manifest.json").read_bytes(), "manifest")
    start, size_bytes = m.shards_table.places_start, ShardTable.size_bytes(m.shards)
    if documents:
        start, size_bytes = m.shards_table.documents_start, ShardDocuments.size_bytes(m.shards)
    for offset in range(start, start + size_bytes):
        flip_bit(root / "shards.arrow", offset)
        with pytest.raises(CorruptBlock, match="shards.arrow") as caught:
            TokenDataset(root, seq_len=7)
        assert (caught.value.start, caught.value.end) == (start, start + size_bytes)
        flip_bit(root / "shards.arrow", offset)
    TokenDataset(root, seq_len=7).close()


def test_a_shard_table_that_was_cut_is_refused(tmp_path: Path) -> None:
    golden.write(tmp_path)
    root = tmp_path / "uint16"
    (root / "shards.arrow").write_bytes((GOLDEN / "uint16" / "shards.arrow").read_bytes()[:1400])
    with pytest.raises(ObjectChanged, match="shards.arrow: must hold bytes"):
        TokenDataset(root, seq_len=7)
