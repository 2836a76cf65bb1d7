"""Reads every byte of committed steps back and says which tensor, file and block is damaged. Needs no torch.

Checked: each record of the log, and of each step its manifest, fragments, documents of plain values, and every block of
every blob. Each byte is read once, at the speed of the store.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from time import perf_counter
from typing import Any

from ..errors import CorruptionError, FormatError, KeyNotFound, NoCheckpoint
from ..storage.store import ObjectStore
from ..storage.urls import open_store
from .log import CheckpointLog, LiveStep, Record, step_directory
from .manifest import CRC_BLOCK_BYTES, BlobInfo, Fragment, Manifest
from .reader import StepReader, read_manifest, resolve_step

__all__ = ["Damage", "VerifyReport", "verify"]

_SMALL_THREADS = 16
"""Documents and fragments are small: what counts there is requests in flight."""
_DAMAGED = (CorruptionError, FormatError, KeyNotFound)


@dataclass(frozen=True, kw_only=True)
class Damage:
    """One thing that is not what was written.

    Attributes:
        kind: ``"log" | "manifest" | "fragment" | "state" | "blob"``.
        key: the object below the root.
        problem: one sentence.
        step: whose it is; None for the log.
        start, end: byte range in the object, end exclusive; None for all of it.
        block: number of the checksummed block that starts there; None where there are none.
        tensors: names of those that have bytes in the range; empty for headers and pads.
    """

    kind: str
    key: str
    problem: str
    step: int | None = None
    start: int | None = None
    end: int | None = None
    block: int | None = None
    tensors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class VerifyReport:
    """What was read and what was found.

    Attributes:
        url: the root.
        steps: those that were checked, ascending.
        num_bytes: of everything that was read.
        seconds: wall time.
        damages: in the order of log, steps, files, blocks; empty if all is well.
    """

    url: str
    steps: tuple[int, ...]
    num_bytes: int
    seconds: float
    damages: tuple[Damage, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """Whether nothing is damaged."""
        return not self.damages

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"ok": self.ok, **asdict(self)}


def verify(
    url: str | os.PathLike[str],
    *,
    step: int | None = None,
    all_steps: bool = False,
    storage_options: Mapping[str, Any] | None = None,
    on_start: Callable[[int], None] = lambda num_bytes: None,
    on_read: Callable[[int], None] = lambda num_bytes: None,
) -> VerifyReport:
    """Check the log and one step (the newest by default) or all steps under a root.

    Args:
        on_start: gets the bytes that will be read from blobs, once.
        on_read: gets the bytes of each read from them, on the reading threads.

    Raises:
        NoCheckpoint: no committed step, or not that one.
    """
    started = perf_counter()
    with open_store(os.fspath(url), **(storage_options or {})) as store:
        job = _Job(store)
        if job.log_is_readable():
            steps = job.steps(step, all_steps)
        else:
            steps = {}  # which steps there are is what the damaged record says
        readers = {number: reader for number, live in steps.items() if (reader := job.open(number, live)) is not None}
        on_start(sum(blob.size_bytes for reader in readers.values() for blob in reader.manifest.blobs.values()))
        for number, reader in readers.items():
            job.check(number, reader, on_read)
        return VerifyReport(
            url=store.url,
            steps=tuple(steps),
            num_bytes=job.num_bytes,
            seconds=perf_counter() - started,
            damages=tuple(job.damages),
        )


class _Job:
    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.damages: list[Damage] = []
        self.num_bytes = 0

    def _add(self, kind: str, key: str, error: Exception, step: int | None = None) -> None:
        self.damages.append(Damage(kind=kind, key=key, problem=str(error), step=step))

    def log_is_readable(self) -> bool:
        """Check every record; whether the newest one can be read."""
        infos = list(self._store.list("log/"))

        def damage(key: str) -> Exception | None:
            try:
                Record.from_json(self._store.get(key), place=self._store.place(key))
            except KeyNotFound:
                return None  # a running job removed it as one of the oldest, since it was listed
            except (CorruptionError, FormatError) as error:
                return error
            return None

        with ThreadPoolExecutor(_SMALL_THREADS, thread_name_prefix="stoker-verify") as threads:
            errors = list(threads.map(damage, [info.key for info in infos]))
        self.num_bytes += sum(info.size for info in infos)
        for info, error in zip(infos, errors, strict=True):
            if error is not None:
                self._add("log", info.key, error)
        return not errors or errors[0] is None  # the newest record comes first in a listing

    def steps(self, step: int | None, all_steps: bool) -> dict[int, LiveStep]:
        log = CheckpointLog(self._store)
        if not all_steps:
            found, live, _ = resolve_step(log, step, self._store.url)
            return {found: live}
        head = log.head()
        if head is None or not head.live:
            raise NoCheckpoint("needs a committed step", place=self._store.url, hint="nothing was committed here")
        return dict(sorted(head.live.items()))

    def open(self, step: int, live: LiveStep) -> StepReader | None:
        directory = step_directory(step, live.nonce)
        try:
            manifest = read_manifest(self._store, directory, live)
        except _DAMAGED as error:
            self._add("manifest", f"{directory}/manifest.arrow", error, step)
            return None
        self.num_bytes += len(manifest.to_bytes())
        return StepReader(self._store, directory, manifest)

    def check(self, step: int, reader: StepReader, on_read: Callable[[int], None]) -> None:
        """All files of a step but its manifest."""
        manifest = reader.manifest
        fragments = [f"frag/{rank:05d}.arrow" for rank in range(manifest.world_size)]

        def small(path: str) -> tuple[int, Exception | None]:
            try:
                if path in manifest.states:
                    return len(reader.read_state(path)), None
                data = self._store.get(reader.key(path))
                Fragment.from_bytes(data, place=self._store.place(reader.key(path)))
                return len(data), None
            except _DAMAGED as error:
                return 0, error

        paths = [*fragments, *manifest.states]
        with ThreadPoolExecutor(_SMALL_THREADS, thread_name_prefix="stoker-verify") as threads:
            for path, (num_bytes, error) in zip(paths, threads.map(small, paths), strict=True):
                self.num_bytes += num_bytes
                if error is not None:
                    self._add("state" if path in manifest.states else "fragment", reader.key(path), error, step)
            sizes = list(threads.map(lambda blob: self._size(reader.key(blob.path)), manifest.blobs.values()))
        whole = []
        for blob, size in zip(manifest.blobs.values(), sizes, strict=True):
            if size == blob.size_bytes:
                whole.append(blob)
            else:
                self.damages.append(_wrong_size(step, reader, blob, size))
        paths_of = {self._store.place(reader.key(blob.path)): blob.path for blob in whole}
        for error in reader.damaged_blocks(whole, on_read=on_read):
            path = paths_of[error.key]
            self.damages.append(
                Damage(
                    kind="blob",
                    key=reader.key(path),
                    problem=error.rule + f", got {error.got:#010x}",
                    step=step,
                    start=error.start,
                    end=error.end,
                    block=error.start // CRC_BLOCK_BYTES,
                    tensors=tuple(_tensors_in(manifest, path, error.start, error.end)),
                )
            )
        self.num_bytes += sum(blob.size_bytes for blob in whole)

    def _size(self, key: str) -> int | None:
        try:
            return self._store.head(key).size
        except KeyNotFound:
            return None


def _wrong_size(step: int, reader: StepReader, blob: BlobInfo, size: int | None) -> Damage:
    start, end = min(size or 0, blob.size_bytes), max(size or 0, blob.size_bytes)
    return Damage(
        kind="blob",
        key=reader.key(blob.path),
        problem=f"must have {blob.size_bytes} bytes, " + ("is missing" if size is None else f"has {size}"),
        step=step,
        start=start,
        end=end,
        block=start // CRC_BLOCK_BYTES,
        tensors=tuple(_tensors_in(reader.manifest, blob.path, start, end)),
    )


def _tensors_in(manifest: Manifest, path: str, start: int, end: int) -> Iterator[str]:
    """Tensors that have bytes in ``[start, end)`` of a blob."""
    for name in manifest.tensor_names:
        for one in manifest.chunks_of(name):
            if one.blob == path and one.byte_offset < end and start < one.byte_offset + one.byte_length:
                yield name
                break
