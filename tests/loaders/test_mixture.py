"""Mixtures of real data sets: the rows of every source at its rate, exact over world sizes, stops and changed weights."""

import json
import pickle
from collections.abc import Iterator
from contextlib import ExitStack
from fractions import Fraction
from functools import partial
from itertools import islice, pairwise
from math import log2
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stoker.errors import ConfigError, CorruptBlock, StateMismatch, UnsupportedError
from stoker.loaders import Mixture, TokenDataset, TokenLoader
from stoker.loaders._state import LoaderState
from stoker.loaders.mixed_order import MixedOrder
from stoker.loaders.order import Window
from stoker.loaders.replay import digest_of_step
from stoker.storage import TieredCache, open_store
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import flip_bit, random_documents, write_set

SEQ_LEN = 16
SMALL = Window(lanes=3, blocks=2)
DOCUMENTS = {"web": 300, "code": 90, "math": 60}
WEIGHTS = {"web": 0.7, "code": 0.2, "math": 0.1}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets; the tokens of each are below, between or above those of the others."""
    root = tmp_path_factory.mktemp("mixture")
    for seed, (name, count) in enumerate(DOCUMENTS.items()):
        documents = [d // 4 + 16_384 * seed for d in random_documents(count, seed=seed)]
        write_set(root / name, documents, dtype="uint32" if name == "math" else "uint16")
    write_set(root / "other", random_documents(80, seed=9))
    return root


class Opened:
    """Data sets of the root, each opened once for each way of cutting it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.datasets: dict[str, TokenDataset] = {}

    def __call__(self, name: str, **options: Any) -> TokenDataset:
        key = repr((name, options))
        if key not in self.datasets:
            self.datasets[key] = TokenDataset(self.root / name, **{"seq_len": SEQ_LEN, **options})
        return self.datasets[key]

    def mix(self, weights: dict[str, float] | None = None, *, packings: Any = "concat", **options: Any) -> Mixture:
        weights = WEIGHTS if weights is None else weights
        kinds = packings if isinstance(packings, dict) else dict.fromkeys(weights, packings)
        return Mixture({name: (self(name, packing=kinds[name]), w) for name, w in weights.items()}, **options)


@pytest.fixture
def opened(root: Path) -> Iterator[Opened]:
    opened = Opened(root)
    yield opened
    for dataset in opened.datasets.values():
        dataset.close()


PACKED = {"web": "best_fit", "code": "pad", "math": "best_fit"}


