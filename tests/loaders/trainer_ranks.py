"""Runs an example of a trainer at two ranks, stops it and resumes it, and then alone; the library is imported once.

    python -m tests.loaders.trainer_ranks EXAMPLE LIBRARY DATA DIRECTORY

The first run takes 6 steps and saves after 4. What it did after that is lost; the second run goes on to step 8.
The third is one process without a launcher, of 2 steps.
"""

import importlib
import os
import runpy
import shutil
import socket
import sys
import traceback
from pathlib import Path

_OPTIONS = {"save-every": 4, "batch-size": 4, "seq-len": 16, "vocab": 256, "width": 32}


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _run(example: str, arguments: list[str], *, alone: bool = False) -> None:
    """All ranks of one run; ends the program if one of them failed."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = []
    for rank in ("0",) if alone else ("0", "1"):
        pid = os.fork()
        if pid == 0:
            if not alone:
                os.environ.update(shared, RANK=rank, LOCAL_RANK=rank)
            sys.argv = [example, *arguments]
            try:
                runpy.run_path(example, run_name="__main__")
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            sys.stdout.flush()
            os._exit(0)
        ranks.append(pid)
    ended = [os.waitpid(pid, 0)[1] for pid in ranks]
    if any(ended):
        sys.exit(1)


def main() -> None:
    example, library, data, directory = sys.argv[1:]
    importlib.import_module(library)
    given = [f"--{name}={value}" for name, value in _OPTIONS.items()]
    output = Path(directory) / "out"
    for run, steps in (("first", 6), ("second", 8)):
        rows = f"--rows={directory}/{run}"
        _run(example, [f"--data={data}", f"--output={output}", rows, f"--steps={steps}", *given])
        # transformers saves at the end as well, which a run that crashed there would not have done.
        shutil.rmtree(output / "checkpoint-6", ignore_errors=True)
    alone = [f"--data={data}", f"--output={directory}/alone", f"--rows={directory}/alone-rows", "--steps=2"]
    _run(example, [*alone, *given], alone=True)


if __name__ == "__main__":
    main()
