"""Each broken process is caught by its trial: a trial that can't fail proves nothing."""

from dataclasses import replace
from pathlib import Path

import pytest

from stoker.testing.kill import run_trial
from tests.faults import caching
from tests.faults.prove import TRIALS


@pytest.mark.parametrize(
    ("name", "mutant", "seen"),
    [
        ("caching", "cache_names_before_bytes", ("is torn",)),
        ("caching", "cache_without_counting", ("bytes are in the", "bytes are counted", "leaked bytes")),
        ("caching", "cache_without_locks", ("is counted", "are counted", "bytes are in the", "ended with", "is left")),
        ("packing", "pack_in_place", ("differs from the set", "CorruptRecord", "FormatError")),
        ("saving", "save_in_place", ("CorruptRecord", "FormatError")),
        ("saving", "save_and_acknowledge_when_staged", ("was acknowledged, the newest is",)),
    ],
)
def test_a_broken_process_is_caught(name: str, mutant: str, seen: tuple[str, ...], memory: Path) -> None:
    trial = replace(TRIALS[name](memory), program=f"tests.faults.mutants:{mutant}")
    report = run_trial(trial, directory=memory, at="calls", seed=1)
    if isinstance(trial.check, caching.Check):
        trial.check.close()
    assert report.violation is not None
    assert any(words in report.violation for words in seen), report
