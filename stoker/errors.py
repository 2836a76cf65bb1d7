"""The one tree of errors. Each class is also the builtin that a caller would expect to catch.

::

    StokerError
    ├── ConfigError (ValueError)               an argument or option breaks its rule
    ├── UnsupportedError (NotImplementedError) valid, but this version does not do it
    ├── MissingExtra (ImportError)             an optional dependency is not installed
    ├── StoreError (OSError)
    │   ├── KeyNotFound (KeyError)             no object of that name
    │   ├── BucketNotFound                     no bucket, container or root directory of that name
    │   ├── AlreadyExists (FileExistsError)    create-if-absent found an object
    │   ├── ObjectChanged                      overwritten or truncated while it was being read
    │   ├── AccessDenied (PermissionError)     wrong, missing or expired credentials; file modes
    │   ├── StoreFull                          no space left, quota reached, shared memory exhausted
    │   └── StoreUnavailable (ConnectionError) no answer that could be used, after all retries
    │       ├── Throttled                      the store asks for fewer requests
    │       ├── Unreachable                    nobody there: no such host, no listener, no TLS
    │       └── BadReply                       an answer that makes no sense
    ├── DeadlineExceeded (TimeoutError)        a public call did not end by its deadline
    ├── CorruptionError (OSError)
    │   ├── CorruptBlock                       bytes differ from their checksum, at the origin
    │   └── CorruptRecord                      a manifest or log record differs from its checksum
    ├── FormatError (ValueError)               not the format it claims to be
    │   ├── UnknownVersion                     written by a newer major version
    │   └── UnsafeName                         a name that could leave its root
    ├── DatasetError (ValueError)
    │   ├── EmptyInput                         nothing to read
    │   └── StateMismatch                      a loader state of another data set or order
    └── CheckpointError (RuntimeError)
        ├── NoCheckpoint (FileNotFoundError)   no committed step
        ├── UnsupportedState (TypeError)       an object in the tree that can't be represented
        ├── TreeMismatch (ValueError)          names or shapes differ; all differences in one message
        ├── SaveFailed                         this attempt will never be committed
        │   ├── StepAlreadyCommitted           another writer committed the step
        │   ├── Fenced                         a newer writer opened this root
        │   ├── AttemptCollected               clean-up took this attempt's data
        │   └── SaveSkipped                    another save was under way, and was not waited for
        ├── CommitUnknown                      no verdict by the deadline; it may still appear, whole
        └── RootNotShared                      the ranks do not see the same root

A message names the *place*, the *rule* and the *value* that broke it; the *hint* says what to do:

>>> raise ConfigError("batch_size must be >= 1", value=0, place="TokenLoader", hint="pass the rows per rank")
Traceback (most recent call last):
    ...
stoker.errors.ConfigError: TokenLoader: batch_size must be >= 1, got 0 (hint: pass the rows per rank)
"""

from typing import Any

_UNSET: Any = object()


