"""Artifacts: written whole or not at all, believed only when intact, called as the original is."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import graphprune
from graphprune import artifact, contents
from graphprune.backend import Lowered, TensorSpec
from graphprune.errors import ArtifactError, GraphpruneError, InputError
from graphprune.manifest import seal
from graphprune.registry import backends
from graphprune.structure import Record
from graphprune.target import get

Pair = namedtuple("Pair", "left right")


class Box:
    """A container that only this file knows."""

    def __init__(self, logits: Any, extra: Any):
        self.logits, self.extra = logits, extra


pytree.register_pytree_node(
    Box, lambda b: ([b.logits, b.extra], ["logits", "extra"]), lambda values, _: Box(*values),
    serialized_type_name="tests.Box",
)  # fmt: skip


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 4)

    def forward(self, x, parts, scale=2.0, *, flags=None, **rest):
        y = self.linear(x) * scale + parts["bias"][0] + rest["shift"]
        if flags == "double":
            y = y * 2
        return Box((y, Pair(y + 1, [y - 1])), {"sum": y.sum(), "flags": flags, "none": None, 3: y})


def nested_call(seed: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    random = torch.Generator().manual_seed(seed)
    x, bias, shift = (torch.randn(s, generator=random) for s in ((2, 3), (4,), (1,)))
    return (x, {"bias": [bias]}), {"flags": "double", "shift": shift}


def lower(model: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Lowered]:
    torch.manual_seed(0)
    graph = graphprune.trace(model.eval(), args, kwargs)
    return graph, backends.load("onnxruntime")().lower(graph, get("cpu"))


@pytest.fixture(scope="module")
def linear() -> tuple[nn.Module, Any, Lowered]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    return (model, *lower(model, torch.zeros(1, 3)))


@pytest.fixture
def write(linear, tmp_path) -> Callable[..., Path]:
    def write(name: str = "build", **options: Any) -> Path:
        _, graph, lowered = linear
        return artifact.save(
            tmp_path / name, lowered, target=get("cpu"), signature=graph.signature, **options
        )

    return write


FULL = {
    "pipeline": "fold-batch-norm", "metrics": {"macs": 6}, "measurements": {"latency_ms": 0.1},
    "report_html": "<p>fine</p>",
}  # fmt: skip


def content(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def edit(directory: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Rewrite the manifest as somebody would who knows how to seal it."""
    document = json.loads((directory / "manifest.json").read_bytes())
    document.pop("checksum")
    document = change(document) or document
    (directory / "manifest.json").write_bytes(seal(document))


# ---- the round trip -------------------------------------------------------------------------------


def test_round_trip(linear, write):
    model, _, _ = linear
    directory = write(**FULL)
    assert sorted(content(directory)) == ["manifest.json", "measurements.json", "model.onnx", "report.html"]
    loaded = artifact.load(directory, threads=1)
    x = torch.randn(1, 3)
    torch.testing.assert_close(loaded(x), model(x).detach())
    torch.testing.assert_close(loaded.run(x)[0], model(x).detach())
    assert loaded.target == get("cpu")
    assert loaded.inputs == (TensorSpec("input", (1, 3), "float32"),)
    assert loaded.manifest["pipeline"] == "fold-batch-norm"
    assert loaded.manifest["metrics"] == {"macs": 6}
    assert loaded.measurements == {"latency_ms": 0.1}
    assert str(directory) in repr(loaded)


