"""Instruments: what watches a pipeline from beside it, so that passes only rewrite.

:class:`Recorder` gathers what a report says of each pass: cost before and after, time, certificate.
:class:`Dump` writes the graph's text after every pass.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .cost import Cost, cost
from .graph import Graph
from .notes import Note, Ranking
from .pipeline import Pass, PassResult
from .verify import Certificate, mask_equivalence, pass_equivalence, require, settle_in_float64


@dataclass(frozen=True)
class PassRecord:
    """One row of a report: what a pass did, what it cost, and its certificate (``None``: none needed).

    ``mask`` is certificate 1 of a pass that removed positions: smaller network against masked original.
    """

    text: str
    changed: bool
    notes: tuple[Note, ...]
    before: Cost
    after: Cost
    seconds: float
    certificate: Certificate | None
    mask: Certificate | None = None
    rankings: tuple[Ranking, ...] = ()


@dataclass
class Recorder:
    """Times, measures and verifies every pass.

    Attributes:
        verify: whether to compare outputs; a graph on the meta device never is.
        inputs: the calls to compare on (default: the graph's examples).
        progress: called with a line of text as each pass starts.
        records: one :class:`PassRecord` for each pass so far.

    Raises:
        VerificationError: an exact pass changed the outputs.
    """

    verify: bool = True
    inputs: Sequence[Sequence[torch.Tensor]] | None = None
    progress: Callable[[str], None] | None = None
    records: list[PassRecord] = field(default_factory=list)
    _started: float = 0.0
    _graph: Graph | None = None
    _outputs: list[Any] = field(default_factory=list)

    def before(self, step: Pass, graph: Graph) -> None:
        """Note the outputs to compare with (once per graph) and start the clock."""
        if self.progress:
            self.progress(f"pass {step}")
        if self.verify and not graph.is_meta and self._graph is not graph:
            self._outputs = [graph.run(*call) for call in self.inputs or [graph.examples]]
            self._graph = graph
        self._started = time.perf_counter()

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        """Record the pass; prove it if it changed the graph."""
        seconds = time.perf_counter() - self._started
        certificate = None
        if result.changed and self.verify and not graph.is_meta:
            certificate = pass_equivalence(self._outputs, result.graph, self.inputs, exact=step.exact)
            certificate = settle_in_float64(certificate, graph, result.graph, self.inputs)
        mask = None
        if result.plan is not None and self.verify and not graph.is_meta:
            mask = mask_equivalence(graph, result.plan, self.inputs, pruned=result.pruned)
        before = self.records[-1].after if self.records else cost(graph)
        after = cost(result.graph) if result.changed else before
        self.records.append(
            PassRecord(
                str(step), result.changed, result.notes, before, after, seconds, certificate, mask,
                result.rankings,
            )
        )  # fmt: skip
        if mask is not None:
            require(mask, f"pass {step.name!r} removed something else than its plan")
        if certificate is not None:
            require(certificate, f"pass {step.name!r} changed the network's outputs")


@dataclass
class Dump:
    """Writes the text of the graph after every pass to ``directory/NN-pass.txt``."""

    directory: Path
    count: int = 0

    def before(self, step: Pass, graph: Graph) -> None:
        """Write the captured graph once."""
        self.directory.mkdir(parents=True, exist_ok=True)
        if self.count == 0:
            (self.directory / "00-captured.txt").write_text(f"{graph}\n")

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        """Write what the pass left."""
        self.count += 1
        (self.directory / f"{self.count:02d}-{step.name}.txt").write_text(f"{result.graph}\n")
