"""A second classifier at a cut of the network: pooled features and a linear layer.

What a value holds is averaged over all positions (or, for a sequence, taken from the first token, where
transformers keep what they classify by), and a linear layer gives as many classes as the network's own
output has. The graph then answers twice, ``(exit, final)``, which is the form that is trained.

The head starts as the multinomial logistic regression of the network's own answers on the pooled features,

    min over W, b of   -mean over n of  Σ_c softmax(final_n)_c log softmax(W x_n + b)_c  +  λ |W|² / 2,

a convex problem solved with L-BFGS on calibration inputs; no labels are asked for.

>>> import torch, graphprune
>>> layers = [torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten()]
>>> model = torch.nn.Sequential(*layers, torch.nn.Linear(8, 3))
>>> graph = attach(graphprune.trace(model, torch.zeros(1, 1, 5, 5)), "1")
>>> early, final = graph.module(torch.zeros(1, 1, 5, 5))
>>> early.shape, final.shape, sorted(n for n in graph.tensors if "exit" in n)
(torch.Size([1, 3]), torch.Size([1, 3]), ['early_exit.bias', 'early_exit.weight'])
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed
from torch import fx
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from graphprune.errors import PassError, suggestion
from graphprune.graph import Graph
from graphprune.kinds import kind

aten = torch.ops.aten
qd = torch.ops.quantized_decomposed

NAME = "early-exit"
HEAD = "early_exit"
POOLS = ("mean", "first")
_PENALTY = 1e-3
_SHOWN = 8
_QUANTIZE, BACK = qd.quantize_per_tensor.default, qd.dequantize_per_tensor.default


def attach(graph: Graph, at: str, *, pool: str = "mean", features: int | None = None) -> Graph:
    """A copy that returns ``(exit, final)``: a new head's logits, and what the network returned before.

    Args:
        graph: a classifier: one of its outputs is a tensor, ``[n, classes]``.
        at: a node, or a module by its path: its last value; behind its quantizer where it has one.
        pool: ``mean`` over all positions, or ``first`` for the first token of a sequence ``[n, tokens, d]``.
        features: the dimension that holds features; by default the second, and the last of a sequence.

    Raises:
        PassError: there is no such cut, nothing of the network lies behind it, or it cannot be pooled.
    """
    work = graph.copy()
    final = logits(work)
    cut = place(work, at)
    if final not in _behind(cut):
        raise PassError(NAME, "the output does not depend on it: it is no cut of the network", cut.name)
    value: torch.Tensor = cut.meta["val"]
    width = _features(value, features, cut)
    if value.dim() < 2 or str(value.shape[0]) != str(final.meta["val"].shape[0]):
        shape = tuple(value.shape)
        raise PassError(NAME, f"its shape {shape} does not start with the batch of the output", cut.name)
    with work.fx.inserting_after(cut):
        pooled = _pooled(work, cut, pool, width)
    after = pooled.next
    size, classes = value.shape[width], final.meta["val"].shape[1]
    like: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    weight = work.add_tensor(
        f"{HEAD}.weight", torch.zeros(classes, size, **like), before=after, trainable=True
    )
    bias = work.add_tensor(f"{HEAD}.bias", torch.zeros(classes, **like), before=after, trainable=True)
    with work.fx.inserting_before(after):
        head = work.fx.call_function(aten.linear.default, (pooled, weight, bias))
    flat: Any = work.output.args[0]
    work.output.args = ((head, *flat),)
    before = pytree.tree_unflatten(list(flat), graph.signature.out_spec)
    work.signature = replace(work.signature, out_spec=pytree.tree_flatten((head, before))[1])
    return work.propagate()


def fit(graph: Graph, calls: Sequence[Sequence[torch.Tensor]]) -> Graph:
    """A copy whose exit answers, as far as a linear layer can, what the network itself answers.

    Args:
        graph: of :func:`attach`.
        calls: flat inputs.
    """
    head, final = outputs(graph)
    probe = graph.copy()
    at = {node.name: node for node in probe.fx.nodes}
    probe.output.args = ((at[head.args[0].name], at[final.name]),)  # type: ignore[union-attr]
    results = [probe.run(*call) for call in calls]
    x, wanted = (torch.cat([result[i] for result in results]).double() for i in (0, 1))
    mean, scale = x.mean(0), x.std(0, correction=0).clamp_min(1e-6)
    weight, bias = _regression((x - mean) / scale, wanted.softmax(-1))
    weight = weight / scale
    fitted = graph.copy()
    names = [str(head.args[i].target) for i in (1, 2)]  # type: ignore[union-attr]
    kind = graph.tensors[names[0]].dtype
    fitted.set_tensors({names[0]: weight.to(kind), names[1]: (bias - weight @ mean).to(kind)})
    return fitted


def outputs(graph: Graph) -> tuple[fx.Node, fx.Node]:
    """The nodes of the exit's and the network's logits, of a graph that returns ``(exit, final)``.

    Raises:
        PassError: it returns something else.
    """
    found = [value for value in graph.output.args[0] if isinstance(value, fx.Node)]  # type: ignore[union-attr]
    shapes = [tuple(map(str, node.meta["val"].shape)) for node in found]
    kinds = [node.meta["val"].dtype for node in found]
    pair = len(graph.signature.out_spec.children()) == 2
    if not pair or len(found) != 2 or shapes[0] != shapes[1] or kinds[0] != kinds[1] or len(shapes[0]) != 2:
        listed = ", ".join(f"[{', '.join(shape)}]" for shape in shapes)
        raise PassError(
            NAME,
            f"the network must return (exit, final), both [n, classes]; its outputs are {listed or 'none'}",
        )
    return found[0], found[1]


def logits(graph: Graph) -> fx.Node:
    """The one output of a classifier.

    Raises:
        PassError: the network returns more than one tensor, or one of another shape.
    """
    found = [value for value in graph.output.args[0] if isinstance(value, fx.Node)]  # type: ignore[union-attr]
    if len(found) != 1:
        raise PassError(NAME, f"needs a network with one output, [n, classes]; this one has {len(found)}")
    shape = tuple(found[0].meta["val"].shape)
    if len(shape) != 2 or not isinstance(shape[1], int) or shape[1] < 2:
        raise PassError(
            NAME, f"needs an output [n, classes] to be sure of; this one is {shape}", found[0].name
        )
    return found[0]


def place(graph: Graph, at: str) -> fx.Node:
    """Where the exit goes: the node of :func:`find`, or the integers that it is rounded to, read as numbers.

    A runtime computes an operator in integers where it sees the quantizer of its result, and nothing else
    reads that result. Padding stands between a quantizer and its reader, and goes with the reader.

    Raises:
        PassError: neither node nor module is there, or it is not a tensor.
    """
    node = find(graph, at)
    source = node.args[0] if kind(node) == "pad" else None
    if isinstance(source, fx.Node) and source.target is BACK:
        node = source
    readers = list(node.users)
    if readers and all(reader.target is _QUANTIZE for reader in readers):
        node = readers[0]
    if node.target is _QUANTIZE:
        node = next((n for n in node.users if n.target is BACK and n.args[1:] == node.args[1:]), node)
    if not isinstance(node.meta.get("val"), torch.Tensor) or not node.meta["val"].is_floating_point():
        raise PassError(NAME, "its value is no tensor of numbers to classify by", node.name)
    return node


def find(graph: Graph, at: str) -> fx.Node:
    """The node of that name, or the last one that a module computes.

    Raises:
        PassError: neither is there.
    """
    nodes = [n for n in graph.fx.nodes if n.op == "call_function"]
    named = [n for n in nodes if n.name == at]
    inside = [n for n in nodes if f"{n.meta.get('module', '')}.".startswith(f"{at}.")] if at else []
    if not named and not inside:
        paths = {str(n.meta["module"]) for n in nodes if n.meta.get("module")}
        around = {path[:i] for path in paths for i, c in enumerate(path) if c == "."}
        near = suggestion(at, [*around, *paths, *(n.name for n in nodes)]) or _beside(at, {*around, *paths})
        raise PassError(NAME, f"there is no node or module {at!r}{near}")
    return (named or inside)[-1]


def _beside(at: str, paths: set[str]) -> str:
    """`` (its neighbours are …)``: modules of the same parent, since a number resembles none."""
    parent = at.rpartition(".")[0]
    beside = sorted(path for path in paths if path.rpartition(".")[0] == parent)
    more = " …" if len(beside) > _SHOWN else ""
    return f" (beside it are {', '.join(map(repr, beside[:_SHOWN]))}{more})" if beside else ""


def _behind(cut: fx.Node) -> set[fx.Node]:
    """Everything that reads a node, directly or not."""
    found: set[fx.Node] = set()
    waiting = list(cut.users)
    while waiting:
        node = waiting.pop()
        if node not in found:
            found.add(node)
            waiting.extend(node.users)
    return found


def _features(value: torch.Tensor, features: int | None, cut: fx.Node) -> int:
    width = (2 if value.dim() == 3 else 1) if features is None else features
    if not -value.dim() <= width < value.dim() or width % value.dim() == 0 or value.dim() < 2:
        raise PassError(NAME, f"its value has {value.dim()} dimensions, and features={features}", cut.name)
    width %= value.dim()
    if not isinstance(value.shape[width], int):
        raise PassError(NAME, f"how many features it has is open ({value.shape[width]})", cut.name)
    return width


def _pooled(graph: Graph, cut: fx.Node, pool: str, width: int) -> fx.Node:
    """One vector of features for each sample."""
    dim = cut.meta["val"].dim()
    if pool not in POOLS:
        raise PassError(NAME, f"unknown pool {pool!r}{suggestion(pool, POOLS)}; known: {', '.join(POOLS)}")
    if pool == "first":
        if dim != 3 or width != 2:
            raise PassError(NAME, "pool=first takes the first token of a sequence [n, tokens, d]", cut.name)
        return graph.fx.call_function(aten.select.int, (cut, 1, 0))
    others = [d for d in range(1, dim) if d != width]
    if not others:
        return cut
    return graph.fx.call_function(aten.mean.dim, (cut, others))


def _regression(x: torch.Tensor, wanted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight ``[classes, features]`` and bias of the regression in the module docstring."""
    weight = x.new_zeros(wanted.shape[1], x.shape[1]).requires_grad_()
    bias = x.new_zeros(wanted.shape[1]).requires_grad_()
    solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        loss = F.cross_entropy(F.linear(x, weight, bias), wanted) + _PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        solver.step(closure)  # type: ignore[arg-type]
    return weight.detach(), bias.detach()
