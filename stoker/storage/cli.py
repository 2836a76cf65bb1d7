"""``stoker doctor`` and ``stoker cache``: what stands in a job's way, what is kept near. Nothing here imports torch."""

import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from time import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._console import JsonFlag, StorageOptions, emit, new_app, parse_options, progress
from ..errors import ConfigError, KeyNotFound

if TYPE_CHECKING:
    from .upkeep import CachedBlock, CacheDirectory

__all__ = ["cache_app", "doctor"]

cache_app = new_app("Look into the block cache of this node, check it, fill it, empty it.")

_Directory = Annotated[
    Path | None, typer.Argument(metavar="DIR", help="Of a tier: what TieredCache got as disk=.", show_default="RAM's")
]


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
    from .urls import is_local_url

    options = parse_options(option)
    if url is None and options:
        raise ConfigError("options of a store need its URL", value=", ".join(sorted(options)), place="doctor")
    if directory is None:
        directory = Path(url.removeprefix("file://")) if url is not None and is_local_url(url) else Path()
    with progress("examining", total=None, unit="checks") as meter, _sigterm_raises():
        found = diagnose(url, storage_options=options, directory=directory, progress=lambda: meter.advance(1))
    emit(found.to_json(), found.to_text(), as_json=json)
    if not found.ok:
        raise typer.Exit(1)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    """SIGTERM raises SystemExit in the block, which can clean up; a second one ends the process at once."""

    def end(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_DFL)
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():  # no other may set a handler
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@cache_app.command("ls")
def ls(
    directory: _Directory = None,
    blocks: Annotated[bool, typer.Option("--blocks", help="Each block, not only sums by object.")] = False,
    json: JsonFlag = False,
) -> None:
    """Show what a tier holds: which objects, how much of them, since when, and why it stays: in use, or read again.

    When blocks are read next is what running jobs wrote down, at most a minute ago, at the pace they had then. A job
    that has published no plan is silent: then nobody knows.

    \b
    stoker cache ls
    stoker cache ls /nvme/stoker --blocks --json
    """
    with _opened(directory) as cache:
        found = list(cache.blocks())
        report: dict[str, Any] = {
            "ok": True,
            "directory": str(cache.path),
            "capacity_bytes": cache.capacity_bytes,
            "used_bytes": cache.used_bytes,
            "blocks": len(found),
            "objects": _by_object(found),
        }
    if blocks:
        report["files"] = [asdict(block) for block in found]
    emit(report, _listing(report), as_json=json)


def _by_object(blocks: "Iterable[CachedBlock]") -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], dict[str, Any]] = {}
    for block in blocks:
        names = {"object": block.object, "version": block.version}
        none_yet = {
            **names,
            "blocks": 0,
            "size_bytes": 0,
            "leased_blocks": 0,
            "planned_blocks": None if block.is_planned is None else 0,
            "next_use_unix_s": None,
            "since_unix_s": block.since_unix_s,
        }
        one = sums.setdefault((block.object or "", block.version or ""), none_yet)
        one["blocks"] += 1
        one["size_bytes"] += block.size_bytes
        one["leased_blocks"] += block.is_leased
        one["since_unix_s"] = min(one["since_unix_s"], block.since_unix_s)
        if block.is_planned is not None:
            one["planned_blocks"] += block.is_planned
        if block.next_use_unix_s is not None:
            one["next_use_unix_s"] = min(one["next_use_unix_s"] or block.next_use_unix_s, block.next_use_unix_s)
    return [one for _, one in sorted(sums.items())]


def _listing(report: dict[str, Any]) -> str:
    from ._units import format_bytes

    rows = [("bytes", "blocks", "in use", "next use", "since", "object")]
    for one in report["objects"]:
        sums = (format_bytes(one["size_bytes"]), f"{one['blocks']:,}", f"{one['leased_blocks']:,}")
        rows.append((*sums, _next_use(one, one["planned_blocks"]), _time(one["since_unix_s"]), _object(one)))
    for block in report.get("files", ()):
        span = "" if block["start"] is None else f" [{block['start']}, {block['end']})"
        sums = (format_bytes(block["size_bytes"]), block["name"][:8], "yes" if block["is_leased"] else "no")
        next_use = _next_use(block, block["is_planned"])
        rows.append((*sums, next_use, _time(block["since_unix_s"]), f"{_object(block)}{span}"))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    lines = ["  ".join((*(c.rjust(w) for c, w in zip(row, widths, strict=False)), row[5])) for row in rows]
    used, capacity = (format_bytes(report[name]) for name in ("used_bytes", "capacity_bytes"))
    return "\n".join(
        map(_printable, [*lines, f"{report['directory']}: {report['blocks']:,} blocks, {used} of {capacity}"])
    )


