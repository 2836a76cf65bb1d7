"""``torch.distributed.checkpoint`` on this package's format: ``dcp.save``, ``async_save`` and ``load`` stay as they are.

::

    dcp.save({"model": model, "app": app}, storage_writer=StokerWriter("s3://bucket/run"))
    dcp.load({"model": model, "app": app}, storage_reader=StokerReader("s3://bucket/run"))

The planner stays torch's, with its collectives; the bytes, the commit and the log are the manager's. So a step saved here
is verified, listed, retired and opened by everything that knows the format, :class:`~stoker.checkpoint.CheckpointManager`
included, and the other way round: tensors meet under their dotted names (``model.layers.0.weight``), and each item of
the state dict has its document of plain values.

Plain values are stored as typed JSON. torch's planners exchange them as streams of ``torch.save``; the writer goes past
that to the object itself, and the reader makes such a stream in memory, from JSON, for the planner that asks for it. No
pickle is stored, and none that was stored is read.

Errors arrive as torch reports them: a ``CheckpointException`` whose ``failures`` hold, by rank, the typed error.
"""

import hashlib
import io
import os
import re
import socket
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import monotonic
from typing import Any, Self, TypeAlias, cast

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict, unflatten_state_dict
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future as TorchFuture

from ..errors import ConfigError, SaveFailed, UnsupportedError, UnsupportedState
from ..storage.store import ObjectStore, redact_url
from ..storage.urls import open_store
from . import values
from .arena import Arena, root_id_of
from .blob import Chunk
from .commit import Attempt, collect_fragments, write_manifest
from .log import CheckpointLog, Record, commit_record, nonce_of, open_record, step_directory
from .manifest import BlobInfo, Fragment, Manifest, StateInfo, WrittenChunk
from .plan import Piece, Plan, dtype_name, local_pieces
from .reader import StepReader, read_manifest, resolve_step
from .restore import read_boxes
from .stage import WRITE_THREADS, BlobSave, StagedLayout
from .tree import put_at, unite_documents

__all__ = ["StokerReader", "StokerWriter"]

StagedLayouts: TypeAlias = Callable[
    [list[Chunk], Sequence[torch.Tensor]], tuple[StagedLayout, Callable[[], None]] | None
]
"""Where chunks lie staged already, given them and their memory; what comes with it is called when they are written."""

_PERSIST_TIMEOUT_S = 1800.0
_STEP = re.compile(r"(?:step[-_])?([0-9]{1,12})")
_RANK_LOCAL = re.compile(r"state/.*\.\d{5}\.json")
_PART = re.compile(r"\.part-\d{5,8}\.json")
_REST = "state/dcp.rest.json"
"""What has no document of its own: items whose names are no identifiers."""


def _step_of(checkpoint_id: str | os.PathLike[str] | int) -> int:
    match = _STEP.fullmatch(str(checkpoint_id))
    if match is None or isinstance(checkpoint_id, bool):
        raise ConfigError(
            "a checkpoint_id is a step: 100, '100' or 'step-100'",
            value=str(checkpoint_id),
            place="checkpoint_id",
            hint="the root is the URL of the writer or reader",
        )
    return int(match[1])


def _checked_step(step: int | None, place: str) -> int | None:
    if step is not None and (isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 10**12):
        raise ConfigError("a step is an integer in [0, 10^12)", value=step, place=place)
    return step


class _Root:
    """The store and the log behind a URL, opened at first use; a copy in another process opens its own."""

    def __init__(self, url: str | os.PathLike[str], storage_options: Mapping[str, Any] | None) -> None:
        self._url, self._options = os.fspath(url), dict(storage_options or {})
        self._store: ObjectStore | None = None

    @property
    def store(self) -> ObjectStore:
        if self._store is None:
            self._store = open_store(self._url, **self._options)
        return self._store

    @property
    def log(self) -> CheckpointLog:
        return CheckpointLog(self.store)

    def __repr__(self) -> str:
        return redact_url(self._url)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_store": None}