def test_nested_arguments_and_results(tmp_path):
    model = Nested()
    args, kwargs = nested_call(0)
    graph, lowered = lower(model, *args, **kwargs)
    place = artifact.save(tmp_path / "n", lowered, target=get("cpu"), signature=graph.signature)
    loaded = artifact.load(place)
    args, kwargs = nested_call(1)
    found, wanted = loaded(*args, **kwargs), model(*args, **kwargs)
    assert isinstance(found, Record)
    y, pair = found.logits
    torch.testing.assert_close(y, wanted.logits[0].detach())
    assert pair._fields == ("left", "right")
    torch.testing.assert_close(pair.left, wanted.logits[1].left.detach())
    assert isinstance(pair.right, list)
    assert list(found["extra"]) == ["sum", "flags", "none", 3]
    assert (found.extra["flags"], found.extra["none"]) == ("double", None)
    assert found[1] is found.extra
    torch.testing.assert_close(loaded(x=args[0], parts=args[1], **kwargs).extra["sum"], found.extra["sum"])
    with pytest.raises(AttributeError, match="'logits', 'extra'"):
        found.nothing  # noqa: B018


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda a, k: (a[:1], k), "missing argument 'parts'"),
        (lambda a, k: ((*a, 1.0, 2.0, 3.0, 4.0), k), "6 positional arguments given"),
        (lambda a, k: (a, {**k, "x": a[0]}), "'x' given twice"),
        (lambda a, k: (a, {**k, "other": 1}), "no argument 'other'"),
        (lambda a, k: (a, {**k, "flags": "single"}), "'flags' was fixed to 'double'.*cannot be 'single'"),
        (lambda a, k: ((a[0], {"bias": [1.0]}), k), "'parts'.bias.0 must be a tensor, got float"),
        (lambda a, k: ((a[0], {"bias": []}), k), "'parts'.bias must be a list of 1, got list of 0"),
        (lambda a, k: ((a[0], {}), k), "'parts' has no 'bias'"),
        (lambda a, k: ((a[0], {**a[1], "more": 1}), k), r"'parts' has keys.*\['more'\]"),
        (lambda a, k: ((a[0], 3), k), "'parts' has no 'bias', got int"),
        (lambda a, k: ((a[0][:1], a[1]), k), r"input 'x' must have shape \(2, 3\), got \(1, 3\)"),
    ],
)
def test_calls_that_do_not_fit(nested, change, says):
    args, kwargs = change(*nested_call(1))
    with pytest.raises(InputError, match=says):
        nested(*args, **kwargs)


@pytest.fixture(scope="module")
def nested(tmp_path_factory):
    args, kwargs = nested_call(0)
    graph, lowered = lower(Nested(), *args, **kwargs)
    place = tmp_path_factory.mktemp("nested") / "n"
    return artifact.load(artifact.save(place, lowered, target=get("cpu"), signature=graph.signature))


def test_same_input_same_bytes(write):
    first = content(write("a", **FULL))
    second = content(
        write("b", **{**FULL, "measurements": {"latency_ms": 0.2}, "report_html": "<p>other</p>"})
    )
    differ = {name for name in first if first[name] != second[name]}
    assert differ == {"measurements.json", "report.html"}


def test_metrics_that_are_not_json_are_refused(write, tmp_path):
    for bad in (float("nan"), object(), {1, 2}):
        with pytest.raises(ArtifactError, match="not JSON"):
            write(metrics={"drop": bad})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_unpickled(write, monkeypatch):
    directory = write(**FULL)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an artifact was unpickled")

    for owner, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(owner, name, never)
    artifact.load(directory)


# ---- what must not be replaced -----------------------------------------------------------------------


def test_overwriting(write, tmp_path):
    old = content(write(pipeline="old"))
    with pytest.raises(ArtifactError, match="overwrite=True"):
        write(pipeline="new")
    assert content(tmp_path / "build") == old
    new = content(write(pipeline="new", overwrite=True))
    assert new["manifest.json"] != old["manifest.json"]
    assert os.listdir(tmp_path) == ["build"]


def test_what_is_no_artifact_is_never_replaced(write, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years")
    (tmp_path / "file").write_text("text")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "manifest.json").write_text('{"name": "an app"}')
    write("extra")
    (tmp_path / "extra" / "notes.txt").write_text("keep")
    for name, says in [("mine", "not an artifact"), ("file", "is a file"), ("other", "not an artifact"),
                       ("extra", r"also holds notes\.txt")]:  # fmt: skip
        before = sorted(p.name for p in tmp_path.rglob("*"))
        with pytest.raises(ArtifactError, match=says):
            write(name, overwrite=True)
        assert sorted(p.name for p in tmp_path.rglob("*")) == before
    (tmp_path / "empty").mkdir()
    artifact.load(write("empty"))


def test_the_working_directory_is_not_replaced(write, tmp_path, monkeypatch):
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for name in ("here/below", "here"):
        with pytest.raises(ArtifactError, match="working directory"):
            write(name)


def test_parents_are_made_and_taken_back(write, tmp_path):
    artifact.load(write("deep/er/build"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="cannot write the artifact") as caught:
        write("file/below/build")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "file").read_text() == ""


