"""The loader: batches of a shuffled, resumable, world-size independent stream of samples.

The consumer's thread does the work of a batch, and there is little of it: where rows lie is computed for thousands of
rows at once, and ``next`` copies resident rows into one of two output buffers. A producer thread would cost more in
hand-over than the whole batch (measured: 0.24 to 0.48 of the speed). What background threads do is make blocks resident
and verified ahead of need; the cache owns those.
"""

import logging
import mmap
import weakref
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from itertools import count
from multiprocessing.context import get_spawning_popen
from os import PathLike
from time import perf_counter_ns
from typing import TYPE_CHECKING, Any, Protocol, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from ..errors import ConfigError, StateMismatch, UnsupportedError
from ..metrics import counters
from ._ahead import ReadAhead, close_dropped
from ._buffers import DeviceBuffers, HostBuffers, usable_device
from ._dataloader import WorkerPart, state_after
from ._lookahead import Lookahead
from ._numbers import whole
from ._packed import DocumentRows, RowBorders
from ._placement import place_in_group
from ._reports import LoaderStats, RowOrigin, SourceStats, SourceTally, origins_of
from ._state import LoaderState
from ._window import CacheRoom, fitting_window, unfitting
from .dataset import TokenDataset
from .mixed_order import MIXTURE_VERSION, MixedOrder, SampleIds
from .mixture import Mixture
from .order import ENDLESS, ORDER_VERSION, OrderV1, Shuffle, SkipRanges, Window, consecutive_rank_rows, rank_rows

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Batch", "LoaderStats", "RowOrigin", "Samples", "SourceStats", "TokenLoader"]

logger = logging.getLogger(__name__)

Batch: TypeAlias = dict[str, Any]
"""Tensors by name, and ``max_seqlen``, an int, where the source has borders of documents."""

