"""AOTInductor: the graph compiled to machine code for this kind of processor, in one ``.pt2`` package.

``torch.compile``'s compiler, run ahead of time and with freezing: weights are constants that oneDNN's layouts
are chosen for, and quantizers around a convolution or linear become its integer form. The package needs torch
to be opened and compiles nothing then. It is for processors of the instruction set it was compiled on, so
only for targets that are this host; its bytes are not the same from one build to the next.
"""

from __future__ import annotations

import io
import json
import logging
import os
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch._inductor
import torch.ao.quantization.fx._decomposed  # registers torch.ops.quantized_decomposed

from graphprune.backend import Audit, Lowered, TensorSpec
from graphprune.errors import BackendError
from graphprune.graph import Graph
from graphprune.graph_text import operator_name
from graphprune.integers import INDUCTOR, Scheme
from graphprune.operands import PRODUCTS
from graphprune.target import Target, host_arch
from graphprune.threads import checked, torch_threads

from . import flat_inputs
from .exported import exported, first_line, specifications, tensor_outputs, tensors_only
from .inductor_audit import OPERATORS_FILE, PACKAGE_FILE, asked, read
from .inductor_device import device_of, moved
from .inductor_sparse import compressed

aten, qd = torch.ops.aten, torch.ops.quantized_decomposed

_LINEAR = PRODUCTS | {aten.linear.default}

UNFROZEN = "weights are not frozen, which is slower: torch gets branches behind frozen ones wrong"
# Kernels take as many threads as the caller has set, not as many as the compiling host had.
OPTIONS = {"freezing": True, "cpp.dynamic_threads": True}


def settings(graph: Graph) -> dict[str, Any]:
    """What a graph is compiled with.

    A branch is traced on rows that follow each other, and torch 2.13 hands it what stands in another layout
    behind a convolution with a frozen weight: it stops, or computes something else.
    """
    return OPTIONS | ({"layout_optimization": False, "freezing": False} if graph.bodies else {})


def placed(graph: Graph, device: str) -> tuple[Graph, tuple[str, ...]]:
    """The graph on the device it is compiled for, and what a reader should know of how it is compiled."""
    notes: tuple[str, ...] = (UNFROZEN,) if graph.bodies else ()
    if device == "cpu":
        return graph, notes
    graph = moved(graph, device)
    return graph, notes + compressed(graph)


class Inductor:
    """Compiles with ``torch._inductor`` and runs the package."""

    name: ClassVar[str] = "inductor"
    extra: ClassVar[str | None] = None
    integers: ClassVar[Scheme | None] = INDUCTOR

    def lower(self, graph: Graph, target: Target) -> Lowered:
        """The graph as ``model.pt2``.

        Raises:
            BackendError: the target is not this host, there is no C++ compiler, or it does not compile.
        """
        reason = self.unrunnable(target)
        if reason:
            raise BackendError(f"{reason}; build on such a host, or with backend='onnxruntime'")
        kept = tensor_outputs(graph)
        inputs, outputs = specifications(graph)
        tensors_only(outputs, "package")
        work = graph.copy()
        understood(work)
        operators = asked(work)
        work, notes = placed(work, "cuda" if target.arch == "cuda" else "cpu")
        with quiet(), torch.no_grad():
            package = _compiled(exported(work, kept), settings(work))
        files = {PACKAGE_FILE: package, OPERATORS_FILE: json.dumps(operators).encode()}
        return Lowered(self.name, files, inputs, outputs, {"torch": torch.__version__}, notes)

    def open(
        self,
        files: Mapping[str, bytes],
        inputs: Sequence[TensorSpec],
        outputs: Sequence[Any],
        target: Target,
        threads: int | None = None,
    ) -> InductorRunner:
        """A runner over the package; ``threads=None`` leaves torch's.

        Raises:
            BackendError: a file is missing, the package is for another processor, or torch cannot read it.
        """
        return InductorRunner(files, tuple(inputs), tuple(outputs), threads)

    def unrunnable(self, target: Target) -> str | None:
        """Why packages for ``target`` do not run here, or ``None``: they are machine code."""
        if target.runs_here:
            return None
        if target.arch == "cuda":
            return "inductor compiles for the GPU it finds, and torch finds none here"
        return f"inductor's packages are machine code for {target.arch}, and this host is {host_arch()}"

    def audit(self, lowered: Lowered, target: Target) -> Audit:
        """The kernels that the package calls, in order."""
        return read(lowered.files)


class InductorRunner:
    """A callable from flat tensors to the flat outputs.

    Attributes:
        inputs, outputs: the specifications.
        threads: of torch during a call; ``None`` leaves them.
        device: that the package computes on; inputs go there, results to where the inputs were.
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[Any, ...],
        threads: int | None = None,
    ):
        if PACKAGE_FILE not in files:
            raise BackendError(f"there is no {PACKAGE_FILE} among the files: {', '.join(files) or 'none'}")
        self.inputs, self.outputs, self.threads = inputs, outputs, checked(threads)
        self._check = flat_inputs.Check(inputs)
        self.device = _checked_device(files[PACKAGE_FILE])
        with tempfile.TemporaryDirectory(prefix="graphprune-") as folder, quiet():
            path = Path(folder) / PACKAGE_FILE
            path.write_bytes(files[PACKAGE_FILE])
            try:
                self._model = torch._inductor.aoti_load_package(str(path))
            except Exception as error:
                reason = f"torch {torch.__version__} does not open the package: {first_line(error)}"
                raise BackendError(reason) from error

    def __call__(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Run once. Raises InputError when the inputs do not fit, BackendError when the package fails."""
        self._check(inputs)
        # Compiled for rows that follow each other: another layout would be read as if it were that.
        given = [value.detach().to(self.device).contiguous() for value in inputs]
        try:
            with torch.no_grad(), torch_threads(self.threads):
                found = self._model(*given)
        except Exception as error:
            raise BackendError(f"the package failed while running: {first_line(error)}") from error
        found = [found] if isinstance(found, torch.Tensor) else found
        return flat_inputs.results(self.outputs, found, inputs)


