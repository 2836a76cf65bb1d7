"""What a killed job had staged and not committed is committed by its next start, if it is whole.

Each rank of the new job looks for full arenas of dead ranks on its node. A step counts as whole if every rank of the old
job left a full arena of one and the same attempt, if that attempt belongs to the run that the log names as its last, and
if it is newer than every live step. Then the new run opens its term, every arena is compared with its checksums, written
as an attempt of the new run, and committed like any save. If one arena is missing or torn, or anything fails, nothing is
committed and the job starts from the newest step that is.
"""

import hashlib
import logging
import mmap
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from typing import Any

from ..errors import CorruptRecord, StokerError, StoreError
from ..metrics import counters
from ..storage._checksums import crc32c
from ..storage.store import ObjectStore
from .arena import HEADER_BYTES, arena_headers, claim, header_frame, is_alive, read_header, read_tail, this_process
from .commit import Attempt
from .job import Job
from .log import CheckpointLog, nonce_of, step_directory
from .manifest import CRC_BLOCK_BYTES, BlobInfo, Fragment
from .targets import BlobTarget

__all__ = ["Salvager"]

logger = logging.getLogger(__name__)

_WRITE_BYTES = 16 << 20


@dataclass(frozen=True, order=True)
class _Found:
    """A full arena of a dead rank. Ordered by step."""

    step: int
    nonce: str
    run_id: str
    world_size: int
    rank: int
    path: str


def _find(root_id: str) -> list[_Found]:
    return [
        _Found(
            step=header["step"],
            nonce=header["nonce"],
            run_id=header["run_id"],
            world_size=header["world_size"],
            rank=header["rank"],
            path=str(path),
        )
        for path, _, header in arena_headers(root_id)
        if header is not None
        and header["state"] == "FULL"
        and not header.get("committed")
        and "tail" in header
        and not is_alive(header)
    ]


def _whole(found: list[list[_Found]]) -> Iterator[dict[int, tuple[int, _Found]]]:
    """Attempts of which every rank's arena was found, the newest step first: by old rank, the new one that takes it."""
    attempts: dict[tuple[int, str, str, int], dict[int, tuple[int, _Found]]] = {}
    for finder, arenas in enumerate(found):
        for one in arenas:
            holders = attempts.setdefault((one.step, one.nonce, one.run_id, one.world_size), {})
            if one.rank not in holders or one.rank == finder:  # ranks of one node find the same: each takes its own
                holders[one.rank] = finder, one
    for (_, _, _, world_size), holders in sorted(attempts.items(), reverse=True):
        if set(holders) == set(range(world_size)):
            yield holders


@dataclass(frozen=True, kw_only=True)
class _Rescued:
    """An arena that this process has claimed, all of it compared with its checksums."""

    memory: mmap.mmap
    header: dict[str, Any]
    starts: dict[str, int]
    fragment: Fragment
    documents: dict[str, bytes]
    metrics: dict[str, float]


