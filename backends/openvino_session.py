"""An OpenVINO model opened on this CPU: torch tensors in, torch tensors out.

OpenVINO computes int64 in int32. Results that an int32 holds are right; an input that it does not hold is an
:class:`~graphprune.errors.InputError` instead of a wrong answer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from graphprune.backend import TensorSpec
from graphprune.errors import BackendError, InputError

from .flat_inputs import Check
from .openvino_model import compiled, floats_note, read, reason, runtime

_INT32 = np.iinfo(np.int32)


class OpenVinoRunner:
    """A callable from flat tensors to the flat outputs; calls from several threads follow each other.

    Attributes:
        inputs, outputs: the specifications.
        threads: of the runtime, ``None`` for its default (one per core).
        compiled: the ``openvino.CompiledModel``.
        notes: what differs from what was asked for.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[Any, ...],
        threads: int | None = None,
        profile: bool = False,
    ):
        self.inputs, self.outputs, self.threads = inputs, outputs, threads
        self._check = Check(inputs)
        self._openvino = runtime()
        self._core = self._openvino.Core()
        model = read(self._core, files)
        self.compiled = compiled(self._core, model, threads, profile)
        self._check_signature()
        self.notes = floats_note(model, self.compiled)
        self._request = self.compiled.create_infer_request()
        self._results = range(len(self.compiled.outputs))
        self._busy = threading.Lock()

    def _check_signature(self) -> None:
        """The files and the specification must be of one artifact."""
        specs = [spec for spec in self.outputs if isinstance(spec, TensorSpec)]
        for ports, wanted in ((self.compiled.inputs, self.inputs), (self.compiled.outputs, specs)):
            there = [sorted(port.names) for port in ports]
            names = [spec.name for spec in wanted]
            fits = len(there) == len(names) and all(n in own for n, own in zip(names, there, strict=True))
            if not fits:
                raise BackendError(
                    f"the model's inputs or outputs {there} are not the specification's {names}"
                )

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run once. Raises InputError when the inputs do not fit, BackendError when the runtime fails."""
        self._check(inputs)
        given = [self._given(value, spec) for value, spec in zip(inputs, self.inputs, strict=True)]
        try:
            with self._busy:
                # One by one: infer(given) looks for their ports first, 0.1 ms of BERT-mini's 2.5.
                for index, tensor in enumerate(given):
                    self._request.set_input_tensor(index, tensor)
                self._request.infer()
                found = [self._request.get_output_tensor(index) for index in self._results]
                results = iter([np.array(tensor.data) for tensor in found])  # the next call writes there
        except Exception as error:
            raise BackendError(f"OpenVINO failed while running: {reason(error)}") from error
        device = inputs[0].device if inputs else torch.device("cpu")
        return tuple(
            _result(next(results), spec, device) if isinstance(spec, TensorSpec) else spec
            for spec in self.outputs
        )

    def _given(self, value: torch.Tensor, spec: TensorSpec) -> Any:
        if spec.dtype == "bfloat16":  # numpy has no such type
            bits = value.detach().cpu().contiguous().view(torch.uint16).numpy()
            return self._openvino.Tensor(bits, self._openvino.Shape(value.shape), self._openvino.Type.bf16)
        array = np.ascontiguousarray(value.numpy(force=True)).reshape(value.shape)
        if spec.dtype == "int64" and array.size and (array.min() < _INT32.min or array.max() > _INT32.max):
            raise InputError(
                f"input {spec.name!r} has values beyond int32, in which OpenVINO computes int64; "
                "use backend='onnxruntime'"
            )
        return self._openvino.Tensor(array, shared_memory=True)


def _result(value: np.ndarray, spec: TensorSpec, device: torch.device) -> Any:
    if spec.dtype == "int":
        return int(value)
    if spec.dtype == "bfloat16":
        return torch.from_numpy(value.view(np.int16)).view(torch.bfloat16).to(device)
    return torch.from_numpy(value).to(device=device, dtype=getattr(torch, spec.dtype))


def zeros(specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Inputs of zeros, every symbolic size 1."""
    return [
        torch.zeros([n if isinstance(n, int) else 1 for n in s.shape], dtype=getattr(torch, s.dtype))
        for s in specs
    ]
