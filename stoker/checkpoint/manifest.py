"""Which bytes make up which tensor: the fragment of each rank, and the manifest of a step that they are merged into.

Everything that grows with the number of chunks is columnar, here and in the files (:mod:`stoker.checkpoint._arrow`): a
million chunks merge, and are checked to cover every tensor exactly, in about a second, where a million Python objects
would take twenty.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any, NamedTuple, NoReturn, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import ConfigError, CorruptRecord, FormatError, SaveFailed, TreeMismatch
from ..storage._units import Buffer
from ._arrow import columns_of, read_row, write_row
from ._columns import (
    BLOBS_TYPE,
    CHUNKS_TYPE,
    CRC_BLOCK_BYTES,
    HELD_TYPE,
    ORIGINS_TYPE,
    STATES_TYPE,
    TENSORS_TYPE,
    BlobInfo,
    Boxes,
    Spans,
    StateInfo,
    TensorInfo,
    Tensors,
    WrittenChunk,
    blob_path,
    blobs_row,
    check_order,
    chunk_objects,
    chunks_row,
    held_row,
    ints,
    matrix_of_tuples,
    origins_row,
    read_blobs,
    read_boxes,
    read_origins,
    read_spans,
    read_states,
    read_tensors,
    states_row,
    tensors_row,
    widen,
    writer_of,
    written_objects,
    wrong_span,
)
from ._cover import Ints, first_wrong_region, sort_order, uncovered_tensor
from .blob import Chunk

__all__ = [
    "CRC_BLOCK_BYTES",
    "VERSION",
    "BlobInfo",
    "Columns",
    "Fragment",
    "Manifest",
    "StateInfo",
    "TensorInfo",
    "WrittenChunk",
    "blob_path",
    "merge",
]

VERSION = 1
"""Major version of fragments and manifests; a reader refuses any other by name."""
_EXACTLY_ONCE = "every element of a tensor must be written exactly once"

_FRAGMENT_TYPES: dict[str, Any] = {
    "rank": pa.int32(),
    "world_size": pa.int32(),
    "host": pa.string(),
    "plan_hash": pa.string(),
    "tensors": TENSORS_TYPE,
    "held": HELD_TYPE,
    "written": CHUNKS_TYPE,
    "blobs": BLOBS_TYPE,
    "states": STATES_TYPE,
}
_MANIFEST_TYPES: dict[str, Any] = {
    "world_size": pa.int32(),
    "tensors": TENSORS_TYPE,
    "chunks": CHUNKS_TYPE,
    "blobs": BLOBS_TYPE,
    "states": STATES_TYPE,
}
_OPTIONAL_TYPES: dict[str, Any] = {"origins": ORIGINS_TYPE}


def _optional_columns(blobs: Sequence[BlobInfo]) -> dict[str, Any]:
    origins = origins_row(blobs)
    return {} if origins is None else {"origins": origins}


class Fragment:
    """What one rank holds and wrote in one attempt; immutable.

    Args:
        rank, world_size, host: who wrote it; the host is for messages.
        plan_hash: ranks that give one must all give the same; empty where ranks may save different trees.
        held: chunks that this rank has in memory, written by it or by a replica.
        written: the chunks that it wrote.
        blobs: the files that it wrote.
        states: the documents that it wrote.

    Raises:
        ConfigError: a chunk in no blob of the fragment, a blob twice, or one tensor with two dtypes or shapes.
    """

    rank: int
    world_size: int
    host: str
    plan_hash: str
    blobs: tuple[BlobInfo, ...]
    states: tuple[StateInfo, ...]

    def __init__(
        self,
        *,
        rank: int,
        world_size: int,
        host: str,
        plan_hash: str,
        held: Sequence[Chunk],
        written: Sequence[WrittenChunk],
        blobs: Sequence[BlobInfo],
        states: Sequence[StateInfo] = (),
    ) -> None:
        self.rank, self.world_size, self.host, self.plan_hash = rank, world_size, host, plan_hash
        self.blobs, self.states = tuple(blobs), tuple(states)
        tensors: dict[str, tuple[int, Chunk]] = {}
        place = f"fragment of rank {rank}"
        chunks = [*held, *(one.chunk for one in written)]
        for chunk in chunks:
            _, first = tensors.setdefault(chunk.name, (len(tensors), chunk))
            if (first.dtype, first.global_shape) != (chunk.dtype, chunk.global_shape):
                raise ConfigError("a tensor has one dtype and one shape", value=chunk.name, place=place)
        blob_index = {blob.path: i for i, blob in enumerate(self.blobs)}
        if len(blob_index) != len(self.blobs):
            raise ConfigError("each blob has a path of its own", value=len(self.blobs), place=place)
        unknown = next((one for one in written if one.blob not in blob_index), None)
        if unknown is not None:
            raise ConfigError(
                "a chunk must be in one of the blobs", value=unknown.blob, place=f"{place}: {unknown.chunk.name}"
            )
        firsts = [chunk for _, chunk in tensors.values()]
        width = max((len(chunk.global_shape) for chunk in firsts), default=0)
        self._tensors = Tensors(
            names=pa.array(list(tensors), pa.string()),
            dtypes=pa.array([chunk.dtype for chunk in firsts], pa.string()),
            ndim=ints([len(chunk.global_shape) for chunk in firsts]),
            shape=matrix_of_tuples([chunk.global_shape for chunk in firsts], width, 1),
        )
        boxes = [
            Boxes(
                tensor=ints([tensors[chunk.name][0] for chunk in part]),
                offsets=matrix_of_tuples([chunk.offsets for chunk in part], width, 0),
                shape=matrix_of_tuples([chunk.shape for chunk in part], width, 1),
            )
            for part in (chunks[: len(held)], chunks[len(held) :])
        ]
        self._held, self._written = boxes
        self._spans = Spans(
            blob=ints([blob_index[one.blob] for one in written]),
            byte_offset=ints([one.byte_offset for one in written]),
            byte_length=ints([one.byte_length for one in written]),
        )

    @property
    def held(self) -> list[Chunk]:
        """Chunks that the rank has in memory, as Python objects."""
        return chunk_objects(self._tensors, self._held, range(len(self._held)))

    @property
    def written(self) -> list[WrittenChunk]:
        """Chunks that the rank wrote, as Python objects."""
        rows = range(len(self._written))
        return written_objects(self._tensors, self._written, self._spans, self.blobs, rows)

    def with_origins(self, origins: Mapping[str, BlobInfo]) -> Self:
        """The same with SHA-256 and home of some blobs, by path."""
        return self.of_columns(
            rank=self.rank,
            world_size=self.world_size,
            host=self.host,
            plan_hash=self.plan_hash,
            tensors=self._tensors,
            held=self._held,
            written=self._written,
            spans=self._spans,
            blobs=[origins.get(blob.path, blob) for blob in self.blobs],
            states=self.states,
        )

    def to_bytes(self) -> bytes:
        """The file ``frag/{rank:05d}.arrow``."""
        return write_row(
            {
                "rank": pa.array([self.rank], pa.int32()),
                "world_size": pa.array([self.world_size], pa.int32()),
                "host": pa.array([self.host], pa.string()),
                "plan_hash": pa.array([self.plan_hash], pa.string()),
                "tensors": tensors_row(self._tensors),
                "held": held_row(self._tensors, self._held),
                "written": chunks_row(self._tensors, self._written, self._spans),
                "blobs": blobs_row(self.blobs),
                "states": states_row(self.states),
                **_optional_columns(self.blobs),
            },
            kind="stoker.fragment",
            version=VERSION,
            compression="lz4",  # read once, by the rank that merges hundreds of them
        )

    @classmethod
    def from_bytes(cls, data: Buffer, *, place: str) -> Self:
        """Read a fragment back.

        Raises:
            CorruptRecord: not the bytes that were written.
            FormatError: something else, or a path out of the directory (UnsafeName).
            UnknownVersion: written by a newer major version.
        """
        row = read_row(
            data,
            kind="stoker.fragment",
            version=VERSION,
            types=_FRAGMENT_TYPES,
            optional=_OPTIONAL_TYPES,
            place=place,
        )
        tensors = read_tensors(row["tensors"], place)
        blobs = read_origins(row.get("origins"), read_blobs(row["blobs"], place), place)
        held = read_boxes(columns_of(row["held"], place), tensors, place)
        columns = columns_of(row["written"], place)
        written = read_boxes(columns, tensors, place)
        return cls.of_columns(
            rank=row["rank"][0].as_py(),
            world_size=row["world_size"][0].as_py(),
            host=row["host"][0].as_py(),
            plan_hash=row["plan_hash"][0].as_py(),
            tensors=tensors,
            # The rule where nothing is replicated: no need to keep it twice.
            held=written if held.equals(written) else held,
            written=written,
            spans=read_spans(columns, blobs, place),
            blobs=blobs,
            states=read_states(row["states"], place),
        )

    @classmethod
    def of_columns(
        cls,
        *,
        rank: int,
        world_size: int,
        host: str,
        plan_hash: str,
        tensors: Tensors,
        held: Boxes,
        written: Boxes,
        spans: Spans,
        blobs: Iterable[BlobInfo],
        states: Iterable[StateInfo] = (),
    ) -> Self:
        """A fragment from tables, which it keeps; `spans` says where each of `written` is. Nothing is checked."""
        self = cls.__new__(cls)
        self.rank, self.world_size, self.host, self.plan_hash = rank, world_size, host, plan_hash
        self.blobs, self.states = tuple(blobs), tuple(states)
        self._tensors, self._held, self._written, self._spans = tensors, held, written, spans
        return self


class Columns(NamedTuple):
    """Chunks ordered by tensor: those of tensor `i` are the rows ``[starts[i], starts[i + 1])``.

    Attributes:
        boxes: offsets and shape, (n, D), filled up with 0 and 1 beyond a tensor's own dimensions.
        spans: where the bytes are; `blob` counts :attr:`Manifest.blobs` in order.
        starts: (tensors + 1,).
    """

    boxes: Boxes
    spans: Spans
    starts: Ints


class Manifest:
    """The tensors of a step, and where each chunk of them is; immutable. Made by :func:`merge` and :meth:`from_bytes`.

    Attributes:
        world_size: of the job that saved it.
        blobs: by path.
        states: by path.
    """

    world_size: int
    blobs: Mapping[str, BlobInfo]
    states: Mapping[str, StateInfo]

    # Chunks are ordered by tensor, tensors by name, so that equal steps have equal manifests and a tensor's chunks are
    # one slice.
    _tensors: Tensors
    _boxes: Boxes
    _spans: Spans
    _bytes: bytes | None

    @classmethod
    def _make(
        cls,
        *,
        world_size: int,
        tensors: Tensors,
        boxes: Boxes,
        spans: Spans,
        blobs: Iterable[BlobInfo],
        states: Iterable[StateInfo],
        data: bytes | None,
    ) -> Self:
        self = cls.__new__(cls)
        self.world_size = world_size
        self.blobs = MappingProxyType({blob.path: blob for blob in blobs})
        self.states = MappingProxyType({state.path: state for state in states})
        self._tensors, self._boxes, self._spans, self._bytes = tensors, boxes, spans, data
        return self

    @cached_property
    def tensor_names(self) -> Sequence[str]:
        """Names of all tensors, sorted."""
        return tuple(self._tensors.names.to_pylist())

    @cached_property
    def _index(self) -> dict[str, int]:
        return {name: i for i, name in enumerate(self.tensor_names)}

    @cached_property
    def _starts(self) -> Ints:
        return np.searchsorted(self._boxes.tensor, np.arange(len(self._tensors.ndim) + 1))

    @cached_property
    def _blob_list(self) -> tuple[BlobInfo, ...]:
        return tuple(self.blobs.values())

    @property
    def columns(self) -> "Columns":
        """The chunks as columns; not to be changed."""
        return Columns(boxes=self._boxes, spans=self._spans, starts=self._starts)

    @property
    def num_chunks(self) -> int:
        """Chunks of all tensors."""
        return len(self._boxes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, without headers and pads."""
        return int(self._spans.byte_length.sum())

    def __contains__(self, name: object) -> bool:
        return name in self._index

    def index_of(self, name: str) -> int:
        """A tensor's place in :attr:`tensor_names`. Raises TreeMismatch."""
        if name not in self._index:
            raise TreeMismatch("no tensor of that name in the checkpoint", value=name, place="manifest")
        return self._index[name]

    def tensor(self, name: str) -> TensorInfo:
        """Dtype and shape of a tensor.

        Raises:
            TreeMismatch: there is none of that name; ``name in manifest`` asks first.
        """
        return self._tensors.info(self.index_of(name))

    def chunks_of(self, name: str) -> list[WrittenChunk]:
        """A tensor's chunks by offsets; together they are the tensor, each element once. Raises TreeMismatch."""
        i = self.index_of(name)
        rows = range(int(self._starts[i]), int(self._starts[i + 1]))
        return written_objects(self._tensors, self._boxes, self._spans, self._blob_list, rows)

    def blob(self, path: str) -> BlobInfo:
        """A blob by its path. Raises FormatError if the step has none of that path."""
        try:
            return self.blobs[path]
        except KeyError:
            raise FormatError("no blob of that path in the checkpoint", value=path, place="manifest") from None

    @property
    def refs(self) -> dict[str, tuple[str, ...]]:
        """Paths of the blobs that lie in other step directories, by directory: what the log holds of them."""
        refs: dict[str, tuple[str, ...]] = {}
        for blob in self.blobs.values():
            if blob.home:
                refs[blob.home] = (*refs.get(blob.home, ()), blob.path)
        return refs

    def to_bytes(self) -> bytes:
        """The file ``manifest.arrow``. Made once: later calls return the same bytes."""
        if self._bytes is None:
            self._bytes = write_row(
                {
                    "world_size": pa.array([self.world_size], pa.int32()),
                    "tensors": tensors_row(self._tensors),
                    "chunks": chunks_row(self._tensors, self._boxes, self._spans),
                    "blobs": blobs_row(self._blob_list),
                    "states": states_row(list(self.states.values())),
                    **_optional_columns(self._blob_list),
                },
                kind="stoker.manifest",
                version=VERSION,
                compression="zstd",  # read by every rank of every restore
            )
        return self._bytes

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of :meth:`to_bytes`, 64 hexadecimal digits: what the log holds of a step."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @classmethod
    def from_bytes(cls, data: Buffer, *, place: str, sha256: str | None = None) -> Self:
        """Read a manifest back and check it, with the digest of the log's record if `sha256` gives it.

        Raises:
            CorruptRecord: not the bytes that were written, or not those that were committed.
            FormatError: something else, or a path out of the directory (UnsafeName).
            UnknownVersion: written by a newer major version.
        """
        data = bytes(data)
        if sha256 is not None and (found := hashlib.sha256(data).hexdigest()) != sha256:
            raise CorruptRecord(
                f"the manifest must have the SHA-256 {sha256} that was committed",
                value=found,
                place=place,
                hint="the stored object is damaged: restore it from its source, or restore another step by name",
            )
        row = read_row(
            data,
            kind="stoker.manifest",
            version=VERSION,
            types=_MANIFEST_TYPES,
            optional=_OPTIONAL_TYPES,
            place=place,
        )
        tensors = read_tensors(row["tensors"], place)
        blobs = read_origins(row.get("origins"), read_blobs(row["blobs"], place), place)
        chunks = columns_of(row["chunks"], place)
        boxes = read_boxes(chunks, tensors, place)
        check_order(boxes.tensor, tensors, place)
        spans = read_spans(chunks, blobs, place)
        wrong = wrong_span(tensors, boxes, spans, blobs)
        if wrong is not None:
            row_number, rule = wrong
            raise FormatError(rule, value=tensors.info(int(boxes.tensor[row_number])).name, place=place)
        uncovered = uncovered_tensor(tensors.shape, boxes.tensor, boxes.offsets, boxes.shape)
        if uncovered is not None:
            raise FormatError(_EXACTLY_ONCE, value=tensors.info(uncovered).name, place=place)
        return cls._make(
            world_size=row["world_size"][0].as_py(),
            tensors=tensors,
            boxes=boxes,
            spans=spans,
            blobs=blobs,
            states=read_states(row["states"], place),
            data=data,
        )


