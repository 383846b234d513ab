"""Every method on one network of one seed: same weights, same calibration, same test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from benchmarks.pruning import networks, ours, peers, real, training, with_kirigami, with_torch_pruning
from benchmarks.pruning.attach import Detached
from benchmarks.pruning.data import split
from benchmarks.pruning.measure import first_line, graph_macs, recalibrated, trace
from graphprune.errors import GraphpruneError
from graphprune.graph import Graph

OURS = "graphprune"
LIBRARIES = (OURS, "torch-pruning", "torch-kirigami")
ALONE, RECALIBRATED, REPAIRED = "alone", "BN recalibrated", "our repair"
# Shares of the multiply-accumulates that are left.
BUDGETS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("resnet20", "vgg", "mobilenetv2"), (1 / 2, 1 / 4, 1 / 8)),
    "vit": (0.65, 1 / 2, 1 / 4, 1 / 8),
    **dict.fromkeys(("crepe-tiny", "crepe-full"), (1 / 2, 1 / 4)),
    **dict.fromkeys(("efficientnet-lite0", "minilm-l6"), (0.85, 0.75, 0.5)),
}
NAMES = tuple(BUDGETS)
REPAIRS = 2  # of a library's variants, the best ones on this seed get our repair


@dataclass(frozen=True)
class Result:
    """One method on one network at one budget; the original itself where the budget is 1.

    Attributes:
        share: of the original's multiply-accumulates, asked for.
        treatment: what was done after pruning.
        reached: the share that was left, by our counter.
        metrics: figures on the held-out inputs; the first is the score. Empty where it failed.
        failure: why there are none.
        seconds: of pruning and what came after, without the test.
    """

    network: str
    seed: int
    share: float
    library: str
    variant: str
    treatment: str
    reached: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    failure: str = ""
    seconds: float = 0.0

    @property
    def score(self) -> float | None:
        """The first of the metrics."""
        return next(iter(self.metrics.values()), None)


def compare(
    name: str, seed: int, budgets: Sequence[float], libraries: Sequence[str], repairs: int = REPAIRS
) -> Iterator[Result]:
    """All results of one network and seed, as they come; ``repairs`` as :data:`REPAIRS`."""
    model = training.trained(name, seed) if name in networks.NAMES else real.define(name)
    bench = Bench(name, seed, model, repairs)
    yield bench.result(1.0, "", "", "", lambda: (model, bench.macs))
    if OURS in libraries:
        for share in budgets:
            yield bench.result(share, OURS, "", "", lambda share=share: bench.ours(share))  # type: ignore[misc]
    for library in (with_torch_pruning, with_kirigami):
        variants = [v for v in library.variants() if name in v.networks and v.library in libraries]
        yield from bench.peer(variants, budgets)


class Bench:
    """One trained network, its graph, its data."""

    def __init__(self, name: str, seed: int, model: nn.Module, repairs: int = REPAIRS):
        self.name, self.seed, self.repairs = name, seed, repairs
        self.split = split(name)
        self.graph = trace(model, self.split.example)
        self.macs = graph_macs(self.graph, self.split.example)
        self.case = peers.Case(name, model, self.split, peers.gradients(model, self.split))

    def ours(self, share: float) -> tuple[Graph, float]:
        """Our network and its multiply-accumulates an input."""
        small = ours.pruned(self.graph, share, self.split.calibration)
        return small, graph_macs(small, self.split.example)

    def result(
        self,
        share: float,
        library: str,
        variant: str,
        treatment: str,
        make: Callable[[], tuple[Any, float]],
        spent: float = 0.0,
    ) -> Result:
        """The result of what ``make`` gives, a network and its multiply-accumulates, or of its failure.

        ``spent`` are seconds that went into it before.
        """
        started = time.perf_counter()
        known = (self.name, self.seed, share, library, variant, treatment)
        try:
            network, macs = make()
        except (Detached, GraphpruneError, ValueError, RuntimeError) as error:
            return Result(*known, failure=f"{type(error).__name__}: {first_line(error)}")
        seconds = time.perf_counter() - started + spent
        reached = macs / self.macs
        if reached > share + 1e-9:
            return Result(*known, reached, failure=f"{reached:.3f} of the MACs is more than was allowed")
        return Result(*known, reached, self.split.metrics(network), "", seconds)

    def peer(self, variants: Sequence[peers.Variant], budgets: Sequence[float]) -> Iterator[Result]:
        """Every variant of a library at every budget, and our repair behind the best of them."""
        low = dict.fromkeys((v.label for v in variants), 0.0)
        broken: dict[str, str] = {}
        for share in sorted(budgets, reverse=True):
            scored: list[tuple[float, peers.Variant, peers.Replay, float]] = []
            for variant in variants:
                at = (share, variant.library, variant.label)
                if variant.label in broken:
                    yield Result(self.name, self.seed, *at, ALONE, failure=broken[variant.label])
                    continue
                started = time.perf_counter()
                try:
                    ratio, (model, replay) = variant.to_budget(
                        self.case, share * self.macs, low[variant.label]
                    )
                    spent = time.perf_counter() - started
                    found = self._treated(at, model, spent)
                except Exception as error:  # whatever another library raises is its result
                    broken[variant.label] = f"{type(error).__name__}: {first_line(error)}"
                    yield Result(self.name, self.seed, *at, ALONE, failure=broken[variant.label])
                    continue
                low[variant.label] = ratio * 0.9  # smaller ones are known to be too small, all but surely
                yield from found
                best = max((r.score for r in found if r.score is not None), default=-1.0)
                scored.append((best, variant, replay, spent))
            if scored and self.repairs:
                yield self._best_repaired(share, scored)

    def _best_repaired(
        self, share: float, scored: list[tuple[float, peers.Variant, peers.Replay, float]]
    ) -> Result:
        """Our repair behind the best variants, and of those the best: one row a seed, whichever it is."""
        found = []
        for _, variant, replay, spent in sorted(scored, key=lambda entry: -entry[0])[: self.repairs]:
            at = (share, variant.library, f"best of {self.repairs} variants")
            found.append(self.result(*at, REPAIRED, lambda replay=replay: self._repaired(replay), spent))  # type: ignore[misc]
        return max(found, key=lambda r: -1.0 if r.score is None else r.score)

    def _treated(self, at: tuple[float, str, str], model: nn.Module, spent: float) -> list[Result]:
        small = trace(model, self.split.example)
        macs = graph_macs(small, self.split.example)
        found = [self.result(*at, ALONE, lambda: (model, macs), spent)]
        if any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules()):
            batches = self.split.calibration
            found.append(self.result(*at, RECALIBRATED, lambda: (recalibrated(model, batches), macs), spent))
        return found

    def _repaired(self, replay: peers.Replay) -> tuple[Graph, float]:
        plan = peers.plan_for(self.graph, self.case, replay)
        small = ours.repaired(self.graph, plan, self.split.calibration)
        return small, graph_macs(small, self.split.example)
