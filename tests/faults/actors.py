"""Processes that do what they are told, line by line, forked before anything starts a thread.

A trial that needs several processes at once runs as a program of its own (:func:`run_program`), since a test process has
threads and must not fork: it imports torch once, forks its actors, and only then does anything itself.
"""

import json
import logging
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any

_PATIENCE_S = 60.0


class Actor:
    """A child process, or in the child itself its own end; orders and answers are lines of text."""

    def __init__(self, name: str, pid: int, orders: int, answers: int) -> None:
        self.name, self.pid = name, pid
        self._out, self._in = orders, answers
        self._heard = b""

    @classmethod
    def fork(cls, name: str, work: Callable[["Actor"], None]) -> "Actor":
        """Start ``work(actor)`` in a child; it ends when the work does, or when it is killed."""
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        pid = os.fork()
        if pid:
            os.close(theirs_out)
            os.close(theirs_in)
            return cls(name, pid, ours_out, ours_in)
        try:
            os.close(ours_in)
            os.close(ours_out)
            logging.disable(logging.ERROR)  # what fails here is meant to
            work(cls(name, os.getpid(), theirs_out, theirs_in))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)

    def tell(self, **order: Any) -> None:
        """Send one order, or in the child one answer."""
        with suppress(BrokenPipeError):  # a dead one is noticed where it is listened to
            os.write(self._out, json.dumps(order).encode() + b"\n")

    def hear(self) -> dict[str, Any]:
        """The next answer. An actor that is dead or says nothing for a minute is a broken rule."""
        line = self._line(_PATIENCE_S)
        assert line is not None, f"{self.name} died"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _line(self, timeout_s: float | None) -> bytes | None:
        while b"\n" not in self._heard:
            assert select.select([self._in], [], [], timeout_s)[0], f"{self.name} hangs"
            more = os.read(self._in, 1 << 16)
            if not more:
                return None
            self._heard += more
        line, _, self._heard = self._heard.partition(b"\n")
        return line

    def ask(self, **order: Any) -> dict[str, Any]:
        """Tell and hear."""
        self.tell(**order)
        return self.hear()

    def orders(self) -> Iterator[dict[str, Any]]:
        """In the child: what it is told, until the other end is closed."""
        while (line := self._line(None)) is not None:
            yield json.loads(line)

    def stop(self) -> None:
        """From when this returns, no thread of the child runs."""
        os.kill(self.pid, signal.SIGSTOP)
        os.waitpid(self.pid, os.WUNTRACED)

    def wake(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        """End the child, however it is, and bury it."""
        with suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(self.pid, 0)
        os.close(self._out)
        os.close(self._in)


def run_program(module: str, job: Mapping[str, Any], progress: Callable[[], None]) -> dict[str, Any]:
    """Run ``python -m module`` with `job` on its input; each line that it prints is progress, the last one the result."""
    with subprocess.Popen(
        [sys.executable, "-m", module], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(job))
        process.stdin.close()
        last = ""
        for line in process.stdout:
            last = line
            progress()
    if process.returncode != 0:
        raise RuntimeError(f"{module} ended with exit code {process.returncode}")
    result: dict[str, Any] = json.loads(last)
    return result
