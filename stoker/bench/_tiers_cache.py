"""Rows of ``stoker bench tiers`` that go through the block cache of one process."""

import mmap
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..storage import CacheStats, ObjectStore, TieredCache
from ..storage._posix import aligned_buffer
from ._tiers_content import BLOCK_BYTES, DISK_TIER, MIB, RAM_FIRST, RAM_KEPT, Content, Piece, each, timed
from ._tiers_local import DISK_BYTES, DISK_THREADS, DiskFile, Files
from ._tiers_store import Bucket, Swept
from .frame import Outcome, Variant, drop_page_cache


def capacity(content: Content) -> int:
    return len(content.pieces) * (BLOCK_BYTES + (64 << 10)) + MIB  # headers, and room to spare


def served(stats: CacheStats, tier: str, wanted: int) -> str:
    """Proof of what served a run: the tier that was meant to, or how many blocks it did."""
    hits = stats.ram_hits if tier == "RAM" else stats.disk_hits
    return f"{tier} tier" if hits == wanted else f"{tier} tier {hits} of {wanted} blocks, origin {stats.misses}"


def ram_tier_variants(content: Content, origin: ObjectStore, shm: Path) -> Sequence[Variant]:
    files, tier = Files(content, shm / "bare"), shm / "tier"
    blocks, maps = [piece.block for piece in content.pieces], list[mmap.mmap]()

    def open_cache() -> TieredCache:
        return TieredCache(ram=capacity(content), ram_path=tier)

    def make_bare() -> None:
        files.make()
        files.fill()
        maps.extend(files.map(piece) for piece in content.pieces)

    def remove_bare() -> None:
        for pages in maps:
            pages.close()
        files.remove()

    def bare() -> Outcome:
        def kept_blocks() -> None:
            for piece, pages in zip(content.pieces, maps, strict=True):
                piece.require(pages, "kept mappings")

        return {RAM_FIRST: content.rate(files.read()), RAM_KEPT: content.rate(timed(kept_blocks))}

    def fill() -> None:
        with open_cache() as cache:
            for piece in content.pieces:
                piece.require(cache.get(origin, piece.block), "RAM tier")

    def ours() -> Outcome:
        def first_opened() -> None:
            for block in blocks:
                cache.get(origin, block)  # let go at once, as the limit closes its map

        def kept_mapped() -> None:
            for piece, block in zip(content.pieces, blocks, strict=True):
                piece.require(cache.get(origin, block), RAM_KEPT)

        with open_cache() as cache:
            first_s = timed(first_opened)
            first = cache.stats()
            kept = [cache.get(origin, block) for block in blocks]
            for piece, view in zip(content.pieces, kept, strict=True):  # the page faults of the new maps
                piece.require(view, RAM_KEPT)
            before = cache.stats().ram_hits
            kept_s = timed(kept_mapped)
            then = cache.stats()
            del kept
        then = then._replace(ram_hits=then.ram_hits - before)
        return {
            RAM_FIRST: content.rate(first_s, origin=served(first, "RAM", len(blocks))),
            RAM_KEPT: content.rate(kept_s, origin=served(then, "RAM", len(blocks))),
        }

    return [
        Variant(
            name="open + mmap + crc32c",
            kind="limit",
            run=bare,
            setup=make_bare,
            teardown=remove_bare,
            notes=("page faults included; the kept mappings have had theirs",),
        ),
        Variant(
            name="stoker TieredCache, RAM",
            kind="stoker",
            run=ours,
            setup=fill,
            teardown=lambda: shutil.rmtree(tier, ignore_errors=True),
            notes=("each run opens the cache anew, so that every block is opened and checked again",),
        ),
    ]


