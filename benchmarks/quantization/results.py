"""All rows of all parts, to be asked for one network's; how figures are written."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.quantization.accuracy import Score
from benchmarks.quantization.methods import OURS
from benchmarks.quantization.pruned import Proof, Pruned
from benchmarks.quantization.qat import Trained
from benchmarks.quantization.speed import AGAIN, Row
from graphprune.measure import Ratio

PEERS = ("onnxruntime", "nncf", "neural-compressor")  # whose files run on the same runtime
OUTSIDE = "openvino"
INT8, DYNAMIC = "int8", "dynamic"


@dataclass(frozen=True)
class Results:
    """All rows of all parts.

    Attributes:
        measured: part and network → when, and on how busy a host.
        versions: of the tools that made files.
    """

    speed: list[Row] = field(default_factory=list)
    accuracy: list[Score] = field(default_factory=list)
    measured: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    pruned: list[Pruned] = field(default_factory=list)
    training: list[Trained] = field(default_factory=list)

    def without(
        self,
        timed: Sequence[str] = (),
        scored: Sequence[str] = (),
        pruned: Sequence[str] = (),
        trained: Sequence[str] = (),
    ) -> Results:
        """What there is of other networks, part by part."""
        parts = {"speed": timed, "accuracy": scored, "pruned": pruned, "training": trained}
        names = {f"{part}, {name}" for part, chosen in parts.items() for name in chosen}
        return Results(
            [row for row in self.speed if row.network not in timed],
            [score for score in self.accuracy if score.network not in scored],
            {key: value for key, value in self.measured.items() if key not in names},
            dict(self.versions),
            [row for row in self.pruned if row.network not in pruned],
            [row for row in self.training if row.network not in trained],
        )

    def rows(self, network: str, threads: int, tool: str) -> list[Row]:
        """Rows of one tool that were timed, fastest first."""
        found = [r for r in self.speed if (r.network, r.threads, r.tool) == (network, threads, tool)]
        return sorted((r for r in found if r.to_float is not None), key=lambda r: r.to_float.median)  # type: ignore[union-attr]

    def timed(self) -> list[tuple[str, int]]:
        """Networks and numbers of threads that there are rows of."""
        return list(dict.fromkeys((r.network, r.threads) for r in self.speed))

    def ours(self, network: str, threads: int, variant: str = INT8) -> Row | None:
        """Our row of a variant."""
        return next((r for r in self.rows(network, threads, OURS) if r.variant == variant), None)

    def again(self, network: str, threads: int) -> Ratio | None:
        """The float export against itself."""
        return next((r.to_float for r in self.rows(network, threads, "") if r.variant == AGAIN), None)

    def scores(self, network: str, tool: str, variant: str | None = None) -> list[Score]:
        """One a seed and variant."""
        return [
            s for s in self.accuracy
            if (s.network, s.tool) == (network, tool) and variant in (None, s.variant)
        ]  # fmt: skip


def networks(rows: Iterable[Row | Score | Pruned | Trained]) -> list[str]:
    """Names in the order of the results."""
    return list(dict.fromkeys(row.network for row in rows))


def load(path: Path) -> Results:
    """Results from the JSON that was written; one of before a part was there has no rows of it."""
    data: Any = json.loads(path.read_text())
    speed = []
    for row in data["speed"]:
        ratios = {key: Ratio(**row[key]) for key in ("to_float", "to_ours") if row[key] is not None}
        speed.append(Row(**row | ratios))
    scores = [Score(**row) for row in data["accuracy"]]
    pruned = [
        Pruned(**row | {"proofs": [Proof(**proof) for proof in row["proofs"]]})
        for row in data.get("pruned", [])
    ]
    training = [Trained(**row) for row in data.get("training", [])]
    return Results(speed, scores, data["measured"], data["versions"], pruned, training)


def three(value: Ratio | None) -> str:
    """A ratio and its quartiles."""
    return "–" if value is None else f"{value.median:.2f} ({value.low:.2f}–{value.high:.2f})"


def share(value: float | None, digits: int = 1) -> str:
    """Per cent; 99.96 does not become 100."""
    if value is None:
        return "–"
    text = f"{100 * value:.{digits}f} %"
    return f"> {100 - 10**-digits:.{digits}f} %" if value < 1 and text.startswith("100") else text
