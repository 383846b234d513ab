"""Remove operators without effect, repeated computations, dead code and unused tensors.

Outputs and training stay as they were:

* identities: ``alias``, ``clone``/``contiguous``/``to`` that change neither dtype, device nor layout,
  reshapes, permutations, slices and paddings to the same shape, ``x * 1``, ``x + 0``, ``cat`` of one;
* common subexpressions: the same pure operator on the same operands is computed once. Operators that
  follow the training mode (dropout, batch norm) or draw random numbers are never merged;
* nodes that nobody reads, and tensors that no node reads.

A ``detach`` stays where a parameter's gradient would otherwise flow through it.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> class Repeat(torch.nn.Module):
...     def forward(self, x):
...         return x.relu().view(2, 3) * 1 + x.relu()
>>> print(Pipeline.parse("clean-up").run(graphprune.trace(Repeat(), torch.zeros(2, 3))).graph)
x: f32[2, 3]
relu: f32[2, 3] = relu(x)
add: f32[2, 3] = add.Tensor(relu, relu)
return (add,)
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.operands import argument, same_layout, sizes
from graphprune.pipeline import Context, Note, Pass, PassResult

aten = torch.ops.aten

# Whatever they are told to do, they did nothing when dtype, device, shape and strides came out the same.
_COPIES = frozenset({
    aten.clone.default, aten.contiguous.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
    aten.to.other, aten.type_as.default, aten._to_copy.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default, aten.alias.default,
})  # fmt: skip
# They keep every element in row-major order, so that the same shape means the same tensor.
_RESHAPES = frozenset({
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.reshape_as.default,
    aten.view_as.default, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.expand_as.default,
})  # fmt: skip
_NEUTRAL = {
    aten.mul.Tensor: 1, aten.mul.Scalar: 1, aten.div.Tensor: 1, aten.div.Scalar: 1,
    aten.add.Tensor: 0, aten.add.Scalar: 0, aten.sub.Tensor: 0, aten.sub.Scalar: 0,
}  # fmt: skip


@dataclass(frozen=True)
class CleanUp(Pass):
    """Identities, repeated computations, dead nodes and unused tensors go; training stays as it was."""

    name: ClassVar[str] = "clean-up"

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Clean a copy up."""
        result = graph.copy()
        identities = _remove_identities(result)
        merged = _merge_repeated(result)
        tensors = set(result.tensors)
        dead = result.sweep() - sum(identities.values())
        unused = sorted(tensors - set(result.tensors))
        notes = [
            Note("changed", "", f"{count} × {name} without effect") for name, count in identities.items()
        ]
        if merged:
            notes.append(Note("changed", "", f"{merged} repeated computations merged"))
        if dead > 0:
            notes.append(Note("changed", "", f"{dead} nodes that nobody reads removed"))
        notes += [Note("changed", name, "is read by no operator: removed") for name in unused]
        if not notes:
            return PassResult(graph, False, (Note("info", "", "nothing to clean up"),))
        return PassResult(result, True, tuple(notes))


def _remove_identities(graph: Graph) -> Counter[str]:
    removed: Counter[str] = Counter()
    trained = _depends_on_parameters(graph)
    for node in graph.nodes:
        source = _identity_of(node, trained)
        if source is None:
            continue
        if _reaches_caller(node) and _storage(source).op in ("placeholder", "get_attr"):
            continue  # the caller would get its own input, or a weight, instead of a copy
        for user in node.users:
            # What was laid out anew may come in another layout at run time; reshape copes with any.
            if node.target in _COPIES and user.target is aten.view.default:
                user.target = aten.reshape.default
        node.replace_all_uses_with(source)
        removed[operator_name(node)] += 1
    return removed


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.op == "call_function"  # getitem of a split
    return node.target in _RESHAPES | _COPIES or any(r.alias_info for r in node.target._schema.returns)


