"""Processes that die in the middle of things, for tests of what they leave behind."""

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from stoker.checkpoint.arena import HEADER_BYTES, arena_headers, root_id_of


def killed_after(act: Callable[[], object]) -> None:
    """Run `act` in a forked process, which is then killed while it holds what `act` has returned."""
    pid = os.fork()
    if pid == 0:
        try:
            torch.set_num_threads(1)  # the threads of OpenMP do not live in a forked process
            held = act()
            os.kill(os.getpid(), signal.SIGKILL)
            del held
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(1)
    status = os.waitpid(pid, 0)[1]
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL


def arenas_of(root: Path) -> list[Path]:
    """The arenas of a checkpoint root, by rank and slot."""
    return [path for path, _, _ in arena_headers(root_id_of(str(root)))]


def flip(path: Path, at: int) -> None:
    """Change one bit of a file, in place."""
    with path.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 16]))


def flip_image(arena: Path, at: int = 0) -> None:
    """Change one bit of what an arena holds, `at` bytes into its image."""
    flip(arena, HEADER_BYTES + at)
