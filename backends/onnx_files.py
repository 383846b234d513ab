"""The files of an ONNX artifact: what the exporter writes and a session reads, without either's imports."""

from __future__ import annotations

MODEL_FILE = "model.onnx"
# Only beside models too large for one protobuf message.
DATA_FILE = "model.onnx.data"
