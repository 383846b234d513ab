"""Results as Markdown, JSON and a drawing: what our files reach, beside each tool's best variant."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from benchmarks.quantization.accuracy import Score
from benchmarks.quantization.goals import goals, verdict
from benchmarks.quantization.methods import OURS
from benchmarks.quantization.plot import FAR, draw
from benchmarks.quantization.pruned import MASK, ORIGINAL, RUNTIME, Proof, held
from benchmarks.quantization.results import DYNAMIC, INT8, OUTSIDE, PEERS, Results, networks, share, three
from benchmarks.quantization.speed import AGAIN
from benchmarks.record import table

ABOUT = """# Quantization

Written by `python -m benchmarks.quantization`. Every tool is given the same float ONNX file (ours the network
it was exported from) and the same calibration samples; all files but OpenVINO's run on one ONNX Runtime."""
ABOUT_SPEED = """Batch 1. Latency is relative to the plain float export on the same ONNX Runtime: medians of
per-round ratios with quartiles, each file in a process of its own, in turns. Of a tool with several variants
the fastest is shown here, whatever its error. *Noise* is the float export against itself in another process.
*Int8* is the share of multiply-accumulates of convolutions, linears and products that the runtime executes in
integers, by its own optimised graph; *size* is of files; *error* the norm of the difference to float outputs
over their norm, on inputs that were not calibrated with. Networks without trained weights have random ones,
and batch norms that fit them. OpenVINO runs on its own runtime with its defaults, which include bfloat16
where the processor has it."""
ABOUT_PLOT = f"""![Latency of each tool's fastest file]({{name}}.svg)

Each tool's fastest file, hollow where its error is more than {FAR:g} times the least."""
ABOUT_ACCURACY = """Scores in per cent on inputs that no method saw, medians over seeds with their range. Of a
tool with several variants the best is shown, chosen by that score."""
ABOUT_FOUR_BITS = """*W4A8* has integers between operators, too; *W4* has the weights of linears in blocks of
32, and embeddings in 8 bits. *Nearest* rounds each weight on its own, *recovered* rounds them so that what a
layer computes changes least."""

ABOUT_PRUNED = """One `optimize` call with `macs=0.5` and `precision="int8"`. *Pruned* is the same without
`precision`, *int8* the same without `macs` (from the table above, where it was run). Certificates are those
of that call's report, with their largest error relative to the largest output: *mask equivalence* compares
the smaller network with the original whose removed positions are zero, *file, graph* what the runtime
computes with the graph that was lowered, and both have to hold; *file, original* is recorded, since half of
the network is gone."""
ABOUT_ORDER = "The same passes the other way round are refused: `{}`."
ABOUT_TRAINING = """Weights of few bits, activations of eight, scores of files on the runtime: each weight
rounded to the *nearest*, *rounded* so that what a layer computes changes least, and *trained* on with the
rounding in the loop (`prepare`, an ordinary loop over 4,000 digits, `convert`), on one thread."""


def speed_summary(results: Results) -> str:
    """One row a network and number of threads: ours, and each tool's fastest."""
    head = ["network", "threads", "fp32, ms", "ours", "int8", "size", "error", "ours, dynamic", *PEERS,
            OUTSIDE, "noise", "no other static file is faster, latency to ours"]  # fmt: skip
    lines = []
    for network, threads in results.timed():
        plain = next((r.ms for r in results.rows(network, threads, "") if r.variant != AGAIN), None)
        ours = results.ours(network, threads)
        line = [network, str(threads), "–" if plain is None else f"{plain:.1f}"]
        if ours is None:
            line += [_failed(results, network, OURS), "–", "–", "–"]
        else:
            figures = (share(ours.integers), f"{ours.size:.3f}", f"{ours.error:.3f}")
            line += [f"**{three(ours.to_float)}**", *figures]
        dynamic = results.ours(network, threads, DYNAMIC)
        line.append("–" if dynamic is None else three(dynamic.to_float))
        for tool in (*PEERS, OUTSIDE):
            rows = [r for r in results.rows(network, threads, tool) if r.variant != "float"]
            line.append(three(rows[0].to_float) if rows else _failed(results, network, tool))
        told, rival = verdict(results, network, threads)
        lines.append([*line, three(results.again(network, threads)), f"{told}: {rival}"])
    return table(head, lines)


