"""What a container may use is what the kernel will grant it, whatever stands in its page cache and wherever the limit is."""

from pathlib import Path

import pytest

from stoker.storage._memory import MemoryLimit, available_memory, memory_limits

GIB = 2**30
STAT = "anon {anon}\nshmem 5\nactive_file {file}\ninactive_file {file}"
STAT_V1 = "cache 7\nactive_file 1\ntotal_active_file {file}\ntotal_inactive_file {file}"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine of 64 GiB, of which 48 are free."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/meminfo").write_text(f"MemTotal: {64 << 20} kB\nMemFree: 5 kB\nMemAvailable: {48 << 20} kB\n")
    return tmp_path


def write(group: Path, **files: object) -> None:
    group.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (group / f"memory.{name}").write_text(f"{text}\n")


def v2(root: Path, path: str, limit: object, used: int, file: int = 0) -> None:
    write(root / "sys/fs/cgroup" / path, max=limit, current=used, stat=STAT.format(anon=used, file=file))


def test_without_a_control_group_the_machine_counts(root: Path) -> None:
    assert list(memory_limits(root=root)) == []
    assert available_memory(root=root) == (48 * GIB, 64 * GIB)


def test_a_group_without_a_limit_does_not_count(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/user\n")
    v2(root, "user", "max", 3 * GIB)
    assert list(memory_limits(root=root)) == []


def test_the_page_cache_of_a_group_is_free_memory(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/job\n")
    v2(root, "job", 32 * GIB, 32 * GIB, file=15 * GIB)
    assert list(memory_limits(root=root)) == [MemoryLimit(limit_bytes=32 * GIB, used_bytes=2 * GIB)]
    assert available_memory(root=root) == (30 * GIB, 32 * GIB)


def test_a_limit_between_the_own_group_and_the_top_counts(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/slurm/job_1/step_0/task_0\n")
    v2(root, "slurm/job_1/step_0/task_0", "max", GIB)
    v2(root, "slurm/job_1", 4 * GIB, GIB)
    assert available_memory(root=root) == (3 * GIB, 4 * GIB)


def test_in_a_container_the_top_of_the_tree_is_the_own_group(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/kubepods/pod1/container\n")
    v2(root, "", 8 * GIB, 2 * GIB)
    assert available_memory(root=root) == (6 * GIB, 8 * GIB)


def test_version_1_is_read_beside_version_2(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("4:cpu:/x\n3:memory:/docker/1\n0::/\n")
    group = root / "sys/fs/cgroup/memory/docker/1"
    write(group, limit_in_bytes=16 * GIB, usage_in_bytes=10 * GIB, stat=STAT_V1.format(file=4 * GIB))
    assert available_memory(root=root) == (14 * GIB, 16 * GIB)


def test_a_group_above_its_limit_has_nothing_to_give(root: Path) -> None:
    (root / "proc/self/cgroup").write_text("0::/job\n")
    v2(root, "job", GIB, 2 * GIB)
    assert available_memory(root=root) == (0, GIB)


def test_a_system_that_does_not_say_has_none(tmp_path: Path) -> None:
    assert available_memory(root=tmp_path) == (0, 0)


def test_this_machine_has_some() -> None:
    available, total = available_memory()
    assert 0 < available <= total
