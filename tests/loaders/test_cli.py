"""``stoker data``: exit codes, one JSON object on standard output, one sentence for each failure."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from stoker.cli import main
from stoker.loaders import TokenDataset
from stoker.loaders.format import shard_key
from stoker.testing.s3 import S3Server
from tests.data.make_token_data_set import GOLDEN
from tests.loaders.test_pack import byte_tokenizer, write_files
from tests.loaders.token_sets import files_in, flip_bit, random_documents, write_set


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def stoker(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process."""

    def run(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Result(int(exited.value.code or 0), out, err)

    return run


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    byte_tokenizer("<|endoftext|>").save(str(tmp_path / "t.json"))
    write_files(tmp_path / "src", {"a.txt": "hello", "b.txt": "world!", "c.txt": ""})
    return tmp_path


def test_pack_inspect_and_verify_follow_each_other(stoker: Any, corpus: Path) -> None:
    packed = stoker("data", "pack", corpus / "src", "--out", corpus / "set", "--tokenizer", corpus / "t.json", "--json")
    assert packed.code == 0, packed
    assert packed.json["ok"] is True
    assert {name: packed.json[name] for name in ("documents", "empty_documents", "tokens", "source_bytes")} == {
        "documents": 2,
        "empty_documents": 1,
        "tokens": 13,
        "source_bytes": 11,
    }
    inspected = stoker("data", "inspect", corpus / "set", "--json")
    assert inspected.code == 0
    assert inspected.json == {
        "ok": True,
        "url": str(corpus / "set"),
        "version": 1,
        "documents": 2,
        "tokens": 13,
        "dtype": "uint16",
        "eos_id": 256,
        "tokenizer": inspected.json["tokenizer"],
        "shards": 1,
        "blocks": 1,
        "block_tokens": 2**21,
        "stored_bytes": packed.json["stored_bytes"],
        "fingerprint": packed.json["fingerprint"],
    }
    assert inspected.json["tokenizer"].startswith("sha256:")
    verified = stoker("data", "verify", corpus / "set", "--json")
    assert verified.code == 0
    assert (verified.json["ok"], verified.json["damage"]) == (True, [])


def test_the_same_is_told_to_people(stoker: Any, corpus: Path) -> None:
    packed = stoker("data", "pack", corpus / "src", "--out", corpus / "set", "--tokenizer", corpus / "t.json")
    assert packed.code == 0
    assert "2 documents, 1 empty and 0 unreadable ones left out" in packed.out
    assert "13 tokens as uint16 from 11 B of sources" in packed.out
    assert packed.err == ""
    inspected = stoker("data", "inspect", GOLDEN / "uint32")
    assert "dtype         uint32\n" in inspected.out
    assert "eos id        -\n" in inspected.out
    verified = stoker("data", "verify", GOLDEN / "uint16")
    assert verified.out.endswith("5 shards, 19 blocks, 11.6 KiB checked: ok\n")


def test_verify_lists_damage_and_exits_1(stoker: Any, tmp_path: Path) -> None:
    write_set(tmp_path, random_documents(20))
    with TokenDataset(tmp_path, seq_len=8) as dataset:
        ranges = [dataset._tables.byte_range(0, 1), dataset._tables.byte_range(1, 6)]
    for shard, (start, _) in enumerate(ranges):
        flip_bit(tmp_path / shard_key(shard), start)
    told = stoker("data", "verify", tmp_path)
    assert told.code == 1
    assert f"data/00000000.arrow: block 1, bytes [{ranges[0][0]}, {ranges[0][1]}): bytes must have CRC32C" in told.out
    assert told.out.endswith("checked: 2 wrong\n")
    listed = stoker("data", "verify", tmp_path, "--json")
    assert (listed.code, listed.json["ok"]) == (1, False)
    assert [(damage["shard"], damage["block"]) for damage in listed.json["damage"]] == [(0, 1), (1, 6)]


def test_an_error_is_one_sentence_and_one_json_object(stoker: Any, corpus: Path) -> None:
    arguments = ("data", "pack", corpus / "src", "--out", corpus / "set", "--tokenizer", corpus / "t.json")
    assert stoker(*arguments).code == 0
    again = stoker(*arguments, "--json")
    assert again.code == 1
    assert again.err.startswith("error: ") and again.err.count("\n") == 1
    assert again.json["error"] == "AlreadyExists"
    assert f"error: {again.json['message']}\n" == again.err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pack", "{root}/gone", "--out", "{root}/out", "--tokenizer", "{root}/t.json"], 1, "no such file or directory"),
        (["pack", "{root}/empty", "--out", "{root}/out", "--tokenizer", "{root}/t.json"], 1, "needs files that match"),
        (["pack", "{root}/bad.jsonl", "--out", "{root}/out", "--tokenizer", "{root}/t.json"], 1, "bad.jsonl:2: each"),
        (["pack", "{root}/bad.jsonl", "--out", "{root}/out", "--tokenizer", "{root}/no.json"], 1, "no such tokenizer"),
        (["pack", "{root}/src", "--out", "{root}/out", "--tokenizer", "{root}/t.json", "--dtype", "int"], 2, "dtype must"),
        (["pack", "{root}/src", "--out", "{root}/o", "--tokenizer", "{root}/t.json", "-o", "key=k"], 2, "no storage opt"),
        (["pack", "{root}/src", "--out", "{root}/o", "--tokenizer", "{root}/t.json", "-o", "key"], 2, "NAME=VALUE"),
        (["pack", "{root}/src", "--out", "{root}/out"], 2, "Missing option '--tokenizer'"),
        (["inspect", "{root}/gone"], 1, "no such directory"),
        (["inspect", "{root}/src"], 1, "a token data set has a manifest.json"),
        (["verify", "{root}/gone"], 1, "no such directory"),
    ],
    ids=str,
)  # fmt: skip
def test_what_goes_wrong_ends_with_its_exit_code(
    stoker: Any, corpus: Path, arguments: list[str], code: int, message: str
) -> None:
    (corpus / "empty").mkdir()
    write_files(corpus, {"bad.jsonl": '{"text": "fine"}\n{"text"\n'})
    result = stoker("data", *(argument.format(root=corpus) for argument in arguments))
    assert result.code == code
    assert message in result.err


