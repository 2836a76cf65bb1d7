"""The checkpoint manager: save, restore and retention of steps under one root."""

import atexit
import functools
import hashlib
import logging
import os
import signal
import weakref
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import replace
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any, Literal, Self

from ..errors import ConfigError, DeadlineExceeded, SaveSkipped, StokerError
from ..metrics import counters
from ..storage.store import ObjectStore
from ..storage.urls import open_store
from ._pool import Pool
from .arena import root_id_of, sweep_dead_arenas
from .commit import Attempt
from .handle import SaveHandle
from .handover import Handover, sweep_dead_handovers
from .holders import Holders, Roster
from .incremental import BlobReuse, settled_groups
from .job import Job
from .local import LocalTier
from .log import CheckpointLog, LiveStep, nonce_of, step_directory
from .manifest import Fragment
from .nearest import ArenaCopy, LocalCopy, NearCopy
from .overlap import LateCopy, OptimizerHooks, OverlapMode, late_tensors
from .persist import Persister, Staged
from .plan import Signature, make_plan, plan_signature
from .reader import StepReader, read_manifest, resolve_step
from .restore import RestoreReport, restore_tree
from .retention import KeepBest, checked_metrics, retention
from .retire import Retirement
from .salvage import Salvager
from .slots import Slots
from .stage import WRITE_THREADS
from .stop import StopRequest
from .term import Term
from .tree import Documents, TreeView, view_tree

__all__ = ["CheckpointManager", "load", "save"]

logger = logging.getLogger(__name__)

_CONSTRUCT_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 1800.0
_EXIT_GRACE_S = 5.0
"""How much longer than the deadline of the last save the end of the interpreter waits for it."""
_TRIES_AHEAD = 8
"""Attempts at one step that another rank may have begun before this one; two at most that go well, by its arenas."""
_CHECKSUM_THREADS = 1
"""With two, which on 2 cores leave less of them to the copy, a save stalled an eighth longer and was durable no sooner."""
_LOCAL_THREADS = 8


