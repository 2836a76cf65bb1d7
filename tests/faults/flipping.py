"""Trial "flips": every single bit of a small checkpoint is flipped, one at a time, in every file that the log leads to.

``verify`` must name the file, whichever bit it is. ``restore`` must raise, and name the file, if it uses the byte: newest
record of the log, manifest, documents of plain values, blocks of blobs with their headers and pads. Of what it does not
use (fragments, older records) it must take no notice: the newest step comes back, bit for bit, and never an older one.
"""

import logging
import random
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.verify import verify
from stoker.errors import CorruptionError, FormatError

NEWEST = 2
_TOLD = (CorruptionError, FormatError)


@dataclass(frozen=True, kw_only=True)
class FlipsReport:
    """What flips came to.

    Attributes:
        bits: of the checkpoint; flips: how many of them were flipped.
        told_by_verify, told_by_restore, unused_by_restore: flips, by kind of file.
        violations: a sentence for each broken rule, the first few.
    """

    seed: int
    bits: int
    flips: int
    told_by_verify: dict[str, int]
    told_by_restore: dict[str, int]
    unused_by_restore: dict[str, int]
    seconds: float
    violations: list[str]

    @property
    def ok(self) -> bool:
        return not self.violations

    def to_json(self) -> dict[str, Any]:
        return {"trial": "flips", "ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        share = "every one" if self.flips == self.bits else f"{self.flips:,} (seed {self.seed})"
        told = ", ".join(f"{kind} {number:,}" for kind, number in sorted(self.told_by_restore.items()))
        unused = ", ".join(f"{kind} {number:,}" for kind, number in sorted(self.unused_by_restore.items()))
        head = (
            f"flips: {share} of {self.bits:,} bits; verify told {sum(self.told_by_verify.values()):,}; restore told "
            f"{sum(self.told_by_restore.values()):,} ({told}) and did not use {sum(self.unused_by_restore.values()):,} "
            f"({unused}); {self.seconds:.1f} s: {'ok' if self.ok else 'VIOLATED'}"
        )
        return "\n".join([head, *(f"NOT {violation}" for violation in self.violations)])


def tree_at(step: int) -> dict[str, Any]:
    """A little of everything: a matrix, a scalar, half bytes, plain values."""
    return {
        "model": {
            "w": torch.arange(6.0).view(2, 3) + step,
            "h": torch.arange(8, dtype=torch.bfloat16) * step,
            "n": torch.tensor(step),
        },
        "progress": {"step": step, "loss": 0.5 / step, "seen": 2**70 + step},
    }


def save_small(root: Path) -> None:
    """Steps 1 and 2 of a job of one rank."""
    with CheckpointManager(root) as ckpt:
        for step in (1, NEWEST):
            ckpt.save(step, tree_at(step)).wait("committed", timeout_s=60)


def files_of(root: Path) -> dict[Path, str]:
    """Every file that the log leads to, with its kind: all records, and what belongs to the newest step."""
    records = sorted(root.glob("log/*"))
    found = dict.fromkeys(records, "old record") | {records[0]: "record"}
    kinds = {"manifest.arrow": "manifest", "frag/*.arrow": "fragment", "state/*": "state", "data/*": "blob"}
    for pattern, kind in kinds.items():
        found |= dict.fromkeys(sorted(root.glob(f"step-{NEWEST:012d}-*/{pattern}")), kind)
    return found


UNUSED = {"old record", "fragment"}
"""What restore does not read. Fragments are what manifests were merged from; records below the newest are history."""


def flip_bits(
    directory: Path | None = None,
    *,
    num_flips: int | None = None,
    seed: int = 0,
    progress: Callable[[], None] = lambda: None,
) -> FlipsReport:
    """Flip `num_flips` bits chosen by `seed`, the same number in each file, or all of them."""
    with tempfile.TemporaryDirectory(prefix="stoker-prove-flips-", dir=directory) as name:
        return _Flips(Path(name) / "root", seed).run(num_flips, progress)


class _Flips:
    def __init__(self, root: Path, seed: int) -> None:
        save_small(root)
        self._root, self._seed = root, seed
        self._files = files_of(root)
        self._verified: Counter[str] = Counter()
        self._told: Counter[str] = Counter()
        self._unused: Counter[str] = Counter()
        self._violations: list[str] = []
        self._expected = tree_at(NEWEST)

    def run(self, num_flips: int | None, progress: Callable[[], None]) -> FlipsReport:
        began = monotonic()
        assert verify(self._root, all_steps=True).ok, "there must be no damage yet"
        sizes = {path: 8 * path.stat().st_size for path in self._files}
        flips = 0
        with CheckpointManager(self._root) as manager, _quiet():
            for path, bits in sizes.items():
                for bit in _chosen(bits, None if num_flips is None else num_flips // len(sizes), self._seed):
                    self._flip(manager, path, bit)
                    flips += 1
                    progress()
        assert verify(self._root, all_steps=True).ok, "every bit must be back in its place"
        return FlipsReport(
            seed=self._seed,
            bits=sum(sizes.values()),
            flips=flips,
            told_by_verify=dict(self._verified),
            told_by_restore=dict(self._told),
            unused_by_restore=dict(self._unused),
            seconds=round(monotonic() - began, 1),
            violations=self._violations[:20],
        )

    def _flip(self, manager: CheckpointManager, path: Path, bit: int) -> None:
        kind, key = self._files[path], str(path.relative_to(self._root))
        where = f"bit {bit} of {key}"
        with flipped(path, bit):
            if key in {damage.key for damage in verify(self._root).damages}:
                self._verified[kind] += 1
            else:
                self._violations.append(f"{where}: verify says nothing of it")
            tree = tree_at(1)
            try:
                step = manager.restore(tree).step
            except _TOLD as error:
                self._told[kind] += 1
                if kind in UNUSED or path.name not in str(error):
                    self._violations.append(f"{where}: restore said {error}")
            else:
                self._unused[kind] += 1
                if kind not in UNUSED:
                    self._violations.append(f"{where}: restore did not see it")
                elif step != NEWEST or not self._is_expected(tree):
                    self._violations.append(f"{where}: restore gave step {step} with other bits")

    def _is_expected(self, tree: dict[str, Any]) -> bool:
        model, expected = tree["model"], self._expected["model"]
        same = all(
            torch.equal(model[name].view(-1).view(torch.uint8), expected[name].view(-1).view(torch.uint8))
            for name in expected
        )
        return same and tree["progress"] == self._expected["progress"]


def _chosen(bits: int, number: int | None, seed: int) -> Iterator[int]:
    if number is None or number >= bits:
        return iter(range(bits))
    return iter(sorted(random.Random(f"{seed}/{bits}").sample(range(bits), number)))


@contextmanager
def flipped(path: Path, bit: int) -> Iterator[None]:
    """One bit of a file flipped, in place, until the block ends."""
    with path.open("r+b", buffering=0) as file:
        file.seek(bit // 8)
        byte = file.read(1)
        try:
            file.seek(bit // 8)
            file.write(bytes([byte[0] ^ 1 << bit % 8]))
            yield
        finally:
            file.seek(bit // 8)
            file.write(byte)


@contextmanager
def _quiet() -> Iterator[None]:
    """A warning for each of 200,000 flips helps nobody."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
