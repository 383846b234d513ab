"""From a Relax module to a shared library: blocked layout, fusion, schedules, and the runtime's bytecode.

TVM's default pipeline legalizes and fuses, but has no schedules for CPUs: what it compiles are nests of
scalar loops. Here the layout is rewritten first (:mod:`graphprune.backends.tvm_layout`), and every function
that fusion leaves gets loops in order, by template (:mod:`graphprune.backends.tvm_schedules`) or by rule
(:mod:`graphprune.backends.tvm_generic`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tvm
from tvm import relax
from tvm.tirx import PrimFunc

from graphprune.errors import BackendError

from .exported import first_line
from .tvm_layout import blocked
from .tvm_machine import Machine
from .tvm_math import exponentials
from .tvm_schedules import Knobs, Work, schedule, work_of

transform = relax.transform


@dataclass(frozen=True)
class Task:
    """A fused function that calls for a schedule.

    Attributes:
        name: in the module.
        function: with its loops as they were written.
        work: what its template goes by, ``None`` without a template.
        calls: how often the network calls it.
    """

    name: str
    function: Any
    work: Work | None
    calls: int


def fused(module: tvm.IRModule, machine: Machine) -> tvm.IRModule:
    """The module in the blocked layout, with one function for what is computed in one go."""
    target = tvm.target.Target(dict(machine.llvm))
    steps = [
        transform.CanonicalizeBindings(),
        transform.DecomposeOpsForInference(),
        transform.CanonicalizeBindings(),
        transform.DeadCodeElimination(),
        _Blocked(machine),
        transform.DeadCodeElimination(),
        relax.backend.DispatchSampling(),
        relax.backend.DispatchSortScan(),
        transform.LegalizeOps(),
        transform.AnnotateTIROpPattern(),
        transform.FuseOps(),
        transform.FuseTIR(),
        transform.DeadCodeElimination(),
        exponentials,
    ]
    with target, tvm.transform.PassContext(opt_level=3):
        return tvm.transform.Sequential(steps)(module)


def tasks(module: tvm.IRModule) -> list[Task]:
    """The functions of a fused module, in the order of their names."""
    calls: dict[str, int] = {}

    def count(expr: Any) -> None:
        if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.call_tir":
            name = expr.args[0].name_hint
            calls[name] = calls.get(name, 0) + 1

    relax.analysis.post_order_visit(module["main"], count)
    found = []
    for var, function in module.functions.items():
        if isinstance(function, PrimFunc):
            name = var.name_hint
            found.append(Task(name, function, work_of(function), calls.get(name, 0)))
    return sorted(found, key=lambda task: task.name)


def scheduled(module: tvm.IRModule, machine: Machine, choose: Callable[[Task], Knobs | None]) -> tvm.IRModule:
    """Every function with its loops in order; ``choose`` gives the knobs, ``None`` for the default ones."""
    made = dict(module.functions)
    for var, function in module.functions.items():
        if isinstance(function, PrimFunc):
            task = Task(var.name_hint, function, work_of(function), 0)
            knobs = choose(task) if task.work is not None else None
            made[var] = schedule(function, knobs, machine)
    return tvm.IRModule(made, attrs=module.attrs)


def library(module: tvm.IRModule, machine: Machine, linker: str | None) -> bytes:
    """A scheduled module as a shared library for ``machine``, its constants inside.

    Raises:
        BackendError: it does not compile or link; says at what.
    """
    from tvm.support import cc

    target = tvm.target.Target(dict(machine.llvm))
    try:
        with tvm.transform.PassContext(opt_level=3):
            program = relax.build(module, target, relax_pipeline=_finished)
    except Exception as error:
        raise BackendError(f"TVM does not compile the graph: {first_line(error)}") from error
    options = {"fcompile": cc.cross_compiler(linker)} if linker else {}
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        path = Path(folder) / "model.so"
        try:
            program.export_library(str(path), **options)
        except Exception as error:
            raise BackendError(f"the library does not link: {_linker_said(error)}") from error
        return path.read_bytes()


def _linker_said(error: Exception) -> str:
    """The line of a compiler's text that has the reason: neither a heading, as TVM's own, nor a warning.

    >>> _linker_said(RuntimeError("Compilation error:\\nld: cannot find -lm\\n\\nCommand line: g++ -shared"))
    'ld: cannot find -lm'
    """
    lines = (line.strip() for line in str(error).splitlines())
    said = (line for line in lines if line and not line.endswith(":") and "warning:" not in line)
    return next(said, first_line(error))


@tvm.transform.module_pass(opt_level=0, name="Finished")
def _finished(module: tvm.IRModule, context: Any) -> tvm.IRModule:
    return tvm.transform.Sequential([
        transform.RewriteDataflowReshape(),
        transform.ToNonDataflow(),
        transform.RemovePurityChecking(),
        transform.CallTIRRewrite(),
        transform.StaticPlanBlockMemory(),
        transform.LowerAllocTensor(),
        transform.KillAfterLastUse(),
        transform.LowerRuntimeBuiltin(),
        transform.ComputePrimValue(),
        transform.VMShapeLower(),
        transform.AttachGlobalSymbol(),
    ])(module)  # fmt: skip


@tvm.transform.module_pass(opt_level=0, name="Blocked")
class _Blocked:
    """:func:`graphprune.backends.tvm_layout.blocked` as a pass."""

    def __init__(self, machine: Machine):
        self.machine = machine

    def transform_module(self, module: tvm.IRModule, context: Any) -> tvm.IRModule:
        return blocked(module, self.machine.vector, self.machine.tile)
