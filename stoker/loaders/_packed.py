"""Rows made of pieces of documents: which pieces, by the plans of :mod:`.packing`, and their tokens from the blocks."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import UnsupportedError
from ._gather import row_index, token_memory
from ._source import Source
from ._tables import Tables
from .packing import Packer, WindowTable

__all__ = [
    "IGNORED_LABEL",
    "DocumentRows",
    "Located",
    "LocatedRows",
    "PackedRows",
    "PackingReport",
    "PieceGather",
    "RowBorders",
]

IGNORED_LABEL = -100
"""What torch's cross entropy leaves out by default."""

_MAX_DOCUMENTS = 10**8
# Of the windows that a shuffle mixes, 48 lanes of 4 blocks: 25 MiB with 600 tokens a document, 220 MiB with 60. With fewer
# than it mixes, windows would be planned again and again.
_KEPT_PLANS_BYTES = 512 << 20

_LONG_RUN = 512  # tokens: about where a copy of its own costs a run as much as its part of a common index

_BEGIN, _LENGTH, _DOCUMENT, _NEXT = range(4)  # columns of a table of pieces


class DocumentRows(NamedTuple):
    """C-contiguous ``(rows, seq_len)`` arrays to be filled.

    Attributes:
        input_ids, labels: int64. position_ids: int64, restarting at 0 with each piece.
        doc_ids: int64, documents counted over the whole set, -1 for padding.
        loss_mask: bool; where it is False, labels are -100.
    """

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]
    doc_ids: NDArray[np.int64]
    loss_mask: NDArray[np.bool_]

    @classmethod
    def empty(cls, rows: int, seq_len: int) -> "DocumentRows":
        """New memory."""
        return cls(*(np.empty((rows, seq_len), dtype) for dtype in cls.dtypes()))

    @staticmethod
    def dtypes() -> tuple[type, ...]:
        """Of each array."""
        return np.int64, np.int64, np.int64, np.int64, np.bool_


class RowBorders(NamedTuple):
    """Where the pieces of some rows end, the rows taken as one sequence; padding counts as a piece.

    Attributes:
        cu_seqlens: int32 ``(pieces + 1,)``, from 0 to all tokens, padding included.
        max_seqlen: the longest piece.
        padded, unlabelled: of each row, the tokens that are padding, and those without a label, padding included; int64.
    """

    cu_seqlens: NDArray[np.int32]
    max_seqlen: int
    padded: NDArray[np.int64]
    unlabelled: NDArray[np.int64]


class PackingReport(NamedTuple):
    """What packing makes of a whole data set, counted exactly.

    ``kept_tokens + cropped_tokens`` are the tokens of the data set, ``kept_tokens + padded_tokens`` the tokens of the
    rows, and ``trained_tokens + masked_tokens`` are the kept ones.

    Attributes:
        rows: samples of the data set.
        kept_tokens: of the data set, in exactly one row each. padded_tokens: positions of rows that hold no token.
        cropped_tokens: in no row, because of `long` or at the end of the data set.
        trained_tokens: with a label. masked_tokens: without one, at the borders of documents.
        max_pieces: the most pieces in a row, padding counted as one: ``batch_size * max_pieces + 1`` is a size of
            `cu_seqlens` that holds every batch.
    """

    rows: int
    kept_tokens: int
    padded_tokens: int
    cropped_tokens: int
    trained_tokens: int
    masked_tokens: int
    max_pieces: int


class _Window(NamedTuple):
    first: NDArray[np.int64]  # of each row: its first piece, and the end
    pieces: NDArray[np.int64]  # (n, 4): begin in the stream, length, document, position of the label after it; or -1

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.pieces.nbytes


