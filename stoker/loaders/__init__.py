"""Tokens: data set format, order, the loader. Builds on storage; never touches tensors of a model.

Names are imported at first use, so that writing and inspecting data sets does not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .dataset import TokenDataset
    from .loader import TokenLoader
    from .mixture import Mixture
    from .packing import BestFit, Pad
    from .writer import TokenWriter

__all__ = ["BestFit", "Mixture", "Pad", "TokenDataset", "TokenLoader", "TokenWriter"]

_MODULES = {
    "BestFit": ".packing",
    "Mixture": ".mixture",
    "Pad": ".packing",
    "TokenDataset": ".dataset",
    "TokenLoader": ".loader",
    "TokenWriter": ".writer",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
