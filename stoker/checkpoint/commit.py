"""From every rank's files to one visible step, without a collective.

Each rank ends its part by creating ``frag/{rank}.arrow`` (or ``frag/{rank}.failed.json``). Rank 0 collects the fragments,
checks that together they cover every tensor exactly, writes the manifest and appends to the log; the others watch the
log. Whoever gives up says so in ``verdict.json``, so that a dead or hanging rank becomes the same typed error on all.
"""

import json
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from time import monotonic, sleep
from typing import Any

from ..errors import AlreadyExists, AttemptCollected, CommitUnknown, Fenced, KeyNotFound, SaveFailed, SaveSkipped
from ..storage.store import ObjectStore
from .blob import ELSEWHERE_PATH, elsewhere_image
from .log import CheckpointLog, Record
from .manifest import Fragment, Manifest, merge

__all__ = [
    "Attempt",
    "collect_fragments",
    "give_up",
    "pauses",
    "rank_failed",
    "report_failure",
    "verdict_of",
    "wait_for_own_term",
    "wait_for_verdict",
    "write_manifest",
]

_GRACE_S = 5.0
"""How much longer than rank 0 the others wait: its verdict has to travel."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One try at one step, the same on every rank."""

    step: int
    nonce: str
    directory: str
    run_id: str
    rank: int
    world_size: int
    deadline: float
    """Of :func:`time.monotonic`; each rank counts from its own ``save()``."""

    def fragment_key(self, rank: int) -> str:
        """Of what a rank holds and has written."""
        return f"{self.directory}/frag/{rank:05d}.arrow"

    def failure_key(self, rank: int) -> str:
        """Of why a rank could not write it."""
        return f"{self.directory}/frag/{rank:05d}.failed.json"

    @property
    def verdict_key(self) -> str:
        """Of rank 0's word that there will be no commit."""
        return f"{self.directory}/verdict.json"

    @property
    def manifest_key(self) -> str:
        """Of the merged fragments."""
        return f"{self.directory}/manifest.arrow"


def pauses(deadline: float) -> Iterator[None]:
    """Ever longer pauses, 10 ms to 0.5 s, until `deadline`."""
    pause_s = 0.01
    while (left := deadline - monotonic()) > 0:
        yield
        sleep(min(pause_s, left))
        pause_s = min(pause_s * 1.5, 0.5)


def report_failure(store: ObjectStore, attempt: Attempt, error: BaseException) -> None:
    """Tell rank 0 that this rank's part will never come."""
    store.put(
        attempt.failure_key(attempt.rank),
        json.dumps({"rank": attempt.rank, "host": socket.gethostname(), **_told(error)}).encode(),
    )


def give_up(store: ObjectStore, attempt: Attempt, error: BaseException) -> None:
    """Rank 0's verdict that this attempt will never be committed."""
    store.put(attempt.verdict_key, json.dumps({"ok": False, **_told(error)}).encode())


def _told(error: BaseException) -> dict[str, Any]:
    return {"error": f"{type(error).__name__}: {error}"[:2000], "skipped": isinstance(error, SaveSkipped)}


def _failure(report: dict[str, Any]) -> type[SaveFailed]:
    return SaveSkipped if report.get("skipped") is True else SaveFailed


def _read_json(store: ObjectStore, key: str) -> dict[str, Any] | None:
    try:
        found = json.loads(bytes(store.get(key)))
    except KeyNotFound:
        return None
    return found if isinstance(found, dict) else None


def verdict_of(store: ObjectStore, attempt: Attempt) -> SaveFailed | None:
    """The error of an attempt that rank 0 gave up; None if it has not."""
    verdict = _read_json(store, attempt.verdict_key)
    if verdict is None:
        return None
    return _failure(verdict)("rank 0 must commit", value=verdict.get("error"), place=store.place(attempt.directory))


