"""Both tiers keep the contract, on a disk and in shared memory; and the contract sees a tier that does not."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import pytest

from stoker.storage import TieredCache
from stoker.testing.tiers import TierOrigin, TierTests


class TestDiskTier(TierTests):
    kind = "disk"

    @pytest.fixture
    def directory(self, tmp_path: Path) -> Path:
        return tmp_path / "tier"


class TestRamTier(TierTests):
    kind = "ram"

    @pytest.fixture
    def directory(self) -> Iterator[Path]:
        directory = tempfile.mkdtemp(prefix="contract-", dir=os.environ["STOKER_SHM_DIR"])
        yield Path(directory) / "tier"
        shutil.rmtree(directory)


class Forgetful(TestDiskTier):
    """A tier that nobody else sees: each cache has a directory of its own."""

    __test__ = False

    def open_cache(
        self, directory: Path, *, capacity_bytes: int, eviction: Literal["keep", "sieve"] = "keep"
    ) -> TieredCache:
        own = Path(tempfile.mkdtemp(dir=directory.parent))
        return super().open_cache(own, capacity_bytes=capacity_bytes, eviction=eviction)


class Careless(TestDiskTier):
    """A tier that takes twice what it was given."""

    __test__ = False

    def open_cache(
        self, directory: Path, *, capacity_bytes: int, eviction: Literal["keep", "sieve"] = "keep"
    ) -> TieredCache:
        return super().open_cache(directory, capacity_bytes=2 * capacity_bytes, eviction=eviction)


def test_the_contract_sees_a_tier_that_nobody_shares(tmp_path: Path) -> None:
    origin = TierOrigin(tmp_path / "origin", 12)
    with pytest.raises(AssertionError):
        Forgetful().test_blocks_are_there_for_other_caches_and_later_ones(tmp_path / "tier", origin)


def test_the_contract_sees_a_tier_that_exceeds_its_capacity(tmp_path: Path) -> None:
    origin = TierOrigin(tmp_path / "origin", 12)
    for test in (
        Careless().test_a_full_tier_keeps_what_it_has,
        Careless().test_a_full_tier_that_evicts_makes_room_for_each,
    ):
        with pytest.raises(AssertionError):
            test(tmp_path / test.__name__, origin)
