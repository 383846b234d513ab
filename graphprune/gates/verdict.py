"""What a check of an artifact found, limit by limit, as lines, as JSON and as JUnit XML.

>>> finding = Finding("max-bytes", "broken", "1,200 bytes, at most 1,000", value=1200.0, bound=1000.0)
>>> verdict = Verdict("build/", None, (finding,))
>>> verdict.passed, *verdict.lines
(False, 'broken: max-bytes: 1,200 bytes, at most 1,000')
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal
from xml.etree import ElementTree

FORMAT = 1
# What XML 1.0 cannot hold, not even escaped.
_UNWRITABLE = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


@dataclass(frozen=True)
class Finding:
    """One limit.

    Attributes:
        limit: its name, that of the option, or ``certificates``.
        status: ``unmeasured`` is neither passed nor broken; the verdict says what becomes of it.
        text: what was found, what was asked, and why; one line.
        value: what was measured; ``None`` where nothing was, or it is infinite.
        bound: the limit.
        low, high: quartiles of what was measured, where it has a spread.
        seconds: how long the check of this limit took.
    """

    limit: str
    status: Literal["passed", "broken", "unmeasured"]
    text: str
    value: float | None = None
    bound: float | None = None
    low: float | None = None
    high: float | None = None
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{'not measured' if self.status == 'unmeasured' else self.status}: {self.limit}: {self.text}"


@dataclass(frozen=True)
class Verdict:
    """The findings of one check.

    Attributes:
        directory, against: the artifacts, as they were named.
        findings: one for each limit, certificates first.
        notes: what a reader of the findings should know.
        allow_unmeasured: whether a limit that could not be measured may stand.
        host: what it was measured on.
        error: why nothing could be judged, else empty.
    """

    directory: str
    against: str | None
    findings: tuple[Finding, ...] = ()
    notes: tuple[str, ...] = ()
    allow_unmeasured: bool = False
    host: str = ""
    error: str = ""

    @property
    def broken(self) -> tuple[Finding, ...]:
        """The findings that fail the build; of limits that could not be measured, those not allowed."""
        return tuple(f for f in self.findings if self.breaks(f))

    @property
    def passed(self) -> bool:
        """Whether the build may go on."""
        return not self.error and not self.broken

    @property
    def lines(self) -> tuple[str, ...]:
        """One line for each finding, then one for each note."""
        return (*map(str, self.findings), *(f"note: {note}" for note in self.notes))

    def breaks(self, finding: Finding) -> bool:
        """Whether a finding fails the build."""
        return finding.status == "broken" or (finding.status == "unmeasured" and not self.allow_unmeasured)

    def to_json(self) -> dict[str, Any]:
        """Plain values under stable keys; ``docs/ci.md`` describes them."""
        values = asdict(self)
        return {"format": FORMAT, "passed": self.passed, **values, "findings": list(values["findings"]),
                "notes": list(self.notes)}  # fmt: skip

    @staticmethod
    def from_json(document: Mapping[str, Any]) -> Verdict:
        """The inverse of :meth:`to_json`."""
        values = {key: value for key, value in document.items() if key not in ("format", "passed")}
        findings = tuple(Finding(**finding) for finding in values["findings"])
        return Verdict(**{**values, "findings": findings, "notes": tuple(values["notes"])})

    def json_bytes(self) -> bytes:
        """:meth:`to_json` as a file's content."""
        return (json.dumps(self.to_json(), indent=2, allow_nan=False) + "\n").encode()

    def junit_bytes(self) -> bytes:
        """JUnit XML: a test case for each limit.

        A finding that breaks the build is a ``failure``, one that could not be measured and may stand is
        ``skipped``, and a check that could judge nothing is one ``error``.
        """
        failed, skipped = len(self.broken), sum(f.status == "unmeasured" for f in self.findings)
        counts = {
            "tests": str(len(self.findings) + bool(self.error)),
            "failures": str(failed),
            "errors": str(int(bool(self.error))),
            "skipped": str(skipped if self.allow_unmeasured else 0),
            "time": f"{sum(f.seconds for f in self.findings):.3f}",
        }
        root = ElementTree.Element("testsuites", {"name": "graphprune check", **counts})
        suite = ElementTree.SubElement(root, "testsuite", {"name": _xml(self.directory), **counts})
        for finding in self.findings:
            case = _case(suite, finding.limit, finding.seconds)
            if self.breaks(finding):
                kind = "unmeasured" if finding.status == "unmeasured" else "broken"
                _add(case, "failure", str(finding), kind)
            elif finding.status == "unmeasured":
                _add(case, "skipped", str(finding))
            else:
                ElementTree.SubElement(case, "system-out").text = _xml(str(finding))
        if self.error:
            _add(_case(suite, "check", 0.0), "error", self.error, "error")
        if self.notes:
            ElementTree.SubElement(suite, "system-out").text = _xml("\n".join(self.notes))
        ElementTree.indent(root)
        return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _case(suite: ElementTree.Element, name: str, seconds: float) -> ElementTree.Element:
    attributes = {"classname": "graphprune.check", "name": _xml(name), "time": f"{seconds:.3f}"}
    return ElementTree.SubElement(suite, "testcase", attributes)


def _add(case: ElementTree.Element, tag: str, message: str, kind: str = "") -> None:
    attributes = {"message": _xml(message)} | ({"type": kind} if kind else {})
    ElementTree.SubElement(case, tag, attributes).text = _xml(message)


def _xml(text: str) -> str:
    return _UNWRITABLE.sub("\N{REPLACEMENT CHARACTER}", text)
