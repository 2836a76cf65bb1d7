"""Small programs for the kill runner to kill: one that is right, and ones that are wrong in a known way."""

import os
import subprocess
import sys
import time
from pathlib import Path

from stoker.storage.local import LocalStore
from stoker.testing.kill import Recorder, attach

RECORD_BYTES = 256 << 10


def record(number: int) -> bytes:
    """A record of one repeated number: a mix of two of them shows."""
    return number.to_bytes(4, "little") * (RECORD_BYTES // 4)


def read_record(path: Path) -> int:
    """The number of the record in a file; -1 without a file. Raises ValueError if the file is torn."""
    if not path.exists():
        return -1
    data = path.read_bytes()
    number = int.from_bytes(data[:4], "little")
    if data != record(number):
        raise ValueError(f"{path.name} is torn: {len(data)} bytes, the first of record {number}")
    return number


def put(directory: Path, recorder: Recorder) -> None:
    """Right: the next record through the store's atomic put."""
    number = read_record(directory / "record") + 1
    with recorder.in_flight():
        LocalStore(directory).put("record", record(number))
    recorder.acknowledge(number)


def overwrite(directory: Path, recorder: Recorder) -> None:
    """Wrong: writes in place, so a kill finds half a record."""
    number = read_record(directory / "record") + 1
    with recorder.in_flight(), (directory / "record").open("wb", buffering=0) as file:
        for start in range(0, RECORD_BYTES, 4096):
            file.write(record(number)[start : start + 4096])
    recorder.acknowledge(number)


def rename_early(directory: Path, recorder: Recorder) -> None:
    """Wrong at one boundary only: the name comes before the last byte."""
    number = read_record(directory / "record") + 1
    with recorder.in_flight():
        fd = os.open(directory / "temporary", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.write(fd, record(number)[:-4])
        os.rename(directory / "temporary", directory / "record")
        os.write(fd, record(number)[-4:])
        os.close(fd)
    recorder.acknowledge(number)


def acknowledge_early(directory: Path, recorder: Recorder) -> None:
    """Wrong: promises a record before it is written."""
    number = read_record(directory / "record") + 1
    with recorder.in_flight():
        recorder.acknowledge(number)
        LocalStore(directory).put("record", record(number))


def unmarked(directory: Path, recorder: Recorder) -> None:
    """Works, and never says so."""
    LocalStore(directory).put("record", record(read_record(directory / "record") + 1))


def fail(directory: Path, recorder: Recorder) -> None:
    """Raises when it finds what the passes before it left."""
    put(directory, recorder)
    if read_record(directory / "record") >= 2:
        raise RuntimeError("could not go on after a restart")


def with_child(directory: Path, recorder: Recorder) -> None:
    """Works through a process of its own, which must not outlive it."""
    code = "import sys, time; open(sys.argv[1], 'w').write('x'); time.sleep(600)"
    with recorder.in_flight():
        child = subprocess.Popen([sys.executable, "-S", "-c", code, str(directory / "started")])
        recorder.acknowledge(child.pid)
        while not (directory / "started").exists():
            time.sleep(0.001)
        (directory / "started").unlink()
        child.kill()
        child.wait()


if __name__ == "__main__":
    recorder = attach()
    for _ in recorder.passes():
        put(Path(sys.argv[1]), recorder)
