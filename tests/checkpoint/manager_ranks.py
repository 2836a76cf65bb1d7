"""What the ranks of a job do under torchrun in test_manager_torchrun: FSDP2, AdamW, one manager.

``python -m torch.distributed.run --nproc-per-node N -m tests.checkpoint.manager_ranks ACT ROOT [ACT ROOT ...]``
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stoker.checkpoint import CheckpointManager
from stoker.errors import SaveFailed

STEP = 6


def sharded_tree(seed: int) -> dict[str, Any]:
    """A model whose rows divide by no number of ranks, sharded by FSDP2, and its optimizer."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 1))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    return {"model": model, "optimizer": optimizer, "progress": {"seed": seed}}


def train(tree: dict[str, Any]) -> None:
    """Two steps, on the same data for every rank."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        tree["model"](torch.randn(4, 5, generator=generator)).square().sum().backward()
        tree["optimizer"].step()
        tree["optimizer"].zero_grad()


def full_tensors(tree: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Parameters and optimizer state, whole, on every rank."""
    found: dict[str, torch.Tensor] = dict(tree["model"].state_dict())
    names = {parameter: name for name, parameter in tree["model"].named_parameters()}
    for parameter, state in tree["optimizer"].state.items():
        found |= {f"{names[parameter]}/{key}": value for key, value in state.items()}
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
        for name, tensor in found.items()
    }


def save(root: Path) -> None:
    """Train, save one step, and leave what it holds beside it, as whole tensors."""
    tree = sharded_tree(0)
    train(tree)
    with CheckpointManager(root) as ckpt:
        ckpt.save(STEP, tree).wait("committed")
    whole = full_tensors(tree)
    if dist.get_rank() == 0:
        save_file(whole, root.with_suffix(".safetensors"))


def restore(root: Path) -> None:
    """Restore into a model and optimizer that know nothing of it, and compare every bit."""
    tree = sharded_tree(1)
    with CheckpointManager(root) as ckpt:
        report = ckpt.restore(tree)
    assert report.step == STEP
    assert tree["progress"] == {"seed": 0}
    assert tree["optimizer"].param_groups[0]["lr"] == 0.1
    expected, found = load_file(root.with_suffix(".safetensors")), full_tensors(tree)
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert any("exp_avg_sq" in name for name in found)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    train(tree)  # and it goes on


class Breaks:
    """State that one rank can't give."""

    rank_local = True

    def __init__(self, *, broken: bool) -> None:
        self.broken = broken

    def state_dict(self) -> dict[str, Any]:
        if self.broken:
            raise RuntimeError("the sampler lost its place")
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def fail(root: Path) -> None:
    """The last rank, then the first one, raises before its fragment; the others hear who it was; the next save works."""
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    tree = sharded_tree(0)
    with CheckpointManager(root) as ckpt:
        for step, broken in enumerate((last, 0)):
            tree["sampler"] = Breaks(broken=rank == broken)
            try:
                ckpt.save(step, tree).wait("committed", timeout_s=30)
            except RuntimeError as error:
                own = str(error) == "the sampler lost its place"
                assert own if rank == broken else isinstance(error, SaveFailed), error
                assert own or f"rank {broken}" in str(error), error
                assert own or "the sampler lost its place" in str(error), error
            else:
                raise AssertionError(f"rank {rank} thinks that step {step} was committed")
            assert ckpt.latest() is None
        tree["sampler"] = Breaks(broken=False)
        ckpt.save(STEP, tree).wait("committed", timeout_s=30)
        assert ckpt.steps() == [STEP]


def stop(root: Path) -> None:
    """One rank hears SIGTERM in the middle of training; all ranks save one and the same step, and stop."""
    tree = sharded_tree(0)
    with CheckpointManager(root, stop_on=[signal.SIGTERM], stop_margin=2) as ckpt:
        for step in range(100):
            train(tree)
            if (dist.get_rank(), step) == (dist.get_world_size() - 1, 3):
                signal.raise_signal(signal.SIGTERM)
            if ckpt.should_stop(step):
                ckpt.save(step, tree).wait("committed", timeout_s=30)
                break
        assert (step, ckpt.steps()) == (6, [6])


def main() -> None:
    """Do each act with its root, in order."""
    dist.init_process_group("gloo")
    acts = {"save": save, "restore": restore, "fail": fail, "stop": stop}
    for act, root in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        acts[act](Path(root))
        dist.barrier()
    # All is checked. Torn down under load, gloo's threads were once seen to abort the process, which proves nothing here.
    os._exit(0)


if __name__ == "__main__":
    main()
