"""From an ``nn.Module`` (or an exported program) to a :class:`~graphprune.graph.Graph`.

``torch.export`` (training IR, not decomposed, non-strict) traces; this module calls it so that the
caller's model stays as it was, and normalises what comes out: tensors by qualified name with ties
kept, in-place operators made functional, higher-order wrappers inlined, assertions dropped,
training-mode operators marked, every operator's module path and source line kept.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

from ..errors import CaptureError, InputError
from ..graph import META_KEYS, Graph
from ..module import Called, TracedModule
from ..signature import Signature
from .functionalize import body_nodes, functionalize, inline_wrappers
from .training import carry_marks, mark_training


def capture(
    model: torch.nn.Module | torch.export.ExportedProgram,
    example_inputs: Any = None,
    example_kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic_batch: bool = False,
) -> Graph:
    """Capture a model as a graph; the model is left exactly as it was.

    Args:
        model: a module in any mode, a module of an earlier result, or an exported program.
        example_inputs: a tensor or a tuple of positional arguments, nested as the model's are;
            ``None`` infers them (see :mod:`graphprune.frontend.inputs`).
        example_kwargs: keyword arguments of the example call.
        dynamic_batch: keep dimension 0 of every input symbolic.

    Raises:
        InputError: the inputs do not fit, or a weight is NaN or infinite (named).
        CaptureError: ``torch.export`` cannot follow the model; names the source line.
    """
    if isinstance(model, TracedModule) and example_inputs is None and example_kwargs is None:
        graph = model.captured
        if graph.is_dynamic == dynamic_batch:
            return graph
        example_inputs, example_kwargs = (), example_call(graph)
    if isinstance(model, torch.export.ExportedProgram):
        return _from_program(model, model, model.example_inputs, dynamic_batch)
    if not isinstance(model, torch.nn.Module):
        raise InputError(
            f"expected an nn.Module or an ExportedProgram, got {type(model).__name__}; "
            "wrap a function in an nn.Module first"
        )
    args, kwargs = arguments(model, example_inputs, example_kwargs)
    source = model.captured if isinstance(model, TracedModule) else None
    if isinstance(model, TracedModule):
        model = Called(model)
    _check_weights(model)
    with _evaluation_mode(model), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = _export(model, args, kwargs, dynamic_batch)
    graph = _from_program(program, model, (args, kwargs), dynamic_batch)
    if source is not None:
        carry_marks(source, graph)
    return graph


def example_call(graph: Graph) -> dict[str, Any]:
    """The call a graph was captured with, every argument by name."""
    from torch.utils import _pytree as pytree

    from ..signature import Slot

    return pytree.tree_map(
        lambda leaf: graph.examples[leaf.index] if isinstance(leaf, Slot) else leaf,
        dict(graph.signature.arguments),
    )


def arguments(model: torch.nn.Module, inputs: Any, kwargs: Mapping[str, Any] | None) -> tuple[Any, Any]:
    """Positional and keyword arguments of the example call, from the forms a caller may give it in.

    Raises:
        InputError: they are of another form, or a tensor among them is empty.
    """
    if inputs is None and kwargs is None:
        from .inputs import infer

        inferred = infer(model)
        return inferred.args, dict(inferred.kwargs)
    if inputs is None:
        inputs = ()
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if isinstance(inputs, Mapping) and kwargs is None:
        inputs, kwargs = (), inputs
    if not isinstance(inputs, Sequence):
        raise InputError(
            f"example_inputs must be a tensor, a tuple of arguments or a mapping of keywords, "
            f"got {type(inputs).__name__}"
        )
    from torch.utils import _pytree as pytree

    for path, leaf in pytree.tree_flatten_with_path((tuple(inputs), dict(kwargs or {})))[0]:
        if isinstance(leaf, torch.Tensor) and leaf.numel() == 0:
            raise InputError(
                f"example input {pytree.keystr(path)} is empty (shape {tuple(leaf.shape)}); "
                "give at least one sample"
            )
    return tuple(inputs), dict(kwargs or {})


def _check_weights(model: torch.nn.Module) -> None:
    bad = []
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if not value.is_floating_point() or value.is_meta or torch.isfinite(value).all():
            continue
        # A buffer may hold -inf on purpose (an additive attention mask); NaN never.
        if isinstance(value, torch.nn.Parameter) or torch.isnan(value).any():
            bad.append(name)
    if bad:
        shown = ", ".join(bad[:5]) + (f" and {len(bad) - 5} more" if len(bad) > 5 else "")
        raise InputError(f"weights hold NaN or infinity: {shown}; repair the checkpoint first")


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode inside, every module's own mode afterwards; fused fast paths stay out of the graph."""
    modes = [(m, m.training) for m in model.modules()]
    fast_path = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        for module, _ in modes:
            module.training = False
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for module, mode in modes:
            module.training = mode