def disk_tier_variants(content: Content, origin: ObjectStore, directory: Path) -> Sequence[Variant]:
    file, tier = DiskFile(content, directory / "bare"), directory / "tier"
    files = Files(content, directory / "files")

    def open_cache() -> TieredCache:
        return TieredCache(ram=0, disk=tier, disk_capacity=capacity(content))

    def bare() -> Outcome:
        seconds, cache = file.read(direct=True)
        return content.rate(seconds, cache=cache)

    def make_buffered() -> None:
        files.make()
        files.fill()

    def buffered() -> Outcome:
        left = drop_page_cache(files.directory)
        target = aligned_buffer(len(content.memory))
        target[:] = bytes(len(target))  # its page faults
        seconds = each(content.pieces, DISK_THREADS, lambda piece: files.read_into(piece, target))
        content.require(target, str(files.directory))
        return content.rate(seconds, cache="cold" if left == 0 else "warm")

    def fill() -> None:
        with open_cache() as cache:
            for piece in content.pieces:
                piece.require(cache.get(origin, piece.block), DISK_TIER)

    def ours() -> Outcome:
        left = drop_page_cache(tier / "blocks")
        with open_cache() as cache:
            seconds = each(content.pieces, DISK_THREADS, lambda piece: cache.get(origin, piece.block))
            by = served(cache.stats(), "disk", len(content.pieces))
            for piece in content.pieces:
                piece.require(cache.get(origin, piece.block), DISK_TIER)
        return content.rate(seconds, cache="cold" if left == 0 else "warm", origin=by)

    return [
        Variant(
            name="O_DIRECT read, no checks",
            kind="limit",
            run=bare,
            setup=file.make,
            teardown=file.remove,
            params={"io_threads": DISK_THREADS, "io_bytes": DISK_BYTES},
        ),
        Variant(
            name="stoker TieredCache, disk",
            kind="stoker",
            run=ours,
            setup=fill,
            teardown=lambda: shutil.rmtree(tier, ignore_errors=True),
            params={"io_threads": DISK_THREADS},
        ),
        Variant(
            name="read through the page cache, no checks",
            kind="peer",
            run=buffered,
            setup=make_buffered,
            teardown=files.remove,
            params={"io_threads": DISK_THREADS},
            notes=("what a block that processes share as mapped pages costs on its way from the disk",),
        ),
    ]


def through_variants(bucket: Bucket, kind: str, directory: Path) -> Sequence[Variant]:
    """Blocks that are nowhere yet, fetched into shared memory or onto the disk."""
    content = bucket.content
    files, tier = Files(content, directory / "plain"), directory / "empty"
    last: list[TieredCache] = []

    def plain(pieces: Sequence[Piece], threads: int) -> float:
        def fetch(piece: Piece) -> None:
            data = bucket.bare_get(piece)
            piece.require(data, "get_range + crc32c + write")
            files.write(piece, data)

        files.make()
        return each(pieces, threads, fetch)

    def forget_plain() -> None:
        for path in files.directory.iterdir():
            piece = content.pieces[int(path.name)]
            with files.map(piece) as pages:
                piece.require(pages, str(path))
        files.remove()

    def cached(pieces: Sequence[Piece], threads: int) -> float:
        room = capacity(content)
        cache = (
            TieredCache(ram=room, ram_path=tier) if kind == "RAM" else TieredCache(ram=0, disk=tier, disk_capacity=room)
        )
        last.append(cache)
        return each(pieces, threads, lambda piece: cache.get(bucket.store, piece.block))

    def forget_cached() -> str:
        with last.pop() as cache:
            stats = cache.stats()
            for piece in content.pieces[: stats.misses]:
                piece.require(cache.get(bucket.store, piece.block), "TieredCache")
        shutil.rmtree(tier)
        passed = f", {stats.pass_through} blocks not kept" if stats.pass_through else ""
        return f"object store, kept in the {kind} tier{passed}"

    def close() -> None:
        for cache in last:
            cache.close()
        shutil.rmtree(tier, ignore_errors=True)

    bare = Swept(content, content.pieces, plain, forget_plain)
    ours = Swept(content, content.pieces, cached, forget_cached)
    durable = (
        ("each block is synced to the disk before it gets its name; the limit's is not",) if kind == "disk" else ()
    )
    limit = bare.variant(f"get_range + crc32c + write to {kind}", "limit")
    stoker = ours.variant(f"stoker TieredCache, S3 into {kind}", "stoker", *durable)
    return [
        Variant(**{**vars(limit), "teardown": files.remove}),
        Variant(**{**vars(stoker), "teardown": close}),
    ]
