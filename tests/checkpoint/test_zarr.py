"""A step as a Zarr hierarchy: right values or an error, never zeros; what does not fit is listed."""

import asyncio
import shutil
import tempfile
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, SuffixByteRequest
from zarr.core.buffer import default_buffer_prototype

from stoker.checkpoint import open_zarr, save
from stoker.checkpoint.blob import DTYPES
from stoker.checkpoint.zarr import references, write_references
from stoker.errors import ConfigError, CorruptBlock, KeyNotFound, NoCheckpoint, UnsupportedError
from tests.checkpoint.steps import Box, rows, whole, write_step


def group_of(root: Path) -> zarr.Group:
    return zarr.open_group(open_zarr(root), mode="r")


def array_of(root: Path, path: str) -> "zarr.Array[Any]":
    found = group_of(root)[path]
    assert isinstance(found, zarr.Array)
    return found


def left_out(root: Path) -> dict[str, str]:
    noted: Any = group_of(root).attrs["stoker"]
    found: dict[str, str] = noted["left_out"]
    return found


def sample(dtype: str, *shape: int) -> torch.Tensor:
    """A tensor whose bytes are all different, of a dtype that may know no arithmetic."""
    kind = getattr(torch, dtype)
    count = int(np.prod(shape)) * DTYPES[dtype].itemsize
    raw = torch.arange(count, dtype=torch.int64) % (2 if dtype == "bool" else 251)
    return raw.to(torch.uint8).view(kind).view(shape)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


# --------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_every_dtype_is_read_with_its_own_bytes_and_named(tmp_path: Path, dtype: str) -> None:
    tensor = sample(dtype, 4, 6)
    write_step(tmp_path, {"w": whole(tensor)})
    array = array_of(tmp_path, "w")
    assert array.shape == (4, 6)
    assert np.asarray(array[:]).tobytes() == raw_bytes(tensor)
    assert array.attrs["torch_dtype"] == dtype


def test_types_that_zarr_has_no_name_for_are_unsigned_integers(tmp_path: Path) -> None:
    names = {"bfloat16": "uint16", "float8_e4m3fn": "uint8", "float8_e5m2": "uint8", "float32": "float32"}
    write_step(tmp_path, {name: whole(sample(name, 4)) for name in names})
    assert {name: str(array_of(tmp_path, name).dtype) for name in names} == names


def test_scalars_and_empty_tensors_keep_their_shapes(tmp_path: Path) -> None:
    write_step(
        tmp_path,
        {"scalar": whole(torch.tensor(2.5)), "empty": whole(torch.empty(0, 3)), "hole": whole(torch.empty(2, 0, 3))},
    )
    assert array_of(tmp_path, "scalar")[()] == 2.5
    assert np.asarray(array_of(tmp_path, "empty")[:]).shape == (0, 3)
    assert np.asarray(array_of(tmp_path, "hole")[:]).shape == (2, 0, 3)


def test_names_become_groups(tmp_path: Path) -> None:
    save(tmp_path, {"model": {"layers": [{"w": torch.ones(2)}, {"w": torch.zeros(3)}]}, "epoch": 1})
    assert sorted(path for path, _ in group_of(tmp_path).members(max_depth=None)) == [
        "model",
        "model/layers",
        "model/layers/0",
        "model/layers/0/w",
        "model/layers/1",
        "model/layers/1/w",
    ]


def test_the_short_last_shard_of_uneven_sharding_is_read(tmp_path: Path) -> None:
    # 9 rows on 8 ranks, as torch.chunk cuts them; ranks 5 to 7 have none.
    tensor = torch.arange(27.0).view(9, 3)
    write_step(tmp_path, {"w": (tensor, rows([2, 2, 2, 2, 1], (3,)))})
    array = array_of(tmp_path, "w")
    assert array.chunks == (2, 3)
    assert np.array_equal(array[:], tensor.numpy())
    assert np.array_equal(array[7:9, 1:], tensor[7:9, 1:].numpy())


