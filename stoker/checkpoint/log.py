"""The log of a checkpoint root: the only truth about which steps there are.

``log/{10**12 - 1 - seq:012d}.json`` holds record `seq`. Each record is created once, exclusively, one after the other
without a gap, and is complete: it names every live step, so the newest record alone is the truth, and since numbers count
down it is the first key of any listing: one LIST page, one GET.

Why a log and not one commit object for each step: with separate objects, a writer that stalls between its check and its
commit can bring back a step that retention has deleted, or tear one that is visible. Here every change of any kind must
win the next number, so it is decided against the very state that it changes:

* **Terms.** The first save of a run appends ``open`` with the next term. A commit under an older term is
  :class:`~stoker.errors.Fenced`, for ever.
* **The dead.** Before the first byte of an attempt is deleted, a record names its nonce in `dead`; a commit of that nonce
  is then refused (:class:`~stoker.errors.AttemptCollected`). Only a higher term clears the list: it fences all who could
  still commit one of them. That is why ``open`` must be acknowledged before a run writes its first byte.
* **Acknowledgement.** Creating the next number proves nothing to a writer that slept while its number was truncated away:
  every append reads the newest record once more, and counts only what that one holds. A reply that was lost is settled by
  the same look.

Transitions (:func:`open_record`, :func:`commit_record`, ...) are pure functions from the newest record to the next;
:func:`append_steps` is the protocol without any input or output; :class:`CheckpointLog` runs it on an object store.
"""

import hashlib
import json
import logging
import math
import re
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, TypeAlias, TypeVar, get_args

from ..errors import (
    AlreadyExists,
    AttemptCollected,
    CommitUnknown,
    ConfigError,
    CorruptRecord,
    DeadlineExceeded,
    Fenced,
    FormatError,
    KeyNotFound,
    NoCheckpoint,
    StepAlreadyCommitted,
    StoreError,
    StoreUnavailable,
    UnknownVersion,
)
from ..storage._units import Buffer
from ..storage.store import ObjectStore

__all__ = [
    "VERSION",
    "CheckpointLog",
    "CreateRecord",
    "FetchRecord",
    "Keep",
    "ListNewest",
    "LiveStep",
    "Record",
    "Request",
    "Transition",
    "append_steps",
    "collect_record",
    "commit_record",
    "head_steps",
    "keep_all",
    "keep_last",
    "kept_blobs",
    "log_key",
    "nonce_of",
    "open_record",
    "parse_log_key",
    "parse_step_directory",
    "retire_record",
    "step_directory",
]

logger = logging.getLogger(__name__)

VERSION = 1
"""Major version of a record; a reader refuses any other by name."""

Kind: TypeAlias = Literal["open", "commit", "retire", "rewind", "gc"]
T = TypeVar("T")

_PREFIX = "log/"
_LAST_SEQ = 10**12 - 1
_MAX_STEP = 10**12 - 1
_MAX_RECORD_BYTES = 64 << 20
_MAX_TRIES = 1000  # a try fails because another writer appended: losing a thousand times in a row is no race any more
_MAX_LOST_REPLIES = 5
_TRUNCATE_EVERY = 100

