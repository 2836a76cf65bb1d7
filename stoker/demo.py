"""The demonstration: real text, a real training run, a real kill, another world size.

``stoker demo`` packs the source of Python's standard library into a token data set, trains a small GPT on it with
``examples/train.py``, once without interruption and once killed by SIGKILL while a save is in flight, resumes the killed
run under torchrun with two ranks as well, and compares what the runs wrote. Nothing is assumed: every figure and verdict
comes from the runs' logs and checkpoints.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import typer

from ._console import JsonFlag, emit, progress
from .errors import ConfigError, MissingExtra, StokerError, StoreFull
from .metrics import Prices
from .storage import open_store
from .storage._units import format_bytes

__all__ = ["Verdict", "compare_checkpoints", "compare_runs", "compare_streams", "demo", "read_events", "train_script"]

_VOCAB = 4096
_GLOBAL_BATCH = 16
_SEQ_LEN = 128
_SAVE_EVERY = 15
_ELASTIC_STEPS = 12
_MAX_KILLS = 8
_RUN_TIMEOUT_S = 900.0
_DATA_BYTES = 64 << 20
"""Disk for the data set, the tokenizer and the logs, with room to spare."""
_FULL_BYTES = 1 << 20
"""Less than that free, and a run that failed did so for want of it."""
_LOSS_TOLERANCE = 1e-3
"""Relative: two ranks add their gradients in another order than one, and a dozen steps of AdamW carry that on."""

Event = Mapping[str, Any]


# ------------------------------------------------------------------------------------------------------ what was written


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether two runs that must agree do, and if not, the first difference."""

    ok: bool
    reason: str = ""


def read_events(log: Path) -> list[dict[str, Any]]:
    """The events that one rank appended to its log; a line torn by a kill is left out."""
    events = []
    for line in log.read_text().splitlines() if log.exists() else []:
        try:
            events.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return events


def _steps(events: Sequence[Event]) -> dict[int, list[Event]]:
    """All events of each step: a step that was done again after a kill has several."""
    steps: dict[int, list[Event]] = {}
    for event in events:
        if event["event"] == "step":
            steps.setdefault(event["step"], []).append(event)
    return steps


def compare_runs(reference: Sequence[Event], other: Sequence[Event], steps: int) -> Verdict:
    """Whether `other` (killed and resumed) did every step, and always with the very loss that `reference` had.

    >>> straight = [{"event": "step", "step": 1, "loss": 2.5}, {"event": "step", "step": 2, "loss": 2.25}]
    >>> compare_runs(straight, [straight[0], straight[0], straight[1]], 2)
    Verdict(ok=True, reason='')
    >>> compare_runs(straight, straight[:1], 2).reason
    'step 2 is missing'
    >>> compare_runs(straight, [straight[0], {"event": "step", "step": 2, "loss": 2.26}], 2).reason
    'step 2: loss 2.26, not 2.25'
    """
    expected, done = _steps(reference), _steps(other)
    for step in range(1, steps + 1):
        if step not in expected or step not in done:
            return Verdict(ok=False, reason=f"step {step} is missing")
        for event in done[step]:
            if event["loss"] != expected[step][0]["loss"]:
                return Verdict(ok=False, reason=f"step {step}: loss {event['loss']}, not {expected[step][0]['loss']}")
    return Verdict(ok=True)


def compare_streams(reference: Sequence[Event], ranks: Sequence[Sequence[Event]], first: int, last: int) -> Verdict:
    """Whether the ranks of `ranks` together were given the very rows of `reference` in steps ``[first, last]``.

    >>> whole = [{"event": "step", "step": 1, "rows": {"0": 7, "1": 8}}]
    >>> left, right = ({"event": "step", "step": 1, "rows": rows} for rows in ({"1": 8}, {"0": 7}))
    >>> compare_streams(whole, [[left], [right]], 1, 1)
    Verdict(ok=True, reason='')
    >>> compare_streams(whole, [[left]], 1, 1).reason
    'step 1: other rows'
    """
    expected, parts = _steps(reference), [_steps(events) for events in ranks]
    for step in range(first, last + 1):
        if step not in expected or any(step not in part for part in parts):
            return Verdict(ok=False, reason=f"step {step} is missing")
        rows = [row for part in parts for row in part[step][0]["rows"].items()]
        if sorted(rows) != sorted(expected[step][0]["rows"].items()):
            return Verdict(ok=False, reason=f"step {step}: other rows")
    return Verdict(ok=True)


