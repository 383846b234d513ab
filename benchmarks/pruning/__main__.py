"""Pruning without training, ours beside torch-pruning and torch-kirigami.

    GRAPHPRUNE_PEERS=build/peers python -m benchmarks.pruning [--quick] [--networks …] [--methods …]

Networks that are trained here come from the cache of :mod:`benchmarks.pruning.training`, or are trained first
(half an hour). The other libraries are read from the folder in ``GRAPHPRUNE_PEERS``; see
:mod:`benchmarks.axes.speed` for how to fill it.
"""

from __future__ import annotations

import argparse
import importlib.util
import time
from collections.abc import Sequence
from importlib.metadata import distributions
from pathlib import Path

import torch

from benchmarks.pruning import comparison, networks, readme, training
from benchmarks.pruning.comparison import BUDGETS, LIBRARIES, NAMES, OURS, Result
from benchmarks.pruning.table import Rows, load, summary, write
from benchmarks.readme import update
from benchmarks.record import RESULTS, conditions


def main() -> None:
    """Run, print as results come, and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pruning", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--networks", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--seeds", nargs="+", type=int, default=training.SEEDS)
    parser.add_argument(
        "--budgets", nargs="+", type=float, help="shares of MACs left, instead of each network's"
    )
    parser.add_argument("--methods", nargs="+", choices=LIBRARIES, default=LIBRARIES)
    parser.add_argument("--quick", action="store_true", help="one seed, and no CREPE full")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder for the results")
    parser.add_argument(
        "--add", action="store_true", help="keep what the folder has of networks and methods not run now"
    )
    parser.add_argument(
        "--repairs", type=int, default=comparison.REPAIRS,
        help="of a library's variants, how many get our repair (minutes each on real networks)",
    )  # fmt: skip
    parser.add_argument("--readme", action="store_true", help="update the readme's table, measure nothing")
    given = parser.parse_args()
    if given.readme:
        update("pruning", readme.section())
        return
    torch.set_num_threads(1)
    for module, library in (("torch_pruning", "torch-pruning"), ("torch_kirigami", "torch-kirigami")):
        if library in given.methods and importlib.util.find_spec(module) is None:
            parser.error(f"{library} cannot be imported; set GRAPHPRUNE_PEERS, or leave it out of --methods")
    seeds = given.seeds[:1] if given.quick else given.seeds
    chosen = [name for name in given.networks if not (given.quick and name == "crepe-full")]
    started = time.perf_counter()
    stem = "pruning-quick" if given.quick else "pruning"
    results = _known(given.output / f"{stem}.json", chosen, given.methods) if given.add else []
    for name in chosen:
        for seed in seeds if name in networks.NAMES else (0,):
            budgets = given.budgets or BUDGETS[name]
            for result in comparison.compare(name, seed, budgets, given.methods, given.repairs):
                results.append(result)
                print(line(result), flush=True)
        facts = conditions(("torch", "torchvision", "timm", "transformers")) | _peers() | {
            "threads": "1", "seeds of networks trained here": ", ".join(map(str, seeds)),
            "minutes": f"{(time.perf_counter() - started) / 60:.0f}",
        }  # fmt: skip
        path = write(Rows(results), facts, given.output, stem)
    print(summary(Rows(results)), path, sep="\n\n")


def _known(path: Path, chosen: Sequence[str], methods: Sequence[str]) -> list[Result]:
    """Results of an earlier run for other networks, or by other methods, than those that are run now."""
    known = load(path)[0].results if path.exists() else []
    return [r for r in known if r.network not in chosen or (r.library and r.library not in methods)]


def line(result: Result) -> str:
    """One result, for a reader who waits."""
    what = ", ".join(
        part for part in (result.library or "unpruned", result.variant, result.treatment) if part
    )
    found = ", ".join(f"{name} {value:.1%}" for name, value in result.metrics.items()) or result.failure
    left = "" if result.reached is None else f" ({result.reached:.1%} left)"
    return (
        f"{result.network} {result.seed} {result.share:5.1%}  {what}: {found}{left}, {result.seconds:.0f} s"
    )


def _peers() -> dict[str, str]:
    names = set(LIBRARIES) - {OURS}
    return {d.metadata["Name"]: d.version for d in distributions() if d.metadata["Name"] in names}


if __name__ == "__main__":
    main()
