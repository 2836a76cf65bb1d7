"""Kill a program with SIGKILL at a random moment of its work, hundreds of times, and examine what each kill left.

A :class:`Trial` is a program and a check. :func:`run_trial` starts the program, kills it (a *life*), calls the check on
what is left in the directory, and starts the program again on the same directory: so recovery is killed as well. At the
end one life is left to finish a pass. Two kinds of moment:

``at="moments"``
    a random delay after the program said that it started, uniform over two of its passes;
``at="calls"``
    just before the k-th call that could change a file (open, write, fsync, link, rename, … made through :mod:`os`), for
    every k that two passes make: no boundary between two calls is left to luck.

A trial that killed idle programs proves nothing, so the program marks its work, and the trial fails if too few kills hit
it (JuiceFS's crash test does the same). What the program acknowledges is kept outside the process and outlives it.

The program is a function ``work(directory, recorder)`` that does one pass and is called over and over, in processes forked
from a server that has imported everything already: hundreds of kills take seconds. Or it is a command line, for what must
be a process from the start (torchrun)::

    # mytests/saving.py
    def work(directory, recorder):
        with recorder.in_flight():
            save(directory / "state", step := load_step(directory) + 1)
        recorder.acknowledge(step)

    # mytests/test_saving.py
    def check(directory, death):
        assert load_step(directory) >= death.acknowledged

    trial = Trial(name="saving", program="mytests.saving:work", check=check)
    report = run_trial(trial, directory=tmp_path, kills=200)
    assert report.ok, report

Linux only (pidfd). SIGKILL ends a process, not the machine: what was written without fsync survives it, so this proves
the order of a program's steps and its recovery, not its power-loss safety.
"""

import ctypes
import gc
import importlib
import json
import os
import random
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from mmap import mmap
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import ConfigError, UnsupportedError
from ._os_calls import CHANGING_CALLS, OPENS_FOR_WRITING

__all__ = ["Death", "KillReport", "Recorder", "Trial", "attach", "run_trial"]

_CONTROL_VARIABLE = "STOKER_KILL_CONTROL"
_PAGE, _STARTED, _OUTPUT = "page", "started", "output"

# The page that the program and the runner share. Native 64-bit slots: one store each, so no kill can tear one.
(
    _IN_FLIGHT,
    _ACKNOWLEDGED,
    _PASSES,
    _PASS_LIMIT,
    _CALLS,
    _KILL_AT_CALL,  # 0: calls are not counted
    _LAST_CALL,
    _STARTED_NS,
    _LAST_PASS_NS,
    _SLOTS_USED,
) = range(10)
_SLOTS = 512
_NEVER = -1


