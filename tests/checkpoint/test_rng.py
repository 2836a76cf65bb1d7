"""Random states: restored to the bit, and new ones for ranks that the saved run did not have."""

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from stoker.checkpoint import RngState


def drawn() -> tuple[float, ...]:
    """A number from each generator, and a second normal one, of which Python and NumPy keep the next."""
    return (
        random.random(),
        random.gauss(0, 1),
        float(np.random.random()),
        float(np.random.standard_normal()),
        float(torch.rand(())),
        float(torch.randn(())),
    )


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    rng, state = RngState(), RngState().state_dict()
    yield
    rng.load_state_dict(state)


def test_every_generator_goes_on_as_it_would_have() -> None:
    drawn()
    rng = RngState()
    state = rng.state_dict()
    expected = [drawn() for _ in range(3)]
    rng.load_state_dict(state)
    assert [drawn() for _ in range(3)] == expected


def test_the_state_is_not_changed_by_what_is_drawn_later() -> None:
    rng = RngState()
    state = rng.state_dict()
    before = state["torch"].copy()
    torch.rand(1000)
    assert np.array_equal(state["torch"], before)


def test_a_rank_that_was_not_there_gets_a_state_of_seed_rank_and_step() -> None:
    rng = RngState()
    torch.manual_seed(5)
    state: dict[str, Any] = rng.state_dict()

    def of(rank: int, step: int) -> tuple[float, ...]:
        rng.load_for_new_rank(state, rank, step)
        return drawn()

    first = of(4, 100)
    torch.rand(7)
    assert of(4, 100) == first  # whatever was drawn before
    others = [of(5, 100), of(4, 101), of(41, 0)]
    assert len({*others, first}) == 4
    assert all(len(set(column)) == 4 for column in zip(first, *others, strict=True))  # in every generator
