"""Any layout into any other, without processes: every element is written once and comes back where the new rank has it."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from stoker.checkpoint._select import select
from stoker.checkpoint._sharding import Box, Split, boxes_of
from stoker.checkpoint.blob import Chunk, plan_blobs
from stoker.checkpoint.manifest import CRC_BLOCK_BYTES, BlobInfo, Fragment, Manifest, WrittenChunk, blob_path, merge
from stoker.checkpoint.plan import Piece, share_out

Indices = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A tensor on a mesh.

    Attributes:
        mesh: sizes.
        dims: by mesh dimension, the tensor dimension that it shards, or None.
        strided: mesh dimension whose split comes last although others on the same tensor dimension follow, or None.
    """

    mesh: tuple[int, ...]
    dims: tuple[int | None, ...]
    strided: int | None

    @property
    def coordinates(self) -> list[tuple[int, ...]]:
        return list(itertools.product(*map(range, self.mesh)))

    def _later(self) -> list[int]:
        assert self.strided is not None
        return [i for i in range(self.strided + 1, len(self.mesh)) if self.dims[i] == self.dims[self.strided]]

    def splits(self, ndim: int, at: tuple[int, ...]) -> list[tuple[Split, ...]]:
        """As placements say it."""
        found: list[list[Split]] = [[] for _ in range(ndim)]
        for i, (parts, dim) in enumerate(zip(self.mesh, self.dims, strict=True)):
            if dim is not None:
                factor = math.prod(self.mesh[j] for j in self._later()) if i == self.strided else 0
                found[dim].append(Split(parts, at[i], factor))
        return [tuple(splits) for splits in found]

    def indices(self, shape: tuple[int, ...], at: tuple[int, ...]) -> list[Indices]:
        """What the rank has of each dimension: torch.chunk after torch.chunk, as the wrappers really do it."""
        order = [i for i in range(len(self.mesh)) if i != self.strided]
        if self.strided is not None:
            last = max([self.strided, *self._later()])
            order.insert(order.index(last) + 1 if last in order else self.strided, self.strided)
        found = [np.arange(size) for size in shape]
        for i in order:
            dim = self.dims[i]
            if dim is not None:
                size = -(-len(found[dim]) // self.mesh[i])
                found[dim] = found[dim][size * at[i] : size * (at[i] + 1)]
        return found

    def replicas(self, at: tuple[int, ...]) -> tuple[int, ...]:
        """Ranks that have the same."""
        return tuple(
            rank
            for rank, other in enumerate(self.coordinates)
            if all(dim is None or a == b for dim, a, b in zip(self.dims, at, other, strict=True))
        )


@st.composite
def layouts(draw: st.DrawFn, ndim: int) -> Layout:
    mesh = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=3)))
    dims = tuple(draw(st.sampled_from([None, *range(ndim)])) for _ in mesh)
    places = [i for i, dim in enumerate(dims) if dim is not None and dim in dims[i + 1 :]]
    return Layout(mesh=mesh, dims=dims, strided=draw(st.sampled_from([None, *places])))


@st.composite
def cases(draw: st.DrawFn) -> tuple[tuple[int, ...], Layout, Layout]:
    shape = tuple(draw(st.lists(st.integers(1, 11), min_size=1, max_size=2)))
    return shape, draw(layouts(len(shape))), draw(layouts(len(shape)))


def boxes(layout: Layout, shape: tuple[int, ...], at: tuple[int, ...]) -> list[Box]:
    local = [len(indices) for indices in layout.indices(shape, at)]
    found = [] if 0 in local else boxes_of(shape, layout.splits(len(shape), at), local)
    assert found is not None
    return found


def region(offsets: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offsets, shape, strict=True))


UNEVEN = Layout(mesh=(3, 2), dims=(0, 0), strided=0)
WORSE = Layout(mesh=(2, 3, 3), dims=(None, 0, 0), strided=1)


@settings(max_examples=80, deadline=None)
@given(case=cases())
@example(case=((7,), UNEVEN, UNEVEN))
@example(case=((11, 2), WORSE, UNEVEN))
def test_the_boxes_of_a_rank_are_what_it_has_in_the_order_of_its_memory(
    case: tuple[tuple[int, ...], Layout, Layout],
) -> None:
    shape, layout, _ = case
    tensor = np.arange(math.prod(shape)).reshape(shape)
    for at in layout.coordinates:
        held = tensor[np.ix_(*layout.indices(shape, at))]
        found = np.full(held.shape, -1)
        for box in boxes(layout, shape, at):
            found[region(box.at, box.shape)] = tensor[region(box.offsets, box.shape)]
        assert np.array_equal(found, held), at


