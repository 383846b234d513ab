"""Compute once what depends on no input: factories, position ids, masks, tables of buffers.

The constant part of the graph is every pure operator whose operands are all constant; its *frontier*
(what the rest of the graph reads) becomes buffers. Parameters are not constants here, so that
everything still trains; :mod:`graphprune.passes.fold_parameters` folds those too. A value that would take
more than ``max_bytes`` beyond the tensors it makes unnecessary is refused, and computed at run time.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> class Ramp(torch.nn.Module):
...     def forward(self, x):
...         return x + torch.arange(3) * 2
>>> result = Pipeline.parse("fold-constants").run(graphprune.trace(Ramp(), torch.zeros(3))).graph
>>> print(result)
x: f32[3]
add: f32[3] = add.Tensor(x, %folded_mul)
return (add,)
>>> result.tensors["folded_mul"]
tensor([0, 2, 4])
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.operands import sizes
from graphprune.pipeline import Context, Note, Pass, PassResult

from .clean_up import is_pure

aten = torch.ops.aten

# Their result has no defined value.
_UNINITIALISED = frozenset({
    aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default,
})  # fmt: skip
_BROADCASTING = frozenset({aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor})


@dataclass(frozen=True)
class FoldConstants(Pass):
    """Operators on buffers and literals alone become buffers.

    Options:
        max_bytes: how much larger than the tensors it replaces a folded tensor may be.
    """

    name: ClassVar[str] = "fold-constants"
    max_bytes: int = 1 << 20

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Fold a copy's constant operators."""
        return fold(graph, self.max_bytes, lambda tensor: not isinstance(tensor, torch.nn.Parameter))


def fold(graph: Graph, max_bytes: int, counts: Callable[[torch.Tensor], bool]) -> PassResult:
    """Fold operators whose operands are literals or tensors that ``counts`` as constants."""
    if graph.is_meta:
        return PassResult(
            graph, False, (Note("info", "", "the weights have shapes only: nothing to compute"),)
        )
    result, notes = graph.copy(), []
    values: dict[fx.Node, Any] = {}
    refused: set[fx.Node] = set()
    while True:
        constant = _constant_nodes(result, counts, refused)
        frontier = [n for n in constant if n.op == "call_function" and set(n.users) - constant.keys()]
        for node in frontier:
            _evaluate(node, result, values)
        over = {n: excess for n in frontier if (excess := _excess(n, result, constant, values)) > max_bytes}
        over.update({n: 0 for n in frontier if not isinstance(values[n], torch.Tensor)})
        if not over:
            break
        refused |= set(over)
        notes += [
            Note(
                "refused", result.where(n), f"is constant, but {excess:,} bytes larger than what it replaces"
            )
            for n, excess in over.items()
            if excess
        ]
    for node in frontier:
        name = _name(node)
        value = _unrepeated(node, values[node].detach()).clone().contiguous()
        folded = result.add_tensor(name, value, before=node, trainable=_is_trained(node, result))
        node.replace_all_uses_with(folded)
        notes.append(Note("changed", result.where(node), f"computed once, as {folded.target}"))
    if not frontier:
        return PassResult(graph, False, (*notes, Note("info", "", "no constant operators to fold")))
    result.sweep()
    return PassResult(result, True, tuple(notes))


def _unrepeated(node: fx.Node, value: torch.Tensor) -> torch.Tensor:
    """The value without its copies along a dimension, where everything that reads it broadcasts.

    The token types of a text without any are one row for every token.
    """
    for user in node.users:
        others = [n for n in user.args[:2] if isinstance(n, fx.Node) and n is not node]
        broadcasts = user.target in _BROADCASTING and len(others) == 1
        if not broadcasts or sizes(others[0]) != tuple(value.shape):
            return value
    for place in range(value.dim()):
        first = value.narrow(place, 0, 1) if value.shape[place] > 1 else value
        if first is not value and torch.equal(first.expand_as(value), value):
            value = first
    return value


def _constant_nodes(
    graph: Graph, counts: Callable[[torch.Tensor], bool], refused: set[fx.Node]
) -> dict[fx.Node, None]:
    """The constant nodes in execution order."""
    found: dict[fx.Node, None] = {}
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            tensor = graph.constant(node)  # None for a branch of torch.cond
            if tensor is not None and counts(tensor):
                found[node] = None
        elif node in refused or not _is_foldable(node):
            continue
        elif all(source in found for source in node.all_input_nodes):
            found[node] = None
    return found


def _is_foldable(node: fx.Node) -> bool:
    if node.op != "call_function":
        return False
    if node.target is not operator.getitem and (not is_pure(node) or node.target in _UNINITIALISED):
        return False
    return not node.meta.get("follows_training")


def _evaluate(node: fx.Node, graph: Graph, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return graph.tensor(node)
    if node not in values:
        for source in node.all_input_nodes:
            _evaluate(source, graph, values)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: _evaluate(n, graph, values))
        with torch.no_grad():
            values[node] = node.target(*args, **kwargs)  # type: ignore[operator]
    return values[node]


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found, stack = {node}, [node]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                stack.append(source)
    return found


def _excess(node: fx.Node, graph: Graph, constant: dict[fx.Node, None], values: dict[fx.Node, Any]) -> int:
    """Bytes the value takes beyond the tensors that only constant operators read, and so can go."""
    if not isinstance(values[node], torch.Tensor):
        return 0
    sources = {str(n.target) for n in _ancestors(node) if n.op == "get_attr"}
    freed = [graph.tensors[s] for s in sources if all(r in constant for r in graph.readers(s))]
    return _bytes(values[node]) - sum(map(_bytes, freed))


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _is_trained(node: fx.Node, graph: Graph) -> bool:
    """Whether a parameter went into the value, which then is one, too."""
    sources = (graph.constant(n) for n in _ancestors(node))
    return node.meta["val"].is_floating_point() and any(isinstance(s, torch.nn.Parameter) for s in sources)


def _name(node: fx.Node) -> str:
    """``conv.weight`` for what a module reads as its weight, else ``folded_NODE`` in the node's module."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        for entry, given in zip(schema.arguments if schema else (), user.args, strict=False):
            if given is node and entry.name in ("weight", "bias") and _is_path(user.meta.get("module")):
                return _join(user.meta["module"], entry.name)
    module = node.meta.get("module")
    return _join(str(module) if _is_path(module) else "", f"folded_{node.name}")


def _join(module: str, leaf: str) -> str:
    return f"{module}.{leaf}" if module else leaf


def _is_path(module: str | None) -> bool:
    if not module:
        return module == ""
    return all(part.isidentifier() or part.isdigit() for part in module.split("."))