def loaders_of(mix: Mixture, world_size: int, *, global_batch: int, **options: Any) -> list[TokenLoader]:
    options = {"shuffle": SMALL, "seed": 7, "epochs": 2, **options}
    return [
        TokenLoader(mix, batch_size=global_batch // world_size, rank=rank, world_size=world_size, **options)
        for rank in range(world_size)
    ]


def digests_of(loaders: list[TokenLoader], count: int | None = None) -> Iterator[bytes]:
    """Of each global step; all ranks must end together."""
    for _ in range(count) if count is not None else iter(int, 1):
        batches = [next(loader, None) for loader in loaders]
        if None in batches:
            assert batches == [None] * len(loaders)
            return
        yield digest_of_step([batch for batch in batches if batch is not None])


# -- the rows ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packings", ["concat", PACKED], ids=["concat", "packed"])
@pytest.mark.parametrize("names", [("web", "code"), ("web", "code", "math")], ids=["one dtype", "two dtypes"])
def test_a_batch_holds_the_rows_of_its_sources(opened: Opened, names: tuple[str, ...], packings: Any) -> None:
    mix = opened.mix({name: WEIGHTS[name] for name in names}, packings=packings)
    kinds = packings if isinstance(packings, dict) else dict.fromkeys(names, packings)
    loader = TokenLoader(mix, batch_size=8, shuffle=SMALL, seed=3)
    seen: list[set[int]] = [set() for _ in names]
    for batch in loader:
        assert batch["source"].dtype == torch.int64 and batch["source"].shape == (8,)
        ids = loader.order(batch["position"].numpy())
        for row, (source, sample_id) in enumerate(zip(batch["source"].tolist(), ids.tolist(), strict=True)):
            number, sample = mix.sample(sample_id)
            assert number == source
            expected = opened(names[source], packing=kinds[names[source]])[sample]
            assert all(torch.equal(batch[name][row], expected[name]) for name in expected)
            assert sample not in seen[source]
            seen[source].add(sample)
        if "cu_seqlens" in batch:
            restarts = np.flatnonzero(batch["position_ids"].numpy().ravel() == 0)
            assert batch["cu_seqlens"].tolist() == [*restarts.tolist(), 8 * SEQ_LEN]
            assert batch["max_seqlen"] == int(batch["cu_seqlens"].diff().max())
        assert batch["input_ids"].is_contiguous() and batch["labels"].is_contiguous()
    # Sources come at their weights; the first to be exhausted is exhausted but for what lanes have not read.
    rows = np.array([len(samples) for samples in seen])
    weights = np.array([WEIGHTS[name] for name in names])
    assert np.abs(rows - rows.sum() * weights / weights.sum()).max() < 3 * SMALL.lanes
    left = [len(dataset) - count for dataset, count in zip(mix.sources, rows.tolist(), strict=True)]
    assert 0 <= min(left) < SMALL.lanes * (1 + log2(len(names))) + 8


def test_rows_longer_than_a_block_are_mixed_too(opened: Opened) -> None:
    sets = {name: opened(name, seq_len=200) for name in ("web", "math", "code")}
    mix = Mixture({name: (dataset, 1) for name, dataset in sets.items()})
    loader = TokenLoader(mix, batch_size=5, shuffle=Window(lanes=1, blocks=1))
    for batch in loader:
        for row, sample_id in enumerate(loader.order(batch["position"].numpy()).tolist()):
            number, sample = mix.sample(sample_id)
            assert torch.equal(batch["input_ids"][row], mix.sources[number][sample]["input_ids"])
            assert torch.equal(batch["labels"][row], mix.sources[number][sample]["labels"])
    assert loader.stats().batches == len(loader) > 5


def test_ranks_with_other_caches_or_none_get_the_same_stream(
    opened: Opened, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path))
    urls, options = (
        {name: s3_server.url("stoker", f"mix-{name}") for name in ("web", "code")},
        s3_server.storage_options,
    )
    for name, url in urls.items():
        with open_store(url, **options) as store:
            for file in sorted((opened.root / name).rglob("*")):
                if file.is_file():
                    store.put(file.relative_to(opened.root / name).as_posix(), file.read_bytes())
    order: dict[str, Any] = {"seed": 5, "shuffle": "window", "epochs": None}  # that of a rank which chooses nothing
    with ExitStack() as stack:
        caches = [
            TieredCache(ram="1MiB"),
            TieredCache(ram=0, disk=tmp_path / "disk", disk_capacity="8KiB", min_free=0),  # holds a few blocks
            TieredCache(ram=0),
        ]
        loaders = []
        for rank, cache in enumerate([*map(stack.enter_context, caches), None]):
            sets = {
                name: opened(name)
                if cache is None or (rank, name) == (0, "code")  # local data, beside remote data in the first rank
                else stack.enter_context(TokenDataset(url, seq_len=SEQ_LEN, cache=cache, storage_options=options))
                for name, url in urls.items()
            }
            mix = Mixture({"web": (sets["web"], 2), "code": (sets["code"], 1)})
            loader = TokenLoader(mix, batch_size=6, rank=rank, world_size=4, prefetch_blocks=1 + 3 * rank, **order)
            loaders.append(stack.enter_context(loader))
        alone = loaders_of(opened.mix({"web": 2, "code": 1}), 1, global_batch=24, **order)
        assert list(digests_of(loaders, 40)) == list(digests_of(alone, 40))
        states = [loader.state_dict() for loader in [*loaders, *alone]]
        assert all(state == states[0] for state in states)


