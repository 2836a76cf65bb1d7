"""Where a rank stands in a device mesh, as the loader sees it: only data-parallel dimensions count."""

import json
import logging
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore

from stoker.errors import ConfigError, UnsupportedError
from stoker.loaders import TokenDataset, TokenLoader
from stoker.loaders._placement import place_in_group
from tests.loaders.token_sets import random_documents, write_set


@contextmanager
def rank_of(rank: int, world_size: int) -> Iterator[None]:
    """A process group of which this process is one rank; nobody is at the other end, and nobody needs to be."""
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def places(shape: list[Any], names: tuple[str, ...] | None) -> list[tuple[int, int]]:
    world_size = sum(len(row) if isinstance(row, list) else 1 for row in shape)
    found = []
    for rank in range(world_size):
        with rank_of(rank, world_size):
            found.append(place_in_group(None, None, DeviceMesh("cpu", shape, mesh_dim_names=names)))
    return found


def test_peers_of_tensor_parallel_share_a_place() -> None:
    assert places([[0, 1], [2, 3]], ("dp", "tp")) == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert places([[0, 1], [2, 3]], ("pp", "dp_shard")) == [(0, 2), (1, 2), (0, 2), (1, 2)]


def test_replicas_and_shards_are_both_data_parallel() -> None:
    assert places([[0, 1], [2, 3]], ("dp_replicate", "dp_shard")) == [(0, 4), (1, 4), (2, 4), (3, 4)]


def test_the_only_dimension_of_a_mesh_without_names_is_data_parallel() -> None:
    assert places([0, 1, 2], None) == [(0, 3), (1, 3), (2, 3)]


@pytest.mark.parametrize(("shape", "names"), [([[0, 1], [2, 3]], None), ([0, 1, 2, 3], ("tp",))])
def test_a_mesh_that_does_not_tell_is_refused(shape: list[Any], names: tuple[str, ...] | None) -> None:
    with (
        rank_of(1, 4),
        pytest.raises(UnsupportedError, match="the data-parallel dimensions of a mesh are those named dp"),
    ):
        place_in_group(None, None, DeviceMesh("cpu", shape, mesh_dim_names=names))


def test_a_process_outside_the_mesh_is_told() -> None:
    with rank_of(3, 4), pytest.raises(ConfigError, match="must belong to the mesh"):
        place_in_group(None, None, DeviceMesh("cpu", [0, 1]))


def test_a_mesh_and_a_rank_together_are_refused() -> None:
    with rank_of(0, 2), pytest.raises(ConfigError, match="give the one or the others"):
        place_in_group(0, 2, DeviceMesh("cpu", [0, 1]))


def test_ranks_of_a_group_that_all_get_the_same_rows_are_warned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="stoker.loaders"):
        assert place_in_group(None, None, None) == (0, 1)
        assert not caplog.messages
        with rank_of(1, 2):
            assert place_in_group(1, 2, None) == (1, 2)
            assert not caplog.messages
            assert place_in_group(None, None, None) == (0, 1)
    assert caplog.messages == ["TokenLoader without rank= and world_size= gives every rank the same rows"]


def deliver(root: Path, rank: int) -> None:
    """What one of four ranks gets, told in a file."""
    dist.init_process_group("gloo", rank=rank, world_size=4, init_method=f"file://{root}/store")
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    with TokenDataset(root / "set", seq_len=16) as dataset, TokenLoader(dataset, batch_size=3, mesh=mesh) as loader:
        steps = [
            list(zip(batch["position"].tolist(), batch["input_ids"].tolist(), strict=True))
            for batch in islice(loader, 10)
        ]
        (root / f"rank-{rank}").write_text(json.dumps([steps, loader.state_dict()]))
    dist.barrier()
    dist.destroy_process_group()


def test_four_ranks_in_a_mesh_of_two_by_two_share_each_step(tmp_path: Path) -> None:
    write_set(tmp_path / "set", random_documents(60))
    children = []
    for rank in range(4):
        pid = os.fork()
        if pid == 0:
            try:
                deliver(tmp_path, rank)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        children.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0] * 4
    ranks = [json.loads((tmp_path / f"rank-{rank}").read_text()) for rank in range(4)]
    assert ranks[0] == ranks[1]  # peers of tensor parallel
    assert ranks[2] == ranks[3]
    assert ranks[0][1] == ranks[2][1]  # one state for all
    with TokenDataset(tmp_path / "set", seq_len=16) as dataset:
        whole = [
            sorted([p, ids] for p, ids in zip(batch["position"].tolist(), batch["input_ids"].tolist(), strict=True))
            for batch in islice(TokenLoader(dataset, batch_size=6), 10)
        ]
    assert [sorted([*a, *b]) for a, b in zip(ranks[0][0], ranks[2][0], strict=True)] == whole
