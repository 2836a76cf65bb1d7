"""Trials "saving": processes that save step after step under one root, killed at any moment.

After each kill: the newest step is no older than the last one that was acknowledged, and never older than it was before;
every step that is listed is whole under its root, and restores, bit for bit, what it must hold. The next process restores
the newest step, as a job does, and goes on saving; once it has a quiet moment, nothing is left of the saves that were
killed.

In "saving with local" a directory on the node's own disk stands in front of the root. In "saving ranks" the ranks of one
job, forked and without a process group, share the writing, and all die at once. In "saving on s3" the root is on a real S3
server, which lives on.
"""

import json
import os
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from stoker.checkpoint.log import CheckpointLog, step_directory
from stoker.checkpoint.manager import CheckpointManager
from stoker.checkpoint.reader import StepReader, read_manifest, resolve_step
from stoker.storage import ObjectStore, open_store
from stoker.testing import S3Server
from stoker.testing.kill import Death, Recorder, Trial

_STEPS_PER_PASS = 5
"""As few as leave most of a pass to its saves: a life costs 0.1 s of a processor, so 10,000 take minutes."""
_KEEP_LAST = 3
_WORLD_SIZE = 3
_S3_NOTE = "s3.json"
_GRACE_OF_RANKS_S = 5.0
"""Of several ranks, one may write for the next step before rank 0 knows of it: without a grace that would be garbage."""


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


def _place(directory: Path) -> tuple[str, dict[str, Any]]:
    """Root and storage options of the trial that works in `directory`."""
    note = directory.parent / _S3_NOTE
    if not note.exists():
        return str(directory / "root"), {}
    server = json.loads(note.read_text())
    return f"{server['url']}/{directory.name}", server["options"]


def work(directory: Path, recorder: Recorder, local: Path | None = None) -> None:
    """Restore the newest step, as a job does when it starts, and save the next ones, each while the one before persists."""
    url, options = _place(directory)
    with CheckpointManager(url, local=local, storage_options=options, keep_last=_KEEP_LAST, grace_s=0.0) as manager:
        newest = _newest(manager)
        if newest >= 0:
            tree = tree_at(-1)
            newest = manager.restore(tree).step
            assert not differences(tree, newest), f"step {newest} came back with other bits"
        _save_steps(manager, recorder, newest)


def work_with_local(directory: Path, recorder: Recorder) -> None:
    """The same with a tier on the node's own disk, from which it restores as well."""
    work(directory, recorder, directory / "local")


def _newest(manager: CheckpointManager) -> int:
    newest = manager.latest()
    return -1 if newest is None else newest


def _save_steps(manager: CheckpointManager, recorder: Recorder, newest: int) -> None:
    """Rank 0 speaks for all: what it acknowledges must be there for everybody."""
    first = newest + 1
    acknowledge: Callable[[int], None] = recorder.acknowledge if manager.rank == 0 else lambda step: None
    with recorder.in_flight():
        before = None
        for step in range(first, first + _STEPS_PER_PASS):
            handle = manager.save(step, tree_at(step))
            if before is not None:
                before.wait("committed")
                acknowledge(step - 1)
            before = handle
        assert before is not None
        before.wait("committed")
        acknowledge(first + _STEPS_PER_PASS - 1)


def work_in_ranks(directory: Path, recorder: Recorder) -> None:
    """Do the same as one job of several ranks. This process only waits, so that it may fork again in its next pass."""
    run_id = os.urandom(8).hex()
    with recorder.in_flight():
        ranks = [fork(partial(_rank, directory, recorder, rank, run_id)) for rank in range(_WORLD_SIZE)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in ranks]
    assert codes == [0] * _WORLD_SIZE, f"exit codes of the ranks: {codes}"


