"""A directory whose disk breaks on purpose: lay it under a cache and see what the job does.

:class:`FaultyTier` meets the calls that this process makes into one directory, a tier of a cache or any other, until a
:class:`TierFault` strikes one of them::

    with FaultyTier("/nvme/stoker") as tier, TieredCache(ram=0, disk="/nvme/stoker") as cache:
        tier.add(TierFault("full"), times=3)                           # the next three writes find no space
        tier.add(TierFault("flip"), path="blocks/", probability=0.01)  # one block in a hundred comes back damaged
        tier.add(TierFault("delay", delay_s=0.2), calls=("read",))     # a slow disk
        train(cache)

===============  =================================================================================  ====================
kind             what the caller sees                                                               calls
===============  =================================================================================  ====================
``full``         ENOSPC where space is taken; with ``capacity_bytes`` only beyond so many in all    write
``error``        EIO                                                                                read, write
``read_only``    EROFS                                                                              write
``flip``         before a file is opened for reading, one bit of it changes, at ``at_byte`` or a    read
                 random place
``delay``        the call is held back for ``delay_s``                                              read, write, lock
``no_locks``     ENOLCK, as on a network file system without a lock service                         lock
``false_locks``  every lock is granted, whoever else has it, as where each node has its own         lock
``vanish``       before the call, the directory and all in it are removed                           read, write
``crash``        :class:`TierCrash` here, and at every later call of any rule's kind until          write
                 :meth:`~FaultyTier.clear`: what a killed process leaves, without a process
===============  =================================================================================  ====================

It stands between Python and the kernel: it replaces functions of :mod:`os` and :mod:`fcntl` while its block lasts, so
that the code under test is the real one, and it goes along into forked children. What it can't: pages that are mapped
already, other processes, calls of other libraries. Linux only.
"""

import errno
import fcntl
import os
import random
import re
import shutil
import threading
import time
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal, Self, get_args

from ..errors import ConfigError, UnsupportedError
from ._os_calls import CHANGING_CALLS, OPENS_FOR_WRITING
from ._rule import Rule

__all__ = ["FaultyTier", "TierCall", "TierCrash", "TierFault", "TierFaultKind", "TierFaultRule"]

TierFaultKind = Literal["full", "error", "read_only", "flip", "delay", "no_locks", "false_locks", "vanish", "crash"]
TierCall = Literal["read", "write", "lock"]

_CALLS: dict[str, tuple[TierCall, ...]] = {
    "full": ("write",),
    "error": ("read", "write"),
    "read_only": ("write",),
    "flip": ("read",),
    "delay": ("read", "write", "lock"),
    "no_locks": ("lock",),
    "false_locks": ("lock",),
    "vanish": ("read", "write"),
    "crash": ("write",),
}
_ERRORS = {"full": errno.ENOSPC, "error": errno.EIO, "read_only": errno.EROFS, "no_locks": errno.ENOLCK}
_FIELDS = {"full": {"capacity_bytes"}, "flip": {"at_byte"}, "delay": {"delay_s"}}

_READS = ("read", "readv", "pread", "preadv")
_WRITES = tuple(name for name in CHANGING_CALLS if name not in ("open", "copy_file_range", "sendfile"))
_TAKE_SPACE = {"open", "write", "writev", "pwrite", "pwritev", "ftruncate", "truncate", "posix_fallocate", "mkdir"}


class TierCrash(BaseException):
    """The simulated process has died: whoever catches it must let the cache go, as the kernel would."""


@dataclass(frozen=True)
class TierFault:
    """What goes wrong with one call; the module's table says which kind takes which settings.

    Attributes:
        kind: one of :data:`TierFaultKind`.
        capacity_bytes: of a file system that is full beyond them: all files below the directory count.
        at_byte: of the file whose bit changes; past its end means its last byte.
        delay_s: how long the call is held back.

    Raises:
        ConfigError: no such kind, a setting that it does not have, one that is missing or negative.
    """

    kind: TierFaultKind
    _: KW_ONLY
    capacity_bytes: int | None = None
    at_byte: int | None = None
    delay_s: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in _CALLS:
            kinds = ", ".join(get_args(TierFaultKind))
            raise ConfigError(f"kind must be one of {kinds}", value=self.kind, place="TierFault")
        place = f"TierFault({self.kind!r})"
        for name in ("capacity_bytes", "at_byte", "delay_s"):
            value = getattr(self, name)
            if value is not None and name not in _FIELDS.get(self.kind, set()):
                raise ConfigError(f"takes no {name}", value=value, place=place)
            if value is not None and value < 0:
                raise ConfigError(f"{name} must be >= 0", value=value, place=place)
        if self.kind == "delay" and self.delay_s is None:
            raise ConfigError("needs delay_s", place=place)


