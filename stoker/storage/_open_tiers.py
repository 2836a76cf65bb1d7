"""Where the tiers of a cache are and how large they may be; a job must run where one can't be had."""

from collections.abc import Callable
from pathlib import Path

from ..errors import AccessDenied, ConfigError, StokerError, UnknownVersion
from ..metrics import counters
from ._memory import memory_limits
from ._posix import shared_memory_directory
from .eviction import EvictionPolicy
from .tiers import Tier, warn_once

__all__ = ["Policy", "open_disk_tier", "open_ram_tier"]

Policy = Callable[[], EvictionPolicy]

_DEFAULT_RAM_BYTES = 8 * 2**30
_FREE_SHARE = 0.8  # of what is free, the most a tier takes: tmpfs pages count against the job's own memory limit

_MISTAKES = (AccessDenied, ConfigError, UnknownVersion)
"""What is wrong about a directory that the user named; what fails otherwise only costs the tier."""


def open_ram_tier(
    path: str | Path | None, asked_bytes: int | None, *, min_free_bytes: int | None, policy: Policy | None
) -> Tier | None:
    """The RAM tier, or None with a warning: a job must run where shared memory is missing or someone else's."""

    def capacity(free_bytes: int, used_bytes: int) -> int:
        for limit in memory_limits():
            free_bytes = min(free_bytes, limit.free_bytes)
        available_bytes = free_bytes + used_bytes  # what the tier holds counts as used there, and is its own
        wanted = min(available_bytes // 4, _DEFAULT_RAM_BYTES) if asked_bytes is None else asked_bytes
        return min(wanted, int(available_bytes * _FREE_SHARE))

    try:
        directory = shared_memory_directory() / "cache" if path is None else Path(path)
        return Tier(
            directory,
            kind="ram",
            capacity=capacity,
            asked_bytes=asked_bytes,
            durable=False,
            min_free_bytes=min_free_bytes,
            policy=policy,
        )
    except (OSError, StokerError) as error:
        if path is not None and isinstance(error, _MISTAKES):
            raise
        _without_tier("ram", error)
        return None


def open_disk_tier(
    path: Path, asked_bytes: int | None, *, min_free_bytes: int | None, policy: Policy | None
) -> Tier | None:
    """The disk tier, or None with a warning if the disk does not let us; a directory in use for something else raises."""

    def capacity(free_bytes: int, used_bytes: int) -> int:
        return int((free_bytes + used_bytes) * _FREE_SHARE) if asked_bytes is None else asked_bytes

    try:
        return Tier(
            path,
            kind="disk",
            capacity=capacity,
            asked_bytes=asked_bytes,
            durable=True,
            min_free_bytes=min_free_bytes,
            policy=policy,
        )
    except _MISTAKES:
        raise
    except OSError as error:
        _without_tier("disk", error)
        return None


def _without_tier(kind: str, error: Exception) -> None:
    counters.add("cache.degraded")
    counters.add(f"cache.{kind}.degraded")
    warn_once(f"no {kind} tier ({error}): blocks go to the next tier or pass through")
