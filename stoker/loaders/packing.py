"""Which tokens make up each row: plans from document lengths alone, one window of the token stream at a time.

A data set is cut into *windows*, stretches of its stream of tokens, and each window is planned by itself into a number of
rows that is known beforehand: row ``i`` of the data set is row ``i % M`` of window ``i // M``, where ``M`` is a power of
two. So a row is found without planning those before it, at any position, world size and number of interruptions. A
window is about as large as an order block, so its rows need no other bytes than a shuffle reads anyway.

A row is a sequence of *pieces*, each a run of tokens of one document, in the order of the stream; what they leave free
at the end is padding.

Plans are a file format: loader states name :data:`PLAN_VERSION`, and ``tests/data/packing-v1.json`` pins them. Everything
here is pure: lengths in, plans out.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError

__all__ = [
    "PLAN_VERSION",
    "BestFit",
    "Concat",
    "LongDocuments",
    "Packer",
    "Pad",
    "WindowPlan",
    "WindowTable",
    "resolve",
]

PLAN_VERSION = 1
"""Part of every loader state. A change of any token of any row needs a new number."""

LongDocuments: TypeAlias = Literal["split", "truncate", "drop"]
"""What becomes of a document that is longer than a row: cut into several pieces, cut off, or left out whole."""

Int64Array: TypeAlias = NDArray[np.int64]


class WindowPlan(NamedTuple):
    """The rows of one window.

    Attributes:
        first: ``(rows + 1,)``; the pieces of row ``i`` are ``[first[i], first[i + 1])``, in the order of the stream.
        document: of each piece, counted from the window's first. offset: its first token, counted from the document's
            first token in the window. length: its tokens, 1 at least. All int64.
    """

    first: Int64Array
    document: Int64Array
    offset: Int64Array
    length: Int64Array


class Packer(Protocol):
    """One way of packing."""

    @property
    def name(self) -> str:
        """Identity in loader states."""

    def rows_per_window(self, *, seq_len: int, order_tokens: int, documents: int, tokens: int) -> int:
        """A power of two: about the rows that an order block of `order_tokens` makes.

        Args:
            documents, tokens: of the whole data set.
        """

    def windows(self, *, seq_len: int, rows: int, tokens: int) -> "int | WindowTable":
        """How a data set of `tokens` is cut into windows of `rows` rows each.

        Either the rows of the data set, its windows being the consecutive ``rows * seq_len`` tokens of the stream; or
        an empty table that finds both.
        """

    def plan(self, lengths: Int64Array, *, seq_len: int, rows: int) -> WindowPlan:
        """Plan one window.

        Args:
            lengths: tokens of its documents that lie in the window, each 1 at least.
            seq_len: tokens of a row.
            rows: of this window.
        """


@dataclass(frozen=True, kw_only=True)
class Concat:
    """Documents one after another, cut wherever a row ends."""

    @property
    def name(self) -> str:
        return "concat"

    def rows_per_window(self, *, seq_len: int, order_tokens: int, documents: int, tokens: int) -> int:
        return _power_of_two(order_tokens // seq_len)

    def windows(self, *, seq_len: int, rows: int, tokens: int) -> "int | WindowTable":
        return (tokens - 1) // seq_len

    def plan(self, lengths: Int64Array, *, seq_len: int, rows: int) -> WindowPlan:
        """
        >>> plan = Concat().plan(np.array([3, 6]), seq_len=4, rows=2)
        >>> plan.first.tolist(), plan.document.tolist(), plan.offset.tolist(), plan.length.tolist()
        ([0, 2, 3], [0, 1, 1], [0, 0, 1], [3, 1, 4])
        """
        ends = np.cumsum(lengths)
        total = min(int(ends[-1]), rows * seq_len)
        starts = np.union1d(ends - lengths, np.arange(0, total, seq_len, dtype=np.int64))
        starts = starts[starts < total]
        document = np.searchsorted(ends, starts, side="right")
        return WindowPlan(
            first=np.searchsorted(starts, np.arange(rows + 1, dtype=np.int64) * seq_len),
            document=document,
            offset=starts - (ends - lengths)[document],
            length=np.diff(starts, append=total),
        )


@dataclass(frozen=True, kw_only=True)
class BestFit:
    """Best-fit-decreasing within each window: far fewer documents are cut than by ``"concat"``, next to no padding.

    The longest documents are placed first, each into the row with the least room that still holds it.

    Args:
        long: ``"split"``: documents longer than a row are cut into rows, and what then fits nowhere is cut to fill the
            largest gaps: every token is kept, and a data set has less than a row of padding, in its last window. ``"truncate"``: only the first
            `seq_len` tokens are kept, and of the few documents that then fit nowhere only what the largest gap
            takes. ``"drop"``: both are left out whole; on web text that is a fifth of all tokens.

    >>> plan = BestFit().plan(np.array([3, 6, 2, 1]), seq_len=4, rows=3)  # [3 + 1], [4 of 6], [2 of 6 + 2]
    >>> plan.first.tolist(), plan.document.tolist(), plan.offset.tolist(), plan.length.tolist()
    ([0, 1, 3, 5], [1, 0, 3, 1, 2], [0, 0, 0, 4, 0], [4, 3, 1, 2, 2])
    """

    long: LongDocuments = "split"

    def __post_init__(self) -> None:
        _check_long(self.long, "BestFit")

    @property
    def name(self) -> str:
        return f"best_fit-{PLAN_VERSION}/{self.long}"

    def rows_per_window(self, *, seq_len: int, order_tokens: int, documents: int, tokens: int) -> int:
        return _power_of_two(order_tokens // seq_len)

    def windows(self, *, seq_len: int, rows: int, tokens: int) -> "int | WindowTable":
        """Windows are parts of the stream; if not split, of the stream without what is longer than a row."""
        if self.long == "split":
            return -(-tokens // seq_len)
        return WindowTable(
            lambda lengths: _kept(lengths, seq_len, self.long), window=rows * seq_len, row=seq_len, split_tokens=0
        )

    def plan(self, lengths: Int64Array, *, seq_len: int, rows: int) -> WindowPlan:
        pieces = _cut(lengths, seq_len, self.long)
        # Longest first, equal ones in the order of the stream. Small integers are sorted by radix.
        small = np.uint16 if seq_len < 1 << 16 else np.uint64
        by_length = np.argsort((seq_len - pieces.length).astype(small), kind="stable")
        row, left_over = _place(pieces.length[by_length], seq_len, rows)
        parts = _fill_gaps(row, left_over, pieces.length[by_length], self.long)
        placed = np.flatnonzero(row >= 0)
        extra = np.array(parts, np.int64).reshape(-1, 4)
        chosen = by_length[np.concatenate((placed, extra[:, 0]))]
        row = np.concatenate((row[placed], extra[:, 1]))
        within = np.concatenate((np.zeros(len(placed), np.int64), extra[:, 2]))
        length = np.concatenate((pieces.length[by_length[placed]], extra[:, 3]))
        # No two parts of one piece share a row, so this orders the pieces of a row as they stand in the stream.
        order = np.argsort(row * len(by_length) + chosen)
        chosen = chosen[order]
        return WindowPlan(
            first=np.concatenate(([0], np.cumsum(np.bincount(row, minlength=rows)))),
            document=pieces.document[chosen],
            offset=pieces.offset[chosen] + within[order],
            length=length[order],
        )


@dataclass(frozen=True, kw_only=True)
class Pad:
    """One document a row, the rest of the row padding.

    Args:
        long: ``"split"``: a document longer than a row takes several rows. ``"truncate"``: only its first `seq_len`
            tokens are kept. ``"drop"``: it is left out whole.

    >>> plan = Pad().plan(np.array([3, 6]), seq_len=4, rows=3)
    >>> plan.document.tolist(), plan.offset.tolist(), plan.length.tolist()
    ([0, 1, 1], [0, 0, 4], [3, 4, 2])
    """

    long: LongDocuments = "split"

    def __post_init__(self) -> None:
        _check_long(self.long, "Pad")

    @property
    def name(self) -> str:
        return f"pad-{PLAN_VERSION}/{self.long}"

    def rows_per_window(self, *, seq_len: int, order_tokens: int, documents: int, tokens: int) -> int:
        rows = order_tokens * documents // tokens
        return _power_of_two(max(rows, order_tokens // seq_len) if self.long == "split" else rows)

    def windows(self, *, seq_len: int, rows: int, tokens: int) -> "int | WindowTable":
        """Windows are `rows` rows; where these split a document, a window may begin within it."""
        if self.long == "split":
            return WindowTable(lambda lengths: -(-lengths // seq_len), window=rows, row=1, split_tokens=seq_len)
        return WindowTable(
            lambda lengths: np.minimum(_kept(lengths, seq_len, self.long), 1), window=rows, row=1, split_tokens=0
        )

    def plan(self, lengths: Int64Array, *, seq_len: int, rows: int) -> WindowPlan:
        pieces = _cut(lengths, seq_len, self.long)
        return WindowPlan(np.arange(rows + 1), *pieces)


class WindowTable:
    """Where windows begin in the stream, found in one pass over all document lengths.

    Each document has a weight, tokens or rows, and a window holds the documents whose weights end in an equal part of
    their sum. A document without weight, one that is dropped, belongs to the same window as the one before it.

    Args:
        weight_of: the weight of each document.
        window: weight of a window. row: of a row.
        split_tokens: if not 0, a window may begin within a document, this many tokens after its start for each unit of
            weight.

    >>> table = Pad().windows(seq_len=4, rows=2, tokens=18)
    >>> assert isinstance(table, WindowTable)
    >>> table.update(np.array([3, 6, 9]))
    >>> table.rows, table.edges().tolist()  # 3 | 4, 2 | 4, 4 | 1
    (6, [0, 7, 13, 18])
    """

    def __init__(
        self, weight_of: Callable[[Int64Array], Int64Array], *, window: int, row: int, split_tokens: int
    ) -> None:
        self._weight_of, self._window, self._row, self._split_tokens = weight_of, window, row, split_tokens
        self._edges: list[Int64Array] = []
        self._windows = self._weight = self._tokens = 0

    def update(self, lengths: NDArray[Any]) -> None:
        """Add the documents that come next."""
        if not len(lengths):
            return
        lengths = lengths.astype(np.int64)  # uint32 as stored
        weights = self._weight_of(lengths)
        before = self._weight + np.cumsum(weights) - weights
        begins = self._tokens + np.cumsum(lengths) - lengths
        self._weight, self._tokens = int(before[-1] + weights[-1]), int(begins[-1] + lengths[-1])
        windows = -(-self._weight // self._window)
        starts = np.arange(self._windows, windows, dtype=np.int64) * self._window
        first = np.searchsorted(before + weights, starts, side="right")
        self._edges.append(begins[first] + (starts - before[first]) * self._split_tokens)
        self._windows = windows

    @property
    def rows(self) -> int:
        """Of all windows. All but the last window have equally many."""
        return -(-self._weight // self._row)

    def edges(self) -> Int64Array:
        """``(windows + 1,)`` positions in the stream: window ``k`` is ``[edges[k], edges[k + 1])``."""
        edges = np.concatenate([*self._edges, [self._tokens]])
        edges[0] = 0  # what is dropped before the first row belongs to the first window
        return edges


def resolve(packing: object, place: str) -> Packer:
    """The packer that a `packing` argument means: its name, or one with settings."""
    if isinstance(packing, BestFit | Pad):
        return packing
    known: dict[object, Packer] = {"concat": Concat(), "best_fit": BestFit(), "pad": Pad()}
    if not isinstance(packing, str) or packing not in known:
        raise ConfigError(
            f"packing must be one of {', '.join(map(str, known))}, or a BestFit or Pad", value=packing, place=place
        )
    return known[packing]


def _power_of_two(value: int) -> int:
    """The largest one that is not above `value`, and 1 at least."""
    return 1 << max(value.bit_length() - 1, 0)


def _check_long(long: str, place: str) -> None:
    if long not in get_args(LongDocuments):
        raise ConfigError(f"long must be one of {', '.join(get_args(LongDocuments))}", value=long, place=place)


def _kept(lengths: Int64Array, seq_len: int, long: LongDocuments) -> Int64Array:
    """Tokens of each document after long ones were cut off or left out."""
    if long == "drop":
        return np.where(lengths > seq_len, 0, lengths)
    return np.minimum(lengths, seq_len)


class _Pieces(NamedTuple):
    document: Int64Array
    offset: Int64Array
    length: Int64Array


def _cut(lengths: Int64Array, seq_len: int, long: LongDocuments) -> _Pieces:
    """Pieces no longer than a row, in the order of the stream."""
    if long != "split":
        kept = _kept(lengths, seq_len, long)
        document = np.flatnonzero(kept)
        return _Pieces(document, np.zeros(len(document), np.int64), kept[document])
    counts = -(-lengths // seq_len)
    document = np.repeat(np.arange(len(lengths)), counts)
    offset = (np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)) * seq_len
    return _Pieces(document, offset, np.minimum(lengths[document] - offset, seq_len))


class _Gaps:
    """Rows by their free tokens. Of rows with equally much room, the one that got so last is taken first."""

    def __init__(self, seq_len: int, rows: int) -> None:
        self.sizes = [seq_len]  # ascending
        self._rows = {seq_len: list(range(rows - 1, -1, -1))}  # by size; the last is taken first

    def take(self, i: int, count: int) -> list[int]:
        """At most `count` rows whose gap is ``sizes[i]``."""
        size = self.sizes[i]
        rows = self._rows[size]
        if count >= len(rows):
            del self._rows[size], self.sizes[i]
            rows.reverse()
            return rows
        taken = rows[: -count - 1 : -1]
        del rows[-count:]
        return taken

    def put(self, size: int, rows: list[int]) -> None:
        """Rows that have `size` free tokens now, in the order in which they came to that."""
        if size == 0:
            return
        known = self._rows.get(size)
        if known is None:
            self._rows[size] = rows
            insort(self.sizes, size)
        else:
            known += rows


def _place(lengths: Int64Array, seq_len: int, rows: int) -> tuple[Int64Array, _Gaps]:
    """The row of each piece, -1 where none has room, and the gaps that are left. `lengths` descend.

    What best-fit does piece by piece, done at once for all pieces of one length: a row takes as many of them as go in,
    because after each it is the one with the least room that still holds the next. So the work grows with the number
    of distinct lengths and not with that of the documents.
    """
    gaps = _Gaps(seq_len, rows)
    out: list[int] = []
    borders = np.flatnonzero(np.diff(lengths, prepend=-1, append=-1))
    counts = np.diff(borders).tolist()
    for length, count in zip(lengths[borders[:-1]].tolist(), counts, strict=True):
        while count:
            i = bisect_left(gaps.sizes, length)
            if i == len(gaps.sizes):
                out += [-1] * count
                break
            size = gaps.sizes[i]
            each = size // length
            if each > count:
                taken = gaps.take(i, 1)
                gaps.put(size - count * length, taken)
                out += taken * count
                break
            taken = gaps.take(i, count // each)
            out += taken if each == 1 else [row for row in taken for _ in range(each)]
            count -= each * len(taken)
            gaps.put(size - each * length, taken)
    return np.array(out, np.int64), gaps


def _fill_gaps(
    row: Int64Array, gaps: _Gaps, lengths: Int64Array, long: LongDocuments
) -> list[tuple[int, int, int, int]]:
    """Cut the pieces without a row into the largest gaps: (number of the piece, row, start within it, length)."""
    parts: list[tuple[int, int, int, int]] = []
    if long == "drop":
        return parts
    for number in np.flatnonzero(row < 0).tolist():
        start, length = 0, int(lengths[number])
        while length and gaps.sizes:
            size = gaps.sizes[-1]
            taken = gaps.take(len(gaps.sizes) - 1, 1)
            part = min(size, length)
            parts.append((number, taken[0], start, part))
            gaps.put(size - part, taken)
            start, length = start + part, length - part
            if long == "truncate":
                break
    return parts
