"""The command ``stoker``: mounts the layers' commands and turns errors into one sentence and an exit code.

Exit codes: 0 done, 1 found wrong or failed, 2 wrong usage, 130 interrupted.
"""

import json
import logging
import sys
from contextlib import suppress
from functools import cache
from typing import Annotated

import typer

from . import __version__
from ._console import new_app
from .errors import ConfigError, StokerError, UnsupportedError

__all__ = ["main"]

INTERRUPTED = 130
"""128 and the number of SIGINT, as shells have it."""

app = new_app("The I/O layer of PyTorch training: token data sets, cache, checkpoints, benches.")


@cache  # typer keeps every command that was ever added, and builds them all at each call
def _mount() -> None:
    from .bench.cli import app as bench_app
    from .checkpoint.cli import app as ckpt_app
    from .demo import demo
    from .loaders.cache_cli import plan, warm
    from .loaders.cli import app as data_app
    from .storage.cli import cache_app, doctor

    app.add_typer(data_app, name="data")
    cache_app.command("warm")(warm)
    app.add_typer(cache_app, name="cache")
    app.add_typer(ckpt_app, name="ckpt")
    app.add_typer(bench_app, name="bench")
    app.command("plan")(plan)
    app.command("doctor")(doctor)
    app.command("demo")(demo)


def _print_version(value: bool) -> None:
    if value:
        sys.stdout.write(f"stoker {__version__}\n")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log to standard error.")] = False,
) -> None:
    if verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr)


def main(arguments: list[str] | None = None) -> None:
    """Run ``stoker`` with `arguments` (those of the process by default) and exit."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        _mount()
        app(args=arguments, prog_name="stoker")
    except (StokerError, OSError) as error:  # a bare OSError comes from the output
        sys.exit(_fail(error, arguments))
    except KeyboardInterrupt:
        sys.exit(_interrupted())
    except SystemExit as done:
        if done.code == INTERRUPTED:  # typer has turned the KeyboardInterrupt into this
            _interrupted()
        raise


def _interrupted() -> int:
    sys.stderr.write("error: interrupted\n")
    return INTERRUPTED


def _fail(error: StokerError | OSError, arguments: list[str]) -> int:
    sys.stderr.write(f"error: {error}\n")
    try:
        sys.stdout.flush()
        if "--json" in arguments:
            sys.stdout.write(json.dumps({"ok": False, "error": type(error).__name__, "message": str(error)}) + "\n")
            sys.stdout.flush()
    except OSError:  # Python would try once more at its end, and print a traceback
        with suppress(OSError):
            sys.stdout.close()
    return 2 if isinstance(error, (ConfigError, UnsupportedError)) else 1


if __name__ == "__main__":
    main()
