"""The compact form: every bit comes back, and what was damaged is refused."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import graphprune
from graphprune.cli import main
from graphprune.compact import MAGIC, pack, unpack
from graphprune.compact.forms import FORMS, Streams, decode, encode, looked_up, palette
from graphprune.compact.spans import Span, spans
from graphprune.contents import MANIFEST, STORED, read
from graphprune.errors import ArtifactError, InputError, MissingExtraError
from graphprune.manifest import digest

WIDTHS = (0, 1, 2, 4, 8)


# ---- forms and the container ----------------------------------------------------------------------


@given(
    words=st.lists(st.sampled_from([0, 0, 0, 1, 7, 255, 2**31, 2**63]), max_size=700),
    quiet=st.integers(0, 2000), width=st.sampled_from(WIDTHS), form=st.sampled_from(FORMS),
)  # fmt: skip
def test_every_form_gives_back_every_bit(words: list[int], quiet: int, width: int, form: str) -> None:
    content = np.array(words + [0] * quiet + words, dtype="<u8").tobytes()
    streams, common = encode(form, content, width)
    given = Streams(streams)
    assert decode(form, given, len(content), width, common) == content
    assert given.finished


@given(st.binary(max_size=3000), st.integers(0, 12))
def test_files_of_anything_come_back(content: bytes, repeat: int) -> None:
    files = {"a.onnx": content, "b.pte": content * repeat, "c.xml": b"", "d.bin": content[::-1]}
    packed = pack(files, level=1)
    assert unpack(packed) == files
    assert list(unpack(packed)) == list(files)


@given(st.data())
def test_a_damaged_file_is_refused(data: st.DataObject) -> None:
    packed = bytearray(PACKED)
    at = data.draw(st.integers(0, len(packed) - 1))
    packed[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ArtifactError, match="damaged"):
        unpack(bytes(packed))


@given(st.integers(0, 10_000))
def test_a_cut_file_is_refused(length: int) -> None:
    with pytest.raises(ArtifactError, match="damaged"):
        unpack(PACKED[: min(length, len(PACKED) - 1)])


@given(st.data())
def test_a_damaged_body_with_a_right_hash_is_an_error_or_other_files(data: st.DataObject) -> None:
    # Whoever can write the file can also hash it: what was written on purpose still must not crash.
    body = bytearray(PACKED[len(MAGIC) + 32 :])
    at = data.draw(st.integers(0, min(len(body) - 1, 200)))
    body[at] ^= data.draw(st.integers(1, 255))
    sealed = MAGIC + hashlib.sha256(body).digest() + bytes(body)
    with suppress(ArtifactError):
        assert isinstance(unpack(sealed), dict)


def sparse(share: float, dtype: str, count: int = 40_000) -> bytes:
    generator = np.random.default_rng(0)
    values = (generator.standard_normal(count) * 40).astype(dtype)
    values[generator.random(count) < share] = 0
    return values.tobytes()


PACKED = pack({"model.pte": sparse(0.8, "float32", 3000), "operators.json": b"{}"})


@pytest.mark.parametrize(
    ("share", "dtype", "most"),
    # Of the dense bytes; a position costs its entropy (0.72 bits at 80 %), int8 of this spread 7 bits.
    [
        (0.8, "float32", 0.21), (0.95, "float32", 0.06), (0.0, "float32", 0.93), (0.8, "float16", 0.25),
        (0.8, "int8", 0.29), (0.95, "int8", 0.09),
    ],
)  # fmt: skip
def test_sparse_weights_take_what_is_left_of_them(share: float, dtype: str, most: float) -> None:
    content = sparse(share, dtype)
    files = {"model.onnx": model_of(content, dtype), "rest": b""}
    packed = pack(files)
    assert unpack(packed) == files
    assert len(packed) < most * len(content)


def test_rearranging_beats_the_compressor_alone() -> None:
    zstandard = pytest.importorskip("zstandard")
    for share, dtype, gain in ((0.0, "float32", 0.05), (0.8, "float32", 0.15), (0.8, "int8", 0.06)):
        content = model_of(sparse(share, dtype), dtype)
        alone = len(zstandard.ZstdCompressor(level=19).compress(content))
        assert len(pack({"model.onnx": content})) < (1 - gain) * alone


def test_four_bits_in_a_byte_are_found() -> None:
    generator = np.random.default_rng(0)
    halves = generator.integers(0, 16, (2, 50_000), dtype=np.uint8)
    halves[generator.random(halves.shape) < 0.8] = 8  # the zero point of unsigned integers
    content = (halves[0] | halves[1] << 4).tobytes()
    packed = pack({"model.onnx": model_of(content, "uint8")})
    assert len(packed) < 0.40 * len(content)  # 0.72 + 0.2 × 3.9 bits of 4
    assert unpack(packed)["model.onnx"].find(content) > 0


def test_floats_that_stand_for_few_integers_take_as_much_as_those() -> None:
    generator = np.random.default_rng(0)
    integers = generator.integers(-7, 8, 40_000).astype(np.int8)
    integers[generator.random(len(integers)) < 0.8] = 0
    floats = (integers * np.float32(0.0173)).tobytes()
    packed = pack({"model.onnx": model_of(floats, "float32")})
    assert unpack(packed)["model.onnx"].find(floats) > 0
    assert len(packed) < 0.21 * len(integers)  # 0.72 + 0.2 × 3.8 bits of 8


@given(st.lists(st.integers(0, 300), max_size=400), st.sampled_from((2, 4, 8)))
def test_a_palette_gives_back_every_bit(words: list[int], width: int) -> None:
    content = np.array(words, dtype=f"<u{width}").tobytes()
    found = palette(content, width)
    if found is None:
        assert len(set(words)) > 256 or not words
    else:
        assert looked_up(found[1], found[0], width) == content


def test_equal_files_give_equal_bytes() -> None:
    files = {"model.onnx": model_of(sparse(0.5, "float32"), "float32")}
    assert pack(files) == pack(dict(files))


# ---- where weights are ----------------------------------------------------------------------------


def model_of(content: bytes, dtype: str) -> bytes:
    kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    tensor = onnx.TensorProto(
        data_type=kind, dims=[len(content) // np.dtype(dtype).itemsize], raw_data=content, name="w"
    )
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    made: bytes = onnx.helper.make_model(graph).SerializeToString()
    return made


def test_tensors_of_an_onnx_file_are_found() -> None:
    content = sparse(0.0, "float16", 500)
    model = model_of(content, "float16")
    (span,) = spans("model.onnx", model, {})
    assert (model[span.start : span.stop], span.width) == (content, 2)


def test_tensors_beside_an_onnx_file_are_found() -> None:
    model = onnx.load_model_from_string(model_of(bytes(400), "float32"))
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, "model.onnx.data", offset=64, length=400)
    tensor.ClearField("raw_data")
    files = {"model.onnx": model.SerializeToString(), "model.onnx.data": bytes(464)}
    assert spans("model.onnx.data", files["model.onnx.data"], files) == [Span(64, 464, 4)]


def test_tensors_of_openvino_are_found() -> None:
    xml = b'<data element_type="f16" shape="4, 50" offset="100" size="400" /><data mode="none" />'
    assert spans("model.bin", bytes(500), {"model.xml": xml}) == [Span(100, 500, 2)]
    assert spans("model.bin", bytes(450), {"model.xml": xml}) == [Span(100, 450, 2)]


# ---- artifacts ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def result() -> Any:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Flatten(), nn.Linear(3136, 10)
    )
    image = torch.rand(1, 3, 16, 16)
    return graphprune.optimize(
        model.eval(),
        image,
        pipeline="prune-weights{sparsity=0.9},strip-masks",
        backend="onnxruntime",
        measure=False,
    )


@pytest.fixture
def saved(result: Any, tmp_path: Path) -> tuple[Path, Path]:
    plain = result.save(tmp_path / "plain")
    return plain, result.save(tmp_path / "compact", compress="zstd")


def test_a_compressed_artifact_is_the_same_artifact(saved: tuple[Path, Path]) -> None:
    plain, compact = saved
    assert read(compact).files == read(plain).files
    assert not (compact / "model.onnx").exists()
    image = torch.rand(1, 3, 16, 16)
    loaded = graphprune.load(compact, threads=1)
    assert torch.equal(loaded(image), graphprune.load(plain, threads=1)(image))
    ((name, entry),) = loaded.manifest["stored"].items()
    content = (compact / STORED).read_bytes()
    assert (name, entry) == (STORED, {"sha256": digest(content), "bytes": len(content)})
    assert entry["bytes"] < 0.13 * loaded.manifest["files"]["model.onnx"]["bytes"]


def test_the_compressed_file_runs_alone(saved: tuple[Path, Path], tmp_path: Path) -> None:
    file = tmp_path / "moved.gpz"
    (saved[1] / STORED).rename(file)
    image = torch.rand(1, 3, 16, 16)
    loaded = graphprune.load(file, threads=1)
    assert torch.equal(loaded(image), graphprune.load(saved[0], threads=1)(image))
    assert loaded.manifest["metrics"] == {}
    assert loaded.target == graphprune.load(saved[0]).target


def test_reports_say_both_sizes(saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    page = (saved[1] / "report.html").read_text()
    assert STORED in page
    assert "model.onnx" in page
    for path in (saved[1], saved[1] / STORED):
        assert main(["inspect", str(path)]) == 0
        said = capsys.readouterr().out
        assert STORED in said
        assert "model.onnx" in said


def test_check_and_verify_read_it(saved: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    plain, compact = map(str, saved)
    size = (saved[1] / STORED).stat().st_size
    held = ["check", compact, "--max-bytes", str(size), "--against", plain, "--min-agreement", "1.0"]
    assert main(held) == 0
    assert main(["check", compact, "--max-bytes", str(size - 1)]) != 0
    capsys.readouterr()
    before = (saved[1] / STORED).read_bytes()
    assert main(["verify", compact, "--record"]) == 0
    assert "passed" in capsys.readouterr().out
    assert (saved[1] / STORED).read_bytes() == before
    assert graphprune.load(compact).measurements["verified"]["passed"]


def test_it_is_replaced_like_any_other(result: Any, saved: tuple[Path, Path]) -> None:
    assert result.save(saved[1], overwrite=True) == saved[1]
    assert not (saved[1] / STORED).exists()
    assert result.save(saved[1], overwrite=True, compress="zstd") == saved[1]
    assert not (saved[1] / "model.onnx").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda file, other: file.write_bytes(file.read_bytes()[:-1]), "altered"),
        (lambda file, other: file.unlink(), "missing"),
        (lambda file, other: file.write_bytes(other.read_bytes()), "altered"),
    ],
)
def test_a_damaged_directory_is_refused(
    saved: tuple[Path, Path], change: Callable[[Path, Path], Any], said: str
) -> None:
    change(saved[1] / STORED, saved[0] / "model.onnx")
    with pytest.raises(ArtifactError, match=said):
        graphprune.load(saved[1])


def test_a_lone_file_that_is_damaged_or_something_else_is_refused(saved: tuple[Path, Path]) -> None:
    file = saved[1] / STORED
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ArtifactError, match="damaged"):
        graphprune.load(file)
    file.write_bytes(pack({"model.onnx": b"no manifest"}))
    with pytest.raises(ArtifactError, match=MANIFEST):
        graphprune.load(file)
    file.write_bytes(pack({MANIFEST: b'{"format": 3}'}))
    with pytest.raises(ArtifactError, match="something else"):
        graphprune.load(file)
    with pytest.raises(ArtifactError, match="not a compressed artifact"):
        graphprune.load(saved[0] / "model.onnx")


def test_an_unknown_compression_is_an_error(result: Any, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="give 'zstd'"):
        result.save(tmp_path / "x", compress="gzip")
    assert not (tmp_path / "x").exists()


def test_without_the_library_the_extra_is_named(result: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(MissingExtraError, match=r"graphprune\[compress\]"):
        result.save(tmp_path / "x", compress="zstd")
    assert not (tmp_path / "x").exists()