# ---- what must not be believed -----------------------------------------------------------------------


def test_every_changed_byte_is_noticed(write):
    directory = write(**FULL)
    for name, intact in content(directory).items():
        for position in {0, 1, len(intact) // 3, len(intact) // 2, len(intact) - 2, len(intact) - 1}:
            changed = bytearray(intact)
            changed[position] ^= 1
            (directory / name).write_bytes(changed)
            with pytest.raises(ArtifactError, match=name.replace(".", r"\.")) as caught:
                artifact.load(directory)
            assert "\n" not in str(caught.value)
        for shorter in (intact[:-1], b"", intact + b" "):
            (directory / name).write_bytes(shorter)
            with pytest.raises(ArtifactError, match=name.replace(".", r"\.")):
                artifact.load(directory)
        (directory / name).write_bytes(intact)
    artifact.load(directory)


@pytest.mark.parametrize("name", ["manifest.json", "measurements.json", "model.onnx", "report.html"])
def test_missing_files_are_named(write, name):
    directory = write(**FULL)
    (directory / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        artifact.load(directory)
    (directory / name).mkdir()
    with pytest.raises(ArtifactError, match="not a regular file"):
        artifact.load(directory)


def test_no_directory(write, tmp_path):
    with pytest.raises(ArtifactError, match="not a directory"):
        artifact.load(tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="not a directory"):
        artifact.load(write() / "model.onnx")


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/hostname", "..", ".", "", "a/../../secret", "sub/model.onnx", "a\\b", "a\0b", "c:x"],
)
def test_files_outside_are_not_read(write, tmp_path, name):
    (tmp_path / "secret").write_bytes(b"x")
    directory = write()
    entry = contents.entry(b"x")
    edit(directory, lambda m: m["files"].update({name: entry}))
    with pytest.raises(ArtifactError, match="not inside the artifact"):
        artifact.load(directory)


def test_links_that_lead_outside_are_not_followed(write, tmp_path):
    directory = write()
    outside = tmp_path / "outside.onnx"
    (directory / "model.onnx").rename(outside)
    (directory / "model.onnx").symlink_to(outside)
    with pytest.raises(ArtifactError, match="leads outside"):
        artifact.load(directory)
    (directory / "model.onnx").unlink()
    (directory / "model.onnx").symlink_to(directory / "gone")
    with pytest.raises(ArtifactError, match="missing"):
        artifact.load(directory)
    (directory / "model.onnx").unlink()
    outside.rename(directory / "inside")
    (directory / "model.onnx").symlink_to("inside")
    (tmp_path / "link").symlink_to(directory)
    artifact.load(tmp_path / "link")


def test_newer_formats_say_upgrade(write):
    directory = write()
    edit(directory, lambda m: m.update(format=3))
    with pytest.raises(ArtifactError, match=r"format 3.*reads up to 2.*upgrade"):
        artifact.load(directory)


def test_an_unknown_backend_says_what_is_missing(write):
    directory = write()
    edit(directory, lambda m: m.update(backend="abacus"))
    with pytest.raises(ArtifactError, match="abacus"):
        artifact.load(directory)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", "null", "NaN", "[" * 100_000, '{"format": "1"}', '{"format": 1}']
)
def test_manifests_that_are_none(write, text):
    directory = write()
    (directory / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json"):
        artifact.load(directory)


words = st.sampled_from(["slot", "tuple", "fields", "name", "value", "dict"])
json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 2**65) | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "slot", "float32", "../x", "__class__", "x" * 50]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=5,
)  # fmt: skip


def spots(value: Any) -> list[tuple[Any, Any]]:
    """Every place in a JSON value, as its container and the key in it."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [spot for key in keys for spot in ((value, key), *spots(value[key]))]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pick=st.integers(0, 10_000), new=json_values, remove=st.booleans())
def test_altered_manifests_never_end_in_a_traceback(nested, pick, new, remove):
    """Even with a checksum that fits, whatever loads was checked, and whatever does not says so."""
    path = nested.directory / "manifest.json"
    intact = path.read_bytes()
    document = json.loads(intact)
    document.pop("checksum")
    places = spots(document)
    container, key = places[pick % len(places)]
    if remove:
        del container[key]
    else:
        container[key] = new
    try:
        path.write_bytes(json.dumps(document).encode())
        with pytest.raises(ArtifactError):
            artifact.load(nested.directory)
        path.write_bytes(seal(document))
        with suppress(GraphpruneError):
            artifact.load(nested.directory)
    finally:
        path.write_bytes(intact)


# ---- what may happen while it is written ----------------------------------------------------------------

KILLS = """
import os, resource, signal, sys
from pathlib import Path
import torch
from torch.utils import _pytree as pytree
from graphprune import artifact, atomic
from graphprune.backend import Lowered, TensorSpec
from graphprune.errors import ArtifactError
from graphprune.signature import Signature
from graphprune.target import get