def merge(fragments: Sequence[Fragment], *, world_size: int, place: str) -> Manifest:
    """One manifest from the fragments of all ranks, in any order.

    Checked: every rank has one fragment and wrote under its own name; ranks that give a plan hash give the same; all
    agree on dtype and shape of each tensor; each chunk has its bytes to itself inside a blob; and **every element of
    every tensor was written exactly once**, whatever the layout of the chunks. Any number of dimensions, empty chunks
    and tensors, and replicas are allowed. The result does not depend on the order of `fragments`.

    One million chunks of 512 ranks take half a second on one core and 160 MB beside the fragments' own 150 MB.

    Raises:
        SaveFailed: one of these does not hold; it names the ranks, hosts and the tensor.
    """
    fragments = sorted(fragments, key=lambda fragment: fragment.rank)
    _check_ranks(fragments, world_size, place)
    tensors, codes = _unite_tensors(fragments, place)
    blobs = _unite_blobs(fragments, place)
    boxes, spans = _unite_chunks(fragments, codes, tensors.shape.shape[1])
    wrong = wrong_span(tensors, boxes, spans, blobs)
    if wrong is not None:
        row, rule = wrong
        path = blobs[int(spans.blob[row])].path
        _fail(rule, f"{place}: {path}: {tensors.info(int(boxes.tensor[row])).name}", [writer_of(path)], fragments)
    uncovered = uncovered_tensor(tensors.shape, boxes.tensor, boxes.offsets, boxes.shape)
    if uncovered is not None:
        _fail_cover(uncovered, tensors, boxes, spans, blobs, fragments, codes, place)
    return Manifest._make(
        world_size=world_size,
        tensors=tensors,
        boxes=boxes,
        spans=spans,
        blobs=blobs,
        states=_unite_states(fragments, place),
        data=None,
    )


