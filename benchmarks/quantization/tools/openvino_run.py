"""OpenVINO as a process that answers: ``run`` once for outputs, or a line in, a line out, to be timed.

``python openvino_run.py outputs MODEL.xml INPUTS.npz OUTPUTS.npz`` or
``python openvino_run.py serve MODEL.xml INPUTS.npz THREADS REPEAT [BATCH [PRECISION]]``; ``PRECISION`` is
what floats are computed in (``f32``), where OpenVINO is not to choose it itself.
"""

from __future__ import annotations

import sys

import numpy as np
import openvino


def main(what: str, model: str, inputs: str, *rest: str) -> None:
    """See the module docstring."""
    arrays = dict(np.load(inputs))
    core = openvino.Core()
    threads = int(rest[0]) if what == "serve" else 1
    settings: dict = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if what == "serve" and len(rest) > 3:
        settings["INFERENCE_PRECISION_HINT"] = rest[3]
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    if what == "outputs":
        found = []
        for i in range(len(next(iter(arrays.values())))):
            result = request.infer({name: values[i : i + 1] for name, values in arrays.items()})
            found.append([np.array(value) for value in result.values()])
        np.savez(rest[0], *(np.concatenate(parts) for parts in zip(*found, strict=True)))
        return
    repeat, batch = int(rest[1]), int(rest[2]) if len(rest) > 2 else 1
    sample = {name: values[:batch] for name, values in arrays.items()}
    for _ in sys.stdin:
        for _ in range(repeat):
            request.infer(sample)
        print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
