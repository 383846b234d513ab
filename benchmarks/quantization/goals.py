"""What our int8 files are held to, and whether they are."""

from __future__ import annotations

import statistics

from benchmarks.quantization.accuracy import Score
from benchmarks.quantization.methods import OURS
from benchmarks.quantization.pruned import Pruned
from benchmarks.quantization.qat import Trained
from benchmarks.quantization.results import DYNAMIC, INT8, PEERS, Results, networks, share
from benchmarks.quantization.speed import Row
from benchmarks.record import table

# What our files are held to: shares of the float file's, and of multiply-accumulates.
SIZE, INTEGERS = 0.27, 0.99
LATENCY = {"resnet18": 0.45, "resnet50": 0.45}
# Of the score that may be lost, or that must be kept.
LOST = {"resnet20": 0.002, "mobilenetv2": 0.002, "vit": 0.002, "crepe-tiny": 0.003, "crepe-full": 0.003}
KEPT = {"efficientnet-lite0": 0.95, "minilm-l6": 0.99}
TRAINED = 0.005  # that may be lost after training with rounding


def verdict(results: Results, network: str, threads: int, dynamic: bool = False) -> tuple[str, str]:
    """Whether our file is at least as fast as the fastest of that kind of another tool's on the same runtime.

    Returns:
        ``yes``, ``within noise``, ``no`` or, where there is none to compare with, a dash; and that file with
        the ratio of its latency to ours, and its error.
    """
    noise = results.again(network, threads)
    rivals = [row for tool in PEERS for row in results.rows(network, threads, tool)]
    compared = [(row.to_ours.median, row) for row in rivals if row.to_ours and row.dynamic == dynamic]
    if not compared or noise is None:
        return "–", "–"
    ratio, best = min(compared, key=lambda pair: pair[0])
    band = max(abs(noise.median - 1), noise.high - noise.median, noise.median - noise.low)
    told = "yes" if ratio >= 1 else "within noise" if ratio >= 1 - band else "**no**"
    return told, f"{ratio:.2f} of {best.tool}, {best.variant} (error {best.error:.3f})"


def goals(results: Results) -> str:
    """A table of all goals that there are figures for."""
    lines = []
    for network, threads in results.timed():
        row = results.ours(network, threads)
        if row is not None:
            lines += _of_speed(results, row)
    for network in networks(results.accuracy):
        found = results.scores(network, OURS, INT8)
        if any(s.score is not None for s in found):
            lines += _of_accuracy(network, found)
    lines += [_of_pruned([r for r in results.pruned if r.network == n]) for n in networks(results.pruned)]
    kinds = dict.fromkeys((row.network, row.bits) for row in results.training)
    lines += [_of_training([r for r in results.training if (r.network, r.bits) == k]) for k in kinds]
    return table(["network", "goal", "measured", "met"], lines)


def _of_speed(results: Results, row: Row) -> list[list[str]]:
    assert row.to_float is not None
    assert row.size is not None
    at = f"{row.network}, {row.threads} thread{'s' * (row.threads > 1)}"
    limit = LATENCY.get(row.network, 1.0)
    ratio = row.to_float.median
    told, text = verdict(results, row.network, row.threads)
    dynamic = verdict(results, row.network, row.threads, True)
    present = results.ours(row.network, row.threads, DYNAMIC) is not None
    whole = row.integers is not None and row.integers >= INTEGERS
    return [
        [at, f"latency at most {limit:g} of fp32", f"{ratio:.2f}", _yes(ratio <= limit)],
        [at, "no other static file is faster, latency to ours", text, told],
        *(
            [[at, "dynamic: no other file is faster, latency to ours", dynamic[1], dynamic[0]]]
            if present
            else []
        ),
        [at, f"at least {INTEGERS:.0%} in int8", share(row.integers), _yes(whole)],
        [at, f"file at most {SIZE:g} of fp32", f"{row.size:.3f}", _yes(row.size <= SIZE)],
    ]


def _of_accuracy(network: str, scores: list[Score]) -> list[list[str]]:
    """By the median over seeds; the worst of them stands beside it."""
    if network in LOST:
        lost = [s.lost for s in scores if s.lost is not None]
        middle = statistics.median(lost)
        text = f"{100 * middle:+.2f} lost" + (f", worst {100 * max(lost):+.2f}" if len(lost) > 1 else "")
        met = _yes(middle <= LOST[network] + 1e-6)
        return [[network, f"loses at most {100 * LOST[network]:.1f} points", text, met]]
    if network in KEPT:
        kept = statistics.median(s.score for s in scores if s.score is not None)
        label = next(iter(scores[0].metrics))
        return [[network, f"{label} at least {KEPT[network]:g}", f"{kept:.4f}", _yes(kept >= KEPT[network])]]
    return []


def _of_pruned(rows: list[Pruned]) -> list[str]:
    """All seeds; a failure proves nothing."""
    goal = "pruned, then int8, in one call: both certificates hold, the reverse order is refused"
    found = [sum(row.proved for row in rows), sum(bool(row.refusal) for row in rows)]
    text = f"{found[0]} and {found[1]} of {len(rows)}"
    return [rows[0].network, goal, text, _yes(min(found) == len(rows))]


def _of_training(rows: list[Trained]) -> list[str]:
    """By the median over seeds; without a score of each it is not met."""
    goal = f"{rows[0].bits}-bit weights, trained: loses at most {100 * TRAINED:.1f} points"
    lost = [row.lost for row in rows if row.lost is not None]
    if len(lost) < len(rows):
        return [rows[0].network, goal, "fails", _yes(False)]
    middle = statistics.median(lost)
    text = f"{100 * middle:+.2f} lost" + (f", worst {100 * max(lost):+.2f}" if len(lost) > 1 else "")
    return [rows[0].network, goal, text, _yes(middle <= TRAINED + 1e-6)]


def _yes(met: bool) -> str:
    return "yes" if met else "**no**"
