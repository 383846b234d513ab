"""Which operators of a captured graph follow ``train()`` and ``eval()``.

Capture happens in evaluation mode, so a training flag stands in the graph as ``False`` and the dropout of
attention as 0. Here each operator is asked which module it came from, and marked
(``node.meta["follows_training"]``) where that module's mode would have decided.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from ..graph import Graph
from ..module import TRAINING_ARGUMENT

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default

# What modules of the common libraries call the dropout of their attention weights.
_PROBABILITIES = (
    "attention_dropout", "attn_dropout", "attn_drop", "dropout_prob", "dropout_p",
    "attention_probs_dropout_prob",
)  # fmt: skip


def mark_training(graph: Graph, model: torch.nn.Module | None) -> tuple[str, ...]:
    """Mark the operators that follow the mode; returns notes on dropout that could not be brought back.

    Args:
        graph: as captured; changed in place.
        model: the module it was captured from, or ``None`` when only the program is known.
    """
    _restore_attention_dropout(graph, model)
    unknown: list[str] = []
    for node in graph.find(*TRAINING_ARGUMENT, _ATTENTION):
        owner = _owner(model, node)
        if node.target is _ATTENTION:
            probability = _attention_dropout(owner)
            if probability is None:
                unknown.append(node.meta["module"])
            elif probability:
                node.meta["follows_training"] = probability
        elif node.target is aten.batch_norm.default:
            if _tracks_statistics(node, owner) and node.args[5] is False:
                node.meta["follows_training"] = True
        elif node.target is aten.instance_norm.default:
            continue  # its flag says which statistics to use, and InstanceNorm's own modules differ
        elif node.args[2] is False:
            node.meta["follows_training"] = True
    if not unknown:
        return ()
    names = ", ".join(dict.fromkeys(unknown[:3])) + (" …" if len(unknown) > 3 else "")
    return (
        f"attention in {names} may drop out in training mode, with a probability the graph does not know; "
        "training result.module does without it",
    )


def carry_marks(source: Graph, graph: Graph) -> None:
    """Mark the batch norms of a graph that was captured again as those of the same statistics were marked."""
    marked = {
        str(node.args[3].target)  # type: ignore[union-attr]
        for node in source.find(aten.batch_norm.default)
        if node.meta.get("follows_training")
    }
    for node in graph.find(aten.batch_norm.default):
        if getattr(node.args[3], "target", None) in marked:
            node.meta["follows_training"] = True


def _tracks_statistics(node: fx.Node, owner: torch.nn.Module | None) -> bool:
    if owner is not None:
        return isinstance(owner, torch.nn.modules.batchnorm._BatchNorm) and bool(owner.track_running_stats)
    kind = node.meta.get("module_type", "")
    return "BatchNorm" in kind.rpartition(".")[2] and "Frozen" not in kind


def _attention_dropout(owner: torch.nn.Module | None) -> float | None:
    """The probability a module drops attention weights with; ``None`` where it may, but it is not known."""
    if owner is None:
        return 0.0
    if isinstance(owner, torch.nn.MultiheadAttention):
        return float(owner.dropout)
    for name in _PROBABILITIES:
        probability = _probability(getattr(owner, name, None))
        if probability is not None:
            return probability
    others = [_probability(v) for k, v in {**vars(owner), **owner._modules}.items() if "drop" in k]
    return None if any(others) else 0.0


def _probability(value: Any) -> float | None:
    if isinstance(value, torch.nn.Dropout):
        return float(value.p)
    return float(value) if isinstance(value, float) else None


def _restore_attention_dropout(graph: Graph, model: torch.nn.Module | None) -> None:
    """Dropout on attention weights, which ``MultiheadAttention`` leaves out altogether in evaluation mode."""
    for node in list(graph.find(aten.softmax.int)):
        owner = _owner(model, node)
        if not isinstance(owner, torch.nn.MultiheadAttention) or not owner.dropout:
            continue
        with graph.fx.inserting_after(node):
            dropout = graph.fx.call_function(aten.dropout.default)
        node.replace_all_uses_with(dropout)
        dropout.args, dropout.meta = (node, owner.dropout, False), dict(node.meta)


def _owner(model: torch.nn.Module | None, node: fx.Node) -> torch.nn.Module | None:
    if model is None or not node.meta.get("module"):
        return None
    try:
        return model.get_submodule(node.meta["module"].split("@")[0])
    except AttributeError:
        return None
