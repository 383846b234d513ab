"""Where the weights are in the files of an artifact: spans of bytes that hold words of one width.

A span is a hint. What it says wrongly costs bytes in the compressed form, and never a bit of what comes back.
Formats that say where their tensors are, are asked: ONNX's and OpenVINO's. Anything else (machine code with
weights inside, flat buffers) is cut into blocks, which may turn out to be floats.

>>> spans("weights.pte", bytes(100_000), {})
[Span(start=0, stop=65536, width=4), Span(start=65536, stop=100000, width=4)]
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

SMALLEST = 64  # bytes of a tensor worth its own entry
BLOCK = 1 << 16

_DATA = re.compile(rb"<data\b[^>]*>")
_FIELD = re.compile(rb'\b(element_type|offset|size)="(\w+)"')
_OPENVINO = {
    b"f64": 8, b"i64": 8, b"u64": 8, b"f32": 4, b"i32": 4, b"u32": 4, b"f16": 2, b"bf16": 2, b"i16": 2,
    b"u16": 2, b"i8": 1, b"u8": 1, b"i4": 0, b"u4": 0,
}  # fmt: skip


class Span(NamedTuple):
    """Bytes ``start`` to ``stop`` of a file, words of ``width`` bytes each (0: half a byte)."""

    start: int
    stop: int
    width: int


def spans(name: str, content: bytes, files: Mapping[str, bytes]) -> list[Span]:
    """The spans of one of the ``files`` of an artifact, in order and without overlap."""
    found: Iterator[Span]
    if name.endswith(".onnx"):
        found = _onnx(content)
    elif name.endswith(".onnx.data"):
        found = _onnx_data(name, files.get(name.removesuffix(".data"), b""))
    elif name.endswith(".bin") and (xml := files.get(str(PurePosixPath(name).with_suffix(".xml")))):
        found = _openvino(xml)
    elif name.endswith((".json", ".xml")):
        return []
    else:
        found = (Span(i, min(i + BLOCK, len(content)), 4) for i in range(0, len(content), BLOCK))
    return _ordered(found, len(content))


def _ordered(found: Iterator[Span], length: int) -> list[Span]:
    """Whole words, inside the file, none before the end of another."""
    result: list[Span] = []
    at = 0
    for start, stop, width in sorted(found):
        stop = min(stop, length)
        stop -= (stop - start) % max(width, 1)
        if start >= at and stop - start >= SMALLEST:
            result.append(Span(start, stop, width))
            at = stop
    return result


def _onnx(content: bytes) -> Iterator[Span]:
    """Tensors stand in the file as they are in memory, in their order."""
    at = 0
    for tensor in _tensors(content):
        raw = tensor.raw_data
        if len(raw) < SMALLEST:
            continue
        start = content.find(raw, at)
        if start >= 0:
            at = start + len(raw)
            yield Span(start, at, _onnx_width(tensor.data_type))


def _onnx_data(name: str, model: bytes) -> Iterator[Span]:
    for tensor in _tensors(model):
        entries = {entry.key: entry.value for entry in tensor.external_data}
        if entries.get("location") == name and "length" in entries:
            start = int(entries.get("offset", 0))
            yield Span(start, start + int(entries["length"]), _onnx_width(tensor.data_type))


def _tensors(model: bytes) -> Iterator[Any]:
    """Initialisers of an ONNX file's main graph; none where it does not parse."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        yield from onnx.load_model_from_string(model).graph.initializer
    except DecodeError:
        return


def _onnx_width(kind: int) -> int:
    from onnx import helper

    try:
        item = helper.tensor_dtype_to_np_dtype(kind)
    except (KeyError, TypeError, ValueError):
        return 1
    return 0 if item.name in ("int4", "uint4") else item.itemsize if item.itemsize in (1, 2, 4, 8) else 1


def _openvino(xml: bytes) -> Iterator[Span]:
    for tag in _DATA.findall(xml):
        fields = dict(_FIELD.findall(tag))
        if len(fields) == 3 and fields[b"offset"].isdigit() and fields[b"size"].isdigit():
            start = int(fields[b"offset"])
            yield Span(start, start + int(fields[b"size"]), _OPENVINO.get(fields[b"element_type"], 1))
