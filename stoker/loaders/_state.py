"""The state of a loader: one small record, the same on every rank, that finds any topology again."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from ..errors import StateMismatch, UnknownVersion
from .order import SkipRanges

__all__ = ["STATE_VERSION", "LoaderState"]

STATE_VERSION = 1
_PLACE = "loader state"

# What two loaders must share for a position to mean the same sample. Paths, ranks and batch sizes are not among it.
_IDENTITY = (
    "fingerprint",
    "packing",
    "seq_len",
    "num_samples",
    "order_version",
    "seed",
    "shuffle",
    "samples_per_block",
    "lanes",
    "window_blocks",
)


@dataclass(frozen=True, kw_only=True)
class LoaderState:
    """Where a stream stands, and which stream it is.

    Attributes:
        fingerprint: content of the data set. packing, seq_len, num_samples: how it is cut into samples.
        order_version, seed, shuffle, samples_per_block, lanes, window_blocks: the order.
        position: the first position that the trainer has not got; everything before it was delivered, skipped by
            request, or dropped at the end of a run.
        run_start: where the current run of epochs began; equal to `position` if that run is yet to begin.
        skip: ranges of positions that are jumped over.
        global_batch: rows of a step when the state was taken; only for the log.
    """

    fingerprint: str
    packing: str
    seq_len: int
    num_samples: int
    order_version: int
    seed: int
    shuffle: str
    samples_per_block: int
    lanes: int
    window_blocks: int
    position: int
    run_start: int
    skip: tuple[tuple[int, int], ...]
    global_batch: int

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: strings, integers and lists of them."""
        record: dict[str, Any] = {"version": STATE_VERSION, **self.__dict__}
        record["skip"] = [list(r) for r in self.skip]
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parse and check what :meth:`to_dict` made.

        Raises:
            UnknownVersion: written by a newer version.
            StateMismatch: no state of a loader, an empty one included.
        """
        record = {"packing": "concat", **record}  # the first states of version 1 knew no other
        version = record.get("version")
        if isinstance(version, int) and version > STATE_VERSION:
            raise UnknownVersion(
                f"this version of stoker reads loader states up to version {STATE_VERSION}", value=version, place=_PLACE
            )
        missing = [f.name for f in fields(cls) if f.name not in record]
        if version != STATE_VERSION or missing:
            raise StateMismatch(
                "must be what TokenLoader.state_dict() returned",
                value=f"a record without {', '.join(missing)}" if missing else f"version {version}",
                place=_PLACE,
                hint="a lost state would start the data anew in silence, so it is refused",
            )
        values = {f.name: record[f.name] for f in fields(cls)}
        for f in fields(cls):
            wanted = str if f.name in ("fingerprint", "packing", "shuffle") else int
            if f.name != "skip" and type(values[f.name]) is not wanted:
                raise StateMismatch(f"{f.name} must be of type {wanted.__name__}", value=values[f.name], place=_PLACE)
        values["skip"] = SkipRanges(values["skip"]).ranges
        if not 0 <= values["run_start"] <= values["position"]:
            raise StateMismatch(
                "0 <= run_start <= position must hold",
                value=f"{values['run_start']} and {values['position']}",
                place=_PLACE,
            )
        return cls(**values)

    def require_same_stream(self, other: "LoaderState") -> None:
        """Raise StateMismatch, naming every difference, unless positions mean the same samples in both."""
        differences = [
            f"{name} is {getattr(self, name)!r} in the state and {getattr(other, name)!r} here"
            for name in _IDENTITY
            if getattr(self, name) != getattr(other, name)
        ]
        if differences:
            raise StateMismatch(
                "the state must come from the same tokens in the same order",
                value="; ".join(differences),
                place=_PLACE,
                hint="open the data set that the run was started with, with the same seed, seq_len, packing and shuffle",
            )
