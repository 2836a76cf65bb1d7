"""``stoker doctor``: what of this machine and of a store stands in a job's way. Nothing here imports torch."""

from pathlib import Path
from typing import Annotated

import typer

from .._console import JsonFlag, StorageOptions, emit, parse_options, progress
from ..errors import ConfigError

__all__ = ["doctor"]


def doctor(
    url: Annotated[str | None, typer.Argument(metavar="URL", help="A store, or a directory, to examine.")] = None,
    directory: Annotated[
        Path | None,
        typer.Option("--dir", help="On the disk that the job will use.", show_default="a local URL, or here"),
    ] = None,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Check this machine, a directory and a store: limits, kernel, credentials, conditions, throughput.

    Each line says ok, warn, fail or not measured, what was found, and what to do about it. Exit code 1 if one failed.
    What it writes stands below a random name and is removed.

    \b
    stoker doctor --dir /nvme
    stoker doctor s3://bucket/run -o endpoint_url=http://127.0.0.1:8333
    """
    from .doctor import diagnose
    from .store import is_local_url

    options = parse_options(option)
    if url is None and options:
        raise ConfigError("options of a store need its URL", value=", ".join(sorted(options)), place="doctor")
    if directory is None:
        directory = Path(url.removeprefix("file://")) if url is not None and is_local_url(url) else Path()
    with progress("examining", total=None, unit="checks") as meter:
        found = diagnose(url, storage_options=options, directory=directory, progress=lambda: meter.advance(1))
    emit(found.to_json(), found.to_text(), as_json=json)
    if not found.ok:
        raise typer.Exit(1)
