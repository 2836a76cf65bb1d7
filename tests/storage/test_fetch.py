"""Remote stores after a fork: what a forked child asks for comes through a helper process."""

import json
import multiprocessing
import os
import select
import subprocess
import sys
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from stoker.testing import S3Server

PROGRAM = """
import json, os, sys
from stoker.errors import StokerError, KeyNotFound, UnsupportedError
from stoker.storage import Block, NetworkPolicy, TieredCache, open_store
from stoker.storage._checksums import crc32c
from stoker.storage import fetch

url, what = sys.argv[1:3]
store = open_store(url)
data = os.urandom(9_000_000)
if what != "unused":
    store.put("object", data)
    for number in range(3):
        store.put(f"list/{number}", b"1")


def child():
    mine = store if what == "inherited" else open_store(url)
    if what == "unused":
        mine.put("object", b"of the child")
        return {"direct": fetch._helper is None}
    found = {}
    found["object"] = mine.get("object") == data and mine.get("object", 5, 7) == data[5:7]
    buffer = memoryview(bytearray(100))
    mine.get_into("object", buffer, 1_000_000)
    found["into"] = buffer == data[1_000_000:1_000_100]
    found["version"] = mine.get("object", 0, 3, version=mine.head("object").version) == data[:3]
    mine.put("small", b"small")
    mine.create("created", b"created")
    found["list"] = [info.key for info in mine.list("list/", limit=2)]
    mine.delete("list/0")
    found["exists"] = mine.exists("list/0"), mine.exists("list/1")
    errors = {}
    for name, call in {
        "missing": lambda: mine.get("missing"),
        "twice": lambda: mine.create("created", b"again"),
        "unsafe": lambda: mine.get("../up"),
        "writer": lambda: mine.open_writer("large", 10),
    }.items():
        try:
            call()
        except StokerError as error:
            errors[name] = type(error).__name__
    found["errors"] = errors
    block = Block(key="object", version="v", start=0, end=4_000_000, crc32c=crc32c(data[:4_000_000]))
    with TieredCache(ram="16MiB", ram_path=sys.argv[3]) as cache:
        cache.prefetch(mine, [block])
        found["block"] = cache.get(mine, block) == data[:4_000_000]
    if what == "killed helper":
        process = fetch._helper._running.process
        process.kill()
        process.wait()
        found["again"] = mine.get("object") == data
    found["helper"] = fetch._helper._running.process.pid
    return found


pid = os.fork()
if not pid:
    try:
        print(json.dumps(child()), flush=True)
    except BaseException:
        import traceback
        traceback.print_exc()
    os._exit(0)  # without any clean-up: the helper must notice
os.waitpid(pid, 0)
"""