def fork(act: Callable[[], None]) -> int:
    """Start `act` in a child of its own, which ends with 0 or with its traceback; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        act()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _rank(directory: Path, recorder: Recorder, rank: int, run_id: str) -> None:
    with CheckpointManager(
        directory / "root",
        keep_last=_KEEP_LAST,
        grace_s=_GRACE_OF_RANKS_S,
        rank=rank,
        world_size=_WORLD_SIZE,
        run_id=run_id,
    ) as manager:
        # All see the same: the next step needs a fragment of each of them.
        _save_steps(manager, recorder, _newest(manager))


class Check:
    """What must hold after each kill. A step whose objects have not changed since they were found right is not read again."""

    def __init__(self) -> None:
        self._newest = -1
        self._right: dict[int, list[tuple[str, int, str]]] = {}

    def __call__(self, directory: Path, death: Death) -> None:
        url, options = _place(directory)
        # As a job does that comes back: what the killed one had staged may be committed now, and retires an older step.
        with CheckpointManager(url, storage_options=options, keep_last=_KEEP_LAST, grace_s=0.0) as manager:
            steps = manager.steps()
            newest = max(steps, default=-1)
            assert (manager.latest() if steps else -1) == newest
            assert newest >= death.acknowledged, f"step {death.acknowledged} was acknowledged, the newest is {newest}"
            assert newest >= self._newest, f"step {self._newest} was the newest once, now {newest} is"
            self._newest = newest
            assert len(steps) <= _KEEP_LAST, f"more than {_KEEP_LAST} steps are kept: {steps}"
            with open_store(url, **options) as store:
                found = {step: _objects(store, f"step-{step:012d}-") for step in steps}
                changed = [step for step in steps if found[step] != self._right.get(step)]
                _check_root(store, changed)
            for step in changed:
                tree = tree_at(-1)
                manager.restore(tree, step=step)
                wrong = differences(tree, step)
                assert not wrong, f"step {step} came back with other bits in {wrong}"
            self._right = found
        if not death.killed:
            _check_nothing_is_left(url, options, newest + 1)


def _check_root(store: ObjectStore, steps: Sequence[int]) -> None:
    """A restore may take its bytes from what a dead process left in memory: those under the root must be right too."""
    log = CheckpointLog(store)
    for step in steps:
        _, live, _ = resolve_step(log, step, store.url)
        directory = step_directory(step, live.nonce)
        reader = StepReader(store, directory, read_manifest(store, directory, live))
        damaged = reader.damaged_blocks(reader.manifest.blobs.values(), on_read=lambda num_bytes: None)
        assert not damaged, f"step {step} is damaged under its root: {damaged[0]}"
        for path in reader.manifest.states:
            reader.read_state(path)


def _objects(store: ObjectStore, prefix: str) -> list[tuple[str, int, str]]:
    return [(info.key, info.size, info.version) for info in store.list(prefix)]


def _check_nothing_is_left(url: str, options: dict[str, Any], step: int) -> None:
    """A run that has a quiet moment after its first save deletes whatever killed runs left."""
    with CheckpointManager(url, storage_options=options, keep_last=_KEEP_LAST, grace_s=0.0) as manager:
        manager.save(step, tree_at(step)).wait("committed")
        steps = manager.steps()
    with open_store(url, **options) as store:
        left = sorted({key.partition("/")[0] for key, _, _ in _objects(store, "step-")})
    assert len(left) == len(steps), f"leftovers of killed saves: {left} for steps {steps}"


PRELOAD = ["torch", "stoker.storage.local", *(["pandas", "pyarrow.pandas_compat"] if find_spec("pandas") else [])]
"""What a first save imports; where pandas is installed, pyarrow imports it for its first array."""


def trial(directory: Path) -> Trial:
    """One process; `directory` is not needed."""
    return Trial(name="saving", program="tests.faults.saving:work", check=Check(), preload=PRELOAD)


def trial_with_local(directory: Path) -> Trial:
    """One process with a local tier; `directory` is not needed."""
    return Trial(
        name="saving with local", program="tests.faults.saving:work_with_local", check=Check(), preload=PRELOAD
    )


def trial_of_ranks(directory: Path) -> Trial:
    """The ranks of one job; `directory` is not needed."""
    return Trial(name="saving ranks", program="tests.faults.saving:work_in_ranks", check=Check(), preload=PRELOAD)


def trial_on_s3(directory: Path, server: S3Server) -> Trial:
    """One process that saves to `server`; `directory` is the one that the trial will run in."""
    url = f"{server.url('stoker', 'saving')}/{directory.name}"
    (directory / _S3_NOTE).write_text(json.dumps({"url": url, "options": server.storage_options}))
    return Trial(
        name="saving on s3", program="tests.faults.saving:work", check=Check(), preload=[*PRELOAD, "obstore.store"]
    )
