"""An emulated aarch64 machine: qemu's user mode, a Python and the runtimes' wheels in a folder.

There is no container and no root file system: qemu runs the folder's Python as an ordinary process, and looks
for files in the folder before it looks for them on the host. What a program would read of the processor
in ``/proc`` and ``/sys`` stands in the folder, too, as it would read it on the processor that is emulated:
the host's would be wrong, and ONNX Runtime crashes on it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache import directory
from ..errors import BackendError

RECORD = "emulator.json"
FORMAT = 1
VARIABLE = "GRAPHPRUNE_EMULATOR"
SET_UP = "set it up with: graphprune emulator FOLDER (in a checkout: make arm)"

_BASE = "fp asimd evtstrm aes pmull sha1 sha2 crc32 cpuid"
_DOT = f"{_BASE} atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp"
_MATRIX = f"{_DOT} asimdfhm i8mm bf16 sve"


@dataclass(frozen=True)
class Processor:
    """A processor as qemu calls it, and how ``/proc/cpuinfo`` describes it (implementer ARM)."""

    model: str
    part: str
    features: str


_A53 = Processor("cortex-a53", "0xd03", _BASE)
_A55 = Processor("cortex-a55", "0xd05", _DOT)
_A72 = Processor("cortex-a72", "0xd08", _BASE)
_A76 = Processor("cortex-a76", "0xd0b", _DOT)
_N1 = Processor("neoverse-n1", "0xd0c", _DOT)
_V1 = Processor("neoverse-v1", "0xd40", _MATRIX)
_N2 = Processor("neoverse-n2", "0xd49", _MATRIX)
_MAX = Processor("max", "0xd0c", _DOT)

# What stands for a target's processor, the best first: itself, or one that can do no more than it. Where qemu
# has neither, it is one that can do everything, and what it runs may ask too much of the target.
_STAND_INS: Mapping[str, Sequence[Processor]] = {
    "": (_A53,),
    "cortex-a53": (_A53,),
    "cortex-a55": (_A55, _A76, _N1),
    "cortex-a72": (_A72,),
    "cortex-a76": (_A76, _N1),
    "cortex-a78": (_A76, _N1),
    "cortex-x1": (_A76, _N1),
    "neoverse-n1": (_N1, _A76),
    "neoverse-v1": (_V1,),
    "neoverse-n2": (_N2,),
}


@dataclass(frozen=True)
class Finished:
    """What an emulated program left: its standard output, and what it ran on."""

    output: str
    processor: Processor


@dataclass(frozen=True)
class Emulator:
    """A folder that was set up.

    Attributes:
        folder: where it is.
        qemu: the program.
        python: the emulated Python's version.
        versions: package → version of the emulated runtimes.
    """

    folder: Path
    qemu: str
    python: str
    versions: Mapping[str, str]

    def models(self) -> frozenset[str]:
        """The processors that this qemu knows."""
        done = subprocess.run([self.qemu, "-cpu", "help"], capture_output=True, text=True, check=False)
        return frozenset(done.stdout.split())

    def processor(self, name: str) -> Processor:
        """What stands for a target's processor (LLVM's name, empty for any aarch64)."""
        there = self.models()
        itself = Processor(name, _A53.part, _BASE)  # of a target made by hand; no runtime asks for more
        return next((p for p in _STAND_INS.get(name, (itself,)) if p.model in there), _MAX)

    def run(
        self, script: Path, arguments: Sequence[str], *, processor: str = "", timeout: float = 1800.0
    ) -> Finished:
        """Run a Python script under emulation.

        Args:
            script: its file; it may import the standard library, numpy and the runtimes.
            arguments: its arguments.
            processor: LLVM's name of the processor to emulate; empty is the least that aarch64 is.
            timeout: seconds.

        Raises:
            BackendError: it crashed, failed or took too long; says the signal and its last line.
        """
        chosen = self.processor(processor)
        with tempfile.TemporaryDirectory(prefix="graphprune-aarch64-") as place:
            root = Path(place)
            overlay(self.folder / "root", root, chosen)
            python = self.folder / "root/usr/bin" / f"python{self.python}"
            emulate = [self.qemu, "-cpu", chosen.model, "-L", str(root)]
            environment = {
                "PATH": os.defpath,
                "HOME": place,
                "LC_ALL": "C.UTF-8",
                "PYTHONHOME": str(self.folder / "root/usr"),
                "PYTHONPATH": str(self.folder / "site"),
            }
            command = [*emulate, str(python), str(script), *arguments]
            try:
                done = subprocess.run(
                    command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                    errors="replace", timeout=timeout, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired as error:
                raise BackendError(
                    f"the emulated process took longer than {timeout:.0f} s and was stopped; "
                    "give it longer with --timeout"
                ) from error
            except OSError as error:
                raise BackendError(f"{self.qemu} does not start: {error.strerror}; {SET_UP}") from error
        if done.returncode:
            raise BackendError(_ending(done.returncode, done.stderr, chosen))
        return Finished(done.stdout, chosen)


def _ending(code: int, stderr: str, processor: Processor) -> str:
    """How an emulated process ended, in one line."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    said = [line for line in lines if not line.startswith("qemu: uncaught")] or lines
    last = f": {said[-1]}" if said else ""
    number = -code if code < 0 else code - 128
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"the emulated process failed (exit code {code}){last}"
    if name == "SIGILL":
        last += f"; it uses an instruction that a {processor.model} has not"
    return f"the emulated process crashed with {name}{last}"


def overlay(system: Path, root: Path, processor: Processor) -> None:
    """A root directory that is ``system`` with one processor of the given kind in ``/proc`` and ``/sys``."""
    for entry in system.iterdir():
        (root / entry.name).symlink_to(entry.resolve())
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(
        f"processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: {processor.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x1\nCPU part\t: {processor.part}\nCPU revision\t: 1\n\n"
    )
    cpus = root / "sys/devices/system/cpu"
    cpus.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (cpus / name).write_text("0\n")


def default_folder() -> Path:
    """Where an emulator is set up and looked for when no folder is named (:mod:`graphprune.cache`)."""
    return directory("arm")


def places() -> list[Path]:
    """Where an emulator is looked for, in order."""
    named = os.environ.get(VARIABLE)
    return [Path(named)] if named else [Path("build/arm"), default_folder()]


def find(folder: str | Path | None = None) -> Emulator:
    """The emulator in ``folder``, or the first that is set up in :func:`places`.

    Raises:
        BackendError: there is none, or it is incomplete; says how to set one up.
    """
    looked = [Path(folder)] if folder is not None else places()
    found = next((place for place in looked if (place / RECORD).exists()), None)
    if found is None:
        raise BackendError(f"no emulator in {' or '.join(map(str, looked))}; {SET_UP}")
    found = found.resolve()
    record = read_record(found)
    if record.get("format") != FORMAT or not record.get("ready"):
        raise BackendError(f"the emulator in {found} is not complete; {SET_UP}")
    qemu = str(found / record["qemu"])  # an absolute path stays as it is
    if shutil.which(qemu) is None:
        raise BackendError(f"the emulator in {found} has no {qemu} any more; {SET_UP}")
    return Emulator(found, qemu, record["python"], record["versions"])


def read_record(folder: Path) -> dict[str, Any]:
    """What was written about the emulator in a folder; empty where nothing reads."""
    try:
        document = json.loads((folder / RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}
