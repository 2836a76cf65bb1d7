"""What packing means, written down as plainly as can be; the tests compare the real thing with it."""

from collections.abc import Sequence
from typing import Any

from stoker.loaders.packing import BestFit, Concat, Packer, Pad

Piece = tuple[int, int, int]  # document, first token, tokens


def plain_plan(packer: Packer, lengths: Sequence[int], seq_len: int, rows: int) -> list[list[Piece]]:
    """The rows of one window of documents."""
    if isinstance(packer, Concat):
        return _cut_stream(lengths, seq_len, rows)
    assert isinstance(packer, BestFit | Pad)
    pieces: list[Piece] = []
    for document, length in enumerate(lengths):
        if length <= seq_len or packer.long == "truncate":
            pieces.append((document, 0, min(length, seq_len)))
        elif packer.long == "split":
            pieces += [(document, at, min(seq_len, length - at)) for at in range(0, length, seq_len)]
    if isinstance(packer, Pad):
        return [[piece] for piece in pieces]
    return _best_fit(pieces, seq_len, rows, packer.long)


def _cut_stream(lengths: Sequence[int], seq_len: int, rows: int) -> list[list[Piece]]:
    tokens = [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    out: list[list[Piece]] = []
    for row in range(rows):
        pieces: list[Piece] = []
        for document, at in tokens[row * seq_len : (row + 1) * seq_len]:
            if pieces and pieces[-1][0] == document:
                pieces[-1] = (document, pieces[-1][1], pieces[-1][2] + 1)
            else:
                pieces.append((document, at, 1))
        out.append(pieces)
    return out


def _best_fit(pieces: list[Piece], seq_len: int, rows: int, long: str) -> list[list[Piece]]:
    out: list[list[Piece]] = [[] for _ in range(rows)]
    room = [seq_len] * rows
    since = [-row for row in range(rows)]  # when the row came to the room that it has

    def put(row: int, piece: Piece, now: int) -> None:
        out[row].append(piece)
        room[row] -= piece[2]
        since[row] = now

    clock, left_over = 0, []
    for piece in sorted(pieces, key=lambda piece: (-piece[2], piece[0], piece[1])):
        fitting = [row for row in range(rows) if room[row] >= piece[2]]
        if fitting:
            put(min(fitting, key=lambda row: (room[row], -since[row])), piece, clock := clock + 1)
        else:
            left_over.append(piece)
    for document, at, length in left_over if long != "drop" else []:
        while length and any(room):
            row = max(range(rows), key=lambda row: (room[row], since[row]))
            part = min(room[row], length)
            put(row, (document, at, part), clock := clock + 1)
            at, length = at + part, length - part
            if long == "truncate":
                break
    return [sorted(row) for row in out]


def plain_rows(
    packer: Packer, lengths: Sequence[int], *, seq_len: int, order_tokens: int
) -> tuple[list[list[Piece]], int]:
    """All rows of a data set, pieces in document coordinates, and the rows of a window."""
    tokens = sum(lengths)
    window_rows = packer.rows_per_window(
        seq_len=seq_len, order_tokens=order_tokens, documents=len(lengths), tokens=tokens
    )
    windows: list[list[Piece]] = []  # the parts of documents in each window
    if isinstance(packer, Pad):
        return plain_plan(packer, lengths, seq_len, 0), window_rows
    assert isinstance(packer, Concat | BestFit)
    if isinstance(packer, Concat) or packer.long == "split":
        window_tokens = window_rows * seq_len
        begin = 0
        for document, length in enumerate(lengths):
            at = 0
            while at < length:
                window, within = divmod(begin + at, window_tokens)
                part = min(length - at, window_tokens - within)
                windows += [[] for _ in range(window + 1 - len(windows))]
                windows[window].append((document, at, part))
                at += part
            begin += length
        total = tokens
    else:
        total = 0  # of the stream without what is longer than a row
        for document, length in enumerate(lengths):
            total += min(length, seq_len) if packer.long == "truncate" or length <= seq_len else 0
            window = max(0, -(-total // (window_rows * seq_len)) - 1)
            windows += [[] for _ in range(window + 1 - len(windows))]
            windows[window].append((document, 0, length))
    count = (total - 1) // seq_len if isinstance(packer, Concat) else -(-total // seq_len)
    out: list[list[Piece]] = []
    for number, parts in enumerate(windows):
        rows_here = min(window_rows, count - number * window_rows)
        if rows_here > 0:
            for row in plain_plan(packer, [length for _, _, length in parts], seq_len, rows_here):
                out.append([(parts[i][0], parts[i][1] + at, length) for i, at, length in row])
    return out, window_rows


def plain_sample(
    row: Sequence[Piece], documents: Sequence[Any], *, seq_len: int, labels: str, padding: int
) -> dict[str, list[int]]:
    """The tensors of a row as lists."""
    sample: dict[str, list[int]] = {
        name: [] for name in ("input_ids", "labels", "position_ids", "doc_ids", "loss_mask")
    }
    for document, at, length in row:
        tokens = documents[document].tolist()
        sample["input_ids"] += tokens[at : at + length]
        if labels == "shifted":
            wanted = (tokens + [-100])[at + 1 : at + length + 1]
        else:
            wanted = [-100, *tokens[at + 1 : at + length]]
        sample["labels"] += wanted
        sample["position_ids"] += range(length)
        sample["doc_ids"] += [document] * length
        sample["loss_mask"] += [int(label != -100) for label in wanted]
    rest = seq_len - len(sample["input_ids"])
    sample["input_ids"] += [padding] * rest
    sample["labels"] += [-100] * rest
    sample["position_ids"] += range(rest)
    sample["doc_ids"] += [-1] * rest
    sample["loss_mask"] += [0] * rest
    return sample
