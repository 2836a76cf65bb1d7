"""The kill runner catches programs that tear, promise too early or only pretend to work, and passes the right one."""

import itertools
import sys
from pathlib import Path

import pytest

from stoker.errors import ConfigError
from stoker.testing.kill import Death, KillReport, Trial, attach, run_trial
from tests.testing.programs import read_record

PROGRAMS = "tests.testing.programs"


@pytest.fixture(autouse=True)
def importable_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


def check_record(directory: Path, death: Death) -> None:
    assert read_record(directory / "record") >= death.acknowledged


def run(
    name: str, directory: Path, *, kills: int | None, at: str = "moments", min_in_flight: float = 0.1
) -> KillReport:
    trial = Trial(name=name, program=f"{PROGRAMS}:{name}", check=check_record)
    assert at in ("moments", "calls")
    return run_trial(
        trial,
        directory=directory,
        kills=kills,
        seed=1,
        at="calls" if at == "calls" else "moments",
        min_in_flight=min_in_flight,
        deadline_s=20,
    )


def test_an_atomic_writer_survives_kills_at_random_moments(tmp_path: Path) -> None:
    report = run("put", tmp_path, kills=60)
    assert report.ok, report
    assert report.kills == 60
    assert 6 <= report.in_flight <= 60
    assert report.passes >= 1


def test_an_atomic_writer_survives_a_kill_at_every_call(tmp_path: Path) -> None:
    report = run("put", tmp_path, kills=None, at="calls")
    assert report.ok, report
    assert report.kills == report.boundaries == report.boundaries_hit >= 8  # open, write, fsync, name; twice


def test_fewer_kills_than_boundaries_are_spread_over_all_of_them(tmp_path: Path) -> None:
    moments = []
    trial = Trial(name="put", program=f"{PROGRAMS}:put", check=lambda _, death: moments.append(death.moment))
    report = run_trial(trial, directory=tmp_path, at="calls", kills=4, seed=1, min_in_flight=0)
    calls = [int(moment.split()[2].rstrip(",")) for moment in moments[:-1]]
    steps = [b - a for a, b in itertools.pairwise([*calls, calls[0] + report.boundaries])]
    assert min(steps) >= report.boundaries // 4 and max(steps) <= report.boundaries // 4 + 1
    assert calls[-1] <= report.boundaries


def test_a_writer_in_place_is_caught_by_random_kills(tmp_path: Path) -> None:
    report = run("overwrite", tmp_path, kills=200)
    assert not report.ok
    assert "is torn" in str(report)
    assert report.kills < 200, "the first violation ends the trial"


def test_one_wrong_boundary_is_always_caught_by_kills_at_calls(tmp_path: Path) -> None:
    report = run("rename_early", tmp_path, kills=20, at="calls")
    assert not report.ok
    assert "before call" in str(report) and "os.write" in str(report)


def test_a_promise_before_the_work_is_caught(tmp_path: Path) -> None:
    report = run("acknowledge_early", tmp_path, kills=20, at="calls")
    assert report.violation is not None
    assert "AssertionError" in report.violation


def test_kills_that_hit_no_work_in_flight_prove_nothing(tmp_path: Path) -> None:
    report = run("unmarked", tmp_path, kills=20)
    assert report.violation is not None
    assert "only 0 of 20 kills hit work in flight, and at least 10% must" in report.violation
    assert "the trial proves nothing" in report.violation


def test_a_program_that_cannot_go_on_after_a_kill_is_reported_with_its_traceback(tmp_path: Path) -> None:
    report = run("fail", tmp_path, kills=50)
    assert report.violation is not None
    assert "could not go on after a restart" in report.violation
    assert "exit code 1" in report.violation


def test_the_children_of_a_killed_program_are_dead_before_the_check(tmp_path: Path) -> None:
    seen = []

    def check(_directory: Path, death: Death) -> None:
        if death.acknowledged > 0:
            assert not Path(f"/proc/{death.acknowledged}").exists()
            seen.append(death.killed)

    trial = Trial(name="with child", program=f"{PROGRAMS}:with_child", check=check)
    report = run_trial(trial, directory=tmp_path, kills=10, seed=1, min_in_flight=0)
    assert report.ok, report
    assert True in seen and seen[-1] is False


def test_a_command_line_is_killed_as_a_function_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (sys.executable, "-m", PROGRAMS, "{directory}")
    trial = Trial(name="command", program=program, check=check_record)
    monkeypatch.chdir(Path(__file__).parents[2])
    report = run_trial(trial, directory=tmp_path, kills=5, seed=1, min_in_flight=0)
    assert report.ok, report
    assert report.kills == 5


def test_the_last_life_is_left_to_finish_and_is_checked(tmp_path: Path) -> None:
    deaths: list[Death] = []
    trial = Trial(name="put", program=f"{PROGRAMS}:put", check=lambda _, death: deaths.append(death))
    report = run_trial(trial, directory=tmp_path, kills=3, seed=1, min_in_flight=0)
    assert report.ok, report
    assert [death.killed for death in deaths] == [True, True, True, False]
    assert deaths[-1].acknowledged == read_record(tmp_path / "work" / "record")
    assert not deaths[-1].in_flight


def test_the_report_is_plain_json_with_its_seed(tmp_path: Path) -> None:
    report = run("put", tmp_path, kills=2, min_in_flight=0)
    found = report.to_json()
    assert (found["seed"], found["kills"], found["ok"], found["violation"]) == (1, 2, True, None)


def test_a_module_that_cannot_be_imported_is_refused(tmp_path: Path) -> None:
    trial = Trial(name="missing", program="tests.testing.no_such_program:work", check=check_record)
    with pytest.raises(ConfigError, match="must be importable, got .*no_such_program"):
        run_trial(trial, directory=tmp_path, kills=1)


def test_a_preloaded_module_with_a_thread_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, name='t1', daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    trial = Trial(name="threaded", program=f"{PROGRAMS}:put", check=check_record, preload=["threaded"])
    with pytest.raises(ConfigError, match="must start no thread.*t1"):
        run_trial(trial, directory=tmp_path, kills=1)


@pytest.mark.parametrize("program", ["tests.testing.programs", ":put", "tests.testing.programs:"])
def test_a_program_must_name_module_and_function(program: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="package.module:function"):
        run_trial(Trial(name="bad", program=program, check=check_record), directory=tmp_path, kills=1)


def test_no_kills_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="kills must be >= 1, got 0"):
        run("put", tmp_path, kills=0)


def test_attach_outside_a_trial_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STOKER_KILL_CONTROL", raising=False)
    with pytest.raises(ConfigError, match="must be started by run_trial"):
        attach()
