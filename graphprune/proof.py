"""Verifying a saved artifact: run it, here or under emulation, and compare its answers with the reference.

The reference is what the artifact keeps of its graph (:mod:`.reference`): an example call and the answers.
An ONNX artifact without one is compared with a run of the same file on this host, on random inputs.

>>> import tempfile, torch, graphprune
>>> result = graphprune.optimize(torch.nn.Linear(4, 3), torch.ones(1, 4), measure=False)
>>> with tempfile.TemporaryDirectory() as place:
...     proof = prove(result.save(f"{place}/build"))
>>> proof.passed, proof.against
(True, "the graph's stored answers")
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .artifact import opened, rewrite
from .backend import Lowered
from .contents import REPORT, Contents, read
from .emulation.emulator import Emulator, find
from .emulation.machine import TIMEOUT, call, emulable, suits
from .errors import VerificationError
from .gates.inputs import draw
from .reference import REFERENCE, Reference, judge
from .reference import read as read_reference
from .registry import backends
from .report import AuditSummary
from .target import host_arch
from .threads import checked
from .verify import Certificate, compare, noise_ratio

EMULATED = "proven under emulation, latency not measured"
STORED = "the graph's stored answers"
ELSEWHERE = "this host's answers, on random inputs"

# Noise over signal of integers against another instruction set's, where nothing tells rounding from mistakes:
# sums in another order round a few numbers the other way. 1e-2 was measured.
INTEGERS = 3e-2

_BEGIN, _END = "<!-- verified -->", "<!-- end of verified -->"


@dataclass(frozen=True)
class Proof:
    """What a verification found.

    Attributes:
        directory: the artifact.
        target, backend: what it was built for, and with.
        ran_on: ``this host (x86_64)`` or the processor that was emulated.
        emulated: whether it ran under emulation.
        against: what its answers were compared with.
        certificate: the comparison.
        host: emulated answers against those of the same file here; ``None`` where it does not run here.
        audit: what its runtime executed, there.
        versions: package → version of what ran.
        notes: what a reader should know.
    """

    directory: str
    target: str
    backend: str
    ran_on: str
    emulated: bool
    against: str
    certificate: Certificate
    host: Certificate | None = None
    audit: AuditSummary | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the answers are those of the reference."""
        return self.certificate.passed

    @property
    def statement(self) -> str:
        """What may be said of the artifact now."""
        if not self.passed:
            return f"not proven: {self.certificate.reason}"
        return EMULATED if self.emulated else f"proven on {self.ran_on}"

    @property
    def lines(self) -> tuple[str, ...]:
        """The result as text: one line, and what belongs to it."""
        verdict = "passed" if self.passed else "failed"
        first = f"{verdict}: {self.directory} on {self.ran_on}, against {self.against}: {self.certificate}"
        found = [first]
        if self.audit is not None and self.audit.integers:
            share = f"{self.audit.integers:.0%} of the multiply-accumulates ran in integers"
            found.append(f"{share}: {_operators(self.audit)}")
        found += [f"note: {note}" for note in self.notes]
        return (*found, self.statement)

    def to_json(self) -> dict[str, Any]:
        """Plain values; numbers that are not finite are ``None``."""
        return {
            "format": 1,
            "passed": self.passed,
            "statement": self.statement,
            "directory": self.directory,
            "target": self.target,
            "backend": self.backend,
            "ran_on": self.ran_on,
            "emulated": self.emulated,
            "against": self.against,
            "certificate": self.certificate.to_json(),
            "host": None if self.host is None else self.host.to_json(),
            "audit": None if self.audit is None else self.audit.to_json(),
            "versions": dict(self.versions),
            "notes": list(self.notes),
            "error": "",
        }


def prove(
    directory: str | Path,
    *,
    emulator: Emulator | str | Path | None = None,
    emulate: bool = False,
    threads: int | None = None,
    timeout: float = TIMEOUT,
    progress: Callable[[str], None] | None = None,
) -> Proof:
    """Run an artifact once and compare what it answers with the reference.

    Args:
        directory: the artifact.
        emulator: the machine, or its folder; ``None`` looks where :func:`.emulation.emulator.places` says.
        emulate: run it on an emulated aarch64 processor instead of here.
        threads: of the runtime; ``None`` is its default, and 1 under emulation.
        timeout: seconds that the emulated process may take.
        progress: called with one line as each step starts.

    Raises:
        ArtifactError: the artifact is incomplete, altered or of a newer format.
        BackendError: it cannot run: no emulator, another architecture, a newer runtime, a crash, too slow.
        InputError: no runtime is given so many threads.
        VerificationError: there is nothing to compare it with.
    """
    say, threads = progress or (lambda line: None), checked(threads)
    contents = read(directory)
    reference = _stored(contents)
    if not emulate:
        return _here(str(directory), contents, reference, threads, say)
    emulable(contents)  # setting an emulator up takes a download, so what no emulator helps comes first
    mine = _answers_here(contents, reference)
    if reference is None and mine is None:
        raise VerificationError(_nothing(contents))
    machine = emulator if isinstance(emulator, Emulator) else find(emulator)
    suits(contents, machine)
    return _emulated(str(directory), contents, reference, mine, machine, threads or 1, timeout, say)


