"""Trial "races": two writers that want the same step, and a zombie that wakes up when they are done.

In each race, under a root of its own: a job saves step 1 and is stopped (SIGSTOP) at a random moment of that save; two
new jobs then save step 1 at the same time, each with bytes of its own; the first job is woken up (SIGCONT) and finds out
what became of its save. After each race:

* exactly one of the three was told that step 1 is committed, and a restore gives that one's bytes;
* the zombie's next save is fenced, whatever the first one came to;
* exactly one of the two others, that of the newest term, can save on; the other one is fenced;
* every record of the log follows the one before it, and terms never fall.

The three are processes, forked before anything starts a thread from one that then judges them.
"""

import contextlib
import importlib
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.log import CheckpointLog, Record, parse_log_key
from stoker.errors import StokerError
from stoker.storage import open_store

from .actors import Actor, run_program
from .saving import PRELOAD

_WRITERS = ("zombie", "a", "b")
_PATIENCE_S = 60.0
COMMITTED, FENCED, TAKEN = "committed", "Fenced", "StepAlreadyCommitted"


@dataclass(frozen=True, kw_only=True)
class RacesReport:
    """What many races came to.

    Attributes:
        winners: how often each of the three committed the step; stalled: races in which the zombie was stopped in its save.
        seconds: of all races.
        violation: the first broken rule; None if every race was right.
    """

    where: str
    seed: int
    num_races: int
    winners: Mapping[str, int]
    stalled: int
    seconds: float
    violation: str | None

    @property
    def ok(self) -> bool:
        return self.violation is None

    def to_json(self) -> dict[str, Any]:
        return {"trial": "races", "ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        won = ", ".join(f"{name} {self.winners.get(name, 0):,}" for name in _WRITERS)
        verdict = "ok" if self.violation is None else f"VIOLATED\n{self.violation}"
        return (
            f"races ({self.where}, seed {self.seed}): {self.num_races:,} of two writers and a stalled one, "
            f"won by {won}; stopped in its save: {self.stalled:,}; {self.seconds:.1f} s: {verdict}"
        )


def run_races(
    url: str | Path,
    num_races: int,
    *,
    seed: int | None = None,
    storage_options: Mapping[str, Any] | None = None,
    program: str = "tests.faults.racing",
    progress: Callable[[], None] = lambda: None,
) -> RacesReport:
    """Run races below `url`, in processes of their own; `progress` is called after each."""
    job = {
        "url": str(url),
        "num_races": num_races,
        "seed": int.from_bytes(os.urandom(4), "little") if seed is None else seed,
        "storage_options": dict(storage_options or {}),
    }
    return RacesReport(**run_program(program, job, progress))


def main(work: Callable[["Actor"], None] | None = None) -> None:
    """The process that forks the three and judges: a job on standard input, a line for each race and a report out."""
    job = json.loads(sys.stdin.read())
    for module in PRELOAD:
        importlib.import_module(module)
    actors = {name: Actor.fork(name, work or _work) for name in _WRITERS}
    began = time.monotonic()
    races = _Races(job, actors)
    violation = None
    done = 0
    try:
        for number in range(job["num_races"]):
            races.race(number)
            done += 1
            print(done, flush=True)
    except AssertionError as error:
        violation = f"race {done}: {error}"
    finally:
        for actor in actors.values():
            actor.kill()
    report = RacesReport(
        where=job["url"].partition("://")[0] if "://" in job["url"] else "posix",
        seed=job["seed"],
        num_races=done,
        winners=dict(races.winners),
        stalled=races.stalled,
        seconds=round(time.monotonic() - began, 1),
        violation=violation,
    )
    print(json.dumps(asdict(report)), flush=True)


class _Races:
    def __init__(self, job: Mapping[str, Any], actors: Mapping[str, "Actor"]) -> None:
        self._url, self._options = job["url"], job["storage_options"]
        self._random = random.Random(job["seed"])
        self._actors = actors
        self._save_s = 0.02
        self.winners: Counter[str] = Counter()
        self.stalled = 0

    def race(self, number: int) -> None:
        url = f"{self._url}/{number:06d}"
        zombie, *writers = self._actors.values()
        for actor in self._actors.values():
            actor.ask(do="open", url=url, options=self._options)
        has_term = (
            number % 3 != 0
        )  # else the zombie may be stopped before it takes one, and is no zombie when it wakes up
        if has_term:
            began = time.monotonic()
            assert zombie.ask(do="save", step=0)["outcome"] == COMMITTED
            self._save_s = 0.9 * self._save_s + 0.1 * (time.monotonic() - began)
        zombie.tell(do="save", step=1)
        time.sleep(self._random.uniform(0, 1.2 * self._save_s))
        zombie.stop()
        for writer in writers:
            writer.tell(do="save", step=1)
        outcomes = {writer.name: writer.hear()["outcome"] for writer in writers}
        zombie.wake()
        outcomes[zombie.name] = zombie.hear()["outcome"]
        after = {actor.name: actor.ask(do="save", step=2)["outcome"] for actor in self._actors.values()}
        for actor in self._actors.values():
            actor.ask(do="close")
        told = f"step 1: {outcomes}, then step 2: {after}"
        winners = [name for name, outcome in outcomes.items() if outcome == COMMITTED]
        assert len(winners) == 1, f"not one winner; {told}"
        assert set(outcomes.values()) <= {COMMITTED, FENCED, TAKEN}, told
        assert not has_term or after[zombie.name] == FENCED, f"the zombie was not fenced; {told}"
        assert sorted(after.values()) == sorted([COMMITTED, FENCED, FENCED]), f"not all but one were fenced; {told}"
        self._look(url, winners[0], next(name for name, outcome in after.items() if outcome == COMMITTED))
        self.winners[winners[0]] += 1
        self.stalled += outcomes[zombie.name] != COMMITTED

    def _look(self, url: str, first: str, second: str) -> None:
        """The steps are those that the winners were told of, with their bytes, and the log has no gap."""
        with CheckpointManager(url, storage_options=self._options) as manager:
            assert [step for step in manager.steps() if step] == [1, 2], manager.steps()
            for step, name in ((1, first), (2, second)):
                tree = _tree("nobody", 0)
                manager.restore(tree, step=step)
                expected = _tree(name, step)
                assert tree["who"] == expected["who"], (
                    f"step {step} is that of {tree['who']}, {name} was told it is its own"
                )
                assert torch.equal(tree["model"]["w"], expected["model"]["w"]), f"step {step} is torn"
        with open_store(url, **self._options) as store:
            records = [Record.from_json(store.get(info.key), place=info.key) for info in store.list("log/")]
            numbers = [parse_log_key(info.key) for info in store.list("log/")]
            assert CheckpointLog(store).head() == records[0]
        assert numbers == [record.seq for record in records] == list(range(len(records), 0, -1)), numbers
        terms = [record.term for record in records]
        assert terms == sorted(terms, reverse=True), f"terms fell: {terms[::-1]}"


def _tree(who: str, step: int) -> dict[str, Any]:
    value = 10 * step + ("nobody", *_WRITERS).index(who)
    return {"model": {"w": torch.full((5000,), value, dtype=torch.int32)}, "who": f"{who} at {step}"}


def _work(actor: Actor) -> None:
    """In the child: what a job does with its manager, order by order."""
    manager: CheckpointManager | None = None
    for order in actor.orders():
        outcome = COMMITTED
        try:
            if order["do"] == "open":
                manager = CheckpointManager(
                    order["url"], storage_options=order["options"], persist_timeout_s=_PATIENCE_S
                )
            elif order["do"] == "close":
                assert manager is not None
                with contextlib.suppress(StokerError):
                    manager.close()
            else:
                assert manager is not None
                manager.save(order["step"], _tree(actor.name, order["step"])).wait("committed", _PATIENCE_S)
        except StokerError as error:
            outcome = type(error).__name__
        actor.tell(outcome=outcome)


if __name__ == "__main__":
    main()
