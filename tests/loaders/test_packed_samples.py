"""Packed samples and batches: every token where the plain definition puts it, at any world size, after any stop."""

import hashlib
import json
import pickle
import tempfile
from collections.abc import Callable
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.utils.data import DataLoader

import stoker.loaders._packed as packed_module
from stoker.errors import ConfigError, CorruptBlock, EmptyInput, StateMismatch, UnsupportedError
from stoker.loaders import BestFit, Pad, TokenDataset, TokenLoader
from stoker.loaders.loader import Batch
from stoker.loaders.order import Window
from stoker.loaders.packing import Concat, Packer, resolve
from stoker.storage import TieredCache
from stoker.testing.s3 import S3Server
from tests.loaders.plain_packing import plain_rows, plain_sample
from tests.loaders.token_sets import flip_bit, random_documents, stream_of, write_set

KEYS = ("input_ids", "labels", "position_ids", "doc_ids", "loss_mask")
SMALL = Window(lanes=3, blocks=2)
ALL_PACKINGS: list[Any] = [
    "concat",
    *(kind(long=long) for kind in (BestFit, Pad) for long in ("split", "truncate", "drop")),
]


def named(packing: Any) -> str:
    return resolve(packing, "").name


def opened(root: Path | str, *, packing: Any, seq_len: int = 16, **options: Any) -> TokenDataset:
    return TokenDataset(root, seq_len=seq_len, packing=packing, documents=True, **options)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """307 documents of 1 to 80 tokens in blocks of 64, 4 blocks a shard."""
    write_set(tmp_path / "set", random_documents(307), eos_id=0)
    return tmp_path / "set"


# --- samples ----------------------------------------------------------------------------------------------------------


