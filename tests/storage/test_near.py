"""A cluster's cache before the origin: used where it is right and in time, harmless where it is not."""

import os
import pickle
import re
import signal
import subprocess
import sysconfig
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stoker.errors import ConfigError
from stoker.metrics import counters
from stoker.storage import Block, ObjectStore, TieredCache, open_store
from stoker.storage._checksums import crc32c
from stoker.storage.near import Near
from stoker.storage.remote import RemoteStore
from stoker.testing import Fault, FaultProxy, S3Server
from tests.storage.test_cache import wait_until

SIZE = 50_000
_MANUAL = Path(__file__).parents[2] / "docs" / "cache.md"


@pytest.fixture
def data() -> bytes:
    return os.urandom(8 * SIZE)


@pytest.fixture
def blocks(data: bytes) -> list[Block]:
    edges = range(0, len(data), SIZE)
    return [
        Block(key="a/object", version="1", start=at, end=at + SIZE, crc32c=crc32c(data[at : at + SIZE])) for at in edges
    ]


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def origin(s3_server: S3Server, data: bytes, prefix: str) -> Iterator[ObjectStore]:
    """Not behind the proxy: what goes through that is for the near cache."""
    with open_store(s3_server.url("stoker", f"{prefix}/set"), **s3_server.storage_options) as store:
        store.put("a/object", data)
        yield store


@pytest.fixture
def mirror(s3_server: S3Server, prefix: str) -> Iterator[ObjectStore]:
    """Where the near cache has the origin's objects, as an operator or a mount would put them there."""
    url = s3_server.url("stoker", f"{prefix}/near/stoker/{prefix}/set")
    with open_store(url, **s3_server.storage_options) as store:
        yield store


@pytest.fixture
def options(s3_server: S3Server, fault_proxy: FaultProxy, prefix: str) -> dict[str, Any]:
    return {
        "near": s3_server.url("stoker", f"{prefix}/near"),
        "near_options": fault_proxy.storage_options,
        "near_timeout_s": 5.0,
        "ram": 0,
    }


def test_what_the_near_cache_has_costs_the_origin_nothing(
    origin: ObjectStore, mirror: ObjectStore, options: dict[str, Any], data: bytes, blocks: list[Block]
) -> None:
    mirror.put("a/object", data)
    before = counters.snapshot()
    with TieredCache(**options) as cache:
        origin.close()  # nobody could ask it
        assert [bytes(cache.get(origin, block)) for block in blocks[:3]] == [
            data[block.start : block.end] for block in blocks[:3]
        ]
        stats = cache.stats()
    assert (stats.near_hits, stats.near_hit_bytes, stats.misses, stats.fetched_bytes) == (3, 3 * SIZE, 0, 0)
    counted = counters.since(before)
    assert (counted["cache.near.hits"], counted["cache.near.hit_bytes"]) == (3, 3 * SIZE)


def test_what_the_near_cache_has_not_comes_from_the_origin(
    origin: ObjectStore, options: dict[str, Any], data: bytes, blocks: list[Block]
) -> None:
    before = counters.snapshot()
    with TieredCache(**options) as cache:
        for block in blocks:
            assert cache.get(origin, block) == data[block.start : block.end]
        assert (cache.stats().near_hits, cache.stats().misses) == (0, 8)
    counted = counters.since(before)
    assert counted["cache.near.misses"] == 8  # an absent object is no failure, so it is asked for again
    assert counted.get("cache.near.failed", 0) == 0


