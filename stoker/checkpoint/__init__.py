"""Tensors: staging, layout, commit, restore, adapters. Builds on storage; meets loaders only through ``state_dict``.

Names are loaded on first use, so that the command line can list and verify checkpoints without torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .handle import SaveHandle, SaveReport
    from .manager import CheckpointManager, load, save
    from .restore import RestoreReport
    from .retention import KeepBest
    from .rng import RngState
    from .zarr import open_zarr

__all__ = [
    "CheckpointManager",
    "KeepBest",
    "RestoreReport",
    "RngState",
    "SaveHandle",
    "SaveReport",
    "load",
    "open_zarr",
    "save",
]

_HOMES = {
    "CheckpointManager": "manager",
    "KeepBest": "retention",
    "RestoreReport": "restore",
    "RngState": "rng",
    "SaveHandle": "handle",
    "SaveReport": "handle",
    "load": "manager",
    "open_zarr": "zarr",
    "save": "manager",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
