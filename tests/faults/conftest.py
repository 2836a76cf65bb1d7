"""A directory in which fsync costs nothing."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.prove import memory_directory


@pytest.fixture
def memory() -> Iterator[Path]:
    """A directory in shared memory, removed at the end."""
    with tempfile.TemporaryDirectory(prefix="stoker-prove-test-", dir=memory_directory()) as directory:
        yield Path(directory)
