"""Which steps stay: keep_last, keep_every, keep_best, and the metrics that decide."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker.checkpoint import CheckpointManager, KeepBest
from stoker.checkpoint.log import LiveStep
from stoker.checkpoint.retention import checked_metrics, retention
from stoker.errors import ConfigError


def live(losses: dict[int, float | None]) -> dict[int, LiveStep]:
    return {
        step: LiveStep(nonce="0" * 16, manifest_sha256="0" * 64, metrics={} if loss is None else {"loss": loss})
        for step, loss in losses.items()
    }


def save_all(ckpt: CheckpointManager, losses: dict[int, float]) -> None:
    for step, loss in losses.items():
        ckpt.save(step, {"x": step}, metrics={"loss": loss}).wait()


def test_without_a_rule_every_step_stays() -> None:
    steps = live(dict.fromkeys(range(5)))
    assert set(retention(keep_last=None, keep_every=None, keep_best=None)(steps)) == set(range(5))


def test_a_step_stays_if_any_rule_wants_it() -> None:
    keep = retention(keep_last=2, keep_every=40, keep_best=KeepBest(metric="loss"))
    steps = live({0: 9.0, 10: 1.0, 20: 5.0, 40: 6.0, 50: 7.0, 60: 8.0, 70: 9.0})
    assert set(keep(steps)) == {0, 10, 40, 60, 70}


def test_the_best_are_those_of_lowest_or_highest_metric_and_of_equal_ones_the_older() -> None:
    steps = live({1: 3.0, 2: 1.0, 3: 1.0, 4: 2.0})
    assert KeepBest(metric="loss", count=2).of(steps) == [2, 3]
    assert KeepBest(metric="loss", mode="max", count=2).of(steps) == [1, 4]
    assert KeepBest(metric="loss").of(live({1: 1.0, 2: 1.0})) == [1]


def test_a_step_with_nan_or_without_the_metric_is_never_the_best() -> None:
    steps = live({1: math.nan, 2: None, 3: math.inf})
    assert KeepBest(metric="loss", count=3).of(steps) == [3]
    assert KeepBest(metric="accuracy").of(steps) == []


def test_the_manager_keeps_the_best_steps_and_knows_the_best(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep_last=1, keep_best=KeepBest(metric="loss", count=2)) as ckpt:
        assert ckpt.best() is None
        save_all(ckpt, {10: 3.0, 20: 1.0, 30: 2.0, 40: math.nan, 50: 9.0})
        assert ckpt.steps() == [20, 30, 50]
        assert ckpt.best() == 20
        tree = {"x": 0}
        ckpt.restore(tree, step=ckpt.best())
        assert tree == {"x": 20}


def test_metrics_are_in_the_log_and_count_for_later_runs(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        save_all(ckpt, {10: 1.0, 20: -math.inf, 30: math.nan})
    record = json.loads(min(tmp_path.glob("log/*")).read_bytes())["record"]
    assert [record["live"][step]["metrics"]["loss"] for step in ("10", "20", "30")] == [1.0, "-inf", "nan"]
    with CheckpointManager(tmp_path, keep_last=1, keep_best=KeepBest(metric="loss")) as ckpt:
        save_all(ckpt, {40: 0.5})
        assert ckpt.steps() == [20, 40]


def test_milestones_stay(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, keep_every=20) as ckpt:
        save_all(ckpt, dict.fromkeys((10, 20, 30, 40, 50), 0.0))
        assert ckpt.steps() == [20, 40, 50]


def test_a_metric_is_any_one_number() -> None:
    given: dict[str, Any] = {"a": 1, "b": np.float32(0.5), "c": torch.tensor(2.0), "d": True}
    assert checked_metrics(given) == {"a": 1.0, "b": 0.5, "c": 2.0, "d": 1.0}


@pytest.mark.parametrize(
    "metrics", [{"loss": "1.0"}, {"loss": None}, {"loss": torch.ones(2)}, {"": 1.0}, {1: 1.0}, {"x" * 101: 1.0},
                {f"m{i}": 1.0 for i in range(101)}, {"loss": 10**400}])  # fmt: skip
def test_metrics_that_are_none_are_refused_before_anything_happens(tmp_path: Path, metrics: Any) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        with pytest.raises(ConfigError, match="metric"):
            ckpt.save(1, {"x": 1}, metrics=metrics)
        assert not list(tmp_path.iterdir())


def test_rules_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    mode: Any = "lowest"
    with pytest.raises(ConfigError, match="keep_last"):
        CheckpointManager(tmp_path, keep_last=0)
    with pytest.raises(ConfigError, match="keep_every"):
        CheckpointManager(tmp_path, keep_every=0)
    with pytest.raises(ConfigError, match="mode must be 'min' or 'max'"):
        KeepBest(metric="loss", mode=mode)
    with pytest.raises(ConfigError, match="count"):
        KeepBest(metric="loss", count=0)
    with CheckpointManager(tmp_path) as ckpt, pytest.raises(ConfigError, match="keep_best"):
        ckpt.best()
