"""``stoker ckpt``: list, show, verify and open checkpoints. Nothing here imports torch."""

import os
from collections.abc import Mapping
from math import isfinite
from time import time
from typing import Annotated, Any

import typer

from .._console import JsonFlag, StorageOptions, emit, new_app, parse_options, progress
from ..errors import ConfigError, CorruptionError, KeyNotFound, NoCheckpoint
from ..storage._units import format_bytes
from ..storage.urls import open_store

__all__ = ["app"]

app = new_app("List, show, verify, compare and clean up checkpoints, and open them with other tools.")

_Url = Annotated[str, typer.Argument(metavar="URL", help="Plain path or URL of a checkpoint root.")]
_MAX_VALUES = 50
_LEVEL = "committed"
"""Of every step that a log names: what is only staged or local is no step yet."""
_Step = Annotated[int | None, typer.Option("--step", min=0, help="A committed step.", show_default="the newest")]


@app.command("ls")
def list_steps(url: _Url, json: JsonFlag = False, option: StorageOptions = None) -> None:
    """List the committed steps under a root, with the metrics that they were saved with, the newest marked.

    Of an incremental step, "new" is what it did not find in an older one. Directories of retired steps that are kept for
    such blobs are listed, too.

    \b
    stoker ckpt ls /nvme/run
    stoker ckpt ls s3://bucket/run -o endpoint_url=http://127.0.0.1:8333
    """
    from .log import CheckpointLog, kept_blobs, step_directory
    from .reader import read_manifest

    with open_store(url, **parse_options(option)) as store:
        head = CheckpointLog(store).head()
        if head is None or not head.live:
            raise NoCheckpoint("needs a committed step", place=store.url, hint="nothing was committed here")
        rows: list[dict[str, Any]] = []
        for step, live in sorted(head.live.items()):
            directory = step_directory(step, live.nonce)
            row: dict[str, Any] = {
                "step": step,
                "newest": step == head.latest,
                "level": _LEVEL,
                "directory": directory,
                "metrics": _metrics(live.metrics),
            }
            try:
                manifest = read_manifest(store, directory, live)
                modified_s = store.head(f"{directory}/manifest.arrow").modified_s
            except (CorruptionError, KeyNotFound) as error:
                rows.append({**row, "error": str(error)})
                continue
            sizes = [blob.size_bytes for blob in manifest.blobs.values()]
            sizes += [state.size_bytes for state in manifest.states.values()]
            elsewhere = sum(blob.size_bytes for blob in manifest.blobs.values() if blob.home)
            rows.append(
                {
                    **row,
                    "bytes": sum(sizes),
                    "new_bytes": sum(sizes) - elsewhere,
                    "age_s": round(max(0.0, time() - modified_s), 1),
                    "world_size": manifest.world_size,
                    "tensors": len(manifest.tensor_names),
                    "error": None,
                }
            )
    live_directories = {row["directory"] for row in rows}
    kept: list[dict[str, Any]] = [
        {
            "directory": directory,
            "blobs": sorted(blobs),
            "steps": sorted(step for step, live in head.live.items() if directory in live.refs),
        }
        for directory, blobs in sorted(kept_blobs(head.live.values()).items())
        if directory not in live_directories
    ]
    ok = not any(row["error"] for row in rows)
    lines = [("step", "level", "bytes", "new", "age", "world size", "tensors", "metrics", "")]
    for row in rows:
        mark = "newest" if row["newest"] else ""
        first, metrics = (str(row["step"]), row["level"]), _metrics_text(row["metrics"])
        if row["error"]:
            lines.append((*first, "-", "-", "-", "-", "-", metrics, f"{mark} damaged: {row['error']}".strip()))
        else:
            size, new, age = format_bytes(row["bytes"]), format_bytes(row["new_bytes"]), _age(row["age_s"])
            lines.append((*first, size, new, age, str(row["world_size"]), f"{row['tensors']:,}", metrics, mark))
    text = _table(lines)
    for one in kept:
        text += f"{one['directory']}: retired, kept for {len(one['blobs'])} files of steps {_listed(one['steps'])}\n"
    emit({"ok": ok, "url": store.url, "steps": rows, "kept": kept}, text, as_json=json)
    if not ok:
        raise typer.Exit(1)