def _fail(rule: str, place: str, ranks: Iterable[int], fragments: Sequence[Fragment], *, value: str = "") -> NoReturn:
    hosts = {fragment.rank: fragment.host for fragment in fragments}
    named = [f"{rank} ({hosts[rank]})" if hosts.get(rank) else str(rank) for rank in sorted(set(ranks))]
    if named:
        value += f" rank {_few(named)}"
    raise SaveFailed(rule, value=value.strip(), place=place, hint="older steps are as they were; save again")


def _few(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:20])) + (", ..." if len(names) > 20 else "")


def _check_ranks(fragments: Sequence[Fragment], world_size: int, place: str) -> None:
    ranks = [fragment.rank for fragment in fragments]
    missing = sorted(set(range(max(1, world_size))) - set(ranks))
    if missing:
        raise SaveFailed(
            f"every rank of {world_size} must deliver its fragment",
            value=f"none from rank {_few(missing)}",
            place=place,
        )
    if len(ranks) != world_size:
        _fail(f"exactly {world_size} ranks deliver a fragment each", place, ranks, (), value=f"{len(ranks)}:")
    for fragment in fragments:
        if fragment.world_size != world_size:
            _fail(
                f"all ranks must agree on the world size {world_size}",
                place,
                [fragment.rank],
                fragments,
                value=f"{fragment.world_size} from",
            )
    hashed = [fragment for fragment in fragments if fragment.plan_hash]
    for fragment in hashed:
        if fragment.plan_hash != hashed[0].plan_hash:
            _fail(
                "all ranks must save the same tree",
                place,
                [hashed[0].rank, fragment.rank],
                fragments,
                value="different plan hashes from",
            )


