"""Weights as integers, block by block: smaller files, for networks of linears and embeddings.

Every row of a linear's weight is parted into blocks of inputs with a scale of their own
(:mod:`graphprune.quantization.blocks`), and rounded to 8, 4 or 3 bits either to the nearest or, with
calibration inputs, so that what the layer computes changes least
(:mod:`graphprune.quantization.rounding`). Embeddings get one scale a row. ONNX Runtime multiplies with
the packed integers as they are.

>>> import torch, graphprune
>>> from graphprune.pipeline import Pipeline
>>> _ = torch.manual_seed(0)
>>> graph = graphprune.trace(torch.nn.Linear(64, 8), torch.zeros(1, 64))
>>> small = Pipeline.parse("quantize-weights{bits=4}").run(graph).graph
>>> {name: (list(t.shape), str(t.dtype)) for name, t in small.tensors.items() if name != "bias"}
{'weight_integers': ([8, 64], 'torch.int8'), 'weight_scale': ([8, 2], 'torch.float32')}
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from graphprune.calibration import Call, read
from graphprune.errors import InputError, PassError
from graphprune.graph import Graph
from graphprune.operands import CONVOLUTIONS
from graphprune.pipeline import Context, Note, Pass, PassResult
from graphprune.quantization.rounding import METHODS

from .places import RECURRENT, Place, kept, places, selected
from .rounding import Rounded, Wanted, round_all
from .writing import write

SIZES = (16, 32, 64, 128)  # what MatMulNBits takes on every provider
BITS = (3, 4, 8)


@dataclass(frozen=True)
class QuantizeWeights(Pass):
    """Linears, constant products and embeddings keep their weights as integers.

    Attributes:
        bits: 8, 4 or 3 of every weight that is multiplied with; 3 are stored in 4.
        block_size: inputs that share a scale: 16, 32, 64 or 128; ``None`` for 32 up to 4 bits, and for
            what is smallest with 8.
        symmetric: no zero points; blocks of one sign only lose half of the integers.
        method: ``nearest``, ``gptq``, ``adaround``, or ``auto``: ``gptq`` below 8 bits where there are
            calibration inputs, else ``nearest``.
        embedding_bits: 8 or 4 of tables that rows are looked up in; also where linears multiply with them.
        inputs: ``float``, or ``int8`` for rounding what is multiplied with a weight, block by block as it
            comes, so that integers are multiplied; ``auto``: ``int8`` with weights of 8 bits.
        ignored: weights, operators or modules that stay in float, by name or glob.
        only: those alone that are quantized, in the same way.
        limit: calibration samples that are read.
        positions: places of an input that enter a Gram matrix, for each sample; ``None`` for all.
    """

    name: ClassVar[str] = "quantize-weights"
    exact: ClassVar[bool] = False
    requires: ClassVar[frozenset[str]] = frozenset({"float"})
    destroys: ClassVar[frozenset[str]] = frozenset({"float", "trainable"})

    bits: int = 8
    block_size: int | None = None
    symmetric: bool = True
    method: str = "auto"
    embedding_bits: int = 8
    inputs: str = "auto"
    ignored: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    limit: int = 512
    positions: int | None = 256

    def run(self, graph: Graph, context: Context) -> PassResult:
        """Integers in place of weights, in a copy."""
        self._check(graph)
        found, notes = places(graph)
        others = {"convolution": CONVOLUTIONS, "recurrent layer": RECURRENT}
        notes += kept(graph, others, "no runtime multiplies blocks of integers there")
        chosen = selected(found, self.only, self.ignored)
        method, why = self._method(context)
        wanted = {place.name: self._wanted(place, graph, method) for place in chosen}
        small = [p for p in chosen if _bytes(p, graph, wanted[p.name]) >= graph.tensors[p.name].nbytes]
        notes += [Note("refused", p.name, "stays in float: it is smaller so") for p in small]
        chosen = [place for place in chosen if place not in small]
        if not chosen:
            return PassResult(graph, False, (Note("info", "", "no weight to quantize"), *notes))
        calls: Sequence[Call] = ()
        needed = method != "nearest" and any(not place.lookups for place in chosen)
        if needed and context.calibration is not None:
            data = read(graph, context.calibration, self.limit)
            calls, notes = data.calls, [*data.notes, *notes]
        results = round_all(graph, chosen, wanted, calls, positions=self.positions, seed=context.seed)
        work = graph.copy()
        twins = dict(zip(graph.fx.nodes, work.fx.nodes, strict=True))
        before = sum(graph.tensors[p.name].nbytes for p in chosen)
        after = sum(_bytes(p, graph, wanted[p.name]) for p in chosen)
        for place in chosen:
            own = tuple(tuple(twins[n] for n in nodes) for nodes in (place.products, place.lookups))
            twin = Place(place.name, own[0], own[1], place.transposed)
            how = wanted[place.name]
            rounds = self.inputs == "int8" or (self.inputs == "auto" and how.bits == BITS[-1])
            rows = _by_rows(place, how)
            write(work, twin, results[place.name], symmetric=self.symmetric, rows=rows, inputs=rounds)
        work.sweep()
        work.propagate()
        work.floating = graph
        summary = f"{len(chosen)} weights, {before:,} → {after:,} bytes; rounded by {method}{why}"
        changes = [_changed(place, wanted[place.name], results[place.name]) for place in chosen]
        return PassResult(work, True, (Note("info", "", summary), *changes, *notes))

    def _check(self, graph: Graph) -> None:
        if self.bits not in BITS:
            raise InputError(f"bits must be 3, 4 or 8, got {self.bits!r}")
        if self.embedding_bits not in BITS[1:]:
            raise InputError(f"embedding-bits must be 4 or 8, got {self.embedding_bits!r}")
        if self.block_size is not None and self.block_size not in SIZES:
            known = ", ".join(map(str, SIZES))
            raise InputError(f"block-size must be one of {known}, got {self.block_size!r}")
        if self.method not in ("auto", *METHODS):
            raise InputError(f"method must be auto or one of {', '.join(METHODS)}, got {self.method!r}")
        if self.inputs not in ("auto", "float", "int8"):
            raise InputError(f"inputs must be auto, float or int8, got {self.inputs!r}")
        if self.positions is not None and self.positions < 1:
            raise InputError(f"positions must be at least 1, got {self.positions}")
        if graph.is_meta:
            raise InputError("the weights have shapes only (meta device), so there is nothing to round")

    def _method(self, context: Context) -> tuple[str, str]:
        if self.method == "nearest" or (self.method == "auto" and self.bits == BITS[-1]):
            return "nearest", ""
        if context.calibration is not None:
            return ("gptq" if self.method == "auto" else self.method), ""
        if self.method == "auto":
            return "nearest", ", for there are no calibration inputs"
        raise PassError(self.name, f"{self.method} needs calibration inputs; give some, or method=nearest")

    def _wanted(self, place: Place, graph: Graph, method: str) -> Wanted:
        columns = place.matrix(graph).shape[1]
        bits = self.embedding_bits if place.lookups else self.bits
        if place.lookups and not place.products and bits == BITS[-1]:
            return Wanted(bits, columns, self.symmetric, "nearest")
        # Both readers of a tied table count, and Gram matrices know of one.
        method = "nearest" if place.lookups else method
        sizes: Sequence[int] = SIZES[1:2] if bits < BITS[-1] else SIZES[::-1]
        if self.block_size is not None:
            sizes = (self.block_size,)
        return min(
            (Wanted(bits, size, self.symmetric, method) for size in sizes),
            key=lambda wanted: _bytes(place, graph, wanted),
        )


def _by_rows(place: Place, wanted: Wanted) -> bool:
    return not place.products and wanted.bits == BITS[-1]


def _bytes(place: Place, graph: Graph, wanted: Wanted) -> int:
    """What a weight takes in a file, with its scales and zero points."""
    rows, columns = place.matrix(graph).shape
    blocks = -(-columns // wanted.size)
    nibbles = 2 if wanted.bits == BITS[-1] else 1
    zeros = 0 if wanted.symmetric else -(-blocks * nibbles // 2)
    return rows * (blocks * wanted.size * nibbles // 2 + 4 * blocks + zeros)


def _changed(place: Place, wanted: Wanted, result: Rounded) -> Note:
    scales = "one scale a row" if _by_rows(place, wanted) else f"blocks of {wanted.size}"
    what = f"int{wanted.bits} in {scales}" if "block" in scales else f"int{wanted.bits}, {scales}"
    if place.lookups and place.products:
        what += ", one table for embedding and product"
    off = f"off by {result.error:.2%}"
    if result.error < result.nearest:
        off += f" (nearest {result.nearest:.2%})"
    why = f"; to the nearest, for {result.why}" if result.why else ""
    return Note("changed", place.name, f"{what}: {off}{why}")
