"""``stoker cache ls``, ``verify`` and ``evict`` on directories that a real cache has filled."""

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from stoker.cli import main
from stoker.errors import AccessDenied, ConfigError, KeyNotFound, UnknownVersion
from stoker.storage import Block, TieredCache
from stoker.storage._checksums import crc32c
from stoker.storage.local import LocalStore
from stoker.storage.upkeep import CacheDirectory

SIZE, HEADER = 8192, 4096


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def stoker(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def run(*arguments: object) -> Result:
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main(["cache", *(str(argument) for argument in arguments)])
        return Result(int(exited.value.code or 0), *capfd.readouterr())

    return run


def test_a_node_without_a_cache_is_told_so(stoker: Callable[..., Result], tmp_path: Path) -> None:
    done = stoker("ls", tmp_path / "none")
    assert (done.code, done.out) == (1, "")
    assert "no such directory (hint: no job has made a cache there yet" in done.err


@pytest.mark.parametrize("arguments", [("ls",), ("ls", "--json"), ("verify", "--json"), ("--help",)])
def test_output_that_can_not_be_written_is_one_line_and_exit_code_1(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    directory = Node(tmp_path).directory
    where = [] if arguments == ("--help",) else [str(directory)]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "stoker.cli", "cache", *arguments, *where],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    assert (done.returncode, done.stderr) == (1, "error: [Errno 28] No space left on device\n")


def test_no_control_character_of_an_object_s_name_reaches_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stoker: Callable[..., Result]
) -> None:
    node = Node(tmp_path)
    described = CacheDirectory._describe

    def named(self: CacheDirectory, *arguments: Any) -> Any:
        return replace(described(self, *arguments), object="s3://b/\x1b]0;title\x07\u009b2J\ninjected")

    monkeypatch.setattr(CacheDirectory, "_describe", named)
    for arguments in (("ls",), ("ls", "--blocks"), ("verify",)):
        if arguments == ("verify",):
            damaged = bytearray(node.files()[0].read_bytes())
            damaged[HEADER] ^= 1
            node.files()[0].write_bytes(damaged)
        out = stoker(*arguments, node.directory).out
        assert "s3://b/\\x1b]0;title\\x07\\x9b2J\\ninjected" in out
        assert all(c.isprintable() or c == "\n" for c in out)


class Node:
    """A disk tier with three blocks of ``a`` and two of ``b``, and where they came from."""

    def __init__(self, root: Path) -> None:
        self.store = LocalStore(root / "origin")
        self.directory = root / "cache"
        self.blocks = [*self._blocks("a", 3), *self._blocks("b", 2)]
        with self.open() as cache:
            for block in self.blocks:
                cache.get(self.store, block)

    def open(self, eviction: Literal["plan", "keep", "sieve"] = "keep") -> TieredCache:
        return TieredCache(ram=0, disk=self.directory, disk_capacity="1MiB", eviction=eviction)

    def _blocks(self, key: str, count: int) -> list[Block]:
        data = random.Random(key).randbytes(count * SIZE)
        self.store.put(key, data)
        edges = range(0, len(data), SIZE)
        return [Block(key=key, version="1", start=a, end=a + SIZE, crc32c=crc32c(data[a : a + SIZE])) for a in edges]

    def files(self) -> list[Path]:
        return sorted(path for path in (self.directory / "blocks").rglob("*") if path.is_file())

    def place(self, key: str) -> str:
        return self.store.place(key)

    def used_bytes(self) -> int:
        with CacheDirectory(self.directory) as directory:
            return directory.used_bytes


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    made = Node(tmp_path)
    assert len(made.files()) == 5
    yield made
    made.store.close()


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


# --- ls ---------------------------------------------------------------------------------------------------------------


def test_ls_tells_what_is_there_how_big_and_since_when(node: Node, stoker: Callable[..., Result]) -> None:
    for file in node.files():
        os.utime(file, (0, 1_700_000_000))
    report = stoker("ls", node.directory, "--json", "--blocks").json
    assert {name: report[name] for name in ("ok", "directory", "capacity_bytes", "used_bytes", "blocks")} == {
        "ok": True,
        "directory": str(node.directory),
        "capacity_bytes": 2**20,
        "used_bytes": 5 * (SIZE + HEADER),
        "blocks": 5,
    }
    assert report["objects"] == [
        {
            "object": node.place(key),
            "version": "1",
            "blocks": count,
            "size_bytes": count * (SIZE + HEADER),
            "leased_blocks": 0,
            "planned_blocks": None,
            "next_use_unix_s": None,
            "since_unix_s": 1_700_000_000,
        }
        for key, count in (("a", 3), ("b", 2))
    ]
    spans = {(file["object"], file["start"], file["end"]) for file in report["files"]}
    assert spans == {(node.place(block.key), block.start, block.end) for block in node.blocks}


