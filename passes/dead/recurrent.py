"""Which hidden units and inputs of an LSTM, GRU or Elman layer its results depend on.

Unit ``h`` of a cell counts when it is read further on, or by a gate of a unit that counts: through
``W_hh[gate · H + unit, h]``. Units that only read each other do not. An input counts when a gate
of a unit that counts reads it, through ``W_ih``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .constancy import Constancy


def needed_of_recurrent(
    values: Constancy, node: fx.Node, wanted: list[torch.Tensor]
) -> dict[fx.Node, torch.Tensor] | None:
    """Operand → its elements that count, broadcast against its shape; ``None`` where that cannot be told.

    Args:
        values: what is known of the parameters.
        node: the operator.
        wanted: which elements of its results count: output ``[…, directions · H]`` and states ``[…, H]``.
    """
    given: tuple[Any, ...] = node.args
    source, state, weights, has_biases, layers, _, train, both, _ = given
    states: Any = state if isinstance(state, (list, tuple)) else [state]
    per_cell, directions = (4 if has_biases else 2), (2 if both else 1)
    if train or len(weights) != layers * directions * per_cell:
        return None  # dropout between layers, or projections
    cells = [weights[i : i + per_cell] for i in range(0, len(weights), per_cell)]
    known = [[w for w in map(values.weights.of, cell[:2]) if w is not None] for cell in cells]
    if any(len(pair) < 2 for pair in known):
        return None
    hidden = known[0][1].shape[1]
    read = _last(wanted[0], directions * hidden)
    kept = torch.zeros(hidden, dtype=torch.bool)
    for result in wanted[1:]:
        kept = kept | _last(result, hidden)
    found: dict[fx.Node, torch.Tensor] = {}
    everywhere = torch.zeros(hidden, dtype=torch.bool)
    for layer in range(int(layers) - 1, -1, -1):
        entering = torch.zeros((), dtype=torch.bool)
        for direction in range(directions):
            at = layer * directions + direction
            own = kept | read.view(directions, hidden)[direction]
            inputs, recurrent = ((w != 0).unflatten(0, (-1, hidden)).any(0) for w in known[at])
            own = _closed(own, recurrent)  # [unit, read by it]
            everywhere |= own
            entering = entering | inputs[own].any(0)
            for operand in cells[at]:
                if operand.op != "get_attr":
                    found[operand] = torch.ones((), dtype=torch.bool)
        read = entering
    for operand in states:
        found[operand] = everywhere
    found[source] = read
    return found


def _last(elements: torch.Tensor, size: int) -> torch.Tensor:
    """Along the last dimension, whether any element counts."""
    return elements.flatten(0, -2).any(0).expand(size)


def _closed(units: torch.Tensor, reads: torch.Tensor) -> torch.Tensor:
    """The units, those their gates read, and so on; ``reads`` is ``[unit, read]``."""
    while True:
        more = units | reads[units].any(0)
        if torch.equal(more, units):
            return units
        units = more