def _failed(results: Results, network: str, tool: str) -> str:
    reasons = [r.failure for r in results.speed if (r.network, r.tool) == (network, tool) and r.failure]
    return f"fails: {reasons[0][:60]}" if reasons else "–"


def speed_details(results: Results, network: str) -> str:
    """Every file of a network."""
    head = ["file", "threads", "ms", "to fp32", "to ours", "int8", "size", "error", "Q and DQ left",
            "made in, s"]  # fmt: skip
    lines = []
    for row in (r for r in results.speed if r.network == network):
        name = ", ".join(part for part in (row.tool, row.variant) if part)
        if row.failure:
            lines.append([name, str(row.threads), f"fails: {row.failure}", *["–"] * (len(head) - 3)])
            continue
        lines.append([
            name, str(row.threads), f"{row.ms:.2f}", three(row.to_float), three(row.to_ours),
            share(row.integers), "–" if row.size is None else f"{row.size:.3f}",
            "–" if row.error is None else f"{row.error:.4f}",
            "–" if row.unfused is None else str(row.unfused), f"{row.seconds:.0f}",
        ])  # fmt: skip
    return table(head, lines)


def cell(scores: Sequence[Score]) -> str:
    """Median and range in per cent; why there is none."""
    found = [100 * s.score for s in scores if s.score is not None]
    if not found or len(found) < len(scores):
        return next((f"fails: {s.failure[:60]}" for s in scores if s.failure), "–")
    text = f"{statistics.median(found):.2f}"
    return text if len(found) == 1 else f"{text} ({min(found):.2f}–{max(found):.2f})"


def best(results: Results, network: str, tool: str) -> str | None:
    """The variant of a tool with the highest median score on a network; ``None`` where all fail."""
    scored: dict[str, float] = {}
    for variant in dict.fromkeys(s.variant for s in results.scores(network, tool)):
        scores = results.scores(network, tool, variant)
        values = [s.score for s in scores if s.score is not None]
        if len(values) == len(scores):
            scored[variant] = statistics.median(values)
    return max(scored, key=lambda v: scored[v]) if scored else None


def accuracy_summary(results: Results) -> str:
    """One row a network: float, ours, and each tool's best."""
    head = ["network", "score", "float", "ours", "points lost", *PEERS]
    lines = []
    for network in networks(results.accuracy):
        start = results.scores(network, "")
        ours = results.scores(network, OURS, INT8)
        lost = [100 * s.lost for s in ours if s.lost is not None]
        line = [network, next(iter(start[0].metrics), "–"), cell(start), f"**{cell(ours)}**",
                f"{statistics.median(lost):+.2f}" if lost else "–"]  # fmt: skip
        for tool in PEERS:
            top = best(results, network, tool)
            text = cell(results.scores(network, tool, top))
            line.append(text if top is None else f"{text} {top}")
        lines.append(line)
    return table(head, lines)


def four_bits(results: Results) -> str:
    """Weights of four bits: rounded to the nearest, and recovered; nothing where none were tried."""
    variants = [f"{what}, {how}" for what in ("W4A8", "W4") for how in ("nearest", "recovered")]
    lines = []
    for network in networks(results.accuracy):
        found = [results.scores(network, OURS, variant) for variant in variants]
        if any(found):
            lines.append([network, cell(results.scores(network, "")), *(cell(s) for s in found)])
    return table(["network", "float", *variants], lines) if lines else ""


def pruned_summary(results: Results) -> str:
    """One row a network and seed: scores, what is left, and what was proved."""
    head = ["network", "seed", "score", "float", "int8", "pruned", "pruned, then int8", "MACs left",
            "in int8", "size", "mask equivalence", "file, graph", "file, original", "made in, s"]  # fmt: skip
    lines = []
    for row in results.pruned:
        line = [row.network, str(row.seed), row.metric or "–", _score(row.plain)]
        if row.failure:
            lines.append([*line, f"fails: {row.failure[:60]}", *["–"] * (len(head) - len(line) - 1)])
            continue
        alone = next((s.score for s in results.scores(row.network, OURS, INT8) if s.seed == row.seed), None)
        lines.append([
            *line, _score(alone), _score(row.pruned), f"**{_score(row.quantized)}**", share(row.left),
            share(row.integers), "–" if row.size is None else f"{row.size:.3f}",
            *(_proofs(row.of(kind)) for kind in (MASK, RUNTIME, ORIGINAL)), f"{row.seconds:.0f}",
        ])  # fmt: skip
    return table(head, lines)