def test_a_truncated_shard_and_a_newer_version_are_told(stoker: Any, tmp_path: Path) -> None:
    write_set(tmp_path, random_documents(20))
    shard = tmp_path / shard_key(1)
    shard.write_bytes(shard.read_bytes()[:-600])
    result = stoker("data", "verify", tmp_path)
    assert result.code == 1
    assert "data/00000001.arrow: the data file must have" in result.out
    assert "data/00000001.arrow: block 7, bytes" in result.out
    manifest = tmp_path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"version": 1', '"version": 9'))
    for command in ("inspect", "verify"):
        result = stoker("data", command, tmp_path)
        assert (result.code, result.out) == (1, "")
        assert "reads stoker-token-data-set version 1, got 9 (hint: upgrade stoker)" in result.err


def test_s3_is_reached_by_options(stoker: Any, corpus: Path, s3_server: S3Server) -> None:
    url = s3_server.url("stoker", f"cli/{corpus.name}")
    options = [f"-o{name}={value}" for name, value in s3_server.storage_options.items()]
    packed = stoker("data", "pack", corpus / "src", "--out", url, "--tokenizer", corpus / "t.json", *options)
    assert packed.code == 0, packed
    assert stoker("data", "verify", url, "--json", *options).json["ok"] is True
    missing = stoker("data", "inspect", s3_server.url("no-such-bucket", "x"), *options)
    assert missing.code == 1
    assert missing.err.startswith("error: ") and "no-such-bucket" in missing.err
    assert str(s3_server.storage_options["secret"]) not in missing.err


@pytest.mark.parametrize("command", ["pack", "inspect", "verify", "explain", "replay"])
def test_help_shows_examples(stoker: Any, command: str) -> None:
    result = stoker("data", command, "--help")
    assert result.code == 0
    assert f"stoker data {command} " in result.out
    assert "--json" in result.out


def test_a_killed_pack_is_resumed_by_the_command_line(stoker: Any, corpus: Path) -> None:
    lines = [json.dumps({"text": f"document {i} " * 20}) for i in range(3000)]
    write_files(corpus, {"a.jsonl": "\n".join(lines)})
    arguments = ["--tokenizer", str(corpus / "t.json"), "--shard-bytes", "64KiB", "--block-tokens", "1024"]
    peace = stoker("data", "pack", corpus / "a.jsonl", "--out", corpus / "peace", *arguments)
    assert peace.code == 0, peace
    program = (
        "import os, signal, sys; from stoker.loaders import pack;"
        "batches = pack._batches;"
        "pack._batches = lambda *a: (os.kill(os.getpid(), signal.SIGKILL) if n == 2 else b"
        " for n, b in enumerate(batches(*a)));"
        "from stoker.cli import main; main(sys.argv[1:])"
    )
    killed = ["data", "pack", str(corpus / "a.jsonl"), "--out", str(corpus / "out"), *arguments]
    assert subprocess.run([sys.executable, "-c", program, *killed], check=False).returncode == -9
    assert "manifest.json" not in files_in(corpus / "out")
    resumed = stoker(*killed, "--resume", "--json")
    assert resumed.code == 0, resumed
    assert 0 < resumed.json["resumed_documents"] < resumed.json["documents"] == 3000
    assert files_in(corpus / "out") == files_in(corpus / "peace")