def _storage(node: fx.Node) -> fx.Node:
    """The node whose memory the value may lie in."""
    while _is_view(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _reaches_caller(node: fx.Node) -> bool:
    """Whether the value, or a view of it, is an output."""
    return any(user.op == "output" or (_is_view(user) and _reaches_caller(user)) for user in node.users)


def _identity_of(node: fx.Node, trained: set[fx.Node]) -> fx.Node | None:
    """The operand that the node merely repeats, if it does."""
    target = node.target
    if node.op != "call_function" or not node.args:
        return None
    source = node.args[0]
    if target is aten.cat.default and isinstance(source, (list, tuple)) and len(source) == 1:
        source = source[0]
    elif target is aten.pad.default or target is aten.constant_pad_nd.default:
        if any(width != 0 for width in argument(node, "pad")):
            return None
    elif target is aten.slice.Tensor:
        if argument(node, "step") != 1:
            return None
    elif target in _COPIES:
        return source if isinstance(source, fx.Node) and same_layout(node, source) else None
    elif target is aten.detach.default:
        if source in trained:
            return None
    elif target is aten.permute.default:
        if [d % len(node.args[1]) for d in node.args[1]] != list(range(len(node.args[1]))):  # type: ignore[arg-type,operator,union-attr]
            return None
    elif target is aten.transpose.int:
        rank = len(source.meta["val"].shape)  # type: ignore[union-attr]
        if node.args[1] % rank != node.args[2] % rank:  # type: ignore[operator]
            return None
    elif target in _NEUTRAL:
        other = node.args[1]
        if isinstance(other, fx.Node) or other != _NEUTRAL[target] or node.kwargs.get("rounding_mode"):
            return None
    elif target not in _RESHAPES:
        return None
    if not isinstance(source, fx.Node) or not isinstance(source.meta.get("val"), torch.Tensor):
        return None
    same = source.meta["val"].dtype == node.meta["val"].dtype and sizes(source) == sizes(node)
    return source if same else None


def _depends_on_parameters(graph: Graph) -> set[fx.Node]:
    found: set[fx.Node] = set()
    for node in graph.fx.nodes:
        tensor = graph.constant(node)
        trainable = isinstance(tensor, torch.nn.Parameter) and tensor.requires_grad
        if trainable or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _merge_repeated(graph: Graph) -> int:
    first: dict[Hashable, fx.Node] = {}
    merged = 0
    for node in graph.nodes:
        key = _key(node)
        if key is None:
            continue
        kept = first.setdefault(key, node)
        if kept is not node:
            node.replace_all_uses_with(kept)
            graph.fx.erase_node(node)
            merged += 1
    return merged


def _key(node: fx.Node) -> Hashable | None:
    """Equal for nodes that compute the same value; ``None`` where running twice is not running once."""
    if node.op == "get_attr":
        return ("get_attr", str(node.target))
    if node.op != "call_function" or node.meta.get("follows_training"):
        return None
    if node.target is not operator.getitem and not is_pure(node):
        return None
    return (node.target, _frozen(node.args), _frozen(dict(node.kwargs)))


def is_pure(node: fx.Node) -> bool:
    """Whether the ATen operator's result depends on its operands alone, and it writes nowhere."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable or node.is_impure():
        return False
    if torch.Tag.nondeterministic_seeded in target.tags or target.namespace not in ("aten", "prims"):
        return False
    if target is aten.batch_norm.default:  # in training mode it writes its running statistics
        return not node.args[5] or node.args[3] is None
    flags = ("train", "training", "dropout_p")  # dropout, recurrent layers, attention
    return not any(a.name in flags and argument(node, a.name) for a in target._schema.arguments)


def _frozen(value: Any) -> Hashable:
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *map(_frozen, value))
    if isinstance(value, dict):
        return tuple(sorted((k, _frozen(v)) for k, v in value.items()))
    if isinstance(value, slice):
        return ("slice", value.start, value.stop, value.step)
    # 1, 1.0 and True are equal to Python but not to an operator; 0.0 and -0.0 differ likewise.
    return value if isinstance(value, fx.Node) else (type(value).__name__, repr(value))
