"""Both sides of every ``If`` of a file: what they hold, how each is made to run, and which of them counts.

A run takes one side of a decision and says nothing of the other. In :func:`steered` every decision asks an
input of its own, ``s``, and takes a side whatever its condition ``c`` says,

    (c and s) or s  =  s,

so that the condition is computed still, and some runs together see everything.

>>> from onnx import parser
>>> graph = parser.parse_graph(
...     "g (bool c, float[1] x) => (float[1] y) {"
...     "y = If (c) <then_branch = t () => (float[1] a) {a = Identity(x)},"
...     "            else_branch = e () => (float[1] b) {b = Neg(x)}>}"
... )
>>> [[node.op_type for node in side.node] for side in sides(graph.node[0])]
[['Identity'], ['Neg']]
>>> graph.name, [inner.name for inner in graphs(graph)]
('g', ['g', 't', 'e'])
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import onnx
from onnx import helper

from graphprune.backend import AuditRow

# What stands in the name of every node and input that :func:`steered` adds.
STEERING = "graphprune_side"

NOTE = "of the two sides of an If the one with more multiply-accumulates counts"


def sides(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    """The graphs that an ``If`` decides between: where the condition holds, and where not; none of others."""
    if node.op_type != "If":
        return []
    found = {attribute.name: attribute.g for attribute in node.attribute}
    return [found["then_branch"], found["else_branch"]]


def graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """A graph, and the sides in it, the outer ones first."""
    yield graph
    for node in graph.node:
        for side in sides(node):
            yield from graphs(side)


def reads(graph: onnx.GraphProto) -> Iterator[tuple[str, str]]:
    """Every value that a graph's nodes read, and the reader's kind; what sides read from outside, too."""
    for node in graph.node:
        yield from ((name, node.op_type) for name in node.input)
        for side in sides(node):
            own = {output for inner in side.node for output in inner.output}
            own.update(tensor.name for tensor in side.initializer)
            yield from ((name, kind) for name, kind in reads(side) if name not in own)


def counted(found: Sequence[Sequence[AuditRow]]) -> list[AuditRow]:
    """The rows of all sides of a decision, with multiply-accumulates on the side that costs most alone."""
    costs = [sum(row.macs for row in rows) for rows in found]
    chosen = costs.index(max(costs)) if costs else 0
    return [row if i == chosen else replace(row, macs=0) for i, rows in enumerate(found) for row in rows]


def steered(content: bytes) -> tuple[bytes, list[dict[str, bool]]]:
    """A file whose decisions follow inputs, and what to give these, run by run, so that every side runs.

    Args:
        content: an ONNX file.

    Returns:
        The same bytes and one run without inputs where there is nothing to decide.
    """
    model = onnx.load_from_string(content)
    needed = list(_steer(model.graph, model.graph, {}))
    if not needed:
        return content, [{}]
    runs: list[dict[str, bool]] = []
    for sides_to_take in needed:
        fitting = next((run for run in runs if _agree(run, sides_to_take)), None)
        if fitting is None:
            runs.append(dict(sides_to_take))
        else:
            fitting.update(sides_to_take)
    return model.SerializeToString(deterministic=True), runs


def _agree(run: Mapping[str, bool], wanted: Mapping[str, bool]) -> bool:
    return all(run.get(name, value) == value for name, value in wanted.items())


def _steer(
    top: onnx.GraphProto, graph: onnx.GraphProto, outer: Mapping[str, bool]
) -> Iterator[dict[str, bool]]:
    """Put steering before every decision, in place; yields the sides to take to reach each side."""
    nodes = list(graph.node)
    for node in nodes:
        if node.op_type != "If":
            continue
        name = f"{STEERING}_{sum(value.name.startswith(STEERING) for value in top.input)}"
        top.input.append(helper.make_tensor_value_info(name, onnx.TensorProto.BOOL, []))
        both, either = f"{name}_and", f"{name}_or"
        at = list(graph.node).index(node)
        graph.node.insert(at, helper.make_node("And", [node.input[0], name], [both], name=both))
        graph.node.insert(at + 1, helper.make_node("Or", [both, name], [either], name=either))
        decision = graph.node[at + 2]
        decision.input[0] = either
        for value, side in zip((True, False), sides(decision), strict=True):
            taken = {**outer, name: value}
            yield taken
            yield from _steer(top, side, taken)
