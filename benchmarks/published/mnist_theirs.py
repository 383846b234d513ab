"""Their side of the MNIST comparison, in the interpreter that ``GRAPHPRUNE_TF`` names.

To make one::

    python3 -m venv build/tf
    build/tf/bin/pip install tensorflow tf_keras tensorflow-model-optimization
    export GRAPHPRUNE_TF=build/tf/bin/python
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

VARIABLE = "GRAPHPRUNE_TF"
SCRIPT = Path(__file__).parent / "tools" / "keras_mnist.py"
LIMIT = 3600  # seconds that training and converting may take


def interpreter() -> str | None:
    """The interpreter with TensorFlow; ``None`` where the variable is not set."""
    return os.environ.get(VARIABLE)


def train(data: Path, folder: Path, seed: int, baseline_epochs: int, epochs: int) -> dict[str, Any]:
    """What the script makes of one seed: ``rows`` (accuracy, bytes, zipped bytes, file) and ``versions``."""
    python = interpreter()
    if python is None:
        raise SystemExit(
            f"set {VARIABLE} to an interpreter that has TensorFlow; {__name__} says how to make one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    arguments = [str(data), str(folder), str(seed), str(baseline_epochs), str(epochs)]
    done = subprocess.run(
        [python, str(SCRIPT), "train", *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    if done.returncode:
        raise SystemExit(f"{SCRIPT.name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads((folder / "made.json").read_text())
    return found


def call(model: Path, data: Path, threads: int, repeat: int, count: int, chunk: int) -> Callable[[], Any]:
    """What is timed of a file of theirs: a line to its process, ``repeat`` runs there, a line back."""
    python = interpreter()
    assert python is not None
    arguments = [str(model), str(data), *map(str, (threads, repeat, count, chunk))]
    worker = subprocess.Popen(
        [python, str(SCRIPT), "serve", *arguments],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, bufsize=1,
    )  # fmt: skip
    assert worker.stdin is not None
    assert worker.stdout is not None
    sent, answered = worker.stdin, worker.stdout

    def answer() -> None:
        if not answered.readline():
            raise RuntimeError(f"the process of {model.name} ended")

    def run() -> None:
        sent.write("run\n")
        answer()

    answer()
    return run
