"""An LSTM that multiplies with integers, as an operator of its own: ``graphprune::dynamic_lstm``.

What an LSTM feeds back into itself is rounded at every step, which no quantizer around ``aten.lstm`` can
say. So this is the operator, computed step by step as runtimes do it (ONNX Runtime's
DynamicQuantizeLSTM): weights are int8 with one scale a row of the matrix (a gate's unit), and both what a
layer reads, all steps together, and its hidden state, each step anew, are rounded to 8 bits with a scale
and zero point of their own range.

>>> import torch
>>> torch.ops.graphprune.dynamic_lstm.default._schema.name
'graphprune::dynamic_lstm'
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

EPS = 1.1920929e-07  # the smallest scale, that of float32


@torch.library.custom_op("graphprune::dynamic_lstm", mutates_args=())
def dynamic_lstm(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every layer and direction of an LSTM.

    Args:
        x: float32 ``[steps, batch, inputs]``, ``[batch, steps, inputs]`` with ``batch_first``.
        hidden, cell: ``[layers · directions, batch, units]``.
        weights: int8, for each layer and direction ``[4 · units, inputs]`` and ``[4 · units, units]``,
            gates in the order input, forget, cell, output.
        scales: ``[4 · units]`` of each of these.
        biases: for each layer and direction ``[4 · units]``, both of torch's summed; or none at all.
        bidirectional, batch_first: as of :class:`torch.nn.LSTM`.

    Returns:
        Results ``[steps, batch, directions · units]`` (or batch first), and the last hidden and cell states.
    """
    value = x.transpose(0, 1) if batch_first else x
    directions = 1 + bidirectional
    last: list[tuple[Tensor, Tensor]] = []
    for layer in range(len(weights) // (2 * directions)):
        source, results = rounded(value), []
        for direction in range(directions):
            at = layer * directions + direction
            pair = slice(2 * at, 2 * at + 2)
            into, back = (w.float() * s[:, None] for w, s in zip(weights[pair], scales[pair], strict=True))
            gates = source @ into.T + (biases[at] if biases else 0)
            steps, h, c = _run(gates.flip(0) if direction else gates, back, hidden[at], cell[at])
            results.append(steps.flip(0) if direction else steps)
            last.append((h, c))
        value = torch.cat(results, -1)
    value = value.transpose(0, 1) if batch_first else value
    return value.clone(), torch.stack([h for h, _ in last]), torch.stack([c for _, c in last])


def rounded(x: Tensor) -> Tensor:
    """A tensor to 256 values between its extremes, zero among them, and back."""
    low, high = x.amin().clamp_max(0), x.amax().clamp_min(0)
    scale = ((high - low) / 255).clamp_min(EPS)
    zero = torch.round(-low / scale).clamp(0, 255)
    return ((torch.round(x / scale) + zero).clamp(0, 255) - zero) * scale


def _run(gates: Tensor, back: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All steps of one direction: results ``[steps, batch, units]``, and the states after the last."""
    results = []
    for step in gates:
        i, f, g, o = (step + rounded(h) @ back.T).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        results.append(h)
    return torch.stack(results), h, c


@dynamic_lstm.register_fake
def _(
    x: Tensor,
    hidden: Tensor,
    cell: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    biases: Sequence[Tensor],
    bidirectional: bool,
    batch_first: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    width = hidden.shape[-1] * (1 + bidirectional)
    return x.new_empty(*x.shape[:-1], width), torch.empty_like(hidden), torch.empty_like(cell)
