"""The one frame of every benchmark: bytes verified first, the limit measured in the same rounds, medians, one report.

A benchmark asks a :class:`Question` of several :class:`Variant` (the *limit* that the machine sets, *stoker*, and its
*peers*) and gets one :class:`Row` for each variant and case. :func:`measure` keeps the rules that make a row worth
reading:

1. bytes first: each variant's `verify` runs before anything is timed, and wrong bytes end the benchmark;
2. warm-up runs, whose values stay visible in the row (the first save of a process is not its second);
3. interleaved rounds, the limit first in each, so that a noisy moment of the machine meets every variant alike;
4. medians with their spread; ratios are medians of the ratios *within* a round;
5. what could not be measured is said: a peer that is not installed becomes a note, not a gap;
6. machine, versions and commit stand in the report; a cold read is called cold only if no page of it was in memory.
"""

import ctypes
import gc
import io
import math
import mmap
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from ..errors import ConfigError, CorruptionError, FormatError, UnknownVersion

__all__ = [
    "SCHEMA",
    "Case",
    "Question",
    "Report",
    "Row",
    "Sample",
    "Variant",
    "describe_machine",
    "drop_page_cache",
    "measure",
    "resident_bytes",
]

SCHEMA = 1
"""Version of the report's layout. A field may be added under the same number; none changes its meaning."""

Kind: TypeAlias = Literal["limit", "stoker", "peer"]
Cache: TypeAlias = Literal["warm", "cold", "not applicable"]
Better: TypeAlias = Literal["higher", "lower"]
Scalar: TypeAlias = str | int | float | bool | None

