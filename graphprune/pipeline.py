"""Passes and pipelines: the contract every rewrite keeps.

A pass is a frozen dataclass; its fields are its options. ``run`` takes a graph and a context and
returns a :class:`PassResult`, never changing the graph it was given. Passes neither time, print nor
verify themselves: :mod:`graphprune.instruments` does that from outside.

A pass declares what must already hold (``requires``), what holds after it (``ensures``) and what it
ends (``destroys``), as words; a pipeline refuses an order that breaks them before anything runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from .errors import GraphpruneError, PassError
from .graph import Graph
from .notes import Note, Ranking
from .target import Target, get

if TYPE_CHECKING:
    from .plans.plan import Plan

LOSSLESS = "clean-up,fold-constants,remove-dropout,fold-parameters,fold-batch-norm,clean-up"
"""What ``optimize`` runs when nothing else is asked."""

# What holds of every freshly captured graph.
INITIAL = frozenset({"float", "batch-norm", "trainable"})


@dataclass(frozen=True)
class PassResult:
    """A pass's answer: the graph (the same object when nothing changed), and what is to be said of it.

    A pass that removed positions gives the ``plan`` and the graph right after it (``pruned``, before any
    weight was changed), so that an instrument can prove the removal by masking. A pass that chose among
    candidates by measuring them gives all it measured as ``rankings``.
    """

    graph: Graph
    changed: bool
    notes: tuple[Note, ...] = ()
    plan: Plan | None = None
    pruned: Graph | None = None
    rankings: tuple[Ranking, ...] = ()


@dataclass(frozen=True)
class Context:
    """What passes may look at besides the graph.

    Attributes:
        target: the device to build for.
        calibration: any iterable of inputs (a tensor, a tuple of positional or a dict of keyword
            arguments each), or ``None``.
        evaluate: ``module -> float``, larger is better, or ``None``.
        seed: for passes that draw random numbers.
        backend, threads: what a pass that measures latency lowers with; as ``optimize`` takes them.
        progress: called with a line of text where a pass takes long; ``None`` is nobody.
    """

    target: Target = field(default_factory=lambda: get("cpu"))
    calibration: Iterable[Any] | None = None
    evaluate: Callable[[Any], float] | None = None
    seed: int = 0
    backend: str = "auto"
    threads: int | None = None
    progress: Callable[[str], None] | None = None


class Pass:
    """Base of all passes. Subclass as a frozen dataclass and implement :meth:`run`.

    Class attributes:
        name: the registry's and the textual form's name, in kebab-case.
        exact: whether outputs must be reproduced to tolerance; otherwise the error is recorded.
        requires, ensures, destroys: words about the graph; see the module docstring.
        for_runtime: whether what it leaves depends on what the target's runtime computes in integers.
    """

    name: ClassVar[str]
    exact: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset()
    ensures: ClassVar[frozenset[str]] = frozenset()
    destroys: ClassVar[frozenset[str]] = frozenset()
    for_runtime: ClassVar[bool] = False

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Rewrite a copy of ``graph``."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options that differ from their defaults, in field order."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}  # type: ignore[arg-type]

    def __str__(self) -> str:
        from .textual import print_pass

        return print_pass(self)


class Instrument(Protocol):
    """Watches a pipeline from beside it. A pipeline calls ``before`` and ``after`` around every pass."""

    def before(self, step: Pass, graph: Graph) -> None:
        """The pass is about to run."""

    def after(self, step: Pass, graph: Graph, result: PassResult) -> None:
        """The pass has run; ``graph`` is what it was given."""


@dataclass(frozen=True)
class PipelineResult:
    """The final graph, and the last one that still trains as the original did."""

    graph: Graph
    trainable: Graph


@dataclass(frozen=True)
class Pipeline:
    """Passes in order. ``str(pipeline)`` prints the textual form, :meth:`parse` reads it.

    >>> str(Pipeline.parse("clean-up, fold-batch-norm"))
    'clean-up,fold-batch-norm'
    """

    passes: tuple[Pass, ...]

    @staticmethod
    def parse(text: str) -> Pipeline:
        """A pipeline from its textual form; see :mod:`graphprune.textual`.

        Raises:
            RecipeError: the text does not parse, or names an unknown pass or option.
        """
        from .textual import parse_pipeline

        return Pipeline(tuple(parse_pipeline(text)))

    def __str__(self) -> str:
        return ",".join(map(str, self.passes))

    def __iter__(self) -> Iterator[Pass]:
        return iter(self.passes)

    def check(self) -> None:
        """Raise a :class:`PassError` where a pass stands before what it requires, or after its end."""
        state = set(INITIAL)
        for step in self.passes:
            missing = step.requires - state
            if missing:
                ended_by = [p.name for p in self.passes if p.destroys & missing]
                why = f" (ended by {ended_by[0]!r})" if ended_by else ""
                raise PassError(step.name, f"needs {', '.join(sorted(missing))}{why}; change the order")
            state = (state - step.destroys) | step.ensures

    def run(
        self,
        graph: Graph,
        context: Context | None = None,
        instruments: Sequence[Instrument] = (),
        part: slice = slice(None),
    ) -> PipelineResult:
        """Run the passes in order, the instruments around each.

        Args:
            part: which of them; the graph is what those before it left.

        Raises:
            PassError: the order is impossible, or a pass fails.
        """
        self.check()
        context = context or Context()
        trainable, still = graph, True
        for step in self.passes[part]:
            for instrument in instruments:
                instrument.before(step, graph)
            try:
                result = step.run(graph, context)
            except GraphpruneError:
                raise
            except Exception as error:
                raise PassError(step.name, f"{type(error).__name__}: {error}") from error
            for instrument in instruments:
                instrument.after(step, graph, result)
            graph = result.graph
            still = still and "trainable" not in step.destroys
            trainable = graph if still else trainable
        return PipelineResult(graph, trainable)
