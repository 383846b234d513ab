"""In-place operators out of a captured graph, without changing what any reader sees.

The graph is rebuilt in order while every storage is followed: a storage has a current value, and each tensor
that lies in it is a chain of views of that value. A write

    v.op_(…)        with  v = view_n(… view_1(base))

becomes ``v' = op(v, …)``, and the change travels back up the chain, each view undone by its inverse (a slice
by ``slice_scatter``, a permutation by the opposite one), to a new value of the base. Whoever reads another
view of it afterwards gets that view taken again, of the new value; scatters that nobody reads
are swept away. This is functionalisation as torch does it, on the operators as captured: dropout and
batch norm stay what they are.

Whether an operator returns a view is asked of the operator itself, on FakeTensors: ``reshape`` may copy.
Where a view cannot be undone, torch's own functionalisation runs on the whole program, which
loses dropout and is said in a note.
"""

from __future__ import annotations

import operator
import warnings
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError

aten = torch.ops.aten


def inline_wrappers(graph: fx.Graph, program: torch.export.ExportedProgram) -> list[str]:
    """Replace ``wrap_with_set_grad_enabled`` / ``wrap_with_autocast`` nodes by their bodies."""
    notes: list[str] = []
    while True:
        wrappers = [n for n in graph.nodes if n.op == "call_function" and "wrap_with_" in str(n.target)]
        if not wrappers:
            _drop_unused_attributes(graph, program)
            return notes
        for node in wrappers:
            body_at = next(
                i for i, a in enumerate(node.args) if isinstance(a, fx.Node) and _is_body(a, program)
            )
            body = program.graph_module.get_submodule(str(node.args[body_at].target))  # type: ignore[union-attr]
            if "autocast" in str(node.target):
                notes.append(f"autocast region {node.name} was inlined at the dtypes it was captured with")
            with graph.inserting_before(node):
                _inline(graph, node, body.graph, node.args[body_at + 1 :])  # type: ignore[arg-type]


def body_nodes(graph: fx.Graph, program: torch.export.ExportedProgram) -> list[fx.Node]:
    """The ``get_attr`` nodes that name a sub-graph, a branch of ``torch.cond`` say."""
    return [n for n in graph.find_nodes(op="get_attr") if _is_body(n, program)]


def _is_body(node: fx.Node, program: torch.export.ExportedProgram) -> bool:
    if node.op != "get_attr":
        return False
    owner = program.graph_module
    return isinstance(getattr(owner, str(node.target), None), fx.GraphModule)


def _inline(graph: fx.Graph, call: fx.Node, body: fx.Graph, operands: tuple[Any, ...]) -> None:
    mapping: dict[fx.Node, Any] = dict(zip(body.find_nodes(op="placeholder"), operands, strict=True))
    for node in body.nodes:
        if node.op in ("placeholder", "output"):
            continue
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = dict(node.meta)
    results = fx.map_arg(body.output_node().args[0], lambda n: mapping[n])
    for user in list(call.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index,arg-type]
        graph.erase_node(user)
    graph.erase_node(call)


def _drop_unused_attributes(graph: fx.Graph, program: torch.export.ExportedProgram) -> None:
    for node in body_nodes(graph, program):
        if not node.users:
            graph.erase_node(node)


def functionalize(
    graph: fx.Graph, tensors: dict[str, torch.Tensor], program: torch.export.ExportedProgram
) -> tuple[list[str], fx.Graph, dict[str, torch.Tensor]]:
    """The program without in-place operators; returns notes, the graph and its tensors.

    Raises:
        CaptureError: forward() writes into a parameter, a buffer or an input.
    """
    for node in graph.find_nodes(op="call_function", target=aten.detach_.default):
        node.target = aten.detach.default  # it writes no value
    if not any(_mutated(node) is not None for node in graph.nodes):
        return [], graph, tensors
    try:
        return [], _Versions().rewrite(graph), tensors
    except _Unsupported as what:
        return _by_torch(program, str(what))


class _Unsupported(Exception):
    """A mutation or a view that this module does not turn round."""


