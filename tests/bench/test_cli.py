"""A bench that is told to end removes what it wrote: its directory, its shared memory, its servers."""

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stoker.bench.cli import _work_directory

# The real command, but for its progress: once the first run is done it says so, and waits.
PROGRAM = """
import sys
import threading
from contextlib import contextmanager

from stoker.bench import cli
from stoker.cli import main

def wait():
    sys.stdout.write("at work\\n")
    sys.stdout.flush()
    threading.Event().wait()

@contextmanager
def rounds(label):
    yield wait

cli._rounds = rounds
main(["bench", *sys.argv[1:]])
"""


@pytest.mark.parametrize(
    ("number", "bench"),
    [
        (signal.SIGTERM, ["tiers", "--size", "8MiB"]),
        (signal.SIGHUP, ["load", "--only", "cold", "--size", "4MiB"]),
        (signal.SIGTERM, ["ckpt", "--only", "large", "--size", "1MiB"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value.name,
)
def test_a_bench_that_a_signal_ends_leaves_nothing_behind(
    number: signal.Signals, bench: list[str], tmp_path: Path
) -> None:
    work, shm, temporary = tmp_path / "work", Path(tempfile.mkdtemp(dir=os.environ["STOKER_SHM_DIR"])), tmp_path / "tmp"
    for directory in (work, temporary):
        directory.mkdir()
    command = [sys.executable, "-c", PROGRAM, *bench, "--dir", str(work)]
    environment = {**os.environ, "STOKER_SHM_DIR": str(shm), "TMPDIR": str(temporary)}
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "at work\n"
            assert list(work.iterdir()), "it has begun to write"
            process.send_signal(number)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, out, err) == (128 + number, "", "")
    assert list(work.iterdir()) == []
    assert list(temporary.iterdir()) == []
    assert [path for path in shm.rglob("*") if path.name.startswith(("bench-", "arena-"))] == []


def test_a_second_signal_does_not_cut_the_clean_up_short(tmp_path: Path) -> None:
    """timeout(1) sends each signal twice."""
    cleaned = []

    def work() -> None:
        with _work_directory(tmp_path):
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGHUP)
                cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        work()
    assert (ended.value.code, cleaned, list(tmp_path.iterdir())) == (128 + signal.SIGTERM, [True], [])
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_bench_under_nohup_goes_on(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with _work_directory(tmp_path):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
