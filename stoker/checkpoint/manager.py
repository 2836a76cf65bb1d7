"""The checkpoint manager: save, restore and retention of steps under one root."""

import hashlib
import logging
import os
import signal
import socket
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from time import monotonic, perf_counter
from types import TracebackType
from typing import Any, Self

import torch

from ..errors import (
    ConfigError,
    DeadlineExceeded,
    StokerError,
    UnsupportedError,
)
from ..metrics import counters
from ..storage.store import ObjectStore
from ..storage.urls import open_store
from . import values
from .arena import Arena, root_id_of, sweep_dead_arenas
from .commit import (
    Attempt,
    collect_fragments,
    give_up,
    report_failure,
    wait_for_own_term,
    wait_for_verdict,
    write_manifest,
)
from .handle import SaveHandle
from .job import Job
from .log import (
    CheckpointLog,
    LiveStep,
    Record,
    Transition,
    commit_record,
    nonce_of,
    open_record,
    step_directory,
)
from .manifest import Fragment, StateInfo
from .plan import Plan, make_plan, plan_signature
from .reader import StepReader, read_manifest, resolve_step
from .restore import RestoreReport, restore_tree
from .retention import KeepBest, checked_metrics, retention
from .retire import Retirement
from .stage import WRITE_THREADS, BlobSave, StagedLayout
from .stop import StopRequest
from .tree import TreeView, state_path, view_tree

__all__ = ["CheckpointManager", "load", "save"]

logger = logging.getLogger(__name__)

_CONSTRUCT_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 1800.0
_SAVES_IN_A_TERM = 100
"""A run opens again above its own term after so many saves, which clears the list of the dead in every record. A number
of saves, not the length of the list, since all ranks must agree without a word."""


