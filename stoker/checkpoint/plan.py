"""Who writes what: each rank plans its own chunks alone, and replicas share the work by one rule.

A rank has some boxes of each tensor; ranks that have the same ones (its *replica set*) split them: whole chunks go to the
least loaded rank, largest first, and only a chunk above the fair share is cut, along its first dimension. A buffer of a
module may differ between ranks that train on different batches, so it is never cut: the lowest replica writes it. Every
replica computes the same split from what it holds itself, so no message is needed; that they did agree is checked when
the fragments are merged, where every element must have been written exactly once.

Which ranks have the same DTensor follows from its mesh. Of a plain tensor somebody has to say (:mod:`.holders`).
"""

import heapq
from collections.abc import Collection, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..errors import UnsupportedError, UnsupportedState
from ._sharding import Split, boxes_of
from .blob import Chunk

__all__ = [
    "Piece",
    "Plan",
    "Signature",
    "dtype_name",
    "local_part",
    "local_pieces",
    "make_plan",
    "plan_signature",
    "share_out",
]


class Held(Protocol):
    """Who has what (:class:`.holders.Holders`)."""

    def ranks_of(self, name: str) -> tuple[int, ...]:
        """The ranks that have a plain tensor, ascending."""

    @property
    def meshes_of(self) -> Mapping[str, tuple[NDArray[np.int64], ...]]:
        """The ranks of all meshes that have a DTensor, where these are several."""


Signature: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """One chunk of a tensor that this rank holds. It names the tensor and holds none, so a plan can be kept.

    Attributes:
        chunk: name, dtype, shape and offsets.
        at: where it begins in this rank's own part of the tensor; None if it is all of that.
        replicas: global ranks that hold the same bytes, ascending.
    """

    chunk: Chunk
    at: tuple[int, ...] | None
    replicas: tuple[int, ...]

    def memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's live memory of the chunk, a view of any strides, given the tree's tensor of that name."""
        local = local_part(tensor)
        if self.at is None:
            return local
        return local[tuple(slice(start, start + size) for start, size in zip(self.at, self.chunk.shape, strict=True))]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a rank holds and which part of it this rank writes, in a stable order.

    Attributes:
        held: all chunks of this rank, after cutting.
        mine: those that this rank writes.
        signature: of what the plan was made from; see :func:`plan_signature`.
        settled: by tensor, the group of those that may well be the same in the next save; see :func:`.blob.plan_blobs`.
    """

    held: list[Piece]
    mine: list[Piece]
    signature: Signature
    settled: Mapping[str, str] = field(default_factory=dict)


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this process has of `tensor`, outside autograd."""
    # What to_local() gives without autograd. Entering no_grad for each tensor cost more than copying a small one.
    return (tensor._local_tensor if isinstance(tensor, DTensor) else tensor).detach()


def plan_signature(tensors: Mapping[str, torch.Tensor], *, rank: int, world_size: int) -> Signature:
    """Equal for two trees exactly if their plans are: names, shapes, dtypes, placements, meshes and ranks.

    Half a microsecond a tensor, where planning one costs some thirty. It keeps meshes alive and no tensor.
    """
    # A spec is made with its tensor and never changed: as long as the tensors are the same, comparing two signatures is
    # comparing pointers.
    facts = [tensor._spec if type(tensor) is DTensor else _facts(tensor) for tensor in tensors.values()]
    return rank, world_size, tuple(tensors), tuple(facts)


def _facts(tensor: torch.Tensor) -> Any:
    return tensor._spec if isinstance(tensor, DTensor) else (tensor.shape, tensor.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


class _Mesh:
    """This rank's place in a device mesh, looked up once for all tensors on it."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.sizes: tuple[int, ...] = tuple(mesh.shape)
        coordinate = mesh.get_coordinate()
        self.coordinate = None if coordinate is None else tuple(coordinate)
        self._ranks = mesh.mesh.numpy()
        self._replicas: dict[tuple[bool, ...], tuple[int, ...]] = {}

    def replicas(self, sharded: tuple[bool, ...], meshes: tuple[NDArray[np.int64], ...] | None) -> tuple[int, ...]:
        """The ranks that differ from this one along dimensions that do not shard, ascending; of all `meshes` if given."""
        assert self.coordinate is not None
        index = tuple(at if cut else slice(None) for cut, at in zip(sharded, self.coordinate, strict=True))
        if meshes is not None:
            return tuple(sorted(int(rank) for ranks in meshes for rank in ranks[index].reshape(-1)))
        found = self._replicas.get(sharded)
        if found is None:
            found = self._replicas[sharded] = tuple(sorted(self._ranks[index].reshape(-1).tolist()))
        return found