def compare_checkpoints(reference: str, other: str, storage_options: Mapping[str, Any]) -> Verdict:
    """Whether the newest steps of two roots hold the same tensors, bit for bit."""
    mine, theirs = _tensors(reference, storage_options), _tensors(other, storage_options)
    if mine.keys() != theirs.keys():
        return Verdict(ok=False, reason=f"tensors {sorted(mine.keys() ^ theirs.keys())[:3]} are in one run only")
    for name, data in mine.items():
        if data != theirs[name]:
            return Verdict(ok=False, reason=f"tensor {name} differs")
    return Verdict(ok=True)


def _tensors(root: str, storage_options: Mapping[str, Any]) -> dict[str, bytes]:
    from .checkpoint.log import CheckpointLog, step_directory
    from .checkpoint.reader import StepReader, read_manifest, resolve_step

    with open_store(root, **storage_options) as store:
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


class _Interrupts:
    """Ctrl-C and SIGTERM become one KeyboardInterrupt, and none while something must not be torn.

    Held from the start; between :meth:`release` and :meth:`hold` the first signal raises. Whatever comes after that one is
    ignored, so that cleaning up is never interrupted itself.
    """

    def __init__(self) -> None:
        self._held, self._arrived, self._raised = True, False, False

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._arrive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc_info: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _arrive(self, *_: object) -> None:
        self._arrived = True
        if not self._held and not self._raised:
            self._raise()

    def hold(self) -> None:
        """From here on a signal waits for :meth:`release`."""
        self._held = True

    def release(self) -> None:
        """Raise KeyboardInterrupt if a signal came meanwhile, and from here on when one comes."""
        self._held = False
        if self._arrived and not self._raised:
            self._raise()

    def _raise(self) -> None:
        self._raised = True
        raise KeyboardInterrupt


