"""``graphprune optimize``: a model in, a proved artifact out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .console import Debug, Json, print_json, stage

if TYPE_CHECKING:
    from ..recipe import Recipe
    from ..result import Result
    from ..target import Target

_OBJECTS = ("source", "calibration", "evaluate")  # options that name Python objects, found from a directory


def optimize(
    source: Annotated[
        str | None,
        typer.Argument(
            help="module:callable, FILE.pt2, timm:NAME, torchvision:NAME, transformers:PATH_OR_TYPE."
        ),
    ] = None,
    target: Annotated[str | None, typer.Option(help="cpu (this host), x86, arm or cuda.")] = None,
    out: Annotated[str | None, typer.Option(help="Directory to write the artifact to.")] = None,
    recipe: Annotated[Path | None, typer.Option(help="A recipe file; flags override it.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Passes in textual form; default: lossless.")] = None,
    backend: Annotated[str | None, typer.Option(help="A backend's name, or auto.")] = None,
    providers: Annotated[
        str | None,
        typer.Option(
            help="ONNX Runtime's execution providers, commas between them, the preferred one first."
        ),
    ] = None,
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Example input, [NAME=]SHAPE[:DTYPE], as in 1x3x224x224; repeatable."),
    ] = None,
    dynamic_batch: Annotated[
        bool | None, typer.Option("--dynamic-batch/--fixed-batch", help="Keep the batch size open.")
    ] = None,
    macs: Annotated[
        float | None, typer.Option(help="Prune to this share (up to 1.0) or number of MACs.")
    ] = None,
    params: Annotated[float | None, typer.Option(help="The same for parameters.")] = None,
    bytes: Annotated[float | None, typer.Option(help="The same for bytes of weights.")] = None,
    latency: Annotated[
        str | None, typer.Option(help="Prune to a measured latency: a share, or a time as in 5ms.")
    ] = None,
    repair: Annotated[
        bool | None, typer.Option("--repair/--no-repair", help="Refit what pruning leaves.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="int8[+bfloat16], int8-dynamic, int8-weights, int4-weights, bfloat16, float16."),
    ] = None,
    max_drop: Annotated[
        float | None, typer.Option(help="How much of what --evaluate gives may be lost, as in 0.01.")
    ] = None,
    allow_float: Annotated[
        bool | None,
        typer.Option("--allow-float/--no-allow-float", help="Let quantized operators run in float."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and write nothing.")] = False,
    calibration: Annotated[str | None, typer.Option(help="module:attribute, an iterable of inputs.")] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="module:attribute, a function from module to score.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the runtime.")] = None,
    seed: Annotated[int | None, typer.Option(help="For passes that draw random numbers.")] = None,
    verify: Annotated[bool | None, typer.Option(help="Prove capture, passes and artifact.")] = None,
    measure: Annotated[bool | None, typer.Option(help="Measure latency on this host.")] = None,
    overwrite: Annotated[
        bool | None, typer.Option("--overwrite/--no-overwrite", help="Replace what is in the directory.")
    ] = None,
    compress: Annotated[
        str | None, typer.Option(help="zstd: store the artifact's files in one that is compressed.")
    ] = None,
    dump: Annotated[str | None, typer.Option(help="Directory for the graph's text after every pass.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Optimise a model for a target and write the artifact to a directory.

    Without a pipeline only lossless passes run. The report goes to standard output.
    """
    from .. import recipe as recipes
    from ..compact import check_compression
    from ..destination import free
    from ..threads import checked

    chosen = recipes.read(recipe) if recipe is not None else recipes.Recipe()
    # What the recipe names is relative to it; what a flag names is relative to the working directory.
    flags = {
        "source": source, "target": target, "out": _absolute(out), "pipeline": pipeline, "backend": backend,
        "inputs": tuple(inputs) if inputs else None, "dynamic_batch": dynamic_batch, "threads": threads,
        "seed": seed, "verify": verify, "measure": measure, "overwrite": overwrite,
        "calibration": calibration, "evaluate": evaluate, "dump": _absolute(dump),
        "compress": compress, "providers": None if providers is None else tuple(providers.split(",")),
        "macs": macs, "params": params, "bytes": bytes, "latency": latency, "repair": repair,
        "precision": precision, "max_drop": max_drop, "allow_float": allow_float,
    }  # fmt: skip
    given = {name for name in _OBJECTS if flags[name] is not None}
    places = {name: Path(".") if name in given else chosen.directory for name in _OBJECTS}
    chosen = chosen.override(**flags)
    if chosen.source is None:
        raise InputError("no model: give a SOURCE, or a recipe with a source")
    check_compression(chosen.compress)  # said before anything is built
    checked(chosen.threads)
    goal = _goal(chosen)
    out_path = chosen.path("out")
    if out_path is not None and not dry_run:
        free(out_path, bool(chosen.overwrite), "--overwrite")
    with stage(json) as say:
        plan: Any = _settled(chosen, goal, places, say, dry_run=True) if dry_run else None
        result = build(chosen, goal, places, say) if plan is None else None
        if out_path is not None and result is not None:
            say(f"write {out_path}")
            out_path = result.save(out_path, overwrite=bool(chosen.overwrite), compress=chosen.compress)
    if plan is not None or result is None:
        print(plan.to_json() if json else plan)
    elif json:
        print_json({**result.report.to_json(), "out": None if out_path is None else str(out_path)})
    else:
        result.report.print()
        print(f"artifact: {out_path}" if out_path is not None else "artifact: not written (no --out)")


