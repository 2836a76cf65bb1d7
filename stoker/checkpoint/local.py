"""The node's own disk as the level between memory and root: a second copy of each blob, near enough to restore from.

::

    <directory>/<root id>/CACHEDIR.TAG                      says that stoker made it; backup programs skip what holds it
    <directory>/<root id>/step-…/data/{writer}-{n}.safetensors   as under the root
    <directory>/<root id>/step-…/state/{name}.json               as under the root

It holds copies only, never the truth: a copy is used if the log names its nonce, and then each block is compared with the
manifest's checksum. So anything may be missing here, or broken, and everything may be deleted at any time.
"""

import logging
import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future
from contextlib import suppress
from pathlib import Path

from ..errors import ConfigError, KeyNotFound, StokerError, StoreError
from ..metrics import counters
from ..storage._posix import is_private_directory, make_directories
from ..storage.local import LocalStore
from .log import LiveStep, parse_step_directory
from .targets import BlobTarget

__all__ = ["LocalTier"]

logger = logging.getLogger(__name__)

_TAG = b"Signature: 8a477f597d28d172789f06886806bc55\n# stoker checkpoints, copies of one root\n"  # bford.info/cachedir
_KEEP_STEPS = 2
_FAILED = object()
_SPARE = 1.1
"""Room to leave beside a new copy: part of its size."""


# Guarantees: the methods may be called from any thread. `_warned` may be set twice, which costs a second warning.
class LocalTier:
    """Copies of the newest steps of one root on this node's disk. Its ranks share the directory.

    Args:
        directory: on the node's own disk; made with mode 0700 if it is missing.
        root_id: of the root.
        threads: that write.

    Raises:
        ConfigError: `directory` is something else, belongs to another user or is open to others.
    """

    def __init__(self, directory: str | os.PathLike[str], *, root_id: str, threads: Executor) -> None:
        self.store = LocalStore(Path(directory) / f"root-{root_id}")
        self._threads = threads
        self._warned = False
        try:
            make_directories(self.store.root)
            if not is_private_directory(self.store.root):
                raise PermissionError("must be a directory of this user with mode 0700")
            tag = self.store.root / "CACHEDIR.TAG"
            if not tag.exists():
                self.store.put(tag.name, _TAG)
        except OSError as error:  # a dead disk must not keep the job from starting
            if isinstance(error, PermissionError) or Path(directory).is_file():
                raise ConfigError(
                    "must be a private directory on the node's own disk",
                    value=str(error),
                    place=f"CheckpointManager(local={os.fspath(directory)!r})",
                ) from error
            self.failed(error)

    def target(self, directory: str, size_bytes: int) -> BlobTarget:
        """Where the blobs of one attempt go. Older copies make room for it first, down to the newest one."""
        return BlobTarget(self.store, directory, self._threads, self._threads.submit(self._make_room, size_bytes))

    def _make_room(self, size_bytes: int) -> None:
        with suppress(OSError):  # whoever writes next hears of it
            free = os.statvfs(self.store.root)
            if free.f_bavail * free.f_frsize < _SPARE * size_bytes:
                for old in self._directories()[:-1]:
                    self._delete(old)

    def finish(
        self, target: BlobTarget, directory: str, documents: Mapping[str, bytes], deadline: float
    ) -> Future[None]:
        """Make a copy durable, with these documents; the future is done when it is. It raises what went wrong."""

        def work() -> None:
            try:
                target.written(deadline)
                target.finish()
                for path, data in documents.items():
                    # Most are the same on every rank of the node; one of them writes.
                    if not self.store.exists(f"{directory}/{path}"):
                        self.store.put(f"{directory}/{path}", data)
            except BaseException as error:
                target.abort()
                self.failed(error)
                raise
            self._warned = False

        return self._threads.submit(work)

    def failed(self, error: BaseException) -> None:
        """Count a failure, and say so once: training goes on without a local copy."""
        counters.add("ckpt.local.failures")
        if not self._warned:
            self._warned = True
            logger.warning("%s: no local copies, saving to the root alone: %s", self.store.url, str(error))

    def _directories(self) -> list[str]:
        """The step directories, the oldest step first."""
        with suppress(OSError):
            return sorted(name for name in os.listdir(self.store.root) if parse_step_directory(name))
        return []

    def retain(
        self, live: Mapping[int, LiveStep], *, spare: Collection[str], stop: Callable[[], bool] = lambda: False
    ) -> None:
        """Delete what is no copy of one of the newest live steps.

        Args:
            spare: nonces of attempts in flight. So is what is newer than the newest live step: another rank's, perhaps.
            stop: asked between two files.
        """
        newest = sorted(live)[-_KEEP_STEPS:]
        kept = {live[step].nonce for step in newest}
        for name in self._directories():
            step, nonce = parse_step_directory(name) or (0, "")
            if newest and step <= newest[-1] and nonce not in kept and nonce not in spare:
                self._delete(name, stop)

    def _delete(self, directory: str, stop: Callable[[], bool] = lambda: False) -> None:
        try:
            for info in list(self.store.list(f"{directory}/")):
                if stop():
                    return
                self.store.delete(info.key)
        except (StokerError, OSError) as error:
            logger.warning("could not delete %s: %s", self.store.place(directory), error)

    def has(self, directory: str) -> bool:
        """Whether there is a copy of this attempt, or a part of one."""
        return (self.store.root / directory).is_dir()

    def read_into(self, key: str, buffer: memoryview, start: int) -> bool:
        """Fill `buffer` from a copy; False if it is not there, too short, or the disk fails."""
        return self._try(key, lambda: self.store.get_into(key, buffer, start)) is not _FAILED

    def read(self, key: str) -> bytes | None:
        """A small file of a copy; None if it is not there, or the disk fails."""
        data = self._try(key, lambda: bytes(self.store.get(key)))
        return data if isinstance(data, bytes) else None

    def _try(self, key: str, act: Callable[[], object]) -> object:
        try:
            return act()
        except KeyNotFound:
            return _FAILED
        except StoreError as error:
            logger.warning("%s: %s", self.store.place(key), error)
            return _FAILED
