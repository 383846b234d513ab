"""``graphprune tune``: what plans and compilers need to know of this machine, measured ahead of time."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .console import Debug, Json, print_json, stage

if TYPE_CHECKING:
    from ..latency.tuning import Progress


def tune(
    source: Annotated[
        str,
        typer.Argument(
            help="module:callable, FILE.pt2, timm:NAME, torchvision:NAME, transformers:PATH_OR_TYPE."
        ),
    ],
    target: Annotated[str, typer.Option(help="A target that is this host.")] = "cpu",
    backend: Annotated[str, typer.Option(help="A backend's name, or auto for the target's.")] = "auto",
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Example input, [NAME=]SHAPE[:DTYPE], as in 1x3x224x224; repeatable."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Threads of the runtime; default: its own.")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(help="How long at most; what was measured until then is kept.")
    ] = None,
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Measure anew what is there.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure a model's operators on this host, at the widths that pruning comes by.

    A latency budget (`optimize --latency`) reads the table. Each time is kept as soon as it is measured: a
    run that was stopped or killed goes on where it was. Backends with a tuner of their own run that.
    """
    from ..frontend import sources
    from ..frontend.input_text import parse_inputs
    from ..latency import tuning
    from ..threads import checked

    checked(threads)  # said before the model is loaded
    with stage(json) as say:
        say(f"load {source}")
        found = sources.resolve(source, Path("."))
    example_inputs, example_kwargs = found.example_inputs, None
    if inputs:
        example_inputs, example_kwargs = parse_inputs(tuple(inputs))
    redirect = contextlib.redirect_stdout(sys.stderr) if json else contextlib.nullcontext()
    with redirect, _bar() as progress:
        tuned = tuning.tune(
            found.model, example_inputs, example_kwargs=example_kwargs, target=target, backend=backend,
            threads=threads, seconds=seconds, rebuild=rebuild, progress=progress,
        )  # fmt: skip
    lines = _lines(tuned)
    if json:
        print_json(tuned.to_json() if hasattr(tuned, "to_json") else {"result": lines})
    else:
        print("\n".join(lines))


def _lines(tuned: Any) -> list[str]:
    """What the table's tuner gave, or a backend's own, which may be anything."""
    return [str(line) for line in getattr(tuned, "lines", (tuned,))]


@contextlib.contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar on a terminal, a line now and then in a log."""
    if not sys.stderr.isatty():
        yield _log()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.completed:.0f} of {task.total:.0f}"), BarColumn(), TimeElapsedColumn(),
        TimeRemainingColumn(), TextColumn("{task.description}", markup=False),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as shown:
        task = shown.add_task("", total=1)
        yield lambda done, total, label: shown.update(task, completed=done, total=total, description=label)


def _log() -> Callable[[float, float, str], None]:
    shown = -1.0

    def progress(done: float, total: float, label: str) -> None:
        nonlocal shown
        if not total or done / total >= shown + 0.1 or shown < 0:
            shown = done / total if total else 0.0
            print(f"{done:.0f} of {total:.0f}: {label}", file=sys.stderr, flush=True)

    return progress
