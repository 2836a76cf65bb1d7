"""Plans of rows from document lengths: as the plain definition says, every token once, the same in every version."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.errors import ConfigError
from stoker.loaders.packing import PLAN_VERSION, BestFit, Concat, Packer, Pad, WindowPlan, WindowTable
from tests.loaders.plain_packing import Piece, plain_plan

GOLDEN = Path(__file__).parent.parent / "data" / "packing-v1.json"

PACKERS: list[Packer] = [
    Concat(),
    *(kind(long=long) for kind in (BestFit, Pad) for long in ("split", "truncate", "drop")),
]
LENGTHS = st.lists(st.one_of(st.integers(1, 9), st.integers(1, 60)), min_size=1, max_size=40)


def named(packer: Any) -> Any:
    return packer.name


def rows_of(plan: WindowPlan) -> list[list[Piece]]:
    assert plan.first[0] == 0
    assert plan.first[-1] == len(plan.document) == len(plan.offset) == len(plan.length)
    pieces = list(zip(plan.document.tolist(), plan.offset.tolist(), plan.length.tolist(), strict=True))
    return [pieces[start:end] for start, end in zip(plan.first[:-1], plan.first[1:], strict=True)]


def rows_for(packer: Packer, lengths: list[int], seq_len: int) -> int:
    """As many rows as a window of these documents has."""
    windows = packer.windows(seq_len=seq_len, rows=10**6, tokens=sum(lengths))
    if isinstance(windows, WindowTable):
        windows.update(np.array(lengths))
        return windows.rows
    return windows


@pytest.mark.parametrize("packer", PACKERS, ids=named)
@given(lengths=LENGTHS, seq_len=st.integers(1, 24), fewer=st.integers(0, 6))
@settings(max_examples=150, deadline=None)
def test_a_plan_is_what_the_plain_definition_says(packer: Any, lengths: list[int], seq_len: int, fewer: int) -> None:
    rows = rows_for(packer, lengths, seq_len)
    if isinstance(packer, BestFit) and packer.long != "split":
        rows -= fewer  # what then fits nowhere is cut off or dropped
    if rows < 1:
        return
    got = rows_of(packer.plan(np.array(lengths), seq_len=seq_len, rows=rows))
    assert got == plain_plan(packer, lengths, seq_len, rows)


@given(lengths=LENGTHS, seq_len=st.integers(1, 24))
@settings(max_examples=150, deadline=None)
def test_best_fit_that_splits_keeps_every_token_once_and_pads_less_than_a_row(lengths: list[int], seq_len: int) -> None:
    rows = -(-sum(lengths) // seq_len)
    packed = rows_of(BestFit().plan(np.array(lengths), seq_len=seq_len, rows=rows))
    tokens = sorted((document, at + i) for row in packed for document, at, length in row for i in range(length))
    assert tokens == [(document, at) for document, length in enumerate(lengths) for at in range(length)]
    assert len(packed) == rows
    assert all(0 < sum(length for _, _, length in row) <= seq_len for row in packed)


def test_best_fit_cuts_far_fewer_documents_than_concat() -> None:
    lengths = np.maximum(2, np.random.default_rng(0).lognormal(np.log(350), 1.0, 4000).astype(np.int64))
    lengths = lengths[lengths <= 2048]
    rows = -(-int(lengths.sum()) // 2048)
    cut = {}
    for packer in (Concat(), BestFit()):
        pieces = np.bincount(packer.plan(lengths, seq_len=2048, rows=rows).document)
        cut[packer.name] = (pieces > 1).mean()
    assert cut["concat"] > 0.2
    assert cut[BestFit().name] < 0.01


@pytest.mark.parametrize(
    "packer", [packer for packer in PACKERS if packer.name not in ("concat", "best_fit-1/split")], ids=named
)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 60)), max_size=60),
    seq_len=st.integers(1, 24),
    rows=st.sampled_from([1, 2, 4]),
    cuts=st.lists(st.integers(0, 60), max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_a_window_table_says_where_windows_begin_however_lengths_come(
    packer: Any, lengths: list[int], seq_len: int, rows: int, cuts: list[int]
) -> None:
    table = packer.windows(seq_len=seq_len, rows=rows, tokens=sum(lengths))
    for part in np.split(np.array(lengths, np.uint32), sorted(min(cut, len(lengths)) for cut in cuts)):
        table.update(part)
    edges, weight, begin = [0], 0, 0
    unit = seq_len if isinstance(packer, BestFit) else 1
    for length in lengths:
        kept = 0 if packer.long == "drop" and length > seq_len else length
        if isinstance(packer, BestFit):
            steps = [(begin, min(kept, seq_len))] if kept else []
        elif packer.long == "split":
            steps = [(begin + at, 1) for at in range(0, length, seq_len)]
        else:
            steps = [(begin, 1)] if kept else []
        for at, more in steps:
            weight += more
            if weight > len(edges) * rows * unit:
                edges.append(at)
        begin += length
    assert table.rows == -(-weight // unit)
    if weight:
        assert table.edges().tolist() == [*edges, sum(lengths)]


@pytest.mark.parametrize(
    ("order_tokens", "seq_len", "rows"), [(2**21, 2048, 1024), (2**21, 2000, 1024), (64, 64, 1), (64, 100, 1)]
)
def test_a_window_is_an_order_block_or_the_power_of_two_of_rows_below(
    order_tokens: int, seq_len: int, rows: int
) -> None:
    for packer in (Concat(), BestFit(), BestFit(long="drop")):
        assert packer.rows_per_window(seq_len=seq_len, order_tokens=order_tokens, documents=9, tokens=900) == rows


def test_a_window_of_padded_documents_is_about_an_order_block() -> None:
    size: dict[str, int] = {"seq_len": 100, "order_tokens": 6400, "tokens": 10**6}
    assert Pad().rows_per_window(documents=10**5, **size) == 512  # of 640 documents
    assert Pad().rows_per_window(documents=100, **size) == 64  # documents of 10,000 tokens, 100 rows each
    assert Pad(long="drop").rows_per_window(documents=100, **size) == 1


def test_the_plans_are_those_of_version_1() -> None:
    golden = json.loads(GOLDEN.read_text())
    assert golden["version"] == PLAN_VERSION
    assert {case["packing"] for case in golden["plans"]} == {packer.name for packer in PACKERS}
    for case in golden["plans"]:
        packer = next(packer for packer in PACKERS if packer.name == case["packing"])
        plan = packer.plan(np.array(golden["lengths"]), seq_len=case["seq_len"], rows=case["rows"])
        assert {name: column.tolist() for name, column in plan._asdict().items()} == case["plan"]


@pytest.mark.parametrize("kind", [BestFit, Pad])
def test_an_unknown_choice_for_long_documents_is_refused(kind: Any) -> None:
    with pytest.raises(ConfigError, match="long must be one of split, truncate, drop, got 'cut'"):
        kind(long="cut")
