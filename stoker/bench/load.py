"""How fast do tokens come, beside what machine and store allow and beside how others load them?

Command: ``stoker bench load [--only PART] [--size 256MiB] [--runs 7] [--dir DIR] [--json]``. Its parts:

``warm``
    Batches of local files in the page cache, of one data set and of two: :mod:`stoker.bench._load_warm`.
``packed``
    Whole documents packed by best fit: :mod:`stoker.bench._load_packed`.
``cold``
    A stream, and a first batch, from an S3 server that no tier holds anything of: :mod:`stoker.bench._load_cold`.
``open``
    A first batch, a resume, a state, and what the number of shards does to them: :mod:`stoker.bench._load_open`.
``stall``
    A trainer at 80 % of what a throttled store gives: :mod:`stoker.bench._load_stall`.
``step``
    A small GPT's step with the loader and without: :mod:`stoker.bench._load_step`.
``memory``
    What a million batches leave in memory: :mod:`stoker.bench._load_memory`. Not run unless it is asked for.

Random tokens in documents of about a thousand are written once for each variant's own format. What is delivered is compared
with them, before anything is timed or in the run itself. Beside each rate stand the seconds that processors spent for 10^9
tokens, in all threads of the process; those of a server are not in it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Protocol

from ..errors import ConfigError
from ._load_cold import run_cold
from ._load_memory import run_memory
from ._load_open import run_open
from ._load_packed import run_packed
from ._load_stall import run_stall
from ._load_step import run_step
from ._load_stream import BATCH, SEQ_LEN
from ._load_warm import run_warm
from .frame import Report
from .peers import LOAD_PEERS

__all__ = ["DEFAULT_PARTS", "PARTS", "run_load"]

PARTS = ("warm", "packed", "cold", "open", "stall", "step", "memory")
DEFAULT_PARTS = PARTS[:-1]
"""Those that ``stoker bench load`` runs."""

_PLACE = "stoker bench load"


class _Part(Protocol):
    def __call__(
        self, *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None
    ) -> Report: ...


def run_load(
    *,
    size_bytes: int,
    runs: int,
    directory: str | Path,
    only: Sequence[str] = DEFAULT_PARTS,
    warmup: int = 1,
    peers: Sequence[str] = tuple(LOAD_PEERS),
    progress: Callable[[], None] | None = None,
) -> Report:
    """Measure the parts in `only`, those that read much over `size_bytes` of tokens.

    Needs three times that much memory, as much shared memory, and nine times as much space below `directory`, which is
    left as it was found. What can't be measured here becomes a note of the report.

    Args:
        peers: packages of :data:`~stoker.bench.peers.LOAD_PEERS`; one that is not installed becomes a note.

    Raises:
        ConfigError: fewer tokens than 32 batches hold, or no such part.
        CorruptionError: the limit or stoker returned a wrong token.
        StoreFull, OSError: no space.
    """
    least = 32 * BATCH * SEQ_LEN * 4
    if size_bytes < least:
        raise ConfigError(f"size must be >= {least} bytes, 32 batches", value=size_bytes, place=_PLACE)
    unknown = set(only) - set(PARTS)
    if unknown or not only:
        raise ConfigError(f"a part is one of {', '.join(PARTS)}", value=", ".join(sorted(unknown)), place="--only")
    parts: Mapping[str, _Part] = {
        "warm": partial(run_warm, peers=peers),
        "packed": run_packed,
        "cold": run_cold,
        "open": run_open,
        "stall": run_stall,
        "step": run_step,
        "memory": run_memory,
    }
    reports = [
        parts[part](size_bytes=size_bytes, runs=runs, warmup=warmup, directory=Path(directory), progress=progress)
        for part in PARTS
        if part in only
    ]
    machine = next((report.machine for report in reports if report.machine), {})
    return sum(reports, Report(machine=machine, rows=()))
