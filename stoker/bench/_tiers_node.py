"""Rows of ``stoker bench tiers`` about a node: several processes, a bounded memory, a link of known width.

What is measured runs in processes of its own, ``python -m stoker.bench._tiers_node``, which say when they are ready and
start when they are told, so that no row pays for their start.
"""

import json
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import sleep
from typing import Any, Self

from ..errors import CorruptionError, StoreError
from ..storage import Block, NetworkPolicy, ObjectStore, TieredCache, open_store
from ..storage._checksums import crc32c
from ._tiers_cache import capacity
from ._tiers_content import MIB, NODE, STREAM, THROTTLED, Content, Piece, each, timed
from ._tiers_store import Bucket
from .frame import Kind, Outcome, Sample, Variant

PROCESSES = 8
LINK_BYTES_PER_S = 300e6
_LINK_SHARE = 0.7
"""Of what the proxy can carry, the most that it is asked to: above, the row would measure the proxy."""
_LINK_THREADS = 8
STREAM_BUDGET_BYTES = 256 * MIB
STREAM_PASSES = 8
STREAM_SLACK_BYTES = 64 * MIB
"""For the interpreter, its libraries and the client's buffers."""


# --- the processes ------------------------------------------------------------------------------------------------------


class Readers:
    """Processes that read all blocks in order through caches of one directory."""

    def __init__(
        self,
        number: int,
        content: Content,
        url: str,
        options: Mapping[str, Any],
        ram_path: Path,
        *,
        ram_bytes: int,
        prefetch_bytes: int = 256 * MIB,
        passes: int = 1,
        hedge: bool = True,
    ) -> None:
        request = {
            "url": url,
            "options": dict(options),
            "ram": ram_bytes,
            "ram_path": str(ram_path),
            "prefetch_bytes": prefetch_bytes,
            "passes": passes,
            "hedge": hedge,
            "blocks": [[piece.key, piece.start, piece.end, piece.crc] for piece in content.pieces],
        }
        command = [sys.executable, "-m", __name__]
        self._processes = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(number)
        ]
        try:
            for process in self._processes:
                self._tell(process, json.dumps(request))  # not as an argument: there are keys in it
            for process in self._processes:
                self._hear(process)
        except BaseException:
            self.close()
            raise

    @property
    def pids(self) -> list[int]:
        return [process.pid for process in self._processes]

    def go(self, version: str) -> None:
        """Start them all on blocks of this version: other names than any before, so none is in a tier."""
        for process in self._processes:
            self._tell(process, version)

    def clear(self) -> None:
        """Empty the cache, between two runs."""
        self._tell(self._processes[0], "")
        self._hear(self._processes[0])

    def results(self) -> list[dict[str, Any]]:
        """What each one counted, when all have read everything."""
        return [self._hear(process) for process in self._processes]

    def results_while(self, watching: Iterator[None]) -> list[dict[str, Any]]:
        """The same, with a look at something every other millisecond until then."""
        for process in self._processes:
            assert process.stdout is not None
            while not select.select([process.stdout], [], [], 0.002)[0]:
                next(watching)
        return self.results()

    def _tell(self, process: "subprocess.Popen[str]", line: str) -> None:
        assert process.stdin is not None
        process.stdin.write(line + "\n")
        process.stdin.flush()

    def _hear(self, process: "subprocess.Popen[str]") -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise StoreError("a reading process must end well", value=f"exit {process.wait()}", place="bench tiers")
        found: dict[str, Any] = json.loads(line)
        if "wrong" in found:
            raise CorruptionError("every block must be the bytes that were written", place=found["wrong"])
        return found

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def main() -> None:
    """One reading process."""
    request = json.loads(sys.stdin.readline())
    policy = NetworkPolicy() if request["hedge"] else NetworkPolicy(hedge_share=0.0)
    with (
        open_store(request["url"], network=policy, **request["options"]) as store,
        TieredCache(
            ram=request["ram"],
            ram_path=request["ram_path"],
            prefetch_bytes=request["prefetch_bytes"],
            eviction="sieve" if request["passes"] > 1 else "keep",
        ) as cache,
    ):
        _say(ready=True)
        for line in sys.stdin:
            if version := line.strip():
                _say(**_read(store, cache, request, version))
            else:
                _say(cleared=cache.clear())


def _read(store: ObjectStore, cache: TieredCache, request: Mapping[str, Any], version: str) -> dict[str, Any]:
    blocks = [
        Block(key=key, version=f"{version}-{number}", start=start, end=end, crc32c=crc)
        for number in range(request["passes"])
        for key, start, end, crc in request["blocks"]
    ]
    cache.prefetch(store, blocks)
    delivered = 0
    for block in blocks:
        view = cache.get(store, block)
        if len(view) != block.size_bytes or crc32c(view) != block.crc32c:
            return {"wrong": f"{block.key} [{block.start}, {block.end})"}
        delivered += len(view)
        del view
    return {"delivered": delivered}


