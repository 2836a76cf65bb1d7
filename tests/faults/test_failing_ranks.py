"""One case of each kind at each run of the suite; `make prove` has a rank fail before every call of the store."""

from pathlib import Path

from tests.faults.failing_ranks import Case, prove_ranks


def test_ranks_that_die_hang_disagree_or_see_another_root_are_named_and_the_next_save_works(memory: Path) -> None:
    cases = [
        Case(kind="dies", rank=2, call=2),
        Case(kind="hangs", rank=2, call=1),
        Case(kind="dies", rank=0, call=4),
        Case(kind="disagrees", rank=2),
        Case(kind="other root, with a process group", rank=1),
    ]
    report = prove_ranks(memory, cases=cases)
    assert report.ok, report
    assert report.num_cases == len(cases) and set(report.outcomes) >= {"SaveFailed", "CommitUnknown"}
