"""What lies below a root that no step needs: found, announced, then deleted. Needs no torch.

Mark and sweep, without counters: the marks are what the records of the log need, steps and single blobs of others, so whatever dies in between leaves
garbage and never a step that lacks a byte. Data stays for its grace: an attempt may be in flight, and a reader may be at
a step that was retired a moment ago.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from time import time
from typing import Any, Literal

from ..storage.store import ObjectInfo, ObjectStore
from .log import CheckpointLog, Record, collect_record, kept_blobs, parse_step_directory

__all__ = ["Attempt", "GcReport", "Leftovers", "announce", "collect_garbage", "deletable", "find_leftovers"]

_NOTES = ("probe/", "stop/")
"""Small objects by which the ranks of one run find each other; a later run has no use for them."""


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """The directory of an attempt to save a step, and why it is garbage.

    Attributes:
        directory, step, nonce: which.
        reason: ``"retired"``: it was a step, or the log announced it as deleted; ``"unfinished"``: it never had a manifest.
        num_objects, num_bytes: what is left of it, without blobs that a step refers to: these stay.
        age_s: since its newest object was written.
    """

    directory: str
    step: int
    nonce: str
    reason: Literal["retired", "unfinished"]
    num_objects: int
    num_bytes: int
    age_s: float


@dataclass(frozen=True, kw_only=True)
class Leftovers:
    """What no step needs.

    Attributes:
        attempts: may be announced, then deleted.
        in_grace: will be garbage once their grace has passed, if nobody commits them.
        notes: keys of ended runs' notes; they may be deleted at once.
    """

    attempts: tuple[Attempt, ...]
    in_grace: tuple[Attempt, ...]
    notes: tuple[str, ...]


def find_leftovers(
    store: ObjectStore,
    log: CheckpointLog,
    *,
    grace_s: float,
    spare: Callable[[int, str], bool] = lambda step, nonce: False,
    run_note: str = "",
) -> Leftovers:
    """Look for garbage; changes nothing. Ages compare the store's clock with this machine's.

    Args:
        grace_s: data is left alone for so long after it was written, and after the log stopped to need it.
        spare: whether the caller looks after an attempt itself, by step and nonce.
        run_note: a note that the caller's run still needs.

    Raises:
        NoCheckpoint: there is no log, so nothing says what is garbage.
        CorruptRecord: a record of the log is damaged, so nothing may be deleted.
    """
    # First what there is, then what is needed: an attempt that is committed in between is seen as needed.
    objects: dict[str, list[ObjectInfo]] = {}
    for info in store.list("step-"):
        objects.setdefault(info.key.split("/", 1)[0], []).append(info)
    now = time()
    head, since = log.needed_since(now - grace_s)
    live, kept = {one.nonce for one in head.live.values()}, kept_blobs(head.live.values())
    in_use, kept_since = {one.nonce for one in since}, kept_blobs(since)
    attempts: list[Attempt] = []
    in_grace: list[Attempt] = []
    for directory, infos in sorted(objects.items()):
        parsed = parse_step_directory(directory)
        if parsed is None or parsed[1] in live or spare(*parsed):
            continue
        infos = _without(infos, directory, kept)
        if not infos:
            continue
        one = _attempt(directory, *parsed, infos, head, now)
        was_needed = one.nonce in in_use or len(_without(infos, directory, kept_since)) < len(infos)
        (in_grace if was_needed or one.age_s < grace_s else attempts).append(one)
    notes = [
        info.key
        for prefix in _NOTES
        for info in store.list(prefix)
        if info.key != run_note and now - info.modified_s >= grace_s
    ]
    return Leftovers(attempts=tuple(attempts), in_grace=tuple(in_grace), notes=tuple(notes))


def _without(infos: Iterable[ObjectInfo], directory: str, kept: Mapping[str, Collection[str]]) -> list[ObjectInfo]:
    """The objects of an attempt's directory without the blobs that are kept for other steps."""
    blobs = kept.get(directory, ())
    return [info for info in infos if info.key.removeprefix(f"{directory}/") not in blobs]


def deletable(store: ObjectStore, directory: str, kept: Mapping[str, Collection[str]]) -> list[ObjectInfo]:
    """What may go of a directory that is announced as dead; `kept` are blobs by directory (:func:`.log.kept_blobs`)."""
    return _without(store.list(f"{directory}/"), directory, kept)


def _attempt(directory: str, step: int, nonce: str, infos: list[ObjectInfo], head: Record, now: float) -> Attempt:
    was_step = nonce in head.dead or any(info.key == f"{directory}/manifest.arrow" for info in infos)
    return Attempt(
        directory=directory,
        step=step,
        nonce=nonce,
        reason="retired" if was_step else "unfinished",
        num_objects=len(infos),
        num_bytes=sum(info.size for info in infos),
        age_s=round(max(0.0, now - max(info.modified_s for info in infos)), 1),
    )


def announce(log: CheckpointLog, attempts: Iterable[Attempt]) -> list[Attempt]:
    """Have a record name the attempts as dead; returns those that may be deleted now: nobody can commit them any more."""
    doomed = list(attempts)
    if not doomed:
        return []
    record = log.append(lambda head: collect_record(head, nonces=[one.nonce for one in doomed]))
    # What the record announces, not what was found: an attempt may have become live in between.
    return [one for one in doomed if one.nonce in record.dead]


@dataclass(frozen=True, kw_only=True)
class GcReport:
    """What a clean-up removed, or would remove.

    Attributes:
        url: the root.
        dry_run: whether nothing was changed.
        grace_s: as asked for.
        attempts: directories that are gone (or would be), with the reason.
        in_grace: garbage that is too young.
        num_log_records: old records of the log.
        num_notes: notes of ended runs.
        num_bytes: of `attempts`.
    """

    url: str
    dry_run: bool
    grace_s: float
    attempts: tuple[Attempt, ...]
    in_grace: tuple[Attempt, ...]
    num_log_records: int
    num_notes: int
    num_bytes: int

    def to_json(self) -> dict[str, Any]:
        """As one JSON object."""
        return {"ok": True, **asdict(self)}


def collect_garbage(
    store: ObjectStore,
    *,
    grace_s: float,
    dry_run: bool,
    on_start: Callable[[int], None] = lambda num_objects: None,
    on_delete: Callable[[int], None] = lambda num_objects: None,
) -> GcReport:
    """Delete what no step needs and nobody can be at any more; a running job may go on saving.

    An attempt in flight that is older than the grace loses its data and is refused its commit
    (:class:`~stoker.errors.AttemptCollected`); it never becomes a step with holes.

    Raises:
        NoCheckpoint: there is no log, so nothing says what is garbage.
        CorruptRecord: a record of the log is damaged, so nothing is deleted.
    """
    log = CheckpointLog(store)
    found = find_leftovers(store, log, grace_s=grace_s)
    attempts, num_records = list(found.attempts), len(log.outdated(log.head()))
    if not dry_run:
        attempts = announce(log, attempts)
        on_start(sum(one.num_objects for one in attempts))
        record = log.head()
        kept = kept_blobs(record.live.values()) if record is not None else {}
        for one in attempts:
            for info in deletable(store, one.directory, kept):
                store.delete(info.key)
                on_delete(1)
        for key in found.notes:
            store.delete(key)
        num_records = 0 if record is None else log.truncate(record)
    return GcReport(
        url=store.url,
        dry_run=dry_run,
        grace_s=grace_s,
        attempts=tuple(attempts),
        in_grace=found.in_grace,
        num_log_records=num_records,
        num_notes=len(found.notes),
        num_bytes=sum(one.num_bytes for one in attempts),
    )
