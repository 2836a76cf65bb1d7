"""pack: text files, JSON lines and Parquet become the tokens that the tokenizer makes of them, in a fixed order."""

import gzip
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from stoker.errors import (
    AlreadyExists,
    ConfigError,
    DatasetError,
    EmptyInput,
    FormatError,
    KeyNotFound,
    MissingExtra,
    UnsupportedError,
)
from stoker.loaders import TokenDataset
from stoker.loaders.pack import PackReport, pack
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import files_in


def byte_tokenizer(*special: str) -> Tokenizer:
    """One token for each byte, in a readable alphabet, and `special` ones."""
    vocabulary = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    path = tmp_path / "tokenizer.json"
    byte_tokenizer("<|endoftext|>").save(str(path))
    return path


def texts_in(root: Path | str, tokenizer: Path, **options: Any) -> list[str]:
    """The documents of a data set, decoded."""
    with TokenDataset(root, seq_len=1, **options) as dataset:
        assert dataset.manifest.eos_id is not None
        input_ids, labels = np.empty((2, len(dataset), 1), np.int64)
        dataset.gather(np.arange(len(dataset)), input_ids, labels)
        documents: list[list[int]] = [[]]
        for token in [*input_ids[:, 0].tolist(), int(labels[-1, 0])]:
            documents[-1].append(token)
            if token == dataset.manifest.eos_id:
                documents.append([])
        assert documents.pop() == []
        assert dataset.manifest.documents == len(documents)
    decode = Tokenizer.from_file(str(tokenizer)).decode
    return [decode(document, skip_special_tokens=True) for document in documents]


@pytest.fixture
def packed(tmp_path: Path, tokenizer: Path) -> Callable[..., tuple[PackReport, list[str]]]:
    """Pack into a fresh directory; returns the report and the documents that are stored."""

    def run(*sources: Path, **options: Any) -> tuple[PackReport, list[str]]:
        report = pack(sources, tmp_path / "out", tokenizer=tokenizer, **options)
        return report, texts_in(tmp_path / "out", tokenizer)

    return run


Packed = Callable[..., tuple[PackReport, list[str]]]


def write_files(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")


def test_a_directory_is_packed_in_the_order_of_its_paths(tmp_path: Path, packed: Packed) -> None:
    source = tmp_path / "src"
    write_files(
        source,
        {
            "b.txt": "über",
            "a/z.txt": "zett",
            "a/b/c.txt": "deep",
            "a.txt": "first",
            "empty.txt": "",
            ".hidden/x.txt": "no",
            ".x.txt": "no",
        },
    )
    report, texts = packed(source)
    assert texts == ["first", "deep", "zett", "über"]
    assert (report.documents, report.empty_documents, report.source_bytes) == (4, 1, 18)
    assert report.tokens == 18 + 4
    assert (report.dtype, report.eos_id) == ("uint16", 256)
    assert report.stored_bytes == sum(len(d) for n, d in files_in(tmp_path / "out").items() if n != "manifest.json")


def test_a_glob_chooses_files_by_name_or_end_of_path(tmp_path: Path, tokenizer: Path) -> None:
    write_files(tmp_path / "src", {"a.py": "a", "b.md": "b", "docs/c.md": "c", "docs/d.py": "d"})
    for glob, expected in (("*.md", ["b", "c"]), ("docs/*.py", ["d"])):
        out = tmp_path / f"out-{len(expected)}"
        pack([tmp_path / "src"], out, tokenizer=tokenizer, glob=glob)
        assert texts_in(out, tokenizer) == expected


def test_json_lines_plain_and_compressed_are_packed_line_by_line(tmp_path: Path, packed: Packed) -> None:
    lines = "\n".join(json.dumps({"id": i, "text": text}) for i, text in enumerate(["one", "", "drei ✓"])) + "\n\n"
    (tmp_path / "a.jsonl").write_text(lines, encoding="utf-8")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress(lines.encode()))
    read: list[int] = []
    report, texts = packed(tmp_path / "b.json.gz", tmp_path / "a.jsonl", progress=read.append)
    assert texts == ["one", "drei ✓", "one", "drei ✓"]
    assert report.empty_documents == 2
    assert 0 < sum(read) <= report.source_bytes


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_parquet_is_packed_row_by_row(tmp_path: Path, packed: Packed, kind: pa.DataType) -> None:
    texts = [f"row {i}" for i in range(2500)]
    column = pa.array([*texts, None, ""], kind)
    pq.write_table(pa.table({"n": range(2502), "body": column}), tmp_path / "a.parquet", row_group_size=700)
    read: list[int] = []
    report, stored = packed(tmp_path / "a.parquet", text_column="body", progress=read.append)
    assert stored == texts
    assert report.empty_documents == 2
    assert sum(read) == report.source_bytes == (tmp_path / "a.parquet").stat().st_size


