"""Trials of the network policy: a real store behind a proxy that breaks things, and what callers see of it."""

import itertools
import os
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stoker._console import progress
from stoker.errors import StokerError
from stoker.metrics import counters
from stoker.storage import Block, NetworkPolicy, ObjectStore, TieredCache, open_store
from stoker.storage._checksums import crc32c
from stoker.testing import Fault, FaultProxy, S3Server

__all__ = ["CALLS", "FAULTS", "Cell", "Figure", "NetworkReport", "late", "matrix", "outage", "prove_network"]

MIB = 2**20
PATIENCE = NetworkPolicy(connect_timeout_s=1.0, stall_timeout_s=0.5, attempt_timeout_s=1.0, timeout_s=3.0)
SMALL, LARGE = os.urandom(MIB // 2), os.urandom(9 * MIB)
"""The large one is read in two ranges and written in two parts."""

FAULTS: dict[str, Fault] = {
    "503": Fault("status", status=503),
    "429": Fault("status", status=429),
    "500": Fault("status", status=500),
    "200 with an error body": Fault("status", status=200),
    "expired credentials": Fault("status", status=403, code="ExpiredToken"),
    "redirect to another host": Fault("redirect", location="http://127.0.0.1:9"),
    "reset before the reply": Fault("reset"),
    "reset in mid-body": Fault("reset", at_byte=1000),
    "end before the reply": Fault("close"),
    "end in mid-body": Fault("close", at_byte=1000),
    "stall before the reply": Fault("stall"),
    "stall in mid-body": Fault("stall", at_byte=1000),
    "reply lost": Fault("lost_reply"),
    "bit flip": Fault("flip"),
    "truncation": Fault("truncate"),
    "wrong bytes": Fault("wrong_bytes"),
    "wrong range": Fault("wrong_content_range"),
    "delay": Fault("delay", delay_s=0.2),
    "slow drip": Fault("drip", bytes_per_s=3e6),
}
SILENT = {"bit flip", "wrong bytes"}
"""No client can see these; callers with checksums do."""


def _get(store: ObjectStore) -> None:
    assert store.get("large") == LARGE


def _get_range(store: ObjectStore) -> None:
    assert store.get("small", 1000, 200_000) == SMALL[1000:200_000]


def _get_into(store: ObjectStore) -> None:
    buffer = memoryview(bytearray(len(LARGE) - 5))
    store.get_into("large", buffer, 5)
    assert buffer == LARGE[5:]


def _block(store: ObjectStore) -> None:
    block = Block(key="large", version="v", start=0, end=4 * MIB, crc32c=crc32c(LARGE[: 4 * MIB]))
    with tempfile.TemporaryDirectory() as directory, TieredCache(ram=0, disk=directory) as cache:
        assert cache.get(store, block) == LARGE[: 4 * MIB]


def _head(store: ObjectStore) -> None:
    assert store.head("large").size == len(LARGE)


def _list(store: ObjectStore) -> None:
    assert {"large", "small"} <= {info.key for info in store.list()}


def _put(store: ObjectStore) -> None:
    store.put("put", SMALL)
    assert store.head("put").size == len(SMALL)


def _create(store: ObjectStore) -> None:
    name = f"create-{uuid.uuid4().hex}"
    store.create(name, SMALL)
    assert store.head(name).size == len(SMALL)


def _write(store: ObjectStore) -> None:
    name = f"write-{uuid.uuid4().hex}"
    with store.open_writer(name, len(LARGE)) as writer:
        writer.write_at(0, LARGE)
        writer.commit()
    assert store.head(name).size == len(LARGE)


def _delete(store: ObjectStore) -> None:
    store.delete("small-2")
    assert not store.exists("small-2")


CALLS: dict[str, Callable[[ObjectStore], None]] = {
    "get": _get,
    "get a range": _get_range,
    "get into a buffer": _get_into,
    "get a block through the cache": _block,
    "head": _head,
    "list": _list,
    "put": _put,
    "create": _create,
    "write": _write,
    "delete": _delete,
}
UNSEEN = {("200 with an error body", "list")}
"""Where *every* answer lies, an error that parses as an empty listing can't be told from one. Once is noticed."""
WITHOUT_CHECKSUM = {"get", "get a range", "get into a buffer"}


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One fault and one call: what came of it, and what was wrong with that.

    Attributes:
        outcome: ``"right"``, or the typed error.
        requests: that reached the proxy during the call.
        faults: how many of them were hit.
        violation: the promise that was broken; empty if none was.
    """

    fault: str
    call: str
    always: bool
    outcome: str
    seconds: float
    requests: int
    faults: int
    violation: str = ""


def matrix(
    server: S3Server,
    *,
    always: bool,
    faults: Sequence[str] | None = None,
    calls: Sequence[str] | None = None,
    threads: int = 1,
    deadline_s: float = 60.0,
    progress: Callable[[], None] = lambda: None,
) -> list[Cell]:
    """Every fault with every call, once or at each request: right bytes or a typed error, within `deadline_s`."""
    cells = list(itertools.product(faults or FAULTS, calls or CALLS))

    def one(cell: tuple[str, str]) -> Cell | None:
        fault, call = cell
        try:
            if (fault in SILENT and call in WITHOUT_CHECKSUM) or (always and cell in UNSEEN):
                return None
            return _cell(server, fault, call, always, deadline_s)
        finally:
            progress()

    with ThreadPoolExecutor(threads) as pool:
        return [found for found in pool.map(one, cells) if found is not None]


@contextmanager
def _filled(server: S3Server) -> Iterator[str]:
    url = server.url("stoker", f"faults/{uuid.uuid4().hex}")
    with open_store(url, **server.storage_options) as store:
        for name, data in (("large", LARGE), ("small", SMALL), ("small-2", SMALL)):
            store.put(name, data)
        yield url
        for info in list(store.list()):
            store.delete(info.key)


def _cell(server: S3Server, fault: str, call: str, always: bool, deadline_s: float) -> Cell:
    with (
        _filled(server) as url,
        FaultProxy(server) as proxy,
        open_store(url, network=PATIENCE, **proxy.storage_options) as store,
    ):
        if call == "create":
            store.create("warm", b"1")  # the probe of the endpoint is not what is tried here
        proxy.clear_requests()
        rule = proxy.add(FAULTS[fault], times=None if always else 1)
        began = time.monotonic()
        outcome, violation = "right", ""
        try:
            CALLS[call](store)
        except StokerError as error:
            outcome = f"{type(error).__name__}: {error}"
            if proxy.storage_options["secret"] in repr(error):
                violation = "a secret is in the error"
        except AssertionError:
            outcome = violation = "wrong bytes"
        except Exception as error:
            outcome = violation = f"untyped {error!r}"
        seconds = time.monotonic() - began
        if seconds > deadline_s:
            violation = f"ended after {seconds:.1f} s"
        requests, hits = len(proxy.requests), rule.hits
        proxy.clear()
        proxy.drop_connections()
    return Cell(
        fault=fault,
        call=call,
        always=always,
        outcome=outcome,
        seconds=seconds,
        requests=requests,
        faults=hits,
        violation=violation,
    )


# --------------------------------------------------------------------------------------------------------------- figures


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One measured promise: `value` must be at most `bound`."""

    name: str
    value: float
    bound: float
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return self.value <= self.bound

    def __str__(self) -> str:
        facts = ", ".join(f"{name} {value}" for name, value in self.facts.items())
        return f"{'ok ' if self.ok else 'NOT'} {self.name}: {self.value:.3f}, at most {self.bound} ({facts})"


def late(server: S3Server, *, requests: int = 5_000, threads: int = 4, size: int = 65_536) -> list[Figure]:
    """One request in a hundred is 1.5 s late: what the slowest reads cost beside a clean run, and in requests."""
    url = server.url("stoker", f"late/{uuid.uuid4().hex}")
    with FaultProxy(server) as proxy, open_store(url, **proxy.storage_options) as store:
        store.put("object", LARGE)
        starts = np.random.default_rng(0).integers(0, len(LARGE) - size, requests).tolist()

        def read(start: int) -> float:
            began = time.perf_counter()
            data = store.get("object", start, start + size)
            seconds = time.perf_counter() - began
            assert data == LARGE[start : start + size]
            return seconds

        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(read, starts[:500]))
            clean = list(pool.map(read, starts))
            before = counters.snapshot()
            proxy.clear_requests()
            rule = proxy.add(Fault("delay", delay_s=1.5), probability=0.01)
            faulty = list(pool.map(read, starts))
            proxy.clear()
        counted = counters.since(before)
        sent = len(proxy.requests)
        proxy.drop_connections()
    p999 = [float(np.quantile(times, 0.999)) for times in (clean, faulty)]
    facts = {
        "clean_ms": round(1e3 * p999[0], 1),
        "faulty_ms": round(1e3 * p999[1], 1),
        "p50_ms": round(1e3 * float(np.median(clean)), 2),
        "late": rule.hits,
        "hedges": int(counted.get("store.hedges", 0)),
        "won": int(counted.get("store.hedges.won", 0)),
    }
    return [
        Figure(name="p99.9 with 1 % of requests 1.5 s late / clean", value=p999[1] / p999[0], bound=2.0, facts=facts),
        Figure(name="requests sent / asked for", value=sent / requests, bound=1.05, facts={"sent": sent}),
    ]