def train_script() -> Path:
    """``examples/train.py``: beside this file in an installed package, one folder up in a checkout."""
    here = Path(__file__).resolve().parent
    for path in (here / "examples" / "train.py", here.parent / "examples" / "train.py"):
        if path.exists():
            return path
    raise ConfigError("examples/train.py must come with the package", place=str(here), hint="install stoker again")


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the demonstration's objects are: a directory, or a bucket."""

    url: str
    storage_options: dict[str, Any] = field(default_factory=dict)
    env: dict[str, str] = field(default_factory=dict)

    def under(self, name: str) -> str:
        return f"{self.url}/{name}"

    def committed(self, name: str) -> list[int]:
        """The committed steps of a checkpoint root."""
        from .checkpoint.log import CheckpointLog

        with open_store(self.under(name), **self.storage_options) as store:
            head = CheckpointLog(store).head()
            return [] if head is None else sorted(head.live)

    def copy(self, source: str, target: str) -> None:
        """Copy every object below `source` to `target`."""
        with (
            open_store(self.under(source), **self.storage_options) as old,
            open_store(self.under(target), **self.storage_options) as new,
        ):
            for info in old.list():
                new.put(info.key, old.get(info.key))


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One training run: where its data and checkpoints are, its logs and how far it goes."""

    name: str
    place: _Place
    work: Path
    interrupts: _Interrupts
    steps: int
    width: int
    ranks: int = 1

    @property
    def _output(self) -> Path:
        return self.work / f"{self.name}.out"

    def events(self, rank: int = 0) -> list[dict[str, Any]]:
        return read_events(self.work / f"{self.name}.events.{rank}")

    def _command(self) -> list[str]:
        options = {
            "--data": self.place.under("tokens"),
            "--checkpoints": self.place.under(self.name),
            "--events": self.work / f"{self.name}.events",
            "--steps": self.steps,
            "--save-every": _SAVE_EVERY,
            "--global-batch": _GLOBAL_BATCH,
            "--seq-len": _SEQ_LEN,
            "--vocab": _VOCAB,
            "--width": self.width,
        }
        launcher = [sys.executable]
        if self.ranks > 1:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.ranks}"]
        return [*launcher, str(train_script()), *(str(part) for pair in options.items() for part in pair)]

    @contextmanager
    def started(self) -> "Iterator[subprocess.Popen[bytes]]":
        """The run as a process group of its own, gone when the block ends, however it ends."""
        # Two ranks on one machine and one step after another: threads that spin for each other only stand in the way.
        threads = {"OMP_NUM_THREADS": "1"} if self.ranks > 1 else {}
        env = {**threads, **os.environ, **self.place.env}
        process = None
        self.interrupts.hold()
        try:
            with self._output.open("ab") as output:
                process = subprocess.Popen(
                    self._command(),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env=env,
                    start_new_session=True,
                )
            self.interrupts.release()
            yield process
        finally:
            self.interrupts.hold()
            if process is not None:
                self._end(process)
            self.interrupts.release()

    def _end(self, process: "subprocess.Popen[bytes]") -> None:
        if process.poll() is not None:
            return
        if self.ranks > 1:
            # torchrun puts its ranks into sessions of their own and ends them when it is asked to end itself.
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(60)  # it gives its ranks 30 s
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def finish(self) -> None:
        """Run to the end, with a bar."""
        with self.started() as process, progress(self.name, total=self.steps, unit="steps") as bar:
            done, deadline = 0, time.monotonic() + _RUN_TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                now = max(_steps(self.events()), default=0)
                bar.advance(now - done)
                done = now
                time.sleep(0.2)
            code = process.poll()
        if code != 0:
            value = "still running" if code is None else f"code {code}: {self._tail()}"
            raise self._failure("a training run must end with code 0", value)

    def _failure(self, rule: str, value: str) -> StokerError:
        # On a full disk a run can't even write down why it ended.
        free = shutil.disk_usage(self.work).free
        if free < _FULL_BYTES:
            return StoreFull(
                "the disk is full",
                value=f"{format_bytes(free)} free",
                place=str(self.work),
                hint="free space, run again",
            )
        return StokerError(rule, value=value, place=self.name)

    def _tail(self) -> str:
        lines = self._output.read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"

    def kill_in_save(self, after_step: int) -> int | None:
        """Run until a save after `after_step` begins, then SIGKILL; returns the step if it was not committed."""
        with self.started() as process:
            seen, deadline = len(self.events()), time.monotonic() + _RUN_TIMEOUT_S
            while process.poll() is None and time.monotonic() < deadline:
                saving = [e for e in self.events()[seen:] if e["event"] == "saving" and e["step"] > after_step]
                if saving:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    step = int(saving[-1]["step"])
                    return None if step in self.place.committed(self.name) else step
                time.sleep(0.001)
        raise self._failure("the run must reach a save", self._tail())


def _kill_once(run: _Run, after_step: int) -> int:
    """SIGKILL the run inside a save. A save that was quicker than the kill is no proof: go on to a later one."""
    for _ in range(_MAX_KILLS):
        step = run.kill_in_save(after_step)
        if step is not None:
            return step
        after_step = max(run.place.committed(run.name), default=after_step)
        if after_step >= run.steps - _SAVE_EVERY:
            break
    raise StokerError("a kill must meet a save in flight", value="every save was quicker", hint="use more --steps")


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


@dataclass(frozen=True, kw_only=True)
class _Settings:
    steps: int
    width: int
    corpus_files: int | None
    seed: int
    prices: Prices


def demo(
    directory: Annotated[
        Path | None, typer.Option("--dir", help="Work here and keep everything; by default a temporary directory.")
    ] = None,
    store: Annotated[
        Literal["file", "s3"], typer.Option(help="file: a directory. s3: a SeaweedFS server started for the purpose.")
    ] = "file",
    steps: Annotated[int, typer.Option(min=4 * _SAVE_EVERY, help="Training steps of each run.")] = 90,
    width: Annotated[int, typer.Option(min=32, help="Width of the model, a multiple of 32.")] = 192,
    seed: Annotated[int | None, typer.Option(help="Which save is killed; by default a random one.")] = None,
    corpus_files: Annotated[
        int | None, typer.Option(min=1, help="Take only that many source files; all of them by default.")
    ] = None,
    usd_per_1000_get: Annotated[float, typer.Option(help="Price of 1,000 reads.")] = Prices.usd_per_1000_get,
    usd_per_1000_put: Annotated[float, typer.Option(help="Price of 1,000 writes.")] = Prices.usd_per_1000_put,
    usd_per_gb_egress: Annotated[float, typer.Option(help="Price of a GB read.")] = Prices.usd_per_gb_egress,
    copy: Annotated[
        Path | None, typer.Option("--copy", help="Copy examples/train.py to this directory and stop.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Pack real text, train a GPT on it, kill it in the middle of a save, resume at 1 and 2 ranks, and compare.

    Examples: stoker demo --store s3 --json; stoker demo --dir /tmp/demo --steps 120; stoker demo --copy my-project
    """
    if copy is not None:
        _copy_script(copy, as_json=as_json)
        return
    try:
        import tokenizers  # noqa: F401
    except ImportError as error:
        raise MissingExtra("the demo needs the extra [demo]", hint="pip install 'stoker[demo]'") from error
    prices = Prices(
        usd_per_1000_get=usd_per_1000_get, usd_per_1000_put=usd_per_1000_put, usd_per_gb_egress=usd_per_gb_egress
    )
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    settings = _Settings(steps=steps, width=width, corpus_files=corpus_files, seed=seed, prices=prices)
    with _Interrupts() as interrupts, ExitStack() as stack:
        work = stack.enter_context(_working_directory(directory))
        _require_space(work, width)
        place = _Place(url=str(work / "store"))
        if store == "s3":
            from .testing.s3 import S3Server

            server = stack.enter_context(S3Server(buckets=("stoker-demo",)))
            place = _Place(url="s3://stoker-demo", storage_options=server.storage_options, env=server.env)
        for make in (_own_shared_memory, _own_temporary_files):
            place = replace(place, env=place.env | stack.enter_context(make()))
        stack.callback(interrupts.hold)  # the first thing that is done at the end, whatever it is
        interrupts.release()
        report = _run_demo(work, place, settings, interrupts)
    emit(report, _table(report), as_json=as_json)
    if not report["ok"]:
        raise typer.Exit(1)


