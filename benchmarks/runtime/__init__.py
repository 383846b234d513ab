"""Latency of artifacts against the eager original and against a plain export to ONNX Runtime."""
