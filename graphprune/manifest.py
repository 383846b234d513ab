"""``manifest.json``: what an artifact is, as plain JSON that is checked before it is believed.

A sealed document is JSON with sorted keys and a ``checksum`` over everything else in it, and reads back only
from exactly the bytes it was written as. See ``docs/artifacts.md`` for the fields.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import Any

import torch

from . import structure
from .backend import TensorSpec
from .errors import ArtifactError, TargetError
from .target import Target, known

FORMAT = 1
COMPRESSED = 2
"""The format of a manifest whose files are stored in one compressed file, which says so as ``stored``."""
AGAIN = "restore the artifact or build it again"


def digest(content: bytes) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def seal(document: Mapping[str, Any]) -> bytes:
    """The document's bytes, with its checksum.

    Raises:
        ArtifactError: a value is not JSON (NaN and infinity included).
    """
    try:
        body = json.dumps(document, sort_keys=True, allow_nan=False)
        sealed = {**json.loads(body), "checksum": digest(body.encode())}
        return (json.dumps(sealed, sort_keys=True, indent=1, allow_nan=False) + "\n").encode()
    except (TypeError, ValueError) as error:
        raise ArtifactError(
            f"the artifact's description is not JSON: {error}; give metrics and measurements as plain "
            "numbers, strings, lists and mappings (null for what is not finite)"
        ) from error


def unseal(content: bytes, name: str) -> dict[str, Any]:
    """The document in ``content``, the file called ``name``.

    Raises:
        ArtifactError: it does not parse, is of a newer format, or is not as it was written.
    """
    try:
        document = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{name} is not JSON ({error}); {AGAIN}") from error
    if not isinstance(document, dict):
        raise ArtifactError(f"{name} is not a JSON object; {AGAIN}")
    written = document.get("format")
    if type(written) is not int or written < 1:
        raise ArtifactError(f"{name} has no format version; this is not an artifact of graphprune")
    if written > COMPRESSED:
        raise ArtifactError(
            f"{name} has format {written}, this graphprune reads up to {COMPRESSED}; upgrade graphprune"
        )
    body = {key: value for key, value in document.items() if key != "checksum"}
    try:
        intact = seal(body) == content
    except (ArtifactError, RecursionError):
        intact = False
    if not intact:
        raise ArtifactError(f"{name} was altered after it was written; {AGAIN}")
    return body


def spec_json(value: Any) -> dict[str, Any]:
    """A flat input or output: a tensor's specification, or the constant that stands there."""
    if isinstance(value, TensorSpec):
        return {"name": value.name, "shape": list(value.shape), "dtype": value.dtype}
    return structure.of_value(value)


def spec_of(document: Mapping[str, Any]) -> Any:
    """The inverse of :func:`spec_json`."""
    if "name" not in document:
        return structure.constant(dict(document))
    return TensorSpec(document["name"], tuple(document["shape"]), document["dtype"])


def target_json(target: Target) -> dict[str, Any]:
    """A target's fields, but for its integers: they say how to build, and this is built."""
    fields = {key: value for key, value in target.to_json().items() if key != "integers"}
    return {**fields, "providers": list(target.providers)}


def target_of(document: Mapping[str, Any]) -> Target:
    """The inverse of :func:`target_json`; integers are those of the known target of that name."""
    named = known().get(document["name"])
    integers = None if named is None else named.integers
    lists = {key: tuple(document.get(key, ())) for key in ("providers", "features")}
    return Target(**{**document, **lists, "integers": integers})