class TierFaultRule(Rule):
    """A fault and the calls it is for, as :meth:`FaultyTier.add` made it.

    Attributes:
        fault: what it does.
        seen: calls that matched so far.
        hits: to how many of them the fault was applied.
    """

    def __init__(
        self,
        tier: "FaultyTier",
        fault: TierFault,
        *,
        calls: tuple[TierCall, ...],
        path: re.Pattern[str] | None,
        times: int | None,
        after: int,
        probability: float,
        chance: random.Random,
    ) -> None:
        super().__init__("FaultyTier.add", times=times, after=after, probability=probability, chance=chance)
        self.fault = fault
        self._tier, self._calls, self._path = tier, calls, path

    def remove(self) -> None:
        """Take it back. Harmless when called twice."""
        self._tier._remove(self)

    def _takes(self, name: str, kind: TierCall, path: str, size: int) -> bool:
        if kind not in self._calls or (self._path is not None and not self._path.search(path)):
            return False
        if self.fault.kind == "full":
            # What stands in a file already can be overwritten on a full disk: the tier's own counter can.
            if name not in _TAKE_SPACE or path == "lock":
                return False
            limit = self.fault.capacity_bytes
            if limit is not None and (size == 0 or self._tier._used_bytes() + size <= limit):
                return False
        if self.fault.kind == "flip" and name != "open":
            return False
        return self._strikes()


