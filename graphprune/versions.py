"""Which version of a runtime is here, and whether an artifact was built with a newer one.

Formats of runtimes grow: an older runtime may refuse a newer file, or read it all the same. Only the first
two numbers of a version count, since formats do not change with the third.

>>> later("2.14.0+cpu", "2.13.1"), later("2.13.2", "2.13.1"), later("1.9", "1.10")
(True, False, False)
>>> newer("onnxruntime", {"onnxruntime": "1.0.0"})
''
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

# What an artifact of each backend is opened with.
_RUNTIMES = {
    "executorch": "executorch",
    "inductor": "torch",
    "onnxruntime": "onnxruntime",
    "openvino": "openvino",
    "tvm": "apache-tvm",
}
# Packages that bring a runtime's module under another name.
_OTHERWISE = {"onnxruntime": ("onnxruntime-openvino", "onnxruntime-gpu", "onnxruntime-directml")}

# Machine code that is linked against its runtime: with an older one it would end the process, not raise.
LINKED = frozenset({"inductor"})


def installed(package: str) -> str:
    """The version of ``package`` that is here, or nothing."""
    for name in (package, *_OTHERWISE.get(package, ())):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return ""


def later(written: str, here: str) -> bool:
    """Whether the first version's first two numbers are above the second's."""
    left, right = (tuple(map(int, re.findall(r"\d+", text)[:2])) for text in (written, here))
    return left > right


def newer(backend: str, versions: Mapping[str, str]) -> str:
    """What an artifact was built with, where that is newer than what is here, else nothing.

    Args:
        backend: the backend's name.
        versions: package → version when it was built.
    """
    package = _RUNTIMES.get(backend)
    if package is None:
        return ""
    written, here = str(versions.get(package, "")), installed(package)
    if not here or not later(written, here):
        return ""
    return f"it was built with {package} {written}, and {here} is here: upgrade {package}, or build it again"
