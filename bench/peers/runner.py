"""A peer of ``stoker bench load`` in its own environment: makes batches when told, and says how long they took.

Started by stoker/bench/peers.py as ``python runner.py NAME``. Requests and replies are JSON lines on standard input and
output. Each peer stores the same tokens as samples of 2,049, in the way that its documentation gives for pretraining, and
hands them out as two contiguous int64 tensors of 16 x 2,048. Of the ways to read that it documents, with and without worker
processes, the one that is fastest in a short trial is used, and named.
"""

import importlib.metadata
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

BATCH, SEQ_LEN = 16, 2048
BLOCK = SEQ_LEN + 1
WORKERS = (0, 2)
TRIAL_BATCHES = 32
Batch = tuple[torch.Tensor, torch.Tensor]


def split(block: torch.Tensor) -> Batch:
    """As LitGPT does: `input_ids` and `labels` of a (16, 2049) batch."""
    return block[:, :-1].long().contiguous(), block[:, 1:].long().contiguous()


def stack(samples: list[dict[str, np.ndarray]]) -> torch.Tensor:
    return torch.from_numpy(np.stack([sample["tokens"] for sample in samples]))


class LitData:
    package = "litdata"

    def write(self, blocks: np.ndarray, directory: Path) -> None:
        from litdata import TokensLoader
        from litdata.streaming.writer import BinaryWriter

        # What optimize() does in its worker processes. Its chunk of 64 MB, in tokens, and a whole number of samples.
        size = (64 << 20) // blocks.itemsize // BLOCK * BLOCK
        writer = BinaryWriter(str(directory), chunk_size=size, item_loader=TokensLoader(block_size=BLOCK))
        if blocks.dtype == np.uint32:  # which it does not store; its documentation has int32
            blocks = blocks.view(np.int32)
        for number, block in enumerate(blocks):
            writer[number] = torch.from_numpy(block)
        writer.done()
        writer.merge(1)

    def ways(self, directory: Path) -> dict[str, Callable[[], Iterator[Batch]]]:
        from litdata import StreamingDataLoader, StreamingDataset, TokensLoader

        def read(workers: int) -> Iterator[Batch]:
            dataset = StreamingDataset(
                str(directory), item_loader=TokensLoader(block_size=BLOCK), shuffle=True, drop_last=True
            )
            loader = StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, drop_last=True)
            for batch in loader:
                yield split(batch)

        return {f"StreamingDataLoader, {w} workers": lambda w=w: read(w) for w in WORKERS}


class MosaicML:
    package = "mosaicml-streaming"

    def write(self, blocks: np.ndarray, directory: Path) -> None:
        from streaming import MDSWriter

        with MDSWriter(out=str(directory), columns={"tokens": f"ndarray:{blocks.dtype}:{BLOCK}"}) as writer:
            for block in blocks:
                writer.write({"tokens": block})

    def ways(self, directory: Path) -> dict[str, Callable[[], Iterator[Batch]]]:
        from streaming import StreamingDataLoader, StreamingDataset

        def read(workers: int) -> Iterator[Batch]:
            dataset = StreamingDataset(local=str(directory), shuffle=True, batch_size=BATCH)
            loader = StreamingDataLoader(
                dataset, batch_size=BATCH, num_workers=workers, drop_last=True, collate_fn=stack
            )
            for batch in loader:
                yield split(batch)

        return {f"StreamingDataLoader, {w} workers": lambda w=w: read(w) for w in WORKERS}


class HuggingFace:
    package = "datasets"

    def write(self, blocks: np.ndarray, directory: Path) -> None:
        import pyarrow as pa
        from datasets import Dataset

        column = pa.FixedSizeListArray.from_arrays(pa.array(blocks.ravel()), BLOCK)
        Dataset(pa.table({"tokens": column})).save_to_disk(str(directory / "tokens"))

    def ways(self, directory: Path) -> dict[str, Callable[[], Iterator[Batch]]]:
        from datasets import load_from_disk

        dataset = load_from_disk(str(directory / "tokens"))

        def whole_batches(kind: str, workers: int) -> Iterator[Batch]:
            formatted = dataset.with_format(kind)
            sampler = BatchSampler(RandomSampler(formatted), BATCH, drop_last=True)
            loader = DataLoader(
                formatted, batch_size=None, sampler=sampler, num_workers=workers, collate_fn=lambda rows: rows
            )
            for batch in loader:
                if kind == "arrow":
                    flat = batch["tokens"].combine_chunks().flatten().to_numpy()
                    yield split(torch.from_numpy(flat.reshape(BATCH, BLOCK)))
                else:
                    yield split(torch.as_tensor(batch["tokens"]))

        def samples(workers: int) -> Iterator[Batch]:
            formatted = dataset.with_format("torch")
            loader = DataLoader(formatted, batch_size=BATCH, shuffle=True, num_workers=workers, drop_last=True)
            for batch in loader:
                yield split(batch["tokens"])

        ways: dict[str, Callable[[], Iterator[Batch]]] = {}
        for w in WORKERS:
            ways[f"with_format('torch'), {w} workers"] = lambda w=w: samples(w)
            for kind in ("torch", "arrow"):
                ways[f"with_format('{kind}'), BatchSampler, {w} workers"] = lambda k=kind, w=w: whole_batches(k, w)
        return ways