def test_ls_prints_a_line_for_each_object(node: Node, stoker: Callable[..., Result]) -> None:
    result = stoker("ls", node.directory)
    assert result.code == 0 and result.err == ""
    lines = result.out.splitlines()
    assert len(lines) == 4
    assert lines[1].split()[:4] == ["36.0", "KiB", "3", "0"] and lines[1].endswith(f"{node.place('a')} @1")
    assert lines[3] == f"{node.directory}: 5 blocks, 60.0 KiB of 1.0 MiB"


def test_ls_says_which_blocks_a_process_has_in_use(node: Node, stoker: Callable[..., Result]) -> None:
    with node.open(eviction="sieve") as cache:
        view = cache.get(node.store, node.blocks[0])
        assert [one["leased_blocks"] for one in stoker("ls", node.directory, "--json").json["objects"]] == [1, 0]
        del view
        assert [one["leased_blocks"] for one in stoker("ls", node.directory, "--json").json["objects"]] == [0, 0]


def test_ls_tells_when_blocks_are_read_next_where_a_running_job_knows(
    node: Node, stoker: Callable[..., Result]
) -> None:
    assert [line.split()[4] for line in stoker("ls", node.directory).out.splitlines()[1:3]] == ["unknown"] * 2
    with node.open(eviction="plan") as cache:
        for block in node.blocks:
            cache.get(node.store, block)  # so that this process knows what is stored
        reader = cache.reader()
        reader.publish(node.store, node.blocks[:2], [10, 1000])
        reader._measure_for_s = 0.0
        reader.advance(0)
        assert stoker("ls", node.directory, "--json").json["objects"][0]["planned_blocks"] is None, "no pace yet"
        reader.advance(5)
        report = stoker("ls", node.directory, "--json", "--blocks").json
        assert [one["planned_blocks"] for one in report["objects"]] == [2, 0]
        first, second = (report["objects"][0]["next_use_unix_s"], report["objects"][1]["next_use_unix_s"])
        assert first > 0 and second is None
        times = sorted(file["next_use_unix_s"] for file in report["files"] if file["is_planned"])
        assert times[0] == first < times[1]
        out = stoker("ls", node.directory, "--blocks").out
        assert " in 0 s" in out and "none planned" in out
        other = cache.reader()
        other.publish(node.store, node.blocks[4:], [1])  # of which nobody knows the pace
        reader._since = (0.0, 0.0)
        reader.advance(6)
        assert " planned " in stoker("ls", node.directory, "--blocks").out
        reader.close()
        other.close()
        assert os.listdir(node.directory / "plans") == []
    assert "unknown" in stoker("ls", node.directory).out


def test_a_plan_of_a_dead_process_or_one_that_is_damaged_means_nothing(
    node: Node, stoker: Callable[..., Result]
) -> None:
    with node.open(eviction="plan") as cache:
        reader = cache.reader()
        cache.get(node.store, node.blocks[0])
        reader.publish(node.store, node.blocks[:1], [10])
        reader._measure_for_s = 0.0
        reader.advance(0)
        reader.advance(5)
        (written,) = (node.directory / "plans").iterdir()
        (node.directory / "plans" / ("0" * 16)).write_bytes(written.read_bytes())  # which nobody holds
        (node.directory / "plans" / "notes.txt").write_text("of somebody else")
        assert stoker("ls", node.directory, "--json").json["objects"][0]["planned_blocks"] == 1
        assert sorted(path.name for path in (node.directory / "plans").iterdir()) == [written.name, "notes.txt"]
        for damage in (b"", b"STKPLAN1", written.read_bytes()[:-1], b"x" * 60):
            written.write_bytes(damage)
            assert stoker("ls", node.directory, "--json").json["objects"][0]["planned_blocks"] is None


def test_ls_shows_a_block_whose_header_is_damaged(node: Node, stoker: Callable[..., Result]) -> None:
    flip(node.files()[0], 60)
    result = stoker("ls", node.directory)
    assert result.code == 0 and "(damaged header)" in result.out


