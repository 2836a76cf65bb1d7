"""Replays: one digest for every world size, with kills and resumes in between, and rows led back to their documents."""

import hashlib
import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stoker.cli import main
from stoker.errors import ConfigError, StateMismatch
from stoker.loaders import Mixture, TokenDataset, TokenLoader
from stoker.loaders._mixture_file import MixtureFile
from stoker.loaders.order import Window
from stoker.loaders.replay import Replay, digest_of_step, digest_of_stream, load_state, parse_range
from stoker.storage import open_store
from stoker.testing.s3 import S3Server
from tests.loaders.token_sets import flip_bit, random_documents, stream_of, write_set

SEQ_LEN = 16
SMALL = Window(lanes=6, blocks=2)
OPTIONS: dict[str, Any] = {"seed": 5, "shuffle": SMALL, "epochs": 2, "skip": [(50, 61), (700, 1003)]}
FLAGS = ["--seed", "5", "--shuffle", "window:6:2", "--epochs", "2", "--skip", "50:61", "--skip", "700:1003"]

# Mixes both packings, with a cap and weights that change.
MIXTURE = """
stop = "all_exhausted"

[sources.web]
url = "{web}"
weight = 0.75
packing = "best_fit"

[sources.code]
url = "{code}"
weight = 0.25
packing = "pad"
cap = 1.7

[[schedule]]
position = 900
weights = {{ web = 0.4, code = 0.6 }}
"""

# Reads the same mixture on from the state in a file as all ranks of a world size would, until it is killed: one step for
# each line of its input. Each step is kept with the state after it by one rename, as a trainer keeps a checkpoint.
_READER = """
import json, os, sys
from pathlib import Path
from stoker.loaders import BestFit, Mixture, Pad, TokenDataset
from stoker.loaders.order import Window
from stoker.loaders.replay import Replay, digest_of_step

urls, file, options = json.loads(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
kept = json.loads(file.read_text()) if file.exists() else {"state": None, "digests": []}
web = TokenDataset(urls["web"], seq_len=16, packing=BestFit())
code = TokenDataset(urls["code"], seq_len=16, packing=Pad())
schedule = [(900, {"web": 0.4, "code": 0.6})]
mix = Mixture({"web": (web, 0.75), "code": (code, 0.25)}, schedule=schedule, caps={"code": 1.7}, stop="all_exhausted")
options["shuffle"] = Window(**options["shuffle"])
for step in Replay(mix, state=kept["state"], **options):
    sys.stdin.readline()
    kept = {"state": step.state, "digests": [*kept["digests"], digest_of_step(step.batches).hex()]}
    file.with_suffix(".new").write_text(json.dumps(kept))
    os.replace(file.with_suffix(".new"), file)
    print(step.step, flush=True)
"""


