"""Fragments of large jobs, made as tables in a moment: for measuring what merges and reads them."""

import numpy as np
import pyarrow as pa

from ..checkpoint._columns import BlobInfo, Boxes, Spans, Tensors, blob_path
from ..checkpoint.manifest import CRC_BLOCK_BYTES, Fragment

__all__ = ["fragments_of_job"]


def fragments_of_job(*, world_size: int, num_tensors: int, rows: int = 4, columns: int = 64) -> list[Fragment]:
    """One fragment a rank of a job that shards `num_tensors` float32 tensors by rows over all its ranks.

    Each rank has `rows` rows of each tensor, in one blob; there are ``world_size * num_tensors`` chunks in all. The
    checksums are zeros, so nothing can be read back from them.

    >>> from stoker.checkpoint.manifest import merge
    >>> merge(fragments_of_job(world_size=4, num_tensors=3), world_size=4, place="").num_chunks
    12
    """
    names = sorted(f"model.layers.{i}.weight" for i in range(num_tensors))
    tensors = Tensors(
        names=pa.array(names, pa.string()),
        dtypes=pa.array(["float32"] * num_tensors, pa.string()),
        ndim=np.full(num_tensors, 2, np.int64),
        shape=np.tile(np.array([world_size * rows, columns], np.int64), (num_tensors, 1)),
    )
    chunk_bytes = 4 * rows * columns
    size_bytes = 4096 + -(-num_tensors * chunk_bytes // 4096) * 4096
    crcs = np.zeros(-(-size_bytes // CRC_BLOCK_BYTES), np.uint32)
    fragments = []
    for rank in range(world_size):
        boxes = Boxes(
            tensor=np.arange(num_tensors),
            offsets=np.tile(np.array([rank * rows, 0], np.int64), (num_tensors, 1)),
            shape=np.tile(np.array([rows, columns], np.int64), (num_tensors, 1)),
        )
        spans = Spans(
            blob=np.zeros(num_tensors, np.int64),
            byte_offset=4096 + chunk_bytes * np.arange(num_tensors),
            byte_length=np.full(num_tensors, chunk_bytes, np.int64),
        )
        fragments.append(
            Fragment.of_columns(
                rank=rank,
                world_size=world_size,
                host=f"host-{rank // 8}",
                plan_hash="",
                tensors=tensors,
                held=boxes,
                written=boxes,
                spans=spans,
                blobs=[BlobInfo(path=blob_path(rank, 0), size_bytes=size_bytes, crcs=crcs)],
            )
        )
    return fragments