class Salvager:
    """Does it, once, for one rank of a new job; collective if the job has a process group.

    Args:
        threads: write to the root.
        open_term: opens this run's term, on rank 0.
        opened: tells the other ranks its number.
        append: collects the fragments of an attempt and commits it, on rank 0.
    """

    def __init__(
        self,
        store: ObjectStore,
        log: CheckpointLog,
        job: Job,
        *,
        root_id: str,
        threads: Executor,
        timeout_s: float,
        open_term: Callable[[], int],
        opened: Callable[[int], None],
        append: Callable[[Attempt, dict[str, float]], object],
    ) -> None:
        self._store, self._log, self._job, self._root_id = store, log, job, root_id
        self._threads, self._timeout_s = threads, timeout_s
        self._open_term, self._opened, self._append = open_term, opened, append

    def run(self) -> Attempt | None:
        """The attempt that was committed, if there was one to be."""
        if self._job.group is None and self._job.rank != 0:
            return None  # rank 0 alone looks after what it sees on its node
        found = self._job.of_all_ranks(_find(self._root_id))
        if not any(found):
            return None
        try:
            return self._salvage(found)
        except StokerError as error:  # told to every rank alike; the older steps are as they were
            counters.add("ckpt.salvage.failures")
            logger.warning("%s: what was staged is not salvaged: %s", self._store.url, error)
            return None

    def _salvage(self, found: list[list[_Found]]) -> Attempt | None:
        chosen = self._from_rank_0(lambda: self._choose(found))
        if chosen is None:
            return None
        step, world_size = chosen[0][1].step, chosen[0][1].world_size
        mine = [one for finder, one in chosen.values() if finder == self._job.rank or self._job.group is None]
        nonce = nonce_of(f"{self._job.run_id}/salvage", step, 0)
        attempt = Attempt(
            step=step,
            nonce=nonce,
            directory=step_directory(step, nonce),
            run_id=self._job.run_id,
            rank=0,
            world_size=world_size,
            deadline=monotonic() + self._timeout_s,
        )
        with ExitStack() as stack:
            rescued = self._on_all_ranks(lambda: [stack.enter_context(self._rescue(one)) for one in mine])
            self._opened(self._from_rank_0(self._open_term))
            for one in rescued:  # if this fails, the next start may try again: this run is the last one by now
                one.header["run_id"] = self._job.run_id
            self._on_all_ranks(lambda: [self._write(replace(attempt, rank=one.header["rank"]), one) for one in rescued])
            told = self._job.of_all_ranks({one.header["rank"]: one.metrics for one in rescued})
            of_rank_0: dict[str, float] = next((metrics[0] for metrics in told if 0 in metrics), {})
            self._from_rank_0(lambda: self._append(attempt, of_rank_0) and None)
            for one in rescued:
                one.header.update(nonce=nonce, committed=True)
        counters.add("ckpt.salvage.steps")
        logger.warning("%s: step %d was staged by a run that was killed, and is committed now", self._store.url, step)
        return attempt

    def _from_rank_0(self, act: Callable[[], Any]) -> Any:
        """What `act` gives on rank 0, on every rank; its error is raised on all."""
        answer: Any = None
        if self._job.rank == 0:
            try:
                answer = act()
            except StokerError as error:
                answer = error
        return self._job.from_rank_0(answer)

    def _on_all_ranks(self, act: Callable[[], list[Any]]) -> list[Any]:
        """`act` on every rank; an error of one is raised on all."""
        failed: StokerError | None = None
        done: list[Any] = []
        try:
            done = act()
        except StokerError as error:
            failed = error
        except OSError as error:
            failed = StoreError("what was staged must be readable", value=str(error), place=self._root_id)
        self._job.of_all_ranks(failed)
        return done

    def _choose(self, found: list[list[_Found]]) -> dict[int, tuple[int, _Found]] | None:
        whole = list(_whole(found))
        if not whole:
            return None
        head = self._log.head()
        for holders in whole:
            one = holders[0][1]
            # Of the run that the log names as its last: another one's has been fenced, or its history was left.
            if head is None or one.run_id != head.run_id or one.nonce in head.dead:
                continue
            if head.latest is None or one.step > head.latest:
                return holders
        return None

    @contextmanager
    def _rescue(self, found: _Found) -> Iterator[_Rescued]:
        """Claim an arena, and compare all of it with its checksums; in the end it is nobody's again, and still full.

        Raises:
            CorruptRecord: it is not what its rank had staged.
        """
        torn = CorruptRecord("an arena that is salvaged must be what was staged", place=Path(found.path).name)
        fd = os.open(found.path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            header = read_header(os.pread(fd, HEADER_BYTES, 0))
            if header is None or header.get("nonce") != found.nonce or header["state"] != "FULL":
                raise torn
            if not claim(fd, header_frame({**header, **this_process()})):
                raise StoreError("an arena has one owner", value="another process has it", place=found.path)
            try:
                with _mapped(fd, HEADER_BYTES + header["length"], torn) as memory:
                    yield self._checked(found, fd, header, memory, torn)
            finally:
                # Nobody's, so that a slot of this process can adopt it; what it holds may have a new name by now.
                os.pwrite(fd, header_frame({**header, "pid": 0}), 0)
        finally:
            os.close(fd)

    def _checked(
        self, found: _Found, fd: int, header: dict[str, Any], memory: mmap.mmap, torn: CorruptRecord
    ) -> _Rescued:
        tail = read_tail(fd, header)
        if tail is None:
            raise torn
        index, documents = tail
        fragment = Fragment.from_bytes(documents[""], place=found.path)
        rescued = _Rescued(
            memory=memory,
            header=header,
            starts={path: start for path, start, _ in index["blobs"]},
            fragment=fragment,
            documents={state.path: documents[state.path] for state in fragment.states},
            metrics=index["metrics"],
        )
        wrong = [s for s in fragment.states if hashlib.sha256(rescued.documents[s.path]).hexdigest() != s.sha256]
        if wrong or not all(self._threads.map(lambda blob: _is_intact(rescued, blob), fragment.blobs)):
            raise torn
        return rescued

    def _write(self, attempt: Attempt, rescued: _Rescued) -> str:
        """Write one old rank's part of an attempt; returns the key of its fragment, which is created last."""
        opened: Future[None] = Future()
        opened.set_result(None)
        target = BlobTarget(self._store, attempt.directory, self._threads, opened)
        view = memoryview(rescued.memory)
        try:
            for blob in rescued.fragment.blobs:
                target.open(blob.path, blob.size_bytes)
                base = HEADER_BYTES + rescued.starts[blob.path]
                for at in range(0, blob.size_bytes, _WRITE_BYTES):
                    end = min(at + _WRITE_BYTES, blob.size_bytes)
                    target.write(blob.path, at, view[base + at : base + end])
            target.written(attempt.deadline)
            target.finish()
        finally:
            target.abort()
        for path, data in rescued.documents.items():
            self._store.put(f"{attempt.directory}/{path}", data)
        return self._store.create(attempt.fragment_key(attempt.rank), rescued.fragment.to_bytes()).key


@contextmanager
def _mapped(fd: int, length: int, torn: CorruptRecord) -> Iterator[mmap.mmap]:
    if os.fstat(fd).st_size < length:
        raise torn
    # Writable, since O_DIRECT is told the address through ctypes, which takes no read-only memory.
    memory = mmap.mmap(fd, length)
    try:
        yield memory
    finally:
        with suppress(BufferError):  # a view that somebody still holds keeps the mapping; it goes with the view
            memory.close()


def _is_intact(rescued: _Rescued, blob: BlobInfo) -> bool:
    base = HEADER_BYTES + rescued.starts[blob.path]
    with memoryview(rescued.memory) as view, view[base : base + blob.size_bytes] as data:
        return all(
            crc32c(data[at : at + CRC_BLOCK_BYTES]) == int(blob.crcs[at // CRC_BLOCK_BYTES])
            for at in range(0, blob.size_bytes, CRC_BLOCK_BYTES)
        )