PEERS = {"litdata": LitData, "mosaicml-streaming": MosaicML, "datasets": HuggingFace}


class Session:
    def __init__(self, name: str) -> None:
        self.peer = PEERS[name]()
        self.batches: Iterator[Batch] = iter(())

    def open(self, tokens: str, dtype: str, directory: str) -> dict[str, Any]:
        stream = np.fromfile(tokens, dtype)
        self.blocks = stream[: len(stream) // BLOCK * BLOCK].reshape(-1, BLOCK)
        root = Path(directory)
        root.mkdir(parents=True)
        self.peer.write(self.blocks, root)
        trials = {}
        for way, read in self.peer.ways(root).items():
            batches = read()
            next(batches)  # start-up is not what is asked
            started = time.perf_counter()
            count = sum(1 for _ in islice(batches, TRIAL_BATCHES))
            trials[way] = count / (time.perf_counter() - started)
            del batches
        self.way = max(trials, key=lambda way: trials[way])
        self.read = self.peer.ways(root)[self.way]
        return {"way": self.way, "version": importlib.metadata.version(self.peer.package)}

    def verify(self) -> dict[str, Any]:
        number_of = {block[:8].tobytes(): number for number, block in enumerate(self.blocks)}
        seen = set()
        for input_ids, labels in islice(self.read(), 64):
            assert input_ids.shape == labels.shape == (BATCH, SEQ_LEN), "the shape"
            assert input_ids.dtype == labels.dtype == torch.int64, "the type"
            assert input_ids.is_contiguous(), "input_ids are not contiguous"
            assert labels.is_contiguous(), "labels are not contiguous"
            for inputs, label in zip(input_ids.numpy(), labels.numpy(), strict=True):
                number = number_of.get(inputs[:8].astype(self.blocks.dtype).tobytes())
                assert number is not None, "a row is no sample"
                assert number not in seen, "a row came twice"
                assert np.array_equal(inputs, self.blocks[number, :-1]), "input_ids"
                assert np.array_equal(label, self.blocks[number, 1:]), "labels"
                seen.add(number)
        assert len(seen) >= BATCH, "no batch"
        return {"rows": len(seen)}

    def run(self, batches: int) -> dict[str, Any]:
        held: list[Any] = []
        cpu, started = cpu_seconds(), time.perf_counter()
        for _ in range(batches):
            batch = next(self.batches, None)
            if batch is None:
                self.batches = self.read()
                batch = next(self.batches)
            held[:] = [batch]
        return {"seconds": time.perf_counter() - started, "cpu_seconds": cpu_seconds() - cpu}

    def close(self) -> dict[str, Any]:
        del self.batches
        return {}


def cpu_seconds() -> float:
    """Of this process by the clock, of its living and ended descendants by what the kernel counts (10 ms)."""
    children: dict[int, list[int]] = {}
    ticks = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        children.setdefault(int(fields[1]), []).append(int(entry.parent.name))
        ticks[int(entry.parent.name)] = sum(map(int, fields[11:15]))
    mine = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    total, waiting = sum(map(int, mine[13:15])), list(children.get(os.getpid(), ()))
    while waiting:
        pid = waiting.pop()
        total += ticks[pid]
        waiting += children.get(pid, ())
    return time.process_time() + total / os.sysconf("SC_CLK_TCK")


def stand_in_for_torchvision() -> None:
    """MosaicML Streaming imports torchvision for its image classes, which nothing here uses; its wheels want CUDA."""
    import transformers.feature_extraction_utils  # what looks for torchvision does so before it seems to be there

    del transformers
    names = ("torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional")
    for name in names:
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        module.VisionDataset, module.to_tensor = object, None
        sys.modules[name] = module


def main() -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply
    name = sys.argv[1]
    if name == "mosaicml-streaming":
        stand_in_for_torchvision()
    torch.set_num_threads(1)  # for 16 rows torch's threads wait for each other longer than they work
    session = Session(name)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(session, request.pop("do"))(**request)
        except AssertionError as error:
            reply = {"wrong": str(error)}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
