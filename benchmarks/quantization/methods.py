"""Every way to quantize that is compared: ours, and the tools that give files for the same runtime.

Other tools run in interpreters of their own, in the folder that ``GRAPHPRUNE_QUANTIZERS`` names, which holds
a virtual environment for each. To fill ``build/quantizers``::

    for tool in nncf neural-compressor; do python3 -m venv build/quantizers/$tool; done
    build/quantizers/nncf/bin/pip install nncf==3.4.0 openvino==2026.4.1 onnx onnxruntime
    build/quantizers/neural-compressor/bin/pip install "neural-compressor<3" onnx==1.16.2 \\
        onnxruntime==1.19.2 "setuptools<80" six

ONNX Runtime's own tool runs in the interpreter of the benchmark. What a tool is given is a float ONNX file
and arrays; what it gives is a file that the one ONNX Runtime of the benchmark runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quantization import ours
from benchmarks.quantization.cases import Case

VARIABLE = "GRAPHPRUNE_QUANTIZERS"
TOOLS = Path(__file__).parent / "tools"
LIMIT = 1800  # seconds that a tool may take for one file


class Failed(Exception):
    """A tool gave no file; the message says why."""


@dataclass(frozen=True)
class Job:
    """One network as all methods are given it.

    Attributes:
        folder: where files go.
        model: the plain float export.
        calibration: ``.npz`` with one array ``[n, …]`` an input of it.
    """

    case: Case
    folder: Path
    model: Path
    calibration: Path


@dataclass(frozen=True)
class Method:
    """One variant of one tool.

    Attributes:
        tool, variant: for tables.
        make: job and path of the file to write → versions of what made it. Raises :class:`Failed`.
        suffix: of the file.
        transformer: whether it is for transformers, for other networks, or (``None``) for both.
    """

    tool: str
    variant: str
    make: Callable[[Job, Path], Mapping[str, str]]
    suffix: str = ".onnx"
    transformer: bool | None = None

    @property
    def label(self) -> str:
        """Tool and variant."""
        return ", ".join(part for part in (self.tool, self.variant) if part)

    def suits(self, case: Case) -> bool:
        """Whether the variant is one for such networks."""
        return self.transformer is None or self.transformer == case.transformer


@dataclass(frozen=True)
class Made:
    """A file of a method, or why there is none."""

    method: Method
    path: Path | None
    seconds: float
    failure: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def make(method: Method, job: Job) -> Made:
    """Have one method quantize; whatever goes wrong is its result."""
    path = job.folder / f"{method.tool}-{method.variant or 'default'}{method.suffix}".replace(" ", "-")
    started = time.perf_counter()
    try:
        versions = method.make(job, path)
        if not path.exists():
            raise Failed("no file was written")
    except Exception as error:  # a tool that fails is a row that says why
        reason = str(error).strip().splitlines() or ["?"]
        text = reason[0] if isinstance(error, Failed) else f"{type(error).__name__}: {reason[0]}"
        return Made(method, None, time.perf_counter() - started, text[:200])
    return Made(method, path, time.perf_counter() - started, versions=versions)


def interpreter(tool: str) -> str:
    """The Python that a tool is installed in.

    Raises:
        Failed: there is none.
    """
    if tool == "onnxruntime":
        return sys.executable
    folder = os.environ.get(VARIABLE)
    if not folder:
        raise Failed(f"not installed here: {VARIABLE} names no folder of environments")
    found = Path(folder) / tool / "bin" / "python"
    if not found.exists():
        raise Failed(f"not installed here: no {tool}/bin/python in {VARIABLE}")
    return str(found.absolute())


def called(arguments: list[str], folder: Path) -> str:
    """What a program prints that runs in a folder, with one thread and no path of this project.

    Raises:
        Failed: it ended with an error, or took too long; the last line of what it said.
    """
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    own = {key: value for key, value in os.environ.items() if key not in hidden}
    own |= {"OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(arguments, capture_output=True, text=True, env=own, cwd=folder, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise Failed(f"not done after {LIMIT} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line] or lines
        raise Failed(errors[-1].strip() if errors else f"ended with {done.returncode}")
    return done.stdout


def _run(tool: str, script: str, options: Mapping[str, Any]) -> Callable[[Job, Path], Mapping[str, str]]:
    def quantize(job: Job, output: Path) -> Mapping[str, str]:
        request = output.with_suffix(".json").resolve()  # the tool runs in the job's folder
        paths = {"model": job.model, "calibration": job.calibration, "output": output}
        request.write_text(
            json.dumps({name: str(path.resolve()) for name, path in paths.items()} | {"options": options})
        )
        printed = called([interpreter(tool), str(TOOLS / script), str(request)], job.folder)
        versions: Mapping[str, str] = json.loads(printed.strip().splitlines()[-1])
        return versions

    return quantize


def _ours(make: Callable[..., bytes], **options: Any) -> Callable[[Job, Path], Mapping[str, str]]:
    def quantize(job: Job, output: Path) -> Mapping[str, str]:
        samples, _ = job.case.parts()
        output.write_bytes(make(job.case.build(), samples, **options))
        return {}

    return quantize


def _onnxruntime(variant: str, transformer: bool | None = None, **options: Any) -> Method:
    quantize = _run("onnxruntime", "onnxruntime_tool.py", options)
    return Method("onnxruntime", variant, quantize, transformer=transformer)


# NNCF makes activations that can be negative signed, whatever its preset and target device, and refuses to be
# told otherwise; ONNX Runtime runs those slower on x86, which is what its rows show.
def _nncf(variant: str, transformer: bool | None = None, **options: Any) -> Method:
    return Method("nncf", variant, _run("nncf", "nncf_tool.py", options), transformer=transformer)


def _compressor(variant: str, transformer: bool | None = None, **options: Any) -> Method:
    quantize = _run("neural-compressor", "neural_compressor_tool.py", options)
    return Method("neural-compressor", variant, quantize, transformer=transformer)


def _openvino(variant: str, transformer: bool | None = None, **options: Any) -> Method:
    """NNCF's environment has OpenVINO, too."""
    return Method("openvino", variant, _run("nncf", "nncf_tool.py", options), ".xml", transformer)


