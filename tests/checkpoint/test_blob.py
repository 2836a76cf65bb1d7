"""The image of a blob file, read back by the readers that it was made for."""

import json
import struct
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from stoker.checkpoint.blob import (
    ALIGN_BYTES,
    DTYPES,
    LARGE_BYTES,
    BlobImage,
    Chunk,
    header_size,
    plan_blobs,
    read_header,
)
from stoker.errors import ConfigError, FormatError, UnknownVersion, UnsupportedState
from tests.checkpoint.strategies import NATIVE_DTYPES, tensors


def whole(name: str, dtype: str, shape: tuple[int, ...]) -> Chunk:
    return Chunk(name=name, dtype=dtype, shape=shape, offsets=(0,) * len(shape), global_shape=shape)


def elements(chunk: Chunk) -> np.ndarray[Any, Any]:
    """Bytes of the whole tensor that `chunk` is cut from, (*global_shape, itemsize); they depend on its name and shape."""
    shape = (*chunk.global_shape, DTYPES[chunk.dtype].itemsize)
    random = np.random.default_rng([*shape, *chunk.name.encode()])
    return random.integers(0, 2 if chunk.dtype == "bool" else 256, shape).astype(np.uint8)


def full_tensor(chunk: Chunk) -> torch.Tensor:
    tensor = torch.empty(chunk.global_shape, dtype=getattr(torch, chunk.dtype))
    if tensor.numel():
        tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(elements(chunk).reshape(-1)))
    return tensor


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def cut(chunk: Chunk) -> bytes:
    index = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.shape, strict=True))
    return elements(chunk)[index].tobytes()


def render(image: BlobImage, chunks: list[Chunk]) -> bytes:
    """The file: whatever is neither header nor chunk nor pad stays 0xff and would show."""
    data = bytearray(b"\xff" * image.size_bytes)
    data[: len(image.header)] = image.header
    for offset, length in image.pads:
        data[offset : offset + length] = bytes(length)
    for place in image.places:
        data[place.byte_offset : place.byte_offset + place.byte_length] = cut(chunks[place.chunk_index])
    return bytes(data)


def write(directory: Path, chunks: list[Chunk], **limits: Any) -> list[BlobImage]:
    images = plan_blobs(chunks, **limits)
    for n, image in enumerate(images):
        (directory / f"00000-{n}.safetensors").write_bytes(render(image, chunks))
    return images


def check_layout(images: list[BlobImage], chunks: list[Chunk]) -> None:
    """Every rule of the image that does not need a reader."""
    assert sorted(place.chunk_index for image in images for place in image.places) == list(range(len(chunks)))
    nth: Counter[str] = Counter()
    for image in images:
        assert len(image.header) % ALIGN_BYTES == 0 and image.size_bytes % ALIGN_BYTES == 0
        assert struct.unpack("<Q", image.header[:8])[0] == len(image.header) - 8
        spans = [(0, len(image.header)), *image.pads, *((p.byte_offset, p.byte_length) for p in image.places)]
        end = 0
        for start, length in sorted(spans):
            assert start == end
            end = start + length
        assert end == image.size_bytes
        itemsizes: list[int] = []
        for place in image.places:
            chunk = chunks[place.chunk_index]
            assert place.byte_length == chunk.nbytes
            if chunk.nbytes >= LARGE_BYTES:
                assert place.byte_offset % ALIGN_BYTES == 0 and not itemsizes
            else:
                itemsizes.append(DTYPES[chunk.dtype].itemsize)
                assert place.byte_offset % itemsizes[-1] == 0
        assert itemsizes == sorted(itemsizes, reverse=True)
        names = [chunks[place.chunk_index].name for place in image.places]
        assert len(set(names)) == len(names)
        for name in names:  # the n-th chunk of a name is in a later file than the one before it
            expected = [i for i, chunk in enumerate(chunks) if chunk.name == name][nth[name]]
            assert expected in [place.chunk_index for place in image.places]
            nth[name] += 1


