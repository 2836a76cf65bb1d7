"""From staged to committed, in the background: checksums, the node's disk, the root, the fragment, the log."""

import hashlib
import logging
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from time import monotonic

from ..errors import CommitUnknown, SaveFailed, StokerError
from ..storage.store import ObjectStore
from .arena import write_tail
from .commit import Attempt, collect_fragments, give_up, report_failure, wait_for_verdict, write_manifest
from .handle import SaveHandle
from .holders import Roster
from .incremental import BlobReuse
from .local import LocalTier
from .log import CheckpointLog, Keep, Record, commit_record
from .manifest import BlobInfo, Fragment, StateInfo
from .plan import Plan
from .retire import Retirement
from .stage import BlobSave
from .targets import BlobTarget
from .term import Term, append_noting_retired

__all__ = ["Persister", "Staged"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Staged:
    """What the background needs to finish a save.

    Attributes:
        may_write: done when the log names this run's term.
        states: the documents that this rank writes to the root.
        documents: all documents, by path; the same items on every rank.
        local: where the blobs go on the node's own disk.
        full: refer to no blob of another step.
        release: gives the arena back.
    """

    attempt: Attempt
    blobs: BlobSave
    may_write: Future[None]
    plan: Plan
    states: Mapping[str, bytes]
    documents: Mapping[str, bytes]
    tree_hash: str
    metrics: Mapping[str, float] = field(default_factory=dict)
    local: BlobTarget | None
    full: bool = False
    release: Callable[[], None]


# Guarantees: seal() is called by one thread at a time, and finish() by one at a time, in the order of the saves.
class Persister:
    """Brings staged saves to their commit: :meth:`seal` as soon as they are staged, :meth:`finish` one after another."""

    def __init__(
        self,
        store: ObjectStore,
        log: CheckpointLog,
        term: Term,
        *,
        keep: Keep,
        retirement: Retirement,
        roster: Roster,
        local: LocalTier | None,
        reuse: BlobReuse | None = None,
    ) -> None:
        self._store, self._log, self._term, self._keep = store, log, term, keep
        self._retirement, self._roster, self._local, self._reuse = retirement, roster, local, reuse
        self._host = socket.gethostname()

    def seal(self, handle: SaveHandle, staged: Staged) -> "tuple[Fragment, Future[None] | None]":
        """Wait for the copy and its checksums; from here on the save survives this process.

        Returns the fragment, and a future of the copy on the node's disk.
        """
        attempt, blobs = staged.attempt, staged.blobs
        blobs.copied(attempt.deadline)
        fragment = Fragment(
            rank=attempt.rank,
            world_size=attempt.world_size,
            host=self._host,
            plan_hash=staged.tree_hash,
            held=[piece.chunk for piece in staged.plan.held],
            written=blobs.written_chunks(),
            blobs=blobs.infos,
            states=[
                StateInfo(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for path, data in staged.states.items()
            ],
        )
        # Whoever finds the arena commits it only if the log was this run's, so the term must be there.
        wait([staged.may_write], max(0.0, attempt.deadline - monotonic()))
        arena = blobs.layout.arena
        starts = zip(blobs.infos, blobs.layout.starts, strict=True)
        index = {
            "blobs": [[blob.path, start, blob.size_bytes] for blob, start in starts],
            "metrics": dict(staged.metrics),
        }
        if arena.path is not None:
            tail = write_tail({"": fragment.to_bytes(), **staged.documents}, index)
            arena.seal(
                tail,
                step=attempt.step,
                nonce=attempt.nonce,
                run_id=attempt.run_id,
                world_size=attempt.world_size,
                plan=staged.tree_hash,
            )
        handle.reach("staged")
        return fragment, self._finish_local(handle, staged)

    def _finish_local(self, handle: SaveHandle, staged: Staged) -> Future[None] | None:
        if self._local is None or staged.local is None:
            return None

        def tell(done: Future[None]) -> None:
            error = done.exception()
            if error is None:
                handle.reach("local")
            else:
                handle.fail_level("local", error)

        attempt = staged.attempt
        copied = self._local.finish(staged.local, attempt.directory, staged.documents, attempt.deadline)
        copied.add_done_callback(tell)
        return copied

    def finish(
        self, handle: SaveHandle, staged: Staged, sealed: "Future[tuple[Fragment, Future[None] | None]]"
    ) -> None:
        """Commit one save, once it is sealed; what went wrong goes to its handle."""
        copied: Future[None] | None = None
        arena = staged.blobs.layout.arena
        try:
            fragment, copied = sealed.result()
            record = self._commit(handle, staged, fragment)
        except BaseException as error:
            logger.error("step %d was not committed: %s", staged.attempt.step, str(error))
            self._roster.forget()
            self.tell_failure(staged.attempt, error)
            handle.fail(error)  # whoever waits for the handle gets it; a hanging write below must not hold it back
            if copied is None:  # nobody else will
                handle.fail_level("local", error)
            staged.blobs.abort()
            if copied is None and staged.local is not None:
                staged.local.abort()
            if not isinstance(error, CommitUnknown):  # this one may have been committed: the next start will look
                arena.mark("EMPTY")
            if not isinstance(error, Exception):
                raise
        else:
            staged.blobs.abort()
            arena.mark_committed()
            self._retirement.committed(record.live)
        finally:
            self._release(staged, copied)

    def _commit(self, handle: SaveHandle, staged: Staged, fragment: Fragment) -> Record:
        attempt = staged.attempt
        fragment = fragment.with_origins(self._refer(staged))
        staged.blobs.checksums_done(attempt.deadline)
        # Before any file gets its name: what has this one may be a live step of a run that was called the same.
        if self._store.exists(attempt.fragment_key(attempt.rank)):
            raise SaveFailed(
                "a run_id must be new at each start",
                value=f"step {attempt.step} was written under it before",
                place=self._store.place(attempt.directory),
                hint="a scheduler's job id stays the same when a job is requeued: add the restart count, or leave run_id out",
            )
        staged.blobs.finish()
        for path, data in staged.states.items():
            self._store.put(f"{attempt.directory}/{path}", data)
        self._store.create(attempt.fragment_key(attempt.rank), fragment.to_bytes())
        if staged.local is None:
            handle.reach("local")
        if attempt.rank == 0:
            record = self.append(attempt, fragment, staged.metrics)
        else:
            record = wait_for_verdict(self._store, attempt, self._log)
        handle.reach("committed")
        if self._reuse is not None:
            self._reuse.committed(attempt.directory, fragment.blobs)
        self._roster.clear(attempt)
        logger.info("step %d is committed under %s", attempt.step, self._store.url)
        return record

    def _refer(self, staged: Staged) -> Mapping[str, BlobInfo]:
        """The blobs that were held back, by path; those without a home have begun to be written by then."""
        blobs = staged.blobs
        found = self._reuse.find(blobs, full=staged.full) if self._reuse is not None else {}
        for blob in blobs.held:
            if blobs.paths[blob] not in found or not found[blobs.paths[blob]].home:
                blobs.write_held(blob)
        return found

    def append(self, attempt: Attempt, own: Fragment | None, metrics: Mapping[str, float]) -> Record:
        """On rank 0: collect the fragments of all ranks, and have the log name the step."""
        manifest = collect_fragments(self._store, attempt, own)
        write_manifest(self._store, attempt, manifest)

        def transition(head: Record | None) -> Record:
            return commit_record(
                head,
                term=self._term.number,
                step=attempt.step,
                nonce=attempt.nonce,
                manifest_sha256=manifest.sha256,
                refs=manifest.refs,
                metrics=metrics,
                keep=self._keep,
            )

        record, retired = append_noting_retired(self._log, transition)
        self._retirement.add(retired)
        return record

    def tell_failure(self, attempt: Attempt, error: BaseException) -> None:
        """Best effort: a store that fails now is why we are here; the others' deadline covers it."""
        try:
            (give_up if attempt.rank == 0 else report_failure)(self._store, attempt, error)
        except StokerError as also:
            logger.warning("could not report the failure of step %d: %s", attempt.step, also)

    def _release(self, staged: Staged, copied: Future[None] | None) -> None:
        """Give the arena back as soon as nobody reads from it; the node's disk may be the last, and hang."""

        def free(_: object = None) -> None:
            staged.release()
            self._retirement.resume(staged.attempt.nonce)

        if copied is None:
            free()
        else:
            copied.add_done_callback(free)
