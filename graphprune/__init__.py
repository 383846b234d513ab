"""graphprune: a compiler for finished PyTorch models.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU()).eval()
>>> graph = graphprune.trace(model, torch.zeros(1, 3, 8, 8))
>>> [node.name for node in graph.nodes if node.op == "call_function"]
['conv2d', 'batch_norm', 'relu']

Everything here loads when it is first named: importing this package imports nothing else, not even torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import verify
    from .api import optimize
    from .artifact import load
    from .axes.axis import Axis
    from .axes.typing import rule
    from .errors import GraphpruneError
    from .frontend.capture import capture as trace
    from .graph import Graph
    from .pipeline import Context, Note, Pass, PassResult, Pipeline
    from .plans.plan import Plan
    from .report import Report
    from .result import Result
    from .target import Target
    from .verify import Certificate

__version__ = "0.1.0"

# Public name -> where it lives. A new name is one line here and one in __all__ and above.
_EXPORTS = {
    "Axis": "axes.axis:Axis",
    "Certificate": "verify:Certificate",
    "Context": "pipeline:Context",
    "Graph": "graph:Graph",
    "GraphpruneError": "errors:GraphpruneError",
    "Note": "pipeline:Note",
    "Pass": "pipeline:Pass",
    "PassResult": "pipeline:PassResult",
    "Pipeline": "pipeline:Pipeline",
    "Plan": "plans.plan:Plan",
    "Report": "report:Report",
    "Result": "result:Result",
    "Target": "target:Target",
    "load": "artifact:load",
    "optimize": "api:optimize",
    "rule": "axes.typing:rule",
    "trace": "frontend.capture:capture",
    "verify": "verify:",
}

__all__ = [
    "Axis",
    "Certificate",
    "Context",
    "Graph",
    "GraphpruneError",
    "Note",
    "Pass",
    "PassResult",
    "Pipeline",
    "Plan",
    "Report",
    "Result",
    "Target",
    "load",
    "optimize",
    "rule",
    "trace",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _EXPORTS[name].partition(":")
    value = importlib.import_module(f".{module}", __name__)
    if attribute:
        value = getattr(value, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