_VERSIONED = (
    "stoker",
    "torch",
    "numpy",
    "pyarrow",
    "safetensors",
    "crc32c",
    "fsspec",
    "obstore",
    "zarr",
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One number that a run yields.

    Attributes:
        name: what is measured, in a few words: ``"durable save"``.
        unit: of the value: ``"GB/s"`` (10^9), ``"s"``, ``"tokens/s"``.
        better: whether a higher or a lower value is better.
        goal_ratio: the ratio to the limit that stoker sets itself; None where there is none.
        goal_value: the value that it sets itself, in `unit`. goal_peer_ratio: the ratio to the best of the peers.
        cache: state of the page cache that the case wants. A run that finds it otherwise says so in its sample.
        origin: where the bytes come from, or which tier served them.
        bytes: how many bytes one run moves; 0 where that says nothing.
    """

    name: str
    unit: str
    better: Better = "higher"
    goal_ratio: float | None = None
    goal_value: float | None = None
    goal_peer_ratio: float | None = None
    cache: Cache = "not applicable"
    origin: str = ""
    bytes: int = 0


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a benchmark asks: its name, the cases that each run answers, and the parameters that all variants share."""

    bench: str
    cases: Sequence[Case]
    params: Mapping[str, Scalar] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One measured value with what the run saw of its circumstances.

    Attributes:
        value: in the unit of its case.
        verified: this very run compared its bytes.
        cache: the state found, if it is not the one that the case wants.
        origin: the tier that served the bytes, if the run knows better than the case.
        cpu_s_per_gtoken: seconds of processors for 10^9 tokens, where the run delivers tokens.
    """

    value: float
    verified: bool = False
    cache: Cache | None = None
    origin: str | None = None
    cpu_s_per_gtoken: float | None = None


Outcome: TypeAlias = float | Sample | Mapping[str, float | Sample]
"""What a run returns: the value of the only case, or a value for each case that it measures, by name."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One way of doing what the question asks.

    Attributes:
        name: as the row shows it.
        kind: ``"limit"`` (what the machine allows), ``"stoker"`` or ``"peer"``.
        run: does the work once and returns what it measured by its own clock, so that clean-up stays untimed.
        setup: called once before anything of this variant; the place to import a peer.
        teardown: called once at the end, also after an error.
        verify: compares bytes with the source and raises CorruptionError; called once, untimed, before the warm-up.
        params: added to the question's in this variant's rows.
        notes: printed under its row.
    """

    name: str
    kind: Kind
    run: Callable[[], Outcome]
    setup: Callable[[], None] | None = None
    teardown: Callable[[], None] | None = None
    verify: Callable[[], None] | None = None
    params: Mapping[str, Scalar] = field(default_factory=dict)
    notes: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of a report.

    Attributes:
        bench, case, variant, kind: what was measured and who did it.
        unit, better: of every value in the row.
        value, low, high: median, smallest and largest of `samples`.
        samples: the value of each run, in order; warmup: those of the warm-up runs, which no other field counts.
        runs: how many samples.
        ratio_to_limit: median over the rounds of this variant's value / the limit's value of the same round; None
            where the case has no limit. 0.9 is 90 % of a rate, 1.3 is 1.3 times a duration.
        goal_ratio: the `ratio_to_limit` that stoker sets itself for this case.
        goal_value: the `value` that it sets itself. goal_peer_ratio: the `ratio_to` the best of the peers.
        cpu_s_per_gtoken: seconds of processors for 10^9 tokens, median of the runs; None where no tokens are delivered.
        ratio_to: the same ratio to each peer by name; only in rows of kind ``"stoker"``.
        bytes: moved by one run.
        verified: the bytes were compared with their source.
        cache: ``"cold"`` only if every run found it so.
        origin: where the bytes came from, or the tier that served them.
        params: what it was run with. notes: what a reader must know.
    """

    bench: str
    case: str
    variant: str
    kind: Kind
    unit: str
    better: Better
    value: float
    low: float
    high: float
    samples: tuple[float, ...]
    warmup: tuple[float, ...] = ()
    runs: int
    ratio_to_limit: float | None = None
    goal_ratio: float | None = None
    goal_value: float | None = None
    goal_peer_ratio: float | None = None
    cpu_s_per_gtoken: float | None = None
    ratio_to: Mapping[str, float] = field(default_factory=dict)
    bytes: int = 0
    verified: bool = False
    cache: Cache = "not applicable"
    origin: str = ""
    params: Mapping[str, Scalar] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def holds(self) -> bool | None:
        """Whether a row of stoker reaches every goal that it could be held against; None if there is none."""
        if self.kind != "stoker":
            return None
        against: list[tuple[float, float]] = []
        if self.goal_ratio is not None and self.ratio_to_limit is not None:
            against.append((self.ratio_to_limit, self.goal_ratio))
        if self.goal_value is not None:
            against.append((self.value, self.goal_value))
        if self.goal_peer_ratio is not None:
            against += [(ratio, self.goal_peer_ratio) for ratio in self.ratio_to.values()]
        if not against:
            return None
        return all(found >= goal if self.better == "higher" else found <= goal for found, goal in against)

    @property
    def goal(self) -> str:
        """The goals in words; empty if there is none."""
        bound = "at least" if self.better == "higher" else "at most"
        words = []
        if self.goal_ratio is not None:
            words.append(f"{bound} {self.goal_ratio:g} of the limit")
        if self.goal_value is not None:
            words.append(f"{bound} {_with_prefix(self.goal_value, self.unit)}")
        if self.goal_peer_ratio is not None:
            words.append(f"{bound} {self.goal_peer_ratio:g} times the best peer")
        return " and ".join(words)

    def __post_init__(self) -> None:
        place = f"row {self.bench}/{self.case}/{self.variant}"
        for name, allowed in (("kind", Kind), ("cache", Cache), ("better", Better)):
            if getattr(self, name) not in get_args(allowed):
                raise ConfigError(
                    f"{name} must be one of {', '.join(get_args(allowed))}", value=getattr(self, name), place=place
                )
        if not (self.bench and self.case and self.variant and self.unit):
            raise ConfigError("bench, case, variant and unit must not be empty", place=place)
        if self.runs < 1 or self.runs != len(self.samples):
            raise ConfigError(f"runs must be the number of samples ({len(self.samples)})", value=self.runs, place=place)
        if not self.low <= self.value <= self.high:
            raise ConfigError("the median must lie within low and high", value=self.value, place=place)
        numbers = [self.value, self.low, self.high, *self.samples, *self.warmup, *self.ratio_to.values()]
        optional = (self.ratio_to_limit, self.goal_ratio, self.goal_value, self.goal_peer_ratio, self.cpu_s_per_gtoken)
        numbers += [n for n in optional if n is not None]
        numbers += [n for n in self.params.values() if isinstance(n, float)]
        for number in numbers:
            if not math.isfinite(number):
                raise ConfigError("every number must be finite", value=number, place=place)


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a benchmark found: the machine, the rows, and notes on what could not be measured."""

    machine: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """The one JSON object of ``stoker bench … --json``."""
        return {
            "schema": SCHEMA,
            "machine": dict(self.machine),
            "rows": [{**asdict(row), "holds": row.holds} for row in self.rows],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> "Report":
        """A report from its JSON object, checked row by row; fields of later versions are ignored.

        Raises:
            UnknownVersion: another schema number. FormatError: a row without the fields of this one.
        """
        if report.get("schema") != SCHEMA:
            raise UnknownVersion(f"a report must have schema {SCHEMA}", value=report.get("schema"), place="report")
        known = {f.name for f in fields(Row)}
        rows = []
        for number, found in enumerate(report.get("rows", ())):
            values: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in found.items()
                if name in known
            }
            try:
                rows.append(Row(**values))
            except TypeError as error:
                raise FormatError("a row must have every field of its schema", place=f"row {number}") from error
        return cls(machine=report.get("machine", {}), rows=tuple(rows), notes=tuple(report.get("notes", ())))

    def __add__(self, other: "Report") -> "Report":
        """Rows and notes of both; the machine is the first one's."""
        return Report(machine=self.machine, rows=self.rows + other.rows, notes=self.notes + other.notes)

    def row(self, case: str, variant: str) -> Row:
        """The row of that case and variant; ConfigError if there is none."""
        for row in self.rows:
            if (row.case, row.variant) == (case, variant):
                return row
        raise ConfigError("no such row", value=f"{case} / {variant}", place="report")

    def to_text(self, *, width: int = 120) -> str:
        """One table for each case, at most `width` columns wide, with its goal and whether it holds.

        "stoker is" is its value / the peer's value.
        """
        from rich.console import Console
        from rich.table import Table

        out = io.StringIO()
        console = Console(file=out, width=width, highlight=False, markup=False)
        machine = self.machine
        console.print(
            f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, "
            f"{machine.get('memory_bytes', 0) / 2**30:.0f} GiB, {machine.get('filesystem', '?')}; "
            f"Python {machine.get('python', '?')}, torch {machine.get('versions', {}).get('torch', 'none')}, "
            f"stoker {machine.get('commit') or machine.get('versions', {}).get('stoker', '?')}"
        )
        for case in dict.fromkeys(row.case for row in self.rows):
            rows = [row for row in self.rows if row.case == case]
            console.print(f"\n{case}, {rows[0].unit}" + (f", goal: {rows[0].goal}" if rows[0].goal else ""))
            against = next((row.ratio_to for row in rows if row.kind == "stoker"), {})
            table = Table(box=None, pad_edge=False)
            for heading in _TEXT_COLUMNS:
                right = heading not in ("", "bytes", "cache", "goal")
                table.add_column(heading, justify="right" if right else "left", no_wrap=True)
            for row in rows:
                prefix, scale = _prefix(row.value)
                table.add_row(
                    row.variant,
                    f"{_short(row.value / scale)} {prefix}{row.unit}",
                    f"{_short(row.low / scale)}-{_short(row.high / scale)}",
                    _short(row.warmup[0] / scale) if row.warmup else "",
                    _ratio_text(row.ratio_to_limit),
                    f"{against[row.variant]:.2f}x" if row.variant in against else "",
                    "" if row.cpu_s_per_gtoken is None else _short(row.cpu_s_per_gtoken),
                    "verified" if row.verified else "unchecked",
                    "" if row.cache == "not applicable" else row.cache,
                    _HOLDS[row.holds],
                )
            console.print(table)
        for note in self._all_notes():
            console.print(f"note: {note}")
        return out.getvalue()

    def to_markdown(self) -> str:
        """All rows as one Markdown table, as the files of ``bench/results`` hold it; notes below."""
        lines = [
            "| case | variant | kind | median | unit | low | high | of the limit | CPU-s/Gtoken | cache | bytes | goal | |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows:
            prefix, scale = _prefix(row.value)
            cells = [
                *(row.case, row.variant, row.kind),
                *(_short(row.value / scale), f"{prefix}{row.unit}", _short(row.low / scale), _short(row.high / scale)),
                _ratio_text(row.ratio_to_limit),
                "" if row.cpu_s_per_gtoken is None else _short(row.cpu_s_per_gtoken),
                *(row.cache, "verified" if row.verified else "unchecked"),
                *((row.goal, _HOLDS[row.holds]) if row.kind == "stoker" else ("", "")),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join([*lines, "", *(f"- {note}" for note in self._all_notes())]).rstrip() + "\n"

    def _all_notes(self) -> Sequence[str]:
        of_rows = [f"{row.variant}: {note}" for row in self.rows for note in row.notes]
        return list(dict.fromkeys([*of_rows, *self.notes]))


_TEXT_COLUMNS = ("", "median", "low-high", "first", "of limit", "stoker is", "CPU-s/Gtoken", "bytes", "cache", "goal")
_HOLDS = {True: "holds", False: "missed", None: ""}


def _ratio_text(ratio: float | None) -> str:
    """Two digits behind the point, three where two would hide it.

    >>> _ratio_text(None), _ratio_text(0.784), _ratio_text(0.0041)
    ('', '0.78', '0.004')
    """
    if ratio is None:
        return ""
    return f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.3f}"


def _with_prefix(value: float, unit: str) -> str:
    """A value and its unit.

    >>> _with_prefix(1e8, "tokens/s"), _with_prefix(16.0, "MiB")
    ('100 Mtokens/s', '16 MiB')
    """
    prefix, scale = _prefix(value)
    return f"{value / scale:g} {prefix}{unit}"


def _prefix(value: float) -> tuple[str, float]:
    """The SI prefix for a value in the thousands or above, and what it stands for.

    >>> _prefix(1.2e9), _prefix(42.0)
    (('G', 1000000000.0), ('', 1.0))
    """
    return next(((p, s) for p, s in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)) if value >= s), ("", 1.0))


