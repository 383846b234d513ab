"""Operators that share a weight, fitted together.

A unit watches each of its operators when the two networks, the original and the pruned one, have come
there, and settles once it has seen all of them: by least squares (:mod:`.solve`) on the rows that
:mod:`.rows` makes of convolutions and matrix products. :mod:`.statistics` has the units of
batch norms.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from graphprune.passes.affine import Refusal
from torch import fx

from graphprune.graph import Graph
from graphprune.operands import PRODUCTS, set_argument

from .rows import Draw, Form, form
from .solve import Gram

aten = torch.ops.aten

HELD = 5  # one sample in so many is held back

# Two values whose difference is below this share of their size are one, up to rounding (amplitudes).
EQUAL = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Record:
    """What became of one unit.

    Attributes:
        nodes: the operators, by name.
        kind: ``weights``, ``mixing`` (see :mod:`.mixing`), ``statistics`` or ``bias``.
        where: node, module and source line of the first.
        samples: rows of the regression, or values a channel of the statistics.
        before, after: error of the operators' results on calibration, relative to the original's results
            (root of summed squares); for statistics, ``before`` is that of the input and ``after`` is NaN.
        ridge: that the weights were fitted with, else NaN.
    """

    nodes: tuple[str, ...]
    kind: str
    where: str
    samples: int
    before: float
    after: float
    ridge: float = math.nan


@dataclass(frozen=True)
class Options:
    """See :func:`graphprune.passes.repair.repair`."""

    ridge: float | None = None
    positions: int | None = 64
    add_bias: bool = False
    residual: bool = True
    seed: int = 0


Compute = Callable[[Mapping[str, torch.Tensor]], torch.Tensor]
"""The operator's result with some of its tensors replaced."""


