"""``stoker bench ckpt --only reshard``: how many bytes two nodes of two ranks read from the root when the layout changes.

Four ranks under ``torchrun`` save a state in rows (FSDP2) and restore it in each of :data:`LAYOUTS`. A node is simulated:
ranks 0 and 1, and ranks 2 and 3, have a directory in shared memory of their own, so that nothing passes between them.

``bytes that two nodes read, {layout}``
    what the ranks asked the store for during the restore, manifest and documents included, by the store's own counters.
    Limit: the checksum blocks that the ranks of each node need, each once a node, worked out without the reader.

What each rank holds afterwards is compared with the saved state, bit for bit.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import CheckpointManager
from ..checkpoint._select import select
from ..checkpoint.log import CheckpointLog, step_directory
from ..checkpoint.manifest import CRC_BLOCK_BYTES, Manifest
from ..checkpoint.plan import local_pieces
from ..checkpoint.reader import read_manifest, resolve_step
from ..errors import CorruptionError, StokerError
from ..metrics import counters
from ..storage import open_store
from ..storage._posix import shared_memory_directory
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["LAYOUTS", "reshard", "run_reshard"]

LAYOUTS = ("replicated", "hybrid", "columns", "quarters")
"""Whole on each rank (DDP); halves, each on both ranks of a node (HSDP); columns; rows and columns."""
_RANKS, _RANKS_PER_NODE = 4, 2
_STEP = 1
_TIMEOUT_S = 300.0


def run_reshard(
    *, size_bytes: int, runs: int, directory: Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Restore `size_bytes` of fp32 tensors below `directory` in each layout."""
    with tempfile.TemporaryDirectory(dir=directory, prefix="reshard-") as root:
        found: dict[str, dict[str, Any]] = {}

        def read() -> Outcome:
            found.update(reshard(Path(root), size_bytes))
            return {_case(name): Sample(value=float(one["read"]), verified=True) for name, one in found.items()}

        def need() -> Outcome:
            if not found:
                read()
            return {_case(name): Sample(value=float(one["needed"]), verified=True) for name, one in found.items()}

        return measure(
            Question(
                bench="ckpt",
                cases=[Case(name=_case(one), unit="B", better="lower", goal_ratio=1.05) for one in LAYOUTS],
                params={"size_bytes": size_bytes, "ranks": _RANKS, "ranks_per_node": _RANKS_PER_NODE},
            ),
            [
                Variant(name="each block once a node", kind="limit", run=need),
                Variant(name="stoker", kind="stoker", run=read, notes=("two nodes simulated on one machine",)),
            ],
            runs=runs,
            warmup=warmup,
            directory=directory,
            progress=progress,
        )


def _case(layout: str) -> str:
    return f"bytes that two nodes read, {layout}"


