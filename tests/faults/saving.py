"""Trial "saving": a process that saves step after step under one root, killed at any moment.

After each kill: the newest step is no older than the last one that was acknowledged, and never older than it was before;
every step that is listed restores, bit for bit, what that step must hold. The next process goes on saving, and once it
has a quiet moment, nothing is left of the saves that were killed.
"""

from pathlib import Path
from typing import Any

import torch

from stoker.checkpoint.manager import CheckpointManager
from stoker.testing.kill import Death, Recorder, Trial

_STEPS_PER_PASS = 10
_KEEP_LAST = 3


def tree_at(step: int) -> dict[str, Any]:
    """The state of a step: every byte of it follows from `step`."""
    base = torch.arange(20_000, dtype=torch.int32) + step * 7919
    return {
        "model": {
            "embedding": base.view(200, 100).clone(),
            "weight": base[:4096].view(torch.float32).view(64, 64).clone(),
            "bias": base[:64].to(torch.bfloat16),
            "scale": torch.tensor(step, dtype=torch.int64),
        },
        "progress": {"step": step, "tokens": step * 2**40, "note": f"step {step}"},
    }


def differences(found: dict[str, Any], step: int) -> list[str]:
    """Names of what is not, bit for bit, the state of `step`."""
    expected = tree_at(step)
    wrong = [
        name
        for name, tensor in expected["model"].items()
        if not torch.equal(tensor.reshape(-1).view(torch.uint8), found["model"][name].reshape(-1).view(torch.uint8))
    ]
    return wrong + [key for key, value in expected["progress"].items() if found["progress"][key] != value]


def work(directory: Path, recorder: Recorder) -> None:
    """Save the next steps, each while the one before still persists."""
    with CheckpointManager(directory / "root", keep_last=_KEEP_LAST, grace_s=0.0) as manager:
        newest = manager.latest()
        first = 0 if newest is None else newest + 1
        with recorder.in_flight():
            before = None
            for step in range(first, first + _STEPS_PER_PASS):
                handle = manager.save(step, tree_at(step))
                if before is not None:
                    before.wait("committed")
                    recorder.acknowledge(step - 1)
                before = handle
            assert before is not None
            before.wait("committed")
            recorder.acknowledge(first + _STEPS_PER_PASS - 1)


class Check:
    """What must hold after each kill."""

    def __init__(self) -> None:
        self._newest = -1

    def __call__(self, directory: Path, death: Death) -> None:
        root = directory / "root"
        with CheckpointManager(root, grace_s=0.0) as manager:
            steps = manager.steps()
            newest = max(steps, default=-1)
            assert (manager.latest() if steps else -1) == newest
            assert newest >= death.acknowledged, f"step {death.acknowledged} was acknowledged, the newest is {newest}"
            assert newest >= self._newest, f"step {self._newest} was the newest once, now {newest} is"
            self._newest = newest
            assert len(steps) <= _KEEP_LAST, f"more than {_KEEP_LAST} steps are kept: {steps}"
            for step in steps:
                tree = tree_at(-1)
                manager.restore(tree, step=step)
                wrong = differences(tree, step)
                assert not wrong, f"step {step} came back with other bits in {wrong}"
        if not death.killed:
            _check_nothing_is_left(root, newest + 1)


def _check_nothing_is_left(root: Path, step: int) -> None:
    """A run that has a quiet moment after its first save deletes whatever killed runs left."""
    with CheckpointManager(root, keep_last=_KEEP_LAST, grace_s=0.0) as manager:
        manager.save(step, tree_at(step)).wait("committed")
        steps = manager.steps()
    left = sorted({path.relative_to(root).parts[0] for path in root.glob("step-*/**/*") if path.is_file()})
    assert len(left) == len(steps), f"leftovers of killed saves: {left} for steps {steps}"


def trial(directory: Path) -> Trial:
    """The trial; `directory` is not needed."""
    return Trial(
        name="saving", program="tests.faults.saving:work", check=Check(), preload=["stoker.storage.local", "torch"]
    )