def _split_of(placement: Any, parts: int, place: int, name: str) -> tuple[int, Split] | None:
    """The dimension that one mesh dimension splits, and how; None if it replicates the tensor."""
    kind = type(placement)
    if kind is Replicate:
        return None
    if kind is Shard:
        return placement.dim, Split(parts, place)
    # By name: the class is private and was a subclass of Shard in torch 2.6, and is not in 2.13.
    if kind.__name__ == "_StridedShard":
        return placement.dim, Split(parts, place, int(placement.split_factor))
    if isinstance(placement, Partial):
        raise UnsupportedError(
            "a tensor must not be a pending sum",
            value=str(placement),
            place=name,
            hint="redistribute it to Replicate or Shard before saving",
        )
    raise UnsupportedError("tensors may be placed by Shard and Replicate", value=kind.__name__, place=name)


def local_pieces(
    name: str,
    tensor: torch.Tensor,
    world_size: int,
    *,
    held: Held | None = None,
    meshes: dict[DeviceMesh, _Mesh] | None = None,
) -> Iterator[Piece]:
    """The chunks of `tensor` that this process holds: none, one, or several where its part is no hyper-rectangle.

    A plain tensor counts as replicated on the ranks that `held` tells, every rank by default. `meshes` keeps what was
    looked up between calls.

    Raises:
        UnsupportedError: a partial sum, or a placement that is neither Shard nor Replicate.
        UnsupportedState: the memory of a DTensor has another shape than its placements say.
    """
    dtype, shape = dtype_name(tensor.dtype), tuple(tensor.shape)
    if not isinstance(tensor, DTensor):
        chunk = Chunk(name=name, dtype=dtype, shape=shape, offsets=(0,) * len(shape), global_shape=shape)
        everyone = tuple(range(world_size))
        yield Piece(chunk=chunk, at=None, replicas=everyone if held is None else held.ranks_of(name))
        return
    known = {} if meshes is None else meshes
    mesh = known.get(tensor.device_mesh)
    if mesh is None:
        mesh = known[tensor.device_mesh] = _Mesh(tensor.device_mesh)
    if mesh.coordinate is None:  # this rank is no member of the tensor's mesh
        return
    splits: list[list[Split]] = [[] for _ in shape]
    sharded = []
    for placement, parts, place in zip(tensor.placements, mesh.sizes, mesh.coordinate, strict=True):
        found_split = _split_of(placement, parts, place, name)
        sharded.append(found_split is not None)
        if found_split is not None:
            splits[found_split[0]].append(found_split[1])
    replicas = mesh.replicas(tuple(sharded), None if held is None else held.meshes_of.get(name))
    if 0 in shape:  # nothing to share; one of the ranks lists it
        if all(split.place == 0 for of_dimension in splits for split in of_dimension):
            chunk = Chunk(name=name, dtype=dtype, shape=shape, offsets=(0,) * len(shape), global_shape=shape)
            yield Piece(chunk=chunk, at=None, replicas=replicas)
        return
    local_shape = tuple(local_part(tensor).shape)
    if 0 in local_shape:  # an uneven shard that got no rows
        return
    boxes = boxes_of(shape, [tuple(of_dimension) for of_dimension in splits], local_shape)
    if boxes is None:
        raise UnsupportedState(
            f"a rank's part of a tensor of shape {list(shape)} must be what {list(tensor.placements)} make of it",
            value=f"{list(local_shape)} on mesh coordinate {list(mesh.coordinate)} of {list(mesh.sizes)}",
            place=name,
            hint="DTensor.from_local needs shape= and stride= where shards are uneven",
        )
    for box in boxes:
        chunk = Chunk(name=name, dtype=dtype, shape=box.shape, offsets=box.offsets, global_shape=shape)
        yield Piece(chunk=chunk, at=None if len(boxes) == 1 else box.at, replicas=replicas)