def _here(
    name: str,
    contents: Contents,
    reference: Reference | None,
    threads: int | None,
    say: Callable[[str], None],
) -> Proof:
    if reference is None:
        raise VerificationError(_nothing(contents))
    artifact = opened(contents, threads)
    say(f"run {name} here")
    outputs = artifact.run(*reference.inputs)
    lowered = Lowered(
        contents.manifest["backend"], contents.files, contents.inputs, contents.outputs,
        contents.manifest["versions"],
    )  # fmt: skip
    audit = AuditSummary.of(backends.load(lowered.backend)().audit(lowered, contents.target))
    notes = [*artifact.notes, *_fallbacks(audit)]
    if not contents.target.runs_here:
        there = f"{contents.target.name} ({contents.target.arch})"
        notes.append(f"it was built for {there} and ran on {host_arch()}; to run it there: --emulate")
    return Proof(
        name, contents.target.name, lowered.backend, f"this host ({host_arch()})", False, STORED,
        judge(reference, outputs), None, audit, contents.manifest["versions"], tuple(notes),
    )  # fmt: skip


def _emulated(
    name: str, contents: Contents, reference: Reference | None, mine: Reference | None, machine: Emulator,
    threads: int, timeout: float, say: Callable[[str], None],
) -> Proof:  # fmt: skip
    notes = []
    wanted = reference or mine
    assert wanted is not None
    if reference is None:
        notes.append(_why_not_stored(contents))
    say(f"run {name} on an emulated {machine.processor(contents.target.processor).model}")
    answer = call(contents, wanted.inputs, machine, threads=threads, timeout=timeout)
    notes += answer.notes
    if answer.audit is not None:
        notes += _fallbacks(answer.audit)
    if reference is not None:
        certificate = judge(reference, answer.outputs)
    else:
        integers = answer.audit is not None and answer.audit.integers > 0
        certificate = beside(answer.outputs, wanted.outputs, integers)
    host = None if mine is None else compare("runtime", [answer.outputs], [mine.outputs], exact=False)
    against = ELSEWHERE if reference is None else STORED
    return Proof(
        name, contents.target.name, contents.manifest["backend"], f"an emulated {answer.processor.model}",
        True, against, certificate, host, answer.audit, machine.versions, tuple(notes),
    )  # fmt: skip


def beside(outputs: Sequence[Any], others: Sequence[Any], integers: bool) -> Certificate:
    """A certificate of two runs of one file on two instruction sets."""
    certificate = compare("runtime", [outputs], [others])
    missed = not certificate.passed and certificate.max_relative > certificate.tolerance
    if not (missed and integers):
        return certificate
    apart = noise_ratio(outputs, others)
    said = f"integers: noise between the two {apart:.1e}"
    if apart > INTEGERS:
        return replace(certificate, reason=f"{certificate.reason}; {said}, at most {INTEGERS:.0e}")
    return replace(certificate, passed=True, tolerance=INTEGERS, reason="", precision=said)


def _stored(contents: Contents) -> Reference | None:
    content = contents.others.get(REFERENCE)
    return None if content is None else read_reference(content, contents.outputs)


def _answers_here(contents: Contents, reference: Reference | None) -> Reference | None:
    """What the same file answers on this host; ``None`` where it is machine code for another."""
    if not (contents.target.runs_here or contents.target.portable):
        return None
    backend = backends.load(contents.manifest["backend"])()
    if backend.unrunnable(contents.target):
        return None
    inputs = draw(contents.inputs, samples=1).calls[0] if reference is None else reference.inputs
    return Reference(tuple(inputs), opened(contents).run(*inputs))


def _why_not_stored(contents: Contents) -> str:
    reason = contents.measurements.get("no_reference")
    return f"the artifact holds no reference: {reason or 'it was written without one'}"


def _nothing(contents: Contents) -> str:
    return (
        f"{_why_not_stored(contents)}, so there is nothing to compare {contents.directory} with; "
        "build it again, with a smaller example if its was too large"
    )


def _fallbacks(audit: AuditSummary) -> list[str]:
    """What did not run as it was asked for, the first of each reason."""
    found: dict[str, list[str]] = {}
    for name, _, _, reason in audit.fallbacks:
        found.setdefault(reason, []).append(name)
    return [
        f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {reason}"
        for reason, names in found.items()
    ]


def _operators(audit: AuditSummary) -> str:
    counts = [(kind, count) for kind, precision, count, _ in audit.operators if precision == "int8"]
    return ", ".join(f"{count} {kind}" for kind, count in counts)


def record(directory: str | Path, proof: Proof) -> None:
    """Write a proof into an artifact: among its measurements, and as a part of its report if it has one.

    The runtime's files and the manifest stay as they are, byte for byte.

    Raises:
        ArtifactError: the artifact is damaged, was written without measurements, or cannot be replaced.
    """
    contents = read(directory)
    measurements = {**contents.measurements, "verified": proof.to_json()}
    others = dict(contents.others)
    if REPORT in others:
        others[REPORT] = _with_proof(others[REPORT].decode(), proof).encode()
    rewrite(contents, measurements, others)


def _with_proof(page: str, proof: Proof) -> str:
    """A report's page with a section on the proof at its end, in place of an earlier one."""
    rows = "".join(f"<p>{html.escape(line)}</p>\n" for line in proof.lines)
    page = re.sub(f"{_BEGIN}.*?{_END}\n", "", page, flags=re.DOTALL)
    return page.replace("</body>", f"{_BEGIN}\n<h2>Verified</h2>\n{rows}{_END}\n</body>")
