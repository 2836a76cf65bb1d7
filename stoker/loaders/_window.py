"""How many blocks a shuffle has open at once, against the room that a cache has for them."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import log2

from ..errors import ConfigError
from ..storage._units import format_bytes
from .order import Window

__all__ = ["CacheRoom", "fitting_window", "unfitting"]

logger = logging.getLogger(__name__)

_SHARE = 4
"""Windows get a quarter of the largest tier: the rest is for blocks that come up again, and for what is fetched ahead."""
_LEAST_BYTES = 64 << 20
"""Room that there is without a tier: what a process holds in anonymous memory."""
_WORTH_TELLING = 1.1  # of the bytes of the data set


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRoom:
    """What a data set's windows need, and what its cache has.

    Attributes:
        place: the data set, for messages. seq_len: of its samples.
        blocks: order blocks of the data set. block_bytes: of the storage blocks that one lies in, on average: more than
            its own where `seq_len` does not divide a storage block, so that it begins and ends within one.
        data_bytes: of all storage blocks.
        capacity_bytes: of the largest tier; 0 without any.
    """

    place: str
    seq_len: int
    blocks: int
    block_bytes: int
    data_bytes: int
    capacity_bytes: int

    @property
    def fetch_factor(self) -> float:
        """Bytes of storage blocks that an epoch asks for, over those of the data set."""
        return self.blocks * self.block_bytes / self.data_bytes

    def window_bytes(self, window: Window) -> int:
        """Of the storage blocks of all windows together."""
        return min(min(window.lanes * window.blocks, self.blocks) * self.block_bytes, self.data_bytes)


def fitting_window(rooms: Sequence[CacheRoom], *, given: Window | None, world_size: int, place: str) -> Window:
    """The window of a new stream over data sets in a cache: `given`, or the default if it fits, or the largest that does.

    A smaller window is another order, so it is chosen only where there is one rank: another may have another cache, or
    none, also on the same node.

    Raises:
        ConfigError: it does not fit: its blocks would be fetched again and again.
    """
    window = given or Window()
    _tell_what_is_fetched_twice(rooms, place)
    if given is None and world_size == 1:
        while window.blocks > 1 and (told := unfitting(rooms, window)):
            window = replace(window, blocks=window.blocks // 2)
            logger.warning(
                "%s: %d blocks a lane instead of %d, another order, because the cache is small (%s); "
                "shuffle=Window(blocks=%d) gives the same order everywhere",
                place,
                window.blocks,
                2 * window.blocks,
                told,
                window.blocks,
            )
    if told := unfitting(rooms, window):
        raise ConfigError(
            "the windows of a shuffle must fit into a quarter of the largest tier of the cache",
            value=told,
            place=place,
            hint="a larger tier; or, for another order, the same on every rank: " + _what_fits(rooms, window),
        )
    return window


def unfitting(rooms: Sequence[CacheRoom], window: Window) -> str:
    """By how much the windows are too large, in words; nothing if they fit."""
    if not rooms:
        return ""
    blocks = [min(window.lanes * window.blocks, room.blocks) for room in rooms]
    needed = sum(room.window_bytes(window) for room in rooms)
    capacity = min(room.capacity_bytes for room in rooms)
    if needed <= max(capacity // _SHARE, _LEAST_BYTES):
        return ""
    sizes = " + ".join(
        f"{count} blocks of {format_bytes(room.block_bytes)}" for count, room in zip(blocks, rooms, strict=True)
    )
    return (
        f"{window.lanes} lanes of {window.blocks} blocks each: {sizes} = {format_bytes(needed)}, "
        f"of a tier of {format_bytes(capacity)}"
    )


def _what_fits(rooms: Sequence[CacheRoom], window: Window) -> str:
    while window.blocks > 1 and unfitting(rooms, window):
        window = replace(window, blocks=window.blocks // 2)
    if unfitting(rooms, window):
        return "fewer lanes, or smaller blocks"
    lanes = "" if window.lanes == Window().lanes else f"lanes={window.lanes}, "
    return f"shuffle=Window({lanes}blocks={window.blocks})"


_told: set[tuple[str, int]] = set()  # each data set once in a process, for each cut


def _tell_what_is_fetched_twice(rooms: Sequence[CacheRoom], place: str) -> None:
    for room in rooms:
        if room.fetch_factor < _WORTH_TELLING or room.capacity_bytes >= room.data_bytes:
            continue
        if (room.place, room.seq_len) in _told:
            continue
        _told.add((room.place, room.seq_len))
        logger.warning(
            "%s: %s: samples of seq_len %d don't fill whole blocks, so that a shuffle fetches up to %.2f times the data "
            "set in an epoch where the cache does not hold it; with seq_len %d, a power of two, once",
            place,
            room.place,
            room.seq_len,
            room.fetch_factor,
            1 << round(log2(room.seq_len)),
        )
