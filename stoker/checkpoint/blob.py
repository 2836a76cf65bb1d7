"""The image of a blob file: a valid safetensors file whose large payloads start on 4 KiB.

::

    0         length of the JSON, 8 bytes little-endian
    8         JSON, then spaces until a multiple of 4096
    ...       chunks of 1 MiB and more, each on a multiple of 4096, pads between them
    ...       all other chunks, largest element first, packed: each is aligned to its element without a pad
    ...       a pad to a multiple of 4096

Why so: O_DIRECT and reads into place want 4 KiB; safetensors allows no gap, so each pad is a ``U8`` tensor
``__pad__.k``; aligning small chunks too would make 100,000 of 256 bytes grow sixteenfold. safetensors counts offsets from
the end of the header, so the header's own length moves nothing.

``__metadata__`` holds ``DCP_SHARDING_INFO`` (the key that torch's Hugging Face reader looks for: each chunk's offsets in
its tensor, pads included, or that reader dies of a KeyError) and ``stoker`` (format version, and the real dtype of what
safetensors can't name). That reader keys a file's chunks by tensor name, so a file holds one chunk of a tensor at most.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

from ..errors import ConfigError, FormatError, StokerError, UnknownVersion, UnsupportedState
from ..storage._units import Buffer, format_bytes

__all__ = [
    "ALIGN_BYTES",
    "DTYPES",
    "ELSEWHERE_PATH",
    "LARGE_BYTES",
    "MAX_HEADER_BYTES",
    "VERSION",
    "BlobHeader",
    "BlobImage",
    "Chunk",
    "DType",
    "HeaderEntry",
    "Place",
    "elsewhere_image",
    "header_size",
    "plan_blobs",
    "read_header",
]

VERSION = 1
"""Major version of what stoker adds to a safetensors file."""
ALIGN_BYTES = 4096
LARGE_BYTES = 1 << 20
MAX_HEADER_BYTES = 100_000_000
"""safetensors refuses larger headers ("header too large")."""
MAX_NAME_BYTES = 4096

_METADATA, _PAD = "__metadata__", "__pad__."
_ENTRY_BYTES, _DIMENSION_BYTES = 320, 44  # most header text of a chunk and of the pad before it, names left out


class DType(NamedTuple):
    """How a dtype is stored.

    Attributes:
        code: the dtype in the safetensors header.
        itemsize: bytes of one element.
        native: False if safetensors or one of its readers can't name the dtype: it is stored as ``U8``, with one more
            dimension of `itemsize` where that is above one, and its name under ``__metadata__``.
    """

    code: str
    itemsize: int
    native: bool = True


DTYPES: Mapping[str, DType] = MappingProxyType(
    {
        "bool": DType("BOOL", 1),
        "uint8": DType("U8", 1),
        "int8": DType("I8", 1),
        "uint16": DType("U16", 2),
        "int16": DType("I16", 2),
        "uint32": DType("U32", 4),
        "int32": DType("I32", 4),
        "uint64": DType("U64", 8),
        "int64": DType("I64", 8),
        "float16": DType("F16", 2),
        "bfloat16": DType("BF16", 2),
        "float32": DType("F32", 4),
        "float64": DType("F64", 8),
        "complex64": DType("C64", 8),
        "float8_e4m3fn": DType("F8_E4M3", 1),
        "float8_e4m3fnuz": DType("F8_E4M3FNUZ", 1),
        "float8_e5m2": DType("F8_E5M2", 1),
        "float8_e5m2fnuz": DType("F8_E5M2FNUZ", 1),
        # Seen with safetensors 0.8: no code for the complex two, no torch dtype in the reader's table for e8m0fnu, and
        # F4 counts half bytes where torch counts pairs.
        "complex32": DType("U8", 4, native=False),
        "complex128": DType("U8", 16, native=False),
        "float8_e8m0fnu": DType("U8", 1, native=False),
        "float4_e2m1fn_x2": DType("U8", 1, native=False),
    }
)
"""Every dtype that can be saved, under the name that torch gives it (``str(dtype)`` without ``torch.``)."""

_NATIVE = {dtype.code: name for name, dtype in DTYPES.items() if dtype.native}


@dataclass(frozen=True, kw_only=True, slots=True)
class Chunk:
    """One hyper-rectangle of one tensor.

    Attributes:
        name: the tensor's dotted name.
        dtype: a name in :data:`DTYPES`.
        shape: of the chunk; a size may be 0.
        offsets: of the chunk's first element in the tensor.
        global_shape: of the tensor.

    Raises:
        UnsupportedState: no dtype or name that can be saved.
        ConfigError: the chunk does not lie in its tensor.

    >>> Chunk(name="w", dtype="bfloat16", shape=(2, 8), offsets=(4, 0), global_shape=(6, 8)).nbytes
    32
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...]

    def __post_init__(self) -> None:
        check_name(self.name)
        if self.dtype not in DTYPES:
            raise UnsupportedState(
                "a tensor's dtype must be one that can be saved",
                value=self.dtype,
                place=self.name,
                hint="convert it before saving; known are " + ", ".join(DTYPES),
            )
        if not len(self.shape) == len(self.offsets) == len(self.global_shape) or any(
            start < 0 or size < 0 or start + size > whole
            for start, size, whole in zip(self.offsets, self.shape, self.global_shape, strict=False)
        ):
            raise ConfigError(
                f"a chunk must lie inside its tensor of shape {self.global_shape}",
                value=f"shape {self.shape} at {self.offsets}",
                place=self.name,
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the chunk's elements."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def check_name(name: str) -> None:
    """Raise UnsupportedState unless a tensor of that name can be saved."""
    rule = ""
    if not name:
        rule = "a tensor must have a name"
    elif name == _METADATA or name.startswith(_PAD):
        rule = f"{_METADATA} and names that start with {_PAD} belong to the file format"
    elif not name.isascii() or len(name) > MAX_NAME_BYTES:
        try:
            if len(name.encode("utf-8")) > MAX_NAME_BYTES:
                rule = f"a tensor's name may have {MAX_NAME_BYTES} bytes at most"
        except UnicodeEncodeError:
            rule = "a tensor's name must be valid Unicode"
    if rule:
        raise UnsupportedState(rule, value=name[:200], place="tensor name", hint="rename it")


class Place(NamedTuple):
    """Where a chunk is.

    Attributes:
        chunk_index: index into the sequence of chunks that was planned.
        byte_offset: in the file.
        byte_length: of the chunk.
    """

    chunk_index: int
    byte_offset: int
    byte_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobImage:
    """A file to be written.

    Attributes:
        header: the first bytes of the file, a multiple of 4096.
        size_bytes: of the file, a multiple of 4096.
        places: of the chunks in it, by byte offset; they do not overlap.
        pads: (byte offset, byte length) of the stretches in between, which must be zeros.
        settled: whether it holds only chunks that may well be the same in the next save.
    """

    header: bytes
    size_bytes: int
    places: tuple[Place, ...]
    pads: tuple[tuple[int, int], ...]
    settled: bool = False


def plan_blobs(
    chunks: Sequence[Chunk],
    *,
    settled: Sequence[str] = (),
    max_bytes: int = 8 << 30,
    max_chunks: int = 100_000,
) -> list[BlobImage]:
    """Lay chunks out in files; the same chunks in the same order give the same bytes.

    The n-th chunk of one tensor goes to the n-th group of files, where a group is one file unless its limits make it
    several. A file holds at most `max_bytes` and `max_chunks`, and its header stays below what safetensors accepts; one
    chunk larger than `max_bytes` gets a file of its own.

    `settled` names a group for each chunk that may well be the same in the next save, and is empty for the others. Each
    such group has files of its own, which come first: so what else there is does not move them.

    Pure and independent of torch; about 10 us a chunk.

    Raises:
        UnsupportedState: a chunk's name is too long for any header.
    """
    sizes = [chunk.nbytes for chunk in chunks]
    images = []
    for name, group in _by_occurrence(chunks, settled or [""] * len(chunks)):
        large = [i for i in group if sizes[i] >= LARGE_BYTES]
        small = [i for i in group if sizes[i] < LARGE_BYTES]
        small.sort(key=lambda i: -DTYPES[chunks[i].dtype].itemsize)  # stable: the given order within one size
        for part in _split(chunks, sizes, large + small, max_bytes, max_chunks):
            image = _lay_out(chunks, sizes, part)
            images.append(replace(image, settled=True) if name else image)
    return images


def _by_occurrence(chunks: Sequence[Chunk], settled: Sequence[str]) -> list[tuple[str, list[int]]]:
    """Indices of all first chunks of a tensor, of all second ones, ..., with their group; those without one come last."""
    seen: dict[str, int] = {}
    groups: dict[tuple[str, int], list[int]] = {}
    for i, (chunk, name) in enumerate(zip(chunks, settled, strict=True)):
        nth = seen.get(chunk.name, 0)
        seen[chunk.name] = nth + 1
        groups.setdefault((name, nth), []).append(i)
    return [(name, groups[name, nth]) for name, nth in sorted(groups, key=lambda key: (not key[0], *key))]


def _split(
    chunks: Sequence[Chunk], sizes: Sequence[int], order: list[int], max_bytes: int, max_chunks: int
) -> list[list[int]]:
    parts: list[list[int]] = []
    num_bytes = header_bytes = 0
    for i in order:
        payload = _aligned(sizes[i]) if sizes[i] >= LARGE_BYTES else sizes[i]
        text = _header_bytes(chunks[i])
        full = num_bytes + payload > max_bytes or header_bytes + text > MAX_HEADER_BYTES
        if not parts or full or len(parts[-1]) >= max_chunks:
            parts.append([])
            num_bytes = header_bytes = 2 * ALIGN_BYTES
        parts[-1].append(i)
        num_bytes += payload
        header_bytes += text
    return parts


def _header_bytes(chunk: Chunk) -> int:
    """At most so much of a header is due to one chunk."""
    name = json.dumps(chunk.name)
    # The name is a key once, and once or twice a key of JSON inside a string, where it is escaped again.
    return _ENTRY_BYTES + _DIMENSION_BYTES * (len(chunk.shape) + 1) + len(name) + 2 * len(json.dumps(name))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGN_BYTES) * ALIGN_BYTES


