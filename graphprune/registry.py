"""Names to passes and backends, loaded when first named; others add theirs through entry points.

A plugin's ``pyproject.toml`` says ``[project.entry-points."graphprune.passes"]`` (or
``"graphprune.backends"``) with ``my-pass = "my_package.module:MyPass"``. Two things with one name are
an error, so nobody's pass is shadowed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from typing import Any

from .errors import RecipeError, described, suggestion


@dataclass
class Registry:
    """Lazy imports by name. ``builtin`` maps a name to ``"module:attribute"``."""

    kind: str
    group: str
    builtin: dict[str, str]

    @cached_property
    def entries(self) -> dict[str, str]:
        """Every name with the place it loads from, plugins included.

        Raises:
            RecipeError: two distributions (or a plugin and this package) claim one name.
        """
        found = dict(self.builtin)
        for point in entry_points(group=self.group):
            if found.get(point.name, point.value) != point.value:
                raise RecipeError(
                    f"two {self._plural} are called {point.name!r}: {found[point.name]} and {point.value}; "
                    "uninstall or rename one"
                )
            found[point.name] = point.value
        return dict(sorted(found.items()))

    @property
    def _plural(self) -> str:
        return "passes" if self.kind == "pass" else f"{self.kind}s"

    def load(self, name: str) -> Any:
        """What ``name`` stands for.

        Raises:
            RecipeError: nothing has that name (the nearest is suggested), or it does not import.
        """
        if name not in self.entries:
            raise RecipeError(
                f"unknown {self.kind} {name!r}{suggestion(name, self.entries)}; "
                f"known: {', '.join(self.entries)}"
            )
        module, _, attribute = self.entries[name].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except Exception as error:  # a plugin, or what it imports, may raise anything
            what = str(error) if isinstance(error, ImportError | AttributeError) else described(error)
            raise RecipeError(
                f"{self.kind} {name!r} does not load from {self.entries[name]}: {what}"
            ) from error


passes = Registry(
    "pass",
    "graphprune.passes",
    {
        "clean-up": "graphprune.passes.clean_up:CleanUp",
        "correct-bias": "graphprune.passes.correct_bias:CorrectBias",
        "early-exit": "graphprune.passes.early_exit:EarlyExit",
        "equalize": "graphprune.passes.equalize:Equalize",
        "fold-batch-norm": "graphprune.passes.fold_batch_norm:FoldBatchNorm",
        "fold-constants": "graphprune.passes.fold_constants:FoldConstants",
        "fold-parameters": "graphprune.passes.fold_parameters:FoldParameters",
        "half-precision": "graphprune.passes.half_precision:HalfPrecision",
        "mixed-precision": "graphprune.passes.mixed_precision:MixedPrecision",
        "prune-channels": "graphprune.passes.prune_channels:PruneChannels",
        "prune-heads": "graphprune.passes.prune_heads:PruneHeads",
        "prune-layers": "graphprune.passes.prune_layers:PruneLayers",
        "prune-weights": "graphprune.passes.prune_weights:PruneWeights",
        "quantize": "graphprune.passes.quantize:Quantize",
        "quantize-aware": "graphprune.passes.quantize.training:QuantizeAware",
        "quantize-dynamic": "graphprune.passes.quantize_dynamic:QuantizeDynamic",
        "quantize-weights": "graphprune.passes.quantize_weights:QuantizeWeights",
        "remove-dead-channels": "graphprune.passes.dead:RemoveDeadChannels",
        "remove-dead-heads": "graphprune.passes.remove_dead_heads:RemoveDeadHeads",
        "remove-dropout": "graphprune.passes.remove_dropout:RemoveDropout",
        "replace-relu6": "graphprune.passes.replace_relu6:ReplaceRelu6",
        "smooth-quant": "graphprune.passes.smooth_quant:SmoothQuant",
        "strip-masks": "graphprune.passes.strip_masks:StripMasks",
        "train": "graphprune.passes.train:Train",
        "repair": "graphprune.passes.repair:Repair",
    },
)

backends = Registry(
    "backend",
    "graphprune.backends",
    {
        "executorch": "graphprune.backends.executorch:ExecuTorch",
        "inductor": "graphprune.backends.inductor:Inductor",
        "onnxruntime": "graphprune.backends.onnxruntime:OnnxRuntime",
        "openvino": "graphprune.backends.openvino:OpenVino",
        "tvm": "graphprune.backends.tvm:Tvm",
    },
)