def collect_fragments(store: ObjectStore, attempt: Attempt, own: Fragment | None) -> Manifest:
    """Rank 0: wait for every other rank's fragment, check that they cover everything, check each blob's size.

    Raises:
        SaveFailed: a rank reported a failure, or gave no fragment by the deadline; it is named with its host.
        SaveSkipped: a rank was still busy with another save.
    """
    fragments = {} if own is None else {attempt.rank: own}
    for _ in pauses(attempt.deadline):
        if len(fragments) == attempt.world_size:
            break
        there = {info.key for info in store.list(f"{attempt.directory}/frag/")}
        for rank in range(attempt.world_size):
            if rank in fragments:
                continue
            if attempt.failure_key(rank) in there:
                raise rank_failed(store, attempt, rank)
            key = attempt.fragment_key(rank)
            if key in there:
                fragments[rank] = Fragment.from_bytes(store.get(key), place=store.place(key))
    missing = sorted(set(range(attempt.world_size)) - set(fragments))
    if missing:
        raise SaveFailed(
            "every rank must deliver its fragment by the deadline",
            value=f"nothing from ranks {missing} of {attempt.world_size}",
            place=store.place(attempt.directory),
            hint=f"seen from host {socket.gethostname()}; look at the logs of those ranks",
        )
    for rank, fragment in fragments.items():
        for blob in fragment.blobs if fragment is not own else ():
            key = f"{blob.home or attempt.directory}/{blob.path}"
            size = store.head(key).size
            if size != blob.size_bytes:
                raise SaveFailed(f"rank {rank} wrote {blob.size_bytes} bytes", value=size, place=store.place(key))
    return merge(
        [fragments[rank] for rank in range(attempt.world_size)],
        world_size=attempt.world_size,
        place=store.place(attempt.directory),
    )


def rank_failed(store: ObjectStore, attempt: Attempt, rank: int) -> SaveFailed:
    report = _read_json(store, attempt.failure_key(rank)) or {}
    return _failure(report)(
        f"rank {rank} on host {report.get('host', 'unknown')} must save its part",
        value=report.get("error", "no reason given"),
        place=store.place(attempt.directory),
    )


def write_manifest(store: ObjectStore, attempt: Attempt, manifest: Manifest) -> None:
    """Create the manifest; one's own from a lost reply is fine.

    Before it, where the step refers to blobs elsewhere, a file beside its own that torch's Hugging Face reader trips over:
    without those blobs it may load a part of a tensor and say nothing.
    """
    if manifest.refs:
        store.put(f"{attempt.directory}/{ELSEWHERE_PATH}", elsewhere_image())
    data = manifest.to_bytes()
    try:
        store.create(attempt.manifest_key, data)
    except AlreadyExists:
        if bytes(store.get(attempt.manifest_key)) != data:
            raise


def wait_for_verdict(store: ObjectStore, attempt: Attempt, log: CheckpointLog) -> Record:
    """Another rank than 0: return a record that holds the step, once it is committed.

    Raises:
        SaveFailed: rank 0's verdict.
        SaveSkipped: a rank was still busy with another save.
        Fenced: a newer run opened this root.
        AttemptCollected: clean-up took this attempt for garbage.
        CommitUnknown: neither by the deadline; the step may still appear, and then it is whole.
    """
    seen_own_run = False
    for _ in pauses(attempt.deadline + _GRACE_S):
        head = log.head()
        if head is not None:
            live = head.live.get(attempt.step)
            if live is not None and live.nonce == attempt.nonce:
                return head
            seen_own_run = seen_own_run or head.run_id == attempt.run_id
            if seen_own_run and head.run_id != attempt.run_id:
                raise Fenced("a newer run opened this root", value=head.run_id, place=store.place(attempt.directory))
            if attempt.nonce in head.dead:  # its verdict may be deleted with the rest
                raise AttemptCollected(
                    "clean-up must not have announced this attempt's data",
                    place=store.place(attempt.directory),
                    hint="save again",
                )
        verdict = verdict_of(store, attempt)
        if verdict is not None:
            raise verdict
    raise CommitUnknown(
        "rank 0 must commit or give up by the deadline",
        value="no word",
        place=store.place(attempt.directory),
        hint=f"seen from host {socket.gethostname()}; the step may still appear, and then it is whole",
    )


def wait_for_own_term(log: CheckpointLog, run_id: str, above_term: int, deadline: float) -> Record:
    """Another rank than 0: return once rank 0 has opened this run's term, a newer one than `above_term`.

    Raises:
        Fenced: this run had a term, and another has opened since.
        SaveFailed: not by the deadline.
    """
    for _ in pauses(deadline):
        head = log.head()
        if head is not None and head.run_id == run_id and head.term > above_term:
            return head
        if head is not None and above_term and head.run_id != run_id:
            raise Fenced("a newer run opened this root", value=head.run_id, place=f"run {run_id}")
    raise SaveFailed(
        "rank 0 must open the run in the log",
        value="no record",
        place=f"run {run_id}",
        hint=f"seen from host {socket.gethostname()}; does this rank see the same root?",
    )
