"""Telling a runtime's rounding from a runtime's mistake.

A deep float32 network may amplify rounding beyond any useful tolerance; a runtime that sums in another order
then differs from PyTorch by more than that, and neither is wrong. So where an artifact misses the tolerance,
both are compared with the same graph in float64: an artifact as close to it as PyTorch's own float32, up to a
factor of :data:`SLACK`, is as good an evaluation of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from .graph import Graph
from .verify import Certificate, compare, in_float64

SLACK = 4.0
CAP = 100.0  # times the tolerance; what PyTorch itself misses by more than that is no rounding


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
    if not missed or any(t.dtype is torch.float64 for t in graph.tensors.values()):
        return certificate
    once = graph.run(*call)
    if not compare(certificate.kind, [graph.run(*call)], [once], tolerance=0.0).passed:
        reason = f"{certificate.reason}; the model draws random numbers, so no two runs agree: verify=False"
        return replace(certificate, reason=reason)
    wide = [x.double() if x.is_floating_point() else x for x in call]
    truth = [in_float64(graph).run(*wide)]
    eager = compare(certificate.kind, [once], truth, exact=False)
    limit = min(max(certificate.tolerance, SLACK * eager.max_relative), CAP * certificate.tolerance)
    again = compare(certificate.kind, [outputs], truth, tolerance=limit)
    return replace(again, precision="float64")
