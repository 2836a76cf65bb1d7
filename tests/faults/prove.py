"""``make prove``: kill real packing and saving processes, many times, and see that nothing is ever torn; break every
request to a real object store in every way; run the log of checkpoints under many schedules.

Command: ``python -m tests.faults.prove --level change|nightly|release [--trial NAME] [--seed N] [--dir DIR] [--json]``.
Each trial with kills runs twice: at random moments, and just before each call that changes a file. Exit 1 on any
violation; the directory of one with kills is kept.
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from stoker._console import emit, progress
from stoker.testing.kill import KillReport, Trial, run_trial
from tests.checkpoint import test_log_simulation as schedules

from . import network, packing, saving

TRIALS: dict[str, Callable[[Path], Trial]] = {"packing": packing.trial, "saving": saving.trial}

NUM_SCHEDULES = 20_000
OTHERS: dict[str, Callable[[], network.NetworkReport | schedules.SchedulesReport]] = {
    "network": network.prove_network,
    "schedules": lambda: schedules.run_schedules(NUM_SCHEDULES, first_seed=1_000_000),
}
"""Trials without kills, the same at every level."""

KILLS: dict[str, tuple[int, int | None]] = {"change": (200, 200), "nightly": (2_000, None), "release": (100_000, None)}
"""For each level, kills at random moments and kills at calls; None is one at each call that two passes make."""

MIN_IN_FLIGHT = {"moments": 0.9, "calls": 0.5}
"""Kills aimed at calls also go to those of opening, closing and deleting, where no save or set is in flight."""


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
    reports: list[KillReport | network.NetworkReport | schedules.SchedulesReport] = []
    for name in chosen.trial or [*sorted(TRIALS), *OTHERS]:
        if name in OTHERS:
            reports.append(OTHERS[name]())
            if not chosen.json:
                emit({}, str(reports[-1]), as_json=False)
            continue
        runs: list[tuple[Literal["moments", "calls"], int | None]]
        runs = [("moments", KILLS[chosen.level][0]), ("calls", KILLS[chosen.level][1])]
        for at, kills in runs:
            directory = Path(tempfile.mkdtemp(prefix=f"stoker-prove-{name}-", dir=chosen.dir or memory_directory()))
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
    sys.exit(main())
