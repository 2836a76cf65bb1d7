"""Rows of several data sets gathered into one batch: located source by source, copied together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ._gather import RowGather
from ._packed import DocumentRows, LocatedRows, RowBorders
from .dataset import GatherPlan, PackedPlan, TokenDataset
from .mixed_order import SampleIds, present

__all__ = ["MixedPlan", "MixedRows"]


class _Part(NamedTuple):
    """What one source has of a plan: row ``i`` of its own plan is row ``places[i]`` of the whole."""

    dataset: TokenDataset
    plan: GatherPlan | PackedPlan
    places: NDArray[np.int64]


@dataclass(slots=True)
class MixedPlan:
    """Where the rows of many batches of a mixture lie. Opaque; one thread uses it."""

    _parts: list[_Part]
    _dtypes: NDArray[np.int64] | None  # the number of each row's dtype; None where there is one
    _rows: NDArray[np.intp]  # row numbers for the gather, valid in [_start, _end)
    _start: int = 0
    _end: int = 0
    _located: LocatedRows | None = None  # with borders, rows [_start, _end)

    def __len__(self) -> int:
        return len(self._rows)


# Guarantees: as a data set's own plan and gather.
class MixedRows:
    """Plan and gather for the samples of several data sets, which share `seq_len`, labels and the keys of a batch.

    Rows are numbered in the process's memory (:mod:`._gather`), so rows of different data sets are one gather into the
    batch, without a copy in between; where dtypes differ, one for each dtype.
    """

    def __init__(self, datasets: Sequence[TokenDataset], ids: SampleIds) -> None:
        first = datasets[0]
        self._datasets, self._ids = datasets, ids
        dtypes = [np.dtype(dataset.manifest.dtype) for dataset in datasets]
        known = list(dict.fromkeys(dtypes))
        self._dtype_of_source = np.array([known.index(dtype) for dtype in dtypes])
        shifted = first.labels == "shifted"
        self._seq_len = first.seq_len
        self._gathers = [RowGather(dtype, first.seq_len, shifted=shifted) for dtype in known]

    def plan(self, samples: NDArray[np.int64]) -> MixedPlan:
        """Locate the rows of many batches; see :meth:`TokenDataset.plan`."""
        sources = self._ids.sources(samples)
        parts = []
        for number in present(sources):
            places = np.flatnonzero(sources == number)
            dataset = self._datasets[number]
            parts.append(_Part(dataset, dataset.plan(self._ids.samples(number, samples[places])), places))
        dtypes = self._dtype_of_source[sources] if len(self._gathers) > 1 else None
        return MixedPlan(parts, dtypes, np.empty(len(samples), np.intp))

    def gather_planned(
        self, plan: MixedPlan, start: int, end: int, input_ids: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None:
        """Fill ``(end - start, seq_len)`` arrays with rows ``[start, end)`` of a plan of rows without borders."""
        if start < plan._start or end > plan._end:
            self._make_ready(plan, start, end)
        rows = plan._rows[start:end]
        if plan._dtypes is None:
            self._gathers[0](rows, input_ids, labels)
            return
        dtypes = plan._dtypes[start:end]
        for number, gather in enumerate(self._gathers):
            places = np.flatnonzero(dtypes == number)
            if places.size:
                gather(rows[places], input_ids, labels, places)

    @staticmethod
    def _make_ready(plan: MixedPlan, start: int, end: int) -> None:
        """Have every source make its rows in [start, end) ready; take the rows after them along that are so already."""
        ready = len(plan)
        plan._end = plan._start = start  # sources let earlier rows go, also if one of them fails now
        for part in plan._parts:
            assert isinstance(part.plan, GatherPlan)
            first, last = np.searchsorted(part.places, (start, end)).tolist()
            rows, first, last = part.dataset.ready_rows(part.plan, first, last)
            plan._rows[part.places[first:last]] = rows[first:last]
            if last < len(part.places):
                ready = min(ready, int(part.places[last]))
        plan._end = ready

    def gather_documents(self, plan: MixedPlan, start: int, end: int, rows: DocumentRows) -> RowBorders:
        """Fill all arrays of rows ``[start, end)`` of a plan of rows with borders."""
        if plan._located is None or start < plan._start or end > plan._end:
            self._locate(plan, start, end)
        assert plan._located is not None
        located = plan._located.rows(start - plan._start, end - plan._start)
        return self._datasets[0].fill_documents(located, rows)

    def _locate(self, plan: MixedPlan, start: int, end: int) -> None:
        """As :meth:`_make_ready`, for rows with borders."""
        found, ready = [], len(plan)
        plan._located = None
        for part in plan._parts:
            first, last = np.searchsorted(part.places, (start, end)).tolist()
            located, begin, stop = part.dataset.located_rows(part.plan, first, last)
            found.append((located, begin, first))
            if stop < len(part.places):
                ready = min(ready, int(part.places[stop]))
        parts, leases = [], list[object]()
        for part, (located, begin, first) in zip(plan._parts, found, strict=True):
            last = int(np.searchsorted(part.places, ready))
            parts.append((located.rows(first - begin, last - begin), part.places[first:last] - start))
            leases.append(located.leases)
        plan._located = LocatedRows.merge(parts, leases, seq_len=self._seq_len)
        plan._start, plan._end = start, ready
