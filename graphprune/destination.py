"""Where an artifact may be written: what stands there already, and whether anything can be made there.

Only an artifact is ever replaced, and only where that was asked for.

>>> import tempfile
>>> with tempfile.TemporaryDirectory() as place:
...     free(f"{place}/new/build") == Path(place).resolve() / "new" / "build"
True
"""

from __future__ import annotations

import os
from pathlib import Path

from . import atomic
from .contents import MANIFEST
from .errors import ArtifactError
from .manifest import check, deployed, unseal


def free(directory: str | Path, overwrite: bool = False, allow: str = "overwrite=True") -> Path:
    """The absolute path of a directory that an artifact can be written to; it is left as it is.

    Args:
        directory: where.
        overwrite: whether an artifact that is there may be replaced.
        allow: what the caller writes to have one replaced; an error says it.

    Raises:
        ArtifactError: the directory holds what must not be replaced, or cannot be written.
    """
    place = absolute(directory)
    try:
        refuse(place, overwrite, allow)
        atomic.attempt(place)
    except OSError as error:
        raise unwritable(place, error) from error
    return place


def unwritable(place: Path, error: OSError) -> ArtifactError:
    """The error of an artifact that the system does not let be written."""
    return ArtifactError(f"cannot write the artifact {place}: {error.strerror or error}")


def absolute(directory: str | Path) -> Path:
    """The absolute path. Raises ArtifactError where it holds the working directory."""
    try:
        place = Path(directory).resolve()
        here = Path.cwd()
    except (OSError, RuntimeError) as error:
        raise ArtifactError(f"cannot write an artifact to {directory}: {error}") from error
    if place == here or place in here.parents:
        raise ArtifactError(
            f"{place} is (or holds) the working directory and cannot be replaced; name another"
        )
    return place


def refuse(place: Path, overwrite: bool, allow: str = "overwrite=True") -> None:
    """Raise an ArtifactError where ``place`` holds anything that must not be replaced."""
    place = atomic.standing(place)
    if not os.path.lexists(place):
        return
    if not place.is_dir():
        raise ArtifactError(f"{place} is a file; give a directory")
    there = {path.name for path in place.iterdir()}
    if not there:
        return
    if not overwrite and MANIFEST in there:
        raise ArtifactError(f"{place} holds an artifact already; give another directory or {allow}")
    try:
        manifest = unseal((place / MANIFEST).read_bytes(), MANIFEST)
        check(manifest)
    except (OSError, ArtifactError) as error:
        raise ArtifactError(
            f"{place} is not empty and not an artifact, so it is not replaced; give another directory"
        ) from error
    foreign = sorted(there - {MANIFEST, *deployed(manifest), *manifest["volatile"]})
    if foreign:
        raise ArtifactError(
            f"{place} also holds {', '.join(foreign)}; move that away, or give another directory"
        )
