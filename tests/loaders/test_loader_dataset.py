"""The loader over a real data set on disk: the right tokens, exact resumes, stock DataLoader, damage told by next."""

import hashlib
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from stoker.errors import CorruptBlock, StateMismatch
from stoker.loaders import TokenDataset, TokenLoader, TokenWriter
from stoker.loaders.order import OrderV1, Window
from stoker.storage import TieredCache, open_store
from stoker.testing.s3 import S3Server

SEQ_LEN = 32
SMALL = Window(lanes=3, blocks=2)


def write(directory: Path, dtype: str, *, first: int = 0, tokens: int = 60_011) -> np.ndarray:
    stream = ((np.arange(tokens) * 2_654_435_761 + first) % 65_521).astype(dtype)
    with TokenWriter(directory, dtype=dtype, eos_id=None, shard_bytes=1 << 15, block_tokens=1 << 10) as writer:
        for start in range(0, tokens, 777):
            writer.write(stream[start : start + 777])
    return stream


@pytest.fixture(params=["uint16", "uint32"])
def data(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[TokenDataset, np.ndarray]]:
    stream = write(tmp_path / "data", request.param)
    with TokenDataset(tmp_path / "data", seq_len=SEQ_LEN) as dataset:
        yield dataset, stream


def test_an_epoch_delivers_the_tokens_that_were_written(data: tuple[TokenDataset, np.ndarray]) -> None:
    dataset, stream = data
    assert dataset.manifest.shards > 2
    seen = []
    with TokenLoader(dataset, batch_size=8, seed=1, shuffle=SMALL) as loader:
        assert isinstance(loader.order, OrderV1)
        assert loader.order.lane_samples > 0
        for batch in loader:
            samples = loader.order(batch["position"].numpy())
            seen += samples.tolist()
            windows = samples[:, None] * SEQ_LEN + np.arange(SEQ_LEN)
            assert np.array_equal(batch["input_ids"].numpy(), stream[windows])
            assert np.array_equal(batch["labels"].numpy(), stream[windows + 1])
    assert len(seen) == len(set(seen)) == len(dataset) // 8 * 8


def test_a_resume_in_another_place_at_another_world_size_goes_on_exactly(tmp_path: Path) -> None:
    write(tmp_path / "here", "uint16")
    write(tmp_path / "there", "uint16")
    write(tmp_path / "else", "uint16", first=1)
    here, there, other = (TokenDataset(tmp_path / name, seq_len=SEQ_LEN) for name in ("here", "there", "else"))
    whole = TokenLoader(here, batch_size=12, shuffle=SMALL, epochs=2)
    steps = [sorted(batch["input_ids"].tolist()) for batch in whole]
    loader = TokenLoader(here, batch_size=12, shuffle=SMALL, epochs=2)
    for _ in islice(loader, 200):
        pass
    state = json.loads(json.dumps(loader.state_dict()))
    ranks = [TokenLoader(there, batch_size=4, shuffle=SMALL, epochs=2, rank=rank, world_size=3) for rank in range(3)]
    for rank in ranks:
        rank.load_state_dict(state)
    resumed = [
        sorted(row for batch in batches for row in batch["input_ids"].tolist()) for batches in zip(*ranks, strict=True)
    ]
    assert resumed == steps[200:]
    with pytest.raises(StateMismatch, match="fingerprint is"):
        TokenLoader(other, batch_size=12, shuffle=SMALL).load_state_dict(state)
    for dataset in (here, there, other):
        dataset.close()


def test_a_remote_data_set_gives_the_stream_of_a_local_one(
    s3_server: S3Server, node_cache: TieredCache, tmp_path: Path
) -> None:
    url, options = s3_server.url("stoker", "loader"), s3_server.storage_options
    write(tmp_path / "data", "uint16")
    for file in sorted((tmp_path / "data").rglob("*")):
        if file.is_file():
            with open_store(url, **options) as store:
                store.put(str(file.relative_to(tmp_path / "data")), file.read_bytes())
    digests = []
    for dataset in (
        TokenDataset(tmp_path / "data", seq_len=SEQ_LEN),
        TokenDataset(url, seq_len=SEQ_LEN, cache=node_cache, storage_options=options),
    ):
        digest = hashlib.sha256()
        with dataset, TokenLoader(dataset, batch_size=8, shuffle=SMALL, epochs=2, prefetch_blocks=4) as loader:
            for batch in loader:
                for name in ("position", "input_ids", "labels"):
                    digest.update(batch[name].numpy().tobytes())
        digests.append(digest.hexdigest())
    assert digests[0] == digests[1]
    assert not dataset.is_local


def test_explain_leads_back_to_the_documents(data: tuple[TokenDataset, np.ndarray]) -> None:
    dataset, stream = data
    loader = TokenLoader(dataset, batch_size=4, shuffle=SMALL)
    batches = list(loader)
    for step in (0, 7, len(batches) - 1):
        for origin in loader.explain(step):
            row = batches[step]["input_ids"][origin.row]
            told = np.concatenate([stream[777 * s.document :][s.start : s.end] for s in origin.spans])
            assert np.array_equal(told[:-1], row.numpy())


def test_damage_comes_out_of_next_and_the_position_stays(tmp_path: Path) -> None:
    write(tmp_path, "uint16")
    file = sorted((tmp_path / "data").iterdir())[1]
    content = bytearray(file.read_bytes())
    middle = len(content) // 2
    content[middle] ^= 1
    file.write_bytes(content)
    with TokenDataset(tmp_path, seq_len=SEQ_LEN) as dataset:
        loader = TokenLoader(dataset, batch_size=4, shuffle=SMALL)
        delivered = 0
        with pytest.raises(CorruptBlock, match=file.name):
            for _ in loader:
                delivered += 1
        assert loader.state_dict()["position"] == delivered * 4
        content[middle] ^= 1
        file.write_bytes(content)  # healed
        assert sum(1 for _ in loader) == len(loader) - delivered
