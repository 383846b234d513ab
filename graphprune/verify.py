"""Certificates: no rewrite is believed, each is compared with what it came from.

A float32 network may amplify its own rounding beyond any useful tolerance (Inception v3 with random
weights: 4e-4). So where an exact rewrite misses the tolerance, both graphs run once more in float64
on the weights as they are: what then differs is the rewrite.

Every comparison is relative to the largest magnitude of the reference output:
``max|a - b| / max|b|`` over each output tensor, the worst output counting. ``sqnr`` is
``10 log10(sum b² / sum (a - b)²)`` in dB, ``agreement`` the share of equal argmax along the last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from .errors import VerificationError
from .graph import Graph

if TYPE_CHECKING:
    from .plans.plan import Plan

# Relative tolerance of an exact rewrite by the outputs' precision.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Certificate:
    """What a comparison found.

    Attributes:
        kind: ``mask``, ``pass`` or ``runtime``.
        exact: whether the tolerance had to hold; otherwise the error is only recorded.
        passed: whether it held; a recorded one fails only on a wrong shape or outputs that are not finite.
        tolerance: the relative tolerance.
        max_relative, mean_relative: error relative to the largest reference magnitude.
        sqnr: signal to quantization-noise ratio, dB (``inf`` when equal).
        agreement: share of equal argmax over the last dimension, 0 to 1.
        samples: how many calls were compared.
        reason: why it did not pass, else empty.
        precision: the arithmetic compared in when it was not the graph's own, else empty.
    """

    kind: str
    exact: bool
    passed: bool
    tolerance: float
    max_relative: float
    mean_relative: float
    sqnr: float
    agreement: float
    samples: int
    reason: str = ""
    precision: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values; an infinite SQNR is ``None``."""
        values = asdict(self)
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}

    def __str__(self) -> str:
        verdict = ("exact" if self.exact else "recorded") if self.passed else "FAILED"
        detail = "; ".join(filter(None, (self.precision and f"computed in {self.precision}", self.reason)))
        return f"{verdict}, relative error {self.max_relative:.1e}" + (f" ({detail})" if detail else "")


def compare(
    kind: str,
    results: Sequence[Sequence[Any]],
    references: Sequence[Sequence[Any]],
    *,
    exact: bool = True,
    tolerance: float | None = None,
) -> Certificate:
    """A certificate for flat outputs of several calls against their references."""
    worst = total = count = 0.0
    signal = noise = same = places = 0.0
    reason, limit = "", 0.0
    for outputs, wanted in zip(results, references, strict=True):
        if len(outputs) != len(wanted):
            reason = reason or f"{len(outputs)} outputs instead of {len(wanted)}"
            continue
        for index, (output, reference) in enumerate(zip(outputs, wanted, strict=True)):
            if not isinstance(reference, torch.Tensor):
                if output != reference:
                    reason = reason or f"output {index} is {output!r} instead of {reference!r}"
                continue
            output = torch.as_tensor(output)
            if output.shape != reference.shape:
                reason = reason or (
                    f"output {index} has shape {tuple(output.shape)} instead of {tuple(reference.shape)}"
                )
                continue
            limit = max(limit, TOLERANCE.get(reference.dtype, 0.0))
            if not reference.numel():
                continue
            a, b = output.detach().cpu().to(torch.float64), reference.detach().cpu().to(torch.float64)
            finite = torch.isfinite(b)
            if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not bool(
                torch.isfinite(a[finite]).all()
            ):
                reason = reason or f"output {index} is not finite where the reference is"
                continue
            same += float((a.nan_to_num().argmax(-1) == b.nan_to_num().argmax(-1)).sum()) if b.dim() else 1.0
            places += b.numel() / b.shape[-1] if b.dim() else 1.0
            a, b = a[finite], b[finite]
            scale = float(b.abs().max()) if b.numel() else 0.0
            error = (a - b).abs() / (scale or 1.0)
            worst = max(worst, float(error.max()) if error.numel() else 0.0)
            total, count = total + float(error.sum()), count + error.numel()
            signal, noise = signal + float((b**2).sum()), noise + float(((a - b) ** 2).sum())
    limit = tolerance if tolerance is not None else (limit or TOLERANCE[torch.float32])
    if exact and not reason and worst > limit:
        reason = f"relative error {worst:.2e} is above {limit:.0e}"
    sqnr = math.inf if noise == 0 else 10 * math.log10(signal / noise) if signal else -math.inf
    return Certificate(kind, exact, not reason, limit, worst, total / count if count else 0.0, sqnr,
                       same / places if places else 1.0, len(references), reason)  # fmt: skip


