"""One counter of multiply-accumulates for every method, and a search for the ratio that meets a budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import graphprune
from graphprune.cost import cost
from graphprune.graph import Graph

Found = TypeVar("Found")
GIVE_UP = 3  # ratios that fail before one succeeds


def trace(model: nn.Module, example: tuple[Tensor, ...]) -> Graph:
    """The graph of a network with an open batch."""
    return graphprune.trace(model, example if len(example) > 1 else example[0], dynamic_batch=True)


def graph_macs(graph: Graph, example: tuple[Tensor, ...]) -> float:
    """Multiply-accumulates an input: what every table here counts."""
    return cost(graph).macs / len(example[0])


def quick_macs(model: nn.Module, example: tuple[Tensor, ...]) -> float:
    """The same, counted while the network runs: many times faster than tracing, to search with."""
    # fused attention on a processor passes the counter by
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*example)
    return counter.get_total_flops() / 2 / len(example[0])


def least(
    attempt: Callable[[float], tuple[float, Found]], limit: float, low: float = 0.0, steps: int = 9
) -> tuple[float, Found]:
    """A ratio and its result, the smallest in [low, 1) that costs at most ``limit``, by bisection.

    The search ends early within 1 % of the limit.

    Args:
        attempt: ratio → cost and result.
        limit: of the cost.
        low: a ratio that is too small.
        steps: bisections at most.

    Raises:
        ValueError: no ratio that was tried meets the limit, with the first reason why one could not be.
    """
    high = 1.0
    best: tuple[float, Found] | None = None
    failures: list[Exception] = []
    for _ in range(steps):
        ratio = (low + high) / 2
        try:
            cost_of_it, found = attempt(ratio)
        except (ValueError, RuntimeError, IndexError, ZeroDivisionError) as error:  # maybe too much was asked
            failures.append(error)
            high = ratio
            if len(failures) == GIVE_UP and best is None:
                break
            continue
        if cost_of_it <= limit:
            best, high = (ratio, found), ratio
            if cost_of_it >= 0.99 * limit:
                break
        else:
            low = ratio
    if best is None:
        reason = f": {type(failures[0]).__name__}: {first_line(failures[0])}" if failures else ""
        raise ValueError(f"no ratio meets the budget{reason}")
    return best


def first_line(error: BaseException) -> str:
    """The beginning of an error's message."""
    return (str(error).strip() or "?").splitlines()[0][:120]


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