_PLACE = "TokenLoader"
# Order and places are computed for this many rows in one call, and for 64 batches at least. Between two batches such a
# call costs 0.5 ms plus 0.1 ms per 1,024 rows: measured per batch of 16, 7 us at 1,024 rows, 2.5 at 8,192, 2.1 at 16,384.
_ROWS_PER_CALL = 8192
_DEFAULT_WINDOWS = (1, 2, 4)  # blocks a lane: what a small cache leaves of the default
_BATCHES_PER_CALL = 64
_MOST_CALLS = 8  # of so many rows at once, where several sources share them: each has an order of its own to compute
_POSITIONS_PER_CALL = 1 << 20  # a call around skipped positions lists those of all ranks
_WAITS_KEPT = 4096
_OF_SOURCES = ("seq_len", "packing", "documents", "samples_per_block", "is_local", "plan", "prefetch", "__len__")


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

    **Other loops.** ``DataLoader(loader, batch_size=None)`` delivers the same batches, with any number of workers and
    any way to start them: worker `k` of `n` makes steps `k`, `k + n`, and so on. Then this object does not know how many
    the trainer got, so that :meth:`state_dict` refuses: save a ``StatefulDataLoader``'s state, which resumes with the
    same number of workers, or :meth:`state_from` it, which resumes anywhere. Workers that don't persist start each
    iteration where this object stands: :meth:`set_epoch` moves it on, as with torch's ``DistributedSampler``.

    A batch of a mixture has ``source`` too, int64 ``(batch_size,)``: the number of each row's source in its `names`;
    ``doc_ids`` then count the documents of that source.

    Args:
        source: a :class:`~stoker.loaders.TokenDataset` or a :class:`~stoker.loaders.Mixture` of several; stays open when
            the loader closes.
        batch_size: rows per rank and step.
        seed: of the order, 0 to 2^63 - 1.
        shuffle: ``"window"``, or a :class:`~stoker.loaders.order.Window` with other settings; ``"full"``: one shuffle
            of all samples, for which every node reads every block; ``"none"``: the order of the data set. Windows over
            remote data must fit into the cache: where the default does not, and there is one rank, it is made smaller
            with a warning, and what does not fit then is refused. A restored loader keeps its state's window.
        rank, world_size: of the data-parallel group; give both or neither (0 of 1). Ranks that must see the same rows
            (tensor, pipeline, context parallel) pass the same rank.
        mesh: instead of both, a ``DeviceMesh``: its dimensions named "dp", "dp_replicate" and "dp_shard", or its only
            one if it is not named.
        epochs: length of a run; None never ends. What that means for a mixture, its `stop` says.
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
        source: "Samples | Mixture",
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
        _require_samples(source)
        batch_size = whole("batch_size", batch_size, place=_PLACE, least=1)
        prefetch_blocks = whole("prefetch_blocks", prefetch_blocks, place=_PLACE, least=1)
        seed = whole("seed", seed, place=_PLACE)
        if cu_seqlens_size is not None:
            cu_seqlens_size = whole("cu_seqlens_size", cu_seqlens_size, place=_PLACE)
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
            epochs = whole("epochs", epochs, place=_PLACE, least=1, hint="None runs for ever")
        self.source = source
        self._documents = source.documents
        self.batch_size = batch_size
        self.rank, self.world_size = place_in_group(rank, world_size, mesh)
        self.epochs = epochs
        self.device = usable_device(device)
        self._default_window = shuffle == "window"
        window = Window()
        if self._default_window or isinstance(shuffle, Window):
            given = shuffle if isinstance(shuffle, Window) else None
            window = fitting_window(self._cache_rooms(), given=given, world_size=self.world_size, place=_PLACE)
        kind: Shuffle = "window" if isinstance(shuffle, Window) else shuffle
        self.order = self._order_of(seed, kind, window)
        orders = self.order.orders if isinstance(self.order, MixedOrder) else (self.order,)
        if epochs is not None and epochs * max(order.num_samples for order in orders) >= ENDLESS // 2:
            raise ConfigError(
                "a run must have fewer than 2^61 rows",
                value=f"epochs={epochs}",
                place=_PLACE,
                hint="None runs for ever",
            )
        if isinstance(source, Mixture):
            self._rows_per_call = _ROWS_PER_CALL * min(len(source.names), _MOST_CALLS)
            self._tally: SourceTally | None = SourceTally(len(source.names))
        else:
            self._rows_per_call, self._tally = _ROWS_PER_CALL, None
        self._global_batch = batch_size * self.world_size
        self._skip = SkipRanges(skip)
        self._prefetch_blocks = prefetch_blocks
        self._cu_seqlens_size = cu_seqlens_size
        self._position = 0  # everything before it is delivered, skipped or dropped
        self._run_start, self._run_end = 0, self.order.run_end(0, epochs)
        self._run_starts = [0]  # of runs 0, 1, ... of a mixture, as far as they were asked for
        self._ended = False  # StopIteration was raised and no iter() came after it
        self._closed = False
        self._worker: WorkerPart | None = None  # in a worker of a DataLoader: which steps are its own
        self._in_workers = mmap.mmap(-1, 1)  # shared with forked workers: 1 once one of them iterates over this loader
        self._next_position: int | None = None  # of the first step that is not prepared, once one is
        self._others_steps = 0  # in a worker: steps from there to its next own one
        self._buffers: HostBuffers | DeviceBuffers | None = None
        self._padded = self._untrained = 0
        self._batches = self._dropped = self._wait_ns = self._counted_batches = self._counted_wait_ns = 0
        self._waits_ns: deque[int] = deque(maxlen=_WAITS_KEPT)
        # The planned steps: step `_at` of `_planned` is next, after `_steps_behind` of earlier plans.
        self._at = self._planned = self._steps_behind = 0
        self._plan: Any = None
        self._rows: list[NDArray[np.int64]] = []  # positions of this rank's rows, one array for each step
        self._row_sources = np.empty(0, np.int64)  # in a mixture, the source of each row
        self._ends: Sequence[int] = ()  # self._position after each step
        self._upcoming: deque[tuple[NDArray[np.int64], NDArray[np.int64], Sequence[int]]] = deque()
        self._lookahead: Lookahead | None = None
        self._ahead: ReadAhead | None = None
        self._close_ahead: Any = None
        self._forget_plan()
        if self._live_rows(0, self._run_end) < self._global_batch:
            raise ConfigError(
                f"a run must have the batch_size * world_size = {self._global_batch} rows of a step at least",
                value=self._live_rows(0, self._run_end),
                place=_PLACE,
                hint="use a smaller batch or more epochs"
                + ("; the first source to be exhausted ends a run" if self._tally is not None else ""),
            )

    def _order_of(self, seed: int, shuffle: Shuffle, window: Window) -> OrderV1 | MixedOrder:
        if isinstance(self.source, Mixture):
            return self.source.order(seed=seed, shuffle=shuffle, window=window)
        return OrderV1(
            num_samples=len(self.source),
            seed=seed,
            samples_per_block=self.source.samples_per_block,
            lanes=window.lanes,
            window_blocks=window.blocks,
            shuffle=shuffle,
        )

    def _cache_rooms(self) -> list[CacheRoom]:
        sources = self.source.sources if isinstance(self.source, Mixture) else (self.source,)
        rooms = [source.cache_room() for source in sources if isinstance(source, TokenDataset)]
        return [room for room in rooms if room is not None]

    def _order_with(self, state: LoaderState) -> OrderV1 | MixedOrder:
        """This loader's order with the window of a state, which may have been another default where it was taken."""
        order = self.order
        if not self._default_window or state.window_blocks not in _DEFAULT_WINDOWS:
            return order
        window = Window(lanes=order.lanes, blocks=state.window_blocks)
        return order if window.blocks == order.window_blocks else self._order_of(order.seed, order.shuffle, window)

    def _take_order(self, order: OrderV1 | MixedOrder) -> None:
        if self._default_window:
            window = Window(lanes=order.lanes, blocks=order.window_blocks)
            if told := unfitting(self._cache_rooms(), window):
                logger.warning("%s: the windows of this stream are too large for the cache (%s)", _PLACE, told)
        if order is not self.order:
            self.order, self._run_starts = order, [0]
            self._drop_ahead()

    def _drop_ahead(self) -> None:
        if self._ahead is not None:
            self._close_ahead.detach()
            self._ahead.close()
            self._ahead = None

    # -- the stream ---------------------------------------------------------------------------------------------------

    @property
    def position(self) -> int:
        """The first stream position that was not delivered, over all epochs and ranks."""
        return self._position

    @property
    def epoch(self) -> int:
        """Whole epochs behind :attr:`position`; of a mixture, of the source that was read least of those that stay in it."""
        return self.order.epoch(self._position)

    def _live_rows(self, start: int, end: int) -> int:
        return self._skip.live_before(end) - self._skip.live_before(start)

    def __len__(self) -> int:
        """Steps of the whole current run, also in its middle; TypeError for a loader without an end."""
        if self._run_end >= ENDLESS:
            why = "epochs=None" if self.epochs is None else "a mixture that never stops"
            raise TypeError(f"a TokenLoader with {why} has no length")  # the protocol of len(), as in torch
        return self._live_rows(self._run_start, self._run_end) // self._global_batch

    @property
    def remaining(self) -> int | None:
        """Steps that the current run still delivers; None for a loader without an end."""
        if self._run_end >= ENDLESS:
            return None
        return max(0, self._live_rows(self._position, self._run_end) // self._global_batch)

    def jump(self, steps: int) -> None:
        """Go on `steps` steps later in the current run, as if those had been delivered; nothing is read.

        Raises:
            ConfigError: the run has fewer steps left, or no whole number of steps.
        """
        remaining = self.remaining
        steps = whole("steps", steps, place=_PLACE, least=0)
        if remaining is not None and steps > remaining:
            raise ConfigError(f"the run has {remaining} steps left", value=steps, place=_PLACE)
        position = self._skip.position_of(self._skip.live_before(self._position) + steps * self._global_batch)
        if position >= ENDLESS:
            raise ConfigError("positions are below 2^62", value=f"{steps} steps from here", place=_PLACE)
        if steps:
            self._forget_plan()
            self._position = position

    def __iter__(self) -> Self:
        self._require_usable()
        info = get_worker_info()
        if info is not None and self._worker is None:
            self._become_worker(info.id, info.num_workers)
        self._ended = False
        return self

    def _become_worker(self, number: int, workers: int) -> None:
        if self.device is not None:
            raise UnsupportedError(
                "in the workers of a DataLoader batches are made in host memory",
                value=f"device {self.device}",
                place=_PLACE,
                hint="TokenLoader(device=None) and DataLoader(pin_memory=True)",
            )
        self._in_workers[0] = 1
        self._worker = WorkerPart(number=number, workers=workers, base=self._position)
        self._forget_plan()

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
        sources = None if self._tally is None else self._row_sources[first : first + self.batch_size]
        batch: Batch
        if self._documents:
            batch = self._gather_documents(buffers, DocumentRows(*arrays), first, sources)
        else:
            self.source.gather_planned(self._plan, first, first + self.batch_size, arrays[0], arrays[1])
            input_ids, labels = buffers.deliver(arrays)
            batch = {"input_ids": input_ids, "labels": labels}
        # Copies are the caller's own, and don't keep the whole plan alive.
        batch["position"] = torch.from_numpy(self._rows[at].copy())
        if sources is not None:
            batch["source"] = torch.from_numpy(sources.copy())
        self._at = at + 1
        self._position = self._ends[at]
        self._batches += 1
        waited = perf_counter_ns() - began
        self._wait_ns += waited
        self._waits_ns.append(waited)
        return batch

    def _gather_documents(
        self, buffers: HostBuffers | DeviceBuffers, rows: DocumentRows, first: int, sources: NDArray[np.int64] | None
    ) -> Batch:
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
        self._untrained += int(borders.unlabelled.sum())
        self._padded += int(borders.padded.sum())
        if self._tally is not None and sources is not None:
            self._tally.add_documents(sources, borders)
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
            self._prepare()
        if not self._upcoming:
            self._end_run()
            if self._worker is not None:
                self._worker = self._worker._replace(base=self._position)
            raise StopIteration
        positions, samples, ends = self._upcoming[0]
        plan = self.source.plan(samples)  # if it raises, these steps are still upcoming
        self._upcoming.popleft()
        if self._tally is not None:
            self._tally.rows += self._tally.of(self._row_sources[: self._at * self.batch_size])
            self._row_sources = SampleIds.sources(samples)
        self._plan = plan
        self._rows, self._ends = list(positions), ends
        self._steps_behind += self._planned
        self._at, self._planned = 0, len(self._rows)
        if self._lookahead is not None:
            if not self._upcoming:
                self._prepare()
            if self._ahead is not None:
                # A run of one epoch may be one of many; what comes after more than one is not known to be read.
                end = self._run_end if self.epochs is not None and self.epochs > 1 else ENDLESS
                self._ahead.plan_from(self._position, row=self._steps_behind * self.batch_size, end=end)
            self._lookahead.advance(self._steps_behind * self.batch_size)

    def _prepare(self) -> None:
        """Append positions, samples and ends of the next own steps, unless the run has none left."""
        if self._next_position is None:
            self._next_position = self._position
            self._others_steps = 0 if self._worker is None else self._worker.others_steps(self._position)
        prepared = len(self._upcoming)
        while len(self._upcoming) == prepared:  # a stretch may hold only steps of others
            steps = self._live_rows(self._next_position, self._run_end) // self._global_batch
            if steps <= 0:  # below 0 where a state stands behind the end of a shorter run
                return
            self._prepare_stretch(self._next_position, steps)

    def _prepare_stretch(self, position: int, steps: int) -> None:
        steps = min(steps, max(_BATCHES_PER_CALL, self._rows_per_call // self.batch_size))
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
        self._next_position = ends[-1]
        if self._worker is not None:
            own = slice(self._others_steps, None, self._worker.workers)
            self._others_steps += self._worker.workers * len(rows[own]) - len(rows)
            rows, ends = rows[own], ends[own]
            if not len(rows):
                return
        samples = self.order(rows).ravel()
        self._upcoming.append((rows, samples, ends))
        if self._lookahead is not None:
            self._lookahead.extend(samples)

    def _end_run(self) -> None:
        dropped = max(0, self._live_rows(self._position, self._run_end))
        self._dropped += dropped
        if self._tally is not None and isinstance(self.order, MixedOrder):
            positions = self._skip.live_positions(self._position, dropped)
            self._tally.dropped += self._tally.of(self.order.locate(positions)[0])
        self._start_run(max(self._position, self._run_end))
        self._forget_plan()
        self._ended = True

    def _start_run(self, position: int) -> None:
        self._position = self._run_start = position
        self._run_end = self.order.run_end(position, self.epochs)

    def _forget_plan(self) -> None:
        if self._tally is not None:
            self._tally.rows += self._tally.of(self._row_sources[: self._at * self.batch_size])
            self._row_sources = np.empty(0, np.int64)
        self._at = self._planned = self._steps_behind = 0
        self._plan, self._rows, self._ends = None, [], ()
        self._upcoming = deque()
        self._next_position = None
        self._lookahead = None
        if self._ahead is not None:
            self._ahead.forget()
        if not self.source.is_local:
            if self._ahead is None:
                self._ahead = ReadAhead(
                    self.source,
                    self.order,
                    rank=self.rank,
                    world_size=self.world_size,
                    global_batch=self._global_batch,
                )
                self._close_ahead = weakref.finalize(self, close_dropped, self._ahead)
                self._close_ahead.atexit = False
            self._lookahead = Lookahead(
                self._ahead,
                samples_per_block=self.order.samples_per_block,
                max_blocks=self._prefetch_blocks,
                batch_size=self.batch_size,
                open_blocks=self._open_blocks(),
            )

    def _open_blocks(self) -> int:
        """Order blocks that the shuffle has open at once; all of a small data set if it has no windows."""
        sources = len(self.source.names) if isinstance(self.source, Mixture) else 1
        return 2048 if self.order.shuffle == "full" else self.order.lanes * self.order.window_blocks * sources

    def _require_usable(self) -> None:
        if self._closed:
            raise ConfigError("the loader is closed", place=_PLACE)

    # -- state --------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, in plain values that JSON holds: a few hundred bytes, the same on every rank.

        Raises:
            UnsupportedError: worker processes of a ``DataLoader`` deliver this loader's batches, and only the trainer's
                side knows how many it got.
        """
        if self._worker is None and self._in_workers[0]:
            raise UnsupportedError(
                "a loader whose batches come from workers of a DataLoader does not know how many the trainer got",
                place=_PLACE,
                hint="save TokenLoader.state_from(dataloader.state_dict()) of a StatefulDataLoader",
            )
        record = self._state(self._position, self._run_start).to_dict()
        if self._worker is not None:
            segments = self._state(self._run_end, self._run_start).content.get("segments")
            record = self._worker.mark(record, run_end=self._run_end, segments=segments)
        return record

    @staticmethod
    def state_from(state: Mapping[str, Any], delivered: int | None = None) -> dict[str, Any]:
        """The state of a loader from that of a ``StatefulDataLoader`` around it: resumes any topology and any loop.

        Args:
            state: what ``StatefulDataLoader.state_dict()`` returned, with any number of workers; or a loader's own.
            delivered: batches that the trainer took in this iteration, if it is not what the ``StatefulDataLoader``
                handed out: some loops fetch one ahead. With a loader's own state, those that it took since then.

        Raises:
            StateMismatch: there is no loader's state in it, or no place in the stream is so many batches from it.
        """
        return state_after(state, delivered).to_dict()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of run `epoch`, counted from 0, unless the stream is there or further; it never goes back.

        Loops call it before each iteration, as they do with torch's ``DistributedSampler``. It matters only where
        worker processes that don't persist deliver the batches. A loader without an end stays where it is.
        """
        start = self._start_of_run(whole("epoch", epoch, place=_PLACE))
        if self._position < start < ENDLESS:
            self._forget_plan()
            self._start_run(start)
            self._ended = False
            self._in_workers[0] = 0

    def _start_of_run(self, number: int) -> int:
        """Where run `number` begins, counted from 0; where the stream ends if that comes before."""
        if isinstance(self.order, OrderV1):
            return max(0, number) * self.order.run_end(0, self.epochs)
        starts = self._run_starts  # each follows from the one before, so that a far one takes a while, once
        while len(starts) <= number and starts[-1] < self.order.end:
            starts.append(self.order.run_end(starts[-1], self.epochs))
        return starts[max(0, min(number, len(starts) - 1))]

    def _state(self, position: int, run_start: int, order: OrderV1 | MixedOrder | None = None) -> LoaderState:
        order, source = order or self.order, self.source
        content: dict[str, Any]
        if isinstance(order, MixedOrder):
            assert isinstance(source, Mixture)
            content = {
                "mixture_version": MIXTURE_VERSION,
                "sources": source.content(),
                "segments": [list(segment) for segment in order.segments_before(position)],
            }
        else:
            content = {
                "fingerprint": source.fingerprint,
                "packing": source.packing,
                "num_samples": order.num_samples,
                "samples_per_block": order.samples_per_block,
            }
        return LoaderState(
            content=content,
            seq_len=source.seq_len,
            order_version=ORDER_VERSION,
            seed=order.seed,
            shuffle=order.shuffle,
            lanes=order.lanes,
            window_blocks=order.window_blocks,
            position=position,
            run_start=run_start,
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
        part = WorkerPart.of(state_dict)
        order = self._order_with(state)
        state.require_same_stream(self._state(state.position, state.run_start, order))
        if part is not None and (self._worker is None or part[:2] != self._worker[:2]):
            raise StateMismatch(
                "the state of a worker must come back to the same worker of as many",
                value=f"worker {part.number} of {part.workers}",
                place=_PLACE,
                hint="keep num_workers, or load TokenLoader.state_from(the state of the StatefulDataLoader)",
            )
        # Nothing has changed so far, and no state is refused from here on.
        self._take_order(order)
        if self._worker is not None:
            self._worker = part or self._worker._replace(base=state.position)
        self._in_workers[0] = 0
        self._forget_plan()
        self._skip = SkipRanges([*state.skip, *self._skip.ranges])
        if state.run_start != self._run_start:
            self._start_run(state.run_start)
        self._position, self._ended = state.position, False
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
            sources=self._source_stats(),
            slack_s=None if self._ahead is None else self._ahead.slack_s(),
        )

    def _source_stats(self) -> dict[str, SourceStats]:
        if self._tally is None or not isinstance(self.order, MixedOrder):
            return {}
        return self._tally.stats(
            self.order,
            position=self._position,
            planned=self._row_sources[: self._at * self.batch_size],
            seq_len=self.source.seq_len,
        )

    def explain(self, step: int) -> list[RowOrigin]:
        """The rows of one global step, of all ranks, in order of position.

        Steps count from 0 at the start of the stream, through all runs, as a loader delivers them that never had another
        batch size, world size, `epochs` or `skip` than this one has now.

        Raises:
            ConfigError: a negative step, or one after the end of a mixture all of whose sources have caps.
        """
        step = whole("step", step, place=_PLACE, least=0)
        start = ENDLESS if step * self._global_batch >= ENDLESS else self._start_of_step(step)
        if start + self._global_batch > ENDLESS:
            raise ConfigError("a step must lie before position 2^62", value=step, place=_PLACE)
        positions = self._skip.live_positions(start, self._global_batch)
        if isinstance(self.order, MixedOrder) and int(positions[-1]) >= self.order.end:
            raise ConfigError(
                f"the stream ends before position {self.order.end}, where all sources have reached their caps",
                value=f"step {step}",
                place=_PLACE,
            )
        return origins_of(positions, self.order, self.source, world_size=self.world_size)

    def _start_of_step(self, step: int) -> int:
        """The first live position of a step, counted from the start of the stream."""
        start = 0
        if self.epochs is not None:
            last_skip = self._skip.ranges[-1][1] if self._skip.ranges else 0
            for run in count(1):
                end = self._start_of_run(run)
                if isinstance(self.order, OrderV1) and start >= last_skip:  # all further runs are equal
                    runs, step = divmod(step, (end - start) // self._global_batch)
                    start += runs * (end - start)
                    break
                steps = self._live_rows(start, end) // self._global_batch
                if step < steps or end == start:
                    break
                step, start = step - steps, end
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
            self._drop_ahead()
            self._buffers = None
            self._closed = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        # To a spawned worker goes what it needs to find its place; no memory, no plan.
        if get_spawning_popen() is not None:
            self._in_workers[0] = 1
        state = self.__dict__.copy()
        del state["_in_workers"]
        for name in ("_buffers", "_plan", "_lookahead", "_ahead", "_close_ahead", "_rows", "_ends", "_upcoming"):
            state[name] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._in_workers = mmap.mmap(-1, 1)
        self._forget_plan()


def _require_samples(source: object) -> None:
    if isinstance(source, TokenDataset | Mixture) or all(hasattr(source, name) for name in _OF_SOURCES):
        return
    is_url = isinstance(source, str | PathLike)
    hint = "open it: TokenDataset(url, seq_len=...)" if is_url else "several are a Mixture({name: (data set, weight)})"
    raise ConfigError(
        "source must be a TokenDataset or a Mixture", value=type(source).__name__, place=_PLACE, hint=hint
    )