# -- exactness --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("global_batch", "packings"), [(120, "concat"), (120, PACKED), (17, PACKED)], ids=["concat", "packed", "prime"]
)
def test_a_mixture_has_one_digest_at_every_world_size_with_stops_in_between(
    opened: Opened, global_batch: int, packings: Any
) -> None:
    mix = opened.mix(
        packings=packings,
        schedule=[(500, {"web": 1, "code": 1, "math": 1}), (1100, {"web": 3, "math": 1})],
        caps={"math": 1.5},
        stop="all_exhausted",
    )
    options: dict[str, Any] = {"skip": [(50, 61), (700, 803)]}
    sizes = [n for n in (1, 2, 3, 5, 4, 8, 17) if global_batch % n == 0]
    expected = list(digests_of(loaders_of(mix, 1, global_batch=global_batch, **options)))
    assert len(expected) == len(set(expected)) == len(loaders_of(mix, 1, global_batch=global_batch, **options)[0])
    assert loaders_of(mix, 1, global_batch=global_batch)[0]._run_end > 1500  # weights change, the cap is reached
    assert [len(segment.sources) for segment in loaders_of(mix, 1, global_batch=120)[0].order.segments] == [3, 3, 2, 1]  # type: ignore[union-attr]
    for size in sizes[1:]:
        assert list(digests_of(loaders_of(mix, size, global_batch=global_batch, **options))) == expected
    # And once more, handed from world size to world size.
    digests: list[bytes] = []
    state = None
    for size, count in [*zip(sizes * 4, (1, 3, 2, 4, 1, 2, 3), strict=False), (1, None)]:
        loaders = loaders_of(mix, size, global_batch=global_batch, **options)
        for loader in loaders:
            if state is not None:
                loader.load_state_dict(json.loads(json.dumps(state)))
        digests += digests_of(loaders, count)
        states = [loader.state_dict() for loader in loaders]
        assert all(s == states[0] for s in states)
        state = states[0]
    assert digests == expected


def test_another_run_begins_where_the_first_ended_and_repeats_nothing_early(opened: Opened) -> None:
    mix = opened.mix({"web": 3, "code": 1})
    loader = TokenLoader(mix, batch_size=7, shuffle=SMALL)
    rows: list[tuple[int, int]] = []
    lengths = []
    for _ in range(3):
        lengths.append(len(loader))
        for batch in loader:
            rows += map(mix.sample, loader.order(batch["position"].numpy()).tolist())
    assert max(lengths) - min(lengths) <= 2
    dropped = loader.stats().dropped_rows
    for number, dataset in enumerate(mix.sources):
        counts = np.bincount([sample for source, sample in rows if source == number], minlength=len(dataset))
        assert counts.max() - counts.min() <= 1 + dropped
    stats = loader.stats().sources
    assert sum(s.rows for s in stats.values()) == len(rows)
    assert sum(s.dropped_rows for s in stats.values()) == dropped
    assert sum(s.samples for s in stats.values()) == loader.position == len(rows) + dropped


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted", "never"])
def test_a_restored_loader_does_what_the_stopped_one_would_have_done(opened: Opened, stop: Any) -> None:
    mix = opened.mix({"code": 1, "math": 2}, stop=stop)

    def make() -> TokenLoader:
        return TokenLoader(mix, batch_size=9, shuffle=SMALL)

    first = make()
    total = 60 if stop == "never" else len(first)
    if stop == "never":
        with pytest.raises(TypeError, match="a mixture that never stops has no length"):
            len(first)
        assert first.remaining is None
    for delivered in (0, 1, 5, total - 1, total):
        loader = make()
        assert len(list(islice(loader, delivered))) == delivered
        if delivered == total and stop != "never":
            assert next(loader, None) is None
        again = make()
        again.load_state_dict(json.loads(json.dumps(loader.state_dict())))
        assert (again.position, again.remaining) == (loader.position, loader.remaining)
        for _ in range(2):
            expected = list(digests_of([iter(loader)], 4))
            assert list(digests_of([iter(again)], 4)) == expected
    loader = make()
    loader.jump(7)
    assert list(digests_of([loader], 3)) == list(digests_of([make()], 10))[7:]
    with pytest.raises(ConfigError, match="steps must be >= 0, got -1"):
        loader.jump(-1)
    if stop != "never":
        with pytest.raises(ConfigError, match=f"the run has {total - 10} steps left, got {total - 9}"):
            loader.jump(total - 9)


