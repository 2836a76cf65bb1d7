"""Train a small GPT on a token data set: prefetching loader, asynchronous checkpoints, resume. Copy and change it.

    python train.py --data DATA --checkpoints CKPT --steps 200
    torchrun --nproc-per-node 2 train.py --data s3://bucket/tokens --checkpoints s3://bucket/ckpt --steps 200

Start it again after a crash and it goes on from the newest committed step. Credentials for s3:// come from AWS_*.
"""

import argparse
import hashlib
import importlib
import json
import os
import time
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from stoker.checkpoint import CheckpointManager, RngState
from stoker.loaders import TokenDataset, TokenLoader
from stoker.metrics import counters
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
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = self.down(nn.functional.gelu(self.up(self.norm_2(x))))
        return x + y


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
        return nn.functional.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.view(-1))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token data set: path or URL")
    parser.add_argument("--checkpoints", required=True, help="checkpoint root: path or URL, the same for all ranks")
    parser.add_argument("--steps", type=int, default=200, help="train until this step")
    numbers = {"save-every": 20, "global-batch": 16, "seq-len": 128, "vocab": 4096, "width": 192, "depth": 4}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--events", help="append one JSON object for each event to EVENTS.rank")
    parser.add_argument("--tensorboard", help="directory for scalars, if TensorBoard is installed")
    return parser.parse_args()


def digest(model: nn.Module) -> str:  # of all parameters: the same for any sharding
    full = [p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters()]
    return hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in full)).hexdigest()


def main() -> None:
    args = arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert device and args.global_batch % world_size == 0
    torch.manual_seed(0)
    model = GPT(args.vocab, args.seq_len, args.width, args.depth, heads=args.width // 32).to(device)
    if world_size > 1:
        dist.init_process_group("gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl")
        for module in (*model.blocks, model):
            fully_shard(module)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: min((done + 1) / 20, 20 / max(done, 20)))
    board: Any = None
    with suppress(ImportError):  # TensorBoard is no requirement
        if args.tensorboard and rank == 0:
            board = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.tensorboard)

    def log(event: str, **facts: object) -> None:
        if args.events:
            with Path(f"{args.events}.{rank}").open("a") as file:
                file.write(json.dumps({"event": event, **facts}) + "\n")
        for name in facts.keys() & {"loss", "seconds", "wait_s", "stall_s"} if board and "step" in facts else ():
            board.add_scalar(f"{event}/{name}", facts[name], facts["step"])

    rows_per_rank, handle = args.global_batch // world_size, None
    with (
        TieredCache() as cache,
        TokenDataset(args.data, seq_len=args.seq_len, cache=cache) as dataset,
        TokenLoader(dataset, batch_size=rows_per_rank, rank=rank, world_size=world_size, epochs=None) as loader,
        CheckpointManager(args.checkpoints, keep_last=2) as ckpt,
    ):
        tree = {"model": model, "optimizer": optimizer, "scheduler": scheduler, "loader": loader}
        tree |= {"rng": RngState(), "progress": (progress := {"step": 0})}
        if ckpt.latest() is not None:
            report = ckpt.restore(tree)
            log("resumed", step=report.step, seconds=report.seconds, parameters=digest(model))
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
            if world_size > 1:
                dist.all_reduce(loss.data.div_(world_size))
            if step % args.save_every == 0 or step == args.steps:
                handle = ckpt.save(step, tree)
                log("saving", step=step, stall_s=handle.report().stall_s)
            seconds = time.perf_counter() - started
            rows = dict(zip(batch["position"].tolist(), map(zlib.crc32, batch["input_ids"].numpy()), strict=True))
            log("step", step=step, loss=loss.item(), seconds=seconds, wait_s=waited_s, rows=rows)
            if rank == 0 and (step % 10 == 0 or step == args.steps):
                print(f"step {step}: loss {loss.item():.4f}, {seconds:.3f} s", flush=True)
        if handle is not None:
            handle.wait("committed")
            log("done", seconds=handle.report().committed_s, bytes=handle.report().staged_bytes)
        log("counts", **counters.snapshot())
    if board:
        board.close()
    if world_size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