def _say(**facts: Any) -> None:
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()


# --- eight processes on one cold set ------------------------------------------------------------------------------------


_SETTLE_S = 0.2


class NodeRow:
    """So many processes, each time on blocks that are nowhere yet: bytes delivered to all of them."""

    def __init__(self, bucket: Bucket, tier: Path, processes: int) -> None:
        self._bucket, self._tier, self._processes = bucket, tier, processes
        self._stack = ExitStack()
        self._runs = 0

    def variant(self, name: str, kind: Kind, *notes: str) -> Variant:
        return Variant(
            name=name,
            kind=kind,
            run=self._run,
            setup=self._start,
            teardown=self._stack.close,
            params={"processes": self._processes},
            notes=notes,
        )

    def _start(self) -> None:
        from ..testing.proxy import FaultProxy

        bucket = self._bucket
        assert bucket.endpoint_url is not None
        self._stack.callback(shutil.rmtree, self._tier, ignore_errors=True)
        self._proxy = self._stack.enter_context(FaultProxy(bucket.endpoint_url))
        self._readers = self._stack.enter_context(
            Readers(
                self._processes,
                bucket.content,
                bucket.url,
                {**bucket.options, "endpoint_url": self._proxy.endpoint_url},
                self._tier,
                # Twice, since a reader may still hold the last block of the run before when that is cleared away.
                ram_bytes=2 * capacity(bucket.content),
                hedge=False,  # each byte is asked for once, or the cache asked twice
            )
        )

    def _run(self) -> Outcome:
        found: list[dict[str, Any]] = []

        def read() -> None:
            self._readers.go(f"run-{self._runs}")
            found.extend(self._readers.results())

        self._runs += 1
        self._proxy.clear_requests()
        seconds = timed(read)
        ranges = [(request.path, request.byte_range) for request in self._proxy.requests if request.method == "GET"]
        # A thread that still looks whether another process has brought a block must find it, or it would ask once more.
        sleep(_SETTLE_S)
        self._readers.clear()
        blocks = len(self._bucket.content.pieces)
        if len(ranges) != blocks or len(set(ranges)) != blocks:
            value = f"{len(ranges)} requests for {blocks} blocks"
            raise StoreError("each block must be requested once", value=value, place=NODE)
        return Sample(value=sum(one["delivered"] for one in found) / seconds / 1e9, verified=True)


def node_variants(bucket: Bucket, shm: Path) -> Sequence[Variant]:
    """One process alone, and several on one cache."""
    note = "bytes delivered to all of them; each block was requested once, by the count of the proxy between"
    return [
        NodeRow(bucket, shm / "alone", 1).variant("stoker TieredCache, one process", "limit"),
        NodeRow(bucket, shm / "node", PROCESSES).variant(f"stoker TieredCache, {PROCESSES} processes", "stoker", note),
    ]


# --- a stream through a bounded memory ----------------------------------------------------------------------------------


def stream_variants(bucket: Bucket, shm: Path) -> Sequence[Variant]:
    """Eight times the budget streamed by one process: the most that it ever had in memory of its own or shared."""
    content, tier = bucket.content, shm / "stream"
    budget = min(len(content.memory), STREAM_BUDGET_BYTES)
    limit_mib = (budget + STREAM_SLACK_BYTES) / MIB
    # Half of it in the tier, a quarter under way, and each block on its way from the one to the other stands in both.
    ram, ahead = budget // 2, budget // 4

    def run() -> Outcome:
        with Readers(
            1,
            content,
            bucket.url,
            bucket.options,
            tier,
            ram_bytes=ram,
            prefetch_bytes=ahead,
            passes=STREAM_PASSES,
        ) as readers:
            (pid,) = readers.pids
            most = 0

            def watch() -> Iterator[None]:
                nonlocal most
                while True:
                    most = max(most, resident_bytes_of(pid))
                    yield

            readers.go("stream")
            found = readers.results_while(watch())
        shutil.rmtree(tier)
        if found[0]["delivered"] != STREAM_PASSES * len(content.memory):
            raise CorruptionError("every byte must be delivered", value=found[0]["delivered"], place=STREAM)
        return Sample(value=most / MIB, verified=True)

    return [
        Variant(
            name="budget + 64 MiB",
            kind="limit",
            run=lambda: Sample(value=limit_mib, verified=True),
            params={"budget_bytes": budget},
            notes=("a bound, not a measurement",),
        ),
        Variant(
            name="stoker TieredCache, peak RssAnon + RssShmem",
            kind="stoker",
            run=run,
            teardown=lambda: shutil.rmtree(tier, ignore_errors=True),
            params={"budget_bytes": budget, "ram_bytes": ram, "prefetch_bytes": ahead},
        ),
    ]


