"""The loader: batches of a shuffled, resumable, world-size independent stream of samples.

The consumer's thread does the work of a batch, and there is little of it: where rows lie is computed for thousands of
rows at once, and ``next`` copies resident rows into one of two output buffers. A producer thread would cost more in
hand-over than the whole batch (measured: 0.24 to 0.48 of the speed). What background threads do is make blocks resident
and verified ahead of need; the cache owns those.
"""

import logging
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import ConfigError, UnsupportedError
from ..metrics import counters
from ._buffers import DeviceBuffers, HostBuffers, usable_device
from ._lookahead import Lookahead
from ._packed import DocumentRows, RowBorders
from ._placement import place_in_group
from ._state import LoaderState
from .order import ORDER_VERSION, OrderV1, Shuffle, SkipRanges, Window, consecutive_rank_rows, rank_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Batch", "LoaderStats", "RowOrigin", "Samples", "TokenLoader"]

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, Any]
"""Tensors by name, and ``max_seqlen``, an int, where the source has borders of documents."""

_PLACE = "TokenLoader"
# Order and places are computed for this many rows in one call, and for 64 batches at least. Between two batches such a
# call costs 0.5 ms plus 0.1 ms per 1,024 rows: measured per batch of 16, 7 us at 1,024 rows, 2.5 at 8,192, 2.1 at 16,384.
_ROWS_PER_CALL = 8192
_BATCHES_PER_CALL = 64
_POSITIONS_PER_CALL = 1 << 20  # a call around skipped positions lists those of all ranks
_WAITS_KEPT = 4096
_ENDLESS = 2**62