# Guarantees: any thread may call any method but renew_after_fork. `_lock` guards `_windows` and `_bytes`; windows are planned outside it, so
# two threads may plan the same one, which is harmless.
class PackedRows:
    """The pieces of each row. Reads tables, never tokens.

    Raises:
        UnsupportedError: a packing that needs a pass over all lengths, and more than 10^8 documents.
    """

    def __init__(self, tables: Tables, packer: Packer, *, seq_len: int) -> None:
        manifest = tables.manifest
        self.packer, self.seq_len = packer, seq_len
        self.rows_per_window = packer.rows_per_window(
            seq_len=seq_len,
            order_tokens=manifest.order_blocks * manifest.block_tokens,
            documents=manifest.documents,
            tokens=manifest.tokens,
        )
        self._edges: NDArray[np.int64] | None = None
        windows = packer.windows(seq_len=seq_len, rows=self.rows_per_window, tokens=manifest.tokens)
        if isinstance(windows, WindowTable):
            if manifest.documents > _MAX_DOCUMENTS:
                raise UnsupportedError(
                    f"packing {packer.name} reads all document lengths when it opens, {_MAX_DOCUMENTS} at most",
                    value=f"{manifest.documents} documents",
                    place=tables.store.url,
                    hint='packing=BestFit(long="split") needs no such pass',
                )
            for lengths in tables.all_lengths():
                windows.update(lengths)
            self._edges, self.rows = windows.edges(), windows.rows
        else:
            self.rows = windows
        self._tokens = manifest.tokens
        self._lock = threading.Lock()
        self._windows: OrderedDict[int, _Window] = OrderedDict()
        self._bytes = 0

    def renew_after_fork(self) -> None:
        """In a child: another thread of the parent may have held the lock."""
        self._lock = threading.Lock()

    def stretch(self, windows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First and end of the tokens that each window is made from."""
        if self._edges is not None:
            return self._edges[windows], self._edges[windows + 1]
        window_tokens = self.rows_per_window * self.seq_len
        starts = windows * window_tokens
        return starts, np.minimum(starts + window_tokens, self._tokens)

    def pieces(self, tables: Tables, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The pieces of some rows, one row after another: ``(n, 4)``, padding included, so each row is full."""
        numbers, rows = (part.tolist() for part in np.divmod(samples, self.rows_per_window))
        windows = {number: self._window(tables, number) for number in dict.fromkeys(numbers)}
        parts = []
        for number, row in zip(numbers, rows, strict=True):
            first, pieces = windows[number]
            parts.append(pieces[first[row] : first[row + 1]])
        return np.concatenate(parts) if parts else np.empty((0, 4), np.int64)

    def planned(self, samples: NDArray[np.int64]) -> int:
        """How many rows from the first on are in windows whose plans are at hand."""
        windows = (samples // self.rows_per_window).tolist()
        with self._lock:
            absent = {number for number in set(windows) if number not in self._windows}
        return next((i for i, number in enumerate(windows) if number in absent), len(windows))

    def _window(self, tables: Tables, number: int) -> _Window:
        with self._lock:
            known = self._windows.get(number)
            if known is not None:
                self._windows.move_to_end(number)
                return known
        window = self._plan(tables, number)
        with self._lock:
            if number not in self._windows:
                self._windows[number] = window
                self._bytes += window.nbytes
            while self._bytes > _KEPT_PLANS_BYTES and len(self._windows) > 1:
                self._bytes -= self._windows.popitem(last=False)[1].nbytes
        return window

    def _plan(self, tables: Tables, number: int) -> _Window:
        start, end = (int(edge[0]) for edge in self.stretch(np.array([number])))
        documents = tables.documents(start, end)
        borders = np.clip(documents.borders, start, end)
        rows = min(self.rows_per_window, self.rows - number * self.rows_per_window)
        plan = self.packer.plan(np.diff(borders), seq_len=self.seq_len, rows=rows)
        begin = borders[plan.document] + plan.offset
        follows = begin + plan.length
        follows[follows == documents.borders[plan.document + 1]] = -1
        pieces = np.stack((begin, plan.length, documents.first + plan.document, follows), axis=1)
        used = np.diff(np.concatenate(([0], np.cumsum(plan.length)))[plan.first])
        short = np.flatnonzero(used < self.seq_len)
        padding = np.full((len(short), 4), -1, np.int64)
        padding[:, _LENGTH] = self.seq_len - used[short]
        first = plan.first.astype(np.int64)
        pieces = np.insert(pieces, first[short + 1], padding, axis=0)
        first[1:] += np.cumsum(used < self.seq_len)
        return _Window(first, pieces)

    def report(self, tables: Tables, *, shifted: bool) -> PackingReport:
        """Plan every window and count."""
        kept = padded = masked = most = 0
        for number in range(-(-self.rows // self.rows_per_window)):
            window = self._plan(tables, number)
            real = window.pieces[:, _BEGIN] >= 0
            kept += int(window.pieces[real, _LENGTH].sum())
            padded += int(window.pieces[~real, _LENGTH].sum())
            masked += int((real & (window.pieces[:, _NEXT] < 0)).sum() if shifted else real.sum())
            most = max(most, int(np.diff(window.first).max()))
        return PackingReport(
            rows=self.rows,
            kept_tokens=kept,
            padded_tokens=padded,
            cropped_tokens=self._tokens - kept,
            trained_tokens=kept - masked,
            masked_tokens=masked,
            max_pieces=most,
        )


class Located(NamedTuple):
    """Addresses of the pieces of some rows, in the numbers of :func:`row_index`; all rows are full.

    Attributes:
        pieces: as :meth:`PackedRows.pieces` has them.
        address, run_length: of each run, a part of a piece that lies in one block.
        next_address: of the label after each piece.
        memories: what the addresses count in; one, unless rows of several dtypes were merged.
        memory_of_run, memory_of_piece: numbers in `memories`; None where there is one.
    """

    pieces: NDArray[np.int64]
    address: NDArray[np.int64]
    run_length: NDArray[np.int64]
    next_address: NDArray[np.int64]
    memories: tuple[NDArray[Any], ...]
    memory_of_run: NDArray[np.int64] | None = None
    memory_of_piece: NDArray[np.int64] | None = None


class LocatedRows:
    """The rows of many batches; valid as long as `leases` are alive."""

    def __init__(self, located: Located, leases: list[object], *, seq_len: int) -> None:
        self._located, self.leases, self._seq_len = located, leases, seq_len
        ends = np.cumsum(located.pieces[:, _LENGTH])
        borders = np.arange((int(ends[-1]) // seq_len if len(ends) else 0) + 1) * seq_len
        self._first_piece = np.searchsorted(ends, borders, side="right")
        self._first_run = np.searchsorted(np.cumsum(located.run_length), borders, side="right")

    def rows(self, start: int, end: int) -> Located:
        """Rows ``[start, end)``, without a copy."""
        every = self._located
        pieces = slice(self._first_piece[start], self._first_piece[end])
        runs = slice(self._first_run[start], self._first_run[end])
        return Located(
            every.pieces[pieces],
            every.address[runs],
            every.run_length[runs],
            every.next_address[pieces],
            every.memories,
            None if every.memory_of_run is None else every.memory_of_run[runs],
            None if every.memory_of_piece is None else every.memory_of_piece[pieces],
        )

    @classmethod
    def merge(
        cls, parts: Sequence[tuple[Located, NDArray[np.int64]]], leases: list[object], *, seq_len: int
    ) -> "LocatedRows":
        """Rows of several data sets: row ``i`` of a part becomes row ``places[i]``."""
        memories: dict[np.dtype[Any], int] = {}
        numbers = [memories.setdefault(part.memories[0].dtype, len(memories)) for part, _ in parts]
        rows = [places[(np.cumsum(part.pieces[:, _LENGTH]) - 1) // seq_len] for part, places in parts]
        rows_of_runs = [places[(np.cumsum(part.run_length) - 1) // seq_len] for part, places in parts]
        order = np.argsort(np.concatenate(rows), kind="stable")
        run_order = np.argsort(np.concatenate(rows_of_runs), kind="stable")
        several = len(memories) > 1
        merged = Located(
            pieces=np.concatenate([part.pieces for part, _ in parts])[order],
            address=np.concatenate([part.address for part, _ in parts])[run_order],
            run_length=np.concatenate([part.run_length for part, _ in parts])[run_order],
            next_address=np.concatenate([part.next_address for part, _ in parts])[order],
            memories=tuple(map(token_memory, memories)),
            memory_of_run=np.repeat(numbers, list(map(len, rows_of_runs)))[run_order] if several else None,
            memory_of_piece=np.repeat(numbers, list(map(len, rows)))[order] if several else None,
        )
        return cls(merged, leases, seq_len=seq_len)


# Guarantees: any number of threads may share one.
class PieceGather:
    """Fill rows with the tokens of pieces, and with what follows from their borders.

    All tokens of some rows are fetched by one index of their addresses: 60 us for (16, 2048), whatever the number of
    pieces. A copy for each costs 0.75 us: 31 us at 800 tokens a piece.
    """

    def __init__(self, tables: Tables, *, seq_len: int, shifted: bool) -> None:
        dtype = np.dtype(tables.manifest.dtype)
        self._memory = token_memory(dtype)
        self._seq_len, self._shifted = seq_len, shifted
        self._shift, self._mask = tables.block_shift, tables.manifest.block_tokens - 1
        self._places = np.arange(0)  # never changed, only replaced by a longer one
        self._padding = np.full(seq_len, tables.manifest.eos_id or 0, dtype)

    def blocks(self, pieces: NDArray[np.int64]) -> NDArray[np.int64]:
        """The blocks that hold the pieces, sorted."""
        begin, length = pieces[:, _BEGIN], pieces[:, _LENGTH]
        real = begin >= 0
        first, last = begin[real] >> self._shift, (begin + length - 1)[real] >> self._shift
        most = int((last - first).max()) if first.size else 0
        return np.unique(np.concatenate([np.minimum(first + step, last) for step in range(most + 1)]))

    def resident(self, pieces: NDArray[np.int64], source: Source) -> tuple[int, int]:
        """How many rows from the first on lie in resident blocks, and how many pieces they have."""
        begin, length = pieces[:, _BEGIN], pieces[:, _LENGTH]
        real = begin >= 0
        first, last = begin >> self._shift, (begin + length - 1) >> self._shift
        absent = np.zeros(len(pieces), np.bool_)
        for step in range(int((last - first)[real].max(initial=0)) + 1):
            absent |= real & (source.rows[np.minimum(first + step, last)] == 0)
        ends = np.cumsum(length)
        found = np.flatnonzero(absent)
        tokens = ends[found[0]] - 1 if found.size else ends[-1] if len(ends) else 0
        rows = int(tokens) // self._seq_len
        return rows, int(np.searchsorted(ends, rows * self._seq_len, side="right"))

    def locate(
        self, pieces: NDArray[np.int64], blocks: NDArray[np.int64], source: Source, tables: Tables
    ) -> LocatedRows:
        """Where the tokens lie. Their `blocks` must be resident; the label after a piece may lie in another one."""
        begin, length, _, follows = pieces.T
        real = begin >= 0
        counts = np.where(real, ((begin + length - 1) >> self._shift) - (begin >> self._shift) + 1, 1)
        run_begin, run_end = begin, begin + length
        if (counts > 1).any():
            piece = np.repeat(np.arange(len(pieces)), counts)
            nth = np.arange(len(piece)) - np.repeat(np.cumsum(counts) - counts, counts)
            border = ((begin[piece] >> self._shift) + nth) << self._shift
            run_begin = np.where(nth > 0, border, begin[piece])
            run_end = np.where(nth + 1 < counts[piece], border + self._mask + 1, run_end[piece])
        address = source.rows[run_begin >> self._shift] + (run_begin & self._mask)
        address[run_begin < 0] = row_index(self._padding)
        next_address, leases = begin, list[object]()
        if self._shifted:
            next_address = source.rows[follows >> self._shift] + (follows & self._mask)
            # The first token of a block stands in the table of blocks, so that no block is fetched for one token.
            at_border = np.flatnonzero((follows >= 0) & (follows & self._mask == 0))
            tokens = np.array(
                [tables.first_token(int(p) >> self._shift) for p in follows[at_border]], self._memory.dtype
            )
            next_address[at_border] = row_index(tokens) + np.arange(len(at_border))
            leases.append(tokens)
        leases += source.hold(blocks)
        located = Located(pieces, address, run_end - run_begin, next_address, (self._memory,))
        return LocatedRows(located, leases, seq_len=self._seq_len)

    def __call__(self, located: Located, rows: DocumentRows) -> RowBorders:
        """Copy the tokens; the leases of `located` must be alive until this returns."""
        _, length, document, follows = located.pieces.T
        ends = np.cumsum(length)
        begins = ends - length
        places = self._places[: rows.input_ids.size]
        if len(places) < rows.input_ids.size:
            places = self._places = np.arange(rows.input_ids.size)
        tokens = rows.input_ids.reshape(-1)
        _copy_runs(located, tokens, places)
        np.subtract(places, np.repeat(begins, length), out=rows.position_ids.reshape(-1))
        rows.doc_ids.reshape(-1)[:] = np.repeat(document, length)
        labels, loss_mask = rows.labels.reshape(-1), rows.loss_mask.reshape(-1)
        loss_mask[:] = True
        if self._shifted:
            labels[:-1] = tokens[1:]
            goes_on = follows >= 0
            of_piece = located.memory_of_piece
            of_label = None if of_piece is None else of_piece[goes_on]
            labels[ends[goes_on] - 1] = _take(located.memories, located.next_address[goes_on], of_label)
            masked = ends[~goes_on] - 1
        else:
            labels[:] = tokens
            masked = begins
        labels[masked] = IGNORED_LABEL
        loss_mask[masked] = False
        padding = document < 0
        for begin, end in zip(begins[padding].tolist(), ends[padding].tolist(), strict=True):
            labels[begin:end] = IGNORED_LABEL
            loss_mask[begin:end] = False
        cu_seqlens = np.zeros(len(ends) + 1, np.int32)
        cu_seqlens[1:] = ends
        # A row has one piece of padding at most, its last; where labels are shifted, that counts among the masked too.
        padded = np.zeros(len(rows.input_ids), np.int64)
        padded[begins[padding] // self._seq_len] = length[padding]
        unlabelled = padded + np.bincount(masked // self._seq_len, minlength=len(padded))
        unlabelled -= padded > 0
        return RowBorders(cu_seqlens, int(length.max()), padded, unlabelled)


def _copy_runs(located: Located, tokens: NDArray[np.int64], places: NDArray[np.int64]) -> None:
    """Fill `tokens` run by run, or by one index where runs are short."""
    lengths, of_run = located.run_length, located.memory_of_run
    if of_run is None and len(lengths) * _LONG_RUN <= len(tokens):
        memory, end = located.memories[0], 0
        for address, length in zip(located.address.tolist(), lengths.tolist(), strict=True):
            begin, end = end, end + length
            tokens[begin:end] = memory[address : address + length]
        return
    index = np.repeat(located.address - (np.cumsum(lengths) - lengths), lengths)
    index += places
    tokens[:] = _take(located.memories, index, None if of_run is None else np.repeat(of_run, lengths))


def _take(memories: tuple[NDArray[Any], ...], index: NDArray[np.int64], of: NDArray[np.int64] | None) -> NDArray[Any]:
    """Tokens by address, each from its memory."""
    if of is None:
        return memories[0].take(index)
    tokens = np.empty(len(index), np.int64)
    for number, memory in enumerate(memories):
        chosen = np.flatnonzero(of == number)
        tokens[chosen] = memory.take(index[chosen])
    return tokens
