"""The matrix as Markdown: every contestant, ``auto`` against the best peer, proofs, and what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.backends.making import BACKENDS, PRECISIONS
from benchmarks.backends.record import Measured, precisions
from benchmarks.backends.timing import AGAIN, COMPILED, EAGER, ORT, OV, OV_FLOAT, OV_INT8, OV_INT8_FLOAT
from benchmarks.record import RESULTS, table

LOAD = "load average over 1, 5 and 15 minutes"
FASTER = 5.0  # pruned and int8 on the ResNets against ONNX Runtime in float32
ABOUT = """# Backends

Written by `python -m benchmarks.backends`. Latency of a network through every backend with every precision,
and of other tools, each in a process of its own, in turns of several runs; figures are ratios to ONNX
Runtime's latency with a plain `torch.onnx.export` in float32 (below 1: faster), medians of the ratios of
turns with quartiles. *Pruned* halves the multiply-accumulates (no repair: only time is measured here).
*Again* is the plain export in another process: what this host cannot tell apart. OpenVINO by its own defaults
computes in bfloat16 where the processor has it; its float32 rows are told not to, and *int8 + bfloat16* lets
ours do the same (on other runtimes that is the artifact of *int8*). TVM's artifacts are not tuned. `auto` is
what `backend="auto"` takes, chosen in a measurement of its own.
"""


def write(found: Sequence[Measured], results: Path = RESULTS, name: str = "backends") -> Path:
    """``backends.md`` and ``backends.json``, or of another name; returns the path of the first."""
    results.mkdir(parents=True, exist_ok=True)
    order = {name: place for place, name in enumerate(dict.fromkeys(m.network for m in found))}
    found = sorted(found, key=lambda m: (order[m.network], m.batch, m.threads))
    facts = "\n".join(f"- {key}: {value}" for key, value in found[0].conditions.items() if key != "date")
    dates = sorted(m.conditions["date"] for m in found)
    sections = [ABOUT, f"{facts}\n- dates: {dates[0]} to {dates[-1]}", *_goals(found), *_automatic(found)]
    sections += [part for one in found for part in _matrix(one)]
    sections += list(_proofs(found))
    path = results / f"{name}.md"
    path.write_text("\n\n".join(sections) + "\n")
    document = {"conditions": found[0].conditions, "rows": [_plain(one) for one in found]}
    path.with_suffix(".json").write_text(json.dumps(document, indent=1) + "\n")
    return path


def _plain(one: Measured) -> dict[str, object]:
    rows = {label: {"ms": one.ms(label), "to_onnxruntime": vars(one.ratio(label))} for label in one.samples}
    return {
        "network": one.network, "batch": one.batch, "threads": one.threads, "contestants": rows,
        "auto": dict(one.auto), "facts": dict(one.facts), "load": one.conditions[LOAD],
    }  # fmt: skip


def _goals(found: Sequence[Measured]) -> Iterator[str]:
    yield "## What was asked"
    rows = []
    for precision in PRECISIONS:
        verdicts = [(one, v) for one in found if (v := one.verdict(precision)) is not None]
        slower = [f"{one.name} ({v[1].median:.2f} of {v[0]})" for one, v in verdicts if v[2]]
        rows.append([
            f"`auto`, {precision}, never slower than the best peer by more than noise",
            f"{len(verdicts) - len(slower)} of {len(verdicts)}", "; ".join(slower) or "none",
        ])  # fmt: skip
    for one in found:
        label = one.automatic("pruned + int8")
        if one.network.startswith("resnet") and label is not None and label in one.samples:
            faster = 1 / one.ratio(label).median
            verdict = "yes" if faster >= FASTER else "no"
            rows.append([f"{one.name}, pruned and int8: {FASTER:g} times", f"{faster:.2f} times", verdict])
    yield table(["asked", "found", "short of it"], rows)


def _automatic(found: Sequence[Measured]) -> Iterator[str]:
    yield "## What `auto` takes, against the best other tool"
    yield (
        "Without integers the other tools compute in float32, too; in int8 they do so around their integers. "
        "With bfloat16 around ours, and where ours is pruned and quantized, all of them count."
    )
    rows = []
    for one in found:
        for precision in precisions(one):
            verdict = one.verdict(precision)
            if verdict is not None:
                peer, against, slower = verdict
                rows.append([
                    one.name, precision, one.auto[precision], peer, str(against), f"{one.noise:.2f}",
                    "yes" if slower else "no",
                ])  # fmt: skip
    yield table(
        ["network", "precision", "`auto`", "best peer", "`auto` / peer", "noise up to", "slower"], rows
    )


def _matrix(one: Measured) -> Iterator[str]:
    yield f"## {one.name}"
    rounds = len(one.samples[ORT])
    yield f"ONNX Runtime: {one.ms(ORT):.2f} ms; {rounds} rounds; load average {one.conditions[LOAD]}."
    peers = [
        label
        for label in (EAGER, COMPILED, AGAIN, OV_FLOAT, OV, OV_INT8_FLOAT, OV_INT8)
        if label in one.samples
    ]
    yield table(["other tools", "to ONNX Runtime"], [[label, str(one.ratio(label))] for label in peers])
    rows = []
    for backend in BACKENDS:
        labels = [f"{backend}, {precision}" for precision in PRECISIONS]
        if any(label in one.samples for label in labels):
            cells = [str(one.ratio(label)) if label in one.samples else "–" for label in labels]
            rows.append([backend, *cells])
    yield table(["ours", *PRECISIONS], rows)


def _proofs(found: Sequence[Measured]) -> Iterator[str]:
    yield "## Proofs"
    yield (
        "The largest relative error of an artifact against its graph (certificate 3), the share of its "
        "multiply-accumulates in integers, or why there is no artifact."
    )
    rows, seen = [], set()
    for one in found:
        for backend in BACKENDS:
            for precision in PRECISIONS:
                fact = one.facts.get(f"{backend}, {precision}")
                key = (one.network, one.batch, backend, precision)
                if fact is None or key in seen:
                    continue
                seen.add(key)
                place = f"{one.network}, batch {one.batch}"
                if "failure" in fact:
                    rows.append([place, backend, precision, "–", "–", fact["failure"]])
                    continue
                share = "–" if fact["integers"] is None else f"{fact['integers']:.1%}"
                verdict = "passed" if fact["proved"] else "FAILED"
                rows.append([place, backend, precision, f"{fact['error']:.1e}", share, verdict])
    yield table(["network", "backend", "precision", "error", "integers", "certificates"], rows)
