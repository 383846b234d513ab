"""A pruned graph back in the user's own class: the same module, with smaller parameters and attributes.

The model is copied, never changed. The copy gets the graph's parameters and buffers; layers of torch get
their sizes from them; the attributes of other modules that held a size which changed get the new one
(:mod:`graphprune.writeback.attributes`). Then the copy *runs* and is compared with the graph: where it fails,
the module it failed in tries what else its attributes may be. A size that ``forward`` holds itself
(``x.view(-1, 8, 64)``) cannot be reached by any attribute, and is refused with its line.

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)).eval()
>>> graph = graphprune.trace(model, torch.zeros(1, 3))
>>> small = graph.apply(graph.plan({"0.weight[0]": [1, 5, 6]}))
>>> small.write_back(model)
Sequential(
  (0): Linear(in_features=3, out_features=5, bias=True)
  (1): ReLU()
  (2): Linear(in_features=5, out_features=2, bias=True)
)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ..errors import AxisError, GraphpruneError, InputError
from ..frontend.capture import example_call
from ..frontend.inputs import undisturbed
from ..graph import Graph, clone_tensor
from ..plans.provenance import Provenance, operator
from ..verify import Certificate, compare, in_float64
from . import refusal
from .attributes import Slot, gather, slots, update_layer

Module = TypeVar("Module", bound=nn.Module)

TOLERANCE = 1e-5  # relative, where a precision allows it
MAX_CHOICES = 64  # combinations of attribute values tried for one module
MAX_RUNS = 256  # runs of the whole model
RAN = "(ran)"  # no module's path


def write_back(graph: Graph, model: Module) -> Module:
    """A copy of ``model`` that computes what ``graph`` computes, in the model's own class.

    Args:
        graph: what is left of the model's graph after one or more plans, trained further or not.
        model: the module the graph was captured from, or one like it.

    Returns:
        The copy, in the model's mode. It was run on the graph's examples and compared: relative error 1e-5
        in float32, or what a lower precision allows.

    Raises:
        InputError: the model cannot be copied.
        AxisError: the model is another one, or ``forward`` holds a size that no attribute can change;
            says which, in which module and at which line.
    """
    before = Provenance.of(graph)
    _check_same(before, model)
    try:
        twin = copy.deepcopy(model, _computed(model))
    except Exception as error:
        raise InputError(
            f"the model cannot be copied: {error}; write_back never changes the original"
        ) from error
    _write_tensors(graph, before, twin)
    evidence = gather(graph, before)
    choices: dict[str, Choices] = {}
    for path, module in twin.named_modules():
        known = evidence.get(path)
        if known is None:
            continue
        if isinstance(module, nn.MultiheadAttention):
            _require_one_width(path, module)
        if not update_layer(module, known) or not type(module).__module__.startswith("torch.nn"):
            found = slots(module, known)
            if found:
                choices[path] = Choices(found)
    for choice in choices.values():
        choice.next()
    _search(graph, before, twin, choices)
    return twin


def _computed(model: nn.Module) -> dict[int, Any]:
    """A memo for ``deepcopy`` with the attributes that hooks compute (old-style weight norm).

    They belong to an autograd graph, which torch refuses to copy; the hook computes them again.
    """
    values = [v for m in model.modules() for v in vars(m).values() if isinstance(v, torch.Tensor)]
    return {id(v): v.detach() for v in values if not v.is_leaf}


# ---- tensors --------------------------------------------------------------------------------------


def _check_same(before: Provenance, model: nn.Module) -> None:
    for name, shape in before.shapes.items():
        found = _lookup(model, name)
        if found is not None and tuple(found.shape) != tuple(shape):
            raise AxisError(
                f"this is not the model the graph came from: {name} has shape {tuple(found.shape)} "
                f"instead of {tuple(shape)}"
            )
    named = {n for n, _ in model.named_parameters(remove_duplicate=False)}
    trained = [n for n in before.shapes if n in named]
    if before.shapes and named and not trained:
        raise AxisError("this is not the model the graph came from: they share no parameter name")


def _write_tensors(graph: Graph, before: Provenance, twin: nn.Module) -> None:
    """Every parameter and buffer of the graph into the copy, under each name that shares it."""
    places: dict[int, list[str]] = {}
    for name, tensor in _named_tensors(twin):
        places.setdefault(id(tensor), []).append(name)
    for name, value in {**graph.tensors, **_replaced_constants(graph, before)}.items():
        old = _lookup(twin, name)
        if old is None:
            continue
        with torch.no_grad():
            new = clone_tensor(value).to(old.device)
            if isinstance(old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=old.requires_grad)
        for place in places.get(id(old), [name]):
            _assign(twin, place, new)


def _replaced_constants(graph: Graph, before: Provenance) -> dict[str, torch.Tensor]:
    """Constants that a plan wrote anew under another name, by the name they had; only unanimous ones."""
    found: dict[str, set[str]] = {}
    for node in graph.fx.nodes:
        was = before.operators.get(node.name)
        if was is None or node.op != "call_function":
            continue
        for old, new in zip(was.reads, operator(node).reads, strict=False):
            found.setdefault(old, set()).add(new)
    return {
        old: graph.tensors[next(iter(new))]
        for old, new in found.items()
        if len(new) == 1 and old not in graph.tensors
    }


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _lookup(module: nn.Module, name: str) -> torch.Tensor | None:
    """The parameter, buffer or plain tensor attribute of that name."""
    path, _, leaf = name.rpartition(".")
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        return None
    found = owner._parameters.get(leaf, owner._buffers.get(leaf, vars(owner).get(leaf)))
    return found if isinstance(found, torch.Tensor) else None


def _assign(module: nn.Module, name: str, value: torch.Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    # The module's own __setattr__: recurrent layers keep a list of their weights beside.
    setattr(module.get_submodule(path), leaf, value)


# ---- the search -----------------------------------------------------------------------------------


class Choices:
    """The combinations of values that a module's attributes may have, the likeliest first."""

    def __init__(self, found: list[Slot]):
        self._slots = found
        ranges = [range(len(s.options)) for s in found]
        combinations = itertools.islice(itertools.product(*ranges), MAX_CHOICES * 16)
        ordered = sorted(combinations, key=lambda c: (sum(map(bool, c)), sum(c)))[:MAX_CHOICES]
        self._first, self._queue = ordered[0], iter(ordered)

    def next(self) -> bool:
        """Set the next combination; when none is left, the first one again, and False."""
        combination = next(self._queue, None)
        for slot, choice in zip(self._slots, combination or self._first, strict=True):
            slot.set(choice)
        return combination is not None