def understood(graph: Graph) -> None:
    """What the compiler has no form for is written otherwise, in place, or refused."""
    for node in list(graph.fx.nodes):
        if node.target is qd.dequantize_per_channel.default and node.args[2] is None:
            _as_float(graph, node)
        elif _is_foreign(node):
            raise BackendError(
                f"{graph.where(node)}: inductor has no {operator_name(node)}, which is ONNX Runtime's "
                "(dynamic integers, weights in blocks); use backend='onnxruntime', or precision='int8'"
            )
        elif node.target is aten.add.Tensor and not node.kwargs:
            _kept_apart(graph, node)
    graph.sweep()
    graph.propagate()


def _is_foreign(node: torch.fx.Node) -> bool:
    own = getattr(node.target, "namespace", "aten") == "graphprune"
    return own or "channel_group" in operator_name(node)


def _kept_apart(graph: Graph, node: torch.fx.Node) -> None:
    """``a + linear`` as ``a - (-linear)``, where the linear is one in integers whose result is in float.

    torch 2.13 fuses the sum into the integer kernel and then computes something else (20 % off on a residual
    stream); loops that negate and subtract are fused with what follows, and cost nothing.
    """
    products = [s for s in node.args[:2] if isinstance(s, torch.fx.Node) and s.target in _LINEAR]
    products = [s for s in products if any("dequantize" in str(i.target) for i in s.all_input_nodes)]
    if not products:
        return
    product = products[0]
    other = node.args[1] if node.args[0] is product else node.args[0]
    with graph.fx.inserting_before(node):
        negative = graph.fx.call_function(aten.neg.default, (product,))
        result = graph.fx.call_function(aten.sub.Tensor, (other, negative))
    node.replace_all_uses_with(result)
    graph.fx.erase_node(node)


def _as_float(graph: Graph, node: torch.fx.Node) -> None:
    """A constant without a zero point (a bias in the unit of its sums) as the numbers it stands for."""
    integers, scale = (graph.tensor(node.args[i]) for i in (0, 1))  # type: ignore[arg-type]
    shape = [1] * integers.dim()
    shape[int(node.args[3])] = -1  # type: ignore[arg-type]
    numbers = integers.float() * scale.reshape(shape)
    made = graph.add_tensor(f"{node.args[0].target}.numbers", numbers, before=node, trainable=False)  # type: ignore[union-attr]
    node.replace_all_uses_with(made)
    graph.fx.erase_node(node)


def _compiled(program: torch.export.ExportedProgram, options: dict[str, Any]) -> bytes:
    with tempfile.TemporaryDirectory(prefix="graphprune-") as folder:
        path = os.path.join(folder, PACKAGE_FILE)
        try:
            torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=options)
        except Exception as error:
            raise not_compiled(error) from error
        return Path(path).read_bytes()


def not_compiled(error: Exception) -> BackendError:
    """What to say of an error of the compiler."""
    why = next((e for e in _causes(error) if "Cxx" in type(e).__name__), None)
    if why is None:
        return BackendError(f"inductor does not compile the graph: {first_line(error)}")
    return BackendError(
        f"inductor needs a C++ compiler and found none that works: {first_line(why)}; install g++, or name "
        "one with the variable CXX"
    )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _checked_device(package: bytes) -> str:
    """What the package runs on. Machine code of another processor would end the process, not raise.

    Raises:
        BackendError: it is no package, or this host cannot run it.
    """
    try:
        with zipfile.ZipFile(io.BytesIO(package)) as archive:
            names = [n for n in archive.namelist() if n.endswith("_metadata.json")]
            facts: dict[str, str] = {}
            for name in names:
                facts |= json.loads(archive.read(name))
    except (zipfile.BadZipFile, ValueError) as error:
        raise BackendError(f"{PACKAGE_FILE} is not a package of AOTInductor: {first_line(error)}") from error
    machine = facts.get("AOTI_MACHINE", "")
    if machine and machine != host_arch():
        raise BackendError(f"the package is machine code for {machine}, and this host is {host_arch()}")
    missing = [word for word in facts.get("AOTI_CPU_ISA", "").split() if not _has(word.lower())]
    if missing:
        raise BackendError(
            f"the package needs {', '.join(missing)}, which this processor lacks; build it here"
        )
    device = device_of(facts)
    if device == "cuda" and not torch.cuda.is_available():
        raise BackendError("the package is for an NVIDIA GPU, and torch finds none here")
    return device


def _has(instructions: str) -> bool:
    """Whether this processor has them; what torch has no word for is taken to be part of the architecture."""
    known = torch.cpu.get_capabilities()
    return bool(known.get(instructions, known.get(f"{instructions}_f", True)))


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's warnings, and its word on every package that is opened where there is no compiler."""
    packages = logging.getLogger("torch._inductor.package.package")  # "Loading outdated pt2 file"
    level = packages.level
    packages.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        packages.setLevel(level)
