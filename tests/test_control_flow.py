"""``torch.cond``, the way to keep a decision in a model, through capture, plans, passes and the artifact."""

from __future__ import annotations

import torch
from torch import nn

import graphprune


class Decides(nn.Module):
    """One of two branches by the sign of a sum; one branch has weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.inner, self.leave = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.enter(x)
        h = torch.cond(h.sum() > 0, lambda h: torch.relu(self.inner(h)), lambda h: h * 2, (h,))
        return self.head(self.leave(h))


def both_sides(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs that take either branch."""
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    sides = [bool(model.enter(v).sum() > 0) for v in (x, -x)]
    assert sides[0] != sides[1]
    return x, -x


@torch.no_grad()
def test_both_branches_survive_capture_plan_and_artifact() -> None:
    torch.manual_seed(0)
    model = Decides().eval()
    nn.init.zeros_(model.enter.bias)
    graph = graphprune.trace(model, torch.ones(3, 4))
    plan = graph.plan(ratio=0.5)
    small = graph.apply(plan)
    result = graphprune.optimize(model, torch.ones(3, 4), measure=False)
    for x in both_sides(model):
        wanted = model(x)
        torch.testing.assert_close(graph(x), wanted)
        torch.testing.assert_close(graph.module(x), wanted)
        torch.testing.assert_close(result(x), wanted, atol=1e-5, rtol=1e-5)
        certificate = graphprune.verify.mask_equivalence(graph, plan, [[x]], pruned=small)
        assert certificate.passed
        assert certificate.exact


def test_what_a_branch_touches_is_frozen_and_the_rest_is_not() -> None:
    graph = graphprune.trace(Decides(), torch.ones(3, 4))
    assert [axis.name for axis in graph.axes.prunable] == ["leave.weight[0]"]
    assert "cond" in graph.axes["inner.weight[0]"].reason
    assert graph.axes.unruled == {"cond": 1}
