"""Steps made chunk by chunk, in any layout that a job of many ranks could leave, without those ranks."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from stoker.checkpoint.blob import Chunk, plan_blobs
from stoker.checkpoint.log import CheckpointLog, commit_record, nonce_of, open_record, step_directory
from stoker.checkpoint.manifest import CRC_BLOCK_BYTES, BlobInfo, Fragment, WrittenChunk, blob_path, merge
from stoker.checkpoint.plan import dtype_name
from stoker.storage._checksums import crc32c_blocks
from stoker.storage.local import LocalStore

Box = tuple[int, tuple[int, ...], tuple[int, ...]]
"""(rank, offsets, shape) of one chunk."""


def write_step(root: Path, tensors: Mapping[str, tuple[torch.Tensor, Sequence[Box]]], *, step: int = 1) -> Path:
    """Commit a step in which each rank wrote the chunks that are its own; returns the step's directory."""
    world_size = 1 + max((rank for _, boxes in tensors.values() for rank, _, _ in boxes), default=0)
    with LocalStore(root) as store:
        log = CheckpointLog(store)
        term = log.append(lambda head: open_record(head, f"run-{step}")).term
        nonce = nonce_of(f"run-{step}", step, 0)
        directory = step_directory(step, nonce)
        fragments = [_write_rank(store, directory, tensors, rank, world_size) for rank in range(world_size)]
        manifest = merge(fragments, world_size=world_size, place=directory)
        store.create(f"{directory}/manifest.arrow", manifest.to_bytes())
        log.append(lambda head: commit_record(head, term=term, step=step, nonce=nonce, manifest_sha256=manifest.sha256))
    return root / directory


def _write_rank(
    store: LocalStore,
    directory: str,
    tensors: Mapping[str, tuple[torch.Tensor, Sequence[Box]]],
    rank: int,
    world_size: int,
) -> Fragment:
    chunks, payloads = [], []
    for name, (tensor, boxes) in tensors.items():
        for owner, offsets, shape in boxes:
            if owner == rank:
                chunks.append(
                    Chunk(
                        name=name,
                        dtype=dtype_name(tensor.dtype),
                        shape=shape,
                        offsets=offsets,
                        global_shape=tuple(tensor.shape),
                    )
                )
                part = tensor[tuple(slice(o, o + n) for o, n in zip(offsets, shape, strict=True))].contiguous()
                payloads.append(part.reshape(-1).view(torch.uint8).numpy().tobytes())
    blobs, written = [], []
    for n, image in enumerate(plan_blobs(chunks)):
        data = bytearray(image.size_bytes)
        data[: len(image.header)] = image.header
        path = blob_path(rank, n)
        for place in image.places:
            data[place.byte_offset : place.byte_offset + place.byte_length] = payloads[place.chunk_index]
            written.append(
                WrittenChunk(
                    chunk=chunks[place.chunk_index],
                    blob=path,
                    byte_offset=place.byte_offset,
                    byte_length=place.byte_length,
                )
            )
        store.put(f"{directory}/{path}", data)
        crcs = np.array(crc32c_blocks(memoryview(data), CRC_BLOCK_BYTES), np.uint32)
        blobs.append(BlobInfo(path=path, size_bytes=len(data), crcs=crcs))
    fragment = Fragment(
        rank=rank, world_size=world_size, host="test", plan_hash="", held=chunks, written=written, blobs=blobs
    )
    store.create(f"{directory}/frag/{rank:05d}.arrow", fragment.to_bytes())
    return fragment


def rows(extents: Sequence[int], tail: tuple[int, ...] = ()) -> list[Box]:
    """Chunks of `extents` rows each, one a rank."""
    boxes, start = [], 0
    for rank, extent in enumerate(extents):
        boxes.append((rank, (start, *(0 for _ in tail)), (extent, *tail)))
        start += extent
    return boxes


def whole(tensor: torch.Tensor) -> tuple[torch.Tensor, list[Box]]:
    """A tensor as one chunk of rank 0."""
    return tensor, [(0, (0,) * tensor.ndim, tuple(tensor.shape))]