def _copy_script(directory: Path, *, as_json: bool) -> None:
    target = directory / "train.py"
    if target.exists():
        raise ConfigError("must not exist yet", place=str(target), hint="choose another directory")
    directory.mkdir(parents=True, exist_ok=True)
    shutil.copy(train_script(), target)
    emit({"ok": True, "path": str(target)}, f"wrote {target}", as_json=as_json)


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


def _require_space(directory: Path, width: int) -> None:
    """Refuse to begin what would end with a full disk."""
    # Parameters of examples/train.py, twelve bytes each with AdamW; three roots hold two steps and write a third.
    parameters = 2 * _VOCAB * width + 4 * 12 * width**2
    needed = 3 * 3 * 12 * parameters + _DATA_BYTES
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise StoreFull(
            f"{format_bytes(needed)} must be free",
            value=format_bytes(free),
            place=str(directory),
            hint="--dir, or TMPDIR, on a larger disk",
        )


@contextmanager
def _own_shared_memory() -> Iterator[dict[str, str]]:
    """The environment that keeps what the runs have in shared memory together, to be removed with the rest."""
    parent = os.environ.get("STOKER_SHM_DIR") or "/dev/shm"
    if not os.access(parent, os.W_OK):
        yield {}
        return
    with tempfile.TemporaryDirectory(prefix="stoker-demo-", dir=parent) as directory:
        yield {"STOKER_SHM_DIR": directory}