@given(
    lengths=st.lists(st.one_of(st.integers(1, 12), st.integers(1, 90)), min_size=1, max_size=30),
    seq_len=st.integers(1, 50),
    block_tokens=st.sampled_from([2, 8, 32, 64]),
    blocks_per_shard=st.integers(1, 5),
    packing=st.sampled_from(ALL_PACKINGS),
    labels=st.sampled_from(["shifted", "same"]),
    eos_id=st.sampled_from([None, 7]),
    seed=st.integers(0, 9),
)
@settings(max_examples=80, deadline=None)
def test_samples_and_counts_are_those_of_the_plain_definition(
    lengths: list[int],
    seq_len: int,
    block_tokens: int,
    blocks_per_shard: int,
    packing: Any,
    labels: Any,
    eos_id: int | None,
    seed: int,
) -> None:
    random = np.random.default_rng(seed)
    documents = [random.integers(8, 60_000, n) for n in lengths]
    stored = [stream_of([document], eos_id) for document in documents]
    tokens = sum(map(len, stored))
    blocks_per_shard = max(blocks_per_shard, tokens // block_tokens // 10)  # each shard costs two fsyncs
    packer = resolve(packing, "")
    rows, window_rows = plain_rows(packer, [len(d) for d in stored], seq_len=seq_len, order_tokens=block_tokens)
    with tempfile.TemporaryDirectory() as root:
        write_set(root, documents, block_tokens=block_tokens, blocks_per_shard=blocks_per_shard, eos_id=eos_id)
        if not rows:
            with pytest.raises(EmptyInput):
                opened(root, packing=packing, seq_len=seq_len, labels=labels)
            return
        with opened(root, packing=packing, seq_len=seq_len, labels=labels) as dataset:
            assert (len(dataset), dataset.samples_per_block) == (len(rows), window_rows)
            wanted = random.permutation(len(rows))
            samples = dataset.__getitems__(wanted.tolist())
            total = dict.fromkeys(("kept", "padded", "trained"), 0)
            for number, sample in zip(wanted.tolist(), samples, strict=True):
                row = rows[number]
                expected = plain_sample(row, stored, seq_len=seq_len, labels=labels, padding=eos_id or 0)
                assert {name: value.int().tolist() for name, value in sample.items()} == expected
                told = [(span.document, i) for span in dataset.explain(number) for i in range(span.start, span.end)]
                assert told == [(document, at + i) for document, at, length in row for i in range(length)]
                total["kept"] += len(told)
                total["padded"] += expected["doc_ids"].count(-1)
                total["trained"] += sum(expected["loss_mask"])
            report = dataset.packing_report()
            assert (report.kept_tokens, report.padded_tokens, report.trained_tokens) == tuple(total.values())
            assert report.kept_tokens + report.cropped_tokens == tokens
            assert report.kept_tokens + report.padded_tokens == report.rows * seq_len == len(dataset) * seq_len
            assert report.trained_tokens + report.masked_tokens == report.kept_tokens
            full = [sum(length for _, _, length in row) == seq_len for row in rows]
            assert report.max_pieces == max(len(row) + (not whole) for row, whole in zip(rows, full, strict=True))


def test_a_sample_has_five_tensors_of_its_own(root: Path) -> None:
    with opened(root, packing="best_fit") as dataset:
        sample = dataset[3]
        assert {name: (tuple(value.shape), value.dtype) for name, value in sample.items()} == {
            **dict.fromkeys(KEYS[:4], ((16,), torch.int64)),
            "loss_mask": ((16,), torch.bool),
        }
        sample["input_ids"].zero_()
        assert dataset[3]["input_ids"].any()


def test_packings_other_than_concat_carry_borders_unasked(root: Path) -> None:
    with TokenDataset(root, seq_len=16, packing="pad") as dataset:
        assert set(dataset[0]) == set(KEYS)
    with TokenDataset(root, seq_len=16) as dataset:
        assert set(dataset[0]) == {"input_ids", "labels"}
        with pytest.raises(ConfigError, match="only packed samples and documents=True have borders"):
            dataset.gather_documents(dataset.plan(np.array([0])), 0, 1, packed_module.DocumentRows.empty(1, 16))
        report = dataset.packing_report()
        assert report.kept_tokens == report.trained_tokens == len(dataset) * 16
        assert report.kept_tokens + report.cropped_tokens == dataset.manifest.tokens


def test_concat_with_borders_has_the_tokens_of_concat_without(root: Path) -> None:
    with TokenDataset(root, seq_len=16) as plain, opened(root, packing="concat") as dataset:
        assert (len(dataset), dataset.samples_per_block) == (len(plain), plain.samples_per_block)
        for one, other in zip(plain, dataset, strict=True):  # type: ignore[call-overload]
            assert torch.equal(one["input_ids"], other["input_ids"])
            mask = other["loss_mask"]
            assert torch.equal(one["labels"][mask], other["labels"][mask])


def test_a_plan_of_packed_rows_fills_plain_arrays_too(root: Path) -> None:
    with opened(root, packing="best_fit") as dataset:
        input_ids, labels = np.empty((3, 16), np.int64), np.empty((3, 16), np.int64)
        dataset.gather(np.array([5, 1, 5]), input_ids, labels)
        assert input_ids.tolist() == [dataset[i]["input_ids"].tolist() for i in (5, 1, 5)]
        assert labels.tolist() == [dataset[i]["labels"].tolist() for i in (5, 1, 5)]
        with pytest.raises(IndexError):
            dataset[len(dataset)]


def test_a_document_longer_than_the_keys_of_a_window_is_split_over_shards(tmp_path: Path) -> None:
    document = np.arange(1, 2000)
    write_set(tmp_path, [document, np.arange(5)])
    with opened(tmp_path, packing="pad", seq_len=100) as dataset:
        rows = [dataset[i] for i in range(20)]
    assert torch.cat([row["input_ids"] for row in rows])[:1999].tolist() == document.tolist()
    assert [row["labels"][-1].item() for row in rows[:19]] == list(range(101, 2001, 100))
    assert rows[19]["labels"][98:].tolist() == [-100, -100]


def test_a_packing_that_reads_all_lengths_refuses_too_many_documents(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_module, "_MAX_DOCUMENTS", 306)
    for packing in ("pad", BestFit(long="drop")):
        with pytest.raises(UnsupportedError, match="reads all document lengths .* 306 at most, got '307 documents'"):
            opened(root, packing=packing)
    for packing in ("concat", "best_fit"):
        opened(root, packing=packing).close()


def test_a_packing_that_leaves_no_document_is_told(tmp_path: Path) -> None:
    write_set(tmp_path, [np.arange(1, 100)])
    with pytest.raises(EmptyInput, match="packing best_fit-1/drop must leave a document, got 'seq_len 16'"):
        opened(tmp_path, packing=BestFit(long="drop"))


def test_plans_that_are_let_go_are_made_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(root, packing="best_fit") as dataset:
        expected = [sample["input_ids"].tolist() for sample in dataset]  # type: ignore[attr-defined]
    monkeypatch.setattr(packed_module, "_KEPT_PLANS_BYTES", 1)
    with opened(root, packing="best_fit") as dataset:
        for i in np.random.default_rng(0).permutation(len(dataset)).tolist():
            assert dataset[i]["input_ids"].tolist() == expected[i]
            assert dataset._packed is not None
            assert len(dataset._packed._windows) == 1


def test_a_flipped_bit_is_told_and_never_packed(root: Path) -> None:
    with opened(root, packing="best_fit") as dataset:
        everything = [sample["input_ids"].tolist() for sample in dataset]  # type: ignore[attr-defined]
        start, _ = dataset._tables.byte_range(1, 5)
    flip_bit(root / "data" / "00000001.arrow", start + 9)
    damaged = 0
    with opened(root, packing="best_fit") as dataset:
        for i, expected in enumerate(everything):
            try:
                assert dataset[i]["input_ids"].tolist() == expected
            except CorruptBlock as error:
                assert error.start == start
                damaged += 1
    assert damaged == dataset.samples_per_block == 4


def test_a_packed_data_set_works_in_worker_processes(root: Path) -> None:
    with opened(root, packing=BestFit(long="truncate"), labels="same") as dataset:
        expected = [sample["labels"].tolist() for sample in dataset]  # type: ignore[attr-defined]
        for start in ("fork", "spawn"):
            loader = DataLoader(dataset, batch_size=7, num_workers=1, multiprocessing_context=start)
            assert [row for batch in loader for row in batch["labels"].tolist()] == expected
        with pickle.loads(pickle.dumps(dataset)) as again:
            assert again.packing == dataset.packing == "best_fit-1/truncate"


# --- batches ----------------------------------------------------------------------------------------------------------


def step_digest(loaders: list[TokenLoader], steps: int | None = None) -> tuple[str, int]:
    """All rows of the steps in order of position, with all that belongs to them."""
    digest, count = hashlib.sha256(), 0
    for _ in range(steps) if steps is not None else iter(int, 1):
        batches = [next(loader, None) for loader in loaders]
        if None in batches:
            assert batches == [None] * len(loaders)
            break
        count += 1
        rows = [
            (position, [batch[name][row].int().tolist() for name in KEYS])
            for batch in batches
            if batch is not None
            for row, position in enumerate(batch["position"].tolist())
        ]
        digest.update(json.dumps(sorted(rows)).encode())
    return digest.hexdigest(), count


@pytest.mark.parametrize("packing", ALL_PACKINGS, ids=named)
def test_packed_steps_are_the_same_at_every_world_size_with_stops_in_between(root: Path, packing: Any) -> None:
    with opened(root, packing=packing, seq_len=24) as dataset:
        options: dict[str, Any] = {"seed": 5, "shuffle": SMALL, "epochs": 2, "skip": [(20, 33)]}

        def loaders(world_size: int) -> list[TokenLoader]:
            return [
                TokenLoader(dataset, batch_size=6 // world_size, rank=rank, world_size=world_size, **options)
                for rank in range(world_size)
            ]

        whole, steps = step_digest(loaders(1))
        assert steps == (2 * len(dataset) - 13) // 6
        for world_size in (2, 3, 6):
            assert step_digest(loaders(world_size)) == (whole, steps)
        reference = loaders(1)
        expected = [step_digest(reference, count)[0] for count in (3, 2, 5, 1, steps)]
        got, state = [], None
        for world_size, count in zip((2, 1, 3, 6, 2), (3, 2, 5, 1, steps), strict=True):
            ranks = loaders(world_size)
            for rank in ranks:
                if state is not None:
                    rank.load_state_dict(state)
            got.append(step_digest(ranks, count)[0])
            states = [json.dumps(rank.state_dict()) for rank in ranks]
            assert len(set(states)) == 1
            state = json.loads(states[0])
        assert got == expected


def test_an_epoch_delivers_every_token_once_and_counts_it(root: Path) -> None:
    for packing in ALL_PACKINGS:
        with opened(root, packing=packing) as dataset:
            loader = TokenLoader(dataset, batch_size=1, shuffle=SMALL)
            seen, trained, padded = [], 0, 0
            for batch in loader:
                real = batch["doc_ids"] >= 0
                seen += batch["doc_ids"][real].tolist()
                trained += int((batch["labels"] != -100).sum())
                padded += int((~real).sum())
                assert torch.equal(batch["loss_mask"], batch["labels"] != -100)
            stats, report = loader.stats(), dataset.packing_report()
            assert (stats.tokens, stats.trained_tokens, stats.padded_tokens) == (
                report.rows * 16,
                report.trained_tokens,
                report.padded_tokens,
            )
            assert (len(seen), trained, padded) == (report.kept_tokens, report.trained_tokens, report.padded_tokens)
            if packing == BestFit():
                stored = np.concatenate([dataset._tables.lengths(shard) for shard in range(dataset.manifest.shards)])
                assert np.bincount(seen).tolist() == stored.tolist()


@pytest.mark.parametrize("packing", ALL_PACKINGS, ids=named)
def test_cu_seqlens_are_where_position_ids_restart(root: Path, packing: Any) -> None:
    # transformers derives the borders of a flattened batch from `position_ids == 0`; both must tell the same.
    with opened(root, packing=packing) as dataset:
        for batch in islice(TokenLoader(dataset, batch_size=5, shuffle=SMALL), 30):
            assert set(batch) == {*KEYS, "position", "cu_seqlens", "max_seqlen"}
            flat = batch["position_ids"].view(-1)
            cu_seqlens = batch["cu_seqlens"]
            assert (cu_seqlens.dtype, type(batch["max_seqlen"])) == (torch.int32, int)
            assert cu_seqlens.tolist() == [*torch.nonzero(flat == 0).ravel().tolist(), 5 * 16]
            assert batch["max_seqlen"] == cu_seqlens.diff().max() == flat.max() + 1
            for start, end in pairwise(cu_seqlens.tolist()):
                assert flat[start:end].tolist() == list(range(end - start))
                assert batch["doc_ids"].view(-1)[start:end].unique().numel() == 1


def test_cu_seqlens_of_a_fixed_size_end_with_empty_pieces(root: Path) -> None:
    with opened(root, packing="best_fit") as dataset:
        most = 4 * dataset.packing_report().max_pieces + 1
        free = TokenLoader(dataset, batch_size=4)
        fixed = TokenLoader(dataset, batch_size=4, cu_seqlens_size=most)
        for one, other in zip(free, fixed, strict=True):
            assert (other["cu_seqlens"].shape, other["cu_seqlens"].dtype) == ((most,), torch.int32)
            assert other["max_seqlen"] == 16
            pieces = len(one["cu_seqlens"])
            assert other["cu_seqlens"].tolist() == one["cu_seqlens"].tolist() + [64] * (most - pieces)
        small = TokenLoader(dataset, batch_size=4, cu_seqlens_size=5)
        with pytest.raises(ConfigError, match=r"cu_seqlens_size must hold the \d+ pieces of this batch and one, got 5"):
            list(small)
        with pytest.raises(ConfigError, match="cu_seqlens_size must be above batch_size = 4, got 4"):
            TokenLoader(dataset, batch_size=4, cu_seqlens_size=4)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
) -> torch.Tensor:
    """``torch.nn.attention.varlen.varlen_attn(window_size=(-1, 0))`` in its own words, on a machine without a GPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    out = torch.full_like(query, torch.nan)  # (tokens, heads, channels)
    for start, end in pairwise(cu_seq_q.tolist()):
        assert 0 <= end - start <= min(max_q, max_k)
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        out[start:end] = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(0, 1)
    return out


@pytest.mark.parametrize("size", [None, 200])
def test_varlen_attention_over_a_batch_is_attention_within_each_document(root: Path, size: int | None) -> None:
    documents = [stream_of([document], 0) for document in random_documents(307)]
    torch.manual_seed(0)
    embedding = torch.randn(65_536, 3, 2, 4)
    with opened(root, packing="best_fit", seq_len=128) as dataset:
        batch = next(TokenLoader(dataset, batch_size=3, cu_seqlens_size=size))
    q, k, v = embedding[batch["input_ids"].view(-1)].unbind(1)
    borders, longest = batch["cu_seqlens"], batch["max_seqlen"]
    packed = varlen_attention(q, k, v, borders, borders, longest, longest)
    # The same by one mask over each row: a token sees those of its own piece up to itself.
    pieces = (batch["position_ids"] == 0).cumsum(1)
    mask = (pieces[:, :, None] == pieces[:, None, :]) & torch.ones(128, 128).tril().bool()
    rows = [x.view(3, 128, 2, 4).transpose(1, 2) for x in (q, k, v)]
    masked = scaled_dot_product_attention(rows[0], rows[1], rows[2], attn_mask=mask[:, None])
    masked = masked.transpose(1, 2).reshape(-1, 2, 4)
    torch.testing.assert_close(packed, masked)
    # And by each whole document alone.
    alone = 0
    for number in batch["doc_ids"].unique().tolist():
        places = (batch["doc_ids"].view(-1) == number).nonzero().ravel()
        if number < 0 or len(places) != len(documents[number]):
            continue  # padding, or a document that is cut
        own = [x.transpose(0, 1) for x in embedding[torch.from_numpy(documents[number])].unbind(1)]
        expected = scaled_dot_product_attention(own[0], own[1], own[2], is_causal=True)
        torch.testing.assert_close(packed[places], expected.transpose(0, 1))
        alone += 1
    assert alone > 4


def test_a_model_that_shifts_loses_the_same_as_one_that_does_not_within_pieces(root: Path) -> None:
    # As transformers computes the loss of a flattened batch: logits of a token against the label of the next one.
    torch.manual_seed(0)
    logits_of = torch.randn(50, 50)
    with (
        opened(root, packing="best_fit", labels="same") as same,
        opened(root, packing="best_fit") as shifted,
    ):
        loaders = (TokenLoader(dataset, batch_size=3) for dataset in (same, shifted))
        for one, other in zip(*(islice(loader, 20) for loader in loaders), strict=True):
            logits = logits_of[one["input_ids"].view(-1) % 50]
            labels = torch.where(one["loss_mask"], one["labels"] % 50, -100).view(-1)
            got = cross_entropy(logits[:-1], labels[1:], reduction="sum")
            expected = torch.zeros(())
            for start, end in pairwise(one["cu_seqlens"].tolist()):
                if one["doc_ids"].view(-1)[start] >= 0:
                    tokens = one["input_ids"].view(-1)[start:end] % 50
                    expected += cross_entropy(logits_of[tokens[:-1]], tokens[1:], reduction="sum")
            torch.testing.assert_close(got, expected)
            # The other convention has these labels one place earlier, and those of documents that go on elsewhere.
            assert torch.equal(one["input_ids"], other["input_ids"])
            moved = other["labels"].view(-1)[:-1]
            assert torch.equal(moved[labels[1:] != -100], one["labels"].view(-1)[1:][labels[1:] != -100])
            assert other["loss_mask"].sum() >= one["loss_mask"].sum()


def test_a_state_of_another_packing_is_refused(root: Path) -> None:
    with opened(root, packing="best_fit") as one, opened(root, packing=BestFit(long="truncate")) as other:
        state = TokenLoader(one, batch_size=2).state_dict()
        assert state["packing"] == "best_fit-1/split"
        with pytest.raises(StateMismatch, match="packing is 'best_fit-1/split' in the state and 'best_fit-1/truncate'"):
            TokenLoader(other, batch_size=2).load_state_dict(state)
    with TokenDataset(root, seq_len=16) as plain, opened(root, packing="concat") as borders:
        TokenLoader(borders, batch_size=2).load_state_dict(TokenLoader(plain, batch_size=2).state_dict())


def test_kept_packed_batches_never_change(root: Path) -> None:
    with opened(root, packing="best_fit") as dataset:
        loader = TokenLoader(dataset, batch_size=3, shuffle=SMALL)
        copies: list[Batch] = []
        batches: list[Batch] = []
        for batch in islice(loader, 60):
            copies.append({k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
            batches.append({name: batch[name] for name in (*KEYS, "cu_seqlens")})
        for batch, copy in zip(batches, copies, strict=True):
            assert all(torch.equal(value, copy[name]) for name, value in batch.items())
        assert loader.stats().fresh_buffers == 58
        del batches, batch
        again = TokenLoader(dataset, batch_size=3, shuffle=SMALL)
        pointers = {batch["loss_mask"].data_ptr() for batch in again}
        assert (len(pointers), again.stats().fresh_buffers) == (2, 0)


@pytest.mark.parametrize("kept", KEYS)
def test_one_kept_tensor_keeps_its_memory(root: Path, kept: str) -> None:
    with opened(root, packing="best_fit") as dataset:
        loader = TokenLoader(dataset, batch_size=3)
        tensor = next(loader)[kept]
        copy = tensor.clone()
        for _ in islice(loader, 9):
            pass
        assert torch.equal(tensor, copy)
        assert loader.stats().fresh_buffers == 1


def test_explain_names_the_pieces_of_every_row(root: Path) -> None:
    with opened(root, packing="best_fit") as dataset:
        loader = TokenLoader(dataset, batch_size=4, shuffle=SMALL)
        batches = list(loader)
        for origin in loader.explain(9):
            row = batches[9]["doc_ids"][origin.row]
            assert [span.document for span in origin.spans for _ in range(span.start, span.end)] == row.tolist()


# --- remote -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def remote(s3_server: S3Server, node_cache: TieredCache, tmp_path: Path) -> Callable[..., TokenDataset]:
    """Opens a remote copy of the data set of `root`."""
    url = s3_server.url("stoker", f"packed/{tmp_path.name}")
    write_set(url, random_documents(307), eos_id=0, storage_options=s3_server.storage_options)

    def open_remote(**options: Any) -> TokenDataset:
        return opened(url, cache=node_cache, storage_options=s3_server.storage_options, **options)

    return open_remote


@pytest.mark.parametrize("packing", ["concat", "best_fit", BestFit(long="drop"), "pad"], ids=named)
def test_a_remote_set_gives_the_packed_stream_of_a_local_one(
    remote: Callable[..., TokenDataset], node_cache: TieredCache, root: Path, packing: Any
) -> None:
    digests = []
    for dataset in (opened(root, packing=packing), remote(packing=packing)):
        with dataset, TokenLoader(dataset, batch_size=4, shuffle=SMALL, prefetch_blocks=4) as loader:
            digests.append(step_digest([loader]))
    assert digests[0] == digests[1]
    assert not dataset.is_local
    assert node_cache.stats().misses <= dataset.manifest.blocks


def test_rows_of_one_window_fetch_the_block_of_that_window(
    remote: Callable[..., TokenDataset], node_cache: TieredCache
) -> None:
    with remote(packing="best_fit") as dataset:
        dataset.prefetch(np.array([9]))
        dataset.__getitems__([8, 9, 10, 11])  # all of window 2, with labels that lie in the next block
        assert node_cache.stats().misses == 1


def test_packers_agree_with_their_names() -> None:
    packers: list[Packer] = [Concat(), BestFit(), Pad()]
    assert [resolve(name, "") for name in ("concat", "best_fit", "pad")] == packers
    assert all(resolve(packing, "") is packing for packing in (BestFit(long="drop"), Pad(long="drop")))
