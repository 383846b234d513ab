"""What backends that read an ``ExportedProgram`` start from: the program, and its inputs and outputs by name.

>>> import graphprune
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(2, 3), dynamic_batch=True)
>>> inputs, outputs = specifications(graph)
>>> outputs
(TensorSpec(name='output', shape=('batch', 2), dtype='float32'),)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from graphprune import structure
from graphprune.backend import TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph

aten = torch.ops.aten

_SYMBOL = re.compile(r"\bs\d+\b")


def tensor_outputs(graph: Graph) -> list[int]:
    """Places of the flat outputs that are computed.

    Raises:
        BackendError: the graph has no weights, or none of its outputs is a tensor.
    """
    if graph.is_meta:
        raise BackendError("the graph was captured on the meta device and has no weights; load them first")
    kept = [i for i, value in enumerate(graph.output.args[0]) if isinstance(value, fx.Node)]  # type: ignore[arg-type]
    if not kept:
        raise BackendError("no output of the graph is a tensor, so there is nothing to lower")
    return kept


def tensors_only(outputs: Sequence[Any], what: str) -> None:
    """Raise a BackendError where an output is a symbolic size, which ``what`` is made cannot return."""
    if any(isinstance(spec, TensorSpec) and spec.dtype == "int" for spec in outputs):
        raise BackendError(f"an output is a symbolic size, which a {what} cannot return; return a tensor")


def exported(graph: Graph, kept: Sequence[int], most: int | None = None) -> torch.export.ExportedProgram:
    """The graph with the outputs ``kept``, exported; symbolic sizes stay symbolic.

    ``graph`` itself is changed: the caller hands in a copy.

    Args:
        most: symbolic sizes go up to this, for runtimes that plan memory ahead; those of the example
            inputs fit in any case.

    Raises:
        BackendError: it does not trace with its symbolic sizes.
    """
    flat = graph.output.args[0]
    graph.output.args = (tuple(flat[i] for i in kept),)  # type: ignore[index]
    for node in graph.find(aten.view.default):
        # A view of attention's result fits the strides of the kernel that was captured, and no others.
        node.target = aten.reshape.default
    # Values do not matter here, sizes do: an example of one sample would fix the batch to one.
    hints = sizes_of(graph, most)
    examples, shapes = [], []
    for node, example in zip(graph.placeholders, graph.examples, strict=True):
        sizes = node.meta["val"].shape
        wanted = [at_sizes(s, hints) for s in sizes]
        examples.append(example.contiguous() if list(example.shape) == wanted else example.new_zeros(wanted))
        symbolic = [i for i, size in enumerate(sizes) if not isinstance(size, int)]
        shapes.append({i: _up_to(most and wanted[i]) for i in symbolic})
    open_sizes = tuple(shapes) if any(shapes) else None
    try:
        return torch.export.export(graph.callable(), tuple(examples), dynamic_shapes=open_sizes, strict=False)
    except Exception as error:
        fixed = "; a pass has fixed a size that should stay symbolic" if any(shapes) else ""
        raise BackendError(f"the graph does not trace for lowering: {first_line(error)}{fixed}") from error


def specifications(graph: Graph) -> tuple[tuple[TensorSpec, ...], tuple[Any, ...]]:
    """Flat inputs and outputs; the first symbolic leading size is ``batch``, others say where they are."""
    names = dict(zip(graph.placeholders, graph.signature.names, strict=True))
    symbols: dict[str, str] = {}
    for node, name in names.items():
        for position, size in enumerate(node.meta["val"].shape):
            if not isinstance(size, int) and str(size) not in symbols:
                first = position == 0 and "batch" not in symbols.values()
                symbols[str(size)] = "batch" if first else f"{name}_dim{position}"

    def spec(name: str, value: Any) -> TensorSpec:
        if not isinstance(value, torch.Tensor):
            return TensorSpec(name, (), "int")
        sizes = (s if isinstance(s, int) else _SYMBOL.sub(_named(symbols), str(s)) for s in value.shape)
        return TensorSpec(name, tuple(sizes), str(value.dtype).removeprefix("torch."))

    named = structure.names(structure.of_spec(graph.signature.out_spec), "output")
    flat: tuple[Any, ...] = tuple(graph.output.args[0])  # type: ignore[arg-type]
    return tuple(spec(name, node.meta["val"]) for node, name in names.items()), tuple(
        spec(named.get(i, f"output_{i}"), value.meta["val"]) if isinstance(value, fx.Node) else value
        for i, value in enumerate(flat)
    )


def sizes_of(graph: Graph, most: int | None = None) -> dict[Any, int]:
    """Symbols of the inputs' sizes → a number for each: ``most``, or what it was captured with if more.

    Traced at the end of its range a size stays open up to it: convolutions ask whether a batch is below 16.
    """
    found: dict[Any, int] = {}
    for node in graph.placeholders:
        for size in node.meta["val"].shape:
            if not isinstance(size, int):
                hint = size.node.hint or 2
                found.setdefault(size.node.expr, hint if most is None else max(most - len(found), hint))
    return found


def at_sizes(size: Any, symbols: Mapping[Any, int]) -> int:
    """A size where its symbols have these values."""
    return size if isinstance(size, int) else int(size.node.expr.xreplace(dict(symbols)))


def _up_to(most: int | None) -> Any:
    dynamic = torch.export.Dim.DYNAMIC
    return dynamic if most is None else dynamic(max=most)


def first_line(error: BaseException) -> str:
    """What an error says, without the pages that compilers put behind it."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _named(symbols: dict[str, str]) -> Any:
    return lambda match: symbols.get(match.group(), match.group())