_KEY = re.compile(r"log/([0-9]{12})\.json")
_DIRECTORY = re.compile(r"step-([0-9]{12})-([0-9a-f]{16})")
_NONCE = re.compile(r"[0-9a-f]{16}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
# The envelope of every version: its digest can be checked before anything inside is understood.
_ENVELOPE = re.compile(rb'\{"record":(\{.*\}),"sha256":"([0-9a-f]{64})"\}\n', re.DOTALL)


def log_key(seq: int) -> str:
    """The object that holds record `seq`; newer records sort first.

    >>> log_key(1)
    'log/999999999998.json'
    """
    if not 1 <= seq < _LAST_SEQ:
        raise ConfigError(f"a record's number is 1 to {_LAST_SEQ - 1}", value=seq, place="log")
    return f"{_PREFIX}{_LAST_SEQ - seq:012d}.json"


def parse_log_key(key: str) -> int | None:
    """The record's number, or None if `key` is no record of the log.

    >>> parse_log_key("log/999999999998.json"), parse_log_key("log/readme.json")
    (1, None)
    """
    match = _KEY.fullmatch(key)
    return _LAST_SEQ - int(match[1]) if match else None


def nonce_of(run_id: str, step: int, nth: int) -> str:
    """Names one attempt, the `nth` of a run to save `step`, the same on every rank: 16 hexadecimal digits.

    >>> nonce_of("run-a", 100, 0) == nonce_of("run-a", 100, 0) != nonce_of("run-a", 100, 1)
    True
    """
    return hashlib.blake2b(f"{run_id}/{step}/{nth}".encode(), digest_size=8).hexdigest()


def step_directory(step: int, nonce: str) -> str:
    """Where an attempt writes, below the root.

    >>> step_directory(10, "0123456789abcdef")
    'step-000000000010-0123456789abcdef'
    """
    if not 0 <= step <= _MAX_STEP:
        raise ConfigError(f"a step is 0 to {_MAX_STEP}", value=step, place="step")
    if not _NONCE.fullmatch(nonce):
        raise ConfigError("a nonce has 16 hexadecimal digits", value=nonce, place="nonce")
    return f"step-{step:012d}-{nonce}"


def parse_step_directory(name: str) -> tuple[int, str] | None:
    """(step, nonce) of a directory that :func:`step_directory` named; None for any other name.

    >>> parse_step_directory("step-000000000010-0123456789abcdef"), parse_step_directory("step-10")
    ((10, '0123456789abcdef'), None)
    """
    match = _DIRECTORY.fullmatch(name)
    return (int(match[1]), match[2]) if match else None


@dataclass(frozen=True, kw_only=True, slots=True)
class LiveStep:
    """A committed step.

    Attributes:
        nonce: of the attempt whose directory holds it.
        manifest_sha256: of its ``manifest.arrow``.
        refs: blobs of other attempts that it needs, by the directory that they were first written to.
        metrics: what the trainer said about it, for retention.
    """

    nonce: str
    manifest_sha256: str
    refs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs(self) -> set[str]:
        """Nonces of the attempts whose data it consists of: its own, and those that it refers to."""
        return {self.nonce, *(directory.rpartition("-")[2] for directory in self.refs)}


def kept_blobs(steps: Iterable[LiveStep]) -> dict[str, set[str]]:
    """Blobs that some steps refer to, by directory: what of a retired step must stay.

    >>> home, sha256 = step_directory(10, "0" * 16), "0" * 64
    >>> kept_blobs([LiveStep(nonce="1" * 16, manifest_sha256=sha256, refs={home: ("data/00000-0.safetensors",)})])
    {'step-000000000010-0000000000000000': {'data/00000-0.safetensors'}}
    """
    kept: dict[str, set[str]] = {}
    for one in steps:
        for directory, blobs in one.refs.items():
            kept.setdefault(directory, set()).update(blobs)
    return kept


Keep: TypeAlias = Callable[[Mapping[int, LiveStep]], Collection[int]]
"""Which of the live steps stay; they are given ascending, with the one being committed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """One record of the log: the whole state of the root.

    Attributes:
        seq: its number, from 1.
        term: grows with each run that opens the root.
        run_id: of the run that opened the term.
        kind: what was done: ``open``, ``rewind`` (an ``open`` that abandons newer steps), ``commit``, ``retire``, ``gc``.
        live: the committed steps.
        dead: nonces of this term whose data may be deleted, or is already, but for the blobs that a live step refers to;
            none of them can be committed.
    """

    seq: int
    term: int
    run_id: str
    kind: Kind
    live: Mapping[int, LiveStep]
    dead: tuple[str, ...] = ()

    @property
    def steps(self) -> list[int]:
        """The committed steps, ascending."""
        return sorted(self.live)

    def has(self, directory: str, blob: str) -> bool:
        """Whether a step that is committed now may refer to a blob: a live step has it, or refers to it."""
        return any(
            directory == step_directory(step, one.nonce) or blob in one.refs.get(directory, ())
            for step, one in self.live.items()
        )

    @property
    def latest(self) -> int | None:
        """The newest committed step, None if there is none."""
        return max(self.live, default=None)

    def to_json(self) -> bytes:
        """The object's content; the same bytes for equal records."""
        live = {
            str(step): {
                "nonce": one.nonce,
                "manifest_sha256": one.manifest_sha256,
                "refs": {directory: list(one.refs[directory]) for directory in sorted(one.refs)},
                "metrics": {name: _metric_to_json(one.metrics[name]) for name in sorted(one.metrics)},
            }
            for step, one in sorted(self.live.items())
        }
        body = {
            "version": VERSION,
            "seq": self.seq,
            "term": self.term,
            "run_id": self.run_id,
            "kind": self.kind,
            "live": live,
            "dead": list(self.dead),
        }
        text = json.dumps(body, separators=(",", ":")).encode("ascii")
        return b'{"record":%b,"sha256":"%b"}\n' % (text, hashlib.sha256(text).hexdigest().encode())

    @classmethod
    def from_json(cls, data: Buffer, *, place: str) -> Self:
        """Read a record back. Keys that a later minor version may add are left alone.

        Raises:
            CorruptRecord: any byte differs from what was written.
            UnknownVersion: written by a newer major version.
            FormatError: intact, but no record.
        """
        match = _ENVELOPE.fullmatch(bytes(data)) if len(data) <= _MAX_RECORD_BYTES else None
        if match is None or hashlib.sha256(match[1]).hexdigest().encode() != match[2]:
            raise _corrupt(place)
        try:
            body = json.loads(match[1])
            version = body["version"]
            if version != VERSION:
                raise UnknownVersion(
                    f"this version of stoker reads log records of version {VERSION}",
                    value=version,
                    place=place,
                    hint="update stoker",
                )
            return cls._from_body(body)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError("must be a record of the log", value=str(error)[:200], place=place) from error

    @classmethod
    def _from_body(cls, body: dict[str, Any]) -> Self:
        if body["kind"] not in get_args(Kind):
            raise ValueError(f"kind {body['kind']}")
        live = {}
        for step, one in body["live"].items():
            refs = {directory: tuple(_typed(blob, str) for blob in blobs) for directory, blobs in one["refs"].items()}
            if any(parse_step_directory(directory) is None for directory in refs):
                raise ValueError(f"references {sorted(refs)}")
            step_directory(int(step), one["nonce"])
            live[int(step)] = LiveStep(
                nonce=one["nonce"],
                manifest_sha256=_digest(one["manifest_sha256"]),
                refs=refs,
                metrics={name: _metric_from_json(value) for name, value in one.get("metrics", {}).items()},
            )
        dead = tuple(_typed(nonce, str) for nonce in body["dead"])
        if not all(_NONCE.fullmatch(nonce) for nonce in dead):
            raise ValueError("a nonce has 16 hexadecimal digits")
        return cls(
            seq=_typed(body["seq"], int),
            term=_typed(body["term"], int),
            run_id=_typed(body["run_id"], str),
            kind=body["kind"],
            live=live,
            dead=dead,
        )


def _typed(value: Any, kind: type[T]) -> T:
    if type(value) is not kind:
        raise TypeError(f"{value!r:.80} is no {kind.__name__}")
    return value


def _metric_to_json(value: float) -> float | str:
    """JSON has no number for NaN and the infinities: they are text, as Python writes them."""
    return value if math.isfinite(value) else repr(value)


def _metric_from_json(value: Any) -> float:
    if value == "nan":
        return (
            math.nan
        )  # this very object: a record is compared with the one that was written, and NaN equals only itself
    return float(value) if value in ("inf", "-inf") else _typed(value, float)


def _digest(text: str) -> str:
    if not _SHA256.fullmatch(text):
        raise ConfigError("a SHA-256 has 64 hexadecimal digits", value=text[:80], place="manifest_sha256")
    return text


def _corrupt(place: str) -> CorruptRecord:
    return CorruptRecord(
        "a record of the log must match its own SHA-256",
        place=place,
        hint="steps are not lost: restore this object from a copy; an older record is never taken in its place",
    )


# ---- transitions: pure functions from the newest record to the next

Transition: TypeAlias = Callable[[Record | None], Record]
"""From the newest record (None: the log is empty) to the next.

Returns the *very* record it was given if that one already holds what is wanted: so a transition is its own check, after a
lost reply or a success, and may be tried again at any time. Raises if what is wanted can't be any more.
"""


def keep_all(live: Mapping[int, LiveStep]) -> Collection[int]:
    """Retention that deletes nothing."""
    return live


def keep_last(num_steps: int) -> Keep:
    """Retention of the newest `num_steps`.

    >>> sorted(keep_last(2)([10, 20, 30]))
    [20, 30]
    """
    if num_steps < 1:
        raise ConfigError("at least one step must be kept", value=num_steps, place="keep_last")
    return lambda live: sorted(live)[-num_steps:]


def open_record(head: Record | None, run_id: str, *, rewind_to: int | None = None, above_term: int = 0) -> Record:
    """The next term, owned by `run_id`. Fences every older run and forgets the dead, which nobody can commit any more.

    Must be acknowledged before the run writes the first byte of its first save.

    Args:
        rewind_to: abandon all live steps above this one, which must be live. Their nonces are dead from here on.
        above_term: a run whose list of the dead has grown long opens again above its own term, if that is the newest.

    Raises:
        Fenced: it opens again, and another run has opened since.
        NoCheckpoint: the step to go back to is not live (any more).
    """
    if head is not None and head.run_id == run_id and head.term > above_term:
        return head
    if above_term:
        _own(head, above_term)
    live = dict(head.live) if head is not None else {}
    if rewind_to is not None and rewind_to not in live:
        raise NoCheckpoint("the step to go back to must be live", value=rewind_to, place="log", hint="restore another")
    abandoned = [] if rewind_to is None else [step for step in sorted(live) if step > rewind_to]
    gone = [live.pop(step) for step in abandoned]
    return Record(
        seq=head.seq + 1 if head is not None else 1,
        term=head.term + 1 if head is not None else 1,
        run_id=run_id,
        kind="rewind" if abandoned else "open",
        live=live,
        dead=_announced((), gone, live),
    )


def _own(head: Record | None, term: int) -> Record:
    """`head` if its term is still `term`."""
    if head is None or head.term != term:
        raise Fenced(
            f"a run may write only until another opens this root; its term is {term}",
            value="no log" if head is None else f"term {head.term} of run {head.run_id}",
            place="log",
            hint="only one job may save under a root: stop this one, or give it a root of its own",
        )
    return head


def commit_record(
    head: Record | None,
    *,
    term: int,
    step: int,
    nonce: str,
    manifest_sha256: str,
    refs: Mapping[str, tuple[str, ...]] | None = None,
    metrics: Mapping[str, float] | None = None,
    keep: Keep = keep_all,
) -> Record:
    """Make `step` live, and retire what `keep` leaves out; the newest step and this one always stay.

    `dead` of the acknowledged record names what may then be deleted. Steps, manifest and blobs must be durable already.

    Raises:
        Fenced: another run opened the root.
        AttemptCollected: clean-up announced this attempt, or a blob that it refers to, as deleted.
        StepAlreadyCommitted: the step is live from another attempt.
    """
    if head is not None and step in head.live and head.live[step].nonce == nonce:
        return head
    head = _own(head, term)
    place = step_directory(step, nonce)
    if nonce in head.dead:
        raise AttemptCollected("clean-up must not have announced this attempt's data", place=place, hint="save again")
    if step in head.live:
        raise StepAlreadyCommitted(
            "a step is committed once",
            value=f"nonce {head.live[step].nonce}",
            place=place,
            hint="another attempt has it: nothing is lost",
        )
    for directory, blobs in (refs or {}).items():
        for blob in blobs:
            if not head.has(directory, blob):
                raise AttemptCollected(
                    "a blob that is referred to must belong to a live step",
                    value=f"{directory}/{blob}",
                    place=place,
                    hint="save again: the blob will be written anew",
                )
    one = LiveStep(
        nonce=nonce, manifest_sha256=_digest(manifest_sha256), refs=dict(refs or {}), metrics=dict(metrics or {})
    )
    return _retire(head, {**head.live, step: one}, keep, "commit", {step})


def retire_record(head: Record | None, *, term: int, keep: Keep) -> Record:
    """Retire what `keep` leaves out without a commit; the newest step always stays. Raises Fenced."""
    head = _own(head, term)
    retired = _retire(head, dict(head.live), keep, "retire", set())
    return head if retired.live == head.live else retired


def _retire(head: Record, live: dict[int, LiveStep], keep: Keep, kind: Kind, always: set[int]) -> Record:
    steps = sorted(live)
    kept = set(keep({step: live[step] for step in steps})) | always | set(steps[-1:])
    retired = [live.pop(step) for step in steps if step not in kept]
    dead = _announced(head.dead, retired, live)
    return Record(seq=head.seq + 1, term=head.term, run_id=head.run_id, kind=kind, live=live, dead=dead)


def _announced(dead: tuple[str, ...], gone: Iterable[LiveStep], live: Mapping[int, LiveStep]) -> tuple[str, ...]:
    """`dead` with the steps that are gone, and with the homes of what these referred to: blobs there may go too now."""
    known = {*dead, *(one.nonce for one in live.values())}
    for one in gone:
        new = [nonce for nonce in (one.nonce, *sorted(one.needs - {one.nonce})) if nonce not in known]
        known.update(new)
        dead += tuple(new)
    return dead


def collect_record(head: Record | None, *, nonces: Collection[str]) -> Record:
    """Announce attempts whose data clean-up wants to delete. Anyone may, under any term.

    `nonces` must have been listed from the store *before* the newest record was read, by one who leaves young attempts
    alone: an attempt in flight is refused its commit. What is live stays out. Once the record is acknowledged, those of
    `nonces` that are in its `dead` may be deleted, but for the blobs that its live steps refer to (:func:`kept_blobs`).
    No later record can need any other: a commit refers only to what a live step has.

    Raises:
        NoCheckpoint: there is no log, so nothing says what is garbage.
    """
    if head is None:
        raise NoCheckpoint("only a log says what may be deleted", place="log")
    new = sorted(set(nonces) - {one.nonce for one in head.live.values()} - set(head.dead))
    if not new:
        return head
    return Record(
        seq=head.seq + 1, term=head.term, run_id=head.run_id, kind="gc", live=head.live, dead=head.dead + tuple(new)
    )


# ---- the protocol, without input and output


@dataclass(frozen=True, slots=True)
class ListNewest:
    """Asks for the first key below ``log/``; the reply is a string, or None if there is none."""


@dataclass(frozen=True, slots=True)
class FetchRecord:
    """Asks for an object; the reply is its bytes, or None if it is gone."""

    key: str


@dataclass(frozen=True, slots=True)
class CreateRecord:
    """Asks to create an object; the reply is ``"created"``, ``"exists"``, or ``"unknown"`` if no answer came."""

    key: str
    data: bytes


Request: TypeAlias = ListNewest | FetchRecord | CreateRecord


def head_steps() -> Generator[Request, Any, Record | None]:
    """Read the newest record: one LIST, one GET."""
    for _ in range(_MAX_TRIES):
        key: str | None = yield ListNewest()
        if key is None:
            return None
        seq = parse_log_key(key)
        if seq is None:
            raise CorruptRecord(
                "the first object below log/ must be a record", place=key, hint="remove what does not belong there"
            )
        data: bytes | None = yield FetchRecord(key)
        if data is not None:
            record = Record.from_json(data, place=key)
            if record.seq != seq:
                raise _corrupt(key)
            return record
        # Truncated since it was listed: a thousand records have been appended meanwhile.
    raise DeadlineExceeded("the newest record must stay readable", place=_PREFIX)


def append_steps(transition: Transition) -> Generator[Request, Any, Record]:
    """Append what `transition` makes of the newest record, whichever that is by then; returns the newest record.

    The record that is returned holds what `transition` wants, by a look at the log after the append. Where a reply is
    due, a :class:`~stoker.errors.StoreError` may be thrown in instead.
    """
    lost_replies = 0
    in_doubt = False
    for _ in range(_MAX_TRIES):
        try:
            head = yield from head_steps()
        except StoreError as error:
            if in_doubt:
                raise _unknown() from error
            raise
        record = transition(head)
        if record is head:
            return record
        try:
            data = record.to_json()
            if len(data) > _MAX_RECORD_BYTES:  # nobody could read it, nor append another
                raise ConfigError(
                    f"a record of the log must have {_MAX_RECORD_BYTES} bytes at most",
                    value=f"{len(data)} bytes for {len(record.live)} steps",
                    place=log_key(record.seq),
                    hint="keep fewer steps (keep_last=, keep_every=), or save fewer metrics",
                )
            reply = yield CreateRecord(log_key(record.seq), data)
        except StoreError as error:
            # POSIX: the record may have its name although the directory could not be made durable.
            if record.kind == "commit" and (yield from head_steps()) == record:
                raise _unknown() from error
            raise
        in_doubt |= record.kind == "commit" and reply != "exists"
        if reply == "unknown":
            lost_replies += 1
            if lost_replies > _MAX_LOST_REPLIES:
                raise _unknown() if in_doubt else StoreUnavailable("the log must be writable", place=_PREFIX)
        # Whatever the reply: what counts is the newest record, and whether the transition is content with it.
    raise DeadlineExceeded("an append must win against other writers", value=f"{_MAX_TRIES} tries", place=_PREFIX)


def _unknown() -> CommitUnknown:
    return CommitUnknown(
        "the store must answer whether the step was committed",
        place=_PREFIX,
        hint="it may still appear, and then it is whole; list the steps before saving it again",
    )


# Guarantees: a CheckpointLog has no state of its own; any number of threads and processes may use one root at once.
class CheckpointLog:
    """The log of one root on an object store.

    >>> import tempfile
    >>> from stoker.storage.urls import open_store
    >>> with tempfile.TemporaryDirectory() as directory, open_store(directory) as store:
    ...     log = CheckpointLog(store)
    ...     term = log.append(lambda head: open_record(head, "run-a")).term
    ...     nonce, digest = nonce_of("run-a", 100, 0), "0" * 64
    ...     log.append(lambda head: commit_record(head, term=term, step=100, nonce=nonce, manifest_sha256=digest)).steps
    [100]

    Args:
        store: the root's; its :meth:`~stoker.storage.ObjectStore.create` must be exclusive.
        keep_records: older records are removed now and then.

    Errors of every method, beside those of the store: :class:`~stoker.errors.CorruptRecord` if the newest record is not
    what was written (an older one is never taken instead), :class:`~stoker.errors.UnknownVersion`.
    """

    def __init__(self, store: ObjectStore, *, keep_records: int = 1000) -> None:
        if keep_records < 2:
            raise ConfigError("the log must keep at least two records", value=keep_records, place="keep_records")
        self._store, self._keep_records = store, keep_records

    def head(self) -> Record | None:
        """The newest record, None if there is none: nothing was ever saved here."""
        return self._run(head_steps())

    def append(self, transition: Transition) -> Record:
        """Append what `transition` makes of the newest record; returns the record that holds it, durable.

        Raises:
            Fenced, AttemptCollected, StepAlreadyCommitted, NoCheckpoint: what `transition` raised; nothing was changed.
            CommitUnknown: the store did not answer whether a commit took place.
            DeadlineExceeded: other writers won a thousand times in a row.
        """
        record = self._run(append_steps(transition))
        if record.seq % _TRUNCATE_EVERY == 0:
            try:
                self.truncate(record)
            except StoreError as error:  # the append stands; the next one tries again
                logger.warning("%s: old log records were not removed: %s", self._store.place(_PREFIX), error)
        return record

    def needed_since(self, since_s: float) -> tuple[Record, list[LiveStep]]:
        """The newest record, and all steps that were live at any time since a moment.

        Raises:
            NoCheckpoint: there is no log.
        """
        head: Record | None = None
        steps: dict[str, LiveStep] = {}
        for info in self._store.list(_PREFIX):
            if parse_log_key(info.key) is None:  # not ours
                continue
            try:
                record = Record.from_json(self._store.get(info.key), place=self._store.place(info.key))
            except KeyNotFound:
                break  # truncated since it was listed: a thousand newer ones were read, or were appended meanwhile
            if record.seq != parse_log_key(info.key):
                raise _corrupt(self._store.place(info.key))
            head = head or record
            steps.update((one.nonce, one) for one in record.live.values())
            if info.modified_s <= since_s:
                break
        if head is None:
            raise NoCheckpoint("only a log says what may be deleted", place=self._store.place(_PREFIX))
        return head, list(steps.values())

    def outdated(self, head: Record | None) -> list[str]:
        """Keys of the records older than the newest `keep_records`, the newest first."""
        oldest = head.seq - self._keep_records + 1 if head is not None else 1
        if oldest <= 1:
            return []
        listed = (info.key for info in self._store.list(_PREFIX, start_after=log_key(oldest)))
        return [key for key in listed if parse_log_key(key) is not None]

    def truncate(self, head: Record) -> int:
        """Remove records older than the newest `keep_records`; returns how many."""
        old = self.outdated(head)
        # The oldest first: a removal that is cut short leaves no gap between records.
        for key in reversed(old):
            self._store.delete(key)
        return len(old)

    def _run(self, steps: Generator[Request, Any, T]) -> T:
        """Answer each request of the protocol from the store."""
        try:
            request = next(steps)
            while True:
                try:
                    reply = self._answer(request)
                except StoreError as error:
                    request = steps.throw(error)
                else:
                    request = steps.send(reply)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]

    def _answer(self, request: Request) -> Any:
        if isinstance(request, ListNewest):
            return next((info.key for info in self._store.list(_PREFIX, limit=1)), None)
        if isinstance(request, FetchRecord):
            try:
                return bytes(self._store.get(request.key))
            except KeyNotFound:
                return None
        try:
            self._store.create(request.key, request.data)
        except AlreadyExists:
            return "exists"
        except StoreUnavailable:
            return "unknown"
        return "created"
