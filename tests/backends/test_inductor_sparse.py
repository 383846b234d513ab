"""Sparse products on a GPU: which linears become one, and that it is the same product.

cuSPARSELt needs a GPU; here its product is the dense one, on weights that are compressed to themselves, so
that shapes, padding and transposes are held to PyTorch's linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from graphprune.backends.inductor_sparse import compressed, two_of_four
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphprune
from benchmarks.backends import cuda
from graphprune.pipeline import Pipeline

HALVE = "half-precision{dtype=bfloat16}"
PRUNE = f"prune-weights{{pattern=2:4}},strip-masks,{HALVE}"


@pytest.fixture(scope="module", autouse=True)
def _dense_product() -> Iterator[None]:
    def product(
        a: torch.Tensor, b: torch.Tensor, bias: Any = None, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        assert b.shape[1] % 8 == 0, "cuSPARSELt takes rows in eights"
        found = a @ b
        return found if bias is None else found + bias[:, None]

    library = torch.library.Library("aten", "IMPL")
    library.impl("_cslt_sparse_mm", product, "CPU")
    yield
    library._destroy()


def lowered(model: nn.Module, x: torch.Tensor, passes: str = PRUNE, **options: Any) -> tuple[Any, Any, Any]:
    graph = Pipeline.parse(passes).run(graphprune.trace(model.eval(), x, **options)).graph
    work = graph.copy()
    return graph, work, compressed(work, compress=torch.clone)


def kinds(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


@settings(max_examples=20, deadline=None)
@given(shape=st.lists(st.integers(1, 9), min_size=1, max_size=3), bias=st.booleans())
def test_the_same_product_for_any_rows(shape: list[int], bias: bool) -> None:
    torch.manual_seed(0)
    graph, work, notes = lowered(nn.Linear(32, 48, bias=bias), torch.randn(*shape, 32))
    assert notes == ("weight: a sparse product, two of every four weights",)
    assert "aten.linear.default" not in kinds(work)
    assert kinds(work).count("aten._cslt_sparse_mm.default") == 1
    (wanted,), (found,) = graph.run(*graph.examples), work.run(*graph.examples)
    assert found.shape == wanted.shape
    assert torch.allclose(found, wanted, rtol=2e-2, atol=2e-2)


def test_what_does_not_fit_stays_dense_and_says_why() -> None:
    for model, passes, reason in (
        (nn.Linear(32, 40), PRUNE, "not multiples of 16"),
        (nn.Linear(32, 48), "prune-weights{pattern=2:4},strip-masks", "of half precision, and it is float32"),
    ):
        graph, work, notes = lowered(model, torch.randn(8, 32), passes)
        assert kinds(work) == kinds(graph)
        assert len(notes) == 1
        assert reason in notes[0]


def test_an_open_batch_stays_dense() -> None:
    _, work, (note,) = lowered(nn.Linear(32, 48), torch.randn(8, 32), dynamic_batch=True)
    assert "aten.linear.default" in kinds(work)
    assert "are open" in note


def test_dense_weights_are_none_of_it() -> None:
    graph, work, notes = lowered(nn.Linear(32, 48), torch.randn(8, 32), HALVE)
    assert (notes, kinds(work)) == ((), kinds(graph))


def test_a_weight_of_two_linears_is_compressed_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 32)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(self.layer(x))

    _, work, notes = lowered(Tied(), torch.randn(8, 32))
    assert len(notes) == 2
    assert [name for name in work.tensors if "two_of_four" in name] == ["layer.weight.two_of_four"]


@pytest.mark.parametrize(
    ("row", "fits"), [([1, 0, 2, 0], True), ([1, 1, 1, 0], False), ([0] * 4, True), ([1, 0], False)]
)
def test_the_pattern(row: list[float], fits: bool) -> None:
    assert two_of_four(torch.tensor([row], dtype=torch.float32)) is fits


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, and it would take minutes")
def test_the_benchmark_without_a_gpu_says_not_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.main([]) == 0
    assert capsys.readouterr().out == "not run: no NVIDIA GPU here\n"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no NVIDIA GPU here")
@pytest.mark.parametrize("ahead", [False, True])
def test_on_a_gpu(ahead: bool) -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64)).eval(), torch.randn(32, 64)
    options: dict[str, Any] = {"target": "cuda", "backend": "inductor", "measure": False}
    result = graphprune.optimize(model, x, pipeline=PRUNE, **options)
    assert any("sparse product" in note for note in result.report.notes)
    (wanted,) = result.graph.run(x)
    found = result(x) if ahead else result.compiled()(x)
    assert float((found - wanted).norm() / wanted.norm()) < 0.02