@contextmanager
def _own_temporary_files() -> Iterator[dict[str, str]]:
    """The environment that keeps the runs' temporary files together: torch leaves some behind."""
    with tempfile.TemporaryDirectory(prefix="stoker-demo-tmp-") as directory:
        yield {"TMPDIR": directory}


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _run_demo(work: Path, place: _Place, settings: _Settings, interrupts: _Interrupts) -> dict[str, Any]:
    began = time.monotonic()
    files = _corpus()[: settings.corpus_files]
    _say(f"[1/6] training a byte-pair tokenizer on {len(files)} files of Python's standard library")
    _train_tokenizer(files, work / "tokenizer.json")
    _say(f"[2/6] packing them into a token data set at {place.under('tokens')}")
    tokens = _pack(files, work, place)
    steps = settings.steps
    straight = _Run(name="straight", place=place, work=work, interrupts=interrupts, steps=steps, width=settings.width)
    killed = replace(straight, name="killed")
    _say(f"[3/6] training {steps} steps without interruption")
    straight.finish()
    _say("[4/6] the same again, with a SIGKILL while a save is in flight")
    saves = steps // _SAVE_EVERY
    killed_at = _kill_once(killed, _SAVE_EVERY * random.Random(settings.seed).randint(1, saves - 2))
    _say(f"[5/6] killed while step {killed_at} was being saved; resuming")
    # Nothing is left to train: what the killed run had in shared memory becomes a step before the root is copied.
    replace(killed, steps=0).finish()
    place.copy("killed", "elastic")
    killed.finish()
    resumed = next(event for event in reversed(killed.events()) if event["event"] == "resumed")
    elastic = replace(straight, name="elastic", steps=min(steps, resumed["step"] + _ELASTIC_STEPS), ranks=2)
    _say(f"[6/6] resuming step {resumed['step']} under torchrun with 2 ranks, sharded by FSDP2")
    elastic.finish()
    return _report(straight, killed, elastic, settings) | {
        "killed_in_save_of_step": killed_at,
        "seed": settings.seed,
        "corpus_tokens": tokens,
        "seconds": round(time.monotonic() - began, 1),
    }


def _pack(files: Sequence[Path], work: Path, place: _Place) -> int:
    from .loaders.pack import pack

    with progress("packing", total=sum(file.stat().st_size for file in files)) as bar:
        packed = pack(
            files,
            place.under("tokens"),
            tokenizer=work / "tokenizer.json",
            errors="replace",  # some of the standard library's tests are about text that is not UTF-8
            storage_options=place.storage_options,
            progress=bar.advance,
        )
    return packed.tokens


def _report(straight: _Run, killed: _Run, elastic: _Run, settings: _Settings) -> dict[str, Any]:
    """Verdicts and figures from what the runs wrote."""
    reference, place = straight.events(), straight.place
    same = compare_runs(reference, killed.events(), settings.steps)
    if same.ok:
        same = compare_checkpoints(place.under(straight.name), place.under(killed.name), place.storage_options)
    resumed = [event for event in killed.events() if event["event"] == "resumed"]
    at = resumed[-1]["step"] if resumed else 0
    ranks = [elastic.events(rank) for rank in range(elastic.ranks)]
    stream = compare_streams(reference, ranks, at + 1, elastic.steps)
    elsewhere = [event for event in ranks[0] if event["event"] == "resumed"]
    parameters = bool(resumed and elsewhere) and elsewhere[-1]["parameters"] == resumed[-1]["parameters"]
    expected = _steps(reference)
    drift = [
        abs(event["loss"] / expected[step][0]["loss"] - 1)
        for step, (event, *_) in _steps(ranks[0]).items()
        if step in expected
    ]
    close = bool(drift) and max(drift) <= _LOSS_TOLERANCE
    verdicts = [
        same,
        stream,
        Verdict(ok=parameters, reason=f"the ranks restored other parameters than step {at}'s"),
        Verdict(ok=close, reason=f"the ranks' losses differ by {max(drift, default=None)}"),
    ]
    return {
        "ok": all(verdict.ok for verdict in verdicts),
        "resume_bit_identical": same.ok,
        "elastic_stream_identical": stream.ok,
        "elastic_parameters_identical": parameters,
        "elastic_loss_difference": max(drift, default=None),
        "differences": [verdict.reason for verdict in verdicts if not verdict.ok],
        "resumed_from_step": at,
        **_figures(reference, settings.prices),
    }