def test_several_sources_keep_their_order(tmp_path: Path, packed: Packed) -> None:
    write_files(tmp_path, {"z.txt": "z", "a.txt": "a", "d/m.txt": "m"})
    assert packed(tmp_path / "z.txt", tmp_path / "d", tmp_path / "a.txt")[1] == ["z", "m", "a"]


def test_the_same_input_gives_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    write_files(tmp_path / "src", {f"{i}.txt": f"text {i} " * i for i in range(40)})
    for name in ("one", "two"):
        pack([tmp_path / "src"], tmp_path / name, tokenizer=tokenizer, shard_bytes=1024, block_tokens=128)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "two")
    assert len(list((tmp_path / "one" / "data").iterdir())) > 3


def test_truncation_padding_and_special_tokens_of_the_tokenizer_do_not_enter(tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = byte_tokenizer("</s>", "<s>")
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 257), ("</s>", 256)])
    tokenizer.save(str(tmp_path / "t.json"))
    write_files(tmp_path, {"a.txt": "abcdef"})
    report = pack([tmp_path / "a.txt"], tmp_path / "out", tokenizer=tmp_path / "t.json")
    assert (report.tokens, report.eos_id) == (7, 256)
    assert texts_in(tmp_path / "out", tmp_path / "t.json") == ["abcdef"]


def test_the_dtype_follows_the_vocabulary(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "abc"})
    for extra, dtype in ((65_536 - 257, "uint16"), (65_536 - 256, "uint32")):
        tokenizer = byte_tokenizer("<|endoftext|>", *(f"<{i}>" for i in range(extra)))
        tokenizer.save(str(tmp_path / "t.json"))
        assert pack([tmp_path / "a.txt"], tmp_path / dtype, tokenizer=tmp_path / "t.json").dtype == dtype


def test_the_end_token_is_found_named_or_left_out(tmp_path: Path) -> None:
    write_files(tmp_path, {"a.txt": "abc"})
    byte_tokenizer("[DONE]").save(str(tmp_path / "t.json"))

    def run(name: str, **options: Any) -> PackReport:
        return pack([tmp_path / "a.txt"], tmp_path / name, tokenizer=tmp_path / "t.json", **options)

    with pytest.raises(ConfigError, match="must have the token that ends a document.*--eos-token none"):
        run("auto")
    with pytest.raises(ConfigError, match="got '<nope>'"):
        run("wrong", eos_token="<nope>")
    assert run("named", eos_token="[DONE]").eos_id == 256
    report = run("without", eos_token=None)
    assert (report.eos_id, report.tokens) == (None, 3)


# --- stopped and continued --------------------------------------------------------------------------------------------


class Stop(Exception):
    """Ends a run in the middle."""


def stopping_after(read_bytes: int) -> Callable[[int], None]:
    left = [read_bytes]

    def progress(size_bytes: int) -> None:
        left[0] -= size_bytes
        if left[0] < 0:
            raise Stop

    return progress


