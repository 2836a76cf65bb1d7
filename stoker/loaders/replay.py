"""The rows of a run's steps as all ranks of a job get them, without the job: what was in step t, and is it the same?

A replay opens one loader for each rank of any world size and takes their batches step by step. The digests of its steps
are the proof that two runs saw the same data: they do not depend on world size, batch split, or how often a run was
stopped and resumed.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from ..errors import ConfigError, StateMismatch
from ._state import LoaderState
from .loader import Batch, Samples, TokenLoader
from .mixture import Mixture
from .order import ENDLESS, Shuffle, Window

__all__ = ["Replay", "ReplayedStep", "digest_of_step", "digest_of_stream", "load_state", "parse_range"]

_PLACE = "replay"
_PREFETCH_BLOCKS = 32  # for all ranks together, as one loader has by default


def digest_of_step(batches: Sequence[Batch]) -> bytes:
    """SHA-256 of one global step, from the batches of all its ranks in any order.

    It covers the rows in order of position. Of each row: its position, then its part of every tensor of shape
    ``(batch_size, seq_len)`` in order of name; all as little-endian integers of their own width, nothing in between.

    >>> import torch
    >>> row = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[6, 7]]), "position": torch.tensor([3])}
    >>> other = {**row, "position": torch.tensor([2])}
    >>> digest_of_step([row, other]) == digest_of_step([other, row]) != digest_of_step([row, row])
    True
    """
    shape = batches[0]["input_ids"].shape
    names = [name for name in sorted(batches[0]) if getattr(batches[0][name], "shape", None) == shape]
    arrays = [[batch[name].cpu().numpy() for name in names] for batch in batches]
    positions = np.concatenate([batch["position"].numpy() for batch in batches])
    digest = hashlib.sha256()
    for at in np.argsort(positions).tolist():
        rank, row = divmod(at, shape[0])
        digest.update(positions[at].tobytes())
        for array in arrays[rank]:
            digest.update(array[row])
    return digest.digest()


def digest_of_stream(step_digests: Iterable[bytes]) -> str:
    """SHA-256, in hexadecimal, of the digests of consecutive steps one after the other.

    A run that was stopped keeps the digests of its steps, so that the whole can be had from its parts.
    """
    return hashlib.sha256(b"".join(step_digests)).hexdigest()


class ReplayedStep(NamedTuple):
    """One global step.

    Attributes:
        step: its number, as :class:`Replay` counts.
        batches: of each rank, in order of rank.
        state: of every rank's loader after this step.
    """

    step: int
    batches: list[Batch]
    state: dict[str, Any]


# Guarantees: one thread at a time.
class Replay:
    """Iterate over steps ``[first, end)`` of a run as :class:`ReplayedStep`; each is read by all ranks, in this process.

    Args:
        source: a :class:`~stoker.loaders.TokenDataset` or a :class:`~stoker.loaders.Mixture`; stays open.
        global_batch: rows of a step; None takes that of `state`.
        world_size: ranks; divides `global_batch`.
        seed, shuffle: as :class:`~stoker.loaders.TokenLoader` takes them; None takes those of `state`, or the loader's
            defaults.
        epochs: length of the run; None never ends.
        skip: ranges of positions to jump over, besides those of `state`.
        state: where to start: what ``TokenLoader.state_dict()`` returned, of any topology. Steps then count from 0 at
            the next one, in the run that the state stands in. Without it, they count from the start of the first run.
        first, end: the range of steps; `end` None means the end of the run. Steps before `first` are not read.

    Raises:
        ConfigError: an argument breaks its rule, or the run has fewer steps.
        StateMismatch: the state is of other tokens or another order.
        Whatever the source can't read comes out of the iteration.
    """

    def __init__(
        self,
        source: Samples | Mixture,
        *,
        global_batch: int | None = None,
        world_size: int = 1,
        seed: int | None = None,
        shuffle: Shuffle | Window | None = None,
        epochs: int | None = 1,
        skip: Iterable[Sequence[int]] = (),
        state: Mapping[str, Any] | None = None,
        first: int = 0,
        end: int | None = None,
    ) -> None:
        saved = None if state is None else LoaderState.from_dict(state)
        if global_batch is None:
            if saved is None:
                raise ConfigError("global_batch is needed, unless a state tells it", place=_PLACE)
            global_batch = saved.global_batch
        if world_size < 1 or global_batch < 1 or global_batch % world_size:
            raise ConfigError(
                "world_size must be >= 1 and divide the rows of a step",
                value=f"world_size = {world_size} for {global_batch} rows",
                place=_PLACE,
            )
        self.global_batch, self.world_size = global_batch, world_size
        self._loaders = [
            TokenLoader(
                source,
                batch_size=global_batch // world_size,
                rank=rank,
                world_size=world_size,
                seed=(0 if saved is None else saved.seed) if seed is None else seed,
                shuffle=_shuffle_of(saved) if shuffle is None else shuffle,
                epochs=epochs,
                skip=skip,
                prefetch_blocks=max(1, _PREFETCH_BLOCKS // world_size),
            )
            for rank in range(world_size)
        ]
        if state is not None:
            for loader in self._loaders:
                loader.load_state_dict(state)
        self.first, self.end = self._go_to(first, end)

    def _go_to(self, first: int, end: int | None) -> tuple[int, int]:
        """Have all loaders stand before step `first`; returns the range, checked."""
        here = LoaderState.from_dict(self._loaders[0].state_dict())
        steps = self._loaders[0].remaining
        if end is None:
            if steps is None:
                raise ConfigError("steps must have an end in a run that has none", place=_PLACE)
            end = steps
        if not 0 <= first < end or (steps is not None and end > steps):
            here_to_end = "of the run" if here.position == here.run_start else "from here to the end of the run"
            rule = "steps must be a range A:B with 0 <= A < B"
            raise ConfigError(
                rule if steps is None else f"{rule} within the {steps} {here_to_end}",
                value=f"{first}:{end}",
                place=_PLACE,
                hint="" if steps is None else "ask for more epochs",
            )
        for loader in self._loaders:
            loader.jump(first)
        return first, end

    def __len__(self) -> int:
        """Steps of the range."""
        return self.end - self.first

    def __iter__(self) -> Iterator[ReplayedStep]:
        for step in range(self.first, self.end):
            batches = [next(loader) for loader in self._loaders]
            yield ReplayedStep(step, batches, self._loaders[0].state_dict())

    def close(self) -> None:
        """Close the loaders; the source stays open."""
        for loader in self._loaders:
            loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _shuffle_of(state: LoaderState | None) -> Shuffle | Window:
    if state is None or state.shuffle == "window":
        return Window() if state is None else Window(lanes=state.lanes, blocks=state.window_blocks)
    return state.shuffle  # type: ignore[return-value]  # the order checks it


def load_state(path: Path) -> dict[str, Any]:
    """The state of a loader from a JSON file.

    Raises:
        ConfigError: there is no such file.
        StateMismatch: it holds something else.
    """
    try:
        record = json.loads(path.read_bytes())
    except OSError as error:
        raise ConfigError("must be a file that can be read", value=error.strerror, place=str(path)) from error
    except ValueError as error:
        raise StateMismatch("must be the JSON of a loader's state", value=str(error), place=str(path)) from error
    if not isinstance(record, dict):
        raise StateMismatch("must be the JSON of a loader's state", value=type(record).__name__, place=str(path))
    return record


def parse_range(text: str, *, place: str) -> tuple[int, int | None]:
    """``A:B`` as a pair; ``A:`` is open, ``:B`` starts at 0 and ``A`` alone is one step.

    >>> parse_range("3:8", place="--steps"), parse_range("3:", place="--steps"), parse_range("3", place="--steps")
    ((3, 8), (3, None), (3, 4))
    """
    first, colon, end = text.partition(":")
    try:
        begin = int(first) if first or not colon else 0
        stop = (int(end) if end else None) if colon else begin + 1
    except ValueError:
        raise ConfigError("must be A:B, A: or A, in whole numbers", value=text, place=place) from None
    if max(begin, stop or 0) >= ENDLESS:
        raise ConfigError("must be below 2^62", value=text, place=place)
    return begin, stop
