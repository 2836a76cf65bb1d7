"""Where else the bytes of a committed step are, nearer than the root: arenas in shared memory, and the node's own disk.

Nothing here is trusted. A copy counts only if the log names its nonce, and then every block of it is compared with the
manifest, every document with its digest; what differs is taken from the next copy.
"""

import logging
import os
from typing import Protocol

from ..storage._posix import pread_into
from .arena import HEADER_BYTES, arena_headers, read_tail
from .local import LocalTier
from .manifest import CRC_BLOCK_BYTES

__all__ = ["ArenaCopy", "LocalCopy", "NearCopy"]

logger = logging.getLogger(__name__)


class NearCopy(Protocol):
    """A copy of a step, or of a part of one.

    Attributes:
        tier: its name in reports and counters.
        read_bytes: how much is best read at once; 0 for as much as is asked for. A multiple of a checksum's block.
        in_memory: whether it is read straight to where the bytes belong, if that is one place: a copy of memory takes
            any address, O_DIRECT only aligned ones.
    """

    tier: str
    read_bytes: int
    in_memory: bool

    def fetch(self, path: str, start: int, buffer: memoryview) -> bool:
        """Fill `buffer` with the bytes of a blob from `start` on; False if the copy does not have them."""
        ...

    def document(self, path: str) -> bytes | None:
        """A document of plain values; None if the copy does not have it."""
        ...

    def close(self) -> None: ...


# Guarantees: fetch() and document() may be called from several threads; close() when none of them runs.
class ArenaCopy:
    """What the arenas of this node's ranks hold of one attempt, of this process and of those that died.

    Reads through descriptors, not mappings: an arena may be taken over and written by its next owner at any moment. Then
    the checksums tell.
    """

    tier = "arena"
    read_bytes = CRC_BLOCK_BYTES  # what was read is then still in the processor's cache when it is checked and copied
    in_memory = True

    def __init__(self, root_id: str, nonce: str) -> None:
        self._blobs: dict[str, tuple[int, int, int]] = {}
        self._documents: dict[str, bytes] = {}
        self._fds: list[int] = []
        for path, fd, header in arena_headers(root_id):
            if header is None or header["state"] != "FULL" or header.get("nonce") != nonce or "tail" not in header:
                continue
            tail = read_tail(fd, header)
            if tail is None:
                logger.warning("%s: its tail is damaged; it is not used", path)
                continue
            index, documents = tail
            own = os.dup(fd)
            self._fds.append(own)
            self._blobs |= {blob: (own, start, size) for blob, start, size in index["blobs"]}
            self._documents |= documents

    def fetch(self, path: str, start: int, buffer: memoryview) -> bool:
        fd, at, size = self._blobs.get(path, (-1, 0, 0))
        if fd < 0 or start + len(buffer) > size:
            return False
        try:
            return pread_into(fd, buffer, HEADER_BYTES + at + start) == len(buffer)
        except OSError as error:
            logger.warning("an arena of this root can't be read: %s", error)
            return False

    def document(self, path: str) -> bytes | None:
        return self._documents.get(path)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)
        self._fds, self._blobs = [], {}


# Guarantees: as those of ArenaCopy.
class LocalCopy:
    """What the node's own disk holds of one attempt."""

    tier = "local"
    read_bytes = 0
    in_memory = False

    def __init__(self, local: LocalTier, directory: str) -> None:
        self._local, self._directory = local, directory

    def fetch(self, path: str, start: int, buffer: memoryview) -> bool:
        return self._local.read_into(f"{self._directory}/{path}", buffer, start)

    def document(self, path: str) -> bytes | None:
        return self._local.read(f"{self._directory}/{path}")

    def close(self) -> None:
        pass