def noise_ratio(results: Sequence[Any], references: Sequence[Any]) -> float:
    """``|a - b| / |b|`` over all floating outputs of one call, Euclidean norms; 0 where there are none."""
    noise = signal = 0.0
    for output, reference in zip(results, references, strict=True):
        if isinstance(reference, torch.Tensor) and reference.is_floating_point():
            a, b = torch.as_tensor(output).detach().double(), reference.detach().double()
            noise, signal = noise + float(((a - b) ** 2).sum()), signal + float((b**2).sum())
    return math.sqrt(noise / signal) if signal else math.sqrt(noise)


def pass_equivalence(
    before: Graph | Sequence[Sequence[Any]],
    after: Graph,
    inputs: Sequence[Sequence[torch.Tensor]] | None = None,
    *,
    exact: bool = True,
    tolerance: float | None = None,
) -> Certificate:
    """Certificate 2: the rewritten graph against the one it came from (or that one's outputs)."""
    calls = inputs or [after.examples]
    references = [before.run(*c) for c in calls] if isinstance(before, Graph) else before
    return compare("pass", [after.run(*c) for c in calls], references, exact=exact, tolerance=tolerance)


def settle_in_float64(
    certificate: Certificate,
    before: Graph,
    after: Graph,
    inputs: Sequence[Sequence[torch.Tensor]] | None = None,
) -> Certificate:
    """A failed certificate of an exact rewrite again, with the rounding of float32 out of the way.

    The tolerance stays: weights that were rounded after a fold still differ by that. A certificate that
    passed, or that failed for another reason than the size of the error, is returned as it is.
    """
    missed = certificate.exact and not certificate.passed and certificate.max_relative > certificate.tolerance
    if not missed or any(t.dtype is torch.float64 for t in before.tensors.values()):
        return certificate
    calls = [[_widen(x) for x in call] for call in inputs or [after.examples]]
    references = [in_float64(before).run(*call) for call in calls]
    results = [in_float64(after).run(*call) for call in calls]
    again = compare(certificate.kind, results, references, tolerance=certificate.tolerance)
    return replace(again, precision="float64")


def in_float64(graph: Graph) -> Graph:
    """The same graph computing in float64, for running only: its shapes are not derived again."""
    wide = graph.copy()
    wide.tensors = {name: _widen(tensor.detach()) for name, tensor in graph.tensors.items()}
    wide.examples = tuple(_widen(example) for example in graph.examples)
    for node in wide.fx.nodes:
        if node.op == "call_function":
            node.args, node.kwargs = tree_map(_widen, (node.args, dict(node.kwargs)))
    return wide


def _widen(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value.is_floating_point else value
    if isinstance(value, torch.Tensor):
        return value.to(torch.float64) if value.is_floating_point() else value
    return value


def runtime_equivalence(
    graph: Graph,
    runner: Callable[..., Sequence[Any]],
    inputs: Sequence[Sequence[torch.Tensor]] | None = None,
    *,
    tolerance: float | None = None,
) -> Certificate:
    """Certificate 3: the lowered artifact (``runner(*flat) -> flat``) against its graph."""
    calls = inputs or [graph.examples]
    return compare(
        "runtime", [runner(*c) for c in calls], [graph.run(*c) for c in calls], tolerance=tolerance
    )


def require(certificate: Certificate, what: str) -> Certificate:
    """The certificate, if it passed.

    Raises:
        VerificationError: it did not; says what failed and by how much.
    """
    if not certificate.passed:
        raise VerificationError(f"{what}: {certificate.reason}")
    return certificate


def mask_equivalence(
    graph: Graph,
    plan: Plan,
    inputs: Sequence[Sequence[torch.Tensor]] | None = None,
    *,
    pruned: Graph | None = None,
    tolerance: float | None = None,
) -> Certificate:
    """Certificate 1: the pruned network against the original with every removed position zeroed.

    The original runs operator by operator; the removed positions of every parameter and of every
    value are set to zero as they are produced. That uses the axes' types but nothing of the rewrite.
    A plan that touches a statistical axis is recorded, not required to match.

    Args:
        graph: the original.
        plan: what is removed.
        inputs: flat inputs of the calls to compare (default: the graph's examples).
        pruned: the rewritten graph, if it was made already.
        tolerance: relative; by default that of the outputs' precision.
    """
    from .plans.masking import run_masked
    from .plans.rewrite import apply_plan

    small = pruned if pruned is not None else apply_plan(graph, plan)
    calls = inputs or [graph.examples]
    exact = all(graph.axes[name].kind == "exact" for name in plan.removed)
    return compare("mask", [small.run(*c) for c in calls], [run_masked(graph, plan, c) for c in calls],
                   exact=exact, tolerance=tolerance)  # fmt: skip