def _lay_out(chunks: Sequence[Chunk], sizes: Sequence[int], order: list[int]) -> BlobImage:
    entries: dict[str, Any] = {}
    sharding: dict[str, Any] = {}
    dtypes: dict[str, str] = {}
    places: list[Place] = []
    pads: list[tuple[int, int]] = []
    end = 0

    def pad() -> None:
        nonlocal end
        start, end = end, _aligned(end)
        if end > start:
            name = f"{_PAD}{len(pads)}"
            entries[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
            sharding[name] = {"saved_offsets": [0]}
            pads.append((start, end - start))

    after_large = False
    for i in order:
        chunk = chunks[i]
        dtype, length = DTYPES[chunk.dtype], sizes[i]
        # The first small chunk is aligned as well, so that all after it are aligned to their elements.
        if length >= LARGE_BYTES or after_large:
            pad()
        after_large = length >= LARGE_BYTES
        shape, offsets = list(chunk.shape), _listed_offsets(chunk)
        if not dtype.native:
            dtypes[chunk.name] = chunk.dtype
            if dtype.itemsize > 1:
                shape, offsets = [*shape, dtype.itemsize], [*offsets, 0]
        entries[chunk.name] = {"dtype": dtype.code, "shape": shape, "data_offsets": [end, end + length]}
        sharding[chunk.name] = {"saved_offsets": offsets}
        places.append(Place(i, end, length))
        end += length
    pad()
    ours = {"version": VERSION, "dtypes": dtypes}
    metadata = {"format": "pt", "DCP_SHARDING_INFO": _compact(sharding), "stoker": _compact(ours)}
    text = _compact({_METADATA: metadata, **entries}).encode("ascii")
    text += b" " * (_aligned(8 + len(text)) - 8 - len(text))
    if len(text) > MAX_HEADER_BYTES:
        raise UnsupportedState(
            f"the header of a file may have {format_bytes(MAX_HEADER_BYTES)} at most",
            value=format_bytes(len(text)),
            place=chunks[order[0]].name,
            hint="shorten the names of the tensors",
        )
    header = struct.pack("<Q", len(text)) + text
    base = len(header)
    return BlobImage(
        header=header,
        size_bytes=base + end,
        places=tuple(Place(i, base + start, length) for i, start, length in places),
        pads=tuple((base + start, length) for start, length in pads),
    )


ELSEWHERE_PATH = "data/elsewhere.safetensors"
"""Beside the files of a step that refers to others, which lie in other directories."""
_ELSEWHERE = "this step refers to files in other directories: load it with stoker"


def elsewhere_image() -> bytes:
    """A valid file, for :data:`ELSEWHERE_PATH`: safetensors finds one empty tensor in it, torch's reader a KeyError.

    >>> list(json.loads(elsewhere_image()[8:]))
    ['__metadata__', 'this step refers to files in other directories: load it with stoker']
    """
    document = {
        _METADATA: {"format": "pt", "DCP_SHARDING_INFO": "{}"},
        _ELSEWHERE: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]},
    }
    text = _compact(document).encode("ascii")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _listed_offsets(chunk: Chunk) -> list[int]:
    """The chunk's offsets; an empty chunk of a tensor that is not empty is listed at the tensor's end.

    torch's reader knows a chunk by its offsets alone: an empty one must not be where another may start.
    """
    return [
        whole if size == 0 else start
        for start, size, whole in zip(chunk.offsets, chunk.shape, chunk.global_shape, strict=True)
    ]


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), check_circular=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class HeaderEntry:
    """What a file's header says of one chunk.

    Attributes:
        dtype: its real dtype, a name in :data:`DTYPES`.
        shape: of the chunk, in elements of that dtype.
        offsets: in its tensor, an empty chunk's at the tensor's end; None in a file that neither stoker nor torch wrote.
        byte_offset: in the file.
        byte_length: of the chunk.
    """

    dtype: str
    shape: tuple[int, ...]
    offsets: tuple[int, ...] | None
    byte_offset: int
    byte_length: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BlobHeader:
    """A file's header, taken apart and checked.

    Attributes:
        header_bytes: where the payloads start.
        size_bytes: of the whole file, as the header implies.
        entries: chunks by tensor name, without the pads.
    """

    header_bytes: int
    size_bytes: int
    entries: Mapping[str, HeaderEntry]


