"""The frame keeps its own rules: bytes first, limits first, interleaved, medians, nothing left unsaid."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.bench.frame import (
    Case,
    Question,
    Report,
    Row,
    Sample,
    Variant,
    describe_machine,
    drop_page_cache,
    measure,
    resident_bytes,
)
from stoker.errors import ConfigError, CorruptionError, FormatError, MissingExtra, UnknownVersion

SPEED = Question(bench="example", cases=[Case(name="speed", unit="GB/s", goal_ratio=0.8)], params={"size_bytes": 8})


def values(*numbers: float) -> Callable[[], float]:
    left = iter(numbers)
    return lambda: next(left)


def row(**changed: Any) -> Row:
    fields: dict[str, Any] = {
        "bench": "example",
        "case": "speed",
        "variant": "stoker",
        "kind": "stoker",
        "unit": "GB/s",
        "better": "higher",
        "value": 2.0,
        "low": 1.0,
        "high": 3.0,
        "samples": (1.0, 2.0, 3.0),
        "runs": 3,
    }
    return Row(**{**fields, **changed})


def test_rounds_are_interleaved_with_the_limit_first() -> None:
    calls: list[str] = []

    def variant(name: str, kind: Any) -> Variant:
        return Variant(
            name=name,
            kind=kind,
            run=lambda: calls.append(name) or 1.0,  # type: ignore[func-returns-value]
            setup=lambda: calls.append(f"{name} setup"),
            verify=lambda: calls.append(f"{name} verify"),
            teardown=lambda: calls.append(f"{name} teardown"),
        )

    ticks: list[int] = []
    measure(
        SPEED,
        [variant("ours", "stoker"), variant("theirs", "peer"), variant("bare", "limit")],
        runs=2,
        progress=lambda: ticks.append(1),
    )
    prepared = [f"{n} {step}" for n in ("bare", "ours", "theirs") for step in ("setup", "verify")]
    assert calls == [*prepared, *["bare", "ours", "theirs"] * 3, "theirs teardown", "ours teardown", "bare teardown"]
    assert len(ticks) == 9


def test_a_row_holds_the_median_the_spread_and_the_warm_up_apart() -> None:
    report = measure(SPEED, [Variant(name="bare", kind="limit", run=values(99, 3, 1, 2))], runs=3, warmup=1)
    found = report.row("speed", "bare")
    assert (found.value, found.low, found.high, found.runs) == (2.0, 1.0, 3.0, 3)
    assert (found.samples, found.warmup) == ((3.0, 1.0, 2.0), (99.0,))
    assert found.params == {"size_bytes": 8}


def test_ratios_are_medians_of_the_ratios_within_a_round() -> None:
    # The machine is twice as fast in the second round; the ratio of medians would say 0.75.
    report = measure(
        SPEED,
        [
            Variant(name="bare", kind="limit", run=values(2, 4, 2)),
            Variant(name="ours", kind="stoker", run=values(1, 2, 1.5)),
            Variant(name="theirs", kind="peer", run=values(1, 1, 1)),
        ],
        runs=3,
        warmup=0,
    )
    ours = report.row("speed", "ours")
    assert ours.ratio_to_limit == 0.5
    assert ours.ratio_to == {"theirs": 1.5}
    assert ours.goal_ratio == 0.8
    assert report.row("speed", "theirs").ratio_to_limit == 0.5
    assert report.row("speed", "theirs").ratio_to == {}


def test_one_run_may_answer_several_cases_and_a_limit_only_its_own() -> None:
    question = Question(
        bench="example",
        cases=[Case(name="stall", unit="s", better="lower"), Case(name="durable", unit="GB/s")],
    )
    report = measure(
        question,
        [
            Variant(name="copy", kind="limit", run=lambda: {"stall": 0.5}),
            Variant(name="write", kind="limit", run=lambda: {"durable": 2.0}),
            Variant(name="ours", kind="stoker", run=lambda: {"stall": 0.6, "durable": Sample(value=1.8)}),
        ],
        runs=1,
        warmup=0,
    )
    assert [(r.case, r.variant) for r in report.rows] == [
        ("stall", "copy"),
        ("stall", "ours"),
        ("durable", "write"),
        ("durable", "ours"),
    ]
    assert report.row("stall", "ours").ratio_to_limit == 1.2
    assert report.row("durable", "ours").ratio_to_limit == 0.9


def test_a_peer_that_is_not_installed_becomes_a_note() -> None:
    def absent() -> None:
        raise MissingExtra("an optional library must be installed", value="litdata", hint="pip install stoker[bench]")

    report = measure(
        SPEED,
        [
            Variant(name="ours", kind="stoker", run=values(1, 1)),
            Variant(name="theirs", kind="peer", run=values(), setup=absent),
        ],
        runs=1,
    )
    assert [r.variant for r in report.rows] == ["ours"]
    assert report.row("speed", "ours").ratio_to == {}
    assert "theirs was not measured" in report.notes[0] and "litdata" in report.notes[0]
    assert "theirs was not measured" in report.to_text()


def wrong_bytes() -> None:
    raise CorruptionError("the batch must hold the packed tokens", value="other tokens")


def test_a_peer_with_wrong_bytes_is_left_out_with_a_note() -> None:
    peer = Variant(name="theirs", kind="peer", run=values(), verify=wrong_bytes)
    report = measure(SPEED, [Variant(name="ours", kind="stoker", run=values(1, 1)), peer], runs=1)
    assert [r.variant for r in report.rows] == ["ours"]
    assert "wrong bytes" in report.notes[0]


def test_a_peer_whose_bytes_turn_wrong_in_a_later_run_is_left_out() -> None:
    runs = iter([None, None, wrong_bytes])

    def run() -> float:
        if (then := next(runs)) is not None:
            then()
        return 1.0

    report = measure(
        SPEED,
        [Variant(name="ours", kind="stoker", run=lambda: 1.0), Variant(name="theirs", kind="peer", run=run)],
        runs=3,
    )
    assert [r.variant for r in report.rows] == ["ours"]
    assert len(report.notes) == 1


@pytest.mark.parametrize("kind", ["stoker", "limit"])
def test_wrong_bytes_of_our_own_end_the_benchmark(kind: Any) -> None:
    ended = []
    variant = Variant(name="ours", kind=kind, run=values(), verify=wrong_bytes, teardown=lambda: ended.append(1))
    with pytest.raises(CorruptionError, match="packed tokens"):
        measure(SPEED, [variant], runs=1)
    assert ended == [1]


def test_verified_means_that_verify_ran_or_that_every_run_compared() -> None:
    def flags(*flags: bool) -> Callable[[], Sample]:
        left = iter(flags)
        return lambda: Sample(value=1.0, verified=next(left))

    report = measure(
        SPEED,
        [
            Variant(name="by verify", kind="stoker", run=lambda: 1.0, verify=lambda: None),
            Variant(name="each run", kind="peer", run=flags(True, True, True)),
            Variant(name="most runs", kind="peer", run=flags(True, False, True)),
            Variant(name="never", kind="peer", run=lambda: 1.0),
        ],
        runs=2,
    )
    assert [r.verified for r in report.rows] == [True, True, False, False]


def test_a_case_is_cold_only_if_every_timed_run_found_it_so() -> None:
    question = Question(bench="example", cases=[Case(name="read", unit="GB/s", cache="cold", origin="disk")])

    def caches(*caches: Any) -> Callable[[], Sample]:
        left = iter(caches)
        return lambda: Sample(value=1.0, cache=next(left))

    report = measure(
        question,
        [
            Variant(name="cold", kind="stoker", run=caches("warm", None, "cold")),
            Variant(name="once warm", kind="peer", run=caches(None, "cold", "warm")),
        ],
        runs=2,
        warmup=1,
    )
    assert [(r.cache, r.origin) for r in report.rows] == [("cold", "disk"), ("warm", "disk")]


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_value_that_is_no_measurement_is_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="finite and > 0"):
        measure(SPEED, [Variant(name="ours", kind="stoker", run=lambda: value)], runs=1)


@pytest.mark.parametrize(
    ("outcomes", "rule"),
    [
        ([{"sped": 1.0}], "only cases of its question"),
        ([1.0, {}], "in every run or in none"),
    ],
)
def test_a_run_must_answer_what_was_asked(outcomes: list[Any], rule: str) -> None:
    left = iter(outcomes)
    with pytest.raises(ConfigError, match=rule):
        measure(SPEED, [Variant(name="ours", kind="stoker", run=lambda: next(left))], runs=len(outcomes), warmup=0)


def test_a_bare_number_is_refused_where_there_are_several_cases() -> None:
    question = Question(bench="example", cases=[Case(name="a", unit="s"), Case(name="b", unit="s")])
    with pytest.raises(ConfigError, match="name the case"):
        measure(question, [Variant(name="ours", kind="stoker", run=lambda: 1.0)], runs=1)


def test_two_variants_of_one_name_and_no_rounds_are_refused() -> None:
    ours = Variant(name="ours", kind="stoker", run=lambda: 1.0)
    with pytest.raises(ConfigError, match="names of variants must differ"):
        measure(SPEED, [ours, ours], runs=1)
    with pytest.raises(ConfigError, match="runs must be >= 1"):
        measure(SPEED, [ours], runs=0)


@pytest.mark.parametrize(
    ("changed", "rule"),
    [
        ({"kind": "ours"}, "kind must be one of limit, stoker, peer, got 'ours'"),
        ({"cache": "hot"}, "cache must be one of"),
        ({"better": "bigger"}, "better must be one of"),
        ({"unit": ""}, "must not be empty"),
        ({"runs": 2}, "number of samples"),
        ({"low": 2.5}, "median must lie within"),
        ({"ratio_to_limit": float("nan")}, "must be finite"),
        ({"ratio_to": {"peer": float("inf")}}, "must be finite"),
        ({"params": {"x": float("nan")}}, "must be finite"),
    ],
)
def test_a_row_that_breaks_its_rules_is_refused(changed: dict[str, Any], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        row(**changed)


@settings(max_examples=50)
@given(
    samples=st.lists(st.floats(min_value=1e-9, max_value=1e12), min_size=1, max_size=9),
    ratio=st.none() | st.floats(min_value=0, max_value=1e6),
    notes=st.lists(st.text(max_size=20), max_size=3),
)
def test_a_report_survives_json(samples: list[float], ratio: float | None, notes: list[str]) -> None:
    middle = sorted(samples)[len(samples) // 2]
    one = row(
        value=middle,
        low=min(samples),
        high=max(samples),
        samples=tuple(samples),
        runs=len(samples),
        ratio_to_limit=ratio,
        ratio_to={"peer": 1.0},
        notes=tuple(notes),
    )
    report = Report(machine={"cores": 2}, rows=(one,), notes=tuple(notes))
    assert Report.from_json(json.loads(json.dumps(report.to_json(), allow_nan=False))) == report


def test_a_report_of_another_schema_or_without_a_field_is_refused() -> None:
    found = Report(machine={}, rows=(row(),)).to_json()
    with pytest.raises(UnknownVersion, match="schema 1, got 2"):
        Report.from_json({**found, "schema": 2})
    del found["rows"][0]["unit"]
    with pytest.raises(FormatError, match="row 0: a row must have every field"):
        Report.from_json(found)


def test_reports_of_several_questions_add_up() -> None:
    one = Report(machine={"cores": 2}, rows=(row(),), notes=("a",))
    two = Report(machine={"cores": 4}, rows=(row(variant="other"),), notes=("b",))
    both = one + two
    assert (both.machine, len(both.rows), both.notes) == ({"cores": 2}, 2, ("a", "b"))


def test_the_text_shows_ratio_goal_and_peers() -> None:
    text = Report(
        machine=describe_machine(),
        rows=(
            row(ratio_to_limit=0.87, goal_ratio=0.8, ratio_to={"torch DCP": 1.5}, verified=True, notes=("note",)),
            row(variant="torch DCP", kind="peer", goal_ratio=0.8),
        ),
    ).to_text(width=140)
    assert "speed, GB/s, goal: at least 0.8 of the limit" in text
    ours, theirs = (line.split() for line in text.splitlines() if "GB/s  " in line)
    assert ours == ["stoker", "2.00", "GB/s", "1.00-3.00", "0.87", "verified", "holds"]
    assert theirs == ["torch", "DCP", "2.00", "GB/s", "1.00-3.00", "1.50x", "unchecked"]
    assert "note: stoker: note" in text


@pytest.mark.parametrize(
    ("changed", "holds"),
    [
        ({}, None),
        ({"goal_ratio": 0.9}, None),  # nothing to hold it against
        ({"goal_ratio": 0.9, "ratio_to_limit": 0.9}, True),
        ({"goal_ratio": 0.9, "ratio_to_limit": 0.89}, False),
        ({"goal_ratio": 1.2, "ratio_to_limit": 1.1, "better": "lower"}, True),
        ({"goal_value": 2.0}, True),
        ({"goal_value": 2.1}, False),
        ({"goal_peer_ratio": 3.0, "ratio_to": {"a": 3.5, "b": 2.9}}, False),
        ({"goal_peer_ratio": 3.0, "ratio_to": {"a": 3.5, "b": 3.0}}, True),
        ({"goal_peer_ratio": 3.0, "ratio_to": {"a": 3.5}, "goal_value": 2.1}, False),
        ({"goal_value": 1.0, "kind": "peer"}, None),
    ],
)
def test_a_row_holds_only_if_it_reaches_every_goal(changed: dict[str, Any], holds: bool | None) -> None:
    one = row(**changed)
    assert one.holds is holds
    assert Report(machine={}, rows=(one,)).to_json()["rows"][0]["holds"] is holds


def test_the_processors_share_is_the_median_of_the_timed_runs() -> None:
    values = iter([9.0, 1.0, 3.0, 2.0])

    def ours() -> Sample:
        return Sample(value=1.0, cpu_s_per_gtoken=next(values))

    report = measure(SPEED, [Variant(name="ours", kind="stoker", run=ours)], runs=3)
    assert report.rows[0].cpu_s_per_gtoken == 2.0
    assert "CPU-s/Gtoken" in report.to_text()


def test_a_markdown_table_has_a_line_for_each_row_and_the_notes_once() -> None:
    ours = row(ratio_to_limit=0.87, goal_ratio=0.9, verified=True, notes=("note",))
    text = Report(machine={}, rows=(ours, ours, row(kind="peer", variant="peer")), notes=("left out",)).to_markdown()
    lines = text.splitlines()
    assert [line.count("|") for line in lines[:5]] == 5 * [lines[0].count("|")]
    assert lines[2].endswith("| verified | at least 0.9 of the limit | missed |")
    assert lines[4].endswith("| unchecked |  |  |")
    assert lines[5:] == ["", "- stoker: note", "- left out"]


def test_the_text_shortens_large_numbers_with_their_prefix() -> None:
    one = row(unit="tokens/s", value=1.234e9, low=1e9, high=2e9, samples=(1e9, 1.234e9, 2e9), warmup=(5e8,))
    text = Report(machine={}, rows=(one,)).to_text()
    assert "1.23 Gtokens/s  1.00-2.00  0.500" in text


def test_the_machine_is_described_without_a_blank(tmp_path: Path) -> None:
    machine = describe_machine(tmp_path)
    assert json.loads(json.dumps(machine, allow_nan=False)) == machine
    for name in ("cpu", "cores", "memory_bytes", "kernel", "filesystem", "python", "versions", "measured_at"):
        assert machine[name]
    assert {"stoker", "torch", "numpy"} <= machine["versions"].keys()
    assert describe_machine("/proc")["filesystem"] == "proc"


def test_a_dropped_file_has_no_page_in_memory(tmp_path: Path) -> None:
    size = (1 << 20) + 5
    path = tmp_path / "data" / "file"
    path.parent.mkdir()
    path.write_bytes(os.urandom(size))
    assert resident_bytes(path) == size
    assert drop_page_cache(tmp_path) == 0
    assert resident_bytes(path) == 0
    path.read_bytes()
    assert resident_bytes(tmp_path) == size


def test_an_empty_file_is_cold(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    assert drop_page_cache(tmp_path) == 0


def test_a_file_on_tmpfs_stays_warm_and_is_said_to() -> None:
    path = Path(f"/dev/shm/stoker-test-frame-{os.getpid()}")
    path.write_bytes(bytes(8192))
    try:
        assert drop_page_cache(path) == 8192
    finally:
        path.unlink()
