"""``stoker bench load --only cold``: what a store holds and no tier does, as a stream and as a first batch.

The store is a SeaweedFS on this machine: the same processors serve and ask, so the rows compare, and say little about a
network. It has the bytes in its own memory; cold is the node, whose tiers are empty before each run.

``cold stream from S3, in order; shuffled``
    tokens/s of a loader over the whole data set, through an empty RAM tier that holds it all. Of its 64 blocks the shuffle
    has 16 open at a time. Limit: the same blocks by bare concurrent GETs, crc32c and one plain write each to the same file
    system, in as many threads as serve it best.
``first cold batch``
    seconds from opening the data set until its first batch. Limit: manifest, tables and the distinct blocks of that batch,
    all at once, bare and unchecked, by a client as new as the loader's.

What the limits ask for is what a proxy saw stoker ask for, each range once.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import numpy as np

from ..loaders import TokenDataset, TokenLoader
from ..loaders.order import Shuffle, Window
from ._load_store import (
    Fetch,
    ServedSet,
    best_threads,
    block_tokens,
    empty_cache,
    room_bytes,
    served,
    shared_memory_for,
)
from ._load_stream import BATCH, SEQ_LEN, Stream, cpu_s_per_gtoken
from ._tiers_content import each
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["FIRST", "STREAMS", "run_cold"]

FIRST = "first cold batch"
_WINDOW = Window(lanes=8, blocks=2)
STREAMS: Mapping[str, Shuffle | Window] = {
    "cold stream from S3, in order": "none",
    "cold stream from S3, shuffled": _WINDOW,
}
"""The streams' cases, and the shuffle of each."""

_ORIGIN = "object store, kept in the RAM tier"


