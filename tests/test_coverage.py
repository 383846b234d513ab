"""Every network of the zoo can be halved: exactly, for the most part, and with a reason for what stays.

Two oracles: the certificate (the captured graph with every removed position zeroed), and the user's own
module in eager mode with slices of its parameters and buffers set to zero. By default a few networks of each
kind run; ``-m slow`` runs them all.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from torch import nn

import graphprune
from benchmarks.axes import coverage
from benchmarks.axes.zeroing import against_zeroed
from tests import zoo
from tests.zoo.network import NO_EXPORT, Network

# Model libraries warn about themselves while they are built or traced.
pytestmark = [pytest.mark.network, pytest.mark.filterwarnings("default")]

QUICK = (
    "tv_resnet18", "tv_shufflenet_v2_x0_5", "tv_mobilenet_v2", "tv_lraspp_mobilenet_v3_large",
    "timm_vit_tiny_patch16_224", "timm_dla46x_c", "timm_convnextv2_atto", "timm_test_nfnet",
    "hf_bert", "hf_gpt2", "hf_llama_grouped", "hf_t5_encoder", "hf_mixtral", "hf_wav2vec2",
    "real_minilm_l6",
)  # fmt: skip
ZOO = [n for n in zoo.networks() if NO_EXPORT not in n.tags]

VISIBLE, LOOKED_UP = "the caller sees it", "looked up by an index"


def require(network: Network) -> None:
    """Skip where a package the network needs is not installed."""
    for package in network.requires:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{network.name} needs {package}")


def check(network: Network) -> coverage.Row:
    """It is typed, halved on every exact axis, runs, and equals both zeroed originals."""
    require(network)
    row = coverage.examine(network)
    assert row.passed, f"differs from the zeroed graph by {row.error:.1e}"
    assert row.zeroed_passed is not False, f"differs from the zeroed module by {row.zeroed_error}"
    assert row.exact + row.statistical + row.frozen > 0
    assert not row.unruled, "operators without a rule"
    if row.exact:
        assert row.macs < 1
    if row.coverage < coverage.ENOUGH:
        assert row.reasons
        told = sum(float(r.split("%")[0]) for r in row.reasons) / 100
        assert told == pytest.approx(1 - row.coverage, abs=0.005), row.reasons
    return row


@pytest.mark.parametrize("name", QUICK)
def test_network_is_halved(name: str) -> None:
    check(zoo.get(name))


@pytest.mark.slow
@pytest.mark.parametrize("network", [n for n in ZOO if n.name not in QUICK], ids=lambda n: n.name)
def test_every_network_is_halved(network: Network) -> None:
    check(network)


def test_the_zoo_is_wide_enough() -> None:
    assert len({n.family for n in zoo.networks("timm")} - {""}) >= 55
    assert len({n.family for n in zoo.networks("transformers")}) >= 20
    assert len(zoo.networks("real")) >= 3


def test_an_encoder_that_returns_its_states_keeps_their_width() -> None:
    network = zoo.get("hf_bert")
    require(network)
    graph = graphprune.trace(network.build(), network.inputs(), network.kwargs())
    told = coverage.reasons(graph)
    assert graph.axes.coverage < coverage.ENOUGH
    assert any("word_embeddings" in r and LOOKED_UP in r and VISIBLE in r for r in told), told
    shares = sum(float(r.split("%")[0]) for r in told)
    assert shares == pytest.approx((1 - graph.axes.coverage) * 100, abs=0.3)


def test_reasons_name_exactly_what_stays() -> None:
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    graph = graphprune.trace(model, torch.zeros(1, 3))
    assert coverage.reasons(graph) == ["4.0% `2.bias`: dim 0 the caller sees it"]


class Wrong(nn.Module):
    """Two layers whose hidden width can go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.b(torch.sigmoid(self.a(x)))
        return out


@pytest.mark.parametrize("spoilt", [False, True])
def test_the_eager_oracle_can_fail(spoilt: bool) -> None:
    torch.manual_seed(0)
    model, x = Wrong().eval(), torch.randn(2, 5)
    graph = graphprune.trace(model, x)
    plan = graph.plan({"a.weight[0]": [1, 4]})
    small = graph.apply(plan)
    if spoilt:  # as if another position had been removed
        other: Any = graph.apply(graph.plan({"a.weight[0]": [1, 5]}))
        small = other
    certificate = against_zeroed(model, graph, plan, small, (x,), {})
    assert certificate is not None
    assert certificate.passed is not spoilt
