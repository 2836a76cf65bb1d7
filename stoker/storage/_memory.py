"""How much memory this machine, or this container, has to give."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

__all__ = ["MemoryLimit", "available_memory", "memory_limits"]


@dataclass(frozen=True, kw_only=True)
class MemoryLimit:
    """What one control group may use, and what it does: without the page cache of files, which goes when memory is wanted.

    Pages of tmpfs stay, and count.
    """

    limit_bytes: int
    used_bytes: int

    @property
    def free_bytes(self) -> int:
        """What it may still take."""
        return max(0, self.limit_bytes - self.used_bytes)


def memory_limits(*, root: Path = Path("/")) -> Iterator[MemoryLimit]:
    """Of this process's control group and of all above it that have a limit, version 2 and 1; the own group first.

    Inside a container the group's path may be the host's, and its files then stand at the top of the tree.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files, .../cgroup-v1/memory.html#stat-file
    """
    with suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if not controllers:
                top, files = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
            elif "memory" in controllers.split(","):
                top, files = root / "sys/fs/cgroup/memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
            else:
                continue
            own = top / path.lstrip("/")
            for group in (own, *own.parents):
                if not group.is_relative_to(top):
                    break
                with suppress(OSError, ValueError, KeyError):  # "max" is no number: no limit
                    yield _read(group, *files)


def _read(group: Path, limit: str, usage: str, prefix: str) -> MemoryLimit:
    limit_bytes, usage_bytes = (int((group / name).read_text()) for name in (limit, usage))
    stat = _table(group / "memory.stat")
    cached_bytes = stat[f"{prefix}active_file"] + stat[f"{prefix}inactive_file"]
    return MemoryLimit(limit_bytes=limit_bytes, used_bytes=max(0, usage_bytes - cached_bytes))


def available_memory(*, root: Path = Path("/")) -> tuple[int, int]:
    """(bytes that can be had without swapping, all bytes) of this machine, or of the container if that has less.

    (0, 0) where the system does not say.
    """
    try:
        machine = _table(root / "proc/meminfo")
        available, total = machine["MemAvailable"] << 10, machine["MemTotal"] << 10
    except (OSError, ValueError, KeyError):
        return 0, 0
    for limit in memory_limits(root=root):
        available, total = min(available, limit.free_bytes), min(total, limit.limit_bytes)
    return available, total


def _table(path: Path) -> dict[str, int]:
    rows = (line.split() for line in path.read_text().splitlines())
    return {name.rstrip(":"): int(value) for name, value, *_ in rows}
