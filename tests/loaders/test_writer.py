"""TokenWriter: what is stored, what is refused, and that a stopped writer can be continued to the same bytes."""

import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import stoker.loaders.writer as writer_module
from stoker.errors import AlreadyExists, ConfigError, CorruptRecord, DatasetError, EmptyInput, KeyNotFound
from stoker.loaders import TokenDataset, TokenWriter
from tests.loaders.token_sets import Document, files_in, flip_bit, random_documents, stream_of, write_set


def stored(root: Path | str) -> list[int]:
    """All tokens of a set but the last."""
    with TokenDataset(root, seq_len=1) as dataset:
        return [token for sample in dataset.__getitems__(range(len(dataset))) for token in sample["input_ids"].tolist()]


class Stop(Exception):
    """Ends a writer in the middle."""


def write_and_stop(root: Path | str, documents: list[Document], after: int, **options: Any) -> int:
    """Write up to `after` of the documents and leave by an exception; returns how many are durable."""
    with pytest.raises(Stop), TokenWriter(root, **options) as writer:
        for document in documents[writer.resumed_documents : after]:
            writer.write(document)
        raise Stop
    return len(list(Path(root).glob("progress/0*.json")))


SMALL: dict[str, Any] = {"dtype": "uint16", "eos_id": 0, "block_tokens": 64, "shard_bytes": 2 * 256}


# --- what is stored ---------------------------------------------------------------------------------------------------


def test_eos_ends_each_document_that_does_not_end_with_it(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, eos_id=0) as writer:
        for document in ([1, 2], [3, 0], [0], [], [4, 0, 5], [6]):
            writer.write(document)
        assert (writer.documents, writer.tokens) == (6, 13)
    assert stored(tmp_path) == [1, 2, 0, 3, 0, 0, 0, 4, 0, 5, 0, 6]
    with TokenDataset(tmp_path, seq_len=12) as dataset:
        assert dataset.manifest.documents == 6
        assert [span.end - span.start for span in dataset.explain(0)] == [3, 2, 1, 1, 4, 2]


def test_without_eos_documents_are_stored_as_given(tmp_path: Path) -> None:
    with TokenWriter(tmp_path) as writer:
        writer.write([1, 2])
        writer.write([0])
        writer.write([3, 9])
    assert stored(tmp_path) == [1, 2, 0, 3]


@pytest.mark.parametrize("kind", ["uint8", "int16", "int32", "int64", "uint64", "uint16", "uint32", "list", "tensor"])
def test_tokens_of_any_integer_type_are_taken(tmp_path: Path, kind: str) -> None:
    tokens: Any = [3, 100, 0, 7]
    if kind == "tensor":
        tokens = torch.tensor(tokens)
    elif kind != "list":
        tokens = np.array(tokens, kind)
    with TokenWriter(tmp_path, dtype="uint32") as writer:
        writer.write(tokens)
    assert stored(tmp_path) == [3, 100, 0]


def test_the_caller_may_reuse_its_array(tmp_path: Path) -> None:
    tokens = np.arange(1, 5, dtype=np.uint16)
    with TokenWriter(tmp_path) as writer:
        writer.write(tokens)
        tokens[:] = 9
        writer.write(tokens)
    assert stored(tmp_path) == [1, 2, 3, 4, 9, 9, 9]


def test_every_shard_but_the_last_holds_whole_blocks(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, shard_bytes=2 * 1000, block_tokens=256) as writer:
        for document in random_documents(60):
            writer.write(document)
    with TokenDataset(tmp_path, seq_len=8) as dataset:
        tokens = np.diff([*dataset._tables.shards.tokens_before, dataset.manifest.tokens])
    assert len(tokens) > 2
    assert (tokens[:-1] == 768).all()
    assert 0 < tokens[-1] <= 768


def test_no_empty_shard_follows_one_that_the_documents_fill(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, shard_bytes=2 * 64, block_tokens=32) as writer:
        writer.write(range(1, 65))
        writer.write(range(1, 65))
    assert [path.name for path in sorted(tmp_path.glob("data/*"))] == ["00000000.arrow", "00000001.arrow"]