def run_cold(
    *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None = None
) -> Report:
    """Measure `size_bytes` of uint16 tokens in an S3 server of the bench's own."""
    stream = Stream(size_bytes // 2 + 1, "uint16")  # one more, the last label: so all blocks have their whole samples
    room = room_bytes(size_bytes)
    with ExitStack() as stack:
        shm, no_shm = stack.enter_context(shared_memory_for(2 * room))
        if shm is None:
            return Report(machine={}, rows=(), notes=(f"the cold part {no_shm}",))
        tokens = block_tokens(len(stream.tokens))
        served_set, no_store = stack.enter_context(served(stream, directory, block_tokens=tokens))
        if served_set is None:
            return Report(machine={}, rows=(), notes=(f"the cold part {no_store}",))
        bare, ours = _Bare(served_set, shm), _Ours(served_set, shm, room)
        cases = [
            *(
                Case(name=name, unit="tokens/s", goal_ratio=0.9, cache="warm", origin=_ORIGIN, bytes=size_bytes)
                for name in STREAMS
            ),
            Case(name=FIRST, unit="s", better="lower", goal_ratio=1.3, cache="warm", origin=_ORIGIN),
        ]
        question = Question(
            bench="load",
            cases=cases,
            params={"size_bytes": size_bytes, "block_bytes": 2 * tokens, "batch_size": BATCH, "seq_len": SEQ_LEN},
        )
        note = "no tier holds a block when a run begins; the server has them in its memory"
        variants = [
            Variant(
                name="bare GET + crc32c + write", kind="limit", run=bare.stream, setup=bare.open, params=bare.params
            ),
            Variant(name="bare GET, all at once", kind="limit", run=bare.first),
            Variant(name="stoker TokenLoader, S3", kind="stoker", run=ours.run, verify=ours.verify, notes=(note,)),
        ]
        return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


class _Bare:
    """The limits: the ranges that stoker asks for, by the bare client."""

    def __init__(self, served_set: ServedSet, shm: Path) -> None:
        self._set, self._directory = served_set, shm / "bare"
        self.params: dict[str, Any] = {}

    def open(self) -> None:
        self._client = self._set.client()
        self._blocks = [fetch for fetch in self._set.fetches(self._read_all) if fetch.key.startswith("data/")]
        self._first = self._set.fetches(self._read_first)
        self._directory.mkdir()
        self.params["threads"] = best_threads(self._blocks, self._copy)
        self.params["first_requests"] = len(self._first)

    def _read_all(self, options: Mapping[str, Any]) -> None:
        with _open_loader(self._set, options, self._directory, room_bytes(2 * len(self._set.stream.tokens))) as loader:
            for _ in loader:
                pass

    def _read_first(self, options: Mapping[str, Any]) -> None:
        """The samples of step 0, without what a loader asks for ahead."""
        room = room_bytes(2 * len(self._set.stream.tokens))
        with ExitStack() as stack:
            cache = stack.enter_context(empty_cache(self._directory, room))
            dataset = stack.enter_context(
                TokenDataset(self._set.url, seq_len=SEQ_LEN, cache=cache, storage_options=options)
            )
            with TokenLoader(dataset, batch_size=BATCH, shuffle=_WINDOW) as loader:
                samples = loader.order(np.arange(BATCH))
            dataset.__getitems__(samples.tolist())

    def _copy(self, fetch: Fetch) -> None:
        data = self._set.get(self._client, fetch)
        fetch.require(data, "bare GET")
        path = self._directory / f"{fetch.key.replace('/', '-')}-{fetch.start}"
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            os.write(fd, data)
        finally:
            os.close(fd)

    def stream(self) -> Outcome:
        for path in self._directory.iterdir():
            path.unlink()
        cpu = process_time()
        seconds = each(self._blocks, self.params["threads"], self._copy)
        cpu_seconds = process_time() - cpu
        for fetch, path in ((f, self._directory / f"{f.key.replace('/', '-')}-{f.start}") for f in self._blocks):
            fetch.require(path.read_bytes(), str(path))
            path.unlink()
        tokens = sum(fetch.end - fetch.start for fetch in self._blocks) // 2
        cpu_per = cpu_s_per_gtoken(cpu_seconds, tokens)
        return dict.fromkeys(STREAMS, Sample(value=tokens / seconds, verified=True, cpu_s_per_gtoken=cpu_per))

    def first(self) -> Outcome:
        client = self._set.client()
        found: dict[Fetch, memoryview] = {}

        def get(fetch: Fetch) -> None:
            found[fetch] = self._set.get(client, fetch)

        seconds = each(self._first, len(self._first), get)
        for fetch, data in found.items():
            fetch.require(data, "bare GET")
        return {FIRST: Sample(value=seconds, verified=True)}


class _Ours:
    """The loader, each time with a cache, a store and a data set of its own."""

    def __init__(self, served_set: ServedSet, shm: Path, room: int) -> None:
        self._set, self._tier, self._room = served_set, shm / "tier", room

    def verify(self) -> None:
        """Every sample of the data set, once in each order."""
        for shuffle in STREAMS.values():
            with _open_loader(self._set, self._set.options, self._tier, self._room, shuffle) as loader:
                for batch in loader:
                    self._require(loader, batch)

    def _require(self, loader: TokenLoader, batch: Mapping[str, Any]) -> None:
        first = loader.order(batch["position"].numpy()) * SEQ_LEN
        self._set.stream.require(first, batch["input_ids"], batch["labels"], place="stoker TokenLoader, S3")

    def run(self) -> Outcome:
        return {FIRST: self._first(), **{name: self._stream(shuffle) for name, shuffle in STREAMS.items()}}

    def _first(self) -> Sample:
        started = perf_counter()
        with _open_loader(self._set, self._set.options, self._tier, self._room) as loader:
            batch = next(loader)
            seconds = perf_counter() - started
            self._require(loader, batch)
        return Sample(value=seconds, verified=True)

    def _stream(self, shuffle: Shuffle | Window) -> Sample:
        with _open_loader(self._set, self._set.options, self._tier, self._room, shuffle) as loader:
            cpu, started = process_time(), perf_counter()
            last: Any = None
            for batch in loader:
                last = batch
            seconds, cpu_seconds = perf_counter() - started, process_time() - cpu
            tokens = loader.stats().tokens
            self._require(loader, last)
        return Sample(value=tokens / seconds, verified=True, cpu_s_per_gtoken=cpu_s_per_gtoken(cpu_seconds, tokens))


@contextmanager
def _open_loader(
    served_set: ServedSet,
    options: Mapping[str, Any],
    tier: Path,
    room: int,
    shuffle: Shuffle | Window = _WINDOW,
) -> Iterator[TokenLoader]:
    """A loader over the data set with nothing in its cache."""
    with (
        empty_cache(tier, room) as cache,
        TokenDataset(served_set.url, seq_len=SEQ_LEN, cache=cache, storage_options=options) as dataset,
        TokenLoader(dataset, batch_size=BATCH, shuffle=shuffle) as loader,
    ):
        yield loader