def _short(value: float) -> str:
    """Three significant digits.

    >>> _short(0.01234), _short(1.5), _short(1234.0)
    ('0.0123', '1.50', '1234')
    """
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"{value:.{digits}f}"


def measure(
    question: Question,
    variants: Sequence[Variant],
    *,
    runs: int,
    warmup: int = 1,
    directory: str | Path = ".",
    progress: Callable[[], None] | None = None,
) -> Report:
    """Ask every variant the question, by the rules at the head of this module.

    A variant whose `setup` or `verify` raises ImportError (:class:`~stoker.errors.MissingExtra` is one) is left out
    with a note. A *peer* that returns wrong bytes is left out with a note too; wrong bytes of stoker or of a limit
    raise. A case that no run of a variant measures has no row. The ratio to the limit is taken against the first
    variant of kind ``"limit"`` that measures the case.

    Args:
        runs: timed rounds, each of which runs every variant once, limits first.
        warmup: rounds before them.
        directory: where the bench writes; names the file system in the report.
        progress: called after each run.

    Raises:
        ConfigError: no rounds, two variants of one name, or a run that returns a case that nobody asked for.
        CorruptionError: stoker or a limit returned wrong bytes.

    >>> question = Question(bench="example", cases=[Case(name="sum", unit="sums/s")])
    >>> report = measure(question, [Variant(name="builtin", kind="limit", run=lambda: 4.0),
    ...                             Variant(name="loop", kind="stoker", run=lambda: 3.0)], runs=3)
    >>> report.row("sum", "loop").ratio_to_limit
    0.75
    """
    _check(question, variants, runs=runs, warmup=warmup)
    machine = describe_machine(directory)
    notes: list[str] = []
    taken: dict[str, list[dict[str, Sample]]] = {}
    verified = set()
    with ExitStack() as stack:
        ready = []
        for variant in sorted(variants, key=lambda v: v.kind != "limit"):
            try:
                if variant.teardown is not None:
                    stack.callback(variant.teardown)
                if variant.setup is not None:
                    variant.setup()
                if variant.verify is not None:
                    variant.verify()
                    verified.add(variant.name)
            except ImportError as error:
                notes.append(f"{variant.name} was not measured: {error}")
                continue
            except CorruptionError as error:
                if variant.kind != "peer":
                    raise
                notes.append(f"{variant.name} was not measured: it returned wrong bytes ({error})")
                continue
            ready.append(variant)
            taken[variant.name] = []
        # What is here by now stays till the end: the collections below look at what the runs leave only.
        gc.collect()
        gc.freeze()
        stack.callback(gc.unfreeze)
        for _ in range(warmup + runs):
            for variant in tuple(ready):
                gc.collect()  # the garbage of one variant is not paid for by the next
                try:
                    outcome = _samples(question, variant, variant.run())
                except CorruptionError as error:
                    if variant.kind != "peer":
                        raise
                    notes.append(f"{variant.name} was not measured: it returned wrong bytes ({error})")
                    ready.remove(variant)
                    continue
                taken[variant.name].append(outcome)
                if progress is not None:
                    progress()
    rows = [
        row
        for case in question.cases
        for row in _rows(question, case, ready, taken, warmup=warmup, verified=frozenset(verified))
    ]
    return Report(machine=machine, rows=tuple(rows), notes=tuple(notes))