class _Versions:
    """A new graph, written while the old one is walked in execution order.

    Tensors that share a storage form a family under its first tensor, the root. ``value`` holds the new
    node for each old one and ``seen`` the family's version it belongs to. A write gives new values to the
    tensor it names and, by turning each view round, to its parents up to the root; every other member
    is replayed from its parent when it is next read.
    """

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.value: dict[fx.Node, fx.Node] = {}
        self.seen: dict[fx.Node, int] = {}
        self.parent: dict[fx.Node, fx.Node] = {}
        self.root: dict[fx.Node, fx.Node] = {}
        self.version: dict[fx.Node, int] = {}

    def rewrite(self, old: fx.Graph) -> fx.Graph:
        for node in old.nodes:
            changed = _mutated(node)
            parent = changed if changed is not None else _alias_source(node)
            if parent is not None:
                self.parent[node] = parent
            self.root[node] = self.root[parent] if parent is not None else node
            if changed is not None:
                self._write(node, changed)
            else:
                self._store(node, self._copy(node))
        return self.graph

    def read(self, node: fx.Node) -> fx.Node:
        """What an old node holds by now."""
        if self.seen[node] != self.version.get(self.root[node], 0):
            replayed = self.read(self.parent[node]) if _mutated(node) is not None else self._copy(node)
            self._store(node, replayed)
        return self.value[node]

    def _store(self, node: fx.Node, value: fx.Node) -> None:
        self.value[node] = value
        self.seen[node] = self.version.get(self.root[node], 0)

    def _copy(self, node: fx.Node) -> fx.Node:
        copy = self.graph.node_copy(node, self.read)
        copy.meta = dict(node.meta)
        return copy

    def _write(self, node: fx.Node, changed: fx.Node) -> None:
        root = self.root[changed]
        if root.op in ("placeholder", "get_attr"):
            what = f"input {root.name!r}" if root.op == "placeholder" else f"tensor {root.target!r}"
            raise CaptureError(
                f"forward() writes into {what} ({node.name}); a compiled network has no state: "
                "compute a new tensor instead, and return it if the caller needs it"
            )
        written = {changed: self._functional(node, changed)}
        child = changed
        while child in self.parent:
            parent = self.parent[child]
            if child.target is operator.getitem:  # one piece of a split: turn the split round
                parent = self.parent.get(parent)  # type: ignore[assignment]
                if parent is None:
                    raise _Unsupported(f"a piece of {child.args[0]}")
            written[parent] = self._turned_round(child, self.read(parent), written[child])
            child = parent
        self.version[root] = self.version.get(root, 0) + 1
        for member, value in written.items():
            self._store(member, value)
        self._store(node, written[changed])

    def _functional(self, node: fx.Node, changed: fx.Node) -> fx.Node:
        """The new value of the written tensor, in its own shape and dtype."""
        target = _functional_overload(node)
        if target is None:
            raise _Unsupported(f"{node.target}, which has no functional form")
        before: torch.Tensor = changed.meta["val"]
        if target is aten.copy.default:
            source = node.args[1]
            if not isinstance(source, fx.Node):
                raise _Unsupported(f"{node.target} of a number")
            return self._fitted(self.read(source), source.meta["val"], before, node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self.read)
        value = self.graph.call_function(target, args, kwargs)
        value.meta = dict(node.meta)
        fakes = fx.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        mode = getattr(before, "fake_mode", None)
        if mode is None:
            raise _Unsupported(f"{changed}, which was traced without shapes")
        with mode:
            result = target(*fakes[0], **fakes[1])
        value.meta["val"] = result
        return self._fitted(value, result, before, node)

    def _fitted(self, value: fx.Node, found: torch.Tensor, wanted: torch.Tensor, node: fx.Node) -> fx.Node:
        if found.shape != wanted.shape:
            if (
                found.dim() > wanted.dim()
                or found.numel() > wanted.numel()
                or not all(isinstance(s, int) for s in wanted.shape)
            ):
                raise _Unsupported(f"{node.target}, which changes the shape of what it writes")
            value = self.graph.call_function(aten.expand.default, (value, list(wanted.shape)))
            value.meta = {**node.meta, "val": found.expand(wanted.shape)}
        if found.dtype != wanted.dtype:
            value = self.graph.call_function(aten.to.dtype, (value, wanted.dtype))
            value.meta = {**node.meta, "val": wanted}
        return value

    def _turned_round(self, view: fx.Node, parent: fx.Node, value: fx.Node) -> fx.Node:
        """The parent's value once ``view`` of it holds ``value``."""
        target, args = view.target, view.args
        if _mutated(view) is not None or target in _SAME:
            return value
        base: torch.Tensor = (args[0].args[0] if target is operator.getitem else args[0]).meta["val"]  # type: ignore[union-attr]
        if target in (aten.slice.Tensor, aten.select.int):
            scatter = aten.slice_scatter if target is aten.slice.Tensor else aten.select_scatter
            result = self.graph.call_function(scatter.default, (parent, value, *args[1:]))
        elif target in (aten.transpose.int, aten.t.default):
            result = self.graph.call_function(target, (value, *args[1:]))  # type: ignore[arg-type]
        elif target is aten.permute.default:
            order: Any = [d % base.dim() for d in args[1]]  # type: ignore[union-attr,operator]
            result = self.graph.call_function(
                aten.permute.default, (value, [order.index(d) for d in range(base.dim())])
            )
        elif target in _RESHAPES and all(isinstance(s, int) for s in base.shape):
            result = self.graph.call_function(aten.reshape.default, (value, list(base.shape)))
        elif target is operator.getitem:
            result = self._piece(view, base, parent, value)
        else:
            raise _Unsupported(f"a view by {target}")
        result.meta = {k: v for k, v in view.meta.items() if k != "val"} | {"val": base}
        return result

    def _piece(self, item: fx.Node, base: torch.Tensor, parent: fx.Node, value: fx.Node) -> fx.Node:
        split: Any = item.args[0]
        index: Any = item.args[1]
        dim = split.args[2] if len(split.args) > 2 else 0
        if split.target is aten.unbind.int:
            dim = split.args[1] if len(split.args) > 1 else 0
            return self.graph.call_function(aten.select_scatter.default, (parent, value, dim, index))
        sizes = [piece.shape[dim] for piece in split.meta["val"]]
        if not all(isinstance(s, int) for s in sizes):
            raise _Unsupported(f"a piece of {split}, which is split at computed points")
        start = sum(sizes[:index])
        bounds = (dim, start, start + sizes[index])
        return self.graph.call_function(aten.slice_scatter.default, (parent, value, *bounds))