class Samples(Protocol):
    """What the loader needs of a source: numbered samples of one length. :class:`~stoker.loaders.TokenDataset` is one.

    ``plan`` locates many rows without reading data; ``gather_planned`` fills two C-contiguous int64 arrays of shape
    ``(end - start, seq_len)`` with rows ``[start, end)`` of a plan, raising what it could not read; ``prefetch`` starts
    to bring the blocks of samples near and returns at once. `packing` names how samples are cut, for the state. If
    `documents` is true, the loader calls ``gather_documents`` instead of ``gather_planned``.
    """

    seq_len: int
    packing: str
    documents: bool

    def __len__(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def samples_per_block(self) -> int: ...
    @property
    def is_local(self) -> bool: ...
    def plan(self, samples: NDArray[np.int64]) -> Any: ...
    def gather_planned(
        self, plan: Any, start: int, end: int, input_ids: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None: ...
    def gather_documents(self, plan: Any, start: int, end: int, rows: DocumentRows) -> RowBorders: ...
    def prefetch(self, samples: NDArray[np.int64]) -> None: ...
    def explain(self, sample: int) -> Sequence[Any]: ...


class LoaderStats(NamedTuple):
    """A snapshot of one loader on one rank, counted since it was made, restores included.

    Attributes:
        batches, rows, tokens: delivered by this rank; a token is one of input_ids.
        wait_s: seconds that the trainer spent inside ``next``: the exposed cost of loading.
        wait_p50_ms, wait_p99_ms: of one ``next``, over the last 4,096; 0 before the first.
        fresh_buffers: batches that got new memory because older ones were still alive.
        position: the stream's position over all epochs, of all ranks together. epoch: the one it lies in.
        skipped_rows: positions jumped over by `skip` in the current run of epochs, all ranks together.
        dropped_rows: rows at the ends of finished runs that did not fill a global batch, all ranks together.
        trained_tokens: delivered by this rank with a label. padded_tokens: that are padding. The rest of `tokens` has
            no label because it stands at the border of a document.
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


class RowOrigin(NamedTuple):
    """Where one row of a global step came from.

    Attributes:
        position: in the stream, over all epochs. epoch: of that position.
        rank: that got the row. row: its number in the rank's batch.
        sample: number in the source.
        spans: what the source says of it; for a token data set its (shard, document, token range) pieces in order.
    """

    position: int
    epoch: int
    rank: int
    row: int
    sample: int
    spans: tuple[Any, ...]


# Guarantees: one consumer thread at a time calls next, load_state_dict and close; state_dict and stats may be called
# from any thread and see the stream between two batches.
class TokenLoader(IterableDataset[Batch]):
    """Iterate over batches of `source`; the stream depends on the seed and the position alone.

    A batch is ``{"input_ids", "labels", "position"}``: two contiguous int64 tensors of shape ``(batch_size, seq_len)``
    and the stream positions of the rows, ``(batch_size,)`` int64. Step after step the next ``batch_size * world_size``
    positions are dealt to the ranks (:func:`~stoker.loaders.order.rank_rows`), so each global step holds the same rows
    at any world size, and any split with the same product gives the same steps. Every rank gets equally many steps.
    Steps run on over the borders of epochs; only what does not fill a global batch at the end of a run is dropped, and
    counted.

    With borders of documents (see :class:`~stoker.loaders.TokenDataset`) a batch also has ``position_ids`` and
    ``doc_ids``, int64, and ``loss_mask``, bool, all ``(batch_size, seq_len)``; and for attention within each piece of
    the flattened batch ``cu_seqlens``, int32 from 0 to ``batch_size * seq_len``, and ``max_seqlen``, a Python int, as
    ``torch.nn.attention.varlen.varlen_attn`` and flash attention want them. Rows start pieces, and padding is one.

    **Runs.** A loader is its own iterator. A run is `epochs` epochs long; ``iter`` after the end of a run starts the
    next one, in a new order. ``iter`` in the middle of a run goes on where the run stands: it never rewinds.

    **State.** :meth:`state_dict` counts what was delivered to the caller. After :meth:`load_state_dict`, the loader
    does what the one that gave the state would have done next: restored after the last batch it ends at once, restored
    after the end of a run it starts the next one (:attr:`epoch` tells). Any rank's state serves every rank and every
    world size. With another global batch the stream goes on at the same position, which is logged.

    **Memory.** A batch belongs to the caller for as long as any reference to its memory is alive, views included; only
    then is it used again. ``list(loader)`` is right.

    **Other loops.** In a stock ``DataLoader`` pass ``batch_size=None`` and no workers. In a worker process the loader
    refuses to run: each worker would deliver the same rows.

    Args:
        source: a :class:`~stoker.loaders.TokenDataset`; stays open when the loader closes.
        batch_size: rows per rank and step.
        seed: of the order, 0 to 2^63 - 1.
        shuffle: ``"window"``, or a :class:`~stoker.loaders.order.Window` with other settings; ``"full"``: one shuffle
            of all samples, for which every node reads every block; ``"none"``: the order of the data set.
        rank, world_size: of the data-parallel group; give both or neither (0 of 1). Ranks that must see the same rows
            (tensor, pipeline, context parallel) pass the same rank.
        mesh: instead of both, a ``DeviceMesh``: its dimensions named "dp", "dp_replicate" and "dp_shard", or its only
            one if it is not named.
        epochs: length of a run; None never ends.
        device: where batches go; None or "cpu" is host memory. On an accelerator the buffers are pinned and the copy
            does not block; ``position`` stays in host memory.
        skip: ranges ``(start, end)`` of stream positions to jump over, end exclusive, the same on every rank. Those of
            a restored state are kept as well.
        prefetch_blocks: order blocks of a remote source that may be under way ahead of need.
        cu_seqlens_size: for compiled graphs: `cu_seqlens` always has this many entries, of which the last ones repeat
            the end, which reads as empty pieces, and `max_seqlen` is always `seq_len`. None: as many entries as there
            are pieces and one, and the length of the longest. ``batch_size * max_pieces + 1`` of
            :meth:`~stoker.loaders.TokenDataset.packing_report` is enough for every batch.

    Raises:
        ConfigError: an argument breaks its rule, or a run does not fill one global batch; from ``next``, a batch has
            more pieces than `cu_seqlens_size` has room for.
        UnsupportedError: a mesh whose data-parallel dimensions can't be told.
        Whatever the source can't read (:class:`~stoker.errors.CorruptBlock`, ...) comes out of ``next``; the position
        has not moved then, and the next ``next`` tries the same batch again.

    Examples:
        >>> import tempfile
        >>> from stoker.loaders import TokenDataset, TokenWriter
        >>> directory = tempfile.TemporaryDirectory()
        >>> with TokenWriter(directory.name, dtype="uint16", eos_id=None) as writer:
        ...     writer.write(range(33))
        >>> loader = TokenLoader(TokenDataset(directory.name, seq_len=4), batch_size=2, shuffle="none")
        >>> len(loader)
        4
        >>> batch = next(loader)
        >>> batch["input_ids"].tolist(), batch["labels"].tolist(), batch["position"].tolist()
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [[1, 2, 3, 4], [5, 6, 7, 8]], [0, 1])
        >>> state = loader.state_dict()
        >>> again = TokenLoader(TokenDataset(directory.name, seq_len=4), batch_size=3, shuffle="none")
        >>> again.load_state_dict(state)
        >>> [sorted(batch["position"].tolist()) for batch in again]
        [[2, 3, 4], [5, 6, 7]]
        >>> directory.cleanup()
    """

    def __init__(
        self,
        source: Samples,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: Shuffle | Window = "window",
        rank: int | None = None,
        world_size: int | None = None,
        mesh: "DeviceMesh | None" = None,
        epochs: int | None = 1,
        device: torch.device | str | None = None,
        skip: Iterable[Sequence[int]] = (),
        prefetch_blocks: int = 32,
        cu_seqlens_size: int | None = None,
    ) -> None:
        _at_least_one("batch_size", batch_size)
        _at_least_one("prefetch_blocks", prefetch_blocks)
        if cu_seqlens_size is not None:
            if not source.documents:
                raise ConfigError(
                    "only batches with borders of documents have cu_seqlens",
                    value=f"cu_seqlens_size={cu_seqlens_size}",
                    place=_PLACE,
                    hint="TokenDataset(..., documents=True)",
                )
            if cu_seqlens_size <= batch_size:
                raise ConfigError(
                    f"cu_seqlens_size must be above batch_size = {batch_size}", value=cu_seqlens_size, place=_PLACE
                )
        if epochs is not None:
            _at_least_one("epochs", epochs, hint="None runs for ever")
        self.source = source
        self._documents = source.documents
        self.batch_size = batch_size
        self.rank, self.world_size = place_in_group(rank, world_size, mesh)
        self.epochs = epochs
        self.device = usable_device(device)
        window = shuffle if isinstance(shuffle, Window) else Window()
        self.order = OrderV1(
            num_samples=len(source),
            seed=seed,
            samples_per_block=source.samples_per_block,
            lanes=window.lanes,
            window_blocks=window.blocks,
            shuffle="window" if isinstance(shuffle, Window) else shuffle,
        )
        self._global_batch = batch_size * self.world_size
        self._skip = SkipRanges(skip)
        self._prefetch_blocks = prefetch_blocks
        self._cu_seqlens_size = cu_seqlens_size
        self._position = 0  # everything before it is delivered, skipped or dropped
        self._run_start = 0
        self._ended = False  # StopIteration was raised and no iter() came after it
        self._closed = False
        self._buffers: HostBuffers | DeviceBuffers | None = None
        self._padded = self._untrained = 0
        self._batches = self._dropped = self._wait_ns = self._counted_batches = self._counted_wait_ns = 0
        self._waits_ns: deque[int] = deque(maxlen=_WAITS_KEPT)
        # The planned steps: step `_at` of `_planned` is next, after `_steps_behind` of earlier plans.
        self._at = self._planned = self._steps_behind = 0
        self._plan: Any = None
        self._rows: list[NDArray[np.int64]] = []  # positions of this rank's rows, one array for each step
        self._ends: Sequence[int] = ()  # self._position after each step
        self._upcoming: deque[tuple[NDArray[np.int64], NDArray[np.int64], Sequence[int]]] = deque()
        self._lookahead: Lookahead | None = None
        self._forget_plan()
        if epochs is not None and len(self) == 0:
            raise ConfigError(
                f"a run must have the batch_size * world_size = {self._global_batch} rows of a step at least",
                value=self._live_rows(0, self._run_end),
                place=_PLACE,
                hint="use a smaller batch or more epochs",
            )

    # -- the stream ---------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The first stream position that was not delivered, over all epochs and ranks."""
        return self._position

    @property
    def epoch(self) -> int:
        """Whole epochs behind :attr:`position`."""
        return self._position // self.order.num_samples

    @property
    def _run_end(self) -> int:
        return _ENDLESS if self.epochs is None else self._run_start + self.epochs * self.order.num_samples

    def _live_rows(self, start: int, end: int) -> int:
        return self._skip.live_before(end) - self._skip.live_before(start)

    def __len__(self) -> int:
        """Steps of the whole current run, also in its middle; TypeError for a loader without an end."""
        if self.epochs is None:
            raise TypeError("a TokenLoader with epochs=None has no length")  # the protocol of len(), as in torch
        return self._live_rows(self._run_start, self._run_end) // self._global_batch

    def __iter__(self) -> Self:
        self._require_usable()
        self._ended = False
        return self

    def __next__(self) -> Batch:
        began = perf_counter_ns()
        at = self._at
        if at == self._planned:
            self._plan_steps()
            at = 0
        elif self._lookahead is not None:
            self._lookahead.advance((self._steps_behind + at) * self.batch_size)
        buffers = self._buffers
        assert buffers is not None
        arrays = buffers.take()
        first = at * self.batch_size
        batch: Batch
        if self._documents:
            batch = self._gather_documents(buffers, DocumentRows(*arrays), first)
        else:
            self.source.gather_planned(self._plan, first, first + self.batch_size, arrays[0], arrays[1])
            input_ids, labels = buffers.deliver(arrays)
            batch = {"input_ids": input_ids, "labels": labels}
        batch["position"] = torch.from_numpy(self._rows[at])
        self._at = at + 1
        self._position = self._ends[at]
        self._batches += 1
        waited = perf_counter_ns() - began
        self._wait_ns += waited
        self._waits_ns.append(waited)
        return batch

    def _gather_documents(self, buffers: HostBuffers | DeviceBuffers, rows: DocumentRows, first: int) -> Batch:
        borders = self.source.gather_documents(self._plan, first, first + self.batch_size, rows)
        ends, longest = borders.cu_seqlens, borders.max_seqlen
        if self._cu_seqlens_size is not None:
            if len(ends) > self._cu_seqlens_size:
                raise ConfigError(
                    f"cu_seqlens_size must hold the {len(ends) - 1} pieces of this batch and one",
                    value=self._cu_seqlens_size,
                    place=_PLACE,
                    hint="batch_size * packing_report().max_pieces + 1 holds every batch",
                )
            ends = np.pad(ends, (0, self._cu_seqlens_size - len(ends)), mode="edge")
            longest = self.source.seq_len
        self._untrained += rows.loss_mask.size - int(np.count_nonzero(rows.loss_mask))
        self._padded += borders.padded_tokens
        batch: Batch = dict(zip(DocumentRows._fields, buffers.deliver(rows), strict=True))
        batch["cu_seqlens"] = torch.from_numpy(ends).to(self.device or "cpu")
        batch["max_seqlen"] = longest
        return batch

    def _plan_steps(self) -> None:
        """Locate the rows of the next steps; at the end of the run, raise StopIteration."""
        self._require_usable()
        if self._ended:
            raise StopIteration
        self._count()
        if self._buffers is None:
            shape = (self.batch_size, self.source.seq_len)
            dtypes = DocumentRows.dtypes() if self._documents else (np.int64, np.int64)
            self._buffers = (
                HostBuffers(shape, dtypes) if self.device is None else DeviceBuffers(shape, dtypes, self.device)
            )
        if not self._upcoming:
            self._prepare(self._position)
        if not self._upcoming:
            self._dropped += self._live_rows(self._position, self._run_end)
            self._position = self._run_start = self._run_end
            self._forget_plan()
            self._ended = True
            raise StopIteration
        positions, samples, ends = self._upcoming[0]
        self._plan = self.source.plan(samples)  # if it raises, these steps are still upcoming
        self._upcoming.popleft()
        self._rows, self._ends = list(positions), ends
        self._steps_behind += self._planned
        self._at, self._planned = 0, len(self._rows)
        if self._lookahead is not None:
            if not self._upcoming:
                self._prepare(self._ends[-1])
            self._lookahead.advance(self._steps_behind * self.batch_size)

    def _prepare(self, position: int) -> None:
        """Append positions, samples and ends of the steps from `position` on, unless the run has none left."""
        steps = self._live_rows(position, self._run_end) // self._global_batch
        if steps == 0:
            return
        steps = min(steps, max(_BATCHES_PER_CALL, _ROWS_PER_CALL // self.batch_size))
        start = self._skip.position_of(self._skip.live_before(position))
        skip = self._skip.next_skip(start)
        whole = steps if skip is None else min(steps, (skip - start) // self._global_batch)
        split = {"lanes": self.order.lanes, "world_size": self.world_size, "rank": self.rank}
        if whole:
            rows = consecutive_rank_rows(start, steps=whole, global_batch=self._global_batch, **split)
            ends = range(start + self._global_batch, start + whole * self._global_batch + 1, self._global_batch)
        else:
            steps = min(steps, max(1, _POSITIONS_PER_CALL // self._global_batch))
            live = self._skip.live_positions(start, steps * self._global_batch).reshape(steps, -1)
            rows = rank_rows(live, **split)
            ends = (live[:, -1] + 1).tolist()
        samples = self.order(rows).ravel()
        self._upcoming.append((rows, samples, ends))
        if self._lookahead is not None:
            self._lookahead.extend(samples)

    def _forget_plan(self) -> None:
        self._at = self._planned = self._steps_behind = 0
        self._plan, self._rows, self._ends = None, [], ()
        self._upcoming = deque()
        self._lookahead = None
        if not self.source.is_local:
            self._lookahead = Lookahead(
                self.source,
                samples_per_block=self.order.samples_per_block,
                max_blocks=self._prefetch_blocks,
                batch_size=self.batch_size,
            )

    def _require_usable(self) -> None:
        if self._closed:
            raise ConfigError("the loader is closed", place=_PLACE)
        worker = get_worker_info()
        if worker is not None:
            raise UnsupportedError(
                "a loader runs in the trainer's process, not in the workers of a DataLoader",
                value=f"worker {worker.id} of {worker.num_workers}",
                place=_PLACE,
                hint="iterate over the loader itself, or use DataLoader(loader, batch_size=None, num_workers=0)",
            )

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain values that JSON holds: a few hundred bytes, the same on every rank."""
        return self._state().to_dict()

    def _state(self) -> LoaderState:
        order = self.order
        return LoaderState(
            fingerprint=self.source.fingerprint,
            packing=self.source.packing,
            seq_len=self.source.seq_len,
            num_samples=order.num_samples,
            order_version=ORDER_VERSION,
            seed=order.seed,
            shuffle=order.shuffle,
            samples_per_block=order.samples_per_block,
            lanes=order.lanes,
            window_blocks=order.window_blocks,
            position=self._position,
            run_start=self._run_start,
            skip=self._skip.ranges,
            global_batch=self._global_batch,
        )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go to where `state_dict` stands, from the next batch on; before, between or after iterations.

        The state may come from any rank, world size, batch size, number of epochs, place of the data and device.

        Raises:
            StateMismatch: of other tokens or another order (every difference is named), or no state at all; an empty
                one is refused, because to start anew in silence would repeat data. The loader stays as it was.
            UnknownVersion: written by a newer version.
        """
        state = LoaderState.from_dict(state_dict)
        state.require_same_stream(self._state())
        self._skip = SkipRanges([*state.skip, *self._skip.ranges])
        self._position, self._run_start, self._ended = state.position, state.run_start, False
        self._forget_plan()
        if state.global_batch != self._global_batch:
            logger.info(
                "the global batch was %d when the state was taken and is %d now: the stream goes on at position %d",
                state.global_batch,
                self._global_batch,
                state.position,
            )

    # -- reports ------------------------------------------------------------------------------------------------------

    def stats(self) -> LoaderStats:
        """What this loader delivered and how long its caller waited; see :class:`LoaderStats`."""
        waits = np.array(tuple(self._waits_ns) or (0,)) / 1e6
        rows = self._batches * self.batch_size
        return LoaderStats(
            batches=self._batches,
            rows=rows,
            tokens=rows * self.source.seq_len,
            wait_s=self._wait_ns / 1e9,
            wait_p50_ms=float(np.percentile(waits, 50)),
            wait_p99_ms=float(np.percentile(waits, 99)),
            fresh_buffers=0 if self._buffers is None else self._buffers.fresh,
            position=self._position,
            epoch=self.epoch,
            skipped_rows=self._position - self._run_start - self._live_rows(self._run_start, self._position),
            dropped_rows=self._dropped,
            trained_tokens=rows * self.source.seq_len - self._untrained,
            padded_tokens=self._padded,
        )

    def explain(self, step: int) -> list[RowOrigin]:
        """The rows of one global step, of all ranks, in order of position.

        Steps count from 0 at the start of the stream, through all runs, as a loader delivers them that never had another
        batch size, world size, `epochs` or `skip` than this one has now.

        Raises:
            ConfigError: a negative step.
        """
        if step < 0:
            raise ConfigError("step must be >= 0", value=step, place=_PLACE)
        positions = self._skip.live_positions(self._start_of_step(step), self._global_batch)
        samples = dict(zip(positions.tolist(), self.order(positions).tolist(), strict=True))
        origins = []
        for rank in range(self.world_size):
            rows = rank_rows(positions, lanes=self.order.lanes, world_size=self.world_size, rank=rank)
            for row, position in enumerate(rows.tolist()):
                origins.append(
                    RowOrigin(
                        position=position,
                        epoch=position // self.order.num_samples,
                        rank=rank,
                        row=row,
                        sample=samples[position],
                        spans=tuple(self.source.explain(samples[position])),
                    )
                )
        return sorted(origins)

    def _start_of_step(self, step: int) -> int:
        """The first live position of a step, counted from the start of the stream."""
        start = 0
        if self.epochs is not None:
            run_rows = self.epochs * self.order.num_samples
            last_skip = self._skip.ranges[-1][1] if self._skip.ranges else 0
            while start < last_skip:  # runs with a skip may be shorter, one by one
                steps = self._live_rows(start, start + run_rows) // self._global_batch
                if step < steps:
                    break
                step, start = step - steps, start + run_rows
            else:
                runs, step = divmod(step, run_rows // self._global_batch)
                start += runs * run_rows
        return self._skip.position_of(self._skip.live_before(start) + step * self._global_batch)

    def _count(self) -> None:
        """Add to the process's counters what came since the last call."""
        batches, wait_ns = self._batches - self._counted_batches, self._wait_ns - self._counted_wait_ns
        if batches:
            counters.add("loader.batches", batches)
            counters.add("loader.tokens", batches * self.batch_size * self.source.seq_len)
            counters.add("loader.wait_s", wait_ns / 1e9)
        self._counted_batches, self._counted_wait_ns = self._batches, self._wait_ns

    # -- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Let the buffers go. Delivered batches stay valid, the source stays open; ``next`` raises from now on."""
        if not self._closed:
            self._count()
            self._forget_plan()
            self._buffers = None
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # To a spawned worker goes what it needs to refuse its work in one clear sentence; no memory, no plan.
        state = self.__dict__.copy()
        for name in ("_buffers", "_plan", "_lookahead", "_rows", "_ends", "_upcoming"):
            state[name] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_plan()


def _at_least_one(name: str, value: int, *, hint: str = "") -> None:
    if value < 1:
        raise ConfigError(f"{name} must be >= 1", value=value, place=_PLACE, hint=hint)
