"""``optimize``: capture, rewrite, prove, lower and measure a model in one call.

Without data and without a pipeline it is lossless:

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Dropout(), torch.nn.ReLU())
>>> result = graphprune.optimize(model, torch.ones(1, 4), target="cpu", measure=False)
>>> bool(torch.allclose(result(torch.ones(1, 4)), model.eval()(torch.ones(1, 4)), atol=1e-6))
True
>>> result.report.certificates["artifact against original"].passed
True
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, overload

import torch

from .building import Builder
from .calibration import replayed
from .cost import cost
from .graph import Graph, clone_tensor
from .instruments import Recorder
from .lowering import Calls, Deployment, candidates, flat_calls
from .measured import kept, latency_of, not_measured, slower_in_integers
from .original import Original, at
from .pipeline import Context, Pipeline
from .plans.plan import Plan
from .precision import around
from .pruning import Pruning, planned
from .report import AuditSummary, Report
from .result import Result
from .target import Target, get
from .threads import checked
from .verify import Certificate, compare, require

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Options(TypedDict, total=False):
    """The keyword arguments of :func:`optimize` for type checkers, but for ``dry_run``."""

    example_kwargs: Mapping[str, Any] | None
    target: str | Target
    calibration: Iterable[Any] | None
    evaluate: Callable[[Any], float] | None
    macs: float | None
    params: float | None
    bytes: float | None
    latency: float | str | None
    importance: Any
    repair: bool
    steps: int
    schedule: str
    callback: Callable[[Any, int], Any] | None
    precision: str | None
    max_drop: float | None
    allow_float: bool
    dynamic_batch: bool
    pipeline: str | Pipeline | None
    backend: str
    verify: bool
    measure: bool
    threads: int | None
    rounds: int
    seed: int
    progress: Callable[[str], None] | None
    dump: str | Path | None


Model = torch.nn.Module | torch.export.ExportedProgram


@overload
def optimize(
    model: Model, example_inputs: Any = ..., *, dry_run: Literal[True], **options: Unpack[Options]
) -> Plan: ...


@overload
def optimize(
    model: Model, example_inputs: Any = ..., *, dry_run: Literal[False] = False, **options: Unpack[Options]
) -> Result: ...


def optimize(
    model: Model,
    example_inputs: Any = None,
    *,
    example_kwargs: Mapping[str, Any] | None = None,
    target: str | Target = "cpu",
    calibration: Iterable[Any] | None = None,
    evaluate: Callable[[Any], float] | None = None,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency: float | str | None = None,
    importance: Any = "auto",
    repair: bool = True,
    steps: int = 1,
    schedule: str = "polynomial",
    callback: Callable[[Any, int], Any] | None = None,
    precision: str | None = None,
    max_drop: float | None = None,
    allow_float: bool = False,
    dry_run: bool = False,
    dynamic_batch: bool = False,
    pipeline: str | Pipeline | None = None,
    backend: str = "auto",
    verify: bool = True,
    measure: bool = True,
    threads: int | None = None,
    rounds: int = 20,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
    dump: str | Path | None = None,
) -> Result | Plan:
    """Optimise a finished model for a target; the model itself is never changed.

    Args:
        model: a module in any mode, ``result.module`` of an earlier call, or an exported program.
        example_inputs: a tensor, or a tuple of positional arguments, or a mapping of keyword arguments;
            inferred where neither these nor ``example_kwargs`` are given.
        example_kwargs: keyword arguments of the example call.
        target: a name (``cpu``, ``x86``, ``arm``, ``cuda``) or a :class:`Target`.
        calibration: any iterable of inputs, for passes that need data.
        evaluate: ``module -> float``, larger is better, for passes that search.
        macs, params, bytes: budgets, each a fraction of what the model has (a float up to 1.0) or an
            absolute number. With one, ``prune-channels`` and ``repair`` run before the lossless pipeline, and
            the outputs change; by how much is in the report.
        latency: a budget measured on this host instead: a fraction of the unpruned artifact's, or a time
            (``"5ms"``).
        importance: what ``prune-channels`` ranks positions by (:mod:`graphprune.importance`).
        repair: refit what is left to what the model computed, without training; on ``calibration``, or
            without it by what batch norms say.
        steps: reach the budget in so many rounds of pruning, repair and ``callback``.
        schedule: ``constant``, ``linear``, ``polynomial`` or ``exponential``; see
            :mod:`graphprune.plans.schedule`.
        callback: ``(module, step) -> anything``, the caller's training after each step, from 1.
        precision: ``int8``, ``int8-dynamic``, ``int8-weights``, ``int4-weights``, ``bfloat16`` or
            ``float16``, after any pruning; ``int8+bfloat16`` lets the runtime compute in bfloat16 what is
            left in float (:mod:`graphprune.precision`). ``None`` keeps the model's.
        max_drop: with ``evaluate``, how much of its score may be lost (0.01 is one point of an accuracy);
            what costs more in int8 stays in float.
        allow_float: do not fail where the runtime computes in float what the graph has in integers.
        dry_run: change nothing and return the :class:`Plan` of what would go in the last step's budget.
        dynamic_batch: keep the batch size open; proved at batch 1 and 7.
        pipeline: passes as text or as a :class:`Pipeline`; ``None`` is the lossless one, ``LOSSLESS``.
        backend: a backend's name, several with commas between them, or ``auto`` for all that are installed;
            of several the fastest is kept, measured in turns on this host. Without measuring, ``auto`` is the
            target's default.
        verify: compare capture, every pass and the artifact with what they came from.
        measure: measure latency where the target is this host.
        threads: of the runtime; ``None`` is its default.
        rounds: how many times original and artifact are called in turn to measure them.
        seed: for passes that draw random numbers.
        progress: called with one line of text as each stage starts.
        dump: a directory for the text of the graph after every pass.

    Raises:
        InputError: the model, its inputs or an option cannot be used as given.
        CaptureError: ``torch.export`` cannot follow the model.
        PassError: a pass stands in an impossible place, or fails.
        VerificationError: something on the way does not reproduce the original.
        BackendError: the runtime cannot lower the graph.
    """
    goal, threads = get(target), checked(threads)
    if around(precision) != "float32":
        goal = replace(goal, floats=around(precision))
    pruning = Pruning(
        {"macs": macs, "params": params, "bytes": bytes, "latency": latency},
        importance, repair, steps, schedule, callback, precision, max_drop,
    )  # fmt: skip
    calibration = replayed(calibration)
    passes = pruning.pipeline(pipeline)
    passes.check()
    measured = measure and goal.runs_here
    tried = candidates(backend, goal, several=measured)
    say = progress or (lambda line: None)
    with _random_state(seed):
        say("capture")
        original = Original.of(model, example_inputs, example_kwargs, dynamic_batch)
        graph = original.graph
        calls = flat_calls(graph, original.calls(dynamic_batch))
        references = original.outputs(dynamic_batch) if verify else {}
        certificates = _captured(graph, calls, references)
        context = Context(goal, calibration, evaluate, seed, backend, threads, progress)
        if dry_run:
            return planned(passes, graph, context, [Recorder(verify, list(calls.values()), progress)])
        builder = Builder(
            pruning.pipeline(pipeline, graph), graph, context, calls, references, verify, allow_float, say,
            None if dump is None else Path(dump),
        )  # fmt: skip
        built = builder.build(tried)
        chosen, contestants, lost = kept(built, next(iter(calls.values())), measured, threads, rounds, say)
        final, deployment = chosen.final, chosen.deployment
        certificates |= chosen.certificates
        timing = latency_of(original, deployment, final.graph.floating, measure, threads, rounds, say)
    report = Report(
        model=original.name,
        target=deployment.target,
        backend=chosen.name,
        pipeline=str(builder.passes),
        inputs=deployment.lowered.inputs,
        outputs=deployment.lowered.outputs,
        example_source=original.source,
        original=cost(graph),
        final=cost(final.graph),
        passes=chosen.records,
        certificates=certificates,
        audit=None if chosen.audit is None else AuditSummary.of(chosen.audit),
        files={name: len(content) for name, content in deployment.lowered.files.items()},
        latency=timing,
        contestants=contestants,
        versions={"python": platform.python_version(), **deployment.lowered.versions},
        notes=(
            *graph.notes,
            *deployment.lowered.notes,
            *deployment.notes,
            *_runner_notes(deployment),
            *builder.refused,
            *lost,
            *not_measured(backend, measured, chosen.name, goal),
            *_vacuous(references),
            *slower_in_integers(timing),
            *_switched_off(verify),
        ),
    )
    lowered, trainable = _owned(final.graph, final.trainable, captured=graph)
    if final.graph is final.trainable:
        lowered = trainable
    return Result(lowered, trainable, deployment, report)


def _runner_notes(deployment: Deployment) -> tuple[str, ...]:
    return tuple(getattr(deployment.runner, "notes", ()))


def _vacuous(references: Calls) -> tuple[str, ...]:
    """Outputs that a comparison says nothing about (a freshly initialised head may be zero)."""
    flat = [list(outputs) for outputs in references.values()]
    return tuple(
        f"output {index} is zero everywhere on the example inputs, so comparing it proves nothing"
        for index, values in enumerate(zip(*flat, strict=True))
        if all(isinstance(v, torch.Tensor) and v.numel() and not v.any() for v in values)
    )


def _switched_off(verify: bool) -> tuple[str, ...]:
    return () if verify else ("verification was switched off: nothing here is proved",)


@contextmanager
def _random_state(seed: int) -> Iterator[None]:
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


def _captured(graph: Graph, calls: Calls, references: Calls) -> dict[str, Certificate]:
    """The graph against the model it was captured from, before anything is rewritten."""
    certificates = {}
    for title, wanted in references.items():
        certificate = compare("capture", [graph.run(*calls[title])], [wanted])
        what = "the captured graph does not reproduce the model"
        certificates[f"capture against original{at(title)}"] = require(certificate, what)
    return certificates


def _owned(*graphs: Graph, captured: Graph) -> list[Graph]:
    """The graphs with tensors of their own where they share memory with the caller's model."""
    theirs = {t.untyped_storage().data_ptr() for t in captured.tensors.values()}
    copies: dict[int, torch.Tensor] = {}
    owned = []
    for graph in graphs:
        twin = graph.copy()
        for name, value in graph.tensors.items():
            if value.untyped_storage().data_ptr() in theirs:
                twin.tensors[name] = copies.setdefault(id(value), clone_tensor(value))
        owned.append(twin)
    return owned