def test_an_exhausted_mixture_stays_at_its_end(opened: Opened) -> None:
    mix = opened.mix({"code": 1, "math": 1}, caps={"code": 1, "math": 0.5}, stop="never")
    loader = TokenLoader(mix, batch_size=8, shuffle=SMALL, epochs=None)
    total = len(loader)
    assert sum(1 for _ in loader) == total
    assert (sum(1 for _ in loader), len(loader), loader.remaining) == (0, 0, 0)
    stats = loader.stats().sources
    for name, epochs in (("code", 1), ("math", 0.5)):
        samples = round(epochs * len(opened(name)))
        assert stats[name].samples + stats[name].unread_samples == samples
        assert 0 <= stats[name].unread_samples < 2 * SMALL.lanes
    with pytest.raises(ConfigError, match="the stream ends before position .* got 'step 999'"):
        loader.explain(999)
    assert len(loader.explain(total - 1)) == 8


# -- changing a run ---------------------------------------------------------------------------------------------------


def test_weights_and_sources_change_in_the_middle_of_a_run_without_loss_or_repeat(opened: Opened) -> None:
    whole = opened.mix({"web": 3, "code": 1})
    loader = TokenLoader(whole, batch_size=10, shuffle=SMALL, epochs=None)
    rows = [int(i) for batch in islice(loader, 30) for i in loader.order(batch["position"].numpy())]
    position = loader.position
    grown = opened.mix({"web": 3, "code": 1, "math": 0}, schedule=[(position, {"code": 1, "math": 2})])
    after = TokenLoader(grown, batch_size=8, shuffle=SMALL, epochs=None)
    after.load_state_dict(loader.state_dict())
    for batch in islice(after, 20):
        rows += after.order(batch["position"].numpy()).tolist()
        assert after.position - 8 <= position + 2 or 0 not in batch["source"].tolist()
    # Ids have the same meaning in both: the data sets have equal order blocks.
    assert whole.samples_per_block == grown.samples_per_block
    assert len(rows) == len(set(rows)) == position + 160
    assert sorted(rows) == sorted(after.order(np.arange(position + 160)).tolist())
    state = after.state_dict()
    assert [segment[0] for segment in state["segments"]] == [0, -(-position // 3) * 3]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"schedule": [(30, {"web": 1})]}, "the weights change at position 30 here and not in the state"),
        ({"weights": {"web": 2, "code": 1, "math": 1}}, "the weights from position 0 on are others here"),
        ({"weights": {"web": 3, "math": 1}}, "source 'code' is missing here, where it may have weight 0"),
        ({"packings": "best_fit"}, r"source 'web' is \['[0-9a-f]{32}', 'concat'\] in the state"),
        ({"caps": {"math": 0.01}}, "the weights change at position 0 here|are others here"),
    ],
)
def test_a_state_of_another_mixture_is_refused_by_name(opened: Opened, options: dict[str, Any], told: str) -> None:
    loader = TokenLoader(opened.mix({"web": 3, "code": 1, "math": 1}), batch_size=12, shuffle=SMALL)
    list(islice(loader, 4))
    other = TokenLoader(
        opened.mix(**{"weights": {"web": 3, "code": 1, "math": 1}, **options}), batch_size=12, shuffle=SMALL
    )
    with pytest.raises(StateMismatch, match=told) as refused:
        other.load_state_dict(loader.state_dict())
    assert "weights may change from position 48 on" in refused.value.hint
    assert other.position == 0