def reshard(
    root: str | Path, size_bytes: int, *, storage_options: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """Save below `root`, if there is nothing yet, and restore in each layout, in four processes.

    Returns:
        By layout: ``needed`` and ``read``, bytes of both nodes, and ``from``: bytes of all ranks by tier.

    Raises:
        CorruptionError: a rank holds other bits than were saved.
        StokerError: the job failed.
    """
    with tempfile.TemporaryDirectory(dir=shared_memory_directory(), prefix="reshard-") as memory:
        answer = Path(memory) / "answer.json"
        order = {"root": str(root), "size_bytes": size_bytes, "options": dict(storage_options or {}), "memory": memory}
        done = subprocess.run(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={_RANKS}"),
                *("-m", __name__, json.dumps(order), str(answer)),
            ],
            check=False,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        if done.returncode != 0:
            raise StokerError("the ranks must save and restore", value=done.stderr[-4000:], place="reshard")
        found: dict[str, dict[str, Any]] = json.loads(answer.read_text())
    return found


# ------------------------------------------------------------------------------------------------------------ one rank


def _shapes(size_bytes: int) -> list[tuple[int, int]]:
    """Tensors whose rows divide by no number of ranks, a third of the bytes in each of two and small ones for the rest."""
    rows = max(7, size_bytes // 3 // 4096)
    shapes = [(rows, 1024), (rows + 5, 1023)]
    left = size_bytes - sum(4 * height * width for height, width in shapes)
    return shapes + [(37, 701)] * max(1, left // (4 * 37 * 701))


def _full(number: int, shape: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64, generator=generator).to(torch.int32)


def _tree(layout: str, size_bytes: int, *, filled: bool) -> dict[str, torch.Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    rows = init_device_mesh("cpu", (_RANKS,))
    nodes = init_device_mesh("cpu", (_RANKS // _RANKS_PER_NODE, _RANKS_PER_NODE))
    tree: dict[str, torch.Tensor] = {}
    for number, shape in enumerate(_shapes(size_bytes)):
        full = _full(number, shape) if filled else torch.zeros(shape, dtype=torch.int32)
        if layout == "replicated":
            tree[f"t{number}"] = full
        elif layout == "hybrid":
            tree[f"t{number}"] = distribute_tensor(full, nodes, [Shard(0), Replicate()])
        elif layout == "columns":
            tree[f"t{number}"] = distribute_tensor(full, rows, [Shard(1)])
        elif layout == "saved":
            tree[f"t{number}"] = distribute_tensor(full, rows, [Shard(0)])
        else:
            tree[f"t{number}"] = distribute_tensor(full, nodes, [Shard(0), Shard(1)])
        assert isinstance(tree[f"t{number}"], DTensor) or layout == "replicated"
    return tree


def _blocks(manifest: Manifest, tree: Mapping[str, torch.Tensor]) -> list[tuple[str, int, int]]:
    """(blob, first byte, bytes) of each checksum block that this rank needs."""
    pieces = ((name, tensor, piece) for name, tensor in tree.items() for piece in local_pieces(f"t.{name}", tensor, 1))
    selection = select(manifest, ((piece.chunk, piece.memory(tensor)) for _, tensor, piece in pieces))
    starts = {
        (path, block * CRC_BLOCK_BYTES)
        for path, spans in selection.wanted.items()
        for span in spans
        for block in range(span.start // CRC_BLOCK_BYTES, -(-span.end // CRC_BLOCK_BYTES))
    }
    sizes = {path: blob.size_bytes for path, blob in manifest.blobs.items()}
    return [(path, start, min(CRC_BLOCK_BYTES, sizes[path] - start)) for path, start in sorted(starts)]


def _main(order: Mapping[str, Any], answer: Path) -> None:
    import torch.distributed as dist

    rank = int(os.environ["RANK"])
    node = rank // _RANKS_PER_NODE
    memory = Path(order["memory"]) / f"node-{node}"
    memory.mkdir(mode=0o700, exist_ok=True)
    os.environ["STOKER_SHM_DIR"] = str(memory)
    dist.init_process_group("gloo")
    root, options, size_bytes = order["root"], order["options"], int(order["size_bytes"])
    with CheckpointManager(root, storage_options=options) as ckpt:
        saved = [ckpt.latest()]
        dist.broadcast_object_list(saved)
        if saved[0] is None:
            ckpt.save(_STEP, {"t": _tree("saved", size_bytes, filled=True)}).wait("committed")
    found = {}
    for layout in LAYOUTS:
        tree, expected = (_tree(layout, size_bytes, filled=filled) for filled in (False, True))
        # A new manager has no copy of the step in memory.
        with CheckpointManager(root, storage_options=options) as ckpt:
            dist.barrier()
            before = counters.snapshot()
            report = ckpt.restore({"t": tree})
            moved = counters.since(before)
        for name, tensor in expected.items():
            if not torch.equal(_local(tree[name]), _local(tensor)):
                raise CorruptionError(f"{name} must come back bit for bit", value="other bits", place=layout)
        with open_store(root, **options) as store:
            step, live, _ = resolve_step(CheckpointLog(store), _STEP, root)
            manifest = read_manifest(store, step_directory(step, live.nonce), live)
        read = moved.get("local.get.bytes", 0) + moved.get("store.get.bytes", 0)
        everybody: list[Any] = [None] * _RANKS
        dist.all_gather_object(everybody, (node, _blocks(manifest, tree), read, report.bytes_from))
        needed = {(node, block) for node, blocks, _, _ in everybody for block in blocks}
        tiers = sorted({tier for *_, by_tier in everybody for tier in by_tier})
        found[layout] = {
            "needed": sum(num_bytes for _, (_, _, num_bytes) in needed),
            "read": sum(read for _, _, read, _ in everybody),
            "from": {tier: sum(by_tier.get(tier, 0) for *_, by_tier in everybody) for tier in tiers},
        }
    if rank == 0:
        answer.write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]), Path(sys.argv[2]))
