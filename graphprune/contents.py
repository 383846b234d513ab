"""Reading an artifact: every file is read once, checked, and what was checked is what is used.

No runtime is asked: that is :func:`graphprune.artifact.load`'s work.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import atomic
from .backend import TensorSpec
from .errors import ArtifactError
from .manifest import AGAIN, check, digest, escapes, spec_of, target_of, unseal
from .target import Target

MANIFEST = "manifest.json"
MEASUREMENTS = "measurements.json"
REPORT = "report.html"


@dataclass(frozen=True)
class Contents:
    """An artifact that was read and checked, and not opened: no runtime is needed for it.

    Attributes:
        directory: where it was read.
        manifest, measurements: the documents.
        files: the runtime's files.
        others: the files that differ from run to run: the report, the reference.
    """

    directory: Path
    manifest: Mapping[str, Any]
    measurements: Mapping[str, Any]
    files: Mapping[str, bytes]
    others: Mapping[str, bytes]

    @property
    def target(self) -> Target:
        """What it was built for."""
        return target_of(self.manifest["target"])

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Specifications of the flat inputs."""
        return tuple(spec_of(document) for document in self.manifest["inputs"])

    @property
    def outputs(self) -> tuple[Any, ...]:
        """Specifications of the flat outputs, constants among them."""
        return tuple(spec_of(document) for document in self.manifest["outputs"])


def read(directory: str | Path) -> Contents:
    """Read an artifact and check every file in it.

    Raises:
        ArtifactError: as :func:`load`.
    """
    try:
        place = atomic.standing(Path(os.path.abspath(directory)))
        if not place.is_dir():
            raise ArtifactError(f"{place} is not a directory; give the one that save() wrote")
        return _read(place)
    except RecursionError as error:
        raise ArtifactError(f"{place / MANIFEST} is nested too deeply; {AGAIN}") from error
    except OSError as error:
        raise ArtifactError(f"cannot read the artifact {directory}: {error.strerror or error}") from error


def entry(content: bytes) -> dict[str, Any]:
    """What a document says of a file: its hash and its size."""
    return {"sha256": digest(content), "bytes": len(content)}


def _read(place: Path) -> Contents:
    """Documents and files, each checked."""
    manifest = unseal(_content(place, MANIFEST), f"{place / MANIFEST}")
    check(manifest)
    files = {name: _checked(place, name, listed) for name, listed in manifest["files"].items()}
    measurements: Any = {}
    contents: dict[str, bytes] = {}
    if manifest["volatile"]:
        document = unseal(_content(place, MEASUREMENTS), f"{place / MEASUREMENTS}")
        measurements, others = document.get("measurements"), document.get("files")
        if not isinstance(measurements, dict) or not isinstance(others, dict):
            raise ArtifactError(f"{place / MEASUREMENTS} is malformed; build the artifact again")
        if sorted({*others, MEASUREMENTS}) != manifest["volatile"]:
            raise ArtifactError(f"{place / MEASUREMENTS} is not of this artifact; build the artifact again")
        contents = {name: _checked(place, name, listed) for name, listed in others.items()}
    return Contents(place, manifest, measurements, files, contents)


def _content(place: Path, name: str) -> bytes:
    """The bytes of a file that really is in the directory."""
    if escapes(name):
        raise ArtifactError(f"{place / MANIFEST} names the file {name!r}, which is not inside the artifact")
    path = place / name
    if not path.exists():
        raise ArtifactError(f"{path} is missing; {AGAIN}")
    real, root = path.resolve(), place.resolve()
    if root not in real.parents:
        raise ArtifactError(f"{path} leads outside the artifact, to {real}; replace it by the file itself")
    if not real.is_file():
        raise ArtifactError(f"{path} is not a regular file; {AGAIN}")
    return real.read_bytes()


def _checked(place: Path, name: str, listed: Any) -> bytes:
    content = _content(place, name)
    if not isinstance(listed, dict) or listed != entry(content):
        raise ArtifactError(f"{place / name} was altered after it was written; {AGAIN}")
    return content
