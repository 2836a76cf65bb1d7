"""The log under every schedule: real transitions and protocol, simulated store, network and time.

Processes are generators that stop before each request; a seeded scheduler decides whose request takes effect next, so a
process may sleep between its decision and the effect for as long as all others need. Saves may refer to a file of the
newest step instead of writing their own, also when that step has been retired meanwhile. Two thousand seeds run a writer that
stalls, a second one that restores and takes over, a third that goes back to an older step, retention, truncation and two
collectors, over a network that loses replies and delivers requests late. After every effect the invariants are checked.

That the simulation can see what it looks for is proved by mutants: take any single guard away and it finds a violation.
"""

import random
from collections import Counter
from collections.abc import Callable, Generator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeVar

import pytest

from stoker.checkpoint.log import (
    CreateRecord,
    FetchRecord,
    ListNewest,
    Record,
    Request,
    Transition,
    append_steps,
    collect_record,
    commit_record,
    head_steps,
    keep_last,
    kept_blobs,
    log_key,
    nonce_of,
    open_record,
    parse_log_key,
    step_directory,
)
from stoker.errors import (
    AttemptCollected,
    CommitUnknown,
    DeadlineExceeded,
    Fenced,
    NoCheckpoint,
    StepAlreadyCommitted,
    StoreUnavailable,
)

NUM_SEEDS = 2000
KEEP_STEPS = 2
KEEP_RECORDS = 3  # so few that a short nap of a writer is enough to lose its number
FILES = 2  # of an attempt
SHA256 = "0" * 64

T = TypeVar("T")
Process = Generator[None, None, T]


@dataclass(kw_only=True)
class Rules:
    """The guards, each of which a mutant replaces."""

    open: Callable[..., Record] = open_record
    commit: Callable[..., Record] = commit_record
    collect: Callable[..., Record] = collect_record
    append: Callable[[Transition], Generator[Request, Any, Record]] = append_steps
    exclusive_create: bool = True
    open_before_data: bool = True
    open_again_before_data: bool = True
    announce_before_delete: bool = True
    list_before_head: bool = True
    delete_only_what_nobody_refers_to: bool = True
    refer_to_first_home: bool = True


@dataclass
class World:
    """The store, what the network still carries, and what has been seen."""

    rules: Rules
    random: random.Random
    records: dict[str, bytes] = field(default_factory=dict)
    files: set[tuple[str, int]] = field(default_factory=set)
    in_flight: list[CreateRecord] = field(default_factory=list)
    head: Record | None = None
    ever_live: set[str] = field(default_factory=set)
    retired: set[str] = field(default_factory=set)
    violations: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)

    def answer(self, request: Request) -> Any:
        if isinstance(request, ListNewest):
            return min(self.records, default=None)
        if isinstance(request, FetchRecord):
            if request.key not in self.records:
                self.seen["a record truncated between LIST and GET"] += 1
            return self.records.get(request.key)
        luck = self.random.random()
        if luck < 0.04:
            self.seen["a request that is delivered late"] += 1
            self.in_flight.append(request)
            return "unknown"
        if luck < 0.06:
            return "unknown"
        created = self.create(request)
        if luck < 0.12:
            self.seen["a lost reply"] += 1
            return "unknown"
        return "created" if created else "exists"

    def create(self, request: CreateRecord) -> bool:
        if request.key in self.records and self.rules.exclusive_create:
            self.seen["a lost race for a number"] += 1
            return False
        seq = parse_log_key(request.key)
        assert seq is not None
        if self.head is not None and seq < self.head.seq:
            self.seen["a number that was truncated taken again"] += 1
        self.records[request.key] = request.data
        self.look()
        return True

    def delete_file(self, nonce: str, part: int) -> None:
        self.files.discard((nonce, part))
        self.check_whole()

    def truncate(self) -> None:
        for key in sorted(self.records)[KEEP_RECORDS:]:
            del self.records[key]

    def look(self) -> None:
        """Compare the newest record with the one before it."""
        key = min(self.records)
        new, old = Record.from_json(self.records[key], place=key), self.head
        if new == old:
            return
        self.head = new
        before = old.live if old is not None else {}
        rewinds = new.kind == "rewind"
        if old is not None and new.seq != old.seq + 1:
            self.violations["a record out of sequence"] += 1
        if (new.latest or -1) < max(before, default=-1) and not rewinds:
            self.violations["latest() went backwards"] += 1
        for step, one in new.live.items():
            if one.nonce in self.retired:
                self.violations["a step that was deleted came back"] += 1
            if step in before and before[step].nonce != one.nonce and not rewinds:
                self.violations["a committed step was replaced"] += 1
            self.ever_live.add(one.nonce)
        live = {one.nonce for one in new.live.values()}
        for one in before.values():
            if one.nonce not in live:
                self.retired.add(one.nonce)
                if one.nonce not in new.dead:
                    self.violations["a step was dropped without being announced"] += 1
        if rewinds:
            self.seen["a rewind"] += 1
        self.check_whole()

    def check_whole(self) -> None:
        if self.head is not None:
            for one in self.head.live.values():
                referred = {_file(directory, blob) for directory, blobs in one.refs.items() for blob in blobs}
                own = {(one.nonce, part) for part in range(FILES)} - {(one.nonce, part) for _, part in referred}
                if not own | referred <= self.files:
                    self.violations["a visible step is torn"] += 1

    def acknowledge(self, nonce: str) -> None:
        self.seen["a commit"] += 1
        if nonce not in self.ever_live:
            self.violations["a commit was acknowledged that never was"] += 1


