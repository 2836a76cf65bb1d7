"""What four ranks do under torchrun in test_layouts_torchrun: save every layout at 1 to 4 ranks, restore each into each.

``python -m torch.distributed.run --nproc-per-node 4 -m tests.checkpoint.layout_ranks ROOT``

A job of fewer ranks is a process group of its own, of the first ranks. What a rank must hold is never computed from
placements: a second model with the expected values is sharded by torch in the same way, and the local parts are compared.
"""

import os
import sys
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch import nn
from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard

from stoker.checkpoint import CheckpointManager, RngState
from stoker.checkpoint.dcp import StokerReader, StokerWriter
from stoker.errors import UnsupportedState

dcp: Any = torch.distributed.checkpoint  # its functions are not declared as exported

STEP = 3
WORLD_SIZES = (1, 2, 3, 4)
LAYOUTS = ("ddp", "fsdp2", "tp", "hsdp", "fsdp2_tp", "pipeline")
_SQUARES = {1: (1, 1), 2: (1, 2), 3: (3, 1), 4: (2, 2)}
_MOMENTS = ("exp_avg", "exp_avg_sq")


class Model(nn.Module):
    """Rows that divide by no number of ranks, a layer with fewer rows than ranks, a buffer and tied weights."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(5, 7)
        self.down = nn.Linear(7, 3, bias=False)
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 2, bias=False)
        self.tied = nn.Linear(3, 2, bias=False)
        self.tied.weight = self.head.weight
        for tensor in (*self.parameters(), self.norm.running_mean, self.norm.running_var):
            assert tensor is not None
            nn.init.normal_(tensor)


@cache
def mesh_of(shape: tuple[int, ...], names: tuple[str, ...]) -> DeviceMesh:
    """One for each shape: every new one connects the ranks anew."""
    return init_device_mesh("cpu", shape, mesh_dim_names=names)


def _stage(world_size: int) -> int:
    return 0 if dist.get_rank() < world_size // 2 else 1


def shard(model: "Model", layout: str, world_size: int) -> nn.Module:
    """`model` in one of :data:`LAYOUTS`."""
    if layout == "pipeline":  # plain tensors, and other ones on each half of the ranks
        for name in () if world_size == 1 else ("norm", "head", "tied") if _stage(world_size) == 0 else ("up", "down"):
            delattr(model, name)
        return model
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(model) if world_size > 1 else model
    height, width = _SQUARES[world_size]
    if layout in ("tp", "fsdp2_tp"):
        names = ("dp", "tp")
        mesh = mesh_of((1, world_size) if layout == "tp" else (height, width), names)
        # Columns of `up` are its rows: where FSDP2 shards too, both split one dimension.
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        if layout == "tp":
            return model
        mesh = mesh["dp"]
    elif layout == "hsdp":
        mesh = mesh_of((height, width), ("replicate", "shard"))
    else:
        mesh = mesh_of((world_size,), ("shard",))
    for layer in (model.up, model.down, model):
        fully_shard(layer, mesh=mesh)
    return model


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part, a copy."""
    with torch.no_grad():
        return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().clone()


