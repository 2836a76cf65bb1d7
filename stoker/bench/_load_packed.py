"""``stoker bench load --only packed``: whole documents packed by best fit, with all keys of a packed batch.

Documents have about a thousand tokens. The limit is that of the warm batches, which makes two arrays of the five, and
plans nothing; the goal is a rate.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..loaders import TokenLoader
from ._load_stream import BATCH, DTYPES, SEQ_LEN, Stream
from ._load_warm import Documents, TakeOut
from .frame import Case, Question, Report, Scalar, measure

__all__ = ["BEST_FIT", "run_packed"]

BEST_FIT = "best_fit batches"
_GOAL_TOKENS_PER_S = 100e6


def run_packed(
    *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None = None
) -> Report:
    """Measure packed batches over `size_bytes` of tokens, for each token width in turn."""
    reports = []
    for dtype in DTYPES:
        stream = Stream(size_bytes // np.dtype(dtype).itemsize, dtype)
        name = f"{BEST_FIT}, {dtype}"
        case = Case(name=name, unit="tokens/s", goal_value=_GOAL_TOKENS_PER_S, cache="warm", origin="page cache")
        mean = round(len(stream.tokens) / len(stream.ends))
        params: dict[str, Scalar] = {"size_bytes": size_bytes, "dtype": dtype, "batch_size": BATCH, "seq_len": SEQ_LEN}
        question = Question(bench="load", cases=[case], params={**params, "mean_document_tokens": mean})
        variants = [kind(stream, directory, (name,)).variant() for kind in (TakeOut, _BestFit)]
        reports.append(measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress))
    return sum(reports[1:], reports[0])


class _BestFit(Documents):
    name = "stoker TokenLoader, best_fit"
    notes = ("with position_ids, doc_ids, loss_mask and cu_seqlens, which the limit does not make",)

    def open(self) -> None:
        self._sources = [self.write("set", 0, len(self.stream.ends), packing="best_fit")]
        self._loader = TokenLoader(self._sources[0], batch_size=BATCH, epochs=None)
        self._first_document = {None: 0}
