"""Numbers as callers give them, Python's own or numpy's, as Python's own: what a state keeps must come back from JSON."""

import math
import operator
from fractions import Fraction
from numbers import Integral, Rational, Real

import numpy as np

from ..errors import ConfigError

__all__ = ["as_whole", "exact", "whole"]


def whole(name: str, value: object, *, place: str, least: int | None = None, hint: str = "") -> int:
    """A whole number of any kind as a Python int. A bool is none, and neither is a float, 2.0 included.

    Raises:
        ConfigError: it is something else, or below `least`.

    >>> whole("seed", np.int64(3), place="TokenLoader")
    3
    """
    number = as_whole(value)
    if number is None:
        raise ConfigError(f"{name} must be a whole number", value=value, place=place, hint=hint)
    if least is not None and number < least:
        raise ConfigError(f"{name} must be >= {least}", value=number, place=place, hint=hint)
    return number


def as_whole(value: object) -> int | None:
    """A whole number of any kind as a Python int; None for anything else."""
    if isinstance(value, bool | np.bool_):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return None


def exact(value: object) -> Fraction | None:
    """A finite number of any kind, exactly; None for anything else.

    >>> exact(np.float32(0.5)), exact(True), exact(float("nan"))
    (Fraction(1, 2), None, None)
    """
    if isinstance(value, bool):
        return None
    if isinstance(value, Integral):
        return Fraction(int(value))
    if isinstance(value, Rational):
        return Fraction(value)
    if isinstance(value, Real) and math.isfinite(value):
        return Fraction(float(value))
    return None
