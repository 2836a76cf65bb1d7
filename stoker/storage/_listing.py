"""The order of listings.

S3 lists keys in lexical order: ``a-b`` < ``a/b``. Stores that keep folders as such (SeaweedFS, some gateways) list a
folder where its name stands, ``a/b`` < ``a-b``, and take an offset to mean "names after this one". Both agree on
everything but names that differ first in a character below ``/``. So what may be out of order is sorted here, and no
offset is given that could mean less than it says.
"""

import re
from collections.abc import Iterator
from heapq import heappop, heappush

from .store import ObjectInfo, is_key

__all__ = ["in_lexical_order", "lowest_offset"]

_BELOW_SLASH = re.compile(r"[ -.]")
_KEY_CHARACTERS = " +-.0123456789=@ABCDEFGHIJKLMNOPQRSTUVWXYZ_abcdefghijklmnopqrstuvwxyz~"


def lowest_offset(folder: str, text: str) -> str:
    """A listing offset that comes before every key >= `text` of `folder`, in either order; "" if there is none.

    >>> lowest_offset("log", "log/0007.json"), lowest_offset("", "b"), lowest_offset("log", "log/"), lowest_offset("", "step-01")
    ('log/0006~', 'a~', '', 'steo~')
    """
    root = f"{folder}/" if folder else ""
    rest = text.removeprefix(root)
    if not text.startswith(root) or not is_key(rest):
        return ""
    stem = _BELOW_SLASH.split(rest, maxsplit=1)[0]
    before = _KEY_CHARACTERS[_KEY_CHARACTERS.index(stem[-1]) - 1]
    return f"{root}{stem[:-1]}{before}~"


def in_lexical_order(infos: Iterator[ObjectInfo], root: int) -> Iterator[ObjectInfo]:
    """Sort a listing in either order, holding back no more than one sub-folder of the root (`root` characters deep)."""
    held: list[tuple[str, int, ObjectInfo]] = []
    for number, info in enumerate(infos):
        heappush(held, (info.key, number, info))  # the number settles what a server lists twice
        name, slash, _ = info.key[root:].partition("/")
        # After a file of the root nothing smaller comes. After a file of a folder its sibling "folder-x" may come.
        reached = f"{info.key[:root]}{name}\x01" if slash else info.key
        while held and held[0][0] <= reached:
            yield heappop(held)[-1]
    while held:
        yield heappop(held)[-1]
