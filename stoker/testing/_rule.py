"""How often a fault strikes: what a rule of the fault proxy and one of a faulty tier have in common."""

import random

from ..errors import ConfigError

__all__ = ["Rule"]


class Rule:
    """Counts the occasions that match a fault, and says on which of them it strikes.

    Args:
        place: where it was asked for, in errors.
        times: how often it strikes at most.
        after: how many occasions are let through first.
        probability: of each one after those.
        chance: for the draws.

    Attributes:
        seen: occasions that matched so far.
        hits: on how many of them the fault struck.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, place: str, *, times: int | None, after: int, probability: float, chance: random.Random) -> None:
        if times is not None and times < 1:
            raise ConfigError("times must be >= 1", value=times, place=place)
        if after < 0:
            raise ConfigError("after must be >= 0", value=after, place=place)
        if not 0.0 <= probability <= 1.0:
            raise ConfigError("probability must be in [0, 1]", value=probability, place=place)
        self.seen = 0
        self.hits = 0
        self._times, self._after, self._probability = times, after, probability
        self._chance = chance

    def _strikes(self) -> bool:
        """Count one occasion. The caller holds the lock that guards the counters."""
        self.seen += 1
        if self.seen <= self._after or (self._times is not None and self.hits >= self._times):
            return False
        # Drawn for every occasion in the span, so that the n-th draw is the n-th occasion's.
        if self._probability < 1.0 and self._chance.random() >= self._probability:
            return False
        self.hits += 1
        return True
