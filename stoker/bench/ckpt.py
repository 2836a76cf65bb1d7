"""How close do save and restore come to what memory, disk, network and processor allow, and how do others do?

Command: ``stoker bench ckpt [--only PART] [--size 2GB] [--runs 5] [--dir DIR] [--json]``. Its parts:

``large``, ``small``
    A state of fp32 tensors in host memory, of 1 to 64 MiB each, or of 200 kB each, is saved to a directory and restored
    from it, by each variant in turn; all numbers come from one and the same save and its restore. Limits and stoker take
    turns three times in each round, and a round's value is the median of its turns: beside them, the peers write and
    remove several times as many bytes, and what memory and disk give changes meanwhile.
``tiny``
    The same with tensors of 20 kB: printed, without goals.
``first``
    What the first save of a process costs: :mod:`stoker.bench._ckpt_first`.
``upload``
    The state as one object store sees it: :mod:`stoker.bench._ckpt_upload`.
``scale``
    Planning and merging, without data: :mod:`stoker.bench._ckpt_scale`.
``reshard``
    Bytes that a node reads when the layout changes: :mod:`stoker.bench._ckpt_reshard`.
``training``
    A loop beside a save that persists: :mod:`stoker.bench._ckpt_training`.

``save stall``
    seconds for which the caller of save can't train on. Limit: ``copy_`` of the same tensors into views made before.
``durable save``
    10^9 bytes/s from the call of save until the step is durable and visible; ``from staged``: from when save returned.
    Limit: O_DIRECT writes of the same bytes from aligned memory in several threads into a fresh, preallocated file, and
    its fsync.
``cold restore``
    10^9 bytes/s back into the tensors of a running job, files out of the page cache and no copy in memory. Limit:
    O_DIRECT reads of the same bytes into aligned memory in several threads. Only stoker checks what it reads.
``warm restore``
    The same from the staging arena, as after a crash of the process alone.

Every restore is compared with the saved state, bit for bit. stoker's memory is allocated before the first save
(``prewarm``); the column "first" is the median of the turns of the first round, which counts for nothing else.
"""

import gc
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from ..checkpoint import CheckpointManager
from ..errors import ConfigError, CorruptionError, StoreFull
from ..storage._units import format_bytes
from ._ckpt_first import run_first
from ._ckpt_job import DURABLE, FROM_STAGED, RESTORE, STALL, WARM, Job, check_equal, large_state, small_state
from ._ckpt_limits import limits
from ._ckpt_peers import peers
from ._ckpt_reshard import run_reshard
from ._ckpt_scale import run_scale
from ._ckpt_training import run_training
from ._ckpt_upload import run_upload
from .frame import Case, Outcome, Question, Report, Sample, Variant, measure

__all__ = ["DURABLE", "FROM_STAGED", "PARTS", "RESTORE", "STALL", "WARM", "check_equal", "run_ckpt"]

PARTS = ("large", "small", "tiny", "first", "upload", "scale", "reshard", "training")
_SMALL_BYTES, _TINY_BYTES = 200_000, 20_000
_MIB = 1 << 20
_TURNS = 3
_COPIES = 8
"""The state, the target, the limit's copy, stoker's two arenas, and a staging copy of each of three peers."""


def run_ckpt(
    *,
    size_bytes: int,
    runs: int,
    directory: str | Path,
    only: Sequence[str] = ("large",),
    warmup: int = 1,
    progress: Callable[[], None] | None = None,
) -> Report:
    """Measure the parts in `only` with `size_bytes` of fp32 tensors below `directory`, which is left as it was found.

    Needs memory for eight copies of the state, and disk for two at a time.

    Raises:
        ConfigError: a size below 1 MiB, one that the memory is too small for, or no such part.
        StoreFull: not enough space below `directory`.
        UnsupportedError: the file system has no O_DIRECT, so there is no limit to measure against.
    """
    unknown = set(only) - set(PARTS)
    if unknown or not only:
        raise ConfigError(f"a part is one of {', '.join(PARTS)}", value=", ".join(sorted(unknown)), place="--only")
    _check_room(size_bytes, Path(directory))
    reports = [
        _run_part(part, size_bytes=size_bytes, runs=runs, warmup=warmup, directory=Path(directory), progress=progress)
        for part in PARTS
        if part in only
    ]
    report = reports[0]
    for more in reports[1:]:
        report += more
    return report


def _run_part(
    part: str, *, size_bytes: int, runs: int, warmup: int, directory: Path, progress: Callable[[], None] | None
) -> Report:
    if part == "first":
        return run_first(size_bytes=size_bytes, runs=runs, warmup=warmup, directory=directory, progress=progress)
    if part == "scale":
        return run_scale(runs=runs, warmup=warmup, directory=directory, progress=progress)
    if part == "reshard":
        return run_reshard(size_bytes=size_bytes, runs=runs, warmup=warmup, directory=directory, progress=progress)
    if part == "training":
        return run_training(size_bytes=size_bytes, runs=runs, warmup=warmup, directory=directory, progress=progress)
    if part == "upload":
        return run_upload(size_bytes=size_bytes, runs=runs, warmup=warmup, directory=directory, progress=progress)
    if part == "large":
        state = large_state(size_bytes)
    else:
        state = small_state(size_bytes, _SMALL_BYTES if part == "small" else _TINY_BYTES)
    job = Job(state, directory)
    suffix = "" if part == "large" else f", {len(state):,} x {next(iter(state.values())).nbytes / 1000:g} kB"
    size_bytes = job.size_bytes
    cases = [
        Case(name=STALL, unit="s", better="lower", goal_ratio=1.3, origin="host memory", bytes=size_bytes),
        Case(name=DURABLE, unit="GB/s", goal_ratio=0.85, origin="host memory", bytes=size_bytes),
        Case(name=FROM_STAGED, unit="GB/s", goal_ratio=0.9, origin="host memory", bytes=size_bytes),
        Case(name=RESTORE, unit="GB/s", goal_ratio=0.85, cache="cold", origin="local disk", bytes=size_bytes),
        # Three times a cold restore that reaches its goal.
        Case(name=WARM, unit="GB/s", goal_ratio=3 * 0.85, cache="warm", origin="arena", bytes=size_bytes),
    ]
    if part == "tiny":
        cases = [replace(case, goal_ratio=None) for case in cases]
    cases = [replace(case, name=case.name + suffix) for case in cases]
    params = {
        "size_bytes": size_bytes,
        "tensors": len(state),
        "torch_threads": torch.get_num_threads(),
        "turns": _TURNS,
    }
    question = Question(bench="ckpt", cases=cases, params=params)
    variants = [
        replace(variant, run=partial(_run_with_suffix, variant.run, suffix))
        for variant in (*_in_turns([*limits(job), _stoker(job)]), *peers(job))
    ]
    return measure(question, variants, runs=runs, warmup=warmup, directory=directory, progress=progress)