def bare(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel."""
    inner: nn.Module = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    return inner


def tree_of(layout: str, world_size: int, seed: int, *, trained: bool) -> dict[str, Any]:
    """A model of that seed, sharded, and its optimizer: with the state of :func:`moments`, or without any."""
    model = shard(Model(seed), layout, world_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01 * (seed + 1))
    if trained:
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            optimizer.param_groups[0]["lr"] = 0.0  # the step is taken for its state alone
            optimizer.step()
            optimizer.param_groups[0]["lr"] = 0.01 * (seed + 1)
        for key, carrier in moments(layout, world_size, seed).items():
            for parameter, source in zip(model.parameters(), carrier, strict=True):
                state = optimizer.state[parameter][key]
                with torch.no_grad():
                    (state.to_local() if isinstance(state, DTensor) else state).copy_(source)
    extra = {"rows": rows(layout, world_size, seed)}
    return {"model": model, "optimizer": optimizer, "rng": RngState(), "extra": extra, "progress": {"seed": seed}}


def rows(layout: str, world_size: int, seed: int) -> torch.Tensor:
    """A tensor of which no rank has a hyper-rectangle: FSDP2's placements the other way round."""
    full = torch.arange(32.0).view(16, 2) + seed
    if layout != "fsdp2_tp":
        return full
    return distribute_tensor(
        full, mesh_of(_SQUARES[world_size], ("dp", "tp")), [Shard(0), _StridedShard(0, split_factor=2)]
    )


def moments(layout: str, world_size: int, seed: int) -> dict[str, list[torch.Tensor]]:
    """The optimizer's state by name, as the local parts of models that have it for their weights."""
    return {
        key: [local(parameter) for parameter in shard(Model(100 * seed + i + 7), layout, world_size).parameters()]
        for i, key in enumerate(_MOMENTS)
    }


def full_tensors(seed: int) -> dict[str, torch.Tensor]:
    """All that a step of that seed holds, whole, under the names it is stored by."""
    found = {f"model.{name}": tensor.detach() for name, tensor in Model(seed).state_dict().items()}
    for i, key in enumerate(_MOMENTS):
        found |= {f"optimizer.state.{n}.{key}": p.detach() for n, p in Model(100 * seed + i + 7).named_parameters()}
    found["extra.rows"] = torch.arange(32.0).view(16, 2) + seed
    found |= {f"optimizer.state.{name}.step": torch.tensor(1.0) for name, _ in Model(seed).named_parameters()}
    return found


def seed_of(layout: str, world_size: int) -> int:
    """Another one for each step, so that none passes for another."""
    return 1 + 10 * world_size + LAYOUTS.index(layout)


def save(root: Path, world_size: int) -> None:
    """Save each layout under a root of its own."""
    for layout in LAYOUTS:
        tree = tree_of(layout, world_size, seed_of(layout, world_size), trained=True)
        with CheckpointManager(root / f"{layout}-{world_size}") as ckpt:
            ckpt.save(STEP, tree).wait("committed", timeout_s=60)


def restore(root: Path, world_size: int) -> None:
    """Restore what other world sizes, and other layouts, saved, and compare every bit of what this rank holds."""
    for old_size, old_layout, layout in pairs(world_size):
        seed = seed_of(old_layout, old_size)
        tree = tree_of(layout, world_size, 0, trained=old_size % 2 == 0)
        with CheckpointManager(root / f"{old_layout}-{old_size}") as ckpt:
            ckpt.restore(tree)
        expected = tree_of(layout, world_size, seed, trained=True)
        where = f"{old_layout} of {old_size} ranks into {layout} of {world_size}"
        mine, theirs = (bare(one["model"]).state_dict() for one in (tree, expected))
        for name, tensor in theirs.items():
            assert torch.equal(local(mine[name]), local(tensor)), f"{where}: {name}"
        for a, b in zip(bare(tree["model"]).parameters(), bare(expected["model"]).parameters(), strict=True):
            for key, value in expected["optimizer"].state[b].items():
                found = tree["optimizer"].state[a][key]
                assert type(found) is type(value) and torch.equal(local(found), local(value)), f"{where}: {key}"
        assert tree["optimizer"].param_groups[0]["lr"] == 0.01 * (seed + 1), where
        assert torch.equal(local(tree["extra"]["rows"]), local(expected["extra"]["rows"])), where
        assert tree["progress"] == {"seed": seed}, where


def refuse(root: Path) -> None:
    """torch's planners take the rows of :func:`rows` for others: nothing is loaded into them, nor committed."""
    state = {"extra": {"rows": rows("fsdp2_tp", 4, 0)}}
    before = local(state["extra"]["rows"])
    for kind, work in (
        (UnsupportedState, partial(dcp.load, state, storage_reader=StokerReader(root / "ddp-4"))),
        (Exception, partial(dcp.save, state, storage_writer=StokerWriter(root / "dcp"))),
    ):
        try:
            work()
        except CheckpointException as error:
            assert all(isinstance(failed[0], kind) for failed in error.failures.values()), error
        else:
            raise AssertionError("rows that torch takes for others were saved or loaded")
    assert torch.equal(local(state["extra"]["rows"]), before)


def pairs(world_size: int) -> Iterator[tuple[int, str, str]]:
    """(old world size, old layout, new layout): every old world size and layout, each into another one in turn."""
    for old_size in WORLD_SIZES:
        for i, old in enumerate(LAYOUTS):
            yield old_size, old, LAYOUTS[(i + old_size + 2 * world_size) % len(LAYOUTS)]


def main(root: Path) -> None:
    """Each world size saves; then each restores what all have saved."""
    rank, port = int(os.environ["RANK"]), int(os.environ["MASTER_PORT"])
    store = TCPStore("localhost", port, is_master=False)
    for act in (save, restore):
        for world_size in WORLD_SIZES:
            if rank < world_size:
                prefix = PrefixStore(f"{act.__name__}-{world_size}", store)
                dist.init_process_group("gloo", store=prefix, rank=rank, world_size=world_size)
                act(root, world_size)
                if (act, world_size) == (restore, 4):
                    refuse(root)
                dist.barrier()
                mesh_of.cache_clear()
                dist.destroy_process_group()
        # The smaller jobs must have saved before a larger one restores.
        store.add(f"{act.__name__}-done", 1)
        while int(store.add(f"{act.__name__}-done", 0)) < WORLD_SIZES[-1]:
            store.wait([f"{act.__name__}-done"])
    # All is checked. Torn down under load, gloo's threads were once seen to abort the process, which proves nothing here.
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
