"""Telling a runtime's rounding from a runtime's mistake.

A deep float32 network may amplify rounding beyond any useful tolerance; a runtime that sums in another order
then differs from PyTorch by more than that, and neither is wrong. So where an artifact misses the tolerance,
both are compared with the same graph in float64: an artifact as close to it as PyTorch's own float32, up to a
factor of :data:`SLACK`, is as good an evaluation of the network.

A quantized graph rounds at every quantizer, one in half precision everywhere, and a number near the middle
between two may fall to either side in another order of summation; from there on they differ by whole steps.
It is compared with the float network behind the graph (:attr:`Graph.floating`): it may be off by
as much as the graph itself is, up to a factor of :data:`QUANTIZED_SLACK`, and by no more than that from the
graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from .graph import Graph
from .verify import Certificate, compare, in_float64, noise_ratio, require, runtime_equivalence

SLACK = 4.0
QUANTIZED_SLACK = 1.5  # in noise over signal; sums in another order change which numbers round up
CAP = 100.0  # times the tolerance; what PyTorch itself misses by more than that is no rounding


def proved(
    graph: Graph, run: Callable[..., Sequence[Any]], flat: Sequence[torch.Tensor], what: str
) -> Certificate:
    """Certificate 3 of something that runs ``graph``, on one call.

    Raises:
        VerificationError: it does not reproduce the graph, not even up to rounding; begins with ``what``.
    """
    certificate = runtime_equivalence(graph, run, [flat])
    if not certificate.passed:
        certificate = allow_rounding(certificate, graph, flat, run(*flat))
    return require(certificate, what)


def allow_rounding(
    certificate: Certificate, graph: Graph, call: Sequence[torch.Tensor], outputs: Sequence[Any]
) -> Certificate:
    """The certificate again, against float64, where it failed for the size of the error alone.

    Args:
        certificate: of ``outputs`` against what PyTorch computed.
        graph: float32; what both are evaluations of.
        call: the flat inputs.
        outputs: the artifact's flat outputs on them.
    """
    missed = certificate.exact and not certificate.passed and certificate.max_relative > certificate.tolerance
    if missed and graph.floating is not None:
        mine, truth = graph.run(*call), graph.floating.run(*call)
        return judged_by_steps(certificate, outputs, mine, truth, _format(graph))
    if not missed or any(t.dtype is torch.float64 for t in graph.tensors.values()):
        return certificate
    once = graph.run(*call)
    if not compare(certificate.kind, [graph.run(*call)], [once], tolerance=0.0).passed:
        reason = f"{certificate.reason}; the model draws random numbers, so no two runs agree: verify=False"
        return replace(certificate, reason=reason)
    return judged_in_float64(certificate, outputs, once, in_float64(graph).run(*widened(call)))


def judged_in_float64(
    certificate: Certificate, outputs: Sequence[Any], mine: Sequence[Any], truth: Sequence[Any]
) -> Certificate:
    """The certificate, with ``outputs`` held to the graph in float64 as PyTorch's own are.

    ``mine`` are those, ``truth`` is what the graph computes in float64.
    """
    eager = compare(certificate.kind, [mine], [truth], exact=False)
    limit = min(max(certificate.tolerance, SLACK * eager.max_relative), CAP * certificate.tolerance)
    again = compare(certificate.kind, [outputs], [truth], tolerance=limit)
    return replace(again, precision="float64")


def judged_by_steps(
    certificate: Certificate,
    outputs: Sequence[Any],
    mine: Sequence[Any],
    truth: Sequence[Any],
    what: str = "integers",
) -> Certificate:
    """The certificate, with ``outputs`` held to the noise that the rounded graph itself (``mine``) has.

    ``truth`` is what the network computes without rounding, ``what`` the numbers it is rounded to.
    """
    own, theirs, apart = (noise_ratio(a, b) for a, b in ((mine, truth), (outputs, truth), (outputs, mine)))
    limit = QUANTIZED_SLACK * own
    said = f"noise against float {theirs:.1e}, the graph's own {own:.1e}, between the two {apart:.1e}"
    if theirs <= limit and apart <= limit:
        return replace(certificate, passed=True, tolerance=limit, reason="", precision=f"{what}: {said}")
    return replace(certificate, reason=f"{certificate.reason}; {said}")


def _format(graph: Graph) -> str:
    """What a graph with a float network behind it computes in."""
    half = [t.dtype for t in graph.tensors.values() if t.dtype in (torch.bfloat16, torch.float16)]
    return str(half[0]).removeprefix("torch.") if half else "integers"


def widened(call: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Flat inputs in float64; integers stay."""
    return [x.double() if x.is_floating_point() else x for x in call]
