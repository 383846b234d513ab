"""Which attributes of a module hold sizes that a plan changed, and what they become.

Two sources say so. torch's own layers name their sizes, and follow from their weights and operators
(:func:`update_layer`). Any other module is asked through its operators: every result that has another
shape now, and every argument that was derived anew, is a pair *old size → new size*
(:class:`Evidence`). An integer attribute with that old value is a :class:`Slot`: a place with one or more
values it may have. Nothing is believed here: the caller runs the module and compares.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..graph import Graph
from ..plans.provenance import Operator, Provenance, operator

aten = torch.ops.aten

# Names that say "a number of channels, heads or units": such an attribute is set where its size is clear.
_SIZE_NAME = re.compile(
    r"head|dim|hidden|size|channel|width|feature|embed|group|inter|inner|plane|rank|unit|filter|split|"
    r"chunk|model|^n[fx]$|^c\d*$|^ch$|_ch$|^(in|out|mid)_?c$"
)
# Names that say something else, whatever number they hold.
_OTHER_NAME = re.compile(
    r"vocab|kernel|patch|window|image|img|position|layer|depth|stride|padding|dilation|batch|seq|_id$|"
    r"token|stage|block_size|num_classes|num_labels|shift|grid|reduction_ratio|pool"
)


@dataclass
class Evidence:
    """What a module's operators say about sizes.

    Attributes:
        arguments: old → new sizes of arguments that were derived anew.
        shapes: old → new sizes of results and parameters, unchanged ones (n → n) among them.
        lists: old → new lists of sizes (split sections).
        nodes: the operators of the module in the smaller graph.
    """

    arguments: dict[int, set[int]] = field(default_factory=dict)
    shapes: dict[int, set[int]] = field(default_factory=dict)
    lists: dict[tuple[int, ...], set[tuple[int, ...]]] = field(default_factory=dict)
    nodes: list[fx.Node] = field(default_factory=list)

    def became(self, old: int) -> list[int]:
        """The sizes an old one may have now, those named in arguments first."""
        changed = sorted(self.arguments.get(old, ()))
        return changed + sorted(self.shapes.get(old, set()) - {*changed, old}, reverse=True)

    def stays(self, old: int) -> bool:
        """Whether something of that size kept it."""
        return old in self.shapes.get(old, ())


@dataclass
class Slot:
    """A place that holds a size: attribute ``name`` of ``holder``, and the values it may take, best first."""

    holder: Any
    name: str
    options: list[Any]

    def set(self, choice: int) -> None:
        """Give the attribute one of its options."""
        setattr(self.holder, self.name, self.options[choice])


def gather(graph: Graph, before: Provenance) -> dict[str, Evidence]:
    """Module path → what its operators and parameters say about sizes."""
    found: dict[str, Evidence] = {}
    for node in graph.fx.nodes:
        was = before.operators.get(node.name)
        path = node.meta.get("module")
        if node.op != "call_function" or was is None or path is None:
            continue
        evidence = found.setdefault(path.split("@")[0], Evidence())
        evidence.nodes.append(node)
        now = operator(node)
        for old, new in changed_arguments(was, now):
            if isinstance(old, int):
                evidence.arguments.setdefault(old, set()).add(new)
            else:
                evidence.lists.setdefault(old, set()).add(new)
        for ours, theirs in zip(was.shapes, now.shapes, strict=False):
            _pair(evidence, ours, theirs)
    for name, shape in before.shapes.items():
        owner = name.rpartition(".")[0]
        for path in {owner, owner.rpartition(".")[0]}:
            if path in found and name in graph.tensors:
                _pair(found[path], shape, tuple(graph.tensors[name].shape))
    return found


def _pair(evidence: Evidence, old: tuple[Any, ...], new: tuple[Any, ...]) -> None:
    for ours, theirs in zip(old, new, strict=False):
        if isinstance(ours, int) and isinstance(theirs, int):
            evidence.shapes.setdefault(ours, set()).add(theirs)


def changed_arguments(was: Operator, now: Operator) -> Iterator[tuple[Any, Any]]:
    """Sizes and lists of sizes among an operator's arguments that are others now, as (old, new)."""
    for old, new in zip(was.arguments, now.arguments, strict=False):
        if _is_size(old) and _is_size(new) and old != new:
            yield old, new
        elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)) and list(old) != list(new):
            if all(map(_is_size, (*old, *new))):
                yield tuple(old), tuple(new)
            for ours, theirs in zip(old, new, strict=False):
                if _is_size(ours) and _is_size(theirs) and ours != theirs:
                    yield ours, theirs


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


# ---- torch's own layers ---------------------------------------------------------------------------


