"""Which rank of how many this process is, as far as data is concerned."""

import logging
from typing import TYPE_CHECKING

import torch.distributed

from ..errors import ConfigError, UnsupportedError
from ._numbers import whole

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["place_in_group"]

logger = logging.getLogger(__name__)

_PLACE = "TokenLoader"
_DATA_PARALLEL = ("dp", "dp_replicate", "dp_shard")


def place_in_group(rank: int | None, world_size: int | None, mesh: "DeviceMesh | None") -> tuple[int, int]:
    """The rank and the world size of the data-parallel group: as given, or from `mesh`, or 0 of 1.

    Raises:
        ConfigError: half of the two, both and a mesh, out of range, or a process outside the mesh.
        UnsupportedError: a mesh that does not tell its data-parallel dimensions.
    """
    if mesh is not None:
        if rank is not None or world_size is not None:
            raise ConfigError("mesh says what rank and world_size are: give the one or the others", place=_PLACE)
        return _place_in_mesh(mesh)
    if (rank is None) != (world_size is None):
        given = "rank" if world_size is None else "world_size"
        raise ConfigError(
            "rank and world_size belong together", value=f"only {given}", place=_PLACE, hint="give both or neither"
        )
    if rank is None or world_size is None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            logger.warning("TokenLoader without rank= and world_size= gives every rank the same rows")
        return 0, 1
    rank, world_size = whole("rank", rank, place=_PLACE), whole("world_size", world_size, place=_PLACE, least=1)
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank must be in [0, world_size = {world_size})", value=rank, place=_PLACE)
    return rank, world_size


def _place_in_mesh(mesh: "DeviceMesh") -> tuple[int, int]:
    names = mesh.mesh_dim_names
    dims = [0] if names is None else [i for i, name in enumerate(names) if name in _DATA_PARALLEL]
    if not dims or (names is None and mesh.ndim > 1):
        raise UnsupportedError(
            f"the data-parallel dimensions of a mesh are those named {', '.join(_DATA_PARALLEL)}",
            value=f"mesh_dim_names={names}, ndim={mesh.ndim}",
            place=_PLACE,
            hint="name them so, or pass rank= and world_size=",
        )
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        raise ConfigError("this process must belong to the mesh", place=_PLACE)
    rank, world_size = 0, 1
    for dim in dims:
        rank = rank * mesh.size(dim) + coordinate[dim]
        world_size *= mesh.size(dim)
    return rank, world_size
