"""What of this machine, and of a store, stands in a job's way? Each check says what it found and what to do about it.

:func:`diagnose` looks at what stoker leans on: limits of the process, shared memory, a directory on a disk, the kernel,
and, where a URL is given, the store behind it. A store is asked to keep its word before any data is trusted to it: byte
ranges, conditions, exclusive creation, order of listings. All that is written stands below a random name and is removed.
"""

import ctypes
import errno
import mmap
import os
import platform
import random
import resource
import shutil
import ssl
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Literal, TypeAlias
from urllib.parse import urlsplit

from ..errors import AlreadyExists, BucketNotFound, ConfigError, ObjectChanged, StokerError, UnsupportedError
from ..metrics import counters
from ._locks import try_lock, unlock
from ._memory import memory_limits
from ._units import format_bytes
from .store import ObjectStore, redact_url
from .urls import is_local_url, open_store

__all__ = ["Check", "Diagnosis", "Throughput", "Verdict", "diagnose"]

Verdict: TypeAlias = Literal["ok", "warn", "fail", "not measured"]

_MIB = 1 << 20
_GIB = 1 << 30

SIZES = (64 << 10, _MIB, 8 * _MIB)
CONCURRENCIES = (1, 2, 4, 8, 16, 32)

_FILES_NEEDED = 1024
"""A guess: two connections for each of 128 requests, some files for each tier, and what torch's workers pass around."""
_LITTLE_BYTES = _GIB
"""Less than this of shared memory or of memory, and little more than small models and short windows fit."""
_LITTLE_SHARE = 0.05
"""Of a disk's bytes or names."""
_CONTAINER_SHM_BYTES = 64 * _MIB
_SKEW_WARN_S, _SKEW_FAIL_S = 5.0, 900.0
"""S3 refuses requests that are signed with a clock 15 minutes off."""
_ANSWER_TIMEOUT_S = 10.0
_CELL_S = 0.3
_LONGEST_CELL_S = 5.0
_UPLOAD_S = 5.0
_MOST_OBJECTS = 8
_KNEE_SHARE = 0.9
_RACERS = 8
_RENAME_NOREPLACE, _AT_FDCWD = 1, -100
_ACCESS = "bucket, credentials"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One finding.

    Attributes:
        name: what was looked at, in a few words.
        verdict: ``"fail"``: stoker can't work so; ``"warn"``: it works, slower or with less; ``"not measured"``.
        value: what was found, or why it was not measured.
        advice: what to do, in one sentence; empty if it is ok.
    """

    name: str
    verdict: Verdict
    value: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """How fast checked range requests of one size are, with so many under way.

    Attributes:
        size_bytes: of a range. concurrency: threads that ask.
        gb_per_s: 10^9 bytes/s; None if it would have taken too long.
        knee: the fewest bytes in flight that give 90 % of the best.
    """

    size_bytes: int
    concurrency: int
    gb_per_s: float | None
    knee: bool = False


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All checks, in the order in which they were made, and the throughput where it was measured."""

    url: str | None
    checks: tuple[Check, ...]
    throughput: tuple[Throughput, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing failed."""
        return not any(check.verdict == "fail" for check in self.checks)

    def check(self, name: str) -> Check:
        """The check of that name; KeyError if it was not made."""
        for check in self.checks:
            if check.name == name:
                return check
        raise KeyError(name)

    def to_json(self) -> dict[str, Any]:
        """The one JSON object of ``stoker doctor --json``."""
        return {
            "ok": self.ok,
            "url": self.url,
            "checks": [asdict(check) for check in self.checks],
            "throughput": [asdict(cell) for cell in self.throughput],
        }

    def to_text(self) -> str:
        """A line for each check, its advice below it, and a table of the throughput."""
        width = max(len(check.name) for check in self.checks)
        lines = []
        for check in self.checks:
            lines.append(f"{check.verdict:<12}  {check.name:<{width}}  {check.value}")
            if check.advice:
                lines.append(f"{'':<12}  {'':<{width}}  -> {check.advice}")
        if self.throughput:
            lines += ["", *_table(self.throughput)]
        return "\n".join(lines) + "\n"


def diagnose(
    url: str | None = None,
    *,
    storage_options: Mapping[str, Any] | None = None,
    directory: str | Path = ".",
    sizes: Sequence[int] = SIZES,
    concurrencies: Sequence[int] = CONCURRENCIES,
    progress: Callable[[], None] | None = None,
) -> Diagnosis:
    """Look at this machine, at `directory` on it, and at the store behind `url` if there is one.

    What fails becomes a check that says so. Takes a second for a machine, and some ten for a store; a slow one is
    asked for less.

    Args:
        directory: where a disk tier, a data set or checkpoints would be.
        sizes, concurrencies: of the range requests whose throughput is measured.
        progress: called after each check.

    Raises:
        ConfigError: a URL or an option that no store understands.
        MissingExtra: the library for that URL is not installed.
    """
    if url == "":
        raise ConfigError("a URL or a path must not be empty", value=url, place="doctor", hint="for this directory, .")
    checks: list[Check] = []

    def add(check: Check) -> None:
        checks.append(check)
        if progress is not None:
            progress()

    store = None if url is None else _open(url, storage_options or {})  # a mistake in the command is told first
    for check in _machine():
        add(check)
    with closing(_directory(Path(directory))) as directory_checks:
        for check in directory_checks:
            add(check)
    cells: tuple[Throughput, ...] = ()
    if url is None or store is None:
        add(Check(name="clock", verdict="not measured", value="no URL to compare it with"))
    else:
        with store:
            examination = _Examination(url, storage_options or {}, store, sizes, concurrencies)
            with closing(examination.run()) as store_checks:  # whatever interrupts it, it removes what it wrote
                for check in store_checks:
                    add(check)
            cells = tuple(examination.cells)
    return Diagnosis(url=None if url is None else redact_url(url), checks=tuple(checks), throughput=cells)


# ------------------------------------------------------------------------------------------------------------- machine


def _machine() -> Iterator[Check]:
    yield _open_files()
    yield _shared_memory()
    yield _memory_limit()
    yield _huge_pages()


def _open_files() -> Check:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    value = f"{_limit(soft)} (soft), {_limit(hard)} (hard), {_FILES_NEEDED} needed"
    if soft == resource.RLIM_INFINITY or soft >= _FILES_NEEDED:
        return Check(name="open files", verdict="ok", value=value)
    return Check(
        name="open files",
        verdict="warn",
        value=value,
        advice=f"raise the limit before the job starts: ulimit -n {_FILES_NEEDED}",
    )


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _shared_memory() -> Check:
    named = os.environ.get("STOKER_SHM_DIR")  # as shared_memory_directory() has it, which makes it
    path = Path(named or "/dev/shm")
    try:
        usage = shutil.disk_usage(path.parent if named and not path.exists() else path)
    except OSError as error:
        return Check(
            name="shared memory",
            verdict="warn",
            value=f"{path}: {error.strerror}",
            advice="mount a tmpfs there: without it there is no RAM tier, and saves stage in the process's own memory",
        )
    value = f"{path}: {format_bytes(usage.total)}, {format_bytes(usage.free)} free"
    if usage.total <= _CONTAINER_SHM_BYTES:
        advice = "give the container more: docker run --shm-size=8g, or an emptyDir with medium: Memory in Kubernetes"
    elif usage.free < _LITTLE_BYTES:
        advice = "free it or make it larger: RAM tier and staged saves live there, and pass through where it is full"
    else:
        return Check(name="shared memory", verdict="ok", value=value)
    return Check(name="shared memory", verdict="warn", value=value, advice=advice)


def _memory_limit() -> Check:
    name = "memory limit"
    if platform.system() != "Linux":
        return Check(name=name, verdict="not measured", value="control groups are Linux's")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [limit for limit in memory_limits() if limit.limit_bytes < total]
    if not limits:
        return Check(name=name, verdict="ok", value=f"no control group's; {format_bytes(total)} in the machine")
    limit = min(limits, key=lambda one: one.free_bytes)
    value = f"{format_bytes(limit.limit_bytes)} by control group, {format_bytes(limit.used_bytes)} in use"
    if limit.free_bytes >= _LITTLE_BYTES:
        return Check(name=name, verdict="ok", value=value)
    advice = "raise the container's memory limit: what stands in shared memory counts against it too"
    return Check(name=name, verdict="warn", value=value, advice=advice)


def _huge_pages() -> Check:
    name = "huge pages"
    try:
        text = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return Check(name=name, verdict="not measured", value="the kernel does not say")
    chosen = text.partition("[")[2].partition("]")[0]
    if chosen in ("always", "madvise") and hasattr(mmap, "MADV_HUGEPAGE"):
        return Check(name=name, verdict="ok", value=f"transparent ones: {chosen}")
    advice = "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, as root: large reads and writes get faster"
    return Check(name=name, verdict="warn", value=f"transparent ones: {chosen}", advice=advice)


# ----------------------------------------------------------------------------------------------------------- directory


def _directory(directory: Path) -> Generator[Check]:
    try:
        scratch = Path(tempfile.mkdtemp(prefix="stoker-doctor-", dir=directory))
    except OSError as error:
        advice = "name a directory that this user can write to: --dir"
        yield Check(name="directory", verdict="fail", value=f"{directory}: {error.strerror}", advice=advice)
        return
    try:
        yield Check(name="directory", verdict="ok", value=f"{directory}: can be written")
        yield from _room(scratch)
        yield _feature(
            "O_DIRECT",
            lambda: _write_direct(scratch),
            "use a local disk: here saves and the disk tier go through the page cache, slower and into memory",
        )
        yield _feature(
            "O_TMPFILE",
            lambda: _open_unnamed(scratch),
            "nothing, if you can bear it: files have temporary names while they are written, and a kill leaves them",
        )
        yield _feature(
            "OFD locks",
            lambda: _lock_one_byte(scratch),
            "use a local file system: without locks processes fetch the same blocks each for itself",
        )
        yield _feature(
            "hard links",
            lambda: _link(scratch),
            "use a file system with hard links: without them nothing can be created exclusively, so no checkpoint",
            otherwise="fail",
        )
        yield _feature(
            "RENAME_NOREPLACE",
            lambda: _rename_noreplace(scratch),
            "nothing: stoker uses hard links for this, other programs may not",
        )
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _room(directory: Path) -> Iterator[Check]:
    info = os.statvfs(directory)
    total, free = info.f_blocks * info.f_frsize, info.f_bavail * info.f_frsize
    value = f"{format_bytes(free)} of {format_bytes(total)}"
    advice = "free some: a full disk stops saves, and the disk tier with them"
    if free < _LITTLE_SHARE * total:
        yield Check(name="free space", verdict="warn", value=value, advice=advice)
    else:
        yield Check(name="free space", verdict="ok", value=value)
    if not info.f_files:
        yield Check(name="free inodes", verdict="ok", value="not limited")
    elif info.f_favail < _LITTLE_SHARE * info.f_files:
        advice = "remove small files: each cached block and each checkpoint file needs one"
        yield Check(name="free inodes", verdict="warn", value=f"{info.f_favail:,} of {info.f_files:,}", advice=advice)
    else:
        yield Check(name="free inodes", verdict="ok", value=f"{info.f_favail:,} of {info.f_files:,}")


def _feature(name: str, act: Callable[[], None], advice: str, *, otherwise: Verdict = "warn") -> Check:
    try:
        act()
    except (OSError, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return Check(name=name, verdict=otherwise, value=f"no: {reason}", advice=advice)
    return Check(name=name, verdict="ok", value="yes")


def _write_direct(directory: Path) -> None:
    page = mmap.mmap(-1, mmap.PAGESIZE)
    fd = os.open(directory / "direct", os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, page, 0)
    finally:
        os.close(fd)
        page.close()


def _open_unnamed(directory: Path) -> None:
    os.close(os.open(directory, os.O_RDWR | os.O_TMPFILE | os.O_CLOEXEC, 0o600))


def _lock_one_byte(directory: Path) -> None:
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    first, second = (os.open(directory / "lock", flags, 0o600) for _ in range(2))
    try:
        if not try_lock(first, 0) or try_lock(second, 0):
            raise OSError(errno.ENOLCK, "two open files got the same lock")
        unlock(first, 0)
    finally:
        os.close(first)
        os.close(second)


def _link(directory: Path) -> None:
    for name in ("a", "b"):
        (directory / name).touch()
    os.link(directory / "a", directory / "link")
    with suppress(FileExistsError):
        os.link(directory / "b", directory / "link")
        raise OSError(errno.EEXIST, "a link replaced another")


def _rename_noreplace(directory: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = directory / "source", directory / "target"
    for path in (source, target):
        path.touch()
    if libc.renameat2(_AT_FDCWD, bytes(source), _AT_FDCWD, bytes(target), _RENAME_NOREPLACE) == 0:
        raise OSError(errno.EEXIST, "it replaced a file")
    if ctypes.get_errno() != errno.EEXIST:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


# --------------------------------------------------------------------------------------------------------------- store


def _open(url: str, options: Mapping[str, Any]) -> ObjectStore:
    """The store below a random name: whatever we leave, even by a kill, touches nobody's objects."""
    return open_store(f"{url.rstrip('/')}/stoker-doctor-{os.urandom(8).hex()}", **options)


class _Failed(Exception):
    """A check's finding, from deep inside: its verdict, value and advice."""

    def __init__(self, value: str, advice: str, verdict: Verdict = "fail") -> None:
        super().__init__(value)
        self.value, self.advice, self.verdict = value, advice, verdict


class _Examination:
    """The checks of one store. Those that need what has failed before are not made, and say so."""

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        store: ObjectStore,
        sizes: Sequence[int],
        concurrencies: Sequence[int],
    ) -> None:
        self._url, self._options, self._store = url, options, store
        self._sizes, self._concurrencies = sizes, concurrencies
        self._date: tuple[float, float] | None = None  # of the store, and of this machine in that moment
        self._wrote = False
        self.cells: list[Throughput] = []

    def run(self) -> Generator[Check]:
        # What the others can't do without comes first.
        steps: list[tuple[str, bool, Callable[[], str]]] = [
            ("reachable", True, self._reachable),
            ("clock", False, self._clock),
            (_ACCESS, True, self._may_list),
            ("writing allowed", True, self._may_write),
            ("byte ranges", True, self._ranges),
            ("If-Match", False, self._if_match),
            ("exclusive create", False, self._create),
            ("list order", False, self._order),
            ("delete", False, self._delete),
            ("throughput", False, self._throughput),
        ]
        failed = ""
        try:
            for name, needed, act in steps:
                if failed and name != "clock":
                    yield Check(name=name, verdict="not measured", value=f"needs: {failed}")
                    continue
                check = _examine(name, act)
                yield check
                if needed and (check.verdict == "fail" or (name == _ACCESS and check.verdict == "not measured")):
                    failed = name
        finally:
            left = _examine("clean-up", self._clean_up) if self._wrote else None
        if left is not None:
            yield left

    def _reachable(self) -> str:
        if is_local_url(self._url):
            path = Path(self._url.removeprefix("file://"))
            if not path.is_dir():
                raise _Failed(f"{path}: no such directory", "make the directory, or name another one")
            return f"{path}: a local directory"
        endpoint = _endpoint(self._url, self._options)
        if endpoint is None:
            raise _Failed("this protocol has no known address", "", "not measured")
        place = redact_url(endpoint)
        request = urllib.request.Request(endpoint, method="HEAD", headers={"User-Agent": "stoker"})
        started = time.time()
        try:
            with urllib.request.urlopen(request, timeout=_ANSWER_TIMEOUT_S) as reply:
                headers = reply.headers
        except urllib.error.HTTPError as error:  # an answer without credentials may well be 403
            headers = error.headers
            error.close()
        except OSError as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, ssl.SSLError):
                # The client that moves the bytes has certificates of its own.
                raise _Failed(f"{place}: {reason.reason}", "check the endpoint's certificate", "warn") from None
            text = getattr(reason, "strerror", None) or str(reason)
            raise _Failed(f"{place}: {text}", "check endpoint_url, the network and the proxy settings") from None
        ended = time.time()
        with suppress(TypeError, ValueError):
            # Dates are whole seconds, cut: the middle of that one is as good as it gets.
            self._date = parsedate_to_datetime(headers["Date"]).timestamp() + 0.5, (started + ended) / 2
        return f"{place} answers in {(ended - started) * 1e3:.0f} ms"

    def _clock(self) -> str:
        if is_local_url(self._url):
            raise _Failed("a local directory has this machine's clock", "", "not measured")
        if self._date is None:
            raise _Failed("the store did not say what time it is", "", "not measured")
        skew_s = self._date[1] - self._date[0]
        value = f"{abs(skew_s):.0f} s {'ahead of' if skew_s > 0 else 'behind'} the store's" if abs(skew_s) > 1 else ""
        if abs(skew_s) >= _SKEW_WARN_S:
            advice = "set this machine's clock (NTP): stores refuse requests from one that is 15 minutes off"
            raise _Failed(value, advice, "fail" if abs(skew_s) >= _SKEW_FAIL_S else "warn")
        return value or "as the store's, to the second"

    def _may_list(self) -> str:
        try:
            next(self._store.list(limit=1), None)
        except UnsupportedError as error:  # plain HTTP
            raise _Failed(str(error), "", "not measured") from None
        except BucketNotFound as error:
            raise _Failed(str(error), "make the bucket, or correct its name") from None
        return "accepted"

    def _may_write(self) -> str:
        self._wrote = True
        self._store.put("probe", b"0123456789")
        if bytes(self._store.get("probe")) != b"0123456789":
            raise _Failed("other bytes came back", "do not use this store")
        return "yes"

    def _ranges(self) -> str:
        for start, end in ((3, 7), (0, 1), (9, 10), (4, None)):
            if bytes(self._store.get("probe", start, end)) != b"0123456789"[start:end]:
                raise _Failed(f"[{start}, {end}) brought other bytes", "use a store, or a proxy, that honours Range")
        return "honoured"

    def _if_match(self) -> str:
        old = self._store.put("replaced", b"a" * 4096).version
        self._store.put("replaced", b"b" * 4096)
        before = counters.snapshot()
        try:
            self._store.get("replaced", 0, 4096, version=old)
        except ObjectChanged:
            sent = counters.since(before).get("store.get.bytes", 0)
            if sent:
                advice = "nothing: stoker compares the version of every reply, at the price of bytes that come in vain"
                raise _Failed("ignored; the overwrite was noticed by the reply's version", advice, "warn") from None
            return "honoured: an overwritten object is noticed"
        raise _Failed("an overwritten object was not noticed", "do not use this store: reads may mix two versions")

    def _create(self) -> str:
        self._store.create("created", b"first")
        try:
            self._store.create("created", b"second")
        except AlreadyExists:
            pass
        else:
            raise _Failed("a second create replaced the first", "keep no checkpoints here: two jobs could both commit")
        if bytes(self._store.get("created")) != b"first":
            raise _Failed("a create that was refused was stored", "keep no checkpoints here")

        def race(number: int) -> int:
            try:
                self._store.create("raced", str(number).encode())
            except AlreadyExists:
                return 0
            return 1

        with ThreadPoolExecutor(_RACERS) as pool:
            winners = sum(pool.map(race, range(_RACERS)))
        if winners > 1:
            raise _Failed(
                f"{winners} of {_RACERS} racing creators won", "keep no checkpoints here: several could commit"
            )
        return f"honoured: {winners} of {_RACERS} racing creators won"

    def _order(self) -> str:
        names = ["B", "a-b", "a/b", "a0", "b"]
        for name in (3, 0, 4, 1, 2):
            self._store.put(f"order/{names[name]}", b"")
        found = [info.key.removeprefix("order/") for info in self._store.list("order/")]
        after = [info.key.removeprefix("order/") for info in self._store.list("order/", start_after="order/a-b")]
        if found != names or after != names[2:]:
            raise _Failed(f"{found}, then {after}", "use a store that lists at once what was written, in lexical order")
        return "lexical, complete at once"

    def _delete(self) -> str:
        self._store.delete("probe")
        if self._store.exists("probe"):
            raise _Failed("the object is still there", "allow this key to delete: retention and clean-up need it")
        self._store.delete("probe")
        return "done, and harmless when repeated"

    def _clean_up(self) -> str:
        for info in list(self._store.list()):
            self._store.delete(info.key)
        left = [info.key for info in self._store.list()]
        if is_local_url(self._url):
            with suppress(OSError):  # what is left in it is told below
                os.rmdir(self._store.url.removeprefix("file://"))
        if left:
            raise _Failed(f"{len(left)} objects stay below {self._store.url}", "remove them by hand")
        return "nothing left"

    # -- throughput

    def _throughput(self) -> str:
        largest = max(self._sizes)
        data = memoryview(os.urandom(largest))
        started, count = time.perf_counter(), 0
        while count < _MOST_OBJECTS and (count == 0 or time.perf_counter() - started < _UPLOAD_S):
            self._store.put(f"data/{count}", data)
            count += 1
        for size in self._sizes:
            rate: float | None = None
            for concurrency in self._concurrencies:
                if rate is not None and size * concurrency > rate * _LONGEST_CELL_S:
                    self.cells.append(Throughput(size_bytes=size, concurrency=concurrency, gb_per_s=None))
                    continue
                rate = self._measure(data, count, size, concurrency)
                self.cells.append(Throughput(size_bytes=size, concurrency=concurrency, gb_per_s=rate / 1e9))
        # Every range was compared; the fewest bytes in flight that are nearly the best is what to ask for.
        measured = [cell for cell in self.cells if cell.gb_per_s is not None]
        best = max(cell.gb_per_s or 0.0 for cell in measured)
        enough = [cell for cell in measured if (cell.gb_per_s or 0.0) >= _KNEE_SHARE * best]
        knee = min(enough, key=lambda cell: (cell.size_bytes * cell.concurrency, cell.concurrency))
        self.cells[self.cells.index(knee)] = Throughput(**{**asdict(knee), "knee": True})
        warm = ", from the page cache" if is_local_url(self._url) else ""
        return f"{best:.2f} GB/s at best; the knee is {_size(knee.size_bytes)} x {knee.concurrency}{warm}"

    def _measure(self, data: memoryview, count: int, size: int, concurrency: int) -> float:
        """Bytes a second of range requests at random places, each compared."""
        started = time.perf_counter()

        def ask(number: int) -> int:
            chance, done = random.Random(number), 0
            while not done or time.perf_counter() - started < _CELL_S:
                start = chance.randrange(len(data) // size) * size
                key = f"data/{chance.randrange(count)}"
                if self._store.get(key, start, start + size) != data[start : start + size]:
                    raise _Failed(f"{key} [{start}, {start + size}) brought other bytes", "do not use this store")
                done += size
            return done

        with ThreadPoolExecutor(concurrency) as pool:
            total = sum(pool.map(ask, range(concurrency)))
        return total / (time.perf_counter() - started)


def _examine(name: str, act: Callable[[], str]) -> Check:
    try:
        return Check(name=name, verdict="ok", value=act())
    except _Failed as failed:
        return Check(name=name, verdict=failed.verdict, value=failed.value, advice=failed.advice)
    except StokerError as error:
        text = str(error).removesuffix(f" (hint: {error.hint})") if error.hint else str(error)
        return Check(name=name, verdict="fail", value=text, advice=error.hint or "see what the store's own log says")


def _endpoint(url: str, options: Mapping[str, Any]) -> str | None:
    """The address that is asked, as far as it follows from URL, options and the usual variables."""
    scheme = urlsplit(url).scheme.lower()
    client: Any = options.get("client_kwargs") or {}
    given = options.get("endpoint_url") or (client.get("endpoint_url") if isinstance(client, Mapping) else None)
    env = os.environ
    if scheme in ("http", "https"):
        return url
    if given:
        return str(given)
    if scheme in ("s3", "s3a"):
        region = options.get("region") or env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        named = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        return named or f"https://s3.{region}.amazonaws.com"
    if scheme in ("gs", "gcs"):
        return "https://storage.googleapis.com"
    account = options.get("account_name") or env.get("AZURE_STORAGE_ACCOUNT_NAME")
    return f"https://{account}.blob.core.windows.net" if scheme in ("az", "abfs", "abfss") and account else None


def _size(size_bytes: int) -> str:
    return format_bytes(size_bytes).replace(".0 ", " ")


def _table(cells: Sequence[Throughput]) -> list[str]:
    """Sizes down, requests at once across, in MB/s."""
    columns = sorted({cell.concurrency for cell in cells})
    lines = ["MB/s of range requests, by size and how many at once; * is the knee"]
    lines.append(f"{'':>10}" + "".join(f"{column:>9}" for column in columns))
    for size in sorted({cell.size_bytes for cell in cells}):
        row = {cell.concurrency: cell for cell in cells if cell.size_bytes == size}
        lines.append(f"{_size(size):>10}" + "".join(_number(row.get(column)) for column in columns))
    return lines


def _number(cell: Throughput | None) -> str:
    if cell is None or cell.gb_per_s is None:
        return f"{'-':>8} "
    return f"{cell.gb_per_s * 1e3:>8.0f}{'*' if cell.knee else ' '}"
