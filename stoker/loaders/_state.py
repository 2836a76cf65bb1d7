"""The state of a loader: one small record, the same on every rank, that finds any topology again."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, Self

from ..errors import ConfigError, StateMismatch, UnknownVersion
from ._numbers import as_whole
from .order import ENDLESS, SkipRanges

__all__ = ["STATE_VERSION", "LoaderState"]

STATE_VERSION = 1
_PLACE = "loader state"

# What two loaders must share for a position to mean the same sample. Paths, ranks and batch sizes are not among it.
_DATASET = {"fingerprint": str, "packing": str, "num_samples": int, "samples_per_block": int}
_MIXTURE = {"mixture_version": int, "sources": dict, "segments": list}
_ORDER = {"seq_len": int, "order_version": int, "seed": int, "shuffle": str, "lanes": int, "window_blocks": int}
_PROGRESS = {"position": int, "run_start": int, "skip": list, "global_batch": int}


@dataclass(frozen=True, kw_only=True, slots=True)
class LoaderState:
    """Where a stream stands, and which stream it is.

    Attributes:
        content: of a data set: ``fingerprint`` of its content, ``packing`` and ``num_samples``, how it is cut into
            samples, ``samples_per_block``. Of a mixture: ``mixture_version``; ``sources``, ``{name: [digest, packing]}``;
            ``segments``, ``[position, digest of weights]`` of those that start before `position`.
        seq_len, order_version, seed, shuffle, lanes, window_blocks: the order.
        position: the first position that the trainer has not got; everything before it was delivered, skipped by
            request, or dropped at the end of a run.
        run_start: where the current run of epochs began; equal to `position` if that run is yet to begin.
        skip: ranges of positions that are jumped over.
        global_batch: rows of a step when the state was taken; only for the log.
    """

    content: Mapping[str, Any]
    seq_len: int
    order_version: int
    seed: int
    shuffle: str
    lanes: int
    window_blocks: int
    position: int
    run_start: int
    skip: tuple[tuple[int, int], ...]
    global_batch: int

    @property
    def is_mixture(self) -> bool:
        """Whether it is of a mixture."""
        return "mixture_version" in self.content

    def to_dict(self) -> dict[str, Any]:
        """Plain values only: strings, integers, and lists and dicts of them."""
        return {
            "version": STATE_VERSION,
            **self.content,
            **{name: getattr(self, name) for name in _ORDER},
            "position": self.position,
            "run_start": self.run_start,
            "skip": [list(r) for r in self.skip],
            "global_batch": self.global_batch,
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Self:
        """Parse and check what :meth:`to_dict` made.

        Raises:
            UnknownVersion: written by a newer version.
            StateMismatch: no state of a loader, an empty one included.
        """
        if not isinstance(record, Mapping):
            raise StateMismatch(
                "must be what TokenLoader.state_dict() returned", value=type(record).__name__, place=_PLACE
            )
        version = record.get("version")
        if isinstance(version, int) and version > STATE_VERSION:
            raise UnknownVersion(
                f"this version of stoker reads loader states up to version {STATE_VERSION}", value=version, place=_PLACE
            )
        content = _MIXTURE if "mixture_version" in record else _DATASET
        if content is _DATASET:
            record = {"packing": "concat", **record}  # the first states of version 1 knew no other
        types = {**content, **_ORDER, **_PROGRESS}
        missing = [name for name in types if name not in record]
        if version != STATE_VERSION or missing:
            raise StateMismatch(
                "must be what TokenLoader.state_dict() returned",
                value=f"a record without {', '.join(missing)}" if missing else f"version {version}",
                place=_PLACE,
                hint="a lost state would start the data anew in silence, so it is refused",
            )
        record = {name: _typed(name, record[name], wanted) for name, wanted in types.items()}
        if not 0 <= record["run_start"] <= record["position"] < ENDLESS:
            raise StateMismatch(
                "0 <= run_start <= position < 2^62 must hold",
                value=f"{record['run_start']} and {record['position']}",
                place=_PLACE,
            )
        if content is _MIXTURE:
            _require_pairs("sources", record["sources"].values(), str, str)
            _require_pairs("segments", record["segments"], int, str)
        values = {name: record[name] for name in {**_ORDER, **_PROGRESS}}
        try:
            values["skip"] = SkipRanges(values["skip"]).ranges
        except ConfigError as error:
            raise StateMismatch(error.rule, value=error.value, place=_PLACE) from error
        return cls(content={name: record[name] for name in content}, **values)

    def require_same_stream(self, here: "LoaderState") -> None:
        """Raise StateMismatch, naming every difference, unless positions up to this state's mean the same samples.

        `here` is what another loader would say at the same position.
        """
        if self.is_mixture != here.is_mixture:
            kinds = ("one data set", "a mixture")
            raise StateMismatch(
                f"the state is of {kinds[self.is_mixture]}",
                value=f"{kinds[here.is_mixture]} here",
                place=_PLACE,
                hint="a mixture of one source is a mixture too",
            )
        differences = []
        for name in (*self.content, *_ORDER):
            mine, other = (s.content[name] if name in s.content else getattr(s, name) for s in (self, here))
            if name == "sources":
                differences += _differing_sources(mine, other)
            elif name == "segments":
                differences += _differing_segments(mine, other)
            elif mine != other:
                differences.append(f"{name} is {mine!r} in the state and {other!r} here")
        if differences:
            hint = "open the data set that the run was started with, with the same seed, seq_len, packing and shuffle"
            raise StateMismatch(
                "the state must come from the same tokens in the same order",
                value="; ".join(differences),
                place=_PLACE,
                hint=f"{hint}; weights may change from position {self.position} on" if self.is_mixture else hint,
            )


def _typed(name: str, value: Any, wanted: type) -> Any:
    """A value of its type; whole numbers of any kind as Python's, because earlier versions kept those of numpy."""
    typed = as_whole(value) if wanted is int else value
    if not isinstance(typed, (list, tuple) if wanted is list else wanted):
        raise StateMismatch(f"{name} must be of type {wanted.__name__}", value=value, place=_PLACE)
    return typed


def _require_pairs(name: str, pairs: Iterable[Any], *types: type) -> None:
    for pair in pairs:
        if not isinstance(pair, list | tuple) or tuple(map(type, pair)) != types:
            told = " and ".join(wanted.__name__ for wanted in types)
            raise StateMismatch(f"{name} must hold pairs of {told}", value=pair, place=_PLACE)


def _differing_sources(mine: Mapping[str, Any], others: Mapping[str, Any]) -> list[str]:
    """What the state's sources are that are others here; further ones are none of its business."""
    differences = []
    for name, told in mine.items():
        if name not in others:
            differences.append(f"source {name!r} is missing here, where it may have weight 0")
        elif list(told) != list(others[name]):
            differences.append(f"source {name!r} is {told!r} in the state and {others[name]!r} here")
    return differences


def _differing_segments(mine: Sequence[Any], others: Sequence[Any]) -> list[str]:
    """Where the first difference between the weights up to the state's position is."""
    for told, other in zip_longest(map(list, mine), map(list, others)):
        if told != other:
            if other is None or (told is not None and told[0] < other[0]):
                return [f"the weights change at position {told[0]} in the state and not here"]
            if told is None or other[0] < told[0]:
                return [f"the weights change at position {other[0]} here and not in the state"]
            return [f"the weights from position {told[0]} on are others here"]
    return []
