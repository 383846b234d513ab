"""Set up an emulated aarch64 machine in a folder: qemu, a Python, and the runtimes in this host's versions.

Each part is made beside its place, put there in one step and written down; a run that was interrupted goes on
where it stopped, and one that finds everything does nothing. Nothing outside the folder changes, and root is
not needed. About 120 MB are fetched (220 MB with TVM).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import atomic
from ..errors import BackendError
from . import debian, wheels
from .emulator import FORMAT, RECORD, Emulator, find, read_record

Say = Callable[[str], None]
QEMU = ("qemu-aarch64-static", "qemu-aarch64")
_PYTHON = re.compile(r"python3\.\d+")
_SHOW = "import sys, numpy\nfor name in sys.argv[1:]: print(name, __import__(name).__version__)\n"


def install(folder: str | Path, *, pip_flags: Sequence[str] = (), say: Say | None = None) -> Emulator:
    """Set up what is missing of the emulator in ``folder``.

    Args:
        folder: made if it does not exist; nothing else may be in it.
        pip_flags: further arguments of ``pip download``, such as ``--index-url``.
        say: called with one line as each step starts.

    Raises:
        BackendError: a tool or package is missing, or a download failed; says what to do.
        OSError: the folder cannot be written.
    """
    place, say = Path(folder).resolve(), say or (lambda line: None)
    packages = wheels.wanted()
    reason = debian.missing()
    if reason and not (place / RECORD).exists():
        raise BackendError(reason)
    place.mkdir(parents=True, exist_ok=True)
    with _alone(place):
        record = read_record(place)
        if record.get("format") != FORMAT:
            record = {"format": FORMAT}
        if not _has_root(place, record) or "qemu" not in record or not shutil.which(place / record["qemu"]):
            if reason:
                raise BackendError(reason)
            _system(place, record, say)
        if record.get("asked") != packages:
            _runtimes(place, record, packages, pip_flags, say)
        if not record.get("ready"):
            _try(place, record, say)
        for name in ("apt", "wheels"):
            shutil.rmtree(place / name, ignore_errors=True)
    return find(place)


def _system(place: Path, record: dict[str, Any], say: Say) -> None:
    """qemu and the emulated Python."""
    if not _has_root(place, record):
        record.pop("python", None)
        say("fetch the lists of Debian packages for arm64")
        guest = debian.Packages(place / "apt/guest", "arm64")
        guest.update()
        python = next((name for name in guest.depends("python3") if _PYTHON.fullmatch(name)), None)
        if python is None:
            raise BackendError("the system's package sources have no python3 for arm64")
        say(f"fetch {python} and the C++ library for arm64 (about 20 MB)")
        archives = guest.fetch(python, "libstdc++6", "libgomp1")
        with _replacing(place / "root") as partial:
            debian.unpack(archives, partial)
        record |= {"python": python.removeprefix("python"), "glibc": _glibc(archives), "ready": False}
        _write(place, record)
    found = next((path for name in QEMU if (path := shutil.which(name))), None)
    if found is None:
        say("fetch qemu (about 65 MB)")
        host = debian.Packages(place / "apt/host", debian.host_architecture())
        host.update()
        with _replacing(place / "qemu") as partial:
            for package in (
                "qemu-user-static",
                "qemu-user",
            ):  # newer releases keep the programs in the second
                debian.unpack([host.fetch_alone(package)], partial)
                name = next((name for name in QEMU if (partial / "usr/bin" / name).is_file()), None)
                if name is not None:
                    break
            else:
                raise BackendError("neither qemu-user-static nor qemu-user holds a qemu for aarch64")
            for other in (partial / "usr/bin").iterdir():  # the other forty architectures
                if other.name not in QEMU:
                    other.unlink()
        found = f"qemu/usr/bin/{name}"
    record |= {"qemu": found, "ready": False}
    _write(place, record)


def _runtimes(
    place: Path, record: dict[str, Any], packages: dict[str, str], flags: Sequence[str], say: Say
) -> None:
    """The wheels."""
    record.pop("asked", None)
    say(f"fetch wheels for aarch64: {', '.join(f'{name} {number}' for name, number in packages.items())}")
    major, minor = record["glibc"]
    # Of other versions, what an interrupted run fetched may not be mixed with what is fetched now.
    folder = place / "wheels" / "-".join(filter(None, packages.values()))
    found = wheels.download(packages, folder, record["python"], (major, minor), flags)
    with _replacing(place / "site") as partial:
        versions = wheels.unpack(found, partial)
    record |= {"asked": packages, "versions": versions, "ready": False}
    _write(place, record)


def _try(place: Path, record: dict[str, Any], say: Say) -> None:
    """Run the emulated Python once: a machine that does not work is not ready."""
    say("try it: import onnxruntime under emulation")
    script = place / "try.py"
    script.write_text(_SHOW)
    machine = Emulator(place, str(place / record["qemu"]), record["python"], record["versions"])
    printed = machine.run(script, ["onnxruntime"], timeout=600).output.split()
    script.unlink()
    if printed != ["onnxruntime", record["versions"]["onnxruntime"]]:
        raise BackendError(
            f"the emulated Python answers {printed}, onnxruntime {record['versions']} expected"
        )
    record["ready"] = True
    _write(place, record)


def _has_root(place: Path, record: dict[str, Any]) -> bool:
    return "python" in record and (place / f"root/usr/bin/python{record['python']}").exists()


def _glibc(archives: Sequence[Path]) -> tuple[int, int]:
    """The version of the C library, from its package's file name."""
    match = next(
        (m for path in archives if (m := re.match(r"libc6_(?:\d+%3a)?(\d+)\.(\d+)", path.name))), None
    )
    if match is None:
        raise BackendError("the packages of the emulated Python hold no C library (libc6)")
    return int(match[1]), int(match[2])


def _write(place: Path, record: dict[str, Any]) -> None:
    atomic.write_file(place / RECORD, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A directory to fill, which takes the place of ``target`` when it was filled."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    shutil.rmtree(target, ignore_errors=True)
    partial.rename(target)


@contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One installation at a time; the second waits, and then finds everything there."""
    import fcntl  # where there is apt there is this

    descriptor = os.open(place / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