def _object(row: dict[str, Any]) -> str:
    return "(damaged header)" if row["object"] is None else f"{row['object']} @{row['version'][:8]}"


def _printable(line: str) -> str:
    """`line` for a terminal: names of objects may hold anything."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)


def _next_use(row: dict[str, Any], planned: int | None) -> str:
    if planned is None:
        return "unknown"
    if not planned:
        return "none planned"
    if row["next_use_unix_s"] is None:
        return "planned"
    return f"in {max(0.0, row['next_use_unix_s'] - time()):.0f} s"


def _time(unix_s: float) -> str:
    return datetime.fromtimestamp(unix_s, UTC).strftime("%Y-%m-%d %H:%M:%SZ")


@cache_app.command("verify")
def verify(
    directory: _Directory = None,
    repair: Annotated[bool, typer.Option("--repair", help="Remove bad blocks: readers fetch them again.")] = False,
    json: JsonFlag = False,
) -> None:
    """Read every block of a tier and compare it with the checksum in its header; exit 1 if bad ones are left.

    The cache itself checks each block at its first use, against the data set: this finds damage before that.

    \b
    stoker cache verify /nvme/stoker
    stoker cache verify --repair --json
    """
    from ._units import format_bytes

    with _opened(directory) as cache:
        with progress("verifying", total=cache.used_bytes or None) as meter:
            found = cache.verify(repair=repair, progress=meter.advance)
        left = sum(not bad.removed for bad in found.bad)
        report = {
            "ok": not left,
            "directory": str(cache.path),
            "blocks": found.blocks,
            "checked_bytes": found.checked_bytes,
            "bad": [asdict(bad) for bad in found.bad],
        }
    lines = [
        f"{bad.block.name}: {bad.problem}{': removed' if bad.removed else ''} ({_object(asdict(bad.block))})"
        for bad in found.bad
    ]
    verdict = f"{len(found.bad):,} bad" + (f", {len(found.bad) - left:,} removed" if repair else "")
    checked = f"{found.blocks:,} blocks, {format_bytes(found.checked_bytes)} checked"
    lines.append(f"{report['directory']}: {checked}: {verdict if found.bad else 'ok'}")
    emit(report, "\n".join(map(_printable, lines)), as_json=json)
    if left:
        raise typer.Exit(1)


@cache_app.command("evict")
def evict(
    directory: _Directory = None,
    match: Annotated[
        str | None, typer.Option("--match", metavar="PATTERN", help="Objects, as ls names them; * matches / too.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All blocks.")] = False,
    json: JsonFlag = False,
) -> None:
    """Remove blocks from a tier, those of some objects or all.

    What caches with eviction have in use stays. Costs time only: views stay readable, and whoever needs a block again
    fetches it.

    \b
    stoker cache evict --all
    stoker cache evict /nvme/stoker --match 's3://bucket/old/*'
    """
    from ._units import format_bytes

    if everything == (match is not None):
        raise ConfigError("one of --match PATTERN and --all is needed", place="stoker cache evict")
    with _opened(directory) as cache:
        found = cache.evict(match)
        report = {"ok": True, "directory": str(cache.path), **found._asdict()}
    kept = f", {found.leased_blocks:,} in use kept" if found.leased_blocks else ""
    freed = f"{found.blocks:,} blocks removed, {format_bytes(found.freed_bytes)} freed{kept}"
    emit(report, f"{report['directory']}: {freed}", as_json=json)


def _opened(directory: Path | None) -> "CacheDirectory":
    from ._posix import shared_memory_directory, translate_os_errors
    from .upkeep import CacheDirectory

    if directory is None:
        with translate_os_errors("shared memory"):
            directory = shared_memory_directory() / "cache"
    try:
        return CacheDirectory(directory)
    except KeyNotFound as error:
        hint = "no job has made a cache there yet; for a disk tier, name what TieredCache got as disk="
        raise KeyNotFound(error.rule, place=error.place, hint=hint) from None