def build(recipe: Recipe, goal: str | Target | None, places: dict[str, Path], say: Any) -> Result:
    """Resolve what a recipe names, and optimise for ``goal``."""
    result: Result = _settled(recipe, goal, places, say)
    return result


def _goal(recipe: Recipe) -> str | Target | None:
    """The recipe's target, with the execution providers that it names.

    Raises:
        TargetError: there is no such target, or provider.
        InputError: there are none, or they would go unheard.
    """
    if recipe.providers is None:
        return recipe.target
    from ..backends.onnx_providers import check_names
    from ..target import get

    names = tuple(name.strip() for name in recipe.providers)
    if not any(names):
        raise InputError("providers names no execution provider; CPUExecutionProvider is one")
    backends = {name.strip() for name in (recipe.backend or "auto").split(",")}
    if backends.isdisjoint({"auto", "onnxruntime"}):
        raise InputError(
            f"execution providers are ONNX Runtime's, and the backend is {recipe.backend}; leave providers "
            "out, or give backend onnxruntime"
        )
    goal = replace(get(recipe.target or "cpu"), providers=names)
    check_names(goal)
    return goal


def _settled(
    recipe: Recipe, goal: str | Target | None, places: dict[str, Path], say: Any, **more: Any
) -> Any:
    from .. import api
    from ..calibration import replayed
    from ..frontend import sources
    from ..frontend.input_text import parse_inputs

    say(f"load {recipe.source}")
    source = sources.resolve(str(recipe.source), places["source"])
    example_inputs, example_kwargs = source.example_inputs, None
    if recipe.inputs:
        example_inputs, example_kwargs = parse_inputs(recipe.inputs)
    calibration = evaluate = None
    if recipe.calibration is not None:
        calibration = sources.load_object(recipe.calibration, places["calibration"])
        calibration = replayed(calibration() if callable(calibration) else calibration)
    if recipe.evaluate is not None:
        evaluate = sources.load_object(recipe.evaluate, places["evaluate"])
    settings = {
        name: getattr(recipe, name)
        for name in (
            "pipeline",
            "backend",
            "dynamic_batch",
            "threads",
            "seed",
            "verify",
            "measure",
            "macs",
            "params",
            "bytes",
            "latency",
            "repair",
            "precision",
            "max_drop",
            "allow_float",
        )
        if getattr(recipe, name) is not None
    }
    if goal is not None:
        settings["target"] = goal
    model, notes = source.model, source.notes
    if recipe.iterate is not None:
        model, rounds = _in_rounds(
            recipe, goal, model, example_inputs, example_kwargs, calibration, evaluate, say, more
        )
        notes = (*notes, *rounds)
    result = api.optimize(
        model, example_inputs, example_kwargs=example_kwargs, calibration=calibration,
        evaluate=evaluate, progress=say, dump=recipe.path("dump"), **settings, **more,
    )  # fmt: skip
    if more:
        return result
    return replace(result, report=replace(result.report, notes=(*notes, *result.report.notes)))


def _in_rounds(
    recipe: Recipe, goal: str | Target | None, model: Any, inputs: Any, kwargs: Any, calibration: Any,
    evaluate: Any, say: Any, more: Any,
) -> tuple[Any, tuple[str, ...]]:  # fmt: skip
    """The network that the recipe's rounds of pruning and training leave, and what a report says of them."""
    from .. import iterating

    if more:
        raise InputError(
            "--dry-run shows the plan of one pruning; the recipe's [iterate] trains between several"
        )
    assert recipe.iterate is not None
    again = [name for name in ("macs", "params", "bytes", "latency") if getattr(recipe, name) is not None]
    if again:
        raise InputError(f"the recipe's [iterate] has the budget; --{again[0]} would prune once more")
    options = {"seed": recipe.seed, "target": goal}
    done = iterating.run(
        recipe.iterate, model, inputs, kwargs, base=recipe.directory, say=say, calibration=calibration,
        evaluate=evaluate, **{name: value for name, value in options.items() if value is not None},
    )  # fmt: skip
    last = done.rounds[-1].parameters if done.rounds else done.before[1]
    summary = f"pruned and trained in {len(done.rounds)} rounds, parameters {done.before[1]:,} → {last:,}"
    return done.module, (summary, *done.notes)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).absolute())
