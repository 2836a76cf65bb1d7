"""Which ranks save together: taken from torch.distributed, or told."""

import socket
import uuid
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from ..errors import ConfigError, RootNotShared, StokerError
from ..storage.store import ObjectStore

__all__ = ["Job"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of one training job, as seen by one rank.

    Attributes:
        rank, world_size: of this process.
        run_id: the same on every rank, another at each start.
        group: the gloo group that the few collectives use; None without torch.distributed and for one rank.
    """

    rank: int
    world_size: int
    run_id: str
    group: dist.ProcessGroup | None = None

    @classmethod
    def join(cls, store: ObjectStore, rank: int | None, world_size: int | None, run_id: str | None) -> "Job":
        """The job of this process; collective where a process group is initialised.

        Raises:
            ConfigError: too much or too little was given.
            RootNotShared: a rank does not see what rank 0 wrote to the store.
        """
        given = (rank, world_size, run_id)
        if dist.is_available() and dist.is_initialized():
            if given != (None, None, None):
                raise ConfigError("rank, world_size and run_id come from the process group", value=given, place="job")
            return cls._of_process_group(store)
        if given == (None, None, None):
            return cls(rank=0, world_size=1, run_id=uuid.uuid4().hex)
        if rank is None or world_size is None or run_id is None:
            raise ConfigError(
                "without a process group a job of several ranks passes rank, world_size and run_id",
                value=f"rank={rank}, world_size={world_size}, run_id={run_id!r}",
                place="job",
            )
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank must be in [0, {world_size})", value=rank, place="job")
        return cls(rank=rank, world_size=world_size, run_id=run_id)

    @classmethod
    def _of_process_group(cls, store: ObjectStore) -> "Job":
        rank, world_size = dist.get_rank(), dist.get_world_size()
        if world_size == 1:
            return cls(rank=0, world_size=1, run_id=uuid.uuid4().hex)
        # Never NCCL: the group that carries gradients must not wait for a disk.
        group = dist.group.WORLD if dist.get_backend() == "gloo" else dist.new_group(backend="gloo")
        job = cls(rank=rank, world_size=world_size, run_id=uuid.uuid4().hex, group=group)
        job = cls(rank=rank, world_size=world_size, run_id=job.from_rank_0(job.run_id), group=group)
        job._check_root_is_shared(store)
        return job

    def from_rank_0(self, value: Any) -> Any:
        """Rank 0's `value` on every rank; an error among the values is raised on all. `value` itself without a group."""
        if self.group is not None:
            box = [value]
            dist.broadcast_object_list(box, src=0, group=self.group)
            value = box[0]
        if isinstance(value, StokerError):
            raise value
        return value

    def of_all_ranks(self, value: Any) -> list[Any]:
        """Every rank's `value`, by rank; an error among them is raised on all. `value` alone without a group."""
        if self.group is None:
            values = [value]
        else:
            values = [None] * self.world_size
            dist.all_gather_object(values, value, group=self.group)
        for one in values:
            if isinstance(one, StokerError):
                raise one
        return values

    def _check_root_is_shared(self, store: ObjectStore) -> None:
        key = f"probe/{self.run_id}"
        self.from_rank_0(_error_of(lambda: store.put(key, b"seen by every rank")) if self.rank == 0 else None)
        seen = _error_of(lambda: store.head(key))
        everybody: list[StokerError | None] = [None] * self.world_size
        dist.all_gather_object(everybody, seen, group=self.group)
        if self.rank == 0:
            store.delete(key)
        blind = [rank for rank, error in enumerate(everybody) if error is not None]
        if blind:
            raise RootNotShared(
                "every rank must see the same root",
                value=f"ranks {blind} do not see what rank 0 wrote: {everybody[blind[0]]}",
                place=f"{store.url} on {socket.gethostname()}",
                hint="use a shared file system or an object store",
            )


def _error_of(act: Any) -> StokerError | None:
    """The error of `act`, to be sent to every rank instead of leaving them in a collective."""
    try:
        act()
    except StokerError as error:
        return error
    return None
