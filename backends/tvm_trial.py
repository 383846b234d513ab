"""The child process that compiles and times candidates, so that one that crashes takes nothing with it.

Requests and replies are JSON, one a line, on standard input and output. A request names a file with the
function, the machine and one or more knobs; the reply has a time for each, in milliseconds, or says why
there is none. Several knobs are timed in turns, so that what else the machine does hits all of them alike.

It runs as ``python -m graphprune.backends.tvm_trial``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm.tirx import PrimFunc

from .exported import first_line
from .tvm_machine import Machine
from .tvm_schedules import Knobs, schedule

ROUNDS = 12  # repeats of a candidate; the shortest counts, because what disturbs only ever adds
SLICE_MS = 1.0  # one repeat runs about that long: short enough to fit between disturbances


def main() -> None:
    """Answer requests until standard input ends."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what a library prints must not look like a reply
    functions: dict[str, PrimFunc] = {}
    for line in sys.stdin:
        request = json.loads(line)
        name = request["function"]
        if name not in functions:
            with open(name, encoding="utf-8") as text:
                functions = {name: tvm.ir.load_json(text.read())}
        reply = answer(functions[name], request)
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


def answer(function: PrimFunc, request: dict[str, Any]) -> dict[str, Any]:
    """``{"ms": [...], "errors": [...]}``, an entry for each knobs of the request."""
    machine = Machine(request["machine"], request["vector"], request["tile"])
    knobs = [Knobs(**values) for values in request["knobs"]]
    built: list[Any] = []
    errors: list[str] = []
    for candidate in knobs:
        try:
            built.append(_built(function, candidate, machine))
            errors.append("")
        except Exception as error:  # whatever TVM raises: the candidate is no use, and the reply says why
            built.append(None)
            errors.append(f"{type(error).__name__}: {first_line(error)}")
    times = _times(built, _arguments(function), request)
    return {"ms": times, "errors": errors}


def _built(function: PrimFunc, knobs: Knobs, machine: Machine) -> Any:
    ordered = schedule(function, knobs, machine).with_attr("global_symbol", "main")
    library = tvm.tirx.build(tvm.IRModule({"main": ordered}), target=tvm.target.Target(dict(machine.llvm)))
    return getattr(library, "mod", library)


def _arguments(function: PrimFunc) -> list[Any]:
    random = np.random.default_rng(0)
    made = []
    for parameter in function.params:
        buffer = function.buffer_map[parameter] if hasattr(function, "buffer_map") else parameter
        shape, dtype = [int(size) for size in buffer.shape], str(buffer.dtype)
        values = random.standard_normal(shape) if dtype.startswith("float") else np.zeros(shape)
        made.append(tvm.runtime.tensor(values.astype(dtype)))
    return made


def _times(built: list[Any], arguments: list[Any], request: dict[str, Any]) -> list[float | None]:
    """Milliseconds of each, timed in turns; ``None`` of what was not built."""
    worst, rounds = request.get("worst"), int(request.get("rounds", ROUNDS))
    clock = time.thread_time_ns if int(request["threads"]) == 1 else time.perf_counter_ns
    found: list[list[float]] = [[] for _ in built]
    calls = [0] * len(built)
    for turn in range(rounds):
        for i, library in enumerate(built):
            if library is None or (turn >= 3 and worst is not None and min(found[i]) > worst):
                continue
            function = library["main"]
            if not calls[i]:
                function(*arguments)
                once = _timed(function, arguments, 1, clock)
                calls[i] = max(1, min(1000, int(SLICE_MS / max(once, 1e-4))))
            found[i].append(_timed(function, arguments, calls[i], clock))
    return [min(times) if times else None for times in found]


def _timed(function: Any, arguments: list[Any], calls: int, clock: Callable[[], int]) -> float:
    """Milliseconds a call. One thread is timed by the processor time it took, so that waiting for a core is
    not counted; with several, that would count their waiting for each other as work."""
    start = clock()
    for _ in range(calls):
        function(*arguments)
    return (clock() - start) / calls / 1e6


if __name__ == "__main__":
    main()