def _unite_tensors(fragments: Sequence[Fragment], place: str) -> tuple[Tensors, list[Ints]]:
    """All tensors, by name, and for each fragment the place of its own tensors among them."""
    # Most ranks name the same tensors in the same order: what is equal is looked at once.
    distinct: list[Tensors] = []
    owners: list[Fragment] = []
    which: list[int] = []
    for fragment in fragments:
        if not distinct or not distinct[-1].equals(fragment._tensors):
            distinct.append(fragment._tensors)
            owners.append(fragment)
        which.append(len(distinct) - 1)
    width = max(tensors.shape.shape[1] for tensors in distinct)
    names = pa.concat_arrays([tensors.names for tensors in distinct]).dictionary_encode()
    dtypes = pa.concat_arrays([tensors.dtypes for tensors in distinct])
    ndim = np.concatenate([tensors.ndim for tensors in distinct])
    shape = np.concatenate([widen(tensors.shape, width, 1) for tensors in distinct])
    by_name = pc.sort_indices(names.dictionary)
    position = np.empty(len(by_name), np.int64)
    position[by_name.to_numpy()] = np.arange(len(by_name))
    codes = position[names.indices.to_numpy()]
    first = np.empty(len(by_name), np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]  # of several rows that set one entry, the last one stays
    dtype_codes = dtypes.dictionary_encode().indices.to_numpy()
    same = (dtype_codes == dtype_codes[first[codes]]) & (ndim == ndim[first[codes]])
    same &= (shape == shape[first[codes]]).all(axis=1)
    ends = np.cumsum([len(tensors.ndim) for tensors in distinct])
    if not same.all():
        row = int(np.argmin(same))
        ranks = [owners[int(np.searchsorted(ends, at, side="right"))].rank for at in (first[codes[row]], row)]
        name = names.dictionary[int(by_name[int(codes[row])].as_py())].as_py()
        _fail("all ranks must agree on a tensor's dtype and shape", f"{place}: {name}", ranks, fragments)
    tensors = Tensors(
        names=names.dictionary.take(by_name), dtypes=dtypes.take(pa.array(first)), ndim=ndim[first], shape=shape[first]
    )
    parts = np.split(codes, ends[:-1])
    return tensors, [parts[i] for i in which]