place, mode = Path(sys.argv[1]), sys.argv[2]
if mode == "renames":
    atomic._exchange = lambda first, second: False
spec = (TensorSpec("x", (1,), "float32"),)
signature, _ = Signature.of(["x"], [torch.zeros(1)], {}, pytree.tree_flatten(0)[1])


def save(fill, overwrite=True):
    files = {"model.onnx": bytes([fill]) * 20000, "more": bytes([fill]) * 9}
    lowered = Lowered("onnxruntime", files, spec, spec)
    artifact.save(place / "a" / "build", lowered, target=get("cpu"), signature=signature,
                  report_html=str(fill), overwrite=overwrite)


def content():
    directory = atomic.standing(place / "a" / "build")
    return {p.name: p.read_bytes() for p in directory.iterdir()} if directory.exists() else {}


def child(work):
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            work()
            code = 0
        except ArtifactError as error:
            code = 4 if "\\n" not in str(error) else 5
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1]


def killed_at(step):
    def work():
        left = [step]

        def tick(event="", *_):
            if event.startswith(("os.", "open", "shutil.", "ctypes.", "fsync", "fcntl")):
                left[0] -= 1
                if left[0] == 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        flush = os.fsync
        os.fsync = lambda descriptor: (tick("fsync"), flush(descriptor))
        sys.addaudithook(tick)
        save(2)

    return child(work)


def count(fresh):
    save(2); new = content(); save(1); old = content()
    assert old != new and len(old) == 5
    if fresh:
        old = {}
    seen = []
    for step in range(1, 500):
        if fresh:
            import shutil
            shutil.rmtree(place / "a", ignore_errors=True)
        else:
            save(1)
            assert os.listdir(place / "a") == ["build"], os.listdir(place / "a")
        status = killed_at(step)
        state = content()
        assert state in (old, new), (step, sorted(state))
        seen.append(state == new)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
    assert seen[0] is False and seen[-1] is True and seen == sorted(seen)
    return len(seen)


if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    assert os.waitstatus_to_exitcode(child(lambda: save(1))) == 4
    assert os.listdir(place) == [], os.listdir(place)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    save(1)
    old = content()
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))
    assert os.waitstatus_to_exitcode(child(lambda: save(2))) == 4
    assert content() == old and os.listdir(place / "a") == ["build"]
    print("ok 11")
else:
    print("ok", min(count(False), count(True)))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", ["exchange", "renames", "full"])
def test_killed_or_out_of_space_leaves_the_old_or_the_new(tmp_path, mode):
    """A child is killed before every system call of a write in turn; the parent looks at what is left."""
    (tmp_path / "work").mkdir()
    script = tmp_path / "kills.py"
    script.write_text(KILLS)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(tmp_path / "work"), mode],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    word, points = done.stdout.split()
    assert (word, int(points) > 10) == ("ok", True), done.stdout


def test_leftovers_of_a_killed_write_are_ignored_then_removed(write, tmp_path):
    directory = write()
    leftover = tmp_path / f".build.partial-{'0' * 32}"
    leftover.mkdir()
    (leftover / "model.onnx").write_bytes(b"half")
    stranger = tmp_path / ".build.partial-mine"
    stranger.mkdir()
    artifact.load(directory)
    write(overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [".build.partial-mine", "build"]


def test_a_writer_at_work_keeps_its_files(write, tmp_path):
    fcntl = pytest.importorskip("fcntl")
    busy = tmp_path / f".build.partial-{'1' * 32}"
    busy.mkdir()
    descriptor = os.open(busy, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        write()
        assert busy.exists()
    finally:
        os.close(descriptor)
    write(overwrite=True)
    assert not busy.exists()
