"""What ``optimize`` measures of what it built: which backend is the fastest, and the artifact's latency."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from .building import Built, said
from .choice import Contestant, fastest, opener
from .frontend.inputs import undisturbed
from .graph import Graph
from .lowering import Deployment, unmeasurable
from .measure import interleaved, ratio
from .original import Original
from .report import Latency
from .target import Target


def kept(
    built: Sequence[Built],
    flat: Sequence[torch.Tensor],
    measured: bool,
    threads: int | None,
    rounds: int,
    say: Callable[[str], None],
) -> tuple[Built, tuple[Contestant, ...], tuple[str, ...]]:
    """The fastest artifact, or the first where nothing is measured; all as measured; and what was lost.

    Raises:
        BackendError: none of several could be opened again and run.
    """
    lost: list[str] = []
    left = {one.name: one for one in built}
    while measured and len(left) > 1:
        say(f"measure {', '.join(left)}")
        openers = {
            name: partial(_run_once, name, opener(one.deployment, flat, threads))
            for name, one in left.items()
        }
        try:
            contestants = fastest(openers, threads=threads, rounds=rounds)
        except _Lost as error:
            del left[error.name]
            lost.append(f"backend {error.name!r} was not taken: opened again to be measured, {error}")
            continue
        chosen = next(contestant.backend for contestant in contestants if contestant.chosen)
        return left[chosen], contestants, tuple(lost)
    return next(iter(left.values())), (), tuple(lost)


class _Lost(Exception):
    """A candidate that was built and proved fails when it is opened again."""

    def __init__(self, name: str, error: Exception):
        super().__init__(said(error))
        self.name = name


def _run_once(name: str, opening: Callable[[], Callable[[], Any]]) -> Callable[[], Any]:
    """A candidate opened and run once."""
    try:
        call = opening()
        call()
    except Exception as error:  # whatever is wrong with one, the others go on
        raise _Lost(name, error) from error
    return call


def not_measured(backend: str, measured: bool, name: str, target: Target) -> tuple[str, ...]:
    """Of several backends the first was taken, as none was timed on this host."""
    if measured or (backend != "auto" and "," not in backend):
        return ()
    why = "measure=False" if target.runs_here else f"the target is {target.arch}"
    return (f"backend {backend!r} is {name}: {why}, so none was measured here",)


def latency_of(
    original: Original,
    deployment: Deployment,
    floating: Graph | None,
    wanted: bool,
    threads: int | None,
    rounds: int,
    say: Callable[[str], None],
) -> Latency:
    """The original in eager mode, the artifact and, if that has integers, its graph in float, in turn."""
    reason = unmeasurable(deployment) if wanted else "not measured: measure=False"
    runner = deployment.runner
    if reason or runner is None:
        return Latency(threads=threads, reason=reason)
    say("measure latency")
    args, kwargs = original.example
    flat = original.graph.signature.flatten(args, kwargs)
    contestants = {"original": lambda: original.model(*args, **kwargs), "artifact": lambda: runner(*flat)}
    if floating is not None:
        float_runner = deployment.reopened(floating, threads)
        contestants["unrounded"] = lambda: float_runner(*flat)
    with undisturbed(original.model):
        timings = interleaved(contestants, rounds=rounds, threads=threads)
    eager, artifact, unrounded = timings["original"], timings["artifact"], timings.get("unrounded")
    gain = None if unrounded is None else ratio(unrounded, artifact)
    return Latency(eager, artifact, ratio(eager, artifact), unrounded, gain, threads, _host())


def slower_in_integers(timing: Latency) -> tuple[str, ...]:
    """Integers that cost time instead of saving it."""
    if timing.gain is None or timing.gain.high >= 1:
        return ()
    return (
        f"on this host the artifact takes {1 / timing.gain.median:.2f} times as long as the same network in "
        "float: leave precision out, or keep operators that do not pay in float with quantize{ignored=…}",
    )


def _host() -> str:
    return f"{platform.machine()} with {os.cpu_count()} cores"
