"""From a captured graph to proved artifacts: passes once, then every candidate backend on its own.

Passes up to the first whose result depends on what a runtime computes in integers run once. From there
candidates that compute the same kinds of this network's operators in integers share a graph, and each lowers,
proves and audits its own artifact. A candidate that is not installed, cannot lower the graph, falls back to
float or fails a certificate is a note in the report where others are left, and an error where none is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from .backend import Audit, Backend
from .errors import BackendError, GraphpruneError, described
from .graph import Graph
from .instruments import Dump, PassRecord, Recorder
from .integers import Scheme
from .kinds import kind
from .lowering import Calls, Deployment, deploy, fitted
from .original import at
from .pipeline import Context, Instrument, Pipeline, PipelineResult
from .rounding import allow_rounding
from .verify import Certificate, compare, require


@dataclass(frozen=True)
class Built:
    """One candidate's artifact.

    Attributes:
        final: the graphs that its passes left.
        records: of all its passes.
        deployment: the artifact, opened where this host can.
        audit: what the runtime executes, where this host could ask.
        certificates: title → certificate, of the artifact against its graph and against the original.
    """

    final: PipelineResult
    records: tuple[PassRecord, ...]
    deployment: Deployment
    audit: Audit | None
    certificates: Mapping[str, Certificate]

    @property
    def name(self) -> str:
        """The backend's."""
        return self.deployment.backend.name


@dataclass
class Builder:
    """Builds with one candidate after the other.

    Attributes:
        captured: the graph as captured.
        calls: title → flat inputs that artifacts are proved on.
        references: title → the original's flat outputs; empty where nothing is verified.
        allow_float: whether a runtime may compute in float what the graph has in integers.
        dump: where the text of the graph goes after every pass.
        refused: what became of candidates that gave nothing.
    """

    passes: Pipeline
    captured: Graph
    context: Context
    calls: Calls
    references: Calls
    verify: bool = True
    allow_float: bool = False
    say: Callable[[str], None] = lambda line: None
    dump: Path | None = None
    refused: list[str] = field(default_factory=list)

    def build(self, tried: Sequence[Backend]) -> list[Built]:
        """The artifacts of all candidates that give one, in their order.

        Raises:
            GraphpruneError: the only candidate's reason.
            BackendError: the reasons of all, where there are several.
        """
        ready = [backend for backend in tried if len(tried) == 1 or self._here(backend)]
        steps = self.passes.passes
        first = next((i for i, step in enumerate(steps) if step.for_runtime), len(steps))
        recorder = Recorder(self.verify, list(self.calls.values()), self.say)
        shared = self._run(slice(first), self.captured, self.context, recorder, self.dump)
        built = []
        for number, group in enumerate(_alike(ready, self.context, shared.graph, bool(steps[first:]))):
            context = replace(self.context, target=fitted(self.context.target, group[0]))
            record = replace(recorder, records=list(recorder.records))
            folder = self.dump if not number or self.dump is None else self.dump / group[0].name
            try:
                final = self._run(slice(first, None), shared.graph, context, record, folder)
            except GraphpruneError as error:
                if len(tried) == 1:
                    raise
                self.refused += [_not_taken(backend, error) for backend in group]
                continue
            if shared.trainable is not shared.graph:
                final = PipelineResult(final.graph, shared.trainable)
            built += list(self._lowered(group, final, tuple(record.records), alone=len(tried) == 1))
        if not built:
            raise BackendError("; ".join(self.refused))
        return sorted(built, key=lambda one: [b.name for b in tried].index(one.name))

    def _here(self, backend: Backend) -> bool:
        try:
            reason = backend.unrunnable(self.context.target)
        except Exception as error:  # whatever is wrong with one, the others go on
            reason = said(error)
        if reason:
            self.refused.append(f"backend {backend.name!r} was not tried: {reason}")
        return not reason

    def _run(
        self, part: slice, graph: Graph, context: Context, recorder: Recorder, dump: Path | None
    ) -> PipelineResult:
        instruments: list[Instrument] = [recorder]
        if dump is not None:
            instruments.append(Dump(dump, len(recorder.records)))
        return self.passes.run(graph, context, instruments, part)

    def _lowered(
        self, group: Sequence[Backend], final: PipelineResult, records: tuple[PassRecord, ...], alone: bool
    ) -> Iterator[Built]:
        exact = all(step.exact for step in self.passes)
        for backend in group:
            self.say(f"lower with {backend.name}")
            target = fitted(self.context.target, backend)
            try:
                made = deploy(
                    final.graph,
                    target,
                    backend,
                    calls=self.calls,
                    verify=self.verify,
                    threads=self.context.threads,
                )
                audit = made.audit() if made.runner is not None else None
                in_integers(audit, self.allow_float)
                certificates = {
                    f"artifact against graph{at(title)}": c for title, c in made.certificates.items()
                }
                certificates |= self._end_to_end(final.graph, made, exact)
            except Exception as error:  # whatever is wrong with one, the others go on
                if alone:
                    raise
                self.refused.append(_not_taken(backend, error))
                continue
            yield Built(final, records, made, audit, certificates)

    def _end_to_end(self, graph: Graph, made: Deployment, exact: bool) -> dict[str, Certificate]:
        """What will be deployed against what came in: the artifact, or its graph where it cannot run here."""
        run, name = (made.runner, "artifact") if made.runner is not None else (graph.run, "graph")
        certificates = {}
        for title, wanted in self.references.items():
            outputs = run(*self.calls[title])
            certificate = compare("end-to-end", [outputs], [wanted], exact=exact)
            certificate = allow_rounding(certificate, self.captured, self.calls[title], outputs)
            certificates[f"{name} against original{at(title)}"] = require(
                certificate, f"the {name} does not reproduce the original model"
            )
        return certificates


def in_integers(audit: Audit | None, allowed: bool) -> None:
    """Raise a :class:`BackendError` where the runtime computes in float what the graph has in integers."""
    fallen = [] if audit is None or allowed else [row for row in audit.rows if row.fell_back]
    if fallen:
        shown = "; ".join(f"{row.name} ({row.operator}) {row.reason}" for row in fallen[:3])
        more = f" and {len(fallen) - 3} more" if len(fallen) > 3 else ""
        raise BackendError(
            f"asked for integers, and the runtime computes in float: {shown}{more}; "
            "leave them out with quantize{ignored=…}, or pass allow_float=True"
        )


def _alike(
    tried: Sequence[Backend], context: Context, graph: Graph, differ: bool
) -> Sequence[Sequence[Backend]]:
    """Candidates for which the remaining passes give one and the same graph."""
    kinds = {kind(node) for node in graph.nodes if node.op == "call_function"}
    if "attention" in kinds:
        kinds.add("matmul")  # what it is written out in
    kinds |= {"add", "mul", "sigmoid", "rescale"}  # the same of activations
    groups: dict[Scheme | None, list[Backend]] = {}
    for backend in tried:
        scheme = fitted(context.target, backend).integers if differ else None
        groups.setdefault(None if scheme is None else scheme.among(kinds), []).append(backend)
    return list(groups.values())


def _not_taken(backend: Backend, error: Exception) -> str:
    return f"backend {backend.name!r} was not taken: {said(error)}"


def said(error: Exception) -> str:
    """An error of this package in its own words; another one with its kind, since nobody meant it."""
    if isinstance(error, GraphpruneError):
        return str(error)
    return f"{described(error)} (a defect of the backend or of its runtime)"
