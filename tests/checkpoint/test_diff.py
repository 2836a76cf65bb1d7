"""``stoker ckpt diff``: what it names, what it reads for that, and that layouts do not count."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.cli import app
from stoker.checkpoint.diff import DiffReport, TensorChange, ValueChange, diff
from stoker.checkpoint.manifest import CRC_BLOCK_BYTES
from stoker.errors import CorruptBlock, NoCheckpoint
from tests.checkpoint.steps import Box, rows, whole, write_step

MIB = CRC_BLOCK_BYTES


def diff_of(root: Path, first: dict[str, Any], second: dict[str, Any]) -> DiffReport:
    """Of two trees, each saved by one rank."""
    with CheckpointManager(root) as ckpt:
        ckpt.save(1, first).wait()
        ckpt.save(2, second).wait()
    return diff(root, 1, 2)


def big(mib: int) -> torch.Tensor:
    return torch.arange(mib * MIB // 4, dtype=torch.int32)


def changed(tensor: torch.Tensor, at: int) -> torch.Tensor:
    other = tensor.clone()
    other.view(-1).view(torch.uint8)[at] ^= 1
    return other


# ---------------------------------------------------------------------------------------------------------------- bytes


def test_equal_steps_are_equal_and_nothing_is_read(tmp_path: Path) -> None:
    tree = {"model": {"w": big(3), "b": torch.ones(5)}, "n": 1}
    report = diff_of(tmp_path, tree, tree)
    assert report.same and report.num_tensors == 2 and report.num_bytes_read == 0


def test_a_change_inside_a_large_tensor_is_found_without_reading(tmp_path: Path) -> None:
    first, same = big(4), big(3)
    report = diff_of(tmp_path, {"t": {"w": first, "same": same}}, {"t": {"w": changed(first, 2 * MIB), "same": same}})
    assert report.other_bytes == ("t.w",) and report.num_bytes_read == 0


def test_of_small_tensors_in_one_block_only_the_changed_one_is_named(tmp_path: Path) -> None:
    tree = {f"s{i}": torch.full((100,), i) for i in range(5)}
    report = diff_of(tmp_path, {"t": tree}, {"t": tree | {"s3": changed(tree["s3"], 799)}})
    assert report.other_bytes == ("t.s3",)
    (blob,) = tmp_path.glob("step-000000000001-*/data/*")
    assert report.num_bytes_read == 2 * blob.stat().st_size


@pytest.mark.parametrize("at", [0, 1, MIB, 2 * MIB - 4097, 2 * MIB - 1])
def test_a_change_at_any_place_is_found(tmp_path: Path, at: int) -> None:
    first = big(2)
    tree = {"w": first, "a": torch.ones(3), "z": torch.zeros(())}
    assert diff_of(tmp_path, {"t": tree}, {"t": tree | {"w": changed(first, at)}}).other_bytes == ("t.w",)


def test_tensors_that_moved_are_compared_by_reading(tmp_path: Path) -> None:
    tree = {"w": big(10), "s": torch.ones(1000)}
    moved = {"another": torch.ones(300_000), **tree}
    report = diff_of(tmp_path, {"t": tree}, {"t": moved})
    assert (report.only_a, report.only_b, report.other_bytes) == ((), ("t.another",), ())
    assert report.num_bytes_read > 20 * MIB
    other = {**moved, "w": changed(tree["w"], 9 * MIB)}
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(3, {"t": other}).wait()
    assert diff(tmp_path, 1, 3).other_bytes == ("t.w",)


def test_other_dtypes_and_shapes_and_names_are_told(tmp_path: Path) -> None:
    report = diff_of(
        tmp_path,
        {"t": {"a": torch.ones(2, 3), "b": torch.ones(4), "gone": torch.ones(1)}},
        {"t": {"a": torch.ones(3, 2), "b": torch.ones(4).double(), "new": torch.ones(1)}},
    )
    assert report.other_shape == (
        TensorChange(name="t.a", a="float32[2, 3]", b="float32[3, 2]"),
        TensorChange(name="t.b", a="float32[4]", b="float64[4]"),
    )
    assert (report.only_a, report.only_b, report.other_bytes) == (("t.gone",), ("t.new",), ())


def grid(shape: Sequence[int], cuts: Sequence[Sequence[int]]) -> list[Box]:
    """The boxes of a grid with these cuts in each dimension, dealt to two ranks."""
    spans = [list(zip((0, *inner), (*inner, extent), strict=True)) for extent, inner in zip(shape, cuts, strict=True)]
    return [
        (i % 2, tuple(start for start, _ in box), tuple(end - start for start, end in box))
        for i, box in enumerate(product(*spans))
    ]


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[list[Box]], int | None]:
    """A shape, two grids of chunks over it, and the byte that changes, if one does."""
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=3))
    grids = [
        grid(shape, [sorted(draw(st.sets(st.integers(1, extent - 1)))) if extent > 1 else [] for extent in shape])
        for _ in range(2)
    ]
    count = int(torch.Size(shape).numel())
    return shape, grids, draw(st.none() | st.integers(0, 2 * count - 1))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=layouts())
def test_any_two_layouts_of_one_tensor_are_compared_element_by_element(
    tmp_path_factory: pytest.TempPathFactory, case: tuple[list[int], list[list[Box]], int | None]
) -> None:
    shape, grids, at = case
    root = tmp_path_factory.mktemp("layouts")
    tensor = torch.arange(int(torch.Size(shape).numel()), dtype=torch.int16).view(shape)
    other = tensor if at is None else changed(tensor, at)
    # One file holds one chunk of a tensor: the second of a rank goes to its next file.
    write_step(root, {"t": (tensor, grids[0]), "same": whole(tensor)}, step=1)
    write_step(root, {"t": (other, grids[1]), "same": whole(tensor)}, step=2)
    report = diff(root, 1, 2)
    assert report.other_bytes == (() if at is None else ("t",))


def test_large_tensors_of_other_world_sizes_are_compared_some_rows_at_a_time(tmp_path: Path) -> None:
    tensor = torch.arange(5 * MIB, dtype=torch.int32).view(5, -1)  # rows of 4 MiB
    tail = (MIB,)
    write_step(tmp_path, {"t": (tensor, rows([3, 2], tail))}, step=1)
    write_step(tmp_path, {"t": (tensor, rows([1, 1, 3], tail))}, step=2)
    write_step(tmp_path, {"t": (changed(tensor, 20 * MIB - 1), rows([2, 3], tail))}, step=3)
    assert diff(tmp_path, 1, 2).same
    assert diff(tmp_path, 2, 3).other_bytes == ("t",)


def test_damage_in_what_must_be_read_is_an_error(tmp_path: Path) -> None:
    tree = {"a": torch.ones(10), "b": torch.ones(10)}
    diff_of(tmp_path, {"t": tree}, {"t": tree | {"b": torch.zeros(10)}})
    (blob,) = tmp_path.glob("step-000000000002-*/data/*")
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptBlock):
        diff(tmp_path, 1, 2)


# --------------------------------------------------------------------------------------------------------------- values


def test_values_are_named_by_their_path(tmp_path: Path) -> None:
    first = {
        "lr": 0.1,
        "same": [1, 2],
        "flag": 1,
        "list": [1, {"x": 2}],
        "old": "o",
        "size": torch.Size([1]),
        "n": None,
    }
    second = first | {"lr": 0.2, "flag": True, "list": [1, {"x": 3}, 4], "new": 5, "size": torch.Size([2])}
    del second["old"]
    report = diff_of(tmp_path, {"run": first, "only": 1}, {"run": second, "also": 2})
    assert report.values == (
        ValueChange(path="also", a=None, b="saved"),
        ValueChange(path="only", a="saved", b=None),
        ValueChange(path="run.lr", a="0.1", b="0.2"),
        ValueChange(path="run.flag", a="1", b="true"),
        ValueChange(path="run.list[1].x", a="2", b="3"),
        ValueChange(path="run.list[2]", a=None, b="4"),
        ValueChange(path="run.old", a='"o"', b=None),
        ValueChange(path="run.size", a='{"$torch.Size": [1]}', b='{"$torch.Size": [2]}'),
        ValueChange(path="run.new", a=None, b="5"),
    )


def test_where_a_tensor_stands_counts_but_one_that_only_one_step_has_is_told_once(tmp_path: Path) -> None:
    one, ones = torch.zeros(1), torch.ones(2)
    report = diff_of(
        tmp_path,
        {"t": {"x": [one, 1], "y": {"z": 5, "gone": ones}}, "pair": (1, ones), "number": {0: ones, 1: 2}},
        {"t": {"x": [one, 2], "y": {"z": ones}}, "pair": (2, ones), "number": {0: ones, 1: 3}},
    )
    assert report.only_a == ("t.y.gone",) and report.only_b == ("t.y.z",)
    assert [change.path for change in report.values] == ["number", "pair", "t.x[1]", "t.y.z"]
    assert report.values[-1] == ValueChange(path="t.y.z", a="5", b=None)


# -------------------------------------------------------------------------------------------------------------- command


def test_the_command_exits_with_1_if_anything_differs(tmp_path: Path) -> None:
    tree = {"t": {"w": torch.ones(3), "v": torch.ones(2)}, "n": 1}
    diff_of(tmp_path, tree, {"t": {"w": torch.zeros(3), "v": torch.ones(3), "u": torch.ones(1)}, "n": 2})
    result = CliRunner().invoke(app, ["diff", str(tmp_path), "1", "2"])
    assert result.exit_code == 1
    for line in ("they differ", "only in 2: t.u", "t.v: float32[2] in 1, float32[3] in 2", "other bytes: t.w",
                 "n: 1 in 1, 2 in 2"):  # fmt: skip
        assert line in result.stdout
    result = CliRunner().invoke(app, ["diff", str(tmp_path), "1", "2", "--json"])
    report = json.loads(result.stdout)
    assert result.exit_code == 1 and report["ok"] is False
    assert report["other_bytes"] == ["t.w"] and report["values"] == [{"path": "n", "a": "1", "b": "2"}]
    result = CliRunner().invoke(app, ["diff", str(tmp_path), "2", "2", "--json"])
    assert result.exit_code == 0 and json.loads(result.stdout)["ok"] is True
    assert isinstance(CliRunner().invoke(app, ["diff", str(tmp_path), "1", "7"]).exception, NoCheckpoint)
