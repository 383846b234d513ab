"""An ONNX file opened in ONNX Runtime: torch tensors in, torch tensors out.

Inputs are checked against the specification before the runtime sees them, so that what does not fit is
an :class:`~graphprune.errors.InputError` that names the input. Results are on the first input's device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

from graphprune.backend import TensorSpec
from graphprune.errors import BackendError
from graphprune.target import Target
from graphprune.threads import checked

from .flat_inputs import Check
from .onnx_files import DATA_FILE, MODEL_FILE
from .onnx_providers import OWN_THREADS, available, brings, settings

# Only errors: the runtime's warnings concern its own choices, and would reach the caller's terminal.
_ERROR = 3

# How it says that a file is of a newer ONNX than it reads.
_NEWER = re.compile(r"Unsupported model IR version: \d+|Opset \d+(?= is)")

# What numpy has no type for goes through DLPack.
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16
_VIEWED = {torch.bfloat16: (torch.uint16, _BFLOAT16)}


def options(threads: int | None = None) -> ort.SessionOptions:
    """Session options that every session here shares: full optimisation, quiet."""
    chosen = ort.SessionOptions()
    chosen.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    chosen.log_severity_level = _ERROR
    if checked(threads) is not None:
        chosen.intra_op_num_threads = threads
    return chosen


def session(files: Mapping[str, bytes], target: Target, chosen: ort.SessionOptions) -> ort.InferenceSession:
    """A session over the files, on the target's providers that are here.

    A provider that is here and does not start is an error: ONNX Runtime would take the next one quietly.

    Raises:
        BackendError: none is here, one does not start, a file is missing, or the model is refused.
    """
    providers = available(target)
    if not providers:
        raise BackendError(
            f"none of the providers {', '.join(target.providers)} of target {target.name!r} is in this "
            f"onnxruntime; {brings(target.providers[0]) if target.providers else 'name one'}"
        )
    if MODEL_FILE not in files:
        raise BackendError(f"there is no {MODEL_FILE} among the files: {', '.join(files) or 'none'}")
    if DATA_FILE in files:
        data = files[DATA_FILE]
        chosen.add_external_initializers_from_files_in_memory([DATA_FILE], [data], [len(data)])
    threads = chosen.intra_op_num_threads or None
    if any(provider in OWN_THREADS for provider in providers):
        chosen.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        opened = ort.InferenceSession(
            files[MODEL_FILE], chosen, enable_fallback=0,
            providers=[(provider, settings(provider, threads)) for provider in providers],
        )  # fmt: skip
    except Exception as error:
        raise BackendError(_refused(error)) from error
    stopped = [provider for provider in providers if provider not in opened.get_providers()]
    if stopped:
        raise BackendError(
            f"{stopped[0]} is in this onnxruntime and does not start: a library that it needs is missing, or "
            "of another version; ONNX Runtime's own log says which"
        )
    return opened


def _refused(error: Exception) -> str:
    reason = str(error).strip().splitlines()[0].rpartition("[ONNXRuntimeError] : ")[2]
    if "NOT_IMPLEMENTED" in reason:
        return (
            f"ONNX Runtime has no kernel for an operator in the model's dtype: {reason}; "
            "convert the model, for example with model.float()"
        )
    newer = _NEWER.search(reason)
    if newer:
        return (
            f"the model is of a newer ONNX than onnxruntime {ort.__version__} reads ({newer[0].strip()}); "
            "upgrade onnxruntime, or build the artifact again"
        )
    return f"ONNX Runtime does not open the model: {reason}"


def run_on_zeros(opened: ort.InferenceSession, given: Mapping[str, bool] | None = None) -> str:
    """Run on zeros, symbolic sizes 1; a note when the model does not run on them.

    Args:
        opened: the session.
        given: values of inputs, by name, that are not to be zeros.
    """
    feed = {}
    for value in opened.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in value.shape]
        kind = value.type.removeprefix("tensor(").removesuffix(")")
        if kind == "bfloat16":
            bits = np.zeros(shape, np.uint16)
            feed[value.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16)
        else:
            dtype = {"float": "float32", "double": "float64"}.get(kind, kind)
            numbers = np.full(shape, (given or {}).get(value.name, 0), dtype)
            feed[value.name] = ort.OrtValue.ortvalue_from_numpy(numbers)
    try:
        opened.run_with_ort_values([o.name for o in opened.get_outputs()], feed)
    except Exception as error:
        reason = str(error).strip().splitlines()[0]
        return f"the model does not run on zeros, so multiply-accumulates are not counted: {reason}"
    return ""


class OnnxRunner:
    """A callable from flat tensors to the flat outputs.

    Attributes:
        inputs, outputs: the specifications.
        providers: the execution providers in use, in order.
        threads: intra-operator threads, ``None`` for the runtime's default.
        notes: what differs from what the target asked for.
        check: raises an InputError that names the input which does not fit, and how.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[Any, ...],
        target: Target,
        threads: int | None = None,
    ):
        self.inputs, self.outputs, self.threads = inputs, outputs, threads
        self.check = Check(inputs)
        self._session = session(files, target, options(threads))
        self.providers = tuple(self._session.get_providers())
        absent = [p for p in target.providers if p not in self.providers]
        self.notes = tuple(
            f"{p} is not available here; {self.providers[0]} runs instead ({brings(p)})" for p in absent
        )
        self._names = [o.name for o in outputs if isinstance(o, TensorSpec)]
        self._check_signature()
        self._by_value = any(
            spec.dtype == "bfloat16" for spec in (*inputs, *outputs) if isinstance(spec, TensorSpec)
        )

    def _check_signature(self) -> None:
        """The file and the specification must be of one artifact."""
        mine = ([i.name for i in self._session.get_inputs()], [o.name for o in self._session.get_outputs()])
        given = ([spec.name for spec in self.inputs], self._names)
        if mine != given:
            raise BackendError(f"the model's inputs and outputs {mine} are not the specification's {given}")

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run once. Raises InputError when the inputs do not fit, BackendError when the runtime fails."""
        self.check(inputs)
        try:
            results = iter(self._run_by_value(inputs) if self._by_value else self._run(inputs))
        except Exception as error:
            reason = str(error).strip().splitlines()[0]
            raise BackendError(f"ONNX Runtime failed while running: {reason}") from error
        device = inputs[0].device if inputs else torch.device("cpu")
        return tuple(
            _result(next(results), spec, device) if isinstance(spec, TensorSpec) else spec
            for spec in self.outputs
        )

    def _run(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        # Between two runs caches hold the network: every call of torch that is saved here saves microseconds.
        feed = {
            spec.name: value.numpy(force=value.requires_grad or not value.is_cpu or value.is_neg())
            for spec, value in zip(self.inputs, inputs, strict=True)
        }
        return self._session.run(self._names, feed)

    def _run_by_value(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        feed = {}
        for spec, value in zip(self.inputs, inputs, strict=True):
            value = value.detach().cpu().contiguous()
            if value.dtype in _VIEWED:
                view, kind = _VIEWED[value.dtype]
                feed[spec.name] = ort.OrtValue.ortvalue_from_numpy_with_onnx_type(
                    value.view(view).numpy(), kind
                )
            else:
                feed[spec.name] = ort.OrtValue.ortvalue_from_numpy(value.numpy())
        results = self._session.run_with_ort_values(self._names, feed)
        return [torch.from_dlpack(value._get_c_value()) for value in results]


def _result(value: Any, spec: TensorSpec, device: torch.device) -> Any:
    if spec.dtype == "int":
        return int(value)
    tensor = torch.from_numpy(value) if isinstance(value, np.ndarray) else torch.as_tensor(value)
    dtype = getattr(torch, spec.dtype)
    if tensor.dtype is dtype and device.type == "cpu":
        return tensor
    return tensor.to(device=device, dtype=dtype)
