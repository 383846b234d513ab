"""One call of an artifact on an emulated machine: files and inputs in, outputs and an audit back."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..backend import Audit, TensorSpec
from ..contents import Contents
from ..errors import BackendError
from ..report import AuditSummary
from .emulator import SET_UP, Emulator, Processor

GUEST = Path(__file__).with_name("guest.py")
TIMEOUT = 1800.0

# Backend → the package that runs its files under emulation.
PACKAGES = {"onnxruntime": "onnxruntime", "tvm": "apache-tvm"}


@dataclass(frozen=True)
class Answer:
    """What an emulated artifact did.

    Attributes:
        outputs: flat, constants among them.
        audit: what its runtime executed; ``None`` where it does not tell.
        processor: what was emulated.
        notes: what a reader should know.
    """

    outputs: tuple[Any, ...]
    audit: AuditSummary | None
    processor: Processor
    notes: tuple[str, ...] = ()


def emulable(contents: Contents) -> None:
    """Raise a BackendError that says why no emulator can run an artifact, if so."""
    target, backend = contents.target, contents.manifest["backend"]
    what = f"the artifact {contents.directory}"
    if backend not in PACKAGES:
        raise BackendError(
            f"{what} is of the backend {backend!r}, which is not emulated ({', '.join(PACKAGES)} are); "
            "verify it on a host of its own"
        )
    if target.arch != "aarch64":
        raise BackendError(
            f"{what} is for {target.name} ({target.arch}), the emulator is aarch64; build with target='arm'"
        )


def suits(contents: Contents, emulator: Emulator) -> None:
    """Raise a BackendError that says why the emulator cannot run an artifact, if so."""
    emulable(contents)
    backend, what = contents.manifest["backend"], f"the artifact {contents.directory}"
    package = PACKAGES[backend]
    there, made = emulator.versions.get(package), contents.manifest["versions"].get(package)
    if there is None:
        raise BackendError(f"{what} needs {package}, which the emulator in {emulator.folder} lacks; {SET_UP}")
    if made is not None and _number(made) > _number(there):
        raise BackendError(
            f"{what} was made with {package} {made}, the emulator in {emulator.folder} has {there}; {SET_UP}"
        )


def call(
    contents: Contents,
    inputs: Sequence[torch.Tensor],
    emulator: Emulator,
    *,
    threads: int = 1,
    timeout: float = TIMEOUT,
) -> Answer:
    """Run an artifact once on flat inputs.

    Raises:
        BackendError: the emulated process crashed, failed or took too long.
    """
    backend = contents.manifest["backend"]
    names = [spec.name for spec in contents.outputs if isinstance(spec, TensorSpec)]
    with tempfile.TemporaryDirectory(prefix="graphprune-job-") as folder:
        place = Path(folder)
        (place / "files").mkdir()
        for name, content in contents.files.items():
            (place / "files" / name).write_bytes(content)
        specs = []
        for index, (spec, value) in enumerate(zip(contents.inputs, inputs, strict=True)):
            value = value.detach().cpu().contiguous()
            (place / f"input.{index}").write_bytes(value.reshape(-1).view(torch.uint8).numpy().tobytes())
            specs.append({"name": spec.name, "dtype": spec.dtype, "shape": list(value.shape)})
        job = {
            "backend": backend, "files": sorted(contents.files),
            "inputs": specs, "outputs": names, "threads": threads,
        }  # fmt: skip
        (place / "job.json").write_text(json.dumps(job))
        finished = emulator.run(GUEST, [str(place)], processor=contents.target.processor, timeout=timeout)
        outputs = _outputs(place, contents.outputs)
        audit = _AUDITS[backend](place, contents) if backend in _AUDITS else None
    return Answer(outputs, audit, finished.processor, _notes(contents, finished.processor))


def _outputs(place: Path, specs: Sequence[Any]) -> tuple[Any, ...]:
    described = iter(enumerate(json.loads((place / "result.json").read_text())))
    found: list[Any] = []
    for spec in specs:
        if not isinstance(spec, TensorSpec):
            found.append(spec)
            continue
        index, made = next(described)
        raw = bytearray((place / f"output.{index}").read_bytes())
        dtype = getattr(torch, "bfloat16" if spec.dtype == "bfloat16" else made["dtype"])
        tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        tensor = tensor.reshape(made["shape"])
        found.append(int(tensor) if spec.dtype == "int" else tensor.to(getattr(torch, spec.dtype)))
    return tuple(found)


def _notes(contents: Contents, processor: Processor) -> tuple[str, ...]:
    wanted = contents.target.processor
    if not wanted or wanted == processor.model:
        return ()
    if processor.model == "max":
        return (
            f"this qemu has no {wanted}, so everything it can emulate was allowed: that the artifact uses "
            "no instruction that the processor lacks is not proven",
        )
    return (f"this qemu has no {wanted}; a {processor.model} stood in, which has the same features",)


def _onnx_audit(place: Path, contents: Contents) -> AuditSummary:
    import onnx

    from ..backends.onnx_audit import executed

    model = onnx.load(place / "optimised.onnx", load_external_data=False)
    profile = json.loads(next(place.glob("profile*.json")).read_text())
    return AuditSummary.of(Audit(executed(model, profile, contents.target)))


_AUDITS: Mapping[str, Callable[[Path, Contents], AuditSummary]] = {"onnxruntime": _onnx_audit}


def _number(version: str) -> tuple[int, ...]:
    """A version's numbers, to be compared: ``1.31.1`` → (1, 31, 1)."""
    release = re.match(r"[\d.]*", version)
    return tuple(int(part) for part in release[0].split(".") if part) if release else ()
