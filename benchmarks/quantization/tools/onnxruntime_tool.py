"""ONNX Runtime's own quantizers, used as its documentation says: pre-processing, then static or dynamic."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process

STRIDE = 4  # samples whose intermediate values are in memory at a time


class Reader(CalibrationDataReader):
    """Samples one by one; a range of them where the calibrator asks for parts."""

    def __init__(self, path: str):
        self.arrays = dict(np.load(path))
        self.range = (0, len(self))
        self.next = 0

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def set_range(self, start_index: int, end_index: int) -> None:
        """Go on with samples ``start_index`` to ``end_index - 1``."""
        self.range = (start_index, end_index)
        self.next = start_index

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next sample as a batch of one."""
        if self.next >= min(self.range[1], len(self)):
            return None
        sample = {name: values[self.next : self.next + 1] for name, values in self.arrays.items()}
        self.next += 1
        return sample


def main(job: dict) -> None:
    """Quantize one file."""
    options = job["options"]
    ready = str(Path(job["output"]).with_suffix(".ready.onnx"))
    try:
        quant_pre_process(job["model"], ready)
    except Exception:  # it stops at some shapes, and then documents this switch
        quant_pre_process(job["model"], ready, skip_symbolic_shape=True)
    types = options.get("operators")
    if options["approach"] == "dynamic":
        quantize_dynamic(ready, job["output"], op_types_to_quantize=types, per_channel=True,
                         weight_type=QuantType[options.get("weights", "QInt8")])  # fmt: skip
    else:
        reader = Reader(job["calibration"])
        extra = {"CalibStridedMinMax": STRIDE} if len(reader) % STRIDE == 0 else {}
        quantize_static(
            ready, job["output"], reader, quant_format=QuantFormat.QDQ, op_types_to_quantize=types,
            per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod[options.get("calibration", "MinMax")], extra_options=extra,
        )  # fmt: skip
    print(json.dumps({"onnxruntime's tool": onnxruntime.__version__}))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
