"""The doctor finds what is wrong, says what to do, keeps secrets, and leaves nothing behind."""

import http.server
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest

from stoker.cli import main
from stoker.errors import ConfigError, ObjectChanged
from stoker.metrics import counters
from stoker.storage import ObjectInfo, open_store
from stoker.storage.doctor import Check, Diagnosis, Throughput, _Examination, diagnose
from stoker.storage.local import LocalStore
from stoker.testing import S3Server

SIZES, CONCURRENCIES = (4096, 65_536), (1, 2)
STORE_CHECKS = [
    "reachable",
    "clock",
    "bucket, credentials",
    "writing allowed",
    "byte ranges",
    "If-Match",
    "exclusive create",
    "list order",
    "delete",
    "throughput",
    "clean-up",
]
AFTER_ACCESS = [name for name in STORE_CHECKS[3:] if name != "clean-up"]


def examine(url: str, directory: Path, options: dict[str, Any] | None = None) -> Diagnosis:
    return diagnose(url, storage_options=options, directory=directory, sizes=SIZES, concurrencies=CONCURRENCIES)


def verdicts(found: Diagnosis, names: list[str]) -> set[str]:
    return {found.check(name).verdict for name in names}


def stoker(*arguments: str) -> int:
    with pytest.raises(SystemExit) as done:
        main(["doctor", *arguments])
    return int(done.value.code or 0)


# --- a machine ------------------------------------------------------------------------------------------------------


def test_a_machine_alone_is_examined_and_the_directory_left_as_it_was(tmp_path: Path) -> None:
    ticks: list[int] = []
    found = diagnose(directory=tmp_path, progress=lambda: ticks.append(1))
    assert [check.name for check in found.checks] == [
        "open files",
        "shared memory",
        "memory limit",
        "huge pages",
        "directory",
        "free space",
        "free inodes",
        "O_DIRECT",
        "O_TMPFILE",
        "OFD locks",
        "hard links",
        "RENAME_NOREPLACE",
        "clock",
    ]
    assert len(ticks) == len(found.checks)
    assert found.check("clock").verdict == "not measured"
    assert found.check("OFD locks").verdict == found.check("hard links").verdict == "ok"
    assert all(check.value for check in found.checks)
    assert all(check.advice for check in found.checks if check.verdict in ("warn", "fail"))
    assert found.url is None and found.throughput == ()
    assert list(tmp_path.iterdir()) == []


def test_few_open_files_are_a_warning_with_the_command_that_helps(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1000, limits[1]))
    try:
        found = diagnose(directory=tmp_path).check("open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found.verdict == "warn"
    assert found.value.startswith("1000 (soft)")
    assert "ulimit -n 1024" in found.advice


def test_without_shared_memory_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path / "missing" / "shm"))
    found = diagnose(directory=tmp_path)
    assert found.check("shared memory").verdict == "warn"
    assert found.ok, "a job runs without it"


def test_a_directory_that_nobody_can_write_to_fails(tmp_path: Path) -> None:
    # /sys refuses root as well.
    found = diagnose(directory="/sys")
    assert not found.ok
    assert (found.check("directory").verdict, found.checks[-2].name) == ("fail", "directory")
    assert diagnose(directory=tmp_path / "missing").check("directory").value.endswith("No such file or directory")


def test_without_o_direct_there_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "O_DIRECT")
    found = diagnose(directory=tmp_path)
    assert found.check("O_DIRECT").verdict == "warn"
    assert list(tmp_path.iterdir()) == []


# --- a store --------------------------------------------------------------------------------------------------------


def test_a_healthy_store_passes_every_check_and_nothing_is_left_in_it(s3_server: S3Server, tmp_path: Path) -> None:
    bucket = f"doctor-{uuid.uuid4().hex[:8]}"
    url = s3_server.create_bucket(bucket)
    found = examine(url, tmp_path, s3_server.storage_options)
    assert [check.name for check in found.checks][-len(STORE_CHECKS) :] == STORE_CHECKS
    assert verdicts(found, STORE_CHECKS) == {"ok"}
    assert found.url == url
    assert [(cell.size_bytes, cell.concurrency) for cell in found.throughput] == [
        (size, concurrency) for size in SIZES for concurrency in CONCURRENCIES
    ]
    assert all(cell.gb_per_s is not None and cell.gb_per_s > 0 for cell in found.throughput)
    assert sum(cell.knee for cell in found.throughput) == 1
    with open_store(url, **s3_server.storage_options) as store:
        assert list(store.list()) == []
    assert s3_server.unfinished_uploads(bucket) == 0


