"""How often would a cache hit? The real order, block by block, through every eviction policy at several capacities.

Five scenes: a plain scan, the same each epoch; one node that reads the set shuffled; one node that reads a mixture
whose smaller part comes up more often; several nodes that keep to their own lanes; the same nodes if blocks were dealt
to lanes anew each epoch, which :class:`~stoker.loaders.order.OrderV1` does not do. A read is one block that enters a
window: while the window lasts the loader holds the block, so its further samples ask nobody. The first epoch fills the
cache and is not counted.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..errors import ConfigError
from ..storage.eviction import EvictionPolicy, KeepFixed, LeastRecent, NextUse, Sieve
from .order import OrderV1, consecutive_rank_rows

__all__ = ["CAPACITIES", "POLICIES", "SCENES", "Outcome", "Simulation", "Workload", "simulate"]

Int64Array: TypeAlias = NDArray[np.int64]

SCENES = ("scan", "one node", "mixture", "fixed lanes", "dealt anew")
CAPACITIES = (0.1, 0.25, 0.5, 0.8)
POLICIES: Mapping[str, type[EvictionPolicy]] = {"plan": NextUse, "pin": KeepFixed, "sieve": Sieve, "lru": LeastRecent}

_MIXTURE_BLOCKS, _MIXTURE_ROWS = (
    0.2,
    0.5,
)  # a fifth of the blocks gives half of the rows: four epochs while others do one


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is read.

    Attributes:
        blocks: order blocks of the data set; 20 windows of all lanes, so that what is special about the ends of an
            epoch is small, as in real sets.
        samples_per_block, lanes, window_blocks, seed: of the order.
        epochs: at least 2.
        nodes: that share the data set in the last two scenes.
    """

    blocks: int = 3840
    samples_per_block: int = 8
    lanes: int = 48
    window_blocks: int = 4
    seed: int = 0
    epochs: int = 4
    nodes: int = 8

    def __post_init__(self) -> None:
        if self.epochs < 2:
            raise ConfigError(
                "epochs must be >= 2: the first only fills the cache", value=self.epochs, place="simulate"
            )
        if self.nodes < 1:
            raise ConfigError("nodes must be >= 1", value=self.nodes, place="simulate")
        self.order(blocks=self.blocks)  # checks the rest
        least = max(5 * self.lanes * self.window_blocks, 10 * self.nodes)
        if self.blocks < least:
            raise ConfigError(
                f"blocks must be >= {least}: five windows of all lanes, and 10 for each node",
                value=self.blocks,
                place="simulate",
            )

    @property
    def samples(self) -> int:
        """Of an epoch."""
        return self.blocks * self.samples_per_block

    @property
    def held_samples(self) -> int:
        """Positions for which a loader holds a block after it has read from it."""
        return self.samples_per_block * self.lanes * self.window_blocks

    def order(self, *, blocks: int, seed: int | None = None) -> OrderV1:
        """The order of that many blocks."""
        return OrderV1(
            num_samples=blocks * self.samples_per_block,
            seed=self.seed if seed is None else seed,
            samples_per_block=self.samples_per_block,
            lanes=self.lanes,
            window_blocks=self.window_blocks,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One policy at one capacity in one scene.

    Attributes:
        scene: one of :data:`SCENES`.
        policy: one of :data:`POLICIES`.
        capacity: of the caches of all nodes together, as a share of the data set's blocks.
        reads, hits: from the second epoch on, of all nodes together.
    """

    scene: str
    policy: str
    capacity: float
    reads: int
    hits: int

    @property
    def hit_rate(self) -> float:
        """Hits over reads."""
        return self.hits / self.reads


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """All outcomes, in the order of scene, capacity and policy."""

    workload: Workload
    outcomes: tuple[Outcome, ...]

    def hit_rate(self, scene: str, policy: str, capacity: float) -> float:
        """Of one outcome; KeyError if it was not simulated."""
        for one in self.outcomes:
            if (one.scene, one.policy, one.capacity) == (scene, policy, capacity):
                return one.hit_rate
        raise KeyError((scene, policy, capacity))

    @property
    def reading(self) -> tuple[str, ...]:
        """What the numbers say, a sentence each."""
        last = self.outcomes[-1].capacity
        lru = max(one.hit_rate for one in self.outcomes if (one.scene, one.policy) == ("scan", "lru"))
        lanes, dealt = self.hit_rate("fixed lanes", "pin", last), self.hit_rate("dealt anew", "plan", last)
        one_node = "On one node the plan equals keeping any fixed part"
        if (gain := self._gain("one node")) >= 0.005:
            one_node += (
                f" but for up to {gain * 100:.0f} points: the ends of an epoch cut windows in two, so that "
                f"{self._read_again:.1%} of the reads are second ones"
            )
        return (
            f"{one_node}.",
            f"LRU hits at most {lru:.0%} in a scan: what was read last is needed last.",
            f"In a mixture at unequal rates the plan hits {_compared(self._gain('mixture'))} the pin.",
            f"At {last:.0%} capacity fixed lanes hit {lanes:.0%} without a plan, blocks dealt anew {dealt:.0%} with one.",
        )

    @property
    def _read_again(self) -> float:
        """Share of one node's reads that are not a block's first in an epoch; shrinks as the data set grows."""
        reads = next(one.reads for one in self.outcomes if one.scene == "one node")
        return max(0.0, 1 - (self.workload.epochs - 1) * self.workload.blocks / reads)

    def _gain(self, scene: str) -> float:
        capacities = dict.fromkeys(one.capacity for one in self.outcomes)
        gains = [self.hit_rate(scene, "plan", share) - self.hit_rate(scene, "pin", share) for share in capacities]
        return max(gains, key=abs)

    def to_json(self) -> dict[str, Any]:
        """The one JSON object of ``stoker plan --simulate --json``."""
        return {
            "ok": True,
            "workload": asdict(self.workload),
            "outcomes": [{**asdict(one), "hit_rate": one.hit_rate} for one in self.outcomes],
            "reading": list(self.reading),
        }

    def to_text(self) -> str:
        """A table of hit rates and the reading of it."""
        work = self.workload
        lines = [
            f"hit rates of epochs 2 to {work.epochs}: {work.blocks:,} blocks, {work.nodes} nodes where there are several",
            "",
            f"{'':<12}{'capacity':>10}" + "".join(f"{name:>8}" for name in POLICIES),
        ]
        shown = None
        for first in range(0, len(self.outcomes), len(POLICIES)):
            row = self.outcomes[first : first + len(POLICIES)]
            head = "" if row[0].scene == shown else row[0].scene
            shown = row[0].scene
            lines.append(f"{head:<12}{row[0].capacity:>10.0%}" + "".join(f"{one.hit_rate:>8.1%}" for one in row))
        return "\n".join([*lines, "", *self.reading]) + "\n"


def _compared(gain: float) -> str:
    if abs(gain) < 0.005:
        return "as often as"
    return f"up to {abs(gain) * 100:.0f} points {'more' if gain > 0 else 'less'} than"


def simulate(
    workload: Workload | None = None,
    *,
    capacities: Sequence[float] = CAPACITIES,
    progress: Callable[[], None] | None = None,
) -> Simulation:
    """Read `workload` through every policy at every capacity, in every scene. Some seconds at the default size.

    Args:
        capacities: shares of the data set, above 0 and at most 1.
        progress: called after each outcome; there are ``len(SCENES) * len(capacities) * len(POLICIES)``.
    """
    workload = workload or Workload()
    if not capacities or not all(0 < share <= 1 for share in capacities):
        raise ConfigError("capacities are shares of the data set in (0, 1]", value=list(capacities), place="simulate")
    outcomes = []
    for scene, traces in _scenes(workload):
        reads = sum(int(counts.sum()) for _, counts in traces)
        for share in capacities:
            slots = round(share * workload.blocks / len(traces))
            for policy, make in POLICIES.items():
                hits = sum(_hits(make(), trace, counts, slots=slots) for trace, counts in traces)
                outcomes.append(Outcome(scene=scene, policy=policy, capacity=share, reads=reads, hits=hits))
                if progress is not None:
                    progress()
    return Simulation(workload=workload, outcomes=tuple(outcomes))


_Trace: TypeAlias = tuple[list[str], NDArray[np.bool_]]
"""Blocks in the order in which one node asks for them, and which of these reads count."""


def _scenes(work: Workload) -> Iterator[tuple[str, list[_Trace]]]:
    positions = np.arange(work.epochs * work.samples, dtype=np.int64)
    blocks = work.order(blocks=work.blocks)(positions) // work.samples_per_block
    whole = np.arange(0, len(positions), work.samples_per_block)
    yield "scan", [_trace(work, whole, whole // work.samples_per_block % work.blocks)]
    yield "one node", [_trace(work, positions, blocks)]
    yield "mixture", [_trace(work, positions, _mixed(work, positions))]
    yield "fixed lanes", _by_node(work, blocks)
    orders = [work.order(blocks=work.blocks, seed=work.seed + epoch) for epoch in range(work.epochs)]
    by_epoch = positions.reshape(work.epochs, -1)
    dealt = [order(part) // work.samples_per_block for order, part in zip(orders, by_epoch, strict=True)]
    yield "dealt anew", _by_node(work, np.concatenate(dealt))


def _trace(work: Workload, positions: Int64Array, blocks: Int64Array) -> _Trace:
    """The reads of a node that needs `blocks` at `positions`, both ascending in time."""
    order = np.argsort(blocks, kind="stable")
    is_read = np.ones(len(blocks), np.bool_)
    still_held = (np.diff(blocks[order]) == 0) & (np.diff(positions[order]) <= work.held_samples)
    is_read[order[1:][still_held]] = False
    return [str(block) for block in blocks[is_read].tolist()], positions[is_read] >= work.samples


def _mixed(work: Workload, positions: Int64Array) -> Int64Array:
    """Blocks of a mixture of two sources; in each lane a counter deals the rows to them at fixed rates."""
    small = max(1, round(_MIXTURE_BLOCKS * work.blocks))
    turn, lane = np.divmod(positions, work.lanes)
    rate, offset = round(_MIXTURE_ROWS * 2**24), lane * 2**24 // work.lanes
    before, after = (turn * rate + offset) >> 24, ((turn + 1) * rate + offset) >> 24
    cursor = np.where(after > before, before, turn - before)
    sources = [work.order(blocks=small), work.order(blocks=work.blocks - small, seed=work.seed + 1)]
    samples = [source(cursor * work.lanes + lane) for source in sources]
    first, second = (sample // work.samples_per_block for sample in samples)
    return np.where(after > before, first, small + second)


def _by_node(work: Workload, blocks: Int64Array) -> list[_Trace]:
    """The reads of each node, of which each is one rank here; a step has as many rows as lets nodes keep to lanes."""
    global_batch = int(np.lcm(work.lanes, work.nodes))
    steps = len(blocks) // global_batch
    traces = []
    for node in range(work.nodes):
        rows = consecutive_rank_rows(
            0, steps=steps, global_batch=global_batch, lanes=work.lanes, world_size=work.nodes, rank=node
        )
        positions = np.sort(rows, axis=None)
        traces.append(_trace(work, positions, blocks[positions]))
    return traces


def _hits(policy: EvictionPolicy, trace: list[str], counts: NDArray[np.bool_], *, slots: int) -> int:
    if isinstance(policy, NextUse):
        policy.publish(enumerate(trace))
    hits = 0
    for now, (name, is_counted) in enumerate(zip(trace, counts.tolist(), strict=True)):
        if name in policy:
            policy.used(name)
            hits += is_counted
            continue
        if isinstance(policy, NextUse):
            policy.advance(now)
        victims = policy.admit(name, 1, free_bytes=slots - len(policy), is_leased=_never)
        if victims is not None:
            for victim in victims:
                policy.removed(victim)
            policy.added(name, 1)
    return hits


def _never(name: str) -> bool:
    return False
