"""``stoker ckpt``: what it prints, what it finds, how it fails, and that it needs no torch."""

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.cli import app
from stoker.checkpoint.manifest import CRC_BLOCK_BYTES
from stoker.checkpoint.verify import Damage, verify
from stoker.errors import AccessDenied, BucketNotFound, ConfigError, NoCheckpoint, StokerError
from stoker.testing.s3 import S3Server
from tests.checkpoint.steps import rows, whole, write_step


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def report_of(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def error_of(kind: type[StokerError], *arguments: str | Path) -> str:
    error = run(*arguments).exception
    assert isinstance(error, kind), error
    return str(error)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2 of one rank."""
    with CheckpointManager(tmp_path / "run") as ckpt:
        for step in (1, 2):
            tree = {"model": {"w": torch.arange(6.0).view(2, 3) + step, "n": torch.tensor(step)}, "epoch": step}
            ckpt.save(step, tree).wait()
    return tmp_path / "run"


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


# ------------------------------------------------------------------------------------------------------------- ls, show


def test_ls_lists_steps_and_marks_the_newest(root: Path) -> None:
    report = report_of("ls", root)
    assert [(row["step"], row["newest"], row["world_size"], row["tensors"]) for row in report["steps"]] == [
        (1, False, 1, 2),
        (2, True, 1, 2),
    ]
    step = root / report["steps"][1]["directory"]
    files = [path for path in step.rglob("*") if path.parent.name in ("data", "state")]
    assert report["steps"][1]["bytes"] == sum(path.stat().st_size for path in files)
    lines = run("ls", root).stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["step", "1", "2"]
    assert "newest" not in lines[1] and lines[2].endswith("newest")


def test_ls_and_show_tell_metrics_and_level_of_a_step(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path) as ckpt:
        ckpt.save(1, {"x": 1}, metrics={"loss": 0.25, "acc": math.nan}).wait()
    for row in (report_of("ls", tmp_path)["steps"][0], report_of("show", tmp_path)):
        assert (row["level"], row["metrics"]) == ("committed", {"acc": "nan", "loss": 0.25})
    assert "acc=nan, loss=0.25" in run("ls", tmp_path).stdout
    assert "metrics: acc=nan, loss=0.25" in run("show", tmp_path).stdout


def test_ls_names_a_step_whose_manifest_is_damaged_and_lists_the_others(root: Path) -> None:
    flip(next(root.glob("step-000000000001-*/manifest.arrow")), 100)
    report = report_of("ls", root, code=1)
    assert report["ok"] is False
    assert "SHA-256" in report["steps"][0]["error"]
    assert report["steps"][1]["error"] is None
    assert "damaged" in run("ls", root).stdout


def test_show_lists_tensors_documents_and_files_of_a_step(root: Path) -> None:
    report = report_of("show", root, "--step", "1")
    assert (report["step"], report["newest"]) == (1, False)
    assert report["tensors"] == [
        {"name": "model.n", "dtype": "int64", "shape": [], "chunks": 1, "bytes": 8},
        {"name": "model.w", "dtype": "float32", "shape": [2, 3], "chunks": 1, "bytes": 24},
    ]
    assert {state["path"] for state in report["states"]} == {"state/model.json", "state/epoch.json"}
    assert [blob["path"] for blob in report["blobs"]] == ["data/00000-0.safetensors"]
    text = run("show", root).stdout
    assert "step 2 of" in text and "2x3" in text and "scalar" in text


# --------------------------------------------------------------------------------------------------------------- verify


def test_verify_reads_every_byte_of_the_newest_step_and_of_all(root: Path) -> None:
    one, both = report_of("verify", root), report_of("verify", root, "--all")
    assert one["ok"] and one["steps"] == [2]
    assert both["ok"] and both["steps"] == [1, 2]
    files = sum(path.stat().st_size for path in root.rglob("*") if path.is_file())
    assert both["num_bytes"] == files
    assert report_of("verify", root, "--step", "1")["steps"] == [1]
    assert "no damage" in run("verify", root).stdout


def damages_of(root: Path) -> tuple[Damage, ...]:
    return verify(root).damages


def test_verify_names_tensor_file_and_block_of_each_flipped_bit(tmp_path: Path) -> None:
    mib = CRC_BLOCK_BYTES
    large = torch.arange(5 * mib // 4, dtype=torch.int32).view(5, -1)
    small = {f"s{i}": whole(torch.full((64,), i)) for i in range(3)}
    step = write_step(tmp_path, {"large": (large, rows([3, 2], (mib // 4,))), **small})
    assert damages_of(tmp_path) == ()
    first, second = step / "data/00000-0.safetensors", step / "data/00001-0.safetensors"
    flip(first, 10)  # header
    flip(first, mib + mib // 2)
    flip(first, first.stat().st_size - 4096)  # the small tensors share a block with the end of the large one
    flip(second, 4096 + 2 * mib - 1)
    found = [(damage.key.rpartition("/")[2], damage.block, damage.tensors) for damage in damages_of(tmp_path)]
    assert found == [
        ("00000-0.safetensors", 0, ("large",)),
        ("00000-0.safetensors", 1, ("large",)),
        ("00000-0.safetensors", 3, ("large", "s0", "s1", "s2")),
        ("00001-0.safetensors", 2, ("large",)),
    ]
    result = run("verify", tmp_path)
    assert result.exit_code == 1
    assert "4 damaged" in result.stdout
    assert f"bytes [{mib}, {2 * mib}) (block 1)" in result.stdout
    report = report_of("verify", tmp_path, code=1)
    assert report["ok"] is False and report["damages"][2]["tensors"] == ["large", "s0", "s1", "s2"]


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4100])


def append(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(("harm", "problem"), [(Path.unlink, "is missing"), (cut, "has 4100"), (append, "has 8193")])
def test_verify_names_the_tensors_of_a_file_that_is_missing_short_or_long(
    root: Path, harm: Callable[[Path], None], problem: str
) -> None:
    harm(next(root.glob("step-000000000002-*/data/*")))
    (damage,) = damages_of(root)
    assert (damage.kind, damage.step) == ("blob", 2)
    assert problem in damage.problem
    lost = {"is missing": ("model.n", "model.w"), "has 4100": ("model.n", "model.w"), "has 8193": ()}[problem]
    assert damage.tensors == lost


@pytest.mark.parametrize("kind", ["state", "fragment", "manifest", "log"])
@pytest.mark.parametrize("harm", ["flip", "unlink"])
def test_verify_names_every_other_damaged_file(root: Path, kind: str, harm: str) -> None:
    pattern = {"state": "state/model.json", "fragment": "frag/*", "manifest": "manifest.arrow"}.get(kind)
    # The oldest record: nothing needs it, yet it is not what was written.
    path = next(root.glob(f"step-000000000002-*/{pattern}")) if pattern else max(root.glob("log/*"))
    if harm == "flip":
        flip(path, path.stat().st_size // 2)
    else:
        path.unlink()
    damages = damages_of(root)
    if (kind, harm) == ("log", "unlink"):
        assert damages == ()  # old records are removed in the course of things
    else:
        assert [(damage.kind, damage.key) for damage in damages] == [(kind, str(path.relative_to(root)))]


def test_verify_of_a_root_whose_newest_record_is_damaged_says_so_and_trusts_no_older_one(root: Path) -> None:
    newest = min(root.glob("log/*"))
    flip(newest, 20)
    report = report_of("verify", root, code=1)
    assert report["steps"] == []
    assert [damage["key"] for damage in report["damages"]] == [f"log/{newest.name}"]


def test_verify_goes_on_after_the_first_damage(root: Path) -> None:
    for path in (*root.glob("step-*/state/epoch.json"), *root.glob("step-*/data/*")):
        flip(path, path.stat().st_size - 1)
    damages = verify(root, all_steps=True).damages
    assert [(damage.step, damage.kind) for damage in damages] == [(1, "state"), (1, "blob"), (2, "state"), (2, "blob")]


# --------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("command", ["ls", "show", "verify"])
def test_a_root_without_a_checkpoint_is_one_sentence(tmp_path: Path, command: str) -> None:
    assert "needs a committed step" in error_of(NoCheckpoint, command, tmp_path)
    assert "needs a committed step" in error_of(NoCheckpoint, command, tmp_path / "nowhere")


def test_the_program_ends_with_one_line_or_one_object_and_exit_code_1(tmp_path: Path) -> None:
    for arguments in ([], ["--json"]):
        program = f"from stoker.cli import main; main(['ckpt', 'ls', {str(tmp_path)!r}, *{arguments!r}])"
        done = subprocess.run([sys.executable, "-c", program], check=False, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
        assert [json.loads(line)["error"] for line in done.stdout.splitlines()] == ["NoCheckpoint"] * len(arguments)


def test_a_step_that_is_not_committed_is_refused_with_those_that_are(root: Path) -> None:
    for command in ("show", "verify"):
        assert "committed steps: 1, 2" in error_of(NoCheckpoint, command, root, "--step", "7")


def test_one_step_and_all_steps_together_are_refused(root: Path) -> None:
    assert "not both" in error_of(ConfigError, "verify", root, "--step", "1", "--all")


def test_a_missing_bucket_and_wrong_keys_are_named(s3_server: S3Server) -> None:
    options = [f"-o{name}={value}" for name, value in s3_server.storage_options.items()]
    assert "no-such-bucket" in error_of(BucketNotFound, "ls", "s3://no-such-bucket/run", *options)
    assert "stoker" in error_of(AccessDenied, "ls", s3_server.url("stoker", "run"), *options, "-osecret=wrong")


# ----------------------------------------------------------------------------------------------------------- both stores


def test_the_commands_read_an_object_store_as_they_read_a_directory(s3_server: S3Server, tmp_path: Path) -> None:
    url = s3_server.url("stoker", "test-cli")
    with CheckpointManager(url, storage_options=s3_server.storage_options) as ckpt:
        ckpt.save(3, {"model": {"w": torch.arange(6.0).view(2, 3)}}).wait()
    options = [f"--option={name}={value}" for name, value in s3_server.storage_options.items()]
    assert [row["step"] for row in report_of("ls", url, *options)["steps"]] == [3]
    assert report_of("verify", url, *options)["ok"]
    assert report_of("show", url, *options)["tensors"][0]["name"] == "model.w"
    refs = tmp_path / "refs.json"
    assert report_of("zarr", url, "-o", refs, *options)["arrays"] == 1
    assert s3_server.storage_options["secret"] not in refs.read_text()
    program = f"""
        import sys, zarr
        from obstore.fsspec import register
        register("s3")
        remote = dict(
            endpoint={s3_server.endpoint_url!r}, access_key_id={s3_server.storage_options["key"]!r},
            secret_access_key={s3_server.storage_options["secret"]!r}, region="us-east-1",
            client_options={{"allow_http": True}}, virtual_hosted_style_request=False, asynchronous=True,
        )
        options = dict(fo={str(refs)!r}, remote_protocol="s3", remote_options=remote)
        group = zarr.open_group("reference://", storage_options=options, mode="r")
        print(group["model/w"][:].tolist(), "stoker" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True)
    assert done.stdout.strip() == "[[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]] False", done.stderr


def test_zarr_writes_references_and_says_what_it_left_out(root: Path, tmp_path: Path) -> None:
    refs = tmp_path / "refs.json"
    result = run("zarr", root, "-o", refs)
    assert result.exit_code == 0
    assert "step 2, 2 arrays, 2 chunks" in result.stdout
    assert json.loads(refs.read_text())["version"] == 1
    write_step(root, {"a..b": whole(torch.ones(1))}, step=9)
    assert "left out: a..b: zarr has no node of that name" in run("zarr", root, "-o", refs).stdout
    assert "zarr.json" in error_of(ConfigError, "zarr", root, "-o", tmp_path / "zarr.json")


def test_no_command_imports_torch(root: Path, tmp_path: Path) -> None:
    program = f"""
        import sys
        from stoker.checkpoint.cli import app
        for arguments in (["ls", {str(root)!r}], ["show", {str(root)!r}], ["verify", {str(root)!r}, "--all"],
                          ["diff", {str(root)!r}, "1", "2"], ["gc", {str(root)!r}, "--grace", "0"],
                          ["zarr", {str(root)!r}, "-o", {str(tmp_path / "refs.json")!r}]):
            app(arguments, standalone_mode=False)
        assert "torch" not in sys.modules and "zarr" not in sys.modules
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_command_explains_itself_with_examples() -> None:
    for command in ("ls", "show", "verify", "diff", "gc", "zarr"):
        text = run(command, "--help").stdout
        assert f"stoker ckpt {command} /" in text and f"stoker ckpt {command} s3://" in text