# Guarantees: save, restore and close are called from one thread at a time, the trainer's; steps and latest from any.
# `_threads` write blobs, `_persister` brings one save after another to its commit; both belong to this object.
class CheckpointManager:
    """Asynchronous, sharded, verified checkpoints of one training job under one root.

    Args:
        url: the root: a path, or any URL that :func:`stoker.storage.open_store` takes. All ranks name the same one.
        local: a directory on the node's own disk; comes with tiered durability, in a later version.
        keep_last, keep_every, keep_best: which committed steps stay: the newest `keep_last`, those that are a multiple of
            `keep_every`, the best by a metric (:class:`~stoker.checkpoint.KeepBest`). A step stays if one of them wants
            it; the newest always stays; with none of them all do. The others are retired in the same log record that
            commits a new step; their data goes `grace_s` later.
        storage_options: for the store.
        rank, world_size, run_id: of the job. With an initialised process group they come from there (the constructor is
            then collective, once, on gloo); without one a job of several ranks must pass all three, the same `run_id`
            on each rank and a new one at each start.
        persist_timeout_s: the deadline of one save, from ``save()`` to its commit.
        grace_s: how long data outlives its retirement, for readers that are still at it.
        stop_on: signals upon which the job is to save and stop; see :meth:`should_stop`. The first one only asks for
            that, a second one does what it did before. Only in the main thread.
        stop_margin: the job stops at most twice as many steps after the first rank has heard of it.

    Durability: :meth:`save` returns when the state is staged in host memory, so training may go on; a step exists for
    anyone, :meth:`latest` included, once it is committed: every byte of every rank is durable under the root and one log
    record names it.

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
        local: str | None = None,
        keep_last: int | None = None,
        keep_every: int | None = None,
        keep_best: KeepBest | None = None,
        storage_options: dict[str, Any] | None = None,
        rank: int | None = None,
        world_size: int | None = None,
        run_id: str | None = None,
        persist_timeout_s: float = 1800.0,
        grace_s: float = 60.0,
        stop_on: Collection[signal.Signals] = (),
        stop_margin: int = 10,
    ) -> None:
        if local is not None:
            raise UnsupportedError(
                "a local tier in front of the root comes in a later version",
                value=str(local),
                place="CheckpointManager(local=)",
                hint="leave local= out: the root itself may be a directory on local disk",
            )
        self._keep = retention(keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        self._keep_best = keep_best
        self._store: ObjectStore = open_store(os.fspath(url), **(storage_options or {}))
        self._log = CheckpointLog(self._store)
        self._timeout_s = persist_timeout_s
        self._job = Job.join(self._store, rank, world_size, run_id)
        self._stop = StopRequest(
            self._store, run_id=self._job.run_id, rank=self.rank, world_size=self.world_size, margin=stop_margin
        )
        self._retirement = Retirement(self._store, self._log, grace_s=grace_s, run_note=self._stop.key)
        self._root_id = root_id_of(self._store.url)
        self._host = socket.gethostname()
        self._threads = ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="stoker-write")
        self._persister = ThreadPoolExecutor(1, thread_name_prefix="stoker-persist")
        self._opened: Future[None] | None = None
        self._term = 0
        self._rewind_to: int | None = None
        self._num_attempts = 0
        self._tries: dict[int, int] = {}
        self._own_nonces: set[str] = set()
        self._arena: Arena | None = None
        self._layout: StagedLayout | None = None
        self._pending: tuple[SaveHandle, Future[None]] | None = None
        self._closed = False
        sweep_dead_arenas(keep_root_id=self._root_id)
        self._stop.listen(stop_on)

    @property
    def rank(self) -> int:
        """This process's rank in the job."""
        return self._job.rank

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self._job.world_size

    # ---------------------------------------------------------------------------------------------------------- save

    def save(self, step: int, tree: dict[str, Any], *, metrics: Mapping[str, float] | None = None) -> SaveHandle:
        """Copy the state and return; writing and committing go on in the background. Every rank calls it.

        The tree may hold modules, optimizers, ``Stateful`` objects, (nested dicts of) tensors, DTensors and plain values;
        everything in it may change as soon as this returns. A save that still persists is waited for.

        Args:
            step: of the training; a step is committed once.
            tree: the state.
            metrics: a few numbers about the step, for ``keep_best=``; every log record holds them. Those of rank 0 count.

        Raises:
            UnsupportedState: an object that can't be represented, with its path; no byte of the step was written.
            SaveFailed, StoreError: of the save before, if its handle's :meth:`~SaveHandle.wait` did not raise it yet.
        """
        started = perf_counter()
        self._check_usable()
        if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**12:
            raise ConfigError("a step is an integer in [0, 10^12)", value=step, place="CheckpointManager.save")
        numbers = checked_metrics(metrics)
        self._settle()
        handle = SaveHandle(step, started, perf_counter() - started)
        attempt = self._new_attempt(step)
        # Before anything can fail here: the other ranks write nothing until they see the record.
        may_write = self._open_once(attempt.deadline)
        try:
            view = view_tree(tree)
            # On every rank, though only rank 0 writes most of them: what can't be represented must not pass unseen.
            documents = {item.name: values.dumps(item.document(), place=item.name) for item in view.items.values()}
            states = {
                state_path(item.name, self.rank if item.rank_local else None): documents[item.name]
                for item in view.items.values()
                if self.rank == 0 or item.rank_local
            }
            layout = self._layout_for(view.tensors)
            layout.arena.mark("FILLING", step=step, nonce=attempt.nonce)
            blobs = BlobSave(
                layout,
                store=self._store,
                directory=attempt.directory,
                rank=self.rank,
                threads=self._threads,
                may_write=may_write,
            )
            self._retirement.pause()
            try:
                blobs.stage(lambda piece: piece.memory(view.tensors[piece.chunk.name]))
            except BaseException:
                blobs.abort()
                raise
        except BaseException as error:
            self._retirement.resume(self._own_nonces)
            if self.world_size > 1:
                self._tell_failure(attempt, error)
            raise
        handle.mark_staged(blobs.num_bytes)
        staged = _Staged(
            attempt=attempt,
            blobs=blobs,
            plan=layout.plan,
            states=states,
            tree_hash=_tree_hash(view),
            metrics=numbers,
        )
        self._pending = handle, self._persister.submit(self._persist, handle, staged)
        counters.add("ckpt.save.stall_s", handle.report().stall_s)
        counters.add("ckpt.save.bytes", blobs.num_bytes)
        return handle

    def _check_usable(self) -> None:
        if self._closed:
            raise ConfigError("the manager must not be closed", place=self._store.url)

    def _settle(self) -> None:
        """Wait until the save before has let go of the arena; raise its failure unless somebody saw it."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        handle, persisted = pending
        try:
            persisted.result(self._timeout_s)
        except TimeoutError:
            self._pending = pending
            raise DeadlineExceeded(
                "the save before must end first",
                value=f"still writing after {self._timeout_s} s",
                place=f"step {handle.step}",
                hint="the disk or the store hangs",
            ) from None
        handle.raise_unobserved()

    def _new_attempt(self, step: int) -> Attempt:
        nth = self._tries.get(step, 0)
        self._tries[step] = nth + 1
        if self._num_attempts % _SAVES_IN_A_TERM == 0:
            self._opened = None
        self._num_attempts += 1
        nonce = nonce_of(self._job.run_id, step, nth)
        self._own_nonces.add(nonce)
        return Attempt(
            step=step,
            nonce=nonce,
            directory=step_directory(step, nonce),
            run_id=self._job.run_id,
            rank=self.rank,
            world_size=self.world_size,
            deadline=monotonic() + self._timeout_s,
        )

    def _layout_for(self, tensors: dict[str, torch.Tensor]) -> StagedLayout:
        signature = plan_signature(tensors, rank=self.rank, world_size=self.world_size)
        if self._layout is not None and self._layout.plan.signature == signature:
            return self._layout
        plan = make_plan(tensors, rank=self.rank, world_size=self.world_size)
        images = StagedLayout.images_of(plan)
        size_bytes = sum(image.size_bytes for image in images)
        self._layout = None
        if self._arena is None or self._arena.size_bytes != size_bytes:
            if self._arena is not None:
                self._arena.close()
            self._arena = Arena(root_id=self._root_id, rank=self.rank, size_bytes=size_bytes)
        self._layout = StagedLayout(plan, images, self._arena)
        return self._layout

    def prewarm(self, tree: dict[str, Any]) -> None:
        """Allocate and touch the staging memory for `tree` now, so that the first save costs what the second does."""
        self._check_usable()
        self._settle()
        self._layout_for(view_tree(tree).tensors)

    # ------------------------------------------------------------------------------------- on the background's threads

    def _open_once(self, deadline: float) -> Future[None]:
        """The future of this run's term in the log; opened by the first save (and now and then), never by a restore."""
        if self._opened is None or (self._opened.done() and self._opened.exception() is not None):
            self._opened = self._threads.submit(self._open_term, deadline)
        return self._opened

    def _open_term(self, deadline: float) -> None:
        if self.rank == 0:
            rewind_to = self._rewind_to
            above = self._term
            abandoned: dict[int, LiveStep] = {}
            record = self._log.append(
                _noting_retired(
                    abandoned,
                    lambda head: open_record(head, self._job.run_id, rewind_to=rewind_to, above_term=above),
                )
            )
            self._retirement.add(step_directory(step, live.nonce) for step, live in abandoned.items())
        else:
            record = wait_for_own_term(self._log, self._job.run_id, self._term, deadline)
        self._term, self._rewind_to = record.term, None

    def _persist(self, handle: SaveHandle, staged: "_Staged") -> None:
        try:
            self._make_durable(handle, staged)
        except BaseException as error:
            logger.error("step %d was not committed: %s", staged.attempt.step, error)
            self._tell_failure(staged.attempt, error)
            handle.fail(error)  # whoever waits for the handle gets it; a hanging write below must not hold it back
            if not isinstance(error, Exception):
                raise
        finally:
            staged.blobs.abort()
        if self.rank == 0:
            self._retirement.resume(self._own_nonces)

    def _make_durable(self, handle: SaveHandle, staged: "_Staged") -> None:
        attempt = staged.attempt
        staged.blobs.checksums_done(attempt.deadline)
        assert self._arena is not None
        self._arena.mark("FULL", step=attempt.step, nonce=attempt.nonce)
        infos = staged.blobs.finish()
        for path, data in staged.states.items():
            self._store.put(f"{attempt.directory}/{path}", data)
        fragment = Fragment(
            rank=self.rank,
            world_size=self.world_size,
            host=self._host,
            plan_hash=staged.tree_hash,
            held=[piece.chunk for piece in staged.plan.held],
            written=staged.blobs.written_chunks(),
            blobs=infos,
            states=[
                StateInfo(path=path, size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
                for path, data in staged.states.items()
            ],
        )
        self._store.create(attempt.fragment_key(self.rank), fragment.to_bytes())
        handle.reach("local")
        if self.rank == 0:
            self._commit(attempt, fragment, staged.metrics)
        else:
            wait_for_verdict(self._store, attempt, self._log)
        handle.reach("committed")
        logger.info("step %d is committed under %s", attempt.step, self._store.url)

    def _commit(self, attempt: Attempt, own: Fragment, metrics: Mapping[str, float]) -> None:
        manifest = collect_fragments(self._store, attempt, own)
        write_manifest(self._store, attempt, manifest)
        retired: dict[int, LiveStep] = {}
        self._log.append(
            _noting_retired(
                retired,
                lambda head: commit_record(
                    head,
                    term=self._term,
                    step=attempt.step,
                    nonce=attempt.nonce,
                    manifest_sha256=manifest.sha256,
                    metrics=metrics,
                    keep=self._keep,
                ),
            )
        )
        self._retirement.add(step_directory(step, live.nonce) for step, live in retired.items())

    def _tell_failure(self, attempt: Attempt, error: BaseException) -> None:
        """Best effort: a store that fails now is why we are here; the others' deadline covers it."""
        try:
            (give_up if self.rank == 0 else report_failure)(self._store, attempt, error)
        except StokerError as also:
            logger.warning("could not report the failure of step %d: %s", attempt.step, also)

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
        updated in place. World size and sharding may differ from the saving job's. Every byte is verified.

        Args:
            tree: what to restore; the same items as at ``save``.
            step: a committed step. The next ``save`` then abandons all steps newer than this one.
            names: shell patterns; only tensors and items that match one are restored.
            strict: False restores what tree and checkpoint have in common and reports the rest.

        Raises:
            NoCheckpoint: no committed step, or not that one.
            TreeMismatch: all differences in one message; nothing was written.
            CorruptBlock, CorruptRecord: stored bytes are damaged; the tree may be partly restored by then.
        """
        started = perf_counter()
        self._check_usable()
        self._settle()
        found, live, newest = self._resolve(step)
        directory = step_directory(found, live.nonce)
        manifest = read_manifest(self._store, directory, live)
        reader = StepReader(self._store, directory, manifest)
        report = restore_tree(tree, reader, rank=self.rank, step=found, names=names, strict=strict)
        if step is None:
            self._rewind_to = None
        elif self._opened is None or newest > found:
            # Also without newer steps: whoever saved last may add one before this run opens its term.
            self._rewind_to, self._opened = found, None
        return replace(report, seconds=perf_counter() - started)

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
        if self._closed:
            return
        if self._pending is not None and not wait([self._pending[1]], timeout_s).done:
            raise DeadlineExceeded(
                "the last save must end before the manager is closed",
                value=f"still going after {timeout_s} s",
                place=f"step {self._pending[0].step}",
            )
        self._closed = True
        self._stop.close()
        self._persister.shutdown(wait=True)
        self._retirement.close()
        self._threads.shutdown(wait=True)
        self._layout = None
        if self._arena is not None:
            self._arena.close()
            self._arena = None
        self._store.close()
        self._settle()

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


def _noting_retired(retired: dict[int, LiveStep], transition: Transition) -> Transition:
    """`transition`, which leaves in `retired` the steps that its record drops."""

    def noting(head: Record | None) -> Record:
        record = transition(head)
        if head is not None and record is not head:  # not the second look, which finds the record there
            retired.clear()
            retired.update({step: live for step, live in head.live.items() if step not in record.live})
        return record

    return noting


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """What the background needs to finish a save."""

    attempt: Attempt
    blobs: BlobSave
    plan: Plan
    states: dict[str, bytes]
    tree_hash: str
    metrics: dict[str, float]


def _tree_hash(view: TreeView) -> str:
    """Of items, names, dtypes and shapes: what every rank of a job must agree on."""
    digest = hashlib.blake2b(digest_size=16)
    for item in view.items.values():
        digest.update(repr((item.name, item.kind)).encode())
    for name, tensor in view.tensors.items():
        digest.update(repr((name, tensor.dtype, tuple(tensor.shape))).encode())
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