def _check(question: Question, variants: Sequence[Variant], *, runs: int, warmup: int) -> None:
    place = f"bench {question.bench}"
    if runs < 1 or warmup < 0:
        raise ConfigError("runs must be >= 1 and warmup >= 0", value=f"{runs} and {warmup}", place=place)
    for what, names in (("variants", [v.name for v in variants]), ("cases", [c.name for c in question.cases])):
        if len(set(names)) != len(names) or not names:
            raise ConfigError(f"the names of {what} must differ", value=names, place=place)


def _samples(question: Question, variant: Variant, outcome: Outcome) -> dict[str, Sample]:
    """The outcome of a run as one sample for each case that it measured."""
    if isinstance(outcome, Mapping):
        by_case = dict(outcome)
    else:
        by_case = {question.cases[0].name: outcome}
        if len(question.cases) != 1:
            raise ConfigError(
                "a run must name the case of each value where there are several", value=outcome, place=variant.name
            )
    unknown = by_case.keys() - {case.name for case in question.cases}
    if unknown:
        raise ConfigError("a run may return only cases of its question", value=sorted(unknown), place=variant.name)
    samples = {name: s if isinstance(s, Sample) else Sample(value=float(s)) for name, s in by_case.items()}
    for name, sample in samples.items():
        if not (math.isfinite(sample.value) and sample.value > 0):
            raise ConfigError(
                "a measured value must be finite and > 0", value=sample.value, place=f"{variant.name}, {name}"
            )
    return samples


