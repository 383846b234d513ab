"""Certificates: what they measure, and what makes them fail."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from graphprune.errors import VerificationError
from graphprune.verify import compare, in_float64, pass_equivalence, require, runtime_equivalence

T = torch.tensor


def one(output: Any, reference: Any, **options: Any) -> Any:
    return compare("pass", [(output,)], [(reference,)], **options)


def test_the_numbers() -> None:
    certificate = one(T([[1.0, 2.0, 4.5]]), T([[1.0, 2.0, 4.0]]), exact=False)
    assert certificate.max_relative == pytest.approx(0.5 / 4)
    assert certificate.mean_relative == pytest.approx(0.5 / 4 / 3)
    assert certificate.sqnr == pytest.approx(10 * math.log10(21 / 0.25))
    assert certificate.agreement == 1
    assert certificate.samples == 1
    assert certificate.passed


def test_agreement_counts_equal_argmax() -> None:
    certificate = one(T([[1.0, 0.0], [1.0, 0.0]]), T([[1.0, 0.0], [0.0, 1.0]]), exact=False)
    assert certificate.agreement == 0.5


def test_the_worst_output_of_all_calls_counts() -> None:
    fine, off = T([1.0, 1.0]), T([1.0, 1.2])
    certificate = compare("pass", [(fine, fine), (fine, off)], [(fine, fine), (fine, fine)], exact=False)
    assert certificate.max_relative == pytest.approx(0.2)
    assert certificate.samples == 2


@pytest.mark.parametrize(
    ("dtype", "limit"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)],
)
def test_the_tolerance_follows_the_precision(dtype: torch.dtype, limit: float) -> None:
    reference = torch.ones(4, dtype=dtype)
    assert one(reference, reference).tolerance == limit
    wide = torch.ones(4, dtype=torch.float64)
    assert one(wide * (1 + limit / 2), reference).passed
    failed = one(wide * (1 + limit * 2), reference)
    assert not failed.passed
    assert "is above" in failed.reason


def test_another_tolerance() -> None:
    assert not one(T([1.01]), T([1.0])).passed
    assert one(T([1.01]), T([1.0]), tolerance=0.1).passed


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize(
    ("output", "reference", "reason"),
    [
        (T([[1.0]]), T([1.0]), r"output 0 has shape \(1, 1\) instead of \(1,\)"),
        (T([float("nan")]), T([1.0]), "output 0 is not finite where the reference is"),
        (T([float("inf")]), T([1.0]), "not finite"),
        (T([1.0]), T([float("inf")]), "not finite"),
        (T([float("-inf")]), T([float("inf")]), "not finite"),
        (3, 4, "output 0 is 3 instead of 4"),
        (T([1.0]), None, "instead of None"),
    ],
)
def test_what_fails_even_when_only_recorded(output: Any, reference: Any, reason: str, exact: bool) -> None:
    certificate = one(output, reference, exact=exact)
    assert not certificate.passed
    with pytest.raises(VerificationError, match=f"the fold: .*{reason}"):
        require(certificate, "the fold")


def test_infinities_that_agree_are_fine() -> None:
    mask = T([float("-inf"), 1.0, float("nan")])
    certificate = one(mask.clone(), mask)
    assert certificate.passed
    assert certificate.sqnr == math.inf


def test_another_number_of_outputs() -> None:
    certificate = compare("pass", [(T([1.0]),)], [(T([1.0]), T([2.0]))])
    assert certificate.reason == "1 outputs instead of 2"


def test_integers_and_booleans_must_be_equal() -> None:
    assert one(T([1, 2]), T([1, 2])).passed
    assert not one(T([1, 3]), T([1, 2])).passed
    assert not one(T([True]), T([False])).passed


def test_empty_and_zero_outputs() -> None:
    assert one(torch.zeros(0, 3), torch.zeros(0, 3)).passed
    assert one(torch.zeros(3), torch.zeros(3)).passed
    assert not one(torch.ones(3), torch.zeros(3)).passed
    assert one(T(1.0), T(1.0)).passed


def test_json_holds_no_infinity() -> None:
    values = one(T([1.0]), T([1.0])).to_json()
    assert values["sqnr"] is None
    assert json.loads(json.dumps(values, allow_nan=False))["passed"] is True


def test_graphs_against_graphs_and_runners() -> None:
    torch.manual_seed(0)
    graph = graphprune.trace(nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3))
    other = graph.copy()
    other.set_tensor("0.bias", graph.tensors["0.bias"].detach() + 1)
    assert pass_equivalence(graph, graph.copy()).passed
    assert not pass_equivalence(graph, other).passed
    calls = [(torch.randn(4, 3),), (torch.randn(4, 3),)]
    assert runtime_equivalence(graph, lambda x: graph.run(x), calls).samples == 2
    assert not runtime_equivalence(graph, lambda x: other.run(x), calls).passed


def test_a_graph_in_float64_computes_in_float64_throughout() -> None:
    class Casts(nn.Module):
        index: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)
            self.register_buffer("index", torch.tensor([1, 0]))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.linear(x.half().to(torch.float32))
            return x[:, self.index] + torch.zeros(2, dtype=torch.bfloat16).float()

    graph = graphprune.trace(Casts(), torch.randn(4, 3))
    wide = in_float64(graph)
    (found,) = wide.run()
    assert found.dtype == torch.float64
    weight, bias = (graph.tensors[f"linear.{n}"].detach().double() for n in ("weight", "bias"))
    wanted = (graph.examples[0].double() @ weight.T + bias)[:, [1, 0]]
    torch.testing.assert_close(found, wanted)
    assert graph.run()[0].dtype == torch.float32, "the graph itself stays"
