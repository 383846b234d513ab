"""Python packages of another machine: wheels for aarch64, unpacked into a folder.

Versions are this host's, so that what runs under emulation is what was built and tested here.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import BackendError

RUNTIMES = ("onnxruntime", "apache-tvm")
# What a runtime imports. Its other requirements are those of its tools, which nobody runs there.
_BESIDE = {
    "onnxruntime": ("numpy",),
    "apache-tvm": ("numpy", "apache-tvm-ffi", "ml-dtypes", "typing-extensions"),
}
# Their versions may differ from the host's where its version has no wheel for the emulated Python.
_ANY = ("numpy", "ml-dtypes", "typing-extensions")


def wanted() -> dict[str, str]:
    """Package → version: the runtimes that are installed here, and what they import."""
    here = {name: found for name in RUNTIMES if (found := _version(name))}
    if "onnxruntime" not in here:
        raise BackendError(
            "onnxruntime is not installed here; install it first, its version is emulated: "
            "pip install onnxruntime"
        )
    beside = {name for runtime in here for name in _BESIDE[runtime]}
    return {**here, **{name: _version(name) for name in sorted(beside)}}


def download(
    packages: Mapping[str, str], folder: Path, python: str, glibc: tuple[int, int], flags: Sequence[str] = ()
) -> list[Path]:
    """Wheels for aarch64.

    Args:
        packages: name → version, empty for any.
        folder: where they are put; those that are there are not fetched again.
        python: the emulated Python's version (``3.11``).
        glibc: of the emulated system.
        flags: further arguments of ``pip download``.

    Raises:
        BackendError: pip is not here, or there is no such wheel; says which.
    """
    if not any(importlib.metadata.distributions(name="pip")):  # looking for the module may warn of distutils
        raise BackendError(
            "this environment has no pip, which fetches the wheels for aarch64: python -m ensurepip"
        )
    folder.mkdir(parents=True, exist_ok=True)
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(glibc[1], 16, -1)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
               "--only-binary=:all:", "--implementation=cp", f"--python-version={python}", *flags,
               *(f"--platform={name}" for name in (*platforms, "manylinux2014_aarch64")),
               f"--dest={folder}"]  # fmt: skip
    for name, number in packages.items():
        asked = [f"{name}=={number}"] if number else []
        asked += [name] if name in _ANY or not asked else []
        for requirement in asked:
            done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                break
        else:
            lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
            said = (lines or done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise BackendError(
                f"no wheel of {asked[0]} for aarch64 and Python {python}: {said.removeprefix('ERROR: ')}"
            )
    return sorted(folder.glob("*.whl"))


def unpack(wheels: Sequence[Path], folder: Path) -> dict[str, str]:
    """The files of wheels as a directory for ``PYTHONPATH``; package → version."""
    shutil.rmtree(folder, ignore_errors=True)
    found = {}
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        name, number = wheel.name.split("-")[:2]
        found[name.replace("_", "-")] = number
    return found


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
