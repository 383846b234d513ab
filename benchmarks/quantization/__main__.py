"""Quantization, ours beside other tools': latency, size, precision and accuracy, in one run.

    GRAPHPRUNE_QUANTIZERS=build/quantizers python -m benchmarks.quantization [--quick] [--parts speed …]
        [--networks …] [--methods …] [--seeds …] [--threads 1 2] [--rounds 24] [--output DIR] [--add]

:mod:`benchmarks.quantization.methods` says how to fill the folder of the other tools; one that is missing or
fails is a row that says why. Networks that are trained here come from the cache of
:mod:`benchmarks.pruning.training`.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.pruning import training
from benchmarks.quantization import accuracy, cases, methods, pruned, qat, speed
from benchmarks.quantization.results import Results, load, three
from benchmarks.quantization.table import (
    accuracy_summary,
    pruned_summary,
    speed_summary,
    training_summary,
    write,
)
from benchmarks.record import RESULTS, conditions

SCORED = (*cases.TRAINED, *cases.REAL)
NAMES = tuple(dict.fromkeys((*cases.SPEED, *SCORED)))
PRUNED = (*cases.TRAINED, "crepe-tiny")
PARTS = ("speed", "accuracy", "pruned", "training")
LONG = ("resnet50", "crepe-full")  # left out of a quick run
PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "torchvision", "timm", "transformers")
INSTRUCTIONS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx_vnni",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "i8mm",
)


def main() -> None:
    """Run, print as results come, and write the tables after each network."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quantization", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--methods", nargs="+", choices=methods.TOOL_NAMES, default=methods.TOOL_NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, help="all three, one for training")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--rounds", type=int, default=24)
    parser.add_argument(
        "--quick", action="store_true", help="one seed, four rounds, without the longest networks"
    )
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument("--add", action="store_true", help="keep what the folder has of networks not run now")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("torch.onnx", "onnxscript", "onnx_ir"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    torch.set_num_threads(1)
    stem = "quantization-quick" if given.quick else "quantization"
    chosen = [name for name in given.networks if not (given.quick and name in LONG)]
    timed = [name for name in chosen if name in cases.SPEED and "speed" in given.parts]
    scored = [name for name in chosen if name in SCORED and "accuracy" in given.parts]
    smaller = [name for name in chosen if name in PRUNED and "pruned" in given.parts]
    taught = [name for name in chosen if name in qat.BITS and "training" in given.parts]
    known = given.output / f"{stem}.json"
    kept = load(known).without(timed, scored, smaller, taught) if given.add and known.exists() else None
    results = kept or Results()
    rounds = 4 if given.quick else given.rounds
    seeds = (given.seeds or training.SEEDS)[: 1 if given.quick else None]

    def save(part: str, name: str, started: float) -> Path:
        now = conditions(())
        load_average = next(value for key, value in now.items() if key.startswith("load"))
        took = f"{(time.perf_counter() - started) / 60:.0f} minutes" + (
            f", {rounds} rounds" if part == "speed" else ""
        )
        results.measured[f"{part}, {name}"] = f"{now['date']}, load {load_average}, {took}"
        facts = {key: value for key, value in conditions(PACKAGES).items() if not key.startswith("load")}
        facts |= {
            "instructions": _instructions(),
            "calibration samples": f"{cases.CALIBRATION}, {cases.UNTRAINED_CALIBRATION} for random weights",
        }
        return write(results, facts, given.output, stem)

    for name in timed:
        started = time.perf_counter()
        found = [m for m in (*methods.FLOATS, *methods.INT8) if m.tool in given.methods]
        found = [m for m in found if m.variant not in methods.CALIBRATORS]
        rows, used = speed.compare(cases.speed_case(name), found, rounds, given.threads)
        results.speed.extend(rows)
        results.versions.update(used)
        for row in rows:
            print(_line(row), flush=True)
        save("speed", name, started)
    for name in scored:
        started = time.perf_counter()
        found = [m for m in (*methods.INT8, *methods.FOUR_BITS) if m.tool in given.methods]
        found = [m for m in found if m.suffix == ".onnx"]
        for seed in seeds if name in cases.TRAINED else (0,):
            for score, used in accuracy.compare(cases.accuracy_case(name, seed), found):
                results.accuracy.append(score)
                results.versions.update(used)
                print(_told(score), flush=True)
        save("accuracy", name, started)
    for name in smaller:
        started = time.perf_counter()
        for seed in seeds if name in cases.TRAINED else (0,):
            results.pruned.append(pruned.compare(cases.accuracy_case(name, seed)))
            print(_shown(results.pruned[-1]), flush=True)
        save("pruned", name, started)
    for name in taught:
        started = time.perf_counter()
        for seed in seeds if given.seeds else seeds[:1]:
            for bits in qat.BITS[name]:
                results.training.append(qat.compare(cases.accuracy_case(name, seed), bits))
                print(_shown(results.training[-1]), flush=True)
        save("training", name, started)
    told = (speed_summary, accuracy_summary, pruned_summary, training_summary)
    print(*(summary(results) for summary in told), given.output / f"{stem}.md", sep="\n\n")


def _instructions() -> str:
    """What this processor has that integer kernels ask for."""
    try:
        words = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return "unknown"
    return ", ".join(name for name in INSTRUCTIONS if name in words) or "none of those that kernels ask for"


def _line(row: speed.Row) -> str:
    name = f"{row.network}, {row.threads} threads, {row.tool} {row.variant}"
    if row.failure:
        return f"{name}: {row.failure}"
    more = "" if row.error is None or row.size is None else f", size {row.size:.3f}, error {row.error:.4f}"
    share = "" if row.integers is None else f", int8 {row.integers:.2%}"
    return f"{name}: {row.ms:.2f} ms, {three(row.to_float)}{share}{more}"


def _told(score: accuracy.Score) -> str:
    figures = ", ".join(f"{key} {value:.2%}" for key, value in score.metrics.items()) or score.failure
    return f"{score.network} {score.seed}, {score.tool} {score.variant}: {figures}, {score.seconds:.0f} s"


def _shown(row: pruned.Pruned | qat.Trained) -> str:
    known = asdict(row).items()
    figures = (f"{k} {v:.4g}" for k, v in known if isinstance(v, int | float) and k != "seed")
    return f"{row.network} {row.seed}: {row.failure or ', '.join(figures)}"


if __name__ == "__main__":
    main()
