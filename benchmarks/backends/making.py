"""Every artifact of a network at a batch size, in a folder; what is there already is not made again.

Ours: each backend with each precision, proved against its graph and against the original as ``optimize`` does
it. Others': a plain ``torch.onnx.export``, OpenVINO's own form of it, and that quantized by NNCF, in the
environment of :mod:`benchmarks.quantization.methods`. What cannot be made is a line that says why.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.backends.networks import Setup
from benchmarks.quantization import measure, methods
from graphprune.artifact import save
from graphprune.building import Builder, Built
from graphprune.calibration import replayed
from graphprune.lowering import candidates, flat_calls
from graphprune.original import Original
from graphprune.pipeline import Context
from graphprune.precision import around
from graphprune.pruning import Pruning
from graphprune.target import get

PRECISIONS: Mapping[str, Mapping[str, Any]] = {
    "fp32": {},
    "int8": {"precision": "int8"},
    "int8 + bfloat16": {"precision": "int8+bfloat16"},
    "pruned": {"macs": 0.5},
    "pruned + int8": {"macs": 0.5, "precision": "int8"},
}
BACKENDS = ("onnxruntime", "openvino", "inductor", "executorch", "tvm")
ALONE = {"int8 + bfloat16": ("openvino",)}  # precision → the backends for which it is another artifact
SAME = {"int8 + bfloat16": "int8"}  # to the others it is this precision
PLAIN, CONVERTED, NNCF = "plain.onnx", "openvino.xml", "nncf.xml"
INPUTS, FACTS = "inputs.npz", "made.json"


def make(setup: Setup, folder: Path, backends: tuple[str, ...] = BACKENDS) -> dict[str, Any]:
    """Fill ``folder``; returns facts by artifact (error, seconds, or ``failure``), which it holds, too."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / FACTS
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}

    def note(name: str, fact: Mapping[str, Any]) -> None:
        facts[name] = dict(fact)
        path.write_text(json.dumps(facts, indent=1) + "\n")

    _others(setup, folder, facts, note)
    for precision, options in PRECISIONS.items():
        able = [b for b in backends if b in ALONE.get(precision, backends)]
        wanted = [b for b in able if f"{b}, {precision}" not in facts]
        if wanted:
            for name, fact in _ours(setup, folder, wanted, precision, options).items():
                note(name, fact)
    return facts


def place(folder: Path, backend: str, precision: str) -> Path:
    """Where an artifact of ours is."""
    return folder / f"{backend}-{precision.replace(' + ', '-')}"


def _ours(
    setup: Setup, folder: Path, names: list[str], precision: str, options: Mapping[str, Any]
) -> dict[str, Any]:
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    try:
        original = Original.of(setup.model(), setup.inputs(), None, False)
        graph = original.graph
        budgets = {"macs": options.get("macs")}
        pruning = Pruning(budgets, repair=False, precision=options.get("precision"))
        passes = pruning.pipeline(None, graph)
        calls = flat_calls(graph, original.calls(False))
        calibration = replayed(setup.calibration()) if "precision" in options else None
        target = replace(get("cpu"), floats=around(options.get("precision")))
        context = Context(target, calibration, threads=1)
        tried = [b for name in names for b in _known(name, facts, precision)]
        builder = Builder(passes, graph, context, calls, original.outputs(False))
        built = builder.build(tried) if tried else []
    except Exception as error:  # a network that cannot be built is a row that says why
        reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        return facts | {f"{name}, {precision}": {"failure": reason} for name in names}
    for one in built:
        save(
            place(folder, one.name, precision), one.deployment.lowered, target=one.deployment.target,
            signature=graph.signature, pipeline=str(passes), metrics={}, measurements={}, report_html="",
            overwrite=True,
        )  # fmt: skip
        facts[f"{one.name}, {precision}"] = _facts(one) | {"seconds": time.perf_counter() - started}
    for name in names:
        said = [line for line in builder.refused if line.startswith(f"backend {name!r} ")]
        if said:
            facts[f"{name}, {precision}"] = {"failure": said[0].partition(": ")[2].splitlines()[0][:200]}
    return facts


def _known(name: str, facts: dict[str, Any], precision: str) -> list[Any]:
    try:
        return candidates(name, get("cpu"))
    except Exception as error:
        facts[f"{name}, {precision}"] = {"failure": str(error).splitlines()[0][:200]}
        return []


def _facts(one: Built) -> dict[str, Any]:
    macs = one.audit.macs if one.audit is not None else {}
    total = sum(macs.values())
    errors = [c.max_relative for what, c in one.certificates.items() if what.startswith("artifact against g")]
    return {
        "error": max(errors, default=None),
        "proved": all(c.passed for c in one.certificates.values()),
        "integers": macs.get("int8", 0) / total if total else None,
        "bytes": sum(map(len, one.deployment.lowered.files.values())),
    }  # fmt: skip


def _others(setup: Setup, folder: Path, facts: dict[str, Any], note: Any) -> None:
    inputs = setup.inputs()
    if not (folder / PLAIN).exists() or not (folder / INPUTS).exists():
        measure.export(setup.model(), inputs, folder / PLAIN)
        names = [value.name for value in measure.session(folder / PLAIN).get_inputs()]
        batches = [torch.cat(parts).numpy() for parts in zip(*setup.calibration(), strict=True)]
        np.savez(folder / "calibration.npz", **dict(zip(names, batches, strict=True)))
        given = dict(zip(names, (t.numpy() for t in inputs), strict=True))
        np.savez(folder / INPUTS, **given)
        note("plain ONNX Runtime", {"bytes": measure.size(folder / PLAIN)})
    transformer = {"model_type": "TRANSFORMER"} if setup.case.transformer else {"preset": "MIXED"}
    for name, file, options in (
        ("OpenVINO", CONVERTED, {"quantize": False}),
        ("NNCF + OpenVINO", NNCF, transformer),
    ):
        if name in facts:
            continue
        job = methods.Job(setup.case, folder, folder / PLAIN, folder / "calibration.npz")
        run = methods._run("nncf", "nncf_tool.py", options | {"batch": setup.batch})
        made = methods.make(methods.Method("nncf", file, run, ".xml"), job)
        if made.path is None:
            note(name, {"failure": made.failure})
            continue
        for suffix in (".xml", ".bin"):
            made.path.with_suffix(suffix).rename((folder / file).with_suffix(suffix))
        note(name, {"bytes": measure.size(folder / file), "seconds": made.seconds})
