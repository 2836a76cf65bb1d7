"""``stoker bench load --only step``: how much slower a model's step is with the loader than on one batch that is there.

A small GPT (the accelerator's, where there is one) takes forward, backward and optimizer steps in threes: on one resident
batch, on the same batch once more, and on a batch that the loader makes just then, in an order that turns from three to
three. So each step has the two others as neighbours, and meets the machine in the same mood.

``a model's step``
    median seconds of a step, that of the loader with its ``next``. Limit: the resident batch.
``a model's step, times the resident batch's``
    median over the threes of the loader's step / the resident batch's. Limit: 1.02 and what the resident batch against
    itself is off, a bound: its median ratio's distance from 1, and twice the standard error of that median.
"""

import shutil
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import CorruptionError
from ..loaders import TokenDataset, TokenLoader
from ._load_stream import Stream, cpu_s_per_gtoken
from .frame import Case, Outcome, Question, Report, Sample, Scalar, Variant, measure

__all__ = ["SLOWED", "STEP", "THREES", "run_step"]

STEP, SLOWED = "a model's step", "a model's step, times the resident batch's"
THREES = 16
"""Steps of each kind in a run."""

_BATCH, _SEQ_LEN, _VOCAB, _WIDTH, _DEPTH, _HEADS = 8, 128, 4096, 128, 2, 4
_STREAM_TOKENS = 8 << 20
_SLOWED = 1.02


def run_step(
    *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None = None
) -> Report:
    """Train for `runs` and `warmup` runs of 16 threes; `size_bytes` is not used, the data set has 16 MiB."""
    training = _Training(directory / "step")
    device = str(training.device)
    params: dict[str, Scalar] = {
        "batch_size": _BATCH,
        "seq_len": _SEQ_LEN,
        "width": _WIDTH,
        "depth": _DEPTH,
        "device": device,
    }
    question = Question(
        bench="load",
        cases=[
            Case(name=STEP, unit="s", better="lower", cache="warm", origin="page cache"),
            Case(name=SLOWED, unit="x", better="lower", goal_ratio=1.0, cache="warm", origin="page cache"),
        ],
        params={**params, "torch_threads": torch.get_num_threads(), "threes": THREES},
    )
    variants = [
        Variant(
            name="one resident batch",
            kind="limit",
            run=training.resident,
            setup=training.open,
            teardown=training.close,
            verify=training.verify,
            notes=(f"{SLOWED}: 1.02 and the spread of the resident batch against itself, a bound",),
        ),
        Variant(name="stoker TokenLoader", kind="stoker", run=training.loaded, verify=training.verify),
    ]
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(_WIDTH), nn.LayerNorm(_WIDTH)
        self.qkv, self.out = nn.Linear(_WIDTH, 3 * _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.up, self.down = nn.Linear(_WIDTH, 4 * _WIDTH), nn.Linear(4 * _WIDTH, _WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(batch, length, 3, _HEADS, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        y: Tensor = x + self.down(nn.functional.gelu(self.up(self.norm_2(x))))
        return y


class _GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(_VOCAB, _WIDTH), nn.Embedding(_SEQ_LEN, _WIDTH)
        self.blocks = nn.Sequential(*(_Block() for _ in range(_DEPTH)))
        self.norm, self.head = nn.LayerNorm(_WIDTH), nn.Linear(_WIDTH, _VOCAB, bias=False)

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1], device=input_ids.device))
        return nn.functional.cross_entropy(self.head(self.norm(self.blocks(x))).flatten(0, 1), labels.view(-1))


class _Training:
    """The model, a resident batch and the loader; a run takes its steps in threes and answers for both variants."""

    def __init__(self, files: Path) -> None:
        self._files, self._resources = files, ExitStack()
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        self.device = accelerator or torch.device("cpu")
        self._last: dict[str, Sample] = {}

    def open(self) -> None:
        self._stream = Stream(_STREAM_TOKENS, "uint16")
        self._stream.tokens %= _VOCAB
        self._resources.callback(shutil.rmtree, self._files, ignore_errors=True)
        self._stream.write(self._files)
        dataset = self._resources.enter_context(TokenDataset(self._files, seq_len=_SEQ_LEN))
        loader = TokenLoader(dataset, batch_size=_BATCH, epochs=None, device=self.device)
        self._loader = self._resources.enter_context(loader)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self._model = _GPT().to(self.device)
        self._optimizer = torch.optim.AdamW(self._model.parameters(), lr=1e-3)
        first = next(self._loader)
        self._resident = {name: first[name].clone() for name in ("input_ids", "labels")}

    def close(self) -> None:
        self._resources.close()

    def verify(self) -> None:
        for _ in range(64):
            batch = next(self._loader)
            for row, sample in enumerate(self._loader.order(batch["position"].numpy()).tolist()):
                expected = self._stream.tokens[sample * _SEQ_LEN : (sample + 1) * _SEQ_LEN + 1]
                found = [*batch["input_ids"][row].tolist(), batch["labels"][row, -1].item()]
                if found != expected.tolist():
                    raise CorruptionError(f"row {row} must be sample {sample}", place=STEP)

    def _step(self, batch: Callable[[], dict[str, Any]]) -> float:
        started = perf_counter()
        given = batch()
        self._optimizer.zero_grad(set_to_none=True)
        self._model(given["input_ids"], given["labels"]).backward()
        self._optimizer.step()
        if self.device.type != "cpu":
            torch.accelerator.synchronize()
        return perf_counter() - started

    def _threes(self) -> tuple[list[list[float]], float]:
        """Seconds of each kind of step, and of processors for the loader's."""
        kinds: list[Callable[[], dict[str, Any]]] = [
            lambda: self._resident,
            lambda: self._resident,
            self._loader.__next__,
        ]
        seconds: list[list[float]] = [[], [], []]
        cpu_seconds = 0.0
        for turn in range(THREES):
            for number in ((turn + at) % 3 for at in range(3)):
                cpu = process_time()
                seconds[number].append(self._step(kinds[number]))
                if number == 2:
                    cpu_seconds += process_time() - cpu
        return seconds, cpu_seconds

    def resident(self) -> Outcome:
        (first, again, loaded), cpu_seconds = self._threes()
        cpu = cpu_s_per_gtoken(cpu_seconds, THREES * _BATCH * _SEQ_LEN)
        slowed = statistics.median(np.divide(loaded, first).tolist())
        self._last = {
            STEP: Sample(value=statistics.median(loaded), cpu_s_per_gtoken=cpu),
            SLOWED: Sample(value=slowed, cpu_s_per_gtoken=cpu),
        }
        bound = _SLOWED + _spread(np.divide(again, first).tolist())
        return {STEP: statistics.median(first), SLOWED: bound}

    def loaded(self) -> Outcome:
        return self._last


def _spread(ratios: list[float]) -> float:
    """How far off 1 the median of `ratios` may be by chance.

    >>> _spread([1.0, 1.0, 1.0, 1.0])
    0.0
    """
    low, high = np.percentile(ratios, [25, 75])
    # Of a normal distribution the quartiles are 1.349 deviations apart, and the median errs 1.253 times the mean's.
    error = 1.253 * (high - low) / 1.349 / len(ratios) ** 0.5
    return float(abs(statistics.median(ratios) - 1) + 2 * error)
