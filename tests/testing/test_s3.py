"""The S3 server for tests: real, private, and gone without a trace."""

import os
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from stoker.errors import AlreadyExists, BucketNotFound, DeadlineExceeded, MissingExtra
from stoker.storage import TieredCache, open_store
from stoker.testing import S3Server


def sockets(ports: set[int]) -> list[Path]:
    """What servers with these ports leave in /tmp; other servers of this machine come and go."""
    return [path for port in ports for path in Path("/tmp").glob(f"seaweedfs-*-grpc-{port + 10_000}.sock")]


def listening(pid: int) -> set[str]:
    """Addresses, in the kernel's hexadecimal, on which a process listens."""
    inodes = set()
    for fd in os.listdir(f"/proc/{pid}/fd"):
        target = os.readlink(f"/proc/{pid}/fd/{fd}")
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1].partition(":")[0])
    return found


def test_servers_side_by_side_are_reachable_from_nowhere_else_and_leave_nothing() -> None:
    with S3Server(buckets=("first", "second")) as one, S3Server() as two:
        assert one.endpoint_url != two.endpoint_url
        assert one.storage_options["secret"] != two.storage_options["secret"]
        for server in (one, two):
            assert listening(server.pid) == {"0100007F"}
            flags = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
            assert b"-master.telemetry=false" in flags
            assert not any(server.storage_options["secret"].encode() in flag for flag in flags)
        for bucket in ("first", "second"):
            with open_store(one.url(bucket, "a/b"), **one.storage_options) as store:
                store.put("object", b"1")
                assert one.unfinished_uploads(bucket) == 0
        with open_store(two.url("first"), **two.storage_options) as store, pytest.raises(BucketNotFound):
            store.put("object", b"1")
        url = two.create_bucket("third")
        with open_store(url, **two.storage_options) as store:
            store.put("object", b"1")
        with pytest.raises(AlreadyExists):
            two.create_bucket("third")
        directories = [one._directory, two._directory]
        pids = [one.pid, two.pid]
        ports = {*one._ports.values(), *two._ports.values()}
        assert sockets(ports)
    one.close()
    assert not any(directory.exists() for directory in directories if directory is not None)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert not sockets(ports)


def test_a_missing_binary_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra, match="stoker\\[testing\\]"):
        S3Server().__enter__()


def test_a_server_that_does_not_start_in_time_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    slow = tmp_path / "weed"
    slow.write_text("#!/bin/sh\nexec sleep 1000\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    killed: list[int] = []
    server = S3Server(start_timeout_s=0)
    monkeypatch.setattr(server, "_answers", lambda: killed.append(server.pid))
    with pytest.raises(DeadlineExceeded, match="must answer within"):
        server.__enter__()
    assert len(killed) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], signal.SIGCONT)


def test_the_cache_of_a_test_has_both_tiers_in_places_of_its_own(node_cache: TieredCache, tmp_path: Path) -> None:
    stats = node_cache.stats()
    assert stats.ram_capacity_bytes == stats.disk_capacity_bytes == 64 * 2**20
    assert os.environ["STOKER_SHM_DIR"] in repr(node_cache) and str(tmp_path) in repr(node_cache)


def test_without_free_ports_it_says_so_and_leaves_nothing(tmp_path: Path) -> None:
    program = """
import resource, sys
from stoker.errors import StoreError
from stoker.testing import S3Server
resource.setrlimit(resource.RLIMIT_NOFILE, (12, 12))
try:
    S3Server().__enter__()
except StoreError as error:
    sys.exit(str(error))
"""
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert done.stderr == "S3Server: needs 5 free ports on 127.0.0.1, got 'Too many open files'\n"
    assert not list(tmp_path.iterdir())