@dataclass
class Refit:
    """Operators that share a weight (and a bias or none), fitted together.

    Attributes:
        nodes: in execution order.
        weight, bias: names; the bias is ``None`` where there is none.
        intercept: whether a constant is fitted. It goes to the bias, to a new one, or into the batch norm
            behind, whose mean is about to be taken again.
    """

    nodes: list[fx.Node]
    weight: str
    bias: str | None
    intercept: bool
    options: Options
    gram: Gram = field(default_factory=Gram)
    held: Gram = field(default_factory=Gram)
    _old: dict[str, torch.Tensor] = field(default_factory=dict)
    _written: bool = False

    def begin(self, graph: Graph, seed: int) -> None:
        """Forget what was seen; the weights of the first time stay those to shrink towards."""
        self.gram, self.held, self._seen = Gram(), Gram(), Counter[fx.Node]()
        self._draw_held = Draw(self.options.positions, seed)
        self._draw = Draw(self.options.positions, seed)
        if not self._old:
            names = [self.weight] if self.bias is None else [self.weight, self.bias]
            self._old = {name: graph.tensors[name].detach() for name in names}

    def observe(
        self,
        node: fx.Node,
        x: torch.Tensor,
        target: torch.Tensor,
        whole: torch.Tensor,
        compute: Compute,
        matters: torch.Tensor | None = None,
    ) -> None:
        """Take one batch in.

        Args:
            node: which operator.
            x: what it reads in the pruned network.
            target: what it is to give.
            whole: the values that its error is relative to.
            compute: runs it on other tensors.
            matters: which places of the result count (:mod:`.relevance`); all by default.

        Raises:
            Refusal: its result has another shape than the target.
        """
        found = compute(self._old)
        if found.shape != target.shape:
            raise Refusal(
                f"it gives {tuple(found.shape)}, where the plan leaves {tuple(target.shape)} of the original"
            )
        kernel = tuple(self._old[self.weight].shape[2:])
        values = [widened(target) - widened(found), whole]
        if matters is not None:
            values.append(matters.expand(target.shape))
        batched = x.dim() >= (len(kernel) + 2 if kernel else 2)
        fitted, held = self._parts(node, x.shape[0] if batched else 1)
        for gram, part, draw in ((self.gram, fitted, self._draw), (self.held, held, self._draw_held)):
            if len(part) == 0:
                continue
            everything = not batched or len(part) == x.shape[0]
            inputs, outputs = (x, values) if everything else (x[part], [v[part] for v in values])
            for rows, rest, wanted, *mask in form(node).rows(inputs, outputs, kernel, draw):
                if mask:
                    kept = mask[0][0, :, 0]
                    rows, rest, wanted = rows[:, kept], rest[:, kept], wanted[:, kept]
                gram.add(rows, rest, wanted, self.gram)

    def _parts(self, node: fx.Node, size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which samples of a batch are fitted, and which held back to choose the ridge by."""
        samples = torch.arange(size)
        if self.options.ridge is not None:
            return samples, samples[:0]
        back = (samples + self._seen[node]) % HELD == HELD - 1
        self._seen[node] += size
        return samples[~back], samples[back]

    def settle(self, graph: Graph) -> Record | None:
        """Solve and write the weights into ``graph``; ``None`` where there is nothing to repair.

        Raises:
            Refusal: the samples do not allow it.
        """
        old, gram = self._old[self.weight], self.gram.merged(self.held)
        if not gram.finite:
            raise Refusal("its input or target is not finite on calibration inputs")
        if self.exact(gram.residual, gram.signal):
            self.restore(graph)
            return None
        ridge = self._ridge()
        change, shift = gram.solve(ridge, self.intercept)
        shape: Form = form(self.nodes[0])
        self.write(graph, old.double() + shape.weight(change, old), shift.flatten())
        signal = gram.signal or math.nan
        before, after = (math.sqrt(v / signal) for v in (gram.residual, gram.left(change, shift)))
        return Record(
            names_of(self.nodes), "weights", graph.where(self.nodes[0]), gram.rows, before, after, ridge
        )

    def _ridge(self) -> float:
        given = self.options.ridge
        return self.gram.chosen_ridge(self.held, self.intercept) if given is None else given

    def exact(self, error: float, signal: float) -> bool:
        """Whether summed squares of errors are rounding alone."""
        return error <= EQUAL.get(self._old[self.weight].dtype, 0.0) ** 2 * signal

    def restore(self, graph: Graph) -> None:
        """Nothing is to repair: take back what an earlier round wrote, whose input was another."""
        if self._written:
            graph.set_tensors(self._old)

    def write(self, graph: Graph, weight: torch.Tensor, shift: torch.Tensor) -> None:
        """Give the operators a weight, and what ``shift`` adds to the bias ``[out]``.

        Raises:
            Refusal: they are not finite.
        """
        old = self._old[self.weight]
        values = {self.weight: weight}
        if self.bias is not None:
            values[self.bias] = self._old[self.bias].double() + shift
        values = {name: value.to(old.dtype) for name, value in values.items()}
        if not all(bool(torch.isfinite(value).all()) for value in values.values()):
            raise Refusal(f"the fitted weights would not be finite in {old.dtype}")
        graph.set_tensors(values)
        self._written = True
        if self.bias is None and self.options.add_bias and all(map(takes_bias, self.nodes)):
            self._add_bias(graph, shift.to(old.dtype))

    def _add_bias(self, graph: Graph, value: torch.Tensor) -> None:
        first, *others = self.nodes
        attribute = new_bias(graph, first, self.weight, value)
        for node in others:
            with graph.fx.inserting_before(node):
                again = graph.fx.get_attr(str(attribute.target))
            again.meta = dict(attribute.meta)
            set_argument(node, "bias", again)
        self.bias = str(attribute.target)
        self._old[self.bias] = torch.zeros_like(value)


def new_bias(graph: Graph, node: fx.Node, weight: str, value: torch.Tensor) -> fx.Node:
    """Give an operator that has none a bias, named beside its weight; returns its ``get_attr`` node."""
    name = weight.rpartition(".")[0] + ".bias" if "." in weight else "bias"
    trainable = isinstance(graph.tensors[weight], torch.nn.Parameter)
    attribute = graph.add_tensor(name, value, before=node, trainable=trainable)
    set_argument(node, "bias", attribute)
    return attribute


def names_of(nodes: Sequence[fx.Node]) -> tuple[str, ...]:
    """Their names."""
    return tuple(node.name for node in nodes)


def takes_bias(node: fx.Node) -> bool:
    """Whether the operator can be given a bias."""
    return node.target not in PRODUCTS


def widened(value: torch.Tensor) -> torch.Tensor:
    """At least float32, where the difference of two half-precision values is exact enough."""
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
