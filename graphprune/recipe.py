"""``graphprune.toml``: what a build is, in a file.

The keys are the options of ``graphprune optimize`` without their dashes; passes are a pipeline text, or
``[[passes]]`` tables with a ``name`` and that pass's options; ``[iterate]`` is a table of its own. Paths are
relative to the recipe's own directory. A key nobody knows is an error, because a budget that is misspelt
would be a budget ignored.

>>> recipe = parse('target = "arm"\\nthreads = 2\\n')
>>> recipe.target, recipe.threads, recipe.pipeline is None
('arm', 2, True)
>>> recipe.override(threads=4, target=None).threads
4
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from . import iterating
from .errors import GraphpruneError, RecipeError, suggestion
from .iterating import Iterating
from .textual import make_pass, parse_pipeline

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True)
class Recipe:
    """The options of one build; ``None`` is an option that nobody set.

    Attributes:
        source: where the model comes from (see :mod:`graphprune.frontend.sources`).
        target, backend, threads, verify, measure, seed, dynamic_batch: as ``optimize`` takes them.
        out: the artifact directory.
        overwrite: whether ``out`` may exist.
        pipeline: the passes, in textual form.
        providers: ONNX Runtime's execution providers, the preferred one first.
        inputs: example inputs, ``[NAME=]SHAPE[:DTYPE]`` each.
        calibration, evaluate: ``module:attribute`` of an iterable (or a function that returns one) and of a
            function from module to score.
        macs, params, bytes: budgets: a share (up to 1.0) or an absolute number.
        latency: a budget that is measured: a share, or a time as in ``5ms``.
        repair: whether what pruning leaves is refitted.
        precision: ``int8``, ``int8-dynamic``, ``int8-weights``, ``int4-weights``, each also with
            ``+bfloat16``, ``bfloat16`` or ``float16``.
        max_drop: how much of what ``evaluate`` gives may be lost.
        allow_float: whether the runtime may compute in float what is quantized.
        compress: ``zstd``: the artifact's files in one that is compressed.
        dump: a directory for the graph's text after every pass.
        iterate: pruning and training in rounds, before all that (:mod:`graphprune.iterating`).
        directory: what relative paths and modules are relative to.
    """

    source: str | None = None
    target: str | None = None
    out: str | None = None
    pipeline: str | None = None
    backend: str | None = None
    providers: tuple[str, ...] | None = None
    inputs: tuple[str, ...] | None = None
    dynamic_batch: bool | None = None
    threads: int | None = None
    verify: bool | None = None
    measure: bool | None = None
    overwrite: bool | None = None
    seed: int | None = None
    calibration: str | None = None
    evaluate: str | None = None
    macs: float | None = None
    params: float | None = None
    bytes: float | None = None
    latency: str | None = None
    repair: bool | None = None
    precision: str | None = None
    max_drop: float | None = None
    allow_float: bool | None = None
    compress: str | None = None
    dump: str | None = None
    iterate: Iterating | None = None
    directory: Path = Path(".")

    def override(self, **flags: Any) -> Recipe:
        """The recipe with every flag that is not ``None`` in its place."""
        return replace(self, **{name: value for name, value in flags.items() if value is not None})

    def path(self, name: str) -> Path | None:
        """A path option, relative to the recipe's directory."""
        value = getattr(self, name)
        return None if value is None else self.directory / value


_TYPES: Mapping[str, type] = {
    **dict.fromkeys(
        (
            "source",
            "target",
            "out",
            "pipeline",
            "backend",
            "calibration",
            "evaluate",
            "latency",
            "compress",
            "dump",
            "precision",
        ),
        str,
    ),
    **dict.fromkeys(("dynamic_batch", "verify", "measure", "overwrite", "repair", "allow_float"), bool),
    **dict.fromkeys(("macs", "params", "bytes", "max_drop"), float),
    **dict.fromkeys(("threads", "seed"), int),
    "inputs": list,
    "providers": list,
}
_WORDS = {
    str: "a text",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    list: "a list of texts",
}


def read(path: str | Path) -> Recipe:
    """The recipe in a file.

    Raises:
        RecipeError: it cannot be read, is not TOML, or holds an unknown key or value; names the file.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RecipeError(f"cannot read the recipe {path}: {reason}") from error
    return replace(parse(text, str(path)), directory=path.parent)


def parse(text: str, name: str = "recipe") -> Recipe:
    """The recipe in a text; ``name`` is what errors call it.

    Raises:
        RecipeError: see :func:`read`.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: {error}") from error
    known = {f.name.replace("_", "-"): f.name for f in fields(Recipe) if f.name in _TYPES}
    options: dict[str, Any] = {}
    for key, value in values.items():
        if key in ("passes", "iterate"):
            continue
        plain = key.replace("_", "-")
        if plain not in known:
            every = [*known, "passes", "iterate"]
            raise RecipeError(
                f"{name}: unknown key {key!r}{suggestion(plain, every)}; known: {', '.join(sorted(every))}"
            )
        options[known[plain]] = _value(name, key, value, _TYPES[known[plain]])
    try:
        if "passes" in values:
            if "pipeline" in options:
                raise RecipeError("give either pipeline or [[passes]], not both")
            options["pipeline"] = _passes(values["passes"])
        elif "pipeline" in options:
            parse_pipeline(options["pipeline"])
    except GraphpruneError as error:
        raise RecipeError(f"{name}: {error}") from error
    if "iterate" in values:
        options["iterate"] = iterating.parse(values["iterate"], name)
        clash = [key for key in ("macs", "params", "bytes", "latency") if key in options]
        if clash:
            raise RecipeError(f"{name}: [iterate] has the budget; {clash[0]} above it would prune once more")
    return Recipe(**options)


def _value(name: str, key: str, value: Any, kind: type) -> Any:
    if key == "latency" and type(value) in (int, float):
        return f"{value}"  # a share; a time has its unit
    # True is an int to Python, but nobody means it as a number of threads; a number may be whole.
    kinds = (int, float) if kind is float else (kind,)
    fits = isinstance(value, kinds) and not (kind in (int, float) and isinstance(value, bool))
    if kind is list:
        fits = fits and all(isinstance(item, str) for item in value)
    if not fits:
        raise RecipeError(f"{name}: {key} must be {_WORDS[kind]}, not {value!r}")
    return tuple(value) if kind is list else value


def _passes(tables: Any) -> str:
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise RecipeError("passes must be [[passes]] tables with a name each")
    texts = []
    for index, table in enumerate(tables, 1):
        options = dict(table)
        name = options.pop("name", None)
        if not isinstance(name, str):
            raise RecipeError(f"pass {index} of [[passes]] has no name")
        texts.append(str(make_pass(name, options)))
    return ",".join(texts)
