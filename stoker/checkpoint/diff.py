"""What differs between two committed steps: tensors, their bytes, plain values. Needs no torch.

Bytes are compared by the checksums of the two manifests wherever blocks hold the same part of a tensor, as they do if both
steps were saved in the same layout; only blocks that several tensors share, and tensors that were cut or placed
differently, are read. Two different blocks have the same CRC32C once in 2**32.
"""

import json
import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..storage.store import ObjectStore
from ..storage.urls import open_store
from .log import CheckpointLog, step_directory
from .manifest import CRC_BLOCK_BYTES, BlobInfo, TensorInfo, WrittenChunk
from .reader import Span, StepReader, read_manifest, resolve_step

__all__ = ["DiffReport", "TensorChange", "ValueChange", "diff"]

_WINDOW_BYTES = 8 << 20
"""One read of what has no comparable checksums: neighbours in a file are neighbours in a tree, so it serves many tensors."""
_WINDOWS = 4
_MAX_SHOWN = 200


@dataclass(frozen=True, kw_only=True)
class TensorChange:
    """A tensor whose dtype or shape differs: ``float32[2, 3]`` in the one step, another in the other."""

    name: str
    a: str
    b: str


@dataclass(frozen=True, kw_only=True)
class ValueChange:
    """A plain value that differs, as JSON, shortened; None in the step that has none at `path`."""

    path: str
    a: str | None
    b: str | None


@dataclass(frozen=True, kw_only=True)
class DiffReport:
    """What differs between steps `a` and `b`; all names sorted.

    Attributes:
        url: the root.
        a, b: the steps.
        only_a, only_b: tensors that the other step does not have.
        other_shape: tensors of another dtype or shape.
        other_bytes: tensors of the same dtype and shape whose bytes differ.
        values: plain values.
        num_tensors: in both steps.
        num_bytes_read: from blobs; 0 if checksums said it all.
    """

    url: str
    a: int
    b: int
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    other_shape: tuple[TensorChange, ...]
    other_bytes: tuple[str, ...]
    values: tuple[ValueChange, ...]
    num_tensors: int
    num_bytes_read: int

    @property
    def same(self) -> bool:
        """Whether nothing differs."""
        return not (self.only_a or self.only_b or self.other_shape or self.other_bytes or self.values)

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"ok": self.same, **asdict(self)}


