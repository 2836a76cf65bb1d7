"""A server program on this machine, for tests: started on free loopback ports, waited for, killed, cleared away."""

import shutil
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from ..errors import DeadlineExceeded, StoreError

__all__ = ["HOST", "LoopbackServer"]

HOST = "127.0.0.1"


class LoopbackServer(ABC):
    """A process with a temporary directory of its own, from the entry of the ``with`` block to its end.

    Args:
        kind: of what, in errors and in the directory's name.
        program: its command, in errors.
        start_timeout_s: seconds until one that does not answer is given up.
    """

    def __init__(self, *, kind: str, program: str, start_timeout_s: float) -> None:
        self._kind, self._program, self._start_timeout_s = kind, program, start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None, "the server runs inside its with block"
        return self._process.pid

    @abstractmethod
    def _prepare(self) -> tuple[Sequence[str], dict[str, str]]:
        """Choose free ports and return the command and its environment; ``_directory / "data"`` is there."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether the server that was started is ready."""

    def _furnish(self) -> None:
        """Make what must be in it once it answers; nothing, unless a server says otherwise."""
        return

    def __enter__(self) -> Self:
        for attempts_left in (2, 1, 0):
            try:
                self._start()
                self._furnish()
                break
            except BaseException as error:
                self.close()
                # Between choosing a port and binding it another process may have taken it.
                if not (isinstance(error, StoreError) and attempts_left):
                    raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Kill the server and remove its data. Harmless when called twice."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _start(self) -> None:
        self._directory = directory = Path(tempfile.mkdtemp(prefix=f"stoker-{self._kind.lower()}-"))
        (directory / "data").mkdir()
        command, env = self._prepare()
        with open(directory / "log", "wb") as log:
            self._process = subprocess.Popen(
                command,
                env={**env, "TMPDIR": str(directory)},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + self._start_timeout_s
        while not self._answers():
            if self._process.poll() is not None:
                lines = (directory / "log").read_text(errors="replace").strip().splitlines()
                raise StoreError(
                    f"the {self._kind} server must start",
                    value=lines[-1] if lines else "no output",
                    place=self._program,
                )
            if time.monotonic() > deadline:
                raise DeadlineExceeded(f"must answer within {self._start_timeout_s} s", place=self._program)
            time.sleep(0.05)
