"""``stoker bench``: the benchmarks as commands."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

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

_Runs = Annotated[int, typer.Option(min=1, help="Timed rounds; each runs every variant once, the limit first.")]
_Directory = Annotated[
    Path,
    typer.Option("--dir", help="Where to write: the disk that is measured. What the bench leaves there is removed."),
]


@app.command("load")
def load(
    size: Annotated[str, typer.Option(help="Tokens to pack, in bytes as stored.")] = "256MiB",
    runs: _Runs = 7,
    directory: _Directory = Path(),
    json: JsonFlag = False,
) -> None:
    """Warm local batches of a token data set: tokens/s of the loader.

    \b
    limit   a bare gather into two contiguous widened outputs
    peers   nanoGPT's memmap, a Megatron-style map data set

    \b
    stoker bench load
    stoker bench load --size 1GiB --runs 11 --dir /nvme --json > load.json
    """
    from .load import run_load

    size_bytes = parse_bytes(size, place="--size")
    with _work_directory(directory) as work, _rounds("load") as step:
        report = run_load(size_bytes=size_bytes, runs=runs, directory=work, progress=step)
    emit(report.to_json(), _text(report), as_json=json)


@app.command("ckpt")
def ckpt(
    size: Annotated[str, typer.Option(help="Bytes of the fp32 state that is saved.")] = "2GB",
    runs: _Runs = 5,
    directory: _Directory = Path(),
    json: JsonFlag = False,
) -> None:
    """Save and restore a state in host memory: stall, durable save, cold verified restore.

    \b
    limit   O_DIRECT writes and reads of the same bytes; copy_ of the same tensors into cached views
    peers   torch.distributed.checkpoint, safetensors

    Needs five times --size of memory and once --size of free disk.

    \b
    stoker bench ckpt
    stoker bench ckpt --size 8GB --runs 5 --dir /nvme --json > ckpt.json
    """
    from .ckpt import run_ckpt

    size_bytes = parse_bytes(size, place="--size")
    with _work_directory(directory) as work, _rounds("ckpt") as step:
        report = run_ckpt(size_bytes=size_bytes, runs=runs, directory=work, progress=step)
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
    limit   the same bytes by bare memcpy, mmap, O_DIRECT and obstore
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
    with tempfile.TemporaryDirectory(prefix="stoker-bench-", dir=directory) as name:
        yield Path(name)


@contextmanager
def _rounds(label: str) -> Iterator[Callable[[], None]]:
    with progress(f"bench {label}", total=None, unit="runs") as meter:
        yield lambda: meter.advance(1)
