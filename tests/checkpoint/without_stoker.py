"""Opens a checkpoint with other people's tools alone: ``python without_stoker.py safetensors|dcp|zarr DATA EXPECTED``.

DATA is a step's ``data/`` directory, or a file of references for zarr. EXPECTED holds the tensors of the step as JSON.
"""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

Expected = dict[str, dict[str, Any]]


def bytes_of(tensor: torch.Tensor) -> str:
    """The elements in C order, as hexadecimal digits."""
    return str(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes().hex())


def with_safetensors(data: Path, expected: Expected) -> int:
    """Put every tensor together from the files, by the offsets in their metadata."""
    from safetensors import safe_open

    found = {name: torch.zeros(one["shape"], dtype=getattr(torch, one["dtype"])) for name, one in expected.items()}
    for path in sorted(data.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            offsets = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            real = json.loads(file.metadata()["stoker"])["dtypes"]
            for name in file.keys():  # noqa: SIM118 - not a mapping
                if name.startswith("__pad__."):
                    assert not file.get_tensor(name).any()
                    continue
                part, start = file.get_tensor(name), offsets[name]["saved_offsets"]
                if name in real:  # a dtype that safetensors has no name for, as bytes
                    part = part.view(getattr(torch, real[name])).squeeze(-1)
                    start = start[: part.ndim]
                assert part.dtype == found[name].dtype, name
                place = tuple(slice(o, o + n) for o, n in zip(start, part.shape, strict=True))
                if part.numel():
                    found[name][place] = part
    for name, one in expected.items():
        assert bytes_of(found[name]) == one["bytes"], name
    return len(expected)


def with_dcp(data: Path, expected: Expected) -> int:
    """Load whole tensors from the ranks' chunks with torch's own reader."""
    import torch.distributed.checkpoint
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

    dcp: Any = torch.distributed.checkpoint
    # complex128 has no name in safetensors; such tensors are listed as left out for this reader.
    names = [name for name, one in expected.items() if one["dtype"] != "complex128"]
    state = {
        name: torch.zeros(expected[name]["shape"], dtype=getattr(torch, expected[name]["dtype"])) for name in names
    }
    nested: dict[str, Any] = {}
    for name, tensor in state.items():
        item, _, rest = name.partition(".")
        nested.setdefault(item, {})[rest] = tensor
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        dcp.load(nested, storage_reader=HuggingFaceStorageReader(str(data)))
    for name in names:
        item, _, rest = name.partition(".")
        assert bytes_of(nested[item][rest]) == expected[name]["bytes"], name
    return len(names)


def with_zarr(references: Path, expected: Expected) -> int:
    """Read every array through the references."""
    import zarr

    group = zarr.open_group("reference://", storage_options={"fo": str(references)}, mode="r")
    noted: Any = group.attrs["stoker"]
    assert noted["left_out"] == {}
    for name, one in expected.items():
        array: Any = group[name.replace(".", "/")]
        assert array.attrs["torch_dtype"] == one["dtype"]
        assert list(array.shape) == one["shape"]
        assert np.asarray(array[...]).tobytes().hex() == one["bytes"], name
    return len(expected)


if __name__ == "__main__":
    warnings.simplefilter("error")
    _, tool, where, file = sys.argv
    tools = {"safetensors": with_safetensors, "dcp": with_dcp, "zarr": with_zarr}
    print(tools[tool](Path(where), json.loads(Path(file).read_text())))
    assert not any(name.split(".")[0] == "stoker" for name in sys.modules)
