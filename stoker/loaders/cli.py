"""``stoker data``: make, show and check token data sets, and what a run reads of them."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .._console import JsonFlag, StorageOptions, emit, new_app, parse_options, progress
from ..errors import ConfigError
from ..storage._units import format_bytes

if TYPE_CHECKING:
    from .dataset import TokenDataset
    from .mixture import Mixture
    from .order import Shuffle, Window

__all__ = ["app"]

app = new_app("Make, show and check token data sets, and what a run reads of them.")

_Url = Annotated[str, typer.Argument(metavar="URL", help="Plain path or URL of a data set.")]
_UrlOrNone = Annotated[
    str | None, typer.Argument(metavar="[URL]", help="Plain path or URL of a data set, unless --mixture is given.")
]
_MixtureFile = Annotated[
    Path | None,
    typer.Option("--mixture", metavar="FILE", help="TOML or JSON of a mixture: sources.NAME.url, .weight, .cap, ..."),
]
_SeqLen = Annotated[int | None, typer.Option(help="Tokens of a sample.")]
_GlobalBatch = Annotated[int | None, typer.Option(help="Rows of a step, of all ranks together.")]
_WorldSize = Annotated[int, typer.Option(help="Ranks that read; divides the rows of a step.")]
_Seed = Annotated[int | None, typer.Option(help="Of the order.", show_default="0")]
_ShuffleName = Annotated[
    str | None,
    typer.Option("--shuffle", help="window, full, none, or window:LANES:BLOCKS.", show_default="window"),
]
_PackingName = Annotated[
    str | None,
    typer.Option(
        "--packing", help="concat, best_fit or pad; best_fit:truncate, pad:drop and so on.", show_default="concat"
    ),
]
_Documents = Annotated[bool, typer.Option("--documents", help="With the borders of documents, also in concat.")]
_Epochs = Annotated[int, typer.Option(help="Length of a run; 0 never ends.")]
_Skip = Annotated[
    list[str] | None, typer.Option(metavar="A:B", help="Stream positions to jump over, B not among them; may repeat.")
]


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
    from ..storage.urls import open_store
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
    from ..storage.urls import open_store
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


@app.command("explain")
def explain(
    url: _UrlOrNone = None,
    *,
    steps: Annotated[str, typer.Option(metavar="A:B", help="Steps, B not among them; A alone is one step.")],
    seq_len: _SeqLen = None,
    global_batch: _GlobalBatch = None,
    world_size: _WorldSize = 1,
    seed: _Seed = None,
    shuffle: _ShuffleName = None,
    packing: _PackingName = None,
    documents: _Documents = False,
    epochs: _Epochs = 1,
    skip: _Skip = None,
    mixture: _MixtureFile = None,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Show where each row of a step comes from: data file, document, tokens. Reads tables, no tokens.

    Give what the run was started with. Steps count from its first one, through all its epochs.

    \b
    stoker data explain /data/docs --steps 1700 --seq-len 2048 --global-batch 512
    stoker data explain s3://bucket/web --steps 10:12 --seq-len 4096 --global-batch 120 --world-size 8 --json
    stoker data explain --mixture mix.toml --steps 1700 --seq-len 2048 --global-batch 512
    """
    from .loader import TokenLoader
    from .replay import parse_range

    if seq_len is None or global_batch is None:
        raise ConfigError("--seq-len and --global-batch are needed", place="stoker data explain")
    if world_size < 1 or global_batch < 1 or global_batch % world_size:
        raise ConfigError("--world-size must be >= 1 and divide --global-batch", value=world_size, place="--world-size")
    first, end = parse_range(steps, place="--steps")
    if end is None or not 0 <= first < end:
        raise ConfigError("must be a range A:B with 0 <= A < B", value=steps, place="--steps")
    with _opened(url, mixture, option, packing=packing, seq_len=seq_len, documents=documents) as (source, told):
        loader = TokenLoader(
            source,
            batch_size=global_batch // world_size,
            rank=0,
            world_size=world_size,
            seed=seed or 0,
            shuffle=_shuffle(shuffle) or "window",
            epochs=epochs or None,
            skip=_skips(skip),
        )
        rows = []
        with loader, progress("explaining", total=end - first, unit="steps") as meter:
            for step in range(first, end):
                for origin in loader.explain(step):
                    url = told["url"] if origin.source is None else told["sources"][origin.source]["url"]
                    spans = [{"source": url, **span._asdict()} for span in origin.spans]
                    rows.append({"step": step, **origin._asdict(), "spans": spans})
                meter.advance(1)
    report = {
        "ok": True,
        **told,
        "seq_len": seq_len,
        "global_batch": global_batch,
        "world_size": world_size,
        "seed": seed or 0,
        "rows": rows,
    }
    emit(report, f"{told['url']}\n{_origins(rows)}", as_json=json)


