"""Sizes as people write them, and the buffer type that the whole package means."""

import re
from decimal import Decimal
from typing import TypeAlias

from ..errors import ConfigError

__all__ = ["Buffer", "format_bytes", "parse_bytes"]

Buffer: TypeAlias = bytes | bytearray | memoryview
"""Contiguous bytes. Pass a numpy array as ``memoryview(array).cast("B")``."""

_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12, "pb": 10**15}
_UNITS |= {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "pib": 2**50}

_MOST_BYTES = 2**63 - 1
"""The largest size that an operating system takes."""


def parse_bytes(size: int | str, *, place: str = "size") -> int:
    """Bytes from an integer or from text with a unit: decimal (``"2GB"``) or binary (``"2GiB"``).

    Raises:
        ConfigError: neither of them, negative, or 2^63 and more.

    >>> parse_bytes("256MiB"), parse_bytes("1.5 GB"), parse_bytes(42)
    (268435456, 1500000000, 42)
    """
    hint = 'for example "256MiB", or an integer of bytes'
    if isinstance(size, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", size)
        unit = _UNITS.get(match[2].lower()) if match else None
        if match is None or unit is None:
            raise ConfigError("a size is a number with a unit", value=size, place=place, hint=hint)
        size = int(Decimal(match[1]) * unit)
    elif not isinstance(size, int) or isinstance(size, bool):
        raise ConfigError("a size is an integer, or text with a unit", value=repr(size), place=place, hint=hint)
    if size < 0:
        raise ConfigError("a size must be >= 0", value=size, place=place, hint=hint)
    if size > _MOST_BYTES:
        # The number itself may have more digits than Python prints.
        raise ConfigError("a size must be less than 8 EiB (2^63)", place=place, hint=hint)
    return size


def format_bytes(size: float) -> str:
    """`size` in the largest binary unit that keeps it above one.

    >>> format_bytes(0), format_bytes(268435456), format_bytes(1536)
    ('0 B', '256.0 MiB', '1.5 KiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} PiB"
