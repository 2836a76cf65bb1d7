"""Train a small GPT on a token data set: prefetching loader, asynchronous checkpoints, resume. Copy and change it.

    python train.py --data DATA --checkpoints CKPT --steps 200
    torchrun --nproc-per-node 2 train.py --data s3://bucket/tokens --checkpoints s3://bucket/ckpt --steps 200

Start it again after a crash and it goes on from the newest committed step. Credentials for s3:// come from AWS_*.
"""

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from stoker.checkpoint import CheckpointManager, RngState
from stoker.loaders import TokenDataset, TokenLoader
from stoker.storage import TieredCache


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        x = x + self.down(F.gelu(self.up(self.norm_2(x))))
        return x


class GPT(nn.Module):
    def __init__(self, vocab: int, seq_len: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, width), nn.Embedding(seq_len, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocab, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.blocks:
            x = block(x)
        loss: Tensor = F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.view(-1))
        return loss


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token data set: path or URL")
    parser.add_argument("--checkpoints", required=True, help="checkpoint root: path or URL, the same for all ranks")
    parser.add_argument("--steps", type=int, default=200, help="train until this step")
    parser.add_argument("--save-every", type=int, default=20, help="steps between saves")
    parser.add_argument("--global-batch", type=int, default=16, help="rows in a step, over all ranks")
    parser.add_argument("--seq-len", type=int, default=128)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--log", type=Path, help="append one JSON object for each event to this file")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device is not None and args.global_batch % world_size == 0
    torch.manual_seed(args.seed)
    model = GPT(args.vocab, args.seq_len, args.width, args.depth, args.heads).to(device)
    if world_size > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        mesh = init_device_mesh(device.type, (world_size,), mesh_dim_names=("dp",))
        for module in (*model.blocks, model):
            fully_shard(module, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min((done + 1) / 20, 20 / max(done, 20)))

    def log(**event: Any) -> None:
        if rank == 0 and args.log:
            with args.log.open("a") as file:
                file.write(json.dumps(event) + "\n")

    tokens_per_step, handle = args.global_batch * args.seq_len, None
    with (
        TieredCache() as cache,
        TokenDataset(args.data, seq_len=args.seq_len, cache=cache) as dataset,
        TokenLoader(
            dataset, batch_size=args.global_batch // world_size, rank=rank, world_size=world_size, epochs=None
        ) as loader,
        CheckpointManager(args.checkpoints, keep_last=2) as ckpt,
    ):
        progress = {"step": 0}
        tree = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
        tree |= {"rng": RngState(), "progress": progress}
        if ckpt.latest() is not None:
            report = ckpt.restore(tree)
            log(event="resumed", step=report.step, seconds=report.seconds, bytes=report.num_bytes)
        batches = iter(loader)
        for step in range(progress["step"] + 1, args.steps + 1):
            started = time.perf_counter()
            batch = next(batches)
            waited_s = time.perf_counter() - started
            loss = model(batch["input_ids"].to(device), batch["labels"].to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            scheduler.step()
            progress["step"] = step
            mean = loss.detach() / world_size
            if world_size > 1:
                dist.all_reduce(mean)
            saved_s = 0.0
            if step % args.save_every == 0 or step == args.steps:
                handle = ckpt.save(step, tree)
                saved_s = handle.report().stall_s
                log(event="saving", step=step, stall_s=saved_s, bytes=handle.report().staged_bytes)
            seconds = time.perf_counter() - started
            log(event="step", step=step, loss=mean.item(), tokens=tokens_per_step, seconds=seconds, wait_s=waited_s)
            if rank == 0 and (step % 10 == 0 or step == args.steps):
                print(f"step {step}: loss {mean.item():.4f}, {tokens_per_step / seconds:,.0f} tokens/s", flush=True)
        if handle is not None:
            handle.wait("committed")
            log(event="done", step=args.steps, seconds=handle.report().committed_s, bytes=handle.report().staged_bytes)
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
