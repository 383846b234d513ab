"""Intel Neural Compressor's post-training quantization of an ONNX file (its 2.x, the last with ONNX)."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx
from neural_compressor import PostTrainingQuantConfig, quantization


class Loader:
    """Batches of one sample, with the dummy label that is expected."""

    batch_size = 1

    def __init__(self, path: str):
        self.arrays = dict(np.load(path))
        self.count = len(next(iter(self.arrays.values())))

    def __iter__(self):
        for i in range(self.count):
            yield {name: values[i : i + 1] for name, values in self.arrays.items()}, 0


def main(job: dict) -> None:
    """Quantize one file."""
    loader = Loader(job["calibration"])
    model = onnx.load(job["model"])
    del model.graph.value_info[:]  # shapes that its own rewriting of the weights would contradict
    config = PostTrainingQuantConfig(calibration_sampling_size=[loader.count], **job["options"])
    done = quantization.fit(model, config, calib_dataloader=loader)
    if done is None:
        raise SystemExit("neural-compressor gave no network")
    done.save(job["output"])
    print(json.dumps({"neural-compressor": version("neural-compressor")}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
