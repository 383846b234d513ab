"""ResNet-18 in int8 beside the figures of PyTorch's guide to static quantization, which its users know.

    python -m benchmarks.published.resnet18 [--threads 1 2] [--rounds 20] [--again]

The guide's are 44.7 to 11.2 MB (of 1024² bytes) and 3.2 times as fast as the same network in eager mode. The
network has random weights, so only size and time are measured; a batch of one, 224 pixels. The artifact is
the one of ``precision="int8"``, stored as it is and compressed, by each backend that is installed.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import graphprune
from benchmarks.backends.networks import Setup
from benchmarks.record import RESULTS, conditions, page, table
from graphprune.errors import BackendError
from graphprune.manifest import deployed
from graphprune.measure import Timing, isolated, ratio

FOLDER = Path(__file__).parents[2] / "build" / "published" / "resnet18"
SETUP = Setup("resnet18", 1)
BACKENDS = ("onnxruntime", "openvino")
EAGER, AGAIN = "eager", "eager, again"
MIB = 1 << 20
SIZE, SPEED = 11.2, 3.2
PAUSE = 0.02


def main() -> None:
    """See the module docstring."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--again", action="store_true", help="build artifacts that are there anew")
    arguments = parser.parse_args()
    built = {name: path for name in BACKENDS if (path := build(name, arguments.again)) is not None}
    calls: dict[str, Callable[[], Callable[[], Any]]] = {EAGER: eager, AGAIN: eager}
    timings = {}
    for threads in arguments.threads:
        calls |= {name: partial(opened, path, threads) for name, path in built.items()}
        timings[threads] = isolated(calls, rounds=arguments.rounds, threads=threads, pause=PAUSE)
    write(built, timings)


def build(backend: str, again: bool) -> Path | None:
    """The compressed int8 artifact of a backend; ``None`` where it is not installed."""
    place = FOLDER / backend
    if place.exists() and not again:
        return place
    try:
        result = graphprune.optimize(
            SETUP.model(), SETUP.inputs(), calibration=SETUP.calibration(), precision="int8", backend=backend,
            measure=False, threads=1,
        )  # fmt: skip
    except BackendError as error:
        print(f"{backend}: {error}", flush=True)
        return None
    return result.save(place, overwrite=True, compress="zstd")


def eager() -> Callable[[], Any]:
    """The network as it is."""
    return partial(SETUP.model(), *SETUP.inputs())


def opened(path: Path, threads: int) -> Callable[[], Any]:
    """An artifact on the same input."""
    return partial(graphprune.load(path, threads=threads), *SETUP.inputs())


def weights() -> int:
    """Bytes of the float network, saved as the guide saves it."""
    buffer = io.BytesIO()
    torch.save(SETUP.model().state_dict(), buffer)
    return buffer.tell()


def write(built: dict[str, Path], timings: dict[int, dict[str, Timing]]) -> None:
    """``results/resnet18.md`` and ``.json``."""
    original = weights() / MIB
    sizes = {}
    for name, path in built.items():
        manifest = graphprune.load(path).manifest
        sizes[name] = tuple(
            sum(e["bytes"] for e in f.values()) / MIB for f in (manifest["files"], deployed(manifest))
        )
    head = ["", "as it runs, MiB", f"stored, MiB (at most {SIZE})"]
    for threads in timings:
        head += [f"{threads} threads, ms", f"times as fast as eager (at least {SPEED})"]
    rows = []
    for name in (EAGER, AGAIN, *built):
        unpacked, stored = sizes.get(name, (original, original))
        row = [name, f"{unpacked:.1f}", f"{stored:.1f}"]
        for found in timings.values():
            row += [f"{found[name].median_ms:.2f}", str(ratio(found[EAGER], found[name]))]
        rows.append(row)
    facts = conditions(("torch", "torchvision", "onnxruntime", "openvino", "zstandard"))
    text = table(head, rows)
    plain = {
        "bytes": {name: {"unpacked": u, "stored": s} for name, (u, s) in sizes.items()},
        "original": original,
        "ms": {t: {name: list(one.samples) for name, one in found.items()} for t, found in timings.items()},
    }
    page(RESULTS / "resnet18.md", "published.resnet18", "ResNet-18 in int8", text, plain, facts)
    print(text)


if __name__ == "__main__":
    main()
