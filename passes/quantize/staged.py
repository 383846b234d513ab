"""A network ready to be quantized, as often as is asked: annotated and calibrated once.

``mixed-precision`` quantizes one network many times, each time with other operators left in float, and
``prepare`` needs the ranges without the quantizers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from graphprune.calibration import Calibration, read
from graphprune.graph import Graph
from graphprune.integers import Scheme
from graphprune.kinds import kind
from graphprune.notes import Note
from graphprune.quantization.parameters import Parameters

from .annotate import Annotation, annotate, weight_of
from .calibrate import calibrate
from .insert import insert
from .prepare import attention_refusal, has_parts, written_out
from .stored import store
from .weights import WIDEST, rounded, width

Skipped = Callable[[fx.Node], str]


@dataclass
class Staged:
    """A float graph with everything written out, what would run in integers in it, and the ranges.

    Attributes:
        graph: float; :meth:`quantized` works on copies.
        scheme: of the target.
        found: what runs in integers when nothing is left out but what the caller skips.
        ranges: parameters by the value they belong to.
        calibration: what they were taken from.
        observer, options: what took the ranges.
        notes: what was odd on the way.
        unstored: embeddings and transposed convolutions whose weights stay in float.
    """

    graph: Graph
    scheme: Scheme
    found: Annotation
    ranges: dict[fx.Node, Parameters]
    calibration: Calibration
    observer: str
    options: Mapping[str, float]
    notes: list[Note] = field(default_factory=list)
    unstored: frozenset[str] = frozenset()

    @staticmethod
    def of(
        graph: Graph, scheme: Scheme, calibration: object, *, skipped: Skipped, attention: bool,
        observer: str, options: Mapping[str, float], limit: int,
    ) -> Staged:  # fmt: skip
        """Write out, annotate, read the calibration inputs and take the ranges."""
        ready, notes = prepared(graph, scheme, skipped, attention=attention)
        found = annotate(ready, scheme, skipped)
        inputs = read(ready, calibration, limit)  # type: ignore[arg-type]
        ranges, odd = calibrate(found, inputs.calls, observer, options) if found.runs else ({}, ())
        said = [*inputs.notes, *notes, *odd]
        unpacked = ("embedding", "transposed-convolution")
        unstored = frozenset(n.name for n in ready.fx.nodes if kind(n) in unpacked and skipped(n))
        return Staged(ready, scheme, found, ranges, inputs, observer, options, said, unstored)

    def quantized(
        self, found: Annotation | None = None, *,
        weights: Mapping[str, tuple[Tensor, Parameters]] | None = None, tables: bool = True,
    ) -> tuple[Graph, list[Note]]:  # fmt: skip
        """A copy with quantizers.

        Args:
            found: which operators run in integers; all that can by default.
            weights: integers by the weight's name, where they are not the nearest.
            tables: whether embeddings are kept as integers, too.
        """
        found = found or self.found
        work, twin = self.twin(found)
        work.floating = self.graph
        insert(twin, self.carried(found, twin), weights)
        return work, store(work, self.unstored) if tables else []

    def twin(self, found: Annotation | None = None) -> tuple[Graph, Annotation]:
        """A copy of the float graph, and an annotation (by default the one that was found) of the copy."""
        work = self.graph.copy()
        twins = dict(zip(self.graph.fx.nodes, work.fx.nodes, strict=True))
        return work, _twin(found or self.found, work, twins)

    def carried(self, found: Annotation, twin: Annotation) -> dict[fx.Node, Parameters]:
        """Parameters of every chief of an annotation's twin."""
        taken = self.taken(found)
        pairs = zip(found.values.values(), twin.values.values(), strict=True)
        return {theirs: taken[ours] for ours, theirs in pairs}

    def taken(self, found: Annotation) -> dict[fx.Node, Parameters]:
        """Parameters of every chief of an annotation: those that are known, and what has to be added."""
        known = {value: self.ranges[chief] for value, chief in self.found.values.items()}
        chiefs = [*dict.fromkeys(found.values.values())]
        if any(chief not in known for chief in chiefs):
            fresh, _ = calibrate(found, self.calibration.calls, self.observer, self.options)
            known = {**fresh, **known}
        return {chief: known[chief] for chief in chiefs}

    def without(self, left_out: Mapping[fx.Node, str]) -> Annotation:
        """The annotation with more operators in float, each with its reason."""
        return annotate(
            self.graph, self.scheme, lambda node: left_out.get(node, "") or self.found.floats.get(node, "")
        )

    def rounded(
        self, found: Annotation, method: str, seed: int, widest: int | None = None
    ) -> dict[str, tuple[Tensor, Parameters]]:
        """Integers of the weights by another method than the nearest; a note on those too wide for it."""
        if method != "nearest" and widest is None:
            wide = [node for node in found.runs if weight_of(node) is not None and width(node) > WIDEST]
            self.notes.extend(
                Note("refused", node.name, f"rounded to the nearest: {method} of {width(node)} inputs wants "
                     "a matrix of their products that does not fit in memory")
                for node in wide
            )  # fmt: skip
        return {} if method == "nearest" else rounded(found, self.calibration.calls, method, seed, widest)


def prepared(
    graph: Graph, scheme: Scheme, skipped: Skipped, *, attention: bool
) -> tuple[Graph, Sequence[Note]]:
    """A copy with operators written out whose parts run in integers, and what was not."""
    graph, notes = graph.copy(), []
    for node in graph.nodes:
        if kind(node) != "attention" or not attention or "matmul" not in scheme.inputs or skipped(node):
            continue
        reason = attention_refusal(node)
        if reason:
            notes.append(Note("refused", node.name, f"attention stays in float: {reason}"))
        else:
            written_out(graph, node)
    graph.propagate()
    for node in annotate(graph, scheme, skipped).runs:
        if has_parts(node):
            written_out(graph, node)
    return graph.propagate(), notes


def float_notes(found: Annotation) -> list[Note]:
    """What stays in float although its kind could run in integers, and why."""
    return [
        Note("refused", node.name, f"{kind(node)} stays in float: {reason}")
        for node, reason in found.floats.items()
        if kind(node) != "rescale"
    ]


def _twin(found: Annotation, graph: Graph, twins: Mapping[fx.Node, fx.Node]) -> Annotation:
    """The annotation of a copy."""
    return Annotation(
        graph,
        found.scheme,
        {twins[node]: role for node, role in found.runs.items()},
        {twins[a]: twins[b] for a, b in found.values.items()},
        {twins[node] for node in found.settled},
        {twins[a]: twins[b] for a, b in found.ends.items()},
        {twins[node]: reason for node, reason in found.floats.items()},
    )