@app.command("show")
def show(url: _Url, step: _Step = None, json: JsonFlag = False, option: StorageOptions = None) -> None:
    """Show what a step holds: metrics, tensors, documents of plain values, files.

    \b
    stoker ckpt show /nvme/run
    stoker ckpt show s3://bucket/run --step 4000 --json
    """
    from .log import CheckpointLog, step_directory
    from .reader import read_manifest, resolve_step

    with open_store(url, **parse_options(option)) as store:
        head = CheckpointLog(store).head()
        found, live, newest = resolve_step(CheckpointLog(store), step, store.url)
        directory = step_directory(found, live.nonce)
        needed_by = sorted(s for s, one in (head.live if head is not None else {}).items() if directory in one.refs)
        manifest = read_manifest(store, directory, live)
    tensors: list[dict[str, Any]] = []
    lines = [("tensor", "dtype", "shape", "chunks", "bytes")]
    for name in manifest.tensor_names:
        info, chunks = manifest.tensor(name), manifest.chunks_of(name)
        shape, size = list(info.global_shape), sum(one.byte_length for one in chunks)
        tensors.append({"name": name, "dtype": info.dtype, "shape": shape, "chunks": len(chunks), "bytes": size})
        extent = "x".join(map(str, shape)) or "scalar"
        lines.append((name, info.dtype, extent, str(len(chunks)), format_bytes(size)))
    states: list[dict[str, Any]] = [
        {"path": state.path, "bytes": state.size_bytes} for state in manifest.states.values()
    ]
    blobs: list[dict[str, Any]] = [
        {"path": blob.path, "bytes": blob.size_bytes, "directory": blob.home or directory}
        for blob in manifest.blobs.values()
    ]
    files = [("file", "bytes", "")]
    for one in (*states, *blobs):
        home = one.get("directory", directory)
        files.append((one["path"], format_bytes(one["bytes"]), "" if home == directory else f"in {home}"))
    report = {
        "ok": True,
        "url": store.url,
        "step": found,
        "newest": found == newest,
        "level": _LEVEL,
        "directory": directory,
        "metrics": _metrics(live.metrics),
        "world_size": manifest.world_size,
        "tensors": tensors,
        "states": states,
        "blobs": blobs,
        "needed_by": needed_by,
    }
    ranks = "1 rank" if manifest.world_size == 1 else f"{manifest.world_size} ranks"
    title = f"step {found} of {store.url}, {_LEVEL}, saved by {ranks} in {directory}"
    if live.metrics:
        title += f"\nmetrics: {_metrics_text(_metrics(live.metrics))}"
    if needed_by:
        title += f"\nsteps {_listed(needed_by)} refer to files of it"
    emit(report, f"{title}\n\n{_table(lines)}\n{_table(files)}", as_json=json)