def _unite_chunks(fragments: Sequence[Fragment], codes: Sequence[Ints], width: int) -> tuple[Boxes, Spans]:
    """Written chunks of all ranks, by tensor and offsets."""
    parts = [fragment._written for fragment in fragments]
    spans = [fragment._spans for fragment in fragments]
    starts = np.cumsum([0, *(len(fragment.blobs) for fragment in fragments)])
    tensor = np.concatenate([code[part.tensor] for part, code in zip(parts, codes, strict=True)])
    offsets = np.concatenate([widen(part.offsets, width, 0) for part in parts])
    order = sort_order([tensor, *(offsets[:, d] for d in range(width))])
    # One column after the other: at a million chunks each of them is some 10 MB, twice while it is put in order.
    boxes = Boxes(
        tensor=tensor[order],
        offsets=offsets[order],
        shape=np.concatenate([widen(part.shape, width, 1) for part in parts])[order],
    )
    return boxes, Spans(
        blob=np.concatenate([part.blob + start for part, start in zip(spans, starts[:-1], strict=True)])[order],
        byte_offset=np.concatenate([part.byte_offset for part in spans])[order],
        byte_length=np.concatenate([part.byte_length for part in spans])[order],
    )


def _unite_blobs(fragments: Sequence[Fragment], place: str) -> tuple[BlobInfo, ...]:
    for fragment in fragments:
        for blob in fragment.blobs:
            if writer_of(blob.path) != fragment.rank:
                _fail(f"a rank writes under its own name; {blob.path} is another's", place, [fragment.rank], fragments)
    return tuple(blob for fragment in fragments for blob in fragment.blobs)