def test_small_shards_get_blocks_that_fit(tmp_path: Path) -> None:
    with TokenWriter(tmp_path, shard_bytes=1000) as writer:
        writer.write(range(600))
    with TokenDataset(tmp_path, seq_len=8) as dataset:
        assert (dataset.manifest.block_tokens, dataset.manifest.shards) == (256, 3)


@pytest.mark.parametrize(("dtype", "block_tokens"), [("uint16", 2**21), ("uint32", 2**20)])
def test_a_tiny_set_is_one_short_block_of_the_default_size(tmp_path: Path, dtype: str, block_tokens: int) -> None:
    with TokenWriter(tmp_path, dtype=dtype) as writer:
        writer.write([1, 2, 3])
    with TokenDataset(tmp_path, seq_len=2) as dataset:
        assert (dataset.manifest.block_tokens, dataset.manifest.blocks, len(dataset)) == (block_tokens, 1, 1)
    assert sum(map(len, files_in(tmp_path).values())) < 10_000


def test_nothing_but_the_data_set_is_left(tmp_path: Path) -> None:
    write_set(tmp_path, random_documents(30))
    names = set(files_in(tmp_path))
    assert names == {"manifest.json", "shards.arrow", "blocks.arrow", "lengths.arrow"} | {
        name for name in names if re.fullmatch(r"data/\d{8}\.arrow", name)
    }


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "token", "hint"), [("uint16", 65_536, "uint32"), ("uint32", 2**32, ""), ("uint16", -1, "")]
)
def test_a_token_that_the_dtype_cannot_hold_is_refused(tmp_path: Path, dtype: str, token: int, hint: str) -> None:
    with TokenWriter(tmp_path, dtype=dtype) as writer:
        writer.write([1, 2])
        with pytest.raises(DatasetError, match=rf"^document 1: {dtype} tokens are in \[0, .*got {token}") as caught:
            writer.write([7, 8, token, 9])
        assert hint in caught.value.hint
        writer.write([3])
    assert stored(tmp_path) == [1, 2]


@pytest.mark.parametrize("tokens", [[1.5], np.ones((2, 2), np.int64), [True], ["a"], 7], ids=str)
def test_what_is_no_list_of_integers_is_refused(tmp_path: Path, tokens: Any) -> None:
    with TokenWriter(tmp_path) as writer:
        writer.write([1])
        with pytest.raises(DatasetError, match="document 1: a document is a 1-D array of integers"):
            writer.write(tokens)


def test_a_document_without_tokens_is_refused_where_no_eos_stands_for_it(tmp_path: Path) -> None:
    with TokenWriter(tmp_path) as writer:
        writer.write([1])
        with pytest.raises(EmptyInput, match="document 1: a document has at least one token"):
            writer.write([])


def test_a_set_without_documents_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(EmptyInput, match="needs at least one document"), TokenWriter(tmp_path):
        pass
    assert files_in(tmp_path) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int64"}, "dtype is 'uint16' or 'uint32', got 'int64'"),
        ({"eos_id": 65_536}, "eos_id of uint16 tokens"),
        ({"eos_id": -1}, "eos_id of uint16 tokens"),
        ({"block_tokens": 100}, "block_tokens must be a power of two, got 100"),
        ({"block_tokens": 0}, "block_tokens must be a power of two, got 0"),
        ({"block_tokens": 2**26}, "a block has at most"),
        ({"block_tokens": 64, "shard_bytes": 100}, "shard_bytes must hold a block, 128 bytes, got 100"),
        ({"shard_bytes": 1}, "at least one token"),
        ({"shard_bytes": "much"}, "a size is a number with a unit"),
        ({"tokenizer": "x" * 257}, "at most 256 characters"),
        ({"storage_options": {"key": "k"}}, "takes no storage options"),
    ],
    ids=str,
)
def test_wrong_options_are_refused_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        TokenWriter(tmp_path / "set", **options)
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("resume", [False, True])
def test_a_data_set_is_never_written_over(tmp_path: Path, resume: bool) -> None:
    write_set(tmp_path, random_documents(5))
    before = files_in(tmp_path)
    with pytest.raises(AlreadyExists, match="manifest.json: a data set is written once.*choose another URL"):
        TokenWriter(tmp_path, resume=resume)
    assert files_in(tmp_path) == before


def test_of_two_writers_at_one_url_the_second_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path) as writer:
        writer.write([1, 2])
        with pytest.raises(AlreadyExists, match="another writer is at work here or was stopped.*--resume"):
            TokenWriter(tmp_path)
    assert stored(tmp_path) == [1]


