"""The two artifacts of a check: opened, run, timed, and each limit judged by what that gave."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from ..artifact import LoadedArtifact, load
from ..backend import Lowered, TensorSpec, integer_share
from ..contents import read as read_artifact
from ..errors import BackendError, InputError
from ..manifest import deployed
from ..measure import Timing, ratio
from ..registry import backends
from ..sittings import Factories
from ..target import Target, host_arch
from ..verify import Certificate, compare
from .inputs import Call, Inputs, common, draw, read
from .verdict import Finding

Measure = Callable[..., Mapping[str, Timing]]
"""``(factories, rounds=, threads=)`` → a timing of each, as :func:`graphprune.sittings.in_sittings`."""


@dataclass(frozen=True)
class Side:
    """One of the two artifacts: opened, or why it does not run here."""

    name: str
    manifest: Mapping[str, Any]
    target: Target
    opened: LoadedArtifact | None
    reason: str = ""

    @staticmethod
    def open(directory: str | Path, threads: int | None, runs: bool) -> Side:
        """Check every file, and open what runs here; what should run here and does not is an error."""
        try:
            opened = load(directory, threads)
        except BackendError as error:
            # Its files were found intact before its runtime was asked.
            contents = read_artifact(directory)
            if runs and contents.target.runs_here:
                raise
            return Side(str(directory), contents.manifest, contents.target, None, str(error))
        return Side(str(directory), opened.manifest, opened.target, opened)

    @property
    def bytes(self) -> int:
        """Of the deployment files, as they are stored."""
        return sum(entry["bytes"] for entry in deployed(self.manifest).values())

    @property
    def elsewhere(self) -> str:
        """For a text about what a portable artifact for another architecture did here."""
        return "" if self.target.runs_here else f" (run on {host_arch()}, built for {self.target.arch})"

    @property
    def untimeable(self) -> str:
        """Why a latency measured here is not the target's, or nothing."""
        if not self.target.runs_here:
            where = f"{self.target.name} ({self.target.arch})"
            return f"{self.name} is for {where}, and this host is {host_arch()}"
        return self.reason


