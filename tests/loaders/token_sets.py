"""What the tests of data sets share: documents, the stream that they make, and data sets written from them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker.loaders import TokenWriter

Document = NDArray[np.int64]


def random_documents(count: int, *, mean: int = 40, seed: int = 0, largest: int = 65_535) -> list[Document]:
    """Documents of 1 to 2 x `mean` tokens, none of them 0."""
    random = np.random.default_rng(seed)
    return [random.integers(1, largest + 1, int(n)) for n in random.integers(1, 2 * mean, count)]


def stream_of(documents: Sequence[Document], eos_id: int | None = None) -> Document:
    """The tokens of a data set in order."""
    if eos_id is None:
        return np.concatenate(documents)
    return np.concatenate([d if d[-1] == eos_id else np.append(d, eos_id) for d in documents])


def write_set(
    root: Path | str,
    documents: Sequence[Document],
    *,
    block_tokens: int = 64,
    blocks_per_shard: int = 4,
    dtype: str = "uint16",
    **options: Any,
) -> None:
    """Write `documents` in small blocks and shards, or go on where an earlier writer was stopped."""
    shard_bytes = block_tokens * blocks_per_shard * np.dtype(dtype).itemsize
    with TokenWriter(root, dtype=dtype, block_tokens=block_tokens, shard_bytes=shard_bytes, **options) as writer:
        for document in documents[writer.resumed_documents :]:
            writer.write(document)


def files_in(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path from there."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def flip_bit(path: Path, offset: int) -> None:
    """Damage one byte of a file."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0x10]))
