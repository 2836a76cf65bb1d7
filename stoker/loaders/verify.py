"""Check every byte of a stored data set and list all that is wrong, not only the first."""

import hashlib
import mmap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..errors import CorruptBlock, CorruptRecord, FormatError, KeyNotFound, ObjectChanged, StokerError
from ..storage._checksums import crc32c
from ..storage.store import ObjectStore
from ..storage.urls import open_store
from ._tables import Tables
from .format import (
    BLOCKS_KEY,
    LENGTHS_KEY,
    SHARDS_KEY,
    Fingerprint,
    ShardFiles,
    check_digest,
    read_arrow,
    shard_key,
    shard_schema,
)

__all__ = ["Damage", "VerifyReport", "verify"]


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is wrong.

    Attributes:
        key: the object. shard, block: their numbers, if it is in a data file (blocks counted over the whole set).
        start, end: the byte range in the object, if it is known.
        problem: what must hold and what was found.
    """

    key: str
    problem: str
    shard: int | None = None
    block: int | None = None
    start: int | None = None
    end: int | None = None


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What :func:`verify` has found.

    Attributes:
        checked_bytes: of data files and tables. damage: empty if all is well.
    """

    url: str
    shards: int
    blocks: int
    checked_bytes: int
    damage: tuple[Damage, ...]

    @property
    def ok(self) -> bool:
        return not self.damage

    def to_json(self) -> dict[str, Any]:
        """One JSON object."""
        return {"ok": self.ok, **asdict(self), "damage": [asdict(damage) for damage in self.damage]}


def verify(
    url: str | Path,
    *,
    storage_options: Mapping[str, Any] | None = None,
    progress: Callable[[int], None] = lambda size_bytes: None,
) -> VerifyReport:
    """Read a data set whole and compare each byte with its checksum, and the tables with the data.

    Data files: size, SHA-256 of all bytes, CRC32C of each block, rows against ``lengths.arrow``, the place of the
    tokens. Tables: SHA-256 and the checksum of each shard's slice. At last the fingerprint.

    Args:
        progress: called with the bytes of each file when it has been read.

    Raises:
        What opening a data set raises: damage to ``manifest.json``, or to what ``shards.arrow`` says of the places of
        tokens, leaves nothing to check by.
        StoreUnavailable, AccessDenied: the data could not be read; that says nothing about it.
    """
    with open_store(str(url), **dict(storage_options or {})) as store:
        tables = Tables.open(store)
        damage: list[Damage] = []
        files: ShardFiles | None = None
        try:
            files = ShardFiles.decode(_content(store, SHARDS_KEY), tables.manifest, store.place(SHARDS_KEY))
        except _DAMAGE as error:
            damage.append(Damage(key=SHARDS_KEY, problem=_problem(error)))
        progress(tables.manifest.shards_table.bytes)
        for key, info in ((BLOCKS_KEY, tables.manifest.blocks_table), (LENGTHS_KEY, tables.manifest.lengths_table)):
            try:
                check_digest(_content(store, key), info, store.place(key))
            except _DAMAGE as error:
                damage.append(Damage(key=key, problem=_problem(error)))
            progress(info.bytes)
        fingerprint: Fingerprint | None = Fingerprint()
        for shard in range(tables.manifest.shards):
            try:
                crcs, lengths = tables.blocks(shard).crc32c, tables.lengths(shard)
            except _DAMAGE as error:
                fingerprint = None
                damage.append(Damage(key=shard_key(shard), shard=shard, problem=f"can't be checked: {_problem(error)}"))
            else:
                damage += _check_shard(tables, files, shard, crcs, lengths)
                if fingerprint is not None:
                    fingerprint.update(crcs, lengths)
            progress(int(tables.shards.file_bytes[shard]))
        manifest = tables.manifest
        if fingerprint is not None:
            found = fingerprint.hexdigest(
                dtype=manifest.dtype,
                documents=manifest.documents,
                tokens=manifest.tokens,
                block_tokens=manifest.block_tokens,
            )
            if found != manifest.fingerprint:
                damage.append(
                    Damage(key="manifest.json", problem=f"fingerprint must be {manifest.fingerprint}, got {found}")
                )
        return VerifyReport(
            url=store.url,
            shards=manifest.shards,
            blocks=manifest.blocks,
            checked_bytes=stored_bytes(tables),
            damage=tuple(damage),
        )


