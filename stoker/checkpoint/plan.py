"""Who writes what: each rank plans its own chunks alone, and replicas share the work by one rule.

A tensor is a set of hyper-rectangular chunks. A rank holds some of them; ranks that hold the same chunks (its *replica
set*) split them: whole chunks go to the least loaded rank, largest first, and only a chunk above the fair share is cut,
along its first dimension. Every replica computes the same split from what it holds itself, so no message is needed; that
they did agree is checked when the fragments are merged, where every held chunk must have been written exactly once.
"""

import hashlib
import heapq
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from ..errors import UnsupportedError
from .blob import Chunk

__all__ = ["Piece", "Plan", "dtype_name", "local_part", "local_pieces", "make_plan", "plan_signature"]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """One chunk of a tensor that this rank holds. It names the tensor and holds none, so a plan can be kept.

    Attributes:
        chunk: name, dtype, shape and offsets.
        rows: the part ``[start, end)`` of the local tensor's first dimension; None for all of it.
        replicas: global ranks that hold the same bytes, ascending.
    """

    chunk: Chunk
    rows: tuple[int, int] | None
    replicas: tuple[int, ...]

    def memory(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's live memory of the chunk, a view of any strides, given the tree's tensor of that name."""
        local = local_part(tensor)
        return local if self.rows is None else local[self.rows[0] : self.rows[1]]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a rank holds and which part of it this rank writes, in a stable order.

    Attributes:
        held: all chunks of this rank, after cutting.
        mine: those that this rank writes.
        signature: of what the plan was made from; see :func:`plan_signature`.
    """

    held: list[Piece]
    mine: list[Piece]
    signature: bytes


def local_part(tensor: torch.Tensor) -> torch.Tensor:
    """The memory that this process has of `tensor`, outside autograd."""
    with torch.no_grad():
        return tensor.to_local().detach() if isinstance(tensor, DTensor) else tensor.detach()


def plan_signature(tensors: Mapping[str, torch.Tensor], *, rank: int, world_size: int) -> bytes:
    """Equal for two trees exactly if their plans are: names, shapes, dtypes, placements, meshes and ranks.

    A few microseconds a tensor, where planning a DTensor costs some fifty.
    """
    digest = hashlib.blake2b(repr((rank, world_size)).encode(), digest_size=16)
    for name, tensor in tensors.items():
        sharding = (tensor.placements, id(tensor.device_mesh)) if isinstance(tensor, DTensor) else None
        digest.update(repr((name, tuple(tensor.shape), tensor.dtype, sharding)).encode())
    return digest.digest()


def dtype_name(dtype: torch.dtype) -> str:
    """``torch.bfloat16`` as ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def local_pieces(name: str, tensor: torch.Tensor, world_size: int) -> Iterator[Piece]:
    """The chunks of `tensor` that this process holds: none, or one.

    A plain tensor counts as replicated on every rank.

    Raises:
        UnsupportedError: a sharding whose local part is no hyper-rectangle, or a partial sum.
    """
    dtype = dtype_name(tensor.dtype)
    if not isinstance(tensor, DTensor):
        shape = tuple(tensor.shape)
        chunk = Chunk(name=name, dtype=dtype, shape=shape, offsets=(0,) * len(shape), global_shape=shape)
        yield Piece(chunk=chunk, rows=None, replicas=tuple(range(world_size)))
        return
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for placement in tensor.placements:
        if isinstance(placement, Partial):
            raise UnsupportedError("a tensor must not be a pending sum", value=str(placement), place=name)
        if type(placement) not in (Shard, Replicate):
            raise UnsupportedError(
                "this version saves Shard and Replicate placements",
                value=type(placement).__name__,
                place=name,
                hint="FSDP2 together with tensor parallelism on one dimension comes later",
            )
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:  # this rank is no member of the tensor's mesh
        return
    shape, offsets = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if 0 in shape and 0 not in tensor.shape:  # an uneven shard that got no rows
        return
    index = tuple(
        slice(None) if isinstance(placement, Replicate) else at
        for placement, at in zip(placements, coordinate, strict=True)
    )
    replicas = tuple(sorted(int(rank) for rank in mesh.mesh[index].reshape(-1)))
    chunk = Chunk(name=name, dtype=dtype, shape=tuple(shape), offsets=tuple(offsets), global_shape=tuple(tensor.shape))
    yield Piece(chunk=chunk, rows=None, replicas=replicas)


def make_plan(tensors: Mapping[str, torch.Tensor], *, rank: int, world_size: int) -> Plan:
    """Plan a save of `tensors` (name to live tensor) for this rank. Deterministic; reads no data."""
    groups: dict[tuple[int, ...], list[Piece]] = {}
    for name, tensor in tensors.items():
        for piece in local_pieces(name, tensor, world_size):
            groups.setdefault(piece.replicas, []).append(piece)
    held: list[Piece] = []
    mine: list[Piece] = []
    for replicas, pieces in groups.items():
        pieces = list(_cut(pieces, len(replicas)))
        held += pieces
        mine += [piece for piece, writer in zip(pieces, _share(pieces, replicas), strict=True) if writer == rank]
    signature = plan_signature(tensors, rank=rank, world_size=world_size)
    return Plan(held=held, mine=mine, signature=signature)


def _cut(pieces: list[Piece], num_replicas: int) -> Iterator[Piece]:
    """Cut what is larger than one replica's share into as many pieces as make it fit, by whole rows."""
    share = sum(piece.chunk.nbytes for piece in pieces) / num_replicas
    for piece in pieces:
        rows = piece.chunk.shape[0] if piece.chunk.shape else 1
        if num_replicas == 1 or piece.chunk.nbytes <= share or rows < 2:
            yield piece
            continue
        step = -(-rows // num_replicas)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            chunk = replace(
                piece.chunk,
                shape=(end - start, *piece.chunk.shape[1:]),
                offsets=(piece.chunk.offsets[0] + start, *piece.chunk.offsets[1:]),
            )
            yield Piece(chunk=chunk, rows=(start, end), replicas=piece.replicas)


def _share(pieces: list[Piece], replicas: tuple[int, ...]) -> list[int]:
    """The writer of each piece: largest first to the least loaded rank (Graham's LPT rule, 1969)."""
    if len(replicas) == 1:
        return [replicas[0]] * len(pieces)
    writers = [0] * len(pieces)
    loads = [(0, rank) for rank in replicas]
    order = sorted(
        range(len(pieces)), key=lambda i: (-pieces[i].chunk.nbytes, pieces[i].chunk.name, pieces[i].chunk.offsets)
    )
    for i in order:
        load, rank = heapq.heappop(loads)
        writers[i] = rank
        heapq.heappush(loads, (load + pieces[i].chunk.nbytes, rank))
    return writers
