"""The demonstration's judge, and the demonstration."""

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker.checkpoint import save
from stoker.demo import compare_checkpoints, compare_runs, compare_streams, read_events, train_script
from stoker.loaders import TokenWriter

STRAIGHT = [{"event": "step", "step": step, "loss": 1 / step} for step in range(1, 7)]


def test_a_killed_run_with_the_same_losses_is_identical_also_where_steps_were_done_twice() -> None:
    resumed = [*STRAIGHT[:4], {"event": "saving", "step": 4}, {"event": "resumed", "step": 2}, *STRAIGHT[2:]]
    assert compare_runs(STRAIGHT, resumed, 6).ok


@pytest.mark.parametrize("step", range(1, 7))
def test_one_flipped_loss_is_found(step: int) -> None:
    flipped: list[dict[str, Any]] = [dict(event) for event in STRAIGHT]
    flipped[step - 1]["loss"] += 2**-50
    verdict = compare_runs(STRAIGHT, flipped, 6)
    assert not verdict.ok
    assert verdict.reason.startswith(f"step {step}: loss")


@pytest.mark.parametrize("step", range(1, 7))
def test_one_missing_step_is_found(step: int) -> None:
    missing = [event for event in STRAIGHT if event["step"] != step]
    assert compare_runs(STRAIGHT, missing, 6).reason == f"step {step} is missing"
    assert compare_runs(missing, STRAIGHT, 6).reason == f"step {step} is missing"


def test_a_repeated_step_with_another_loss_is_found() -> None:
    assert not compare_runs(STRAIGHT, [*STRAIGHT, {"event": "step", "step": 3, "loss": 0.5}], 6).ok


def test_checkpoints_are_compared_bit_by_bit(tmp_path: Path) -> None:
    weights = torch.arange(1000.0)
    save(tmp_path / "a", {"w": weights})
    save(tmp_path / "b", {"w": weights.clone()})
    other = weights.clone()
    other[500] = 500.00003
    save(tmp_path / "c", {"w": other})
    assert compare_checkpoints(str(tmp_path / "a"), str(tmp_path / "b"), {}).ok
    assert compare_checkpoints(str(tmp_path / "a"), str(tmp_path / "c"), {}).reason == "tensor w differs"


def test_a_line_torn_by_a_kill_is_no_event(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text('{"event": "step", "step": 1, "loss": 2.5}\n{"event": "st')
    assert read_events(log) == [{"event": "step", "step": 1, "loss": 2.5}]


ROWS = [{"event": "step", "step": step, "rows": {str(16 * step + i): i * step for i in range(4)}} for step in (1, 2, 3)]


def split(events: list[dict[str, Any]], rank: int) -> list[dict[str, Any]]:
    """One of two ranks' share of the rows."""
    return [e | {"rows": {p: crc for p, crc in e["rows"].items() if int(p) % 2 == rank}} for e in events]


def test_a_stream_that_is_split_over_ranks_is_the_same_stream() -> None:
    assert compare_streams(ROWS, [split(ROWS, 0), split(ROWS, 1)], 1, 3).ok


def test_a_lost_a_repeated_and_a_changed_row_are_found() -> None:
    left, right = split(ROWS, 0), split(ROWS, 1)
    changed = [dict(event) for event in right]
    changed[1]["rows"] = {p: crc ^ 1 for p, crc in changed[1]["rows"].items()}
    for ranks in ([left], [left, left, right], [left, changed]):
        assert not compare_streams(ROWS, ranks, 1, 3).ok
    assert compare_streams(ROWS, [left, right[:2]], 1, 3).reason == "step 3 is missing"


SMALL = ("--steps", "60", "--corpus-files", "60", "--width", "64")
# One thread: two that spin for each other make no progress on a machine that is busy with something else.
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}


def stoker(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stoker.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=ENV, capture_output=True, text=True, check=False)


def test_the_whole_demonstration_ends_with_ok(tmp_path: Path) -> None:
    done = stoker("demo", *SMALL, "--json", cwd=tmp_path)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert report["differences"] == []
    assert done.returncode == 0
    assert report["ok"] is True
    assert report["resume_bit_identical"] is True
    assert report["elastic_stream_identical"] is True
    assert report["elastic_parameters_identical"] is True
    # What was staged when it was killed may have been saved afterwards, from shared memory.
    assert report["resumed_from_step"] <= report["killed_in_save_of_step"]
    assert len(report["losses"]) == 60
    assert report["losses"][-1] < report["losses"][0]
    assert not list(tmp_path.iterdir())


