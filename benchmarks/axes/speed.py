"""How long it takes to know what is coupled with what, beside two other libraries, and how that grows.

``python -m benchmarks.axes.speed [NETWORK …]``. The other libraries are measured where they can be imported;
to keep them out of the environment under test, install them aside and name the folder::

    pip install --no-deps --target build/peers torch-pruning==1.6.1 torch-kirigami==0.2.1
    GRAPHPRUNE_PEERS=build/peers python -m benchmarks.axes.speed

One thread, processor time, garbage collection off (as :mod:`timeit` has it), all in turn in every round.
Both libraries trace and analyse in one call, as their documentation has it:
``DependencyGraph().build_dependency(model, example_inputs)`` and ``DependencyGraph.build(model, args=…)``.
Here tracing is ``torch.export``'s and typing works on the graph it left. So three things are compared:
typing with their whole call, typing with their call less its own tracing, and capture with typing against
their whole call.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import torch

import graphprune
from benchmarks import record
from benchmarks.axes.chains import calls, chain, seconds, typing_seconds
from graphprune.axes.axis import Axes
from graphprune.axes.typing import Typing
from tests.zoo import torchvision_schemas

NETWORKS = ("resnet152", "vit_l_16", "swin_b", "densenet201")
LENGTHS = (200, 2_000, 20_000)
ROUNDS = 5


@dataclass
class Times:
    """Seconds of every round of one contender, and of the tracing within it; or why there are none."""

    total: list[float] = field(default_factory=list)
    tracing: list[float] = field(default_factory=list)
    failure: str = ""

    @property
    def analysis(self) -> list[float]:
        """What is left without tracing."""
        return [a - b for a, b in zip(self.total, self.tracing, strict=True)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Processor time of one call, and its result."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        result = work()
        return time.process_time() - start, result
    finally:
        gc.enable()


class TorchPruning:
    """``DependencyGraph().build_dependency``; its ``_trace`` runs the model and walks autograd's graph."""

    name = "torch-pruning"

    def __call__(self, model: torch.nn.Module, x: torch.Tensor) -> float:
        """Build; returns how long tracing took."""
        import torch_pruning

        spent = [0.0]

        class Watched(torch_pruning.DependencyGraph):  # type: ignore[misc]
            def _trace(self, *args: Any, **kwargs: Any) -> Any:
                start = time.process_time()
                result = super()._trace(*args, **kwargs)
                spent[0] += time.process_time() - start
                return result

        Watched().build_dependency(model, example_inputs=x)
        return spent[0]


class Kirigami:
    """``DependencyGraph.build``; its ``capture`` traces with FX and runs the model for shapes."""

    name = "torch-kirigami"

    def __call__(self, model: torch.nn.Module, x: torch.Tensor) -> float:
        """Build; returns how long tracing took."""
        import torch_kirigami
        from torch_kirigami.dep_graph import construction

        original, spent = construction.capture, [0.0]

        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            result = original(*args, **kwargs)
            spent[0] += time.process_time() - start
            return result

        construction.capture = watched
        try:
            torch_kirigami.DependencyGraph.build(model, args=(x,))
        finally:
            construction.capture = original
        return spent[0]


PEERS = (TorchPruning(), Kirigami())


def contest(name: str) -> dict[str, Times]:
    """Every contender on one network of torchvision, in turn."""
    torchvision_schemas.declare()
    from torchvision import models

    model = getattr(models, name)(weights=None).eval()
    x = torch.randn(1, 3, 224, 224)
    times = {key: Times() for key in ("typing", "axes", "capture", *(peer.name for peer in PEERS))}
    graph = graphprune.trace(model, x)
    Typing(graph)
    for peer in PEERS:  # what they cannot build is found out here, and first calls are not counted
        try:
            peer(model, x)
        except Exception as error:
            times[peer.name].failure = f"{type(error).__name__}: {(str(error) or '?').splitlines()[0][:90]}"
    for _ in range(ROUNDS):
        spent, typing = timed(lambda: Typing(graph))
        times["typing"].total.append(spent)
        times["axes"].total.append(timed(lambda found=typing: Axes(found))[0])  # type: ignore[misc]
        for peer in PEERS:
            mine = times[peer.name]
            if not mine.failure:
                spent, tracing = timed(lambda peer=peer: peer(model, x))  # type: ignore[misc]
                mine.total.append(spent)
                mine.tracing.append(tracing)
        times["capture"].total.append(timed(lambda: graphprune.trace(model, x))[0])
    return times


