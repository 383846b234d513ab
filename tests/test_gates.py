"""Gates for builds: every limit passing and broken on real artifacts; nothing unmeasured counts as passed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune import atomic, gates
from graphprune.backend import TensorSpec
from graphprune.cli import main
from graphprune.errors import ArtifactError, BackendError, InputError
from graphprune.gates import Finding, Limits, Verdict, check
from graphprune.gates.bench import answers
from graphprune.gates.inputs import common, draw, read
from graphprune.gates.limits import byte_count
from graphprune.manifest import seal
from graphprune.measure import Timing
from graphprune.sittings import in_sittings


class Net(nn.Module):
    """A classifier of 8 by 8 images whose answers depend on the image, with randomised statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)
        self.deep, self.head = nn.Conv2d(16, 16, 3), nn.Linear(16 * 16, 5)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.deep(self.norm(self.conv(x)).relu()).relu()
        return self.head(y.flatten(1))


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return Net().eval()


def images(count: int, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(count)]


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``old``; ``int8``, the same network in integers; ``stranger``, another network; ``open``, any batch;
    ``arm`` and ``unproved``, as their names say; ``wide``, for other inputs; ``score``, with one output."""
    place = tmp_path_factory.mktemp("builds")

    def build(name: str, model: nn.Module, x: torch.Tensor, **options: Any) -> None:
        graphprune.optimize(model, x, measure=False, **options).save(place / name)

    x = images(1)[0]
    build("old", net(0), x)
    build("int8", net(0), x, precision="int8", calibration=images(8, 2))
    build("stranger", net(1), x)
    build("open", net(0), x, dynamic_batch=True)
    build("arm", net(0), x, target="arm")
    build("unproved", net(0), x, verify=False)
    build("wide", nn.Linear(4, 3), torch.zeros(1, 4))
    build("score", nn.Sequential(nn.Flatten(), nn.Linear(192, 1)), x)
    return place


def rigged(new: float, old: float = 1.0, spread: float = 0.0) -> Callable[..., Mapping[str, Timing]]:
    """A measurement of ``new`` and ``old`` ms a call; the first's turns differ by ``spread``."""

    def measure(factories: Mapping[str, Any], *, rounds: int, threads: int | None) -> Mapping[str, Timing]:
        assert set(factories) == {"new", "old"}
        turns = [new + spread * (i / (rounds - 1) - 0.5) for i in range(rounds)]
        return {
            "new": Timing(new, min(turns), max(turns), rounds, threads or 1, tuple(turns)),
            "old": Timing(old, old, old, rounds, threads or 1, (old,) * rounds),
        }

    return measure


def finding(verdict: Verdict, limit: str) -> Finding:
    [found] = [f for f in verdict.findings if f.limit == limit]
    return found


