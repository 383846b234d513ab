"""An oracle for pruning that knows nothing of the graph: the user's own module with slices set to zero.

Of the axis types it uses which entries of which parameter go, and nothing else; the module then runs in
eager mode. A channel whose every weight is zero contributes nothing, so the zeroed original and the pruned
network agree, unless zeroing makes the original itself undefined: weight normalisation divides a zero
vector by its length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from graphprune.axes.terms import mask
from graphprune.graph import Graph
from graphprune.plans.plan import Plan, keep_masks
from graphprune.verify import Certificate, compare


def zero(model: torch.nn.Module, graph: Graph, plan: Plan) -> None:
    """Set the parameters and buffers of ``model`` to zero, in place, wherever ``plan`` removes a position."""
    masks = keep_masks(graph, plan)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    with torch.no_grad():
        for name, dims in graph.typing.tensors.items():
            if name not in state:
                continue  # a constant that tracing found in the code
            for dim, term in enumerate(dims):
                gone = torch.from_numpy(~mask(term, masks)).nonzero().flatten()
                if gone.numel():
                    state[name].index_fill_(dim, gone, 0.0)


def against_zeroed(
    model: torch.nn.Module,
    graph: Graph,
    plan: Plan,
    pruned: Graph,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Certificate | None:
    """The pruned network against the zeroed original, or ``None`` where zeroing leaves no finite output.

    ``model`` is zeroed in place: pass one of its own, with the weights the graph was captured with.
    """
    zero(model, graph, plan)
    with torch.no_grad():
        wanted = _tensors(model(*args, **kwargs))
        found = _tensors(pruned.module(*args, **kwargs))
    if not all(bool(torch.isfinite(t).all()) for t in wanted if t.is_floating_point()):
        return None
    return compare("zeroed", [found], [wanted])


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