def test_a_closed_writer_is_refused(tmp_path: Path) -> None:
    with TokenWriter(tmp_path) as writer:
        writer.write([1, 2])
    writer.close()
    with pytest.raises(ConfigError, match="the writer is closed"):
        writer.write([3])


# --- stopped and continued --------------------------------------------------------------------------------------------


def test_leaving_by_an_exception_publishes_no_manifest(tmp_path: Path) -> None:
    assert write_and_stop(tmp_path, random_documents(30), 30, **SMALL) > 2
    with pytest.raises(KeyNotFound, match="manifest.json.*its writer has not finished.*--resume"):
        TokenDataset(tmp_path, seq_len=4)


def test_leaving_before_the_first_shard_leaves_nothing(tmp_path: Path) -> None:
    assert write_and_stop(tmp_path, random_documents(3), 3) == 0
    assert files_in(tmp_path) == {}


@given(
    lengths=st.lists(st.integers(1, 700), min_size=1, max_size=25),
    stops=st.lists(st.integers(0, 25), max_size=4),
    eos_id=st.sampled_from([None, 0]),
)
@settings(max_examples=25, deadline=None)
def test_a_writer_stopped_any_number_of_times_writes_the_same_bytes(
    lengths: list[int], stops: list[int], eos_id: int | None
) -> None:
    documents = [np.arange(n) % 65_535 + 1 for n in lengths]
    options = {**SMALL, "eos_id": eos_id}
    with tempfile.TemporaryDirectory() as directory:
        peace, stopped = Path(directory, "peace"), Path(directory, "stopped")
        for stop in stops:
            write_and_stop(stopped, documents, stop, resume=True, **options)
        for root in (peace, stopped):
            with TokenWriter(root, resume=True, **options) as writer:
                for document in documents[writer.resumed_documents :]:
                    writer.write(document)
                assert writer.documents == len(documents)
                assert writer.tokens == len(stream_of(documents, eos_id))
        assert files_in(stopped) == files_in(peace)


def test_a_writer_stopped_before_the_manifest_may_go_on_with_more_documents(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = random_documents(20)

    def stop(*arguments: object) -> None:
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "write_tables", stop)
        with pytest.raises(Stop):
            write_set(tmp_path / "stopped", documents[:15])
    for name in ("stopped", "peace"):
        write_set(tmp_path / name, documents, resume=True)
    assert files_in(tmp_path / "stopped") == files_in(tmp_path / "peace")


def test_a_resumed_writer_tells_which_documents_are_durable(tmp_path: Path) -> None:
    documents = [np.full(100, n + 1) for n in range(10)]
    write_and_stop(tmp_path, documents, 6, **SMALL)  # 606 tokens: two shards of 256, 94 that are lost
    with TokenWriter(tmp_path, resume=True, **SMALL) as writer:
        assert writer.resumed_documents == 5
        assert (writer.documents, writer.tokens) == (5, 505)
        for document in documents[5:]:
            writer.write(document)
    assert stored(tmp_path) == stream_of(documents, 0)[:-1].tolist()


def test_resuming_needs_the_same_options(tmp_path: Path) -> None:
    write_and_stop(tmp_path, random_documents(30), 30, **SMALL)
    for options, name in (
        (
            {"dtype": "uint32", "shard_bytes": 4 * 256},
            "dtype must be the 'uint16' that writing began with, got 'uint32'",
        ),
        ({"eos_id": 1}, "eos_id must be the 0"),
        ({"block_tokens": 32}, "block_tokens must be the 64"),
        ({"shard_bytes": 2 * 512}, "shard_tokens must be the 256"),
        ({"tokenizer": "other"}, "tokenizer must be the None"),
    ):
        with pytest.raises(ConfigError, match=name):
            TokenWriter(tmp_path, resume=True, **{**SMALL, **options})


