"""What each of two ranks does under torchrun in test_dcp: save DTensors, then load what one process saved."""

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from stoker.checkpoint.dcp import StokerReader, StokerWriter
from stoker.checkpoint.staging import StokerStager
from stoker.errors import UnsupportedState

dcp: Any = torch.distributed.checkpoint  # its functions are not declared as exported


def full_state() -> dict[str, torch.Tensor]:
    """What every job of the test holds, as full tensors: even, uneven, replicated, sharded by column, empty, scalar."""
    return {
        "even": torch.arange(24.0).view(6, 4),
        "uneven": torch.arange(15).view(5, 3),
        "one_row": torch.arange(4.0).view(1, 4).bfloat16(),
        "columns": torch.arange(14.0).view(2, 7),
        "replica": torch.arange(7.0),
        "empty": torch.empty(0, 3),
        "plain": torch.tensor(5),
    }


def main(root: Path) -> None:
    """Save to ``root/two``, load from ``root/one``, fail on one rank, save again."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    placements: dict[str, Any] = {"columns": Shard(1), "replica": Replicate()}

    def sharded(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            name: tensor if name == "plain" else distribute_tensor(tensor, mesh, [placements.get(name, Shard(0))])
            for name, tensor in tensors.items()
        }

    with StokerWriter(root / "two") as writer:
        dcp.save({"model": sharded(full_state()), "epoch": 3, "lr": {"base": 0.5}}, storage_writer=writer)
        try:
            dcp.save({"model": sharded(full_state()), "bad": object()}, storage_writer=writer)
        except CheckpointException as error:
            # torch's planner gives a plain value to one rank; every rank hears of its failure.
            assert [type(failed[0]) for failed in error.failures.values()] == [UnsupportedState], error
        else:
            raise AssertionError("a value that can't be saved was saved")
        dcp.save({"model": sharded(full_state()), "epoch": 4, "lr": {"base": 0.5}}, storage_writer=writer)
        assert writer.step == 1, writer.step

    with StokerWriter(root / "staged") as writer, StokerStager(writer) as stager:
        state = {"model": sharded(full_state()), "epoch": 0}
        for epoch in (1, 2):
            state["epoch"] = epoch
            future = dcp.async_save(state, storage_writer=writer, async_stager=stager)
            for tensor in state["model"].values():  # type: ignore[attr-defined]
                (tensor.to_local() if isinstance(tensor, DTensor) else tensor).add_(1)
            future.result()
            # What both ranks hold was given to one of them, as the other's stager knows from the second save on.
            assert epoch == 1 or writer._arena is None, writer._arena
            writer.close()

    state = {"model": sharded({name: torch.zeros_like(t) for name, t in full_state().items()}), "epoch": 0}
    dcp.load(state, storage_reader=StokerReader(root / "one"))
    for name, tensor in full_state().items():
        loaded = state["model"][name]  # type: ignore[index]
        full = loaded.full_tensor() if isinstance(loaded, DTensor) else loaded
        assert torch.equal(full, tensor), name
    assert state["epoch"] == 7
    dist.barrier()
    # All is checked. Torn down under load, gloo's threads were once seen to abort the process, which proves nothing here.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