@settings(max_examples=60, deadline=None)
@given(tensors(), st.integers(1, 5))
def test_plain_safetensors_reads_every_chunk(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[list[Chunk]], max_chunks: int
) -> None:
    directory = tmp_path_factory.mktemp("data")
    chunks = [chunk for tensor in cuts for chunk in tensor]
    images = write(directory, chunks, max_chunks=max_chunks)
    check_layout(images, chunks)
    for n, image in enumerate(images):
        assert len(image.places) <= max_chunks
        with safe_open(directory / f"00000-{n}.safetensors", framework="pt") as file:
            keys = list(file.keys())
            pads = [key for key in keys if key.startswith("__pad__.")]
            assert len(pads) == len(image.pads)
            assert len(keys) == len(pads) + len(image.places)
            for pad in pads:
                assert not file.get_tensor(pad).any()
            for place in image.places:
                chunk = chunks[place.chunk_index]
                tensor = file.get_tensor(chunk.name)
                assert tensor.dtype == getattr(torch, chunk.dtype) and tuple(tensor.shape) == chunk.shape
                assert bytes_of(tensor) == cut(chunk)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@settings(max_examples=40, deadline=None)
@given(tensors(), st.integers(2, 5))
def test_stock_dcp_reassembles_every_tensor(
    tmp_path_factory: pytest.TempPathFactory, cuts: list[list[Chunk]], max_chunks: int
) -> None:
    directory = tmp_path_factory.mktemp("data")
    chunks = [chunk for tensor in cuts for chunk in tensor]
    write(directory, chunks, max_chunks=max_chunks)
    wanted = {tensor[0].name: full_tensor(tensor[0]) for tensor in cuts}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(directory)), no_dist=True)
    for name, tensor in wanted.items():
        assert bytes_of(loaded[name]) == bytes_of(tensor), name


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("dtype", NATIVE_DTYPES)
def test_every_dtype_with_a_code_of_its_own_goes_through_stock_dcp(tmp_path: Path, dtype: str) -> None:
    chunks = [
        Chunk(name="rows", dtype=dtype, shape=(2, 3), offsets=(0, 0), global_shape=(5, 3)),
        Chunk(name="rows", dtype=dtype, shape=(3, 3), offsets=(2, 0), global_shape=(5, 3)),
        whole("scalar", dtype, ()),
        whole("empty", dtype, (0, 3)),
    ]
    write(tmp_path, chunks)
    wanted = {chunk.name: full_tensor(chunk) for chunk in chunks}
    loaded = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
    load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path)), no_dist=True)
    for name, tensor in wanted.items():
        assert loaded[name].dtype == tensor.dtype and bytes_of(loaded[name]) == bytes_of(tensor)


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", [name for name, dtype in DTYPES.items() if not dtype.native])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0, 2)])
def test_a_dtype_without_a_code_is_bytes_that_view_as_it(tmp_path: Path, dtype: str, shape: tuple[int, ...]) -> None:
    chunk = whole("w", dtype, shape)
    (image,) = write(tmp_path, [chunk, whole("x", "int8", (3,))])
    header = read_header(image.header, place="blob")
    assert (header.entries["w"].dtype, header.entries["w"].shape, header.entries["w"].offsets) == (
        dtype,
        shape,
        (0,) * len(shape),
    )
    with safe_open(tmp_path / "00000-0.safetensors", framework="pt") as file:
        raw = file.get_tensor("w")
    assert raw.dtype == torch.uint8
    itemsize = DTYPES[dtype].itemsize
    viewed = raw.view(getattr(torch, dtype))
    viewed = viewed[..., 0] if itemsize > 1 else viewed
    assert tuple(viewed.shape) == shape and bytes_of(viewed) == elements(chunk).tobytes()


