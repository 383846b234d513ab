"""``graphprune verify``: run a saved artifact, here or under emulation, and compare it with its reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..errors import VerificationError
from .console import Debug, Json, print_json, stage


def verify(
    directory: Annotated[Path, typer.Argument(help="An artifact directory.")],
    emulate: Annotated[
        bool, typer.Option("--emulate", help="Run it on an emulated aarch64 processor, not here.")
    ] = False,
    emulator: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Where the emulator is; default: build/arm, then the cache."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the runtime; default: its own, 1 under emulation.")
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, metavar="S", help="Seconds the emulated process may take.")
    ] = 1800.0,
    record: Annotated[
        bool, typer.Option("--record", help="Write what was proven into the artifact and its report.")
    ] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Run an artifact once and compare its answers with those of its graph."""
    from .. import proof

    with stage(json) as say:
        found = proof.prove(
            directory,
            emulate=emulate or emulator is not None,
            emulator=emulator,
            threads=threads,
            timeout=timeout,
            progress=say,
        )
        if record:
            proof.record(directory, found)
    if json:
        print_json(found.to_json())
    else:
        for line in found.lines:
            print(line)
    if not found.passed:
        sys.stdout.flush()
        raise VerificationError(f"{directory} does not answer as its reference: {found.certificate.reason}")
