"""Trial "packing": a process that writes one token data set after another, killed at any moment.

After each kill: what has no manifest does not open; what opens holds, in every file, the bytes of a set that was written
in peace; a set that was acknowledged is there. The next process resumes the set that was being written.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stoker.errors import AlreadyExists, StokerError
from stoker.loaders.writer import TokenWriter
from stoker.testing.kill import Death, Recorder, Trial

_SHARD_BYTES = 8 << 10
_BLOCK_TOKENS = 512


def documents() -> list[NDArray[np.uint16]]:
    """28 documents of 1 to 5,000 tokens in 4 shards: most fill part of one, one reaches over two or three."""
    random = np.random.default_rng(7)
    lengths = np.append(random.integers(1, 900, 26), [5000, 1])
    random.shuffle(lengths)
    return [random.integers(1, 50_000, length, dtype=np.uint16) for length in lengths]


_DOCUMENTS = documents()


def write_set(root: Path, **options: Any) -> None:
    """Write the documents as a data set, or go on where an earlier writer was stopped."""
    with TokenWriter(
        root, dtype="uint16", eos_id=0, shard_bytes=_SHARD_BYTES, block_tokens=_BLOCK_TOKENS, **options
    ) as writer:
        for tokens in _DOCUMENTS[writer.resumed_documents :]:
            writer.write(tokens)


def sets_in(directory: Path) -> list[Path]:
    return sorted(directory.glob("set-*"))


def work(directory: Path, recorder: Recorder) -> None:
    """Finish the newest data set, or begin the next one if it is finished."""
    found = sets_in(directory)
    number = int(found[-1].name.removeprefix("set-")) if found else 0
    with recorder.in_flight():
        try:
            write_set(directory / f"set-{number:08d}", resume=True)
        except AlreadyExists:
            number += 1
            write_set(directory / f"set-{number:08d}", resume=True)
    recorder.acknowledge(number)


class Check:
    """What must hold after each kill. Finished sets are removed once they were found to be right."""

    def __init__(self, reference: Path) -> None:
        write_set(reference)
        self._expected = files_in(reference)
        self._finished = -1

    def __call__(self, directory: Path, death: Death) -> None:
        found = sets_in(directory)
        for root in found:
            number = int(root.name.removeprefix("set-"))
            if (root / "manifest.json").exists():
                self._check_whole(root, is_newest=root == found[-1])
                self._finished = max(self._finished, number)
            else:
                assert root == found[-1], f"{root.name} was left unfinished"
                assert number > self._finished, f"{root.name} was finished and is not any more"
                _check_closed(root)
        assert self._finished >= death.acknowledged, f"set {death.acknowledged} was acknowledged and is not there"
        for root in found[:-1]:
            _remove(root)

    def _check_whole(self, root: Path, *, is_newest: bool) -> None:
        from stoker.loaders import TokenDataset

        actual = files_in(root)
        for name, data in self._expected.items():
            assert name in actual, f"{root.name} has a manifest and lacks {name}"
            assert actual[name] == data, f"{root.name}/{name} differs from the set that was written in peace"
        more = sorted(actual.keys() - self._expected.keys())
        # Until somebody asks to resume it, a finished set may still hold the notes of the writer that was killed.
        assert not more or is_newest, f"{root.name} keeps {more}"
        with TokenDataset(root, seq_len=64) as dataset:
            assert len(dataset) > 0
            dataset[len(dataset) - 1]


def _check_closed(root: Path) -> None:
    from stoker.loaders import TokenDataset

    try:
        TokenDataset(root, seq_len=64).close()
    except StokerError:
        return
    raise AssertionError(f"{root.name} has no manifest and opens all the same")


def files_in(root: Path) -> dict[str, bytes]:
    """Every file below a directory, by its path from there."""
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def _remove(root: Path) -> None:
    for path in sorted(root.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    root.rmdir()


def trial(directory: Path) -> Trial:
    """The trial, with its reference set below `directory`."""
    return Trial(name="packing", program="tests.faults.packing:work", check=Check(directory / "reference"))
