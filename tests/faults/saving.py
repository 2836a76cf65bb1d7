"""Trials "saving": processes that save step after step under one root, killed at any moment.

After each kill: the newest step is no older than the last one that was acknowledged, and never older than it was before;
every step that is listed is whole under its root, and restores, bit for bit, what it must hold. The next process restores
the newest step, as a job does, and goes on saving; once it has a quiet moment, nothing is left of the saves that were
killed.

In "saving with local" a directory on the node's own disk stands in front of the root. In "saving ranks" the ranks of one
job, forked and without a process group, share the writing, and all die at once. In "saving incremental" a part of the state
stays the same for some steps, and steps refer to where it was written first, also when that step has been retired. In
"saving on s3" the root is on a real S3 server, which lives on.
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

from stoker.checkpoint.log import CheckpointLog, kept_blobs, step_directory
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
_BASE_STEPS = 7
"""For so many steps the base stays the same: longer than its first step is kept."""


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


def tree_with_base_at(step: int) -> dict[str, Any]:
    """The same with a base that changes now and then; 1 MiB, since less has no file of its own."""
    base = torch.arange(1 << 18, dtype=torch.int32) + step // _BASE_STEPS
    return {"base": {"base": base}, **tree_at(step)}


def differences(found: dict[str, Any], step: int) -> list[str]:
    """Names of what is not, bit for bit, the state of `step`."""
    expected = tree_with_base_at(step) if "base" in found else tree_at(step)
    if "base" in found and not torch.equal(expected["base"]["base"], found["base"]["base"]):
        return ["base"]
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


def work(directory: Path, recorder: Recorder, local: Path | None = None, *, incremental: bool = False) -> None:
    """Restore the newest step, as a job does when it starts, and save the next ones, each while the one before persists."""
    url, options = _place(directory)
    tree_of = tree_with_base_at if incremental else tree_at
    with CheckpointManager(
        url, local=local, storage_options=options, keep_last=_KEEP_LAST, grace_s=0.0, incremental=incremental
    ) as manager:
        newest = _newest(manager)
        if newest >= 0:
            tree = tree_of(-1)
            newest = manager.restore(tree).step
            assert not differences(tree, newest), f"step {newest} came back with other bits"
        _save_steps(manager, recorder, newest, tree_of)


def work_with_local(directory: Path, recorder: Recorder) -> None:
    """The same with a tier on the node's own disk, from which it restores as well."""
    work(directory, recorder, directory / "local")


def work_incremental(directory: Path, recorder: Recorder) -> None:
    """The same with steps that refer to files of older ones."""
    work(directory, recorder, incremental=True)


def _newest(manager: CheckpointManager) -> int:
    newest = manager.latest()
    return -1 if newest is None else newest


def _save_steps(
    manager: CheckpointManager, recorder: Recorder, newest: int, tree_of: Callable[[int], dict[str, Any]] = tree_at
) -> None:
    """Rank 0 speaks for all: what it acknowledges must be there for everybody."""
    first = newest + 1
    acknowledge: Callable[[int], None] = recorder.acknowledge if manager.rank == 0 else lambda step: None
    with recorder.in_flight():
        before = None
        for step in range(first, first + _STEPS_PER_PASS):
            handle = manager.save(step, tree_of(step))
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
        grace_s=0.0,
        rank=rank,
        world_size=_WORLD_SIZE,
        run_id=run_id,
    ) as manager:
        # All see the same: the next step needs a fragment of each of them.
        _save_steps(manager, recorder, _newest(manager))


class Check:
    """What must hold after each kill. A step whose objects have not changed since they were found right is not read again."""

    def __init__(self, *, incremental: bool = False) -> None:
        self._tree_of = tree_with_base_at if incremental else tree_at
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
                found = {step: _objects_of(store, step) for step in steps}
                changed = [step for step in steps if found[step] != self._right.get(step)]
                _check_root(store, changed)
            for step in changed:
                tree = self._tree_of(-1)
                manager.restore(tree, step=step)
                wrong = differences(tree, step)
                assert not wrong, f"step {step} came back with other bits in {wrong}"
            self._right = found
        if not death.killed:
            _check_nothing_is_left(url, options, newest + 1, self._tree_of(newest + 1))


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


def _objects_of(store: ObjectStore, step: int) -> list[tuple[str, int, str]]:
    """All that a step consists of, in other directories, too."""
    _, live, _ = resolve_step(CheckpointLog(store), step, store.url)
    elsewhere = [_objects(store, f"{home}/{blob}") for home, blobs in live.refs.items() for blob in blobs]
    return _objects(store, f"step-{step:012d}-") + [one for found in elsewhere for one in found]


def _check_nothing_is_left(url: str, options: dict[str, Any], step: int, tree: dict[str, Any]) -> None:
    """A run that has a quiet moment after its first save deletes whatever killed runs left."""
    with CheckpointManager(
        url, storage_options=options, keep_last=_KEEP_LAST, grace_s=0.0, incremental="base" in tree
    ) as manager:
        manager.save(step, tree).wait("committed")
    with open_store(url, **options) as store:
        head = CheckpointLog(store).head()
        assert head is not None
        own = {step_directory(step, live.nonce) for step, live in head.live.items()}
        kept = {f"{home}/{blob}" for home, blobs in kept_blobs(head.live.values()).items() for blob in blobs}
        left = sorted(key for key, _, _ in _objects(store, "step-") if key.partition("/")[0] not in own)
    assert set(left) <= kept, f"leftovers of killed saves: {sorted(set(left) - kept)} for steps {head.steps}"


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


def trial_incremental(directory: Path) -> Trial:
    """One process with steps that refer to files of older ones; `directory` is not needed."""
    return Trial(
        name="saving incremental",
        program="tests.faults.saving:work_incremental",
        check=Check(incremental=True),
        preload=PRELOAD,
    )


def trial_on_s3(directory: Path, server: S3Server) -> Trial:
    """One process that saves to `server`; `directory` is the one that the trial will run in."""
    url = f"{server.url('stoker', 'saving')}/{directory.name}"
    (directory / _S3_NOTE).write_text(json.dumps({"url": url, "options": server.storage_options}))
    return Trial(
        name="saving on s3", program="tests.faults.saving:work", check=Check(), preload=[*PRELOAD, "obstore.store"]
    )