def ask(world: World, steps: Generator[Request, Any, T]) -> Process[T]:
    """Run the protocol: stop before each request, then let it take effect."""
    try:
        request = next(steps)
        while True:
            yield
            request = steps.send(world.answer(request))
    except StopIteration as stop:
        return stop.value  # type: ignore[no-any-return]


def delete(world: World, nonce: str, record: Record | None = None) -> Process[None]:
    """Delete the files of an attempt, but for those that the steps of `record` refer to."""
    kept: set[tuple[str, int]] = set()
    if record is not None and world.rules.delete_only_what_nobody_refers_to:
        refs = kept_blobs(record.live.values())
        kept = {_file(directory, blob) for directory, blobs in refs.items() for blob in blobs}
    for part in range(FILES):
        yield
        if (nonce, part) in kept:
            world.seen["a file kept for another step"] += 1
        else:
            world.delete_file(nonce, part)


def _file(directory: str, blob: str) -> tuple[str, int]:
    """The file that a reference names."""
    return directory.rpartition("-")[2], int(blob)


def references(world: World, head: Record | None) -> dict[str, tuple[str, ...]]:
    """To the file 0 of the newest step: one that never changes."""
    if head is None or head.latest is None:
        return {}
    one = head.live[head.latest]
    if one.refs and world.rules.refer_to_first_home:
        return dict(one.refs)
    return {step_directory(head.latest, one.nonce): ("0",)}