def check(manifest: Mapping[str, Any]) -> None:
    """Raise an ArtifactError that says which field of a manifest is not what it should be."""
    optional = {"stored"} if manifest["format"] < COMPRESSED else set()
    for field, (fits, wanted) in _FIELDS.items():
        if field in optional and field not in manifest:
            continue
        if field not in manifest:
            raise ArtifactError(f"manifest.json has no {field!r}; build the artifact again")
        if not fits(manifest[field]):
            raise ArtifactError(f"manifest.json: {field!r} is not {wanted}; build the artifact again")
    for field, count in (("call", len(manifest["inputs"])), ("result", len(manifest["outputs"]))):
        parts = [part for _, part in manifest[field]] if field == "call" else [manifest[field]]
        numbers = sorted(number for part in parts for number in structure.slots(part))
        if numbers != list(range(count)):
            raise ArtifactError(
                f"manifest.json: {field!r} names slots {numbers}, but there are {count} of them; "
                "build the artifact again"
            )


def deployed(manifest: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """The deployment files as they are stored: name → hash and bytes."""
    stored: Mapping[str, Mapping[str, Any]] = manifest.get("stored") or manifest["files"]
    return stored


def _strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _is_input(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"name", "shape", "dtype"}:
        return False
    sizes = value["shape"]
    return (
        isinstance(value["name"], str)
        and isinstance(sizes, list)
        and all(isinstance(s, str) or (type(s) is int and s >= 0) for s in sizes)
        and (value["dtype"] == "int" or _is_dtype(value["dtype"]))
    )


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) and isinstance(getattr(torch, value, None), torch.dtype)


def _is_output(value: Any) -> bool:
    constant = isinstance(value, dict) and set(value) & {"value", "float", "dtype"} and "name" not in value
    return _is_input(value) or bool(constant and structure.problem(value, "output") is None)


def _is_target(value: Any) -> bool:
    if not isinstance(value, dict) or not _strings(value.get("providers")):
        return False
    kinds = {"name": str, "arch": str, "backend": str, "channel_alignment": int, "linear_alignment": int,
             "portable": bool, "providers": list}  # fmt: skip
    newer = {"processor": str, "features": list, "floats": str}  # an artifact of an older version has none
    asked = {**kinds, **{key: kind for key, kind in newer.items() if key in value}}
    if set(value) != set(asked) or any(type(value[key]) is not kind for key, kind in asked.items()):
        return False
    if not _strings(value.get("features", [])):
        return False
    try:
        target_of(value)
    except TargetError:
        return False
    return True


def _is_call(value: Any) -> bool:
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        return False
    names = [name for name, _ in value]
    return (
        _strings(names)
        and len(set(names)) == len(names)
        and all(structure.problem(part, name) is None for name, part in value)
    )


def _is_files(value: Any) -> bool:
    return isinstance(value, dict) and all(
        isinstance(entry, dict)
        and set(entry) == {"sha256", "bytes"}
        and isinstance(entry["sha256"], str)
        and type(entry["bytes"]) is int
        for entry in value.values()
    )


def escapes(name: str) -> bool:
    """Whether a file name in a manifest leads anywhere but straight into the artifact's directory."""
    path = PurePosixPath(name)
    return (
        not name
        or "\0" in name
        or "\\" in name
        or ":" in name
        or path.parts != (name,)
        or name in (".", "..")
    )


_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "graphprune": (lambda v: isinstance(v, str), "a version"),
    "versions": (_mapping, "an object"),
    "backend": (lambda v: isinstance(v, str), "a name"),
    "target": (_is_target, "a target"),
    "inputs": (lambda v: isinstance(v, list) and all(map(_is_input, v)), "a list of tensor specifications"),
    "outputs": (lambda v: isinstance(v, list) and all(map(_is_output, v)), "a list of tensors and constants"),
    "call": (_is_call, "a list of arguments with their structure"),
    "result": (lambda v: structure.problem(v, "result") is None, "a structure"),
    "pipeline": (lambda v: isinstance(v, str), "a text"),
    "metrics": (_mapping, "an object"),
    "notes": (_strings, "a list of texts"),
    "files": (_is_files, "an object of files with their hashes"),
    "volatile": (_strings, "a list of file names"),
    "stored": (lambda v: _is_files(v) and len(v) == 1, "one file with its hash"),
}
