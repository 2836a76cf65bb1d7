"""The demonstration: real text, a real training run, a real kill.

``stoker demo`` packs the source of Python's standard library into a token data set, trains a small GPT on it with
``examples/train.py``, once without interruption and once killed by SIGKILL while a save is in flight, and compares what
the two runs wrote. Nothing is assumed: every figure and verdict comes from the runs' logs and checkpoints.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from ._console import JsonFlag, emit, progress
from .errors import ConfigError, MissingExtra, StokerError

__all__ = ["Verdict", "compare_runs", "demo", "train_script"]

_VOCAB = 4096
_SAVE_EVERY = 15
_MAX_KILLS = 8
_RUN_TIMEOUT_S = 600.0


# ------------------------------------------------------------------------------------------------------ what was written


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What two runs that must be equal wrote.

    Attributes:
        identical: every step of both runs is there, with bit-identical losses, also where a step was done twice, and
            the tensors of the last checkpoints are bit-identical.
        reason: the first difference, or an empty string.
    """

    identical: bool
    reason: str


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events that a run appended to its log; a line torn by a kill is left out."""
    events = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def compare_runs(reference: Sequence[dict[str, Any]], other: Sequence[dict[str, Any]], steps: int) -> Verdict:
    """Whether `other` (killed and resumed) did the same steps with the same losses as `reference`.

    >>> straight = [{"event": "step", "step": 1, "loss": 2.5}, {"event": "step", "step": 2, "loss": 2.25}]
    >>> compare_runs(straight, [straight[0], straight[0], straight[1]], 2)
    Verdict(identical=True, reason='')
    >>> compare_runs(straight, straight[:1], 2).reason
    'step 2 is missing'
    >>> compare_runs(straight, [straight[0], {"event": "step", "step": 2, "loss": 2.26}], 2).reason
    'step 2: loss 2.26, not 2.25'
    """
    expected: dict[int, float] = {e["step"]: e["loss"] for e in reference if e["event"] == "step"}
    done: dict[int, list[float]] = {}
    for event in other:
        if event["event"] == "step":
            done.setdefault(event["step"], []).append(event["loss"])
    for step in range(1, steps + 1):
        if step not in expected or step not in done:
            return Verdict(identical=False, reason=f"step {step} is missing")
        for loss in done[step]:
            if loss != expected[step]:
                return Verdict(identical=False, reason=f"step {step}: loss {loss}, not {expected[step]}")
    return Verdict(identical=True, reason="")


def compare_checkpoints(reference: Path, other: Path) -> Verdict:
    """Whether the newest steps of two roots hold the same tensors, bit for bit."""
    mine, theirs = _tensors(reference), _tensors(other)
    if mine.keys() != theirs.keys():
        return Verdict(identical=False, reason=f"tensors {sorted(mine.keys() ^ theirs.keys())[:3]} are in one run only")
    for name, data in mine.items():
        if data != theirs[name]:
            return Verdict(identical=False, reason=f"tensor {name} differs")
    return Verdict(identical=True, reason="")


def _tensors(root: Path) -> dict[str, bytes]:
    from .checkpoint.log import CheckpointLog, step_directory
    from .checkpoint.reader import StepReader, read_manifest, resolve_step
    from .storage import open_store

    with open_store(root) as store:
        step, live, _ = resolve_step(CheckpointLog(store), None, store.url)
        directory = step_directory(step, live.nonce)
        manifest = read_manifest(store, directory, live)
        reader = StepReader(store, directory, manifest)
        return {
            name: b"".join(
                reader.read_bytes(chunk.blob, chunk.byte_offset, chunk.byte_offset + chunk.byte_length)
                for chunk in manifest.chunks_of(name)
            )
            for name in manifest.tensor_names
        }


# ------------------------------------------------------------------------------------------------------------ the runs


def train_script() -> Path:
    """``examples/train.py``: beside this file in an installed package, one folder up in a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "examples" / "train.py", here.parent / "examples" / "train.py"):
        if path.exists():
            return path
    raise ConfigError("examples/train.py must come with the package", place=str(here), hint="install stoker again")


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One training run: its data, its checkpoint root and its log."""

    tokens: Path
    checkpoints: Path
    log: Path
    steps: int

    def command(self) -> list[str]:
        options = {
            "--data": self.tokens,
            "--checkpoints": self.checkpoints,
            "--log": self.log,
            "--steps": self.steps,
            "--save-every": _SAVE_EVERY,
            "--vocab": _VOCAB,
        }
        return [sys.executable, str(train_script()), *(str(part) for pair in options.items() for part in pair)]

    @contextmanager
    def started(self) -> "Iterator[subprocess.Popen[bytes]]":
        """The run as a process group of its own, gone when the block ends, however it ends."""
        with (self.log.parent / f"{self.log.stem}.out").open("ab") as output:
            process = subprocess.Popen(
                self.command(), stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def finish(self) -> None:
        """Run to the end."""
        with self.started() as process:
            code = process.wait(_RUN_TIMEOUT_S)
        if code != 0:
            raise StokerError(
                "the training run must end with code 0", value=code, place=str(self.log), hint=self._tail()
            )

    def _tail(self) -> str:
        output = self.log.parent / f"{self.log.stem}.out"
        return output.read_text(errors="replace").strip().splitlines()[-1] if output.stat().st_size else "no output"

    def kill_in_save(self, after_step: int) -> int | None:
        """Run until a save after `after_step` begins, then SIGKILL; returns the step if it was not committed."""
        with self.started() as process:
            seen = len(read_events(self.log))
            deadline = time.monotonic() + _RUN_TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                saving = [e for e in read_events(self.log)[seen:] if e["event"] == "saving" and e["step"] > after_step]
                if saving:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    step = int(saving[-1]["step"])
                    return None if step in _committed(self.checkpoints) else step
                time.sleep(0.001)
        raise StokerError("the run must reach a save", place=str(self.log), hint=self._tail())


def _committed(root: Path) -> list[int]:
    from .checkpoint.log import CheckpointLog
    from .storage import open_store

    with open_store(root) as store:
        head = CheckpointLog(store).head()
        return [] if head is None else sorted(head.live)


# ------------------------------------------------------------------------------------------------------------ the data


def _corpus() -> list[Path]:
    """The source files of Python's standard library: tens of MB of real text on every machine."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [path for path in sorted(root.rglob("*.py")) if "site-packages" not in path.parts]


