"""torch-pruning (Fang et al., *DepGraph*, 2023), as its readme and its examples use it.

``BasePruner`` with a pruning ratio, found by bisection so that the budget is met; group importance by L2
or by Taylor expansion of the loss; one ratio for every layer (*uniform*), one ranking over all layers
(*global*), or one over layers of the same kind (*isomorphic*, Fang et al. 2024). The layer that gives the
outputs is ignored. For transformers it is what the library's own scripts do: fused projections are listed
with their numbers of heads, the attention's sizes are set anew afterwards, and either dimensions of every
head go or whole heads; *bottleneck* keeps the width of the residual stream. CREPE's last convolution is
ignored, too: it is flattened with its channels innermost, and the classifier would lose other columns than
those of the removed channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks.pruning.peers import Case, Replay, Variant

CONVOLUTIONAL = frozenset(
    {"resnet20", "vgg", "mobilenetv2", "crepe-tiny", "crepe-full", "efficientnet-lite0"}
)


def variants() -> list[Variant]:
    """Every variant, the ones for transformers among them."""
    found = []
    for importance in ("L2", "Taylor"):
        for scope in ("uniform", "global", "isomorphic"):
            found.append(_variant(f"{importance} {scope}", CONVOLUTIONAL, importance, scope, {}))
        on = frozenset({"vit"} if importance == "Taylor" else {"vit", "minilm-l6"})
        for scope in ("uniform", "global"):
            for heads in (False, True):
                label = f"{importance} {scope}, bottleneck, {'heads' if heads else 'head dimensions'}"
                found.append(_variant(label, on, importance, scope, {"heads": heads, "bottleneck": True}))
        found.append(_variant(f"{importance} uniform", frozenset({"vit"}), importance, "uniform", {}))
    return found


def _variant(label: str, on: frozenset[str], importance: str, scope: str, options: Any) -> Variant:
    def prune(case: Case, ratio: float) -> tuple[nn.Module, Replay]:
        return _prune(case, ratio, importance, scope, **options)

    return Variant("torch-pruning", label, on, prune)


def _prune(
    case: Case, ratio: float, importance: str, scope: str, heads: bool = False, bottleneck: bool = False
) -> tuple[nn.Module, Replay]:
    import torch_pruning as tp

    model = case.copy()
    counts = follow_heads(model)
    score = tp.importance.GroupMagnitudeImportance(p=2)
    if importance == "Taylor":
        score = tp.importance.GroupTaylorImportance()
    pruner = tp.pruner.BasePruner(
        model,
        _inputs(case),
        importance=score,
        global_pruning=scope != "uniform",
        isomorphic=scope == "isomorphic",
        pruning_ratio=ratio,
        ignored_layers=_ignored(case.name, model, bottleneck),
        num_heads=counts,
        prune_num_heads=heads,
        prune_head_dims=not heads,
        head_pruning_ratio=ratio if heads else 0.0,
    )
    pruner.step()
    _finish(model, pruner.num_heads)
    history = list(pruner.pruning_history())

    def replay(other: nn.Module) -> None:
        places = [p.detach().clone() for p in other.parameters()]
        follow_heads(other)
        for own, fresh in zip(other.parameters(), case.model.parameters(), strict=True):
            own.data = fresh.detach().clone()  # to be traced with
        graph = tp.DependencyGraph().build_dependency(other, _inputs(case))
        for own, place in zip(other.parameters(), places, strict=True):
            own.data = place
        graph.load_pruning_history(history)

    model.zero_grad()
    return model.eval(), replay


def _inputs(case: Case) -> Any:
    example = case.split.example
    if len(example) == 1:
        return example[0]
    return dict(zip(("input_ids", "attention_mask"), example, strict=True))


def follow_heads(model: nn.Module) -> dict[nn.Module, int]:
    """Make attention follow its projections, and list those with their numbers of heads."""
    counts: dict[nn.Module, int] = {}
    module: Any
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.forward = _attend.__get__(module)
            counts[module.qkv] = module.num_heads
        elif hasattr(module, "query"):
            for layer in (module.query, module.key, module.value):
                counts[layer] = module.num_attention_heads
    return counts


def _attend(self: Any, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """timm's attention without the assumption that its inner width is its outer one."""
    batch, tokens, _width = x.shape
    fused = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
    query, key, value = fused.unbind(0)
    y = F.scaled_dot_product_attention(query, key, value)
    return self.proj(y.transpose(1, 2).reshape(batch, tokens, -1))  # type: ignore[no-any-return]


def _finish(model: nn.Module, counts: dict[nn.Module, int]) -> None:
    """Set the sizes that forward functions read from attributes, as the readme asks for."""
    module: Any
    for module in model.modules():
        if hasattr(module, "qkv"):
            module.num_heads = counts[module.qkv]
            module.head_dim = module.qkv.out_features // (3 * module.num_heads)
        elif hasattr(module, "query"):
            module.num_attention_heads = counts[module.query]
            module.attention_head_size = module.query.out_features // module.num_attention_heads
            module.all_head_size = module.query.out_features
        elif hasattr(module, "classifier") and hasattr(module, "in_features"):
            module.in_features = module.classifier.in_features


def _ignored(name: str, model: Any, bottleneck: bool) -> list[nn.Module]:
    """Layers whose outputs stay: the network's own, and those of the residual stream in a bottleneck."""
    if name == "minilm-l6":
        layers = [model.bert.embeddings]
        for layer in model.bert.encoder.layer:
            layers += [layer.attention.output, layer.output]
        return layers
    last: list[nn.Module] = [[m for m in model.modules() if isinstance(m, nn.Linear)][-1]]
    if name.startswith("crepe"):
        last.append(model.crepe.conv6)
    if bottleneck:
        last.append(model.patch_embed.proj)
        for block in model.blocks:
            last += [block.attn.proj, block.mlp.fc2]
    return last
