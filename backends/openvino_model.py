"""OpenVINO's files (``model.xml`` and ``model.bin``) from ONNX bytes, and opened again.

OpenVINO's own ONNX reader translates, and not ``openvino.convert_model``, which reports its use over the
network. Names that OpenVINO numbers within a process are numbered by file
instead, so that equal graphs give equal bytes. Constants keep their precision: nothing is stored as float16.

The package is imported when it is first needed (:func:`runtime`), since it is an extra.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from graphprune.errors import BackendError, MissingExtraError, described
from graphprune.threads import checked

from .onnx_files import MODEL_FILE

XML_FILE = "model.xml"
BIN_FILE = "model.bin"

_ELSE = "write that part of the model with other operators, or use backend='onnxruntime'"
# What OpenVINO calls an operator that came without a name: its kind, and how many were made before.
_NUMBERED = re.compile(r"[A-Z][A-Za-z0-9]*_\d+")
_UNCONVERTED = re.compile(r"(?:No conversion rule found for operations|Conversion is failed for): (.+)")
_UNSUPPORTED = re.compile(r"[Uu]nsupported operation of type: (\S+) name: (\S+)")
_ROUNDED = 4  # accuracy_level of a MatMulNBits whose inputs become integers, too
_FLOATS = ["graphprune", "floats"]  # where a model says what floats are computed in
_NOISE = ("Exception from", "Check '", "FrontEnd API", "Summary", "Model wasn't fully", "--")


def runtime() -> Any:
    """The package ``openvino``.

    Raises:
        MissingExtraError: it is not installed.
        BackendError: it is, and does not import.
    """
    try:
        import openvino
    except ModuleNotFoundError as error:
        if error.name != "openvino":
            raise BackendError(f"openvino does not import ({error}); install it again") from error
        raise MissingExtraError("openvino", "openvino", "backend='openvino'") from error
    except Exception as error:  # a library that is not there is an OSError, one built for another numpy …
        raise BackendError(f"openvino does not import ({described(error)}); install it again") from error
    return openvino


def convert(files: Mapping[str, bytes], floats: str = "f32") -> tuple[dict[str, bytes], tuple[str, ...]]:
    """``model.onnx`` (and its data file) as OpenVINO's two files, and notes on what it computes otherwise.

    Args:
        floats: what float operators may be computed in, in OpenVINO's words; kept in the model.

    Raises:
        BackendError: OpenVINO has no translation for an operator; names it.
    """
    ov = runtime()
    with tempfile.TemporaryDirectory() as place:
        for name, content in files.items():
            (Path(place) / name).write_bytes(content)
        try:
            model = ov.Core().read_model(f"{place}/{MODEL_FILE}")
            if floats != "f32":
                model.set_rt_info(floats, _FLOATS)
            ov.serialize(model, f"{place}/{XML_FILE}", f"{place}/{BIN_FILE}")
        except Exception as error:
            raise BackendError(_untranslated(error)) from error
        xml = (Path(place) / XML_FILE).read_text()
        made = {XML_FILE: _renumbered(xml).encode(), BIN_FILE: (Path(place) / BIN_FILE).read_bytes()}
    return made, _otherwise(xml, files[MODEL_FILE])


def read(core: Any, files: Mapping[str, bytes]) -> Any:
    """The files as an ``openvino.Model``.

    Raises:
        BackendError: a file is missing, or OpenVINO refuses them.
    """
    missing = [name for name in (XML_FILE, BIN_FILE) if name not in files]
    if missing:
        raise BackendError(f"there is no {missing[0]} among the files: {', '.join(files) or 'none'}")
    try:
        return core.read_model(files[XML_FILE], files[BIN_FILE])
    except Exception as error:
        raise BackendError(f"OpenVINO does not open the model: {reason(error)}") from error


def compiled(core: Any, model: Any, threads: int | None = None, profile: bool = False) -> Any:
    """The model compiled for this CPU, for the least latency of one call.

    Float stays float32 where the processor could do bfloat16, unless the model says otherwise, and inputs are
    never rounded to integers that the graph does not have. Threads are not pinned: those of two models would
    share a core.

    Raises:
        InputError: ``threads`` is below 1.
        BackendError: OpenVINO has no kernel for an operator; names it.
    """
    checked(threads)
    ov = runtime()
    import openvino.properties as properties
    import openvino.properties.hint as hint

    chosen = {
        hint.performance_mode(): hint.PerformanceMode.LATENCY,
        hint.inference_precision(): ov.Type.bf16 if _floats(model) == "bf16" else ov.Type.f32,
        hint.dynamic_quantization_group_size(): 0,
        hint.enable_cpu_pinning(): False,
        properties.enable_profiling(): profile,
    }
    if threads is not None:
        chosen[properties.inference_num_threads()] = threads
    try:
        return core.compile_model(model, "CPU", chosen)
    except Exception as error:
        found = _UNSUPPORTED.search(str(error))
        if found:
            kind, name = found.groups()
            said = f"OpenVINO has no kernel for the operator {kind} ({name}); {_ELSE}"
            raise BackendError(said) from error
        raise BackendError(f"OpenVINO does not compile the model: {reason(error)}") from error


def floats_note(model: Any, ready: Any) -> tuple[str, ...]:
    """A line where a model may compute in bfloat16 and, compiled, does not: this processor has none."""
    import openvino.properties.hint as hint

    if _floats(model) != "bf16" or ready.get_property(hint.inference_precision()) == runtime().Type.bf16:
        return ()
    return ("this processor has no bfloat16, so OpenVINO computes in float32",)


def _floats(model: Any) -> str:
    """What a model says its floats are computed in."""
    return model.get_rt_info(_FLOATS).astype(str) if model.has_rt_info(_FLOATS) else "f32"


def reason(error: BaseException) -> str:
    """The line of OpenVINO's message that says what was wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    telling = [line for line in lines if not line.startswith(_NOISE)]
    return next(iter(telling or lines), type(error).__name__)


