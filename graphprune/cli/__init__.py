"""The command line: ``graphprune optimize | inspect | passes | bench | check | verify …``, a file each.

Results go to standard output, progress and errors to standard error; ``--json`` leaves nothing but JSON on
standard output. Every deliberate error is one line and an exit code of its own (see ``docs/cli.md``).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from .. import __version__
from .bench import bench
from .check import CHECK_CODES, check
from .console import EXIT_CODES, guarded
from .emulator import emulator
from .inspect import inspect
from .optimize import optimize
from .passes import passes
from .tune import tune
from .verify import verify

app = typer.Typer(
    name="graphprune",
    help="Fold, prune, quantize, prove and deploy finished PyTorch models.",
    epilog=EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (optimize, inspect, passes, bench, tune, verify, emulator):
    app.command(epilog=EXIT_CODES)(guarded(command))
app.command(epilog=CHECK_CODES)(guarded(check))


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True)
    ] = False,
) -> None:
    if version:
        print(f"graphprune {__version__}")
        raise typer.Exit()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; the exit code is returned, as :data:`console.EXIT_CODES` lists them."""
    try:
        app(args=list(sys.argv[1:] if arguments is None else arguments), prog_name="graphprune")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
