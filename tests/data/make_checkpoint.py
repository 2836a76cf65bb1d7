"""Write the golden checkpoint: ``python tests/data/make_checkpoint.py [directory]``.

Two steps of a job of two ranks, in threads: tensors of many dtypes, one of them cut unevenly between the ranks, a scalar,
an empty one, plain values of every kind, and a document for each rank. ``expected.json`` beside the steps holds every
tensor's bytes, so that it can be checked without this package.
"""

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from stoker.checkpoint import CheckpointManager

GOLDEN = Path(__file__).parent / "checkpoint-v1"
STEPS = (10, 20)
WORLD_SIZE = 2


class PerRank:
    """State that each rank keeps for itself."""

    rank_local = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def state_dict(self) -> dict[str, Any]:
        return {"rank": self.rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rank = state["rank"]


def tensors(step: int) -> dict[str, torch.Tensor]:
    """The tensors of a step; two thirds of the bytes are those of ``embed``, so that its five rows are cut into 3 and 2."""
    return {
        "embed": torch.arange(40.0).view(5, 8) + step,
        "scalar": torch.tensor(step),
        "empty": torch.empty(0, 3),
        "bf16": torch.tensor([1.0, -2.5, float("inf"), 3e-38]).bfloat16(),
        "fp16": torch.tensor([[0.5, 65504.0]], dtype=torch.float16),
        "fp8_e4m3": torch.tensor([1.0, -448.0, 0.015625]).to(torch.float8_e4m3fn),
        "fp8_e5m2": torch.tensor([1.0, 57344.0]).to(torch.float8_e5m2),
        "flags": torch.tensor([True, False, True]),
        "bytes": torch.tensor([0, 255], dtype=torch.uint8),
        "wide": torch.tensor([1 / 3], dtype=torch.float64),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
        "layers.0.weight": torch.tensor([[1, -1]], dtype=torch.int32),
    }


def plain(step: int) -> dict[str, Any]:
    """Plain values of every kind that JSON does not have by itself."""
    return {
        "step": step,
        "big": 2**70,
        "rate": float("inf"),
        "none": None,
        "raw": b"\x00\xff",
        "pair": (1, "two"),
        "by_number": {0: 0.1, 1: 0.2},
        "counts": Counter(a=2),
        "array": np.arange(3, dtype=np.int16),
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
    }


def tree(step: int, rank: int) -> dict[str, Any]:
    """What rank `rank` saves at `step`."""
    return {"model": tensors(step), "progress": plain(step), "mine": PerRank(rank)}


def write(directory: Path) -> None:
    """Write the checkpoint below `directory`."""

    def save(rank: int) -> None:
        with CheckpointManager(directory, rank=rank, world_size=WORLD_SIZE, run_id="golden") as ckpt:
            for step in STEPS:
                ckpt.save(step, tree(step, rank), metrics={"loss": 1 / step, "grad_norm": float("nan")}).wait()

    # The host's name goes into the fragments.
    with mock.patch("socket.gethostname", return_value="golden"), ThreadPoolExecutor(WORLD_SIZE) as threads:
        for _ in threads.map(save, range(WORLD_SIZE)):
            pass
    expected = {
        str(step): {
            f"model.{name}": {
                "dtype": str(tensor.dtype).removeprefix("torch."),
                "shape": list(tensor.shape),
                "bytes": tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex(),
            }
            for name, tensor in tensors(step).items()
        }
        for step in STEPS
    }
    (directory / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