def _untranslated(error: BaseException) -> str:
    kinds = dict.fromkeys(
        kind.strip() for found in _UNCONVERTED.findall(str(error)) for kind in found.split(",")
    )
    if not kinds:
        return f"OpenVINO does not read the ONNX model: {reason(error)}; use backend='onnxruntime'"
    several = "s" if len(kinds) > 1 else ""
    return f"OpenVINO has no translation for the ONNX operator{several} {', '.join(kinds)}; {_ELSE}"


def _otherwise(xml: str, source: bytes) -> tuple[str, ...]:
    import onnx  # only to lower: a process that opens an artifact does without

    notes = []
    if 'precision="FP64"' in xml:
        notes.append("OpenVINO computes what is float64 within the graph in float32")
    levels = [
        attribute.i
        for node in onnx.load_from_string(source).graph.node if node.op_type == "MatMulNBits"
        for attribute in node.attribute if attribute.name == "accuracy_level"
    ]  # fmt: skip
    if _ROUNDED in levels:
        notes.append(
            f"OpenVINO multiplies in float32 where the graph rounds the inputs of {levels.count(_ROUNDED)} "
            "operators with packed weights"
        )
    return tuple(notes)


def _renumbered(xml: str) -> str:
    """The model with the names that count a process's operators counted from the start of the file."""
    root = ElementTree.fromstring(xml)
    layers = list(root.iter("layer"))
    taken = {layer.get("name", "") for layer in layers}
    taken -= {name for name in taken if _NUMBERED.fullmatch(name)}
    for number, layer in enumerate(layers):
        if _NUMBERED.fullmatch(layer.get("name", "")):
            name = f"{layer.get('type')}_{number}"
            while name in taken:
                name += "_"
            taken.add(name)
            layer.set("name", name)
    return ElementTree.tostring(root, encoding="unicode")
