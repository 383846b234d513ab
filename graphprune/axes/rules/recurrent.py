"""LSTM, GRU and Elman layers: gates are ``Concat(H, H, …)``, and one H runs through layers and time.

``W_ih [gates·H, I]``, ``W_hh [gates·H, H]``, biases ``[gates·H]``; a projected LSTM has ``W_hr [P, H]``
and P takes H's place in the state. The initial state ``[layers·directions, N, H]`` is one tensor, so
every layer and direction shares H.
"""

from __future__ import annotations

import torch
from torch import fx

from ..terms import Reason, Term, concat
from ..typing import Typed, Typing, rule

aten = torch.ops.aten
_STATES = Reason("layers and directions of a recurrent state")


@rule(aten.lstm.input)
def lstm(t: Typing, node: fx.Node) -> Typed:
    """``(output, h_n, c_n)``."""
    return _recurrent(t, node, 4)


@rule(aten.gru.input)
def gru(t: Typing, node: fx.Node) -> Typed:
    """``(output, h_n)``."""
    return _recurrent(t, node, 3)


@rule(aten.rnn_tanh.input, aten.rnn_relu.input)
def elman(t: Typing, node: fx.Node) -> Typed:
    """``(output, h_n)``."""
    return _recurrent(t, node, 1)


def _recurrent(t: Typing, node: fx.Node, gates: int) -> Typed:
    # input, state(s), weights, has_biases, num_layers, dropout, train, bidirectional, batch_first
    source, state, weights, has_biases, layers, _, _, both, _ = node.args
    states = state if isinstance(state, (list, tuple)) else [state]
    x = t.of(source)
    t.freeze(x[:-1], "steps of a sequence", node)
    per_cell = (4 if has_biases else 2) + (
        len(weights) != int(layers) * (2 if both else 1) * (4 if has_biases else 2)
    )
    first = t.of(weights[1])
    projected = per_cell in (3, 5)
    hidden = t.fresh(first[0].size // gates, node)
    out: Term = first[1]
    if projected:
        # torch knows a projected LSTM by its two state sizes being different; P is the smaller one.
        t.freeze(hidden, "the cell has to stay wider than its projection", node)
    else:
        t.same(out, hidden, node)
    entering: Term = x[-1]
    for layer in range(int(layers)):
        cells = []
        for direction in range(2 if both else 1):
            at = (layer * (2 if both else 1) + direction) * per_cell
            cell = [t.of(w) for w in weights[at : at + per_cell]]
            gate_axis = concat(*[hidden] * gates)
            t.same(cell[0][0], gate_axis, node)
            t.same(cell[0][1], entering, node)
            t.same(cell[1][0], gate_axis, node)
            t.same(cell[1][1], out, node)
            if has_biases:
                t.same(cell[2][0], gate_axis, node)
                t.same(cell[3][0], gate_axis, node)
            if projected:
                t.same(cell[-1][0], out, node)
                t.same(cell[-1][1], hidden, node)
            cells.append(out)
        entering = concat(*cells)
    for index, tensor in enumerate(states):
        t.same(t.of(tensor)[-1], out if index == 0 else hidden, node)
        t.freeze(t.of(tensor)[:-1], "layers and directions of a recurrent state", node)
    shapes = node.meta["val"]
    results: list[object] = [(*x[:-1], entering)]
    for index, value in enumerate(shapes[1:]):
        results.append((*[t.fixed(s, _STATES) for s in value.shape[:-1]], out if index == 0 else hidden))
    return results