@pytest.fixture
def stoker(capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process; returns exit code, output and errors."""

    def run(*arguments: object) -> tuple[int, str, str]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main([str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return int(exited.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set with a prime number of samples."""
    root = tmp_path_factory.mktemp("replay")
    documents = random_documents(400)
    tokens = stream_of(documents)[: 1009 * SEQ_LEN + 1]
    assert len(tokens) == 1009 * SEQ_LEN + 1
    ends = np.cumsum([len(document) for document in documents])
    write_set(root, [part for part in np.split(tokens, ends[ends < len(tokens)]) if len(part)])
    return str(root)


def replayed(url: str, *, global_batch: int, **options: Any) -> list[str]:
    with (
        TokenDataset(url, seq_len=SEQ_LEN) as dataset,
        Replay(dataset, global_batch=global_batch, **{**OPTIONS, **options}) as run,
    ):
        return [digest_of_step(step.batches).hex() for step in run]


@pytest.fixture(scope="module")
def urls(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Two data sets to mix."""
    root = tmp_path_factory.mktemp("replay-code")
    write_set(root, random_documents(311, mean=20, seed=3))
    return {"web": url, "code": str(root)}


@pytest.fixture
def mixture(urls: dict[str, str], tmp_path: Path) -> Path:
    """A file that mixes them."""
    file = tmp_path / "mix.toml"
    file.write_text(MIXTURE.format(**urls))
    return file


def test_the_digest_is_one_for_all_world_sizes_with_kills_in_between(
    stoker: Any, urls: dict[str, str], mixture: Path, tmp_path: Path
) -> None:
    asked = ["data", "replay", "--mixture", mixture, "--hash", "--seq-len", SEQ_LEN, "--global-batch", 120, *FLAGS]
    reports = []
    for world_size in (1, 2, 3, 4, 5, 8):
        code, out, err = stoker(*asked, "--json", "--world-size", world_size)
        assert code == 0, err
        reports.append(json.loads(out))
    digests = [step["sha256"] for step in reports[0]["steps"]]
    assert len(digests) == len(set(digests))
    assert {report["sha256"] for report in reports} == {reports[0]["sha256"]}
    assert all(report["state"] == reports[0]["state"] for report in reports)
    # Weights changed at 900 and at the cap, the steps fill no epoch, run or row of lanes, and nothing was cut short.
    state = reports[0]["state"]
    assert [segment[0] for segment in state["segments"]][:2] == [0, 900] and len(state["segments"]) == 3
    assert state["position"] > 2 * 1010 and state["position"] % 6 and set(reports[0]["sources"]) == {"web", "code"}
    # Once more, killed at one world size after the other in the middle of a step, and resumed at the next.
    file, stopped = tmp_path / "kept.json", []
    for i, world_size in enumerate((8, 3, 5)):
        options = {**OPTIONS, "shuffle": {"lanes": 6, "blocks": 2}, "global_batch": 120, "world_size": world_size}
        with subprocess.Popen(
            [sys.executable, "-c", _READER, json.dumps(urls), str(file), json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as reader:
            assert reader.stdin is not None and reader.stdout is not None
            for _ in range(4 + 2 * i):  # up to the change of weights, past it, past the cap
                reader.stdin.write(b"\n")
                reader.stdin.flush()
                assert reader.stdout.readline()
            reader.stdin.write(b"\n")  # for a step that it is killed in, before or after it is kept
            reader.stdin.flush()
            reader.kill()
        assert reader.returncode == -9
        kept = json.loads(file.read_text())
        stopped.append(len(kept["digests"]))
        assert kept["digests"] == digests[: stopped[-1]]
    assert sorted(set(stopped)) == stopped and stopped[-1] < len(digests)
    (tmp_path / "state.json").write_text(json.dumps(kept["state"]))
    rest = stoker(
        "data", "replay", "--mixture", mixture, "--hash", "--state", tmp_path / "state.json", "--epochs", 2, "--json"
    )
    assert rest[0] == 0, rest
    parts = [*kept["digests"], *(step["sha256"] for step in json.loads(rest[1])["steps"])]
    assert digest_of_stream(bytes.fromhex(part) for part in parts) == reports[0]["sha256"]


@pytest.mark.parametrize(("global_batch", "packing"), [(17, "concat"), (120, "best_fit"), (120, "mixture")])
def test_the_digest_is_one_where_each_step_is_read_at_another_world_size(
    url: str, mixture: Path, global_batch: int, packing: Any
) -> None:
    with ExitStack() as stack:
        source: TokenDataset | Mixture
        if packing == "mixture":
            file = MixtureFile.read(mixture)
            sets = {n: stack.enter_context(TokenDataset(u, seq_len=SEQ_LEN)) for n, u in file.urls.items()}
            source = file.mix(sets)
        else:
            source = stack.enter_context(TokenDataset(url, seq_len=SEQ_LEN, packing=packing))
            assert len(source) == (1009 if packing == "concat" else 1010) and len(source) % global_batch
        whole = [digest_of_step(s.batches) for s in Replay(source, global_batch=global_batch, **OPTIONS)]
        sizes = [n for n in (2, 3, 4, 5, 8, 17) if global_batch % n == 0]
        state: dict[str, Any] | None = None
        for world_size, expected in zip(sizes * 20, whole, strict=False):
            options: dict[str, Any] = {"global_batch": global_batch, "world_size": world_size, **OPTIONS}
            state = json.loads(json.dumps(state))
            part = next(iter(Replay(source, state=state, **options)))
            assert digest_of_step(part.batches) == expected
            state = part.state


def test_a_digest_is_of_the_rows_in_order_of_position(url: str) -> None:
    with (
        TokenDataset(url, seq_len=SEQ_LEN) as dataset,
        Replay(dataset, global_batch=120, world_size=5, **OPTIONS) as run,
    ):
        step = next(iter(run))
        rows = sorted(
            (int(position), *(x.numpy().astype("<i8").tobytes() for x in (ids, labels)))
            for batch in step.batches
            for position, ids, labels in zip(batch["position"], batch["input_ids"], batch["labels"], strict=True)
        )
    content = b"".join(position.to_bytes(8, "little") + ids + labels for position, ids, labels in rows)
    assert hashlib.sha256(content).digest() == digest_of_step(step.batches)
    step.batches[3]["labels"][7, 1] += 1
    assert hashlib.sha256(content).digest() != digest_of_step(step.batches)


@pytest.mark.parametrize(("name", "other"), [("seed", 6), ("shuffle", "full"), ("skip", [(50, 62)])])
def test_another_order_has_another_digest(url: str, name: str, other: Any) -> None:
    assert replayed(url, global_batch=120, end=3) != replayed(url, global_batch=120, end=3, **{name: other})


def test_steps_are_reached_without_those_before_them(url: str) -> None:
    whole = replayed(url, global_batch=17)
    assert replayed(url, global_batch=17, world_size=17, first=40, end=43) == whole[40:43]
    assert replayed(url, global_batch=17, first=90) == whole[90:]
    assert replayed(url, global_batch=17, epochs=None, first=90, end=95) == whole[90:95]


def test_with_a_state_steps_count_from_the_next_one(url: str) -> None:
    whole = replayed(url, global_batch=17)
    with TokenDataset(url, seq_len=SEQ_LEN) as dataset:
        loader = TokenLoader(dataset, batch_size=17, **OPTIONS)
        for _ in range(30):
            next(loader)
        state = loader.state_dict()
        run = Replay(dataset, state=state, epochs=2, first=4, end=6)  # all else is in the state
        assert [(step.step, digest_of_step(step.batches).hex()) for step in run] == [(4, whole[34]), (5, whole[35])]


@pytest.mark.parametrize("packing", ["best_fit", "best_fit:truncate", "pad", "pad:truncate", "concat --documents"])
def test_packed_rows_have_one_digest_too_and_the_state_knows_the_packing(
    stoker: Any, url: str, tmp_path: Path, packing: str
) -> None:
    asked = ["data", "replay", url, "--hash", "--seq-len", SEQ_LEN, "--global-batch", 120, *FLAGS, "--json"]
    reports = []
    for world_size in (1, 3, 8):
        code, out, err = stoker(*asked, "--packing", *packing.split(), "--world-size", world_size)
        assert code == 0, err
        reports.append(json.loads(out))
    assert len({report["sha256"] for report in reports}) == 1
    assert reports[0]["sha256"] != json.loads(stoker(*asked)[1])["sha256"]
    digests = [step["sha256"] for step in reports[0]["steps"]]
    first = stoker(*asked, "--packing", *packing.split(), "--steps", "0:2")
    (tmp_path / "state.json").write_text(json.dumps(json.loads(first[1])["state"]))
    rest = ["--state", tmp_path / "state.json", "--epochs", 2, "--world-size", 5, *packing.split()[1:], "--json"]
    code, out, err = stoker("data", "replay", url, "--hash", *rest)
    assert code == 0, err
    assert [step["sha256"] for step in json.loads(out)["steps"]] == digests[2:]


def test_explain_tells_where_the_rows_of_a_step_come_from(stoker: Any, url: str) -> None:
    asked = ["data", "explain", url, "--seq-len", SEQ_LEN, "--global-batch", 120, "--world-size", 3, *FLAGS]
    code, out, _ = stoker(*asked, "--steps", "4:6", "--json")
    assert code == 0
    report = json.loads(out)
    assert [row["step"] for row in report["rows"]] == [4] * 120 + [5] * 120
    documents = random_documents(400)
    with TokenDataset(url, seq_len=SEQ_LEN) as dataset:
        run = Replay(dataset, global_batch=120, world_size=3, **OPTIONS, first=4, end=6)
        batches = {step.step: step.batches for step in run}
        for row in report["rows"]:
            batch = batches[row["step"]][row["rank"]]
            assert batch["position"][row["row"]] == row["position"]
            tokens = np.concatenate([documents[s["document"]][s["start"] : s["end"]] for s in row["spans"]])
            assert tokens[:-1].tolist() == batch["input_ids"][row["row"]].tolist()
            assert {span["source"] for span in row["spans"]} == {url}
    code, out, _ = stoker(*asked, "--steps", "4")
    lines = out.splitlines()
    assert lines[0] == url
    assert lines[1].split() == ["step", "position", "epoch", "rank", "row", "sample", "shard", "document", "tokens"]
    first = report["rows"][0]
    span = first["spans"][0]
    told = [first[name] for name in ("step", "position", "epoch", "rank", "row", "sample")]
    assert lines[2].split(maxsplit=8) == [
        *map(str, [*told, span["shard"], span["document"]]),
        f"[{span['start']}, {span['end']})",
    ]
    assert len(lines) == 2 + sum(len(row["spans"]) for row in report["rows"][:120])


def test_explain_names_the_sources_of_a_mixture(stoker: Any, urls: dict[str, str], tmp_path: Path) -> None:
    sources = {name: {"url": url, "weight": weight} for (name, url), weight in zip(urls.items(), (1, 2), strict=True)}
    (tmp_path / "mix.json").write_text(json.dumps({"sources": sources}))
    asked = ["data", "explain", "--mixture", tmp_path / "mix.json", "--seq-len", SEQ_LEN, "--global-batch", 30]
    code, out, err = stoker(*asked, "--steps", "4:5", "--world-size", 3, "--json")
    assert code == 0, err
    report = json.loads(out)
    documents = {"web": random_documents(400), "code": random_documents(311, mean=20, seed=3)}
    with TokenDataset(urls["web"], seq_len=SEQ_LEN) as web, TokenDataset(urls["code"], seq_len=SEQ_LEN) as part:
        mix = Mixture({"web": (web, 1), "code": (part, 2)})
        batches = next(iter(Replay(mix, global_batch=30, world_size=3, first=4))).batches
    for row in report["rows"]:
        batch = batches[row["rank"]]
        assert mix.names[batch["source"][row["row"]]] == row["source"]
        tokens = np.concatenate([documents[row["source"]][s["document"]][s["start"] : s["end"]] for s in row["spans"]])
        assert tokens[:-1].tolist() == batch["input_ids"][row["row"]].tolist()
        assert {span["source"] for span in row["spans"]} == {urls[row["source"]]}
    lines = stoker(*asked, "--steps", "4")[1].splitlines()
    assert lines[1].split()[:5] == ["step", "position", "epoch", "source", "rank"]
    assert {line.split()[3] for line in lines[2:] if len(line.split()) > 6} == {"web", "code"}


def test_replay_is_told_to_people(stoker: Any, url: str) -> None:
    asked = ["data", "replay", url, "--seq-len", SEQ_LEN, "--global-batch", 120, "--steps", "2:4"]
    code, out, err = stoker(*asked, "--hash", "--world-size", 8)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert [line.split(": ")[0] for line in lines[:3]] == ["step 2", "step 3", "all"]
    assert all(len(line.split(": ")[1]) == 64 for line in lines[:3])
    assert lines[3].startswith(f"{url}: steps 2:4, 240 rows, 3,840 tokens, read by 8 ranks in ")
    assert stoker(*asked)[1].startswith(f"{url}: steps 2:4, ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["replay", "{url}"], 2, "--seq-len is needed, unless --state tells it"),
        (["replay", "{url}", "--seq-len", "16"], 2, "global_batch is needed, unless a state tells it"),
        (["replay", "{set}", "--world-size", "7"], 2, "world_size must be >= 1 and divide the rows of a step, got"),
        (["replay", "{set}", "--steps", "3:9"], 2, "with 0 <= A < B within the 8 of the run, got '3:9' (hint: ask for"),
        (["replay", "{set}", "--steps", "3:3"], 2, "got '3:3'"),
        (["replay", "{set}", "--epochs", "0"], 2, "steps must have an end in a run that has none"),
        (["replay", "{set}", "--steps", "one"], 2, "--steps: must be A:B, A: or A, in whole numbers, got 'one'"),
        (["replay", "{set}", "--skip", "7:"], 2, "--skip: must have an end, got '7:'"),
        (["replay", "{set}", "--shuffle", "window:2"], 2, "--shuffle: must be window:LANES:BLOCKS"),
        (["replay", "{set}", "--shuffle", "wild"], 2, "shuffle must be one of"),
        (["replay", "{set}", "--packing", "tight"], 2, "packing must be one of"),
        (["replay", "{set}", "--packing", "pad:tight"], 2, "long must be one of"),
        (["replay", "{set}", "--state", "{root}/gone.json"], 2, "gone.json: must be a file that can be read"),
        (["replay", "{set}", "--state", "{root}/text"], 1, "text: must be the JSON of a loader's state"),
        (["replay", "{set}", "--state", "{root}/list"], 1, "list: must be the JSON of a loader's state, got 'list'"),
        (["replay", "{set}", "--state", "{root}/other"], 1, "seed is 5 in the state and 6 here"),
        (["replay", "{root}/none", "--seq-len", "16", "--global-batch", "4"], 1, "no such directory"),
        (["explain", "{url}", "--steps", "3"], 2, "--seq-len and --global-batch are needed"),
        (["explain", "{set}", "--steps", "3:"], 2, "must be a range A:B with 0 <= A < B, got '3:'"),
        (["explain", "{set}", "--steps", "3", "--world-size", "0"], 2, "--world-size must be >= 1 and divide"),
        (["explain", "{set}", "--steps", "9" * 26], 2, "--steps: must be below 2^62, got '999"),
        (["explain", "{set}", "--steps", f"{2**61}"], 2, "a step must lie before position 2^62, got 2305843009213693952"),
        (["replay", "{set}", "--steps", f"3:{'9' * 26}"], 2, "--steps: must be below 2^62"),
        (["replay", "{set}", "--skip", f"3:{'9' * 26}"], 2, "--skip: must be below 2^62"),
        (["replay", "{set}", "--epochs", f"{2**60}"], 2, "a run must have fewer than 2^61 rows"),
        (["explain", "{set}"], 2, "Missing option '--steps'"),
        (["replay", "--seq-len", "16"], 2, "one of URL and --mixture is needed"),
        (["replay", "{url}", "--seq-len", "16", "--mixture", "{root}/text"], 2, "one of URL and --mixture is needed"),
        (["replay", "--seq-len", "16", "--mixture", "{root}/gone"], 2, "gone: must be a file that can be read"),
        (["replay", "--seq-len", "16", "--mixture", "{root}/text"], 2, "text: must be TOML, or JSON if it ends in .json"),
        (["replay", "--seq-len", "16", "--mixture", "{root}/list.json"], 2, "must be a table with sources"),
        (["replay", "--seq-len", "16", "--mixture", "{root}/no-url.json"], 2, "web: must hold url, weight, got 'no url'"),
        (["replay", "--seq-len", "16", "--mixture", "{root}/more.json"], 2, "must hold no more than sources, schedule, stop"),
    ],
    ids=lambda value: " ".join(value[:4]) if isinstance(value, list) else "",
)  # fmt: skip
def test_what_goes_wrong_ends_with_its_exit_code(
    stoker: Any, url: str, tmp_path: Path, arguments: list[str], code: int, message: str
) -> None:
    (tmp_path / "text").write_text("no JSON")
    (tmp_path / "list").write_text("[]")
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "no-url.json").write_text('{"sources": {"web": {"weight": 1}}}')
    (tmp_path / "more.json").write_text('{"sources": {}, "weights": {}}')
    with TokenDataset(url, seq_len=SEQ_LEN) as dataset, TokenLoader(dataset, batch_size=120, seed=5) as loader:
        next(loader)
        (tmp_path / "other").write_text(json.dumps(loader.state_dict()))
    the_set = [url, "--seq-len", "16", "--global-batch", "120"]
    given = [word for part in arguments for word in (the_set if part == "{set}" else [part])]
    given += ["--seed", "6"] if "{root}/other" in arguments else []
    got = stoker("data", *(word.format(root=tmp_path, url=url) for word in given))
    assert got[0] == code, got
    assert message in got[2]


def test_a_state_at_the_end_of_its_run_says_that_nothing_is_left(url: str) -> None:
    with TokenDataset(url, seq_len=SEQ_LEN) as dataset, TokenLoader(dataset, batch_size=120) as loader:
        for _ in range(8):
            next(loader)
        with pytest.raises(ConfigError, match="within the 0 from here to the end of the run, got '0:0'"):
            Replay(dataset, state=loader.state_dict())
        assert len(Replay(dataset, state=loader.state_dict(), epochs=2)) == (2 * 1009 - 8 * 120) // 120


def test_all_commands_tell_the_same_url(stoker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_set(tmp_path / "set", random_documents(20))
    monkeypatch.chdir(tmp_path)
    some = ["--seq-len", SEQ_LEN, "--global-batch", 4, "--steps", "0:1"]
    asked = (["inspect", "set"], ["verify", "set"], ["explain", "set", *some], ["replay", "set", *some])
    told = [json.loads(stoker("data", *arguments, "--json")[1]) for arguments in asked]
    assert {report["url"] for report in told} == {str(tmp_path / "set")}
    assert told[2]["rows"][0]["spans"][0]["source"] == str(tmp_path / "set")


def test_damage_comes_out_of_a_replay_by_its_name(stoker: Any, tmp_path: Path) -> None:
    write_set(tmp_path, random_documents(60))
    file = sorted((tmp_path / "data").iterdir())[1]
    with TokenDataset(tmp_path, seq_len=SEQ_LEN) as dataset:
        flip_bit(file, dataset._tables.byte_range(1, 5)[0])
    code, out, err = stoker("data", "replay", tmp_path, "--seq-len", SEQ_LEN, "--global-batch", 4, "--json")
    assert code == 1
    assert json.loads(out)["error"] == "CorruptBlock"
    assert file.name in err


def test_a_remote_data_set_has_the_digest_of_a_local_one(
    stoker: Any, url: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path))
    remote = s3_server.url("stoker", "replay")
    with open_store(remote, **s3_server.storage_options) as store:
        for file in sorted(Path(url).rglob("*")):
            if file.is_file():
                store.put(file.relative_to(url).as_posix(), file.read_bytes())
    options = [f"-o{name}={value}" for name, value in s3_server.storage_options.items()]
    asked = ["--steps", "0:3", "--hash", "--seq-len", SEQ_LEN, "--global-batch", 120, *FLAGS, "--json"]
    there = stoker("data", "replay", remote, *asked, "--world-size", 4, *options)
    here = stoker("data", "replay", url, *asked)
    assert there[0] == here[0] == 0, there
    assert json.loads(there[1])["sha256"] == json.loads(here[1])["sha256"]


def test_no_state_is_told_from_a_state(tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    assert load_state(tmp_path / "empty.json") == {}
    with pytest.raises(StateMismatch, match="a lost state would start the data anew"):
        Replay(None, state={})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got '1:x'"):
        parse_range("1:x", place="--steps")
