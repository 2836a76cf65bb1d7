"""How fast is each place that bytes come from, and how much of it does stoker hand on?

Command: ``stoker bench tiers [--size 256MB] [--runs 3] [--dir DIR] [--url URL -o NAME=VALUE …] [--json]``.

The same random bytes, in blocks of 4 MiB, pass through memory, shared memory, a disk, an object store and the block cache
above them. Every number is 10^9 bytes/s.

``copy in memory, crc32c, shared memory, disk …``
    what the machine gives, bare: the ceilings of what follows.
``ranged GET``
    one block a request, each checked. Limit: ``obstore.get_range`` and crc32c in threads.
``ranged GET, server at no cost``
    the same from a bare loop around ``sendfile(2)``: on one machine a real server takes more of the processors than any
    client, and so hides what the clients cost.
``upload``
    a quarter of the bytes, but 128 MiB at least, in objects of 16 MiB. Limit: ``obstore.put`` of each in one request.
``RAM tier, disk tier``
    ``TieredCache.get`` of blocks that are there: opened for the first time (and so checked), or kept mapped (limit and
    stoker both read every byte once more). Limits: open, mmap and crc32c of bare files; O_DIRECT reads.
``S3 into the RAM tier, the disk tier``
    ``TieredCache.get`` of blocks that no tier has. Limit: ``get_range``, crc32c and one plain write to the same file
    system.

``S3 over a throttled link into the RAM tier``
    the same in 8 threads over a proxy that lets 300 MB/s through, or 70 % of what it can carry on this machine. Limit:
    that width. Peer: ``get_range`` and crc32c over the same link.
``eight processes on one cold set``
    bytes delivered to all of 8 processes that read one set through one cache. Limit: one process, alone. The proxy between
    them and the store counts requests: one for each block, or the bench ends.
``memory of a stream``
    the most that RssAnon and RssShmem of a process ever were while 8 times a budget went through it. The budget is the size
    of the set, 256 MiB at most. Limit: the budget and 64 MiB.

How many requests at once serve a network row best, of 1, 2, 4, 8, 16 and 32, is found for each variant alone, on a part
of the bytes, before its runs; its note says what it was. Without ``--url`` the store is a SeaweedFS on this machine: the
same processor serves and asks, so those rows compare, and say little about a network.

Every byte is checked: by the checksum of its block, in the run or right after it. A row is cold only if no page of its
file was in memory; what a store keeps in its own caches is not known, so rows of the network are called warm. Not
measured here: data sets, forked workers, hedging.
"""

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ConfigError, StoreFull
from ..storage import open_store
from ..storage._units import format_bytes
from ._tiers_cache import disk_tier_variants, ram_tier_variants, through_variants
from ._tiers_content import (
    BLOCK_BYTES,
    COPY,
    CRC,
    DISK_READ,
    DISK_TIER,
    DISK_WARM,
    DISK_WRITE,
    GET,
    GET_LEAN,
    INTO_DISK,
    INTO_RAM,
    NODE,
    RAM_FIRST,
    RAM_KEPT,
    SHM_READ,
    SHM_WRITE,
    STREAM,
    THROTTLED,
    UPLOAD,
    Content,
)
from ._tiers_local import disk_variants, memory_variants, no_o_direct, shared_memory, shared_memory_variants
from ._tiers_node import STREAM_PASSES, ThrottledRows, node_variants, stream_variants
from ._tiers_store import Bucket, open_bucket, upload_bytes
from .frame import Cache, Case, Question, Report, Scalar, Variant, measure
from .lean_server import LeanServer

__all__ = ["run_tiers"]

_LEAST_BYTES = 2 * BLOCK_BYTES