class StokerError(Exception):
    """Root of every error that stoker raises on purpose.

    Attributes:
        rule: what must hold, without the value.
        value: what was found instead, if there is one.
        place: the key, file, argument or tensor that broke the rule.
        hint: what the user can do about it.
    """

    def __init__(self, rule: str, *, value: object = _UNSET, place: str = "", hint: str = "") -> None:
        self.rule = rule
        self.value = None if value is _UNSET else value
        self.place = place
        self.hint = hint
        text = f"{place}: {rule}" if place else rule
        if value is not _UNSET:
            text += f", got {value!r}" if isinstance(value, str) else f", got {value}"
        if hint:
            text += f" (hint: {hint})"
        super().__init__(text)

    def __str__(self) -> str:
        return str(self.args[0])  # KeyError would quote it, OSError would take it for an errno

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process borders (DataLoader workers, gloo), where the default would call __init__ wrongly.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[StokerError], args: tuple[Any, ...], state: dict[str, Any]) -> StokerError:
    # Not cls.__new__: of two builtins among the bases it may find the one whose memory layout is not the class's.
    new = OSError.__new__ if issubclass(cls, OSError) else cls.__new__
    error: StokerError = new(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(StokerError, ValueError):
    """An argument or option breaks its rule."""


class UnsupportedError(StokerError, NotImplementedError):
    """A valid request that this version of stoker does not do."""


class MissingExtra(StokerError, ImportError):
    """An optional dependency is not installed; the hint names the extra."""


class StoreError(StokerError, OSError):
    """An object store or a file system did not do what was asked."""


class KeyNotFound(StoreError, KeyError):
    """No object of that name."""


class BucketNotFound(StoreError):
    """No bucket, container or root directory of that name."""


class AlreadyExists(StoreError, FileExistsError):
    """Create-if-absent found an object."""


class ObjectChanged(StoreError):
    """The object was overwritten or truncated while it was being read."""


class AccessDenied(StoreError, PermissionError):
    """Wrong, missing or expired credentials, or file modes."""


class StoreFull(StoreError):
    """No space left on the device, quota reached or shared memory exhausted."""


class StoreUnavailable(StoreError, ConnectionError):
    """No usable answer from the store after all retries."""


class Throttled(StoreUnavailable):
    """The store asks for fewer requests (429, 503)."""


class Unreachable(StoreUnavailable):
    """Nobody is there: the name does not resolve, nobody listens, or TLS fails."""


class BadReply(StoreUnavailable):
    """An answer that makes no sense, several times over."""


class DeadlineExceeded(StokerError, TimeoutError):
    """A public call did not end by its deadline."""


class CorruptionError(StokerError, OSError):
    """Bytes that are not what was written."""


class _Checksum(int):
    """A CRC32C that prints as it is usually written."""

    def __str__(self) -> str:
        return f"{int(self):#010x}"


class CorruptBlock(CorruptionError):
    """A block differs from its checksum at its origin, so no healthy copy is left to fetch.

    Attributes:
        key: the object. start, end: byte range, end exclusive. expected, got: CRC32C as integers.
    """

    def __init__(self, key: str, start: int, end: int, expected: int, got: int, *, hint: str = "") -> None:
        self.key, self.start, self.end, self.expected, self.got = key, start, end, expected, got
        super().__init__(
            f"bytes [{start}, {end}) must have CRC32C {expected:#010x}",
            value=_Checksum(got),
            place=key,
            hint=hint or "the stored object is damaged: restore it from its source",
        )


class CorruptRecord(CorruptionError):
    """A manifest, table or log record differs from its checksum."""


class FormatError(StokerError, ValueError):
    """Not the format that it claims to be."""


class UnknownVersion(FormatError):
    """Written by a newer major version of stoker."""


class UnsafeName(FormatError):
    """A name that could leave its root directory."""


class DatasetError(StokerError, ValueError):
    """A data set can't be read or written as asked."""


class EmptyInput(DatasetError):
    """Nothing to read where something was expected."""


class StateMismatch(DatasetError):
    """A loader state that belongs to another data set, order version or loader."""


class CheckpointError(StokerError, RuntimeError):
    """A checkpoint can't be saved or restored as asked."""


class NoCheckpoint(CheckpointError, FileNotFoundError):
    """No committed step under this root."""


class UnsupportedState(CheckpointError, TypeError):
    """An object in the state tree that can't be represented; place is its path in the tree."""


class TreeMismatch(CheckpointError, ValueError):
    """Names or shapes of the tree differ from the checkpoint's; nothing has been written."""


class SaveFailed(CheckpointError):
    """This attempt will never be committed. Older steps are as they were."""


class StepAlreadyCommitted(SaveFailed):
    """Another writer committed this step."""


class Fenced(SaveFailed):
    """A newer writer opened this checkpoint root; this one may never commit again."""


class AttemptCollected(SaveFailed):
    """Clean-up took this attempt's data before it was committed."""


class SaveSkipped(SaveFailed):
    """Another save was under way, and the job had asked not to wait for it; nothing was written."""


class CommitUnknown(CheckpointError):
    """No verdict by the deadline: the step may still appear, and then it is whole."""


class RootNotShared(CheckpointError):
    """The ranks of the job do not see the same checkpoint root."""
