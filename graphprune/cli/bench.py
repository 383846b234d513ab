"""``graphprune bench``: how long a call of an artifact takes here, alone or against another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Debug, Json, print_json, print_tables, stage

if TYPE_CHECKING:
    import torch

    from ..artifact import LoadedArtifact


def bench(
    directory: Annotated[Path, typer.Argument(help="An artifact directory.")],
    against: Annotated[Path | None, typer.Option(help="Another artifact, called in turn with it.")] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Size of every open dimension; default: 1, or the other's.")
    ] = None,
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
        opened = {}
        for name, place in places.items():
            # In this process first, so that what is wrong is said plainly.
            artifact = opened[name] = load(place, threads)
            if not artifact.target.runs_here:
                goal = artifact.target
                raise TargetError(f"{place} is for {goal.name} ({goal.arch}); measure it on such a host")
        size = _batch(opened, batch)
        say(f"measure {', '.join(places)}")
        timings = isolated(
            {name: functools.partial(_call, str(place), size, threads) for name, place in places.items()},
            rounds=rounds,
            threads=threads,
        )
    first = timings[str(directory)]
    speedups = {name: ratio(timing, first) for name, timing in timings.items() if timing is not first}
    notes = [f"{name}: {note}" for name, artifact in opened.items() for note in artifact.notes]
    if json:
        found = {name: {k: v for k, v in asdict(t).items() if k != "samples"} for name, t in timings.items()}
        print_json({
            "batch": size, "timings": found,
            "speedup": {name: asdict(speedup) for name, speedup in speedups.items()}, "notes": notes,
        })  # fmt: skip
        return
    from ..report.sections import timing_section

    rows = {name: (timing, "") for name, timing in timings.items()}
    for name, speedup in speedups.items():
        rows[str(directory)] = (first, f"{speedup} than {name}")
    used = "default threads" if threads is None else f"threads: {threads}"
    caption = f"batch {size}, {used}" + (", called in turn" if against is not None else "")
    print_tables([timing_section(rows, caption)])
    for note in notes:
        print(f"note: {note}")


def _batch(artifacts: Mapping[str, LoadedArtifact], asked: int | None) -> int:
    """Size of the open dimensions: what was asked for, else that of an artifact without any, else 1.

    Raises:
        InputError: an artifact is fixed at another batch size, or two are at different ones.
    """
    from ..errors import InputError

    fixed: dict[str, int] = {}
    for name, artifact in artifacts.items():
        sizes = [size for spec in artifact.inputs for size in spec.shape]
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            fixed[name] = numbers[0] if numbers else 1
    for name, size in fixed.items():
        if asked not in (None, size):
            raise InputError(
                f"{name} is fixed at batch {size} and has no open size, so nothing can be measured at batch "
                f"{asked}; leave --batch out, or build it with --dynamic-batch"
            )
    if len(set(fixed.values())) > 1:
        found = " and ".join(f"{name} at batch {size}" for name, size in fixed.items())
        raise InputError(f"{found} are fixed, and a call of each is other work; measure each alone")
    return asked or next(iter(fixed.values()), 1)


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