def run(s3_server: S3Server, what: str, tmp_path: Path) -> dict[str, Any]:
    (tmp_path / "ram").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, s3_server.url("stoker", uuid.uuid4().hex), what, str(tmp_path / "ram")],
        env={**os.environ, **s3_server.env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("what", ["inherited", "its own", "killed helper"])
def test_a_forked_child_reads_and_writes_although_its_parent_used_the_store(
    s3_server: S3Server, tmp_path: Path, what: str
) -> None:
    found = run(s3_server, what, tmp_path)
    helper = found.pop("helper")
    again = {"again": True} if what == "killed helper" else {}
    assert found == {
        "object": True,
        "into": True,
        "version": True,
        "list": ["list/0", "list/1"],
        "exists": [False, True],
        "errors": {
            "missing": "KeyNotFound",
            "twice": "AlreadyExists",
            "unsafe": "UnsafeName",
            "writer": "UnsupportedError",
        },
        "block": True,
        **again,
    }
    # The child ended without closing anything. Its helper reads the end of the pipe and ends as well.
    with suppress(ProcessLookupError):  # it has ended already
        pidfd = os.pidfd_open(helper)
        try:
            assert select.select([pidfd], [], [], 60)[0]
        finally:
            os.close(pidfd)


def test_a_child_of_a_parent_that_never_used_obstore_uses_it_itself(s3_server: S3Server, tmp_path: Path) -> None:
    assert run(s3_server, "unused", tmp_path) == {"direct": True}


def read_object(store: Any, results: Any) -> None:
    results.put(bytes(store.get("object")))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_every_way_to_start_a_process_reads_a_store_that_its_parent_has_used(s3_server: S3Server, method: str) -> None:
    from stoker.storage import open_store

    context: Any = multiprocessing.get_context(method)
    with open_store(s3_server.url("stoker", uuid.uuid4().hex), **s3_server.storage_options) as store:
        store.put("object", b"of the parent")
        results = context.SimpleQueue()
        process = context.Process(target=read_object, args=(store, results))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert results.get() == b"of the parent"
        results.close()
        process.close()


def test_no_secret_is_in_the_helper_s_command_line(s3_server: S3Server, tmp_path: Path) -> None:
    program = PROGRAM.replace(
        'found["helper"] = fetch._helper._running.process.pid',
        'found["command"] = open(f"/proc/{fetch._helper._running.process.pid}/cmdline").read()',
    )
    assert program != PROGRAM
    (tmp_path / "ram").mkdir(mode=0o700)
    done = subprocess.run(
        [sys.executable, "-c", program, s3_server.url("stoker", uuid.uuid4().hex), "its own", str(tmp_path / "ram")],
        env={**os.environ, **s3_server.env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    command = json.loads(done.stdout)["command"]
    assert "stoker.storage.fetch" in command
    assert s3_server.storage_options["secret"] not in command


STOPPED = """
import json, os, signal, sys, threading, time
from stoker.errors import StoreUnavailable
from stoker.storage import NetworkPolicy, fetch, open_store

fetch._GRACE_S = 1.0
url = sys.argv[1]
open_store(url).put("object", b"of the parent")
pid = os.fork()
if not pid:
    found = {}
    mine = open_store(url, network=NetworkPolicy(timeout_s=120.0))
    mine.get("object")  # the helper runs
    stopped = fetch._helper._running.process
    os.kill(stopped.pid, signal.SIGSTOP)
    hasty = open_store(url, network=NetworkPolicy(timeout_s=1.0))
    try:
        hasty.put("large", bytes(3 << 20))
    except StoreUnavailable as error:
        found["put"] = error.value
    found["killed"] = stopped.wait()
    found["again"] = bytes(mine.get("object")).decode()

    running = fetch._helper._running
    os.kill(running.process.pid, signal.SIGSTOP)
    def behind():
        try:
            hasty.get("object")
        except StoreUnavailable as error:
            found["behind"] = error.value
    first = threading.Thread(target=lambda: mine.put("large", bytes(3 << 20)))
    first.start()
    while not fetch._helper._lock.locked():
        pass
    behind()
    os.kill(running.process.pid, signal.SIGCONT)
    first.join()
    found["large"] = len(mine.get("large"))

    # What the first helper leaves unanswered is not what its successor was asked.
    os.kill(running.process.pid, signal.SIGSTOP)
    told = []
    def ask():
        try:
            mine.get("object")
        except StoreUnavailable as error:
            told.append(error.value)
    asking = threading.Thread(target=ask)
    asking.start()
    while not running.waiting:
        pass
    fetch._helper._running = None
    successor = fetch._helper._started()
    unanswered = fetch.queue.SimpleQueue()
    successor.waiting[-1] = unanswered
    running.process.kill()
    asking.join()
    found["told"] = told, unanswered.empty()

    # An error of open_store in the helper is its caller's only.
    try:
        fetch.FetchedStore("s3://bucket", {"no_such": 1}, shown_url="s3://bucket").get("object")
    except Exception as error:
        found["wrong"] = type(error).__name__
    found["same helper"] = bytes(mine.get("object")).decode(), successor is fetch._helper._running
    print(json.dumps(found), flush=True)
    os._exit(0)
os.waitpid(pid, 0)
"""


def test_a_helper_that_is_stopped_or_dies_costs_no_call_more_than_its_deadline(s3_server: S3Server) -> None:
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, s3_server.url("stoker", uuid.uuid4().hex)],
        env={**os.environ, **s3_server.env},
        capture_output=True,
        text=True,
        timeout=100,  # less than the time-out of the calls that must not wait for it
        check=False,
    )
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == {
        "put": "timed out",
        "killed": -9,
        "again": "of the parent",
        "behind": "timed out",
        "large": 3 << 20,
        "told": [["it ended"], True],
        "wrong": "ConfigError",
        "same helper": ["of the parent", True],
    }
