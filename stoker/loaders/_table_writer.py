"""The tables of a finished data set, from the progress records of its shards and the row offsets in their files.

Only what a resumed writer has too is used, so that a set which took several writers is the same, byte for byte.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..storage._checksums import crc32c
from ..storage.store import ObjectStore
from ._arrow_file import ArrowFile, column, measure
from ._progress import ShardRecord, WriterOptions
from .format import (
    BLOCKS_KEY,
    BLOCKS_SCHEMA,
    LENGTHS_KEY,
    LENGTHS_SCHEMA,
    SHARDS_KEY,
    SHARDS_SCHEMA,
    BlockTable,
    Fingerprint,
    Manifest,
    ShardDocuments,
    ShardsInfo,
    ShardTable,
    packed_offsets,
)

__all__ = ["write_tables"]

_READ_AHEAD = 16


def write_tables(store: ObjectStore, options: WriterOptions, records: Sequence[ShardRecord]) -> Manifest:
    """Store the three tables; returns the manifest, which the caller publishes. Holds the lengths of few shards."""
    num_blocks = [len(record.crcs) for record in records]
    tokens_before = np.cumsum([0] + [record.tokens for record in records])
    documents_before = np.cumsum([0] + [record.documents for record in records])
    fingerprint = Fingerprint()
    slices: list[tuple[int, int, int, int]] = []
    last_start = 0
    with (
        _open_table(store, BLOCKS_KEY, BLOCKS_SCHEMA, num_blocks) as blocks_file,
        _open_table(store, LENGTHS_KEY, LENGTHS_SCHEMA, [record.documents for record in records]) as lengths_file,
    ):
        for number, (record, offsets) in enumerate(zip(records, _read_offsets(store, records), strict=True)):
            starts = int(tokens_before[number]) + offsets[:-1]
            if record.continued:
                starts[0] = last_start  # its document began in an earlier shard
            last_start = int(starts[-1])
            first = int(tokens_before[number]) + np.arange(len(record.crcs), dtype=np.int64) * options.block_tokens
            row = np.searchsorted(starts, first, side="right") - 1
            blocks = BlockTable(
                crc32c=np.array(record.crcs, np.uint32),
                first_token=np.array(record.first_tokens, np.uint32),
                first_doc=int(documents_before[number]) - int(record.continued) + row,
                first_doc_offset=first - starts[row],
            )
            lengths = record.lengths(offsets)
            fingerprint.update(blocks.crc32c, lengths)
            _write(blocks_file, BLOCKS_SCHEMA, blocks)
            _write(lengths_file, LENGTHS_SCHEMA, [lengths])
            _check_layout(blocks_file, blocks)
            slices.append(
                (
                    blocks_file.offset_of(blocks.crc32c),
                    crc32c(_body(blocks)),
                    lengths_file.offset_of(lengths),
                    crc32c(lengths.tobytes()),
                )
            )
        blocks_table, lengths_table = blocks_file.commit(), lengths_file.commit()
    documents, tokens = int(documents_before[-1]), int(tokens_before[-1])
    return Manifest(
        dtype=options.dtype,
        eos_id=options.eos_id,
        tokenizer=options.tokenizer,
        documents=documents,
        tokens=tokens,
        shards=len(records),
        blocks=sum(num_blocks),
        block_tokens=options.block_tokens,
        order_blocks=1,
        shards_table=_write_shards(store, records, tokens_before[:-1], documents_before[:-1], slices),
        blocks_table=blocks_table,
        lengths_table=lengths_table,
        fingerprint=fingerprint.hexdigest(
            dtype=options.dtype, documents=documents, tokens=tokens, block_tokens=options.block_tokens
        ),
    )


def _read_offsets(store: ObjectStore, records: Sequence[ShardRecord]) -> Iterator[NDArray[np.int64]]:
    with ThreadPoolExecutor(_READ_AHEAD, thread_name_prefix="stoker-offsets") as pool:
        for first in range(0, len(records), _READ_AHEAD):
            some = range(first, min(first + _READ_AHEAD, len(records)))
            yield from pool.map(lambda number: records[number].read_offsets(store, number), some)


def _open_table(store: ObjectStore, key: str, schema: pa.Schema, num_rows: Iterable[int]) -> ArrowFile:
    blanks = (
        pa.record_batch([column(np.zeros(rows, field.type.to_pandas_dtype())) for field in schema], schema=schema)
        for rows in num_rows
    )
    return ArrowFile(store, key, schema, measure(schema, blanks))


def _write(file: ArrowFile, schema: pa.Schema, columns: Iterable[NDArray[Any]]) -> None:
    file.write(pa.record_batch([column(array) for array in columns], schema=schema))


def _write_shards(
    store: ObjectStore,
    records: Sequence[ShardRecord],
    tokens_before: NDArray[np.int64],
    documents_before: NDArray[np.int64],
    slices: Sequence[tuple[int, int, int, int]],
) -> ShardsInfo:
    blocks_start, blocks_crc32c, lengths_start, lengths_crc32c = (list(part) for part in zip(*slices, strict=True))
    places = ShardTable(
        tokens_before=tokens_before,
        tokens_start=np.array([record.tokens_start for record in records], np.int64),
        file_bytes=np.array([record.file_bytes for record in records], np.int64),
        blocks_start=np.array(blocks_start, np.int64),
        blocks_crc32c=np.array(blocks_crc32c, np.uint32),
    )
    documents = ShardDocuments(
        documents_before=documents_before,
        lengths_start=np.array(lengths_start, np.int64),
        lengths_crc32c=np.array(lengths_crc32c, np.uint32),
    )
    digests = pa.array([bytes.fromhex(record.sha256) for record in records], pa.binary(32))
    continued = pa.array([record.continued for record in records])
    numbers = [column(array) for array in (*places, *documents)]
    batch = pa.record_batch([*numbers, continued, digests], schema=SHARDS_SCHEMA)
    with ArrowFile(store, SHARDS_KEY, SHARDS_SCHEMA, measure(SHARDS_SCHEMA, [batch])) as file:
        file.write(batch)
        for part in (places, documents):
            _check_layout(file, part)
        table = file.commit()
    return ShardsInfo(
        *table,
        places_start=file.offset_of(places.tokens_before),
        places_crc32c=crc32c(_body(places)),
        documents_start=file.offset_of(documents.documents_before),
        documents_crc32c=crc32c(_body(documents)),
    )


def _body(columns: Sequence[NDArray[Any]]) -> bytes:
    """Consecutive columns of a record batch as they stand in the file."""
    return b"".join(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0") for array in columns)


def _check_layout(file: ArrowFile, columns: Sequence[NDArray[Any]]) -> None:
    # Readers compute the places of the columns. An Arrow that pads in another way must fail here, not there.
    start = file.offset_of(columns[0])
    found = [file.offset_of(array) - start for array in columns]
    expected = list(packed_offsets([array.dtype.str for array in columns], len(columns[0]))[:-1])
    assert found == expected, f"Arrow must pad columns to 8 bytes: {found} is not {expected}"
