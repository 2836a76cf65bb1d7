"""The examples for other people's trainers, at two ranks and with a resume: no row twice, none skipped, none dealt anew.

And as one process, without a launcher.
"""

import json
import os
import subprocess
import sys
import zlib
from itertools import islice
from pathlib import Path

import pytest

from stoker.loaders import TokenDataset, TokenLoader
from tests.loaders.token_sets import random_documents, write_set

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("example", "library"), [("hf_trainer", "transformers.trainer"), ("lightning_trainer", "pytorch_lightning")]
)
def test_a_trainer_of_two_ranks_trains_each_row_once_and_resumes_exactly(
    example: str, library: str, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    write_set(data, random_documents(60, largest=255))
    command = [sys.executable, "-m", "tests.loaders.trainer_ranks", str(ROOT / "examples" / f"{example}.py")]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, library, str(data), str(tmp_path)],
        check=False,
        cwd=ROOT,
        env={**os.environ, **offline},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    with TokenDataset(data, seq_len=16) as dataset:
        steps = [
            sorted(zip(batch["position"].tolist(), map(zlib.crc32, batch["input_ids"].numpy()), strict=True))
            for batch in islice(TokenLoader(dataset, batch_size=8), 8)
        ]
    assert [step[0][0] for step in steps] == list(range(0, 64, 8))
    for run, first, last in (("first", 0, 6), ("second", 4, 8)):
        files = [(tmp_path / f"{run}.{rank}").read_text().splitlines() for rank in range(2)]
        ranks = [list(map(json.loads, lines)) for lines in files]
        assert [step for step, *_ in ranks[0]] == [step for step, *_ in ranks[1]] == list(range(first, last))
        together = [sorted((*row,) for _, *rows in both for row in rows) for both in zip(*ranks, strict=True)]
        assert together == steps[first:last]
    alone = [json.loads(line)[1:] for line in (tmp_path / "alone-rows.0").read_text().splitlines()]
    assert [sorted(map(tuple, rows)) for rows in alone] == [steps[0][:4], steps[0][4:]]
