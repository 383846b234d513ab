"""The exporter's table of translations: built once, the same as torch's own, and nobody else's."""

from __future__ import annotations

import subprocess
import sys

import onnx
import pytest
import torch
from graphprune.backends import onnx_translations
from graphprune.backends.onnx_translations import shared
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

pytestmark = pytest.mark.filterwarnings("default")  # torch's exporter warns of torch's own code
MODEL, X = nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.LayerNorm(3)).eval(), torch.randn(2, 4)


def exported(**options: object) -> bytes:
    program = torch.export.export(MODEL, (X,), strict=False)
    done = torch.onnx.export(program, dynamo=True, verbose=False, **options)  # type: ignore[call-overload]
    return bytes(done.model_proto.SerializeToString())


def test_it_is_built_once_and_gives_the_same_files(monkeypatch) -> None:
    monkeypatch.setattr(onnx_translations, "_tables", {})
    built = []
    own = ONNXRegistry.__dict__["from_torchlib"]

    def counted(cls, opset_version=18):
        built.append(opset_version)
        return own.__func__(cls, opset_version)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    alone = exported()
    with shared():
        assert exported() == exported() == alone
    assert len(built) == 2, "once by torch itself, once for all that share"
    exported()
    assert len(built) == 3, "behind it torch builds its own again"


LATER = """
import torch, graphprune
model, x = torch.nn.Sequential(torch.nn.Linear(4, 3)).eval(), torch.ones(2, 4)
before = "quantized_decomposed::quantize_per_tensor" in torch._C._dispatch_get_all_op_names()
for precision in (None, "int8"):
    result = graphprune.optimize(
        model, x, backend="onnxruntime", precision=precision, calibration=[x], measure=False
    )
print(before, result.report.audit.integers)
"""


def test_operators_that_came_after_the_first_export_are_translated() -> None:
    done = subprocess.run([sys.executable, "-c", LATER], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "1.0"], done.stderr


def test_translations_of_one_export_stay_its_own() -> None:
    calls = []

    def gelu(x, approximate: str = "none"):
        from onnxscript import opset18

        calls.append(approximate)
        return opset18.Identity(x)

    with shared():
        mine = onnx.load_from_string(exported(custom_translation_table={torch.ops.aten.gelu.default: gelu}))
        other = onnx.load_from_string(exported())
    assert calls
    assert "Gelu" not in {node.op_type for node in mine.graph.node}
    assert other.graph.node != mine.graph.node
    assert {node.op_type for node in other.graph.node} & {"Gelu", "Erf"}


def test_an_error_leaves_torch_as_it_was() -> None:
    own = ONNXRegistry.__dict__["from_torchlib"]
    with pytest.raises(KeyError), shared():
        raise KeyError("any")
    assert ONNXRegistry.__dict__["from_torchlib"] is own


def test_another_torch_goes_its_own_way(monkeypatch) -> None:
    monkeypatch.delattr(ONNXRegistry, "from_torchlib")
    with shared():
        assert "from_torchlib" not in vars(ONNXRegistry)