def resident_bytes_of(pid: int) -> int:
    """RssAnon + RssShmem of a process: what it has in memory that no file gives back."""
    kib = 0
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssShmem"):
            kib += int(value.split()[0])
    return kib << 10


# --- a link of known width ----------------------------------------------------------------------------------------------


@contextmanager
def link(bucket: Bucket) -> Iterator["Link"]:
    """A proxy before the store, in a process of its own, that carries so many bytes a second."""
    assert bucket.endpoint_url is not None
    command = [sys.executable, "-m", __name__, "link", bucket.endpoint_url]
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        yield Link(process)


class Link:
    """The proxy's process, told over its input how wide to be."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process
        assert process.stdout is not None
        self.endpoint_url = process.stdout.readline().strip()
        if not self.endpoint_url:
            raise StoreError("the proxy must start", value=f"exit {process.wait()}", place=THROTTLED)

    def limit(self, bytes_per_s: float) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(f"{bytes_per_s}\n")
        self._process.stdin.flush()
        self._process.stdout.readline()


def serve_link(server_url: str) -> None:
    """The proxy's process: a rate a line, until its input ends."""
    from ..testing.proxy import FaultProxy

    with FaultProxy(server_url) as proxy:
        sys.stdout.write(proxy.endpoint_url + "\n")
        sys.stdout.flush()
        for line in sys.stdin:
            proxy.bytes_per_s = float(line) or None
            sys.stdout.write("set\n")
            sys.stdout.flush()


class ThrottledRows:
    """Blocks that no tier has, over a link whose width is set to 300 MB/s, or to what the proxy here can carry."""

    def __init__(self, bucket: Bucket, shm: Path) -> None:
        self._bucket, self._tier = bucket, shm / "throttled"
        self._stack = ExitStack()
        self._rate = 0.0
        self._params: dict[str, Any] = {"io_threads": _LINK_THREADS}
        self._notes: list[str] = []

    def variants(self) -> Sequence[Variant]:
        return [
            Variant(
                name="the link",
                kind="limit",
                run=lambda: Sample(value=self._rate / 1e9, verified=True),
                setup=self._open,
                teardown=self._stack.close,
                params=self._params,
                notes=self._notes,
            ),
            Variant(name="stoker TieredCache, S3 into RAM", kind="stoker", run=self._ours, params=self._params),
            Variant(name="obstore get_range + crc32c", kind="peer", run=self._bare, params=self._params),
        ]

    def _open(self) -> None:
        bucket = self._bucket
        self._link = self._stack.enter_context(link(bucket))
        options = {**bucket.options, "endpoint_url": self._link.endpoint_url}
        self._through = Bucket(bucket.content, bucket.url, options, prefix="")  # the same objects by another way
        self._stack.callback(self._through.store.close)
        self._stack.callback(shutil.rmtree, self._tier, ignore_errors=True)
        content = bucket.content
        free = max(len(content.memory) / self._bare_seconds() for _ in range(2))
        self._rate = min(LINK_BYTES_PER_S, _LINK_SHARE * free)
        self._link.limit(self._rate)
        self._params["link_bytes_per_s"] = round(self._rate)
        self._notes.append(
            f"throttled to {self._rate / 1e6:.0f} MB/s; the proxy carries {free / 1e6:.0f} MB/s on this machine"
        )

    def _bare_seconds(self) -> float:
        def fetch(piece: Piece) -> None:
            piece.require(self._through.bare_get(piece), "obstore get_range")

        return each(self._bucket.content.pieces, _LINK_THREADS, fetch)

    def _bare(self) -> Outcome:
        return self._bucket.content.rate(self._bare_seconds())

    def _ours(self) -> Outcome:
        content, store = self._bucket.content, self._through.store
        with TieredCache(ram=capacity(content), ram_path=self._tier) as cache:
            seconds = each(content.pieces, _LINK_THREADS, lambda piece: cache.get(store, piece.block))
            for piece in content.pieces:
                piece.require(cache.get(store, piece.block), THROTTLED)
        shutil.rmtree(self._tier)
        return content.rate(seconds, origin="object store, kept in the RAM tier")


if __name__ == "__main__":
    serve_link(sys.argv[2]) if sys.argv[1:2] == ["link"] else main()
