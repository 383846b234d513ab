"""EfficientNet-Lite0 with its ImageNet weights, compiled without loss, on photographs.

    python examples/demo.py

Prints what the network sees in each photograph before and after, then the report; saves the artifact and
opens it again in a fresh process, which knows neither the model nor its Python code.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import networks
import numpy as np
import torch

import graphprune


def main(out: Path, rounds: int) -> None:
    """Compile, compare, save to `out`, and check the artifact in another process."""
    model, photographs = networks.efficientnet_lite0(), networks.photographs()
    result = graphprune.optimize(
        model,
        photographs[:1],
        target="cpu",
        backend="onnxruntime",
        dynamic_batch=True,
        rounds=rounds,
        progress=lambda line: print(f"... {line}", file=sys.stderr),
    )
    with torch.no_grad():
        before = model(photographs)
    after = result(photographs)
    show_top5(before.softmax(-1), after.softmax(-1))
    print()
    print(result.report)

    directory = result.save(out, overwrite=True)
    answers = directory.with_name(f"{directory.name}-answers.npy")
    np.save(answers, after.numpy())
    sys.stdout.flush()
    subprocess.run([sys.executable, __file__, "--load", str(directory), str(answers)], check=True)


def show_top5(before: torch.Tensor, after: torch.Tensor) -> None:
    """The five likeliest classes of every photograph, with their probability before and after."""
    names = networks.imagenet_classes()
    for index, photograph in enumerate(networks.PHOTOGRAPHS):
        print(f"{photograph:<22}  before    after")
        for label in before[index].topk(5).indices.tolist():
            old, new = float(before[index, label]), float(after[index, label])
            print(f"  {names[label]:<20}  {old:6.2%}   {new:6.2%}")
    same = torch.equal(before.topk(5).indices, after.topk(5).indices)
    print(f"top five {'the same' if same else 'DIFFER'} in all {len(before)} photographs, "
          f"largest difference of a probability {float((before - after).abs().max()):.1e}")  # fmt: skip


def load(directory: Path, answers: Path) -> None:
    """What a deployment does: open the artifact and run it. Fails unless the answers are the same."""
    runner = graphprune.load(directory)
    found = runner(networks.photographs())
    difference = float((found - torch.from_numpy(np.load(answers))).abs().max())
    print(
        f"opened {directory} in a fresh process: largest difference from the answers above {difference:.1e}"
    )
    if difference > 1e-5:
        sys.exit("error: the saved artifact answers differently")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="directory of the artifact")
    parser.add_argument("--rounds", type=int, default=20, help="calls that are timed")
    parser.add_argument("--load", type=Path, nargs=2, metavar=("DIR", "ANSWERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        load(*options.load)
    else:
        main(options.out, options.rounds)