@pytest.mark.parametrize("what", ["another version", "cut short", "flipped on the way"])
def test_wrong_bytes_from_the_near_cache_reach_nobody(
    what: str,
    origin: ObjectStore,
    mirror: ObjectStore,
    fault_proxy: FaultProxy,
    options: dict[str, Any],
    data: bytes,
    blocks: list[Block],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirror.put("a/object", {"another version": data[::-1], "cut short": data[: SIZE // 2]}.get(what, data))
    if what == "flipped on the way":
        fault_proxy.add(Fault("flip"), methods=("GET",))
    before = counters.snapshot()
    with TieredCache(**options) as cache:
        for block in blocks[:2]:
            assert cache.get(origin, block) == data[block.start : block.end]
        assert (cache.stats().near_hits, cache.stats().misses) == (0, 2)
    counted = counters.since(before)
    assert counted.get("cache.near.corrupt", 0) + counted.get("cache.near.failed", 0) == 2
    if what != "cut short":
        assert counted["cache.near.corrupt"] == 2
        assert "differs from its checksum" in caplog.text


@pytest.mark.parametrize("fault", [Fault("status", status=403), Fault("reset"), Fault("stall")])
def test_a_near_cache_that_fails_is_not_asked_for_a_while(
    fault: Fault,
    origin: ObjectStore,
    mirror: ObjectStore,
    fault_proxy: FaultProxy,
    options: dict[str, Any],
    data: bytes,
    blocks: list[Block],
    caplog: pytest.LogCaptureFixture,
) -> None:
    mirror.put("a/object", data)
    fault_proxy.add(fault)
    before = counters.snapshot()
    with TieredCache(**{**options, "near_timeout_s": 0.2}) as cache:
        for block in blocks:
            assert cache.get(origin, block) == data[block.start : block.end]
        assert (cache.stats().near_hits, cache.stats().misses) == (0, 8)
    counted = counters.since(before)
    assert (counted["cache.near.failed"], counted["cache.near.skipped"]) == (3, 5)
    assert caplog.text.count("going on without it") == 1


def test_a_near_cache_that_comes_back_is_asked_again_after_one_probe(
    origin: ObjectStore, mirror: ObjectStore, options: dict[str, Any], fault_proxy: FaultProxy, data: bytes
) -> None:
    now = 0.0
    near = Near(options["near"], storage_options=fault_proxy.storage_options, timeout_s=30.0, clock=lambda: now)
    wanted = (origin, "a/object", 0, SIZE, crc32c(data[:SIZE]))
    with fault_proxy.outage(Fault("status", status=403)):
        for _ in range(3):
            assert near.get(*wanted) is None
        fault_proxy.clear_requests()
        assert near.get(*wanted) is None
        assert not fault_proxy.requests
        now = 1.0
        assert near.get(*wanted) is None  # a probe, for which nobody waits, and which fails: twice the pause
        wait_until(lambda: not near._probing)
        asked = len(fault_proxy.requests)
        assert asked
        now = 2.9
        assert near.get(*wanted) is None
        assert len(fault_proxy.requests) == asked
    mirror.put("a/object", data)
    now = 3.0
    assert near.get(*wanted) is None
    wait_until(lambda: not near._probing)
    for _ in range(2):
        assert bytes(near.get(*wanted) or b"") == data[:SIZE]
    near.close()


def test_a_fault_of_ours_is_not_hidden(origin: ObjectStore, options: dict[str, Any], blocks: list[Block]) -> None:
    near = Near(options["near"], storage_options={}, timeout_s=1.0)
    with pytest.raises(TypeError):
        near.get(origin, None, 0, 1, 0)  # type: ignore[arg-type]
    near.close()


def test_a_bucket_in_the_url_stands_for_the_origins(
    s3_server: S3Server, origin: ObjectStore, data: bytes, blocks: list[Block]
) -> None:
    """As with AIStore, which has the origin's buckets under their own names."""
    options: dict[str, Any] = {"near_options": s3_server.storage_options, "near_timeout_s": 5.0, "ram": 0}
    with TieredCache(near="s3://{bucket}", **options) as cache:
        assert cache.get(origin, blocks[0]) == data[:SIZE]
        assert (cache.stats().near_hits, cache.stats().misses) == (1, 0)
        with pickle.loads(pickle.dumps(cache)) as other:
            assert other.get(origin, blocks[1]) == data[SIZE : 2 * SIZE]
            assert other.stats().near_hits == 1


def test_a_forked_child_asks_the_near_cache_on_its_own(
    origin: ObjectStore, mirror: ObjectStore, options: dict[str, Any], data: bytes, blocks: list[Block]
) -> None:
    mirror.put("a/object", data)
    with TieredCache(**options) as cache:
        assert cache.get(origin, blocks[0]) == data[:SIZE]
        pid = os.fork()
        if not pid:
            status = 1
            try:
                right = cache.get(origin, blocks[1]) == data[SIZE : 2 * SIZE]
                status = 0 if right and cache.stats().near_hits == 1 else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


class _Cluster(S3Server):
    """A SeaweedFS that may mount a bucket of this machine: by itself it refuses loopback addresses."""

    def _prepare(self) -> tuple[list[str], dict[str, str]]:
        command, env = super()._prepare()
        return [*command, *(f"-{part}.allowUntrustedRemoteEndpoints" for part in ("volume", "filer", "s3"))], env

    def shell(self, script: str, env: dict[str, str]) -> None:
        path = f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}"
        env = {**os.environ, **env, "PATH": path, "NEAR_MASTER": f"127.0.0.1:{self._ports['master']}"}
        subprocess.run(["sh", "-euc", script], env=env, check=True, capture_output=True, timeout=60)


def test_a_seaweedfs_set_up_as_the_manual_says_asks_the_origin_once_for_all_nodes(
    s3_server: S3Server, fault_proxy: FaultProxy, data: bytes, blocks: list[Block]
) -> None:
    s3_server.create_bucket("tokens")
    with open_store("s3://tokens/web", **s3_server.storage_options) as store:
        store.put("a/object", data)
    recipe = re.search(r"```sh\n(weed shell .*?)```", _MANUAL.read_text(), re.DOTALL)
    assert recipe is not None
    # All that goes to the origin goes through the proxy, whoever asks.
    with open_store("s3://tokens/web", **fault_proxy.storage_options) as origin, _Cluster() as cluster:
        cluster.shell(recipe[1], fault_proxy.env)
        fault_proxy.clear_requests()
        options: dict[str, Any] = {"ram": 0, "near": "s3://near", "near_options": cluster.storage_options}
        for _ in range(2):  # two nodes: none has a tier
            with TieredCache(**options, near_timeout_s=30.0) as cache:
                for block in blocks:
                    assert cache.get(origin, block) == data[block.start : block.end]
                assert (cache.stats().near_hits, cache.stats().misses) == (8, 0)
        asked = [(request.method, request.path, request.bytes_sent) for request in fault_proxy.requests]
        assert asked == [("GET", "/tokens/web/a/object", len(data))]
        with TieredCache(**options, near_timeout_s=0.5) as cache:
            assert cache.get(origin, blocks[0]) == data[:SIZE]
            os.kill(cluster.pid, signal.SIGKILL)
            for block in blocks[1:]:
                assert cache.get(origin, block) == data[block.start : block.end]
            assert (cache.stats().near_hits, cache.stats().misses) == (1, 7)


# --- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"near": ""}, "near must be a URL or an absolute path"),
        ({"near": "notaurl"}, "near must be a URL or an absolute path, got \"'notaurl'\" (hint"),
        ({"near": 5}, "near must be a URL or an absolute path"),
        ({"near_timeout_s": float("inf")}, "near_timeout_s must be"),
        ({"near_timeout_s": float("nan")}, "near_timeout_s must be"),
        ({"near_timeout_s": 0}, "near_timeout_s must be"),
        ({"near_timeout_s": "2"}, "near_timeout_s must be"),
        ({"near_timeout_s": True}, "near_timeout_s must be"),
        ({"near_options": 5}, "near_options must be a dict"),
        ({"near_options": {"keys": "k"}}, "near=s3://cache: no such option, got 'keys'"),
        ({"near": "s3://user:CANARY@cache"}, "near=s3://cache: credentials do not belong in a URL"),
    ],
)
def test_a_mistake_in_what_it_is_given_is_told_as_it_was_written(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        TieredCache(**{"ram": 0, "near": "s3://cache", **given})
    assert words in str(caught.value)
    assert "CANARY" not in str(caught.value)


@pytest.mark.parametrize("scheme", ["s3", "s3a", "S3", "gs", "gcs", "http", "HTTPS"])
def test_its_time_out_is_the_policy_of_every_store_that_has_one(scheme: str) -> None:
    near = Near(f"{scheme}://cache", storage_options={}, timeout_s=0.25)
    with near._open("s3://bucket/path") as store:
        assert isinstance(store, RemoteStore)
        assert (store._policy.timeout_s, store._policy.hedge_share) == (0.25, 0.0)
    near.close()
