"""``graphprune bench``: how long a call of an artifact takes here, alone or against another."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Debug, Json, print_json, print_tables, stage

if TYPE_CHECKING:
    import torch


def bench(
    directory: Annotated[Path, typer.Argument(help="An artifact directory.")],
    against: Annotated[Path | None, typer.Option(help="Another artifact, called in turn with it.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Size of every open dimension.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Timed calls of each.")] = 50,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the runtime; default: its own.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure an artifact's latency on this host, each artifact in a process of its own."""
    from ..artifact import load
    from ..errors import TargetError
    from ..measure import isolated, ratio

    places = {str(directory): directory}
    if against is not None:
        places[f"{against} (other)" if str(against) == str(directory) else str(against)] = against
    with stage(json) as say:
        for place in places.values():
            artifact = load(place)  # in this process first, so that what is wrong is said plainly
            if not artifact.target.runs_here:
                goal = artifact.target
                raise TargetError(f"{place} is for {goal.name} ({goal.arch}); measure it on such a host")
        say(f"measure {', '.join(places)}")
        timings = isolated(
            {name: functools.partial(_call, str(place), batch, threads) for name, place in places.items()},
            rounds=rounds,
            threads=threads,
        )
    first = timings[str(directory)]
    speedups = {name: ratio(timing, first) for name, timing in timings.items() if timing is not first}
    if json:
        found = {name: {k: v for k, v in asdict(t).items() if k != "samples"} for name, t in timings.items()}
        print_json({
            "batch": batch, "timings": found,
            "speedup": {name: asdict(speedup) for name, speedup in speedups.items()},
        })  # fmt: skip
        return
    from ..report.sections import timing_section

    rows = {name: (timing, "") for name, timing in timings.items()}
    for name, speedup in speedups.items():
        rows[str(directory)] = (first, f"{speedup} than {name}")
    used = "default threads" if threads is None else f"threads: {threads}"
    caption = f"batch {batch}, {used}" + (", called in turn" if against is not None else "")
    print_tables([timing_section(rows, caption)])


def _call(directory: str, batch: int, threads: int | None) -> Callable[[], Any]:
    """What a measuring process runs: the artifact on inputs of its own specification."""
    from ..artifact import load

    artifact = load(directory, threads)
    inputs = [_example(spec, batch) for spec in artifact.inputs]
    return lambda: artifact.run(*inputs)


def _example(spec: Any, batch: int) -> torch.Tensor:
    import torch

    from ..frontend.input_text import values

    shape = [size if isinstance(size, int) else batch for size in spec.shape]
    return values(shape, getattr(torch, spec.dtype), torch.Generator().manual_seed(0))
