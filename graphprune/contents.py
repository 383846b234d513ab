"""Reading an artifact: every file is read once, checked, and what was checked is what is used.

An artifact is a directory, or the one file that a compressed directory keeps its deployment files in, which
holds all that is needed to run them (:func:`alone`). No runtime is asked: that is
:func:`graphprune.artifact.load`'s work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import atomic
from .backend import TensorSpec
from .compact import MAGIC, pack, unpack
from .errors import ArtifactError
from .manifest import AGAIN, COMPRESSED, check, deployed, digest, escapes, spec_of, target_of, unseal
from .target import Target

MANIFEST = "manifest.json"
MEASUREMENTS = "measurements.json"
REPORT = "report.html"
STORED = "artifact.gpz"


@dataclass(frozen=True)
class Contents:
    """An artifact that was read and checked, and not opened: no runtime is needed for it.

    Attributes:
        directory: where it was read; a file that stands alone is itself this.
        manifest, measurements: the documents.
        files: the runtime's files.
        stored: the same as they are in the directory: one compressed file, or themselves.
        others: the files that differ from run to run: the report, the reference.
    """

    directory: Path
    manifest: Mapping[str, Any]
    measurements: Mapping[str, Any]
    files: Mapping[str, bytes]
    others: Mapping[str, bytes]
    stored: Mapping[str, bytes]

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

    Args:
        directory: what ``save`` wrote, or the compressed file out of it.

    Raises:
        ArtifactError: as :func:`load`.
        MissingExtraError: it is compressed, and ``zstandard`` is not installed.
    """
    try:
        place = atomic.standing(Path(os.path.abspath(directory)))
        if place.is_file():
            return _alone(place)
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


def alone(manifest: Mapping[str, Any], files: Mapping[str, bytes]) -> bytes:
    """All that is needed to run an artifact, as one compressed file: its files and a manifest.

    The manifest inside has no metrics, which nobody needs to run it, and no hashes: one hash is over all.

    Raises:
        MissingExtraError: ``zstandard`` is not installed.
    """
    needed = {key: value for key, value in manifest.items() if key not in ("metrics", "files", "stored")}
    document = json.dumps({**needed, "volatile": []}, sort_keys=True, separators=(",", ":"))
    return pack({MANIFEST: document.encode(), **files})


def _alone(place: Path) -> Contents:
    content = place.read_bytes()
    if not content.startswith(MAGIC):
        raise ArtifactError(
            f"{place} is not a directory and not a compressed artifact; give the directory that save() "
            f"wrote, or its {STORED}"
        )
    document, files = _unpacked(place, content)
    listed = {name: entry(part) for name, part in files.items()}
    stored = {place.name: content}
    manifest = {**document, "metrics": {}, "files": listed, "stored": {place.name: entry(content)}}
    check(manifest)
    return Contents(place, manifest, {}, files, {}, stored)


def _unpacked(path: Path, content: bytes) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest inside a compressed file, as far as it goes, and the files."""
    try:
        files = unpack(content)
        document = json.loads(files.pop(MANIFEST))
    except (ArtifactError, KeyError, ValueError) as error:
        raise ArtifactError(f"{path}: {error}") from error
    bad = [name for name in files if escapes(name)]
    if not isinstance(document, dict) or document.get("format") != COMPRESSED or bad:
        raise ArtifactError(f"{path} holds something else than an artifact of this version; {AGAIN}")
    return document, files


def _files(place: Path, manifest: Mapping[str, Any]) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The runtime's files, and the files they are stored as."""
    stored = {name: _checked(place, name, listed) for name, listed in deployed(manifest).items()}
    if not manifest.get("stored"):
        return stored, stored
    ((name, content),) = stored.items()
    _, files = _unpacked(place / name, content)
    if {part: entry(value) for part, value in files.items()} != manifest["files"]:
        raise ArtifactError(f"{place / name} is not of this artifact; {AGAIN}")
    return files, stored


def _read(place: Path) -> Contents:
    """Documents and files, each checked."""
    manifest = unseal(_content(place, MANIFEST), f"{place / MANIFEST}")
    check(manifest)
    files, stored = _files(place, manifest)
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
    return Contents(place, manifest, measurements, files, contents, stored)


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
