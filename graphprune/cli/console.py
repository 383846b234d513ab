"""What every command shares: where output goes, how progress shows, and how an error ends."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any, ParamSpec

import typer

from ..errors import GraphpruneError

Parameters = ParamSpec("Parameters")

OTHER, FILES, DEFECT, INTERRUPTED, READER_GONE = 1, 8, 70, 130, 141
EXIT_CODES = (
    "Exit codes: 0 done; 1 another error; 2 wrong usage; 3 model, inputs, option or recipe cannot be used; "
    "4 capture; 5 a pass; 6 verification; 7 backend, or a package is missing; 8 artifact or file; "
    "70 defect in graphprune; 130 interrupted."
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the Python trace of an error.")]


def guarded(command: Callable[Parameters, None]) -> Callable[Parameters, None]:
    """The command with every error turned into one line on standard error and an exit code."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except (typer.Exit, SystemExit):
            raise
        except BrokenPipeError:
            # The reader (head, less) has gone; closing standard output again at exit must not complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(READER_GONE) from None
        except BaseException as error:
            if kwargs.get("debug"):
                traceback.print_exc()
            code, line = verdict(error)
            print(line, file=sys.stderr)
            raise typer.Exit(code) from None

    return run


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and message of an error that ended a command."""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "interrupted"
    if isinstance(error, GraphpruneError):
        return error.exit_code, f"error: {one_line(error)}"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        return FILES, f"error: {where}{error.strerror or one_line(error)}"
    if isinstance(error, MemoryError):
        return OTHER, "error: out of memory; try a smaller example batch"
    return DEFECT, (
        f"error: {type(error).__name__}: {one_line(error)}; this is a defect in graphprune, "
        "run again with --debug and report the trace"
    )


def one_line(error: BaseException) -> str:
    """The message without line breaks."""
    return " ".join(str(error).split())


@contextlib.contextmanager
def stage(quiet_stdout: bool) -> Iterator[Callable[[str], None]]:
    """A function that shows what is being done: a spinner on a terminal, plain lines in a log.

    With ``quiet_stdout``, whatever libraries print meanwhile goes to standard error.
    """
    redirect = contextlib.redirect_stdout(sys.stderr) if quiet_stdout else contextlib.nullcontext()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.markup import escape

        with Console(stderr=True).status("") as status, redirect:
            yield lambda line: status.update(escape(line))
    else:
        with redirect:
            yield lambda line: print(line, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    print(json.dumps(value, indent=2))


def print_tables(tables: Sequence[Any]) -> None:
    """Sections of a report on standard output."""
    from ..report.text import show_sections

    show_sections(tables)
