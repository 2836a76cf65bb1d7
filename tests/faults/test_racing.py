"""A few races at each run of the suite, and proof that their judge sees a writer that is not fenced."""

from pathlib import Path

from stoker.testing import S3Server
from tests.faults.racing import run_races


def test_of_two_writers_and_a_stalled_one_exactly_one_commits_and_the_zombie_is_fenced(memory: Path) -> None:
    report = run_races(memory, 6, seed=1)
    assert report.ok, report
    assert report.num_races == sum(report.winners.values()) == 6


def test_races_on_an_object_store_have_one_winner_too(s3_server: S3Server) -> None:
    url = s3_server.url("stoker", "test-racing")
    report = run_races(url, 2, seed=1, storage_options=s3_server.storage_options)
    assert report.ok, report


def test_writers_without_fencing_are_caught(memory: Path) -> None:
    report = run_races(memory, 12, seed=1, program="tests.faults.unfenced")
    assert report.violation is not None and "fenced" in report.violation, report
