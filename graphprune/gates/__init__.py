"""Gates for builds: an artifact held to limits, alone or against the artifact of an earlier build.

Nothing is taken from what an artifact says of its own speed: latency, answers and the share of integers are
measured when they are asked for, on the host that asks. A latency limit counts as broken when the lower
quartile of the ratios, turn by turn, is above it; a median above it with a quartile below is noise, and the
finding says so. What cannot be measured here is never counted as passed.

>>> import tempfile, torch, graphprune
>>> model = torch.nn.Linear(4, 3)
>>> with tempfile.TemporaryDirectory() as place:
...     saved = graphprune.optimize(model, torch.ones(1, 4), measure=False).save(f"{place}/build")
...     verdict = check(saved, Limits(max_bytes="1kB", min_agreement=1.0), against=saved)
>>> [(finding.limit, finding.status) for finding in verdict.findings]
[('certificates', 'passed'), ('max-bytes', 'passed'), ('min-agreement', 'passed')]
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import InputError
from ..sittings import in_sittings
from ..threads import checked
from .bench import Bench, Measure, Side
from .limits import Limits
from .verdict import Finding, Verdict

__all__ = ["Finding", "Limits", "Verdict", "certificates", "check"]


def check(
    directory: str | Path,
    limits: Limits | None = None,
    *,
    against: str | Path | None = None,
    inputs: str | Path | Sequence[Sequence[torch.Tensor]] | None = None,
    batch: int = 1,
    samples: int = 64,
    threads: int | None = None,
    rounds: int = 40,
    allow_unmeasured: bool = False,
    progress: Callable[[str], None] | None = None,
    measure: Measure = in_sittings,
) -> Verdict:
    """Hold an artifact to limits.

    Args:
        directory: the artifact.
        limits: none by default; its certificates are looked at in any case.
        against: the artifact that ratios and agreement are to.
        inputs: a file (:func:`graphprune.gates.inputs.read`) or flat inputs of calls; random numbers
            from the manifest's specification where none are given, which a note then says.
        batch: open sizes of the inputs.
        samples: how many calls are compared at most. Latency is that of the first.
        threads: of the runtime; ``None`` leaves its default.
        rounds: timed turns of each artifact.
        allow_unmeasured: let a limit stand that could not be measured here.
        progress: called with a line of text as each measurement starts.
        measure: times the two artifacts.

    Raises:
        InputError: the options do not go together, or inputs and artifacts do not.
        ArtifactError: an artifact is incomplete, altered or of a newer format.
        BackendError: this host should run the artifact and cannot: a package is missing, or too old.
    """
    limits = limits or Limits()
    _check_options(limits, against, inputs, (batch, samples, rounds))
    threads = checked(threads)
    runs = bool(limits.running) or limits.min_integers is not None
    new = Side.open(directory, threads, runs)
    old = None if against is None else Side.open(against, threads, bool(limits.running))
    bench = Bench(new, old, inputs, batch, samples, threads, rounds, measure, progress or (lambda line: None))
    judges: dict[str, Callable[[float], Finding]] = {
        "max-bytes": bench.size,
        "max-bytes-ratio": bench.size_ratio,
        "max-latency-ratio": bench.latency,
        "min-agreement": bench.agreement,
        "min-sqnr": bench.sqnr,
        "min-integers": bench.integers,
    }
    steps: list[tuple[float | None, Callable[[], Finding]]] = [(None, partial(certificates, new.manifest))]
    steps += [(bound, partial(judges[name], bound)) for name, bound in limits.given.items()]
    findings = []
    for bound, judge in steps:
        start = time.perf_counter()
        finding = judge()
        findings.append(replace(finding, bound=bound, seconds=round(time.perf_counter() - start, 3)))
    sides = [side for side in (new, old) if side is not None and side.opened is not None]
    here = [f"{side.name}: {note}" for side in sides for note in side.opened.notes]  # type: ignore[union-attr]
    notes = (*here, *(bench.calls.notes if bench.compared else ()))
    other = None if against is None else str(against)
    return Verdict(str(directory), other, tuple(findings), notes, allow_unmeasured, host())


def certificates(manifest: Mapping[str, Any]) -> Finding:
    """Whether every certificate that a manifest holds has passed."""
    metrics = manifest["metrics"]
    found = dict(metrics.get("certificates") or {})
    for record in metrics.get("passes") or ():
        for kind in ("certificate", "mask_certificate"):
            if record.get(kind) is not None:
                found[f"pass {record['pass']} ({kind.replace('_', ' ')})"] = record[kind]
    if not found:
        return Finding(
            "certificates", "unmeasured", "the artifact holds none; it was built without verification"
        )
    failed = {title: c for title, c in found.items() if c.get("passed") is not True}
    if failed:
        reasons = "; ".join(f"{title}: {c.get('reason') or 'not passed'}" for title, c in failed.items())
        return Finding("certificates", "broken", f"{len(failed)} of {len(found)} failed: {reasons}")
    return Finding("certificates", "passed", f"{len(found)} passed")


def host() -> str:
    """What a measurement was made on."""
    return f"{platform.machine()} with {os.cpu_count()} cores"


def _check_options(limits: Limits, against: Any, inputs: Any, counts: tuple[int, ...]) -> None:
    """Raise an InputError where options do not go together."""
    if limits.relative and against is None:
        raise InputError(
            f"{', '.join(limits.relative)}: compared with what? Name the artifact of an earlier build "
            "(--against); what a report measured at another time is no measure"
        )
    if against is not None and not limits.relative:
        raise InputError(
            f"nothing would be compared with {against}: give one of max-latency-ratio, max-bytes-ratio, "
            "min-agreement and min-sqnr"
        )
    if inputs is not None and not limits.running:
        raise InputError(
            "inputs were given, and no limit runs on them: give one of max-latency-ratio, min-agreement and "
            "min-sqnr"
        )
    if min(counts) < 1:
        raise InputError("batch, samples and rounds must be at least 1, got {}, {} and {}".format(*counts))
