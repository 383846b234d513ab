"""``graphprune check``: an artifact held to limits, so that a build fails when it grew slow, big or wrong."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import GraphpruneError
from .console import Debug, stage, verdict

if TYPE_CHECKING:
    from ..gates import Verdict

BROKEN, UNJUDGED = 1, 2
CHECK_CODES = (
    "Exit codes: 0 every limit holds; 1 a limit is broken, or could not be measured; 2 nothing was judged: "
    "wrong usage, a damaged artifact, a missing package; 70 defect in graphprune; 130 interrupted."
)
STANDARD_OUTPUT = Path("-")


def check(
    directory: Annotated[Path, typer.Argument(help="An artifact directory.")],
    against: Annotated[
        Path | None, typer.Option(metavar="OLD_DIR", help="The artifact of an earlier build.")
    ] = None,
    max_bytes: Annotated[
        str | None, typer.Option(metavar="N", help="Deployment files together: bytes, 12MB, 1.5MiB.")
    ] = None,
    max_bytes_ratio: Annotated[
        float | None, typer.Option(metavar="R", help="The same, to OLD_DIR's.")
    ] = None,
    max_latency_ratio: Annotated[
        float | None, typer.Option(metavar="R", help="Latency to OLD_DIR's, both measured here in turns.")
    ] = None,
    min_agreement: Annotated[
        float | None, typer.Option(metavar="A", help="Share of answers equal to OLD_DIR's, 0 to 1.")
    ] = None,
    min_sqnr: Annotated[
        float | None, typer.Option(metavar="DB", help="Signal to noise against OLD_DIR's outputs, dB.")
    ] = None,
    min_integers: Annotated[
        float | None, typer.Option(metavar="S", help="Share of multiply-accumulates run in int8, 0 to 1.")
    ] = None,
    inputs: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Inputs to compare on, .npz or .pt; default: random.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Calls to compare, at most.")] = 64,
    batch: Annotated[int, typer.Option(min=1, help="Size of every open dimension.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of each artifact.")] = 40,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the runtime; default: its own.")
    ] = None,
    allow_unmeasured: Annotated[
        bool, typer.Option("--allow-unmeasured", help="Let a limit stand that cannot be measured here.")
    ] = False,
    junit: Annotated[Path | None, typer.Option(metavar="FILE", help="Write JUnit XML.")] = None,
    json: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write JSON; - is standard output.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Hold an artifact to limits: one line each, and an exit code that fails a build."""
    quiet = json == STANDARD_OUTPUT
    if _same(junit, json):
        print(
            f"error: --junit and --json both name {json}, which holds one of them; give two", file=sys.stderr
        )
        raise typer.Exit(UNJUDGED)
    try:
        _clear(junit, json)
        from .. import gates

        limits = gates.Limits(
            max_bytes=max_bytes,
            max_bytes_ratio=max_bytes_ratio,
            max_latency_ratio=max_latency_ratio,
            min_agreement=min_agreement,
            min_sqnr=min_sqnr,
            min_integers=min_integers,
        )
        with stage(quiet) as say:
            found = gates.check(
                directory,
                limits,
                against=against,
                inputs=inputs,
                batch=batch,
                samples=samples,
                threads=threads,
                rounds=rounds,
                allow_unmeasured=allow_unmeasured,
                progress=say,
            )
        _write(found, junit, json)
    except (GraphpruneError, OSError) as error:
        if debug:
            traceback.print_exc()
        _unjudged(error, directory, against, junit, json)
        raise typer.Exit(UNJUDGED) from None
    for line in found.lines:
        print(line, file=sys.stderr if quiet else sys.stdout)
    if not found.passed:
        raise typer.Exit(BROKEN)


def _same(junit: Path | None, json: Path | None) -> bool:
    """Whether both reports are one file, which the second would replace."""
    if junit is None or json is None or json == STANDARD_OUTPUT:
        return False
    device = junit.exists() and not junit.is_file()
    return junit.resolve() == json.resolve() and not device


def _unjudged(
    error: Exception, directory: Path, against: Path | None, junit: Path | None, json: Path | None
) -> None:
    """One line that says why, and the same in the reports."""
    from ..gates import Verdict

    _, line = verdict(error)
    print(line, file=sys.stderr)
    reason = line.removeprefix("error: ")
    found = Verdict(str(directory), None if against is None else str(against), error=reason)
    for reports in ((junit, None), (None, json)):
        try:
            _write(found, *reports)
        except OSError as second:
            if not isinstance(error, OSError):  # else it is most likely the same one
                print(verdict(second)[1], file=sys.stderr)


def _write(found: Verdict, junit: Path | None, json: Path | None) -> None:
    from ..atomic import write_file

    if junit is not None:
        write_file(junit, found.junit_bytes())
    if json == STANDARD_OUTPUT:
        print(found.json_bytes().decode(), end="")
    elif json is not None:
        write_file(json, found.json_bytes())


def _clear(*reports: Path | None) -> None:
    """Whatever happens, no report of an earlier check is left; what cannot be a report is an error now."""
    from ..atomic import attempt

    for report in reports:
        if report is None or report == STANDARD_OUTPUT:
            continue
        if report.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(report))
        if report.exists() and not report.is_file():
            continue  # a device or a pipe
        attempt(report)
        if report.is_file():
            report.resolve().unlink()
