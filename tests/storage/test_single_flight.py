"""Processes of a node that want the same blocks at once: one fetches, the others wait for it, and never for long."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from stoker.storage import Block, ObjectStore, TieredCache, _wake, open_store
from stoker.storage._checksums import crc32c
from stoker.storage._layout import BlockFile
from stoker.storage._wake import Wake
from stoker.storage.tiers import Tier
from stoker.testing import Fault, FaultProxy, S3Server

SIZE, COUNT = 65_536, 48

READER = """
import sys
from stoker.storage import Block, TieredCache, open_store
from stoker.storage._checksums import crc32c
url, ram, size, count, ahead = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5] == "prefetch"
with open_store(url) as store, TieredCache(ram="64MiB", ram_path=ram) as cache:
    crcs = [int(line) for line in sys.stdin.readline().split()]
    print("ready", flush=True)
    sys.stdin.readline()
    blocks = [
        Block(key="object", version="1", start=n * size, end=n * size + size, crc32c=crc) for n, crc in enumerate(crcs)
    ][:count]
    if ahead:
        cache.prefetch(store, blocks)
    for block in blocks:
        assert crc32c(cache.get(store, block)) == block.crc32c
    stats = cache.stats()
    print(stats.misses, stats.pass_through, flush=True)
"""


@pytest.fixture
def data() -> bytes:
    return os.urandom(SIZE * COUNT)


@pytest.fixture
def url(s3_server: S3Server, data: bytes) -> str:
    url = s3_server.url("stoker", uuid.uuid4().hex)
    with open_store(url, **s3_server.storage_options) as store:
        store.put("object", data)
    return url


@pytest.fixture
def ram(memory: Path) -> Path:
    return memory / "tier"


@pytest.fixture
def memory() -> Iterator[Path]:
    directory = tempfile.mkdtemp(prefix="flight-", dir=os.environ["STOKER_SHM_DIR"])
    yield Path(directory)
    shutil.rmtree(directory)


class Readers:
    """Processes that read the blocks in order, when they are told to."""

    def __init__(
        self, number: int, url: str, ram: Path, data: bytes, proxy: FaultProxy, *, count: int = COUNT, how: str = "get"
    ) -> None:
        command = [sys.executable, "-c", READER, url, str(ram), str(SIZE), str(count), how]
        crcs = " ".join(str(crc32c(data[at : at + SIZE])) for at in range(0, len(data), SIZE))
        self.processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **proxy.env}
            )
            for _ in range(number)
        ]
        for process in self.processes:
            self._tell(process, crcs)
            assert process.stdout is not None and process.stdout.readline() == "ready\n"

    def _tell(self, process: "subprocess.Popen[str]", line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def go(self) -> None:
        for process in self.processes:
            self._tell(process, "go")

    def misses(self) -> list[int]:
        """Of those that end well, in order."""
        found = []
        for process in self.processes:
            assert process.stdout is not None and process.stdin is not None
            out = process.stdout.read()
            process.stdin.close()
            process.stdout.close()
            if process.wait() == 0:
                found.append(int(out.split()[0]))
        return found


@pytest.mark.parametrize("how", ["get", "prefetch"])
def test_processes_that_read_one_cold_set_request_each_byte_once(
    url: str, ram: Path, data: bytes, fault_proxy: FaultProxy, how: str
) -> None:
    fault_proxy.latency_s = 0.005  # so that requests are under way long enough to meet
    readers = Readers(4, url, ram, data, fault_proxy, how=how)
    fault_proxy.clear_requests()
    readers.go()
    misses = readers.misses()
    assert (len(misses), sum(misses)) == (4, COUNT)
    ranges = [request.byte_range for request in fault_proxy.requests if request.method == "GET"]
    assert len(ranges) == len(set(ranges)) == COUNT


def test_a_process_that_is_killed_while_it_fetches_holds_up_nobody(
    url: str, ram: Path, data: bytes, fault_proxy: FaultProxy
) -> None:
    stalled = fault_proxy.add(Fault("stall"), times=1, methods=("GET",))
    first = Readers(1, url, ram, data, fault_proxy, count=1)
    first.go()
    fault_proxy.wait_until(lambda _: stalled.hits == 1)
    others = Readers(2, url, ram, data, fault_proxy, count=1)
    others.go()
    first.processes[0].kill()
    assert first.misses() == []
    assert len(others.misses()) == 2


def test_a_process_that_is_stopped_while_it_fetches_costs_the_others_a_request(
    url: str, ram: Path, data: bytes, fault_proxy: FaultProxy
) -> None:
    stalled = fault_proxy.add(Fault("stall"), times=1, methods=("GET",))
    first = Readers(1, url, ram, data, fault_proxy, count=1)
    first.go()
    fault_proxy.wait_until(lambda _: stalled.hits == 1)
    first.processes[0].send_signal(signal.SIGSTOP)
    others = Readers(1, url, ram, data, fault_proxy, count=1)
    others.go()
    assert others.misses() == [1]
    first.processes[0].kill()
    assert first.misses() == []


def test_blocks_that_no_tier_keeps_are_not_fetched_one_process_after_another(
    url: str, memory: Path, data: bytes, fault_proxy: FaultProxy
) -> None:
    # A tier that holds one block: all others pass through, in each process for itself, side by side.
    with (
        TieredCache(ram=SIZE + 4096, ram_path=memory / "small") as cache,
        open_store(url, **fault_proxy.storage_options) as store,
    ):
        block = Block(key="object", version="1", start=0, end=SIZE, crc32c=crc32c(data[:SIZE]))
        assert cache.get(store, block) == data[:SIZE]
        readers = Readers(3, url, memory / "small", data, fault_proxy)
        readers.go()
        assert readers.misses() == [COUNT - 1] * 3


class _Held:
    """A store that says when it is asked, and answers when it is told to."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store
        self.asked, self.go_on = threading.Event(), threading.Event()

    def get(self, key: str, start: int, end: int) -> memoryview:
        self.asked.set()
        assert self.go_on.wait(60)
        return self._store.get(key, start, end)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


