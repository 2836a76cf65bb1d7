"""Batches in a real causal model of transformers and in torch's varlen attention: the loss is that of each document alone."""

import inspect
from collections.abc import Iterator
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

from stoker.loaders import TokenDataset, TokenLoader
from tests.loaders.token_sets import random_documents, write_set

SEQ_LEN, VOCAB = 48, 64


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For a model this small torch's threads wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("transformers")
    write_set(path / "set", random_documents(90, largest=VOCAB - 1, mean=16), eos_id=0)
    return path / "set"


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.3,  # so that attention tells
        use_cache=False,  # with a cache transformers does not look for restarts in position_ids
    )
    model = LlamaForCausalLM(config).double()
    assert isinstance(model, LlamaForCausalLM)
    return model


@pytest.fixture
def batches(root: Path) -> Iterator[list[dict[str, Any]]]:
    with TokenDataset(root, seq_len=SEQ_LEN, packing="best_fit", labels="same") as dataset:
        yield list(islice(TokenLoader(dataset, batch_size=3), 3))


def close(loss: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-6, atol=0)  # transformers takes float32 logits


def loss_by_hand(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Sum over one document alone: minus the log of the probability that each token had before it came."""
    with torch.no_grad():
        probabilities = model(input_ids=tokens[None]).logits[0, :-1].exp()
    chosen = probabilities.gather(1, tokens[1:, None])[:, 0]
    return torch.log(probabilities.sum(1) / chosen).sum()


@pytest.mark.parametrize("documents", [False, True])
def test_the_loss_of_a_causal_model_is_the_one_computed_by_hand(
    root: Path, model: LlamaForCausalLM, documents: bool
) -> None:
    with (
        TokenDataset(root, seq_len=SEQ_LEN, labels="same", documents=documents) as same,
        TokenDataset(root, seq_len=SEQ_LEN, documents=documents) as shifted,
    ):
        loaders = (TokenLoader(dataset, batch_size=3) for dataset in (same, shifted))
        for one, other in zip(*(islice(loader, 4) for loader in loaders), strict=True):
            with torch.no_grad():
                out = model(input_ids=one["input_ids"], labels=one["labels"])
            if not documents:
                by_hand = torch.stack([loss_by_hand(model, row) for row in one["input_ids"]]).sum()
                close(out.loss, by_hand / (3 * (SEQ_LEN - 1)))
            # The labels of losses that don't shift have one token more in each row: that after its last.
            labels = other["labels"].clone()
            labels[:, -1] = -100
            close(out.loss, cross_entropy(out.logits.flatten(0, 1), labels.view(-1)))


@pytest.mark.parametrize("told_by", ["position_ids", "cu_seqlens"])
def test_packed_documents_lose_what_each_loses_alone(
    batches: list[dict[str, Any]], model: LlamaForCausalLM, told_by: Literal["position_ids", "cu_seqlens"]
) -> None:
    for batch in batches:
        given = {name: batch[name] for name in ("input_ids", "position_ids", "labels")}
        if told_by == "cu_seqlens":  # one row for the whole batch, and a mask with one block for each piece
            given = {name: value.view(1, -1) for name, value in given.items()}
            piece = torch.bucketize(torch.arange(3 * SEQ_LEN), batch["cu_seqlens"], right=True)
            given["attention_mask"] = ((piece[:, None] == piece) & torch.ones(3 * SEQ_LEN, 3 * SEQ_LEN).tril().bool())[
                None, None
            ]
        with torch.no_grad():
            loss = model(**given).loss
        alone, tokens = torch.zeros((), dtype=torch.float64), 0
        flat, owners = batch["input_ids"].view(-1), batch["doc_ids"].view(-1)
        pieces = [(start, end) for start, end in pairwise(batch["cu_seqlens"].tolist()) if owners[start] >= 0]
        assert len(pieces) > 3
        for start, end in pieces:
            alone += loss_by_hand(model, flat[start:end])
            tokens += end - start - 1
        assert tokens == (batch["labels"] != -100).sum() == batch["loss_mask"].sum()
        close(loss, alone / tokens)
    with torch.no_grad():  # and it is another where documents see each other
        seen = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert abs(seen - loss) > 1e-3


def test_borders_are_those_that_transformers_finds(batches: list[dict[str, Any]]) -> None:
    for batch in batches:
        (from_q, from_k), (longest_q, longest_k) = prepare_fa_kwargs_from_position_ids(
            batch["position_ids"].view(1, -1)
        )
        assert torch.equal(from_q, batch["cu_seqlens"])
        assert torch.equal(from_k, batch["cu_seqlens"])
        assert longest_q == longest_k == batch["max_seqlen"]


def test_a_batch_fits_the_signature_of_varlen_attention(root: Path) -> None:
    with TokenDataset(root, seq_len=SEQ_LEN, packing="best_fit") as dataset:
        for size in (None, 60):
            batch = next(TokenLoader(dataset, batch_size=3, cu_seqlens_size=size))
            borders, longest = batch["cu_seqlens"].to("meta"), batch["max_seqlen"]
            query = torch.empty(3 * SEQ_LEN, 2, 16, dtype=torch.bfloat16, device="meta")
            arguments: dict[str, Any] = {"query": query, "key": query, "value": query, "window_size": (-1, 0)}
            arguments |= {"cu_seq_q": borders, "cu_seq_k": borders, "max_q": longest, "max_k": longest}
            inspect.signature(varlen_attn).bind(**arguments)
            # The kernel itself runs on accelerators only; its schema takes an int, no tensor, for the longest.
            out = varlen_attn(**arguments)
            assert isinstance(out, Tensor)
            assert out.shape == query.shape


def test_all_tokens_of_an_epoch_are_accounted_for(root: Path, model: LlamaForCausalLM) -> None:
    with TokenDataset(root, seq_len=SEQ_LEN, packing="best_fit", labels="same") as dataset:
        loader = TokenLoader(dataset, batch_size=1)
        trained = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in loader)  # as the model shifts them
        stats, report = loader.stats(), dataset.packing_report()
    assert trained == stats.trained_tokens == report.trained_tokens
    assert stats.tokens == stats.trained_tokens + report.masked_tokens + stats.padded_tokens
    assert report.kept_tokens + report.cropped_tokens == dataset.manifest.tokens