def test_ls_without_a_directory_shows_the_ram_tier(
    tmp_path: Path, stoker: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STOKER_SHM_DIR", str(tmp_path / "shm"))
    with TieredCache(ram="1MiB"):
        assert stoker("ls", "--json").json["directory"] == str(tmp_path / "shm" / "cache")


# --- verify -----------------------------------------------------------------------------------------------------------


def test_verify_finds_nothing_wrong_with_a_whole_cache(node: Node, stoker: Callable[..., Result]) -> None:
    result = stoker("verify", node.directory, "--json")
    assert result.code == 0
    assert result.json == {
        "ok": True,
        "directory": str(node.directory),
        "blocks": 5,
        "checked_bytes": 5 * (SIZE + HEADER),
        "bad": [],
    }


@pytest.mark.parametrize("offset", [0, 8, 12, 16, 24, 40, 44, 60, 2000, HEADER, HEADER + SIZE - 1])
def test_verify_finds_a_bit_that_flipped_anywhere(node: Node, stoker: Callable[..., Result], offset: int) -> None:
    flip(node.files()[1], offset)
    result = stoker("verify", node.directory, "--json")
    assert result.code == 1
    (bad,) = result.json["bad"]
    assert bad["block"]["name"] == node.files()[1].name and not bad["removed"]
    assert len(node.files()) == 5


@pytest.mark.parametrize("size", [0, 10, HEADER - 1, HEADER, HEADER + SIZE - 1, HEADER + SIZE + 1])
def test_verify_finds_a_file_of_another_size(node: Node, stoker: Callable[..., Result], size: int) -> None:
    os.truncate(node.files()[2], size)
    assert len(stoker("verify", node.directory, "--json").json["bad"]) == 1


def test_verify_finds_a_block_under_the_name_of_another(node: Node, stoker: Callable[..., Result]) -> None:
    shutil.copyfile(node.files()[0], node.files()[1])
    (bad,) = stoker("verify", node.directory, "--json").json["bad"]
    assert "another" in bad["problem"]


def test_repair_removes_the_bad_counts_them_out_and_the_next_reader_has_them_again(
    node: Node, stoker: Callable[..., Result]
) -> None:
    flip(node.files()[0], HEADER + 5)
    flip(node.files()[4], 3)
    result = stoker("verify", node.directory, "--repair")
    assert result.code == 0
    assert result.out.count(": removed (") == 2 and "2 bad, 2 removed" in result.out
    assert len(node.files()) == 3 and node.used_bytes() == 3 * (SIZE + HEADER)
    assert stoker("verify", node.directory).code == 0
    with node.open() as cache:
        for block in node.blocks:
            assert crc32c(cache.get(node.store, block)) == block.crc32c
        assert cache.stats().misses == 2 and cache.stats().corrupt == 0


# --- evict ------------------------------------------------------------------------------------------------------------


def test_evict_all_empties_the_tier_and_its_counter(node: Node, stoker: Callable[..., Result]) -> None:
    result = stoker("evict", node.directory, "--all", "--json")
    assert result.code == 0
    assert result.json == {
        "ok": True,
        "directory": str(node.directory),
        "blocks": 5,
        "freed_bytes": 5 * (SIZE + HEADER),
        "leased_blocks": 0,
    }
    assert node.files() == [] and node.used_bytes() == 0


def test_evict_by_pattern_removes_the_objects_that_match(node: Node, stoker: Callable[..., Result]) -> None:
    assert stoker("evict", node.directory, "--match", "*/b", "--json").json["blocks"] == 2
    assert [one["object"] for one in stoker("ls", node.directory, "--json").json["objects"]] == [node.place("a")]


def test_evict_leaves_blocks_that_another_process_has_in_use(node: Node, stoker: Callable[..., Result]) -> None:
    program = (
        "import sys; from stoker.storage import Block, TieredCache, open_store\n"
        "cache = TieredCache(ram=0, disk=sys.argv[1], disk_capacity='1MiB', eviction='sieve')\n"
        "view = cache.get(open_store(sys.argv[2]), Block(key='a', version='1', start=0, end=8192, crc32c=int(sys.argv[3])))\n"
        "print('held', flush=True); sys.stdin.read()"
    )
    arguments = [str(node.directory), str(node.store.root), str(node.blocks[0].crc32c)]
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        assert process.stdout.readline() == b"held\n"
        result = stoker("evict", node.directory, "--all")
        assert "4 blocks removed, 48.0 KiB freed, 1 in use kept" in result.out
        assert len(node.files()) == 1 and node.used_bytes() == SIZE + HEADER
        process.kill()
        process.wait()
    assert stoker("evict", node.directory, "--all", "--json").json["blocks"] == 1, "a killed process holds nothing"


def test_views_of_evicted_blocks_stay_valid(node: Node, stoker: Callable[..., Result]) -> None:
    with node.open() as cache:  # one that never evicts announces no use
        view = cache.get(node.store, node.blocks[0])
        assert stoker("evict", node.directory, "--all", "--json").json["blocks"] == 5
        assert crc32c(view) == node.blocks[0].crc32c


def test_a_job_goes_on_while_its_blocks_are_evicted(node: Node, stoker: Callable[..., Result]) -> None:
    with node.open() as cache:
        for block in node.blocks:
            cache.get(node.store, block)
        stoker("evict", node.directory, "--all")
        assert cache.stats().disk_bytes == 0
        for block in node.blocks:
            assert crc32c(cache.get(node.store, block)) == block.crc32c
        assert cache.stats().disk_bytes == 5 * (SIZE + HEADER) and cache.stats().disk_capacity_bytes == 2**20


def test_the_counter_is_right_after_evicting_beside_a_job_that_fills_and_evicts(node: Node) -> None:
    def job() -> None:
        with TieredCache(ram=0, disk=node.directory, disk_capacity=3 * (SIZE + HEADER), eviction="sieve") as cache:
            for _ in range(40):
                for block in node.blocks:
                    assert crc32c(cache.get(node.store, block)) == block.crc32c

    removed = 0
    with ThreadPoolExecutor(1) as pool, CacheDirectory(node.directory) as directory:
        done = pool.submit(job)
        while not done.done():
            removed += directory.evict().blocks
        done.result()
        assert removed
        assert directory.used_bytes == sum(file.stat().st_size for file in node.files())


@pytest.mark.parametrize("arguments", [[], ["--all", "--match", "*"]])
def test_evict_wants_to_be_told_what(node: Node, stoker: Callable[..., Result], arguments: list[str]) -> None:
    assert stoker("evict", node.directory, *arguments).code == 2
    assert len(node.files()) == 5


# --- what is not ours -------------------------------------------------------------------------------------------------


def test_nothing_foreign_is_counted_checked_or_removed(node: Node, stoker: Callable[..., Result]) -> None:
    first = node.files()[0]
    foreign = [node.directory / "mine.txt", node.directory / "blocks" / "mine", first.parent / "notes.txt"]
    foreign += [node.directory / "tmp" / "12-mine", first.parent / ("f" * 31)]
    for path in foreign:
        path.write_text("mine")
    link, folder = first.parent / ("e" * 32), first.parent / ("d" * 32)
    link.symlink_to(foreign[0])
    folder.mkdir()
    (node.directory / "blocks" / "mine too").mkdir()
    foreign.append(node.directory / "blocks" / "mine too" / ("c" * 32))
    foreign[-1].write_text("mine")
    assert stoker("ls", node.directory, "--json").json["blocks"] == 5
    assert stoker("verify", node.directory, "--repair", "--json").json["bad"] == []
    assert stoker("evict", node.directory, "--all", "--json").json["blocks"] == 5
    assert all(path.read_text() == "mine" for path in foreign)
    assert link.is_symlink() and folder.is_dir()


@pytest.mark.parametrize("command", [["ls"], ["verify", "--repair"], ["evict", "--all"]])
def test_a_directory_that_is_no_cache_is_refused_and_left_alone(
    tmp_path: Path, stoker: Callable[..., Result], command: list[str]
) -> None:
    victim = tmp_path / "blocks" / "ab" / ("ab" * 16)
    victim.parent.mkdir(parents=True)
    victim.write_text("mine")
    result = stoker(*command, tmp_path, "--json")
    assert result.code == 2
    assert result.json["error"] == "ConfigError" and "made by stoker" in result.json["message"]
    assert victim.read_text() == "mine" and sorted(os.listdir(tmp_path)) == ["blocks"]


def test_what_is_missing_a_link_or_of_a_newer_version_is_refused(node: Node, tmp_path: Path) -> None:
    with pytest.raises(KeyNotFound):
        CacheDirectory(tmp_path / "nothing")
    (tmp_path / "link").symlink_to(node.directory)
    with pytest.raises(ConfigError, match="link"):
        CacheDirectory(tmp_path / "link")
    tag = node.directory / "CACHEDIR.TAG"
    tag.write_bytes(tag.read_bytes().replace(b"cache v1", b"cache v2"))
    with pytest.raises(UnknownVersion):
        CacheDirectory(node.directory)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_cache_of_another_user_is_refused(node: Node) -> None:
    os.chown(node.directory, 12345, 12345)
    with pytest.raises(AccessDenied):
        CacheDirectory(node.directory)
    os.chown(node.directory, 0, 0)


def test_a_cache_that_nobody_has_used_yet_is_empty(node: Node, stoker: Callable[..., Result]) -> None:
    shutil.rmtree(node.directory / "blocks")
    (node.directory / "lock").unlink()
    report = stoker("ls", node.directory, "--json").json
    assert (report["blocks"], report["used_bytes"], report["capacity_bytes"]) == (0, 0, 0)
    assert stoker("evict", node.directory, "--all").code == 0