def _export(model: torch.nn.Module, args: Any, kwargs: Any, dynamic: bool) -> torch.export.ExportedProgram:
    shapes = None
    if dynamic:
        from .batch import dynamic_shapes, widen

        args, kwargs = widen(args, kwargs)
        shapes = dynamic_shapes(model, args, kwargs)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        raise _explained(model, error, args, kwargs, dynamic) from error


def _explained(model: torch.nn.Module, error: Exception, args: Any, kwargs: Any, dynamic: bool) -> Exception:
    """Tell inputs that do not fit from a model that cannot be captured, with the user's own source line."""
    place = user_line(error)
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    at = f" at {place}" if place else ""
    try:
        with torch.no_grad():
            model(*args, **kwargs)
    except Exception as eager:
        reason = str(eager).strip().splitlines()[0] if str(eager).strip() else type(eager).__name__
        line = user_line(eager) or place
        return InputError(
            f"the model does not run on these example inputs{f' at {line}' if line else ''}: {reason}; "
            "pass example_inputs (and example_kwargs) that it accepts"
        )
    if dynamic:
        return CaptureError(
            f"cannot keep the batch dimension symbolic{at}: {first}; "
            "capture with dynamic_batch=False, or remove the batch-size dependence there"
        )
    return CaptureError(
        f"torch.export cannot capture {type(model).__name__}{at}: {first}; "
        "data-dependent Python control flow must become tensor operations (torch.where, torch.cond)"
    )


