"""``graphprune inspect``: what a model consists of and costs, or what an artifact holds and executes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import InputError
from .console import Debug, Json, print_json, print_tables, stage

if TYPE_CHECKING:
    from ..graph import Graph
    from ..report.sections import Section

MANIFEST = "manifest.json"


def inspect(
    source: Annotated[str, typer.Argument(help="A model source, or an artifact directory.")],
    inputs: Annotated[
        list[str] | None,
        typer.Option("--input", help="Example input, [NAME=]SHAPE[:DTYPE], as in 1x3x224x224; repeatable."),
    ] = None,
    dynamic_batch: Annotated[bool, typer.Option("--dynamic-batch", help="Keep the batch size open.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph's text as well.")] = False,
    axes: Annotated[bool, typer.Option("--axes/--no-axes", help="List the axes that can be pruned.")] = True,
    frozen: Annotated[bool, typer.Option("--frozen", help="List the frozen axes too, with reasons.")] = False,
    explain: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Say what an axis, parameter or module is coupled with."),
    ] = None,
    draw: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write the coupling of axes as FILE.svg, .dot or .json."),
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Show a model's graph and costs, or an artifact's manifest and what its runtime executes."""
    if (Path(source) / MANIFEST).is_file() or source.endswith(".gpz"):
        if frozen or explain or draw:
            raise InputError(
                f"{source} is an artifact, whose axes are gone; --frozen, --explain and --draw need a model"
            )
        from .artifacts import describe, sections

        with stage(json) as say:
            say(f"open {source}")
            found = describe(Path(source))
        if json:
            print_json(found.to_json())
        else:
            print_tables(list(sections(found)))
        return
    from ..axes.dependency import selection, write
    from .axes import axes_json, axes_section

    with stage(json) as say:
        captured, notes = _capture(source, inputs or [], dynamic_batch, say)
        if draw is not None:
            say(f"draw {draw}")
            write(selection(captured.dependencies, frozen=frozen), draw)
    if json:
        extra: dict[str, Any] = {"graph": str(captured)} if graph else {}
        extra |= {"explanation": captured.explain(explain)} if explain else {}
        extra |= {"axes": axes_json(captured, frozen)} if axes else {}
        print_json({**model_json(captured, notes), **extra})
        return
    if explain:
        print(captured.explain(explain))
        return
    print_tables(list(model_sections(captured, source, notes)))
    if axes:
        print_tables([axes_section(captured, frozen)])
    if graph:
        print(captured)


def _capture(source: str, inputs: list[str], dynamic_batch: bool, say: Any) -> tuple[Graph, tuple[str, ...]]:
    from ..frontend import sources
    from ..frontend.input_text import parse_inputs
    from ..original import Original

    say(f"load {source}")
    found = sources.resolve(source)
    args, kwargs = found.example_inputs, None
    if inputs:
        args, kwargs = parse_inputs(inputs)
    say("capture")
    original = Original.of(found.model, args, kwargs, dynamic_batch, weights=False)
    return original.graph, (f"example inputs: {original.source}", *found.notes, *original.graph.notes)


def model_sections(graph: Graph, source: str, notes: tuple[str, ...]) -> Iterator[Section]:
    """The tables about a model; a new kind of finding is one more ``yield`` here."""
    yield _interface(graph, source)
    yield _totals(graph)
    yield _operators(graph)
    if notes:
        yield _notes(notes)


def model_json(graph: Graph, notes: tuple[str, ...]) -> dict[str, Any]:
    """The same findings for machines."""
    from ..cost import cost
    from ..graph_text import type_text

    return {
        "inputs": {n.name: type_text(n.meta["val"]) for n in graph.placeholders},
        "outputs": output_types(graph),
        "dynamic": graph.is_dynamic,
        "cost": asdict(cost(graph)),
        "operators": [
            dict(zip(("operator", "count", "macs"), row, strict=True)) for row in operator_counts(graph)
        ],
        "tied": dict(graph.tied),
        "notes": list(notes),
    }


def operator_counts(graph: Graph) -> list[tuple[str, int, int]]:
    """(operator, count, MACs), the most MACs first, then the most frequent."""
    from ..cost import node_macs
    from ..graph_text import operator_name

    counts: dict[str, list[int]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            entry = counts.setdefault(operator_name(node), [0, 0])
            entry[0], entry[1] = entry[0] + 1, entry[1] + node_macs(node)
    rows = [(name, count, macs) for name, (count, macs) in counts.items()]
    return sorted(rows, key=lambda row: (-row[2], -row[1], row[0]))


def output_types(graph: Graph) -> list[str]:
    """The type of every flat output; one that is not a tensor stands as its value."""
    from torch.fx import Node

    from ..graph_text import type_text

    flat: Any = graph.output.args[0]
    return [type_text(value.meta["val"]) if isinstance(value, Node) else repr(value) for value in flat]


def _interface(graph: Graph, source: str) -> Section:
    from ..graph_text import type_text
    from ..report.sections import Section

    rows = [("source", source)]
    rows += [("input", f"{n.name}: {type_text(n.meta['val'])}") for n in graph.placeholders]
    rows += [("output", text) for text in output_types(graph)]
    rows += [("tied", f"{alias} is {name}") for alias, name in graph.tied.items()]
    return Section("model", ("", ""), tuple(rows))


def _totals(graph: Graph) -> Section:
    from ..cost import cost
    from ..report.sections import Section, count_text, size_text

    total = cost(graph)
    rows = (
        ("operators", f"{total.nodes:,}"),
        ("parameters", count_text(total.parameters)),
        ("tensor bytes", size_text(total.bytes)),
        ("MACs a call", count_text(total.macs)),
    )
    return Section("cost", ("", ""), rows, frozenset({1}))


def _operators(graph: Graph) -> Section:
    from ..report.sections import Section, count_text

    rows = tuple(
        (name, f"{count:,}", count_text(macs) if macs else "") for name, count, macs in operator_counts(graph)
    )
    return Section("operators", ("operator", "count", "MACs"), rows, frozenset({1, 2}))


def _notes(notes: tuple[str, ...]) -> Section:
    from ..report.sections import Section

    return Section("notes", ("",), tuple((note,) for note in notes))
