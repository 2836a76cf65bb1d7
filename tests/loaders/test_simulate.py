import json
from math import log
from typing import Any

import numpy as np
import pytest

from stoker.cli import main
from stoker.errors import ConfigError
from stoker.loaders.simulate import CAPACITIES, POLICIES, SCENES, Simulation, Workload, _mixed, simulate

SMALL = Workload(blocks=960, samples_per_block=2, lanes=8, window_blocks=2, nodes=4)


@pytest.fixture(scope="module")
def small() -> Simulation:
    return simulate(SMALL)


@pytest.mark.parametrize("share", CAPACITIES)
def test_a_repeated_scan_hits_what_is_kept_and_with_lru_and_sieve_nothing(small: Simulation, share: float) -> None:
    assert small.hit_rate("scan", "pin", share) == share
    assert small.hit_rate("scan", "plan", share) == pytest.approx(share, abs=1e-3)
    assert small.hit_rate("scan", "lru", share) == small.hit_rate("scan", "sieve", share) == 0


@pytest.mark.parametrize("share", CAPACITIES)
def test_lru_on_blocks_shuffled_each_epoch_hits_as_often_as_theory_says(share: float) -> None:
    """A block at x of one epoch and y of the next, both uniform, is still there if x * (1 - y) > 1 - share."""
    shuffled = Workload(blocks=4000, samples_per_block=1, lanes=1, window_blocks=1, epochs=6)
    found = simulate(shuffled, capacities=[share]).hit_rate("one node", "lru", share)
    assert found == pytest.approx(share + (1 - share) * log(1 - share), abs=0.01)


@pytest.mark.parametrize("share", CAPACITIES)
def test_on_one_node_the_plan_wins_no_more_than_what_is_read_twice_an_epoch(small: Simulation, share: float) -> None:
    reads = next(one.reads for one in small.outcomes if one.scene == "one node")
    twice = reads - (SMALL.epochs - 1) * SMALL.blocks
    # At most one window of each lane is cut, and read again at the epoch's end.
    assert 0 < twice <= (SMALL.epochs - 1) * SMALL.lanes * SMALL.window_blocks
    gain = small.hit_rate("one node", "plan", share) - small.hit_rate("one node", "pin", share)
    assert 0 <= gain <= twice / reads + 0.005


@pytest.mark.parametrize("share", CAPACITIES)
def test_nodes_that_keep_to_their_lanes_hit_like_one_and_read_each_block_on_one_node(
    small: Simulation, share: float
) -> None:
    reads = {one.scene: one.reads for one in small.outcomes}
    assert reads["fixed lanes"] == reads["one node"]
    assert small.hit_rate("fixed lanes", "pin", share) == pytest.approx(share, abs=0.02)


@pytest.mark.parametrize("share", CAPACITIES)
def test_nodes_that_are_dealt_other_blocks_each_epoch_hit_what_chance_left_with_them(
    small: Simulation, share: float
) -> None:
    pin, plan = (small.hit_rate("dealt anew", policy, share) for policy in ("pin", "plan"))
    assert pin == pytest.approx(share / SMALL.nodes, abs=0.03)
    assert pin < plan < small.hit_rate("fixed lanes", "pin", share) + 0.05


@pytest.mark.parametrize("scene", SCENES)
@pytest.mark.parametrize("share", CAPACITIES)
def test_no_policy_hits_more_than_the_plan(small: Simulation, scene: str, share: float) -> None:
    best = small.hit_rate(scene, "plan", share)
    # The plan is the best over the whole run; what the first epoch hits is not counted.
    assert all(small.hit_rate(scene, policy, share) <= best + 0.002 for policy in POLICIES)


def test_the_plan_wins_in_a_mixture_at_unequal_rates(small: Simulation) -> None:
    assert small.hit_rate("mixture", "plan", 0.25) > small.hit_rate("mixture", "pin", 0.25) + 0.1


def test_half_of_the_mixture_comes_from_a_fifth_of_the_blocks_and_no_source_loses_a_row() -> None:
    positions = np.arange(SMALL.epochs * SMALL.samples)
    blocks = _mixed(SMALL, positions)
    is_small = blocks < 192
    assert is_small.mean() == pytest.approx(0.5, abs=0.001)
    assert blocks.max() < SMALL.blocks
    # An epoch of the small part, as long as 0.4 epochs of the whole: each of its rows once, but for the counters' phase.
    times = np.bincount(blocks[: int(0.4 * SMALL.samples)][is_small[: int(0.4 * SMALL.samples)]], minlength=192)
    assert times.sum() == 192 * SMALL.samples_per_block
    assert (times == SMALL.samples_per_block).mean() > 0.95


def test_the_same_workload_gives_the_same_numbers_and_another_seed_others(small: Simulation) -> None:
    assert simulate(SMALL) == small
    other = Workload(blocks=960, samples_per_block=2, lanes=8, window_blocks=2, nodes=4, seed=1)
    assert simulate(other).outcomes != small.outcomes


def test_progress_is_told_after_each_outcome() -> None:
    told: list[None] = []
    found = simulate(SMALL, capacities=[0.5], progress=lambda: told.append(None))
    assert len(told) == len(found.outcomes) == len(SCENES) * len(POLICIES)


@pytest.mark.parametrize("share", [0, -0.1, 1.1, float("nan")])
def test_a_capacity_that_is_no_share_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="capacities"):
        simulate(SMALL, capacities=[share])


@pytest.mark.parametrize(
    "wrong",
    [{"epochs": 1}, {"nodes": 0}, {"blocks": 959}, {"nodes": 97, "blocks": 960}, {"window_blocks": 3}, {"seed": -1}],
)
def test_a_workload_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError):
        Workload(**wrong)


def stoker(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return (int(exited.value.code or 0), *capfd.readouterr())


def test_the_command_prints_a_table_and_what_it_says(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, err = stoker(capfd, "plan", "--simulate", "--blocks", 960, "--capacity", 0.5)
    assert code == 0 and err == ""
    lines = out.splitlines()
    assert lines[2].split() == ["capacity", "plan", "pin", "sieve", "lru"]
    assert [line.split("50%")[0].strip() for line in lines[3:8]] == list(SCENES)
    assert lines[3].split()[1:] == ["50%", "50.0%", "50.0%", "0.0%", "0.0%"]
    assert "On one node the plan" in out and "LRU hits at most 0% in a scan" in out


def test_the_command_prints_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    code, out, _ = stoker(capfd, "plan", "--simulate", "--json", "--blocks", 960, "--nodes", 4, "--capacity", 0.25)
    assert code == 0 and out.count("\n") == 1
    report: Any = json.loads(out)
    assert report["workload"]["nodes"] == 4
    scan = {one["policy"]: one["hit_rate"] for one in report["outcomes"] if one["scene"] == "scan"}
    assert (scan["pin"], scan["lru"]) == (0.25, 0)
    assert len(report["reading"]) == 4


def test_the_command_without_its_question_is_wrong_usage(capfd: pytest.CaptureFixture[str]) -> None:
    code, _, err = stoker(capfd, "plan")
    assert code == 2 and "--simulate" in err
