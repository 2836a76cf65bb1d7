"""Peers in environments of their own: found, asked, told apart from broken ones; the runner's own sums."""

import json
import runpy
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from stoker.bench import peers
from stoker.cli import main
from stoker.errors import ConfigError, CorruptionError, MissingExtra

RUNNER = """
import json, sys
for line in sys.stdin:
    request = json.loads(line)
    if request["do"] == "end":
        sys.exit("no more " * 20000 + "of this")
    print(json.dumps({"wrong": "labels"} if request["do"] == "verify" else {"got": request, "name": sys.argv[1]}), flush=True)
"""


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of peers in which all three are pinned and LitData is installed."""
    (tmp_path / "runner.py").write_text(RUNNER)
    monkeypatch.setattr(peers, "_root", lambda: tmp_path)
    for name in peers.LOAD_PEERS:
        (tmp_path / f"requirements-{name}.txt").write_text(f"aaa==1.0\n{name}==2.5\n")
    binaries = tmp_path / ".venv" / "litdata" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    (binaries.parent / "stamp").write_text(peers._stamp("litdata"))
    return tmp_path


def test_what_is_pinned_and_what_is_installed_is_told(root: Path) -> None:
    assert peers.statuses() == [
        ("litdata", "2.5", True),
        ("mosaicml-streaming", "2.5", False),
        ("datasets", "2.5", False),
    ]
    with pytest.raises(MissingExtra, match="it is not installed .*stoker bench peers --install"):
        peers.PeerProcess("datasets")


def test_the_command_lists_them(root: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["bench", "peers", "--json"])
    assert not exited.value.code
    found = json.loads(capfd.readouterr().out)["peers"]
    assert found[0] == {"name": "litdata", "version": "2.5", "installed": True}
    assert [peer["installed"] for peer in found] == [True, False, False]


def test_an_environment_of_other_pins_is_not_installed(root: Path) -> None:
    (root / "requirements-litdata.txt").write_text("litdata==2.6\n")
    assert peers.statuses()[0] == ("litdata", "2.6", False)


def test_a_peer_replies_in_its_own_process(root: Path) -> None:
    with peers.PeerProcess("litdata") as peer:
        assert peer.ask("run", batches=3) == {"got": {"do": "run", "batches": 3}, "name": "litdata"}
        with pytest.raises(CorruptionError, match="litdata: labels"):
            peer.ask("verify")
        assert peer.ask("run")["got"] == {"do": "run"}
        peer.close()


def test_a_peer_that_ends_is_left_out_with_its_last_words(root: Path) -> None:
    with (
        peers.PeerProcess("litdata") as peer,
        pytest.raises(MissingExtra, match="litdata ended when it was asked to end, got '.*no more of this"),
    ):
        peer.ask("end")


def test_an_unknown_peer_is_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match="a peer is one of litdata, mosaicml-streaming, datasets, got 'nobody'"):
        peers.install("nobody")


def test_every_pin_of_a_real_environment_is_exact() -> None:
    for name in peers.LOAD_PEERS:
        lines = peers._requirements(name).read_text().split()
        assert lines == sorted(lines)
        assert all(line.count("==") == 1 for line in lines)
    assert [status.name for status in peers.statuses()] == list(peers.LOAD_PEERS)


def test_the_runner_counts_the_processors_of_workers_too() -> None:
    runner = Path(__file__).resolve().parents[2] / "bench" / "peers" / "runner.py"
    cpu_seconds: Callable[[], float] = runpy.run_path(str(runner))["cpu_seconds"]
    busy = "import os, time\nwhile time.process_time() < 0.3: pass\nprint(flush=True)\nos.read(0, 1)"
    before, own = cpu_seconds(), time.process_time()
    with subprocess.Popen([sys.executable, "-S", "-c", busy], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        assert worker.stdout is not None
        worker.stdout.readline()
        alive = cpu_seconds() - before - (time.process_time() - own)
        assert alive >= 0.28
        worker.communicate(b"x")
    ended = cpu_seconds() - before - (time.process_time() - own)
    assert ended >= 0.28