# What is wrong with the data; other errors say that it could not be read.
_DAMAGE = (CorruptBlock, CorruptRecord, FormatError, KeyNotFound, ObjectChanged)


def stored_bytes(tables: Tables) -> int:
    """Bytes of all data files and tables."""
    manifest = tables.manifest
    return int(tables.shards.file_bytes.sum()) + sum(
        info.bytes for info in (manifest.shards_table, manifest.blocks_table, manifest.lengths_table)
    )


def _content(store: ObjectStore, key: str) -> memoryview:
    """A whole object; local files are mapped, not copied."""
    path = store.local_path(key)
    if path is None or not path.is_file() or not path.stat().st_size:
        return store.get(key)
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


def _problem(error: StokerError) -> str:
    return f"{error.rule}, got {error.value}" if error.value is not None else error.rule


def _check_shard(
    tables: Tables, files: ShardFiles | None, shard: int, crcs: NDArray[np.uint32], lengths: NDArray[np.uint32]
) -> Iterator[Damage]:
    key = shard_key(shard)
    try:
        content = _content(tables.store, key)
    except _DAMAGE as error:
        yield Damage(key=key, shard=shard, problem=_problem(error))
        return
    whole = True
    size_bytes = int(tables.shards.file_bytes[shard])
    if len(content) != size_bytes:
        whole = False
        yield Damage(key=key, shard=shard, problem=f"the data file must have {size_bytes} bytes, got {len(content)}")
    first_block, _ = tables.blocks_in(shard)
    for block, expected in enumerate(crcs.tolist(), first_block):
        start, end = tables.byte_range(shard, block)
        if end > len(content):
            problem = "bytes are missing"
        elif (got := crc32c(content[start:end])) != expected:
            problem = f"bytes must have CRC32C {expected:#010x}, got {got:#010x}"
        else:
            continue
        whole = False
        yield Damage(key=key, shard=shard, block=block, start=start, end=end, problem=problem)
    if whole and files is not None:
        problems = _check_file(tables, files, shard, content, lengths)
        yield from (Damage(key=key, shard=shard, problem=problem) for problem in problems)


def _check_file(
    tables: Tables, files: ShardFiles, shard: int, content: memoryview, lengths: NDArray[np.uint32]
) -> Iterator[str]:
    """What is wrong beside the tokens."""
    found, expected = hashlib.sha256(content).hexdigest(), files.sha256[shard].tobytes().hex()
    if found != expected:
        yield f"the data file must have SHA-256 {expected}, got {found}"
        return
    table = read_arrow(content, shard_schema(tables.manifest.dtype), tables.store.place(shard_key(shard)))
    rows: Any = table.column("input_ids").chunk(0)
    start = rows.values.buffers()[1].address - pa.py_buffer(content).address
    if start != tables.shards.tokens_start[shard]:
        yield f"tokens must start at byte {tables.shards.tokens_start[shard]}, got {start}"
    goes_on = shard + 1 < tables.manifest.shards and bool(files.continued[shard + 1])
    continued = int(files.continued[shard])
    continues = table.column("continues").to_numpy()
    stored = np.diff(rows.offsets.to_numpy())
    if len(stored) != len(lengths) + continued:
        yield f"the file must have {len(lengths) + continued} rows, got {len(stored)}"
    elif continues[:-1].any() or bool(continues[-1]) != goes_on:
        yield "continues must mark the last row exactly if its document goes on in the next file"
    elif (stored[continued : len(stored) - goes_on] != lengths[: len(lengths) - goes_on]).any():
        yield "rows must be as long as lengths.arrow says"
