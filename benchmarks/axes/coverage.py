"""Every network of the zoo: typed, halved on each exact axis, run, and compared with its zeroed original.

``python -m benchmarks.axes.coverage [NAME or TAG …]`` prints a row a network; without arguments it runs them
all and writes the table. *Prunable* is the share of parameters in at least one prunable axis. Where it is
below 95 % the graph itself says why, see :func:`reasons`.
"""

from __future__ import annotations

import gc
import re
import sys
import time
import warnings
from collections import Counter
from dataclasses import dataclass

import torch

import graphprune
from benchmarks import record
from benchmarks.axes.zeroing import against_zeroed
from graphprune import verify
from graphprune.axes.terms import leaves
from graphprune.graph import Graph
from tests.zoo import NO_EXPORT, Network, networks

TOLERANCE = 1e-4
ENOUGH = 0.95


@dataclass(frozen=True)
class Row:
    """What the sweep found of one network; times in seconds of the process, errors relative."""

    network: str
    family: str
    source: str
    nodes: int
    parameters: int
    coverage: float
    exact: int
    statistical: int
    frozen: int
    macs: float
    typing_seconds: float
    error: float
    passed: bool
    zeroed_error: float | None
    zeroed_passed: bool | None
    unruled: dict[str, int]
    misfits: int
    reasons: tuple[str, ...]

    @property
    def good(self) -> bool:
        """Whether every comparison held and whatever is not covered has its reason."""
        explained = self.coverage >= ENOUGH or bool(self.reasons)
        return self.passed and self.zeroed_passed is not False and explained


def examine(network: Network) -> Row:
    """Type the network, remove half of each exact axis, and compare with both kinds of zeroed original."""
    args, kwargs = network.inputs(), network.kwargs()
    graph = graphprune.trace(network.build(), args, kwargs)
    start = time.process_time()
    axes = graph.axes
    seconds = time.process_time() - start
    plan = graph.plan(ratio=0.5, importance="random")
    small = graph.apply(plan)
    certificate = verify.mask_equivalence(graph, plan, pruned=small, tolerance=TOLERANCE)
    oracle = against_zeroed(network.build(), graph, plan, small, args, kwargs)
    return Row(
        network=network.name,
        family=network.family,
        source=next(t for t in ("block", "torchvision", "timm", "transformers", "real") if t in network.tags),
        nodes=len(graph.nodes),
        parameters=sum(p.numel() for p in graph.parameters.values()),
        coverage=axes.coverage,
        exact=len(axes.exact),
        statistical=len(axes.statistical),
        frozen=len(axes.frozen),
        macs=plan.after["macs"] / max(1, plan.before["macs"]),
        typing_seconds=seconds,
        error=certificate.max_relative,
        passed=certificate.passed,
        zeroed_error=oracle.max_relative if oracle is not None else None,
        zeroed_passed=oracle.passed if oracle is not None else None,
        unruled=axes.unruled,
        misfits=len(graph.typing.misfits),
        reasons=tuple(reasons(graph)) if axes.coverage < ENOUGH else (),
    )


def reasons(graph: Graph, least: float = 0.01) -> list[str]:
    """Why parameters are in no prunable axis, largest share first, as the graph has it.

    Parameters that differ in numbers alone (``layers.0.fc``, ``layers.1.fc``) are told together; shares
    below ``least`` are added up at the end.
    """
    parameters = graph.parameters
    total = sum(p.numel() for p in parameters.values())
    shares: Counter[str] = Counter()
    for name, parameter in parameters.items():
        atoms = [list(leaves(term)) for term in graph.typing.tensors.get(name, ())]
        if any(a.frozen is None for dim in atoms for a in dim):
            continue
        why = [
            f"dim {place} {' and '.join(dict.fromkeys(a.frozen.why for a in dim if a.frozen is not None))}"
            for place, dim in enumerate(atoms)
            if dim
        ]
        alike = re.sub(r"[.]\d+(?=[.])", ".*", name)
        shares[f"`{alike}`: {'; '.join(why)}"] += parameter.numel()
    told = [f"{n / total:.1%} {words}" for words, n in shares.most_common() if n / total >= least]
    rest = sum(n for n in shares.values() if n / total < least) / total
    return [*told, *([f"{rest:.1%} in smaller parameters"] if rest >= 0.0005 else [])]


def text(rows: list[Row], failures: dict[str, str]) -> str:
    """The tables: totals, every network, reasons below 95 %, failures."""
    sources = list(dict.fromkeys(row.source for row in rows))
    totals = []
    for source in sources:
        mine = [r for r in rows if r.source == source]
        compared = [r for r in mine if r.zeroed_passed is not None]
        totals.append((
            source, len(mine), len({r.family for r in mine}), sum(r.passed for r in mine),
            f"{sum(bool(r.zeroed_passed) for r in compared)} of {len(compared)}",
            sum(r.coverage >= ENOUGH for r in mine), f"{max(r.error for r in mine):.1e}",
        ))  # fmt: skip
    head = ["source", "networks", "families", "mask-equivalent", "equal to zeroed module", "prunable ≥ 95 %",
            "largest error"]  # fmt: skip
    lines = [record.table(head, totals), "", "## Every network", ""]
    head = ["network", "parameters", "prunable", "exact", "statistical", "frozen", "MACs", "error",
            "error to zeroed module", "operators without a rule"]  # fmt: skip
    lines.append(record.table(head, [_cells(r) for r in rows]))
    low = [r for r in rows if r.coverage < ENOUGH]
    lines += ["", f"## Why the rest stays ({len(low)} networks below 95 %)", ""]
    for row in low:
        lines += [f"- **{row.network}** ({row.coverage:.1%})", *(f"  - {why}" for why in row.reasons)]
    if failures:
        lines += ["", "## Failures", "", *(f"- {name}: {why}" for name, why in failures.items())]
    return "\n".join(lines)


def _cells(r: Row) -> tuple[str, ...]:
    zeroed = "not finite" if r.zeroed_error is None else f"{r.zeroed_error:.1e}"
    marks = ("" if r.passed else " FAILED", "" if r.zeroed_passed is not False else " FAILED")
    return (
        r.network, f"{r.parameters:,}", f"{r.coverage:.1%}", str(r.exact), str(r.statistical), str(r.frozen),
        f"×{r.macs:.2f}", f"{r.error:.1e}{marks[0]}", f"{zeroed}{marks[1]}",
        ", ".join(f"{k} ×{v}" for k, v in r.unruled.items()),
    )  # fmt: skip


def main(wanted: list[str]) -> int:
    """Sweep; returns the number of networks that failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [n for n in networks() if not wanted or {n.name, *n.tags} & set(wanted)]
    rows: list[Row] = []
    failures = {n.name: f"torch.export does not capture it: {n.note}" for n in chosen if NO_EXPORT in n.tags}
    for network in chosen:
        if NO_EXPORT in network.tags:
            continue
        try:
            rows.append(examine(network))
        except Exception as error:
            failures[network.name] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            print(network.name, "FAILED", failures[network.name], flush=True)
            continue
        print(*_cells(rows[-1]), sep="  ", flush=True)
        gc.collect()
    if not wanted:
        facts = record.conditions(("torch", "torchvision", "timm", "transformers"))
        print(record.write("coverage", "Coverage of structured pruning", text(rows, failures), rows, facts))
    elif rows:
        print(text(rows, failures))
    return len(failures) + sum(not r.good for r in rows)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