def _figures(events: Sequence[Event], prices: Prices) -> dict[str, Any]:
    """Speed, stalls, bytes and money of one run; speeds leave out the first step, which pays for warming up."""
    steps = [event for event in events if event["event"] == "step"]
    seconds = sum(event["seconds"] for event in steps[1:])
    per_step = _GLOBAL_BATCH * _SEQ_LEN
    tokens = per_step * len(steps)
    done = next(event for event in reversed(events) if event["event"] == "done")
    counts = next(event for event in reversed(events) if event["event"] == "counts")
    counts = {name: value for name, value in counts.items() if name != "event"}
    return {
        "steps": len(steps),
        "tokens": tokens,
        "tokens_per_s": per_step * (len(steps) - 1) / seconds,
        "data_stall_s": sum(event["wait_s"] for event in steps[1:]),
        "data_stall_fraction": sum(event["wait_s"] for event in steps[1:]) / seconds,
        "save_stall_s": [event["stall_s"] for event in events if event["event"] == "saving"],
        "durable_bytes_per_s": done["bytes"] / done["seconds"],
        "bytes_by_tier": {
            "mapped": counts.get("data.checked.bytes", 0),
            "ram": counts.get("cache.ram.hit_bytes", 0),
            "disk": counts.get("cache.disk.hit_bytes", 0),
            "store": counts.get("store.get.bytes", 0),
        },
        "requests": {
            verb: counts.get(f"store.{verb}.requests", 0) for verb in ("get", "put", "head", "list", "delete")
        },
        "usd_per_billion_tokens": prices.usd(counts) / tokens * 1e9,
        "losses": [event["loss"] for event in steps],
    }


def _table(report: Mapping[str, Any]) -> str:
    losses, stalls, tiers = report["losses"], report["save_stall_s"], report["bytes_by_tier"]
    drift = report["elastic_loss_difference"]
    rows = {
        "corpus": f"{report['corpus_tokens']:,} tokens of Python source",
        "training": f"{report['steps']} steps, {report['tokens']:,} tokens, loss {losses[0]:.3f} -> {losses[-1]:.3f}",
        "speed": f"{report['tokens_per_s']:,.0f} tokens/s",
        "waiting for data": f"{report['data_stall_s']:.4f} s, {report['data_stall_fraction']:.3%} of the run",
        "save stall": f"{1e3 * sum(stalls) / len(stalls):.1f} ms a save, {len(stalls)} saves",
        "durable save": f"{report['durable_bytes_per_s'] / 1e9:.2f} GB/s from save() to committed",
        "bytes by tier": ", ".join(f"{name} {size / 1e6:.1f} MB" for name, size in tiers.items()),
        "requests": ", ".join(f"{verb} {count:.0f}" for verb, count in report["requests"].items()),
        "cost": f"${report['usd_per_billion_tokens']:.2f} per billion tokens at this size of run",
        "killed": f"by SIGKILL while step {report['killed_in_save_of_step']} was being saved (seed {report['seed']})",
        "resumed": f"from step {report['resumed_from_step']}",
        "losses and parameters": "identical to the bit" if report["resume_bit_identical"] else "DIFFERENT",
        "2 ranks, same stream": "identical to the bit" if report["elastic_stream_identical"] else "DIFFERENT",
        "2 ranks, same parameters": "identical to the bit" if report["elastic_parameters_identical"] else "DIFFERENT",
        "2 ranks, losses": "none" if drift is None else f"within {drift:.1e}",
        "took": f"{report['seconds']:.0f} s",
        "verdict": "ok" if report["ok"] else "; ".join(["NOT ok", *report["differences"]]),
    }
    width = max(map(len, rows))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows.items())
