"""Padding is not fitted: what no output depends on has no say in the weights."""

from __future__ import annotations

import torch
from graphprune.passes.repair import repair
from graphprune.passes.repair.relevance import relevance
from torch import nn
from torch.nn import functional as F

import graphprune
from graphprune.calibration import read


class Encoder(nn.Module):
    """One attention and a feed-forward layer over tokens; the mean of those that the mask keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(20, 8)
        self.qkv = nn.Linear(8, 24)
        self.inner, self.outer = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, tokens: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.table(tokens)
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        x = x + F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :]).squeeze(1)
        x = x + self.outer(torch.relu(self.inner(x)))
        kept = mask.unsqueeze(-1).to(x.dtype)
        return (x * kept).sum(1) / kept.sum(1)


def batches(padding: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of 12 sentences, 6 tokens of 10 each; padded with token ``padding``."""
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(10) < 6).expand(12, 10)
    return [
        (torch.where(mask, torch.randint(1, 19, (12, 10), generator=generator), padding), mask)
        for _ in range(2)
    ]


def test_the_padding_decides_nothing() -> None:
    torch.manual_seed(0)
    model = Encoder().eval()
    graph = graphprune.trace(model, batches(0)[0], dynamic_batch=True)
    plan = graph.plan({"inner.weight[0]": range(20)})
    found = [repair(graph, graph.apply(plan), plan, batches(padding)) for padding in (0, 19)]
    for name in ("outer.weight", "outer.bias"):
        first, second = (result.graph.tensors[name] for result in found)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)
    record = next(r for r in found[0].records if r.nodes == ("linear_2",))
    assert record.samples == 2 * 12 * 6


def test_masks_are_where_the_output_is_flat_and_images_have_none() -> None:
    torch.manual_seed(0)
    graph = graphprune.trace(Encoder().eval(), batches(0)[0], dynamic_batch=True)
    masks = relevance(graph, read(graph, batches(0), 64).calls, seed=0)
    assert [mask.squeeze(-1).tolist() for mask in masks["linear_2"]] == [batches(0)[0][1].tolist()] * 2
    plain = graphprune.trace(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(2, 4))
    assert relevance(plain, [(torch.zeros(2, 4),)], seed=0) == {}
