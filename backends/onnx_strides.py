"""A convolution of few channels and the max pooling behind it, as one convolution with a stride.

ONNX Runtime computes convolutions on x86 in blocks of channels (16 with AVX-512): 4 channels cost what 16 do.
Where pooling keeps the largest of ``p x p`` places that do not overlap, those places can be channels instead.
With a convolution's kernel shifted by ``(a, b)``, zeros around it,

    conv(x)[c, p i + a, p j + b] = conv'(x)[(a p + b) C + c, i, j],   stride s p, kernel k + s (p - 1),

and the largest is taken over ``p p`` groups of ``C`` channels. The sums are the same but for zeros in them.
Operators between the two that work on each value by itself stay between them. It is done where that is less
work by the blocks, by more than the further operator costs: measured on 648 such pairs (1 to 8 channels in, 2
to 16 out): of the 268 where the rule says so, one took 1.08 of the time, the others 0.38 to 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from graphprune.cost import size_hint
from graphprune.graph import Graph
from graphprune.kinds import kind
from graphprune.operands import argument, sizes
from graphprune.target import Target

aten = torch.ops.aten

# Multiply-accumulates that take as long as the maximum over groups does beyond its values.
_WORTH = 200_000
_EACH_BY_ITSELF = frozenset({
    "relu", "clamp", "leaky-relu", "sigmoid", "silu", "gelu", "tanh", "hardswish", "hardsigmoid",
})  # fmt: skip


def stride_pooling(graph: Graph, target: Target) -> tuple[str, ...]:
    """Rewrite, in place, what is faster so on ``target``; returns a note for each.

    Convolutions of two dimensions in float32 with constant weights, without groups and dilation, that nothing
    else reads; pooling by as much as it steps, without padding, on places whose number is known.
    """
    notes = []
    if target.arch != "x86_64" or target.providers[:1] != ("CPUExecutionProvider",):
        return ()
    for pool in list(graph.find(aten.max_pool2d.default)):
        conv, step = _before(pool), _step(pool)
        if step is None or not _fits(graph, conv):
            continue
        if _saved(graph, conv, pool, step, target.channel_alignment) < _WORTH:
            continue
        count = sizes(conv)[1]
        _rewrite(graph, conv, pool, step)
        notes.append(
            f"{graph.where(pool)} runs inside the convolution before it, which steps over {step} x {step} "
            f"places with {step * step * count} channels for {count}: blocks of {target.channel_alignment} "
            "channels are full so"
        )
    if notes:
        graph.sweep()
        graph.propagate()
    return tuple(notes)


def _before(pool: fx.Node) -> fx.Node:
    """What comes before the operators that work on each value by itself, and that nothing else reads."""
    node = _source(pool)
    while kind(node) in _EACH_BY_ITSELF and len(node.users) == 1:
        node = _source(node)
    return node


def _step(pool: fx.Node) -> int | None:
    """The ``p`` of pooling over ``p x p`` places that do not overlap; else ``None``."""
    kernel, stride = _pair(argument(pool, "kernel_size")), _pair(argument(pool, "stride"))
    plain = _pair(argument(pool, "padding")) == (0, 0) and _pair(argument(pool, "dilation")) == (1, 1)
    square = kernel[0] == kernel[1] > 1 and stride in ((), kernel)
    known = all(isinstance(size, int) for size in sizes(pool)[1:]) and len(sizes(pool)) == 4
    whole = not argument(pool, "ceil_mode") or all(s % kernel[0] == 0 for s in sizes(_source(pool))[2:])
    return int(kernel[0]) if plain and square and known and whole else None


def _fits(graph: Graph, conv: fx.Node) -> bool:
    if conv.target is not aten.conv2d.default or len(conv.users) != 1 or len(sizes(conv)) != 4:
        return False
    stride = _pair(argument(conv, "stride"))
    if argument(conv, "groups") != 1 or _pair(argument(conv, "dilation")) != (1, 1) or stride[0] != stride[1]:
        return False
    if conv.meta["val"].dtype != torch.float32:
        return False
    bias = argument(conv, "bias")
    constant = graph.constant(argument(conv, "weight")) is not None
    return constant and (bias is None or graph.constant(bias) is not None)


def _saved(graph: Graph, conv: fx.Node, pool: fx.Node, step: int, block: int) -> int:
    """Multiply-accumulates saved where every convolution has whole blocks of channels."""
    weight = graph.constant(argument(conv, "weight"))
    assert weight is not None
    count, read, *kernel = weight.shape
    stride = _pair(argument(conv, "stride"))[0]

    def work(channels: int, kernel: list[int]) -> int:
        return math.ceil(channels / block) * block * math.prod(kernel)

    before = work(count, kernel) * step * step
    after = work(count * step * step, [size + stride * (step - 1) for size in kernel])
    batch, _, *places = (size_hint(size) for size in pool.meta["val"].shape)
    return (before - after) * read * batch * math.prod(places)


def _rewrite(graph: Graph, conv: fx.Node, pool: fx.Node, step: int) -> None:
    weight, bias = (graph.constant(argument(conv, name)) for name in ("weight", "bias"))
    assert weight is not None
    stride = _pair(argument(conv, "stride"))[0]
    wide = graph.add_tensor(
        f"{conv.name}_weight", _shifted(weight.detach(), stride, step), before=conv, trainable=False
    )
    several = None
    if bias is not None:
        several = graph.add_tensor(
            f"{conv.name}_bias", bias.detach().repeat(step * step), before=conv, trainable=False
        )
    by, padding = [stride * step] * 2, list(_pair(argument(conv, "padding")))
    conv.args, conv.kwargs = (conv.args[0], wide, several, by, padding), {}
    count = sizes(pool)[1]
    with graph.fx.inserting_before(pool):
        groups = graph.fx.call_function(aten.unflatten.int, (pool.args[0], 1, [step * step, count]))
        largest = graph.fx.call_function(aten.amax.default, (groups, [1]))
    pool.replace_all_uses_with(largest)
    graph.fx.erase_node(pool)


def _shifted(weight: Tensor, stride: int, step: int) -> Tensor:
    """``[C, R, k, k]`` at every one of ``p x p`` places: ``[p p C, R, k + s (p - 1), k + s (p - 1)]``."""
    count, read, height, width = weight.shape
    room = stride * (step - 1)
    wide = weight.new_zeros(step, step, count, read, height + room, width + room)
    for a in range(step):
        for b in range(step):
            top, left = stride * a, stride * b
            wide[a, b, :, :, top : top + height, left : left + width] = weight
    return wide.flatten(0, 2)


def _source(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]


def _pair(value: Any) -> tuple[Any, ...]:
    if isinstance(value, (list, tuple)):
        return tuple(value) * (2 if len(value) == 1 else 1)
    return (value, value)
