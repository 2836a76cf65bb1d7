"""The load benchmark, at a size that says nothing about speed: every loader is right, and a wrong one is told."""

from pathlib import Path

import numpy as np
import pytest

from stoker.bench import peers
from stoker.bench._load_stream import SEQ_LEN, Stream
from stoker.bench.load import run_load
from stoker.errors import ConfigError, CorruptionError

SMALL = 4 << 20
LIMIT = "numpy take(out=), two widened outputs"
OURS = {
    "warm local batches": "stoker TokenLoader",
    "CPU of warm batches": "stoker TokenLoader",
    "best_fit batches": "stoker TokenLoader, best_fit",
    "batches of two sources": "stoker TokenLoader, two sources",
}
HERE = ["nanoGPT memmap", "Megatron-style map data set"]
ELSEWHERE = ["LitData", "MosaicML Streaming", "HF datasets"]


def test_every_loader_is_verified_and_set_against_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "is_installed", lambda name: False)
    report = run_load(size_bytes=SMALL, runs=1, warmup=0, directory=tmp_path)
    absent = [note for note in report.notes if "not installed" in note]
    assert [note.partition(" was not measured")[0] for note in absent] == 2 * ELSEWHERE
    assert len(absent) == len(report.notes)
    for dtype in ("uint16", "uint32"):
        for case, ours in OURS.items():
            rows = [row for row in report.rows if row.case == f"{case}, {dtype}"]
            compared = HERE if ours == "stoker TokenLoader" else []
            assert [row.variant for row in rows] == [LIMIT, ours, *compared]
            assert rows[1].ratio_to.keys() == set(compared)
            assert rows[1].goal_ratio == (0.7 if case == "warm local batches" else None)
            for row in rows:
                assert row.verified
                assert row.cache == "warm"
                assert row.unit == ("CPU-s/Gtoken" if case.startswith("CPU") else "tokens/s")
                assert row.ratio_to_limit is not None
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_token_is_found() -> None:
    stream = Stream(4 * SEQ_LEN, "uint16")
    first = np.array([5, SEQ_LEN])
    rows = np.stack([stream.tokens[a : a + SEQ_LEN + 1].astype(np.int64) for a in first.tolist()])
    stream.require(first, rows[:, :-1], rows[:, 1:], place="here")
    rows[1, -1] ^= 1
    with pytest.raises(CorruptionError, match=f"here: labels of row 1 must be the tokens from {SEQ_LEN} on"):
        stream.require(first, rows[:, :-1], rows[:, 1:], place="here")


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="size must be >= 4194304 bytes, 32 batches, got 4194303"):
        run_load(size_bytes=SMALL - 1, runs=1, directory=tmp_path)
    assert list(tmp_path.iterdir()) == []