def test_a_stopped_run_is_resumed_to_the_same_bytes(tmp_path: Path, tokenizer: Path) -> None:
    lines = [json.dumps({"text": f"{i} " * (i % 97)}) for i in range(4000)]
    write_files(tmp_path, {"a.jsonl": "\n".join(lines)})
    options: dict[str, Any] = {"tokenizer": tokenizer, "shard_bytes": 2**16, "block_tokens": 2**10}
    pack([tmp_path / "a.jsonl"], tmp_path / "peace", **options)
    with pytest.raises(Stop):
        size_bytes = (tmp_path / "a.jsonl").stat().st_size
        pack([tmp_path / "a.jsonl"], tmp_path / "out", progress=stopping_after(size_bytes * 3 // 4), **options)
    with pytest.raises(AlreadyExists, match="--resume"):
        pack([tmp_path / "a.jsonl"], tmp_path / "out", **options)
    report = pack([tmp_path / "a.jsonl"], tmp_path / "out", resume=True, **options)
    assert 0 < report.resumed_documents < report.documents == 4000 - report.empty_documents
    assert files_in(tmp_path / "out") == files_in(tmp_path / "peace")


def test_a_resumed_run_needs_the_same_input(tmp_path: Path, tokenizer: Path) -> None:
    source = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": f"document {i}"}) for i in range(2000)]
    source.write_text("\n".join([*lines, "{"]))
    options: dict[str, Any] = {"tokenizer": tokenizer, "shard_bytes": 2**12, "block_tokens": 2**10}
    with pytest.raises(FormatError, match=r"a\.jsonl:2001: each line must be JSON"):
        pack([source], tmp_path / "out", **options)
    source.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match="needs the same files, sizes, text column and errors"):
        pack([source], tmp_path / "out", resume=True, **options)
    source.write_text("\n".join([*lines, " "]))  # the same size, and the line is right now
    assert pack([source], tmp_path / "out", resume=True, **options).documents == 2000


def test_packing_to_s3_gives_the_bytes_of_a_local_set(s3_server: S3Server, tmp_path: Path, tokenizer: Path) -> None:
    from stoker.storage import open_store

    write_files(tmp_path / "src", {f"{i}.txt": f"text {i}" for i in range(9)})
    url = s3_server.url("stoker", f"pack/{tmp_path.name}")
    pack([tmp_path / "src"], tmp_path / "out", tokenizer=tokenizer)
    report = pack([tmp_path / "src"], url, tokenizer=tokenizer, storage_options=s3_server.storage_options)
    assert report.url == url
    with open_store(url, **s3_server.storage_options) as store:
        assert {info.key: bytes(store.get(info.key)) for info in store.list()} == files_in(tmp_path / "out")


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "kind", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', FormatError, r"a\.jsonl:2: each line must be JSON"),
        ("a.jsonl", b"[1]\n", FormatError, r"a\.jsonl:1: each line must be a JSON object, got 'list'"),
        ("a.jsonl", b'{"body": "x", "id": 1}', DatasetError, r":1: needs a column 'text', got 'columns body, id'.*--text"),
        ("a.jsonl", b'{"text": 7}', FormatError, r":1: column 'text' must hold text, got 'int'"),
        ("a.jsonl", b'{"text": "x"}\n"\xff"\n', FormatError, r"a\.jsonl:2: text must be UTF-8, got 'byte 0xff at 1'"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-12], FormatError, r"must be a whole gzip file"),
        ("a.jsonl.gz", b'{"text": "x"}\n', FormatError, r"must be a whole gzip file"),
        ("a.txt", b"caf\xe9", FormatError, r"a\.txt: text must be UTF-8, got 'byte 0xe9 at 3'.*--errors replace"),
        ("a.parquet", b"PAR1", FormatError, r"a\.parquet: must be a Parquet file"),
        ("a.txt", b"", EmptyInput, r"at least one document"),
    ],
)  # fmt: skip
def test_bad_input_is_told_by_file_and_line(
    tmp_path: Path, tokenizer: Path, name: str, content: bytes, kind: type[Exception], message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(kind, match=message):
        pack([tmp_path / name], tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_parquet_file_without_the_column_is_refused(tmp_path: Path, tokenizer: Path) -> None:
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(DatasetError, match="a.parquet: needs a column 'text', got 'columns n, body'"):
        pack([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=tokenizer)
    with pytest.raises(FormatError, match="a.parquet: row 0: column 'n' must hold text, got 'int'"):
        pack([tmp_path / "a.parquet"], tmp_path / "out", tokenizer=tokenizer, text_column="n")


@pytest.mark.parametrize(("errors", "texts", "skipped"), [("replace", ["ok", "caf�"], 0), ("skip", ["ok"], 1)])
def test_text_that_is_not_utf_8_is_replaced_or_left_out_on_request(
    tmp_path: Path, packed: Packed, errors: str, texts: list[str], skipped: int
) -> None:
    (tmp_path / "a.txt").write_bytes(b"ok")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    report, stored = packed(tmp_path / "a.txt", tmp_path / "b.txt", errors=errors)
    assert (stored, report.skipped_documents) == (texts, skipped)


def refused(kind: type[Exception], message: str, sources: Sequence[Any], out: Path, **options: Any) -> None:
    with pytest.raises(kind, match=message):
        pack(sources, out, **options)
    assert not out.exists()


def test_missing_and_empty_sources_are_refused_before_anything_is_written(tmp_path: Path, tokenizer: Path) -> None:
    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    write_files(tmp_path, {"a.txt": "a", "bad.json": "{"})
    refused(KeyNotFound, "no such file or directory", [tmp_path / "gone"], out, tokenizer=tokenizer)
    refused(
        EmptyInput, r"empty: a directory needs files that match '\*'", [tmp_path / "empty"], out, tokenizer=tokenizer
    )
    refused(EmptyInput, "pack needs a source", [], out, tokenizer=tokenizer)
    refused(UnsupportedError, "local files and directories", ["s3://b/x"], out, tokenizer=tokenizer)
    refused(KeyNotFound, "no such tokenizer file", [tmp_path / "a.txt"], out, tokenizer=tmp_path / "gone.json")
    refused(FormatError, "must be a tokenizer.json", [tmp_path / "a.txt"], out, tokenizer=tmp_path / "bad.json")
    refused(ConfigError, "dtype must be one of", [tmp_path / "a.txt"], out, tokenizer=tokenizer, dtype="int8")
    refused(ConfigError, "errors must be one of", [tmp_path / "a.txt"], out, tokenizer=tokenizer, errors="ignore")


def test_a_missing_library_names_the_extra(tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(tmp_path, {"a.txt": "a"})
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refused(MissingExtra, r"needs the package tokenizers \(hint: pip install 'stoker\[demo\]'\)", [tmp_path / "a.txt"],
            tmp_path / "out", tokenizer=tokenizer)  # fmt: skip