def test_a_local_directory_is_a_store_too(tmp_path: Path) -> None:
    found = examine(str(tmp_path), tmp_path)
    assert verdicts(found, [name for name in STORE_CHECKS if name != "clock"]) == {"ok"}
    assert found.check("clock").verdict == "not measured"
    assert list(tmp_path.iterdir()) == []
    missing = examine(str(tmp_path / "missing"), tmp_path)
    assert missing.check("reachable").verdict == "fail"
    assert list(tmp_path.iterdir()) == []


def test_a_bucket_that_is_not_there_fails_and_the_rest_says_why_it_was_not_asked(
    s3_server: S3Server, tmp_path: Path
) -> None:
    found = examine("s3://no-such-bucket/run", tmp_path, s3_server.storage_options)
    check = found.check("bucket, credentials")
    assert (check.verdict, check.advice) == ("fail", "make the bucket, or correct its name")
    assert found.check("reachable").verdict == "ok"
    assert {(found.check(name).verdict, found.check(name).value) for name in AFTER_ACCESS} == {
        ("not measured", "needs: bucket, credentials")
    }
    assert found.throughput == ()


def test_an_endpoint_where_nobody_listens_is_told_at_once(tmp_path: Path) -> None:
    options = {"endpoint_url": "http://127.0.0.1:1", "key": "k", "secret": "s"}
    found = examine("s3://bucket", tmp_path, options)
    assert found.check("reachable").value == "http://127.0.0.1:1: Connection refused"
    assert verdicts(found, ["bucket, credentials", *AFTER_ACCESS]) == {"not measured"}