# Guarantees: every public member may be used from any thread; faults strike whichever thread makes the call. `_lock`
# guards `_rules` and the counters of the rules. A forked child has its own copy of both.
class FaultyTier:
    """A directory whose calls may fail; see the module for the faults.

    Works while its ``with`` block lasts. Blocks may be nested, and end in the reverse order.

    Args:
        directory: whose calls to meet. It need not exist yet.
        seed: of every probability and random place.

    Raises:
        UnsupportedError: not on Linux.

    >>> import tempfile
    >>> from pathlib import Path
    >>> with tempfile.TemporaryDirectory() as directory, FaultyTier(directory) as tier:
    ...     rule = tier.add(TierFault("full"), times=1)
    ...     try:
    ...         Path(directory, "file").touch()
    ...     except OSError as error:
    ...         print(error.strerror)
    ...     Path(directory, "file").touch()
    No space left on device
    """

    def __init__(self, directory: str | Path, *, seed: int = 0) -> None:
        self.directory = Path(directory)
        self._root = os.path.realpath(directory)
        self._seed = seed
        self._made = 0
        self._lock = threading.Lock()
        self._rules: list[TierFaultRule] = []
        self._crashed = False
        self._inside = threading.local()  # our own calls, made while a fault is applied, meet none
        self._replaced: list[tuple[Any, str, Any, Any]] = []

    def add(
        self,
        fault: TierFault,
        *,
        calls: tuple[TierCall, ...] | None = None,
        path: "str | re.Pattern[str] | None" = None,
        times: int | None = None,
        after: int = 0,
        probability: float = 1.0,
    ) -> TierFaultRule:
        """Apply `fault` to calls from now on. Rules are asked in the order in which they were added; the first that
        takes a call keeps it.

        Args:
            calls: which kinds it meets; the module's table says what stands for None.
            path: text that must stand in the path below the directory (``"blocks/"``), or a compiled pattern.
            times: how many calls it hits at most.
            after: how many that match are let through first.
            probability: of hitting each one after those.

        Raises:
            ConfigError: a number out of range, or a kind of call that the fault can't meet.
        """
        if foreign := sorted(set(calls or ()) - set(_CALLS[fault.kind])):
            raise ConfigError(
                f"a {fault.kind!r} fault can't meet these calls", value=", ".join(foreign), place="FaultyTier.add"
            )
        with self._lock:
            self._made += 1
            rule = TierFaultRule(
                self,
                fault,
                calls=calls or _CALLS[fault.kind],
                path=re.compile(re.escape(path)) if isinstance(path, str) else path,
                times=times,
                after=after,
                probability=probability,
                chance=random.Random(f"{self._seed}/{self._made}"),
            )
            self._rules.append(rule)
        return rule

    def clear(self) -> None:
        """Remove all faults; a disk that crashed works again."""
        with self._lock:
            self._rules.clear()
            self._crashed = False

    def _remove(self, rule: TierFaultRule) -> None:
        with self._lock, suppress(ValueError):
            self._rules.remove(rule)

    # -- between Python and the kernel

    def __enter__(self) -> Self:
        if not os.path.isdir("/proc/self/fd"):
            raise UnsupportedError("needs /proc, which only Linux has", place="FaultyTier")
        for name in ("open", *_READS, *_WRITES):
            if hasattr(os, name):
                self._replace(os, name)
        self._replace(fcntl, "fcntl")
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.clear()
        for module, name, real, _ in reversed(self._replaced):
            setattr(module, name, real)
        self._replaced.clear()

    def _replace(self, module: Any, name: str) -> None:
        real = getattr(module, name)

        def met(*args: Any, **kwargs: Any) -> Any:
            if (self._rules or self._crashed) and not getattr(self._inside, "yes", False):
                self._inside.yes = True
                try:
                    if self._meet(name, args, kwargs):
                        return b""  # a lock that is granted without asking
                finally:
                    self._inside.yes = False
            return real(*args, **kwargs)

        setattr(module, name, met)
        self._replaced.append((module, name, real, met))

    def _meet(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Let a fault strike, if one takes this call; whether the call is done with."""
        kind = _kind_of(name, args)
        path = self._path_of(name, args, kwargs)
        if path is None:
            return False
        with self._lock:
            if self._crashed:
                raise TierCrash
            size = _new_bytes(name, args)
            rule = next((rule for rule in self._rules if rule._takes(name, kind, path, size)), None)
            if rule is None:
                return False
            self._crashed = rule.fault.kind == "crash"
        fault = rule.fault
        if fault.kind in _ERRORS:
            raise OSError(_ERRORS[fault.kind], os.strerror(_ERRORS[fault.kind]), path)
        if fault.kind == "crash":
            raise TierCrash
        if fault.kind == "delay":
            time.sleep(fault.delay_s or 0.0)
        elif fault.kind == "vanish":
            shutil.rmtree(self._root, ignore_errors=True)
        elif fault.kind == "flip":
            _flip(Path(self._root, path), fault.at_byte, rule._chance)
        return fault.kind == "false_locks"

    def _path_of(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """Where below the directory a call goes; None for any other place."""
        target = args[1] if name in ("rename", "replace", "link", "symlink") else args[0]
        if isinstance(target, int):
            full = _path_of_fd(target)
        else:
            fd = kwargs.get("dst_dir_fd", kwargs.get("dir_fd"))
            full = os.path.join(os.getcwd() if fd is None else _path_of_fd(fd), os.fsdecode(target))
        if full == self._root:
            return ""
        prefix = f"{self._root}{os.sep}"
        return full[len(prefix) :] if full.startswith(prefix) else None

    def _used_bytes(self) -> int:
        found = 0
        for folder, _, names in os.walk(self._root):
            for name in names:
                with suppress(FileNotFoundError):
                    found += os.lstat(os.path.join(folder, name)).st_blocks * 512
        return found


def _kind_of(name: str, args: tuple[Any, ...]) -> TierCall:
    if name == "open":
        return "write" if args[1] & OPENS_FOR_WRITING else "read"
    return "lock" if name == "fcntl" else "read" if name in _READS else "write"


def _new_bytes(name: str, args: tuple[Any, ...]) -> int:
    """How much space a call takes that the file does not have yet."""
    if name == "posix_fallocate":
        end = args[1] + args[2]
    elif name == "pwrite":
        end = args[2] + len(memoryview(args[1]).cast("B"))
    elif name == "ftruncate":
        end = args[1]
    else:
        return len(memoryview(args[1]).cast("B")) if name == "write" else 0
    with suppress(OSError):  # a descriptor that is none: the call itself will say so
        return max(0, int(end) - os.fstat(args[0]).st_blocks * 512)
    return 0


def _path_of_fd(fd: int) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}").removesuffix(" (deleted)")
    except OSError:  # closed: the call itself will say so
        return ""


def _flip(path: Path, at_byte: int | None, chance: random.Random) -> None:
    with suppress(FileNotFoundError, IsADirectoryError):
        data = bytearray(path.read_bytes())
        if data:
            place = chance.randrange(len(data)) if at_byte is None else min(at_byte, len(data) - 1)
            data[place] ^= 1 << chance.randrange(8)
            info = path.stat()
            with path.open("r+b") as file:
                file.write(data)
            # A later time than any that the writer saw, whatever the clock's ticks are.
            os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 10**9))