OURS = "graphprune"
PRODUCTS = ["MatMul", "Gemm"]
INT8 = (
    Method(OURS, "int8", _ours(ours.int8)),
    Method(OURS, "dynamic", _ours(ours.int8, precision="int8-dynamic"), transformer=True),
    _onnxruntime("static", approach="static"),
    _onnxruntime("static, entropy", approach="static", calibration="Entropy"),
    _onnxruntime("static, percentile", approach="static", calibration="Percentile"),
    _onnxruntime("static, products only", True, approach="static", operators=PRODUCTS),
    _onnxruntime("dynamic", True, approach="dynamic"),
    _nncf("default", False),
    _nncf("mixed preset", False, preset="MIXED"),
    _nncf("transformer", True, model_type="TRANSFORMER"),
    _nncf("transformer, mixed preset", True, model_type="TRANSFORMER", preset="MIXED"),
    _compressor("static", approach="static", quant_format="QDQ"),
    _compressor("dynamic", True, approach="dynamic"),
    _openvino("nncf int8", False, preset="MIXED"),
    _openvino("nncf int8, transformer", True, model_type="TRANSFORMER"),
)
FOUR_BITS = tuple(
    Method(OURS, f"{what}, {how}", _ours(ours.by_pass, step=step))
    for what, how, step in (
        ("W4A8", "nearest", "quantize{bits=4 rounding=nearest}"),
        ("W4A8", "recovered", "quantize{bits=4 rounding=gptq}"),
        ("W4", "nearest", "quantize-weights{bits=4 method=nearest}"),
        ("W4", "recovered", "quantize-weights{bits=4 method=gptq}"),
    )
)
FLOATS = (
    Method(OURS, "float", _ours(ours.unquantized)),
    Method("openvino", "float", _run("nncf", "nncf_tool.py", {"quantize": False}), ".xml"),
)
TOOL_NAMES = (OURS, "onnxruntime", "nncf", "neural-compressor", "openvino")
CALIBRATORS = ("static, entropy", "static, percentile")  # other scales, the same operators: no other speed
