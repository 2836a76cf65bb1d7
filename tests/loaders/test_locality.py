"""What the nodes of a job read together, by global batch: counted, and compared with the order itself."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker.cli import main
from stoker.errors import ConfigError
from stoker.loaders import TokenDataset
from stoker.loaders.locality import bytes_factor, locality, straddling_factor
from stoker.loaders.order import OrderV1, consecutive_rank_rows
from tests.loaders.token_sets import write_set


@pytest.mark.parametrize(
    ("nodes", "batch", "lanes"), [(1, 7, 6), (2, 12, 6), (4, 12, 6), (3, 9, 6), (5, 5, 6), (4, 8, 8)]
)
def test_the_factor_is_that_of_the_order(nodes: int, batch: int, lanes: int) -> None:
    order = OrderV1(num_samples=lanes * 96, seed=1, samples_per_block=16, lanes=lanes, window_blocks=2)
    steps = order.num_samples // batch
    read = 0
    for node in range(nodes):
        rows = consecutive_rank_rows(0, steps=steps, global_batch=batch, lanes=lanes, world_size=nodes, rank=node)
        read += len(np.unique(order(rows) // 16))
    factor = bytes_factor(nodes=nodes, global_batch=batch, lanes=lanes)
    assert read / (order.num_samples // 16) == pytest.approx(factor, rel=0.02)
    groups = np.gcd(lanes, batch)
    assert 1 <= factor <= (groups + nodes - 1) / groups


def test_a_batch_is_suggested_that_reads_least() -> None:
    found = locality(nodes=5, global_batch=35, lanes=48)
    assert (found.lane_groups, found.bytes_factor) == (1, 5.0)
    assert found.suggested_bytes_factor == min(
        bytes_factor(nodes=5, global_batch=batch, lanes=48) for batch in range(20, 71, 5)
    )
    assert "Window(lanes=50)" in found.to_text()
    good = locality(nodes=8, global_batch=512, lanes=48)
    assert (good.bytes_factor, good.suggested_global_batch) == (1.0, 512)
    assert good.to_text().count("\n") == 1


@pytest.mark.parametrize(
    ("seq_len", "block"), [(16, 64), (48, 64), (65, 64), (200, 64), (24, 256), (65, 256), (96, 256)]
)
def test_the_straddling_factor_counts_the_blocks_that_order_blocks_lie_in(
    seq_len: int, block: int, tmp_path: Path
) -> None:
    write_set(tmp_path, [np.arange(1, 40_001)], block_tokens=block)
    with TokenDataset(tmp_path, seq_len=seq_len) as dataset:
        tokens = dataset.samples_per_block * seq_len
        edges = [*range(0, len(dataset) * seq_len, tokens), len(dataset) * seq_len]
        touched = sum((end - 1) // block - start // block + 1 for start, end in pairwise(edges))
        factor = straddling_factor(seq_len=seq_len, block_tokens=block)
        assert touched / dataset.manifest.blocks == pytest.approx(factor, rel=0.02)


@pytest.mark.parametrize("wrong", [{"nodes": 3}, {"nodes": 0}, {"global_batch": 0}, {"lanes": 0}, {"seq_len": 0}])
def test_numbers_that_make_no_split_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        locality(**{"nodes": 2, "global_batch": 8, "lanes": 4, **wrong})


def test_the_command_prints_the_factor_and_a_better_batch(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["plan", "--global-batch", "35", "--nodes", "5", "--json"])
    report = json.loads(capfd.readouterr().out)
    assert exited.value.code in (0, None)
    assert (report["bytes_factor"], report["suggested_global_batch"]) == (5.0, 60)
    assert report["straddling_factor"] is None
    with pytest.raises(SystemExit):
        main(["plan", "--global-batch", "35", "--nodes", "5", "--seq-len", "1536"])
    assert "fetched up to 2.00 times in an epoch; with 1,024 or 2,048, powers of two, once" in capfd.readouterr().out
    with pytest.raises(SystemExit) as exited:
        main(["plan", "--global-batch", "35", "--nodes", "5", "--simulate"])
    assert exited.value.code == 2
