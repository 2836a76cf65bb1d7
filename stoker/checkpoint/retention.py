"""Which committed steps stay: the newest ones, one every so many, the best by a metric. Needs no torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..errors import ConfigError
from .log import Keep, LiveStep, keep_all

__all__ = ["KeepBest", "checked_metrics", "retention"]

_MAX_METRICS = 100
_MAX_NAME = 100


@dataclass(frozen=True, kw_only=True)
class KeepBest:
    """Keep the `count` steps whose `metric`, as given to ``save(metrics=)``, is best.

    A step without that metric, or with NaN, is never among the best. Of equal ones the older stays.

    >>> KeepBest(metric="loss")                               # the step of lowest loss
    KeepBest(metric='loss', mode='min', count=1)
    >>> KeepBest(metric="accuracy", mode="max", count=3)      # the three of highest accuracy
    KeepBest(metric='accuracy', mode='max', count=3)
    """

    metric: str
    mode: Literal["min", "max"] = "min"
    count: int = 1

    def __post_init__(self) -> None:
        if self.mode not in ("min", "max"):
            raise ConfigError("mode must be 'min' or 'max'", value=self.mode, place="KeepBest")
        if self.count < 1:
            raise ConfigError("count must be >= 1", value=self.count, place="KeepBest")

    def of(self, live: Mapping[int, LiveStep]) -> list[int]:
        """Those of the committed steps that are best, the best first."""
        sign = 1 if self.mode == "min" else -1
        values = {step: one.metrics.get(self.metric, math.nan) for step, one in live.items()}
        ranked = sorted((sign * value, step) for step, value in values.items() if not math.isnan(value))
        return [step for _, step in ranked[: self.count]]


def retention(*, keep_last: int | None, keep_every: int | None, keep_best: KeepBest | None) -> Keep:
    """One rule of the three: a step stays if any of them wants it. None of them given keeps all.

    >>> live = {step: LiveStep(nonce="0" * 16, manifest_sha256="0" * 64) for step in range(0, 60, 10)}
    >>> sorted(retention(keep_last=2, keep_every=30, keep_best=None)(live))
    [0, 30, 40, 50]
    """
    for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
        if value is not None and value < 1:
            raise ConfigError(f"{name} must be >= 1 or None", value=value, place="CheckpointManager")
    if keep_last is None and keep_every is None and keep_best is None:
        return keep_all

    def keep(live: Mapping[int, LiveStep]) -> set[int]:
        kept = set(sorted(live)[-(keep_last or 1) :])
        if keep_every is not None:
            kept.update(step for step in live if step % keep_every == 0)
        if keep_best is not None:
            kept.update(keep_best.of(live))
        return kept

    return keep


def checked_metrics(metrics: Mapping[str, Any] | None) -> dict[str, float]:
    """The metrics of a step as floats; every log record carries them, so they are few and their names short.

    >>> checked_metrics({"loss": 2})
    {'loss': 2.0}

    Raises:
        ConfigError: a name that is no short text, a value that is no number, or too many.
    """
    place = "CheckpointManager.save(metrics=)"
    checked: dict[str, float] = {}
    for name, value in (metrics or {}).items():
        if not isinstance(name, str) or not 0 < len(name) <= _MAX_NAME:
            raise ConfigError(f"a metric's name is text of 1 to {_MAX_NAME} characters", value=name, place=place)
        try:
            if isinstance(value, str | bytes):
                raise TypeError
            number = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ConfigError("a metric is one number", value=repr(value)[:80], place=f"{place}: {name}") from None
        checked[name] = math.nan if math.isnan(number) else number
    if len(checked) > _MAX_METRICS:
        raise ConfigError(f"at most {_MAX_METRICS} metrics for a step", value=len(checked), place=place)
    return checked
