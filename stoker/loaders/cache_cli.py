"""``stoker plan`` and ``stoker cache warm``: what a cache would do for a run, and filling it before the run."""

from pathlib import Path
from typing import Annotated

import typer

from .._console import JsonFlag, StorageOptions, emit, parse_options, progress
from ..errors import ConfigError

__all__ = ["plan", "warm"]


def plan(
    simulate: Annotated[
        bool, typer.Option("--simulate", help="Hit rates of eviction policies over the real order.")
    ] = False,
    blocks: Annotated[int, typer.Option(help="Order blocks of the data set.")] = 3840,
    epochs: Annotated[int, typer.Option(help="At least 2: the first fills the cache and does not count.")] = 4,
    nodes: Annotated[int, typer.Option(help="Where there are several.")] = 8,
    seed: Annotated[int, typer.Option(help="Of the order.")] = 0,
    capacity: Annotated[
        list[float] | None,
        typer.Option(
            metavar="SHARE", help="Of the data set, for all nodes; may repeat.", show_default="0.1, 0.25, 0.5, 0.8"
        ),
    ] = None,
    global_batch: Annotated[
        int | None, typer.Option(help="Rows of a step, of all ranks: show how many bytes the nodes read with it.")
    ] = None,
    lanes: Annotated[int, typer.Option(help="Of the order; with --global-batch.")] = 48,
    seq_len: Annotated[
        int | None, typer.Option(help="Tokens of a sample; with --global-batch: show how often blocks are fetched.")
    ] = None,
    block_tokens: Annotated[int, typer.Option(help="Of the data set; with --seq-len.")] = 1 << 21,
    json: JsonFlag = False,
) -> None:
    """Show what a job's nodes would read, or how often a cache would hit. Reads no data.

    With --global-batch: the bytes that all nodes read for each byte of the data set, and a batch near it that reads
    least; with --seq-len too, how often a block is fetched in an epoch where no cache holds it. With --simulate, in some seconds: hit rates by the plan, keeping a fixed part (pin), SIEVE and LRU; for one
    node in a scan, shuffled, and with a mixture at unequal rates; for several nodes with fixed lanes, and with blocks
    dealt to lanes anew each epoch.

    \b
    stoker plan --global-batch 480 --nodes 5 --seq-len 1536
    stoker plan --simulate
    stoker plan --simulate --nodes 16 --capacity 0.3 --json
    """
    if simulate == (global_batch is not None):
        raise ConfigError("one of --simulate and --global-batch is needed", place="stoker plan")
    if global_batch is not None:
        from .locality import locality

        split = locality(
            nodes=nodes, global_batch=global_batch, lanes=lanes, seq_len=seq_len, block_tokens=block_tokens
        )
        emit(split.to_json(), split.to_text(), as_json=json)
        return
    from .simulate import CAPACITIES, POLICIES, SCENES, Workload
    from .simulate import simulate as run

    workload = Workload(blocks=blocks, epochs=epochs, nodes=nodes, seed=seed)
    capacities = tuple(capacity or CAPACITIES)
    with progress("simulating", total=len(SCENES) * len(capacities) * len(POLICIES), unit="runs") as meter:
        found = run(workload, capacities=capacities, progress=lambda: meter.advance(1))
    emit(found.to_json(), found.to_text(), as_json=json)


def warm(
    url: Annotated[str, typer.Argument(metavar="URL", help="Of a remote data set, written as the job writes it.")],
    ram: Annotated[
        str | None, typer.Option(help="Limit of the RAM tier, 0 for none.", show_default="as TieredCache")
    ] = None,
    disk: Annotated[Path | None, typer.Option(metavar="DIR", help="Of the disk tier.", show_default="none")] = None,
    disk_capacity: Annotated[
        str | None, typer.Option(help="Limit of the disk tier.", show_default="as TieredCache")
    ] = None,
    json: JsonFlag = False,
    option: StorageOptions = None,
) -> None:
    """Fetch all blocks of a data set into this node's cache: first into RAM, then onto the disk.

    Give tiers and limits as the job will. A full cache is no error: what fits is there, and the output says how much.

    \b
    stoker cache warm s3://bucket/web --disk /nvme/stoker --disk-capacity 1TiB
    stoker cache warm s3://bucket/web --ram 64GiB --json -o endpoint_url=http://host:8333
    """
    from ..storage._units import format_bytes
    from ..storage.cache import TieredCache
    from ..storage.store import redact_url
    from .warm import warm as run

    with (
        TieredCache(ram=ram, disk=disk, disk_capacity=disk_capacity) as cache,
        progress("warming", total=None) as meter,
    ):
        done = run(url, cache, storage_options=parse_options(option), set_total=meter.set_total, progress=meter.advance)
    shown = redact_url(url)
    complete = done.resident_blocks == done.blocks
    report = {"ok": True, "url": shown, "complete": complete, **done._asdict()}
    fetched = f"{format_bytes(done.fetched_bytes)} fetched in {done.elapsed_s:.1f} s"
    full = "" if complete else "; no room for more: the rest comes from its store at each read"
    emit(report, f"{shown}: {done.resident_blocks:,} of {done.blocks:,} blocks cached, {fetched}{full}", as_json=json)
