"""Loop orders for convolutions, depthwise convolutions and linears: one template a family, a few knobs each.

A tile of outputs is summed in vector registers, over the whole reduction, and written once, with everything
that was fused behind the product. A weight vector is loaded once for all positions of the tile and an input
once for all its channel blocks, so with *t* positions and *c* blocks there are *t·c* multiply-adds for *t +
c* loads. The threads share the tiles of channels or of rows. (Y. Liu et al., USENIX ATC 2019, section 3.1;
K. Goto and R. A. van de Geijn, "Anatomy of High-Performance Matrix Multiplication", 2008, for the register
tile.)

>>> from graphprune.backends.tvm_machine import Machine
>>> work = Work("conv", (1, 4, 56, 56, 16), (4, 3, 3, 16), padded=True)
>>> knobs = default(work, Machine({"kind": "llvm"}, vector=16, tile=28))
>>> knobs.channels, knobs.rows, knobs.columns
(2, 1, 8)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from typing import Any

from tvm import s_tir
from tvm.tirx import IterVar

from .tvm_generic import schedule_rest
from .tvm_machine import Machine
from .tvm_operators import PRODUCTS
from .tvm_tiles import divisors

TEMPLATES = 1  # raised when knobs come to mean something else, so that older measurements are not used
LINEAR = ("dense", "matmul")
ENOUGH = 16  # sums in registers
PARALLEL_FROM = 500_000  # multiply-adds, below which waking a thread costs more than it computes


@dataclass(frozen=True)
class Work:
    """What decides how a product is scheduled.

    Attributes:
        kind: one of the operators' products; ``matmul`` is a ``dense`` whose weights are packed each time.
        spatial: extents of the output: n, channel blocks, rows, columns, v; or leading axes, rows, outputs.
        reduction: extents of what is summed over.
        padded: whether it reads a padded copy.
        lanes: outputs in a vector of a linear.
    """

    kind: str
    spatial: tuple[int, ...]
    reduction: tuple[int, ...]
    padded: bool = False
    lanes: int = 16

    @property
    def macs(self) -> int:
        """Multiply-adds that are computed, those on zeros that only fill a block included."""
        return prod(self.spatial) * prod(self.reduction)


@dataclass(frozen=True)
class Knobs:
    """One schedule.

    Attributes:
        channels, rows, columns: of the tile, in vectors of outputs and in positions.
        chunk: rows a thread takes at a time.
        order: ``channels``: threads share channel blocks, and each keeps its weights in its cache; ``rows``:
            they share rows, and each keeps its inputs.
        pad: where the padded copy is made: ``whole`` at once, ``chunk`` for a thread's rows, or nowhere
            (``inline``): what is read is asked whether it is inside.
        unroll: how many of the kernel's two axes are unrolled (of a linear: whether the sum is, by four).
    """

    channels: int
    rows: int
    columns: int
    chunk: int = 1
    order: str = "channels"
    pad: str = "whole"
    unroll: int = 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def work_of(function: Any) -> Work | None:
    """The product in a function, or ``None`` if there is none with a template."""
    sch = s_tir.Schedule(function)
    found = _product(sch)
    if found is None:
        return None
    block = sch.get(found)
    extents = {True: [], False: []}  # type: ignore[var-annotated]
    for var in block.iter_vars:
        extents[var.iter_type == IterVar.CommReduce].append(int(var.dom.extent))
    names = _names(sch)
    lanes = int(block.reads[1].source.ty.shape[-1])
    kind = next(k for k in PRODUCTS if str(block.name_hint).startswith(k))
    return Work(
        kind, tuple(extents[False]), tuple(extents[True]), any(n.startswith("pad") for n in names), lanes
    )


def space(work: Work, machine: Machine) -> list[Knobs]:
    """The schedules that are worth measuring: tiles that fill the registers, in every order."""
    tiles = _tiles(work, machine)
    orders = ("channels", "rows")
    if work.kind in LINEAR:
        return [Knobs(c, r, 1, r, order, "whole", unroll)
                for (c, r, _), order, unroll in product(tiles, orders, (0, 1))]  # fmt: skip
    height = work.spatial[2]
    found = []
    for (c, rows, columns), order, unroll in product(tiles, orders, (0, 1, 2)):
        if unroll > 1 and prod(work.reduction[-3:-1] if work.kind == "conv" else work.reduction) > 9:
            continue
        chunks = {rows, *(d for d in divisors(height, height) if d % rows == 0 and d * 8 >= height)}
        for chunk in sorted(chunks):
            pads = ("whole", "chunk", "inline") if work.padded else ("whole",)
            found += [Knobs(c, rows, columns, chunk, order, pad, unroll) for pad in pads]
    return found


def default(work: Work, machine: Machine) -> Knobs:
    """A schedule that is good without having been measured.

    Two channel blocks and as many positions as :data:`ENOUGH` sums allow: more hide no more of the latency
    of a multiply-add, and the compiler begins to keep some of them in memory.
    """
    tiles = [t for t in _tiles(work, machine, everything=True) if prod(t) <= min(ENOUGH, machine.tile)]
    c, rows, columns = max(tiles, key=lambda t: (prod(t) * 4 >= ENOUGH * 3, t[0] == 2, prod(t), t[2]))
    if work.kind in LINEAR:
        return Knobs(c, rows, 1, rows, "channels", "whole", 1)
    if work.kind == "depthwise":
        height = work.spatial[2]
        return Knobs(1, rows, columns, height if height % rows == 0 else rows, "channels", "chunk", 2)
    return Knobs(c, rows, columns, rows, "channels", "whole", 0)


def _tiles(work: Work, machine: Machine, everything: bool = False) -> list[tuple[int, int, int]]:
    """(channel vectors, rows, columns) whose sums fit in registers: the fullest, and those half as full.

    With ``everything``, the small ones too.
    """
    if work.kind in LINEAR:
        vectors = work.spatial[-1] // work.lanes
        axes = (divisors(vectors, 8), divisors(work.spatial[-2], machine.tile), [1])
    else:
        _, blocks, height, width, _ = work.spatial
        most = 1 if work.kind == "depthwise" else 4
        axes = (divisors(blocks, most), divisors(height, machine.tile), divisors(width, machine.tile))
    fit = [tile for tile in product(*axes) if prod(tile) <= machine.tile]
    fullest = max(map(prod, fit))
    return fit if everything else [tile for tile in fit if 2 * prod(tile) >= fullest]


def schedule(function: Any, knobs: Knobs | None, machine: Machine) -> Any:
    """The function with its loops in order; ``knobs=None`` takes :func:`default`.

    Raises:
        tvm.s_tir.ScheduleError: the knobs do not fit the function.
    """
    sch = s_tir.Schedule(function)
    work = work_of(function)
    if work is not None:
        _schedule_product(sch, work, knobs or default(work, machine), machine)
    schedule_rest(sch, machine)
    return sch.mod["main"].with_attr("tirx.is_scheduled", True)


def _names(sch: Any) -> list[str]:
    return [str(sch.get(b).name_hint) for b in sch.get_child_blocks(sch.get_sblock("root"))]


def _product(sch: Any) -> Any | None:
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        name = str(sch.get(block).name_hint)
        if name.rstrip("_0123456789") in PRODUCTS:
            return block
    return None


def _schedule_product(sch: Any, work: Work, knobs: Knobs, machine: Machine) -> None:
    block = _product(sch)
    last = _merged_behind(sch, block)
    extents = [int(sch.get(loop).extent) for loop in sch.get_loops(last)] if last is not None else []
    if extents != list(work.spatial):
        # What comes behind has another shape, or there is nothing: the sums are written where they belong.
        last = sch.cache_write(block, 0, "local")
    else:
        sch.set_scope(block, 0, "local")
    if work.kind in LINEAR:
        _schedule_dense(sch, block, last, work, knobs)
    else:
        _schedule_window(sch, block, last, work, knobs)


def _merged_behind(sch: Any, block: Any) -> Any | None:
    """The last block, with all between it and the product written into it."""
    names = _names(sch)
    start = names.index(str(sch.get(block).name_hint))
    behind = [sch.get_sblock(name) for name in names[start + 1 :]]
    for between in behind[:-1]:
        sch.compute_inline(between)
    return behind[-1] if behind else None


def _schedule_window(sch: Any, block: Any, last: Any, work: Work, knobs: Knobs) -> None:
    """``conv`` and ``depthwise``: tiles of channel blocks × rows × columns."""
    n, c, i, j, v = sch.get_loops(last)
    co, ci = sch.split(c, [None, knobs.channels])
    io, im, ii = sch.split(i, [None, knobs.chunk // knobs.rows, knobs.rows])
    jo, ji = sch.split(j, [None, knobs.columns])
    if knobs.order == "channels":
        sch.reorder(n, co, io, im, jo, ci, ii, ji, v)
        shared = sch.fuse(n, co, io)
    else:
        sch.reorder(n, io, co, im, jo, ci, ii, ji, v)
        shared = sch.fuse(n, io)
    if work.macs >= PARALLEL_FROM:
        sch.parallel(shared)
    sch.compute_at(block, jo, preserve_unit_loops=True)
    loops = sch.get_loops(block)[-(5 + len(work.reduction)) :]
    spatial, reduction = loops[:5], loops[5:]
    sch.reorder(spatial[0], *reduction, *spatial[1:])
    kernel = reduction[1:3] if work.kind == "conv" else reduction
    for loop in list(kernel)[2 - knobs.unroll :]:
        sch.unroll(loop)
    _in_registers(sch, spatial[1:4], spatial[4])
    _in_registers(sch, (ci, ii, ji), v)
    pad = next((name for name in _names(sch) if name.startswith("pad")), None)
    if pad is not None:
        _schedule_pad(sch, sch.get_sblock(pad), shared, knobs.pad, work)
    sch.decompose_reduction(block, reduction[0])


def _schedule_pad(sch: Any, pad: Any, shared: Any, where: str, work: Work) -> None:
    if where == "inline":
        sch.compute_inline(pad)
        return
    blocked = len(sch.get(pad).iter_vars) == 5
    if where == "chunk":
        sch.compute_at(pad, shared, preserve_unit_loops=True)
    loops = sch.get_loops(pad)
    if where == "whole":
        rows = sch.fuse(*loops[:3])
        if work.macs >= PARALLEL_FROM:
            sch.parallel(rows)
    if blocked:
        sch.vectorize(loops[-1])


def _schedule_dense(sch: Any, block: Any, last: Any, work: Work, knobs: Knobs) -> None:
    """``dense``: tiles of rows × vectors of outputs."""
    *lead, m, n = sch.get_loops(last)
    no, ni, v = sch.split(n, [None, knobs.channels, work.lanes])
    mo, mi = sch.split(m, [None, knobs.rows])
    outer = (no, mo) if knobs.order == "channels" else (mo, no)
    sch.reorder(*lead, *outer, ni, mi, v)
    shared = sch.fuse(*lead, *outer)
    if work.macs >= PARALLEL_FROM:
        sch.parallel(shared)
    sch.compute_at(block, shared, preserve_unit_loops=True)
    loops = sch.get_loops(block)[1:]
    row, out, k = loops[-3:]
    inner, lane = sch.split(out, [None, work.lanes])
    sch.reorder(*loops[:-3], k, inner, row, lane)
    if knobs.unroll and work.reduction[0] % 4 == 0:
        k, by_four = sch.split(k, [None, 4])
        sch.unroll(by_four)
    _in_registers(sch, (inner, row), lane)
    _in_registers(sch, (ni, mi), v)
    sch.decompose_reduction(block, k)


def _in_registers(sch: Any, tile: Any, lane: Any) -> None:
    for loop in tile:
        sch.unroll(loop)
    sch.vectorize(lane)