def test_the_table_of_dtypes_agrees_with_torch() -> None:
    for name, dtype in DTYPES.items():
        assert getattr(torch, name).itemsize == dtype.itemsize
        assert str(getattr(torch, name)) == f"torch.{name}"


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(DTYPES)), st.sampled_from([0, 1, 7, 999, LARGE_BYTES // 4, LARGE_BYTES + 3])),
        max_size=12,
    ),
    st.sampled_from([1, 3 * LARGE_BYTES, 8 << 30]),
)
def test_large_chunks_are_aligned_and_small_ones_packed(sizes: list[tuple[str, int]], max_bytes: int) -> None:
    chunks = [whole(f"t{i}", dtype, (count,)) for i, (dtype, count) in enumerate(sizes)]
    images = plan_blobs(chunks, max_bytes=max_bytes)
    check_layout(images, chunks)
    for image in images:
        payload = sum(place.byte_length for place in image.places)
        assert len(image.places) == 1 or payload <= max_bytes
        num_large = sum(place.byte_length >= LARGE_BYTES for place in image.places)
        assert sum(length for _, length in image.pads) < (num_large + 1) * ALIGN_BYTES
    assert [image.header for image in images] == [i.header for i in plan_blobs(chunks, max_bytes=max_bytes)]


def test_nothing_to_write_is_no_file() -> None:
    assert plan_blobs([]) == []


def test_a_hundred_thousand_small_tensors_hardly_grow() -> None:
    chunks = [whole(f"layers.{i}.norm.weight", "float32", (64,)) for i in range(100_000)]
    (image,) = plan_blobs(chunks)
    assert image.size_bytes - len(image.header) < 100_000 * 256 + ALIGN_BYTES
    assert read_header(image.header, place="blob").entries["layers.99999.norm.weight"].byte_length == 256


def test_long_names_make_more_files_before_a_header_grows_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.checkpoint.blob.MAX_HEADER_BYTES", 200_000)
    chunks = [whole('"\\é𝄞\n' * 100 + str(i), "complex128", (1, 1, 1)) for i in range(100)]
    images = plan_blobs(chunks)
    check_layout(images, chunks)
    assert len(images) > 1
    assert all(120_000 < len(image.header) - 8 <= 200_000 for image in images[:-1])


@pytest.mark.parametrize("name", ["", "__metadata__", "__pad__.7", "a" * 4097, "é" * 2049, "a\ud800"])
def test_a_name_that_no_file_can_hold_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedState, match="name"):
        whole(name, "int8", ())


def test_a_dtype_that_can_not_be_saved_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedState, match=r"model\.w.*got 'quint8'.*bfloat16"):
        whole("model.w", "quint8", (1,))


@pytest.mark.parametrize(
    ("shape", "offsets", "global_shape"),
    [((2,), (1,), (2,)), ((-1,), (0,), (2,)), ((1,), (-1,), (2,)), ((1,), (0, 0), (2,)), ((1,), (0,), (2, 2))],
)
def test_a_chunk_outside_its_tensor_is_refused(shape: Any, offsets: Any, global_shape: Any) -> None:
    with pytest.raises(ConfigError, match="inside its tensor"):
        Chunk(name="w", dtype="int8", shape=shape, offsets=offsets, global_shape=global_shape)


@settings(max_examples=60)
@given(tensors(dtypes=sorted(DTYPES)))
def test_the_header_reads_back_as_it_was_planned(cuts: list[list[Chunk]]) -> None:
    chunks = [chunk for tensor in cuts for chunk in tensor]
    for image in plan_blobs(chunks):
        header = read_header(image.header + b"more", place="blob")
        assert (header.header_bytes, header.size_bytes) == (len(image.header), image.size_bytes)
        assert len(header.entries) == len(image.places)
        for place in image.places:
            chunk, entry = chunks[place.chunk_index], header.entries[chunks[place.chunk_index].name]
            assert (entry.dtype, entry.shape) == (chunk.dtype, chunk.shape)
            assert entry.offsets == tuple(
                start if size else whole
                for start, size, whole in zip(chunk.offsets, chunk.shape, chunk.global_shape, strict=True)
            )
            assert (entry.byte_offset, entry.byte_length) == (place.byte_offset, place.byte_length)


