"""Train with transformers' Trainer on a token data set: each rank its own rows, resumed at the exact batch.

    torchrun --nproc-per-node 2 hf_trainer.py --data DATA --output OUT --steps 200

Start it again and it goes on from the newest checkpoint. What matters: the loader already deals rows to ranks, so that
accelerate must neither shard it again nor hand out rank 0's batches (an unprepared DataLoader, `dispatch_batches=False`);
and it resumes by its state, so that nothing is to be skipped by reading (`ignore_data_skip=True`).
"""

import argparse
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import get_last_checkpoint

from stoker.loaders import TokenDataset, TokenLoader


class LoaderState(TrainerCallback, ExportableState):
    """Keeps the loader's state inside trainer_state.json, so that a checkpoint has it from the start."""

    def __init__(self, loader: TokenLoader) -> None:
        self.loader = loader

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"loader": self.loader.state_dict()}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:
            self.loader.load_state_dict(state.stateful_callbacks["LoaderState"]["attributes"]["loader"])


class TokenTrainer(Trainer):
    loader: TokenLoader
    rows: str | None

    def get_train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.loader, batch_size=None)  # as it is: accelerator.prepare would shard it again

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        position = inputs.pop("position")  # not for the model
        if self.rows:
            checksums = map(zlib.crc32, inputs["input_ids"].cpu().numpy())
            with Path(f"{self.rows}.{self.args.process_index}").open("a") as file:
                file.write(json.dumps([self.state.global_step, *zip(position.tolist(), checksums, strict=True)]) + "\n")
        return super().training_step(model, inputs, num_items_in_batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="token data set: path or URL")
    parser.add_argument("--output", required=True, help="directory of checkpoints, the same for all ranks")
    parser.add_argument("--rows", help="append the rows of each step to ROWS.rank")
    numbers = {
        "steps": 200,
        "save-every": 50,
        "batch-size": 8,
        "accumulate": 1,
        "seq-len": 128,
        "vocab": 4096,
        "width": 64,
    }
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    args = parser.parse_args()
    cpu = not torch.accelerator.is_available()
    training = TrainingArguments(
        use_cpu=cpu,
        ddp_backend="gloo" if cpu and "RANK" in os.environ else None,  # one process alone needs none, and refuses it
        ddp_find_unused_parameters=False,
        per_device_train_batch_size=args.batch_size,
        output_dir=args.output,
        max_steps=args.steps,
        save_steps=args.save_every,
        gradient_accumulation_steps=args.accumulate,
        ignore_data_skip=True,
        accelerator_config={"dispatch_batches": False},
        report_to="none",
        disable_tqdm=True,
    )
    width = {"hidden_size": args.width, "intermediate_size": 3 * args.width}
    heads = {"num_hidden_layers": 2, "num_attention_heads": args.width // 16, "num_key_value_heads": args.width // 16}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=args.vocab, **width, **heads))
    ranks = {"rank": training.process_index, "world_size": training.world_size}
    with (
        TokenDataset(args.data, seq_len=args.seq_len, labels="same") as dataset,  # the model shifts the labels itself
        TokenLoader(dataset, batch_size=args.batch_size, epochs=None, **ranks) as loader,
    ):
        trainer = TokenTrainer(model=model, args=training, callbacks=[LoaderState(loader)])
        trainer.loader, trainer.rows = loader, args.rows
        newest = get_last_checkpoint(args.output) if Path(args.output).is_dir() else None
        trainer.train(resume_from_checkpoint=newest)


if __name__ == "__main__":
    main()
