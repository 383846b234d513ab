"""``graphprune emulator``: set up the emulated aarch64 machine of ``graphprune verify --emulate``."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from .console import Debug, stage


def emulator(
    folder: Annotated[Path | None, typer.Argument(help="Where; default: the user's cache directory.")] = None,
    pip_flags: Annotated[
        str, typer.Option(metavar="FLAGS", help="Further flags of pip download, in one argument.")
    ] = "",
    debug: Debug = False,
) -> None:
    """Set up an emulated aarch64 machine from Debian's packages, without root: 120 MB, 220 MB with TVM."""
    from ..emulation.emulator import default_folder
    from ..emulation.install import install

    with stage(False) as say:
        machine = install(folder or default_folder(), pip_flags=shlex.split(pip_flags), say=say)
    versions = ", ".join(f"{name} {number}" for name, number in sorted(machine.versions.items()))
    print(f"{machine.folder}: Python {machine.python}, {versions}, run by {machine.qemu}")
