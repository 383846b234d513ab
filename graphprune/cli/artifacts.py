"""An artifact directory as tables and as JSON, for ``graphprune inspect``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..artifact import opened
from ..backend import Lowered
from ..contents import read
from ..errors import BackendError
from ..registry import backends
from ..report import AuditSummary
from ..report.sections import Section, audit_sections, size_text


@dataclass(frozen=True)
class Description:
    """What a directory holds, and what its runtime executes (or why this host cannot tell).

    ``notes`` say what is otherwise here than where it was built.
    """

    directory: Path
    manifest: Mapping[str, Any]
    measurements: Mapping[str, Any]
    audit: AuditSummary | None
    reason: str = ""
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "directory": str(self.directory),
            "manifest": dict(self.manifest),
            "measurements": dict(self.measurements),
            "audit": None if self.audit is None else self.audit.to_json(),
            "reason": self.reason,
            "notes": list(self.notes),
        }


def describe(directory: Path) -> Description:
    """Read and check an artifact, and ask its runtime what it executes.

    Raises:
        ArtifactError: it is incomplete, altered or of a newer format.
    """
    contents = read(directory)
    manifest = dict(contents.manifest)
    try:
        artifact = opened(contents)
    except BackendError as error:
        # What cannot run here can still be read.
        return Description(directory, manifest, contents.measurements, None, str(error))
    lowered = Lowered(
        manifest["backend"], contents.files, artifact.inputs, artifact.outputs, manifest["versions"]
    )
    audit = backends.load(manifest["backend"])().audit(lowered, artifact.target)
    return Description(
        directory, manifest, artifact.measurements, AuditSummary.of(audit), notes=artifact.notes
    )


def sections(found: Description) -> Iterator[Section]:
    """The tables of an artifact."""
    manifest = found.manifest
    rows = [
        ("directory", str(found.directory)),
        ("target", f"{manifest['target']['name']} ({manifest['target']['arch']})"),
        ("backend", manifest["backend"]),
        ("pipeline", manifest["pipeline"] or "(empty)"),
        *((kind, _spec(spec)) for kind in ("input", "output") for spec in manifest[f"{kind}s"]),
        ("graphprune", manifest["graphprune"]),
        *manifest["versions"].items(),
        *(("note", note) for note in manifest["notes"]),
        *(("on this host", note) for note in found.notes),
    ]
    yield Section("artifact", ("", ""), tuple(rows))
    listed = [*manifest["files"].items(), *manifest.get("stored", {}).items()]
    files = tuple((name, size_text(entry["bytes"]), entry["sha256"]) for name, entry in listed)
    yield Section("files", ("file", "size", "SHA-256"), files, frozenset({1}))
    if found.audit is not None:
        yield from audit_sections(found.audit, full=True)
    else:
        yield Section("what the runtime executes", ("",), ((found.reason,),), frozenset(), ((0, "warning"),))


def _spec(spec: Mapping[str, Any]) -> str:
    if "name" not in spec:
        return repr(dict(spec))
    return f"{spec['name']}: {spec['dtype']}[{', '.join(map(str, spec['shape']))}]"
