"""The unit of the cache: an immutable byte range of an object, and the file that holds it."""

import hashlib
from dataclasses import dataclass

from ..errors import ConfigError
from ._layout import BlockFile
from .store import ObjectStore

__all__ = ["Block", "block_file"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Block:
    """One immutable byte range of an object, and what its bytes must be.

    Attributes:
        key: the object, below its store's root.
        version: what tells this content from another under the same key: a store's version or a manifest's digest.
            It names the block; the store is not asked for it.
        start, end: byte range, end exclusive.
        crc32c: CRC32C of the bytes, from a manifest, never from beside the block.
    """

    key: str
    version: str
    start: int
    end: int
    crc32c: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise ConfigError("a block needs 0 <= start < end", value=f"[{self.start}, {self.end})", place=self.key)
        if not 0 <= self.crc32c < 2**32:
            raise ConfigError("crc32c must be an unsigned 32-bit integer", value=self.crc32c, place=self.key)

    @property
    def size_bytes(self) -> int:
        """Length of the range."""
        return self.end - self.start


def block_file(store: ObjectStore, block: Block) -> BlockFile:
    """The file of a tier in which `block` of `store` is or would be."""
    place = store.place(block.key)
    text = f"{place}\n{block.version}\n{block.start}-{block.end}\n{block.crc32c:08x}\n".encode()
    name = hashlib.blake2b(text, digest_size=16).hexdigest()
    return BlockFile(name, text, block.size_bytes, block.crc32c)
