"""NNCF's post-training quantization, of an ONNX file or of the same file read by OpenVINO."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import nncf
import numpy as np


def main(job: dict) -> None:
    """Quantize one file; to OpenVINO's format where the output ends in ``.xml``."""
    options = job["options"]
    arrays = dict(np.load(job["calibration"]))
    batch = options.get("batch", 1)
    count = len(next(iter(arrays.values()))) // batch
    samples = [
        {name: values[i * batch : (i + 1) * batch] for name, values in arrays.items()} for i in range(count)
    ]
    settings: dict = {"subset_size": count}
    if "preset" in options:
        settings["preset"] = nncf.QuantizationPreset[options["preset"]]
    if "model_type" in options:
        settings["model_type"] = nncf.ModelType[options["model_type"]]
    to_openvino = job["output"].endswith(".xml")
    if to_openvino:
        import openvino

        model = openvino.Core().read_model(job["model"])
    else:
        import onnx

        model = onnx.load(job["model"])
    done = nncf.quantize(model, nncf.Dataset(samples), **settings) if options.get("quantize", True) else model
    if to_openvino:
        openvino.save_model(done, job["output"], compress_to_fp16=False)
    else:
        onnx.save(done, job["output"])
    print(json.dumps({name: version(name) for name in ("nncf", "openvino")}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
