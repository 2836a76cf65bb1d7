"""What every test is held to: it leaks no file, thread or shared memory, and it is not skipped without a reason."""

import gc
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

_SKIPS = Path(__file__).parent / "skips.txt"

# Threads that belong to a library for the life of the process, started by its first use.
# "Dummy-" is what Python calls threads that it did not start: pyarrow's, once they have called a Python file.
_LIBRARY_THREADS = ("fsspecIO", "zarr_io", "zarr_pool", "asyncio_", "Dummy-")
# Files that the running process may open at any time and keep.
_LIBRARY_FILES = ("/dev/", "/proc/", "/sys/")
# What a cache leaves in the user's directory by design: it is there for the next process.
_KEPT_NAMES = {"CACHEDIR.TAG", "lock"}


def _open_files() -> set[tuple[str, str]]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{name}")
        except FileNotFoundError:  # the directory's own
            continue
        # Sockets, pipes and event files of client libraries outlive a test: their pools are meant to.
        if target.startswith("/") and not (target.startswith(_LIBRARY_FILES) and not target.startswith("/dev/shm")):
            found.add((name, target))
    return found


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.name.startswith(_LIBRARY_THREADS)}


def _shared_memory() -> set[str]:
    directory = Path(os.environ["STOKER_SHM_DIR"])
    found = (path for path in directory.rglob("*") if not path.is_dir() and path.name not in _KEPT_NAMES)
    # The node's limits of requests are there for the next process, as the caches are.
    return {str(path) for path in found if not _is_arena_of_another(path) and path.parent.name != "limits"}


def _is_arena_of_another(path: Path) -> bool:
    """Whether this is the staging arena of a child: a killed one leaves it for the next start, by design."""
    if not path.name.startswith("arena-"):
        return False
    with path.open("rb") as file:
        return f'"pid":{os.getpid()},'.encode() not in file.read(4096)


@pytest.fixture(scope="session", autouse=True)
def own_shared_memory() -> Iterator[None]:
    """Keep the tests, and the processes that they start, away from the shared memory of real jobs on this machine."""
    shm = Path("/dev/shm")
    for left in shm.glob("stoker-test-*-*"):  # of runs that were killed
        pid = left.name.split("-")[2]
        if pid.isdecimal() and not Path(f"/proc/{pid}").exists():
            shutil.rmtree(left, ignore_errors=True)
    directory = tempfile.mkdtemp(prefix=f"stoker-test-{os.getpid()}-", dir=shm if shm.is_dir() else None)
    before = os.environ.get("STOKER_SHM_DIR")
    os.environ["STOKER_SHM_DIR"] = directory
    yield
    shutil.rmtree(directory)
    if before is None:
        del os.environ["STOKER_SHM_DIR"]
    else:
        os.environ["STOKER_SHM_DIR"] = before


@pytest.fixture(autouse=True)
def nothing_is_leaked(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves open files, running threads or shared memory behind."""
    # Session fixtures may hold what they like: have them started before we look.
    for name in request.fixturenames:
        if name == "s3_server":
            request.getfixturevalue(name)
    files, threads, shared = _open_files(), _threads(), _shared_memory()
    yield
    for thread in _threads() - threads:
        thread.join(timeout=10)  # what is ending may end
    if _open_files() - files or _threads() - threads:
        gc.collect()  # what is only not collected yet is not leaked
    left = {
        "open files": sorted(target for _, target in _open_files() - files),
        "threads": sorted(thread.name for thread in _threads() - threads),
        "shared memory": sorted(_shared_memory() - shared),
    }
    assert not any(left.values()), (
        f"left behind: {', '.join(f'{what} {names}' for what, names in left.items() if names)}"
    )


# --- skips ------------------------------------------------------------------------------------------------------------

_skipped: list[tuple[str, str]] = []


def _allowed_skips() -> list[str]:
    lines = (line.strip() for line in _SKIPS.read_text().splitlines())
    prefixes = [line.partition(": ") for line in lines if line and not line.startswith("#")]
    assert all(prefix and reason for prefix, _, reason in prefixes), f"{_SKIPS}: each line needs 'prefix: reason'"
    return [prefix for prefix, _, _ in prefixes]


def _note(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        allowed = _allowed_skips()
        if not any(report.nodeid.startswith(prefix) for prefix in allowed):
            _skipped.append((report.nodeid, str(report.longrepr)))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    _note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and session.exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped:
        terminalreporter.section("skipped without a line in tests/skips.txt", red=True)
        for nodeid, reason in _skipped:
            terminalreporter.line(f"{nodeid}: {reason}")