def test_a_state_tells_content_not_place_and_a_mixture_from_a_data_set(opened: Opened, tmp_path: Path) -> None:
    loader = TokenLoader(opened.mix({"web": 3, "code": 1}), batch_size=12, shuffle=SMALL)
    list(islice(loader, 4))
    (tmp_path / "moved").symlink_to(opened.root / "code")
    sets = {"web": opened("web"), "code": TokenDataset(tmp_path / "moved", seq_len=SEQ_LEN)}
    moved = TokenLoader(
        Mixture({name: (sets[name], w) for name, w in (("code", 2), ("web", 6))}), batch_size=12, shuffle=SMALL
    )
    moved.load_state_dict(loader.state_dict())  # in another order, with weights of the same ratio
    assert list(digests_of([moved], 3)) == list(digests_of([loader], 3))
    sets["code"].close()
    wrong = Mixture({"web": (opened("web"), 3), "code": (opened("other"), 1)})
    with pytest.raises(StateMismatch, match="source 'code' is"):
        TokenLoader(wrong, batch_size=12, shuffle=SMALL).load_state_dict(loader.state_dict())
    alone = TokenLoader(opened("web"), batch_size=12, shuffle=SMALL)
    with pytest.raises(StateMismatch, match="the state is of a mixture, got 'one data set here'"):
        alone.load_state_dict(loader.state_dict())
    with pytest.raises(StateMismatch, match="the state is of one data set, got 'a mixture here'"):
        loader.load_state_dict(alone.state_dict())
    with pytest.raises(StateMismatch, match="sources must be of type dict"):
        loader.load_state_dict({**loader.state_dict(), "sources": []})
    with pytest.raises(StateMismatch, match="sources must hold pairs of str and str, got 7"):
        loader.load_state_dict({**loader.state_dict(), "sources": {"web": 7}})
    with pytest.raises(StateMismatch, match="segments must be of type list, got 'x'"):
        loader.load_state_dict({**loader.state_dict(), "segments": "x"})
    with pytest.raises(StateMismatch, match="segments must hold pairs of int and str, got 'x'"):
        loader.load_state_dict({**loader.state_dict(), "segments": ["x"]})


def test_the_state_of_a_mixture_has_the_form_of_version_1() -> None:
    state = {
        "version": 1,
        "mixture_version": 1,
        "sources": {"web": ["0" * 32, "concat"], "code": ["1" * 32, "pad-1/split"]},
        "segments": [[0, "2" * 16], [48, "3" * 16]],
        "seq_len": 16,
        "order_version": 1,
        "seed": 7,
        "shuffle": "window",
        "lanes": 48,
        "window_blocks": 4,
        "position": 60,
        "run_start": 0,
        "skip": [[3, 5]],
        "global_batch": 12,
    }
    assert LoaderState.from_dict(state).to_dict() == state


@pytest.mark.parametrize("sources", [2, 8, 40])
def test_a_state_is_small(opened: Opened, sources: int) -> None:
    names = [f"source-{i}" for i in range(sources)]
    schedule = [(100 * i, {names[i % sources]: 1, names[0]: 2}) for i in range(1, 11)]
    mix = Mixture({name: (opened("web", packing="best_fit"), 1) for name in names}, schedule=schedule)
    loader = TokenLoader(mix, batch_size=50, shuffle=SMALL, skip=[(7 * i, 7 * i + 1) for i in range(1, 6)], epochs=None)
    loader.jump(40)
    state = loader.state_dict()
    assert (len(state["segments"]), len(state["skip"])) == (11, 5)
    assert len(json.dumps(state)) <= 512 + 96 * sources + 64 * (11 + 5)
    assert json.loads(json.dumps(state)) == state


# -- reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packings", ["concat", PACKED], ids=["concat", "packed"])
def test_stats_count_each_source(opened: Opened, packings: Any) -> None:
    mix = opened.mix({"code": 1, "math": 1}, packings=packings, stop="all_exhausted")
    loader = TokenLoader(mix, batch_size=6, shuffle=SMALL, seed=1)
    rows, padded, trained = (np.zeros(2, int) for _ in range(3))
    state = None
    for number, batch in enumerate(loader):
        for row, source in enumerate(batch["source"].tolist()):
            rows[source] += 1
            padded[source] += int((batch["doc_ids"][row] < 0).sum()) if "doc_ids" in batch else 0
            trained[source] += int((batch["labels"][row] != -100).sum())
        if number == 10:
            state = loader.state_dict()
            assert [s.rows for s in loader.stats().sources.values()] == rows.tolist()
    stats = loader.stats()
    told = stats.sources
    assert list(told) == ["code", "math"]
    assert [s.rows for s in told.values()] == rows.tolist()
    assert [s.tokens for s in told.values()] == (rows * SEQ_LEN).tolist()
    assert [s.padded_tokens for s in told.values()] == padded.tolist()
    assert [s.trained_tokens for s in told.values()] == trained.tolist()
    assert (stats.trained_tokens, stats.padded_tokens) == (trained.sum(), padded.sum())
    for source, dataset in zip(told.values(), mix.sources, strict=True):
        assert source.epochs == source.samples / len(dataset) >= 1
        assert source.repeated_samples == source.samples - len(dataset)
    assert sum(s.samples for s in told.values()) == stats.position
    assert sum(s.dropped_rows for s in told.values()) == stats.dropped_rows
    # What was delivered before a state was loaded stays counted.
    assert state is not None
    loader.load_state_dict(state)
    assert [s.rows for s in loader.stats().sources.values()] == rows.tolist()
    assert loader.stats().epoch == 0 and stats.epoch == 1
    assert TokenLoader(opened("web"), batch_size=2).stats().sources == {}