def test_a_file_of_another_writer_is_read_too(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(1, dtype=torch.bfloat16)}, tmp_path / "x.safetensors")
    header = read_header((tmp_path / "x.safetensors").read_bytes(), place="x")
    assert header.size_bytes == (tmp_path / "x.safetensors").stat().st_size
    assert {name: (e.dtype, e.shape, e.offsets) for name, e in header.entries.items()} == {
        "a": ("float32", (2, 3), None),
        "b": ("bfloat16", (1,), None),
    }


def _file(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def _of(entries: dict[str, Any]) -> bytes:
    return _file(json.dumps(entries))


BAD = {
    "shorter than its length": b"\1\0",
    "an absurd length": struct.pack("<Q", 1 << 60) + b"{}",
    "cut off": _file("{}   ")[:-2],
    "no JSON": _file("{]"),
    "no UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "no object": _file("[]"),
    "deep": _file("[" * 100_000),
    "a name twice": _file('{"a":%s,"a":%s}' % ((json.dumps(_entry()),) * 2)),
    "no entry": _of({"a": 3}),
    "an unknown dtype": _of({"a": _entry(dtype="F7")}),
    "a dtype that is none": _of({"a": _entry(dtype=[])}),
    "a negative size": _of({"a": _entry(shape=[-2])}),
    "a size of text": _of({"a": _entry(shape="2")}),
    "a length of another shape": _of({"a": _entry(data_offsets=[0, 4])}),
    "three offsets": _of({"a": _entry(data_offsets=[0, 8, 8])}),
    "a gap at the start": _of({"a": _entry(data_offsets=[4, 12])}),
    "a gap": _of({"a": _entry(), "b": _entry(data_offsets=[12, 20])}),
    "an overlap": _of({"a": _entry(), "b": _entry(data_offsets=[4, 12])}),
    "metadata of text": _of({"__metadata__": "x", "a": _entry()}),
    "a strange sharding": _of({"__metadata__": {"DCP_SHARDING_INFO": "{}"}, "a": _entry()}),
    "a dtype of ours that has a code": _of(
        {
            "__metadata__": {"stoker": '{"version":1,"dtypes":{"a":"int8"}}'},
            "a": _entry(dtype="I8", shape=[8]),
        }
    ),
    "dtypes of ours that are none": _of({"__metadata__": {"stoker": '{"version":1,"dtypes":[]}'}, "a": _entry()}),
    "bytes of another width": _of(
        {
            "__metadata__": {"stoker": '{"version":1,"dtypes":{"a":"complex128"}}'},
            "a": _entry(dtype="U8", shape=[2, 8], data_offsets=[0, 32]),
        }
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_header_that_breaks_a_rule_is_refused_with_the_file_named(name: str) -> None:
    with pytest.raises(FormatError, match=r"data/00000-0\.safetensors"):
        read_header(BAD[name], place="data/00000-0.safetensors")


def test_a_newer_blob_is_refused_by_name() -> None:
    data = _of({"__metadata__": {"stoker": '{"version":2}'}, "a": _entry()})
    with pytest.raises(UnknownVersion, match="got 2"):
        read_header(data, place="x")


def test_the_size_of_a_header_is_known_from_eight_bytes() -> None:
    (image,) = plan_blobs([whole("a", "int8", (3,))])
    assert header_size(image.header[:8], place="x") == len(image.header)


def test_planning_and_reading_headers_need_no_torch() -> None:
    program = (
        "import sys; from stoker.checkpoint.blob import *; "
        "c = Chunk(name='a', dtype='bfloat16', shape=(2,), offsets=(0,), global_shape=(2,)); "
        "read_header(plan_blobs([c])[0].header, place=''); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