def writer(world: World, run_id: str, num_saves: int, *, back: int = 0) -> Process[None]:
    """Restore the newest step (or one `back` before it), then save step after step as a manager does."""
    rules = world.rules
    head = yield from ask(world, head_steps())
    steps = head.steps if head is not None else []
    at = steps[max(0, len(steps) - 1 - back)] if steps else 0
    rewind_to = at if back and steps else None
    term: int | None = None
    for i in range(num_saves):
        step = at + 10 * (i + 1)
        for nth in range(3):
            nonce = nonce_of(run_id, step, nth)
            if term is None and rules.open_before_data:
                term = yield from take_term(world, run_id, rewind_to)
            opens_again = i == 2 and nth == 0  # to forget the dead
            if term and opens_again and rules.open_again_before_data:
                term = yield from take_term(world, run_id, None, above_term=term)
            if term == 0:
                return
            refs: dict[str, tuple[str, ...]] = {}
            if nth == 0 and i < 2:  # an incremental save; the first one goes by what was restored, before the term
                refs = references(world, (yield from ask(world, head_steps())) if i else head)
                world.seen["a save that refers to another"] += bool(refs)
            for part in range(1 if refs else 0, FILES):
                yield
                world.files.add((nonce, part))
            if term and opens_again and not rules.open_again_before_data:
                term = yield from take_term(world, run_id, None, above_term=term)
            if term is None:
                term = yield from take_term(world, run_id, rewind_to)
            if term == 0:
                return
            transition = commit_of(rules, term=term, step=step, nonce=nonce, refs=refs)
            try:
                record = yield from ask(world, rules.append(transition))
            except Fenced:
                world.seen["a fenced writer"] += 1
                return
            except AttemptCollected:
                world.seen["an attempt that was collected"] += 1
                continue
            except StepAlreadyCommitted:
                world.seen["a step committed already"] += 1
                break
            except StoreUnavailable:
                yield from delete(world, nonce)  # only a mutant comes here: it takes a lost reply for a failure
                break
            except (CommitUnknown, DeadlineExceeded):
                break
            world.acknowledge(nonce)
            for dead in record.dead:
                yield from delete(world, dead, record)
            yield
            world.truncate()
            break


def take_term(world: World, run_id: str, rewind_to: int | None, *, above_term: int = 0) -> Process[int]:
    """The term; 0 if the run can't start, or go on."""

    def opening(head: Record | None) -> Record:
        return world.rules.open(head, run_id, rewind_to=rewind_to, above_term=above_term)

    try:
        record = yield from ask(world, world.rules.append(opening))
    except (NoCheckpoint, StoreUnavailable):
        return 0
    except Fenced:
        world.seen["a run that was fenced when it opened again"] += 1
        return 0
    world.seen["a run that opens again"] += above_term > 0
    if above_term and record.term != above_term + 1:
        world.violations["a fenced run took the root back"] += 1
    return record.term


def commit_of(rules: Rules, *, term: int, step: int, nonce: str, refs: dict[str, tuple[str, ...]]) -> Transition:
    return lambda head: rules.commit(
        head, term=term, step=step, nonce=nonce, manifest_sha256=SHA256, refs=refs, keep=keep_last(KEEP_STEPS)
    )


def collector(world: World) -> Process[None]:
    """Delete what no record needs; it has no mercy with young attempts."""
    yield
    nonces = {nonce for nonce, _ in world.files}
    if not world.rules.announce_before_delete:
        head = yield from ask(world, head_steps())
        live = {one.nonce for one in head.live.values()} if head is not None else set()
        for nonce in sorted(nonces - live):
            yield from delete(world, nonce, head)
        return
    try:
        record = yield from ask(world, world.rules.append(lambda head: world.rules.collect(head, nonces=nonces)))
    except (NoCheckpoint, StoreUnavailable):
        return
    doomed = nonces & set(record.dead)
    if not world.rules.list_before_head:
        yield
        doomed = {nonce for nonce, _ in world.files} - {one.nonce for one in record.live.values()}
    for nonce in sorted(doomed):
        world.seen["garbage collected"] += 1
        yield from delete(world, nonce, record)


def network(world: World) -> Process[None]:
    """Deliver late what a writer gave up waiting for."""
    for _ in range(60):
        yield
        if world.in_flight:
            world.create(world.in_flight.pop(world.random.randrange(len(world.in_flight))))


