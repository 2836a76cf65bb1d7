"""Train with Lightning's Trainer on a token data set: each rank its own rows, resumed at the exact batch.

    torchrun --nproc-per-node 2 lightning_trainer.py --data DATA --output OUT --steps 200

Start it again and it goes on from the last checkpoint. What matters: the loader is given to `fit` as it is, so that its
state goes into Lightning's checkpoints and comes back from there; it has a length (`epochs=1`), because of a loader without
one Lightning fetches a batch ahead of the checkpoint; and `use_distributed_sampler=False`, since it deals rows to ranks.
"""

import argparse
import json
import os
import zlib
from pathlib import Path

import pytorch_lightning as lightning
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor, nn

from stoker.loaders import TokenDataset, TokenLoader


class Bigram(lightning.LightningModule):
    def __init__(self, vocab: int, width: int, rows: str | None) -> None:
        super().__init__()
        self.tokens, self.head, self.rows = nn.Embedding(vocab, width), nn.Linear(width, vocab), rows

    def training_step(self, batch: dict[str, Tensor]) -> Tensor:
        if self.rows:
            checksums = map(zlib.crc32, batch["input_ids"].cpu().numpy())
            with Path(f"{self.rows}.{self.global_rank}").open("a") as file:
                row = [self.global_step, *zip(batch["position"].tolist(), checksums, strict=True)]
                file.write(json.dumps(row) + "\n")
        logits = self.head(self.tokens(batch["input_ids"]))
        return nn.functional.cross_entropy(logits.flatten(0, 1), batch["labels"].view(-1))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token data set: path or URL")
    parser.add_argument("--output", required=True, help="directory of checkpoints, the same for all ranks")
    parser.add_argument("--rows", help="append the rows of each step to ROWS.rank")
    numbers = {"steps": 200, "save-every": 50, "batch-size": 8, "seq-len": 128, "vocab": 4096, "width": 64}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    trainer = lightning.Trainer(
        max_steps=args.steps,
        use_distributed_sampler=False,
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=world_size // int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        strategy="ddp" if world_size > 1 else "auto",
        callbacks=[ModelCheckpoint(args.output, every_n_train_steps=args.save_every, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    last = Path(args.output) / "last.ckpt"
    with (
        TokenDataset(args.data, seq_len=args.seq_len) as dataset,
        TokenLoader(dataset, batch_size=args.batch_size, rank=rank, world_size=world_size) as loader,
    ):
        model = Bigram(args.vocab, args.width, args.rows)
        trainer.fit(model, loader, ckpt_path=last if last.exists() else None)


if __name__ == "__main__":
    main()