def _train_tokenizer(files: Sequence[Path], path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(path))


# --------------------------------------------------------------------------------------------------------- the command


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Work here and keep everything; by default a temporary directory.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2 * _SAVE_EVERY, help="Training steps of each run.")] = 90,
    corpus_files: Annotated[
        int | None, typer.Option(min=1, help="Take only that many source files; all of them by default.")
    ] = None,
    copy: Annotated[
        Path | None, typer.Option("--copy", help="Copy examples/train.py to this directory and stop.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Pack real text, train a GPT on it, kill it in the middle of a save, resume, and compare.

    Example: stoker demo --steps 120 --json
    """
    if copy is not None:
        copy.mkdir(parents=True, exist_ok=True)
        target = copy / "train.py"
        if target.exists():
            raise ConfigError("must not exist yet", place=str(target), hint="choose another directory")
        shutil.copy(train_script(), target)
        emit({"ok": True, "path": str(target)}, f"wrote {target}", as_json=as_json)
        return
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise MissingExtra("the demo needs the extra [demo]", hint="pip install 'stoker[demo]'") from error
    with ExitStack() as stack:
        report = _run_demo(stack.enter_context(_working_directory(directory)), steps, corpus_files)
    emit(report, _table(report), as_json=as_json)
    if not report["ok"]:
        raise typer.Exit(1)


@contextmanager
def _working_directory(directory: Path | None) -> Iterator[Path]:
    if directory is None:
        with tempfile.TemporaryDirectory(prefix="stoker-demo-") as temporary:
            yield Path(temporary)
        return
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ConfigError("the directory must be empty", place=str(directory), hint="choose another --dir or empty it")
    directory.mkdir(parents=True, exist_ok=True)
    yield directory


def _run_demo(work: Path, steps: int, corpus_files: int | None) -> dict[str, Any]:
    from .loaders.pack import pack

    started = time.monotonic()
    files = _corpus()[:corpus_files]
    _say(f"[1/5] training a byte-pair tokenizer on {len(files)} files of Python's standard library")
    _train_tokenizer(files, work / "tokenizer.json")
    _say("[2/5] packing them into a token data set")
    with progress("packing", total=sum(file.stat().st_size for file in files)) as bar:
        # Some of the standard library's tests are about text that is not UTF-8.
        packed = pack(files, work / "tokens", tokenizer=work / "tokenizer.json", errors="replace", progress=bar.advance)
    runs = {
        name: _Run(tokens=work / "tokens", checkpoints=work / name, log=work / f"{name}.jsonl", steps=steps)
        for name in ("straight", "killed")
    }
    _say(f"[3/5] training {steps} steps without interruption")
    runs["straight"].finish()
    _say("[4/5] the same again, with a SIGKILL while a save is in flight")
    killed_at = _kill_once(runs["killed"])
    _say(f"[5/5] killed while step {killed_at} was being saved; resuming")
    runs["killed"].finish()
    straight, killed = read_events(runs["straight"].log), read_events(runs["killed"].log)
    verdict = compare_runs(straight, killed, steps)
    if verdict.identical:
        verdict = compare_checkpoints(runs["straight"].checkpoints, runs["killed"].checkpoints)
    resumed = [event["step"] for event in killed if event["event"] == "resumed"]
    return {
        "ok": verdict.identical and bool(resumed),
        "resume_bit_identical": verdict.identical,
        "difference": verdict.reason,
        "killed_in_save_of_step": killed_at,
        "resumed_from_step": resumed[-1] if resumed else None,
        "corpus_tokens": packed.tokens,
        "seconds": round(time.monotonic() - started, 1),
        **_figures(straight),
    }


def _kill_once(run: _Run) -> int:
    """SIGKILL the run inside a save. A save that was quicker than the kill is no proof: go on to a later one."""
    after_step = _SAVE_EVERY
    for _ in range(_MAX_KILLS):
        step = run.kill_in_save(after_step)
        if step is not None:
            return step
        after_step = max(_committed(run.checkpoints), default=after_step)
        if after_step >= run.steps - _SAVE_EVERY:
            break
    raise StokerError(
        "a kill must meet a save in flight",
        value=f"{_MAX_KILLS} tries",
        hint="every save was quicker: use more --steps",
    )


def _figures(events: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Speed and stalls of one run, the first step left out: it pays for warming up."""
    steps = [event for event in events if event["event"] == "step"][1:]
    seconds = sum(event["seconds"] for event in steps)
    done = [event for event in events if event["event"] == "done"][-1]
    return {
        "steps": len(steps) + 1,
        "tokens": sum(event["tokens"] for event in events if event["event"] == "step"),
        "tokens_per_s": sum(event["tokens"] for event in steps) / seconds,
        "data_stall_fraction": sum(event["wait_s"] for event in steps) / seconds,
        "save_stall_s": [event["stall_s"] for event in events if event["event"] == "saving"],
        "durable_bytes_per_s": done["bytes"] / done["seconds"],
        "losses": [event["loss"] for event in events if event["event"] == "step"],
    }


def _table(report: dict[str, Any]) -> str:
    losses, stalls = report["losses"], report["save_stall_s"]
    rows = {
        "corpus": f"{report['corpus_tokens']:,} tokens of Python source",
        "loss, first to last step": f"{losses[0]:.4f} -> {losses[-1]:.4f} in {report['steps']} steps",
        "training": f"{report['tokens_per_s']:,.0f} tokens/s",
        "waiting for data": f"{report['data_stall_fraction']:.3%} of the run",
        "save stall": f"{1e3 * sum(stalls) / len(stalls):.1f} ms a save, {len(stalls)} saves",
        "durable save": f"{report['durable_bytes_per_s'] / 1e9:.2f} GB/s from save() to committed",
        "killed": f"while step {report['killed_in_save_of_step']} was being saved",
        "resumed": f"from step {report['resumed_from_step']}",
        "same losses and parameters": "yes, bit for bit" if report["resume_bit_identical"] else report["difference"],
        "took": f"{report['seconds']:.0f} s",
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