def _rows(
    question: Question,
    case: Case,
    variants: Sequence[Variant],
    taken: Mapping[str, Sequence[Mapping[str, Sample]]],
    *,
    warmup: int,
    verified: frozenset[str],
) -> Iterable[Row]:
    values = {v.name: [samples[case.name].value for samples in taken[v.name] if case.name in samples] for v in variants}
    measured = [v for v in variants if values[v.name]]
    limit = next((v.name for v in measured if v.kind == "limit"), None)
    peers = [v.name for v in measured if v.kind == "peer"]
    for variant in measured:
        samples = [s[case.name] for s in taken[variant.name] if case.name in s]
        if len(samples) != len(taken[variant.name]):
            raise ConfigError("a case must be measured in every run or in none", value=case.name, place=variant.name)
        timed = values[variant.name][warmup:]
        yield Row(
            bench=question.bench,
            case=case.name,
            variant=variant.name,
            kind=variant.kind,
            unit=case.unit,
            better=case.better,
            value=statistics.median(timed),
            low=min(timed),
            high=max(timed),
            samples=tuple(timed),
            warmup=tuple(values[variant.name][:warmup]),
            runs=len(timed),
            ratio_to_limit=None if limit is None else _ratio(timed, values[limit][warmup:]),
            goal_ratio=case.goal_ratio,
            goal_value=case.goal_value,
            goal_peer_ratio=case.goal_peer_ratio,
            cpu_s_per_gtoken=_median_cpu(samples[warmup:]),
            ratio_to={p: _ratio(timed, values[p][warmup:]) for p in peers} if variant.kind == "stoker" else {},
            bytes=case.bytes,
            verified=variant.name in verified or all(s.verified for s in samples),
            cache=_cache_of(case, samples[warmup:]),
            origin=next((s.origin for s in samples if s.origin is not None), case.origin),
            params={**question.params, **variant.params},
            notes=tuple(variant.notes),
        )


