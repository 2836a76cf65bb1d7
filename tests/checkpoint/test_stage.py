"""What one rank does while it stages: in which order, and what its report says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from stoker.checkpoint import CheckpointManager, stage
from stoker.checkpoint.plan import local_part
from stoker.checkpoint.stage import BlobSave

MIB = 1 << 20


def test_no_checksum_is_computed_beside_the_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_all, checksum = stage.copy_all, BlobSave._checksum
    events: list[str] = []

    def copying(*pairs: Any) -> None:
        copy_all(*pairs)
        events.append("copy")

    def checking(self: BlobSave, blob: int, start: int, data: memoryview) -> None:
        checksum(self, blob, start, data)
        events.append("checksum")

    monkeypatch.setattr(stage, "copy_all", copying)
    monkeypatch.setattr(stage, "_STRETCH_BYTES", MIB)
    monkeypatch.setattr(stage, "WRITE_BYTES", MIB)
    monkeypatch.setattr(BlobSave, "_checksum", checking)
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {f"t{i}": torch.zeros(MIB, dtype=torch.float32) for i in range(8)}).wait()
    copies = events.count("copy")
    assert copies >= 8 and events.count("checksum") >= 8
    assert events[:copies] == ["copy"] * copies


def test_the_report_tells_what_the_plan_took_of_the_stall(tmp_path: Path) -> None:
    tree = {f"t{i}": torch.zeros(4) for i in range(100)}
    with CheckpointManager(tmp_path) as ckpt:
        for step in (1, 2):
            handle = ckpt.save(step, tree)
            report = handle.report()
            assert 0 < report.plan_s < report.stall_s
            handle.wait()


def test_a_tensors_own_part_is_its_memory_outside_autograd(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        plain = torch.nn.Parameter(torch.arange(4.0))
        sharded = DTensor.from_local(torch.arange(4.0).requires_grad_(), init_device_mesh("cpu", (1,)), [Shard(0)])
        for tensor, memory in ((plain, plain), (torch.nn.Parameter(sharded), sharded.to_local())):
            part = local_part(tensor)
            assert type(part) is torch.Tensor and not part.requires_grad
            assert part.data_ptr() == memory.data_ptr()
    finally:
        torch.distributed.destroy_process_group()
