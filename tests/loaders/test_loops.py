"""The loader inside torch's DataLoader and torchdata's StatefulDataLoader: the same stream, the same resumes."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from stoker.errors import StateMismatch, UnsupportedError
from stoker.loaders import Mixture, TokenDataset, TokenLoader
from stoker.loaders.order import Window
from stoker.storage import TieredCache
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import random_documents, write_set

pytestmark = [
    # torch warns of more workers than this machine has cores; what they deliver does not depend on it.
    pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning"),
    # torchdata 0.11 calls what torch 2.13 deprecates.
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),
]

SMALL = Window(lanes=3, blocks=2)
Make = Callable[..., TokenLoader]


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[TokenDataset]:
    write_set(tmp_path / "set", random_documents(60))
    with TokenDataset(tmp_path / "set", seq_len=16) as opened:
        yield opened


@pytest.fixture
def make(dataset: TokenDataset) -> Make:
    """Makes loaders of one stream, 150 rows an epoch, with positions that are jumped over."""
    options: dict[str, Any] = {"batch_size": 6, "seed": 4, "shuffle": SMALL, "skip": [(20, 33)]}
    return partial(TokenLoader, dataset, **options)


def rows(batches: Any) -> list[list[list[int]]]:
    """Of each batch, its rows: the position and the tokens."""
    return [
        [[p, *ids] for p, ids in zip(batch["position"].tolist(), batch["input_ids"].tolist(), strict=True)]
        for batch in batches
    ]


def stateful(loader: TokenLoader, workers: int, **options: Any) -> StatefulDataLoader[Any]:
    return StatefulDataLoader(loader, batch_size=None, num_workers=workers, **options)


def through_json(state: Any) -> Any:
    return json.loads(json.dumps(state))


# --- torch ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_a_stock_dataloader_delivers_the_stream_with_any_number_of_workers(make: Make, workers: int) -> None:
    whole = rows(make())
    assert len(whole) % 4
    assert rows(DataLoader(make(), batch_size=None, num_workers=workers)) == whole


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(make: Make, start: str) -> None:
    loader = make()
    workers = DataLoader(loader, batch_size=None, num_workers=1, multiprocessing_context=start)
    assert rows(workers) == rows(make())
    with pytest.raises(UnsupportedError, match="does not know how many the trainer got"):
        loader.state_dict()


def test_workers_that_persist_go_on_with_the_next_run_and_others_do_after_set_epoch(make: Make) -> None:
    reference = make()
    runs = [rows(reference) for _ in range(3)]
    assert runs[0] != runs[1]
    persistent = DataLoader(make(), batch_size=None, num_workers=2, persistent_workers=True)
    assert [rows(persistent) for _ in range(3)] == runs
    loader = make()
    fresh = DataLoader(loader, batch_size=None, num_workers=2)
    got = []
    for epoch in range(3):
        loader.set_epoch(epoch)
        got.append(rows(fresh))
    assert got == runs


def test_set_epoch_never_goes_back(make: Make, dataset: TokenDataset) -> None:
    loader, reference = make(), make(epochs=2)
    expected = rows(islice(reference, 40))
    got = rows(islice(loader, 5))
    for _ in range(2):
        loader.set_epoch(0)
    got += rows(loader)
    loader.set_epoch(1)
    assert loader.position == len(dataset)
    assert len(got) == len(make())
    endless = make(epochs=None)
    endless.set_epoch(3)
    assert endless.position == 0
    assert got == expected[: len(got)]


def test_workers_go_on_where_the_loader_stands(make: Make) -> None:
    whole = rows(make())
    loader = make()
    assert rows(islice(loader, 7)) == whole[:7]
    assert rows(DataLoader(loader, batch_size=None, num_workers=3)) == whole[7:]


def test_a_loader_whose_workers_deliver_refuses_to_tell_a_state(make: Make) -> None:
    loader = make()
    before = loader.state_dict()
    list(DataLoader(loader, batch_size=None, num_workers=1))
    with pytest.raises(UnsupportedError, match="does not know how many the trainer got"):
        loader.state_dict()
    loader.load_state_dict(before)
    assert loader.state_dict() == before


def test_a_worker_makes_no_batches_on_an_accelerator(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = make()
    loader.device = torch.device("cuda", 0)
    worker = type("Worker", (), {"id": 1, "num_workers": 2})()
    monkeypatch.setattr("stoker.loaders.loader.get_worker_info", lambda: worker)
    with pytest.raises(UnsupportedError, match="batches are made in host memory, got 'device cuda:0'"):
        iter(loader)


@pytest.mark.parametrize("workers", [0, 1, 4])
def test_samples_come_from_any_number_of_workers_epoch_after_epoch(dataset: TokenDataset, workers: int) -> None:
    loader = DataLoader(dataset, batch_size=7, num_workers=workers, persistent_workers=workers > 0)
    expected = [sample["labels"].tolist() for sample in dataset.__getitems__(range(len(dataset)))]
    for _ in range(2):
        assert [row for batch in loader for row in batch["labels"].tolist()] == expected


def test_workers_read_a_remote_mixture(
    s3_server: S3Server, node_cache: TieredCache, dataset: TokenDataset, tmp_path: Path
) -> None:
    url, storage_options = s3_server.url("stoker", f"loops/{tmp_path.name}"), s3_server.storage_options
    write_set(url, random_documents(40, seed=1), storage_options=storage_options)
    with TokenDataset(url, seq_len=16, cache=node_cache, storage_options=storage_options) as remote:
        mixture = Mixture({"near": (dataset, 0.7), "far": (remote, 0.3)})
        whole = rows(islice(TokenLoader(mixture, batch_size=5, shuffle=SMALL), 12))
        loader = TokenLoader(mixture, batch_size=5, shuffle=SMALL)
        assert rows(islice(DataLoader(loader, batch_size=None, num_workers=2), 12)) == whole


# --- torchdata --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "every"), [(0, 1), (2, 1), (3, 4)])
def test_a_stateful_dataloader_resumes_at_every_boundary(make: Make, workers: int, every: int) -> None:
    options: dict[str, Any] = {"snapshot_every_n_steps": every, "persistent_workers": workers > 0}
    whole = rows(make(epochs=2))
    for stop in (0, 1, workers, 10, len(whole) - 1, len(whole)):
        first = stateful(make(epochs=2), workers, **options)
        assert (rows(islice(first, stop)) if stop else []) == whole[:stop]
        state = through_json(first.state_dict())
        again = stateful(make(epochs=2), workers, **options)
        again.load_state_dict(state)
        assert rows(again) == whole[stop:]
        assert TokenLoader.state_from(state) == reached(make(epochs=2), stop)


@pytest.mark.parametrize(("workers", "persistent"), [(0, False), (2, True), (2, False)])
def test_after_the_end_comes_the_next_run(make: Make, workers: int, persistent: bool) -> None:
    reference = make()
    runs = [rows(reference) for _ in range(2)]
    first = stateful(make(), workers, persistent_workers=persistent)
    assert rows(first) == runs[0]
    state = through_json(first.state_dict())
    loader = make()
    if workers and not persistent:
        loader.set_epoch(1)
    again = stateful(loader, workers, persistent_workers=persistent)
    again.load_state_dict(state)
    assert rows(again) == runs[1]
    elsewhere = make()
    elsewhere.load_state_dict(TokenLoader.state_from(state))
    assert rows(elsewhere) == runs[1]


def reached(loader: TokenLoader, steps: int) -> dict[str, Any]:
    """The state of a loader after so many steps."""
    for _ in islice(loader, steps):
        pass
    return loader.state_dict()


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stateful_dataloader_over_samples_resumes(dataset: TokenDataset, workers: int) -> None:
    def opened() -> StatefulDataLoader[Any]:
        return StatefulDataLoader(dataset, batch_size=7, num_workers=workers)

    whole = [batch["input_ids"].tolist() for batch in opened()]
    for stop in (0, 5, len(whole)):
        first = opened()
        assert [batch["input_ids"].tolist() for batch in (islice(first, stop) if stop else ())] == whole[:stop]
        again = opened()
        again.load_state_dict(first.state_dict())
        assert [batch["input_ids"].tolist() for batch in again] == whole[stop:]


def test_a_state_of_workers_moves_to_another_world_size(make: Make) -> None:
    source = stateful(make(), 2)
    head = rows(islice(source, 9))
    state = TokenLoader.state_from(through_json(source.state_dict()))
    ranks = [make(batch_size=2, rank=rank, world_size=3) for rank in range(3)]
    for rank in ranks:
        rank.load_state_dict(state)
    tail = [sorted(row for step in steps for row in step) for steps in zip(*map(rows, ranks), strict=True)]
    assert [*map(sorted, head), *tail] == [*map(sorted, rows(make()))]


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_loop_fetched_ahead_is_taken_back(make: Make, workers: int) -> None:
    source = stateful(make(), workers)
    assert len(rows(islice(source, 9))) == 9
    for delivered in (0, 3, 8, 9):
        assert TokenLoader.state_from(source.state_dict(), delivered) == reached(make(), delivered)
    start = make().state_dict()
    assert TokenLoader.state_from(start, 8) == reached(make(), 8)


def test_the_state_of_a_worker_stays_with_that_many_workers(make: Make) -> None:
    source = stateful(make(), 2)
    assert len(rows(islice(source, 3))) == 3
    state = source.state_dict()
    of_a_worker = state["_snapshot"]["_worker_snapshots"]["worker_1"]["fetcher_state"]["dataset_iter_state"]
    with pytest.raises(StateMismatch, match="must come back to the same worker of as many, got 'worker 1 of 2'"):
        make().load_state_dict(of_a_worker)
    with pytest.raises(StateMismatch, match="must hold the state of a TokenLoader, got 'a record of model'"):
        TokenLoader.state_from({"model": {"weights": 1}})
    with pytest.raises(StateMismatch, match="no more steps can be taken back than there were"):
        TokenLoader.state_from(make().state_dict(), -1)


def test_a_mixture_keeps_its_weights_through_a_stateful_dataloader(dataset: TokenDataset, tmp_path: Path) -> None:
    write_set(tmp_path / "other", random_documents(40, seed=1))
    with TokenDataset(tmp_path / "other", seq_len=16) as other:

        def mixed() -> TokenLoader:
            mixture = Mixture({"a": (dataset, 0.5), "b": (other, 0.5)}, schedule=[(60, {"a": 0.9, "b": 0.1})])
            return TokenLoader(mixture, batch_size=5, shuffle=SMALL)

        whole = rows(mixed())
        for stop in (3, 14, 20):
            source = stateful(mixed(), 2, snapshot_every_n_steps=6)
            assert rows(islice(source, stop)) == whole[:stop]
            state = through_json(source.state_dict())
            resumed = stateful(mixed(), 2)
            resumed.load_state_dict(state)
            assert rows(resumed) == whole[stop:]
            loader = mixed()
            loader.load_state_dict(TokenLoader.state_from(state))
            assert rows(loader) == whole[stop:]
