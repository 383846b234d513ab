"""How much a head matters: the expected sensitivity of a loss to a mask on it.

Michel, Levy and Neubig (*Are Sixteen Heads Really Better than One?*, NeurIPS 2019) multiply the context of
head ``h`` by a mask ``ξ_h``, all of them 1, and take over inputs ``x``, their equations (2) and (3),

    I_h = E_x | ∂L(x) / ∂ξ_h | = E_x | Σ context_h · ∂L(x)/∂context_h |

divided within each layer by the l2 norm over its heads (after Molchanov et al., 2017). Masks on groups of
heads, on a dimension of the values (of the context) or of the keys (of the query) are the same thing along
another axis; they are divided by the same norm, so that all of a layer stays comparable.

Without labels there is no loss, and the distance from the network's own output has gradient 0 where nothing
is masked. ``L`` then is the output in a random direction, ``r · y(x)`` with ``r`` standard normal, drawn anew
for every input: the expectation of ``|∂L/∂ξ_h|`` over ``r`` is ``√(2/π) ‖∂y/∂ξ_h‖``, how far the output moves
as the head fades.

>>> import torch, graphprune
>>> from graphprune.passes.attention import attentions
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True).eval()
>>> _ = layer.self_attn.out_proj.weight.data[:, 3:6].zero_()  # what head 1 writes
>>> graph = graphprune.trace(layer, torch.zeros(2, 5, 12))
>>> [found] = sensitivities(graph, attentions(graph), [(torch.randn(2, 5, 12),)]).values()
>>> int(found.argmin()), float(found[1])
(1, 0.0)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from graphprune.axes.axis import Axis
from graphprune.axes.terms import factors, placements, resolve
from graphprune.errors import InputError
from graphprune.graph import Graph

from .attention import Attention

Loss = Callable[[nn.Module], Any]
PIECE = 16  # samples that are differentiated at once
Tap = tuple[fx.Node, Tensor, Tensor]  # where, the value there, and a 0 that was added to it


class Tapped(nn.Module):
    """A graph behind its caller's convention, in evaluation mode, that keeps what its attentions compute.

    Args:
        graph: the network.
        nodes: whose values are kept.

    Attributes:
        taps: ``(node, value, zero)`` for every time one of the nodes has run; the gradient of a loss with
            respect to the zero, which was added to the value, is its gradient with respect to the value.
    """

    def __init__(self, graph: Graph, nodes: Iterable[fx.Node]):
        super().__init__()
        self._signature = graph.signature
        self._flat = graph.callable()
        self._nodes = {node.name: node for node in nodes}
        self.taps: list[Tap] = []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the graph gives for the caller's arguments."""
        return self._signature.unflatten(self.run(self._signature.flatten(args, kwargs)))

    def run(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        """Flat outputs for flat inputs."""
        with torch.enable_grad():
            return _Interpreter(self._flat, self._nodes, self.taps).run(*inputs)


class _Interpreter(fx.Interpreter):
    def __init__(self, module: fx.GraphModule, nodes: dict[str, fx.Node], taps: list[Tap]):
        super().__init__(module)
        self._watched, self._taps = nodes, taps

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self._watched:
            zero = torch.zeros_like(value, requires_grad=True)
            self._taps.append((self._watched[n.name], value.detach(), zero))
            return value + zero
        return value


def sensitivities(
    graph: Graph,
    layers: Sequence[Attention],
    calls: Sequence[Sequence[Tensor]],
    *,
    loss: Loss | None = None,
    widths: bool = False,
    probes: int = 1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Axis name → scores ``[axis.size]`` in float64.

    Args:
        graph: the network.
        layers: its attentions, see :func:`.attention.attentions`.
        calls: flat inputs of each call; not read when a loss is given.
        loss: from a module, called as the original, to a scalar loss or an iterable of them; the
            expectation is over those, so one for each input is best.
        widths: score the dimensions inside heads and the queries inside groups, too.
        probes: random directions an input, where there is no loss. Another input is about as dear as another
            direction, and does more.
        seed: for the random directions.

    Raises:
        InputError: the loss gives no finite scalar that depends on the module, or the network's outputs
            hold no real numbers.
    """
    axes = {axis.name: axis for layer in layers for axis in _of(layer, widths)}
    tapped = Tapped(graph, {node for layer in layers for node in (*layer.contexts, *layer.queries)})
    totals = {name: torch.zeros(axis.size, dtype=torch.float64) for name, axis in axes.items()}
    watched = _watched(layers, widths)
    count = 0
    steps = _of_loss(tapped, loss) if loss is not None else _of_directions(graph, tapped, calls, probes, seed)
    for samples, gradients in steps:
        for name, places in watched.items():
            signed: Any = 0.0
            for node, value, gradient in gradients:
                if node in places:
                    signed = signed + _along(graph, node, axes[name], value * gradient, samples)
            totals[name] += torch.as_tensor(signed, dtype=torch.float64).abs().sum(0)
        count += samples
    means = {name: total / count for name, total in totals.items()}
    return _normalised(layers, means, widths)


def _of(layer: Attention, widths: bool) -> tuple[Axis, ...]:
    inside = (*layer.shared, *layer.key_width, *layer.value_width)
    return (*layer.heads, *inside) if widths else layer.heads


def _watched(layers: Sequence[Attention], widths: bool) -> dict[str, set[fx.Node]]:
    """Axis name → values that its mask is on: contexts, or the queries for the width of keys."""
    found: dict[str, set[fx.Node]] = {}
    for layer in layers:
        for axis in _of(layer, widths):
            inside = axis in layer.key_width and axis not in layer.value_width
            found.setdefault(axis.name, set()).update(layer.queries if inside else layer.contexts)
    return found


def _normalised(layers: Sequence[Attention], scores: dict[str, Tensor], widths: bool) -> dict[str, Tensor]:
    done: dict[str, Tensor] = {}
    for layer in layers:
        norm = max((float(scores[axis.name].norm()) for axis in layer.heads), default=0.0)
        for axis in _of(layer, widths):
            done.setdefault(axis.name, scores[axis.name] / norm if norm else scores[axis.name])
    return done


# ---- losses ----------------------------------------------------------------------------------------


def _of_directions(
    graph: Graph, tapped: Tapped, calls: Sequence[Sequence[Tensor]], probes: int, seed: int
) -> Iterator[tuple[int, list[Tap]]]:
    generator = torch.Generator().manual_seed(seed)
    scales: list[float] = []
    for call in (piece for whole in calls for piece in _pieces(graph, whole)):
        tapped.taps.clear()
        outputs = [y for y in tapped.run(call) if isinstance(y, Tensor) and y.is_floating_point()]
        if not any(y.requires_grad for y in outputs):
            raise InputError("no output of real numbers depends on the attention heads; give a loss")
        samples = next((t.shape[0] for t in call if t.dim()), 1)
        # Every output counts alike, whatever its scale and size: in all calls as in the first one.
        scales = scales or [float(y.detach().float().norm()) or 1.0 for y in outputs]
        for probe in range(probes):
            total: Any = 0.0
            for y, scale in zip(outputs, scales, strict=True):
                direction = torch.randn(y.shape, generator=generator, dtype=torch.float32)
                total = total + (y * direction.to(y.device, y.dtype)).sum() / scale
            yield samples, _gradients(total, tapped.taps, retain=probe + 1 < probes)


def _pieces(graph: Graph, call: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    """A call in pieces of a few samples, where the batch size is open: gradients keep every activation."""
    batched = [
        n.meta["val"].dim() > 0 and not isinstance(n.meta["val"].shape[0], int) for n in graph.placeholders
    ]
    size = max((len(t) for t, b in zip(call, batched, strict=True) if b), default=0)
    if size <= PIECE:
        yield tuple(call)
        return
    for start in range(0, size, PIECE):
        yield tuple(t[start : start + PIECE] if b else t for t, b in zip(call, batched, strict=True))


def _of_loss(tapped: Tapped, loss: Loss) -> Iterator[tuple[int, list[Tap]]]:
    found = loss(tapped)
    count = 0
    for count, value in enumerate([found] if isinstance(found, Tensor) else found, 1):
        if not isinstance(value, Tensor) or value.numel() != 1:
            what = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise InputError(f"loss must give scalar tensors, got {what}")
        if not value.requires_grad:
            raise InputError(
                "loss does not depend on the module's attention heads; call the module it is given, "
                "and not under no_grad"
            )
        if not bool(torch.isfinite(value)):
            raise InputError(f"loss {count - 1} is {float(value.detach())}; it must be finite")
        yield 1, _gradients(value.sum(), tapped.taps, retain=False)
        tapped.taps.clear()
    if not count:
        raise InputError("loss gave no losses; return a scalar tensor or an iterable of them")


def _gradients(loss: Tensor, taps: Sequence[Tap], *, retain: bool) -> list[Tap]:
    """``(node, value, gradient)`` for each tap that the loss depends on."""
    found = torch.autograd.grad(loss, [zero for *_, zero in taps], retain_graph=retain, allow_unused=True)
    return [(node, value, g) for (node, value, _), g in zip(taps, found, strict=True) if g is not None]


# ---- from a value to the positions of an axis ------------------------------------------------------


def _along(graph: Graph, node: fx.Node, axis: Axis, product: Tensor, samples: int) -> Tensor:
    """``[samples, axis.size]``: sums of a value's elements over what belongs to each position.

    Where the batch is not the first dimension's leading factor, all samples are summed into the first row.
    """
    dims: Any = graph.typing.dims[node]
    if not batch_first(graph, node) or product.shape[0] % samples:
        samples = 1
    wide = product.detach().to("cpu", torch.float64).unflatten(0, (samples, -1))
    result = torch.zeros(samples, axis.size, dtype=torch.float64)
    for dim, term in enumerate(dims):
        for atom, index in placements(term):
            if atom is not axis.atom:
                continue
            others = [d for d in range(1, wide.dim()) if d != dim + 1]
            sums = wide.sum(others) if others else wide  # [samples, size of dim (of its part a sample)]
            # A batch that leads the dimension repeats what stands behind it, whatever its size.
            places = torch.from_numpy(np.resize(index, sums.shape[1]))
            inside = places >= 0
            result.index_add_(1, places[inside], sums[:, inside])
    return result


def batch_first(graph: Graph, node: fx.Node) -> bool:
    """Whether the first dimension of a value is the batch, times other things it may be."""
    leading = factors(resolve(graph.typing.dims[node][0]))  # type: ignore[index]
    batch = next((graph.typing.dims[p][0] for p in graph.placeholders if graph.typing.dims[p]), None)  # type: ignore[index]
    if batch is None:
        return False
    return batch.size == 1 or (bool(leading) and leading[0].size == batch.size)
