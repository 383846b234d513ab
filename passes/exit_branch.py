"""The decision itself: what lies behind an exit moves into a branch that runs only where it is needed.

The graph that returned ``(exit, final)`` returns one answer again:

    confident = max softmax(exit) ≥ threshold                                       one flag a sample
    answer    = exit                                      if every sample is confident
                where(confident, exit, rest(…))           otherwise

as ``torch.cond``, ONNX ``If``. Of a batch the rest is computed for all samples or for none, so one sample
at a time gains most; a sample's answer is the same in any batch. What the rest reads (values of the trunk,
weights) goes in as operands; what is not a tensor there, a symbolic size say, is computed again inside. So
is a number that integers stand for: the integers go in, since a runtime fuses an operator only with the
``dequantize`` of its own branch.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx

from graphprune.errors import PassError
from graphprune.graph import Graph

from .exit_head import NAME, outputs

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed
COND = torch.ops.higher_order.cond
_BACK = (qd.dequantize_per_tensor.default, qd.dequantize_per_channel.default)


def branch(graph: Graph, threshold: float) -> Graph:
    """A copy that returns the network's own structure, with the rest behind the exit in a branch.

    Args:
        graph: returns ``(exit, final)``, both ``[n, classes]``: of :func:`.exit_head.attach`, or captured
            from a model with an exit of its own.
        threshold: of the largest softmax, above 0 and at most 1.

    Raises:
        PassError: the graph returns something else, or all of it is needed for the exit.
    """
    if isinstance(threshold, bool) or not 0 < threshold <= 1:
        raise PassError(NAME, f"the threshold is a probability, above 0 and at most 1, not {threshold}")
    work = graph.copy()
    exit_, final = outputs(work)
    trunk = _trunk(exit_)
    rest = [n for n in work.fx.nodes if n.op == "call_function" and n not in trunk]
    if final in trunk or not rest:
        raise PassError(NAME, "everything that the output needs is computed before the exit", exit_.name)
    with work.fx.inserting_before(work.output):
        probabilities = work.fx.call_function(aten.softmax.int, (exit_, -1))
        confident = work.fx.call_function(
            aten.ge.Scalar,
            (work.fx.call_function(aten.amax.default, (probabilities, [-1])), float(threshold)),
        )
        decision = work.fx.call_function(aten.all.default, (confident,))
    work.propagate()
    mixed = final.meta["val"].shape[0] != 1
    operands = _operands(rest, [exit_, *([confident] if mixed else [])])
    taken, other = _branches(work, rest, operands, exit_, confident if mixed else None, final)
    names = [_free(work, name) for name in ("exit_taken", "exit_refused")]
    work.bodies = {**work.bodies, names[0]: taken, names[1]: other}
    value = final.meta["val"]
    with work.fx.inserting_before(work.output):
        bodies = [work.fx.get_attr(name) for name in names]
        choice = work.fx.call_function(COND, (decision, *bodies, tuple(operands)))
        choice.meta["val"] = (value,)
        answer = work.fx.call_function(operator.getitem, (choice, 0))
        answer.meta["val"] = value
    flat = list(work.output.args[0])[1:]  # type: ignore[arg-type]
    work.output.args = (tuple(answer if v is final else v for v in flat),)
    work.signature = replace(graph.signature, out_spec=graph.signature.out_spec.children()[1])
    work.sweep()
    return work


def _trunk(exit_: fx.Node) -> set[fx.Node]:
    """What the exit needs; and pieces of what it needs, since only tensors go into a branch."""
    trunk: set[fx.Node] = set()
    waiting = [exit_]
    while waiting:
        node = waiting.pop()
        if node not in trunk:
            trunk.add(node)
            waiting.extend(node.all_input_nodes)
    for node in exit_.graph.nodes:
        if node.target is operator.getitem and node.args[0] in trunk:
            trunk.add(node)
    return trunk


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _operands(rest: Iterable[fx.Node], more: list[fx.Node]) -> list[fx.Node]:
    """The tensors that the branches read, a parameter once however many nodes name it."""
    inside = set(rest)
    found: dict[Any, fx.Node] = {}
    waiting = [*more, *(source for node in rest for source in node.all_input_nodes)]
    for node in waiting:
        if node in inside:
            continue
        if _is_tensor(node) and node.target not in _BACK:
            found.setdefault(_key(node), node)
        else:
            waiting.extend(node.all_input_nodes)
    return list(found.values())


def _key(node: fx.Node) -> Any:
    return ("tensor", str(node.target)) if node.op == "get_attr" else node


def _branches(
    graph: Graph,
    rest: list[fx.Node],
    operands: list[fx.Node],
    exit_: fx.Node,
    confident: fx.Node | None,
    final: fx.Node,
) -> tuple[fx.GraphModule, fx.GraphModule]:
    """The exit's answer, and the whole network's, as functions of the operands."""
    bodies = []
    for leaves in (True, False):
        body = fx.Graph()
        inner: dict[Any, fx.Node] = {}
        for operand in operands:
            name = f"p_{operand.target}".replace(".", "_") if operand.op == "get_attr" else operand.name
            inner[_key(operand)] = body.placeholder(name)
            inner[_key(operand)].meta = {"val": operand.meta["val"]}
        if leaves:
            # A branch must not return what it was given.
            result = body.call_function(aten.clone.default, (inner[exit_],))
        else:
            for node in rest:
                _copied(body, inner, node)
            result = inner[final]
            if confident is not None:
                column = body.call_function(aten.unsqueeze.default, (inner[confident], -1))
                column.meta["val"] = confident.meta["val"].unsqueeze(-1)
                result = body.call_function(aten.where.self, (column, inner[exit_], result))
        result.meta.setdefault("val", final.meta["val"])
        body.output((result,))
        bodies.append(fx.GraphModule(dict(graph.bodies), body, class_name="Branch"))
    return bodies[0], bodies[1]


def _copied(body: fx.Graph, inner: dict[Any, fx.Node], node: fx.Node) -> fx.Node:
    """A node of the rest in the branch, with whatever it reads that is no operand."""
    key = _key(node)
    if key not in inner:
        for source in node.all_input_nodes:
            _copied(body, inner, source)
        inner[key] = body.node_copy(node, lambda n: inner[_key(n)])
        inner[key].meta = dict(node.meta)
    return inner[key]


def _free(graph: Graph, name: str) -> str:
    candidate, count = name, 0
    while candidate in graph.bodies or candidate in graph.tensors:
        count += 1
        candidate = f"{name}_{count}"
    return candidate
