"""What is measured of a file: its size, what ONNX Runtime makes of it, its outputs, its latency.

Every ONNX file is opened and timed by the same few lines, whoever made it; OpenVINO's are timed in a process
of its interpreter.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch
from torch import Tensor

from benchmarks.quantization.cases import Sample
from benchmarks.quantization.methods import TOOLS, called, interpreter
from benchmarks.runtime.candidates import _quiet
from graphprune.backend import Audit, Lowered
from graphprune.measure import Timing, isolated
from graphprune.registry import backends
from graphprune.target import get

TURN = 0.05  # seconds that one timed turn should last at least
PAUSE = 0.02
OPENVINO = "nncf"  # the environment that it is in


def export(model: torch.nn.Module, sample: Sample, path: Path) -> None:
    """`torch.onnx.export` as it comes, for a batch of one."""
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(model.eval(), sample, dynamo=True)
    assert program is not None
    program.save(str(path))


def arrays(samples: list[Sample], model: Path, path: Path) -> Path:
    """Samples as a ``.npz`` with one array ``[n, …]`` for each input of the model; returns ``path``."""
    names = [value.name for value in session(model).get_inputs()]
    columns = [torch.cat(parts).numpy() for parts in zip(*samples, strict=True)]
    np.savez(path, **dict(zip(names, columns, strict=True)))
    return path


def session(path: Path, threads: int = 1) -> ort.InferenceSession:
    """ONNX Runtime with its defaults but for the threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def network(path: Path) -> Callable[..., Tensor]:
    """A file as a function of tensors of any batch, sample by sample, to its first output."""
    opened = session(path)
    names = [value.name for value in opened.get_inputs()]
    first = opened.get_outputs()[0].name

    def call(*inputs: Tensor) -> Tensor:
        found = [
            torch.from_numpy(
                opened.run([first], {n: t.numpy() for n, t in zip(names, parts, strict=True)})[0]
            )
            for parts in zip(*(t.split(1) for t in inputs), strict=True)
        ]
        return torch.cat(found)

    return call


def outputs(path: Path, inputs: Path) -> list[np.ndarray]:
    """All float outputs on all samples of a ``.npz``."""
    if path.suffix == ".xml":
        target = inputs.with_name("openvino-outputs.npz")
        script = str(TOOLS / "openvino_run.py")
        job = [interpreter(OPENVINO), script, "outputs", str(path), str(inputs), str(target)]
        called(job, path.parent)
        return [value for value in np.load(target).values() if value.dtype.kind == "f"]
    opened = session(path)
    given = dict(np.load(inputs))
    count = len(next(iter(given.values())))
    runs = [opened.run(None, {k: v[i : i + 1] for k, v in given.items()}) for i in range(count)]
    columns = [np.concatenate(parts) for parts in zip(*runs, strict=True)]
    return [value for value in columns if value.dtype.kind == "f"]


def relative_error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    """Norm of the difference over that of the wanted, all outputs together.

    >>> relative_error([np.array([1.0, 1.0])], [np.array([1.0, 0.0])])
    1.0
    """
    a, b = (np.concatenate([v.ravel().astype(np.float64) for v in values]) for values in (found, wanted))
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


def size(path: Path) -> int:
    """Bytes of a file, with what belongs to it."""
    beside = [path.with_suffix(".bin")] if path.suffix == ".xml" else [Path(f"{path}.data")]
    return sum(p.stat().st_size for p in (path, *beside) if p.exists())


def audit(path: Path) -> Audit:
    """What ONNX Runtime executes of a file on this host."""
    files = {"model.onnx": path.read_bytes()}
    lowered = Lowered(backend="onnxruntime", inputs=(), outputs=(), files=files)
    found: Audit = backends.load("onnxruntime")().audit(lowered, get("cpu"))
    return found


def in_integers(found: Audit) -> float | None:
    """The share of multiply-accumulates that run in int8; ``None`` where none were counted."""
    total = sum(found.macs.values())
    return found.macs.get("int8", 0) / total if total else None


def latencies(
    files: Mapping[str, Path], inputs: Path, rounds: int, threads: int
) -> tuple[dict[str, Timing], int]:
    """Milliseconds of turns, interleaved, each file in a process of its own; and how many runs a turn has.

    The first file decides how many that are.
    """
    first = onnxruntime_call(next(iter(files.values())), inputs, threads, 1)
    lasted = []
    for _ in range(4):
        start = time.perf_counter()
        first()
        lasted.append(time.perf_counter() - start)
    repeat = max(1, round(TURN / min(lasted)))
    factories = {
        label: partial(
            openvino_call if path.suffix == ".xml" else onnxruntime_call, path, inputs, threads, repeat
        )
        for label, path in files.items()
    }
    return isolated(factories, rounds=rounds, threads=threads, pause=PAUSE), repeat


def onnxruntime_call(path: Path, inputs: Path, threads: int, repeat: int) -> Callable[[], Any]:
    """What is timed of an ONNX file: arrays in, arrays out."""
    opened = session(path, threads)
    feed = {name: values[:1] for name, values in np.load(inputs).items()}

    def call() -> None:
        for _ in range(repeat):
            opened.run(None, feed)

    return call


def openvino_call(
    path: Path, inputs: Path, threads: int, repeat: int, batch: int = 1, floats: str = ""
) -> Callable[[], Any]:
    """The same of OpenVINO's file, in a process of its interpreter that answers a line with a line.

    ``floats`` is what they are computed in (``f32``); empty leaves OpenVINO's choice: bfloat16 where the
    processor has it.
    """
    options = [str(threads), str(repeat), str(batch), *([floats] if floats else [])]
    worker = subprocess.Popen(
        [interpreter(OPENVINO), str(TOOLS / "openvino_run.py"), "serve", str(path), str(inputs), *options],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
    )  # fmt: skip

    def call() -> None:
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write("run\n")
        if not worker.stdout.readline():
            raise RuntimeError("OpenVINO's process ended")

    return call