def milliseconds(values: list[float]) -> str:
    """Median and range, ms."""
    ms = [v * 1e3 for v in values]
    return f"{statistics.median(ms):.1f} ({min(ms):.1f} to {max(ms):.1f})"


def ratio(theirs: list[float], ours: list[float]) -> str:
    """Median and range of the rounds' ratios."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return f"×{_short(statistics.median(ratios))} ({_short(min(ratios))} to {_short(max(ratios))})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def growth() -> list[dict[str, float]]:
    """Microseconds of processor time a node on longer chains, and how many functions typing calls a node."""
    rows = []
    for length in LENGTHS:
        graph = chain(length)
        count = len(graph.nodes)
        plan = graph.plan(ratio=0.5)
        row: dict[str, float] = {"nodes": count, "typing": typing_seconds(length) * 1e6}
        row["typing calls"] = calls(lambda graph=graph: Typing(graph)) / count  # type: ignore[misc]
        work: dict[str, Callable[[], Any]] = {
            "axes": lambda graph=graph: Axes(graph.typing),  # type: ignore[misc]
            "plan": lambda graph=graph: graph.plan(ratio=0.5),  # type: ignore[misc]
            "apply": lambda graph=graph, plan=plan: graph.apply(plan),  # type: ignore[misc]
        }
        row |= {key: seconds(function, 3) / count * 1e6 for key, function in work.items()}
        rows.append(row)
        print(row, flush=True)
    return rows


def _peer_rows(found: dict[str, dict[str, Times]]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name, times in found.items():
        ours = times["typing"].total
        whole = [a + b for a, b in zip(times["capture"].total, ours, strict=True)]
        for peer in PEERS:
            theirs = times[peer.name]
            if theirs.failure:
                rows.append((name, peer.name, f"fails: {theirs.failure}", "", "", "", ""))
                continue
            rows.append((
                name, peer.name, milliseconds(theirs.total), milliseconds(theirs.tracing),
                ratio(theirs.total, ours), ratio(theirs.analysis, ours), ratio(theirs.total, whole),
            ))  # fmt: skip
    return rows


def main(wanted: list[str]) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path += [p for p in os.environ.get("GRAPHPRUNE_PEERS", "").split(os.pathsep) if p]
    found: dict[str, dict[str, Times]] = {}
    for name in wanted or NETWORKS:
        found[name] = contest(name)
        print(name, {key: milliseconds(t.total) if t.total else t.failure for key, t in found[name].items()},
              flush=True)  # fmt: skip
    own = [(name, *(milliseconds(t[key].total) for key in ("typing", "axes", "capture")))
           for name, t in found.items()]  # fmt: skip
    chains = growth()
    base = chains[0]["typing"]
    body = "\n".join([
        "Median of the rounds with their range; processor time of one thread, all in turn in each round.",
        "", "## Typing a captured graph", "",
        record.table(["network", "typing, ms", "naming the axes, ms", "capture, ms"], own),
        "", "## Beside other libraries", "",
        "The last three columns are their time over graphprune's: above 1, graphprune is faster. "
        "*Typing* starts from a captured graph; their calls trace the model first. torch-pruning resolves "
        "couplings only when a group is asked for, so its call without tracing does less than typing does.",
        "",
        record.table(
            ["network", "library", "their call, ms", "of it tracing, ms", "typing against their call",
             "typing against their call without tracing", "capture and typing against their call"],
            _peer_rows(found)),
        "", "## Growth", "",
        "Microseconds of processor time a node, best of several runs. Typing is measured on 20,000 nodes in "
        "all: 100 chains of 200, 10 of 2,000, one of 20,000, so that all of them meet the same memory.", "",
        record.table(
            ["nodes in a chain", "typing", "against the shortest", "functions that typing calls a node",
             "naming axes", "plan (L2)", "apply"],
            [(f"{r['nodes']:,.0f}", f"{r['typing']:.2f}", f"×{r['typing'] / base:.2f}",
              f"{r['typing calls']:.2f}", f"{r['axes']:.2f}", f"{r['plan']:.1f}", f"{r['apply']:.1f}")
             for r in chains]),
    ])  # fmt: skip
    facts = record.conditions(("torch", "torchvision")) | {"threads": "1", "rounds": str(ROUNDS)}
    facts |= {peer.name: _version(peer.name) for peer in PEERS}
    rows = {"networks": {n: {k: vars(t) for k, t in times.items()} for n, times in found.items()},
            "growth": chains}  # fmt: skip
    print(record.write("speed", "Speed of axis typing", body, rows, facts))


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main(sys.argv[1:])
