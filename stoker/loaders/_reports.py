"""What a loader tells of itself: counts of what it delivered, and where the rows of a step come from."""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ._packed import RowBorders
from .mixed_order import MixedOrder
from .order import OrderV1, rank_rows

__all__ = ["LoaderStats", "RowOrigin", "SourceStats", "SourceTally", "origins_of"]


class SourceStats(NamedTuple):
    """What a loader on one rank did with one source of a mixture, and where the stream of all ranks stands in it.

    Attributes:
        rows, tokens, trained_tokens, padded_tokens: delivered by this rank, as in :class:`LoaderStats`.
        samples: positions before the loader's that fall to the source, of all ranks, skipped and dropped ones included.
        epochs: `samples` by the number of samples that the source has.
        repeated_samples: of `samples`, those beyond the source's first epoch.
        dropped_rows: as in :class:`LoaderStats`.
        unread_samples: that its cap left unread when it left the mixture; 0 before.
    """

    rows: int
    tokens: int
    trained_tokens: int
    padded_tokens: int
    samples: int
    epochs: float
    repeated_samples: int
    dropped_rows: int
    unread_samples: int


class LoaderStats(NamedTuple):
    """A snapshot of one loader on one rank, counted since it was made, restores included.

    Attributes:
        batches, rows, tokens: delivered by this rank; a token is one of input_ids.
        wait_s: seconds that the trainer spent inside ``next``: the exposed cost of loading.
        wait_p50_ms, wait_p99_ms: of one ``next``, over the last 4,096; 0 before the first.
        fresh_buffers: batches that got new memory because older ones were still alive.
        position: the stream's position over all epochs, of all ranks together. epoch: the one it lies in; of a mixture,
            how often all sources that stay in it were read whole.
        skipped_rows: positions jumped over by `skip` in the current run of epochs, all ranks together.
        dropped_rows: rows at the ends of finished runs that did not fill a global batch, all ranks together.
        trained_tokens: delivered by this rank with a label. padded_tokens: that are padding. The rest of `tokens` has
            no label because it stands at the border of a document.
        sources: of each source of a mixture by name; empty for one data set.
        slack_s: seconds of data ahead of the trainer: until the first block is needed that was asked for and is not there
            yet, at the pace so far; if all are there, until the last one is. None where nothing is fetched ahead.
    """

    batches: int
    rows: int
    tokens: int
    wait_s: float
    wait_p50_ms: float
    wait_p99_ms: float
    fresh_buffers: int
    position: int
    epoch: int
    skipped_rows: int
    dropped_rows: int
    trained_tokens: int
    padded_tokens: int
    sources: dict[str, SourceStats]
    slack_s: float | None


class RowOrigin(NamedTuple):
    """Where one row of a global step came from.

    Attributes:
        position: in the stream, over all epochs. epoch: of that position; in a mixture, of the row's source.
        rank: that got the row. row: its number in the rank's batch.
        sample: number in the source.
        spans: what the source says of it; for a token data set its (shard, document, token range) pieces in order.
        source: name in the mixture, None for one data set.
    """

    position: int
    epoch: int
    rank: int
    row: int
    sample: int
    spans: tuple[Any, ...]
    source: str | None = None


class SourceTally:
    """Counts of each source of a mixture, as arrays with one element for each."""

    def __init__(self, sources: int) -> None:
        self.rows, self.padded, self.unlabelled, self.dropped = (np.zeros(sources, np.int64) for _ in range(4))

    def of(self, sources: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many of some rows each source has."""
        return np.bincount(sources, minlength=len(self.rows))

    def add_documents(self, sources: NDArray[np.int64], borders: RowBorders) -> None:
        """Count the tokens without a label of rows with borders."""
        for total, of_rows in ((self.padded, borders.padded), (self.unlabelled, borders.unlabelled)):
            total += np.bincount(sources, of_rows, len(total)).astype(np.int64)

    def stats(
        self, order: MixedOrder, *, position: int, planned: NDArray[np.int64], seq_len: int
    ) -> dict[str, SourceStats]:
        """By name. `planned`: sources of the rows that were delivered and are not among :attr:`rows` yet."""
        columns = (
            self.rows + self.of(planned),
            self.padded,
            self.unlabelled,
            self.dropped,
            order.samples_before(position),
            order.unread_before(position),
        )
        stats = {}
        for source, values in zip(order.sources, np.stack(columns, axis=1).tolist(), strict=True):
            rows, padded, unlabelled, dropped, samples, unread = values
            stats[source.name] = SourceStats(
                rows=rows,
                tokens=rows * seq_len,
                trained_tokens=rows * seq_len - unlabelled,
                padded_tokens=padded,
                samples=samples,
                epochs=samples / source.num_samples,
                repeated_samples=max(0, samples - source.num_samples),
                dropped_rows=dropped,
                unread_samples=unread,
            )
        return stats


class _Explains(Protocol):
    def explain(self, sample: int) -> Sequence[Any]: ...


def origins_of(
    positions: NDArray[np.int64], order: OrderV1 | MixedOrder, source: _Explains, *, world_size: int
) -> list[RowOrigin]:
    """The rows of one global step, of all ranks, in order of position. `positions` ascend."""
    ids = order(positions)
    samples, names = ids.tolist(), list[str | None]([None] * len(ids))
    if isinstance(order, MixedOrder):
        numbers, own = order.locate(positions)
        epochs = [at // order.sources[j].num_samples for j, at in zip(numbers.tolist(), own.tolist(), strict=True)]
        names = [order.sources[j].name for j in numbers.tolist()]
        samples = [int(order.ids.samples(j, ids[i : i + 1])[0]) for i, j in enumerate(numbers.tolist())]
    else:
        epochs = (positions // order.num_samples).tolist()
    origins = []
    for rank in range(world_size):
        rows = rank_rows(positions, lanes=order.lanes, world_size=world_size, rank=rank)
        for row, position in enumerate(rows.tolist()):
            i = int(np.searchsorted(positions, position))
            spans = tuple(source.explain(int(ids[i])))
            origins.append(RowOrigin(position, epochs[i], rank, row, samples[i], spans, names[i]))
    return sorted(origins, key=lambda origin: origin.position)