@dataclass
class Outcome:
    """What running the copy gave: a certificate, or an error and the path of the module it came from."""

    certificate: Certificate | None = None
    error: Exception | None = None
    path: str = ""

    @property
    def passed(self) -> bool:
        return self.certificate is not None and self.certificate.passed


def _search(graph: Graph, before: Provenance, twin: nn.Module, choices: dict[str, Choices]) -> None:
    """Run and correct until the copy computes what the graph does.

    Raises:
        AxisError: nothing that can be set makes it so.
    """
    first: dict[str, Outcome] = {}
    outcome = _run(graph, twin)
    for _ in range(MAX_RUNS):
        if outcome.passed:
            return
        first.setdefault(outcome.path if outcome.error is not None else RAN, outcome)
        if outcome.error is not None:
            # The module it failed in, then those around it; a child may fail for what its parent handed it.
            tried = [p for p in _around(outcome.path) if p in choices]
        else:
            tried = list(choices)
        if not any(choices[p].next() for p in tried):
            break
        outcome = _run(graph, twin)
    # A copy that ran had every size in place: what it computed tells more than a later attempt that failed.
    ran = next((o for o in first.values() if o.error is None), None)
    outcome = ran or first[outcome.path]
    if outcome.error is None:
        assert outcome.certificate is not None
        raise AxisError(refusal.of_difference(graph, before, outcome.certificate.reason))
    kind = type(twin.get_submodule(outcome.path)).__name__
    raise AxisError(refusal.of_error(graph, before, outcome.path, kind, outcome.error)) from outcome.error


def _around(path: str) -> list[str]:
    parts = path.split(".") if path else []
    return [".".join(parts[:i]) for i in range(len(parts), -1, -1)]


def _run(graph: Graph, twin: nn.Module) -> Outcome:
    call = example_call(graph)
    args = [call.pop(name) for name in graph.signature.positional]
    stack: list[str] = []

    def leave(*_: Any) -> None:
        stack.pop()

    hooks = []
    for path, module in twin.named_modules():
        hooks.append(module.register_forward_pre_hook(lambda *_, path=path: stack.append(path)))
        hooks.append(module.register_forward_hook(leave))
    try:
        with undisturbed(twin):
            results = pytree.tree_leaves(twin(*args, **call))
    except GraphpruneError:
        raise
    except Exception as error:
        return Outcome(error=error, path=stack[-1] if stack else "")
    finally:
        for hook in hooks:
            hook.remove()
    wanted = graph.run()
    floats = {w.dtype for w in wanted if isinstance(w, torch.Tensor)}
    tolerance = TOLERANCE if floats <= {torch.float32, torch.float64, torch.int64, torch.bool} else None
    certificate = compare("write-back", [results], [wanted], tolerance=tolerance)
    if not certificate.passed and certificate.max_relative < 1e-2 and torch.float32 in floats:
        certificate = _settled(graph, twin, args, call) or certificate
    return Outcome(certificate)


def _settled(graph: Graph, twin: nn.Module, args: list[Any], call: dict[str, Any]) -> Certificate | None:
    """The comparison again in float64, without the rounding of float32; ``None`` if it cannot run."""

    def wide(value: Any) -> Any:
        is_float = isinstance(value, torch.Tensor) and value.is_floating_point()
        return value.double() if is_float else value

    double = copy.deepcopy(twin).double()
    try:
        with undisturbed(double):
            results = pytree.tree_leaves(double(*pytree.tree_map(wide, args), **pytree.tree_map(wide, call)))
        return compare("write-back", [results], [in_float64(graph).run()], tolerance=1e-7)
    except RuntimeError:
        # A forward that names its precision does not run in another one; the first comparison stands.
        return None


def _require_one_width(path: str, module: nn.MultiheadAttention) -> None:
    """Refuse sizes that torch's MultiheadAttention cannot express, whatever its attributes."""
    stream, heads = module.out_proj.weight.shape
    if stream != heads:
        raise AxisError(
            f"refused to write back: module {path!r} (MultiheadAttention) has one embed_dim for its input "
            f"and for all its heads together, which are now {stream} and {heads} wide; keep its heads whole, "
            "remove as many positions from the stream, or use graph.module, which has no such limit"
        )