def test_a_grid_that_is_short_at_two_edges_is_read(tmp_path: Path) -> None:
    tensor = torch.arange(35).view(5, 7)
    boxes = [(0, (r, c), (min(3, 5 - r), min(4, 7 - c))) for r in (0, 3) for c in (0, 4)]
    write_step(tmp_path, {"w": (tensor, [(i, *box[1:]) for i, box in enumerate(boxes)])})
    assert array_of(tmp_path, "w").chunks == (3, 4)
    assert np.array_equal(array_of(tmp_path, "w")[:], tensor.numpy())


def test_shards_that_replicas_have_cut_again_are_read_on_a_finer_grid(tmp_path: Path) -> None:
    tensor = torch.arange(40.0).view(20, 2)  # two shards of ten rows, each cut by three replicas into 4, 4 and 2
    write_step(tmp_path, {"w": (tensor, rows([4, 4, 2, 4, 4, 2], (2,)))})
    assert array_of(tmp_path, "w").chunks == (2, 2)
    assert np.array_equal(array_of(tmp_path, "w")[:], tensor.numpy())
    assert left_out(tmp_path) == {}


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]]]:
    """A shape, and the cuts in each of its dimensions."""
    shape = draw(st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple))
    cuts = [draw(st.lists(st.integers(0, size), max_size=3)) for size in shape]
    return shape, [sorted({0, size, *inner}) for size, inner in zip(shape, cuts, strict=True)]


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_any_product_of_cuts_is_read_right_or_listed_as_left_out(
    layout: tuple[tuple[int, ...], list[list[int]]],
) -> None:
    shape, cuts = layout
    tensor = torch.arange(int(np.prod(shape))).view(shape)
    boxes = [
        (rank, tuple(a for a, _ in spans), tuple(b - a for a, b in spans))
        for rank, spans in enumerate(product(*(list(pairwise(edges)) for edges in cuts)))
    ]
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_step(root, {"w": (tensor, boxes)})
        even = all(
            len({b - a for a, b in pairwise(edges[:-1])}) <= 1 and edges[-1] - edges[-2] <= edges[1]
            for edges in cuts[1:]
        )
        if "w" in left_out(root):
            assert not even
        else:
            assert np.array_equal(array_of(root, "w")[:], tensor.numpy())


def test_a_chunk_that_is_asked_for_in_part_is_read_in_part(tmp_path: Path) -> None:
    tensor = torch.arange(9, dtype=torch.uint8)
    write_step(tmp_path, {"w": (tensor, rows([4, 4, 1]))})
    store = open_zarr(tmp_path)

    def get(key: str, part: ByteRequest | None) -> bytes:
        found = asyncio.run(store.get(key, default_buffer_prototype(), part))
        assert found is not None
        return found.to_bytes()

    assert get("w/c/1", RangeByteRequest(1, 3)) == bytes([5, 6])
    assert get("w/c/1", OffsetByteRequest(2)) == bytes([6, 7])
    assert get("w/c/1", SuffixByteRequest(1)) == bytes([7])
    assert get("w/c/2", None) == bytes([8, 0, 0, 0])
    assert get("w/c/2", SuffixByteRequest(4)) == bytes([8, 0, 0, 0])
    assert asyncio.run(store.get("w/c/3", default_buffer_prototype())) is None
    assert asyncio.run(store.get("w/c/01/0", default_buffer_prototype())) is None


# --------------------------------------------------------------------------------------------------------- what is left


def test_what_has_no_regular_grid_is_listed_with_the_reason(tmp_path: Path) -> None:
    columns = [(0, (0, 0), (4, 2)), (0, (0, 2), (4, 5)), (0, (0, 7), (4, 1))]
    write_step(tmp_path, {"cut": (torch.zeros(4, 8), columns), "fine": whole(torch.ones(2))})
    assert left_out(tmp_path) == {"cut": "its chunks form no regular grid"}
    assert [name for name, _ in group_of(tmp_path).members()] == ["fine"]


def test_a_grid_of_absurdly_small_chunks_is_left_out(tmp_path: Path) -> None:
    write_step(tmp_path, {"w": (torch.zeros(1501), rows([500, 501, 500]))})
    assert list(left_out(tmp_path)) == ["w"]


