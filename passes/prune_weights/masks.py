"""Which weights can be pruned, and how a mask stands in a graph.

A masked weight is a product, ``mul(weight, mask)``, of a parameter and a buffer of ones and zeros. Everything
that read the weight reads the product: forward and backward see zeros where the mask has them, and a gradient
never reaches what went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from graphprune.passes.affine import Refusal
from graphprune.passes.commute import describe
from graphprune.passes.quantize.select import Selection
from graphprune.passes.quantize_weights.places import RECURRENT
from graphprune.passes.repair.rows import Form, form, operands
from torch import Tensor, fx

from graphprune.cost import node_macs
from graphprune.graph import Graph
from graphprune.operands import LINEAR, depends_on_input
from graphprune.pipeline import Note
from graphprune.sparsity.patterns import Pattern

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Weight:
    """One weight.

    Attributes:
        name: the parameter's.
        readers: the operators that multiply with it, in execution order.
        form: how they do.
    """

    name: str
    readers: tuple[fx.Node, ...]
    form: Form

    def matrix(self, value: Tensor) -> Tensor:
        """``[outputs, columns]``, the groups of a convolution below each other."""
        return self.form.matrix(value).mT.flatten(0, 1)

    def back(self, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`, in the shape of ``like``."""
        return self.form.weight(matrix.unflatten(0, (self.form.groups, -1)).mT, like)


def weights(
    graph: Graph, pattern: Pattern, ignored: tuple[str, ...], only: tuple[str, ...]
) -> tuple[list[Weight], list[Note]]:
    """The weights that qualify, in the order they are read, and notes on those that do not."""
    selection = Selection(graph, ignored, only)
    found: list[Weight] = []
    notes: list[Note] = []
    named: set[str] = set()
    whole = 0
    for node in graph.nodes:
        name = _name(graph, operands(node)[1]) if node.target in LINEAR else ""
        if not name:
            count, why = _left_out(node)
            whole += count
            if count and not selection.skipped(node):
                notes.append(Note("refused", graph.place(node), f"stays dense: {why}"))
            continue
        if name not in named:
            named.add(name)
            whole += graph.tensors[name].numel()
        if any(name == other.name for other in found) or selection.skipped(node):
            continue
        try:
            found.append(_weight(graph, name, node, pattern))
        except Refusal as refusal:
            notes.append(Note("refused", name, f"stays dense: {refusal}"))
    own = sum(graph.tensors[weight.name].numel() for weight in found)
    if found and own < whole:
        said = f"{own / whole:.1%} of the {whole:,} weights of products get a mask, the others stay dense"
        notes.append(Note("info", "", said))
    return found, notes


def masked(graph: Graph, values: Mapping[str, tuple[Tensor, Tensor]]) -> Graph:
    """A copy of ``graph`` with new weights, each multiplied with its mask.

    Args:
        values: name → the weight and its mask (bool), in its shape. A weight that has a mask already gets the
            product of both.
    """
    result = graph.copy()
    result.set_tensors({name: value.clone() for name, (value, _) in values.items()})
    for name, (value, mask) in values.items():
        readers = result.readers(name)
        known = mask_of(result, name)
        if known is not None:
            result.set_tensor(known, result.tensors[known] * mask)
            continue
        first = next(node for node in result.fx.find_nodes(op="get_attr", target=name))
        ones = result.add_tensor(f"{name}_mask", mask.to(value.dtype), before=first, trainable=False)
        with result.fx.inserting_before(readers[0]):
            product = result.fx.call_function(aten.mul.Tensor, (first, ones))
        for reader in readers:
            for source in list(reader.all_input_nodes):
                if source.op == "get_attr" and source.target == name:
                    reader.replace_input_with(source, product)
    result.sweep()
    return result.propagate()


def mask_of(graph: Graph, name: str) -> str | None:
    """The name of a weight's mask, if it is multiplied with one."""
    product = _product(graph, name)
    return None if product is None else f"{name}_mask"


def product_of(graph: Graph, name: str) -> fx.Node:
    """The product of a weight and its mask, which it must have."""
    product = _product(graph, name)
    assert product is not None
    return product


def _product(graph: Graph, name: str) -> fx.Node | None:
    for reader in graph.readers(name):
        sources = {str(source.target) for source in reader.all_input_nodes if source.op == "get_attr"}
        if reader.target is aten.mul.Tensor and sources == {name, f"{name}_mask"}:
            return reader
    return None


def value_of(graph: Graph, name: str) -> Tensor:
    """A weight as it is multiplied with: its mask, if it has one, counts."""
    mask, value = mask_of(graph, name), graph.tensors[name].detach()
    return value if mask is None else value * graph.tensors[mask]


def there_of(graph: Graph, weight: Weight) -> Tensor:
    """Which entries of a weight's matrix no mask has taken yet: bool ``[outputs, columns]``."""
    mask, value = mask_of(graph, weight.name), graph.tensors[weight.name].detach()
    return weight.matrix(torch.ones_like(value) if mask is None else graph.tensors[mask]) != 0


def _name(graph: Graph, operand: object) -> str:
    """The parameter behind an operand: itself, or multiplied with its mask; empty where there is none."""
    if not isinstance(operand, fx.Node):
        return ""
    if operand.op == "get_attr":
        return str(operand.target)
    names = [str(source.target) for source in operand.all_input_nodes if source.op == "get_attr"]
    return next((name for name in names if _product(graph, name) is operand), "")


def _left_out(node: fx.Node) -> tuple[int, str]:
    """How many weights an operator reads that can get no mask, and why."""
    if not node_macs(node):
        return 0, ""
    read = [source for source in node.all_input_nodes if _is_weight(source)]
    computed = [source for source in read if source.op != "get_attr"]
    if node.target in RECURRENT:
        why = "recurrent weights"
    elif computed:
        why = f"computed by {describe(computed[0])}; run fold-parameters first"
    else:
        why = f"{describe(node)} does not multiply with it as a linear layer does"
    return sum(source.meta["val"].numel() for source in read), why


def _is_weight(node: fx.Node) -> bool:
    """Whether a value is a matrix or more, and of stored tensors alone."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.ndim < 2 or depends_on_input(node):
        return False
    stack = [node]
    while stack:
        current = stack.pop()
        if current.op == "get_attr":
            return True
        stack += current.all_input_nodes
    return False


def _weight(graph: Graph, name: str, node: fx.Node, pattern: Pattern) -> Weight:
    value = graph.tensors[name]
    if not value.is_floating_point():
        raise Refusal(f"it is {str(value.dtype).removeprefix('torch.')}")
    product = _product(graph, name)
    readers: Sequence[fx.Node] = graph.readers(name) if product is None else list(product.users)
    for reader in readers:
        if reader.target not in LINEAR or _name(graph, operands(reader)[1]) != name:
            raise Refusal(f"{graph.place(reader)} reads it, too, and does not multiply with it")
        if sum(_name(graph, source) == name for source in reader.args) > 1:
            raise Refusal(f"{graph.place(reader)} reads it twice")
    forms = [form(reader) for reader in readers]
    if len({(how.kind, how.groups) for how in forms}) > 1:
        raise Refusal("two operators read it in different layouts")
    weight = Weight(name, tuple(readers), form(node))
    why = pattern.refusal(*weight.matrix(value.detach()).shape)
    if why:
        raise Refusal(why)
    return weight
