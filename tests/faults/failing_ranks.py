"""Trial "failing ranks": one rank of a job dies, hangs, has another tree or another root, at every point of a save.

A job of three ranks without a process group saves step 0 in peace. At step 1 one of them comes to grief just before it
calls the store for the k-th time, for every k: SIGKILL, or SIGSTOP until the others have given up. After each case:

* every other rank is told in time, by a typed error that names the rank and a host, unless step 1 is committed;
* all ranks agree with the log on whether it is; step 0 is there;
* the next save works: on the same managers, with the rank that hung among them; of a rank that died, by a new job.
"""

import importlib
import json
import os
import re
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from stoker.checkpoint import CheckpointManager, commit
from stoker.errors import RootNotShared, StokerError
from stoker.storage.local import LocalStore, LocalWriter

from .actors import Actor, run_program
from .saving import PRELOAD

WORLD_SIZE = 3
_TIMEOUT_S = 4.0
_GRACE_S = 1.0
_SLACK_S = 20.0
"""How much later than the deadline a rank may hear of it on a machine that does several cases at once."""
_AT_ONCE = 6
Kind = Literal["dies", "hangs", "disagrees", "other root", "other root, with a process group"]


@dataclass(frozen=True, kw_only=True)
class Case:
    """What happens to which rank, before which of its calls of the store (from 1)."""

    kind: Kind
    rank: int
    call: int = 0

    def __str__(self) -> str:
        return f"rank {self.rank} {self.kind}" + (f" before call {self.call}" if self.call else "")