def _unite_states(fragments: Sequence[Fragment], place: str) -> list[StateInfo]:
    states: dict[str, StateInfo] = {}
    writers: dict[str, int] = {}
    for fragment in fragments:
        for state in fragment.states:
            if state.path in states:
                _fail(
                    f"{state.path} must be written by one rank",
                    place,
                    [writers[state.path], fragment.rank],
                    fragments,
                    value="written by",
                )
            states[state.path], writers[state.path] = state, fragment.rank
    return [states[path] for path in sorted(states)]


def _fail_cover(
    index: int,
    tensors: Tensors,
    boxes: Boxes,
    spans: Spans,
    blobs: Sequence[BlobInfo],
    fragments: Sequence[Fragment],
    codes: Sequence[Ints],
    place: str,
) -> NoReturn:
    """Say where a tensor is written not once, by whom, and who holds what nobody wrote."""
    info = tensors.info(index)
    ndim = len(info.global_shape)
    where = f"{place}: {info.name} {list(info.global_shape)}"
    rows = np.flatnonzero((boxes.tensor == index) & (boxes.shape > 0).all(axis=1))
    low, high = boxes.offsets[rows, :ndim], (boxes.offsets + boxes.shape)[rows, :ndim]
    region = first_wrong_region(low, high, info.global_shape)
    if region is None:
        _fail(
            _EXACTLY_ONCE,
            where,
            (),
            fragments,
            value="chunks that leave gaps, overlap or are cut in too many dimensions",
        )
    text = "[" + ", ".join(f"{start}:{end}" for start, end in region) + "]"
    lows, highs = ints([start for start, _ in region]), ints([end for _, end in region])
    hits = [row for row, a, b in zip(rows, low, high, strict=True) if (a <= lows).all() and (highs <= b).all()]
    if hits:
        writers = [writer_of(blobs[int(spans.blob[row])].path) for row in hits]
        _fail(_EXACTLY_ONCE, where, writers, fragments, value=f"{len(hits)} times {text} from")
    holders = []
    for fragment, code in zip(fragments, codes, strict=True):
        held = fragment._held
        mine = code[held.tensor] == index
        start, end = held.offsets[mine][:, :ndim], (held.offsets + held.shape)[mine][:, :ndim]
        if ((start < highs) & (lows < end)).all(axis=1).any():
            holders.append(fragment.rank)
    if holders:
        _fail(_EXACTLY_ONCE, where, holders, fragments, value=f"nobody wrote {text}, held by")
    _fail(_EXACTLY_ONCE, where, (), fragments, value=f"nobody holds or wrote {text}")
