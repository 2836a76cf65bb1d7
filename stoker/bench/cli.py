"""``stoker bench``: the benchmarks as commands."""

import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

import typer

from .._console import JsonFlag, StorageOptions, emit, new_app, parse_options, progress
from ..errors import ConfigError
from ..storage._units import parse_bytes
from .frame import Report

__all__ = ["app"]

app = new_app(
    "Measure this machine: stoker beside its limit and its peers, in the same run. "
    "Every row says what it was verified against; ratios, not absolute times, carry over to other machines."
)

_Peers = Literal["installed", "all", "none"]
_Runs = Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every variant once, the limit first.")]
_Directory = Annotated[
    Path,
    typer.Option("--dir", help="Where to write: the disk that is measured. What the bench leaves there is removed."),
]


@app.command("load")
def load(
    size: Annotated[str, typer.Option(help="Tokens to pack, in bytes as stored.")] = "256MiB",
    runs: _Runs = 7,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            help="A part: warm, packed, cold, open, stall, step, memory; may repeat.",
            show_default="all but memory",
        ),
    ] = None,
    peers: Annotated[
        _Peers, typer.Option(help="Libraries to measure; all: install those that are missing.")
    ] = "installed",
    directory: _Directory = Path(),
    json: JsonFlag = False,
) -> None:
    """Batches of a token data set: how fast, how soon, with what stalls, and what they cost the processors.

    \b
    warm    local files in memory          packed  whole documents, best fit     cold    from an S3 server
    open    first batch, resume, state     stall   at 80 % of a throttled store  step    a model's step
    memory  after a million batches

    \b
    limit   a bare gather into two contiguous widened outputs; bare GETs, crc32c and writes; one resident batch; bounds
    peers   nanoGPT's memmap, a Megatron-style map data set; LitData, MosaicML Streaming and HF datasets,
            each in an environment of its own (stoker bench peers)

    \b
    stoker bench load
    stoker bench load --only warm --peers all
    stoker bench load --only memory
    stoker bench load --size 1GiB --runs 11 --dir /nvme --json > load.json
    """
    from .load import DEFAULT_PARTS, run_load
    from .peers import LOAD_PEERS, install, statuses

    size_bytes = parse_bytes(size, place="--size")
    if peers == "all":
        for status in statuses():
            if not status.installed:
                install(status.name)
    names = () if peers == "none" else tuple(LOAD_PEERS)
    with _work_directory(directory) as work, _rounds("load") as step:
        report = run_load(
            size_bytes=size_bytes,
            runs=runs,
            directory=work,
            only=only or DEFAULT_PARTS,
            peers=names,
            progress=step,
        )
    emit(report.to_json(), _text(report), as_json=json)


@app.command("report")
def report(
    files: Annotated[list[Path], typer.Argument(help="What a bench printed with --json, of one machine.")],
    json: JsonFlag = False,
) -> None:
    """Render what benches printed with --json as one Markdown table: goals, whether they hold, notes.

    \b
    stoker bench report load.json > load.md
    stoker bench report warm.json cold.json
    """
    found = [_read_report(path) for path in files]
    whole = sum(found[1:], found[0])
    emit(whole.to_json(), whole.to_markdown(), as_json=json)


def _read_report(path: Path) -> Report:
    import json

    try:
        body = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            "must be a report that a bench printed with --json", value=str(error), place=str(path)
        ) from error
    return Report.from_json(body)


@app.command("peers")
def list_peers(
    install: Annotated[bool, typer.Option("--install", help="Make the environments that are missing.")] = False,
    json: JsonFlag = False,
) -> None:
    """Libraries that stoker is measured beside, in environments of their own below bench/peers of a source checkout.

    \b
    stoker bench peers
    stoker bench peers --install
    """
    from . import peers

    for status in peers.statuses() if install else ():
        if not status.installed:
            peers.install(status.name)
    found = peers.statuses()
    lines = [f"{s.name:<20} {s.version:<10} {'installed' if s.installed else 'not installed'}" for s in found]
    emit({"peers": [s._asdict() for s in found]}, "\n".join(lines), as_json=json)


