"""The loader's stream: the same rows at any world size, exact over stops, resumes, epochs and skips, in memory of its own."""

import gc
import hashlib
import json
import logging
import pickle
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch.utils.data import DataLoader

from stoker.errors import ConfigError, CorruptBlock, StateMismatch, UnknownVersion
from stoker.loaders._packed import DocumentRows, RowBorders
from stoker.loaders.loader import Batch, TokenLoader
from stoker.loaders.order import SkipRanges, Window
from stoker.metrics import counters

GOLDEN = Path(__file__).parent.parent / "data" / "loader-state-v1.json"
SMALL = Window(lanes=6, blocks=2)


@dataclass
class MemorySamples:
    """Samples of a stream whose token t has the value t, so that a row says where it came from."""

    num_samples: int
    seq_len: int = 4
    samples_per_block: int = 4
    fingerprint: str = "stream-of-integers"
    is_local: bool = True
    packing: str = "concat"
    documents: bool = False
    planned: list[int] = field(default_factory=list)
    prefetched: list[NDArray[np.int64]] = field(default_factory=list)
    gathered: list[NDArray[np.int64]] = field(default_factory=list)
    broken: set[int] = field(default_factory=set)

    def __len__(self) -> int:
        return self.num_samples

    def plan(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        self.planned.append(len(samples))
        return samples

    def gather_planned(
        self, plan: Any, start: int, end: int, input_ids: NDArray[np.int64], labels: NDArray[np.int64]
    ) -> None:
        samples = plan[start:end]
        if self.broken & set(samples.tolist()):
            raise CorruptBlock("data/00000000.arrow", 0, 4096, 1, 2)
        self.gathered.append(samples)
        input_ids[:] = samples[:, None] * self.seq_len + np.arange(self.seq_len)
        labels[:] = input_ids + 1

    def gather_documents(self, plan: Any, start: int, end: int, rows: DocumentRows) -> RowBorders:
        raise NotImplementedError

    def prefetch(self, samples: NDArray[np.int64]) -> None:
        self.prefetched.append(samples)

    def explain(self, sample: int) -> list[str]:
        return [f"sample {sample}"]


def positions_of(batches: Iterable[Batch]) -> list[list[int]]:
    return [batch["position"].tolist() for batch in batches]


def loaders_of(source: MemorySamples, world_size: int, *, global_batch: int, **options: Any) -> list[TokenLoader]:
    options = {"shuffle": SMALL, "seed": 7, **options}
    return [
        TokenLoader(source, batch_size=global_batch // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def steps_of(loaders: list[TokenLoader], count: int | None = None) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """Each global step as its rows (position, tokens) in order of position; all ranks must end together."""
    for _ in range(count) if count is not None else iter(int, 1):
        batches = [next(loader, None) for loader in loaders]
        if None in batches:
            assert batches == [None] * len(loaders)
            return
        yield sorted(
            (position, tuple(row))
            for batch in batches
            if batch is not None
            for position, row in zip(batch["position"].tolist(), batch["input_ids"].tolist(), strict=True)
        )


def digest_of(steps: Iterable[list[tuple[int, tuple[int, ...]]]]) -> str:
    digest = hashlib.sha256()
    for step in steps:
        digest.update(json.dumps(step).encode())
    return digest.hexdigest()


# -- the stream -------------------------------------------------------------------------------------------------------


def test_a_batch_holds_the_samples_of_its_positions() -> None:
    source = MemorySamples(1001, seq_len=5)
    loader = TokenLoader(source, batch_size=8, seed=3, shuffle=SMALL)
    for batch in loader:
        assert batch.keys() == {"input_ids", "labels", "position"}
        assert batch["input_ids"].shape == batch["labels"].shape == (8, 5)
        assert batch["position"].shape == (8,)
        assert all(t.dtype == torch.int64 and t.is_contiguous() for t in batch.values())
        samples = torch.from_numpy(loader.order(batch["position"].numpy()))
        assert torch.equal(batch["input_ids"], samples[:, None] * 5 + torch.arange(5))
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)


@pytest.mark.parametrize("shuffle", [SMALL, "window", "full", "none"])
def test_every_sample_comes_once_per_epoch_but_for_the_counted_rest(shuffle: Any) -> None:
    source = MemorySamples(331)
    loader = TokenLoader(source, batch_size=7, shuffle=shuffle, epochs=3)
    got = [sample for batch in loader for sample in (batch["input_ids"][:, 0] // 4).tolist()]
    assert len(got) == 3 * 331 // 7 * 7
    assert loader.stats().dropped_rows == 3 * 331 % 7 == 6
    for epoch in range(3):
        part = got[epoch * 331 : (epoch + 1) * 331]
        assert sorted(part) == list(range(331)) or (epoch == 2 and len(set(part)) == 331 - 6)


@pytest.mark.parametrize("global_batch", [120, 17])
def test_the_digest_is_the_same_for_every_world_size_with_stops_in_between(global_batch: int) -> None:
    source = MemorySamples(1009)  # a prime: divisible by no lane, block or batch
    options: dict[str, Any] = {"epochs": 3, "skip": [(50, 61), (700, 1300), (2000, 2001)]}
    sizes = [n for n in (1, 2, 3, 5, 4, 8, 17) if global_batch % n == 0]
    expected = digest_of(steps_of(loaders_of(source, 1, global_batch=global_batch, **options)))
    for size in sizes[1:]:
        assert digest_of(steps_of(loaders_of(source, size, global_batch=global_batch, **options))) == expected
    # And once more, handed from world size to world size, each stop at another place.
    digest, state, steps = hashlib.sha256(), None, 0
    for size, count in [*zip(sizes * 4, (1, 3, 2, 4, 1, 2, 3), strict=False), (1, None)]:
        loaders = loaders_of(source, size, global_batch=global_batch, **options)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        for step in steps_of(loaders, count):
            digest.update(json.dumps(step).encode())
            steps += 1
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert digest.hexdigest() == expected
    assert steps == (3 * 1009 - 11 - 600 - 1) // global_batch


@settings(max_examples=60, deadline=None)
@given(
    num_samples=st.integers(5, 400),
    epochs=st.integers(1, 4),
    rows=st.integers(1, 6),
    world_size=st.integers(1, 4),
    skip=st.lists(st.tuples(st.integers(0, 900), st.integers(1, 90)), max_size=4),
    stop=st.integers(0, 40),
    more_rows=st.integers(1, 6),
    more_world=st.integers(1, 4),
)
def test_the_stream_is_the_next_live_positions_step_after_step(
    num_samples: int,
    epochs: int,
    rows: int,
    world_size: int,
    skip: list[tuple[int, int]],
    stop: int,
    more_rows: int,
    more_world: int,
) -> None:
    ranges = [(start, start + length) for start, length in skip]
    skipped = {p for a, b in ranges for p in range(a, b)}
    live = [p for p in range(num_samples * epochs) if p not in skipped]
    source = MemorySamples(num_samples)
    options: dict[str, Any] = {"epochs": epochs, "skip": ranges}
    if len(live) < max(rows * world_size, more_rows * more_world):
        return
    first = loaders_of(source, world_size, global_batch=rows * world_size, **options)
    assert len(first[0]) == len(live) // (rows * world_size)
    got = [p for step in steps_of(first, stop) for p, _ in step]
    state = first[-1].state_dict()
    # Resumed with another global batch, the stream goes on where it was.
    second = loaders_of(source, more_world, global_batch=more_rows * more_world, **options)
    if state["run_start"]:  # the run was over: the next one would start now
        assert got == live[: len(live) // (rows * world_size) * rows * world_size]
        return
    for loader in second:
        loader.load_state_dict(state)
    got += [p for step in steps_of(second) for p, _ in step]
    assert got == live[: len(got)]
    assert len(live) - len(got) == second[0].stats().dropped_rows < more_rows * more_world


def test_order_and_places_are_computed_for_many_batches_at_once() -> None:
    source = MemorySamples(100_000)
    for rows, batches in ((1, 8192), (16, 512), (1024, 64)):
        source.planned.clear()
        loader = TokenLoader(source, batch_size=rows, shuffle=SMALL)
        for _ in islice(loader, batches):
            pass
        assert source.planned == [rows * min(batches, 100_000 // rows)]


def test_a_loader_without_an_end_runs_over_epochs_and_has_no_length() -> None:
    loader = TokenLoader(MemorySamples(10), batch_size=4, epochs=None)
    assert [p for step in positions_of(islice(loader, 600)) for p in sorted(step)] == list(range(2400))
    assert loader.epoch == 240
    assert loader.stats().dropped_rows == 0
    with pytest.raises(TypeError, match="epochs=None has no length"):
        len(loader)


# -- runs and states --------------------------------------------------------------------------------------------------


def a_loader(**changes: Any) -> TokenLoader:
    options: dict[str, Any] = {"batch_size": 4, "seed": 11, "shuffle": SMALL, "epochs": 2, **changes}
    return TokenLoader(options.pop("source", None) or MemorySamples(27), **options)


def test_iterating_again_in_the_middle_of_a_run_goes_on() -> None:
    loader, other = a_loader(), a_loader()
    got = positions_of(islice(loader, 3)) + positions_of(loader)
    assert got == positions_of(other)


def test_iterating_again_after_a_run_starts_the_next_one() -> None:
    loader = a_loader()
    first, second = positions_of(loader), positions_of(loader)
    assert len(first) == len(second) == len(loader) == 2 * 27 // 4
    assert {p for step in second for p in step} == {p + 54 for step in first for p in step}
    assert loader.stats().dropped_rows == 2 * 2
    assert next(iter(loader))["position"].min() == 108


def test_an_ended_iterator_stays_ended() -> None:
    loader = a_loader()
    positions_of(loader)
    for _ in range(3):
        with pytest.raises(StopIteration):
            next(loader)


@pytest.mark.parametrize("delivered", [0, 1, 5, 12, 13])
@pytest.mark.parametrize("ended", [False, True])
def test_a_restored_loader_does_what_the_stopped_one_would_have_done(delivered: int, ended: bool) -> None:
    loader = a_loader()  # 13 steps, then 2 rows are dropped
    iterator = iter(loader)
    for _ in range(delivered):
        next(iterator)
    if ended:
        if delivered < 13:
            return
        assert next(iterator, None) is None
    state = json.loads(json.dumps(loader.state_dict()))
    restored = a_loader()
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    # What is left of this run (nothing after the last batch; the next run after its end), then the run after it.
    for _ in range(2):
        assert positions_of(restored) == positions_of(loader)
        assert restored.state_dict() == loader.state_dict()


def test_a_state_loaded_in_the_middle_of_an_iteration_counts_from_the_next_batch_on() -> None:
    loader = a_loader()
    steps = positions_of(islice(loader, 4))
    early = a_loader()
    next(early)
    loader.load_state_dict(early.state_dict())
    assert next(loader)["position"].tolist() == steps[1]


def test_a_longer_run_may_be_asked_of_a_state_of_a_shorter_one() -> None:
    short = a_loader(epochs=1)
    positions_of(islice(short, 6))
    longer = a_loader(epochs=3)
    longer.load_state_dict(short.state_dict())
    assert sorted(p for step in positions_of(longer) for p in step) == list(range(24, 80))


def test_a_state_is_small_plain_and_the_same_on_every_rank() -> None:
    loaders = loaders_of(MemorySamples(1000), 4, global_batch=16, skip=[(3, 5), (90, 95)])
    list(steps_of(loaders, 9))
    texts = {json.dumps(loader.state_dict()) for loader in loaders}
    assert len(texts) == 1
    text = texts.pop()
    assert len(text) < 512 + 2 * 64
    assert json.loads(text)["position"] == 9 * 16 + 2 + 5


def test_the_state_has_the_form_of_version_1() -> None:
    golden = json.loads(GOLDEN.read_text())
    loader = TokenLoader(
        MemorySamples(**golden["source"]), batch_size=4, seed=11, shuffle=SMALL, epochs=None, skip=[(10, 12)]
    )
    positions_of(islice(loader, golden["steps"]))
    assert loader.state_dict() == golden["state"]
    before_packing = {name: value for name, value in golden["state"].items() if name != "packing"}
    for state in (golden["state"], before_packing):
        loader.load_state_dict(state)
        assert next(loader)["position"].tolist() == golden["next_positions"]


def test_skips_of_the_state_and_of_the_loader_both_hold() -> None:
    loader = a_loader(skip=[(20, 30)])
    positions_of(islice(loader, 2))
    resumed = a_loader(skip=[(10, 12), (28, 33)])
    resumed.load_state_dict(loader.state_dict())
    got = sorted(p for step in positions_of(resumed) for p in step)
    assert got == [p for p in range(8, 54) if p not in {10, 11, *range(20, 33)}][: len(got)]
    assert resumed.state_dict()["skip"] == [[10, 12], [20, 33]]
    assert resumed.stats().skipped_rows == 0  # of the next run, which stands at its start


def test_another_global_batch_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    loader = a_loader()
    next(loader)
    with caplog.at_level(logging.INFO, logger="stoker.loaders"):
        a_loader().load_state_dict(loader.state_dict())
        assert not caplog.records
        a_loader(batch_size=6).load_state_dict(loader.state_dict())
    assert caplog.messages == [
        "the global batch was 4 when the state was taken and is 6 now: the stream goes on at position 4"
    ]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"source": MemorySamples(27, fingerprint="other")}, "fingerprint is 'other' in the state and 'stream-of"),
        (
            {"source": MemorySamples(27, packing="pad-1/split")},
            "packing is 'pad-1/split' in the state and 'concat' here",
        ),
        ({"source": MemorySamples(28)}, "num_samples is 28 in the state and 27 here"),
        ({"source": MemorySamples(27, seq_len=8)}, "seq_len is 8 in the state and 4 here"),
        ({"source": MemorySamples(27, samples_per_block=8)}, "samples_per_block is 8 in the state and 4 here"),
        ({"seed": 12}, "seed is 12 in the state and 11 here"),
        ({"shuffle": "full"}, "shuffle is 'full' in the state and 'window' here"),
        ({"shuffle": Window(lanes=5, blocks=4)}, "lanes is 5 .* and 6 here; window_blocks is 4 .* and 2 here"),
    ],
)
def test_a_state_of_another_stream_is_refused_with_both_values(changes: dict[str, Any], told: str) -> None:
    other = a_loader(**changes)
    next(other)
    loader = a_loader()
    next(loader)
    before = loader.state_dict()
    with pytest.raises(StateMismatch, match=told):
        loader.load_state_dict(other.state_dict())
    assert loader.state_dict() == before


def test_what_is_no_state_is_refused() -> None:
    loader = a_loader()
    good = loader.state_dict()
    with pytest.raises(StateMismatch, match="must be what TokenLoader.state_dict.. returned"):
        loader.load_state_dict({})
    for changes, told in (
        ({"position": "3"}, "position must be of type int"),
        ({"position": True}, "position must be of type int"),
        ({"position": -1}, "0 <= run_start <= position"),
        ({"run_start": 5}, "0 <= run_start <= position"),
        ({"fingerprint": 3}, "fingerprint must be of type str"),
        ({"version": 0}, "must be what"),
        ({"position": 2**62}, "position < 2.62 must hold"),
        ({"position": 2**63 - 1}, "position < 2.62 must hold"),
        ({"skip": [[4, 4]]}, "skip"),
        ({"skip": [[4, 2**70]]}, "skip"),
        ({"skip": [[0.5, 2.7]]}, "a position of skip must be a whole number, got 0.5"),
        ({"skip": 3}, "skip must be of type list"),
        ({"skip": None}, "skip must be of type list"),
        ({"worker": {}}, "worker must hold number, workers, base as whole numbers"),
        ({"worker": {"number": 0, "workers": "2", "base": 0}}, "worker must hold"),
        ({"worker": 3}, "worker must hold"),
        ({"worker": None}, "worker must hold"),
    ):
        with pytest.raises(StateMismatch, match=told):
            loader.load_state_dict({**good, **changes})
    for nothing in (None, 3, "state", [good]):
        with pytest.raises(StateMismatch, match="must be what TokenLoader.state_dict.. returned"):
            loader.load_state_dict(nothing)  # type: ignore[arg-type]
    with pytest.raises(UnknownVersion, match="up to version 1, got 2"):
        loader.load_state_dict({**good, "version": 2})
    assert loader.state_dict() == good


@pytest.mark.parametrize("kind", [np.int64, np.uint8, torch.tensor])
def test_numbers_of_numpy_and_torch_give_a_state_that_comes_back_through_json(kind: Any) -> None:
    numbers: dict[str, Any] = {"batch_size": 4, "seed": 11, "epochs": 2, "rank": 0, "world_size": 2}
    window = {"lanes": 6, "blocks": 2}
    other: dict[str, Any] = {"prefetch_blocks": 32, "skip": [(5, 9)]}
    plain = TokenLoader(MemorySamples(100), **numbers, **other, shuffle=Window(**window))
    loader = TokenLoader(
        MemorySamples(100),
        **{name: kind(value) for name, value in numbers.items()},
        shuffle=Window(**{name: kind(value) for name, value in window.items()}),
        prefetch_blocks=kind(32),
        skip=[(kind(5), kind(9))],
    )
    expected, got = positions_of(islice(plain, 3)), positions_of(islice(loader, 3))
    assert got == expected
    state = json.loads(json.dumps(loader.state_dict()))
    assert state == plain.state_dict()
    loader.load_state_dict(state)
    assert positions_of(loader) == positions_of(plain)
    loader.set_epoch(kind(1))
    loader.jump(kind(2))


def test_a_state_that_holds_numbers_of_numpy_is_taken() -> None:
    """Earlier versions made such states, which no JSON holds but a pickle does."""
    loader, other = a_loader(), a_loader()
    next(loader)
    state = loader.state_dict()
    other.load_state_dict({**state, "seed": np.int64(state["seed"]), "position": np.int64(state["position"])})
    assert other.state_dict() == state
    assert all(type(value) is not np.int64 for value in other.state_dict().values())


def test_a_state_that_is_refused_changes_nothing() -> None:
    """Also not the window that it has, which the loader would have taken with it."""
    source = MemorySamples(40_000)
    stopped = TokenLoader(source, batch_size=4, shuffle=Window(blocks=1))
    next(stopped)
    loader, untouched = (TokenLoader(source, batch_size=4) for _ in range(2))
    next(loader), next(untouched)
    state = {**stopped.state_dict(), "worker": {"number": 0, "workers": 2, "base": 0}}
    with pytest.raises(StateMismatch, match="the state of a worker must come back to the same worker"):
        loader.load_state_dict(state)
    assert loader.state_dict() == untouched.state_dict()
    assert loader.order == untouched.order
    assert positions_of(islice(loader, 50)) == positions_of(islice(untouched, 50))
    assert np.array_equal(source.gathered[-1], source.gathered[-51])
    del state["worker"]
    loader.load_state_dict(state)
    assert loader.state_dict() == stopped.state_dict()


# -- memory -----------------------------------------------------------------------------------------------------------


def test_every_batch_of_a_list_has_memory_of_its_own() -> None:
    source = MemorySamples(500)
    batches = list(TokenLoader(source, batch_size=5, shuffle=SMALL))
    assert len(batches) == 100
    for name in ("input_ids", "labels"):
        assert len({batch[name].data_ptr() for batch in batches}) == 100
    for batch, samples in zip(batches, source.gathered, strict=True):
        assert batch["input_ids"][:, 0].tolist() == (samples * 4).tolist()
        assert torch.equal(batch["labels"], batch["input_ids"] + 1)


def test_positions_are_the_callers_own_and_keep_no_plan_alive() -> None:
    loader = TokenLoader(MemorySamples(40_000), batch_size=4, shuffle="none")
    for step in range(3):
        position = next(loader)["position"]
        assert position.tolist() == [*range(4 * step, 4 * step + 4)]
        position.zero_()
    assert loader.position == 12
    plan = weakref.ref(loader._rows[0].base)
    loader.close()
    gc.collect()
    assert plan() is None and position.tolist() == [0, 0, 0, 0]


def test_memory_is_used_again_once_nobody_holds_it() -> None:
    loader = TokenLoader(MemorySamples(4000), batch_size=5, shuffle=SMALL)
    seen = set()
    for batch in loader:  # holds one batch while the next is made
        seen |= {batch["input_ids"].data_ptr(), batch["labels"].data_ptr()}
    assert len(seen) == 4
    assert loader.stats().fresh_buffers == 0


@pytest.mark.parametrize(
    "keep",
    [
        lambda batch: batch["labels"],
        lambda batch: batch["input_ids"][1:, ::2],
        lambda batch: batch["input_ids"].view(-1)[3],
        lambda batch: batch["labels"].detach().numpy(),
        lambda batch: batch["labels"].numpy()[2],
        lambda batch: torch.utils.dlpack.from_dlpack(batch["input_ids"]),
        lambda batch: memoryview(batch["input_ids"].numpy().ravel()),
        lambda batch: iter(batch["input_ids"].unbind()),
        lambda batch: batch["input_ids"].untyped_storage(),
    ],
)
def test_whatever_is_kept_of_a_batch_never_changes(keep: Any) -> None:
    loader = TokenLoader(MemorySamples(4000), batch_size=5, shuffle=SMALL)
    batch = next(loader)
    copies = {name: batch[name].clone() for name in ("input_ids", "labels")}
    pointers = {batch[name].data_ptr() for name in ("input_ids", "labels")}
    kept = keep(batch)
    del batch
    gc.collect()
    for later in islice(loader, 20):
        assert pointers.isdisjoint({later["input_ids"].data_ptr(), later["labels"].data_ptr()})
    assert loader.stats().fresh_buffers == 1
    expected = keep(copies)
    if isinstance(kept, torch.Tensor):
        assert torch.equal(kept, expected)
    elif isinstance(kept, np.ndarray):
        assert np.array_equal(kept, expected)
    elif isinstance(kept, memoryview | torch.UntypedStorage):
        assert list(kept) == list(expected)
    else:
        assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))


# -- faults, prefetch, reports ----------------------------------------------------------------------------------------


def test_a_fault_is_raised_by_next_and_the_batch_comes_when_it_is_healed() -> None:
    source = MemorySamples(400)
    loader, whole = a_loader(source=source), a_loader(source=MemorySamples(400))
    expected = positions_of(whole)
    got = positions_of(islice(loader, 3))
    source.broken = set(loader.order(np.array(expected[3])).tolist())
    before = loader.state_dict()
    for _ in range(2):
        with pytest.raises(CorruptBlock, match="data/00000000.arrow"):
            next(loader)
    assert loader.state_dict() == before
    source.broken = set()
    assert got + positions_of(loader) == expected


def test_a_fault_while_rows_are_located_loses_nothing() -> None:
    class Unlocatable(MemorySamples):
        failing = False

        def plan(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
            if self.failing:
                raise CorruptBlock("blocks.arrow", 0, 64, 1, 2)
            return super().plan(samples)

    for local in (True, False):
        source = Unlocatable(10_000, is_local=local)
        loader = a_loader(source=source)
        got = positions_of(islice(loader, 2048))  # all steps of the first plan
        source.failing = True
        with pytest.raises(CorruptBlock, match="blocks.arrow"):
            next(loader)
        source.failing = False
        assert got + positions_of(loader) == positions_of(a_loader(source=MemorySamples(10_000)))


def test_a_local_source_is_not_asked_to_prefetch() -> None:
    source = MemorySamples(400)
    positions_of(a_loader(source=source))
    assert not source.prefetched


@pytest.mark.parametrize("shuffle", [Window(lanes=6, blocks=2), "full"])
def test_a_remote_source_is_asked_in_order_of_need_and_not_too_far_ahead(shuffle: Any) -> None:
    source = MemorySamples(40_000, samples_per_block=16, is_local=False)
    loader = TokenLoader(source, batch_size=8, shuffle=shuffle, prefetch_blocks=40)
    asked: list[int] = []
    for step, _ in enumerate(islice(loader, 600)):
        asked = [s for samples in source.prefetched for s in samples.tolist()]
        needed = [s for samples in source.gathered for s in samples.tolist()]
        ahead = {s // 16 for s in asked} - {s // 16 for s in needed}
        assert {s // 16 for s in needed} <= {s // 16 for s in asked}
        assert 40 // 2 - 8 <= len(ahead) <= 40
        if step == 0:
            assert source.prefetched[0].tolist() == source.gathered[0].tolist()  # the first batch stands alone
    for _ in islice(loader, 1000):
        pass
    assert np.concatenate(source.gathered).tolist()[: len(asked)] == asked


def test_blocks_of_a_window_are_asked_for_once() -> None:
    source = MemorySamples(40_000, samples_per_block=512, is_local=False)
    loader = TokenLoader(source, batch_size=64, shuffle=Window(lanes=2, blocks=4))
    positions_of(loader)
    assert len(source.prefetched) < 200  # of 625 batches, though blocks come up in nearly every one


def test_stats_say_what_was_delivered() -> None:
    before = counters.snapshot()
    loader = a_loader(skip=[(5, 9)])
    assert loader.stats() == (0, 0, 0, 0.0, 0.0, 0.0, 0, 0, 0, 0, 0, 0, 0, {}, None)
    positions_of(islice(loader, 8))
    stats = loader.stats()
    assert (stats.batches, stats.rows, stats.tokens) == (8, 32, 128)
    assert (stats.position, stats.epoch, stats.skipped_rows, stats.dropped_rows) == (36, 1, 4, 0)
    assert (stats.trained_tokens, stats.padded_tokens) == (128, 0)
    assert 0 < stats.wait_p50_ms <= stats.wait_p99_ms <= stats.wait_s * 1000
    loader.close()
    counted = counters.since(before)
    assert counted["loader.batches"] == 8
    assert counted["loader.tokens"] == 128
    assert counted["loader.wait_s"] == pytest.approx(stats.wait_s)


@pytest.mark.parametrize("epochs", [2, None])
def test_explain_names_the_sample_of_every_row_of_a_step(epochs: int | None) -> None:
    source = MemorySamples(203)
    loaders = loaders_of(source, 3, global_batch=12, epochs=epochs, skip=[(30, 41), (400, 500), (1000, 1003)])
    step = 0
    for _ in range(4):  # runs, of which three are shortened by skips
        for batches in zip(*(islice(loader, 60) for loader in loaders), strict=True):
            rows = loaders[1].explain(step)
            step += 1
            assert [row.position for row in rows] == sorted(p for b in batches for p in b["position"].tolist())
            for row in rows:
                assert batches[row.rank]["position"][row.row] == row.position
                assert batches[row.rank]["input_ids"][row.row, 0] == row.sample * source.seq_len
                assert row.spans == (f"sample {row.sample}",)
                assert row.epoch == row.position // 203
    assert step >= 120
    for wrong, told in ((-1, "step must be >= 0, got -1"), (1.5, "a whole number"), (10**25, "before position 2.62")):
        with pytest.raises(ConfigError, match=told):
            loaders[0].explain(wrong)  # type: ignore[arg-type]


def test_a_closed_loader_says_so_and_its_batches_stay() -> None:
    source = MemorySamples(400)
    with a_loader(source=source) as loader:
        batch = next(loader)
        copy = batch["input_ids"].clone()
    for use in (lambda: next(loader), lambda: iter(loader)):
        with pytest.raises(ConfigError, match="the loader is closed"):
            use()
    loader.close()
    assert loader.state_dict()["position"] == 4
    assert torch.equal(batch["input_ids"], copy)


# -- in other loops ---------------------------------------------------------------------------------------------------


def test_a_stock_dataloader_without_workers_delivers_the_same_batches() -> None:
    stock: DataLoader[Batch] = DataLoader(a_loader(), batch_size=None)
    assert len(stock) == 13
    for _ in range(2):  # each iteration is a run, as in torch each is an epoch
        assert len(positions_of(stock)) == 13
    assert positions_of(DataLoader(a_loader(), batch_size=None)) == positions_of(a_loader())


def test_a_copy_sent_elsewhere_goes_on_at_the_same_place() -> None:
    loader = a_loader()
    positions_of(islice(loader, 3))
    copy = pickle.loads(pickle.dumps(loader))
    assert positions_of(copy) == positions_of(loader)


# -- bad input --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"epochs": 0}, "epochs must be >= 1, got 0"),
        ({"prefetch_blocks": 0}, "prefetch_blocks must be >= 1"),
        ({"cu_seqlens_size": 9}, "only batches with borders of documents have cu_seqlens, got 'cu_seqlens_size=9'"),
        ({"seed": -1}, "seed must be from 0"),
        ({"shuffle": "blocks"}, "shuffle must be one of"),
        ({"world_size": 4}, "rank and world_size belong together, got 'only world_size'"),
        ({"rank": 0}, "rank and world_size belong together, got 'only rank'"),
        ({"rank": 4, "world_size": 4}, r"rank must be in \[0, world_size = 4\), got 4"),
        ({"rank": 0, "world_size": 0}, "world_size must be >= 1"),
        ({"batch_size": 55}, "a run must have the .* = 55 rows of a step at least, got 54"),
        ({"skip": [(0, 51)]}, "a run must have the .* = 4 rows of a step at least, got 3"),
        ({"skip": [(3, 2)]}, "a skip range is"),
        ({"skip": [(0.5, 2.7)]}, "a position of skip must be a whole number, got 0.5"),
        ({"skip": [(3, 2**70)]}, "a skip range is"),
        ({"skip": 3}, "skip holds"),
        ({"batch_size": 2.0}, "batch_size must be a whole number, got 2.0"),
        ({"batch_size": True}, "batch_size must be a whole number, got True"),
        ({"batch_size": "2"}, "batch_size must be a whole number, got '2'"),
        ({"seed": True}, "seed must be a whole number, got True"),
        ({"seed": np.True_}, "seed must be a whole number, got True"),
        ({"seed": 1.9}, "seed must be a whole number, got 1.9"),
        ({"epochs": 1.5}, "epochs must be a whole number, got 1.5"),
        ({"epochs": 2**60}, r"a run must have fewer than 2\^61 rows, got 'epochs=1152921504606846976'"),
        ({"prefetch_blocks": 2.5}, "prefetch_blocks must be a whole number"),
        ({"rank": 0.0, "world_size": 1}, "rank must be a whole number"),
        ({"rank": 0, "world_size": 1.0}, "world_size must be a whole number"),
        ({"source": "s3://bucket/set"}, r"source must be a TokenDataset or a Mixture, got 'str' \(hint: open it"),
        ({"source": [MemorySamples(27)]}, r"source must be .*, got 'list' \(hint: several are a Mixture"),
        ({"device": "no-such-device"}, "device must be one that torch knows"),
        ({"device": "meta"}, "device must be the CPU or the accelerator of this process, got 'meta'"),
    ],
)
def test_an_argument_out_of_its_rule_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        a_loader(**changes)


@pytest.mark.parametrize("wrong", [{"lanes": 6.0}, {"lanes": True}, {"blocks": 1.5}, {"lanes": 0}, {"blocks": "2"}])
def test_a_window_of_no_whole_numbers_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"Window: {next(iter(wrong))} must be"):
        Window(**wrong)


@pytest.mark.parametrize("steps", [1.5, True, -1, 2**62, 10**30])
def test_a_jump_to_nowhere_is_refused(steps: Any) -> None:
    for epochs in (2, None):
        loader = a_loader(epochs=epochs)
        with pytest.raises(ConfigError):
            loader.jump(steps)
        assert loader.position == 0


def test_skip_ranges_reach_the_loader_merged() -> None:
    loader = a_loader(skip=[(5, 9), (1, 3), (8, 12)])
    assert loader.state_dict()["skip"] == [list(r) for r in SkipRanges([(1, 3), (5, 12)]).ranges]