def edited(source: Path, place: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of an artifact with another manifest, sealed as an honest one."""
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    document = json.loads(files["manifest.json"])
    document.pop("checksum")
    change(document)
    place.mkdir()
    for name, content in {**files, "manifest.json": seal(document)}.items():
        (place / name).write_bytes(content)
    return place


# ---- each limit ---------------------------------------------------------------------------------------


def test_bytes_are_those_of_the_deployment_files(builds: Path) -> None:
    count = (builds / "old" / "model.onnx").stat().st_size
    held = check(builds / "old", Limits(max_bytes=count))
    assert held.passed
    assert finding(held, "max-bytes").value == count
    broken = check(builds / "old", Limits(max_bytes=count - 1))
    assert [f.limit for f in broken.broken] == ["max-bytes"]
    assert str(broken.broken[0]) == f"broken: max-bytes: {count:,} bytes, at most {count - 1:,}"


def test_bytes_to_the_other(builds: Path) -> None:
    sizes = [(builds / name / "model.onnx").stat().st_size for name in ("int8", "old")]
    share = sizes[0] / sizes[1]
    assert check(builds / "int8", Limits(max_bytes_ratio=share + 1e-6), against=builds / "old").passed
    found = check(builds / "int8", Limits(max_bytes_ratio=share - 1e-6), against=builds / "old")
    assert finding(found, "max-bytes-ratio").value == pytest.approx(share)
    assert not found.passed


def test_agreement_and_sqnr_are_those_of_the_outputs(builds: Path) -> None:
    calls = [(x,) for x in images(40, 5)]
    old, stranger = (graphprune.load(builds / name) for name in ("old", "stranger"))
    a, b = (torch.cat([loaded.run(*c)[0] for c in calls]) for loaded in (stranger, old))
    share = float((a.argmax(1) == b.argmax(1)).double().mean())
    ratio = float(10 * torch.log10((b.double() ** 2).sum() / ((a.double() - b.double()) ** 2).sum()))
    assert 0 < share < 1

    def verdict(agreement: float, sqnr: float) -> Verdict:
        limits = Limits(min_agreement=agreement, min_sqnr=sqnr)
        return check(builds / "stranger", limits, against=builds / "old", inputs=calls)

    found = verdict(share, ratio - 1e-6)
    assert found.passed
    assert finding(found, "min-agreement").value == share
    assert finding(found, "min-sqnr").value == pytest.approx(ratio)
    broken = verdict(share + 0.01, ratio + 0.01)
    assert [f.limit for f in broken.broken] == ["min-agreement", "min-sqnr"]
    assert f"{round(40 * share)} of 40 answers are those of" in str(broken.broken[0])


def test_equal_outputs_have_no_noise(builds: Path) -> None:
    found = check(builds / "old", Limits(min_sqnr=300.0), against=builds / "old")
    assert found.passed
    assert finding(found, "min-sqnr").value is None
    json.loads(found.json_bytes())


def test_random_inputs_are_a_note_and_given_ones_are_not(builds: Path) -> None:
    limits = Limits(min_agreement=0.0)
    drawn = check(builds / "int8", limits, against=builds / "old", samples=3)
    assert any("random numbers" in note for note in drawn.notes)
    assert "of 3 answers" in str(finding(drawn, "min-agreement"))
    assert check(builds / "int8", limits, against=builds / "old", inputs=[(images(1)[0],)]).notes == ()


def test_integers_are_what_the_runtime_executes(builds: Path) -> None:
    assert check(builds / "int8", Limits(min_integers=0.99)).passed
    found = check(builds / "old", Limits(min_integers=0.01))
    assert finding(found, "min-integers").status == "broken"
    assert finding(found, "min-integers").value == 0.0


@pytest.mark.parametrize(
    ("new", "spread", "limit", "status", "says"),
    [
        (1.0, 0.1, 1.05, "passed", "1.000 (0.975 to 1.025) of"),
        (1.2, 0.1, 1.05, "broken", "1.200 (1.175 to 1.225) of"),
        (1.06, 0.1, 1.05, "passed", "above it within the noise"),
        (1.06, 0.0, 1.05, "broken", "at most 1.05 ("),
        (0.5, 0.0, 0.5, "passed", "at most 0.5 ("),
    ],
)
def test_latency_is_broken_beyond_the_noise(
    builds: Path, new: float, spread: float, limit: float, status: str, says: str
) -> None:
    limits = Limits(max_latency_ratio=limit)
    measure = rigged(new, spread=spread)
    verdict = check(builds / "int8", limits, against=builds / "old", measure=measure, rounds=41)
    found = finding(verdict, "max-latency-ratio")
    assert found.status == status
    assert says in found.text
    assert found.value == pytest.approx(new)
    assert found.low == pytest.approx(new - spread / 4)
    assert verdict.passed is (status == "passed")


def test_latency_is_measured_in_turns_on_opened_artifacts(builds: Path) -> None:
    limits = Limits(max_latency_ratio=1000.0)
    found = check(builds / "int8", limits, against=builds / "old", threads=1, rounds=4)
    assert finding(found, "max-latency-ratio").value
    assert "4 rounds, threads: 1" in str(finding(found, "max-latency-ratio"))


def test_a_failed_certificate_breaks_whatever_the_limits(builds: Path, tmp_path: Path) -> None:
    def fail(manifest: dict[str, Any]) -> None:
        certificate = manifest["metrics"]["certificates"]["artifact against original"]
        certificate.update(passed=False, reason="relative error 3.0e-01 is above 1e-04")

    assert str(check(builds / "old").findings[0]).startswith("passed: certificates: ")
    verdict = check(edited(builds / "old", tmp_path / "failed", fail))
    assert "artifact against original: relative error 3.0e-01" in str(verdict.broken[0])


def test_a_failed_certificate_of_a_pass_breaks_too(builds: Path, tmp_path: Path) -> None:
    def fail(manifest: dict[str, Any]) -> None:
        changed = [p for p in manifest["metrics"]["passes"] if p["certificate"]]
        changed[0]["certificate"]["passed"] = False

    verdict = check(edited(builds / "old", tmp_path / "failed", fail))
    assert [f.limit for f in verdict.broken] == ["certificates"]
    assert "pass fold-batch-norm (certificate): not passed" in str(verdict.broken[0])


def test_no_certificate_is_no_proof(builds: Path) -> None:
    verdict = check(builds / "unproved")
    assert not verdict.passed
    assert str(verdict.broken[0]).startswith("not measured: certificates: the artifact holds none")
    assert check(builds / "unproved", allow_unmeasured=True).passed


# ---- what cannot be measured --------------------------------------------------------------------------


def test_another_architecture_is_compared_and_not_timed(builds: Path) -> None:
    if graphprune.load(builds / "arm").target.runs_here:
        pytest.skip("this host is the other architecture")
    limits = Limits(max_latency_ratio=1.0, min_agreement=1.0, max_bytes="1MB")

    def verdict(**options: Any) -> Verdict:
        def measure(*_: Any, **__: Any) -> Any:
            raise AssertionError("measured")

        return check(builds / "arm", limits, against=builds / "old", measure=measure, **options)

    strict = verdict()
    assert [str(f).partition(" is for")[0] for f in strict.broken] == [
        f"not measured: max-latency-ratio: {builds / 'arm'}"
    ]
    assert "built for aarch64" in str(finding(strict, "min-agreement"))
    lenient = verdict(allow_unmeasured=True)
    assert lenient.passed
    assert finding(lenient, "max-latency-ratio").status == "unmeasured"
    [skipped] = ElementTree.fromstring(lenient.junit_bytes()).iter("skipped")
    assert skipped.attrib["message"].startswith("not measured: max-latency-ratio")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the host has a GPU")
def test_an_artifact_that_runs_elsewhere_only_is_weighed(builds: Path, tmp_path: Path) -> None:
    def elsewhere(manifest: dict[str, Any]) -> None:
        manifest["target"].update(name="gpu", arch="cuda", providers=["CUDAExecutionProvider"])

    place = edited(builds / "int8", tmp_path / "gpu", elsewhere)
    limits = Limits(max_bytes="1MB", min_agreement=0.5, min_integers=0.5, max_latency_ratio=2.0)
    verdict = check(place, limits, against=builds / "old")
    assert finding(verdict, "max-bytes").status == "passed"
    assert {f.limit for f in verdict.broken} == {"min-agreement", "min-integers", "max-latency-ratio"}
    assert all("not measured" in str(f) for f in verdict.broken)
    (place / "model.onnx").write_bytes(b"damaged")
    with pytest.raises(ArtifactError, match="was altered"):
        check(place, limits, against=builds / "old")


def test_what_should_run_here_and_does_not_is_an_error(builds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphprune.backends.onnxruntime import OnnxRuntime

    def refuse(*_: Any, **__: Any) -> Any:
        raise BackendError("the artifact needs a newer runtime; upgrade it")

    monkeypatch.setattr(OnnxRuntime, "open", refuse)
    with pytest.raises(BackendError, match="newer runtime"):
        check(builds / "old", Limits(min_integers=0.5))
    assert check(builds / "old", Limits(max_bytes="1MB")).passed  # needs no runtime


def test_one_value_is_no_answer(builds: Path) -> None:
    verdict = check(builds / "score", Limits(min_agreement=0.5), against=builds / "score")
    assert "give min-sqnr" in str(verdict.broken[0])


def test_outputs_of_another_shape_are_broken(builds: Path) -> None:
    limits = Limits(min_agreement=0.0, min_sqnr=-1000.0)
    verdict = check(builds / "score", limits, against=builds / "old")
    assert [f.limit for f in verdict.broken] == ["min-agreement", "min-sqnr"]
    assert "shape (1, 1) instead of (1, 5)" in str(verdict.broken[0])


# ---- options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("limits", "options", "says"),
    [
        ({"max_latency_ratio": 1.0}, {}, "max-latency-ratio: compared with what"),
        ({"max_bytes_ratio": 1.0, "min_sqnr": 9.0}, {}, "max-bytes-ratio, min-sqnr: compared"),
        ({"max_bytes": 9}, {"against": "old"}, "nothing would be compared with"),
        ({"max_bytes": 9}, {"inputs": "x.npz"}, "no limit runs on them"),
        ({}, {"samples": 0}, "at least 1"),
        ({"min_sqnr": 1.0}, {"against": "wide"}, r"cannot be compared: they take \(x: float32\[1, 3, 8, 8\]"),
    ],
)
def test_options_that_do_not_go_together(
    builds: Path, limits: dict[str, Any], options: dict[str, Any], says: str
) -> None:
    if "against" in options:
        options = {**options, "against": builds / options["against"]}
    with pytest.raises(InputError, match=says):
        check(builds / "old", Limits(**limits), **options)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_bytes": 0}, {"max_bytes": "12 parsecs"}, {"max_bytes": 1.5}, {"max_bytes_ratio": 0.0},
        {"max_latency_ratio": -1.0}, {"max_latency_ratio": float("nan")}, {"min_agreement": 98},
        {"min_integers": -0.1}, {"min_sqnr": float("inf")},
    ],
)  # fmt: skip
def test_limits_out_of_range(limits: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Limits(**limits)


@pytest.mark.parametrize(
    ("text", "count"),
    [("12MB", 12_000_000), ("12 mb", 12_000_000), ("1.5MiB", 1_572_864), ("300", 300), (7, 7), ("2kB", 2000)],
)
def test_sizes(text: int | str, count: int) -> None:
    assert byte_count(text) == count


def test_answers_of_integers_are_their_values() -> None:
    logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    old = [(logits, torch.tensor([1, 0, 3]), torch.tensor(0.5), 4)]
    new = [(logits.flip(0), torch.tensor([1, 0, 2]), torch.tensor(0.6), 4)]
    assert answers(new, old) == {0: (0, 2), 1: (2, 3)}


# ---- inputs -------------------------------------------------------------------------------------------

PAIR = (TensorSpec("x", (2, 3), "float32"), TensorSpec("scale", (), "float32"))


def test_a_file_is_cut_into_calls(tmp_path: Path) -> None:
    x = np.arange(21, dtype=np.float32).reshape(7, 3)
    np.savez(tmp_path / "x.npz", x=x, scale=np.float32(2))
    found = read(tmp_path / "x.npz", PAIR, samples=2)
    assert [call[0].tolist() for call in found.calls] == [x[:2].tolist(), x[2:4].tolist()]
    assert all(call[1].item() == 2 for call in found.calls)
    assert any("1 further calls" in note for note in found.notes)
    assert any("1 samples" in note and "left out" in note for note in found.notes)
    torch.save([torch.from_numpy(x), torch.tensor(2.0)], tmp_path / "x.pt")
    again = read(tmp_path / "x.pt", PAIR, samples=2)
    assert all(torch.equal(a, b) for p, q in zip(found.calls, again.calls, strict=True)
               for a, b in zip(p, q, strict=True))  # fmt: skip


def test_a_single_input_needs_no_name(tmp_path: Path) -> None:
    spec = (TensorSpec("x", ("batch", 3), "float32"),)
    torch.save(torch.ones(6, 3), tmp_path / "x.pt")
    assert [c[0].shape[0] for c in read(tmp_path / "x.pt", spec, samples=9, batch=3).calls] == [3, 3]
    np.savez(tmp_path / "x.npz", np.ones((2, 3), np.float32))
    assert len(read(tmp_path / "x.npz", spec, samples=9).calls) == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"x": torch.ones(4, 3), "y": torch.ones(())}, r"holds \['x', 'y'\], the artifact takes"),
        ({"x": torch.ones(4, 3).double(), "scale": torch.ones(())}, "is float64, the artifact takes float32"),
        ({"x": torch.ones(4, 4), "scale": torch.ones(())}, r"has shape \[4, 4\], the artifact takes \['samp"),
        ({"x": torch.ones(1, 3), "scale": torch.ones(())}, "holds 1 samples, and one call takes 2"),
        ([torch.ones(4, 3)], "holds 1 tensors"),
        ("text", "something else than tensors"),
        (nn.Linear(1, 1), "does not read as tensors"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, content: Any, says: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputError, match=says) as caught:
        read(tmp_path / "x.pt", PAIR, samples=1)
    assert "\n" not in str(caught.value)


def test_inputs_that_make_different_numbers_of_calls(tmp_path: Path) -> None:
    specs = (TensorSpec("a", (1,), "float32"), TensorSpec("b", (1,), "float32"))
    torch.save([torch.ones(4), torch.ones(3)], tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"different numbers of calls: \{'a': 4, 'b': 3\}"):
        read(tmp_path / "x.pt", specs, samples=1)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.npz", b"no", "does not read as tensors: ."),
        ("x.pt", b"no", "holds objects other than tensors, and nothing in it is executed"),
        ("x.npz", b"", "does not read as tensors: it is empty, or ends too early"),
        ("x.pt", b"", "does not read as tensors: it is empty, or ends too early"),
        ("x.csv", b"", "is not read; give"),
    ],
)
def test_files_that_are_none(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=says):
        read(tmp_path / name, PAIR, samples=1)


def test_open_sizes_are_those_of_the_other(builds: Path) -> None:
    limits = Limits(min_agreement=1.0)
    for pair in (("open", "old"), ("old", "open")):
        new, old = (builds / name for name in pair)
        assert check(new, limits, against=old, batch=3, samples=4).passed
    spec = TensorSpec("x", ("batch", 3), "float32")
    assert common([spec], [TensorSpec("y", (4, 3), "float32")]) == (TensorSpec("x", (4, 3), "float32"),)
    assert draw([spec], samples=1, batch=2).calls[0][0].shape == (2, 3)


# ---- timing -------------------------------------------------------------------------------------------


def test_every_sitting_opens_anew() -> None:
    opened: list[str] = []

    def factory(name: str) -> Callable[[], Callable[[], int]]:
        def make() -> Callable[[], int]:
            opened.append(name)
            return lambda: sum(range(50))

        return make

    found = in_sittings({n: factory(n) for n in "ab"}, rounds=5, sittings=3, turn=0.0, threads=1)
    assert opened == ["a", "b", "b", "a", "a", "b"]
    assert [len(timing.samples) for timing in found.values()] == [5, 5]
    opened.clear()
    assert in_sittings({"a": factory("a")}, rounds=1, turn=0.0)["a"].rounds == 1
    assert opened == ["a"]
    with pytest.raises(InputError):
        in_sittings({"a": factory("a")}, sittings=0)


# ---- reports ------------------------------------------------------------------------------------------

numbers = st.none() | st.floats(allow_nan=False, allow_infinity=False)
findings = st.builds(
    Finding, st.text(max_size=9), st.sampled_from(["passed", "broken", "unmeasured"]), st.text(),
    numbers, numbers, numbers, numbers, st.floats(0, 10),
)  # fmt: skip
verdicts = st.builds(
    Verdict, st.text(), st.none() | st.text(), st.lists(findings, max_size=4).map(tuple),
    st.lists(st.text(), max_size=2).map(tuple), st.booleans(), st.text(), st.sampled_from(["", "damaged"]),
)  # fmt: skip


@given(verdicts)
def test_json_reads_back(verdict: Verdict) -> None:
    assert Verdict.from_json(json.loads(verdict.json_bytes())) == verdict


@given(verdicts)
def test_junit_is_xml_and_counts_what_it_holds(verdict: Verdict) -> None:
    root = ElementTree.fromstring(verdict.junit_bytes())
    assert root.tag == "testsuites"
    for element in (root, root[0]):
        assert int(element.attrib["tests"]) == len(list(root.iter("testcase")))
        for tag, name in (("failure", "failures"), ("error", "errors"), ("skipped", "skipped")):
            assert int(element.attrib[name]) == len(list(root.iter(tag)))
    bad = list(root.iter("failure")) + list(root.iter("error"))
    assert bool(bad) is not verdict.passed


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "deep" / "report.xml"
    atomic.write_file(target, b"old")
    link = tmp_path / "link.xml"
    link.symlink_to(target)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            atomic.write_file(target, b"new")
    assert os.listdir(target.parent) == ["report.xml"]
    assert target.read_bytes() == b"old"
    atomic.write_file(link, b"new")
    assert link.is_symlink()
    assert target.read_bytes() == b"new"


# ---- the command --------------------------------------------------------------------------------------


@pytest.fixture
def here(builds: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(builds)
    return builds


def test_the_command_passes(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    junit, report = tmp_path / "out" / "check.xml", tmp_path / "check.json"
    flags = ["--max-bytes", "1MB", "--min-agreement", "0.5", "--max-latency-ratio", "1000", "--rounds", "2"]
    assert (
        main(["check", "int8", "--against", "old", *flags, "--junit", str(junit), "--json", str(report)]) == 0
    )
    output = capsys.readouterr()
    assert [line.split(":")[0] for line in output.out.splitlines()] == ["passed"] * 4 + ["note"]
    assert "measure int8 and old in turns" in output.err
    cases = list(ElementTree.parse(junit).getroot().iter("testcase"))
    names = ["certificates", "max-bytes", "max-latency-ratio", "min-agreement"]
    assert [case.attrib["name"] for case in cases] == names
    document = json.loads(report.read_text())
    assert document["passed"] is True
    assert [f["limit"] for f in document["findings"]] == names
    assert document["against"] == "old"


def test_the_command_fails_with_a_line_for_each_broken_limit(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = gates.check
    monkeypatch.setattr(gates, "check", lambda *a, **k: real(*a, **k, measure=rigged(2.0)))
    junit = tmp_path / "check.xml"
    flags = ["--max-bytes", "1kB", "--max-latency-ratio", "1.1", "--min-integers", "0"]
    assert main(["check", "int8", "--against", "old", *flags, "--junit", str(junit)]) == 1
    lines = capsys.readouterr().out.splitlines()
    broken = [line for line in lines if line.startswith("broken: ")]
    assert [line.split(": ")[1] for line in broken] == ["max-bytes", "max-latency-ratio"]
    failures = list(ElementTree.parse(junit).getroot().iter("failure"))
    assert [f.attrib["message"] for f in failures] == broken


def test_json_on_standard_output_is_alone_there(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "old", "--max-bytes", "1kB", "--json", "-"]) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["passed"] is False
    assert "broken: max-bytes: " in output.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["absent"], "absent is not a directory"),
        (["old", "--max-latency-ratio", "1.1"], "compared with what?"),
        (["old", "--max-bytes", "many"], "'many' is not understood"),
        (["old", "--min-sqnr", "9", "--against", "old", "--inputs", "no.npz"], "no.npz: No such file"),
        (["damaged"], "model.onnx was altered"),
        (["newer"], "upgrade graphprune"),
        (["foreign"], "needs the backend 'abacus'"),
    ],
)
def test_what_cannot_be_judged_is_one_line_and_an_error_in_the_reports(
    here: Path, arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("old", "damaged"):
        edited(here / "old", tmp_path / name, lambda manifest: None)
    (tmp_path / "damaged" / "model.onnx").write_bytes(b"x")
    edited(here / "old", tmp_path / "newer", lambda manifest: manifest.update(format=99))
    edited(here / "old", tmp_path / "foreign", lambda manifest: manifest.update(backend="abacus"))
    junit, report = tmp_path / "check.xml", tmp_path / "check.json"
    report.write_text("stale")
    assert main(["check", *arguments, "--junit", str(junit), "--json", str(report)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    [line] = output.err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    [error] = ElementTree.parse(junit).getroot().iter("error")
    assert says in error.attrib["message"]
    assert says in json.loads(report.read_text())["error"]


def test_a_report_that_cannot_be_written_is_found_at_once(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    places = (tmp_path, tmp_path / "file" / "check.xml", Path("/proc/check.xml"), Path("/proc/no/check.xml"))
    for junit in places:
        assert main(["check", "absent", "--junit", str(junit)]) == 2  # before the artifact is looked at
        output = capsys.readouterr()
        assert output.out == ""
        [line] = output.err.splitlines()
        assert line.startswith(f"error: {junit}: ")


def test_two_reports_are_two_files(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = tmp_path / "check.out"
    report.write_text("mine")
    (tmp_path / "link").symlink_to(report)
    for other in (report, tmp_path / "link"):
        assert main(["check", "old", "--junit", str(report), "--json", str(other)]) == 2
        assert f"--junit and --json both name {other}" in capsys.readouterr().err
    assert report.read_text() == "mine"
    assert main(["check", "old", "--junit", os.devnull, "--json", os.devnull]) == 0


def test_no_report_of_an_earlier_check_survives_a_defect(
    here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def defect(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError("a defect")

    (tmp_path / "check.xml").write_text("stale")
    monkeypatch.setattr(gates, "check", defect)
    assert main(["check", "old", "--junit", str(tmp_path / "check.xml")]) == 70
    assert os.listdir(tmp_path) == []
