"""Operator schemas of torchvision, for an installation whose compiled operators do not load.

`import torchvision` registers shape functions for its own operators and fails with "operator
torchvision::nms does not exist" where the compiled extension cannot be loaded: the wheel is linked
against CUDA libraries that a CPU build of torch does not ship. None of the networks of the zoo calls
these operators; they only have to be *known*. `declare` makes them known and is harmless otherwise:

>>> declare() in (True, False)
True
>>> declare()  # the second time there is nothing left to do
False
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_POOLED = "float spatial_scale, SymInt pooled_height, SymInt pooled_width"
_SIZE = "SymInt batch_size, SymInt channels, SymInt height, SymInt width"
_WINDOW = (
    "SymInt stride_h, SymInt stride_w, SymInt pad_h, SymInt pad_w, SymInt dilation_h, SymInt dilation_w, "
    "SymInt groups, SymInt offset_groups, bool use_mask"
)
_DEFORM = "Tensor input, Tensor weight, Tensor offset, Tensor mask, Tensor bias"

SCHEMAS: tuple[str, ...] = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    f"roi_align(Tensor input, Tensor rois, {_POOLED}, int sampling_ratio, bool aligned) -> Tensor",
    f"_roi_align_backward(Tensor grad, Tensor rois, {_POOLED}, {_SIZE}, int sampling_ratio, bool aligned) "
    "-> Tensor",
    f"roi_pool(Tensor input, Tensor rois, {_POOLED}) -> (Tensor, Tensor)",
    f"_roi_pool_backward(Tensor grad, Tensor rois, Tensor argmax, {_POOLED}, {_SIZE}) -> Tensor",
    f"ps_roi_align(Tensor input, Tensor rois, {_POOLED}, int sampling_ratio) -> (Tensor, Tensor)",
    f"_ps_roi_align_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOLED}, "
    f"int sampling_ratio, {_SIZE}) -> Tensor",
    f"ps_roi_pool(Tensor input, Tensor rois, {_POOLED}) -> (Tensor, Tensor)",
    f"_ps_roi_pool_backward(Tensor grad, Tensor rois, Tensor channel_mapping, {_POOLED}, {_SIZE}) -> Tensor",
    f"deform_conv2d({_DEFORM}, {_WINDOW}) -> Tensor",
    f"_deform_conv2d_backward(Tensor grad, {_DEFORM}, {_WINDOW}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)

# A Library takes its operators with it when it is collected, so it lives as long as the module.
_LIBRARIES: list[torch.library.Library] = []


def declare() -> bool:
    """Declare the schemas, unless torchvision is absent, its operators load, or it was done before.

    Returns whether anything was declared. Must run before the first `import torchvision`.
    """
    if _LIBRARIES or not _installed() or _known() or _compiled_operators_load():
        return False
    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in SCHEMAS:
        library.define(schema)
    _LIBRARIES.append(library)
    return True


def _installed() -> bool:
    return importlib.util.find_spec("torchvision") is not None


def _known() -> bool:
    return hasattr(torch.ops.torchvision, "nms")


def _compiled_operators_load() -> bool:
    """Load the extension the way torchvision itself will; a second load of the same file does nothing."""
    spec = importlib.util.find_spec("torchvision")
    folders = (spec.submodule_search_locations or []) if spec is not None else []
    for folder in folders:
        for library in sorted(Path(folder).glob("_C*.so")) + sorted(Path(folder).glob("_C*.pyd")):
            try:
                torch.ops.load_library(str(library))
            except OSError:
                continue
            return True
    return False
