"""In-place operators out of a captured graph, without changing what any reader sees.

``y = add_(x, z)`` becomes ``y = add(x, z)``. The tracer already routes later reads of the *same*
tensor object to ``y``; what it cannot route is a read through another view of the storage. So each
rewrite is made only where no other node that may alias ``x`` (by the operator schemas) is read
after the mutation; writes through a slice or select of a tensor that is read later become
``slice_scatter`` / ``select_scatter``. Where that does not cover the case, torch's own
functionalisation runs on the whole program, which loses dropout and is said in a note.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .errors import CaptureError

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
    for node in graph.find_nodes(op="get_attr"):
        if not node.users and _is_body(node, program):
            graph.erase_node(node)


def functionalize(
    graph: fx.Graph, tensors: dict[str, torch.Tensor], program: torch.export.ExportedProgram
) -> tuple[list[str], fx.Graph, dict[str, torch.Tensor]]:
    """Rewrite ``graph`` without in-place operators; returns notes, the graph and its tensors.

    Raises:
        CaptureError: forward() writes into a parameter, a buffer or an input.
    """
    mutations = [n for n in graph.nodes if _mutated(n) is not None]
    if not mutations:
        return [], graph, tensors
    order = {n: i for i, n in enumerate(graph.nodes)}
    roots = _storage_roots(graph)
    for node in mutations:
        root = roots[_mutated(node)]  # type: ignore[index]
        if root.op in ("placeholder", "get_attr"):
            what = f"input {root.name!r}" if root.op == "placeholder" else f"tensor {root.target!r}"
            raise CaptureError(
                f"forward() writes into {what} ({node.name}); a compiled network has no state: "
                "compute a new tensor instead, and return it if the caller needs it"
            )
    for node in mutations:
        target, changed = _functional_overload(node), _mutated(node)
        if target is None or changed is None or not _rewrite(graph, node, changed, target, roots, order):
            return _by_torch(program)
    return [], graph, tensors


def _rewrite(graph: fx.Graph, node: fx.Node, changed: fx.Node, target: Any, roots: Any, order: Any) -> bool:
    later = [
        other
        for other, root in roots.items()
        if root is roots[changed] and other is not node and any(order[u] > order[node] for u in other.users)
        and not _reads_after(other, node)
    ]  # fmt: skip
    stale = [o for o in later if o is not changed and order[o] < order[node]]
    views_after = [u for u in changed.users if order[u] > order[node]]
    if target is not aten.copy.default:
        if stale or views_after:
            return False
        node.target = target
        _cut(roots, node)
        return True
    # copy_ into a slice or select of a base: the base's later readers get the scattered tensor.
    base = changed.args[0] if changed.op == "call_function" and changed.args else None
    scatter = {
        aten.slice.Tensor: aten.slice_scatter.default,
        aten.select.int: aten.select_scatter.default,
    }.get(changed.target)  # type: ignore[call-overload]
    if scatter is None or not isinstance(base, fx.Node) or node.users or set(stale) - {base}:
        return False
    source = node.args[1]
    with graph.inserting_before(node):
        if source.meta["val"].shape != changed.meta["val"].shape:  # type: ignore[union-attr]
            shape = list(changed.meta["val"].shape)
            if not all(isinstance(s, int) for s in shape):
                return False
            source = graph.call_function(aten.expand.default, (source, shape))
            source.meta = {**node.meta, "val": node.meta["val"]}
        if source.meta["val"].dtype != base.meta["val"].dtype:  # type: ignore[union-attr]
            return False
        scattered = graph.call_function(scatter, (base, source, *changed.args[1:]))
        scattered.meta = {**node.meta, "val": base.meta["val"]}
    order[scattered] = order[node]
    roots[scattered] = scattered
    base.replace_all_uses_with(scattered, lambda u: u is not scattered and order.get(u, -1) > order[node])
    graph.erase_node(node)
    roots.pop(node, None)
    return True


def _reads_after(other: fx.Node, node: fx.Node) -> bool:
    """Whether ``other`` was made from the mutation's own result, so that it sees the new value."""
    seen, stack = set(), [other]
    while stack:
        current = stack.pop()
        if current is node:
            return True
        if current not in seen:
            seen.add(current)
            stack.extend(current.all_input_nodes)
    return False


def _cut(roots: dict[fx.Node, fx.Node], node: fx.Node) -> None:
    """A functional result is a storage of its own: it and the views of it get it as their root."""
    roots[node] = node
    for other in roots:
        if other is not node and _alias_source(other) in roots and other.op == "call_function":
            source = _alias_source(other)
            if source is not None:
                roots[other] = roots[source]


def _storage_roots(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    roots: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = _alias_source(node)
        roots[node] = roots[source] if source is not None else node
    return roots


def _alias_source(node: fx.Node) -> fx.Node | None:
    """The operand whose storage the result may share, by the operator's schema."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if not isinstance(node.target, torch._ops.OpOverload):  # getitem of split, unbind, …
        return first if isinstance(first, fx.Node) else None
    for argument, value in zip(node.target._schema.arguments, node.args, strict=False):
        if argument.alias_info is not None and isinstance(value, fx.Node):
            return value
    if node.target in (aten.reshape.default, aten.contiguous.default, aten.flatten.using_ints,
                       aten.dropout.default, aten.to.dtype, aten.to.device, aten.to.dtype_layout,
                       aten.type_as.default, aten.reshape_as.default, aten.unflatten.int):  # fmt: skip
        return first if isinstance(first, fx.Node) else None
    return None


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


def _by_torch(program: torch.export.ExportedProgram) -> tuple[list[str], fx.Graph, dict[str, torch.Tensor]]:
    from .capture import collect

    graph, tensors, _ = collect(program.run_decompositions({}))
    _restore_batch_norm(graph)
    note = (
        "forward() mutates tensors through views; torch's functionalisation was used for the whole "
        "graph, which drops dropout (training the result does without it)"
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