def saved(layout: Layout, tensor: NDArray[np.int32]) -> tuple[Manifest, dict[str, bytearray]]:
    """The manifest and the files that the ranks of a layout make of one tensor."""
    shape, files, fragments = tensor.shape, {}, []
    for rank, at in enumerate(layout.coordinates):
        local = torch.from_numpy(tensor[np.ix_(*layout.indices(shape, at))].copy())
        pieces = [
            Piece(
                chunk=Chunk(name="t", dtype="int32", shape=box.shape, offsets=box.offsets, global_shape=shape),
                at=box.at,
                replicas=layout.replicas(at),
            )
            for box in boxes(layout, shape, at)
        ]
        held, mine = share_out(((piece, False) for piece in pieces), rank)
        written, blobs = [], []
        for n, image in enumerate(plan_blobs([piece.chunk for piece in mine])):
            data = files[blob_path(rank, n)] = bytearray(image.size_bytes)
            for place in image.places:
                piece = mine[place.chunk_index]
                part = piece.memory(local).contiguous().numpy().tobytes()
                data[place.byte_offset : place.byte_offset + place.byte_length] = part
                written.append(
                    WrittenChunk(
                        chunk=piece.chunk,
                        blob=blob_path(rank, n),
                        byte_offset=place.byte_offset,
                        byte_length=place.byte_length,
                    )
                )
            crcs = np.zeros(-(-len(data) // CRC_BLOCK_BYTES), np.uint32)
            blobs.append(BlobInfo(path=blob_path(rank, n), size_bytes=len(data), crcs=crcs))
        fragments.append(
            Fragment(
                rank=rank,
                world_size=len(layout.coordinates),
                host="h",
                plan_hash="",
                held=[piece.chunk for piece in held],
                written=written,
                blobs=blobs,
            )
        )
    return merge(fragments, world_size=len(fragments), place="test"), files


@settings(max_examples=60, deadline=None)
@given(case=cases(), transposed=st.booleans())
@example(case=((7,), UNEVEN, WORSE), transposed=False)
@example(case=((11, 2), WORSE, UNEVEN), transposed=True)
def test_what_any_layout_saved_fills_any_other(case: tuple[tuple[int, ...], Layout, Layout], transposed: bool) -> None:
    shape, old, new = case
    tensor = np.arange(math.prod(shape), dtype=np.int32).reshape(shape)
    manifest, files = saved(old, tensor)  # merging has checked that each element was written once
    for at in new.coordinates:
        expected = tensor[np.ix_(*new.indices(shape, at))]
        memory = torch.full(expected.shape[::-1] if transposed else expected.shape, -1, dtype=torch.int32)
        local = memory.permute(*reversed(range(memory.dim()))) if transposed else memory
        found = boxes(new, shape, at)
        selection = select(
            manifest,
            [
                (
                    Chunk(name="t", dtype="int32", shape=box.shape, offsets=box.offsets, global_shape=shape),
                    local[region(box.at, box.shape)],
                )
                for box in found
            ],
        )
        for path, spans in selection.wanted.items():
            for span in spans:
                span.sink[:] = np.frombuffer(files[path], np.uint8)[span.start : span.end]
        for copy in selection.copies:
            copy()
        assert np.array_equal(local.numpy(), expected), at


def test_seven_rows_under_fsdp2_and_tensor_parallelism_lie_where_fsdp2_put_them() -> None:
    """torch's placements say that the last row is on rank (2, 0), which has none; it is on (2, 1)."""
    assert [boxes(UNEVEN, (7,), at) for at in ((2, 0), (2, 1))] == [[], [Box((6,), (1,), (0,))]]


def test_a_part_that_fits_no_reading_of_the_placements_is_no_layout() -> None:
    assert boxes_of((8,), [(Split(2, 0),)], (3,)) is None
    assert boxes_of((8, 2), [(Split(2, 0),), ()], (4,)) is None
    assert boxes_of((8,), [(Split(2, 0, 2),)], (5,)) is None
