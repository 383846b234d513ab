"""Importing stays cheap, layers import only from layers to their left, the public names stay as they are."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import graphprune

PACKAGE = Path(graphprune.__file__).parent
HEAVY = (
    "onnx",
    "onnxruntime",
    "onnxscript",
    "torchvision",
    "timm",
    "transformers",
    "rich",
    "typer",
    "jinja2",
)

# Left to right; a module imports from its own layer and from those before it. A new module has a line here.
LAYERS = {
    "base": (
        "errors", "notes", "integers", "target", "signature", "structure", "atomic", "threads", "cache",
        "compact",
    ),
    "capture": (
        "graph", "graph_text", "module", "frontend", "original", "cost", "calibration", "runner", "operands",
        "kinds",
    ),
    "type": ("axes",),
    "plan": ("importance", "inverse_factor", "quantization", "sparsity", "plans"),
    "rewrite": ("pipeline", "textual", "registry"),
    "verify": ("verify", "rounding", "instruments", "writeback"),
    "lower": (
        "backend", "lowering", "manifest", "contents", "reference", "versions", "destination", "artifact",
    ),
    "measure": (
        "measure", "sittings", "choice", "blocks", "fusion", "latency",
    ),
    "train": ("train",),
    "front": (
        "report", "result", "precision", "pruning", "building", "measured", "api", "iterating", "recipe",
        "gates", "emulation", "proof", "cli",
    ),
}  # fmt: skip
LEVEL = {module: level for level, modules in enumerate(LAYERS.values()) for module in modules}


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def loaded(statement: str, modules: tuple[str, ...]) -> list[str]:
    """Which of ``modules`` a fresh interpreter has loaded after ``statement``."""
    code = f"import sys\n{statement}\nprint(*[m for m in {modules!r} if m in sys.modules])"
    return python(code).split()


def test_the_public_names() -> None:
    assert sorted(graphprune.__all__) == [
        "Axis", "Certificate", "Context", "Graph", "GraphpruneError", "Note", "Pass", "PassResult",
        "Pipeline", "Plan", "Report", "Result", "Target", "load", "optimize", "rule", "trace", "verify",
    ]  # fmt: skip


@pytest.mark.parametrize("name", graphprune.__all__)
def test_every_public_name_exists_and_is_documented(name: str) -> None:
    value = getattr(graphprune, name)
    assert value.__doc__
    assert name in dir(graphprune)


@pytest.mark.parametrize("package", sorted(PACKAGE.rglob("__init__.py")), ids=lambda path: path.parent.name)
def test_every_name_that_a_package_declares_is_there(package: Path) -> None:
    name = ".".join(("graphprune", *package.parent.relative_to(PACKAGE).parts))
    module = importlib.import_module(name)
    for declared in getattr(module, "__all__", ()):
        assert getattr(module, declared) is not None, f"{name}.{declared}"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'optimise'"):
        _ = graphprune.optimise


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded("import graphprune", (*HEAVY, "torch", "numpy", "networkx")) == []


def test_naming_the_api_loads_neither_runtimes_nor_terminals() -> None:
    statement = (
        "import graphprune; graphprune.optimize, graphprune.trace, graphprune.Graph, graphprune.Report"
    )
    extra = ("graphprune.passes", "graphprune.backends", "graphprune.artifact")
    assert loaded(statement, (*HEAVY, *extra)) == []


def test_the_version_needs_no_torch() -> None:
    statement = "from graphprune.cli import main; assert main(['--version']) == 0"
    assert loaded(statement, ("torch",)) == ["graphprune", graphprune.__version__]


def sources() -> Iterator[tuple[str, Path]]:
    """(module relative to the package by its first part, file)."""
    for path in sorted(PACKAGE.rglob("*.py")):
        first = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if first not in ("__init__", "passes", "backends"):
            yield first, path


def imports(path: Path) -> Iterator[str]:
    """First parts of what a file imports from this package when it is itself imported."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    here = parts[:-1]
    for node in _eager(ast.parse(path.read_text()).body):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif node.level:
            base = here[: len(here) - node.level + 1]
            prefix = ".".join(("graphprune", *base, *([node.module] if node.module else [])))
            names = [prefix] if node.module else [f"{prefix}.{alias.name}" for alias in node.names]
        else:
            names = [node.module or ""]
        for name in names:
            if name.startswith("graphprune."):
                yield name.split(".")[1]


def _eager(body: list[ast.stmt]) -> Iterator[ast.Import | ast.ImportFrom]:
    for node in body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" not in ast.unparse(node.test):
            yield from _eager([*node.body, *node.orelse])
        elif isinstance(node, ast.ClassDef):
            yield from _eager(node.body)


@pytest.mark.parametrize(("module", "path"), [*sources()], ids=lambda v: v if isinstance(v, str) else v.stem)
def test_a_layer_imports_only_from_layers_to_its_left(module: str, path: Path) -> None:
    assert module in LEVEL, f"{module} stands in no layer; add it to LAYERS in {Path(__file__).name}"
    for imported in imports(path):
        assert imported not in ("passes", "backends"), f"{path.name} imports {imported} eagerly"
        if imported in LEVEL:
            assert LEVEL[imported] <= LEVEL[module], f"{path.name} imports {imported}, which is to its right"
