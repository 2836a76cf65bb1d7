"""Peers whose pins conflict with ours: each in an environment of its own, made on demand and never shipped.

They live below ``bench/peers`` of a source checkout: ``requirements-NAME.txt`` pins every package, ``runner.py`` speaks for
all of them. An environment sees this one's packages behind its own, so that both sides of a comparison run on the same
torch. :class:`PeerProcess` runs a peer in its environment and passes JSON lines to and fro.
"""

import hashlib
import json
import os
import selectors
import shutil
import subprocess
import sysconfig
import tempfile
import venv
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ..errors import ConfigError, CorruptionError, DeadlineExceeded, MissingExtra

__all__ = ["LOAD_PEERS", "PeerProcess", "PeerStatus", "install", "statuses"]

LOAD_PEERS = {"litdata": "LitData", "mosaicml-streaming": "MosaicML Streaming", "datasets": "HF datasets"}
"""Peers of ``stoker bench load`` by the package that they come in."""

_INSTALL_TIMEOUT_S = 900
_REPLY_TIMEOUT_S = 600


class PeerStatus(NamedTuple):
    """A peer's package, its pinned version, and whether its environment is there with just these pins."""

    name: str
    version: str
    installed: bool


def _root() -> Path:
    """``bench/peers`` of the checkout that this package runs from; MissingExtra for an installed package."""
    root = Path(__file__).resolve().parents[2] / "bench" / "peers"
    if not (root / "runner.py").is_file():
        raise MissingExtra("peers with environments of their own come with a source checkout only", place="bench/peers")
    return root


def _requirements(name: str) -> Path:
    if name not in LOAD_PEERS:
        raise ConfigError(f"a peer is one of {', '.join(LOAD_PEERS)}", value=name, place="stoker bench peers")
    return _root() / f"requirements-{name}.txt"


def _environment(name: str) -> Path:
    return _root() / ".venv" / name


def _stamp(name: str) -> str:
    """What an environment was made from: other pins, or another torch behind them, make it another one."""
    return hashlib.sha256(_requirements(name).read_bytes() + sysconfig.get_path("purelib").encode()).hexdigest()


def is_installed(name: str) -> bool:
    """Whether the environment of a peer is there, with the pins that the checkout has now."""
    stamp = _environment(name) / "stamp"
    return stamp.is_file() and stamp.read_text() == _stamp(name)


def statuses() -> list[PeerStatus]:
    """All peers, in the order of a report.

    Raises:
        MissingExtra: not a source checkout.
    """
    found = []
    for name in LOAD_PEERS:
        pins = dict(line.split("==") for line in _requirements(name).read_text().split())
        found.append(PeerStatus(name=name, version=pins[name], installed=is_installed(name)))
    return found


def install(name: str) -> None:
    """Make a peer's environment anew, from the package index that pip is configured for. Takes some seconds.

    Raises:
        MissingExtra: pip failed, with the end of what it said; or not a source checkout.
    """
    requirements, environment = _requirements(name), _environment(name)
    shutil.rmtree(environment, ignore_errors=True)
    venv.create(environment, with_pip=True)
    own = Path(sysconfig.get_path("purelib", vars={"base": str(environment), "platbase": str(environment)}))
    # Its own packages come first. Dependencies are all pinned: torch and what else is not stays as it is here.
    (own / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    python = str(environment / "bin" / "python")
    command = [python, "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(requirements)]
    unconstrained = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    try:
        done = subprocess.run(
            command, env=unconstrained, check=False, capture_output=True, text=True, timeout=_INSTALL_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise DeadlineExceeded(f"pip must end within {_INSTALL_TIMEOUT_S} s", place=name) from error
    if done.returncode != 0:
        raise MissingExtra(f"{name} could not be installed", value=done.stderr[-500:], place=str(requirements))
    (environment / "stamp").write_text(_stamp(name))


class PeerProcess:
    """A peer at work in its own environment. One thread uses it; :meth:`close` ends the process.

    Raises:
        MissingExtra: it is not installed.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._process: subprocess.Popen[str] | None = None
        if not is_installed(name):
            raise MissingExtra("it is not installed", hint="stoker bench peers --install")
        self._said = tempfile.TemporaryFile("w+")  # a pipe that nobody reads would stop it  # noqa: SIM115
        self._process = subprocess.Popen(
            [_environment(name) / "bin" / "python", _root() / "runner.py", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._said,
            text=True,
            # Nothing is fetched or reported while a peer runs.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "DO_NOT_TRACK": "1"},
        )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """One request, and the reply to it.

        Raises:
            CorruptionError: the peer says that it returned wrong bytes.
            MissingExtra: it ended instead; with the last of what it wrote.
            DeadlineExceeded: no reply in ten minutes.
        """
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            process.stdin.flush()
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                if not selector.select(_REPLY_TIMEOUT_S):
                    raise DeadlineExceeded(f"{self.name} must reply within {_REPLY_TIMEOUT_S} s", value=do)
            line = process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            process.wait(_REPLY_TIMEOUT_S)
            self._said.seek(0)
            raise MissingExtra(f"{self.name} ended when it was asked to {do}", value=self._said.read()[-300:])
        reply: dict[str, Any] = json.loads(line)
        if "wrong" in reply:
            raise CorruptionError(reply["wrong"], place=self.name)
        return reply

    def close(self) -> None:
        """End the process and wait for it. Harmless when called twice."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            process.communicate(timeout=10)  # closes its input, at which it ends
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
        self._said.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()