def test_names_that_zarr_has_no_node_for_are_listed(tmp_path: Path) -> None:
    names = ["a..b", ".a", "a.", "a/b", "x.__y", "group", "group.inner"]
    write_step(tmp_path, {name: whole(torch.ones(1)) for name in names})
    assert sorted(left_out(tmp_path)) == sorted(set(names) - {"group"})
    assert left_out(tmp_path)["group.inner"] == "another tensor has the name of its group"


def test_an_array_and_a_group_named_like_a_chunk_directory_do_not_mix(tmp_path: Path) -> None:
    tensors = {"c": torch.arange(3), "a.c": torch.tensor(7), "b.c.0": torch.arange(4)}
    write_step(tmp_path, {name: whole(tensor) for name, tensor in tensors.items()})
    for name, tensor in tensors.items():
        assert np.array_equal(array_of(tmp_path, name.replace(".", "/"))[...], tensor.numpy())


# --------------------------------------------------------------------------------------------------------------- damage


def test_a_missing_file_raises_and_never_reads_as_zeros(tmp_path: Path) -> None:
    directory = write_step(tmp_path, {"w": (torch.ones(4, 2), rows([2, 2], (2,)))})
    array = array_of(tmp_path, "w")
    (directory / "data/00001-0.safetensors").unlink()
    assert np.array_equal(array[:2], np.ones((2, 2)))
    with pytest.raises(KeyNotFound, match="00001-0"):
        array[:]


def test_a_flipped_bit_raises(tmp_path: Path) -> None:
    directory = write_step(tmp_path, {"w": whole(torch.ones(8))})
    blob = directory / "data/00000-0.safetensors"
    data = bytearray(blob.read_bytes())
    data[4096 + 5] ^= 1
    blob.write_bytes(data)
    with pytest.raises(CorruptBlock, match="CRC32C"):
        array_of(tmp_path, "w")[:]


def test_a_moved_checkpoint_is_the_same_checkpoint(tmp_path: Path) -> None:
    tensor = torch.arange(6)
    write_step(tmp_path / "here", {"w": (tensor, rows([3, 3]))})
    shutil.move(tmp_path / "here", tmp_path / "there")
    assert np.array_equal(array_of(tmp_path / "there", "w")[:], tensor.numpy())


def test_a_step_that_is_open_stays_that_step_when_newer_ones_come(tmp_path: Path) -> None:
    write_step(tmp_path, {"w": whole(torch.tensor(1))}, step=1)
    old = zarr.open_array(open_zarr(tmp_path), path="w", mode="r")
    write_step(tmp_path, {"w": whole(torch.tensor(2))}, step=2)
    assert old[()] == 1
    assert array_of(tmp_path, "w")[()] == 2
    assert zarr.open_array(open_zarr(tmp_path, step=1), path="w", mode="r")[()] == 1


def test_the_store_is_read_only(tmp_path: Path) -> None:
    write_step(tmp_path, {"w": whole(torch.ones(2))})
    store = open_zarr(tmp_path)
    with pytest.raises(ValueError, match="read-only"):
        zarr.open_group(store, mode="w")
    with pytest.raises(UnsupportedError, match="never changed"):
        store.with_read_only(False)
    assert store == open_zarr(tmp_path) and hash(store) == hash(open_zarr(tmp_path))


def test_listing_shows_exactly_the_keys_that_can_be_read(tmp_path: Path) -> None:
    write_step(tmp_path, {"m.w": (torch.ones(5, 2), rows([2, 2, 1], (2,))), "s": whole(torch.tensor(1))})
    store = open_zarr(tmp_path)

    async def keys() -> list[str]:
        return [key async for key in store.list()]

    async def names(path: str) -> list[str]:
        return [name async for name in store.list_dir(path)]

    found = asyncio.run(keys())
    assert sorted(found) == [
        "m/w/c/0/0",
        "m/w/c/1/0",
        "m/w/c/2/0",
        "m/w/zarr.json",
        "m/zarr.json",
        "s/c",
        "s/zarr.json",
        "zarr.json",
    ]
    assert all(asyncio.run(store.exists(key)) for key in found)
    assert asyncio.run(names("")) == ["zarr.json", "m", "s"]
    assert asyncio.run(names("m/w/")) == ["zarr.json", "c"]
    assert asyncio.run(names("nothing")) == []
    assert not asyncio.run(store.exists("m/w/c/3/0"))


