"""Which ranks have which tensors: found out once for each change of the tree, through the root, without a collective.

A DTensor's mesh says who has the same bytes, but for one: a layer that FSDP2 shards beside others that are tensor parallel
too has a mesh of its own on each of the parallel ranks. Of a plain tensor (a buffer, a step count, a model under
DistributedDataParallel) a rank knows nothing but its own; with pipeline stages the names differ. So when a rank's tree has
changed it leaves a note in the attempt's directory, named by a digest of its tree, and lists the notes of the
others. All digests equal, which is the rule, is all there is to know: no note is read. Otherwise one note of each digest
is, and a name is shared by the ranks that list it.

A rank whose tree did not change leaves no note, and what it had before counts; its fragment says that it has passed. Two
ranks that see different notes plan differently, which the exact-cover check of the commit refuses; the save after a
refused one asks again.
"""

import hashlib
import json
import logging
import re
import socket
from collections.abc import Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..errors import ConfigError, FormatError, SaveFailed, StoreError, UnsupportedState
from ..storage.store import ObjectStore
from .commit import Attempt, pauses, rank_failed, verdict_of
from .tree import Item, TreeView, part_path, state_path

__all__ = ["Holders", "Roster"]

logger = logging.getLogger(__name__)

_NOTE = re.compile(r"(\d{5,8})\.([0-9a-f]{32})\.note\.json")
Note = dict[str, Any]
"""``items``: by item, [name, dtype, shape] of each tensor, and of a DTensor [.., placements, number of its mesh];
``meshes``: the ranks of each, as nested lists; ``values``: by item, what besides tensors makes its document another one."""
Ranks: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Holders:
    """Who has what, as this rank knows it.

    Attributes:
        rank: this one.
        everyone: the ranks that have a plain tensor that is not in `of_tensor`, ascending.
        of_tensor: the ranks that have a plain tensor, where not all do.
        of_item: the ranks that have tensors of the same names in an item as this one, where not all do.
        meshes_of: the ranks of all meshes that have a DTensor, where there are several. Its shards are in the same places
            of each.
    """

    rank: int
    everyone: tuple[int, ...]
    of_tensor: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    of_item: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    meshes_of: Mapping[str, tuple[Ranks, ...]] = field(default_factory=dict, compare=False)

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """The ranks that have the plain tensor `name`, ascending."""
        return self.of_tensor.get(name, self.everyone)

    def path_of(self, item: Item) -> str:
        """Where the item's value document lies, whoever writes it."""
        if item.rank_local:
            return state_path(item.name, self.rank)
        ranks = self.of_item.get(item.name)
        return state_path(item.name) if ranks is None else part_path(item.name, ranks[0])

    def document_path(self, item: Item) -> str | None:
        """Where this rank writes the item's value document; None if another rank does."""
        if item.rank_local:
            return state_path(item.name, self.rank)
        ranks = self.of_item.get(item.name)
        if ranks is None:
            return state_path(item.name) if self.rank == 0 else None
        return part_path(item.name, self.rank) if self.rank == ranks[0] else None