def user_line(error: BaseException) -> str | None:
    """``file:line`` of the innermost traceback frame that is not torch's or this package's."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        name = trace.tb_frame.f_code.co_filename
        if "/torch/" not in name and "/graphprune/" not in name and not name.startswith("<"):
            found = f"{name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _positional_names(model: Any, count: int) -> tuple[str, ...]:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError, AttributeError):
        parameters = []  # type: ignore[assignment]
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [p.name for p in parameters if p.kind in kinds][:count]
    return tuple(names + [f"arg{i}" for i in range(len(names), count)])


def _from_program(program: torch.export.ExportedProgram, model: Any, example: Any, dynamic: bool) -> Graph:
    args, kwargs = example if example is not None else ((), {})
    spec = program.call_spec.out_spec
    signature, examples = Signature.of(_positional_names(model, len(args)), args, kwargs, spec)
    examples = [e.detach() if isinstance(e, torch.Tensor) else e for e in examples]
    raw, tensors, persistent = collect(program)
    notes = list(inline_wrappers(raw, program))
    program_notes, raw, tensors = functionalize(raw, tensors, program)
    notes += program_notes
    fresh = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    names = iter(signature.names)
    is_module = isinstance(model, torch.nn.Module)
    for node in raw.nodes:
        if node.op == "placeholder" and not isinstance(node.meta.get("val"), torch.Tensor):
            continue  # a flag or None that was fixed at capture; nothing reads it
        if _is_check(node):
            continue
        if node.op == "placeholder":
            mapping[node] = fresh.placeholder(next(names).replace(".", "_"))
            # fx assigns by target but reads by name: a parameter of that name would be mixed up with it.
            mapping[node].target = mapping[node].name
        else:
            mapping[node] = fresh.node_copy(node, lambda n: mapping[n])
        mapping[node].meta = _meta(node)
    ties = _canonical_names(fresh, tensors, model if is_module else program)
    names_kept = frozenset(ties.get(name, name) for name in persistent)
    bodies = {str(n.target): getattr(program.graph_module, str(n.target)) for n in body_nodes(fresh, program)}
    graph = Graph(fresh, tensors, signature, tuple(examples), ties, names_kept, tuple(notes), bodies)
    graph.notes += mark_training(graph, model if is_module else None)
    graph.sweep()
    graph.fx.lint()
    return graph


def collect(program: torch.export.ExportedProgram) -> tuple[fx.Graph, dict[str, torch.Tensor], set[str]]:
    """The program's graph with lifted tensors turned back into ``get_attr`` nodes by qualified name."""
    kinds = torch.export.graph_signature.InputKind
    specs = {s.arg.name: s for s in program.graph_signature.input_specs}
    state: dict[str, Any] = {**program.constants, **program.state_dict}
    graph, tensors, persistent = fx.Graph(), {}, set()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind == kinds.USER_INPUT:
            mapping[node] = graph.node_copy(node, lambda n: mapping[n])
            if node.op == "output":
                mapping[node].args = (tuple(mapping[node].args[0]),)  # type: ignore[arg-type]
        elif spec.kind in (kinds.PARAMETER, kinds.BUFFER, kinds.CONSTANT_TENSOR):
            name = str(spec.target)
            value = state[name]
            tensors[name] = value if isinstance(value, torch.nn.Parameter) else value.detach()
            if spec.kind == kinds.PARAMETER or (spec.kind == kinds.BUFFER and spec.persistent):
                persistent.add(name)
            mapping[node] = graph.get_attr(name)
        else:
            raise CaptureError(
                f"the model holds a {spec.kind.name.lower()} called {spec.target!r}, which is not a tensor; "
                "move it out of forward()"
            )
        mapping[node].meta = dict(node.meta)
    return graph, tensors, persistent


def _meta(node: fx.Node) -> dict[str, Any]:
    meta = {k: node.meta[k] for k in META_KEYS if k in node.meta}
    stack = node.meta.get("nn_module_stack")
    if stack:
        path, kind = list(stack.values())[-1]
        meta["module"] = path
        meta["module_type"] = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
    return meta


def _is_check(node: fx.Node) -> bool:
    """Assertions of the exporter: they hold for the captured shapes and would only bind later rewrites."""
    if node.op != "call_function":
        return False
    name = str(getattr(node.target, "_name", getattr(node.target, "__name__", "")))
    return name.removeprefix("aten::").startswith(("_assert", "sym_constrain"))


def _canonical_names(graph: fx.Graph, tensors: dict[str, torch.Tensor], owner: Any) -> dict[str, str]:
    """Give every shared parameter its first name in the module tree; returns its other names → that one."""
    if isinstance(owner, torch.nn.Module):
        named = list(owner.named_parameters(remove_duplicate=False))
    else:
        named = [(k, v) for k, v in owner.state_dict.items() if isinstance(v, torch.nn.Parameter)]
    first: dict[int, str] = {}
    ties: dict[str, str] = {}
    for name, value in named:
        if first.setdefault(id(value), name) != name:
            ties[name] = first[id(value)]
    for name in [n for n in tensors if n in ties]:
        tensors[ties[name]] = tensors.pop(name)
        for node in graph.find_nodes(op="get_attr", target=name):
            node.target = ties[name]
    return {alias: name for alias, name in ties.items() if name in tensors}
