"""How many bytes a job's nodes read for each byte of the data set: by the global batch, and by the length of samples."""

from dataclasses import asdict, dataclass
from math import gcd
from typing import Any

from ..errors import ConfigError
from ._numbers import whole

__all__ = ["Locality", "bytes_factor", "locality", "straddling_factor"]


@dataclass(frozen=True, kw_only=True)
class Locality:
    """What a split reads, and a global batch near it that reads least.

    Attributes:
        nodes, global_batch, lanes: the split.
        lane_groups: what rows are sorted by before they are dealt to ranks: ``gcd(lanes, global_batch)``.
        bytes_factor: bytes that all nodes fetch in an epoch, over those of the data set.
        suggested_global_batch, suggested_bytes_factor: of those from half to twice as large, the nearest that reads least.
        seq_len, straddling_factor: of samples, and how often a node without room for its part of the data set fetches a
            block in an epoch; None where the length was not given.
    """

    nodes: int
    global_batch: int
    lanes: int
    lane_groups: int
    bytes_factor: float
    suggested_global_batch: int
    suggested_bytes_factor: float
    seq_len: int | None = None
    straddling_factor: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The one JSON object of ``stoker plan --global-batch``."""
        return {"ok": True, **asdict(self)}

    def to_text(self) -> str:
        """A few lines."""
        split = (
            f"{self.nodes:,} nodes, global batch {self.global_batch:,}, {self.lanes} lanes in {self.lane_groups} groups"
        )
        lines = [f"{split}: all nodes together read {self.bytes_factor:.2f}x the data set in an epoch"]
        if self.suggested_global_batch != self.global_batch:
            lines.append(f"global batch {self.suggested_global_batch:,}: {self.suggested_bytes_factor:.2f}x")
        if self.suggested_bytes_factor > 1:
            lines.append(f"1.00x takes lanes that are a multiple of the nodes, for example {_multiple(self)}")
        if self.seq_len is not None and self.straddling_factor is not None:
            line = f"seq_len {self.seq_len:,}: without room for them in a cache, blocks are fetched up to "
            line += f"{self.straddling_factor:.2f} times in an epoch"
            if self.straddling_factor > 1:
                power = 1 << (self.seq_len.bit_length() - 1)
                line += f"; with {power:,} or {2 * power:,}, powers of two, once"
            lines.append(line)
        return "\n".join(lines) + "\n"


def _multiple(found: Locality) -> str:
    return f"shuffle=Window(lanes={-(-found.lanes // found.nodes) * found.nodes})"


def bytes_factor(*, nodes: int, global_batch: int, lanes: int) -> float:
    """Bytes that all nodes fetch for each byte of the data set, where each serves an equal slice of every step.

    A node reads the blocks of each lane group that its slice touches (:func:`~stoker.loaders.order.rank_rows`), so the
    factor is the number of such touches over the groups: 1 where the nodes divide the groups, and less than
    ``(groups + nodes) / groups`` otherwise.

    >>> [round(bytes_factor(nodes=8, global_batch=batch, lanes=48), 2) for batch in (192, 512, 40)]
    [1.0, 1.0, 1.0]
    >>> round(bytes_factor(nodes=5, global_batch=240, lanes=48), 2), bytes_factor(nodes=5, global_batch=35, lanes=48)
    (1.08, 5.0)
    """
    if global_batch % nodes:
        raise ConfigError("the nodes must divide the global batch", value=f"{global_batch} over {nodes}", place="plan")
    groups, rows = gcd(lanes, global_batch), global_batch // nodes
    rows_of_group = global_batch // groups
    touches = sum((node * rows + rows - 1) // rows_of_group - node * rows // rows_of_group + 1 for node in range(nodes))
    return touches / groups


def straddling_factor(*, seq_len: int, block_tokens: int) -> float:
    """Blocks that the order blocks of a data set lie in, counted for each of them, over the blocks that there are.

    An order block has a power of two of samples. Where a storage block has no whole number of samples, order blocks
    begin and end within one, and their neighbours, which are read at another time, need it again.

    >>> [round(straddling_factor(seq_len=seq_len, block_tokens=4096), 2) for seq_len in (32, 48, 65)]
    [1.0, 2.0, 2.95]
    """
    samples = block_tokens // seq_len
    tokens = seq_len << max(0, samples.bit_length() - 1)  # of an order block
    # One that begins at a multiple of `step` within a block lies in 1 + (tokens - step) / block_tokens on average.
    step = gcd(tokens, block_tokens)
    return (block_tokens + tokens - step) / tokens


def locality(
    *, nodes: int, global_batch: int, lanes: int, seq_len: int | None = None, block_tokens: int = 1 << 21
) -> Locality:
    """What a split reads, and a better one.

    Args:
        seq_len: of samples, if it is known. block_tokens: of a block; as a writer of uint16 makes them.

    Raises:
        ConfigError: a number below 1, or nodes that don't divide the global batch.
    """
    given = {"nodes": nodes, "global_batch": global_batch, "lanes": lanes, "block_tokens": block_tokens}
    for name, value in given.items() if seq_len is None else {**given, "seq_len": seq_len}.items():
        whole(name, value, place="plan", least=1)
    factor = bytes_factor(nodes=nodes, global_batch=global_batch, lanes=lanes)
    # The factor falls with the number of groups, a divisor of the lanes: the nearest batch for each of them.
    steps = {nodes * groups // gcd(nodes, groups) for groups in range(1, lanes + 1) if lanes % groups == 0}
    near = {global_batch // step * step + more for step in steps for more in (0, step)}
    best, _, suggested = min(
        (bytes_factor(nodes=nodes, global_batch=batch, lanes=lanes), abs(batch - global_batch), batch)
        for batch in near
        if global_batch / 2 <= batch <= 2 * global_batch
    )
    return Locality(
        nodes=nodes,
        global_batch=global_batch,
        lanes=lanes,
        lane_groups=gcd(lanes, global_batch),
        bytes_factor=factor,
        suggested_global_batch=suggested,
        suggested_bytes_factor=best,
        seq_len=seq_len,
        straddling_factor=None if seq_len is None else straddling_factor(seq_len=seq_len, block_tokens=block_tokens),
    )
