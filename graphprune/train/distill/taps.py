"""Values inside a network, caught while it runs, by node name or module path.

An ``nn.Module`` has hooks. A traced network has operators, and its modules only hold parameters: there an
operator that hands the value over stands in the code behind the one that computes it, until the taps are
taken off. A module path means the same in both, so that a pruned network's values can be compared with those
of the network that it was: the module's result, of its last call where there are several. In a traced
network a node's name works too.

Values are as the module gave them, also where the operator that reads them writes into them
(``ReLU(inplace=True)``).

>>> import torch
>>> network = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU())
>>> taps = Taps(network, ["0"], "network")
>>> taps.attach()
>>> _ = network(torch.zeros(4, 2))
>>> taps.take()["0"].shape
torch.Size([4, 3])
>>> taps.detach()
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from graphprune.errors import InputError
from graphprune.module import TracedModule


class Taps:
    """Catches the values of some layers of one network.

    Args:
        network: whose values.
        names: module paths, or names of nodes in a traced network.
        role: what errors call the network: "teacher", "student".

    Raises:
        InputError: a name is unknown, or has more than one result.
    """

    def __init__(self, network: nn.Module, names: Iterable[str], role: str):
        self.network, self.role = network, role
        self.names = tuple(dict.fromkeys(names))
        self._values: dict[str, Tensor] = {}
        self._hooks: list[Any] = []
        self._graph: fx.Graph | None = None
        self._nodes: list[fx.Node] = []
        for name in self.names:
            self._find(name)

    def attach(self) -> None:
        """Begin to catch; again after a traced network has become another (pruned in place), else nothing."""
        if isinstance(self.network, TracedModule):
            if self._graph is not self.network.graph:
                self._tap(self.network)
        elif not self._hooks:
            for name in self.names:
                module = self.network.get_submodule(name)
                self._hooks.append(module.register_forward_hook(self._hook(name)))

    def detach(self) -> None:
        """Leave the network as it was."""
        for hook in self._hooks:
            hook.remove()
        if isinstance(self.network, TracedModule) and self._graph is self.network.graph:
            for node in self._nodes:
                self._graph.erase_node(node)
            self.network.recompile()
        self._hooks, self._nodes, self._graph = [], [], None
        self._values.clear()

    def take(self) -> dict[str, Tensor]:
        """The values of the last run by name, once.

        Raises:
            InputError: the network has not run since they were last taken.
        """
        missing = [name for name in self.names if name not in self._values]
        if missing:
            raise InputError(
                f"the {self.role} gave no value for {missing[0]!r}: run it inside `with distillation:`, once "
                "for every call of loss; after its graph was replaced, call distillation.attach()"
            )
        values = dict(self._values)
        self._values.clear()
        return values

    def _hook(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            self._values[name] = first_tensor(result, f"{self.role}'s {name!r}").clone()

        return hook

    def _tap(self, network: TracedModule) -> None:
        self._graph, self._nodes = network.graph, []
        for name in self.names:
            node = _node(network, name, self.role)
            with self._graph.inserting_after(node):
                self._nodes.append(self._graph.call_function(_writer(self._values, name), (node,)))
        network.recompile()

    def _find(self, name: str) -> None:
        if isinstance(self.network, TracedModule):
            _node(self.network, name, self.role)
            return
        known = dict(self.network.named_modules())
        if name not in known:
            raise InputError(
                f"the {self.role} has no module {name!r}{_nearest(name, known)}; "
                "names of nodes work in a traced network only"
            )


def first_tensor(value: Any, where: str) -> Tensor:
    """The tensor itself, or the first one of a tuple, list or mapping.

    Raises:
        InputError: there is none.
    """
    if isinstance(value, Tensor):
        return value
    parts = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else ()
    )
    for part in parts:
        if isinstance(part, (Tensor, tuple, list, Mapping)):
            return first_tensor(part, where)
    raise InputError(f"{where} gives no tensor but {type(value).__name__}")


def _writer(values: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    def record(value: Tensor) -> None:
        values[name] = value

    return record


def _node(network: TracedModule, name: str, role: str) -> fx.Node:
    """The operator whose value a name means."""
    nodes = [n for n in network.graph.nodes if n.op in ("call_function", "placeholder")]
    tensors = [n for n in nodes if isinstance(n.meta.get("val"), Tensor)]
    inside = {n for n in tensors if name in _paths(n)}
    results = [n for n in tensors if n in inside and any(user not in inside for user in n.users)]
    if results:
        call = nodes[_start_of_last_call(nodes, inside, results[-1]) :]
        ambiguous = [n.name for n in results if n in call]
        if len(ambiguous) > 1:
            raise InputError(
                f"module {name!r} of the {role} has several results ({', '.join(ambiguous)}); name one of "
                "these nodes"
            )
        return results[-1]
    for node in tensors:
        if node.name == name:
            return node
    known = {path for n in tensors for path in _paths(n)} | {n.name for n in tensors}
    raise InputError(f"the {role} has neither a module nor a node {name!r}{_nearest(name, known)}")


def _paths(node: fx.Node) -> list[str]:
    """Every module path that a node stands in, without the network's own."""
    parts = (node.meta.get("module") or "").split("@")[0].split(".")
    return [path for i in range(1, len(parts) + 1) if (path := ".".join(parts[:i]))]


def _start_of_last_call(nodes: list[fx.Node], inside: set[fx.Node], last: fx.Node) -> int:
    """Where the unbroken run of a module's operators that ends with ``last`` begins."""
    place = nodes.index(last)
    while place and nodes[place - 1] in inside:
        place -= 1
    return place


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, [k for k in known if k], n=3, cutoff=0.4)
    return f" (the nearest: {', '.join(map(repr, close))})" if close else ""
