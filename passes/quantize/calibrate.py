"""The range of every quantized value, from calibration inputs, a batch at a time.

>>> import torch, graphprune
>>> from graphprune.target import get
>>> from .annotate import annotate
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> found = annotate(graph, get("cpu").integers)
>>> ranges, notes = calibrate(found, [(torch.tensor([[-1.0, 0.0, 3.0]]),)], "minmax", {})
>>> [(value.name, round(how.low, 3), round(how.high, 3)) for value, how in ranges.items()], notes
([('input_1', -1.004, 2.996)], ())
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import fx

from graphprune.errors import InputError
from graphprune.graph import Graph
from graphprune.notes import Note
from graphprune.quantization.observers import Observer, observer
from graphprune.quantization.parameters import INT8, UINT8, Parameters, of_centred, of_range
from graphprune.runner import Runner

from .annotate import Annotation

# A value whose largest magnitude is this many times its 99.9th percentile gets a warning.
OUTLIER = 20.0


def calibrate(
    found: Annotation, calls: Sequence[Sequence[torch.Tensor]], name: str, options: Mapping[str, float]
) -> tuple[dict[fx.Node, Parameters], tuple[Note, ...]]:
    """Parameters of every value that others take their scale from, and what was odd about them.

    Args:
        found: the annotated graph.
        calls: flat inputs of each batch.
        name, options: of the observer (:mod:`graphprune.quantization.observers`).

    Raises:
        InputError: the observer is unknown, or a value is not finite on these inputs.
    """
    watched = {chief: observer(name, **options) for chief in dict.fromkeys(found.values.values())}
    moved = {found.ends[node] for node, role in found.runs.items() if role == "shares"}
    seen_by = {
        value: watched[chief] for value, chief in found.values.items() if value not in moved or value is chief
    }
    for call in calls:
        _watch(found.graph, call, seen_by)
    form, centred = found.scheme.activation, found.centred
    ranges = {
        chief: _centred(watch, centred[chief]) if chief in centred else of_range(*watch.range(form), form)
        for chief, watch in watched.items()
    }
    return ranges, tuple(_odd(found.graph, watched))


def _centred(watch: Observer, signed: bool) -> Parameters:
    if not signed:
        low, high = watch.range(UINT8)
        if low >= 0:
            return of_range(low, high, UINT8)
    return of_centred(*watch.range(INT8))


def _watch(graph: Graph, call: Sequence[torch.Tensor], seen_by: Mapping[fx.Node, Observer]) -> None:
    runner = Runner(graph, [call], keep=[*seen_by])
    for value, watch in seen_by.items():
        if value.op != "get_attr":
            runner.advance(value)
        try:
            watch.see(runner.values(value)[0])
        except InputError as error:
            raise InputError(f"{graph.where(value)}: {error}") from error
        runner.release(value)


def _odd(graph: Graph, watched: Mapping[fx.Node, Observer]) -> Iterable[Note]:
    for value, watch in watched.items():
        if watch.constant:
            yield Note("warning", value.name, "has one value on all calibration inputs; its scale is a guess")
        elif watch.outlier > OUTLIER:
            yield Note(
                "warning", value.name,
                f"its largest value is {watch.outlier:.0f} times its 99.9th percentile; "
                "an observer that clips (percentile, mse, entropy) may suit it better",
            )  # fmt: skip
