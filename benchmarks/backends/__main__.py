"""Every network through every backend with every precision, against other tools, interleaved in one run.

    python -m benchmarks.backends --make                  make the artifacts (hours; what is there is kept)
    python -m benchmarks.backends                         time them, and write benchmarks/results/backends.*
    python -m benchmarks.backends --networks resnet18 --batches 1 --threads 1 --rounds 8
    python -m benchmarks.backends --write                 the tables from measurements there are

Artifacts and measurements lie in ``build/backends``. OpenVINO and NNCF run in an environment of their own:
``GRAPHPRUNE_QUANTIZERS``, see :mod:`benchmarks.quantization.methods`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.backends import record, tables, timing
from benchmarks.backends.making import BACKENDS, FACTS, PRECISIONS, make
from benchmarks.backends.networks import BATCHES, NAMES, Setup
from benchmarks.record import conditions

PACKAGES = (
    "torch",
    "onnxruntime",
    "openvino",
    "executorch",
    "apache-tvm",
    "torchvision",
    "timm",
    "transformers",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make, measure, write; a network that fails is named and costs the others nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__)
    parser.add_argument("--networks", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--threads", nargs="+", type=int, default=(1, 2))
    parser.add_argument("--backends", nargs="+", default=BACKENDS, choices=BACKENDS)
    parser.add_argument("--rounds", type=int, default=16, help="turns of each contestant in a sitting")
    parser.add_argument("--sittings", type=int, default=1, help="how often every process is started anew")
    parser.add_argument("--folder", type=Path, default=Path("build/backends"))
    parser.add_argument("--name", default="backends", help="of the page and the table in benchmarks/results")
    parser.add_argument("--make", action="store_true", help="make artifacts, measure nothing")
    parser.add_argument("--write", action="store_true", help="write the tables, measure nothing")
    options = parser.parse_args(arguments)
    if options.write:
        print(f"written to {tables.write(record.read(options.folder), name=options.name)}")
        return 0
    failed = 0
    for batch in options.batches:
        for name in options.networks:
            setup = Setup(name, batch)
            folder = options.folder / setup.folder
            if options.make:
                made = make(setup, folder, tuple(options.backends))
                missing = {label: fact["failure"] for label, fact in made.items() if "failure" in fact}
                print(f"{setup.folder} made; not made: {missing or 'none'}", flush=True)
                continue
            for threads in options.threads:
                try:
                    measured = measure(setup, folder, threads, options.rounds, options.sittings)
                except Exception as error:  # the other networks go on, and the exit code says it
                    failed += 1
                    print(f"{setup.folder}, {threads} threads: {type(error).__name__}: {error}", flush=True)
                    continue
                record.write(measured, options.folder)
                print(f"{measured.name}: " + "; ".join(_short(measured)), flush=True)
    if not options.make:
        print(f"written to {tables.write(record.read(options.folder), name=options.name)}")
    return 1 if failed else 0


def measure(setup: Setup, folder: Path, threads: int, rounds: int, sittings: int) -> record.Measured:
    """Time everything there is of a network."""
    facts = json.loads((folder / FACTS).read_text())
    auto = {}
    for precision in PRECISIONS:
        if any(label.endswith(f", {precision}") for label in timing.artifacts(folder)):
            (auto[precision],) = (
                one.backend for one in timing.automatic(setup, folder, precision, threads) if one.chosen
            )
    timings = timing.timed(setup, folder, threads, rounds, sittings)
    samples = {label: [round(ms, 4) for ms in found.samples] for label, found in timings.items()}
    return record.Measured(setup.name, setup.batch, threads, samples, auto, facts, conditions(PACKAGES))


def _short(measured: record.Measured) -> list[str]:
    found = []
    for precision in record.precisions(measured):
        verdict = measured.verdict(precision)
        if verdict is not None:
            peer, against, slower = verdict
            label = measured.automatic(precision) or ""
            text = (
                f"{label} {measured.ratio(label).median:.2f} of ONNX Runtime, {against.median:.2f} of {peer}"
            )
            found.append(f"{text}, slower" if slower else text)
    return found


if __name__ == "__main__":
    sys.exit(main())
