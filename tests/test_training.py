"""Dropout of attention weights comes back in training mode, or the graph says that it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import graphprune


class Attends(nn.Module):
    """Attention whose dropout probability is an attribute called ``name``."""

    def __init__(self, name: str, value: object) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        setattr(self, name, value)
        self.name = name

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = getattr(self, self.name)
        p = held.p if isinstance(held, nn.Dropout) else held
        q, k, v = self.qkv(x).unsqueeze(1).chunk(3, -1)
        return F.scaled_dot_product_attention(q, k, v, dropout_p=p if self.training else 0.0)


@pytest.mark.parametrize(("name", "value"), [("attention_dropout", 0.5), ("attn_drop", nn.Dropout(0.5))])
def test_attention_dropout_follows_the_mode(name: str, value: object) -> None:
    x = torch.randn(2, 5, 8)
    original = nn.Sequential(Attends(name, value))
    graph = graphprune.trace(original, x)
    assert graph.notes == ()
    torch.manual_seed(1)
    wanted = original.train()(x)
    torch.manual_seed(1)
    torch.testing.assert_close(graph.module.train()(x), wanted)
    torch.testing.assert_close(graph.module.eval()(x), original.eval()(x))


def test_a_probability_of_another_name_is_said_in_a_note() -> None:
    graph = graphprune.trace(nn.Sequential(Attends("my_drop_rate", 0.25)), torch.randn(2, 5, 8))
    assert len(graph.notes) == 1
    assert "attention in 0 may drop out" in graph.notes[0]