def simulate(seed: int, rules: Rules) -> World:
    rng = random.Random(seed)
    world = World(rules, rng)
    processes: dict[str, Process[None]] = {
        "stalled": writer(world, "stalled", 3),
        "second": writer(world, "second", 4),
        "back": writer(world, "back", 2, back=rng.randrange(2)),
        "collector": collector(world),
        "collector 2": collector(world),
        "collector 3": collector(world),
        "network": network(world),
    }
    speed = {name: rng.choice((0.02, 0.3, 1, 1, 3)) for name in processes}
    start = dict.fromkeys(processes, 0)
    start |= {"second": rng.randrange(40), "back": rng.randrange(40, 120), "network": 0}
    start |= {name: rng.randrange(120) for name in processes if name.startswith("collector")}
    now = 0
    while processes and not world.violations:
        ready = [name for name in processes if now >= start[name]] or list(processes)
        name = rng.choices(ready, [speed[one] for one in ready])[0]
        now += 1
        if rng.random() < 0.1:
            speed[name] = rng.choice((0.01, 0.3, 1, 3))  # it falls asleep, or wakes up
        try:
            next(processes[name])
        except StopIteration:
            del processes[name]
    return world


@dataclass(frozen=True, kw_only=True)
class SchedulesReport:
    """What many schedules came to: how often each rare thing happened, and a sentence for each violation."""

    num_schedules: int
    seen: dict[str, int]
    violations: list[str]

    @property
    def ok(self) -> bool:
        return not self.violations

    def __str__(self) -> str:
        lines = [f"schedules: {self.num_schedules:,} of the log, {self.seen.get('a commit', 0):,} commits"]
        return "\n".join([*lines, *(f"NOT {violation}" for violation in self.violations)])

    def to_json(self) -> dict[str, Any]:
        return {"trial": "schedules", "ok": self.ok, **asdict(self)}


def run_schedules(num_schedules: int, *, first_seed: int = 0, rules: Rules | None = None) -> SchedulesReport:
    """One schedule for each seed; the suite runs some, the trial ``schedules`` of ``make prove`` many more."""
    seen: Counter[str] = Counter()
    violations = []
    for seed in range(first_seed, first_seed + num_schedules):
        world = simulate(seed, rules or Rules())
        violations += [f"seed {seed}: {violation}" for violation in world.violations]
        seen += world.seen
    return SchedulesReport(num_schedules=num_schedules, seen=dict(seen), violations=violations)


GUARDS = [
    "a commit",
    "a fenced writer",
    "an attempt that was collected",
    "a step committed already",
    "a lost race for a number",
    "a lost reply",
    "a request that is delivered late",
    "a number that was truncated taken again",
    "a record truncated between LIST and GET",
    "a rewind",
    "a run that opens again",
    "a run that was fenced when it opened again",
    "garbage collected",
    "a save that refers to another",
    "a file kept for another step",
]


def test_no_schedule_breaks_an_invariant_and_every_guard_is_needed_somewhere() -> None:
    report = run_schedules(NUM_SEEDS)
    assert report.ok, report
    assert report.seen.keys() == set(GUARDS)
    assert all(count > 10 for count in report.seen.values()), report.seen


def test_a_report_names_the_seeds_that_broke_an_invariant() -> None:
    report = run_schedules(50, rules=Rules(announce_before_delete=False))
    assert not report.ok and "NOT seed" in str(report)
    assert report.to_json()["violations"] == report.violations


# ---- mutants: each takes one guard away


def commit_under_any_term(head: Record | None, *, term: int, **wanted: Any) -> Record:
    return commit_record(head, term=head.term if head is not None else term, **wanted)


def commit_of_the_dead(head: Record | None, **wanted: Any) -> Record:
    blind = replace(head, dead=()) if head is not None else None
    record = commit_record(blind, **wanted)
    if record is blind and head is not None:
        return head
    return replace(record, dead=(head.dead if head is not None else ()) + record.dead)


def commit_of_refs_to_anything(head: Record | None, *, refs: dict[str, tuple[str, ...]], **wanted: Any) -> Record:
    record = commit_record(head, **wanted)
    if record is head:
        return record
    step = wanted["step"]
    return replace(record, live={**record.live, step: replace(record.live[step], refs=refs)})


def commit_over_another(head: Record | None, *, step: int, nonce: str, **wanted: Any) -> Record:
    if head is None or step not in head.live or head.live[step].nonce == nonce:
        return commit_record(head, step=step, nonce=nonce, **wanted)
    without = {s: one for s, one in head.live.items() if s != step}
    return commit_record(replace(head, live=without), step=step, nonce=nonce, **wanted)