@dataclass
class Bench:
    """Measures both artifacts; each method judges one limit."""

    new: Side
    old: Side | None
    given: str | Path | Sequence[Sequence[torch.Tensor]] | None
    batch: int
    samples: int
    threads: int | None
    rounds: int
    measure: Measure
    say: Callable[[str], None]
    compared: bool = False

    @property
    def other(self) -> Side:
        """The other artifact, which options made sure of."""
        assert self.old is not None
        return self.old

    def size(self, bound: float) -> Finding:
        """Bytes of the deployment files."""
        count = self.new.bytes
        text = f"{count:,} bytes, at most {int(bound):,}"
        return Finding("max-bytes", _status(count <= bound), text, float(count))

    def size_ratio(self, bound: float) -> Finding:
        """Bytes to the other's."""
        ours, theirs = self.new.bytes, self.other.bytes
        share = ours / theirs if theirs else math.inf
        text = f"{share:.3f} of {self.other.name}, at most {bound:g} ({ours:,} and {theirs:,} bytes)"
        return Finding("max-bytes-ratio", _status(share <= bound), text, _finite(share))

    def latency(self, bound: float) -> Finding:
        """Latency to the other's, in turns; broken only beyond the noise."""
        reason = self.new.untimeable or self.other.untimeable
        if reason:
            return Finding("max-latency-ratio", "unmeasured", reason)
        call = self.calls.calls[0]
        self.compared = True
        self.say(f"measure {self.new.name} and {self.other.name} in turns, {self.rounds} rounds")
        sides = {"new": self.new, "old": self.other}
        factories: Factories = {
            name: partial(_opened, side, self.threads, call) for name, side in sides.items()
        }
        timings = self.measure(factories, rounds=self.rounds, threads=self.threads)
        found = ratio(timings["new"], timings["old"])
        used = "default threads" if self.threads is None else f"threads: {self.threads}"
        noise = found.low <= bound < found.median
        text = (
            f"{found.median:.3f} ({found.low:.3f} to {found.high:.3f}) of {self.other.name}, "
            f"at most {bound:g}{', above it within the noise' if noise else ''} "
            f"({timings['new'].median_ms:.3g} and {timings['old'].median_ms:.3g} ms, "
            f"{timings['new'].rounds} rounds, {used})"
        )
        status = _status(found.low <= bound)
        return Finding("max-latency-ratio", status, text, found.median, None, found.low, found.high)

    def agreement(self, bound: float) -> Finding:
        """Share of equal answers."""
        name, reason = "min-agreement", self._silent()
        if reason:
            return Finding(name, "unmeasured", reason)
        if self._certificate.reason:
            return Finding(name, "broken", f"{self._certificate.reason}, against {self.other.name}")
        results, references = self._outputs
        shares = answers(results, references)
        if not shares:
            reason = "no output has several values in its last dimension to choose from; give min-sqnr"
            return Finding(name, "unmeasured", reason)
        output, (same, count) = min(shares.items(), key=lambda item: item[1][0] / item[1][1])
        share = same / count
        spec = self.new.manifest["outputs"][output]
        where = f" of output {spec['name']!r}" if len(self.new.manifest["outputs"]) > 1 else ""
        text = f"{share:.4f}: {same:,} of {count:,} answers{where} are those of {self.other.name}"
        text += f", at least {bound:g}{self.new.elsewhere}"
        return Finding(name, _status(share >= bound), text, share)

    def sqnr(self, bound: float) -> Finding:
        """Signal to noise of the outputs against the other's."""
        reason = self._silent()
        if reason:
            return Finding("min-sqnr", "unmeasured", reason)
        found = self._certificate
        if found.reason:
            return Finding("min-sqnr", "broken", f"{found.reason}, against {self.other.name}")
        text = f"{found.sqnr:.1f} dB against {self.other.name}, at least {bound:g}{self.new.elsewhere}"
        return Finding("min-sqnr", _status(found.sqnr >= bound), text, _finite(found.sqnr))

    def integers(self, bound: float) -> Finding:
        """Share of the multiply-accumulates that the runtime here computes in int8."""
        if self.new.opened is None:
            return Finding("min-integers", "unmeasured", self.new.reason)
        self.say(f"audit {self.new.name}")
        macs = _audit(self.new.opened)
        if not macs:
            return Finding("min-integers", "unmeasured", "the runtime does not say what it multiplies")
        share = integer_share(macs)
        text = f"{share:.3f} of the multiply-accumulates in int8, at least {bound:g}{self.new.elsewhere}"
        return Finding("min-integers", _status(share >= bound), text, share)

    @cached_property
    def calls(self) -> Inputs:
        """The inputs of every call."""
        specs = common(_specs(self.new), _specs(self.other))
        if self.given is None:
            return draw(specs, samples=self.samples, batch=self.batch)
        if isinstance(self.given, (str, Path)):
            return read(Path(self.given), specs, samples=self.samples, batch=self.batch)
        calls: tuple[Call, ...] = tuple(tuple(call) for call in self.given)[: self.samples]
        if not calls:
            raise InputError("inputs holds no calls; give at least one sequence of flat tensors")
        return Inputs(calls)

    def _silent(self) -> str:
        """Why the two cannot both be asked here, or nothing."""
        return next((side.reason for side in (self.new, self.other) if side.opened is None), "")

    @cached_property
    def _outputs(self) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        calls = self.calls.calls
        self.compared = True
        self.say(f"compare {self.new.name} and {self.other.name} on {len(calls)} calls")
        assert self.new.opened is not None
        assert self.other.opened is not None
        return [self.new.opened.run(*c) for c in calls], [self.other.opened.run(*c) for c in calls]

    @cached_property
    def _certificate(self) -> Certificate:
        return compare("runtime", *self._outputs, exact=False)


def answers(
    results: Sequence[Sequence[Any]], references: Sequence[Sequence[Any]]
) -> dict[int, tuple[int, int]]:
    """Output → how many answers are equal, of how many.

    An answer is the position of the largest value along the last dimension; of an output of integers, each
    value is one. Outputs that have nothing to choose from are left out.
    """
    found: dict[int, tuple[int, int]] = {}
    for outputs, wanted in zip(results, references, strict=True):
        for index, (output, reference) in enumerate(zip(outputs, wanted, strict=True)):
            if not isinstance(reference, torch.Tensor) or not reference.numel():
                continue
            if reference.is_floating_point():
                if not reference.dim() or reference.shape[-1] < 2:
                    continue
                output, reference = output.argmax(-1), reference.argmax(-1)
            same, count = found.get(index, (0, 0))
            found[index] = (same + int((output == reference).sum()), count + reference.numel())
    return found


def _opened(side: Side, threads: int | None, call: Call) -> Callable[[], Any]:
    """The artifact opened anew, as a call."""
    assert side.opened is not None
    return partial(load(side.opened.directory, threads).run, *call)


def _audit(artifact: LoadedArtifact) -> dict[str, int]:
    """Precision → multiply-accumulates, of what the runtime executes."""
    manifest, files = artifact.manifest, read_artifact(artifact.directory).files
    lowered = Lowered(manifest["backend"], files, artifact.inputs, artifact.outputs, manifest["versions"])
    return backends.load(manifest["backend"])().audit(lowered, artifact.target).macs


def _specs(side: Side) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(s["name"], tuple(s["shape"]), s["dtype"]) for s in side.manifest["inputs"])


def _status(held: bool) -> Any:
    return "passed" if held else "broken"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