def test_an_empty_root_has_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(NoCheckpoint):
        open_zarr(tmp_path)


# ----------------------------------------------------------------------------------------------------------- references


def through_references(root: Path, file: Path) -> zarr.Group:
    write_references(root, file)
    return zarr.open_group("reference://", storage_options={"fo": str(file)}, mode="r")


def test_references_read_short_edges_and_list_what_they_cannot_name(tmp_path: Path) -> None:
    root = tmp_path / "root"
    wide = torch.arange(35).view(5, 7)
    tensors: dict[str, tuple[torch.Tensor, list[Box]]] = {
        "even": (torch.arange(12.0).view(6, 2), rows([2, 2, 2], (2,))),
        "uneven": (torch.arange(10.0).view(5, 2), rows([2, 2, 1], (2,))),
        "narrow": (wide, [(0, (0, 0), (5, 4)), (1, (0, 4), (5, 3))]),
        "cut": (torch.zeros(4, 8), [(0, (0, 0), (4, 2)), (0, (0, 2), (4, 5)), (0, (0, 7), (4, 1))]),
    }
    write_step(root, tensors)
    group = through_references(root, tmp_path / "refs.json")
    for name in ("even", "uneven"):
        array = group[name]
        assert isinstance(array, zarr.Array)
        assert np.array_equal(array[:], tensors[name][0].numpy())
    found = references(root)
    assert set(found.left_out) == {"narrow", "cut"}
    assert (found.num_arrays, found.num_chunks) == (2, 6)
    noted = group.attrs["stoker"]
    assert isinstance(noted, dict) and noted["left_out"] == found.left_out
    assert sorted(group) == ["even", "uneven"]


def test_a_short_chunk_at_the_end_of_its_file_is_in_the_references_themselves(tmp_path: Path) -> None:
    root = tmp_path / "root"
    # 2,000 rows of 1,000 bytes on rank 0, one row on rank 1: nothing like a full chunk stands behind that row.
    tensor = (torch.arange(2001 * 1000) % 251).to(torch.uint8).view(2001, 1000)
    write_step(root, {"w": (tensor, [(0, (r, 0), (1000, 1000)) for r in (0, 1000)] + [(1, (2000, 0), (1, 1000))])})
    group = through_references(root, tmp_path / "refs.json")
    array = group["w"]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(array[:], tensor.numpy())
    big = torch.zeros(2 * 3000 + 1, 1000, dtype=torch.uint8)
    write_step(root, {"w": (big, rows([3000, 3000, 1], (1000,)))}, step=2)
    assert list(references(root).left_out) == ["w"]  # 3 MB of zeros for one row: not in a JSON file
    assert np.array_equal(array_of(root, "w")[:], big.numpy())


def test_references_follow_a_move_by_their_template(tmp_path: Path) -> None:
    root = tmp_path / "root"
    tensor = torch.arange(6)
    directory = write_step(root, {"w": (tensor, rows([3, 3]))})
    write_references(root, tmp_path / "refs.json")
    shutil.move(directory, tmp_path / "elsewhere")
    group = zarr.open_group(
        "reference://",
        storage_options={
            "fo": str(tmp_path / "refs.json"),
            "template_overrides": {"u": (tmp_path / "elsewhere").as_uri()},
        },
        mode="r",
    )
    array = group["w"]
    assert isinstance(array, zarr.Array)
    assert np.array_equal(array[:], tensor.numpy())


@pytest.mark.parametrize("name", ["zarr.json", "refs.parquet", "key=value"])
def test_references_go_to_a_json_file_that_is_not_called_zarr_json(tmp_path: Path, name: str) -> None:
    write_step(tmp_path / "root", {"w": whole(torch.ones(2))})
    with pytest.raises(ConfigError, match=r"refs\.json"):
        write_references(tmp_path / "root", tmp_path / name)
    assert not (tmp_path / name).exists()
