"""``stoker data``: make, show and check token data sets."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .._console import JsonFlag, StorageOptions, emit, new_app, parse_options, progress
from ..storage._units import format_bytes

__all__ = ["app"]

app = new_app("Make, show and check token data sets.")

_Url = Annotated[str, typer.Argument(metavar="URL", help="Plain path or URL of a data set.")]


@app.command("pack")
def pack(
    sources: Annotated[
        list[Path], typer.Argument(metavar="SRC", help="Text, JSON lines, Parquet, or directories of them.")
    ],
    out: Annotated[str, typer.Option("--out", metavar="URL", help="Where the data set goes.")],
    tokenizer: Annotated[Path, typer.Option("--tokenizer", metavar="FILE", help="A tokenizer.json of Hugging Face.")],
    text_column: Annotated[str, typer.Option(help="The text of a JSON object or Parquet row.")] = "text",
    glob: Annotated[str, typer.Option(help="Files to take from directories, by name or end of path.")] = "*",
    errors: Annotated[str, typer.Option(help="Text that is not UTF-8: strict (stop), replace or skip.")] = "strict",
    dtype: Annotated[str, typer.Option(help="uint16, uint32, or auto: uint16 if the vocabulary fits.")] = "auto",
    eos_token: Annotated[
        str, typer.Option(help="Ends each document; auto looks for a customary one, none adds nothing.")
    ] = "auto",
    shard_bytes: Annotated[str, typer.Option(help="Most token bytes of a data file.")] = "256MiB",
    block_tokens: Annotated[
        int | None, typer.Option(help="Tokens of a block, a power of two.", show_default="4 MiB of them")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where a run with the same input was stopped.")
    ] = False,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Tokenize text and write it as a token data set.

    Files that end in .jsonl, .ndjson (also .gz) or .json.gz hold one JSON object a line, .parquet files one document a
    row; every other file is one document. The same input gives the same bytes.

    \b
    stoker data pack corpus/ --glob '*.md' --out /data/docs --tokenizer tokenizer.json
    stoker data pack web-*.jsonl.gz --out s3://bucket/web --tokenizer tokenizer.json -o endpoint_url=http://host:8333
    stoker data pack books.parquet --text-column body --out /data/books --tokenizer tokenizer.json --resume
    """
    from ._texts import TextSources
    from .pack import pack as run

    choices: dict[str, Any] = {"text_column": text_column, "glob": glob, "errors": errors}
    size_bytes = TextSources.find(sources, **choices).size_bytes
    with progress("packing", total=size_bytes) as meter:
        report = run(
            sources,
            out,
            tokenizer=tokenizer,
            dtype=dtype,  # type: ignore[arg-type]  # checked by pack
            eos_token=None if eos_token == "none" else eos_token,
            shard_bytes=shard_bytes,
            block_tokens=block_tokens,
            resume=resume,
            storage_options=parse_options(option),
            progress=meter.advance,
            **choices,
        )
    left_out = f", {report.empty_documents:,} empty and {report.skipped_documents:,} unreadable ones left out"
    resumed = f", {report.resumed_documents:,} of them by an earlier run" if report.resumed_documents else ""
    emit(
        report.to_json(),
        f"{report.url}: {report.documents:,} documents{resumed}{left_out}\n"
        f"{report.tokens:,} tokens as {report.dtype} from {format_bytes(report.source_bytes)} of sources, "
        f"{format_bytes(report.stored_bytes)} stored\n"
        f"{report.elapsed_s:.1f} s, {report.tokens_per_s:,.0f} tokens/s",
        as_json=json,
    )


@app.command("inspect")
def inspect(url: _Url, json: JsonFlag = False, option: StorageOptions = None) -> None:
    """Show what a data set holds. Reads the manifest and the shard table.

    \b
    stoker data inspect /data/docs
    stoker data inspect s3://bucket/web --json -o endpoint_url=http://host:8333
    """
    from ..storage.store import open_store
    from ._tables import Tables
    from .verify import stored_bytes

    with open_store(url, **parse_options(option)) as store:
        tables = Tables.open(store)
    manifest = tables.manifest
    report: dict[str, Any] = {
        "ok": True,
        "url": store.url,
        "version": 1,
        "documents": manifest.documents,
        "tokens": manifest.tokens,
        "dtype": manifest.dtype,
        "eos_id": manifest.eos_id,
        "tokenizer": manifest.tokenizer,
        "shards": manifest.shards,
        "blocks": manifest.blocks,
        "block_tokens": manifest.block_tokens,
        "stored_bytes": stored_bytes(tables),
        "fingerprint": manifest.fingerprint,
    }
    emit(report, _aligned({**report, "stored_bytes": format_bytes(report["stored_bytes"])}), as_json=json)


def _aligned(report: dict[str, Any]) -> str:
    lines = []
    for name, value in report.items():
        if name != "ok":
            text = "-" if value is None else f"{value:,}" if isinstance(value, int) and name != "version" else value
            lines.append(f"{name.replace('_', ' '):<14}{text}")
    return "\n".join(lines)


@app.command("verify")
def verify(url: _Url, json: JsonFlag = False, option: StorageOptions = None) -> None:
    """Read a data set whole and check every byte of data and tables; list all damage, exit 1 if there is any.

    \b
    stoker data verify /data/docs
    stoker data verify s3://bucket/web --json -o endpoint_url=http://host:8333
    """
    from ..storage.store import open_store
    from ._tables import Tables
    from .verify import stored_bytes
    from .verify import verify as run

    options = parse_options(option)
    with open_store(url, **options) as store:
        size_bytes = stored_bytes(Tables.open(store))
    with progress("verifying", total=size_bytes) as meter:
        report = run(url, storage_options=options, progress=meter.advance)
    lines = [
        f"{damage.key}"
        + (f": block {damage.block}, bytes [{damage.start}, {damage.end})" if damage.block is not None else "")
        + f": {damage.problem}"
        for damage in report.damage
    ]
    checked = f"{report.shards:,} shards, {report.blocks:,} blocks, {format_bytes(report.checked_bytes)}"
    verdict = f"{len(report.damage)} wrong" if report.damage else "ok"
    emit(report.to_json(), "\n".join([*lines, f"{report.url}: {checked} checked: {verdict}"]), as_json=json)
    if not report.ok:
        raise typer.Exit(1)
