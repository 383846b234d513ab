"""Artifacts for ARM, run under emulation and compared with their graphs.

    make arm                                          once: the emulated machine
    python -m benchmarks.backends.arm                 every network and form, written to benchmarks/results
    python -m benchmarks.backends.arm resnet18 --forms 'onnxruntime fp32'

Weights are random, so an error is one of arithmetic and not of accuracy. No latency is measured: a processor
that is emulated has none. It is emulated with its own instructions only, so machine code that asks for more
would crash; for `arm` without a name it is the Cortex-A53.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import graphprune
from benchmarks.quantization.cases import speed_case
from benchmarks.record import RESULTS, conditions, table
from graphprune.emulation.emulator import Emulator, find
from graphprune.errors import GraphpruneError
from graphprune.proof import Proof, prove

NETWORKS = ("resnet18", "mobilenet_v2", "mobilenet_v3_large", "vit_tiny", "bert-mini")
TARGETS = ("arm", "arm:cortex-a76")
SAMPLES = 4  # to calibrate with: weights are random, and nothing is scored
HEAD = ("network", "form", "target", "ran on", "passed", "error", "allowed", "from x86",
        "in integers", "operators", "latency")  # fmt: skip
ABOUT = """# Artifacts for ARM

Written by `python -m benchmarks.backends.arm`; batch 1, random weights, one call each, run by qemu's user
mode on an emulated processor. *Error* is the largest difference from the graph's answers in PyTorch on x86,
relative to the largest answer, and *allowed* what it may be. For integers that bound is on the noise over the
whole output: 1.5 times what the graph's own rounding makes. *From x86* is the largest difference from what
ONNX Runtime answers on x86, from the same file; TVM's machine code does not run there. *In integers* is the
share of the multiply-accumulates that the emulated ONNX Runtime ran so.
"""


@dataclass(frozen=True)
class Form:
    """How a network is built."""

    backend: str
    precision: str | None = None

    def __str__(self) -> str:
        return f"{self.backend} {self.precision or 'fp32'}"


FORMS = (Form("onnxruntime"), Form("onnxruntime", "int8"), Form("tvm"))


@dataclass(frozen=True)
class Row:
    """One artifact; ``failure`` says why it was not proven."""

    network: str
    form: str
    target: str
    proof: Proof | None = None
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether it was proven."""
        return self.proof is not None and self.proof.passed

    def cells(self) -> list[str]:
        """The columns of `HEAD`."""
        start = [self.network, self.form, self.target]
        if self.proof is None:
            return [*start, "-", f"no: {self.failure}", *["-"] * (len(HEAD) - 5)]
        proof = self.proof
        found, host, audit = proof.certificate, proof.host, proof.audit
        noise = "noise " if found.precision.startswith("integers") else ""
        return [
            *start, proof.ran_on.removeprefix("an emulated "),
            "yes" if proof.passed else f"no: {found.reason}",
            f"{found.max_relative:.1e}", f"{noise}{found.tolerance:.1e}",
            "-" if host is None else f"{host.max_relative:.1e}",
            f"{audit.integers:.0%}" if audit is not None else "-", operators(proof), "not measured",
        ]  # fmt: skip


def operators(proof: Proof) -> str:
    """The operators that ran in integers, or how many ran at all."""
    if proof.audit is None:
        return "-"
    integers = [
        f"{count} {kind}" for kind, precision, count, _ in proof.audit.operators if precision == "int8"
    ]
    return ", ".join(integers[:3]) or f"{sum(row[2] for row in proof.audit.operators)} in float"


def build(network: str, form: Form, target: str, folder: Path) -> Path:
    """The artifact of a network, saved."""
    case = speed_case(network)
    samples = case.samples(SAMPLES)
    options: dict[str, Any] = (
        {} if form.precision is None else {"precision": form.precision, "calibration": samples}
    )
    result = graphprune.optimize(
        case.build().eval(), samples[0], target=target, backend=form.backend, measure=False, **options
    )
    return result.save(folder / f"{network}-{form}-{target}".replace(" ", "-").replace(":", "-"))


def measure(network: str, form: Form, target: str, machine: Emulator, timeout: float = 1800.0) -> Row:
    """Build, run under emulation, compare."""
    with tempfile.TemporaryDirectory() as place:
        try:
            proof = prove(
                build(network, form, target, Path(place)), emulator=machine, emulate=True, timeout=timeout
            )
        except GraphpruneError as error:
            return Row(network, str(form), target, failure=" ".join(str(error).split()))
    return Row(network, str(form), target, proof)


def write(rows: Sequence[Row], machine: Emulator) -> Path:
    """`arm.md` and `arm.json` in the results; returns the path of the first."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = conditions(("torch", "onnxruntime", "apache-tvm"))
    facts |= {f"emulated {name}": number for name, number in sorted(machine.versions.items())}
    facts["emulated Python"] = machine.python
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    proven = sum(row.passed for row in rows)
    verdict = f"{proven} of {len(rows)} artifacts are proven under emulation. Latency was not measured."
    path = RESULTS / "arm.md"
    path.write_text(f"{ABOUT}\n{about}\n\n{table(HEAD, [row.cells() for row in rows])}\n\n{verdict}\n")
    documents = [_document(row) for row in rows]
    document = {"conditions": facts, "rows": documents}
    (RESULTS / "arm.json").write_text(json.dumps(document, indent=1) + "\n")
    return path


def _document(row: Row) -> dict[str, object]:
    """Plain values; a directory that is gone says nothing."""
    values = asdict(row) | {"passed": row.passed, "latency": "not measured"}
    values["proof"] = None if row.proof is None else row.proof.to_json() | {"directory": ""}
    return values


def main() -> int:
    """Print a row as each is done; write the files when nothing was left out."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends.arm", description=__doc__)
    parser.add_argument("networks", nargs="*", metavar="network", help=f"of {', '.join(NETWORKS)}")
    parser.add_argument("--forms", nargs="+", choices=[str(form) for form in FORMS], metavar="FORM")
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--emulator", help="its folder; default: where verify looks")
    options = parser.parse_args()
    machine = find(options.emulator)
    forms = [form for form in FORMS if not options.forms or str(form) in options.forms]
    print(" | ".join(HEAD), flush=True)
    rows = []
    for network in options.networks or NETWORKS:
        for form in forms:
            for target in options.targets:
                rows.append(measure(network, form, target, machine))
                print(" | ".join(rows[-1].cells()), flush=True)
    if not (options.networks or options.forms or options.targets != TARGETS):
        print(f"written to {write(rows, machine)}")
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
