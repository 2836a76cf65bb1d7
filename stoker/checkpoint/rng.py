"""The random states of Python, NumPy and torch as one stateful item of a tree."""

import hashlib
import random
from typing import Any

import numpy as np
import torch

__all__ = ["RngState"]


class RngState:
    """Saves and restores the global generators of ``random``, ``numpy.random``, torch and the accelerator.

    Every rank keeps its own document (``rank_local``). Restored at another world size, a rank below the old one takes
    its own old state; any other derives a new one from (torch seed of rank 0, rank, step), so that no two ranks, and no
    two restarts, repeat each other.

    >>> rng = RngState(); state = rng.state_dict(); first = random.random()
    >>> rng.load_state_dict(state); random.random() == first
    True
    """

    rank_local = True

    def state_dict(self) -> dict[str, Any]:
        """All states, as plain values and NumPy arrays."""
        state: dict[str, Any] = {
            "python": random.getstate(),
            "numpy": np.random.get_state(legacy=False),
            "torch": torch.get_rng_state().numpy(),
            "torch_seed": torch.initial_seed(),
        }
        if torch.accelerator.is_available():
            device = torch.get_device_module(torch.accelerator.current_accelerator())
            state["accelerator"] = device.get_rng_state().cpu().numpy()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set every generator that `state` has."""
        np.random.set_state(state["numpy"])  # first: it refuses the state of another kind of generator
        random.setstate(state["python"])
        torch.set_rng_state(torch.from_numpy(state["torch"].copy()))
        if "accelerator" in state and torch.accelerator.is_available():
            device = torch.get_device_module(torch.accelerator.current_accelerator())
            device.set_rng_state(torch.from_numpy(state["accelerator"].copy()))

    def load_for_new_rank(self, state: dict[str, Any], rank: int, step: int) -> None:
        """Seed every generator for a rank that the saved run did not have, from rank 0's state as saved at `step`."""
        text = f"{state['torch_seed']}/{rank}/{step}".encode()
        seed = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # the accelerators' generators too