def make_plan(
    tensors: Mapping[str, torch.Tensor],
    *,
    rank: int,
    world_size: int,
    held: Held | None = None,
    buffers: Collection[str] = frozenset(),
    settled: Mapping[str, str] = MappingProxyType({}),
) -> Plan:
    """Plan a save of `tensors` (name to live tensor) for this rank. Deterministic; reads no data.

    `held` says who has what besides what meshes say, by default every rank all plain tensors; tensors named in `buffers` are written whole by their lowest replica.
    """
    meshes: dict[DeviceMesh, _Mesh] = {}
    pieces = (
        (piece, name in buffers)
        for name, tensor in tensors.items()
        for piece in local_pieces(name, tensor, world_size, held=held, meshes=meshes)
    )
    of_rank, mine = share_out(pieces, rank, settled)
    signature = plan_signature(tensors, rank=rank, world_size=world_size)
    return Plan(held=of_rank, mine=mine, signature=signature, settled=settled)


def share_out(
    pieces: Iterable[tuple[Piece, bool]], rank: int, settled: Container[str] = ()
) -> tuple[list[Piece], list[Piece]]:
    """(what `rank` holds after cutting, what it writes) of its pieces, each given with whether it must stay whole.

    Every replica comes to the same cuts and the same writers from the same pieces. What is `settled` is shared for
    itself: most saves write only the rest of it, which is to be even then, too.
    """
    groups: dict[tuple[tuple[int, ...], bool], tuple[list[Piece], list[Piece]]] = {}
    for piece, of_lowest in pieces:
        groups.setdefault((piece.replicas, piece.chunk.name in settled), ([], []))[of_lowest].append(piece)
    held: list[Piece] = []
    mine: list[Piece] = []
    for (replicas, _), (shared, whole) in groups.items():
        of_lowest_bytes = sum(piece.chunk.nbytes for piece in whole)
        shared = list(_cut(shared, len(replicas)))
        held += shared
        held += whole
        writers = _share(shared, replicas, of_lowest_bytes)
        mine += [piece for piece, writer in zip(shared, writers, strict=True) if writer == rank]
        if rank == replicas[0]:
            mine += whole
    return held, mine


def _cut(pieces: Iterable[Piece], num_replicas: int) -> Iterator[Piece]:
    """Cut what is larger than one replica's share into as many pieces as make it fit, by whole rows."""
    pieces = list(pieces)
    share = sum(piece.chunk.nbytes for piece in pieces) / num_replicas
    for piece in pieces:
        rows = piece.chunk.shape[0] if piece.chunk.shape else 1
        if num_replicas == 1 or piece.chunk.nbytes <= share or rows < 2:
            yield piece
            continue
        at = piece.at or (0,) * len(piece.chunk.shape)
        step = -(-rows // num_replicas)
        for start in range(0, rows, step):
            chunk = replace(
                piece.chunk,
                shape=(min(step, rows - start), *piece.chunk.shape[1:]),
                offsets=(piece.chunk.offsets[0] + start, *piece.chunk.offsets[1:]),
            )
            yield Piece(chunk=chunk, at=(at[0] + start, *at[1:]), replicas=piece.replicas)


def _share(pieces: list[Piece], replicas: tuple[int, ...], of_lowest_bytes: int) -> list[int]:
    """The writer of each piece: largest first to the least loaded rank (Graham's LPT rule, 1969)."""
    if len(replicas) == 1:
        return [replicas[0]] * len(pieces)
    writers = [0] * len(pieces)
    loads = [(of_lowest_bytes if rank == replicas[0] else 0, rank) for rank in replicas]
    heapq.heapify(loads)
    order = sorted(
        range(len(pieces)), key=lambda i: (-pieces[i].chunk.nbytes, pieces[i].chunk.name, pieces[i].chunk.offsets)
    )
    for i in order:
        load, rank = heapq.heappop(loads)
        writers[i] = rank
        heapq.heappush(loads, (load + pieces[i].chunk.nbytes, rank))
    return writers
