"""Everything in half precision: weights, operators and what stands between them, inputs and outputs apart.

bfloat16 keeps float32's range with 8 bits of precision, float16 has 11 bits and ends at 65,504 (Micikevicius
et al., *Mixed Precision Training*, ICLR 2018; Kalamkar et al., *A Study of BFLOAT16*, 2019). The caller goes
on passing and getting float32; casts stand at the edges. Constants beyond the range, such as the most
negative float32 of an attention mask, become the end of the range: as an infinity, a row of them would come
out of a softmax as NaN. Sums inside an operator are the runtime's: the common kernels keep them in float32.

>>> import torch, graphprune
>>> from graphprune.pipeline import Context
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> print(HalfPrecision().run(graph, Context()).graph)
input_1: f32[1, 3]
to_dtype: bf16[1, 3] = to.dtype(input_1, torch.bfloat16)
linear: bf16[1, 2] = linear(to_dtype, %weight, %bias)
to_dtype_1: f32[1, 2] = to.dtype(linear, torch.float32)
return (to_dtype_1,)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch.fx.node import map_aggregate

from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.pipeline import Context, Note, Pass, PassResult

aten = torch.ops.aten

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class HalfPrecision(Pass):
    """float32 becomes half precision.

    Attributes:
        dtype: ``bfloat16`` or ``float16``.
    """

    name: ClassVar[str] = "half-precision"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    ensures: ClassVar[frozenset[str]] = frozenset({"half"})
    destroys: ClassVar[frozenset[str]] = frozenset({"float", "trainable"})

    dtype: str = "bfloat16"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """The graph with casts at its edges; a note says how many weights changed.

        Raises:
            InputError: the dtype is none of the two.
            PassError: an operator does not take half precision beside what else it reads; names it.
        """
        if self.dtype not in DTYPES:
            raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        half = DTYPES[self.dtype]
        weights = [name for name, value in graph.tensors.items() if value.dtype == torch.float32]
        result = graph.copy()
        result.set_tensors({name: _within(graph.tensors[name].detach(), half).to(half) for name in weights})
        inputs = [node for node in result.placeholders if _is_float(node)]
        if not weights and not inputs:
            return PassResult(graph, False, (Note("info", "", "nothing here is in float32"),))
        originals = [_is_float(value) for value in graph.output.args[0]]  # type: ignore[union-attr]
        for node in inputs:
            _cast_behind(result, node, half)
        for node in result.nodes:
            if node.op == "call_function" and not (node.target is aten.to.dtype and node.args[0] in inputs):
                node.args = map_aggregate(node.args, lambda value: _constant(value, half))
                node.kwargs = map_aggregate(node.kwargs, lambda value: _constant(value, half))
        _cast_outputs(result, originals)
        try:
            result.propagate()
        except Exception as error:
            said = str(error).strip().splitlines()[0]
            raise PassError(
                self.name, f"{said}; not every operator of this network takes {self.dtype}"
            ) from error
        result.floating = graph
        return PassResult(
            result, True, (Note("changed", "", f"{len(weights)} tensors of weights are {self.dtype} now"),)
        )


def _is_float(value: Any) -> bool:
    value = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(value, torch.Tensor) and value.dtype == torch.float32


def _within(value: torch.Tensor, half: torch.dtype) -> torch.Tensor:
    """Finite numbers beyond the range of the format as the end of it."""
    ends = torch.finfo(half)
    return torch.where(value.isfinite(), value.clamp(ends.min, ends.max), value)


def _constant(argument: Any, half: torch.dtype) -> Any:
    """An argument that names a precision, or is a number beyond the range."""
    if argument is torch.float32:
        return half
    if isinstance(argument, float) and abs(argument) < float("inf"):
        ends = torch.finfo(half)
        return min(max(argument, ends.min), ends.max)
    return argument


def _cast_behind(graph: Graph, node: fx.Node, half: torch.dtype) -> None:
    with graph.fx.inserting_after(graph.placeholders[-1]):
        cast = graph.fx.call_function(aten.to.dtype, (node, half))
    node.replace_all_uses_with(
        cast, delete_user_cb=lambda user: user is not cast and user is not graph.output
    )


def _cast_outputs(graph: Graph, floats: list[bool]) -> None:
    results: list[Any] = list(graph.output.args[0])  # type: ignore[arg-type]
    for place, (value, was_float) in enumerate(zip(results, floats, strict=True)):
        if was_float and value.op != "placeholder":
            with graph.fx.inserting_before(graph.output):
                results[place] = graph.fx.call_function(aten.to.dtype, (value, torch.float32))
    graph.output.args = (tuple(results),)
