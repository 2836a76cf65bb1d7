"""Stopping by a signal: who hears it, where the ranks stop, and that a second signal and children are left alone."""

import random
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stoker.checkpoint import CheckpointManager
from stoker.checkpoint.stop import StopRequest
from stoker.errors import ConfigError
from stoker.storage.local import LocalStore


@contextmanager
def started(program: str) -> Iterator["subprocess.Popen[str]"]:
    """A Python process, killed at the end if it still runs."""
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE, text=True) as it:
        try:
            yield it
        finally:
            it.kill()


def lines(process: "subprocess.Popen[str]", count: int) -> list[str]:
    assert process.stdout is not None
    return [process.stdout.readline().strip() for _ in range(count)]


def test_a_process_that_gets_sigterm_saves_its_step_and_ends_well(tmp_path: Path) -> None:
    program = f"""
        import signal, torch
        from stoker.checkpoint import CheckpointManager
        with CheckpointManager({str(tmp_path)!r}, stop_on=[signal.SIGTERM]) as ckpt:
            step = 0
            while not ckpt.should_stop(step):
                step += 1
                print(step, flush=True)
            ckpt.save(step, {{"t": torch.full((1000,), step)}})
        print("saved", step, flush=True)
    """
    with started(program) as process:
        lines(process, 5)
        process.send_signal(signal.SIGTERM)
        rest = process.communicate()[0].split()
        assert process.returncode == 0
        with CheckpointManager(tmp_path) as ckpt:
            assert ckpt.steps() == [int(rest[-1])]


def test_a_second_signal_does_what_it_did_before(tmp_path: Path) -> None:
    program = f"""
        import signal
        from stoker.checkpoint import CheckpointManager
        ckpt = CheckpointManager({str(tmp_path)!r}, stop_on=[signal.SIGTERM, signal.SIGUSR1])
        print("ready", flush=True)
        while not ckpt.should_stop(1):
            pass
        print("heard", flush=True)
        while True:
            signal.pause()
    """
    with started(program) as process:
        lines(process, 1)
        process.send_signal(signal.SIGUSR1)
        assert lines(process, 1) == ["heard"]
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert process.returncode == -signal.SIGTERM


def test_a_forked_worker_dies_of_its_signal(tmp_path: Path) -> None:
    """torch's DataLoader ends its workers by SIGTERM: they must not take it for a request."""
    program = f"""
        import os, signal, warnings
        from stoker.checkpoint import CheckpointManager
        warnings.simplefilter("ignore")
        ckpt = CheckpointManager({str(tmp_path)!r}, stop_on=[signal.SIGTERM])
        mine, its = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(its, b"!")
            while os.getppid() != 1:
                pass
            os._exit(0)
        os.read(mine, 1)
        os.kill(child, signal.SIGTERM)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), ckpt.should_stop(1))
        ckpt.close()
    """
    with started(program) as process:
        out = process.communicate(timeout=60)[0]
        assert out.split() == [str(-signal.SIGTERM), "False"]


def test_close_gives_the_handlers_back(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with CheckpointManager(tmp_path, stop_on=[signal.SIGUSR1]):
        assert signal.getsignal(signal.SIGUSR1) != before
    assert signal.getsignal(signal.SIGUSR1) == before


def test_a_manager_outside_the_main_thread_is_told_how_to_listen(tmp_path: Path) -> None:
    found: list[str] = []

    def work() -> None:
        with pytest.raises(ConfigError, match="request_stop") as caught:
            CheckpointManager(tmp_path, stop_on=[signal.SIGUSR1])
        found.append(str(caught.value))
        with CheckpointManager(tmp_path) as ckpt:
            assert not ckpt.should_stop(1)
            ckpt.request_stop()
            assert ckpt.should_stop(2)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found


@pytest.mark.parametrize("margin", [1, 3, 10])
def test_all_ranks_stop_at_one_step_whoever_hears_and_whenever(tmp_path: Path, margin: int) -> None:
    """Every order of calls in which ranks stay at most `margin` steps apart; several may hear, at different steps."""
    rng = random.Random(margin)
    with LocalStore(tmp_path) as store:
        for seed in range(100):
            ranks = [
                StopRequest(store, run_id=f"run-{seed}", rank=rank, world_size=4, margin=margin) for rank in range(4)
            ]
            first = rng.randrange(50)
            steps = [first] * 4
            heard_at: dict[int, int] = {}
            stopped: dict[int, int] = {}
            will_hear = {rng.randrange(4): first + rng.randrange(25) for _ in range(rng.randrange(1, 4))}
            while len(stopped) < 4:
                slowest = min(steps[rank] for rank in range(4) if rank not in stopped)
                rank = rng.choice([r for r in range(4) if r not in stopped and steps[r] <= slowest + margin])
                if will_hear.get(rank) == steps[rank]:
                    ranks[rank].request()
                    heard_at[rank] = steps[rank]
                if ranks[rank].reached(steps[rank]):
                    stopped[rank] = steps[rank]
                steps[rank] += 1
            assert len(set(stopped.values())) == 1, (seed, stopped, heard_at)
            assert min(heard_at.values()) < stopped[0] <= min(heard_at.values()) + 2 * margin + margin


def test_a_rank_that_is_never_asked_keeps_going_and_writes_nothing(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, rank=0, world_size=2, run_id="run") as ckpt:
        assert not any(ckpt.should_stop(step) for step in range(100))
    assert not list(tmp_path.iterdir())


def test_the_note_of_a_run_that_was_stopped_is_removed_by_a_later_one(tmp_path: Path) -> None:
    with CheckpointManager(tmp_path, rank=0, world_size=2, run_id="../run") as ckpt:
        ckpt.request_stop()
        assert not ckpt.should_stop(1)
    assert len(list(tmp_path.glob("stop/*"))) == 1
    with CheckpointManager(tmp_path, grace_s=0) as ckpt:
        ckpt.save(1, {"x": 1}).wait()
    assert not list(tmp_path.glob("stop/*"))
