"""``stoker bench ckpt --only upload``: a save to an S3 server on this machine beside bare concurrent puts of its bytes.

``upload``
    10^9 bytes/s from the call of save until the step is committed. Limit: the same bytes from memory, by obstore's own
    ``put`` in several threads, one object for each part of a multipart upload.

The server is a child of the bench and shares the machine's processors with what is measured: only the ratio says something.
"""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from ..checkpoint import CheckpointManager
from ..storage import open_store
from ..testing.s3 import S3Server
from ._ckpt_job import Job, check_equal, large_state
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["UPLOAD", "run_upload"]

UPLOAD = "upload"
_PART_BYTES = 8 << 20
_THREADS = 8


def run_upload(
    *, size_bytes: int, runs: int, directory: Path, warmup: int = 1, progress: Callable[[], None] | None = None
) -> Report:
    """Save `size_bytes` of tensors to an S3 server that keeps its data below the system's temporary directory."""
    with S3Server() as server:
        job = _Uploads(Job(large_state(size_bytes), directory), server)
        size_bytes = job.job.size_bytes
        question = Question(
            bench="ckpt",
            cases=[Case(name=UPLOAD, unit="GB/s", goal_ratio=0.85, origin="host memory", bytes=size_bytes)],
            params={"size_bytes": size_bytes, "part_bytes": _PART_BYTES, "threads": _THREADS},
        )
        variants = [
            Variant(name="bare concurrent put", kind="limit", run=job.put, setup=job.open, teardown=job.close),
            Variant(name="stoker", kind="stoker", run=job.save, notes=("the server shares the machine's processors",)),
        ]
        return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


class _Uploads:
    def __init__(self, job: Job, server: S3Server) -> None:
        self.job, self._server = job, server
        self._url = server.url("stoker", f"bench-{uuid.uuid4().hex[:8]}")
        self._memory = np.zeros(0, np.uint8)
        self._bare: Any = None
        self._manager: CheckpointManager | None = None
        self._step = 0

    def open(self) -> None:
        from obstore.store import S3Store

        options = self._server.storage_options
        self._bare = S3Store(
            "stoker",
            prefix="bare",
            endpoint=self._server.endpoint_url,
            access_key_id=options["key"],
            secret_access_key=options["secret"],
            region="us-east-1",
            virtual_hosted_style_request=False,
            client_options={"allow_http": True, "timeout": "120s"},
        )
        self._memory = np.concatenate([tensor.view(-1).numpy().view(np.uint8) for tensor in self.job.state.values()])
        self._manager = CheckpointManager(self._url, storage_options=options, keep_last=1, grace_s=0.0)
        self._manager.prewarm({"model": self.job.state})

    def close(self) -> None:
        if self._manager is not None:
            self._manager.close()

    def put(self) -> Outcome:
        import obstore

        parts = range(0, len(self._memory), _PART_BYTES)
        with ThreadPoolExecutor(_THREADS) as threads:
            started = perf_counter()
            done = threads.map(
                lambda at: obstore.put(
                    self._bare, f"part-{at:012d}", self._memory[at : at + _PART_BYTES].data, use_multipart=False
                ),
                parts,
            )
            for _ in done:
                pass
            seconds = perf_counter() - started
        first = bytes(obstore.get(self._bare, "part-000000000000").bytes())
        verified = first == self._memory[:_PART_BYTES].tobytes()
        for at in parts:
            obstore.delete(self._bare, f"part-{at:012d}")
        return Sample(value=self.job.rate(seconds), verified=verified)

    def save(self) -> Outcome:
        assert self._manager is not None
        self._step += 1
        handle = self._manager.save(self._step, {"model": self.job.state})
        handle.wait("committed")
        seconds = handle.report().committed_s
        assert seconds is not None
        # By another name of the same bucket, so that no copy in memory serves it.
        with open_store(self._url, **self._server.storage_options) as store:
            sizes = sum(info.size for info in store.list(f"step-{self._step:012d}") if "/data/" in info.key)
        verified = sizes >= self.job.size_bytes
        if self._step == 1:
            self._manager.restore({"model": self.job.target})
            check_equal(self.job.state, self.job.target, place=self._url)
        return Sample(value=self.job.rate(seconds), verified=verified)