def test_who_waits_for_another_process_is_woken_when_the_block_is_there(
    tmp_path: Path, memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two caches of one directory exclude each other as two processes do. Without news they would look once a minute.
    monkeypatch.setattr(_wake, "_LONGEST_S", 60.0)
    waiting, wait = threading.Event(), Tier.wait_for_news

    def wait_for_news(tier: Tier, file: BlockFile, news: int) -> None:
        waiting.set()
        wait(tier, file, news)

    monkeypatch.setattr(Tier, "wait_for_news", wait_for_news)
    got: list[bytes] = []
    with (
        open_store(str(tmp_path / "origin")) as store,
        TieredCache(ram="1MiB", ram_path=memory / "tier") as first,
        TieredCache(ram="1MiB", ram_path=memory / "tier") as second,
    ):
        store.put("object", b"some tokens")
        block = Block(key="object", version="1", start=5, end=11, crc32c=crc32c(b"tokens"))
        held = _Held(store)
        fetching = threading.Thread(target=lambda: got.append(bytes(first.get(cast(ObjectStore, held), block))))
        looking = threading.Thread(target=lambda: got.append(bytes(second.get(store, block))))
        fetching.start()
        assert held.asked.wait(60)
        looking.start()
        assert waiting.wait(60)
        held.go_on.set()
        fetching.join()
        looking.join(30)
        assert not looking.is_alive()
        assert (got, second.stats().misses) == ([b"tokens", b"tokens"], 0)


def test_news_from_another_process_between_a_look_and_the_sleep_is_not_missed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_wake, "_LONGEST_S", 60.0)
    path = tmp_path / "file"
    path.write_bytes(b"state")
    program = (
        "import os, sys; from stoker.storage._wake import Wake; "
        "fd = os.open(sys.argv[1], os.O_RDWR); Wake(fd).tell(fd, 700)"
    )
    fd = os.open(path, os.O_RDWR)
    try:
        wake = Wake(fd)
        news = wake.seen(700)
        subprocess.run([sys.executable, "-c", program, path], check=True)
        sleeper = threading.Thread(target=wake.wait, args=(700, news))
        sleeper.start()
        sleeper.join(30)
        assert not sleeper.is_alive()
    finally:
        os.close(fd)
    assert path.read_bytes()[:5] == b"state"
