"""The model as it came in: its graph, an example call, and its outputs as the reference of every proof."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from .errors import InputError
from .frontend.batch import resize
from .frontend.capture import arguments, capture, example_call
from .frontend.inputs import infer, undisturbed
from .graph import Graph
from .module import TracedModule

BATCHES = (1, 7)  # sizes a symbolic batch is proved at

Call = tuple[tuple[Any, ...], Mapping[str, Any]]


@dataclass(frozen=True)
class Original:
    """The model that came in: its graph, its example call, and how to run it undisturbed."""

    model: torch.nn.Module
    name: str
    graph: Graph
    example: Call
    source: str

    @staticmethod
    def of(
        model: Any,
        inputs: Any,
        kwargs: Mapping[str, Any] | None,
        dynamic_batch: bool,
        *,
        weights: bool = True,
    ) -> Original:
        """Capture ``model``, inferring the example call where none is given.

        Args:
            weights: whether they must have values; shapes are enough to look at a model.

        Raises:
            InputError, CaptureError: as :func:`graphprune.frontend.capture.capture`.
        """
        given = inputs is not None or kwargs is not None
        if isinstance(model, torch.export.ExportedProgram):
            if given:
                raise InputError("an exported program carries its example inputs; do not pass others")
            if model.example_inputs is None:
                raise InputError("the exported program has no example inputs; export the model again")
            graph = capture(model, dynamic_batch=dynamic_batch)
            if dynamic_batch and not graph.is_dynamic:
                raise InputError(
                    "dynamic_batch=True, but the exported program has fixed shapes; "
                    "export it with dynamic_shapes, or pass the module instead"
                )
            args, named = model.example_inputs
            return Original(model.module(), "ExportedProgram", graph, (args, named), "the exported program")
        source = "given"
        if isinstance(model, TracedModule) and not given:
            graph = capture(model, dynamic_batch=dynamic_batch)
            example: Call = ((), example_call(graph))
            source = "those of the earlier result"
        else:
            if not given and isinstance(model, torch.nn.Module):
                inferred = infer(model)
                inputs, kwargs, source = inferred.args, inferred.kwargs, f"inferred: {inferred.reason}"
            graph = capture(model, inputs, kwargs, dynamic_batch=dynamic_batch)
            example = arguments(model, inputs, kwargs)
        if weights and graph.is_meta:
            raise InputError("the model's weights are on the meta device and have no values; load them first")
        return Original(model, type(model).__name__, graph, example, source)

    def calls(self, dynamic_batch: bool) -> dict[str, Call]:
        """Title → call to prove on: the example, or batches of several sizes."""
        args, kwargs = self.example
        if not dynamic_batch:
            return {"": self.example}
        return {f"batch {size}": resize(tuple(args), kwargs, size) for size in BATCHES}

    def outputs(self, dynamic_batch: bool) -> dict[str, list[Any]]:
        """Title → the original's flat outputs on :meth:`calls`."""
        found = {}
        for title, (args, kwargs) in self.calls(dynamic_batch).items():
            try:
                with undisturbed(self.model):
                    leaves = pytree.tree_leaves(self.model(*args, **kwargs))
            except Exception as error:
                raise InputError(f"the model does not run{at(title)}: {error}") from error
            found[title] = [leaf.clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        return found


def at(title: str) -> str:
    """``, batch 7`` behind what a title belongs to."""
    return f", {title}" if title else ""
