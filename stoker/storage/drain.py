"""Whole files to and from a store, many parts at once, within one byte budget: finished shards, checkpoint steps that
reached only the local disk, warming, export.

Never on the path of a block or a batch: this is for the minutes before and after. What was moved is checked (size
always, content where a checksum is given), what is there already is not moved again, and a run that was killed or
cancelled is simply run again.

::

    upload({"step-7/data.safetensors": "/nvme/ckpt/step-7/data.safetensors"}, store)
    download(store, ["shard-00000.arrow"], "/nvme/warm", budget_bytes="1GiB", on_progress=print)
    await upload_async(paths, store)          # in a program that has an event loop
"""

import asyncio
import hashlib
import logging
import os
import stat
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..errors import ConfigError, CorruptBlock, KeyNotFound, ObjectChanged, StoreError, StoreFull, UnsafeName
from ._async import ByteBudget, each, to_the_end
from ._checksums import crc32c
from ._locks import try_lock
from ._posix import fsync_directory, make_directories, translate_os_errors
from ._transfer import ContentTag, Transfer, make_transfer
from ._units import Buffer, format_bytes, parse_bytes
from .store import ObjectInfo, ObjectStore, safe_key

__all__ = ["DrainProgress", "DrainReport", "download", "download_async", "upload", "upload_async"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_FILES_AT_ONCE = 16
"""Requests for sizes, and files that are moved. A guess, not measured; large ones are fewer, by the budget."""

_PARTIAL_PREFIX = ".stoker-part-"


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainProgress:
    """Where a drain stands; made after each part.

    Attributes:
        key: the object that came on.
        done_bytes, size_bytes: of that object. What was there already counts as done.
        total_done_bytes, total_bytes: of all objects. They are equal when the drain has ended well.
    """

    key: str
    done_bytes: int
    size_bytes: int
    total_done_bytes: int
    total_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class DrainReport:
    """What a drain did.

    Attributes:
        objects: as they are in the store, in the order in which they were asked for.
        moved_files, moved_bytes: sent or fetched in this run.
        kept_files: were there already, whole.
        kept_bytes: were there already, in whole files or in the first part of one.
        peak_bytes: the most memory that was reserved at once; never more than the budget.
    """

    objects: tuple[ObjectInfo, ...]
    moved_files: int
    moved_bytes: int
    kept_files: int
    kept_bytes: int
    peak_bytes: int


OnProgress = Callable[[DrainProgress], object]


def upload(
    files: Mapping[str, str | Path] | Iterable[str | Path],
    store: ObjectStore,
    *,
    checksums: Mapping[str, int] | None = None,
    budget_bytes: int | str = "256MiB",
    part_bytes: int | str = "8MiB",
    on_progress: OnProgress | None = None,
) -> DrainReport:
    """Store local files; returns when all are there, durable and checked.

    A file whose object is there is not sent again if the content is known to be the same: by the ETag where that is an
    MD5 (S3 without KMS), else by reading the object where it is a local file or a checksum is given, else if the object
    has the same size and is not older than the file, which is the rule of ``aws s3 sync``.

    An error or a cancellation aborts the multipart uploads that were begun; files that were done stay. A killed process
    can't: keep a lifecycle rule on the bucket that removes unfinished uploads.

    Args:
        files: files by key; or plain paths, each of which gets its file name as key.
        checksums: CRC32C by key. Such a file is published only if it was read with that checksum, and its object is
            compared, by its ETag or by reading it back.
        budget_bytes: most memory for parts, over all files; at least three parts.
        part_bytes: of a multipart upload, at least 5 MiB; larger for files of more than 10 000 parts.
        on_progress: called after each part, in this thread; what it raises ends the drain.

    Raises:
        KeyNotFound: a file is missing; nothing was sent.
        ObjectChanged: a file changed while it was sent (not published), or another writer replaced the object.
        CorruptBlock: the file or the object differs from its checksum.
        ConfigError: two files of one key, a directory, or called from a running event loop.
    """
    return _run(
        upload_async(
            files,
            store,
            checksums=checksums,
            budget_bytes=budget_bytes,
            part_bytes=part_bytes,
            on_progress=on_progress,
        ),
        "upload",
    )


async def upload_async(
    files: Mapping[str, str | Path] | Iterable[str | Path],
    store: ObjectStore,
    *,
    checksums: Mapping[str, int] | None = None,
    budget_bytes: int | str = "256MiB",
    part_bytes: int | str = "8MiB",
    on_progress: OnProgress | None = None,
) -> DrainReport:
    """:func:`upload` for a program with an event loop. A cancellation passes when what was begun is aborted."""
    sources = [_Source.of(key, path) for key, path in _by_key(files).items()]
    drain = _Drain(store, checksums, [source.key for source in sources], budget_bytes, part_bytes, on_progress)
    for source in sources:
        drain.transfer.window_bytes(source.size_bytes)  # what can't be sent is said before anything is
    drain.total_bytes = sum(source.size_bytes for source in sources)
    await each(sources, lambda source: _Upload(drain, source).run(), workers=_FILES_AT_ONCE)
    return drain.report("sent")


def download(
    store: ObjectStore,
    keys: Iterable[str],
    directory: str | Path,
    *,
    checksums: Mapping[str, int] | None = None,
    budget_bytes: int | str = "256MiB",
    part_bytes: int | str = "8MiB",
    on_progress: OnProgress | None = None,
) -> DrainReport:
    """Fetch objects to ``directory/key``; returns when all files are there, durable and checked.

    A file gets its name when it is complete, never before, and replaces one of that name. Until then it is a hidden
    file, at which the next run goes on where this one stopped: if the object is still the same version, and the machine
    was not started anew since, for then nobody knows which of its bytes reached the disk.

    A file that is there is not fetched again if its content is known to be the same, by the rules of :func:`upload`.

    Args:
        keys: of the objects.
        directory: made if it is missing, with mode 0700; files get 0600.
        checksums: CRC32C by key; a file gets its name only if its content has it.
        budget_bytes: most memory for parts, over all files; at least three parts.
        part_bytes: of a request, at least 5 MiB.
        on_progress: called after each part, in this thread; what it raises ends the drain.

    Raises:
        KeyNotFound: an object is missing; nothing was fetched.
        ObjectChanged: an object was replaced while it was fetched.
        CorruptBlock: what was fetched differs from its checksum.
        StoreFull: the disk has not enough space left.
        UnsafeName: a key, or a link in the directory, that leads out of it.
        ConfigError: a key that is given twice, or called from a running event loop.
    """
    return _run(
        download_async(
            store,
            keys,
            directory,
            checksums=checksums,
            budget_bytes=budget_bytes,
            part_bytes=part_bytes,
            on_progress=on_progress,
        ),
        "download",
    )


async def download_async(
    store: ObjectStore,
    keys: Iterable[str],
    directory: str | Path,
    *,
    checksums: Mapping[str, int] | None = None,
    budget_bytes: int | str = "256MiB",
    part_bytes: int | str = "8MiB",
    on_progress: OnProgress | None = None,
) -> DrainReport:
    """:func:`download` for a program with an event loop. A cancellation passes when no thread writes any more."""
    root = Path(os.path.abspath(os.path.expanduser(directory)))
    wanted = list(_unique((safe_key(key) for key in keys), "download"))
    drain = _Drain(store, checksums, wanted, budget_bytes, part_bytes, on_progress)
    found: dict[str, ObjectInfo] = {}

    async def look(key: str) -> None:
        found[key] = await asyncio.to_thread(store.head, key)

    await each(wanted, look, workers=_FILES_AT_ONCE)
    drain.total_bytes = sum(info.size for info in found.values())
    await each([found[key] for key in wanted], lambda info: _Download(drain, info, root).run(), workers=_FILES_AT_ONCE)
    return drain.report("fetched")


def _run(work: Coroutine[Any, Any, T], name: str) -> T:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    work.close()
    raise ConfigError("would block the running event loop", place=name, hint=f"await {name}_async(...)")


def _by_key(files: Mapping[str, str | Path] | Iterable[str | Path]) -> dict[str, Path]:
    if isinstance(files, str | Path):
        raise ConfigError("files must be a list or a mapping", value=str(files), place="upload")
    pairs = files.items() if isinstance(files, Mapping) else [(Path(path).name, path) for path in files]
    named = [(safe_key(key), Path(path)) for key, path in pairs]
    list(_unique((key for key, _ in named), "upload"))
    return dict(named)


def _unique(keys: Iterable[str], place: str) -> Iterable[str]:
    seen: set[str] = set()
    for key in keys:
        if key in seen:
            raise ConfigError("each key must stand for one object", value=key, place=place)
        seen.add(key)
        yield key


class _Drain:
    """What all files of one call share."""

    def __init__(
        self,
        store: ObjectStore,
        checksums: Mapping[str, int] | None,
        keys: list[str],
        budget_bytes: int | str,
        part_bytes: int | str,
        on_progress: OnProgress | None,
    ) -> None:
        self.store = store
        self._checksums = dict(checksums or {})
        if unknown := sorted(self._checksums.keys() - set(keys)):
            raise ConfigError("each checksum must belong to an object", value=unknown[0], place="checksums")
        self.budget = ByteBudget(parse_bytes(budget_bytes, place="budget_bytes"))
        self.transfer: Transfer = make_transfer(
            store, budget_bytes=self.budget.limit_bytes, part_bytes=parse_bytes(part_bytes, place="part_bytes")
        )
        self.total_bytes = 0
        self._keys, self._on_progress = keys, on_progress
        self._objects: dict[str, ObjectInfo] = {}
        self._done: dict[str, int] = {}
        self._moved_files = self._moved_bytes = self._kept_bytes = 0

    def checksum(self, key: str) -> int | None:
        return self._checksums.get(key)

    def advance(self, key: str, size_bytes: int, more_bytes: int, *, moved: bool) -> None:
        self._done[key] = self._done.get(key, 0) + more_bytes
        if moved:
            self._moved_bytes += more_bytes
        else:
            self._kept_bytes += more_bytes
        if self._on_progress is not None:
            self._on_progress(
                DrainProgress(
                    key=key,
                    done_bytes=self._done[key],
                    size_bytes=size_bytes,
                    total_done_bytes=self._moved_bytes + self._kept_bytes,
                    total_bytes=self.total_bytes,
                )
            )

    def finish(self, info: ObjectInfo, *, moved: bool) -> None:
        self._objects[info.key] = info
        self._moved_files += moved
        logger.debug("%s: %s", self.store.place(info.key), "moved" if moved else "was there already")

    def report(self, verb: str) -> DrainReport:
        report = DrainReport(
            objects=tuple(self._objects[key] for key in self._keys),
            moved_files=self._moved_files,
            moved_bytes=self._moved_bytes,
            kept_files=len(self._keys) - self._moved_files,
            kept_bytes=self._kept_bytes,
            peak_bytes=self.budget.peak_bytes,
        )
        logger.info(
            "%s: %d files with %s %s, %d were there already",
            self.store.url,
            report.moved_files,
            format_bytes(report.moved_bytes),
            verb,
            report.kept_files,
        )
        return report

    async def same_content(self, path: Path, info: ObjectInfo, *, newer: Callable[[os.stat_result], bool]) -> bool:
        """Whether the file holds what the object holds, as far as it can be known; both have one size."""
        expected = self.checksum(info.key)
        part_bytes = self.transfer.part_bytes_of(info.size)
        readable = expected is not None or self.store.local_path(info.key) is not None
        if not readable and not ContentTag(info.size, part_bytes).tells(info.version):
            return newer(path.stat())
        crc, verdict = await self.with_memory(lambda buffer: _read_through(path, info, part_bytes, buffer))
        if expected is not None and crc != expected:
            return False
        if verdict is not None:
            return verdict
        return await self.object_checksum(info) == crc

    async def with_memory(self, read: Callable[[memoryview], T]) -> T:
        size = self.transfer.part_bytes
        await self.budget.acquire(size)
        try:
            return await to_the_end(asyncio.to_thread(lambda: read(memoryview(bytearray(size)))))
        finally:
            self.budget.release(size)

    async def object_checksum(self, info: ObjectInfo) -> int:
        """CRC32C of the object, read from the store."""
        crc, part = 0, self.transfer.part_bytes
        for start in range(0, info.size, part):
            end = min(start + part, info.size)
            await self.budget.acquire(end - start)
            try:
                crc = crc32c(await self.transfer.fetch(info, start, end), crc)
            finally:
                self.budget.release(end - start)
        return crc


def _read_through(path: Path, info: ObjectInfo, part_bytes: int, buffer: memoryview) -> tuple[int, bool | None]:
    """CRC32C of a file, and what the object's ETag says of it."""
    crc, tag = 0, ContentTag(info.size, part_bytes)
    with translate_os_errors(str(path)), open(path, "rb", buffering=0) as file:
        filled, part = 0, hashlib.md5(usedforsecurity=False)
        while got := file.readinto(buffer[: min(len(buffer), part_bytes - filled)]):
            crc = crc32c(buffer[:got], crc)
            part.update(buffer[:got])
            filled += got
            if filled == part_bytes:
                tag.add_digest(part.digest())
                filled, part = 0, hashlib.md5(usedforsecurity=False)
        if filled:
            tag.add_digest(part.digest())
    return crc, tag.verdict(info.version)


# --- upload ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    key: str
    path: Path
    size_bytes: int

    @classmethod
    def of(cls, key: str, path: Path) -> "_Source":
        with translate_os_errors(str(path)):
            status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(
                "must be a regular file", place=str(path), hint="name the files of a directory one by one"
            )
        return cls(key=key, path=path, size_bytes=status.st_size)


class _Upload:
    def __init__(self, drain: _Drain, source: _Source) -> None:
        self._drain, self._source = drain, source
        self._part_bytes = drain.transfer.part_bytes_of(source.size_bytes)
        self._tag = ContentTag(source.size_bytes, self._part_bytes)
        self._crc = 0

    async def run(self) -> None:
        drain, source = self._drain, self._source
        there: ObjectInfo | None = None
        with suppress(KeyNotFound):
            there = await asyncio.to_thread(drain.store.head, source.key)
        if there is not None and there.size == source.size_bytes and await self._is_the_same(there):
            drain.advance(source.key, source.size_bytes, source.size_bytes, moved=False)
            drain.finish(there, moved=False)
            return
        window = drain.transfer.window_bytes(source.size_bytes)
        await drain.budget.acquire(window)
        try:
            async with aclosing(self._pieces()) as pieces:
                await drain.transfer.send(source.key, source.size_bytes, pieces)
        finally:
            drain.budget.release(window)
        info = await asyncio.to_thread(drain.store.head, source.key)
        await self._check(info)
        if not source.size_bytes:
            drain.advance(source.key, 0, 0, moved=True)
        drain.finish(info, moved=True)

    async def _is_the_same(self, there: ObjectInfo) -> bool:
        return await self._drain.same_content(
            self._source.path, there, newer=lambda file: there.modified_s >= file.st_mtime
        )

    async def _pieces(self) -> AsyncGenerator[memoryview, None]:
        """The file in parts. Ends with an error unless the file stayed what it was and has its checksum."""
        import aiofiles  # type: ignore[import-untyped]

        source, place = self._source, str(self._source.path)
        with translate_os_errors(place):
            fd = os.open(source.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            before = os.fstat(fd)
            file = await to_the_end(aiofiles.open(fd, "rb", buffering=0, closefd=False))
            for start in range(0, source.size_bytes, self._part_bytes):
                piece = memoryview(bytearray(min(self._part_bytes, source.size_bytes - start)))
                filled = 0
                while filled < len(piece):
                    with translate_os_errors(place):
                        got = await to_the_end(file.readinto(piece[filled:]))
                    if not got:
                        raise self._changed(start + filled)
                    filled += got
                await self._note(piece)
                yield piece
                self._drain.advance(source.key, source.size_bytes, len(piece), moved=True)
            after = os.fstat(fd)
            if (after.st_size, after.st_mtime_ns) != (source.size_bytes, before.st_mtime_ns):
                raise self._changed(after.st_size)
            expected = self._drain.checksum(source.key)
            if expected is not None and self._crc != expected:
                raise CorruptBlock(
                    place, 0, source.size_bytes, expected, self._crc, hint="the local file is damaged: nothing was sent"
                )
        finally:
            os.close(fd)

    async def _note(self, piece: Buffer) -> None:
        if self._drain.checksum(self._source.key) is not None:
            self._crc = crc32c(piece, self._crc)
            await to_the_end(asyncio.to_thread(self._tag.add, piece))

    def _changed(self, size: int) -> ObjectChanged:
        return ObjectChanged(
            f"must stay as it is, with {self._source.size_bytes} bytes, while it is sent",
            value=f"{size} bytes",
            place=str(self._source.path),
        )

    async def _check(self, info: ObjectInfo) -> None:
        place = self._drain.store.place(info.key)
        if info.size != self._source.size_bytes:
            raise ObjectChanged(
                f"must hold the {self._source.size_bytes} bytes that were sent",
                value=f"{info.size} bytes",
                place=place,
                hint="another writer replaced it, or the store lost a part",
            )
        expected = self._drain.checksum(info.key)
        if expected is None or self._tag.verdict(info.version):
            return
        got = await self._drain.object_checksum(info)
        if got != expected:
            raise CorruptBlock(place, 0, info.size, expected, got)


# --- download -------------------------------------------------------------------------------------------------------


class _Download:
    def __init__(self, drain: _Drain, info: ObjectInfo, root: Path) -> None:
        self._drain, self._info, self._root = drain, info, root
        self._path = root / info.key
        self._crc = 0

    async def run(self) -> None:
        drain, info = self._drain, self._info
        await asyncio.to_thread(self._prepare)
        if await self._is_there():
            drain.advance(info.key, info.size, info.size, moved=False)
            drain.finish(info, moved=False)
            return
        partial = _Partial(self._path, f"{drain.store.place(info.key)}\0{info.version}\0{info.size}")
        complete = False
        try:
            done = await self._begin(partial)
            await self._fill(partial, done)
            complete = True
            with translate_os_errors(str(self._path)):
                await to_the_end(asyncio.to_thread(partial.publish, info.size))
        except BaseException as error:
            # What is no beginning of this object goes, what fills a disk, and what could not be synced: a second fsync
            # may report success for lost pages. The rest is for the next run.
            partial.close(keep=not (complete or isinstance(error, ObjectChanged | CorruptBlock | StoreFull)))
            raise
        partial.close(keep=False)
        if not info.size:
            drain.advance(info.key, 0, 0, moved=True)
        drain.finish(info, moved=True)

    def _prepare(self) -> None:
        if not self._path.parent.resolve().is_relative_to(self._root.resolve()):
            raise UnsafeName("a link must not lead out of the directory", value=self._info.key, place=str(self._root))
        with translate_os_errors(str(self._path)):
            make_directories(self._path.parent)

    async def _is_there(self) -> bool:
        info = self._info
        try:
            status = self._path.lstat()
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(status.st_mode):
            raise StoreError("a name is a file or a directory, never both", place=str(self._path))
        if not stat.S_ISREG(status.st_mode) or status.st_size != info.size:
            return False
        # Stores round the time of an object down to a second.
        return await self._drain.same_content(self._path, info, newer=lambda file: file.st_mtime >= info.modified_s + 1)

    async def _begin(self, partial: "_Partial") -> int:
        """Open the file that grows; returns how much of the object it holds."""
        info = self._info
        with translate_os_errors(str(self._path)):
            done = partial.open(info.size)
            free = os.statvfs(self._path.parent)
        if free.f_bavail * free.f_frsize < info.size - done:
            raise StoreFull(
                f"needs {format_bytes(info.size - done)} more",
                value=f"{format_bytes(free.f_bavail * free.f_frsize)} free",
                place=str(self._path),
                hint="free space and run again",
            )
        if done:
            if self._drain.checksum(info.key) is not None:
                self._crc = await self._drain.with_memory(partial.checksum)
            self._drain.advance(info.key, info.size, done, moved=False)
            logger.info("%s: goes on at byte %d", self._drain.store.place(info.key), done)
        return done

    async def _fill(self, partial: "_Partial", done: int) -> None:
        """Fetch the rest, several parts at once, and write it in order, so that the file's length says what it holds."""
        import aiofiles

        drain, info, size = self._drain, self._info, self._info.size
        file = await to_the_end(aiofiles.open(partial.fd, "r+b", buffering=0, closefd=False))
        await to_the_end(file.seek(done))
        fetched: deque[tuple[int, asyncio.Task[Buffer]]] = deque()
        try:
            while done < size or fetched:
                while done < size and len(fetched) < drain.transfer.parts_in_flight:
                    length = min(drain.transfer.part_bytes, size - done)
                    # Never wait while a part of ours may be complete: it gives its bytes back only when it is written.
                    if fetched and not drain.budget.try_acquire(length):
                        break
                    if not fetched:
                        await drain.budget.acquire(length)
                    fetch = drain.transfer.fetch(info, done, done + length)
                    fetched.append((length, asyncio.ensure_future(fetch)))
                    done += length
                data = await fetched[0][1]
                await self._write(file, data)
                length = fetched.popleft()[0]
                del data  # its memory goes before its place in the budget
                drain.budget.release(length)
                drain.advance(info.key, size, length, moved=True)
        finally:
            for _, task in fetched:
                task.cancel()
            await to_the_end(asyncio.gather(*(task for _, task in fetched), return_exceptions=True))
            drain.budget.release(sum(length for length, _ in fetched))
        expected = drain.checksum(info.key)
        if expected is not None and self._crc != expected:
            raise CorruptBlock(drain.store.place(info.key), 0, size, expected, self._crc)

    async def _write(self, file: Any, data: Buffer) -> None:
        if self._drain.checksum(self._info.key) is not None:
            self._crc = crc32c(data, self._crc)
        view = memoryview(data)
        while view:
            with translate_os_errors(str(self._path)):
                view = view[await to_the_end(file.write(view)) :]


class _Partial:
    """A hidden file that grows to an object and is found again by the next run, on this machine until its next start.

    Its name holds what it is to become and in which life of the machine it was written; its length is how much of it is
    there. Locked while somebody writes to it: another run then takes a file of its own, which is not found again.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self._target = path
        self._directory = path.parent
        self._prefix = f"{_PARTIAL_PREFIX}{_hash(path.name)}-"
        boot = _boot_id()
        self._shared = f"{self._prefix}{_hash(identity + boot)}" if boot else None
        self._path: Path | None = None
        self._found_again = False
        self.fd = -1

    def open(self, size_bytes: int) -> int:
        """Open or make it; returns how many bytes it holds already."""
        if self._shared is not None and self._open(self._shared):
            self._found_again = True
        while self.fd < 0:
            self._open(f"{self._prefix}{os.urandom(8).hex()}")
        self._remove_others()
        held = os.fstat(self.fd).st_size
        if held > size_bytes:
            os.ftruncate(self.fd, 0)
            held = 0
        return held

    def _open(self, name: str) -> bool:
        path = self._directory / name
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        fd = os.open(path, flags, 0o600)
        try:
            locked = _locked(fd)
            # Between its name and its lock it may have become the object, or have been taken for left over.
            if (locked and not _is_ours(fd, path)) or (name == self._shared and not locked):
                os.close(fd)
                return False
        except BaseException:
            os.close(fd)
            raise
        self.fd, self._path = fd, path
        return True

    def _remove_others(self) -> None:
        """Remove what killed runs left of other versions of this object."""
        assert self._path is not None
        for other in self._directory.glob(f"{self._prefix}*"):
            if other != self._path:
                with suppress(OSError):
                    fd = os.open(other, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
                    try:
                        if try_lock(fd, 0) and _is_ours(fd, other):
                            other.unlink()
                    finally:
                        os.close(fd)

    def checksum(self, buffer: memoryview) -> int:
        """CRC32C of what it holds."""
        crc, offset = 0, 0
        while got := os.preadv(self.fd, [buffer], offset):
            crc, offset = crc32c(buffer[:got], crc), offset + got
        return crc

    def publish(self, size_bytes: int) -> None:
        """fsync, once; give it its name; fsync the directory."""
        assert self._path is not None
        held = os.fstat(self.fd).st_size
        if held != size_bytes:
            raise ObjectChanged(
                f"must hold the {size_bytes} bytes that were written", value=f"{held} bytes", place=str(self._path)
            )
        os.fsync(self.fd)
        os.rename(self._path, self._target)
        self._path = None
        fsync_directory(self._directory)

    def close(self, *, keep: bool) -> None:
        """Close it; without `keep`, or where no run would find it again, it is removed unless it has its name."""
        if self.fd < 0:
            return
        if self._path is not None and not (keep and self._found_again and os.fstat(self.fd).st_size):
            self._path.unlink(missing_ok=True)
        os.close(self.fd)
        self.fd = -1


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _locked(fd: int) -> bool:
    try:
        return try_lock(fd, 0)
    except OSError:  # without locks two runs could write to one file
        return False


def _is_ours(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        status = os.fstat(fd)
        named = os.path.samestat(os.stat(path, follow_symlinks=False), status)
        return named and stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
    return False
