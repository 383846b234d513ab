"""Artifacts: what ``optimize`` made, as a directory that runs without the model it came from.

:func:`save` writes the runtime's files, ``manifest.json`` (what they are and how they are called, with the
SHA-256 of each), and ``measurements.json`` and the report for what differs from run to run. :func:`load`
believes nothing it has not checked and never unpickles. ``docs/artifacts.md`` describes the format.

>>> import tempfile, torch, graphprune
>>> from graphprune.target import get
>>> graph = graphprune.trace(torch.nn.Linear(3, 2), torch.zeros(1, 3))
>>> lowered = backends.load("onnxruntime")().lower(graph, get("cpu"))
>>> with tempfile.TemporaryDirectory() as place:
...     directory = save(f"{place}/build", lowered, target=get("cpu"), signature=graph.signature)
...     artifact = load(directory)
...     sorted(path.name for path in directory.iterdir())
['manifest.json', 'model.onnx']
>>> artifact(torch.zeros(1, 3)).shape
torch.Size([1, 2])
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from . import atomic, structure, versions
from .backend import Lowered, Runner, TensorSpec
from .compact import check_compression
from .contents import MANIFEST, MEASUREMENTS, REPORT, STORED, Contents, alone, entry, read
from .destination import absolute, refuse, unwritable
from .errors import ArtifactError, BackendError, InputError, RecipeError
from .manifest import COMPRESSED, FORMAT, escapes, seal, spec_json, target_json
from .reference import REFERENCE
from .registry import backends
from .signature import Signature
from .target import Target
from .threads import checked


def save(
    directory: str | Path,
    lowered: Lowered,
    *,
    target: Target,
    signature: Signature,
    pipeline: str = "",
    metrics: Mapping[str, Any] | None = None,
    measurements: Mapping[str, Any] | None = None,
    report_html: str | Callable[[Mapping[str, int]], str] | None = None,
    reference: bytes | None = None,
    overwrite: bool = False,
    compress: str | None = None,
) -> Path:
    """Write an artifact in one step: afterwards the directory holds it whole, or is as it was.

    Args:
        directory: where; parents are made. An empty directory is taken over.
        lowered: what a backend made.
        target: what it was made for.
        signature: the graph's calling convention.
        pipeline: the textual form of the passes that ran.
        metrics: JSON values that follow from the input alone (MACs, parameters, certificates).
        measurements: JSON values that differ from run to run (latency); they and the report stay out of
            the files that are equal for equal input.
        report_html: the report, or what makes it from the bytes of each deployment file as it is stored.
        reference: what the artifact should answer (:mod:`.reference`). It is computed by PyTorch on this
            host, so its last bits differ from host to host, and it stands with what differs.
        overwrite: replace an artifact that is there. Anything else is never replaced.
        compress: ``"zstd"`` stores the runtime's files in one compressed file (:mod:`.compact`), which runs
            on its own, too.

    Returns:
        The directory's absolute path.

    Raises:
        ArtifactError: the directory holds something else, or cannot be written.
        InputError: there is no such compression.
        MissingExtraError: ``zstandard`` is not installed.
    """
    check_compression(compress)
    place = absolute(directory)
    reserved = {MANIFEST, MEASUREMENTS, REPORT, REFERENCE, STORED}
    bad = [name for name in lowered.files if name in reserved or escapes(name)]
    if bad:
        raise ArtifactError(f"backend {lowered.backend!r} names files that an artifact cannot hold: {bad}")
    manifest = {
        "format": COMPRESSED if compress else FORMAT,
        "graphprune": version("graphprune"),
        "versions": dict(lowered.versions),
        "backend": lowered.backend,
        "target": target_json(target),
        "inputs": [spec_json(spec) for spec in lowered.inputs],
        "outputs": [spec_json(spec) for spec in lowered.outputs],
        "call": [[name, structure.of_value(value)] for name, value in signature.arguments.items()],
        "result": structure.of_spec(signature.out_spec),
        "pipeline": pipeline,
        "metrics": dict(metrics or {}),
        "notes": list(lowered.notes),
        "files": {name: entry(content) for name, content in lowered.files.items()},
    }
    stored = {STORED: alone(manifest, lowered.files)} if compress else dict(lowered.files)
    if compress:
        manifest["stored"] = {name: entry(content) for name, content in stored.items()}
    volatile: dict[str, bytes] = {}
    if report_html is not None:
        sizes = {name: len(content) for name, content in stored.items()}
        volatile[REPORT] = (report_html if isinstance(report_html, str) else report_html(sizes)).encode()
    if reference is not None:
        volatile[REFERENCE] = reference
    if volatile or measurements:
        volatile |= _measured(measurements or {}, volatile)
    files = {**stored, MANIFEST: seal({**manifest, "volatile": sorted(volatile)}), **volatile}
    try:
        refuse(place, overwrite)
        atomic.write(place, files)
    except OSError as error:
        raise unwritable(place, error) from error
    return place


def rewrite(contents: Contents, measurements: Mapping[str, Any], others: Mapping[str, bytes]) -> None:
    """Replace what differs from run to run in an artifact; everything else stays, byte for byte.

    Args:
        contents: the artifact as it was read.
        measurements: the new ones.
        others: the new files of ``contents.others``, under the same names.

    Raises:
        ArtifactError: it was written without measurements, or cannot be replaced.
    """
    place, listed = absolute(contents.directory), contents.manifest["volatile"]
    if sorted({MEASUREMENTS, *others}) != listed:
        raise ArtifactError(
            f"{place} was written without {MEASUREMENTS}, so nothing can be added; save it again"
        )
    try:
        refuse(place, overwrite=True)
        manifest = (place / MANIFEST).read_bytes()
        atomic.write(
            place, {**contents.stored, MANIFEST: manifest, **others, **_measured(measurements, others)}
        )
    except OSError as error:
        raise unwritable(place, error) from error


def _measured(measurements: Mapping[str, Any], others: Mapping[str, bytes]) -> dict[str, bytes]:
    hashes = {name: entry(content) for name, content in others.items()}
    document = {"format": FORMAT, "measurements": dict(measurements), "files": hashes}
    return {MEASUREMENTS: seal(document)}


def load(directory: str | Path, threads: int | None = None) -> LoadedArtifact:
    """Open an artifact, after every file in it was checked.

    Args:
        directory: what :func:`save` wrote, or the compressed file out of it.
        threads: intra-operator threads of the runtime; ``None`` leaves its default.

    Raises:
        ArtifactError: it is incomplete, altered, of a newer format, or not an artifact; says which file.
        BackendError: this host cannot run it.
        InputError: no runtime is given so many threads.
    """
    return opened(read(directory), threads)


def opened(contents: Contents, threads: int | None = None) -> LoadedArtifact:
    """The artifact in its runtime, as :func:`load` opens it, with its errors."""
    place, manifest, target = contents.directory, contents.manifest, contents.target
    threads = checked(threads)
    inputs, outputs = contents.inputs, contents.outputs
    try:
        backend = backends.load(manifest["backend"])()
    except RecipeError as error:
        raise ArtifactError(f"{place} needs the backend {manifest['backend']!r}: {error}") from error
    reason = backend.unrunnable(target)
    if reason:
        raise BackendError(f"the artifact {place} cannot run here: {reason}")
    newer = versions.newer(manifest["backend"], manifest["versions"])
    if newer and manifest["backend"] in versions.LINKED:
        raise BackendError(f"the artifact {place} cannot run here: {newer}")
    try:
        runner = backend.open(contents.files, inputs, outputs, target, threads)
    except BackendError as error:
        if newer:
            raise BackendError(f"{error}; {newer}") from error
        raise
    notes = (*getattr(runner, "notes", ()), *([f"it opens here, although {newer}"] if newer else []))
    return LoadedArtifact(place, manifest, contents.measurements, target, inputs, outputs, runner, notes)


class LoadedArtifact:
    """An artifact that was opened: call it as the original model was called.

    Attributes:
        directory: where it was read.
        manifest: everything ``manifest.json`` says (see ``docs/artifacts.md``).
        measurements: what ``measurements.json`` says, empty if there is none.
        target: what it was built for.
        inputs, outputs: specifications of the flat tensors.
        notes: what is otherwise here than where it was built.
    """

    def __init__(
        self,
        directory: Path,
        manifest: Mapping[str, Any],
        measurements: Mapping[str, Any],
        target: Target,
        inputs: Sequence[TensorSpec],
        outputs: Sequence[Any],
        runner: Runner,
        notes: Sequence[str] = (),
    ):
        self.directory, self.manifest, self.measurements = directory, manifest, measurements
        self.target, self.inputs, self.outputs = target, tuple(inputs), tuple(outputs)
        self._runner, self.notes = runner, tuple(notes)
        parts = list(dict(manifest["call"]).values())
        self._plain = parts == [{"slot": place} for place in range(len(self.inputs))]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The result for the original's arguments, in the original's structure.

        Containers of a library's own (``ModelOutput``) come back as :class:`~graphprune.structure.Record`.

        Raises:
            InputError: an argument is missing, unknown, or does not fit.
        """
        return structure.build(self.manifest["result"], self.run(*self.flatten(args, kwargs)))

    def run(self, *inputs: torch.Tensor) -> tuple[Any, ...]:
        """Flat tensors in the order of ``inputs``, flat results in the order of ``outputs``."""
        return self._runner(*inputs)

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[torch.Tensor]:
        """The flat tensors of a call. Raises InputError as calling does."""
        tensors = all(isinstance(value, torch.Tensor) for value in args)
        if self._plain and tensors and not kwargs and len(args) == len(self.inputs):
            return list(args)
        call = dict(self.manifest["call"])
        if len(args) > len(call):
            raise InputError(f"{len(args)} positional arguments given, the artifact takes {list(call)}")
        given = dict(zip(call, args, strict=False))
        for name, value in kwargs.items():
            if name in given:
                raise InputError(f"argument {name!r} given twice, by position and by name")
            if name not in call and value is not None:
                raise InputError(f"the artifact takes no argument {name!r}; it takes {list(call)}")
            given[name] = value
        found: dict[int, torch.Tensor] = {}
        for name, part in call.items():
            if name in given:
                structure.collect(part, given[name], repr(name), found)
            elif next(structure.slots(part), None) is not None:
                raise InputError(f"missing argument {name!r}; the artifact takes {list(call)}")
        return [found[i] for i in range(len(self.inputs))]

    def __repr__(self) -> str:
        return f"<artifact {self.directory} for {self.target.name}, {self.manifest['backend']}>"
