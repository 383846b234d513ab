"""A graph as an ``nn.Module`` that runs, trains, saves its state and exports.

Batch normalisation and dropout follow ``train()`` and ``eval()``: capture marks the nodes whose
training flag came from a module's mode (``node.meta["follows_training"]``), and changing the mode
rewrites that flag in the code. A normalisation that was always in training mode (weight
standardisation), or never (frozen statistics), is not marked and stays as it is.
"""

from __future__ import annotations

import copy
import inspect
from dataclasses import fields
from typing import Any

import torch
from torch import fx

from .errors import InputError
from .graph import Graph, clone_tensor

aten = torch.ops.aten

# Where the training flag (or the dropout probability) stands among an operator's arguments.
TRAINING_ARGUMENT = {
    aten.batch_norm.default: 5,
    aten.dropout.default: 2,
    aten.feature_dropout.default: 2,
    aten.alpha_dropout.default: 2,
    aten.feature_alpha_dropout.default: 2,
    aten.instance_norm.default: 5,
}


class TracedModule(fx.GraphModule):
    """A captured graph behind the original's calling convention and parameter names.

    Reached as :attr:`Graph.module`. ``train()`` and ``eval()`` switch batch normalisation and
    dropout; ``copy.deepcopy`` gives an independent module. ``graphprune.optimize`` and
    ``graphprune.trace`` take it back without exporting again.
    """

    def __init__(self, graph: Graph):
        self._source = graph
        root = {**graph.tensors, **graph.bodies}
        super().__init__(root, _copied(graph.fx), class_name="TracedModule")
        for name in graph.tensors:
            if name not in graph.persistent and name not in dict(self.named_parameters()):
                self._mark_non_persistent(name)
        for alias, name in graph.tied.items():
            self._tie(alias, graph.tensors[name])
        super().train(False)

    # fx.GraphModule.__init__ runs nn.Module.__init__, which would clear plain attributes; keep ours outside.
    @property
    def _source(self) -> Graph:
        return self.__dict__["_graphprune_source"]

    @_source.setter
    def _source(self, graph: Graph) -> None:
        self.__dict__["_graphprune_source"] = graph

    def recompile(self) -> Any:
        """Compile the flat graph and put the caller's calling convention around it."""
        code = super().recompile()
        cls: Any = type(self)
        cls.flat = cls.forward

        def forward(self: TracedModule, *args: Any, **kwargs: Any) -> Any:
            signature = self._source.signature
            # Looked up now: a hook that runs before a pass may have changed what the pass is to compute.
            flat: Any = type(self).flat  # type: ignore[attr-defined]
            return signature.unflatten(flat(self, *signature.flatten(args, kwargs)))

        cls.forward = forward
        return code

    def train(self, mode: bool = True) -> TracedModule:
        """Switch the nodes that follow the mode, then the module as usual."""
        super().train(mode)
        changed = False
        for node in self.graph.nodes:
            if node.meta.get("follows_training"):
                changed |= _set_training(node, mode)
        if changed:
            self.recompile()
        return self

    @property
    def captured(self) -> Graph:
        """The graph, with this module's parameters as they are now (shared, not copied)."""
        state = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        graph = self._source.copy()
        graph.tensors = {name: state[name] for name in graph.tensors}
        return graph

    def become(self, graph: Graph) -> None:
        """Take on another graph in place; the graph that this is the module of becomes that one, too.

        Tensors that both have stay the same objects, so that an optimizer goes on with its parameters.

        Args:
            graph: a rewrite of :attr:`captured`; it gives its operators and tensors away.
        """
        training, gone = self.training, {*self._source.tensors, *self._source.tied}
        source = self._source
        for entry in fields(graph):
            if not entry.name.startswith("_"):
                setattr(source, entry.name, getattr(graph, entry.name))
        source._typing = source._axes = source._dependencies = None
        for name in gone - {*source.tensors, *source.tied}:
            module, leaf = self._owner(name)
            delattr(module, leaf)
        for name, value in source.tensors.items():
            self._put(name, value)
        for alias, name in source.tied.items():
            self._put(alias, source.tensors[name])
        for name, body in source.bodies.items():
            setattr(self, name, body)
        self.graph = _copied(source.fx)
        self.train(False)
        if training:
            self.train(True)

    def __deepcopy__(self, memo: dict[int, Any]) -> TracedModule:
        graph = self.captured
        graph.tensors = {k: clone_tensor(v) for k, v in graph.tensors.items()}
        twin = TracedModule(graph)
        twin.train(self.training)
        for (_, parameter), (_, copied) in zip(self.named_parameters(), twin.named_parameters(), strict=True):
            copied.grad = copy.deepcopy(parameter.grad, memo)
        memo[id(self)] = twin
        return twin

    def __reduce__(self) -> Any:
        raise TypeError("a TracedModule is not pickled; save its state_dict(), or result.save(directory)")

    def _owner(self, name: str) -> tuple[torch.nn.Module, str]:
        path, _, leaf = name.rpartition(".")
        module: torch.nn.Module = self
        for part in path.split(".") if path else ():
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        return module, leaf

    def _put(self, name: str, value: torch.Tensor) -> None:
        """Set a parameter or buffer under its qualified name."""
        module, leaf = self._owner(name)
        if isinstance(value, torch.nn.Parameter) or leaf in module._buffers:
            setattr(module, leaf, value)
        else:
            module.register_buffer(leaf, value, persistent=name in self._source.persistent)

    def _tie(self, alias: str, value: torch.Tensor) -> None:
        module, leaf = self._owner(alias)
        setattr(module, leaf, value)

    def _mark_non_persistent(self, name: str) -> None:
        module, leaf = self._owner(name)
        module._non_persistent_buffers_set.add(leaf)


def require_traced(module: object) -> None:
    """Raise :class:`InputError` unless ``module`` is a traced one."""
    if not isinstance(module, TracedModule):
        raise InputError(
            f"what is trained here is a traced network, not a {type(module).__name__}; make one with "
            "graphprune.trace(model, example_inputs).module, or take result.module"
        )


def _copied(graph: fx.Graph) -> fx.Graph:
    own = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapping[node] = own.node_copy(node, lambda n: mapping[n])
    return own


def _set_training(node: fx.Node, mode: bool) -> bool:
    """Write the mode into a node's training flag; whether that changed it."""
    if node.target is aten.scaled_dot_product_attention.default:
        probability = node.meta["follows_training"] if mode else 0.0
        args = [*node.args, None, 0.0][:5] if len(node.args) < 5 else list(node.args)
        args[4] = probability
        old, node.args = node.args, tuple(args)
        return old != node.args
    index = TRAINING_ARGUMENT[node.target]  # type: ignore[index]
    old = node.args
    node.args = (*node.args[:index], mode, *node.args[index + 1 :])
    return old != node.args


class Called(torch.nn.Module):
    """A traced module for ``torch.export``, which looks through an fx module to its flat graph.

    It shares the module's parameters, buffers and children, and is called as it is: the structure of the
    result and the names of the arguments stay.
    """

    def __init__(self, module: TracedModule):
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self.__dict__["_traced"] = module
        names = module._source.signature
        keywords = [name for name in names.arguments if name not in names.positional]
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names.positional]
        parameters += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in keywords]
        self.forward = _forwards(module, inspect.Signature(parameters))


def _forwards(module: TracedModule, signature: inspect.Signature) -> Any:
    def forward(*args: Any, **kwargs: Any) -> Any:
        return type(module).forward(module, *args, **kwargs)

    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
