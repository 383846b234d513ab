"""Which operators a caller means: by the name of the operator, of its module, or of a parameter it reads."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase

from torch import fx

from graphprune.errors import InputError
from graphprune.graph import Graph


class Selection:
    """What ``ignored`` and ``only`` leave.

    Args:
        graph: whose names they are.
        ignored, only: names or globs; a module's name stands for all within it.

    Raises:
        InputError: one of them matches nothing.
    """

    def __init__(self, graph: Graph, ignored: tuple[str, ...], only: tuple[str, ...]):
        self._ignored, self._only = ignored, only
        known = [name for node in graph.fx.nodes if node.op == "call_function" for name in _names(node)]
        for option, patterns in (("ignored", ignored), ("only", only)):
            for pattern in patterns:
                if not any(_matches(name, pattern) for name in known):
                    raise InputError(
                        f"{option}={pattern!r} matches no operator, module or parameter; "
                        "names are those that the report and `graphprune inspect` print"
                    )

    def skipped(self, node: fx.Node) -> str:
        """Why an operator stays in float; empty where it may be quantized."""
        names = _names(node)
        for pattern in self._ignored:
            if any(_matches(name, pattern) for name in names):
                return f"ignored={pattern!r}"
        if self._only and not any(_matches(name, p) for p in self._only for name in names):
            return "it is not among `only`"
        return ""


def _names(node: fx.Node) -> list[str]:
    module = node.meta.get("module")
    parameters = [str(n.target) for n in _read(node) if n.op == "get_attr"]
    return [node.name, *([module] if module else []), *parameters]


def _read(node: fx.Node) -> Iterator[fx.Node]:
    """What a node reads, and what that is made of where parameters alone make it, as a masked weight."""
    for read in node.all_input_nodes:
        inner = read.all_input_nodes
        yield read
        if read.op == "call_function" and all(n.op == "get_attr" for n in inner):
            yield from inner


def _matches(name: str, pattern: str) -> bool:
    return fnmatchcase(name, pattern) or name.startswith(f"{pattern}.")
