"""One counter of multiply-accumulates for every method, and a search for the ratio that meets a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import graphprune
from graphprune.cost import cost
from graphprune.graph import Graph

Found = TypeVar("Found")


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """The graph of a network with an open batch."""
    return graphprune.trace(model, example if len(example) > 1 else example[0], dynamic_batch=True)


def graph_macs(graph: Graph, example: tuple[Tensor, ...]) -> float:
    """Multiply-accumulates an input: what every table here counts."""
    return cost(graph).macs / len(example[0])


def quick_macs(model: nn.Module, example: tuple[Tensor, ...]) -> float:
    """The same, counted while the network runs: many times faster than tracing, to search with."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example)
    return counter.get_total_flops() / 2 / len(example[0])


def least(
    attempt: Callable[[float], tuple[float, Found]], limit: float, steps: int = 9
) -> tuple[float, Found]:
    """The result of the smallest ratio in [0, 1) whose cost is at most ``limit``.

    Args:
        attempt: ratio → cost and result.
        limit: of the cost.
        steps: bisections.

    Raises:
        ValueError: no ratio that was tried meets the limit.
    """
    low, high = 0.0, 1.0
    best: tuple[float, Found] | None = None
    failure: Exception | None = None
    for _ in range(steps):
        ratio = (low + high) / 2
        try:
            found = attempt(ratio)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:  # too much was asked
            failure, high = error, ratio
            continue
        if found[0] <= limit:
            best, high = found, ratio
        else:
            low = ratio
    if best is None:
        reason = f": {type(failure).__name__}: {str(failure).splitlines()[0]}" if failure else ""
        raise ValueError(f"no ratio meets the budget{reason}")
    return best


def recalibrated(model: nn.Module, batches: list[Any], passes: int = 1) -> nn.Module:
    """The network with the statistics of its batch norms taken anew over the batches; changed in place.

    Means over all batches (``momentum=None``), as :func:`torch.optim.swa_utils.update_bn` takes them.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return model
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    with torch.no_grad():
        for batch in batches * passes:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()