def _ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    # Paired by round: both sides of each ratio met the machine in the same mood.
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def _median_cpu(samples: Sequence[Sample]) -> float | None:
    found = [s.cpu_s_per_gtoken for s in samples if s.cpu_s_per_gtoken is not None]
    return statistics.median(found) if found else None


def _cache_of(case: Case, samples: Sequence[Sample]) -> Cache:
    return next((s.cache for s in samples if s.cache is not None and s.cache != case.cache), case.cache)


def describe_machine(directory: str | Path = ".") -> dict[str, Any]:
    """Where a report was made: processor, memory, kernel, the file system under `directory`, versions, commit."""
    return {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerator": _accelerator(),
        "system": platform.system(),
        "kernel": platform.release(),
        "filesystem": _filesystem(Path(directory)),
        "load_1m": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": dict(_versions()),
        "commit": _commit(),
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _accelerator() -> str | None:
    torch = sys.modules.get("torch")  # a bench that never needed torch does not pay its import here
    if torch is None or not torch.accelerator.is_available():
        return None
    return str(torch.accelerator.current_accelerator())


def _filesystem(directory: Path) -> str:
    """Type of the mount that holds `directory`: ``"ext4"``, ``"tmpfs"``; ``"unknown"`` where the system won't say."""
    path = directory.resolve()
    best: tuple[int, str] = (-1, "unknown")
    with suppress(OSError):
        # man 5 proc: "36 35 98:0 /root /mount/point options … - type source options"; octal escapes for blanks.
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            head, _, tail = line.partition(" - ")
            point = Path(head.split()[4].encode().decode("unicode_escape"))
            if path.is_relative_to(point) and len(point.parts) >= best[0]:
                best = (len(point.parts), tail.split()[0])
    return best[1]


def _versions() -> Iterable[tuple[str, str]]:
    for name in _VERSIONED:
        with suppress(PackageNotFoundError):
            yield name, version(name)


def _commit() -> str | None:
    """``git describe`` of the checkout that holds this package; None for an installed one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    with suppress(OSError, subprocess.SubprocessError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--tags"]
        return subprocess.run(command, capture_output=True, check=True, text=True, timeout=10).stdout.strip()
    return None


def drop_page_cache(path: str | Path) -> int:
    """Write back and forget the cached pages of a file, or of every file below a directory.

    Needs no privilege: ``posix_fadvise(POSIX_FADV_DONTNEED)`` after fsync. Returns the bytes that are still in memory
    all the same (locked or mapped pages, tmpfs, a system without the call): 0 is what "cold" means.
    """
    left = 0
    for file in _files(Path(path)):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)  # dirty pages are not dropped
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        left += resident_bytes(file)
    return left


def resident_bytes(path: str | Path) -> int:
    """Bytes of a file, or of all files below a directory, that are in the page cache now (``mincore``, whole pages)."""
    return sum(_resident_bytes_of(file) for file in _files(Path(path)))


def _files(path: Path) -> Sequence[Path]:
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _resident_bytes_of(path: Path) -> int:
    size = path.stat().st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as pages:
        # A private map counts the file's cached pages as long as nobody writes to it, and gives ctypes an address.
        vector = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
        first = ctypes.c_char.from_buffer(pages)
        try:
            address = ctypes.c_void_p(ctypes.addressof(first))
            if libc.mincore(address, ctypes.c_size_t(size), vector) != 0:
                error = ctypes.get_errno()
                raise OSError(error, os.strerror(error), str(path))
        finally:
            del first  # or the map could not be closed
        return min(size, sum(byte & 1 for byte in bytes(vector)) * mmap.PAGESIZE)