def outage(server: S3Server, *, seconds: float = 10.0, threads: int = 8, size: int = MIB) -> list[Figure]:
    """Every request is answered by 503 for a while: how many are sent, are any lost, how soon is all as before."""
    url = server.url("stoker", f"outage/{uuid.uuid4().hex}")
    with FaultProxy(server) as proxy, open_store(url, **proxy.storage_options) as store:
        store.put("object", LARGE)
        done: list[float] = []
        lost: list[StokerError] = []
        stop = threading.Event()

        def reader(number: int) -> None:
            start = number * 65_536
            while not stop.is_set():
                try:
                    assert store.get("object", start, start + size) == LARGE[start : start + size]
                    done.append(time.monotonic())
                except StokerError as error:
                    lost.append(error)

        with ThreadPoolExecutor(threads) as pool:
            readers = [pool.submit(reader, number) for number in range(threads)]
            _let_pass(2.0)
            began = time.monotonic()
            proxy.clear_requests()
            _let_pass(seconds)
            clean = len(proxy.requests)
            clean_rate = sum(began <= moment for moment in done) / seconds
            with proxy.outage(Fault("status", status=503)):
                proxy.clear_requests()
                _let_pass(seconds)
                during = len(proxy.requests)
            ended = time.monotonic()
            _let_pass(10.0)
            stop.set()
            for running in readers:
                running.result()
    after_rate = sum(ended + 5 <= moment < ended + 10 for moment in done) / 5
    first = min((moment for moment in done if moment > ended), default=float("inf")) - ended
    return [
        Figure(
            name="requests in an outage / in a clean run as long",
            value=during / clean,
            bound=1.1,
            facts={"sent": during},
        ),
        Figure(name="reads lost", value=len(lost), bound=0, facts={"first read after": f"{first:.2f} s"}),
        Figure(
            name="clean rate / rate from 5 s after the outage on",
            value=clean_rate / max(after_rate, 1e-9),
            bound=1.15,
            facts={"clean_per_s": round(clean_rate, 1), "after_per_s": round(after_rate, 1)},
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class NetworkReport:
    """All that this trial found."""

    cells: list[Cell]
    figures: list[Figure]

    @property
    def ok(self) -> bool:
        return not any(cell.violation for cell in self.cells) and all(figure.ok for figure in self.figures)

    def __str__(self) -> str:
        right = sum(cell.outcome == "right" for cell in self.cells)
        lines = [f"network: {len(self.cells)} pairs of fault and call, {right} right, the others a typed error in time"]
        lines += [f"NOT {cell.fault}, {cell.call}: {cell.violation}" for cell in self.cells if cell.violation]
        return "\n".join([*lines, *map(str, self.figures)])

    def to_json(self) -> dict[str, Any]:
        return {
            "trial": "network",
            "ok": self.ok,
            "cells": [asdict(cell) for cell in self.cells],
            "figures": [{**asdict(figure), "ok": figure.ok} for figure in self.figures],
        }


def prove_network() -> NetworkReport:
    """The whole matrix, each fault once and at every request, then the figures."""
    with S3Server() as server:
        with progress("network", total=2 * len(FAULTS) * len(CALLS), unit="pairs") as meter:
            cells = [
                cell
                for always in (False, True)
                for cell in matrix(server, always=always, threads=4, progress=lambda: meter.advance(1))
            ]
        return NetworkReport(cells=cells, figures=[*late(server), *outage(server)])


def _let_pass(seconds: float) -> None:
    """What is measured here goes by the clock."""
    threading.Event().wait(seconds)