def update_layer(module: nn.Module, evidence: Evidence) -> bool:
    """Set the size attributes of one of torch's layers; False for any other module."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return _convolution(module, evidence)
    if isinstance(module, nn.modules.rnn.RNNBase):
        return _recurrent(module)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, evidence)
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = module.weight.shape
    elif isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.num_embeddings, module.embedding_dim = module.weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        for node in evidence.nodes:
            if node.target in (aten.batch_norm.default, aten.instance_norm.default):
                module.num_features = int(node.meta["val"].shape[1])
        if isinstance(weight, torch.Tensor):
            module.num_features = weight.shape[0]
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        for node in evidence.nodes:
            if node.target in (aten.layer_norm.default, aten.rms_norm.default):
                module.normalized_shape = tuple(node.args[1])  # type: ignore[arg-type]
    elif isinstance(module, nn.GroupNorm):
        for node in evidence.nodes:
            if node.target is aten.group_norm.default:
                module.num_groups = int(node.args[1])  # type: ignore[arg-type]
                module.num_channels = int(node.meta["val"].shape[1])
    elif isinstance(module, nn.PReLU):
        module.num_parameters = module.weight.shape[0]
    elif isinstance(module, nn.ChannelShuffle):
        for node in evidence.nodes:
            if node.target in (aten.channel_shuffle.default, aten.native_channel_shuffle.default):
                module.groups = int(node.args[1])  # type: ignore[arg-type]
    else:
        return False
    return True


def _convolution(module: Any, evidence: Evidence) -> bool:
    for node in evidence.nodes:
        name = getattr(getattr(node.target, "_schema", None), "name", "")
        if name.startswith("aten::conv") and node.args[1].meta["val"].dim() == module.weight.dim():  # type: ignore[union-attr]
            index = 8 if len(node.args) > 8 else 6
            given = node.args[index] if len(node.args) > index else 1
            module.groups = int(given)  # type: ignore[arg-type]
    first, second = module.weight.shape[:2]
    if module.transposed:
        module.in_channels, module.out_channels = first, second * module.groups
    else:
        module.out_channels, module.in_channels = first, second * module.groups
    return True


def _recurrent(module: Any) -> bool:
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    module.hidden_size = module.weight_ih_l0.shape[0] // gates
    module.input_size = module.weight_ih_l0.shape[1]
    if module.proj_size:
        module.proj_size = module.weight_hr_l0.shape[0]
    module.flatten_parameters()
    return True


def _attention(module: Any, evidence: Evidence) -> bool:
    stream = module.out_proj.weight.shape[0]
    module.out_proj.out_features, module.out_proj.in_features = module.out_proj.weight.shape
    heads, width = module.num_heads, module.head_dim
    module.embed_dim = stream
    for count in (heads, *evidence.became(heads)):
        for dim in (width, *evidence.became(width)):
            if count * dim == module.out_proj.in_features:
                module.num_heads, module.head_dim = count, dim
    if module._qkv_same_embed_dim:
        module.kdim = module.vdim = stream
    else:
        module.kdim, module.vdim = module.k_proj_weight.shape[1], module.v_proj_weight.shape[1]
    return True


# ---- any other module -----------------------------------------------------------------------------

_INTERNAL = frozenset(vars(nn.Module()))


def slots(module: nn.Module, evidence: Evidence) -> list[Slot]:
    """The attributes of a module, and of configurations it holds, that may hold a size that changed.

    A configuration is copied first: others may share it.
    """
    found = list(_slots_of(module, vars(module), evidence))
    for name, value in list(vars(module).items()):
        if name in _INTERNAL or not _is_configuration(name, value):
            continue
        inner = list(_slots_of(value, vars(value), evidence))
        if inner:
            own = copy.copy(value)
            setattr(module, name, own)
            found += [Slot(own, s.name, s.options) for s in inner]
    return found


def _slots_of(holder: Any, values: dict[str, Any], evidence: Evidence) -> Iterator[Slot]:
    for name, value in list(values.items()):
        if name in _INTERNAL or _OTHER_NAME.search(name.lower()):
            continue
        options = _options(name, value, evidence)
        if options != [value] and options:
            yield Slot(holder, name, options)


def _options(name: str, value: Any, evidence: Evidence) -> list[Any]:
    if _is_size(value):
        new = evidence.became(value)
        named = bool(_SIZE_NAME.search(name.lower()))
        clear = named and len(new) == 1 and (not evidence.stays(value) or value in evidence.arguments)
        return [*new, value] if clear else [value, *new]
    if isinstance(value, (list, tuple)) and value and all(map(_is_size, value)):
        whole = [_like(value, v) for v in sorted(evidence.lists.get(tuple(value), ()))]
        each = [evidence.became(v) for v in value]
        mapped = _like(value, [new[0] if new else old for new, old in zip(each, value, strict=True)])
        return [*whole, value, *([mapped] if mapped != value and mapped not in whole else [])]
    return []


def _like(value: Any, items: Any) -> Any:
    return torch.Size(items) if isinstance(value, torch.Size) else type(value)(items)


def _is_configuration(name: str, value: Any) -> bool:
    if (
        isinstance(value, (nn.Module, torch.Tensor, type))
        or not hasattr(value, "__dict__")
        or callable(value)
    ):
        return False
    return type(value).__name__.lower().endswith(("config", "args", "options", "settings")) or name in (
        "config", "cfg", "args", "hparams",
    )  # fmt: skip