def commit_without_announcing(head: Record | None, **wanted: Any) -> Record:
    record = commit_record(head, **wanted)
    return record if record is head or head is None else replace(record, dead=head.dead)


def commit_that_keeps_the_oldest(head: Record | None, *, step: int, **wanted: Any) -> Record:
    record = commit_record(head, step=step, **(wanted | {"keep": lambda steps: steps}))
    if record is head:
        return record
    kept = {step, min(record.live)}
    gone = tuple(one.nonce for s, one in record.live.items() if s not in kept)
    return replace(record, live={s: record.live[s] for s in kept}, dead=record.dead + gone)


def open_without_a_new_term(head: Record | None, run_id: str, **wanted: Any) -> Record:
    record = open_record(head, run_id, **wanted)
    return record if record is head or head is None else replace(record, term=head.term)


def open_again_without_asking(head: Record | None, run_id: str, *, above_term: int, **wanted: Any) -> Record:
    if head is not None and head.run_id == run_id and head.term > above_term:
        return head
    return open_record(replace(head, run_id="") if head is not None else None, run_id, **wanted)


def collect_and_forget(head: Record | None, *, nonces: set[str]) -> Record:
    record = collect_record(head, nonces=nonces)
    return record if record is head or head is None else replace(record, dead=record.dead[len(head.dead) :])


def collect_the_live(head: Record | None, *, nonces: set[str]) -> Record:
    blind = replace(head, live={}) if head is not None else None
    record = collect_record(blind, nonces=nonces)
    if head is None or record is blind:
        return record if head is None else head
    return replace(record, live=head.live)


def append_without_a_second_look(transition: Transition) -> Generator[Request, Any, Record]:
    while True:
        head = yield from head_steps()
        record = transition(head)
        if record is head:
            return record
        if (yield CreateRecord(log_key(record.seq), record.to_json())) == "created":
            return record


def append_that_gives_up_on_a_lost_reply(transition: Transition) -> Generator[Request, Any, Record]:
    while True:
        head = yield from head_steps()
        record = transition(head)
        if record is head:
            return record
        if (yield CreateRecord(log_key(record.seq), record.to_json())) == "unknown":
            raise StoreUnavailable("lost")


MUTANTS: dict[str, Rules] = {
    "a commit needs no term of its own": Rules(commit=commit_under_any_term),
    "opening takes no new term": Rules(open=open_without_a_new_term),
    "a fenced run may open again": Rules(open=open_again_without_asking),
    "the dead may be committed": Rules(commit=commit_of_the_dead),
    "a step may be committed over another attempt": Rules(commit=commit_over_another),
    "retention announces nothing": Rules(commit=commit_without_announcing),
    "retention may drop the newest step": Rules(commit=commit_that_keeps_the_oldest),
    "a collector forgets what others announced": Rules(collect=collect_and_forget),
    "a collector takes live steps too": Rules(collect=collect_the_live),
    "a collector deletes before it announces": Rules(announce_before_delete=False),
    "a collector lists after it looked at the log": Rules(list_before_head=False),
    "data is written before the term is taken": Rules(open_before_data=False),
    "data is written before the term is taken again": Rules(open_again_before_data=False),
    "a reference needs no live step": Rules(commit=commit_of_refs_to_anything),
    "what is dead goes whole": Rules(delete_only_what_nobody_refers_to=False),
    "a reference may name a reference": Rules(refer_to_first_home=False),
    "no second look after an append": Rules(append=append_without_a_second_look),
    "a lost reply is a failure": Rules(append=append_that_gives_up_on_a_lost_reply),
    "a record may be overwritten": Rules(exclusive_create=False),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_without_one_guard_some_schedule_breaks_an_invariant(name: str) -> None:
    assert any(simulate(seed, MUTANTS[name]).violations for seed in range(NUM_SEEDS))