# Guarantees: used by the thread that saves, but for forget(), which only sets a flag.
class Roster:
    """What the ranks of a job told each other about their trees.

    Args:
        replicas: the ranks that have the same plain tensors as this one, itself included; None asks.
    """

    def __init__(self, store: ObjectStore, *, rank: int, world_size: int, replicas: Collection[int] | None) -> None:
        self._store, self._rank, self._world_size = store, rank, world_size
        self._given: tuple[int, ...] | None = None
        if replicas is not None:
            self._given = tuple(sorted(set(replicas)))
            if rank not in self._given or not 0 <= self._given[0] <= self._given[-1] < world_size:
                raise ConfigError(
                    f"replicas are ranks in [0, {world_size}), this one ({rank}) among them",
                    value=list(replicas),
                    place="replicas",
                )
        self._asked_for: Any = None
        self._digests: dict[int, str] = {}
        self._notes: dict[str, Note] = {}
        self._holders: Holders | None = None
        self._stale = False
        self._left: str | None = None

    def forget(self) -> None:
        """Ask again at the next save: the last one failed, which may be because a rank knew too little."""
        self._stale = True

    def assumed(self) -> Holders:
        """Without asking: that all ranks have the same tree, or what they told last."""
        if self._holders is not None:
            return self._holders
        return Holders(rank=self._rank, everyone=tuple(range(self._world_size)))

    def holders(self, view: TreeView, signature: object, attempt: Attempt, may_write: Future[None]) -> Holders:
        """Who has what; asks the other ranks if `signature`, of this rank's tensors, is another than the last time.

        `may_write` must be done before anything may be written in the attempt's directory.

        Raises:
            SaveFailed: a rank reported a failure, or did not answer by the deadline; it is named.
        """
        if self._holders is not None and not self._stale and signature == self._asked_for:
            return self._holders
        if self._given is not None:
            everyone = self._given
            items = {} if len(everyone) == self._world_size else dict.fromkeys(view.items, everyone)
            self._holders = Holders(rank=self._rank, everyone=everyone, of_item=items)
        elif self._world_size == 1:
            self._holders = Holders(rank=0, everyone=(0,))
        else:
            self._holders = self._ask(view, attempt, may_write)
        self._asked_for, self._stale = signature, False
        return self._holders

    def clear(self, attempt: Attempt) -> None:
        """Remove the note that this rank left in `attempt`, which every rank has read once it is committed."""
        key, self._left = self._left, None
        if key is not None and key.startswith(f"{attempt.directory}/"):
            try:
                self._store.delete(key)
            except StoreError as error:
                logger.warning("could not remove a note: %s", error)

    def _ask(self, view: TreeView, attempt: Attempt, may_write: Future[None]) -> Holders:
        note = _note_of(view)
        data = json.dumps(note, separators=(",", ":")).encode()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        may_write.result()  # it has a deadline of its own
        self._left = _key(attempt, self._rank, digest)
        self._store.put(self._left, data)
        told = self._wait_for_notes(attempt)
        self._digests = {**self._digests, **told, self._rank: digest}
        self._notes[digest] = note
        for rank, other in sorted(told.items()):
            if other not in self._notes:
                key = _key(attempt, rank, other)
                self._notes[other] = _read_note(bytes(self._store.get(key)), other, self._store.place(key))
        self._notes = {other: self._notes[other] for other in set(self._digests.values())}
        return self._from_notes(digest)

    def _wait_for_notes(self, attempt: Attempt) -> dict[int, str]:
        """The digest of every other rank that left a note; returns when all others did, or have passed without one."""
        told: dict[int, str] = {}
        absent: list[int] = []
        for _ in pauses(attempt.deadline):
            there = {info.key for info in self._store.list(f"{attempt.directory}/frag/")}
            for key in there:
                match = _NOTE.fullmatch(key.rpartition("/")[2])
                if match is not None and int(match[1]) != self._rank:
                    told[int(match[1])] = match[2]
            others = [rank for rank in range(self._world_size) if rank not in (self._rank, *told)]
            absent = [rank for rank in others if rank not in self._digests or attempt.fragment_key(rank) not in there]
            if not absent:
                return told
            for rank in absent:
                if attempt.failure_key(rank) in there:
                    raise rank_failed(self._store, attempt, rank)
            verdict = verdict_of(self._store, attempt)
            if verdict is not None:
                raise verdict
        raise SaveFailed(
            "every rank must say by the deadline what it saves",
            value=f"ranks {absent} of {self._world_size} did not",
            place=self._store.place(attempt.directory),
            hint=f"seen from host {socket.gethostname()}; older steps are as they were; save again",
        )

    def _from_notes(self, own: str) -> Holders:
        everyone = tuple(range(self._world_size))
        if len(self._notes) == 1:
            return Holders(rank=self._rank, everyone=everyone)
        ranks_of: dict[str, list[int]] = {}
        for rank in everyone:
            ranks_of.setdefault(self._digests[rank], []).append(rank)
        of_tensor: dict[str, list[int]] = {}
        classes: dict[str, dict[str, list[int]]] = {}  # by item, then by its tensors: who has just those
        meshes: dict[str, dict[str, Ranks]] = {}
        placements: dict[str, set[str]] = {}
        for digest, ranks in ranks_of.items():
            note = self._notes[digest]
            for item, tensors in note["items"].items():
                names = _names(note, item)
                classes.setdefault(item, {}).setdefault(names, []).extend(ranks)
                for name, _, _, *sharded in tensors:
                    if not sharded:
                        of_tensor.setdefault(name, []).extend(ranks)
                        continue
                    table = note["meshes"][sharded[1]]
                    meshes.setdefault(name, {})[json.dumps(table)] = np.array(table, np.int64)
                    placements.setdefault(name, set()).add(sharded[0])
        for name, tables in meshes.items():
            if len(tables) > 1 and len(placements[name]) + len({table.shape for table in tables.values()}) > 2:
                raise UnsupportedState(
                    "a DTensor that is on several meshes must be sharded in the same way on each",
                    value="; ".join(sorted(placements[name])),
                    place=name,
                )
        mine = self._notes[own]
        return Holders(
            rank=self._rank,
            everyone=everyone,
            of_tensor={name: tuple(sorted(ranks)) for name, ranks in of_tensor.items() if len(ranks) < len(everyone)},
            of_item={
                item: tuple(sorted(classes[item][_names(mine, item)]))
                for item in mine["items"]
                if len(classes[item]) > 1
            },
            meshes_of={name: tuple(tables.values()) for name, tables in meshes.items() if len(tables) > 1},
        )


def _key(attempt: Attempt, rank: int, digest: str) -> str:
    return f"{attempt.directory}/frag/{rank:05d}.{digest}.note.json"


def _note_of(view: TreeView) -> Note:
    items: dict[str, list[list[Any]]] = {name: [] for name in view.items}
    meshes: dict[DeviceMesh, int] = {}
    for name, tensor in view.tensors.items():
        row: list[Any] = [name, str(tensor.dtype), list(tensor.shape)]
        if isinstance(tensor, DTensor):
            row += [str(tensor.placements), meshes.setdefault(tensor.device_mesh, len(meshes))]
        items[name.split(".", 1)[0]].append(row)
    values: dict[str, Any] = {}
    for item in view.items.values():
        if item.kind == "optimizer":
            values[item.name] = [group["params"] for group in item.value["param_groups"]]
        elif item.kind == "module":
            values[item.name] = list(item.value)
    return {"items": items, "meshes": [mesh.mesh.tolist() for mesh in meshes], "values": values}


def _names(note: Note, item: str) -> str:
    """Equal for ranks whose documents of `item` have the same names."""
    return json.dumps([note["values"].get(item), [row[:3] for row in note["items"][item]]])


def _read_note(data: bytes, digest: str, place: str) -> Note:
    if hashlib.blake2b(data, digest_size=16).hexdigest() != digest:
        raise FormatError("a note must have the digest that names it", value=f"{len(data)} bytes", place=place)
    note: Note = json.loads(data)
    return note
