"""What is timed of a network: eager torch, other tools, and every artifact of ours, each in its own process.

A call runs the network ``repeat`` times. The plain export is there twice: the ratio of the two is noise.
"""

from __future__ import annotations

import multiprocessing
import time
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

TURN = 0.03  # seconds that a turn of the plain export lasts at least
PAUSE = 0.02

EAGER, COMPILED = "eager", "torch.compile"
ORT, AGAIN = "ONNX Runtime", "ONNX Runtime, again"
OV, OV_FLOAT = "OpenVINO", "OpenVINO, float32"
OV_INT8, OV_INT8_FLOAT = "NNCF + OpenVINO", "NNCF + OpenVINO, float32"

Call = Callable[[], Any]


def timed(setup: Setup, folder: Path, threads: int, rounds: int) -> tuple[dict[str, Timing], int]:
    """All contestants in turns, and how many runs a turn has."""
    first = plain(setup, folder, threads, 1)
    lasted = []
    for _ in range(4):
        start = time.perf_counter()
        first()
        lasted.append(time.perf_counter() - start)
    repeat = max(1, round(TURN / min(lasted)))
    multiprocessing.set_forkserver_preload([__name__])  # a score of processes, each with torch in it
    calls = {name: partial(how, setup, folder, threads, repeat) for name, how in contestants(folder).items()}
    timings = isolated(calls, rounds=rounds, warmup=2, threads=threads, pause=PAUSE, start="forkserver")
    return timings, repeat


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
    return _repeated(partial(setup.model(), *setup.inputs()), repeat)


def compiled(setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """``torch.compile`` with its defaults."""
    return _repeated(partial(torch.compile(setup.model()), *setup.inputs()), repeat)


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

    return _repeated(call, repeat)


def openvino(file: str, floats: str, setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """OpenVINO by :func:`benchmarks.quantization.measure.openvino_call`, in its own interpreter."""
    return openvino_call(folder / file, folder / INPUTS, threads, repeat, setup.batch, floats)


def artifact(path: Path, setup: Setup, folder: Path, threads: int, repeat: int) -> Call:
    """What ``graphprune.load`` opens, called with the original's own arguments."""
    return _repeated(_opened(path, threads), repeat)


def inputs(folder: Path) -> dict[str, torch.Tensor]:
    """The batch that everything is called with, in the order of the network's arguments."""
    return {name: torch.from_numpy(values) for name, values in np.load(folder / INPUTS).items()}


def _opened(path: Path, threads: int) -> Call:
    return partial(graphprune.load(path, threads=threads), *inputs(path.parent).values())


def _repeated(call: Call, repeat: int) -> Call:
    def run() -> None:
        for _ in range(repeat):
            call()

    return run