@dataclass(frozen=True, kw_only=True)
class Death:
    """One life of the program, as its end left it.

    Attributes:
        number: of the life, from 0.
        killed: False for the last life, which was left to finish a pass.
        in_flight: the program was inside :meth:`Recorder.in_flight` when it died.
        acknowledged: the last number that this life acknowledged; -1 if none.
        passes: that this life finished.
        moment: when it was killed, in words.
    """

    number: int
    killed: bool
    in_flight: bool
    acknowledged: int
    passes: int
    moment: str


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A program to kill and the rule that must hold afterwards.

    Attributes:
        name: for the report; part of the seed.
        program: ``"package.module:function"``, or a command line that calls :func:`attach`, in which
            ``{directory}`` stands for the directory it works in.
        check: called as ``check(directory, death)`` in the calling process after each life; whatever it raises is the
            violation. It sees the directory at rest: the program and all its children are dead.
        preload: modules that the fork server imports beside the program's own, so that no life pays for them. They must
            start no thread.
    """

    name: str
    program: str | Sequence[str]
    check: Callable[[Path, Death], None]
    preload: Sequence[str] = ()


@dataclass(frozen=True, kw_only=True)
class KillReport:
    """What a trial found.

    Attributes:
        trial, at, seed: what was run; the same seed draws the same delays.
        kills: lives ended by SIGKILL. in_flight: how many of them hit work in flight.
        boundaries: calls that could change a file, in two passes. boundaries_hit: at how many of them a kill was aimed;
            0 for random moments.
        passes: that all lives finished together.
        elapsed_s: of the whole trial.
        violation: the first broken rule in words, and where; None if every check held.
    """

    trial: str
    at: str
    seed: int
    kills: int
    in_flight: int
    boundaries: int
    boundaries_hit: int
    passes: int
    elapsed_s: float
    violation: str | None

    @property
    def ok(self) -> bool:
        return self.violation is None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "ok": self.ok}

    def __str__(self) -> str:
        share = self.in_flight / self.kills if self.kills else 0.0
        hit = f" at {self.boundaries_hit:,} of {self.boundaries:,} call boundaries" if self.boundaries_hit else ""
        counts = f"{self.kills:,} kills{hit}, {share:.1%} in flight, {self.passes:,} passes finished"
        verdict = "ok" if self.violation is None else f"VIOLATED\n{self.violation}"
        return f"{self.trial} ({self.at}, seed {self.seed}): {counts}, {self.elapsed_s:.1f} s: {verdict}"


# Guarantees: in_flight and acknowledge may be called from any thread; `_lock` guards `_depth`. The page is a shared file
# mapping: what was stored before a SIGKILL is there after it.
class Recorder:
    """What a program tells the runner while it works, kept where its death can't reach it."""

    def __init__(self, control: Path) -> None:
        self._control = control
        fd = os.open(control / _PAGE, os.O_RDWR | os.O_CLOEXEC)
        try:
            self._slots = memoryview(mmap(fd, 8 * _SLOTS)).cast("q")
        finally:
            os.close(fd)
        self._lock = threading.Lock()
        self._depth = 0

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Mark the block as work that a kill is meant to hit. Blocks may nest and overlap between threads."""
        self._move(+1)
        try:
            yield
        finally:
            self._move(-1)

    def _move(self, by: int) -> None:
        with self._lock:
            self._depth += by
            self._slots[_IN_FLIGHT] = self._depth

    def acknowledge(self, number: int) -> None:
        """Record that the program promised `number` (a step, a count) to be safe: the check will hold it to that."""
        self._slots[_ACKNOWLEDGED] = number

    def passes(self) -> Iterator[int]:
        """Count passes, 0, 1, 2, …, for as long as the runner wants. The first one starts the clock of the kill."""
        self._start()
        while not self._slots[_PASS_LIMIT] or self._slots[_PASSES] < self._slots[_PASS_LIMIT]:
            yield self._slots[_PASSES]
            self._slots[_LAST_PASS_NS] = time.monotonic_ns()
            self._slots[_PASSES] += 1

    def _start(self) -> None:
        fd = os.open(self._control / _STARTED, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, b"!")
        finally:
            os.close(fd)
        if self._slots[_KILL_AT_CALL]:
            _count_calls(self._slots)
        self._slots[_STARTED_NS] = time.monotonic_ns()


def attach() -> Recorder:
    """The recorder of a program that :func:`run_trial` started as a command line.

    Raises:
        ConfigError: the process was not started by a trial.
    """
    control = os.environ.get(_CONTROL_VARIABLE)
    if control is None:
        raise ConfigError("the process must be started by run_trial", place="stoker.testing.kill.attach")
    return Recorder(Path(control))


def _count_calls(slots: memoryview) -> None:
    """Count the calls of this process that could change a file, and die just before the one that was asked for."""
    lock = threading.Lock()
    opened = os.open

    def counted(index: int, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if call is opened and not args[1] & OPENS_FOR_WRITING:
                return call(*args, **kwargs)
            with lock:
                slots[_CALLS] += 1
                if slots[_CALLS] == slots[_KILL_AT_CALL]:
                    slots[_LAST_CALL] = index
                    os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return wrapper

    for index, name in enumerate(CHANGING_CALLS):
        if hasattr(os, name):
            setattr(os, name, counted(index, getattr(os, name)))


def run_trial(
    trial: Trial,
    *,
    directory: str | Path,
    kills: int | None = None,
    at: Literal["moments", "calls"] = "moments",
    seed: int | None = None,
    min_in_flight: float = 0.9,
    deadline_s: float = 60.0,
    progress: Callable[[], None] | None = None,
) -> KillReport:
    """Kill the trial's program many times and check what each kill left.

    The program works in ``directory/work``, created here and kept, so that a violation can be looked into. The trial
    ends at the first violation.

    Args:
        kills: how many. With ``at="calls"``, None kills once at each boundary; fewer are spread evenly over them, from a
            place that the seed chooses, and more start again.
        at: ``"moments"`` or ``"calls"``, see the head of this module.
        seed: of the random delays; drawn and reported if None.
        min_in_flight: share of the kills that must hit work in flight.
        deadline_s: for the program to start and, where it is left alone, for each of its passes.
        progress: called after each kill.

    Raises:
        ConfigError: no kills asked for, or a preloaded module that can't be imported or that starts threads.
        UnsupportedError: not on Linux.
    """
    if (kills is None and at == "moments") or (kills is not None and kills < 1):
        raise ConfigError("kills must be >= 1", value=kills, place=f"trial {trial.name}")
    if not hasattr(os, "pidfd_open"):
        raise UnsupportedError("the kill runner needs pidfd_open, which only Linux has", place=f"trial {trial.name}")
    seed = struct.unpack("<I", os.urandom(4))[0] if seed is None else seed
    began = time.perf_counter()
    with ExitStack() as stack:
        work = Path(directory) / "work"
        work.mkdir(parents=True, exist_ok=True)
        stage = _Stage(trial, Path(directory), stack, deadline_s=deadline_s)
        tally = _Tally()
        violation: str | None = None
        boundaries = 0
        try:
            span_s, boundaries = stage.rehearse()
            kills = boundaries if kills is None else kills
            for number in range(kills):
                if at == "calls":
                    call = 1 + _boundary(number, kills, boundaries, seed)
                    death = stage.life(work, number, kill_at_call=call)
                else:
                    delay_s = random.Random(f"{seed}/{trial.name}/{number}").uniform(0, span_s)
                    death = stage.life(work, number, delay_s=delay_s)
                tally.add(death)
                _checked(trial, work, death)
                if progress is not None:
                    progress()
            tally.passes += (last := stage.life(work, kills, passes=1)).passes
            _checked(trial, work, last)
            if tally.in_flight < min_in_flight * kills:
                violation = (
                    f"only {tally.in_flight} of {kills} kills hit work in flight, and at least {min_in_flight:.0%} "
                    "must: the trial proves nothing"
                )
        except _Violation as found:
            violation = str(found)
    return KillReport(
        trial=trial.name,
        at=at,
        seed=seed,
        kills=tally.kills,
        in_flight=tally.in_flight,
        boundaries=boundaries,
        boundaries_hit=min(tally.kills, boundaries) if at == "calls" else 0,
        passes=tally.passes,
        elapsed_s=time.perf_counter() - began,
        violation=violation,
    )


def _boundary(number: int, kills: int, boundaries: int, seed: int) -> int:
    """Where kill `number` goes: each boundary in turn, or an even spread whose start the seed chooses.

    >>> [_boundary(n, 6, 4, seed=0) for n in range(6)], [_boundary(n, 3, 9, seed=0) for n in range(3)]
    ([0, 1, 2, 3, 0, 1], [2, 5, 8])
    """
    if kills >= boundaries:
        return number % boundaries
    return (number * boundaries + random.Random(seed).randrange(boundaries)) // kills


class _Violation(Exception):
    """Carries a broken rule from where it was seen to the report; never leaves this module."""


@dataclass
class _Tally:
    kills: int = 0
    in_flight: int = 0
    passes: int = 0

    def add(self, death: Death) -> None:
        self.kills += 1
        self.in_flight += death.in_flight
        self.passes += death.passes


def _checked(trial: Trial, work: Path, death: Death) -> None:
    try:
        trial.check(work, death)
    except Exception as error:
        what = f"killed {death.moment}" if death.killed else death.moment
        where = f"life {death.number} of {trial.name}, {what}, in {work}"
        raise _Violation(f"{where}\n{''.join(traceback.format_exception(error)).rstrip()}") from error


class _Stage:
    """Runs one life after another."""

    def __init__(self, trial: Trial, directory: Path, stack: ExitStack, *, deadline_s: float) -> None:
        self._name, self._directory, self._deadline_s = trial.name, directory, deadline_s
        self._control = directory / "control"
        self._control.mkdir(exist_ok=True)
        (self._control / _PAGE).write_bytes(bytes(8 * _SLOTS))
        self._slots = Recorder(self._control)._slots
        with suppress(FileNotFoundError):
            (self._control / _STARTED).unlink()
        os.mkfifo(self._control / _STARTED)
        # Read and write: with a writer of its own, the fifo is never at its end between two lives.
        self._started = os.open(self._control / _STARTED, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        stack.callback(os.close, self._started)
        self._server = stack.enter_context(_ForkServer(trial))

    def rehearse(self) -> tuple[float, int]:
        """Two passes in a directory of their own, left alone: their seconds, and the calls that they make."""
        directory = self._directory / "rehearsal"
        directory.mkdir(exist_ok=True)
        self.life(directory, -2, passes=1)  # as in most lives, there is something to recover from
        self.life(directory, -1, passes=2, kill_at_call=_NEVER)
        span_s = (self._slots[_LAST_PASS_NS] - self._slots[_STARTED_NS]) * 1e-9
        return span_s, max(1, self._slots[_CALLS])

    def life(
        self, directory: Path, number: int, *, delay_s: float | None = None, kill_at_call: int = 0, passes: int = 0
    ) -> Death:
        """Start the program, let it work, and see it dead: after `delay_s`, by its own hand at a call, or at its end."""
        killed = passes == 0
        for slot in range(_SLOTS_USED):
            self._slots[slot] = 0
        self._slots[_ACKNOWLEDGED] = -1
        self._slots[_PASS_LIMIT] = passes
        self._slots[_KILL_AT_CALL] = kill_at_call
        with suppress(BlockingIOError):
            os.read(self._started, 4096)  # of several processes that attached, the first one counted
        pid = self._server.start(directory, self._control)
        pidfd = os.pidfd_open(pid)
        try:
            started = self._wait_for_start(pidfd)
            if started and delay_s is not None:
                time.sleep(delay_s)
            elif started:
                _readable(pidfd, self._deadline_s * max(1, passes))
            outlived = not _readable(pidfd, 0)
        finally:
            os.killpg(pid, signal.SIGKILL)  # its children too; a dead leader that nobody buried still holds the group
            _readable(pidfd, None)
            os.close(pidfd)
            code = self._server.bury(pid)
        if not started:
            when = f"did not start within {self._deadline_s:g} s" if outlived else "ended before it started"
            raise self._failure(when, code, number)
        if outlived and delay_s is None:
            raise self._failure(f"did not get there within {self._deadline_s:g} s for a pass", code, number)
        if code != (-signal.SIGKILL if killed else 0):
            raise self._failure("ended by itself", code, number)
        if delay_s is not None:
            moment = f"{delay_s * 1e3:.2f} ms after it started"
        else:
            moment = f"before call {kill_at_call}, os.{CHANGING_CALLS[self._slots[_LAST_CALL]]}"
        return Death(
            number=number,
            killed=killed,
            in_flight=self._slots[_IN_FLIGHT] > 0,
            acknowledged=self._slots[_ACKNOWLEDGED],
            passes=self._slots[_PASSES],
            moment=moment if killed else "left to finish",
        )

    def _wait_for_start(self, pidfd: int) -> bool:
        """Whether the program said that it started, before it died and before the deadline."""
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        poll.register(self._started, select.POLLIN)
        poll.poll(self._deadline_s * 1e3)
        try:
            return os.read(self._started, 1) == b"!"
        except BlockingIOError:
            return False

    def _failure(self, what: str, code: int, number: int) -> _Violation:
        output = self._control / _OUTPUT
        said = output.read_text(errors="replace").strip() if output.exists() else ""
        return _Violation(f"life {number} of {self._name}: the program {what} (exit code {code})\n{said}".rstrip())


def _readable(fd: int, timeout_s: float | None) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(None if timeout_s is None else timeout_s * 1e3))


class _ForkServer:
    """A process that has imported everything, does nothing, and forks a life whenever it is asked to.

    The runner itself can't fork: it may hold threads (torch, pyarrow), and a forked child of a threaded process may
    find their locks taken for ever. The server runs one thread and refuses to serve if an import started another.
    """

    def __init__(self, trial: Trial) -> None:
        self._name, self._program = trial.name, trial.program
        modules = list(trial.preload)
        if isinstance(self._program, str):
            module, colon, function = self._program.partition(":")
            if not colon or not module or not function:
                raise ConfigError('a program is "package.module:function"', value=self._program, place="Trial.program")
            modules.append(module)
        start = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import _serve; _serve()"
        self._process = subprocess.Popen(
            [sys.executable, "-c", start, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,  # Ctrl-C is the runner's to handle
        )
        try:
            answer = self._ask({"modules": modules})
            if "error" in answer:
                raise ConfigError(answer["error"], value=answer["value"], place=f"trial {trial.name}")
        except BaseException:
            self.close()
            raise

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise _Violation(f"the fork server of {self._name} ended (exit code {self._process.wait()})")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def start(self, directory: Path, control: Path) -> int:
        """Start a life in a process group of its own; returns its pid, which stays taken until :meth:`bury`."""
        program = self._program if isinstance(self._program, str) else list(self._program)
        answer = self._ask({"program": program, "directory": str(directory), "control": str(control)})
        return int(answer["pid"])

    def bury(self, pid: int) -> int:
        """Reap a dead life and its children; returns its exit code as subprocess counts it (-9 for SIGKILL)."""
        return int(self._ask({"bury": pid})["code"])

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()  # the server reads the end of its input and leaves
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def _serve() -> None:
    """The fork server: one JSON line in, one out, until its input ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)  # the children of a killed life become ours, so that bury can wait for them
    requests, answers = sys.stdin, os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever an import prints is no answer

    def answer(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    answer(**_prepare(json.loads(requests.readline())["modules"]))
    for line in requests:
        request = json.loads(line)
        if "bury" in request:
            _, status = os.waitpid(request["bury"], 0)
            with suppress(ChildProcessError):
                while True:
                    os.waitpid(-request["bury"], 0)
            answer(code=os.waitstatus_to_exitcode(status))
        else:
            pid = os.fork()
            if pid == 0:
                _live(request["program"], Path(request["directory"]), Path(request["control"]))
            with suppress(OSError):  # the child does it too: whoever comes first
                os.setpgid(pid, pid)
            answer(pid=pid)


def _prepare(modules: Sequence[str]) -> dict[str, Any]:
    try:
        for module in modules:
            importlib.import_module(module)
    except ImportError as error:
        return {"error": "the modules of a trial must be importable", "value": str(error)}
    if threads := [t.name for t in threading.enumerate() if t is not threading.main_thread()]:
        return {"error": "a preloaded module must start no thread: fork would not copy it", "value": threads}
    gc.collect()
    gc.freeze()  # or the first collection of every life would copy each page that holds an object
    return {}


def _live(program: str | Sequence[str], directory: Path, control: Path) -> None:
    """The forked child: pass after pass until it is killed. Never returns into the server's loop."""
    code = 1
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        with suppress(OSError):
            os.setpgid(0, 0)
        output = os.open(control / _OUTPUT, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        null = os.open(os.devnull, os.O_RDONLY)
        for source, target in ((null, 0), (output, 1), (output, 2)):
            os.dup2(source, target)
        if isinstance(program, str):
            module, _, function = program.partition(":")
            work = getattr(importlib.import_module(module), function)
            recorder = Recorder(control)
            for _ in recorder.passes():
                work(directory, recorder)
        else:
            arguments = [part.replace("{directory}", str(directory)) for part in program]
            os.execvpe(arguments[0], arguments, {**os.environ, _CONTROL_VARIABLE: str(control)})
        code = 0
    except BaseException:  # noqa: BLE001 - told to the runner through the output file and the exit code
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


# man 2 prctl. With the first, an interrupted runner leaves no process behind.
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(option, value)
