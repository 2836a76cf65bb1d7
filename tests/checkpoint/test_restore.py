"""Reading chunks back into other chunks: any layout into any other, every byte verified and none read twice."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint.blob import Chunk, plan_blobs
from stoker.checkpoint.manifest import CRC_BLOCK_BYTES, BlobInfo, Fragment, Manifest, WrittenChunk, blob_path, merge
from stoker.checkpoint.reader import Span, StepReader
from stoker.checkpoint.restore import read_boxes, read_tensors
from stoker.errors import CorruptBlock
from stoker.metrics import counters
from stoker.storage import ObjectStore, open_store
from stoker.storage._checksums import crc32c_blocks

DIRECTORY = "step-000000000000-00"


def write_step(store: ObjectStore, tensor: torch.Tensor, cuts: list[list[int]], writers: int = 2) -> Manifest:
    """Save `tensor` as the grid of chunks that `cuts` (inner borders for each dimension) makes, by several writers."""
    edges = [sorted({0, extent, *cut}) for extent, cut in zip(tensor.shape, cuts, strict=True)]
    boxes = list(itertools.product(*(list(itertools.pairwise(edge)) for edge in edges)))
    fragments = []
    for writer in range(writers):
        mine = boxes[writer::writers]
        chunks = [
            Chunk(
                name="t",
                dtype="int32",
                shape=tuple(end - start for start, end in box),
                offsets=tuple(start for start, _ in box),
                global_shape=tuple(tensor.shape),
            )
            for box in mine
        ]
        blobs, written = [], []
        for n, image in enumerate(plan_blobs(chunks)):
            data = bytearray(image.size_bytes)
            data[: len(image.header)] = image.header
            for place in image.places:
                part = tensor[tuple(slice(*edge) for edge in mine[place.chunk_index])]
                end = place.byte_offset + place.byte_length
                data[place.byte_offset : end] = part.contiguous().numpy().tobytes()
                written.append(
                    WrittenChunk(
                        chunk=chunks[place.chunk_index],
                        blob=blob_path(writer, n),
                        byte_offset=place.byte_offset,
                        byte_length=place.byte_length,
                    )
                )
            store.put(f"{DIRECTORY}/{blob_path(writer, n)}", data)
            crcs = np.array(crc32c_blocks(memoryview(data), CRC_BLOCK_BYTES), np.uint32)
            blobs.append(BlobInfo(path=blob_path(writer, n), size_bytes=len(data), crcs=crcs))
        fragments.append(
            Fragment(
                rank=writer, world_size=writers, host="h", plan_hash="p", held=chunks, written=written, blobs=blobs
            )
        )
    return merge(fragments, world_size=writers, place="test")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], list[list[int]], list[tuple[int, int]]]:
    """A shape, the saved grid's cuts, and the box that a new rank needs."""
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    cuts = [draw(st.lists(st.integers(1, max(1, extent - 1)), max_size=3)) for extent in shape]
    box = []
    for extent in shape:
        start = draw(st.integers(0, extent - 1))
        box.append((start, draw(st.integers(start + 1, extent))))
    return shape, cuts, box


@settings(max_examples=60, deadline=None)
@given(layout=layouts(), transposed=st.booleans())
def test_any_saved_layout_fills_any_box(
    layout: tuple[tuple[int, ...], list[list[int]], list[tuple[int, int]]], transposed: bool
) -> None:
    shape, cuts, box = layout
    tensor = torch.arange(int(np.prod(shape)), dtype=torch.int32).view(shape)
    wanted = tensor[tuple(slice(*edge) for edge in box)]
    with TemporaryDirectory() as directory, open_store(directory) as store:
        reader = StepReader(store, DIRECTORY, write_step(store, tensor, cuts))
        mine = torch.full(wanted.shape[::-1] if transposed else wanted.shape, -1, dtype=torch.int32)
        target = mine.permute(*reversed(range(mine.dim()))) if transposed else mine
        chunk = Chunk(
            name="t",
            dtype="int32",
            shape=tuple(wanted.shape),
            offsets=tuple(start for start, _ in box),
            global_shape=shape,
        )
        read_boxes(reader, [(chunk, target)])
    assert torch.equal(target, wanted)


@pytest.fixture
def large(tmp_path: Path) -> tuple[ObjectStore, StepReader, torch.Tensor]:
    """A tensor of 24 MiB in two chunks of one blob each, 12 CRC blocks and a header."""
    tensor = torch.arange(6 << 20, dtype=torch.int32).view(-1, 1024)
    store = open_store(tmp_path)
    return store, StepReader(store, DIRECTORY, write_step(store, tensor, [[3072], []])), tensor


def test_a_large_tensor_is_read_in_parallel_and_each_block_once(
    large: tuple[ObjectStore, StepReader, torch.Tensor],
) -> None:
    _, reader, tensor = large
    target = torch.zeros_like(tensor)
    num_bytes = read_tensors(reader, {"t": target})
    assert torch.equal(target, tensor)
    assert tensor.nbytes <= num_bytes <= sum(blob.size_bytes for blob in reader.manifest.blobs.values())


def test_a_small_part_reads_little_more_than_it_needs(large: tuple[ObjectStore, StepReader, torch.Tensor]) -> None:
    _, reader, tensor = large
    target = torch.zeros(10, 1024, dtype=torch.int32)
    chunk = Chunk(name="t", dtype="int32", shape=(10, 1024), offsets=(100, 0), global_shape=tuple(tensor.shape))
    assert read_boxes(reader, [(chunk, target)]) <= 2 * CRC_BLOCK_BYTES
    assert torch.equal(target, tensor[100:110])


def test_a_damaged_block_is_read_again_and_then_named(large: tuple[ObjectStore, StepReader, torch.Tensor]) -> None:
    store, reader, tensor = large
    path = store.local_path(f"{DIRECTORY}/data/00001-0.safetensors")
    assert path is not None
    with path.open("r+b") as file:
        file.seek(5 * CRC_BLOCK_BYTES + 77)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 16]))
    before = counters.snapshot()
    with pytest.raises(CorruptBlock) as caught:
        read_tensors(reader, {"t": torch.zeros_like(tensor)})
    assert (caught.value.start, caught.value.end) == (5 * CRC_BLOCK_BYTES, 6 * CRC_BLOCK_BYTES)
    assert counters.since(before)["ckpt.restore.rereads"] >= 1
    damaged = reader.damaged_blocks(reader.manifest.blobs.values(), on_read=lambda _: None)
    assert [(error.key.rpartition("/")[2], error.start) for error in damaged] == [
        ("00001-0.safetensors", 5 * CRC_BLOCK_BYTES)
    ]


def test_spans_that_share_blocks_are_served_by_one_read(large: tuple[ObjectStore, StepReader, torch.Tensor]) -> None:
    _, reader, tensor = large
    sinks = [np.empty(1000, np.uint8) for _ in range(20)]
    spans = [Span(start=4096 + 1000 * i, sink=sink) for i, sink in enumerate(sinks)]
    assert reader.read({"data/00000-0.safetensors": spans}) == CRC_BLOCK_BYTES
    expected = tensor.numpy().view(np.uint8).reshape(-1)[:20000]
    assert np.array_equal(np.concatenate(sinks), expected)