def _proofs(found: Sequence[Proof]) -> str:
    """How many hold, and the largest error."""
    if not found:
        return "**none**"
    worst = max(proof.error for proof in found)
    if all(proof.passed and not proof.exact for proof in found):
        return f"recorded, {worst:.0e}"
    passed = sum(proof.passed for proof in found)
    return f"{'holds' if held(found) else '**fails**'}, {passed} of {len(found)}, {worst:.0e}"


def training_summary(results: Results) -> str:
    """One row a network, seed and number of bits."""
    head = ["network", "seed", "bits", "float", "nearest", "rounded", "trained", "points lost", "in int8",
            "epochs", "seconds"]  # fmt: skip
    lines = []
    for row in results.training:
        line = [row.network, str(row.seed), str(row.bits), _score(row.plain)]
        if row.failure:
            lines.append([*line, f"fails: {row.failure[:60]}", *["–"] * (len(head) - len(line) - 1)])
            continue
        lines.append([
            *line, _score(row.nearest), _score(row.rounded), f"**{_score(row.trained)}**",
            "–" if row.lost is None else f"{100 * row.lost:+.2f}", share(row.integers), str(row.epochs),
            f"{row.seconds:.0f}",
        ])  # fmt: skip
    return table(head, lines)


def _score(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f}"


def accuracy_details(results: Results) -> str:
    """Every score, with all metrics."""
    lines = []
    for s in results.accuracy:
        name = ", ".join(part for part in (s.tool, s.variant) if part)
        figures = ", ".join(f"{key} {value:.4f}" for key, value in s.metrics.items())
        size = "–" if s.size is None else f"{s.size:.3f}"
        lines.append(
            [s.network, str(s.seed), name, figures or f"fails: {s.failure}", size, f"{s.seconds:.0f}"]
        )
    return table(["network", "seed", "file", "on unseen inputs", "size", "made in, s"], lines)


def write(results: Results, facts: dict[str, str], folder: Path, name: str = "quantization") -> Path:
    """Write ``NAME.json``, ``NAME.md`` and ``NAME.svg``; returns the path of the second."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {"conditions": facts} | asdict(results)
    (folder / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    parts = [ABOUT, "\n".join(f"- {key}: {value}" for key, value in (facts | results.versions).items())]
    parts += ["## Ours, and what it is held to", goals(results)]
    if results.speed:
        draw(results, folder / f"{name}.svg")
        parts += ["## Latency and size", ABOUT_SPEED, speed_summary(results), ABOUT_PLOT.format(name=name)]
    if results.accuracy:
        parts += ["## Accuracy", ABOUT_ACCURACY, accuracy_summary(results)]
    four = four_bits(results)
    if four:
        parts += ["### Weights of four bits", ABOUT_FOUR_BITS, four]
    if results.pruned:
        parts += ["## Pruned, then quantized", ABOUT_PRUNED, pruned_summary(results)]
        parts += [ABOUT_ORDER.format(text) for text in {r.refusal: 0 for r in results.pruned if r.refusal}]
    if results.training:
        parts += ["## Trained with rounding", ABOUT_TRAINING, training_summary(results)]
    for network in networks(results.speed):
        parts += [f"### Every file: {network}", speed_details(results, network)]
        ours = results.ours(network, results.timed()[0][1])
        if ours is not None and ours.reasons:
            reasons = "\n".join(f"- {reason}" for reason in ours.reasons)
            parts.append(f"Not in integers in ours, by the runtime's graph:\n\n{reasons}")
    if results.accuracy:
        parts += ["### Every score", accuracy_details(results)]
    parts += ["### When", "\n".join(f"- {key}: {value}" for key, value in results.measured.items())]
    path = folder / f"{name}.md"
    path.write_text("\n\n".join(parts) + "\n")
    return path
