"""Fragments and manifests: what is merged covers every tensor exactly, or the ranks and the tensor are named."""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from stoker.checkpoint import _arrow
from stoker.checkpoint import manifest as module
from stoker.checkpoint.blob import DTYPES, Chunk, plan_blobs
from stoker.checkpoint.manifest import (
    CRC_BLOCK_BYTES,
    BlobInfo,
    Fragment,
    Manifest,
    StateInfo,
    TensorInfo,
    WrittenChunk,
    blob_path,
    merge,
)
from stoker.errors import ConfigError, CorruptRecord, FormatError, SaveFailed, TreeMismatch, UnknownVersion, UnsafeName
from tests.checkpoint.strategies import boxes, tensors

ROOT = "step-000000000001-0123456789abcdef"
SHA256 = "ab" * 32


def fragment(rank: int, world_size: int, held: list[Chunk], written: list[Chunk], **changes: Any) -> Fragment:
    """The fragment of a rank that lays `written` out as it would on disk."""
    blobs, places = [], []
    for n, image in enumerate(plan_blobs(written)):
        path = blob_path(rank, n)
        crcs = np.arange(-(-image.size_bytes // CRC_BLOCK_BYTES), dtype=np.uint32) + rank
        blobs.append(BlobInfo(path=path, size_bytes=image.size_bytes, crcs=crcs))
        places += [
            WrittenChunk(
                chunk=written[place.chunk_index],
                blob=path,
                byte_offset=place.byte_offset,
                byte_length=place.byte_length,
            )
            for place in image.places
        ]
    values: dict[str, Any] = {
        "rank": rank,
        "world_size": world_size,
        "host": f"node{rank}",
        "plan_hash": "",
        "held": held,
        "written": places,
        "blobs": blobs,
        "states": [StateInfo(path=f"state/rank-{rank:05d}.json", size_bytes=10 + rank, sha256=SHA256)],
    }
    return Fragment(**(values | changes))


def chunk(name: str, shape: tuple[int, ...], offsets: tuple[int, ...], global_shape: tuple[int, ...]) -> Chunk:
    return Chunk(name=name, dtype="float32", shape=shape, offsets=offsets, global_shape=global_shape)


def corner(one: Chunk) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return one.offsets, one.shape


def job(parts: list[list[Chunk]], **changes: Any) -> list[Fragment]:
    """One fragment for each rank, which writes all that it holds."""
    return [fragment(rank, len(parts), part, part, **changes) for rank, part in enumerate(parts)]


def rows(start: int, end: int, of: int, name: str = "w") -> Chunk:
    return chunk(name, (end - start, 4), (start, 0), (of, 4))


def stored(fragments: list[Fragment]) -> list[Fragment]:
    return [Fragment.from_bytes(one.to_bytes(), place=f"frag/{one.rank:05d}.arrow") for one in fragments]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[list[Chunk]], list[list[Chunk]]]:
    """Tensors cut into chunks, and for each rank those it writes, dealt at random."""
    cuts = draw(tensors(dtypes=sorted(DTYPES)))
    world_size = draw(st.integers(1, 4))
    parts: list[list[Chunk]] = [[] for _ in range(world_size)]
    for tensor in cuts:
        for one in tensor:
            parts[draw(st.integers(0, world_size - 1))].append(one)
    return cuts, parts


@settings(max_examples=100, deadline=None)
@given(jobs(), st.randoms(use_true_random=False))
def test_any_layout_that_covers_every_tensor_merges_and_reads_back(
    layout: tuple[list[list[Chunk]], list[list[Chunk]]], random: Any
) -> None:
    cuts, parts = layout
    fragments = job(parts)
    merged = merge(fragments, world_size=len(parts), place=ROOT)
    shuffled = stored(fragments)
    random.shuffle(shuffled)
    assert merge(shuffled, world_size=len(parts), place=ROOT).to_bytes() == merged.to_bytes()
    manifest = Manifest.from_bytes(merged.to_bytes(), place="manifest.arrow", sha256=merged.sha256)
    assert manifest.tensor_names == tuple(sorted(tensor[0].name for tensor in cuts))
    assert manifest.num_chunks == sum(map(len, cuts))
    assert manifest.num_bytes == sum(one.nbytes for tensor in cuts for one in tensor)
    assert manifest.world_size == len(parts)
    where = {(one.chunk, one.blob, one.byte_offset, one.byte_length) for each in fragments for one in each.written}
    for tensor in cuts:
        first = tensor[0]
        assert manifest.tensor(first.name) == TensorInfo(
            name=first.name, dtype=first.dtype, global_shape=first.global_shape
        )
        found = manifest.chunks_of(first.name)
        assert sorted((one.chunk for one in found), key=corner) == sorted(tensor, key=corner)
        assert [one.chunk.offsets for one in found] == sorted(one.chunk.offsets for one in found)
        assert {(one.chunk, one.blob, one.byte_offset, one.byte_length) for one in found} <= where
    for each in fragments:
        for blob in each.blobs:
            assert manifest.blob(blob.path).size_bytes == blob.size_bytes
            assert np.array_equal(manifest.blob(blob.path).crcs, blob.crcs)
    assert sorted(manifest.states) == [f"state/rank-{rank:05d}.json" for rank in range(len(parts))]


def coverage(tensor: list[Chunk]) -> np.ndarray[Any, Any]:
    count = np.zeros(tensor[0].global_shape, np.int64)
    for one in tensor:
        count[tuple(slice(start, start + size) for start, size in zip(one.offsets, one.shape, strict=True))] += 1
    return count


def mutated(draw: st.DrawFn, tensor: list[Chunk]) -> list[Chunk]:
    """`tensor` with one chunk left out, doubled, moved or resized."""
    i = draw(st.integers(0, len(tensor) - 1))
    one, rest = tensor[i], tensor[:i] + tensor[i + 1 :]
    kind = draw(st.sampled_from(["drop", "double", "move", "resize"]))
    if kind == "drop":
        return rest
    if kind == "double":
        return [*rest, one, one]
    if not one.shape:
        return [*rest, one, one]
    d = draw(st.integers(0, len(one.shape) - 1))
    whole = one.global_shape[d]
    if kind == "move":
        start, size = draw(st.integers(0, whole - one.shape[d])), one.shape[d]
    else:
        start = one.offsets[d]
        size = draw(st.integers(0, whole - start))
    return [
        *rest,
        replace(
            one,
            offsets=(*one.offsets[:d], start, *one.offsets[d + 1 :]),
            shape=(*one.shape[:d], size, *one.shape[d + 1 :]),
        ),
    ]


@st.composite
def broken_tensors(draw: st.DrawFn) -> list[Chunk]:
    shape = tuple(draw(st.lists(st.integers(1, 5), max_size=4)))
    tensor = [chunk("t", size, offsets, shape) for offsets, size in draw(boxes(shape))]
    for _ in range(draw(st.integers(1, 2))):
        tensor = mutated(draw, tensor)
        if not tensor:
            break
    return tensor


@settings(max_examples=400, deadline=None)
@given(broken_tensors())
def test_exactly_the_layouts_with_a_gap_or_an_overlap_are_refused(tensor: list[Chunk]) -> None:
    assume(tensor)
    covered = bool((coverage(tensor) == 1).all())
    ok = chunk("ok", (2,), (0,), (2,))
    parts = [[ok], *([one] for one in tensor)]
    if covered:
        merge(job(parts), world_size=len(parts), place=ROOT)
        return
    with pytest.raises(SaveFailed, match=rf"{ROOT}: t \[.*every element of a tensor must be written exactly once"):
        merge(job(parts), world_size=len(parts), place=ROOT)


def refusal(fragments: list[Fragment], world_size: int | None = None) -> str:
    with pytest.raises(SaveFailed) as caught:
        merge(stored(fragments), world_size=world_size or len(fragments), place=ROOT)
    return str(caught.value)


def test_an_overlap_names_the_region_and_its_writers() -> None:
    text = refusal(job([[rows(0, 3, 6)], [rows(2, 6, 6)], [rows(0, 2, 2, "v")]]))
    assert "w [6, 4]" in text and "2 times [2:3, 0:4] from rank 0 (node0), 1 (node1)" in text


def test_a_gap_names_the_region_and_who_holds_it() -> None:
    parts = [[rows(0, 2, 6)], [rows(2, 4, 6)], [rows(4, 6, 6)]]
    fragments = [fragment(rank, 3, part, part if rank != 1 else []) for rank, part in enumerate(parts)]
    assert "nobody wrote [2:4, 0:4], held by rank 1 (node1)" in refusal(fragments)


def test_a_gap_that_nobody_holds_says_so() -> None:
    assert "nobody holds or wrote [1:6, 0:4]" in refusal(job([[rows(0, 1, 6)]]))


def test_a_gap_in_two_dimensions_is_found_although_the_volume_fits() -> None:
    # 2 + 2 + 2 + 3 of 9 elements, one of them twice and one never.
    parts = [
        [chunk("w", (1, 2), (0, 0), (3, 3))],
        [chunk("w", (2, 1), (0, 2), (3, 3))],
        [chunk("w", (2, 1), (1, 0), (3, 3))],
        [chunk("w", (1, 3), (2, 0), (3, 3))],
    ]
    assert "exactly once" in refusal(job(parts))


def test_replicas_hold_what_one_of_them_writes() -> None:
    a, b = rows(0, 2, 4), rows(2, 4, 4)
    fragments = [fragment(0, 2, [a, b], [a]), fragment(1, 2, [a, b], [b])]
    manifest = merge(stored(fragments), world_size=2, place=ROOT)
    assert [one.blob for one in manifest.chunks_of("w")] == [blob_path(0, 0), blob_path(1, 0)]
    assert stored(fragments)[1].held == [a, b]
    assert [one.chunk for one in stored(fragments)[1].written] == [b]


def test_a_scalar_that_two_ranks_write_is_refused() -> None:
    scalar = chunk("step", (), (), ())
    assert "2 times [] from rank 0 (node0), 1 (node1)" in refusal(job([[scalar], [scalar]]))


def test_a_tensor_without_elements_needs_no_bytes() -> None:
    empty = chunk("e", (0, 3), (0, 0), (0, 3))
    manifest = merge(stored(job([[empty], [empty]])), world_size=2, place=ROOT)
    assert manifest.tensor("e").global_shape == (0, 3)
    assert [one.byte_length for one in manifest.chunks_of("e")] == [0, 0]


def test_empty_shards_of_uneven_sharding_are_no_overlap() -> None:
    parts = [[rows(2 * rank, min(2 * rank + 2, 5), 5)] for rank in range(3)] + [[chunk("w", (0, 4), (5, 0), (5, 4))]]
    assert merge(job(parts), world_size=4, place=ROOT).num_chunks == 4


def test_a_tensor_that_is_only_held_is_not_forgotten() -> None:
    extra = rows(0, 2, 2, "buffer")
    assert "nobody wrote [0:2, 0:4], held by rank 0" in refusal(
        [fragment(0, 1, [rows(0, 2, 2), extra], [rows(0, 2, 2)])]
    )


def test_missing_ranks_are_named() -> None:
    fragments = job([[rows(0, 2, 4)], [rows(2, 4, 4)], []])
    assert "every rank of 3 must deliver its fragment, got 'none from rank 0, 2'" in refusal([fragments[1]], 3)
    assert "every rank of 1" in refusal([], 1)


def test_a_rank_that_delivers_twice_is_named() -> None:
    fragments = job([[rows(0, 2, 4)], [rows(2, 4, 4)]])
    assert "exactly 2 ranks" in refusal([*fragments, fragments[1]], 2)


def test_ranks_of_another_world_size_are_named() -> None:
    fragments = [fragment(0, 2, [], []), fragment(1, 3, [], [])]
    assert "got '3 from rank 1 (node1)'" in refusal(fragments)


def test_ranks_that_save_another_tree_are_named() -> None:
    same = [fragment(rank, 3, [], [], plan_hash="a") for rank in range(2)]
    merge([*same, fragment(2, 3, [], [], plan_hash="")], world_size=3, place=ROOT)
    assert "rank 0 (node0), 2 (node2)" in refusal([*same, fragment(2, 3, [], [], plan_hash="b")])


@pytest.mark.parametrize(
    "other",
    [
        Chunk(name="w", dtype="bfloat16", shape=(2, 4), offsets=(2, 0), global_shape=(4, 4)),
        chunk("w", (2, 4), (2, 0), (5, 4)),
        chunk("w", (2, 4, 1), (2, 0, 0), (4, 4, 1)),
    ],
)
def test_ranks_that_disagree_on_dtype_or_shape_are_named(other: Chunk) -> None:
    parts = [[rows(0, 1, 1, "a")], [rows(0, 2, 4)], [other]]
    text = refusal(job(parts))
    assert f"{ROOT}: w: all ranks must agree on a tensor's dtype and shape" in text
    assert "rank 1 (node1), 2 (node2)" in text


def with_span(byte_offset: int, byte_length: int, of: Chunk, at: int = 1) -> Fragment:
    """A fragment whose chunk number `at` claims these bytes."""
    good = fragment(0, 1, [of, rows(0, 1, 1, "v")], [of, rows(0, 1, 1, "v")])
    written = good.written
    written[at] = replace(written[at], byte_offset=byte_offset, byte_length=byte_length)
    return Fragment(rank=0, world_size=1, host="node0", plan_hash="", held=good.held, written=written, blobs=good.blobs)


@pytest.mark.parametrize(
    ("byte_offset", "byte_length", "rule"),
    [
        (4096 + 32, 17, "bytes of its shape"),
        (4096 + 16, 16, "must not share bytes"),
        (8192 - 8, 16, "inside its blob"),
        (-16, 16, "inside its blob"),
        (1 << 62, 16, "inside its blob"),
    ],
)
def test_bytes_that_can_not_be_the_chunks_are_refused(byte_offset: int, byte_length: int, rule: str) -> None:
    text = refusal([with_span(byte_offset, byte_length, rows(0, 2, 2))])
    assert rule in text and blob_path(0, 0) in text and "rank 0 (node0)" in text


def test_a_rank_that_writes_under_anothers_name_is_named() -> None:
    blob = BlobInfo(path=blob_path(1, 0), size_bytes=0, crcs=np.zeros(0, np.uint32))
    text = refusal([fragment(0, 1, [], [], blobs=[blob])])
    assert "data/00001-0.safetensors is another's" in text and "rank 0 (node0)" in text


def test_a_document_that_two_ranks_write_is_refused() -> None:
    state = StateInfo(path="state/trainer.json", size_bytes=1, sha256=SHA256)
    text = refusal([fragment(rank, 2, [], [], states=[state]) for rank in range(2)])
    assert "state/trainer.json must be written by one rank" in text and "rank 0 (node0), 1 (node1)" in text


def test_a_fragment_that_contradicts_itself_can_not_be_made() -> None:
    with pytest.raises(ConfigError, match="must be in one of the blobs"):
        fragment(0, 1, [], [rows(0, 2, 2)], blobs=[])
    with pytest.raises(ConfigError, match="a path of its own"):
        fragment(0, 1, [], [], blobs=[BlobInfo(path=blob_path(0, 0), size_bytes=0, crcs=np.zeros(0, np.uint32))] * 2)
    with pytest.raises(ConfigError, match="one dtype and one shape"):
        fragment(0, 1, [rows(0, 2, 2), rows(0, 2, 3)], [])


@pytest.mark.parametrize(
    "path", ["data/0-0.safetensors", "../data/00000-0.safetensors", "data/00000-00.safetensors", "x"]
)
def test_a_blob_has_a_path_below_data_and_no_other(path: str) -> None:
    with pytest.raises(UnsafeName):
        BlobInfo(path=path, size_bytes=0, crcs=np.zeros(0, np.uint32))


@pytest.mark.parametrize("path", ["state/../x.json", "state/.json", "state/a/b.json", "state/a.pkl", "/state/a.json"])
def test_a_state_has_a_path_below_state_and_no_other(path: str) -> None:
    with pytest.raises(UnsafeName):
        StateInfo(path=path, size_bytes=0, sha256=SHA256)


def test_a_blob_has_a_checksum_for_each_block() -> None:
    with pytest.raises(ConfigError, match="2 uint32 checksums"):
        BlobInfo(path=blob_path(0, 0), size_bytes=CRC_BLOCK_BYTES + 1, crcs=np.zeros(1, np.uint32))
    with pytest.raises(ConfigError, match="SHA-256"):
        StateInfo(path="state/a.json", size_bytes=1, sha256="00")


def small_manifest() -> Manifest:
    return merge(job([[rows(0, 2, 4), chunk("s", (), (), ())], [rows(2, 4, 4)]]), world_size=2, place=ROOT)


def test_an_unknown_tensor_or_blob_is_told() -> None:
    manifest = small_manifest()
    assert "w" in manifest and "x" not in manifest
    for ask in (manifest.tensor, manifest.chunks_of):
        with pytest.raises(TreeMismatch, match="got 'x'"):
            ask("x")
    with pytest.raises(FormatError, match="got 'x'"):
        manifest.blob("x")


@pytest.mark.parametrize(
    ("data", "read"),
    [
        (small_manifest().to_bytes(), Manifest.from_bytes),
        (fragment(0, 1, [rows(0, 2, 2)], [rows(0, 2, 2)]).to_bytes(), Fragment.from_bytes),
    ],
    ids=["manifest", "fragment"],
)
def test_a_flip_of_any_byte_is_a_corrupt_record(data: bytes, read: Callable[..., Any]) -> None:
    read(data, place="m.arrow")
    for at in range(len(data)):
        broken = bytearray(data)
        broken[at] ^= 1 << (at % 8)
        with pytest.raises(CorruptRecord, match=r"m\.arrow"):
            read(bytes(broken), place="m.arrow")
    for size in (0, 1, 7, 100, len(data) - 1):
        with pytest.raises(CorruptRecord):
            read(data[:size], place="m.arrow")
    with pytest.raises(CorruptRecord):
        read(data + b"\0", place="m.arrow")


def test_another_manifest_than_the_committed_one_is_a_corrupt_record() -> None:
    manifest = small_manifest()
    Manifest.from_bytes(manifest.to_bytes(), place="m", sha256=manifest.sha256)
    with pytest.raises(CorruptRecord, match="that was committed"):
        Manifest.from_bytes(manifest.to_bytes(), place="m", sha256=SHA256)


def test_a_newer_major_version_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VERSION", 2)
    newer, newer_fragment = small_manifest().to_bytes(), fragment(0, 1, [], []).to_bytes()
    monkeypatch.undo()
    with pytest.raises(UnknownVersion, match="got '2'"):
        Manifest.from_bytes(newer, place="m")
    with pytest.raises(UnknownVersion, match="got '2'"):
        Fragment.from_bytes(newer_fragment, place="f")


def test_a_fragment_is_no_manifest() -> None:
    with pytest.raises(FormatError, match=r"must be a stoker\.manifest"):
        Manifest.from_bytes(fragment(0, 1, [], []).to_bytes(), place="m")


def test_a_later_minor_version_may_add_columns() -> None:
    def add(columns: dict[str, Any]) -> None:
        columns["more"] = pa.array(["x"])

    assert Manifest.from_bytes(forged(add), place="m").tensor_names == ("s", "w")


def forged(change: Callable[[dict[str, Any]], None], data: bytes | None = None) -> bytes:
    """The file with columns changed and a right digest, as only a broken or hostile writer makes it."""
    batch = pa.ipc.open_file(data or small_manifest().to_bytes()).get_batch(0)
    columns: dict[str, Any] = {name: batch.column(name) for name in batch.schema.names}
    change(columns)
    kind = batch.schema.metadata[b"stoker.format"].decode()
    return _arrow.write_row(columns, kind=kind, version=1, compression="zstd")


def edit(column: str, row: int, **changes: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        kind = columns[column].type
        values = columns[column].to_pylist()
        values[0][row] |= changes
        columns[column] = pa.array(values, kind)

    return change


def point_outside_the_file(columns: dict[str, Any]) -> None:
    """A path whose text lies where no text is."""
    offsets = pa.py_buffer(np.array([0, 1 << 30, 12], np.int32))
    columns["states"] = pa.LargeListArray.from_arrays(
        pa.array([0, 2], pa.int64()),
        pa.StructArray.from_arrays(
            [
                pa.StringArray.from_buffers(2, offsets, pa.py_buffer(b"state/a.json")),
                pa.array([1, 1], pa.int64()),
                pa.array([SHA256, SHA256]),
            ],
            fields=list(columns["states"].type.value_type),
        ),
    )


def add_an_empty_row(columns: dict[str, Any]) -> None:
    for name, column in columns.items():
        more = column if name == "world_size" else pa.array([[]], column.type)
        columns[name] = pa.concat_arrays([column, more])


def drop_the_scalars_chunk(columns: dict[str, Any]) -> None:
    columns["chunks"] = pa.array([columns["chunks"].to_pylist()[0][1:]], columns["chunks"].type)


def put_the_scalars_chunk_last(columns: dict[str, Any]) -> None:
    first, *rest = columns["chunks"].to_pylist()[0]
    columns["chunks"] = pa.array([[*rest, first]], columns["chunks"].type)


def make_the_scalar_a_tensor_of_size_minus_one(columns: dict[str, Any]) -> None:
    drop_the_scalars_chunk(columns)
    edit("tensors", 0, shape=[-1])(columns)


def cut_in_65_dimensions(columns: dict[str, Any]) -> None:
    edit("tensors", 0, shape=[1] * 65)(columns)
    edit("chunks", 0, shape=[1] * 65, offsets=[0] * 65)(columns)


HOSTILE: dict[str, Callable[[dict[str, Any]], None]] = {
    "no chunks": lambda columns: columns.pop("chunks"),
    "chunks of another type": lambda columns: columns.update(chunks=columns["tensors"]),
    "a second row": add_an_empty_row,
    "text outside the file": point_outside_the_file,
    "a null table": lambda columns: columns.update(chunks=pa.array([None], columns["chunks"].type)),
    "a null path": edit("states", 0, path=None),
    "a null name": edit("tensors", 0, name=None),
    "a null size": edit("chunks", 0, shape=[None]),
    "an unknown dtype": edit("tensors", 0, dtype="float7"),
    "a negative size": make_the_scalar_a_tensor_of_size_minus_one,
    "a tensor without chunks": drop_the_scalars_chunk,
    "a gap": edit("chunks", 1, shape=[1, 4], byte_length=16),
    "a tensor beyond all memory": edit("tensors", 1, shape=[1 << 62, 1 << 62]),
    "too many dimensions": cut_in_65_dimensions,
    "names out of order": edit("tensors", 0, name="z"),
    "a chunk of no tensor": edit("chunks", 0, tensor=2),
    "a chunk of tensor -1": edit("chunks", 0, tensor=-1, shape=[2, 4], offsets=[0, 0], byte_length=32),
    "chunks out of order": put_the_scalars_chunk_last,
    "another number of dimensions": edit("chunks", 1, shape=[8]),
    "a chunk outside its tensor": edit("chunks", 2, offsets=[3, 0]),
    "an offset below zero": edit("chunks", 1, offsets=[-1, 0]),
    "a chunk of no blob": edit("chunks", 0, blob=9),
    "bytes outside the blob": edit("chunks", 0, byte_offset=1 << 40),
    "bytes of another length": edit("chunks", 0, byte_length=5),
    "shared bytes": edit("chunks", 0, byte_offset=4096),
    "a path out of the root": edit("blobs", 0, path="data/../../00000-0.safetensors"),
    "an absolute path": edit("blobs", 0, path="/etc/passwd"),
    "a path twice": edit("blobs", 0, path=blob_path(1, 0)),
    "a blob without its checksums": edit("blobs", 0, crc32c=[]),
    "a blob of negative size": edit("blobs", 0, size_bytes=-1),
    "a state out of the root": edit("states", 0, path="state/../../x.json"),
    "a state twice": edit("states", 0, path="state/rank-00001.json"),
    "a state without a digest": edit("states", 0, sha256=""),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_well_formed_file_of_nonsense_is_refused(name: str) -> None:
    with pytest.raises(FormatError):
        Manifest.from_bytes(forged(HOSTILE[name]), place="m.arrow")


@pytest.mark.parametrize(
    "change",
    [
        edit("tensors", 0, name="w"),
        edit("tensors", 0, name=None),
        edit("held", 0, offsets=[-1, 0]),
        edit("held", 0, offsets=[1, 0]),
        edit("held", 0, shape=[3, 4]),
        edit("written", 0, blob=1),
        edit("written", 0, blob=-1),
    ],
)
def test_a_fragment_of_nonsense_is_refused(change: Callable[[dict[str, Any]], None]) -> None:
    parts = [rows(0, 2, 2, "v"), rows(0, 2, 2, "w")]
    data = fragment(0, 1, parts, parts).to_bytes()
    Fragment.from_bytes(forged(lambda columns: None, data), place="f")
    with pytest.raises(FormatError):
        Fragment.from_bytes(forged(change, data), place="f")


def test_the_forger_changes_nothing_by_itself() -> None:
    assert forged(lambda columns: None) == small_manifest().to_bytes()


def test_a_file_that_would_decode_to_too_much_is_refused_before_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    zeros = pa.array(np.zeros(1 << 20, np.int64))
    row = pa.LargeListArray.from_arrays(pa.array([0, len(zeros)], pa.int64()), zeros)
    data = forged(lambda columns: columns.update(more=row))
    assert len(data) < 1 << 16
    Manifest.from_bytes(data, place="m")
    monkeypatch.setattr(_arrow, "MAX_DECODED_BYTES", 8 << 20)
    with pytest.raises(FormatError, match="decodes to"):
        Manifest.from_bytes(data, place="m")


def test_names_that_look_like_the_digests_mark_do_no_harm() -> None:
    name = "stoker-sha256:" + "0" * 64
    data = merge(job([[rows(0, 2, 2, name)]]), world_size=1, place=ROOT).to_bytes()
    assert Manifest.from_bytes(data, place="m").tensor_names == (name,)
    assert data.count(b"stoker-sha256:") >= 2


def test_plain_pyarrow_opens_the_manifest() -> None:
    table: Any = pa.ipc.open_file(small_manifest().to_bytes()).read_all()
    chunks = table.column("chunks").chunk(0).flatten()
    names = table.column("tensors").chunk(0).flatten().field("name")
    assert names.to_pylist() == ["s", "w"]
    assert chunks.field("offsets").to_pylist() == [[], [0, 0], [2, 0]]
    assert re.fullmatch("[0-9a-f]{64}", table.column("states").chunk(0).flatten().field("sha256")[0].as_py())


def test_a_job_of_many_ranks_and_chunks_merges_to_what_each_wrote() -> None:
    world_size, names = 64, [f"layers.{i}.weight" for i in range(100)]
    parts = [[chunk(name, (3, 2), (3 * rank, 0), (3 * world_size, 2)) for name in names] for rank in range(world_size)]
    manifest = merge(stored(job(parts)), world_size=world_size, place=ROOT)
    assert manifest.num_chunks == world_size * len(names)
    assert [one.blob for one in manifest.chunks_of(names[7])] == [blob_path(rank, 0) for rank in range(world_size)]
