"""Write a token data set: documents in, whole shards out, the manifest last."""

import logging
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from ..errors import AlreadyExists, ConfigError, DatasetError, EmptyInput, StoreError
from ..storage._checksums import crc32c, crc32c_blocks
from ..storage._units import parse_bytes
from ..storage.store import ObjectStore
from ..storage.urls import open_store
from ._arrow_file import ArrowFile, column, measure
from ._progress import OpenDocument, ShardRecord, WriterOptions, claim, clear_progress, create_once, record_key
from ._table_writer import write_tables
from .format import (
    DATA_PREFIX,
    MANIFEST_KEY,
    MAX_BLOCK_BYTES,
    MAX_DOCUMENT_TOKENS,
    check_token_dtype,
    default_block_tokens,
    shard_key,
    shard_schema,
)

__all__ = ["TokenWriter"]

logger = logging.getLogger(__name__)


# Guarantees: one thread at a time. Objects appear in the order data, its progress record, tables, manifest; each is
# whole and durable before the next is begun, so that a kill leaves either no manifest or a complete data set.
class TokenWriter:
    """Write documents of tokens as a new data set; a context manager.

    Documents are stored one after another in the order of the calls. A data file is published as soon as it is full
    (`shard_bytes` of memory are held until then); the manifest, without which nothing opens, when the ``with`` block
    is left without an exception. A writer that was stopped, by an exception or by SIGKILL, is continued by another one
    with the same options and ``resume=True``, whose caller then skips :attr:`resumed_documents` documents; the result
    is the same, byte for byte.

    Args:
        url: plain path or URL of the root; it must not hold a data set.
        dtype: how tokens are stored: ``"uint16"`` up to 65,535, else ``"uint32"``.
        eos_id: ends each document that does not end with it; None leaves documents as they are.
        shard_bytes: most token bytes of a data file, rounded down to whole blocks.
        block_tokens: tokens that are checked and fetched together, a power of two; by default 4 MiB of them.
        tokenizer: identity of what made the tokens, kept in the manifest: a name or a digest.
        resume: go on where an earlier writer was stopped; starts from nothing if there was none.
        storage_options: options of the object store, as :func:`~stoker.storage.open_store` takes them.

    Raises:
        AlreadyExists: the root holds a data set, or one is being written or was left unfinished and `resume` is False.
        ConfigError: an argument breaks its rule, or differs from those that the resumed writer had.
        StoreFull, StoreUnavailable, …: what was finished stays and can be resumed.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as url, TokenWriter(url, dtype="uint16", eos_id=0) as writer:
    ...     writer.write([17, 4, 256])
    ...     writer.write([9, 0])
    ...     writer.documents, writer.tokens
    (2, 6)
    """

    def __init__(
        self,
        url: str | Path,
        *,
        dtype: str = "uint16",
        eos_id: int | None = None,
        shard_bytes: int | str = "256MiB",
        block_tokens: int | None = None,
        tokenizer: str | None = None,
        resume: bool = False,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        self._dtype = np.dtype(check_token_dtype(dtype, "TokenWriter"))
        self._largest = int(np.iinfo(self._dtype).max)
        if eos_id is not None and not 0 <= eos_id <= self._largest:
            raise ConfigError(f"eos_id of {dtype} tokens is in [0, {self._largest}]", value=eos_id, place="TokenWriter")
        if tokenizer is not None and len(tokenizer) > 256:
            raise ConfigError(
                "tokenizer is a name or a digest of at most 256 characters", value=len(tokenizer), place="TokenWriter"
            )
        shard_tokens, block_tokens = _geometry(
            check_token_dtype(dtype, "TokenWriter"), parse_bytes(shard_bytes, place="shard_bytes"), block_tokens
        )
        self._options = WriterOptions(
            dtype=check_token_dtype(dtype, "TokenWriter"),
            eos_id=eos_id,
            block_tokens=block_tokens,
            shard_tokens=shard_tokens,
            tokenizer=tokenizer,
        )
        self._store: ObjectStore = open_store(str(url), **dict(storage_options or {}))
        if self._store.exists(MANIFEST_KEY):
            if resume:
                clear_progress(self._store)  # what is left of a writer killed after its last step
            raise AlreadyExists(
                "a data set is written once and never changed",
                place=self._store.place(MANIFEST_KEY),
                hint="choose another URL, or delete the data set first",
            )
        self._records = claim(self._store, self._options, resume=resume)
        self._open = self._records[-1].open_document if self._records else None
        self._pending = self._open  # its first tokens are durable: the caller gives it again, whole
        self.documents = sum(record.documents for record in self._records)
        """Documents so far, those of a resumed writer included."""
        self.tokens = sum(record.tokens for record in self._records)
        """Tokens so far, as :attr:`documents`."""
        self.resumed_documents = self.documents - (self._open is not None)
        """Documents that an earlier writer has finished: the caller must go on with the document after them."""
        if self._pending is not None:
            self.documents -= 1
            self.tokens -= self._pending.written
        # Pages that no token has touched yet take no memory.
        self._buffer = np.empty(shard_tokens, self._dtype)
        self._ends: list[int] = []
        self._fill = 0
        self._started = 0
        self._closed = False

    def write(self, token_ids: ArrayLike) -> None:
        """Add one document: a non-empty 1-D array or list of integers of any width.

        Raises:
            DatasetError: a token that the dtype can't hold, or no integers. Nothing of the document is stored.
            EmptyInput: no token, and no eos_id to put there.
        """
        tokens = self._checked(token_ids)
        eos_id = self._options.eos_id
        add_eos = eos_id is not None and (not tokens.size or int(tokens[-1]) != eos_id)
        total = tokens.size + add_eos
        if not total:
            raise EmptyInput(
                "a document has at least one token",
                value=0,
                place=self._place(),
                hint="skip it, or give eos_id, which then is its only token",
            )
        if self._pending is None and total < len(self._buffer) - self._fill:
            end = self._fill + tokens.size
            self._buffer[self._fill : end] = tokens
            if add_eos:
                self._buffer[end] = eos_id
            self._fill += total
            self._ends.append(self._fill)
            self._started += 1
            self.documents += 1
            self.tokens += total
        else:
            self._append(np.append(tokens, np.int64(eos_id)) if add_eos and eos_id is not None else tokens)

    def _checked(self, token_ids: ArrayLike) -> NDArray[Any]:
        tokens = np.asarray(token_ids)
        if not tokens.size:
            tokens = tokens.astype(self._dtype)  # an empty list has no dtype of its own
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DatasetError(
                "a document is a 1-D array of integers", value=f"{tokens.ndim}-D {tokens.dtype}", place=self._place()
            )
        # One pass: the bits of all tokens together reach beyond the dtype exactly if those of one of them do.
        if tokens.dtype != self._dtype and tokens.size:
            together = int(np.bitwise_or.reduce(tokens))
            if not 0 <= together <= self._largest:
                wrong = tokens[(tokens < 0) | (tokens > self._largest)][0]
                raise DatasetError(
                    f"{self._dtype} tokens are in [0, {self._largest}]",
                    value=int(wrong),
                    place=self._place(),
                    hint='use dtype="uint32"' if self._largest < wrong <= MAX_DOCUMENT_TOKENS else "",
                )
        return tokens

    def _place(self) -> str:
        return f"document {self.documents}"

    def _append(self, tokens: NDArray[Any]) -> None:
        """Store a document that fills the shard, reaches over several, or goes on with what a stopped writer had."""
        if self._closed:
            raise ConfigError("the writer is closed", place=self._store.url)
        total = len(tokens)
        if total > MAX_DOCUMENT_TOKENS:
            raise DatasetError(f"a document has at most {MAX_DOCUMENT_TOKENS} tokens", value=total, place=self._place())
        position, crc = 0, 0
        if self._pending is not None:
            position, crc = self._skip_durable(tokens, self._pending)
            self._pending = None
        else:
            self._started += 1
        while position < total:
            count = min(total - position, len(self._buffer) - self._fill)
            piece = self._buffer[self._fill : self._fill + count]
            piece[:] = tokens[position : position + count]
            position += count
            self._fill += count
            self._ends.append(self._fill)
            if self._fill == len(self._buffer):
                crc = crc32c(piece.data.cast("B"), crc)
                self._publish_or_stop(OpenDocument(total, position, crc) if position < total else None)
        self.documents += 1
        self.tokens += total

    def _skip_durable(self, tokens: NDArray[Any], pending: OpenDocument) -> tuple[int, int]:
        head = tokens[: pending.written].astype(self._dtype)
        if len(tokens) != pending.tokens or crc32c(head.data.cast("B")) != pending.crc32c:
            raise DatasetError(
                "the document must be the one that the stopped writer was at",
                value=f"other tokens for document {self.resumed_documents}",
                place=self._store.url,
                hint="skip exactly resumed_documents documents of the same input",
            )
        return pending.written, pending.crc32c

    def _publish_or_stop(self, open_document: OpenDocument | None) -> None:
        try:
            self._publish(open_document)
        except BaseException:
            self.abort()  # the buffer is not what a next call would expect
            raise

    def _publish(self, open_document: OpenDocument | None) -> None:
        """Store the buffer as a data file, then its progress record."""
        number = len(self._records)
        tokens = self._buffer[: self._fill]
        offsets = np.zeros(len(self._ends) + 1, np.int64)
        offsets[1:] = self._ends
        continues = np.zeros(len(self._ends), np.bool_)
        continues[-1] = open_document is not None
        schema = shard_schema(self._options.dtype)
        rows = pa.LargeListArray.from_arrays(column(offsets), column(tokens), type=schema.field("input_ids").type)
        batch = pa.record_batch([rows, pa.array(continues)], schema=schema)
        size_bytes = measure(schema, [batch])
        with ArrowFile(self._store, shard_key(number), schema, size_bytes) as file:
            file.write(batch)
            tokens_start, offsets_start = file.offset_of(tokens), file.offset_of(offsets)
            sha256 = file.commit().sha256
        record = ShardRecord(
            tokens=len(tokens),
            file_bytes=size_bytes,
            sha256=sha256,
            tokens_start=tokens_start,
            documents=self._started,
            continued=self._open is not None,
            offsets_start=offsets_start,
            offsets_crc32c=crc32c(offsets.data.cast("B")),
            crcs=crc32c_blocks(tokens.data.cast("B"), self._options.block_tokens * self._dtype.itemsize),
            first_tokens=tokens[:: self._options.block_tokens].tolist(),
            open_document=open_document,
        )
        create_once(self._store, record_key(number), record.encode())
        self._records.append(record)
        self._open = open_document
        self._ends, self._fill, self._started = [], 0, 0
        logger.info("wrote %s: %s tokens, %s bytes", shard_key(number), record.tokens, record.file_bytes)

    def close(self) -> None:
        """Publish the last data file, the tables and the manifest. Returns when all is durable; harmless when repeated.

        Raises:
            EmptyInput: nothing was written.
            DatasetError: a document that a stopped writer had begun was not given again.
        """
        if self._closed:
            return
        try:
            if self._pending is not None:
                raise DatasetError(
                    "the document that the stopped writer was at must be written again",
                    value=f"no document after {self.resumed_documents}",
                    place=self._store.url,
                )
            if not self._records and not self._fill:
                raise EmptyInput("a data set needs at least one document", value=0, place=self._store.url)
            if self._fill:
                self._publish(None)
            create_once(self._store, MANIFEST_KEY, write_tables(self._store, self._options, self._records).encode())
        except BaseException:
            self.abort()
            raise
        self._closed = True
        clear_progress(self._store)
        # A killed writer may have got further than its input now reaches.
        for info in list(self._store.list(DATA_PREFIX, start_after=shard_key(len(self._records) - 1))):
            self._store.delete(info.key)
        self._release()

    def abort(self) -> None:
        """Stop without a manifest. Finished data files stay for a writer with ``resume=True``."""
        if self._closed:
            return
        self._closed = True
        if not self._records:
            with suppress(StoreError):  # nothing to resume: leave nothing behind; the reason to stop matters more
                clear_progress(self._store)
        self._release()

    def _release(self) -> None:
        self._buffer = np.empty(0, self._dtype)
        self._store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


def _geometry(dtype: Any, shard_bytes: int, block_tokens: int | None) -> tuple[int, int]:
    """Tokens of a shard and of a block."""
    itemsize = np.dtype(dtype).itemsize
    wanted = shard_bytes // itemsize
    if wanted < 1:
        raise ConfigError("shard_bytes must hold at least one token", value=shard_bytes, place="TokenWriter")
    if block_tokens is None:
        block_tokens = min(default_block_tokens(dtype), 1 << (wanted.bit_length() - 1))
    if block_tokens < 1 or block_tokens & (block_tokens - 1):
        raise ConfigError("block_tokens must be a power of two", value=block_tokens, place="TokenWriter")
    if block_tokens * itemsize > MAX_BLOCK_BYTES:
        raise ConfigError(
            f"a block has at most {MAX_BLOCK_BYTES} bytes", value=block_tokens * itemsize, place="TokenWriter"
        )
    if wanted < block_tokens:
        raise ConfigError(
            f"shard_bytes must hold a block, {block_tokens * itemsize} bytes",
            value=shard_bytes,
            place="TokenWriter",
            hint="choose a smaller block_tokens",
        )
    return wanted // block_tokens * block_tokens, block_tokens