def _origins(rows: list[dict[str, Any]]) -> str:
    """A line for each span; what a row's further spans share with its first is left blank."""
    names = ["step", "position", "epoch", "rank", "row", "sample"]
    names[3:3] = ["source"] if rows[0]["source"] is not None else []
    table = [[*names, "shard", "document", "tokens"]]
    for row in rows:
        for i, span in enumerate(row["spans"]):
            head = [f"{row[name]}" if i == 0 else "" for name in names]
            table.append([*head, f"{span['shard']}", f"{span['document']}", f"[{span['start']}, {span['end']})"])
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in table)


@app.command("replay")
def replay(
    url: _UrlOrNone = None,
    *,
    steps: Annotated[
        str, typer.Option(metavar="A:B", help="Steps, B not among them; open at the end of the run.")
    ] = "0:",
    hash_rows: Annotated[bool, typer.Option("--hash", help="Print a digest of each step and one of all.")] = False,
    seq_len: _SeqLen = None,
    global_batch: _GlobalBatch = None,
    world_size: _WorldSize = 1,
    seed: _Seed = None,
    shuffle: _ShuffleName = None,
    packing: _PackingName = None,
    documents: _Documents = False,
    epochs: _Epochs = 1,
    skip: _Skip = None,
    state: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="JSON of a loader's state to start from; steps then count from the next one."
        ),
    ] = None,
    mixture: _MixtureFile = None,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Read the rows of steps as all ranks of a run would, without a trainer; digests tell whether two runs saw the same.

    A step's digest is the same for any number of ranks and any stops in between. What --state holds need not be given.

    \b
    stoker data replay /data/docs --steps 0:100 --hash --seq-len 2048 --global-batch 512 --world-size 8
    stoker data replay s3://bucket/web --state loader.json --steps 0:10 --hash --json
    stoker data replay --mixture mix.toml --steps 0:100 --hash --seq-len 2048 --global-batch 512
    """
    from ._state import LoaderState
    from .replay import Replay, digest_of_step, digest_of_stream, load_state, parse_range

    first, end = parse_range(steps, place="--steps")
    saved = None if state is None else load_state(state)
    if seq_len is None:
        if saved is None:
            raise ConfigError("--seq-len is needed, unless --state tells it", place="stoker data replay")
        seq_len = LoaderState.from_dict(saved).seq_len
    if packing is None and saved is not None and mixture is None:
        packing = _packing_of(str(saved.get("packing", "concat")))
    began = perf_counter()
    digests: list[bytes] = []
    with _opened(url, mixture, option, packing=packing, seq_len=seq_len, documents=documents, saved=saved) as (
        source,
        told,
    ):
        run = Replay(
            source,
            global_batch=global_batch,
            world_size=world_size,
            seed=seed,
            shuffle=_shuffle(shuffle),
            epochs=epochs or None,
            skip=_skips(skip),
            state=saved,
            first=first,
            end=end,
        )
        with run, progress("replaying", total=len(run), unit="steps") as meter:
            for step in run:
                if hash_rows:
                    digests.append(digest_of_step(step.batches))
                last = step.state
                meter.advance(1)
    elapsed_s = perf_counter() - began
    rows = len(run) * run.global_batch
    report: dict[str, Any] = {
        "ok": True,
        **told,
        "seq_len": seq_len,
        "global_batch": run.global_batch,
        "world_size": world_size,
        "seed": last["seed"],
        "first": run.first,
        "end": run.end,
        "rows": rows,
        "tokens": rows * seq_len,
        "elapsed_s": elapsed_s,
        "state": last,
    }
    if hash_rows:
        report["steps"] = [{"step": run.first + i, "sha256": digest.hex()} for i, digest in enumerate(digests)]
        report["sha256"] = digest_of_stream(digests)
    lines = [f"step {run.first + i}: {digest.hex()}" for i, digest in enumerate(digests)]
    lines += [f"all: {report['sha256']}"] if hash_rows else []
    lines.append(
        f"{told['url']}: steps {run.first}:{run.end}, {rows:,} rows, {rows * seq_len:,} tokens, "
        f"read by {world_size:,} {'rank' if world_size == 1 else 'ranks'} in {elapsed_s:.1f} s"
    )
    emit(report, "\n".join(lines), as_json=json)


@contextmanager
def _opened(
    url: str | None,
    file: Path | None,
    option: list[str] | None,
    *,
    packing: str | None,
    saved: dict[str, Any] | None = None,
    **choices: Any,
) -> "Iterator[tuple[TokenDataset | Mixture, dict[str, Any]]]":
    """A data set or a mixture, and what a report says of it."""
    from ..storage import TieredCache
    from ..storage.urls import is_local_url
    from .dataset import TokenDataset

    if (url is None) == (file is None):
        raise ConfigError("one of URL and --mixture is needed", place="stoker data")
    plan = None
    if file is not None:
        from ._mixture_file import MixtureFile

        plan = MixtureFile.read(file)
    urls = plan.urls if plan is not None else {"": str(url)}
    packings = dict.fromkeys(urls, packing)
    if plan is not None:
        known = (saved or {}).get("sources", {})
        packings |= {name: _packing_of(told[1]) for name, told in known.items() if packing is None and name in urls}
        packings |= plan.packings
    with ExitStack() as stack:
        # Remote data sets are read through the node's cache, closed with them: no thread outlives the command.
        local = all(map(is_local_url, urls.values()))
        cache = None if local else stack.enter_context(TieredCache())
        datasets = {
            name: stack.enter_context(
                TokenDataset(
                    url,
                    cache=cache,
                    storage_options={} if is_local_url(url) and plan is not None else parse_options(option),
                    packing=_packing(packings[name]),
                    **choices,
                )
            )
            for name, url in urls.items()
        }
        if plan is None:
            yield datasets[""], _identity(datasets[""])
            return
        mixed = plan.mix(datasets)
        sources = {name: _identity(dataset) for name, dataset in datasets.items()}
        yield mixed, {"url": str(file), "fingerprint": mixed.fingerprint, "sources": sources}


def _identity(dataset: "TokenDataset") -> dict[str, Any]:
    # The store's URL, as inspect and verify tell it: a plain path is absolute there.
    return {"url": dataset._tables.store.url, "fingerprint": dataset.fingerprint}


def _packing_of(name: str) -> str:
    """As the command line has it, what a state has: ``best_fit-1/split`` is ``best_fit:split``."""
    kind, _, rest = name.partition("-")
    return ":".join([kind, *rest.split("/")[1:]])


def _shuffle(name: str | None) -> "Shuffle | Window | None":
    from .order import Window

    if name is None or not name.startswith("window:"):
        return name  # type: ignore[return-value]  # checked by the order
    try:
        lanes, blocks = (int(part) for part in name.split(":")[1:])
    except ValueError:
        raise ConfigError("must be window:LANES:BLOCKS, in whole numbers", value=name, place="--shuffle") from None
    return Window(lanes=lanes, blocks=blocks)


def _packing(name: str | None) -> Any:
    """What the data set takes as `packing`; ``kind:long`` is one with a setting."""
    from .packing import BestFit, Pad

    kind, colon, long = (name or "concat").partition(":")
    makers: dict[str, Any] = {"best_fit": BestFit, "pad": Pad}
    return makers[kind](long=long) if colon and kind in makers else name or "concat"


def _skips(ranges: list[str] | None) -> list[tuple[int, int]]:
    from .replay import parse_range

    skips = []
    for text in ranges or []:
        start, end = parse_range(text, place="--skip")
        if end is None:
            raise ConfigError("must have an end", value=text, place="--skip")
        skips.append((start, end))
    return skips
