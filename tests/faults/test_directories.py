"""Cache directories that break, in small, at each run of the suite; `make prove` flips every bit and has the full sizes."""

from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.storage import TieredCache
from tests.faults.directories import SCENARIOS, Facts, every_bit, mounted, tried

SPARSE = range(0, 8 * 8192, 67)
FIELDS = range(8 * 48)
"""Of the header; its text, its padding, the payload and the padding behind it are met by the others."""


@pytest.mark.parametrize("bits", [FIELDS, SPARSE], ids=["fields", "sparse"])
def test_a_flipped_bit_is_told_and_healed_or_harmless(memory: Path, bits: range) -> None:
    facts = every_bit(memory, bits)
    assert facts["told and healed"] + facts["harmless, in the padding behind the payload"] == 2 * len(bits)
    assert facts["told and healed"] >= 0.5 * 2 * len(bits)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_directory_that_breaks_costs_no_byte(memory: Path, scenario: Callable[[Path], Facts]) -> None:
    scenario(memory)


def test_real_file_systems_that_are_small_full_and_read_only_cost_no_byte(memory: Path) -> None:
    outcomes = mounted(memory / "mounted", divisor=8)
    if any("not tried" in name for outcome in outcomes for name in outcome.facts):
        pytest.skip(f"{outcomes[0]}: the same scenarios ran on a simulated disk")
    assert [str(outcome) for outcome in outcomes if outcome.violation] == []
    assert len(outcomes) == 3


def test_what_a_scenario_asserts_is_its_violation(tmp_path: Path) -> None:
    def broken(directory: Path) -> Facts:
        with TieredCache(ram=0, disk=directory / "tier") as cache:
            assert cache.stats().disk_capacity_bytes == 0, "a capacity"
        return {}

    outcome = tried("broken", broken, tmp_path / "scenario")
    assert "AssertionError: a capacity" in outcome.violation
    assert str(outcome).startswith("NOT broken")
