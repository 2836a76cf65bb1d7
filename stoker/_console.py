"""What every command line of stoker shares: one JSON object or text on standard output, progress on standard error."""

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

__all__ = ["JsonFlag", "Meter", "StorageOptions", "emit", "new_app", "parse_options", "progress"]

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
StorageOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--option", "-o", metavar="NAME=VALUE", help="Option of the object store, as fsspec names it; may repeat."
    ),
]


def new_app(help_text: str) -> typer.Typer:
    """A command group with the house's settings."""
    return typer.Typer(help=help_text, no_args_is_help=True, rich_markup_mode=None, pretty_exceptions_enable=False)


def parse_options(options: list[str] | None) -> dict[str, str]:
    """``NAME=VALUE`` pairs as storage options.

    >>> parse_options(["endpoint_url=http://127.0.0.1:8333", "key=k"])
    {'endpoint_url': 'http://127.0.0.1:8333', 'key': 'k'}
    """
    parsed = {}
    for option in options or []:
        name, equals, value = option.partition("=")
        if not equals or not name:
            raise typer.BadParameter(f"--option takes NAME=VALUE, got {name!r}")
        parsed[name] = value
    return parsed


def emit(report: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print the result of a command: the one JSON object, or its text for people."""
    sys.stdout.write((json.dumps(report, allow_nan=False) if as_json else text.rstrip("\n")) + "\n")
    sys.stdout.flush()


class Meter:
    """A progress bar's handle; a no-op where standard error is no terminal."""

    def __init__(self, bar: Any = None, task: Any = None) -> None:
        self._bar, self._task = bar, task

    def set_total(self, total: float) -> None:
        """Say how much there is to do, once it is known."""
        if self._bar is not None:
            self._bar.update(self._task, total=total)

    def advance(self, amount: float) -> None:
        """Add `amount` in the units that :func:`progress` was given."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)


@contextmanager
def progress(label: str, *, total: float | None, unit: str = "bytes") -> Iterator[Meter]:
    """A bar on standard error while the block runs; `unit` is ``"bytes"`` or the plural of what is counted."""
    if not sys.stderr.isatty():
        yield Meter()
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (DownloadColumn(), TransferSpeedColumn()) if unit == "bytes" else (MofNCompleteColumn(), TextColumn(unit))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), *columns, TimeRemainingColumn(), console=Console(stderr=True)
    ) as bar:
        yield Meter(bar, bar.add_task(label, total=total))