# Guarantees: save, restore and close are called from one thread at a time, the trainer's; steps and latest from any.
# `_threads` write to the root, `_local_threads` to the node's disk, `_checksums` and `_copier` read and fill the arenas,
# `_sealer` waits for them, and `_background` brings one save after another to its commit; all belong to this object.
class CheckpointManager:
    """Asynchronous, sharded, verified checkpoints of one training job under one root.

    Args:
        url: the root: a path, or any URL that :func:`stoker.storage.open_store` takes. All ranks name the same one.
        local: a directory on the node's own disk. Each rank's bytes are written there, too, at the same time as they go
            to the root, and restored from there after a crash. If that disk is full or broken, saves go on to the root.
        keep_last, keep_every, keep_best: which committed steps stay: the newest `keep_last`, those that are a multiple of
            `keep_every`, the best by a metric (:class:`~stoker.checkpoint.KeepBest`). A step stays if one of them wants
            it; the newest always stays; with none of them all do. The others are retired in the same log record that
            commits a new step; their data goes `grace_s` later.
        storage_options: for the store.
        rank, world_size, run_id: of the job. With an initialised process group they come from there (the constructor is
            then collective, once, on gloo); without one a job of several ranks must pass all three, the same `run_id`
            on each rank and a new one at each start.
        replicas: the ranks whose plain tensors (no DTensors) are the same as this rank's, itself included: in a job with
            pipeline stages those of its stage. None finds out, by a note under the root whenever the tree has changed.
        overlap: whether parameters and optimizer state of 64 KiB and more are copied after ``save()`` has returned,
            beside the next forward and backward pass; the optimizers in the tree wait for it before they step. Nothing
            else may change them meanwhile: no edit of ``p.data``, no ``load_state_dict`` but by this manager.
            ``"auto"``: on where they are on an accelerator, off in host memory. ``"verify"``: on, and a save whose
            tensors were changed before they were copied fails.
        on_busy: what a save does while as many are under way as there are arenas: ``"wait"`` for one, or ``"skip"``.
        incremental: whether a save refers to what is the same in the newest committed step, instead of writing it again.
            It goes by files: what no optimizer in the tree changes (frozen parameters, buffers, plain tensors) has files
            of its own, for each item of the tree, and a file is referred to if it has the same SHA-256. The whole state
            is staged all the same, and written to `local` in full.
        persist_timeout_s: the deadline of one save, from ``save()`` to its commit.
        grace_s: how long data outlives its retirement, for readers that are still at it.
        stop_on: signals upon which the job is to save and stop; see :meth:`should_stop`. The first one only asks for
            that, a second one does what it did before. Only in the main thread.
        stop_margin: the job stops at most twice as many steps after the first rank has heard of it.

    Durability: :meth:`save` returns when training may go on. The level ``"staged"`` is reached when the state lies in
    shared memory with its checksums: if the processes are killed then, the next start on the same nodes commits it.
    ``"local"``: this rank's bytes are durable on the node's own disk (without `local`, under the root). A step exists for
    anyone, :meth:`latest` included, once it is ``"committed"``: every byte of every rank is durable under the root and
    one log record names it. A manager belongs to the process that made it: a forked child can't use it.

    Examples:
        >>> import tempfile, torch
        >>> directory = tempfile.TemporaryDirectory()
        >>> model = torch.nn.Linear(4, 2)
        >>> with CheckpointManager(directory.name, keep_last=2) as ckpt:
        ...     handle = ckpt.save(10, {"model": model, "progress": {"tokens": 4096}})
        ...     handle.wait("committed")
        ...     fresh = {"model": torch.nn.Linear(4, 2), "progress": {"tokens": 0}}
        ...     report = ckpt.restore(fresh)
        >>> report.step, fresh["progress"], torch.equal(fresh["model"].weight, model.weight)
        (10, {'tokens': 4096}, True)
        >>> directory.cleanup()
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        local: str | os.PathLike[str] | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | None = None,
        storage_options: dict[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        run_id: str | None = None,
        replicas: Collection[int] | None = None,
        overlap: OverlapMode = "auto",
        on_busy: Literal["wait", "skip"] = "wait",
        incremental: bool = False,
        persist_timeout_s: float = 1800.0,
        grace_s: float = 60.0,
        stop_on: Collection[signal.Signals] = (),
        stop_margin: int = 10,
    ) -> None:
        if overlap not in (True, False, "auto", "verify"):
            raise ConfigError(
                "overlap must be 'auto', True, False or 'verify'", value=overlap, place="CheckpointManager"
            )
        if on_busy not in ("wait", "skip"):
            raise ConfigError("on_busy must be 'wait' or 'skip'", value=on_busy, place="CheckpointManager")
        self._pid = os.getpid()
        self._overlap, self._on_busy, self._incremental = overlap, on_busy, incremental
        self._keep = retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self._keep_best = keep_best
        self._store: ObjectStore = open_store(os.fspath(url), **(storage_options or {}))
        self._log = CheckpointLog(self._store)
        self._timeout_s = persist_timeout_s
        self._job = Job.join(self._store, rank, world_size, run_id)
        self._stop = StopRequest(
            self._store, run_id=self._job.run_id, rank=self.rank, world_size=self.world_size, margin=stop_margin
        )
        self._root_id = root_id_of(self._store.url)
        self._threads = Pool(WRITE_THREADS, "stoker-write")
        self._local_threads = Pool(_LOCAL_THREADS, "stoker-local")
        self._checksums = Pool(_CHECKSUM_THREADS, "stoker-checksum")
        self._copier = Pool(1, "stoker-copy")
        self._sealer = Pool(1, "stoker-seal")
        self._background = Pool(1, "stoker-persist")
        self._tries: dict[int, int] = {}
        self._salvaged_nonces: set[str] = set()
        self._num_restores = 0
        self._pending: list[tuple[SaveHandle, Future[None], float]] = []
        self._closed = False
        self._local = None
        if local is not None:
            self._local = LocalTier(local, root_id=self._root_id, threads=self._local_threads)
        self._retirement = Retirement(
            self._store,
            self._log,
            grace_s=grace_s,
            is_owner=self.rank == 0,
            is_own=self._is_own_attempt,
            run_note=self._stop.key,
            local=self._local,
        )
        self._documents = Documents()
        self._roster = Roster(self._store, rank=self.rank, world_size=self.world_size, replicas=replicas)
        self._term = Term(self._log, self._job, self._threads, retire=self._retirement.add)
        self._persister = Persister(
            self._store,
            self._log,
            self._term,
            keep=self._keep,
            retirement=self._retirement,
            roster=self._roster,
            local=self._local,
            reuse=BlobReuse(self._store, self._log, rank=self.rank) if incremental else None,
        )
        self._slots = Slots(root_id=self._root_id, rank=self.rank, world_size=self.world_size)
        self._hooks = OptimizerHooks()
        sweep_dead_arenas(keep_root_id=self._root_id)
        sweep_dead_handovers()
        self._salvage()
        self._stop.listen(stop_on)
        self._at_exit = functools.partial(_finish_at_exit, weakref.ref(self))
        atexit.register(self._at_exit)

    def _salvage(self) -> None:
        """Commit what a killed run had staged, if all of it is there."""
        attempt = Salvager(
            self._store,
            self._log,
            self._job,
            root_id=self._root_id,
            threads=self._threads,
            timeout_s=self._timeout_s,
            open_term=self._term.open_now,
            opened=self._term.opened_by_rank_0,
            append=lambda attempt, metrics: self._persister.append(attempt, None, metrics),
        ).run()
        if attempt is not None:
            self._salvaged_nonces.add(attempt.nonce)

    @property
    def rank(self) -> int:
        """This process's rank in the job."""
        return self._job.rank

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._job.world_size

    # ---------------------------------------------------------------------------------------------------------- save

    def save(
        self, step: int, tree: dict[str, Any], *, metrics: Mapping[str, float] | None = None, full: bool = False
    ) -> SaveHandle:
        """Copy the state and return; writing and committing go on in the background. Every rank calls it.

        The tree may hold modules, optimizers, ``Stateful`` objects, (nested dicts of) tensors, DTensors and plain values;
        everything in it may change as soon as this returns. A save that still persists is waited for.

        Items have the same names on every rank; the tensors in them may differ (pipeline stages). Tensors of one name are
        the same, but for buffers of modules, which the lowest rank gives. Of plain values those of the lowest rank count.
        Before the first save of a tree, and after it has changed, ranks wait for a note of each other under the root.

        Args:
            step: of the training; a step is committed once.
            tree: the state.
            metrics: a few numbers about the step, for ``keep_best=``; every log record holds them. Those of rank 0 count.
            full: with ``incremental=``, write everything, so that the step needs no other's directory.

        Raises:
            UnsupportedState: an object that can't be represented, with its path; no byte of the step was written.
            SaveFailed, StoreError: of the save before, if its handle's :meth:`~SaveHandle.wait` did not raise it yet.
            StoreFull: there is no memory to stage in. Where there is some, but not for a whole copy, this returns when all
                is written, and raises what kept it from being written.
        """
        started = perf_counter()
        self._check_usable()
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**12:
            raise ConfigError("a step is an integer in [0, 10^12)", value=step, place="CheckpointManager.save")
        numbers = checked_metrics(metrics)
        has_slot = self._await_slot()
        handle = SaveHandle(step, started, perf_counter() - started)
        attempt = self._new_attempt(step)
        # Before anything can fail here: the other ranks write nothing until they see the record.
        may_write = self._term.open(attempt.deadline)
        if not has_slot:
            return self._skipped(handle, attempt)
        release = None
        try:
            view = view_tree(tree)
            # On every rank, though only rank 0 writes most of them: what can't be represented must not pass unseen.
            documents = {item.name: self._documents.encode(item) for item in view.items.values()}
            signature = plan_signature(view.tensors, rank=self.rank, world_size=self.world_size)
            holders = self._roster.holders(view, signature, attempt, may_write)
            self._lay_out(tree, view, signature, holders)
            handle.mark_planned()
            layout, release = self._slots.acquire()
            layout.arena.mark("FILLING", step=step, nonce=attempt.nonce)
            self._retirement.pause(attempt.nonce)
            local = None
            if self._local is not None:
                local = self._local.target(attempt.directory, sum(image.size_bytes for image in layout.images))
            blobs = layout.save_type(
                layout,
                store=self._store,
                directory=attempt.directory,
                rank=self.rank,
                threads=self._threads,
                may_write=may_write,
                checksum_threads=self._checksums,
                local=local,
            )
            try:
                blobs.stage(
                    lambda piece: piece.memory(view.tensors[piece.chunk.name]),
                    self._late_copy(tree, view, attempt),
                    deadline=attempt.deadline,
                )
            except BaseException:
                blobs.abort()
                if local is not None:
                    local.abort()
                raise
        except BaseException as error:
            if release is not None:
                release()
            self._retirement.resume(attempt.nonce)
            self._roster.forget()
            if self.world_size > 1:
                self._persister.tell_failure(attempt, error)
            if isinstance(error, SaveSkipped):  # another rank's
                handle.fail(error)
                handle.fail_level("local", error)
                return handle
            raise
        handle.mark_returned(blobs.num_bytes, self._slots.num_slots, layout.staging)
        staged = Staged(
            attempt=attempt,
            blobs=blobs,
            may_write=may_write,
            plan=layout.plan,
            states={
                path: documents[item.name]
                for item in view.items.values()
                if (path := holders.document_path(item)) is not None
            },
            documents={holders.path_of(item): documents[item.name] for item in view.items.values()},
            tree_hash=_tree_hash(view),
            metrics=numbers,
            local=local,
            full=full,
            release=release,
        )
        sealed = self._sealer.submit(self._persister.seal, handle, staged)
        persisted = self._background.submit(self._persist, handle, staged, sealed)
        self._pending.append((handle, persisted, attempt.deadline))
        counters.add("ckpt.save.stall_s", handle.report().stall_s)
        counters.add("ckpt.save.bytes", blobs.num_bytes)
        return handle

    def _persist(
        self, handle: SaveHandle, staged: Staged, sealed: Future[tuple[Fragment, Future[None] | None]]
    ) -> None:
        self._persister.finish(handle, staged, sealed)
        if self._slots.num_saves >= 2:  # not for one that saves once
            self._slots.grow()

    def _late_copy(self, tree: dict[str, Any], view: TreeView, attempt: Attempt) -> LateCopy | None:
        names = late_tensors(tree, view, self._overlap)
        if not names:
            return None
        self._hooks.hook(tree)
        copy = LateCopy(names, self._copier, deadline=attempt.deadline, verify=self._overlap == "verify")
        self._hooks.expect(copy)
        return copy

    def _await_slot(self) -> bool:
        """Whether an arena is free for the next save, once all is done that must end before it."""
        self._hooks.join()
        self._raise_failures()
        if self._term.needs_opening():
            self._settle()
        if self._slots.num_slots and not self._slots.num_free:
            if self._on_busy == "skip":
                return False
            if not self._slots.wait_free(self._timeout_s):
                raise self._still_busy()
        self._raise_failures()
        return True

    def _skipped(self, handle: SaveHandle, attempt: Attempt) -> SaveHandle:
        error = SaveSkipped(
            "a save is skipped while as many are under way as there is memory for",
            value=f"rank {self.rank}: {self._slots.num_slots} arenas are in use",
            place=f"step {attempt.step}",
        )
        for level in ("staged", "local", "committed"):
            handle.fail_level(level, error)
        counters.add("ckpt.save.skipped")
        if self.world_size > 1:  # the others may have begun; not on this thread
            self._threads.submit(self._persister.tell_failure, attempt, error)
        return handle

    def _check_usable(self) -> None:
        if self._closed:
            raise ConfigError("the manager must not be closed", place=self._store.url)
        if os.getpid() != self._pid:
            raise ConfigError(
                "a manager is used by the process that made it",
                value=f"process {os.getpid()}, made by {self._pid}",
                place=self._store.url,
                hint="make one in the forked process",
            )

    def _raise_failures(self) -> None:
        """Forget the saves that have ended; raise the first failure that nobody saw."""
        # By the handle: an arena is given back a moment before the thread that did it is done.
        ended = [handle for handle, _, _ in self._pending if handle.done()]
        self._pending = [one for one in self._pending if not one[1].done()]
        for handle in ended:
            handle.raise_unobserved()

    def _settle(self) -> None:
        """Wait until no save is under way; raise the first failure that nobody saw."""
        if self._pending and wait([one[1] for one in self._pending], self._timeout_s).not_done:
            raise self._still_busy()
        self._raise_failures()
        if not self._slots.wait_all_free(self._timeout_s):  # the node's disk may be the last
            raise self._still_busy()

    def _still_busy(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            "the saves before must end first",
            value=f"still writing after {self._timeout_s} s",
            place=f"step {self._pending[0][0].step}" if self._pending else self._store.url,
            hint="the disk or the store hangs",
        )

    def _new_attempt(self, step: int) -> Attempt:
        nth = self._tries.get(step, 0)
        self._tries[step] = nth + 1
        nonce = nonce_of(self._job.run_id, step, nth)
        return Attempt(
            step=step,
            nonce=nonce,
            directory=step_directory(step, nonce),
            run_id=self._job.run_id,
            rank=self.rank,
            world_size=self.world_size,
            deadline=monotonic() + self._timeout_s,
        )

    def _is_own_attempt(self, step: int, nonce: str) -> bool:
        """Whether an attempt is this run's: begun here, or by a rank that is ahead of this one. From any thread."""
        tries = self._tries.get(step, 0) + _TRIES_AHEAD
        own = (nonce_of(self._job.run_id, step, nth) for nth in range(tries))
        return nonce in self._salvaged_nonces or nonce in own

    def _lay_out(self, tree: dict[str, Any], view: TreeView, signature: Signature, holders: Holders) -> None:
        """Have the slots laid out for this tree."""
        settled = settled_groups(tree, view) if self._incremental else {}
        key = signature, holders, settled
        if self._slots.key == key:
            return
        self._settle()
        plan = make_plan(
            view.tensors,
            rank=self.rank,
            world_size=self.world_size,
            held=holders,
            buffers=view.buffers,
            settled=settled,
        )
        self._slots.prepare(plan, key)

    def prewarm(self, tree: dict[str, Any]) -> None:
        """Allocate and touch the staging memory for `tree` now, so that the first save costs what later ones do."""
        self._check_usable()
        self._settle()
        view = view_tree(tree)
        signature = plan_signature(view.tensors, rank=self.rank, world_size=self.world_size)
        self._lay_out(tree, view, signature, self._roster.assumed())
        self._slots.grow(wait=True)

    # ------------------------------------------------------------------------------------------------------- reading

    def steps(self) -> list[int]:
        """All committed steps, ascending."""
        head = self._log.head()
        return [] if head is None else sorted(head.live)

    def latest(self) -> int | None:
        """The newest committed step, or None. Never goes backwards but by a rewind (``restore(step=)``, then a save)."""
        head = self._log.head()
        return None if head is None else head.latest

    def best(self) -> int | None:
        """The committed step that is best by ``keep_best=``; None if no step has the metric."""
        if self._keep_best is None:
            raise ConfigError("needs keep_best=", place="CheckpointManager.best", hint="it says what is best")
        head = self._log.head()
        return None if head is None else next(iter(self._keep_best.of(head.live)), None)

    def restore(
        self,
        tree: dict[str, Any],
        *,
        step: int | None = None,
        names: Sequence[str] | None = None,
        strict: bool = True,
    ) -> RestoreReport:
        """Restore `tree` in place from a committed step, the newest by default. Every rank calls it.

        Tensors are written in place, ``Stateful`` objects get ``load_state_dict``, nested dicts of plain values are
        updated in place. World size and sharding may differ from the saving job's. Every byte is verified, and comes from
        the nearest copy that has it right: arenas in this node's shared memory, another rank of this node that reads it
        as well, the node's own disk, the root.

        Args:
            tree: what to restore; the same items as at ``save``.
            step: a committed step. The next ``save`` then abandons all steps newer than this one, unless `names` are
                given: a part of an older step is no return to it.
            names: shell patterns; only tensors of modules, and other items as a whole, that match one are restored. A
                pattern that matches nothing is an error.
            strict: False restores what tree and checkpoint have in common, keeps what only the tree has, and reports the
                rest.

        Two names in the tree that are one tensor get the bytes of the last. A module's tensors are its parameters and
        buffers, and what ``get_extra_state`` gave goes to ``set_extra_state``, after all tensors are filled.

        Raises:
            ConfigError: `names` is one string.
            NoCheckpoint: no committed step, or not that one.
            TreeMismatch: all differences in one message; nothing was written.
            CorruptBlock, CorruptRecord: stored bytes are damaged; the tree may be partly restored by then.
        """
        started = perf_counter()
        self._check_usable()
        if isinstance(names, str):
            raise ConfigError("names must be a list of patterns", value=repr(names), place="CheckpointManager.restore")
        self._settle()
        self._num_restores += 1
        found, live, newest = self._resolve(step)
        directory = step_directory(found, live.nonce)
        try:
            manifest = read_manifest(self._store, directory, live)
        except StokerError as error:
            self._job.of_all_ranks(error)  # the others wait for this rank
            raise
        nearer: list[NearCopy] = [ArenaCopy(self._root_id, live.nonce)]
        if self._local is not None and self._local.has(directory):
            nearer.append(LocalCopy(self._local, directory))
        with ExitStack() as stack:
            for copy in nearer:
                stack.callback(copy.close)
            reader = StepReader(self._store, directory, manifest, nearer=nearer)
            report = restore_tree(
                tree,
                reader,
                rank=self.rank,
                step=found,
                names=names,
                strict=strict,
                of_all_ranks=self._job.of_all_ranks,
                handover=lambda neighbours: Handover.of_rank(
                    self.rank,
                    self.world_size,
                    neighbours,
                    names=(self._root_id, self._job.run_id, live.nonce, self._num_restores),
                ),
            )
        if step is None:
            self._term.stay()
        elif names is None and (not self._term.is_open or newest > found):
            # Also without newer steps: whoever saved last may add one before this run opens its term.
            self._term.rewind_to(found)
        return replace(
            report,
            seconds=perf_counter() - started,
            bytes_from=dict(reader.bytes_from),
            num_healed=reader.num_healed,
        )

    def _resolve(self, step: int | None) -> tuple[int, LiveStep, int]:
        """One (step, nonce) for all ranks, and the newest step."""
        if self._job.group is None and self.world_size > 1 and step is None:
            raise ConfigError(
                "without a process group every rank names the step to restore",
                place="CheckpointManager.restore",
                hint="two ranks that each ask for the newest may get different ones",
            )
        answer: Any = None
        if self._job.group is None or self.rank == 0:
            try:
                answer = resolve_step(self._log, step, self._store.url)
            except StokerError as error:
                answer = error
        found: tuple[int, LiveStep, int] = self._job.from_rank_0(answer)
        return found

    # --------------------------------------------------------------------------------------------------------- the end

    def request_stop(self) -> None:
        """Ask the whole job to save and stop, as a signal of ``stop_on=`` does. Any rank may, from anywhere."""
        self._stop.request()

    def should_stop(self, step: int) -> bool:
        """Whether the job is to save `step` and stop. Every rank asks after each step, and all get the same answer.

        One rank that was asked to stop is enough: it names a step at most ``2 * stop_margin`` ahead under the root, where
        each rank looks once in `stop_margin` steps. No collective; the ranks' own keep them closer together than that.

        Examples:
            >>> import tempfile
            >>> directory = tempfile.TemporaryDirectory()
            >>> with CheckpointManager(directory.name, stop_on=[signal.SIGTERM]) as ckpt:
            ...     for step in range(1, 1000):
            ...         if step == 3:
            ...             signal.raise_signal(signal.SIGTERM)
            ...         if ckpt.should_stop(step):
            ...             ckpt.save(step, {"progress": {"step": step}}).wait("committed")
            ...             break
            ...     ckpt.latest()
            3
            >>> directory.cleanup()
        """
        return self._stop.reached(step)

    def close(self, timeout_s: float = _CLOSE_TIMEOUT_S) -> None:
        """Wait for a save that persists, then free the staging memory. Raises the failure of a save nobody waited for.

        Raises:
            DeadlineExceeded: the save did not end in time; it goes on, and its memory stays until it has.
        """
        if self._closed or os.getpid() != self._pid:
            return
        deadline = monotonic() + timeout_s
        wait([one[1] for one in self._pending], timeout_s)
        if not self._slots.wait_all_free(max(0.0, deadline - monotonic())):
            raise DeadlineExceeded(
                "the last save must end before the manager is closed",
                value=f"still going after {timeout_s} s",
                place=f"step {self._pending[-1][0].step}" if self._pending else self._store.url,
            )
        self._closed = True
        atexit.unregister(self._at_exit)
        self._stop.close()
        self._hooks.close()
        # The node's disk may be the last to be written; it reads from the arenas.
        pools = (self._background, self._sealer, self._copier, self._checksums, self._threads, self._local_threads)
        for pool in pools:
            pool.shutdown()
        self._retirement.close()
        self._slots.close()
        self._store.close()
        self._raise_failures()

    def _finish_at_exit(self) -> None:
        """The interpreter ends without close(): wait for what is pending, each save by its own deadline."""
        if self._closed or os.getpid() != self._pid:
            return
        deadline = max((one[2] for one in self._pending), default=0.0)
        left = wait([one[1] for one in self._pending], max(0.0, deadline + _EXIT_GRACE_S - monotonic())).not_done
        if not left:
            self._slots.wait_all_free(
                max(0.0, deadline + _EXIT_GRACE_S - monotonic())
            )  # for the copy on the node's disk
            self._slots.close()
            return
        logger.error(
            "%s: %d saves have not ended, and this process has; what they staged stays in shared memory, and the next "
            "start on this node commits it",
            self._store.url,
            len(left),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        try:
            self.close()
        except Exception as failure:
            if error is None:
                raise
            # The block's own error is what the user must see; this one goes to the log.
            logger.error("while closing %s: %s", self._store.url, failure)


def _finish_at_exit(own: "weakref.ref[CheckpointManager]") -> None:
    manager = own()
    if manager is not None:
        manager._finish_at_exit()


def _tree_hash(view: TreeView) -> str:
    """Of the items: what every rank of a job must agree on. Pipeline stages have different tensors in them."""
    digest = hashlib.blake2b(digest_size=16)
    for item in view.items.values():
        digest.update(repr((item.name, item.kind, item.rank_local)).encode())
    return digest.hexdigest()


def save(url: str | os.PathLike[str], tree: dict[str, Any], *, storage_options: dict[str, Any] | None = None) -> int:
    """Save one tree, durably, as the next step under `url`; returns the step. No retention.

    >>> import tempfile, torch
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     step = save(directory, {"w": torch.arange(4)})
    ...     tree = {"w": torch.zeros(4, dtype=torch.int64)}
    ...     report = load(directory, tree)
    >>> step, tree["w"].tolist()
    (0, [0, 1, 2, 3])
    """
    with CheckpointManager(url, storage_options=storage_options) as manager:
        newest = manager._job.from_rank_0(manager.latest())
        step = 0 if newest is None else newest + 1
        manager.save(step, tree).wait("committed")
    return step


def load(
    url: str | os.PathLike[str],
    tree: dict[str, Any],
    *,
    step: int | None = None,
    strict: bool = True,
    storage_options: dict[str, Any] | None = None,
) -> RestoreReport:
    """Restore `tree` in place from the newest step (or `step`) under `url`. See :meth:`CheckpointManager.restore`."""
    with CheckpointManager(url, storage_options=storage_options) as manager:
        return manager.restore(tree, step=step, strict=strict)
