"""CREPE tiny, a pitch estimator, with accuracy on labelled data before and after.

    python examples/pitch.py

Tones of known pitch are synthesised, so every frame has a true answer: raw pitch accuracy is the fraction of
frames within half a semitone of it. The artifact is built for ARM, where it is not measured; an ONNX file
runs on this host for its answers.
"""

from __future__ import annotations

import argparse

import networks
import torch

import graphprune


def main(frames: int) -> None:
    """Compile for ARM, then score original and artifact on `frames` tones."""
    model = networks.crepe_tiny()
    sound, hertz = networks.tones(frames, seed=1)
    result = graphprune.optimize(model, sound[:1], target="arm", dynamic_batch=True)
    with torch.no_grad():
        before = model(sound)
    after = result(sound)

    print(result.report)
    print()
    print(f"{'':<10}{'accuracy':>10}{'pitch of the first three tones, Hz':>40}")
    print(f"{'truth':<10}{'':>10}{_three(hertz):>40}")
    for name, probabilities in (("original", before), ("artifact", after)):
        accuracy = networks.pitch_accuracy(probabilities, hertz)
        print(f"{name:<10}{accuracy:>10.2%}{_three(networks.pitch(probabilities)):>40}")
    print(f"largest difference of a probability {float((before - after).abs().max()):.1e}")


def _three(hertz: torch.Tensor) -> str:
    return "  ".join(f"{value:8.2f}" for value in hertz[:3].tolist())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--frames", type=int, default=256, help="tones to score")
    main(parser.parse_args().frames)