def test_resuming_with_another_document_than_the_one_cut_in_two_is_refused(tmp_path: Path) -> None:
    documents = [np.full(100, 1), np.full(300, 2)]
    write_and_stop(tmp_path, documents, 2, **SMALL)
    with (
        pytest.raises(DatasetError, match="must be the one that the stopped writer was at, got .*document 1"),
        TokenWriter(tmp_path, resume=True, **SMALL) as writer,
    ):
        writer.write(np.full(300, 3))
    with (
        pytest.raises(DatasetError, match="must be written again, got 'no document after 1'"),
        TokenWriter(tmp_path, resume=True, **SMALL),
    ):
        pass
    with TokenWriter(tmp_path, resume=True, **SMALL) as writer:
        writer.write(documents[1])
    assert stored(tmp_path) == stream_of(documents, 0)[:-1].tolist()


def test_a_damaged_progress_record_is_refused(tmp_path: Path) -> None:
    write_and_stop(tmp_path, random_documents(30), 30, **SMALL)
    flip_bit(tmp_path / "progress" / "00000001.json", 40)
    with pytest.raises(CorruptRecord, match="00000001.json"):
        TokenWriter(tmp_path, resume=True, **SMALL)
    (tmp_path / "progress" / "00000001.json").unlink()
    with pytest.raises(CorruptRecord, match="progress records must follow each other"):
        TokenWriter(tmp_path, resume=True, **SMALL)


def test_what_a_killed_writer_left_beyond_the_end_is_removed(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "00000007.arrow").write_bytes(b"of a writer that got further")
    write_set(tmp_path, random_documents(5))
    assert [path.name for path in tmp_path.glob("data/*")] == ["00000000.arrow"]


def test_notes_left_by_a_kill_after_the_manifest_go_at_the_next_resume(tmp_path: Path) -> None:
    write_set(tmp_path, random_documents(5))
    (tmp_path / "progress").mkdir()
    (tmp_path / "progress" / "00000000.json").write_bytes(b"{}")
    with pytest.raises(AlreadyExists):
        TokenWriter(tmp_path, resume=True)
    assert not list(tmp_path.glob("progress/*"))


# --- a full disk, a kill ----------------------------------------------------------------------------------------------

_PROGRAM = """
import resource, signal, sys
from stoker.errors import StoreFull
from stoker.loaders import TokenWriter
from tests.loaders.token_sets import random_documents

root, what = sys.argv[1], sys.argv[2]
assert "torch" not in sys.modules
documents = random_documents(40, mean=150)
try:
    with TokenWriter(root, dtype="uint16", block_tokens=64, shard_bytes=2 * 1024, resume=True) as writer:
        for number, document in enumerate(documents[writer.resumed_documents:]):
            if what == "kill" and number == 20:
                print("writing", flush=True)
                signal.pause()
            if what == "full" and number == 20:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))
            writer.write(document)
except StoreFull as error:
    print(error)
    sys.exit(3)
"""


def program(root: Path, what: str) -> list[str]:
    return [sys.executable, "-c", _PROGRAM, str(root), what]


@pytest.fixture
def in_peace(tmp_path: Path) -> dict[str, bytes]:
    write_set(tmp_path / "peace", random_documents(40, mean=150), blocks_per_shard=16)
    return files_in(tmp_path / "peace")


_ENV = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


def test_a_full_disk_is_one_error_and_what_was_finished_is_resumed(tmp_path: Path, in_peace: dict[str, bytes]) -> None:
    root = tmp_path / "full"
    run = subprocess.run(program(root, "full"), env=_ENV, check=False, capture_output=True, text=True)
    assert run.returncode == 3, run.stderr
    assert "needs more space than is left" in run.stdout and "free space and run again" in run.stdout
    left = files_in(root)
    assert "manifest.json" not in left
    assert any(name.startswith("progress/0") for name in left)
    assert all(in_peace[name] == data for name, data in left.items() if name.startswith("data/"))
    subprocess.run(program(root, "finish"), env=_ENV, check=True)
    assert files_in(root) == in_peace


def test_a_killed_writer_is_resumed_to_the_same_bytes(tmp_path: Path, in_peace: dict[str, bytes]) -> None:
    root = tmp_path / "killed"
    with subprocess.Popen(program(root, "kill"), env=_ENV, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "writing\n"
        process.send_signal(signal.SIGKILL)
    assert "manifest.json" not in files_in(root)
    with pytest.raises(KeyNotFound):
        TokenDataset(root, seq_len=4)
    subprocess.run(program(root, "finish"), env=_ENV, check=True)
    assert files_in(root) == in_peace