def _in_turns(variants: Sequence[Variant]) -> list[Variant]:
    """The same variants, of which the first one's run runs all, in turns; each returns the medians of its own.

    A ratio is taken of what was measured within seconds of each other, and a moment in which the machine was busy with
    something else falls on one turn of several.
    """
    outcomes: dict[str, list[Mapping[str, float | Sample]]] = {}

    def run(variant: Variant) -> Outcome:
        if variant is variants[0]:
            outcomes.update({one.name: [] for one in variants})
            for _ in range(_TURNS):
                for one in variants:
                    gc.collect()  # as between variants
                    outcome = one.run()
                    assert isinstance(outcome, Mapping)
                    outcomes[one.name].append(outcome)
        return _medians(outcomes[variant.name])

    return [replace(variant, run=partial(run, variant)) for variant in variants]


def _medians(outcomes: Sequence[Mapping[str, float | Sample]]) -> dict[str, float | Sample]:
    """By case, the sample in the middle; its bytes count as compared, and the cache as cold, if those of all do."""
    found: dict[str, float | Sample] = {}
    for case in outcomes[0]:
        samples = [sample for outcome in outcomes if isinstance(sample := outcome[case], Sample)]
        middle = sorted(samples, key=lambda sample: sample.value)[len(samples) // 2]
        warm = next((sample.cache for sample in samples if sample.cache == "warm"), middle.cache)
        found[case] = replace(middle, cache=warm, verified=all(sample.verified for sample in samples))
    return found


def _run_with_suffix(run: Callable[[], Outcome], suffix: str) -> Outcome:
    outcome = run()
    assert isinstance(outcome, Mapping)
    return {name + suffix: sample for name, sample in outcome.items()}


def _check_room(size_bytes: int, directory: Path) -> None:
    if size_bytes < _MIB:
        raise ConfigError("size must be >= 1 MiB", value=size_bytes, place="stoker bench ckpt")
    free = shutil.disk_usage(directory).free
    if free < 1.1 * size_bytes:
        raise StoreFull(
            f"{format_bytes(1.1 * size_bytes)} must be free", value=format_bytes(free), place=str(directory)
        )
    # What can be had without swapping, by the kernel's own estimate; other systems just try.
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
        if available is not None and available < _COPIES * size_bytes:
            raise ConfigError(
                f"size must fit into the available memory {_COPIES} times",
                value=f"{format_bytes(size_bytes)} with {format_bytes(available)} available",
                place="stoker bench ckpt",
                hint="choose a smaller --size",
            )


def _stoker(job: Job) -> Variant:
    path = job.directory / "stoker"
    # Under another name of the same directory a manager finds no arena, so what it restores comes from the disk.
    alias = job.directory / "stoker-by-another-name"
    manager: CheckpointManager | None = None
    step = 0

    def open_manager() -> None:
        nonlocal manager
        path.mkdir()
        alias.symlink_to(path.name, target_is_directory=True)
        manager = CheckpointManager(path)
        manager.prewarm({"model": job.state})

    def close_manager() -> None:
        if manager is not None:
            manager.close()
        alias.unlink(missing_ok=True)
        shutil.rmtree(path, ignore_errors=True)

    def save(_path: Path) -> tuple[float, float]:
        nonlocal step
        assert manager is not None
        step += 1
        handle = manager.save(step, {"model": job.state})
        handle.wait("committed")
        report = handle.report()
        assert report.committed_s is not None
        return report.stall_s, report.committed_s

    def restore(_path: Path) -> None:
        with CheckpointManager(alias) as other:
            _came_from("root", other.restore({"model": job.target}).bytes_from)

    def restore_warm(_path: Path) -> None:
        assert manager is not None
        _came_from("arena", manager.restore({"model": job.target}).bytes_from)

    return Variant(
        name="stoker",
        kind="stoker",
        run=lambda: job.round_trip(path, save, restore, warm=restore_warm),
        setup=open_manager,
        teardown=close_manager,
        notes=("durable means committed: every byte fsynced and one log record naming the step", "prewarmed"),
    )


def _came_from(tier: str, bytes_from: dict[str, int]) -> None:
    """Raise CorruptionError if a tier served bytes that was not to be measured."""
    others = {name: count for name, count in bytes_from.items() if count and name != tier}
    if others:
        raise CorruptionError(f"every byte must come from the {tier}", value=others, place="stoker bench ckpt")
