"""A convolution of few channels and the max pooling behind it, as one convolution with a stride.

ONNX Runtime computes convolutions on x86 in blocks of channels (16 with AVX-512): 4 channels cost what 16 do.
Where pooling keeps the largest of ``p x p`` places that do not overlap, those places can be channels instead.
With a convolution's kernel shifted by ``(a, b)``, zeros around it,

    conv(x)[c, p i + a, p j + b] = conv'(x)[(a p + b) C + c, i, j],   stride s p, kernel k + s (p - 1),

and the largest is taken over ``p p`` groups of ``C`` channels. The sums are the same but for zeros in them
(for finite inputs: a zero times infinity is not a number). Operators between the two that work on each value
by itself stay between them. It is done where that is less work in blocks of 16, by more than the further
operator costs, and no more work in blocks of 8, which processors without AVX-512 have. Measured with AVX-512
on 648 such pairs (1 to 8 channels in, 2 to 16 out): of the 268 where blocks of 16 say so, one took 1.08 of
the time, the others 0.38 to 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from graphprune.cost import size_hint
from graphprune.graph import Graph
from graphprune.kinds import kind
from graphprune.operands import argument, sizes, spread_out
from graphprune.target import Target

aten = torch.ops.aten

# Multiply-accumulates that take as long as the maximum over groups does beyond its values.
_WORTH = 200_000
_ROOM = 1 << 16  # bytes by which the weight may grow, with its zeros
_NARROW = 8  # channels in a block without AVX-512
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
        if _saved(graph, conv, pool, step, _NARROW) < 0:
            continue
        count, wide = sizes(conv)[1], _shifted(graph, conv, step)
        more = wide.nbytes - graph.tensor(argument(conv, "weight")).nbytes
        if more > _ROOM:
            continue
        _rewrite(graph, conv, pool, step, wide)
        notes.append(
            f"{graph.where(pool)} runs inside the convolution before it, which steps over {step} x {step} "
            f"places with {step * step * count} channels for {count}: blocks of {target.channel_alignment} "
            f"channels are full so, and the weight has {more:,} bytes more"
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
    kernel, stride = _pair(pool, "kernel_size"), _pair(pool, "stride")
    plain = _pair(pool, "padding") == (0, 0) and _pair(pool, "dilation") == (1, 1)
    square = kernel[0] == kernel[1] > 1 and stride in ((), kernel)
    known = all(isinstance(size, int) for size in sizes(pool)[1:]) and len(sizes(pool)) == 4
    whole = not argument(pool, "ceil_mode") or all(s % kernel[0] == 0 for s in sizes(_source(pool))[2:])
    return int(kernel[0]) if plain and square and known and whole else None


def _fits(graph: Graph, conv: fx.Node) -> bool:
    if conv.target is not aten.conv2d.default or len(conv.users) != 1 or len(sizes(conv)) != 4:
        return False
    stride = _pair(conv, "stride")
    if argument(conv, "groups") != 1 or _pair(conv, "dilation") != (1, 1) or stride[0] != stride[1]:
        return False
    if conv.meta["val"].dtype != torch.float32:
        return False
    bias = argument(conv, "bias")
    constant = graph.constant(argument(conv, "weight")) is not None
    return constant and (bias is None or graph.constant(bias) is not None)


def _saved(graph: Graph, conv: fx.Node, pool: fx.Node, step: int, block: int) -> int:
    """Multiply-accumulates saved where every convolution has whole blocks of channels."""
    count, read, *kernel = graph.tensor(argument(conv, "weight")).shape
    stride = _pair(conv, "stride")[0]

    def work(channels: int, kernel: list[int]) -> int:
        return math.ceil(channels / block) * block * math.prod(kernel)

    before = work(count, kernel) * step * step
    after = work(count * step * step, [size + stride * (step - 1) for size in kernel])
    batch, _, *places = (size_hint(size) for size in pool.meta["val"].shape)
    return (before - after) * read * batch * math.prod(places)


def _rewrite(graph: Graph, conv: fx.Node, pool: fx.Node, step: int, wide: Tensor) -> None:
    bias, several = graph.constant(argument(conv, "bias")), None
    weight = graph.add_tensor(f"{conv.name}_weight", wide, before=conv, trainable=False)
    if bias is not None:
        several = graph.add_tensor(
            f"{conv.name}_bias", bias.detach().repeat(step * step), before=conv, trainable=False
        )
    by, padding = [_pair(conv, "stride")[0] * step] * 2, list(_pair(conv, "padding"))
    conv.args, conv.kwargs = (conv.args[0], weight, several, by, padding), {}
    count = sizes(pool)[1]
    with graph.fx.inserting_before(pool):
        groups = graph.fx.call_function(aten.unflatten.int, (pool.args[0], 1, [step * step, count]))
        largest = graph.fx.call_function(aten.amax.default, (groups, [1]))
    largest.meta = dict(pool.meta)  # its shape and its place in the source, for what reads it
    pool.replace_all_uses_with(largest)
    graph.fx.erase_node(pool)


def _shifted(graph: Graph, conv: fx.Node, step: int) -> Tensor:
    """``[C, R, k, k]`` at every one of ``p x p`` places: ``[p p C, R, k + s (p - 1), k + s (p - 1)]``."""
    weight, stride = graph.tensor(argument(conv, "weight")).detach(), _pair(conv, "stride")[0]
    count, read, height, width = weight.shape
    room = stride * (step - 1)
    wide = weight.new_zeros(step, step, count, read, height + room, width + room)
    for a in range(step):
        for b in range(step):
            top, left = stride * a, stride * b
            wide[a, b, :, :, top : top + height, left : left + width] = weight
    return wide.flatten(0, 2)


def _pair(node: fx.Node, name: str) -> tuple[int, ...]:
    return spread_out(argument(node, name), 2)


def _source(node: fx.Node) -> fx.Node:
    assert isinstance(node.args[0], fx.Node)
    return node.args[0]
