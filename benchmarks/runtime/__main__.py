"""Artifacts against the eager original and against a plain export, interleaved in one run.

    python -m benchmarks.runtime                      every network, one thread, written to benchmarks/results
    python -m benchmarks.runtime resnet18 --threads 2 --rounds 50
    python -m benchmarks.runtime --readme             the readme's table from the results there are

Every candidate has a process of its own; they take turns with a pause before each, in a balanced order, and
ratios are medians of per-round ratios, with quartiles. The plain export is measured twice: the ratio of the
two is what this host cannot tell apart. An artifact counts as slower where its median is more than that and
more than 5 % off, and its quartile agrees; the command then ends with exit code 1.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.readme import update
from benchmarks.record import RESULTS, conditions, table
from benchmarks.runtime import readme
from benchmarks.runtime.candidates import factories, plain, prepare
from benchmarks.runtime.networks import NETWORKS, get
from graphprune.measure import Ratio, Timing, isolated, ratio

TURN = 0.03  # seconds that one timed turn should last at least
TIE = 0.05  # below this nothing is claimed: where a process puts its memory makes as much of a difference
PAUSE = 0.02  # seconds before each turn, for the threads of the one before to stop spinning
HEAD = ("network", "eager, ms", "plain, ms", "artifact, ms", "eager / artifact", "plain / artifact", "noise",
        "operators, plain", "artifact", "slower than plain")  # fmt: skip
ABOUT = """# Latency of artifacts

Written by `python -m benchmarks.runtime`; batch 1, float32, lossless passes. Ratios are medians of per-round
ratios with quartiles: above 1, the artifact is faster. *Noise* is the plain export against itself in another
process. *Operators* are those that ONNX Runtime executes.
"""


@dataclass(frozen=True)
class Row:
    """One network; milliseconds are of one run of it, ratios per round."""

    network: str
    threads: int
    rounds: int
    repeat: int
    eager_ms: float
    plain_ms: float
    artifact_ms: float
    eager_to_artifact: Ratio
    plain_to_artifact: Ratio
    noise: Ratio
    operators: dict[str, dict[str, int]]

    @property
    def slower(self) -> bool:
        """Whether the artifact is slower than the plain export by more than the noise of this run."""
        spread = (self.noise.median, self.noise.low, self.noise.high)
        band = max(-math.log(1 - TIE), *(abs(math.log(value)) for value in spread))
        return math.log(self.plain_to_artifact.median) < -band and self.plain_to_artifact.high < 1.0

    def cells(self) -> list[str]:
        """The columns of `HEAD`."""
        return [
            self.network, f"{self.eager_ms:.2f}", f"{self.plain_ms:.2f}", f"{self.artifact_ms:.2f}",
            str(self.eager_to_artifact), str(self.plain_to_artifact), str(self.noise),
            *(str(sum(self.operators[kind].values())) for kind in ("plain", "artifact")),
            "yes" if self.slower else "no",
        ]  # fmt: skip


def measure(name: str, rounds: int, threads: int) -> Row:
    """Time one network."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        operators = prepare(name, folder)
        once = plain(name, 1, folder, threads)
        once()
        start = time.perf_counter()
        once()
        repeat = max(1, round(TURN / (time.perf_counter() - start)))
        timings = isolated(
            factories(name, repeat, folder, threads), rounds=rounds, threads=threads, pause=PAUSE
        )

    def each(timing: Timing) -> float:
        return timing.median_ms / repeat

    plain_, artifact_ = timings["plain"], timings["artifact"]
    return Row(
        network=name,
        threads=threads,
        rounds=rounds,
        repeat=repeat,
        eager_ms=each(timings["eager"]),
        plain_ms=each(plain_),
        artifact_ms=each(artifact_),
        eager_to_artifact=ratio(timings["eager"], artifact_),
        plain_to_artifact=ratio(plain_, artifact_),
        noise=ratio(plain_, timings["plain again"]),
        operators=operators,
    )


def write(rows: list[Row], failed: dict[str, str], rounds: int, threads: int) -> Path:
    """`runtime.md` and `runtime.json` in the results; returns the path of the first.

    `failed` holds the networks that could not be measured, with the error.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = conditions(("torch", "onnx", "onnxscript", "onnxruntime", "torchvision", "transformers"))
    facts |= {"threads": str(threads), "rounds": str(rounds)}
    about = "\n".join(f"- {key}: {value}" for key, value in facts.items())
    slower = [row.network for row in rows if row.slower]
    verdict = f"Slower than the plain export by more than the noise: {', '.join(slower) or 'none'}."
    verdict += "".join(f"\n\nNot measured: {name}, {reason}." for name, reason in failed.items())
    path = RESULTS / "runtime.md"
    path.write_text(f"{ABOUT}\n{about}\n\n{table(HEAD, [row.cells() for row in rows])}\n\n{verdict}\n")
    documents = [asdict(row) | {"slower": row.slower} for row in rows]
    document = {"conditions": facts, "rows": documents, "failed": failed}
    (RESULTS / "runtime.json").write_text(json.dumps(document, indent=1) + "\n")
    return path


def main() -> int:
    """Measure, print a row as each is done, and write the files when every network was measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runtime", description=__doc__)
    parser.add_argument("networks", nargs="*", help="those whose names begin so (default: all, and written)")
    parser.add_argument("--rounds", type=int, default=32, help="a multiple of four balances the order")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--readme", action="store_true", help="update the readme's table, measure nothing")
    options = parser.parse_args()
    if options.readme:
        update("runtime", readme.section())
        return 0
    names = [get(name).name for name in options.networks] or [network.name for network in NETWORKS]
    print(" | ".join(HEAD), flush=True)
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for name in names:
        try:
            rows.append(measure(name, options.rounds, options.threads))
        except (
            Exception
        ) as error:  # one network must not cost the others; it is named, and the exit code is 1
            failed[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            print(f"{name} | not measured: {failed[name]}", flush=True)
        else:
            print(" | ".join(rows[-1].cells()), flush=True)
    if not options.networks:
        print(f"written to {write(rows, failed, options.rounds, options.threads)}")
        update("runtime", readme.section())
    return 1 if failed or any(row.slower for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