@app.command("ckpt")
def ckpt(
    size: Annotated[str, typer.Option(help="Bytes of the fp32 state that is saved.")] = "2GB",
    runs: _Runs = 5,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only", help="A part: large, small, tiny, upload, scale, training; may repeat.", show_default="all"
        ),
    ] = None,
    directory: _Directory = Path(),
    json: JsonFlag = False,
) -> None:
    """Save and restore a state in host memory: stall, durable save, cold and warm verified restore, and what they need.

    \b
    large     few large tensors            small   of 200 kB each        tiny      of 20 kB each
    upload    to an S3 server              scale   plans and manifests   training  a loop beside a save

    \b
    limit   O_DIRECT writes and reads of the same bytes; copy_ of the same tensors into cached views; bare puts
    peers   torch.distributed.checkpoint, torch_checkpointing, safetensors, torch.save

    Needs eight times --size of memory and twice --size of free disk. torch_checkpointing is measured if it is installed.

    \b
    stoker bench ckpt
    stoker bench ckpt --only large --size 8GB --runs 5 --dir /nvme --json > ckpt.json
    """
    from .ckpt import PARTS, run_ckpt

    size_bytes = parse_bytes(size, place="--size")
    with _work_directory(directory) as work, _rounds("ckpt") as step:
        report = run_ckpt(size_bytes=size_bytes, runs=runs, directory=work, only=only or PARTS, progress=step)
    emit(report.to_json(), _text(report), as_json=json)


@app.command("tiers")
def tiers(
    size: Annotated[str, typer.Option(help="Bytes that each row moves.")] = "256MB",
    runs: _Runs = 3,
    directory: _Directory = Path(),
    url: Annotated[
        str | None, typer.Option(help="An S3 URL to measure.", show_default="a SeaweedFS on this machine")
    ] = None,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Memory, shared memory, disk, object store and the block cache: GB/s of each, and what stoker hands on.

    \b
    limit   the same bytes by bare memcpy, mmap, O_DIRECT and obstore; a throttled link; one process for eight
    peers   s3fs

    Needs three times --size of memory, as much shared memory and as much free disk. What it writes below --url stands
    under a prefix of its own and is removed.

    \b
    stoker bench tiers
    stoker bench tiers --size 1GB --runs 5 --dir /nvme --json > tiers.json
    stoker bench tiers --url s3://bucket/scratch -o region=eu-central-1
    """
    from .tiers import run_tiers

    size_bytes = parse_bytes(size, place="--size")
    with _work_directory(directory) as work, _rounds("tiers") as step:
        report = run_tiers(
            size_bytes=size_bytes,
            runs=runs,
            directory=work,
            url=url,
            storage_options=parse_options(option),
            progress=step,
        )
    emit(report.to_json(), _text(report), as_json=json)


def _text(report: Report) -> str:
    import shutil

    return report.to_text(width=max(100, shutil.get_terminal_size((140, 0)).columns))


@contextmanager
def _work_directory(directory: Path) -> Iterator[Path]:
    """A fresh directory below the one asked for, removed at the end with all that a bench left in it."""
    if not directory.is_dir():
        raise ConfigError("must be an existing directory", value=str(directory), place="--dir")
    with _signals_raise(), tempfile.TemporaryDirectory(prefix="stoker-bench-", dir=directory) as name:
        yield Path(name)


@contextmanager
def _signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise SystemExit in the block, once: what cleans up on Ctrl-C does so on these as well."""
    heard = False

    def end(number: int, frame: object) -> None:
        nonlocal heard
        if not heard:  # timeout(1) sends each signal twice: the second must not cut the clean-up short
            heard = True
            raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    before = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # nohup(1)
    try:
        for number in before:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


@contextmanager
def _rounds(label: str) -> Iterator[Callable[[], None]]:
    with progress(f"bench {label}", total=None, unit="runs") as meter:
        yield lambda: meter.advance(1)