# --------------------------------------------------------------------------------------------------------------- writer


@dataclass(frozen=True, kw_only=True)
class _Assignment:
    """What the coordinator tells a rank about a save, inside its plan."""

    step: int
    nonce: str
    run_id: str
    rank: int
    world_size: int

    def attempt(self, deadline: float) -> Attempt:
        return Attempt(
            step=self.step,
            nonce=self.nonce,
            directory=step_directory(self.step, self.nonce),
            run_id=self.run_id,
            rank=self.rank,
            world_size=self.world_size,
            deadline=deadline,
        )


@dataclass(frozen=True, kw_only=True)
class _Entry:
    """What a rank reports to the coordinator of one item: the save that it belongs to, and a plain value as JSON."""

    nonce: str
    value: bytes | None


@dataclass(frozen=True, kw_only=True)
class _Part:
    """The coordinator's own part of a save between :meth:`StokerWriter.write_data` and ``finish``."""

    attempt: Attempt
    written: list[WrittenChunk]
    blobs: list[BlobInfo]


# Guarantees: one save at a time, as torch calls it. `_arena_lock` guards `_arena` and `_layout` against a second
# async_save that was started before the first one ended.
class StokerWriter(StorageWriter):
    """Saves of ``dcp.save`` and ``dcp.async_save`` under a root, each one a committed step.

    Every rank makes one with the same arguments and keeps it: the staging memory and the log's term are made once.

    Args:
        url: the root: a path, or any URL that :func:`stoker.storage.open_store` takes.
        step: of every save with this writer. None gives each save the newest committed step plus one. A
            ``checkpoint_id`` in ``dcp.save`` (100, ``"100"`` or ``"step-100"``) names the step of that one save.
        storage_options: for the store.
        persist_timeout_s: the deadline of one save.

    A step that is committed already is never replaced: saving it again raises
    :class:`~stoker.errors.StepAlreadyCommitted` before a byte is written. Writing the first step opens a term in the log:
    an older writer or manager of this root can commit nothing any more (:class:`~stoker.errors.Fenced`).

    ``dcp.save`` returns when the step is committed: every byte of every rank is durable. It needs host memory for one
    copy of what this rank writes.

    What torch's planner flattens comes back as it does there: keys of dicts are text, and empty dicts are gone.

    Examples:
        >>> import tempfile, warnings, torch, torch.distributed.checkpoint as dcp
        >>> warnings.simplefilter("ignore")  # torch warns that there is no process group
        >>> root = tempfile.TemporaryDirectory()
        >>> with StokerWriter(root.name) as writer:
        ...     _ = dcp.save({"w": torch.arange(3), "epoch": 7}, storage_writer=writer)
        >>> state = {"w": torch.zeros(3, dtype=torch.int64), "epoch": 0}
        >>> dcp.load(state, storage_reader=StokerReader(root.name))
        >>> writer.step, state["epoch"], state["w"]
        (0, 7, tensor([0, 1, 2]))
        >>> root.cleanup()
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        step: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
        persist_timeout_s: float = _PERSIST_TIMEOUT_S,
    ) -> None:
        super().__init__()
        self._root = _Root(url, storage_options)
        self._fixed_step = _checked_step(step, "StokerWriter")
        self.persist_timeout_s = persist_timeout_s
        self.step: int | None = None
        """Step of the newest save that this writer began."""
        self._start_run()

    def _start_run(self) -> None:
        self._run_id = uuid.uuid4().hex
        self._term: int | None = None
        self._asked_step: int | None = None
        self._wanted_step: int | None = None
        self._tries: dict[int, int] = {}
        self._plans: list[SavePlan] = []
        self._part: _Part | None = None
        self._arena_lock = threading.Lock()
        self._arena: Arena | None = None
        self._layout: StagedLayout | None = None
        self._free_arena: Callable[[], object] = lambda: None
        self.staged_layout: StagedLayouts | None = None
        """Set by a :class:`~stoker.checkpoint.staging.StokerStager` of this writer."""

    def __getstate__(self) -> dict[str, Any]:
        # Sent to another process (async_save in a process) it is another writer: with a run and an arena of its own.
        names = ("_root", "_fixed_step", "persist_timeout_s", "step", "_asked_step")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._start_run()
        self.__dict__.update(state)

    # ------------------------------------------------------------------------------------- what torch calls, in order

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a step."""
        return _STEP.fullmatch(str(checkpoint_id)) is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the step of the next save from `checkpoint_id`."""
        self._asked_step = None if checkpoint_id is None else _step_of(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Begin a save."""
        if not kwargs.get("use_collectives", True):
            raise UnsupportedError(
                "a step is committed by one rank for all",
                value="use_collectives=False",
                place="StokerWriter",
                hint="leave it out, or save with CheckpointManager, which uses no collectives",
            )
        self._part = None
        # Taken now: whatever becomes of this save, the next one does not have its checkpoint_id.
        self._wanted_step = self._fixed_step if self._asked_step is None else self._asked_step
        self._asked_step = None

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """`plan` as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On the coordinator: open the term, choose step and nonce, and tell every rank."""
        plans = self._whole_plans(plans)
        if self._term is None:
            opened = self._root.log.append(lambda head: open_record(head, self._run_id))
            self._term = opened.term
        head = self._root.log.head()
        step = self._wanted_step
        if step is None:
            newest = None if head is None else head.latest
            step = 0 if newest is None else newest + 1
        nth = self._tries.get(step, 0)
        self._tries[step] = nth + 1
        nonce = nonce_of(self._run_id, step, nth)
        # Raises now what the commit would raise after all bytes are written.
        commit_record(head, term=self._term, step=step, nonce=nonce, manifest_sha256="0" * 64)
        return [
            replace(
                plan,
                storage_data=_Assignment(step=step, nonce=nonce, run_id=self._run_id, rank=rank, world_size=len(plans)),
            )
            for rank, plan in enumerate(plans)
        ]

    def _whole_plans(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Plans with their items: a planner that caches leaves out those that did not change."""
        usable = [getattr(plan, "usable", True) for plan in plans]
        if not all(usable) and len(self._plans) != len(plans):
            raise UnsupportedError(
                "a planner that caches its plans needs the writer that saw them",
                place="StokerWriter",
                hint="make one writer and keep it for all saves",
            )
        self._plans = [plan if new else self._plans[i] for i, (plan, new) in enumerate(zip(plans, usable, strict=True))]
        return self._plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> TorchFuture[list[WriteResult]]:
        """Write this rank's blobs and, but for the coordinator, its fragment. Returns when they are durable."""
        assigned = plan.storage_data
        if not isinstance(assigned, _Assignment):
            raise ConfigError("a plan must come from the coordinator's writer", place="StokerWriter.write_data")
        self.step = assigned.step
        attempt = assigned.attempt(monotonic() + self.persist_timeout_s)
        encoded = {
            item.index.fqn: values.dumps(_lookup_object(planner, item.index), place=item.index.fqn)
            for item in plan.items
            if item.type == WriteItemType.BYTE_IO
        }
        tensors = [item for item in plan.items if item.type != WriteItemType.BYTE_IO]
        with self._arena_lock:
            written, blobs = self._write_blobs(attempt, tensors, planner)
        if attempt.rank == 0:
            self._part = _Part(attempt=attempt, written=written, blobs=blobs)
        else:
            fragment = _fragment(attempt, written, blobs, ())
            self._root.store.create(attempt.fragment_key(attempt.rank), fragment.to_bytes())
        results: TorchFuture[list[WriteResult]] = TorchFuture()
        results.set_result(
            [
                WriteResult(
                    index=item.index,
                    size_in_bytes=len(value) if (value := encoded.get(item.index.fqn)) is not None else _nbytes(item),
                    storage_data=_Entry(nonce=attempt.nonce, value=value),
                )
                for item in plan.items
            ]
        )
        return results

    def _write_blobs(
        self, attempt: Attempt, items: list[WriteItem], planner: SavePlanner
    ) -> tuple[list[WrittenChunk], list[BlobInfo]]:
        item_of: dict[tuple[str, tuple[int, ...]], WriteItem] = {}
        chunks = []
        for item in items:
            chunk = chunk_of(item)
            if chunk.nbytes or 0 in chunk.global_shape:  # an uneven shard may have got no rows
                item_of[chunk.name, chunk.offsets] = item
                chunks.append(chunk)

        def memory_of(piece: Piece) -> torch.Tensor:
            return _resolved(planner, item_of[piece.chunk.name, piece.chunk.offsets], piece.chunk)

        _check_shardings(planner, {chunk.name for chunk in chunks})
        found = None
        if self.staged_layout is not None:
            found = self.staged_layout(chunks, [_resolved(planner, item, chunk_of(item)) for item in item_of.values()])
        layout, let_go = (self._layout_for(attempt.rank, chunks), None) if found is None else found
        layout.arena.mark("FILLING", step=attempt.step, nonce=attempt.nonce)
        opened: Future[None] = Future()
        opened.set_result(None)  # the coordinator opened the term before it sent the plans
        with ThreadPoolExecutor(WRITE_THREADS, thread_name_prefix="stoker-write") as threads:
            blobs = BlobSave(
                layout,
                store=self._root.store,
                directory=attempt.directory,
                rank=attempt.rank,
                threads=threads,
                may_write=opened,
            )
            try:
                if let_go is None:
                    blobs.stage(memory_of, deadline=attempt.deadline)
                else:
                    blobs.write_staged()
                blobs.checksums_done(attempt.deadline)
                layout.arena.mark("FULL", step=attempt.step, nonce=attempt.nonce)
                infos = blobs.finish()
            finally:
                blobs.abort()
                if let_go is not None:
                    let_go()
        return blobs.written_chunks(), infos

    def _layout_for(self, rank: int, chunks: list[Chunk]) -> StagedLayout:
        if self._layout is not None and [piece.chunk for piece in self._layout.plan.mine] == chunks:
            return self._layout
        plan = plan_of_chunks(chunks)
        images = StagedLayout.images_of(plan)
        size_bytes = sum(image.size_bytes for image in images)
        self._layout = None
        if self._arena is None or self._arena.size_bytes != size_bytes:
            self.close()
            self._arena = Arena(root_id=root_id_of(self._root.store.url), rank=rank, size_bytes=size_bytes)
            self._free_arena = weakref.finalize(self, close_arena, self._arena, os.getpid())
        self._layout = StagedLayout(plan, images, self._arena)
        return self._layout

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the coordinator: write the documents of plain values, merge all ranks' fragments, commit."""
        part, self._part = self._part, None
        entries = {result.index.fqn: result.storage_data for of_rank in results for result in of_rank}
        if part is None or any(entry.nonce != part.attempt.nonce for entry in entries.values()):
            raise SaveFailed(
                "one save must end before the next one begins",
                place=repr(self._root),
                hint="wait for the future of async_save before the next save",
            )
        attempt, store = part.attempt, self._root.store
        states = []
        for path, document in _documents(metadata, entries).items():
            store.put(f"{attempt.directory}/{path}", document)
            digest = hashlib.sha256(document).hexdigest()
            states.append(StateInfo(path=path, size_bytes=len(document), sha256=digest))
        own = _fragment(attempt, part.written, part.blobs, states)
        store.create(attempt.fragment_key(attempt.rank), own.to_bytes())
        manifest = collect_fragments(store, attempt, own)
        write_manifest(store, attempt, manifest)
        term = cast(int, self._term)

        def transition(head: Record | None) -> Record:
            return commit_record(
                head, term=term, step=attempt.step, nonce=attempt.nonce, manifest_sha256=manifest.sha256
            )

        self._root.log.append(transition)

    # -------------------------------------------------------------------------------------------------------- the end

    @property
    def url(self) -> str:
        """The root."""
        return self._root.store.url

    def close(self) -> None:
        """Free the staging memory; the next save makes it anew. Happens by itself when the writer is dropped."""
        self._free_arena()
        self._free_arena = lambda: None
        self._arena = self._layout = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def close_arena(arena: Arena, pid: int) -> None:
    if os.getpid() == pid:  # a forked child holds a copy of the object, not of the arena
        arena.close()


def _lookup_object(planner: SavePlanner, index: MetadataIndex) -> Any:
    lookup = getattr(planner, "lookup_object", None)
    if lookup is None:
        raise UnsupportedError(
            "a planner must give plain values as objects, for no pickle is stored",
            value=type(planner).__name__,
            place=index.fqn,
            hint="derive it from torch's DefaultSavePlanner, or give it lookup_object(index)",
        )
    return lookup(index)


def chunk_of(item: WriteItem) -> Chunk:
    """The chunk that an item of a plan wants to be written."""
    data = item.tensor_data
    assert data is not None  # by the type of the item
    return Chunk(
        name=item.index.fqn,
        dtype=dtype_name(data.properties.dtype),
        shape=tuple(data.chunk.sizes),
        offsets=tuple(data.chunk.offsets),
        global_shape=tuple(data.size),
    )


def plan_of_chunks(chunks: Sequence[Chunk]) -> Plan:
    """The plan of a rank that writes just these chunks, each of them all of its part of a tensor."""
    pieces = [Piece(chunk=chunk, at=None, replicas=()) for chunk in chunks]
    return Plan(held=pieces, mine=pieces, signature=())


def _nbytes(item: WriteItem) -> int:
    return chunk_of(item).nbytes


def _check_shardings(planner: SavePlanner | LoadPlanner, names: Iterable[str]) -> None:
    """Refuse what torch's planners describe as rows that the rank does not have.

    They take a rank's part for a hyper-rectangle where its placements say it begins, which is wrong for some strided ones.
    """
    state: Mapping[str, Any] = getattr(planner, "state_dict", {})
    for name in names:
        tensor = state.get(name)
        if not isinstance(tensor, DTensor) or all(type(p).__name__ != "_StridedShard" for p in tensor.placements):
            continue
        real = [(piece.chunk.offsets, piece.chunk.shape) for piece in local_pieces(name, tensor, 1)]
        told = [(tuple(one.offsets), tuple(one.sizes)) for one in tensor.__create_chunk_list__()]
        if real != told:
            raise UnsupportedState(
                "torch's planner must know which rows a rank has",
                value=f"{list(tensor.placements)}, rows {real}, planned {told}",
                place=name,
                hint="CheckpointManager saves and restores this sharding",
            )


def _resolved(planner: SavePlanner, item: WriteItem, chunk: Chunk) -> torch.Tensor:
    tensor = planner.resolve_data(item)
    if not isinstance(tensor, torch.Tensor):
        raise UnsupportedState("a planner must resolve a tensor", value=type(tensor).__name__, place=chunk.name)
    found = (dtype_name(tensor.dtype), tuple(tensor.shape))
    if found != (chunk.dtype, chunk.shape):  # copy_ would convert and broadcast without a word
        raise UnsupportedState(
            f"a planner must resolve what it planned, {chunk.dtype}{list(chunk.shape)}",
            value=f"{found[0]}{list(found[1])}",
            place=chunk.name,
        )
    return tensor.detach()


def _fragment(
    attempt: Attempt, written: list[WrittenChunk], blobs: list[BlobInfo], states: "list[StateInfo] | tuple[()]"
) -> Fragment:
    return Fragment(
        rank=attempt.rank,
        world_size=attempt.world_size,
        host=socket.gethostname(),
        plan_hash="",  # after torch's planner has shared the work, ranks save different things
        held=[one.chunk for one in written],
        written=written,
        blobs=blobs,
        states=states,
    )


def _documents(metadata: Metadata, entries: Mapping[str, _Entry]) -> dict[str, bytes]:
    """The documents of a step by path: one for each item that the manager could have, one for all else."""
    paths: Mapping[str, tuple[str | int, ...]] = metadata.planner_data or {}
    leaves: dict[str, Any] = {}
    tensors: list[tuple[list[str | int], str]] = []
    for name, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, BytesStorageMetadata):
            leaves[name] = values.loads(cast(bytes, entries[name].value), place=name)
        else:
            leaves[name] = None
            tensors.append((list(paths.get(name, (name,))), name))
    tree = unflatten_state_dict(leaves, {name: paths.get(name, (name,)) for name in leaves})
    items = {key: value for key, value in tree.items() if key.isidentifier() and key.isascii() and len(key) <= 64}
    of_item: dict[str, list[Any]] = {key: [] for key in items}
    of_rest: list[Any] = []
    for path, name in tensors:
        if path[0] in items:
            of_item[str(path[0])].append([path[1:], name])
        else:
            of_rest.append([path, name])
    documents = {
        f"state/{key}.json": values.dumps({"kind": "value", "value": value, "tensors": of_item[key]}, place=key)
        for key, value in items.items()
    }
    rest = {key: value for key, value in tree.items() if key not in items}
    if rest:
        documents[_REST] = values.dumps({"kind": "value", "value": rest, "tensors": of_rest}, place="state dict")
    return documents


