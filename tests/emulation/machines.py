"""An emulator that emulates nothing: a script in the place of qemu that runs this Python, or misbehaves."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

MODELS = "cortex-a53 cortex-a72 cortex-a76 max neoverse-n1"


def pretended(folder: Path, *, ending: str = "", models: str = MODELS, **versions: str) -> Path:
    """A folder that is set up; ``ending`` is what its qemu does in place of running anything."""
    (folder / "root/usr/bin").mkdir(parents=True)
    (folder / "site").mkdir()
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    run = ending or f'exec "{sys.executable}" "$@"'
    qemu = folder / "qemu"
    qemu.write_text(
        "#!/bin/sh\n"
        f'if [ "$2" = help ]; then echo "Available CPUs: {models}"; exit 0; fi\n'
        f'echo "$@" >> "{folder}/calls"\n'
        f'cp "$4/proc/cpuinfo" "{folder}/cpuinfo"\n'
        "shift 5\nunset PYTHONHOME PYTHONPATH\n"
        f"{run}\n"
    )
    qemu.chmod(0o755)
    record = {
        "format": 1, "ready": True, "python": python.removeprefix("python"), "glibc": [2, 36],
        "qemu": str(qemu), "versions": {"onnxruntime": version("onnxruntime"), **versions},
    }  # fmt: skip
    (folder / "emulator.json").write_text(json.dumps(record))
    return folder
