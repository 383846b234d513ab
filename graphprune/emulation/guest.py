"""Runs inside the emulated Python: opens an artifact's files, calls it once, writes down what it answers.

    python guest.py JOB

``JOB`` is a directory with ``job.json`` and the files it names, which :mod:`.machine` writes and reads.
Here there is neither torch nor graphprune, so this file imports the standard library, numpy and the runtime.
Arrays are raw files; bfloat16, which numpy lacks, is carried as uint16.
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np

_BFLOAT16 = 16  # in ONNX's numbering of types


def onnxruntime(job: dict[str, Any], place: Path, arrays: list[Any]) -> list[Any]:
    """Run ``model.onnx``; the graph the runtime made of it and a profile are left beside the results."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    options.intra_op_num_threads = job["threads"]
    options.optimized_model_filepath = str(place / "optimised.onnx")
    if len(job["files"]) > 1:
        options.add_session_config_entry(
            "session.optimized_model_external_initializers_file_name", "optimised.data"
        )
    options.enable_profiling = True
    options.profile_file_prefix = str(place / "profile")
    session = ort.InferenceSession(
        str(place / "files/model.onnx"), options, providers=["CPUExecutionProvider"]
    )
    feed = {}
    for spec, array in zip(job["inputs"], arrays):  # noqa: B905 (the lengths are those of one list)
        if spec["dtype"] == "bfloat16":
            value = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
        else:
            value = ort.OrtValue.ortvalue_from_numpy(array)
        feed[spec["name"]] = value
    values = session.run_with_ort_values(job["outputs"], feed)
    session.end_profiling()
    return [_array(value) for value in values]


def tvm(job: dict[str, Any], place: Path, arrays: list[Any]) -> list[Any]:
    """Run ``model.so`` as ``tvm.json`` says it is called."""
    os.environ["TVM_NUM_THREADS"] = str(job["threads"])  # read when the package is imported
    import tvm

    facts = json.loads((place / "files/tvm.json").read_text())
    library = tvm.runtime.load_module(str(place / "files/model.so"))
    program = tvm.relax.VirtualMachine(library, tvm.cpu())
    results = program[facts["function"]](*(tvm.runtime.tensor(array) for array in arrays))
    return [result.numpy() for result in results]


def _array(value: Any) -> Any:
    if value.data_type() != "tensor(bfloat16)":
        return value.numpy()
    shape = value.shape()
    count = int(np.prod(shape, dtype=np.int64))
    raw = ctypes.string_at(value.data_ptr(), 2 * count)
    return np.frombuffer(raw, np.uint16).reshape(shape)


RUNTIMES = {"onnxruntime": onnxruntime, "tvm": tvm}


def main(place: Path) -> None:
    """Do the job in a directory."""
    job = json.loads((place / "job.json").read_text())
    arrays = [
        np.fromfile(place / f"input.{index}", "uint16" if spec["dtype"] == "bfloat16" else spec["dtype"])
        .reshape(spec["shape"])
        for index, spec in enumerate(job["inputs"])
    ]  # fmt: skip
    outputs = RUNTIMES[job["backend"]](job, place, arrays)
    described = []
    for index, output in enumerate(outputs):
        array = np.ascontiguousarray(output)
        array.tofile(place / f"output.{index}")
        described.append({"dtype": str(array.dtype), "shape": list(np.shape(output))})
    (place / "result.json").write_text(json.dumps(described))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
