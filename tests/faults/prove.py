"""``make prove``: kill real packing, saving and caching processes, many times, and see that nothing is ever torn; break
every request to a real object store, every directory of a cache, every rank of a job and every bit of a checkpoint, in
every way; let writers race for a step; run the log of checkpoints under many schedules.

Command: ``python -m tests.faults.prove --level change|nightly|release [--trial NAME] [--seed N] [--dir DIR] [--json]``.
Each trial with kills runs twice: at random moments, and just before each call that changes a file. Exit 1 on any
violation; the directory of one with kills is kept.
"""

import argparse
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from stoker._console import emit, progress
from stoker.testing import S3Server
from stoker.testing.kill import KillReport, Trial, run_trial
from tests.checkpoint import test_log_simulation as schedules

from . import caching, directories, failing_ranks, flipping, network, packing, racing, saving

TRIALS: dict[str, Callable[[Path], Trial]] = {
    "caching": caching.trial,
    "packing": packing.trial,
    "saving": saving.trial,
    "saving incremental": saving.trial_incremental,
    "saving ranks": saving.trial_of_ranks,
    "saving with local": saving.trial_with_local,
}
ONLY_MOMENTS = {"saving ranks"}
"""Calls are counted, and a process killed at one, in one process."""

NUM_SCHEDULES = 20_000
OtherReport = (
    directories.DirectoriesReport
    | KillReport
    | failing_ranks.RanksReport
    | flipping.FlipsReport
    | network.NetworkReport
    | racing.RacesReport
    | schedules.SchedulesReport
)
FLIPS: dict[str, int | None] = {"change": 2_000, "nightly": None, "release": None}
"""Bits for each level; None is every one."""
RACES = {"change": (100, 5), "nightly": (1_000, 20), "release": (10_000, 200)}
"""Races for each level: under a directory, and on an S3 server."""


def prove_flips(level: str) -> OtherReport:
    """Flip the bits of a small checkpoint."""
    with progress("flips", total=FLIPS[level], unit="bits") as meter:
        return flipping.flip_bits(memory_directory(), num_flips=FLIPS[level], progress=lambda: meter.advance(1))


def prove_ranks(level: str) -> OtherReport:
    """Every case at every level."""
    with (
        tempfile.TemporaryDirectory(prefix="stoker-prove-ranks-", dir=memory_directory()) as directory,
        progress("failing ranks", total=None, unit="cases") as meter,
    ):
        return failing_ranks.prove_ranks(Path(directory), progress=lambda: meter.advance(1))


def prove_races(level: str) -> OtherReport:
    """Races in a directory."""
    number = RACES[level][0]
    with (
        tempfile.TemporaryDirectory(prefix="stoker-prove-races-", dir=memory_directory()) as directory,
        progress("races", total=number, unit="races") as meter,
    ):
        return racing.run_races(directory, number, progress=lambda: meter.advance(1))


def prove_races_on_s3(level: str) -> OtherReport:
    """Races on a real S3 server."""
    number = RACES[level][1]
    with S3Server() as server, progress("races on S3", total=number, unit="races") as meter:
        url = server.url("stoker", "races")
        return racing.run_races(url, number, storage_options=server.storage_options, progress=lambda: meter.advance(1))


KILLS_ON_S3 = {"change": 20, "nightly": 500, "release": 5_000}


def prove_saving_on_s3(level: str, kills: int | None = None) -> KillReport:
    """Kill a process that saves to a real S3 server, at random moments."""
    kills = KILLS_ON_S3[level] if kills is None else kills
    with (
        S3Server() as server,
        tempfile.TemporaryDirectory(prefix="stoker-prove-s3-", dir=memory_directory()) as directory,
        progress("saving on S3", total=kills, unit="kills") as meter,
    ):
        trial = saving.trial_on_s3(Path(directory), server)
        return run_trial(trial, directory=directory, kills=kills, min_in_flight=0.5, progress=lambda: meter.advance(1))


OTHERS: dict[str, Callable[[str], OtherReport]] = {
    "directories": lambda level: directories.prove_directories(),
    "failing ranks": prove_ranks,
    "flips": prove_flips,
    "network": lambda level: network.prove_network(),
    "races": prove_races,
    "races on s3": prove_races_on_s3,
    "saving on s3": prove_saving_on_s3,
    "schedules": lambda level: schedules.run_schedules(NUM_SCHEDULES, first_seed=1_000_000),
}
"""Trials without kills, each given the level."""

KILLS: dict[str, tuple[int, int | None]] = {"change": (200, 200), "nightly": (10_000, None), "release": (100_000, None)}
"""For each level, kills at random moments and kills at calls; None is one at each call that two passes make."""

MIN_IN_FLIGHT = {"moments": 0.5, "calls": 0.5}
"""The others hit opening, recovery, closing and deleting, where no save or set is in flight."""


def prove(
    name: str,
    at: Literal["moments", "calls"],
    kills: int | None,
    *,
    directory: Path,
    seed: int | None = None,
    min_in_flight: float | None = None,
) -> KillReport:
    """Run one trial below `directory`. Of few kills a handful may miss: then `min_in_flight` asks for less."""
    with progress(f"{name}, {at}", total=kills, unit="kills") as meter:
        return run_trial(
            TRIALS[name](directory),
            directory=directory,
            kills=kills,
            at=at,
            seed=seed,
            min_in_flight=MIN_IN_FLIGHT[at] if min_in_flight is None else min_in_flight,
            progress=lambda: meter.advance(1),
        )


def memory_directory() -> Path:
    """Where fsync costs nothing: SIGKILL does not touch what the kernel holds, so more kills in the same time say more."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trials of a level and print one report; returns the exit code."""
    parser = argparse.ArgumentParser(prog="prove", description="Kill processes and break requests; nothing may tear.")
    parser.add_argument("--level", choices=sorted(KILLS), default="change")
    parser.add_argument(
        "--trial", choices=[*sorted(TRIALS), *OTHERS], action="append", help="only this trial; may repeat"
    )
    parser.add_argument("--seed", type=int, help="of the random moments; drawn and printed by default")
    parser.add_argument("--dir", type=Path, help="where the processes work; shared memory by default")
    parser.add_argument("--json", action="store_true", help="print one JSON object on standard output, nothing else")
    chosen = parser.parse_args(arguments)
    reports: list[KillReport | OtherReport] = []
    for name in chosen.trial or [*sorted(TRIALS), *OTHERS]:
        if name in OTHERS:
            reports.append(OTHERS[name](chosen.level))
            if not chosen.json:
                emit({}, str(reports[-1]), as_json=False)
            continue
        runs: list[tuple[Literal["moments", "calls"], int | None]]
        runs = [("moments", KILLS[chosen.level][0])]
        if name not in ONLY_MOMENTS:
            runs.append(("calls", KILLS[chosen.level][1]))
        for at, kills in runs:
            directory = Path(
                tempfile.mkdtemp(prefix=f"stoker-prove-{name.replace(' ', '-')}-", dir=chosen.dir or memory_directory())
            )
            report = prove(name, at, kills, directory=directory, seed=chosen.seed)
            reports.append(report)
            if not chosen.json:
                emit({}, str(report), as_json=False)
            if report.ok:
                shutil.rmtree(directory)
    ok = all(report.ok for report in reports)
    document = {"schema": 1, "level": chosen.level, "ok": ok, "trials": [report.to_json() for report in reports]}
    if chosen.json:
        emit(document, "", as_json=True)
    return 0 if ok else 1


if __name__ == "__main__":
    logging.disable(logging.WARNING)  # that killed runs leave something behind is what this is about
    sys.exit(main())