def test_wrong_keys_fail_and_no_secret_is_printed(
    s3_server: S3Server, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = s3_server.storage_options
    planted = "planted-" + uuid.uuid4().hex
    arguments = [s3_server.url("stoker"), "--dir", str(tmp_path), "-o", f"endpoint_url={given['endpoint_url']}"]
    for key, secret in ((given["key"], planted), (planted, given["secret"])):
        for form in ([], ["--json"]):
            assert stoker(*arguments, "-o", f"key={key}", "-o", f"secret={secret}", *form) == 1
            printed = capfd.readouterr()
            for text in (printed.out, printed.err):
                assert planted not in text
                assert given["secret"] not in text
            assert "bucket, credentials" in printed.out
    options = {**given, "secret": planted}
    assert examine(s3_server.url("stoker"), tmp_path, options).check("bucket, credentials").verdict == "fail"


def test_a_mistake_in_the_command_is_wrong_usage(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("s3://bucket", "--dir", str(tmp_path), "-o", "keys=k") == 2
    assert stoker("--dir", str(tmp_path), "-o", "key=k") == 2
    assert "need its URL" in capfd.readouterr().err
    with pytest.raises(ConfigError, match="no such option"):
        diagnose("s3://bucket", storage_options={"keys": "k"}, directory=tmp_path)


def test_the_command_prints_one_json_object_or_a_line_for_each_check(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert stoker("--dir", str(tmp_path), "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["ok"] is True and printed["url"] is None and printed["throughput"] == []
    assert set(printed["checks"][0]) == {"name", "verdict", "value", "advice"}
    assert stoker("--dir", "/sys") == 1
    lines = capfd.readouterr().out.splitlines()
    failed = next(number for number, line in enumerate(lines) if line.startswith("fail"))
    assert lines[failed + 1].strip().startswith("-> name a directory")


def test_the_table_marks_the_knee_and_what_took_too_long() -> None:
    cells = (
        Throughput(size_bytes=65_536, concurrency=1, gb_per_s=0.0104),
        Throughput(size_bytes=65_536, concurrency=2, gb_per_s=0.02, knee=True),
        Throughput(size_bytes=1 << 20, concurrency=1, gb_per_s=0.021),
        Throughput(size_bytes=1 << 20, concurrency=2, gb_per_s=None),
    )
    check = Check(name="throughput", verdict="ok", value="0.02 GB/s")
    table = Diagnosis(url="s3://bucket", checks=(check,), throughput=cells).to_text().splitlines()[-2:]
    assert [line.split() for line in table] == [["64", "KiB", "10", "20*"], ["1", "MiB", "21", "-"]]


# --- stores that break their word -------------------------------------------------------------------------------------


class Replacing(LocalStore):
    """Accepts the condition of a create and ignores it."""

    def create(self, key: str, data: Any) -> ObjectInfo:
        return self.put(key, data)


class Ignoring(LocalStore):
    """Sends the new bytes to who asked for the old ones."""

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        return super().get(key, start, end)


class Wasting(Ignoring):
    """Sends them too, and the client notices."""

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        data = super().get(key, start, end)
        if version is not None and self.head(key).version != version:
            counters.add("store.get.bytes", len(data))
            raise ObjectChanged("must still be the version that was asked for", place=key)
        return data


class Unordered(LocalStore):
    """Lists backwards."""

    def list(self, prefix: str = "", *, start_after: str = "", limit: int | None = None) -> Iterator[ObjectInfo]:
        return iter(sorted(super().list(prefix, start_after=start_after), key=lambda info: info.key, reverse=True))


class Keeping(LocalStore):
    """Says that it has deleted."""

    def delete(self, key: str) -> None:
        self.head(key)


class Flipping(LocalStore):
    """Gets one bit of large ranges wrong."""

    def get(self, key: str, start: int = 0, end: int | None = None, *, version: str | None = None) -> memoryview:
        data = bytearray(super().get(key, start, end, version=version))
        if len(data) >= 4096 and key.startswith("data/"):
            data[17] ^= 1
        return memoryview(data).toreadonly()


@pytest.mark.parametrize(
    ("broken", "name", "verdict", "words"),
    [
        (Replacing, "exclusive create", "fail", "a second create replaced the first"),
        (Ignoring, "If-Match", "fail", "was not noticed"),
        (Wasting, "If-Match", "warn", "ignored"),
        (Unordered, "list order", "fail", "'b', 'a0'"),
        (Keeping, "delete", "fail", "still there"),
        (Keeping, "clean-up", "fail", "objects stay below"),
        (Flipping, "throughput", "fail", "other bytes"),
    ],
)
def test_a_store_that_breaks_its_word_is_found_out(
    broken: type[LocalStore], name: str, verdict: str, words: str, tmp_path: Path
) -> None:
    with broken(str(tmp_path / "scratch")) as store:
        found = _Examination(str(tmp_path), {}, store, SIZES, CONCURRENCIES)
        checks = {check.name: check for check in found.run()}
    assert checks[name].verdict == verdict
    assert words in checks[name].value
    assert checks[name].advice


@contextmanager
def server_at(moment: datetime) -> Iterator[str]:
    """A server with that clock, which has nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response_only(404)
            self.send_header("Date", format_datetime(moment, usegmt=True))
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize(
    ("off_s", "verdict", "words"), [(3600, "fail", "behind"), (-60, "warn", "ahead of"), (0, "ok", "as the store's")]
)
def test_a_clock_that_is_off_is_told(off_s: int, verdict: str, words: str, tmp_path: Path) -> None:
    with server_at(datetime.now(UTC) + timedelta(seconds=off_s)) as url:
        found = examine(url, tmp_path)
    assert found.check("clock").verdict == verdict
    assert words in found.check("clock").value
    assert found.check("bucket, credentials").verdict == "not measured", "plain HTTP can't be listed"


def test_an_empty_url_is_no_directory(capfd: pytest.CaptureFixture[str]) -> None:
    assert stoker("") == 2
    assert "must not be empty" in capfd.readouterr().err


@pytest.mark.parametrize("where", ["store", "directory"])
def test_a_doctor_ended_by_sigterm_leaves_nothing_behind(tmp_path: Path, where: str) -> None:
    method = "_ranges" if where == "store" else None
    program = f"""
import signal, os
from stoker.cli import main
from stoker.storage import doctor

def end(*arguments):
    assert list(os.scandir({str(tmp_path)!r}))
    os.kill(os.getpid(), signal.SIGTERM)
    return "not ended"

if {method!r}:
    doctor._Examination._ranges = end
else:
    doctor._link = end
main(["doctor", {str(tmp_path)!r}])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
    assert list(tmp_path.iterdir()) == []
