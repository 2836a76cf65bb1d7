"""The Azure server for tests: real, private, and gone without a trace."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest

from stoker.errors import AlreadyExists, BucketNotFound, DeadlineExceeded, MissingExtra, StoreError
from stoker.storage import open_store
from stoker.testing import azure
from stoker.testing.azure import AzureServer


def installed() -> bool:
    try:
        azure._find_azurite()
    except MissingExtra:
        return False
    return True


needs_azurite = pytest.mark.skipif(not installed(), reason="azurite is not installed")


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


@needs_azurite
def test_servers_side_by_side_are_reachable_from_nowhere_else_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    with AzureServer(containers=("first", "second")) as one, AzureServer() as two:
        assert one.endpoint_url != two.endpoint_url
        assert one.storage_options["account_key"] != two.storage_options["account_key"]
        for server in (one, two):
            assert listening(server.pid) == {"0100007F"}
            flags = Path(f"/proc/{server.pid}/cmdline").read_bytes().split(b"\0")
            assert b"--disableTelemetry" in flags
            assert not any(server.storage_options["account_key"].encode() in flag for flag in flags)
        for container in ("first", "second"):
            with open_store(one.url(container, "a/b"), **one.storage_options) as store:
                store.put("object", b"1")
        with open_store(two.url("first"), **two.storage_options) as store, pytest.raises(BucketNotFound):
            store.put("object", b"1")
        url = two.create_container("third")
        with open_store(url, **two.storage_options) as store:
            store.put("object", b"1")
        with pytest.raises(AlreadyExists):
            two.create_container("third")
        with pytest.raises(StoreError, match="status 400"):
            two.create_container("NO")
        pids = [one.pid, two.pid]
    one.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert [path.name for path in tmp_path.rglob("*")] == ["home"]


def test_a_missing_program_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "prefix", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtra, match="npm install --prefix"):
        AzureServer().__enter__()


def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    program = tmp_path / "azurite" / "node_modules" / ".bin" / "azurite-blob"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "prefix", str(tmp_path))


def test_a_server_that_does_not_start_in_time_is_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(tmp_path, monkeypatch, "exec sleep 1000")
    killed: list[int] = []
    server = AzureServer(start_timeout_s=0)
    monkeypatch.setattr(server, "_answers", lambda: killed.append(server.pid))
    with pytest.raises(DeadlineExceeded, match="must answer within"):
        server.__enter__()
    assert len(killed) == 1
    with pytest.raises(ProcessLookupError):
        os.kill(killed[0], signal.SIGCONT)


def test_a_server_that_ends_while_it_starts_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake(tmp_path, monkeypatch, "echo no such flag; exit 1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(StoreError, match="must start, got 'no such flag'"):
        AzureServer().__enter__()
    assert not list(tmp_path.glob("stoker-azure-*"))