def diff(
    url: str | os.PathLike[str],
    a: int,
    b: int,
    *,
    storage_options: Mapping[str, Any] | None = None,
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> DiffReport:
    """Compare two committed steps under a root. World size and sharding do not count, only what they add up to.

    Args:
        on_read: gets the bytes of each read from blobs.

    Raises:
        NoCheckpoint: one of the steps is not committed.
        CorruptBlock, CorruptRecord: what had to be read is damaged. ``verify`` looks at the rest.
    """
    with open_store(os.fspath(url), **(storage_options or {})) as store:
        one, other = _Side(store, a, on_read), _Side(store, b, on_read)
        names, others = set(one.manifest.tensor_names), set(other.manifest.tensor_names)
        both = sorted(names & others)
        other_shape = [
            TensorChange(name=name, a=mine, b=theirs)
            for name in both
            if (mine := _described(one.manifest.tensor(name))) != (theirs := _described(other.manifest.tensor(name)))
        ]
        comparable = [name for name in both if name not in {change.name for change in other_shape}]
        return DiffReport(
            url=store.url,
            a=a,
            b=b,
            only_a=tuple(sorted(names - others)),
            only_b=tuple(sorted(others - names)),
            other_shape=tuple(other_shape),
            other_bytes=tuple(sorted(_Bytes(one, other).differing(comparable))),
            values=tuple(_value_changes(one, other)),
            num_tensors=len(both),
            num_bytes_read=one.num_bytes_read + other.num_bytes_read,
        )


def _described(info: TensorInfo) -> str:
    return f"{info.dtype}{list(info.global_shape)}"


class _Side:
    """One of the two steps."""

    def __init__(self, store: ObjectStore, step: int, on_read: Callable[[int], None]) -> None:
        _, live, _ = resolve_step(CheckpointLog(store), step, store.url)
        directory = step_directory(step, live.nonce)
        self.manifest = read_manifest(store, directory, live)
        self.reader = StepReader(store, directory, self.manifest)
        self.num_bytes_read = 0
        self._on_read = on_read
        self._window = lru_cache(maxsize=_WINDOWS)(self._read_window)

    def read(self, path: str, start: int, end: int) -> NDArray[np.uint8]:
        """Bytes of a blob, verified."""
        sink = np.empty(end - start, np.uint8)
        num_bytes = self.reader.read({path: [Span(start=start, sink=sink)]})
        self.num_bytes_read += num_bytes
        self._on_read(num_bytes)
        return sink

    def _read_window(self, path: str, start: int) -> NDArray[np.uint8]:
        return self.read(path, start, min(start + _WINDOW_BYTES, self.manifest.blob(path).size_bytes))

    def near(self, path: str, start: int, end: int) -> NDArray[np.uint8]:
        """The same, with what stands around it kept for the next call."""
        parts = [
            self._window(path, at)[max(0, start - at) : end - at]
            for at in range(start - start % _WINDOW_BYTES, end, _WINDOW_BYTES)
        ]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


# ---------------------------------------------------------------------------------------------------------------- bytes


class _Bytes:
    """Finds the tensors whose bytes differ, with as few reads as there can be."""

    def __init__(self, one: _Side, other: _Side) -> None:
        self._one, self._other = one, other
        self._differ: set[str] = set()
        # Pairs of blocks that hold more than one tensor, or other things, too: (tensor, start, end) in the block.
        self._shared: dict[tuple[str, int, str, int], list[tuple[str, int, int]]] = defaultdict(list)

    def differing(self, names: Sequence[str]) -> set[str]:
        unaligned: list[str] = []
        for name in names:
            mine, theirs = self._one.manifest.chunks_of(name), self._other.manifest.chunks_of(name)
            if self._same_places(mine, theirs):
                for a, b in zip(mine, theirs, strict=True):
                    self._by_checksum(a, b)
            else:
                unaligned.append(name)
        for pair, parts in sorted(self._shared.items()):
            self._by_block(pair, [part for part in parts if part[0] not in self._differ])
        for name in unaligned:
            if not self._equal(self._one.manifest.chunks_of(name), self._other.manifest.chunks_of(name)):
                self._differ.add(name)
        return self._differ

    @staticmethod
    def _same_places(mine: Sequence[WrittenChunk], theirs: Sequence[WrittenChunk]) -> bool:
        """Whether both are cut in the same way, and each chunk lies at the same place of a block."""
        return len(mine) == len(theirs) and all(
            (a.chunk.offsets, a.chunk.shape) == (b.chunk.offsets, b.chunk.shape)
            and (a.byte_offset - b.byte_offset) % CRC_BLOCK_BYTES == 0
            for a, b in zip(mine, theirs, strict=True)
        )

    def _by_checksum(self, a: WrittenChunk, b: WrittenChunk) -> None:
        if not a.byte_length:
            return
        blob, other = self._one.manifest.blob(a.blob), self._other.manifest.blob(b.blob)
        start, end = a.byte_offset, a.byte_offset + a.byte_length
        shift = (b.byte_offset - a.byte_offset) // CRC_BLOCK_BYTES
        first, last = start // CRC_BLOCK_BYTES, (end - 1) // CRC_BLOCK_BYTES
        equal = blob.crcs[first : last + 1] == other.crcs[first + shift : last + shift + 1]
        for i in (first + np.flatnonzero(~equal)).tolist():
            at = i * CRC_BLOCK_BYTES
            low, high = max(start - at, 0), min(end - at, CRC_BLOCK_BYTES)
            if high - low == _length(blob, i) == _length(other, i + shift):
                self._differ.add(a.chunk.name)
                return
            self._shared[a.blob, i, b.blob, i + shift].append((a.chunk.name, low, high))

    def _by_block(self, pair: tuple[str, int, str, int], parts: Sequence[tuple[str, int, int]]) -> None:
        if not parts:
            return
        blocks = []
        for side, path, i in ((self._one, *pair[:2]), (self._other, *pair[2:])):
            at = i * CRC_BLOCK_BYTES
            blocks.append(side.read(path, at, at + _length(side.manifest.blob(path), i)))
        for name, low, high in parts:
            if not np.array_equal(blocks[0][low:high], blocks[1][low:high]):
                self._differ.add(name)

    def _equal(self, mine: Sequence[WrittenChunk], theirs: Sequence[WrittenChunk]) -> bool:
        """Compare tensors that are cut or placed differently, box by box where chunks overlap."""
        if not (mine and theirs):  # no chunks: no elements
            return True
        starts = np.array([_extended(b.chunk.offsets, 0) for b in theirs])
        ends = starts + np.array([_extended(b.chunk.shape, 1) for b in theirs])
        for a in mine:
            start = np.array(_extended(a.chunk.offsets, 0))
            end = start + np.array(_extended(a.chunk.shape, 1))
            for k in np.flatnonzero((np.maximum(starts, start) < np.minimum(ends, end)).all(axis=1)).tolist():
                if not all(
                    np.array_equal(x, y)
                    for x, y in self._overlap(a, theirs[k], np.maximum(starts[k], start), np.minimum(ends[k], end))
                ):
                    return False
        return True

    def _overlap(
        self, a: WrittenChunk, b: WrittenChunk, start: NDArray[np.int64], end: NDArray[np.int64]
    ) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
        """The bytes that both chunks have of the box ``[start, end)``, some rows at a time."""
        itemsize = a.byte_length // prod(a.chunk.shape)
        rows = max(1, _WINDOW_BYTES // max(_row_bytes(a, itemsize), _row_bytes(b, itemsize)))
        for row in range(int(start[0]), int(end[0]), rows):
            box = [(row, min(row + rows, int(end[0]))), *zip(start[1:].tolist(), end[1:].tolist(), strict=True)]
            yield _rows(self._one, a, itemsize, box), _rows(self._other, b, itemsize, box)


def _length(blob: BlobInfo, block: int) -> int:
    return min(CRC_BLOCK_BYTES, blob.size_bytes - block * CRC_BLOCK_BYTES)


def _extended(extents: tuple[int, ...], scalar: int) -> tuple[int, ...]:
    """A scalar's as those of a vector of one."""
    return extents or (scalar,)


def _row_bytes(one: WrittenChunk, itemsize: int) -> int:
    return prod(one.chunk.shape[1:]) * itemsize


def _rows(side: _Side, one: WrittenChunk, itemsize: int, box: Sequence[tuple[int, int]]) -> NDArray[np.uint8]:
    """The part of a chunk that lies in a box of its tensor; all of its rows are read."""
    (first, last), *rest = box
    offsets, shape = _extended(one.chunk.offsets, 0), _extended(one.chunk.shape, 1)
    row_bytes = _row_bytes(one, itemsize)
    at = one.byte_offset + (first - offsets[0]) * row_bytes
    data = side.near(one.blob, at, at + (last - first) * row_bytes).reshape(last - first, *shape[1:], itemsize)
    return data[(slice(None), *(slice(s - o, e - o) for (s, e), o in zip(rest, offsets[1:], strict=True)))]


# --------------------------------------------------------------------------------------------------------------- values


def _value_changes(one: _Side, other: _Side) -> Iterator[ValueChange]:
    """Documents whose SHA-256 differs are read and compared as JSON."""
    mine, theirs = one.manifest.states, other.manifest.states
    for path in sorted(mine.keys() | theirs.keys()):
        name = path.removeprefix("state/").removesuffix(".json")
        if path not in mine or path not in theirs:
            yield ValueChange(path=name, a="saved" if path in mine else None, b="saved" if path in theirs else None)
        elif mine[path].sha256 != theirs[path].sha256:
            told = set(one.manifest.tensor_names) ^ set(other.manifest.tensor_names)
            a, b = (_with_tensors(json.loads(side.reader.read_state(path))["value"], told) for side in (one, other))
            for part in ("value", "kind", "tensors"):
                yield from _walk(a[part], b[part], name if part == "value" else f"{name} ({part})")


_ABSENT: Any = object()


def _with_tensors(document: dict[str, Any], told: set[str]) -> dict[str, Any]:
    """A document with ``{"$tensor": name}`` in place of the nulls that it lists.

    Those of `told` are taken out: that only one step has them is said already.
    """
    rest = []
    for path, name in document["tensors"]:
        owner = document["value"]
        for key in path[:-1]:
            owner = _child(owner, key)
        if (
            not path or _child(owner, path[-1]) is not None
        ):  # of a kind that JSON has no place for, as a key that is no text
            rest.append([path, name])
        elif name in told and isinstance(owner, dict):
            del owner[path[-1]]
        else:
            owner[path[-1]] = {"$tensor": name}
    return {**document, "tensors": [entry for entry in rest if entry[1] not in told]}


def _child(owner: Any, key: Any) -> Any:
    """What `owner` has at `key`, or ``_ABSENT``."""
    if isinstance(owner, dict) and isinstance(key, str):
        return owner.get(key, _ABSENT)
    if isinstance(owner, list) and isinstance(key, int) and key < len(owner):
        return owner[key]
    return _ABSENT


def _walk(a: Any, b: Any, path: str) -> Iterator[ValueChange]:
    if isinstance(a, dict) and isinstance(b, dict) and not any(key.startswith("$") for key in (*a, *b)):
        for key in dict.fromkeys((*a, *b)):
            yield from _walk(a.get(key, _ABSENT), b.get(key, _ABSENT), f"{path}.{key}")
    elif isinstance(a, list) and isinstance(b, list):
        for i, (x, y) in enumerate(zip_longest(a, b, fillvalue=_ABSENT)):
            yield from _walk(x, y, f"{path}[{i}]")
    elif a is _ABSENT or b is _ABSENT or json.dumps(a) != json.dumps(b):  # in Python, 1 == True == 1.0
        yield ValueChange(path=path, a=_shown(a), b=_shown(b))


def _shown(value: Any) -> str | None:
    if value is _ABSENT:
        return None
    text = json.dumps(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."
