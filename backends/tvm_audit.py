"""What a TVM library executes: the functions its program calls, with what fusion put into each.

The rows are written next to the library when it is compiled, because they are not to be read from machine
code.
"""

from __future__ import annotations

import json
from typing import Any

from graphprune.backend import Audit, AuditRow, Lowered

from .tvm_runtime import FACTS_FILE


def rows(module: Any) -> list[dict[str, Any]]:
    """The calls of a fused module, in order: function, the operators in it, precision and multiply-adds."""
    from tvm import relax
    from tvm.tirx import PrimFunc

    from .tvm_schedules import work_of

    functions = {var.name_hint: f for var, f in module.functions.items() if isinstance(f, PrimFunc)}
    found: list[dict[str, Any]] = []
    for block in module["main"].body.blocks:
        for binding in block.bindings:
            call = binding.value
            if not isinstance(call, relax.Call) or getattr(call.op, "name", "") != "relax.call_tir":
                continue
            name = call.args[0].name_hint
            work = work_of(functions[name])
            found.append({
                "name": name, "operator": name.removeprefix("fused_").rstrip("0123456789"),
                "precision": str(getattr(call.ty, "dtype", "") or "float32"),
                "macs": work.macs if work else 0, "template": work.kind if work else "",
            })  # fmt: skip
    return found


def audit(lowered: Lowered) -> Audit:
    """The rows of an artifact; multiply-adds count what is computed, zeros that fill a block included."""
    facts = json.loads(lowered.files[FACTS_FILE])
    made = tuple(
        AuditRow(row["name"], row["operator"], row["precision"], row["macs"]) for row in facts["functions"]
    )
    return Audit(
        made, ("functions as they were compiled; channels that only fill a block count as computed",)
    )
