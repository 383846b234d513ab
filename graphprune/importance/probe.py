"""Values and gradients inside a network on calibration inputs, without labels.

What is differentiated is the output itself, projected on random directions: with ``v`` of independent
standard normal entries and ``y`` the output, the mean over ``v`` of ``(d(v·y)/dz · e)^2`` is the squared
length of the change of ``y`` that a small change ``e`` of ``z`` makes (Hutchinson's estimator). Outputs are
divided by their root mean square, so that each counts alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

if TYPE_CHECKING:
    from ..graph import Graph

Values = Mapping[fx.Node, torch.Tensor]
Look = Callable[[fx.Node, Sequence[Any], Any], None]


def gradients(
    graph: Graph,
    calls: Sequence[Sequence[torch.Tensor]],
    nodes: Sequence[fx.Node],
    *,
    look: Look | None = None,
    probes: int = 1,
    seed: int = 0,
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """For every call and probe the values of some nodes and the projected output's gradients there.

    Args:
        graph: the network.
        calls: flat inputs of each call.
        nodes: operators and ``get_attr`` nodes whose values are asked for.
        look: called with every operator, its positional arguments and its value, once a call.
        probes: random directions a call.
        seed: of the directions.

    Yields:
        ``(value, gradient)`` for each of ``nodes``; the gradient is zero where no output depends on it.
    """
    generator = torch.Generator().manual_seed(seed)
    scales: list[torch.Tensor] | None = None
    for call in calls:
        kept, outputs = _forward(graph, call, set(nodes), look)
        if scales is None:
            scales = [_root_mean_square(y) for y in outputs]
        values = [kept[node] for node in nodes]
        for probe in range(probes):
            directions = [
                torch.randn(y.shape, generator=generator, dtype=y.dtype).to(y.device) / scale
                for y, scale in zip(outputs, scales, strict=True)
            ]
            reached = [(y, v) for y, v in zip(outputs, directions, strict=True) if y.requires_grad]
            found: Sequence[torch.Tensor | None] = [None] * len(values)
            if reached and values:
                found = torch.autograd.grad(
                    [y for y, _ in reached], values, [v for _, v in reached],
                    retain_graph=probe + 1 < probes, allow_unused=True,
                )  # fmt: skip
            yield [
                (z.detach(), torch.zeros_like(z) if g is None else g)
                for z, g in zip(values, found, strict=True)
            ]


def _root_mean_square(value: torch.Tensor) -> torch.Tensor:
    return value.detach().double().square().mean().sqrt().clamp_min(1e-12).to(value.dtype)


@torch.enable_grad()
def _forward(
    graph: Graph, call: Sequence[torch.Tensor], wanted: set[fx.Node], look: Look | None
) -> tuple[dict[fx.Node, torch.Tensor], list[torch.Tensor]]:
    """The values of ``wanted`` as part of an autograd graph, and the floating-point outputs."""
    values: dict[fx.Node, Any] = dict(zip(graph.placeholders, call, strict=True))
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.fx.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    kept: dict[fx.Node, torch.Tensor] = {}
    outputs: list[Any] = []
    for node in graph.fx.nodes:
        if node.op == "get_attr":
            name = str(node.target)
            values[node] = graph.bodies[name] if name in graph.bodies else graph.tensors[name].detach()
            if node in wanted:
                kept[node] = values[node] = values[node].requires_grad_()
        elif node.op == "output":
            fx.map_arg(node.args, lambda n: outputs.append(values[n]))
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: values[n])
            value = node.target(*args, **kwargs)  # type: ignore[operator]
            if node in wanted:
                # A leaf where nothing before it is differentiated: the backward pass ends there.
                value = value if value.requires_grad else value.requires_grad_()
                kept[node] = value
            if look is not None:
                look(node, args, value)
            values[node] = value
        for source in node.all_input_nodes:
            if last[source] is node and source is not node:
                values.pop(source, None)
    return kept, [y for y in outputs if isinstance(y, torch.Tensor) and y.is_floating_point()]
