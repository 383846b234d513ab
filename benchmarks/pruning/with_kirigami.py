"""torch-kirigami, as its readme and its examples use it.

Group magnitudes (its readme) or Taylor scores (its workflows) rank the candidates that it discovers,
once; the lowest go, over all layers (*global*) or the same share of every layer (*uniform*). It has no
budget of multiply-accumulates, so what goes is searched until ours is met. Its own ``Greedy`` takes the
same ones one by one and verifies each, minutes for every budget; here its planner verifies them together.

Transformers lose whole heads and inner widths of feed-forward layers, as in its workflow for them; the
attention is rewritten so that the number of heads is inferred, as its planner asks for. CREPE keeps the
channels of its last convolution, since its ``forward`` has their number written down.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.pruning.networks import NAMES as TRAINED
from benchmarks.pruning.peers import Case, Replay, Variant
from benchmarks.pruning.real import NAMES as REAL

EVERYWHERE = frozenset(TRAINED + REAL)
LABELLED = EVERYWHERE - {"minilm-l6"}
# Layers to prune, where not all that it discovers.
CREPE = [f"*.conv{n}" for n in range(1, 6)]
INNER = {"vit": "*.mlp.fc1", "minilm-l6": "*.intermediate.dense"}  # of feed-forward layers


def variants() -> list[Variant]:
    """Every variant; which networks it can work on is its own to say."""
    sessions: dict[str, Session] = {}  # the latest: variants of one case share it
    return [
        _variant(sessions, "L2 uniform", EVERYWHERE, "GroupMagnitude", "uniform"),
        _variant(sessions, "L2 global", EVERYWHERE, "GroupMagnitude", "global"),
        _variant(sessions, "Taylor global", LABELLED, "WeightTaylor", "global"),
    ]


class Session:
    """The library at work on one network: what it found and scored, from which many ratios are served."""

    def __init__(self, case: Case):
        from torch_kirigami import DependencyGraph, pruning

        self.case = case
        self._model = _followed(case, case.copy())
        graph = DependencyGraph.build(self._model, args=case.split.example)
        self._pruner = pruning.Pruner(self._model, graph=graph)
        inner = INNER.get(case.name)
        targets = CREPE if case.name.startswith("crepe") else None
        self._space = (
            _candidates(self._pruner, inner) if inner else self._pruner.discover_candidates(targets=targets)
        )
        self._scores: dict[str, dict[str, float]] = {}

    def prune(self, ratio: float, metric: str, scope: str) -> tuple[nn.Module, Replay]:
        """A pruned copy, and how to prune another one."""
        from torch_kirigami import pruning

        candidates = self._pruner.filter_candidates(self._space).candidates
        if metric not in self._scores:
            self._score(metric)
        keys = set(_lowest(candidates, self._scores[metric], ratio, scope))
        plan = self._pruner.plan_remove([s for c in candidates if c.key in keys for s in c.remove])

        def replay(other: nn.Module) -> None:
            pruning.Pruner(_followed(self.case, other)).apply(plan)

        model = self.case.copy()
        replay(model)
        model.zero_grad()
        return model.eval(), replay

    def _score(self, metric: str) -> None:
        from torch_kirigami import pruning

        scores: dict[str, float] = {}

        class Scored(Exception):
            """Thrown once they are had."""

        class Scoring:
            def select(self, context: Any) -> Any:
                found = context.score(getattr(pruning, metric)(), context.candidates)
                scores.update(zip((c.key for c in context.candidates), found, strict=True))
                raise Scored

        with contextlib.suppress(Scored):
            self._pruner.plan(self._space, strategy=Scoring(), budget=pruning.ChannelRatio(0.001))
        self._scores[metric] = scores


def _variant(
    sessions: dict[str, Session], label: str, on: frozenset[str], metric: str, scope: str
) -> Variant:
    def prune(case: Case, ratio: float) -> tuple[nn.Module, Replay]:
        found = sessions.get("now")
        if found is None or found.case is not case:
            found = sessions["now"] = Session(case)
        return found.prune(ratio, metric, scope)

    return Variant("torch-kirigami", label, on, prune)


def _followed(case: Case, model: nn.Module) -> nn.Module:
    if case.name in INNER:
        module: Any
        for module in model.modules():
            if hasattr(module, "qkv"):
                module.forward = _attend.__get__(module)
    return model


def _attend(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    """timm's attention for any number of heads."""
    fused = self.qkv(x).reshape(x.size(0), x.size(1), 3, -1, self.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = fused.unbind(0)
    y = F.scaled_dot_product_attention(query, key, value)
    return self.proj(y.transpose(1, 2).reshape(x.size(0), x.size(1), -1))  # type: ignore[no-any-return]


def _lowest(candidates: Any, scores: dict[str, float], ratio: float, scope: str) -> list[str]:
    axes = defaultdict(list)
    for candidate in candidates:
        axes[candidate.axis].append(candidate.key)
    loose = []
    for keys in axes.values():
        keys.sort(key=lambda key: (scores[key], key))
        loose += keys[: min(len(keys) - 1, int(ratio * len(keys)))] if scope == "uniform" else keys[:-1]
    if scope == "uniform":
        return loose
    loose.sort(key=lambda key: (scores[key], key))
    return loose[: int(ratio * len(loose))]


def _candidates(pruner: Any, widths: str) -> Any:
    """Inner widths of feed-forward layers, and the heads of every attention."""
    from torch_kirigami.pruning import Candidate, CandidateSpace

    inner = pruner.discover_candidates(targets=[widths])
    candidates, axes = list(inner.candidates), list(inner.channel_axes)
    for operation in pruner.graph.operations():
        if operation.node.target is F.scaled_dot_product_attention:
            axis = operation.argument("query", 0).axis(1)
            axes.append(axis)
            for head in range(axis.tensor.shape[1]):
                name = f"{operation.node.name}:{head}"
                candidates.append(Candidate(name, (axis.select([head]),), axis))
    return CandidateSpace(tuple(candidates), tuple(axes), exclusions=inner.exclusions)
