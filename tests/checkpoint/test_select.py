"""What a rank reads of a step with many chunks: its own part, whatever the size of the batches it is worked out in."""

import numpy as np
import pytest
import torch

from stoker.checkpoint import _select
from stoker.checkpoint._select import Selection, select
from stoker.checkpoint.blob import Chunk
from stoker.checkpoint.manifest import Manifest, merge
from stoker.testing.fragments import fragments_of_job

WORLD_SIZE, ROWS, COLUMNS = 32, 4, 8


@pytest.fixture(scope="module")
def manifest() -> Manifest:
    fragments = fragments_of_job(world_size=WORLD_SIZE, num_tensors=20, rows=ROWS, columns=COLUMNS)
    return merge(fragments, world_size=WORLD_SIZE, place="test")


def boxes(manifest: Manifest, start: int, end: int, *, columns: int = COLUMNS) -> list[tuple[Chunk, torch.Tensor]]:
    shape = (WORLD_SIZE * ROWS, COLUMNS)
    return [
        (
            Chunk(name=name, dtype="float32", shape=(end - start, columns), offsets=(start, 0), global_shape=shape),
            torch.empty(end - start, columns),
        )
        for name in manifest.tensor_names
    ]


def reads(selection: Selection) -> list[tuple[str, int, int]]:
    return sorted((path, span.start, len(span.sink)) for path, spans in selection.wanted.items() for span in spans)


def test_a_rank_reads_its_rows_and_no_others(manifest: Manifest) -> None:
    found = select(manifest, boxes(manifest, 6, 14))  # half a chunk, a chunk, half a chunk
    assert sorted(found.wanted) == [f"data/{rank:05d}-0.safetensors" for rank in (1, 2, 3)]
    assert [len(spans) for spans in found.wanted.values()] == [20, 20, 20]
    assert found.num_bytes == 20 * 8 * COLUMNS * 4
    assert not found.copies  # straight to its place


def test_batches_change_nothing(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = reads(select(manifest, boxes(manifest, 3, 99)))
    monkeypatch.setattr(_select, "_PAIRS_AT_ONCE", 7)
    assert reads(select(manifest, boxes(manifest, 3, 99))) == whole


def test_columns_are_read_by_way_of_a_buffer_for_each_chunk(manifest: Manifest) -> None:
    assert len(select(manifest, boxes(manifest, 0, 8, columns=3)).copies) == 40
    box = boxes(manifest, 0, 4, columns=3)[0]
    found = select(manifest, [box])
    for spans in found.wanted.values():
        for span in spans:
            span.sink[:] = np.arange(len(span.sink) // 4, dtype=np.float32).view(np.uint8)
    for copy in found.copies:
        copy()
    assert torch.equal(box[1], torch.arange(4)[:, None] * COLUMNS + torch.arange(3.0))


def test_nothing_is_read_for_nothing(manifest: Manifest) -> None:
    assert select(manifest, []).wanted == {}
    assert select(manifest, boxes(manifest, 5, 5)).wanted == {}