def test_a_directory_in_use_is_refused_in_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    done = stoker("demo", "--dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "the directory must be empty" in done.stderr
    assert (tmp_path / "mine.txt").read_text() == "precious"


def test_the_training_script_is_handed_over_and_short(tmp_path: Path) -> None:
    done = stoker("demo", "--copy", str(tmp_path / "mine"), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    copied = tmp_path / "mine" / "train.py"
    assert copied.read_bytes() == train_script().read_bytes()
    assert len(copied.read_text().splitlines()) <= 150
    again = stoker("demo", "--copy", str(tmp_path / "mine"), cwd=tmp_path)
    assert again.returncode == 2


def processes_with(variable: str) -> list[int]:
    """Those that were started with this NAME=VALUE in their environment, and still run."""
    found = []
    for process in Path("/proc").iterdir():
        with suppress(OSError):
            if process.name.isdigit() and variable.encode() in (process / "environ").read_bytes():
                found.append(int(process.name))
    return found


@pytest.mark.parametrize(
    ("number", "moment"),
    [(signal.SIGINT, "[1/6]"), (signal.SIGTERM, "[3/6]"), (signal.SIGINT, "[6/6]")],
    ids=["ctrl-c before the runs", "sigterm in a run", "ctrl-c under torchrun"],
)
def test_an_interrupt_ends_in_one_sentence_and_leaves_nothing(tmp_path: Path, number: int, moment: str) -> None:
    memory = Path(os.environ["STOKER_SHM_DIR"]) / tmp_path.name
    memory.mkdir(mode=0o700)
    (tmp_path / "tmp").mkdir()
    env = {**ENV, "TMPDIR": str(tmp_path / "tmp"), "STOKER_SHM_DIR": str(memory)}
    command = [sys.executable, "-m", "stoker.cli", "demo", *SMALL]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env) as process:
        assert process.stderr is not None
        assert any(line.startswith(moment) for line in process.stderr)
        process.send_signal(number)
        process.send_signal(number)  # impatience must not leave more behind
        said = process.stderr.read().splitlines()
        assert process.wait() == 130
    assert said[-1] == "error: interrupted"
    assert not any(line.startswith("Traceback") for line in said)
    assert not list((tmp_path / "tmp").iterdir())
    assert not list(memory.iterdir())
    memory.rmdir()
    assert not processes_with(f"TMPDIR={tmp_path / 'tmp'}")


def test_too_small_a_disk_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    done = stoker("demo", "--dir", str(tmp_path / "work"), "--width", "1000000", cwd=tmp_path)
    assert done.returncode == 1
    assert "must be free" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def training(tmp_path: Path) -> list[str]:
    """The command line of two steps of examples/train.py with scalars for TensorBoard."""
    with TokenWriter(tmp_path / "tokens", dtype="uint16", eos_id=0) as writer:
        writer.write(np.arange(1, 2000) % 64)
    options = {
        "data": tmp_path / "tokens",
        "checkpoints": tmp_path / "ckpt",
        "tensorboard": tmp_path / "scalars",
        "steps": 2,
        "global-batch": 2,
        "seq-len": 16,
        "vocab": 64,
        "width": 32,
        "depth": 1,
    }
    return [sys.executable, str(train_script()), *(f"--{name}={value}" for name, value in options.items())]


def test_the_training_script_writes_scalars_for_tensorboard(training: list[str], tmp_path: Path) -> None:
    subprocess.run(training, env=ENV, check=True, capture_output=True)
    (events,) = (tmp_path / "scalars").iterdir()
    for name in (b"step/loss", b"step/wait_s", b"saving/stall_s"):
        assert name in events.read_bytes()


def test_the_training_script_does_without_tensorboard(training: list[str], tmp_path: Path) -> None:
    (tmp_path / "absent").mkdir()
    (tmp_path / "absent" / "tensorboard.py").write_text("raise ImportError('not installed')")
    subprocess.run(training, env={**ENV, "PYTHONPATH": str(tmp_path / "absent")}, check=True, capture_output=True)
    assert not (tmp_path / "scalars").exists()
