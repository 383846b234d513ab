"""What is timed: three ways to run one network, each in a process of its own.

`prepare` makes the files in the parent; the other functions run in a worker and return the call. A call runs
the network `repeat` times, so that also a network of a few hundred microseconds is timed over several
milliseconds.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

import graphprune
from benchmarks.runtime.networks import get
from graphprune.backend import Audit, Lowered
from graphprune.registry import backends
from graphprune.target import get as get_target

PLAIN, ARTIFACT = "plain.onnx", "artifact"

Call = Callable[[], Any]


def prepare(name: str, folder: Path) -> dict[str, dict[str, int]]:
    """Export the network to `PLAIN` and compile it to `ARTIFACT` in `folder`.

    Returns:
        For both, how many of which operators ONNX Runtime executes on this host.
    """
    network = get(name)
    model, args, kwargs = network.build(), network.args(), network.kwargs()
    # Without gradients, as an artifact is: with them, the exporter fails on the strides of T5's attention.
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(model, args, kwargs=kwargs, dynamo=True)
    assert program is not None
    program.save(str(folder / PLAIN))
    with _quiet():
        result = graphprune.optimize(model, args, example_kwargs=kwargs or None, measure=False)
    result.save(folder / ARTIFACT)
    backend = backends.load("onnxruntime")()
    plain = Lowered(
        backend="onnxruntime", inputs=(), outputs=(), files={"model.onnx": (folder / PLAIN).read_bytes()},
        versions={},
    )  # fmt: skip
    return {
        "plain": _operators(backend.audit(plain, get_target("cpu"))),
        "artifact": _operators(result.audit()),
    }


def _operators(audit: Audit) -> dict[str, int]:
    return dict(sorted(Counter(row.operator for row in audit.rows).items()))


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter prints its progress and warns about its own internals."""
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def eager(name: str, repeat: int) -> Call:
    """The original, in evaluation mode without gradients."""
    network = get(name)
    model, args, kwargs = network.build(), network.args(), network.kwargs()
    return _repeated(lambda: model(*args, **kwargs), repeat)


def plain(name: str, repeat: int, folder: Path, threads: int) -> Call:
    """`torch.onnx.export` as it comes, in an ONNX Runtime session with its defaults but for the threads.

    Tensors go in and come out, as they do for the others, by the least code that does it.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(folder / PLAIN, options, providers=["CPUExecutionProvider"])
    network = get(name)
    values = [*network.args(), *network.kwargs().values()]
    names = [value.name for value in session.get_inputs()]

    def call() -> list[torch.Tensor]:
        feed = {key: value.numpy() for key, value in zip(names, values, strict=True)}
        return [torch.from_numpy(value) for value in session.run(None, feed)]

    return _repeated(call, repeat)


def artifact(name: str, repeat: int, folder: Path, threads: int) -> Call:
    """What `graphprune.load` opens, called with the original's own arguments."""
    runner = graphprune.load(folder / ARTIFACT, threads=threads)
    network = get(name)
    args, kwargs = network.args(), network.kwargs()
    return _repeated(lambda: runner(*args, **kwargs), repeat)


def _repeated(call: Call, repeat: int) -> Call:
    def run() -> None:
        for _ in range(repeat):
            call()

    return run


def factories(name: str, repeat: int, folder: Path, threads: int) -> dict[str, Callable[[], Call]]:
    """Every candidate; the plain export is there twice, and what differs between the two is noise."""
    return {
        "eager": partial(eager, name, repeat),
        "plain": partial(plain, name, repeat, folder, threads),
        "artifact": partial(artifact, name, repeat, folder, threads),
        "plain again": partial(plain, name, repeat, folder, threads),
    }