_SAME = {aten.alias.default, aten.detach.default, aten.contiguous.default,
         aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.dropout.default,
         aten.lift_fresh.default}  # fmt: skip
# Tracing may show them with their operand's storage; the program that runs copies.
_COPIES = {aten.lift_fresh_copy.default}
_RESHAPES = {aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints,
             aten.unflatten.int, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims,
             aten.unsqueeze.default, aten.view_as.default, aten.reshape_as.default}  # fmt: skip


def _alias_source(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the result shares, as it was traced; a schema only says that it may."""
    if node.op != "call_function" or node.target in _COPIES:
        return None
    own = _storages(node)
    return next((a for a in node.all_input_nodes if own and not own.isdisjoint(_storages(a))), None)


def _storages(node: fx.Node) -> set[int]:
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return {v.untyped_storage()._cdata for v in values if isinstance(v, torch.Tensor)}


def _mutated(node: fx.Node) -> fx.Node | None:
    """The operand an operator writes into, if any."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if not node.target._schema.is_mutable or node.target is aten.batch_norm.default:
        return None
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, fx.Node):
            return value
    return None


def _functional_overload(node: fx.Node) -> Any:
    name = node.target._schema.name.removeprefix("aten::")  # type: ignore[union-attr]
    packet = getattr(aten, name.removesuffix("_"), None)
    if not name.endswith("_") or name.endswith("__") or packet is None:
        return None
    wanted = [a.type for a in node.target._schema.arguments]  # type: ignore[union-attr]
    for overload in packet.overloads():
        candidate = getattr(packet, overload)
        if [a.type for a in candidate._schema.arguments] == wanted:
            return candidate
    return None


def _by_torch(
    program: torch.export.ExportedProgram, reason: str
) -> tuple[list[str], fx.Graph, dict[str, torch.Tensor]]:
    from .capture import collect

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph, tensors, _ = collect(program.run_decompositions({}))
    _restore_batch_norm(graph)
    note = (
        f"forward() writes through {reason}; torch's functionalisation was used for the whole graph, "
        "which drops dropout (training the result does without it)"
    )
    return [note], graph, tensors


def _restore_batch_norm(graph: fx.Graph) -> None:
    native = aten._native_batch_norm_legit_no_training.default
    for node in graph.find_nodes(op="call_function", target=native):
        x, weight, bias, mean, variance, momentum, eps = node.args
        with graph.inserting_before(node):
            args = (x, weight, bias, mean, variance, False, momentum, eps, False)
            whole = graph.call_function(aten.batch_norm.default, args)
        for user in list(node.users):
            if user.args[1] == 0:
                whole.meta = dict(user.meta)
                user.replace_all_uses_with(whole)
            if not user.users:
                graph.erase_node(user)
        graph.erase_node(node)