def test_explain_names_source_document_and_tokens(opened: Opened) -> None:
    mix = opened.mix(stop="all_exhausted", schedule=[(200, {"math": 1, "web": 1})])
    loaders = loaders_of(mix, 3, global_batch=24, epochs=1, skip=[(100, 131)])
    batches = list(zip(*loaders, strict=True))
    documents = {
        name: [d // 4 + 16_384 * seed for d in random_documents(count, seed=seed)]
        for seed, (name, count) in enumerate(DOCUMENTS.items())
    }
    again = len(batches) + 2  # in the second run
    batches += list(islice(zip(*map(iter, loaders), strict=True), 3))
    for step in (0, 3, 5, len(batches) - 4, again):
        for origin in loaders[1].explain(step):
            assert origin.source is not None
            batch = batches[step][origin.rank]
            assert batch["position"][origin.row] == origin.position
            assert mix.names[batch["source"][origin.row]] == origin.source
            told = np.concatenate([documents[origin.source][s.document][s.start : s.end] for s in origin.spans])
            assert told[:-1].tolist() == batch["input_ids"][origin.row].tolist()
            _, own = loaders[0].order.locate(np.array([origin.position]))  # type: ignore[union-attr]
            assert origin.epoch == own[0] // len(opened(origin.source))


# -- faults -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packings", ["concat", "best_fit"])
def test_damage_in_one_source_comes_out_of_next_and_the_batch_comes_when_it_is_healed(
    opened: Opened, tmp_path: Path, packings: str
) -> None:
    write_set(tmp_path, random_documents(120))
    file = sorted((tmp_path / "data").iterdir())[1]
    with TokenDataset(tmp_path, seq_len=SEQ_LEN, packing=packings) as dataset:  # type: ignore[arg-type]
        mix = Mixture({"bad": (dataset, 1), "good": (opened("web", packing=packings), 2)})
        expected = list(digests_of(loaders_of(mix, 1, global_batch=8, epochs=1)))
        offset = dataset._tables.byte_range(1, 5)[0]
    flip_bit(file, offset)
    with TokenDataset(tmp_path, seq_len=SEQ_LEN, packing=packings) as dataset:  # type: ignore[arg-type]
        mix = Mixture({"bad": (dataset, 1), "good": (opened("web", packing=packings), 2)})
        loaders = loaders_of(mix, 1, global_batch=8, epochs=1)
        digests: list[bytes] = []
        with pytest.raises(CorruptBlock, match=file.name):
            digests.extend(digests_of(loaders))
        assert loaders[0].position == 8 * len(digests) < 8 * len(expected)
        flip_bit(file, offset)
        assert [*digests, *digests_of(loaders)] == expected


def test_sources_share_what_may_be_mapped_at_a_time(opened: Opened, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each map costs a descriptor, of which a process has a thousand or so."""
    monkeypatch.setattr("stoker.loaders._source._affordable_maps", lambda shards: 40)
    sets = {name: TokenDataset(opened.root / name, seq_len=SEQ_LEN) for name in DOCUMENTS}
    with ExitStack() as stack:
        for dataset in sets.values():
            stack.enter_context(dataset)
        sets["web"][0]  # is open when it becomes part of a mixture
        mix = Mixture({name: (dataset, 1) for name, dataset in sets.items()})
        assert sets["web"].manifest.shards > 16
        expected = list(digests_of(loaders_of(opened.mix(dict.fromkeys(sets, 1)), 1, global_batch=12), 60))
        assert list(digests_of(loaders_of(mix, 1, global_batch=12), 60)) == expected
        assert [dataset._source.max_maps for dataset in sets.values()] == [16, 16, 16]  # type: ignore[union-attr]


def test_every_batch_of_a_list_has_memory_of_its_own(opened: Opened) -> None:
    loader = TokenLoader(opened.mix(), batch_size=4, shuffle=SMALL)
    batches = list(islice(loader, 100))
    copies = [{name: value.clone() for name, value in batch.items()} for batch in batches[:50]]
    list(islice(loader, 30))
    assert all(
        torch.equal(batch[name], copy[name]) for batch, copy in zip(batches, copies, strict=False) for name in copy
    )


def test_a_mixture_survives_pickling(opened: Opened) -> None:
    mix = opened.mix(schedule=[(90, {"web": 1})], caps={"code": 1})
    again = pickle.loads(pickle.dumps(mix))
    expected = list(digests_of(loaders_of(mix, 1, global_batch=8, epochs=1), 20))
    assert list(digests_of(loaders_of(again, 1, global_batch=8, epochs=1), 20)) == expected
    for dataset in again.sources:
        dataset.close()


def test_weights_caps_and_positions_may_be_numbers_of_numpy(opened: Opened) -> None:
    plain = opened.mix(
        {"web": 1, "code": float(np.float32(0.3))}, schedule=[(90, {"web": 2, "code": 0.5})], caps={"code": 1.5}
    )
    weights: dict[str, Any] = {"web": np.int64(1), "code": np.float32(0.3)}
    other = opened.mix(
        weights,
        schedule=[(np.int32(90), {"web": np.uint8(2), "code": Fraction(1, 2)})],
        caps={"code": np.float64(1.5)},
    )
    assert other._schedule == plain._schedule
    assert other._caps == plain._caps
    with TokenLoader(other, batch_size=4) as loader:
        for _ in range(40):
            next(loader)
        loader.load_state_dict(json.loads(json.dumps(loader.state_dict())))


def test_writing_into_a_batch_falsifies_no_count(opened: Opened) -> None:
    loader, other = (TokenLoader(opened.mix(), batch_size=4, shuffle=SMALL) for _ in range(2))
    for batch in islice(loader, 20):
        assert batch["source"].untyped_storage().nbytes() == 4 * 8
        batch["source"].zero_()
    list(islice(other, 20))
    assert loader.stats().sources == other.stats().sources


@pytest.mark.parametrize("stop", ["first_exhausted", "all_exhausted"])
def test_runs_that_were_asked_for_once_cost_nothing_again(opened: Opened, stop: Any) -> None:
    asked = []

    def run_end(order: MixedOrder, start: int, epochs: int | None) -> int:
        asked.append(start)
        return MixedOrder.run_end(order, start, epochs)

    loader, plain = (TokenLoader(opened.mix(stop=stop), batch_size=4, shuffle=SMALL) for _ in range(2))
    starts = [0]
    for _ in range(30):
        starts.append(plain.order.run_end(starts[-1], 1))
    assert isinstance(loader.order, MixedOrder)
    loader.order.run_end = partial(run_end, loader.order)  # type: ignore[method-assign]
    loader.set_epoch(30)
    assert loader.position == starts[30]
    assert asked == [*starts[:30], starts[30]]  # each once, and where the run that it goes to ends
    del asked[:]
    step = sum((end - start) // 4 for start, end in pairwise(starts)) - 1
    for _ in range(3):
        rows = loader.explain(step)
    assert rows[-1].position < starts[30]
    assert not asked
    loader.set_epoch(31)
    assert asked == [starts[30], loader.position]


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"weights": {}}, ConfigError, "needs at least one source"),
        ({"weights": {"web": -1, "code": 1}}, ConfigError, "Mixture: web: the first weights must be .* >= 0, got -1"),
        ({"weights": {"web": NAN, "code": 1}}, ConfigError, "finite numbers >= 0, got nan"),
        ({"weights": {"web": INF, "code": 1}}, ConfigError, "finite numbers >= 0, got inf"),
        ({"weights": {"web": True, "code": 1}}, ConfigError, "finite numbers >= 0, got True"),
        ({"weights": {"web": "1", "code": 1}}, ConfigError, "finite numbers >= 0, got '1'"),
        ({"weights": {"web": 0, "code": 0}}, ConfigError, "one of the first weights must be above 0"),
        ({"weights": {"web": 1, "code": 1e-9}}, ConfigError, r"code: .* must be 2\^-24 of the largest one, 1, at least"),
        ({"schedule": [(5, {"wbe": 1})]}, ConfigError, "names are those of the sources: web, code, math, got 'wbe'"),
        ({"schedule": [(5, {"web": -1})]}, ConfigError, "the weights at position 5 must be"),
        ({"schedule": [(5, {})]}, ConfigError, "one of the weights at position 5 must be above 0"),
        ({"schedule": [(0, {"web": 1})]}, ConfigError, "above 0 and ascending, got 0"),
        ({"schedule": [(9, {"web": 1}), (9, {"web": 1})]}, ConfigError, "above 0 and ascending, got 9"),
        ({"schedule": [(2**70, {"web": 1})]}, ConfigError, r"whole numbers, below 2\^62, .* got 1180591620717411303424"),
        ({"schedule": [(True, {"web": 1})]}, ConfigError, "whole numbers, .* got True"),
        ({"caps": {"web": True}}, ConfigError, "a cap is a number of epochs above 0, got True"),
        ({"schedule": [(1.5, {"web": 1})]}, ConfigError, "whole numbers, .* got 1.5"),
        ({"schedule": [(9, 1)]}, ConfigError, r"schedule holds \(position, {name: weight}\)"),
        ({"schedule": [(9, {"web": 1}), (48, {"code": 1})]}, ConfigError, "must start 48 positions apart"),
        ({"caps": {"wbe": 1}}, ConfigError, "Mixture caps: names are those of the sources"),
        ({"caps": {"web": 0}}, ConfigError, "a cap is a number of epochs above 0, got 0"),
        ({"caps": {"web": NAN}}, ConfigError, "a cap is a number of epochs above 0, got nan"),
        ({"stop": "last"}, ConfigError, "stop must be one of first_exhausted, all_exhausted, never, got 'last'"),
        ({"packings": {"web": "concat", "code": "pad", "math": "pad"}}, ConfigError, "the same documents, which is False"),
    ],
)  # fmt: skip
def test_an_argument_out_of_its_rule_is_refused(
    opened: Opened, options: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        opened.mix(**options)


def test_sources_that_don_t_fit_together_are_refused_by_name(opened: Opened) -> None:
    web = opened("web")
    for other, told in (
        ((opened("code", seq_len=8), 1), "Mixture: code: all sources must have the same seq_len, which is 16 in 'web', got 8"),
        ((opened("code", labels="same"), 1), "the same labels, which is 'shifted' in 'web', got 'same'"),
        (opened("code"), "Mixture: code: a source is \\(data set, weight\\)"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=told):
            Mixture({"web": (web, 1), "code": other})  # type: ignore[dict-item]
    with pytest.raises(UnsupportedError, match="the sources of a mixture are TokenDatasets, got 'list'"):
        Mixture({"web": ([1], 1)})  # type: ignore[dict-item]
    for name in ("", "x" * 65, "a\nb"):
        with pytest.raises(ConfigError, match="a name is 1 to 64 printable characters"):
            Mixture({name: (web, 1)})
    with pytest.raises(UnsupportedError, match="at most 16384 sources"):
        Mixture({str(i): (web, 1) for i in range(16385)})
    with pytest.raises(ConfigError, match="the first source to be exhausted ends a run"):
        TokenLoader(Mixture({"web": (web, 1)}), batch_size=4, shuffle=Window(lanes=100_000))