# --------------------------------------------------------------------------------------------------------------- reader


class StokerReader(StorageReader):
    """Reads a committed step with ``dcp.load``, into any sharding and world size. Every byte is verified.

    Args:
        url: the root.
        step: a committed step; None takes the newest at each load. A ``checkpoint_id`` in ``dcp.load`` goes before.
        storage_options: for the store.

    A step saved with :class:`~stoker.checkpoint.CheckpointManager` is read under the same dotted names: parameters as
    ``model.state_dict()`` names them, optimizer state as ``get_optimizer_state_dict`` does. State that each rank keeps
    for itself (:class:`~stoker.checkpoint.RngState`) is not among them.

    A tensor may have another dtype than the saved one: it is converted, as torch's own readers do.

    Raises, inside torch's ``CheckpointException``:
        NoCheckpoint: no committed step, or not that one (as the text of an AssertionError: torch wraps what a reader
            raises here).
        CorruptBlock, CorruptRecord: stored bytes are damaged.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        step: int | None = None,
        storage_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self._root = _Root(url, storage_options)
        self._fixed_step = _checked_step(step, "StokerReader")
        self._asked_step: int | None = None
        self.step: int | None = None
        """The step of the newest load."""
        self._nonce = ""
        self._reader: StepReader | None = None
        self._values: dict[str, Any] = {}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Whether it names a step."""
        return _STEP.fullmatch(str(checkpoint_id)) is not None

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Take the step of the next load from `checkpoint_id`."""
        self._asked_step = None if checkpoint_id is None else _step_of(checkpoint_id)

    # Without **kwargs, as in torch's own reader of safetensors: torch would call a reader that has them once more, for
    # the metadata of one rank, and report the failure twice.
    def read_metadata(self) -> Metadata:
        """What the step holds, in torch's terms.

        Raises:
            NoCheckpoint: no committed step, or not that one.
        """
        step = self._fixed_step if self._asked_step is None else self._asked_step
        self._asked_step = None
        store = self._root.store
        self.step, live, _ = resolve_step(self._root.log, step, store.url)
        self._nonce = live.nonce
        directory = step_directory(self.step, live.nonce)
        manifest = read_manifest(store, directory, live)
        self._reader = StepReader(store, directory, manifest)
        paths: dict[str, Any] = {name: (name,) for name in manifest.tensor_names}
        self._values = {}
        for path, parts in _documents_of(manifest.states).items():
            documents = [values.loads(self._reader.read_state(part), place=part) for part in parts]
            found, places = _flat_document(path, unite_documents(documents))
            self._values.update(found)
            paths.update(places)
        entries: dict[str, Any] = {name: _tensor_metadata(manifest, name) for name in manifest.tensor_names}
        entries.update((name, BytesStorageMetadata()) for name in self._values)
        return Metadata(state_dict_metadata=entries, planner_data=paths)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to do."""

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """`plan`, with the step that it was made for."""
        return replace(plan, storage_data=(self.step, self._nonce))

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """On the coordinator: refuse ranks that found different steps.

        Raises:
            ConfigError: a step was committed while the ranks looked for the newest one.
        """
        steps = sorted({plan.storage_data for plan in plans})
        if len(steps) > 1:
            raise ConfigError(
                "all ranks must load the same step",
                value=", ".join(f"{step} ({nonce})" for step, nonce in steps),
                place=repr(self._root),
                hint="name the step: a newer one was committed while the ranks looked for the newest",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> TorchFuture[None]:
        """Fill what the plan asks for. Each block of the files that is touched is read once and checked."""
        assert self._reader is not None  # read_metadata came first
        tensors = [item for item in plan.items if item.type == LoadItemType.TENSOR]
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                stream = io.BytesIO()
                torch.save(self._values[item.storage_index.fqn], stream)
                stream.seek(0)
                planner.load_bytes(item, stream)
        _check_shardings(planner, {item.dest_index.fqn for item in tensors})
        chunks: dict[str, dict[tuple[int, ...], WrittenChunk]] = {}
        boxes = []
        done: list[tuple[ReadItem, torch.Tensor, torch.Tensor]] = []
        for item in tensors:
            name = item.storage_index.fqn
            if name not in chunks:
                chunks[name] = {one.chunk.offsets: one for one in self._reader.manifest.chunks_of(name)}
            written = chunks[name][tuple(item.storage_index.offset or ())]
            box = _box_of(item, written.chunk)
            target = planner.resolve_tensor(item).detach()
            memory = target
            if dtype_name(target.dtype) != box.dtype:
                memory = torch.empty(box.shape, dtype=getattr(torch, box.dtype), device="cpu")
            boxes.append((box, memory))
            done.append((item, target, memory))
        read_boxes(self._reader, boxes)
        for item, target, memory in done:
            if memory is not target:
                target.copy_(memory)
            planner.commit_tensor(item, target)
        result: TorchFuture[None] = TorchFuture()
        result.set_result(None)
        return result


def _box_of(item: ReadItem, chunk: Chunk) -> Chunk:
    """The part of a written chunk that `item` wants, as a box of the tensor."""
    starts = zip(chunk.offsets, item.storage_offsets, strict=True)
    return replace(chunk, shape=tuple(item.lengths), offsets=tuple(offset + start for offset, start in starts))


def _tensor_metadata(manifest: Manifest, name: str) -> TensorStorageMetadata:
    info = manifest.tensor(name)
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=getattr(torch, info.dtype)),
        size=torch.Size(info.global_shape),
        chunks=[
            ChunkStorageMetadata(offsets=torch.Size(one.chunk.offsets), sizes=torch.Size(one.chunk.shape))
            for one in manifest.chunks_of(name)
        ],
    )


def _documents_of(states: Iterable[str]) -> dict[str, list[str]]:
    """The documents that are not one rank's alone: by the path of the whole one, its parts in the order of ranks."""
    found: dict[str, list[str]] = {}
    for path in sorted(states):
        if not _RANK_LOCAL.fullmatch(path):
            found.setdefault(_PART.sub(".json", path), []).append(path)
    return found


def _flat_document(path: str, document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, tuple[Any, ...]]]:
    """A document as torch's planner flattens it: plain values by dotted name, and where each name was."""
    value = document["value"]
    # Tensors are put in, so that torch finds the same leaves as in the tree that was saved; they hold nothing.
    tensor = torch.empty(0, device="meta")
    for place, _ in document["tensors"]:
        value = put_at(value, tuple(place), tensor)
    name = path.removeprefix("state/").removesuffix(".json")
    flat, paths = flatten_state_dict(value if path == _REST else {name: value})
    plain = {key: leaf for key, leaf in flat.items() if not _holds_tensor(leaf)}
    return plain, paths


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_holds_tensor, value))
    return isinstance(value, torch.Tensor)
