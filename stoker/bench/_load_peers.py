"""Peers of ``stoker bench load``: the two that are an algorithm stand here, the libraries in their own environments."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, RandomSampler

from ._load_stream import BATCH, SEQ_LEN, Loader, Stepper, Stream
from .peers import LOAD_PEERS, PeerProcess

__all__ = ["Elsewhere", "Megatron", "NanoGPT"]


class NanoGPT(Stepper):
    """As nanoGPT's train.py loads: a map opened anew for each batch, random offsets, each row widened, then stacked."""

    name = "nanoGPT memmap"
    notes = ("rows drawn with replacement, as its train.py does; no order, no state",)

    def open(self) -> None:
        self.files.mkdir(parents=True)
        self._path = self.files / "train.bin"
        self.stream.tokens.tofile(self._path)
        self._generator = torch.Generator().manual_seed(1)

    def stepper(self) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
        return self._step

    def _step(self) -> tuple[torch.Tensor, torch.Tensor]:
        data = np.memmap(self._path, dtype=self.stream.tokens.dtype, mode="r")
        self._starts = starts = torch.randint(len(data) - SEQ_LEN, (BATCH,), generator=self._generator)
        input_ids = torch.stack([torch.from_numpy(data[i : i + SEQ_LEN].astype(np.int64)) for i in starts])
        labels = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + SEQ_LEN].astype(np.int64)) for i in starts])
        return input_ids, labels

    def verify(self) -> None:
        for _ in range(16):
            batch = self._step()
            self.stream.require(self._starts.numpy(), *batch, place=self.name)


class _IndexedSamples(Dataset[dict[str, torch.Tensor]]):
    """As Megatron's GPT data set reads: a map of all documents, their offsets, and a table of where samples start."""

    def __init__(self, path: Path, dtype: np.dtype[Any], ends: NDArray[np.int64]) -> None:
        self._buffer: memoryview = np.memmap(path, mode="r").data
        self._dtype = dtype
        self._starts = np.concatenate([[0], ends[:-1]])
        self._lengths = np.diff(ends, prepend=0)
        num_samples = (int(ends[-1]) - 1) // SEQ_LEN
        first = np.arange(num_samples + 1) * SEQ_LEN
        document = np.searchsorted(ends, first, side="right")
        self._sample_index = np.stack([document, first - self._starts[document]], axis=1)
        self._shuffle_index = np.random.default_rng(1).permutation(num_samples)

    def __len__(self) -> int:
        return len(self._shuffle_index)

    def _tokens(self, document: int, offset: int, length: int) -> NDArray[Any]:
        start = (int(self._starts[document]) + offset) * self._dtype.itemsize
        return np.frombuffer(self._buffer, dtype=self._dtype, count=length, offset=start)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        sample = self._shuffle_index[index]
        (first, start), (last, end) = self._sample_index[sample].tolist(), self._sample_index[sample + 1].tolist()
        if first == last:
            parts = [self._tokens(first, start, end - start + 1)]
        else:
            parts = [self._tokens(first, start, int(self._lengths[first]) - start)]
            parts += [self._tokens(document, 0, int(self._lengths[document])) for document in range(first + 1, last)]
            parts.append(self._tokens(last, 0, end + 1))
        text = torch.from_numpy(np.concatenate(parts)).long()
        return {"tokens": text[:-1].contiguous(), "labels": text[1:].contiguous()}

    def first_tokens(self, indices: list[int]) -> NDArray[np.int64]:
        return self._shuffle_index[indices] * SEQ_LEN


class Megatron(Stepper):
    name = "Megatron-style map data set"
    notes = (
        "tokens and labels only: no loss mask, position ids or attention mask; documents unshuffled",
        "DataLoader without workers: batches handed over by one or two of them came seven times slower when this was made",
    )

    def open(self) -> None:
        self.files.mkdir(parents=True)
        path = self.files / "text_document.bin"
        self.stream.tokens.tofile(path)
        self._data = _IndexedSamples(path, self.stream.tokens.dtype, self.stream.ends)
        self._drawn: list[int] = []
        self._batches: Iterator[dict[str, torch.Tensor]] = iter(())

    def _epoch(self) -> Iterator[dict[str, torch.Tensor]]:
        sampler = RandomSampler(self._data, generator=torch.Generator().manual_seed(1))
        return iter(DataLoader(self._data, batch_size=BATCH, sampler=sampler, drop_last=True))

    def stepper(self) -> Callable[[], dict[str, torch.Tensor]]:
        return self._step

    def _step(self) -> dict[str, torch.Tensor]:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = self._epoch()
            batch = next(self._batches)
        return batch

    def verify(self) -> None:
        for start in range(0, 16 * BATCH, BATCH):
            indices = list(range(start, start + BATCH))
            batch = next(iter(DataLoader(self._data, batch_size=BATCH, sampler=indices)))
            first = self._data.first_tokens(indices)
            self.stream.require(first, batch["tokens"], batch["labels"], place=self.name)

    def close(self) -> None:
        if hasattr(self, "_data"):
            self._batches = iter(())
            del self._data  # the map, before its file
        super().close()


class Elsewhere(Loader):
    """A library in an environment and a process of its own, which its batches never leave; ``bench/peers/runner.py`` tells
    what they took.

    A variant's notes stand before it runs, so what it finds there (version, way of reading) is added to its rows after.
    """

    def __init__(self, stream: Stream, directory: Path, cases: tuple[str, ...], *, package: str) -> None:
        super().__init__(stream, directory, cases)
        self.package, self.name = package, LOAD_PEERS[package]
        self.files = directory / f"{package}-{self.dtype}"
        self.found: dict[str, Any] = {}
        self._process: PeerProcess | None = None

    def open(self) -> None:
        self._process = PeerProcess(self.package)
        tokens = self.files.with_suffix(".tokens")
        self.stream.tokens.tofile(tokens)
        try:
            self.found = self._ask("open", tokens=str(tokens), dtype=self.dtype, directory=str(self.files))
        finally:
            tokens.unlink()

    def _ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        assert self._process is not None
        return self._process.ask(do, **arguments)

    def verify(self) -> None:
        self._ask("verify")

    def timed(self) -> tuple[float, float]:
        taken = self._ask("run", batches=self.batches)
        return taken["seconds"], taken["cpu_seconds"]

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        super().close()
