"""Loop orders for everything without a template: inlined, vectorized along the last axis, shared by the
threads.

TVM's own pipeline leaves such functions as the nests of scalar loops that they were written as.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import s_tir
from tvm.tirx import IntImm, IterVar

from .tvm_machine import Machine

PARALLEL_FROM = 65_536  # element operations, below which waking a thread costs more than it computes


def schedule_rest(sch: Any, machine: Machine) -> None:
    """Schedule, in place, every block that still stands in the loops it was made with."""
    for block in _fresh(sch):
        _try_inline(sch, block)
    for block in _fresh(sch):
        _schedule(sch, block, machine)


def _fresh(sch: Any) -> list[Any]:
    """Blocks with one serial loop an axis."""
    found = []
    for block in sch.get_child_blocks(sch.get_sblock("root")):
        loops = [sch.get(loop) for loop in sch.get_loops(block)]
        own = sch.get(block).iter_vars
        serial = all(int(loop.kind) == 0 and isinstance(loop.extent, IntImm) for loop in loops)
        if serial and len(loops) == len(own) and loops:
            found.append(block)
    return found


def _reduces(sch: Any, block: Any) -> bool:
    return any(var.iter_type == IterVar.CommReduce for var in sch.get(block).iter_vars)


def _try_inline(sch: Any, block: Any) -> None:
    """Into its only reader, where it is elementwise and has one."""
    if _reduces(sch, block) or len(sch.get_consumers(block)) != 1:
        return
    reader = sch.get_consumers(block)[0]
    if str(sch.get(block).name_hint).startswith("weights"):
        return  # packed once for all that reads it
    if _reduces(sch, reader) and len(sch.get_producers(block)) > 0 and _costly(sch, block):
        return
    try:
        sch.compute_inline(block)
    except s_tir.ScheduleError:
        return  # it writes an output, or is read in a form that cannot be replaced: it stays


def _costly(sch: Any, block: Any) -> bool:
    text = str(sch.get(block).body)
    return any(word in text for word in ("exp", "erf", "tanh", "sigmoid", "pow"))


def _schedule(sch: Any, block: Any, machine: Machine) -> None:
    iters = sch.get(block).iter_vars
    loops = sch.get_loops(block)
    reduction = [x for x, var in zip(loops, iters, strict=True) if var.iter_type == IterVar.CommReduce]
    spatial = [x for x, var in zip(loops, iters, strict=True) if var.iter_type != IterVar.CommReduce]
    work = prod(int(sch.get(loop).extent) for loop in loops)
    if not spatial:
        return
    inner, outer = [], spatial
    if not (reduction and _along_rows(sch, block)):
        *outer, last = spatial
        width = _width(sch, last, machine)
        if width:
            more, lane = sch.split(last, [None, width])
            outer, inner = [*outer, more], [lane]
            sch.vectorize(lane)
        elif outer:
            inner = [last]  # a plain loop, which LLVM vectorizes with a remainder
        else:
            outer = [last]
    sch.reorder(*outer, *reduction, *inner)
    shared = sch.fuse(*outer)
    if work >= PARALLEL_FROM:
        sch.parallel(shared)
    if reduction:
        sch.decompose_reduction(block, reduction[0])


def _along_rows(sch: Any, block: Any) -> bool:
    """Whether what is summed over stands side by side in memory, as in a softmax or a layer norm."""
    found = sch.get(block)
    last = found.reads[0].region[-1].min if found.reads and len(found.reads[0].region) else None
    sums = [var.var for var in found.iter_vars if var.iter_type == IterVar.CommReduce]
    return last is not None and any(last.same_as(var) for var in sums)


def _width(sch: Any, loop: Any, machine: Machine) -> int:
    """The widest vector that divides a loop, 0 if none does."""
    extent = int(sch.get(loop).extent)
    return next((w for w in (machine.vector, machine.vector // 2, 4) if extent % w == 0), 0)