def header_size(prefix: Buffer, *, place: str) -> int:
    """Bytes of the header, its length included, from the first 8 bytes of a file.

    Raises:
        FormatError: the file is shorter, or the header longer than safetensors allows.

    >>> header_size(plan_blobs([Chunk(name="a", dtype="bool", shape=(), offsets=(), global_shape=())])[0].header, place="x")
    4096
    """
    if len(prefix) < 8:
        raise FormatError("a safetensors file has 8 bytes at least", value=len(prefix), place=place)
    length = int(struct.unpack("<Q", bytes(prefix[:8]))[0])
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise FormatError(
            f"a safetensors header has 2 to {MAX_HEADER_BYTES} bytes", value=length, place=place, hint="another format?"
        )
    return 8 + length


def read_header(data: Buffer, *, place: str) -> BlobHeader:
    """Take apart the header of a safetensors file from its first bytes, of which there may be more than the header.

    Every rule of safetensors is checked: unique names, known dtypes, lengths that follow from shapes, no gap and no
    overlap. Files that stoker did not write are read too.

    Raises:
        FormatError: it breaks one of them.
        UnknownVersion: written by a newer major version.
    """
    size = header_size(data, place=place)
    if len(data) < size:
        raise FormatError(f"a header of {size} bytes must be there whole", value=f"{len(data)} bytes", place=place)
    document = _parse(bytes(data[8:size]), place)
    metadata = document.pop(_METADATA, {})
    if not isinstance(metadata, dict):
        raise _bad(f"{_METADATA} must be an object", metadata, place)
    ours: dict[str, Any] = _parse(metadata["stoker"], place) if "stoker" in metadata else {"version": VERSION}
    if ours.get("version") != VERSION:
        raise UnknownVersion(
            f"this version of stoker reads blobs of version {VERSION}",
            value=ours.get("version"),
            place=place,
            hint="update stoker",
        )
    dtypes = ours.get("dtypes", {})
    if not isinstance(dtypes, dict):
        raise _bad("dtypes must be an object", dtypes, place)
    sharding = _parse(metadata["DCP_SHARDING_INFO"], place) if "DCP_SHARDING_INFO" in metadata else None
    entries: dict[str, HeaderEntry] = {}
    spans = []
    for name, body in document.items():
        entry = _entry(name, body, dtypes, sharding, size, f"{place}: {name:.200}")
        spans.append((entry.byte_offset, entry.byte_offset + entry.byte_length))
        if not name.startswith(_PAD):
            entries[name] = entry
    end = size
    for start, stop in sorted(spans):
        if start != end:
            raise _bad(f"payloads must follow each other without gap or overlap; expected one at {end}", start, place)
        end = stop
    return BlobHeader(header_bytes=size, size_bytes=end, entries=MappingProxyType(entries))


