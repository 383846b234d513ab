"""What repair without training gives back: a small residual network on 5,000 handwritten digits.

    python -m benchmarks.pruning.repair_demo

Trains for half a minute (one core), prunes every axis by plain L2 magnitude until half, a quarter and an
eighth of the multiply-accumulates are left, and prints the accuracy on 1,000 held-out digits: before,
after pruning, after the repair without data, and after the repair with 256 images without their labels.
No weight is trained after pruning.
"""

from __future__ import annotations

import argparse
import time

import torch
from graphprune.passes.repair import repair
from torch import nn
from torch.nn import functional as F

import graphprune
from benchmarks.pruning.data import digits
from benchmarks.pruning.networks import Residual
from graphprune.cost import cost
from graphprune.graph import Graph
from graphprune.plans.plan import Plan


def network() -> nn.Sequential:
    """Five residual blocks, 16 to 64 channels."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(),
        Residual(16, 16, 1), Residual(16, 32, 2), Residual(32, 32, 1), Residual(32, 64, 2),
        Residual(64, 64, 1),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> None:
    """One-cycle SGD with shifts by up to two pixels."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    steps = epochs * (len(images) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - 63, 64):
            batch = order[start : start + 64]
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(model(images[batch].roll(shift, (2, 3))), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    model.eval()


def accuracy(graph: Graph, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of right answers, 0 to 1."""
    return float((graph(images).argmax(1) == labels).float().mean())


def plan_for(graph: Graph, share: float) -> Plan:
    """The plan of the smallest ratio that leaves at most ``share`` of the MACs."""
    for percent in range(1, 100):
        plan = graph.plan(ratio=percent / 100)
        if plan.after["macs"] <= share * plan.before["macs"]:
            return plan
    raise SystemExit(f"no ratio leaves {share:.0%} of the MACs")


def main() -> None:
    """Print the table."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--epochs", type=int, default=12)
    options.add_argument("--images", type=int, default=256, help="calibration images, without labels")
    given = options.parse_args()
    torch.manual_seed(0)
    images, labels = digits()
    model, started = network(), time.perf_counter()
    train(model, images[:4000], labels[:4000], given.epochs)
    graph = graphprune.trace(model, images[:2], dynamic_batch=True)
    held_out = images[4000:], labels[4000:]
    print(f"trained in {time.perf_counter() - started:.0f} s: {accuracy(graph, *held_out):.1%}, "
          f"{cost(graph).macs / 2:,.0f} MACs an image")  # fmt: skip
    print("MACs      pruned  without data  repaired   seconds")
    calibration = list(images[: given.images].split(64))
    for share in (1 / 2, 1 / 4, 1 / 8):
        plan = plan_for(graph, share)
        small = graph.apply(plan)
        row = [accuracy(small, *held_out)]
        row.append(accuracy(repair(graph, small, plan, None).graph, *held_out))
        started = time.perf_counter()
        repaired = repair(graph, small, plan, calibration)
        seconds = time.perf_counter() - started
        row.append(accuracy(repaired.graph, *held_out))
        fewer = plan.before["macs"] / plan.after["macs"]
        print(f"÷ {fewer:4.2f}  {row[0]:8.1%}  {row[1]:12.1%}  {row[2]:8.1%}  {seconds:8.1f}")


if __name__ == "__main__":
    main()