@dataclass(frozen=True, kw_only=True)
class RanksReport:
    """What came of all cases; `outcomes` counts what the other ranks were told."""

    num_cases: int
    outcomes: dict[str, int]
    slowest_s: float
    violations: list[str]

    @property
    def ok(self) -> bool:
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        return {"trial": "failing ranks", "ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        told = ", ".join(f"{name} {number:,}" for name, number in sorted(self.outcomes.items()))
        head = (
            f"failing ranks: {self.num_cases:,} cases; the other ranks were told {told}; the last one after "
            f"{self.slowest_s:.1f} s of a deadline of {_TIMEOUT_S:g} s: {'ok' if self.ok else 'VIOLATED'}"
        )
        return "\n".join([head, *(f"NOT {violation}" for violation in self.violations)])


def prove_ranks(
    directory: Path, *, cases: Sequence[Case] | None = None, progress: Callable[[], None] = lambda: None
) -> RanksReport:
    """Run `cases`, or every one there is, below `directory`."""
    chosen = None if cases is None else [asdict(case) for case in cases]
    return RanksReport(
        **run_program("tests.faults.failing_ranks", {"directory": str(directory), "cases": chosen}, progress)
    )


def main() -> None:
    """The process that forks the ranks: a job on standard input, a line for each case and a report on standard output."""
    job = json.loads(sys.stdin.read())
    directory = Path(job["directory"])
    for module in PRELOAD:
        importlib.import_module(module)
    wanted = None if job["cases"] is None else [Case(**case) for case in job["cases"]]
    if wanted is None:
        calls = _rehearse(directory / "rehearsal")
        wanted = [
            Case(kind=kind, rank=rank, call=call)
            for kind in ("dies", "hangs")
            for rank in (0, WORLD_SIZE - 1)
            for call in range(1, calls[rank] + 1)
        ]
        wanted += [Case(kind="disagrees", rank=rank) for rank in (0, WORLD_SIZE - 1)]
        wanted += [Case(kind="other root", rank=1), Case(kind="other root, with a process group", rank=1)]
    report = RanksReport(num_cases=len(wanted), outcomes={}, slowest_s=0.0, violations=[])
    waiting = list(enumerate(wanted))
    running: list[Actor] = []
    while waiting or running:
        # Each case is judged in a child, so that this process never has threads and may go on forking.
        while waiting and len(running) < _AT_ONCE:
            number, case = waiting.pop(0)
            running.append(Actor.fork(str(case), partial(_judge, case, directory / f"case-{number:03d}")))
        judge = running.pop(0)
        report = _joined(report, judge)
        judge.kill()
        print(judge.name, flush=True)
    print(json.dumps(asdict(report)), flush=True)


def _joined(report: RanksReport, judge: Actor) -> RanksReport:
    try:
        found = judge.hear()
    except AssertionError as error:
        return replace(report, violations=[*report.violations, str(error)])
    return replace(
        report,
        outcomes=dict(Counter(report.outcomes) + Counter(found["told"])),
        slowest_s=max(report.slowest_s, found["slowest_s"]),
        violations=report.violations + found["violations"],
    )


def _judge(case: Case, root: Path, actor: Actor) -> None:
    """In a child: play one case and tell what came of it."""
    one = _Case(case, root)
    violations = []
    try:
        one.judge()
    except AssertionError as error:
        violations.append(f"{case}: {error}")
    finally:
        one.kill()
    actor.tell(told=one.told, slowest_s=round(one.slowest_s, 1), violations=violations)
    for _ in actor.orders():  # until it is killed
        pass


def _rehearse(root: Path) -> list[int]:
    """How often each rank calls the store in the save of step 1, left alone."""
    ranks = [Actor.fork(f"rank {rank}", partial(_rank, rank, root, root.name, None)) for rank in range(WORLD_SIZE)]
    for rank in ranks:
        rank.tell(step=0)
        rank.tell(step=1)
    calls = []
    for rank in ranks:
        rank.hear()
        calls.append(rank.hear()["calls"])
        rank.kill()
    return calls


class _Case:
    """One case, and the ranks that play it."""

    def __init__(self, case: Case, root: Path) -> None:
        self.case, self._root = case, root
        root.mkdir(parents=True)
        self.told: list[str] = []
        self.slowest_s = 0.0
        play = _group_rank if "group" in case.kind else _rank
        self._ranks = [
            Actor.fork(f"rank {rank}", partial(play, rank, root, "first", case)) for rank in range(WORLD_SIZE)
        ]
        next_job = [Actor.fork(f"rank {rank}", partial(_rank, rank, root, "next", None)) for rank in range(WORLD_SIZE)]
        self._next_job = next_job

    def kill(self) -> None:
        for rank in (*self._ranks, *self._next_job):
            rank.kill()

    def judge(self) -> None:
        """See the head of this module."""
        case, victim = self.case, self._ranks[self.case.rank]
        if "group" in case.kind:
            for rank in self._ranks:
                told = rank.hear()
                assert told["error"] == RootNotShared.__name__, told
                self._must_name(told)
            return
        others = [rank for rank in self._ranks if rank is not victim]
        if case.kind != "other root":
            answers = [self._save(rank, 0) for rank in self._ranks]
            assert [one.hear()["error"] for one in answers] == [None] * WORLD_SIZE, "step 0 must be committed"
        began = time.monotonic()
        for rank in self._ranks:
            self._save(rank, 1)
        heard = {rank.name: rank.hear() for rank in others}
        self.slowest_s = time.monotonic() - began
        limit_s = _TIMEOUT_S + _GRACE_S + _SLACK_S
        assert self.slowest_s < limit_s, (
            f"the others heard after {self.slowest_s:.1f} s, the deadline was {_TIMEOUT_S} s"
        )
        if case.kind == "hangs":
            victim.wake()
        if case.kind != "dies":
            heard[victim.name] = victim.hear()
        for name, told in heard.items():
            self.told.append(told["error"] or "that it is committed")
            if told["error"] and name != victim.name:
                self._must_name(told)
        committed = 1 in _steps(self._root)
        errors = {told["error"] for name, told in heard.items() if name != victim.name}
        # Rank 0 may do after it woke up what it was about to: then the others were told that they can't know.
        may_be = {"CommitUnknown"} if case.kind == "hangs" else set()
        assert errors == {None} if committed and errors != may_be else None not in errors, heard
        again = self._next_job if case.kind in ("dies", "other root") else self._ranks
        for rank in again:
            self._save(rank, 2)
        after = [rank.hear() for rank in again]
        assert [told["error"] for told in after] == [None] * WORLD_SIZE, f"the next save must work: {after}"
        assert _steps(self._root) == [*([0] if case.kind != "other root" else []), *([1] if committed else []), 2]

    def _save(self, rank: Actor, step: int) -> Actor:
        rank.tell(step=step)
        return rank

    def _must_name(self, told: dict[str, Any]) -> None:
        message, rank = told["message"], self.case.rank
        assert re.search(rf"\branks? .*\b{rank}\b", message), f"does not name rank {rank}: {message}"
        assert socket.gethostname() in message, f"names no host: {message}"


def _steps(root: Path) -> list[int]:
    with CheckpointManager(root) as manager:
        steps = manager.steps()
        for step in steps:
            tree = _tree(-1)
            manager.restore(tree, step=step)
            assert torch.equal(tree["model"]["w"], _tree(step)["model"]["w"]), f"step {step} is torn"
    return steps


def _tree(step: int) -> dict[str, Any]:
    # Several tensors, so that each rank writes some.
    return {"model": {"w": torch.full((3000,), step), **{f"b{i}": torch.full((500,), step) for i in range(4)}}}


def _rank(rank: int, root: Path, run_id: str, case: Case | None, actor: Actor) -> None:
    """In a rank: save what it is told to, and come to grief at step 1 if it is the one."""
    commit._GRACE_S = _GRACE_S
    victim = case is not None and case.rank == rank
    manager: CheckpointManager | None = None
    fate = _Fate(None if case is None or not victim else case)
    for order in actor.orders():
        told: dict[str, Any] = {"error": None, "message": ""}
        try:
            step = order["step"]
            if manager is None:
                place = root / "elsewhere" if victim and case is not None and case.kind == "other root" else root
                manager = CheckpointManager(
                    place, rank=rank, world_size=WORLD_SIZE, run_id=run_id, persist_timeout_s=_TIMEOUT_S
                )
            fate.begin(at_risk=step == 1)
            tree = _tree(step)
            if victim and case is not None and case.kind == "disagrees" and step == 1:
                tree["model"]["w"] = torch.ones(3)  # more tensors would make it a pipeline stage
            manager.save(step, tree).wait("committed")
        except StokerError as error:
            told = {"error": type(error).__name__, "message": _text(error)}
        actor.tell(**told, calls=fate.calls)


def _group_rank(rank: int, root: Path, run_id: str, case: Case, actor: Actor) -> None:
    """In a rank of a process group: one of them names another root."""
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=WORLD_SIZE)
    try:
        CheckpointManager(root / ("elsewhere" if rank == case.rank else "shared"))
        told = {"error": None, "message": ""}
    except StokerError as error:
        told = {"error": type(error).__name__, "message": _text(error)}
    actor.tell(**told)


def _text(error: StokerError) -> str:
    return " ".join([str(error), *getattr(error, "__notes__", ())])


class _Fate:
    """Counts the calls by which a rank changes the store, and acts on the case's one."""

    def __init__(self, case: Case | None) -> None:
        self._case = case
        self._at_risk = False
        self.calls = 0
        for owner, names in ((LocalStore, ("put", "create", "open_writer")), (LocalWriter, ("write_at", "commit"))):
            for name in names:
                setattr(owner, name, self._counted(getattr(owner, name)))

    def begin(self, *, at_risk: bool) -> None:
        self.calls, self._at_risk = 0, at_risk

    def _counted(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self._at_risk and self._case is not None and self.calls == self._case.call:
                self._at_risk = False
                # The whole process, whichever thread this is: os.kill(SIGSTOP) stops them all.
                os.kill(os.getpid(), {"dies": 9, "hangs": 19}[self._case.kind])
            return call(*args, **kwargs)

        return counted


if __name__ == "__main__":
    main()