def _parse(text: Any, place: str) -> dict[str, Any]:
    try:
        if isinstance(text, bytes):
            text = text.decode()
        document = json.loads(text, object_pairs_hook=_unique)
    except StokerError as error:
        raise _bad(error.rule, error.value, place) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise _bad("the header must be JSON", str(error), place) from error
    if not isinstance(document, dict):
        raise _bad("the header must be a JSON object", type(document).__name__, place)
    return document


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise FormatError("the header must not name a tensor twice", value=f"{len(pairs) - len(result)} duplicates")
    return result


def _bad(rule: str, value: object, place: str) -> FormatError:
    return FormatError(rule, value=str(value)[:200], place=place)


def _entry(
    name: str, body: Any, dtypes: dict[str, Any], sharding: dict[str, Any] | None, base: int, place: str
) -> HeaderEntry:
    if not isinstance(body, dict) or not {"dtype", "shape", "data_offsets"} <= set(body):
        raise _bad("an entry has dtype, shape and data_offsets", body, place)
    shape, span = _sizes(body["shape"], place), _sizes(body["data_offsets"], place)
    offsets = None
    if sharding is not None:
        saved = sharding.get(name)
        if not isinstance(saved, dict) or len(_sizes(saved.get("saved_offsets"), place)) != len(shape):
            raise _bad("each tensor must have its offsets in DCP_SHARDING_INFO", saved, place)
        offsets = tuple(saved["saved_offsets"])
    dtype = dtypes.get(name)
    if dtype is None:
        dtype = _NATIVE.get(body["dtype"]) if isinstance(body["dtype"], str) else None
        if dtype is None:
            raise _bad("a dtype must be one that stoker knows", body["dtype"], place)
    else:
        known = DTYPES.get(dtype) if isinstance(dtype, str) else None
        if known is None or known.native or body["dtype"] != known.code:
            raise _bad("a dtype stored as bytes must be one that stoker knows", dtype, place)
        if known.itemsize > 1:
            if not shape or shape[-1] != known.itemsize:
                raise _bad(f"{dtype} must have a last dimension of {known.itemsize} bytes", shape, place)
            shape, offsets = shape[:-1], None if offsets is None else offsets[:-1]
    length = math.prod(shape) * DTYPES[dtype].itemsize
    if len(span) != 2 or span[1] - span[0] != length:
        raise _bad(f"{dtype} of shape {shape} takes {length} bytes", f"data_offsets {span}", place)
    return HeaderEntry(dtype=dtype, shape=tuple(shape), offsets=offsets, byte_offset=base + span[0], byte_length=length)


def _sizes(value: Any, place: str) -> list[int]:
    if not isinstance(value, list) or any(type(size) is not int or not 0 <= size < 1 << 63 for size in value):
        raise _bad("sizes and offsets must be lists of integers", value, place)
    return value
