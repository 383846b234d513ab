"""What is timed of a network: eager torch, other tools, and every artifact of ours, each in its own process.

A turn runs the network ``repeat`` times. The plain export is there twice: the ratio of the two is noise.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import torch

import graphprune
from benchmarks.backends.making import BACKENDS, CONVERTED, INPUTS, NNCF, PLAIN, PRECISIONS, SAME, place
from benchmarks.backends.networks import Setup
from benchmarks.quantization.measure import openvino_call
from graphprune.choice import Contestant, fastest
from graphprune.measure import Timing, isolated
from graphprune.sittings import one_turn, pooled

TURN = 0.06  # seconds that a turn lasts
PILOT = 4  # rounds that say how many runs that are
PAUSE = 0.02

EAGER, COMPILED = "eager", "torch.compile"
ORT, AGAIN = "ONNX Runtime", "ONNX Runtime, again"
OV, OV_FLOAT = "OpenVINO", "OpenVINO, float32"
OV_INT8, OV_INT8_FLOAT = "NNCF + OpenVINO", "NNCF + OpenVINO, float32"

Call = Callable[[], Any]


def timed(setup: Setup, folder: Path, threads: int, rounds: int, sittings: int) -> dict[str, Timing]:
    """All contestants in turns, ms of one run.

    Every sitting has so many rounds and processes of its own: where its memory and threads come to lie makes
    a process faster or slower for as long as it lives. A turn of each lasts as long, so that for all of them
    as small a part of it is the first run, whose weights the others have driven out of the caches.
    """
    multiprocessing.set_forkserver_preload([__name__])  # a score of processes, each with torch in it
    found = contestants(folder)

    def sitting(rounds: int, repeats: dict[str, int]) -> dict[str, list[float]]:
        calls = {name: partial(how, setup, folder, threads, repeats[name]) for name, how in found.items()}
        taken = isolated(calls, rounds=rounds, warmup=2, threads=threads, pause=PAUSE, start="forkserver")
        return {name: [ms / repeats[name] for ms in timing.samples] for name, timing in taken.items()}

    first = sitting(PILOT, dict.fromkeys(found, 1))
    repeats = {name: max(1, round(TURN * 1e3 / min(samples))) for name, samples in first.items()}
    samples: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(sittings):
        for name, values in sitting(rounds, repeats).items():
            samples[name] += values
    return {name: pooled(values, threads) for name, values in samples.items()}


def contestants(folder: Path) -> dict[str, Callable[[Setup, Path, int, int], Call]]:
    """What there is to time in a folder."""
    found: dict[str, Callable[[Setup, Path, int, int], Call]] = {
        EAGER: eager, COMPILED: compiled, ORT: plain, AGAIN: plain,
    }  # fmt: skip
    if (folder / CONVERTED).exists():
        found[OV] = partial(openvino, CONVERTED, "")
        found[OV_FLOAT] = partial(openvino, CONVERTED, "f32")
    if (folder / NNCF).exists():
        found[OV_INT8] = partial(openvino, NNCF, "")
        found[OV_INT8_FLOAT] = partial(openvino, NNCF, "f32")
    found |= {label: partial(artifact, path) for label, path in artifacts(folder).items()}
    return found


def artifacts(folder: Path) -> dict[str, Path]:
    """``backend, precision`` → artifact of ours."""
    return {
        f"{backend}, {precision}": path
        for backend in BACKENDS
        for precision in PRECISIONS
        if (path := place(folder, backend, precision)).exists()
    }


def automatic(setup: Setup, folder: Path, precision: str, threads: int) -> tuple[Contestant, ...]:
    """What ``backend="auto"`` measures and takes among the artifacts of a precision."""
    made = artifacts(folder)
    paths = {b: made.get(f"{b}, {precision}", made.get(f"{b}, {SAME.get(precision)}")) for b in BACKENDS}
    openers = {b: partial(_opened, path, threads) for b, path in paths.items() if path is not None}
    return fastest(openers, threads=threads)


def eager(setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """The network as it is, without gradients."""
    return partial(one_turn, partial(setup.model(), *setup.inputs()), repeat)


def compiled(setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """``torch.compile`` with its defaults."""
    return partial(one_turn, partial(torch.compile(setup.model()), *setup.inputs()), repeat)


def plain(setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """`torch.onnx.export` as it comes, ONNX Runtime with its defaults but for the threads."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = ort.InferenceSession(folder / PLAIN, options, providers=["CPUExecutionProvider"])
    given = inputs(folder)

    def call() -> list[torch.Tensor]:
        feed = {name: value.numpy() for name, value in given.items()}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return partial(one_turn, call, repeat)


def openvino(file: str, floats: str, setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """OpenVINO by :func:`benchmarks.quantization.measure.openvino_call`, in its own interpreter."""
    return openvino_call(folder / file, folder / INPUTS, threads, repeat, setup.batch, floats)


def artifact(path: Path, setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """What ``graphprune.load`` opens, called with the original's own arguments."""
    return partial(one_turn, _opened(path, threads), repeat)


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """The batch that everything is called with, in the order of the network's arguments."""
    return {name: torch.from_numpy(values) for name, values in np.load(folder / INPUTS).items()}


def _opened(path: Path, threads: int) -> Call:
    return partial(graphprune.load(path, threads=threads), *inputs(path.parent).values())