@app.command("verify")
def verify(
    url: _Url,
    step: _Step = None,
    all_steps: Annotated[bool, typer.Option("--all", help="Every committed step.")] = False,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Read every byte of a step back and name each damaged tensor, file and block. Exit code 1 if there is one.

    \b
    stoker ckpt verify /nvme/run
    stoker ckpt verify s3://bucket/run --all -o endpoint_url=http://127.0.0.1:8333
    """
    from .verify import verify as run

    if step is not None and all_steps:
        raise ConfigError("name a step or all of them, not both", value=f"--step {step} --all", place="verify")
    with progress("verifying", total=None) as meter:
        report = run(
            url,
            step=step,
            all_steps=all_steps,
            storage_options=parse_options(option),
            on_start=meter.set_total,
            on_read=meter.advance,
        )
    steps = ", ".join(map(str, report.steps)) or "none"
    rate = report.num_bytes / report.seconds / 1e9 if report.seconds else 0.0
    text = f"{report.url}: {'no damage' if report.ok else f'{len(report.damages)} damaged'}, steps: {steps}\n"
    text += f"{format_bytes(report.num_bytes)} read in {report.seconds:.1f} s, {rate:.2f} GB/s\n"
    for damage in report.damages:
        where = "" if damage.start is None else f" bytes [{damage.start}, {damage.end}) (block {damage.block})"
        what = "" if damage.kind != "blob" else f"; tensors: {_shortened(damage.tensors) or 'none, header or pad'}"
        text += f"{damage.kind} {damage.key}{where}: {damage.problem}{what}\n"
    emit(report.to_json(), text, as_json=json)
    if not report.ok:
        raise typer.Exit(1)


@app.command("diff")
def diff(
    url: _Url,
    a: Annotated[int, typer.Argument(min=0, metavar="A", help="A committed step.")],
    b: Annotated[int, typer.Argument(min=0, metavar="B", help="Another one.")],
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Say what differs between two steps: tensors, dtypes and shapes, bytes, plain values. Exit code 1 if anything does.

    Bytes are compared by checksum where both steps have the same layout, else by reading. World size does not count.

    \b
    stoker ckpt diff /nvme/run 1000 2000
    stoker ckpt diff s3://bucket/run 1000 2000 --json -o endpoint_url=http://127.0.0.1:8333
    """
    from .diff import diff as run

    with progress("comparing", total=None) as meter:
        report = run(url, a, b, storage_options=parse_options(option), on_read=meter.advance)
    text = f"steps {a} and {b} of {report.url}: {'no difference' if report.same else 'they differ'}\n"
    text += f"{report.num_tensors:,} tensors in both, {format_bytes(report.num_bytes_read)} read\n"
    for step, names in ((a, report.only_a), (b, report.only_b)):
        text += f"only in {step}: {_shortened(names)}\n" if names else ""
    for change in report.other_shape:
        text += f"{change.name}: {change.a} in {a}, {change.b} in {b}\n"
    text += f"other bytes: {_shortened(report.other_bytes)}\n" if report.other_bytes else ""
    for value in report.values[:_MAX_VALUES]:
        mine, theirs = ("nothing" if one is None else one for one in (value.a, value.b))
        text += f"{value.path}: {mine} in {a}, {theirs} in {b}\n"
    if len(report.values) > _MAX_VALUES:
        text += f"and {len(report.values) - _MAX_VALUES} more values\n"
    emit(report.to_json(), text, as_json=json)
    if not report.same:
        raise typer.Exit(1)


@app.command("gc")
def collect(
    url: _Url,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Change nothing, say what would go.")] = False,
    grace: Annotated[
        float, typer.Option("--grace", min=0.0, metavar="SECONDS", help="Leave alone what was needed or written since.")
    ] = 3600.0,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Delete what no step needs: attempts that were never committed, retired steps, old log records.

    A running job goes on saving. A save of it that takes longer than the grace is refused its commit, never torn.

    \b
    stoker ckpt gc /nvme/run --dry-run
    stoker ckpt gc s3://bucket/run --grace 86400 -o endpoint_url=http://127.0.0.1:8333
    """
    from .garbage import collect_garbage

    with open_store(url, **parse_options(option)) as store, progress("deleting", total=None, unit="objects") as meter:
        report = collect_garbage(
            store, grace_s=grace, dry_run=dry_run, on_start=meter.set_total, on_delete=meter.advance
        )
    what = "would go" if dry_run else "deleted"
    text = f"{report.url}: {len(report.attempts)} attempts {what}, {format_bytes(report.num_bytes)}; "
    text += f"{report.num_log_records} old log records, {report.num_notes} notes of ended runs\n"
    rows = [("attempt", "bytes", "age", "why")]
    rows += [(one.directory, format_bytes(one.num_bytes), _age(one.age_s), one.reason) for one in report.attempts]
    rows += [
        (one.directory, format_bytes(one.num_bytes), _age(one.age_s), f"{one.reason}, stays for its grace")
        for one in report.in_grace
    ]
    emit(report.to_json(), text + (_table(rows) if len(rows) > 1 else ""), as_json=json)


@app.command("zarr")
def zarr(
    url: _Url,
    output: Annotated[
        str, typer.Option("--output", "-o", metavar="FILE", help="The references, for example refs.json.")
    ],
    step: _Step = None,
    json: JsonFlag = False,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="NAME=VALUE", help="Option of the object store, as fsspec names it; may repeat."
        ),
    ] = None,
) -> None:
    """Write kerchunk references: plain zarr and fsspec then open the step's tensors, without checks.

    Checked reads, and those of arrays that are left out here, come with stoker.checkpoint.open_zarr.

    \b
    stoker ckpt zarr /nvme/run -o refs.json
    stoker ckpt zarr s3://bucket/run -o refs.json --step 4000 --option endpoint_url=http://127.0.0.1:8333

    \b
    zarr.open_group("reference://", storage_options={"fo": "refs.json"}, mode="r")
    """
    from .zarr import write_references

    written = write_references(url, output, step, storage_options=parse_options(option))
    report = {
        "ok": True,
        "url": url,
        "output": os.path.abspath(output),
        "step": written.step,
        "arrays": written.num_arrays,
        "chunks": written.num_chunks,
        "left_out": written.left_out,
    }
    text = f"{output}: step {written.step}, {written.num_arrays:,} arrays, {written.num_chunks:,} chunks\n"
    for name, reason in written.left_out.items():
        text += f"left out: {name}: {reason}\n"
    emit(report, text, as_json=json)


def _metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """What JSON has no number for is text, as in the log."""
    return {name: value if isfinite(value) else repr(value) for name, value in sorted(metrics.items())}


def _metrics_text(metrics: Mapping[str, float | str]) -> str:
    return ", ".join(
        f"{name}={value}" if isinstance(value, str) else f"{name}={value:.6g}" for name, value in metrics.items()
    )


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[:8])) + (f" and {len(steps) - 8} more" if len(steps) > 8 else "")


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def _shortened(names: tuple[str, ...]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _table(rows: list[Any]) -> str:
    """Columns as wide as their widest entry, the last one as it is."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines) + "\n"
