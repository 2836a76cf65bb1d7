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
    TableInfo,
)

__all__ = ["write_tables"]

_READ_AHEAD = 16


def write_tables(store: ObjectStore, options: WriterOptions, records: Sequence[ShardRecord]) -> Manifest:
    """Store the three tables; returns the manifest, which the caller publishes. Holds the lengths of few shards."""
    num_blocks = [len(record.crcs) for record in records]
    tokens_before = np.cumsum([0] + [record.tokens for record in records])
    documents_before = np.cumsum([0] + [record.documents for record in records])
    fingerprint = Fingerprint()
    rows: list[dict[str, Any]] = []
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
            rows.append(
                {
                    "documents_before": int(documents_before[number]),
                    "tokens_before": int(tokens_before[number]),
                    "continued": record.continued,
                    "file_bytes": record.file_bytes,
                    "sha256": bytes.fromhex(record.sha256),
                    "tokens_start": record.tokens_start,
                    "blocks_start": blocks_file.offset_of(blocks.crc32c),
                    "blocks_crc32c": crc32c(_body(blocks)),
                    "lengths_start": lengths_file.offset_of(lengths),
                    "lengths_crc32c": crc32c(lengths.tobytes()),
                }
            )
            _check_layout(blocks_file, blocks)
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
        shards_table=_write_shards(store, rows),
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


def _write_shards(store: ObjectStore, rows: list[dict[str, Any]]) -> TableInfo:
    batch = pa.RecordBatch.from_pylist(rows, schema=SHARDS_SCHEMA)
    with ArrowFile(store, SHARDS_KEY, SHARDS_SCHEMA, measure(SHARDS_SCHEMA, [batch])) as file:
        file.write(batch)
        return file.commit()


def _body(blocks: BlockTable) -> bytes:
    """A record batch of ``blocks.arrow`` as it stands in the file."""
    return b"".join(array.tobytes().ljust(-(-array.nbytes // 8) * 8, b"\0") for array in blocks)


def _check_layout(file: ArrowFile, blocks: BlockTable) -> None:
    # Readers compute the places of the columns. An Arrow that pads in another way must fail here, not there.
    start = file.offset_of(blocks.crc32c)
    found = [file.offset_of(array) - start for array in blocks]
    expected = list(BlockTable.offsets(len(blocks.crc32c))[:4])
    assert found == expected, f"Arrow must pad columns to 8 bytes: {found} is not {expected}"
