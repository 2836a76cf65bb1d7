"""Who writes what: every held chunk has exactly one writer, and the work is shared."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint.plan import Plan, make_plan, plan_signature

shapes = st.lists(st.lists(st.integers(0, 9), max_size=3).map(tuple), min_size=1, max_size=8)


def plans(tensors: dict[str, torch.Tensor], world_size: int) -> list[Plan]:
    return [make_plan(tensors, rank=rank, world_size=world_size) for rank in range(world_size)]


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, world_size=st.integers(1, 5))
def test_every_chunk_of_a_replicated_tree_is_written_by_exactly_one_rank(
    shapes: list[tuple[int, ...]], world_size: int
) -> None:
    tensors = {f"t{i}": torch.zeros(shape) for i, shape in enumerate(shapes)}
    everyone = plans(tensors, world_size)
    held = [piece.chunk for piece in everyone[0].held]
    assert all([piece.chunk for piece in plan.held] == held for plan in everyone)
    written = [piece.chunk for plan in everyone for piece in plan.mine]
    assert sorted(map(repr, written)) == sorted(map(repr, held))
    assert sum(chunk.nbytes for chunk in held) == sum(tensor.nbytes for tensor in tensors.values())


def test_one_large_replicated_tensor_is_cut_so_that_every_rank_writes_an_equal_part() -> None:
    everyone = plans({"big": torch.zeros(1000, 10), "small": torch.zeros(3)}, 4)
    sizes = [sum(piece.chunk.nbytes for piece in plan.mine) for plan in everyone]
    assert max(sizes) - min(sizes) <= 12
    big = [piece for plan in everyone for piece in plan.mine if piece.chunk.name == "big"]
    assert sorted((piece.at, piece.chunk.shape) for piece in big) == [
        ((at, 0), (250, 10)) for at in range(0, 1000, 250)
    ]


def test_a_piece_names_the_memory_of_its_rows() -> None:
    tensor = torch.arange(12.0).view(6, 2)
    (plan,) = [make_plan({"t": tensor}, rank=1, world_size=2)]
    (piece,) = plan.mine
    assert torch.equal(piece.memory(tensor), tensor[3:6])
    assert piece.chunk.offsets == (3, 0)


def test_the_signature_changes_with_shape_dtype_name_and_rank_and_not_with_content() -> None:
    base = plan_signature({"a": torch.zeros(4)}, rank=0, world_size=2)
    assert base == plan_signature({"a": torch.ones(4)}, rank=0, world_size=2)
    others = [
        plan_signature({"a": torch.zeros(5)}, rank=0, world_size=2),
        plan_signature({"a": torch.zeros(4, dtype=torch.float64)}, rank=0, world_size=2),
        plan_signature({"b": torch.zeros(4)}, rank=0, world_size=2),
        plan_signature({"a": torch.zeros(4)}, rank=1, world_size=2),
    ]
    assert base not in others
