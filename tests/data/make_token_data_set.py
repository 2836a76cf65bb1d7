"""Write the golden token data sets: ``python tests/data/make_token_data_set.py [directory]``.

Two small sets: ``uint16`` has several shards, a document that reaches over three of them and documents that end exactly
at the end of a shard; ``uint32`` is one short document without an end token.
"""

import sys
from pathlib import Path

from stoker.loaders import TokenWriter

GOLDEN = Path(__file__).parent / "token-data-set-v1"

EOS_ID = 0
BLOCK_TOKENS = 16
SHARD_TOKENS = 64
# Each one longer by its end token: two fill the first shard, the fourth reaches over three shards, the sixth over two.
LENGTHS = (20, 42, 9, 169, 1, 10, 5, 30)
WIDE = (70_000, 4_294_967_295, 0, 65_536, 1)


def documents() -> list[list[int]]:
    """The documents of the ``uint16`` set, without end tokens."""
    found, first = [], 1
    for length in LENGTHS:
        found.append([(first + i) * 40_503 % 65_535 + 1 for i in range(length)])
        first += length
    return found


def write(directory: Path) -> None:
    """Write both sets below `directory`."""
    with TokenWriter(
        directory / "uint16",
        dtype="uint16",
        eos_id=EOS_ID,
        shard_bytes=2 * SHARD_TOKENS,
        block_tokens=BLOCK_TOKENS,
        tokenizer="golden",
    ) as writer:
        for tokens in documents():
            writer.write(tokens)
    with TokenWriter(directory / "uint32", dtype="uint32") as writer:
        writer.write(WIDE)


if __name__ == "__main__":
    write(Path(sys.argv[1]) if len(sys.argv) > 1 else GOLDEN)
