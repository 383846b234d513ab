"""The one intermediate representation: an fx graph of ATen operators with its tensors beside it.

A :class:`Graph` is what ``torch.export`` captured, normalised:

* ``fx``: a :class:`torch.fx.Graph` without in-place operators; one placeholder per tensor the
  caller passes, ``get_attr`` nodes for parameters and buffers *by qualified name*, ATen
  ``call_function`` nodes that each carry a FakeTensor in ``node.meta["val"]``, and one output node
  that holds a flat tuple.
* ``tensors``: qualified name → parameter or buffer. ``tied`` maps the other names of a shared one.
* ``bodies``: the branches of control-flow operators (``torch.cond``), by their ``get_attr`` node's name.
* ``signature``: how the caller's nested arguments become flat placeholders, and back.

Passes never change a graph they were given: they work on :meth:`Graph.copy`, which shares tensors
(rewrites replace tensors, they never write into them).

>>> import torch, graphprune
>>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.ReLU())
>>> graph = graphprune.trace(model, torch.zeros(1, 3))
>>> print(graph)
input_1: f32[1, 3]
linear: f32[1, 2] = linear(input_1, %0.weight, %0.bias)
relu: f32[1, 2] = relu(linear)
return (relu,)
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import fx as torch_fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx import Node, map_arg

from .errors import InputError
from .graph_text import node_line, source_line
from .signature import Signature

if TYPE_CHECKING:
    import networkx

    from .axes.axis import Axes
    from .axes.typing import Typing
    from .plans.plan import Plan
    from .plans.provenance import Provenance
    from .plans.removal import Removal

Module = TypeVar("Module", bound=torch.nn.Module)

# torch's C++ kernels of these ask for numbers; their Python kernels have symbolic sizes, too.
_RECURRENT = {
    torch.ops.aten.lstm.input, torch.ops.aten.gru.input,
    torch.ops.aten.rnn_tanh.input, torch.ops.aten.rnn_relu.input,
}  # fmt: skip

# What a node keeps of torch.export's metadata, and what graphprune adds. The rest is dropped at capture.
META_KEYS = ("val", "stack_trace", "module", "module_type", "follows_training")


@dataclass
class Graph:
    """An fx graph of ATen operators, its tensors by name, and the signature it is called with.

    Attributes:
        fx: the operators; see the module docstring for the invariants.
        tensors: parameters (``nn.Parameter``) and buffers by qualified name.
        signature: nested arguments ↔ flat placeholders.
        examples: one tensor per placeholder, the inputs the graph was captured with.
        tied: alias → name in ``tensors`` for parameters that several modules share.
        persistent: names of buffers and parameters that belong in a ``state_dict``.
        notes: what capture wants the reader of a report to know.
        bodies: sub-graphs that control-flow operators call, by name; their tensors come in as operands.
        provenance: what the network was before positions were removed; ``None`` while none were.
        removal: the network before and the plan, what a repair needs; ``None`` while nothing was removed.
        floating: what a quantized graph computes without rounding, operator names as here; else ``None``.
    """

    fx: torch_fx.Graph
    tensors: dict[str, torch.Tensor]
    signature: Signature
    examples: tuple[torch.Tensor, ...]
    tied: dict[str, str] = field(default_factory=dict)
    persistent: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    bodies: dict[str, torch_fx.GraphModule] = field(default_factory=dict)
    provenance: Provenance | None = field(default=None, repr=False, compare=False)
    removal: Removal | None = field(default=None, repr=False, compare=False)
    floating: Graph | None = field(default=None, repr=False, compare=False)
    _module: Any = field(default=None, repr=False, compare=False)
    _typing: Any = field(default=None, repr=False, compare=False)
    _axes: Any = field(default=None, repr=False, compare=False)
    _dependencies: Any = field(default=None, repr=False, compare=False)

    # ---- reading -------------------------------------------------------------------------------

    @property
    def nodes(self) -> list[Node]:
        """Every node in execution order."""
        return list(self.fx.nodes)

    @property
    def placeholders(self) -> list[Node]:
        """The input nodes, in the order of ``signature.names``."""
        return self.fx.find_nodes(op="placeholder")

    @property
    def output(self) -> Node:
        """The output node; its first argument is the flat tuple of results."""
        return self.fx.output_node()

    @property
    def parameters(self) -> dict[str, torch.Tensor]:
        """The trainable tensors by qualified name, tied ones once."""
        return {k: v for k, v in self.tensors.items() if isinstance(v, torch.nn.Parameter)}

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """The tensors that are not trained, by qualified name."""
        return {k: v for k, v in self.tensors.items() if not isinstance(v, torch.nn.Parameter)}

    @property
    def is_meta(self) -> bool:
        """Whether the weights have shapes only (captured on the meta device)."""
        return any(t.is_meta for t in self.tensors.values())

    @property
    def is_dynamic(self) -> bool:
        """Whether some input dimension is symbolic."""
        return any(not isinstance(s, int) for n in self.placeholders for s in n.meta["val"].shape)

    def tensor(self, node: Node) -> torch.Tensor:
        """The tensor behind a ``get_attr`` node."""
        return self.tensors[str(node.target)]

    def constant(self, argument: Any) -> torch.Tensor | None:
        """The tensor an argument names when it is a parameter or buffer, else ``None``."""
        if isinstance(argument, Node) and argument.op == "get_attr":
            return self.tensors.get(str(argument.target))
        return None

    def readers(self, name: str) -> list[Node]:
        """The operators that read the tensor called ``name``, each once, in execution order."""
        readers: dict[Node, None] = {}
        for node in self.fx.find_nodes(op="get_attr", target=name):
            readers.update(dict.fromkeys(node.users))
        return list(readers)

    def find(self, *targets: Callable[..., Any]) -> Iterator[Node]:
        """The operator nodes whose target is one of ``targets``, in execution order."""
        wanted = set(targets)
        return (n for n in self.fx.nodes if n.op == "call_function" and n.target in wanted)

    def where(self, node: Node) -> str:
        """A place a reader can open: node name, module path and source line, as far as they are known."""
        line = source_line(node)
        return self.place(node) + (f" at {line}" if line else "")

    def place(self, node: Node) -> str:
        """Node name and, where it is known, module path: enough to find it in the network."""
        module = node.meta.get("module")
        return f"{node.name} in module {module!r}" if module else node.name

    # ---- changing (on a copy) --------------------------------------------------------------------

    def copy(self) -> Graph:
        """The same graph, free to be rewritten: nodes are new, tensors and FakeTensors are shared."""
        fresh = torch_fx.Graph()
        mapping: dict[Node, Node] = {}
        for node in self.fx.nodes:
            # node_copy does not bring an output node's meta dict along as a copy, so copy all of them.
            mapping[node] = fresh.node_copy(node, lambda n: mapping[n])
            mapping[node].meta = dict(node.meta)
        return replace(
            self,
            fx=fresh,
            tensors=dict(self.tensors),
            tied=dict(self.tied),
            _module=None,
            _typing=None,
            _axes=None,
            _dependencies=None,
        )

    def add_tensor(self, name: str, value: torch.Tensor, *, before: Node, trainable: bool) -> Node:
        """Add a parameter or buffer under a free name near ``name``; returns its ``get_attr`` node."""
        name = self.free_name(name)
        self.tensors[name] = torch.nn.Parameter(value) if trainable else value
        self.persistent = self.persistent | {name}
        with self.fx.inserting_before(before):
            node = self.fx.get_attr(name)
        node.meta["val"] = self._fake(value)
        return node

    def set_tensor(self, name: str, value: torch.Tensor) -> None:
        """Replace the tensor called ``name``; a parameter stays a parameter and keeps ``requires_grad``."""
        self.set_tensors({name: value})

    def set_tensors(self, values: Mapping[str, torch.Tensor]) -> None:
        """Replace several tensors as :meth:`set_tensor` does, in one walk over the graph."""
        for name, value in values.items():
            old = self.tensors[name]
            if isinstance(old, torch.nn.Parameter):
                grad = old.requires_grad and value.is_floating_point()
                value = torch.nn.Parameter(value.detach(), requires_grad=grad)
            self.tensors[name] = value
        fakes: dict[str, Any] = {}
        mode = self.fake_mode
        for node in self.fx.find_nodes(op="get_attr"):
            name = str(node.target)
            if name in values:
                if name not in fakes:
                    fakes[name] = _fake_of(mode, self.tensors[name])
                node.meta["val"] = fakes[name]

    def free_name(self, name: str) -> str:
        """``name``, or the first ``name_1``, ``name_2`` … that no tensor has yet."""
        taken, candidate, count = {*self.tensors, *self.tied}, name, 0
        while candidate in taken:
            count += 1
            candidate = f"{name}_{count}"
        return candidate

    def sweep(self) -> int:
        """Erase nodes whose result nobody uses, and tensors nobody reads; returns how many nodes went."""
        before = len(self.fx.nodes)
        for node in reversed(list(self.fx.nodes)):
            # Dropout and other random operators go too: a result that nobody reads has no effect.
            pure = node.op in ("call_function", "get_attr") and not node.is_impure(impure_random=False)
            if pure and not node.users:
                self.fx.erase_node(node)
        used = {str(n.target) for n in self.fx.find_nodes(op="get_attr")}
        self.tensors = {k: v for k, v in self.tensors.items() if k in used}
        self.tied = {k: v for k, v in self.tied.items() if v in used}
        self.bodies = {k: v for k, v in self.bodies.items() if k in used}
        self.persistent = self.persistent & {*self.tensors, *self.tied}
        return before - len(self.fx.nodes)

    def propagate(self) -> Graph:
        """Derive every node's FakeTensor again, in execution order; returns self.

        Raises whatever the operator raises when its operands no longer fit together, with the node
        added to the message.
        """
        mode = self.fake_mode
        dynamic = self.is_dynamic
        values: dict[Node, Any] = {}
        fakes: dict[str, Any] = {}
        for node in self.fx.nodes:
            if node.op == "placeholder":
                values[node] = node.meta["val"]
            elif node.op == "get_attr":
                name = str(node.target)
                if name in self.bodies:
                    continue
                if name not in fakes:
                    known, tensor = node.meta.get("val"), self.tensors[name]
                    fakes[name] = known if _is_fake_of(mode, known, tensor) else _fake_of(mode, tensor)
                values[node] = node.meta["val"] = fakes[name]
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                values[node] = node.meta["val"]  # its operands keep their shapes, see axes.typing
            elif node.op == "call_function":
                args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
                try:
                    call: Any = node.target
                    if dynamic and call in _RECURRENT:
                        call = call.decompose
                    # Composite operators (bilinear) reach symbolic sizes through Python only.
                    with mode, enable_python_dispatcher() if dynamic else nullcontext():
                        values[node] = node.meta["val"] = call(*args, **kwargs)
                except Exception as error:
                    error.add_note(f"while deriving the shape of {self.where(node)}")
                    raise
        return self

    @property
    def fake_mode(self) -> Any:
        """The FakeTensorMode the graph's shapes live in."""
        for node in self.fx.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode
        from torch._subclasses.fake_tensor import FakeTensorMode

        return FakeTensorMode()

    def _fake(self, value: torch.Tensor) -> Any:
        return _fake_of(self.fake_mode, value)

    # ---- axes: what can go (the layers behind these load when first asked) ------------------------

    @property
    def typing(self) -> Typing:
        """The type of every dimension of every value; inferred once."""
        if self._typing is None:
            from .axes.typing import Typing

            self._typing = Typing(self)
        return self._typing

    @property
    def axes(self) -> Axes:
        """The axes by name: size, members, exact, statistical or frozen, and why."""
        if self._axes is None:
            from .axes.axis import Axes

            self._axes = Axes(self.typing)
        return self._axes

    @property
    def dependencies(self) -> networkx.MultiGraph:
        """How axes and parameters are coupled. See :func:`graphprune.axes.dependency.dependencies`."""
        if self._dependencies is None:
            from .axes.dependency import dependencies

            self._dependencies = dependencies(self)
        return self._dependencies

    def explain(self, name: str) -> str:
        """In words, what a parameter, module or axis is coupled with, or why it is frozen."""
        return self.axes.explain(name)

    def plan(
        self, removed: Mapping[Any, Any] | None = None, *, ratio: float | None = None,
        importance: Any = "l2", statistical: bool = False, align: int = 1, seed: int = 0,
    ) -> Plan:  # fmt: skip
        """A plan: either the positions to remove by axis, or the least important ``ratio`` of every axis.

        Raises:
            InputError: both or neither are given, or the ratio is out of range.
            AxisError: an axis is unknown or frozen, or a position is out of range.
        """
        from .plans.plan import make_plan, plan_ratio

        if (removed is None) == (ratio is None):
            raise InputError("give either the positions to remove by axis, or a ratio")
        if removed is not None:
            return make_plan(self, removed)
        return plan_ratio(self, ratio, importance, statistical=statistical, align=align, seed=seed)  # type: ignore[arg-type]

    def apply(self, plan: Plan) -> Graph:
        """A new, smaller graph; this one is untouched. See :func:`graphprune.plans.rewrite.apply_plan`."""
        from .plans.rewrite import apply_plan

        return apply_plan(self, plan)

    def compose(self, first: Plan, second: Plan) -> Plan:
        """The plan that does at once what ``first`` here and then ``second`` on the result do."""
        from .plans.rewrite import compose

        return compose(self, first, second)

    def write_back(self, model: Module) -> Module:
        """A copy of ``model`` with this graph's sizes and weights, in the model's own class.

        Raises:
            AxisError: the model's ``forward`` holds a size that no attribute can change; see
                :func:`graphprune.writeback.write_back`.
        """
        from .writeback import write_back

        return write_back(self, model)

    # ---- running ---------------------------------------------------------------------------------

    @property
    def module(self) -> Any:
        """The graph as a trainable ``nn.Module`` with the original's arguments and parameter names.

        Built on first use with tensors of its own, which become this graph's: training the module
        trains the graph, and never the model it was captured from.
        """
        if self._module is None:
            from .module import TracedModule

            self.tensors = {k: clone_tensor(v) for k, v in self.tensors.items()}
            self._module = TracedModule(self)
        return self._module

    def callable(self) -> torch_fx.GraphModule:
        """A module from flat inputs to the flat outputs, on the tensors as they are now."""
        return torch_fx.GraphModule({**self.tensors, **self.bodies}, self.fx)

    def run(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Flat outputs for flat inputs (default: the examples), without gradients."""
        with torch.no_grad():
            return self.callable()(*(inputs or self.examples))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result for the caller's own arguments, in the caller's own structure."""
        return self.signature.unflatten(self.run(*self.signature.flatten(args, kwargs)))

    # ---- text --------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return "\n".join(node_line(n) for n in self.fx.nodes if n.op != "get_attr")

    def fingerprint(self) -> str:
        """SHA-256 over the printed graph and the bytes of every tensor: equal graphs, equal digest."""
        digest = hashlib.sha256(str(self).encode())
        for name in sorted(self.bodies):
            digest.update(self.bodies[name].code.encode())
        for name in sorted(self.tensors):
            value = self.tensors[name].detach()
            digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
            if not value.is_meta:
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _fake_of(mode: Any, value: torch.Tensor) -> Any:
    return mode.from_tensor(value.detach(), static_shapes=True)


def _is_fake_of(mode: Any, known: Any, value: torch.Tensor) -> bool:
    """Whether a node's FakeTensor still describes a tensor, so that no new one need be made."""
    return (
        getattr(known, "fake_mode", None) is mode
        and not known.requires_grad
        and known.shape == value.shape
        and known.dtype == value.dtype
        and known.device == value.device
        and known.stride() == value.stride()
    )


def clone_tensor(value: torch.Tensor) -> torch.Tensor:
    """A tensor with storage of its own; a parameter stays a parameter."""
    copy = value.detach().clone()
    if isinstance(value, torch.nn.Parameter):
        return torch.nn.Parameter(copy, requires_grad=value.requires_grad)
    return copy