def run_tiers(
    *,
    size_bytes: int,
    runs: int,
    directory: str | Path,
    url: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    warmup: int = 1,
    progress: Callable[[], None] | None = None,
) -> Report:
    """Measure every tier with `size_bytes` of random bytes, rounded down to whole blocks of 4 MiB.

    Needs three times that much memory, shared memory and disk below `directory`, and twice as much in the store. All
    that it wrote is removed at the end, in the store too, also after an error or Ctrl-C.

    Args:
        url: an S3 URL to write below; None for a SeaweedFS of its own.
        storage_options: as :func:`~stoker.storage.open_store` takes them: ``key, secret, token, endpoint_url, region,
            anon``.

    Raises:
        ConfigError: fewer than two blocks, or an option that the bare client does not have.
        CorruptionError: wrong bytes from a limit or from stoker.
        StoreError: the store refused.
        StoreFull: not enough space below `directory`.
        UnsupportedError: a URL of another kind.
    """
    _check_room(size_bytes, Path(directory))
    content = Content(size_bytes)
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tiers-", dir=directory)))
        ask = partial(_ask, content, runs=runs, warmup=warmup, directory=work, progress=progress)
        # Asked first, since a wrong key should be told now and not in half a minute.
        bucket, no_network = stack.enter_context(open_bucket(content, url, storage_options or {}))
        shm, no_shm = stack.enter_context(shared_memory(content))
        no_disk = no_o_direct(work)
        report = ask(
            [_rate(COPY, "warm", "process memory"), _rate(CRC, "warm", "process memory")], memory_variants(content)
        )
        if shm is not None:
            cases = [_rate(SHM_WRITE, "not applicable", "process memory"), _rate(SHM_READ, "warm", "shared memory")]
            report += ask(cases, shared_memory_variants(content, shm))
        if not no_disk:
            cases = [
                _rate(DISK_WARM, "warm", "page cache"),
                _rate(DISK_READ, "cold", "local disk"),
                _rate(DISK_WRITE, "not applicable", "process memory"),
            ]
            report += ask(cases, disk_variants(content, work))
        if bucket is not None:
            report += ask([_rate(GET, "warm", "object store", goal=0.95)], bucket.readers())
            uploaded = upload_bytes(content)
            cases = [_rate(UPLOAD, "not applicable", "process memory", goal=0.85, size_bytes=uploaded)]
            report += ask(cases, bucket.uploaders(uploaded))
        with open_store(work / "origin") as origin:
            content.put_objects(origin)
            if bucket is not None:
                with LeanServer(work / "origin") as server:
                    lean = Bucket(content, server.url(), server.storage_options, prefix="")
                    stack.callback(lean.store.close)
                    report += ask([_rate(GET_LEAN, "warm", "page cache", goal=0.95)], lean.readers())
            if shm is not None:
                cases = [
                    _rate(RAM_FIRST, "warm", "RAM tier", goal=0.9),
                    _rate(RAM_KEPT, "warm", "RAM tier", goal=0.95),
                ]
                report += ask(cases, ram_tier_variants(content, origin, shm))
            if not no_disk:
                report += ask(
                    [_rate(DISK_TIER, "cold", "disk tier", goal=0.9)], disk_tier_variants(content, origin, work)
                )
            if bucket is not None:
                if shm is not None:
                    cases = [_rate(INTO_RAM, "warm", "object store", goal=0.9)]
                    report += ask(cases, through_variants(bucket, "RAM", shm))
                if not no_disk:
                    report += ask([_rate(INTO_DISK, "warm", "object store")], through_variants(bucket, "disk", work))
        no_node = ""
        if bucket is not None and shm is not None:
            if bucket.endpoint_url is not None:
                report += ask(
                    [_rate(THROTTLED, "warm", "object store", goal=0.97)], ThrottledRows(bucket, shm).variants()
                )
                report += ask([_rate(NODE, "warm", "object store", goal=4.0)], node_variants(bucket, shm))
            else:
                no_node = "a throttled link and several processes were not measured: the proxy speaks plain HTTP only"
            memory = Case(
                name=STREAM,
                unit="MiB",
                better="lower",
                goal_ratio=1.0,
                origin="object store",
                bytes=STREAM_PASSES * len(content.memory),
            )
            report += ask([memory], stream_variants(bucket, shm), runs=1, warmup=0)
    notes = (no_shm, no_disk, no_network, no_node)
    return report + Report(machine={}, rows=(), notes=tuple(note for note in notes if note))


def _check_room(size_bytes: int, directory: Path) -> None:
    if size_bytes < _LEAST_BYTES:
        raise ConfigError(f"size must be >= {_LEAST_BYTES} bytes, two blocks", value=size_bytes, place="--size")
    free = shutil.disk_usage(directory).free
    if free < 3 * size_bytes:
        raise StoreFull(f"{format_bytes(3 * size_bytes)} must be free", value=format_bytes(free), place=str(directory))


def _rate(name: str, cache: Cache, origin: str, *, goal: float | None = None, size_bytes: int = 0) -> Case:
    return Case(name=name, unit="GB/s", goal_ratio=goal, cache=cache, origin=origin, bytes=size_bytes)


def _ask(
    content: Content,
    cases: Sequence[Case],
    variants: Sequence[Variant],
    *,
    runs: int,
    warmup: int,
    directory: Path,
    progress: Callable[[], None] | None,
) -> Report:
    cases = [Case(**{**vars(case), "bytes": case.bytes or len(content.memory)}) for case in cases]
    params: dict[str, Scalar] = {"size_bytes": len(content.memory), "block_bytes": BLOCK_BYTES}
    question = Question(bench="tiers", cases=cases, params=params)
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)
