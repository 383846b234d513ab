"""Residual blocks left out at random while a network trains, so that it can lose some later.

In training every block ``f`` of ``y = x + f(x)`` is left out of a forward pass with probability ``rate``, for
the whole batch, and nothing is rescaled; in evaluation all are there (Fan, Grave and Joulin, *Reducing
Transformer Depth on Demand with Structured Dropout*, ICLR 2020; Huang et al., *Deep Networks with Stochastic
Depth*, ECCV 2016). The blocks are those that ``prune-layers`` could take. A block that is left out is still
computed, and multiplied with 0: this changes what is learnt, not how long it takes. The draws are torch's,
as those of dropout, and ``torch.manual_seed`` sets them.

Only what the module runs is changed, between ``attach`` and ``detach`` or within ``with``; its graph
(``module.captured``) and its ``state_dict`` never know.

>>> import torch, graphprune
>>> layer = torch.nn.TransformerEncoderLayer(12, 4, 16, batch_first=True, norm_first=True)
>>> module = graphprune.trace(layer, torch.zeros(2, 5, 12)).module
>>> with StochasticDepth(module, 0.5) as depth:
...     _ = torch.manual_seed(1)
...     _ = module.train()(torch.zeros(2, 5, 12))
...     print(depth.blocks, depth.dropped)
('add', 'add_1') ('add_1',)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..errors import InputError
from ..module import TracedModule, require_traced

if TYPE_CHECKING:
    from graphprune.passes.residual import Block

aten = torch.ops.aten
GATES = "stochastic_depth_gates"


class StochasticDepth:
    """Leave residual blocks out at random.

    Attributes:
        module, rate: as given.
        dropped: the blocks that the last forward pass left out, by the name of their sum (or layer).
    """

    def __init__(
        self,
        module: TracedModule,
        rate: float = 0.1,
        *,
        whole: bool = False,
        ignored: tuple[str, ...] = (),
    ):
        """Find the blocks; nothing is left out before :meth:`attach`.

        Args:
            module: a traced network.
            rate: probability with which a block is left out, 0 to below 1.
            whole: leave out all blocks of a numbered module together (attention and feed-forward).
            ignored: blocks that are never left out, by the name of their sum, or the path of its module or
                a glob.

        Raises:
            InputError: the rate is out of range, a name matches nothing, or there is no residual block.
        """
        require_traced(module)
        if not 0 <= rate < 1:
            raise InputError(f"rate is a probability, 0 to below 1, got {rate}")
        self.module, self.rate = module, rate
        self._whole, self._ignored = whole, ignored
        self.dropped: tuple[str, ...] = ()
        self._gated: fx.Graph | None = None
        self._handle: Any = None
        self._groups = self._found()
        if not self._groups:
            raise InputError("the network has no residual block whose shortcut is an identity")

    @property
    def blocks(self) -> tuple[str, ...]:
        """The blocks that may be left out, by the name of their sum (with ``whole`` of their layer)."""
        return tuple(self._groups)

    def attach(self) -> StochasticDepth:
        """Put the draws before every forward pass in training mode."""
        if self._handle is None:
            if hasattr(self.module, GATES):
                raise InputError("another StochasticDepth is attached to this module; detach it first")
            self._insert()
            self._handle = self.module.register_forward_pre_hook(self._draw)
        return self

    def detach(self) -> None:
        """Take it off: the module runs what it ran before."""
        if self._handle is None:
            return
        self._handle.remove()
        self._handle = None
        if self.module.graph is self._gated:
            for node in list(self.module.graph.find_nodes(op="call_function", target=aten.mul.Tensor)):
                if node.meta.get(GATES):
                    node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            self.module.graph.eliminate_dead_code(lambda node: not node.meta.get(GATES))
            self.module.recompile()
        self._gated = None
        delattr(self.module, GATES)

    def __enter__(self) -> StochasticDepth:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    def _draw(self, module: torch.nn.Module, _: Any) -> None:
        """Before a forward pass: which blocks are there."""
        if self.module.graph is not self._gated:  # it took on another graph since
            self._groups = self._found()
            delattr(self.module, GATES)
            self._insert()
        there = torch.ones(len(self._groups))
        if module.training:
            there = (torch.rand(len(self._groups)) >= self.rate).float()
        self.dropped = tuple(n for n, gate in zip(self._groups, there.tolist(), strict=True) if not gate)
        # A new tensor each time: the one before may be part of a loss that is still to be differentiated.
        self.module._buffers[GATES] = there.to(self._device)

    @property
    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))

    def _found(self) -> dict[str, list[Block]]:
        from graphprune.passes.prune_layers import matches
        from graphprune.passes.residual import residual_blocks

        blocks = residual_blocks(self.module.captured)
        for pattern in self._ignored:
            if not any(matches(block, pattern) for block in blocks):
                raise InputError(f"ignored name {pattern!r} matches no residual block's sum or module")
        groups: dict[str, list[Block]] = {}
        for block in blocks:
            if not any(matches(block, pattern) for pattern in self._ignored):
                groups.setdefault(block.layer if self._whole else block.add, []).append(block)
        return groups

    def _insert(self) -> None:
        """Multiply the result of every block with its gate, in what the module runs."""
        graph = self.module.graph
        own = {node.name: node for node in graph.nodes}
        self.module.register_buffer(
            GATES, torch.ones(len(self._groups), device=self._device), persistent=False
        )
        for place, blocks in enumerate(self._groups.values()):
            for block in blocks:
                add, shortcut = own[block.add], own[block.shortcut]
                side = 1 if add.args[0] is shortcut else 0
                result = add.args[side]
                with graph.inserting_before(add):
                    gates = graph.get_attr(GATES)
                    gate = graph.call_function(aten.select.int, (gates, 0, place))
                    gated = graph.call_function(aten.mul.Tensor, (result, gate))
                for node in (gates, gate, gated):
                    node.meta[GATES] = True
                add.update_arg(side, gated)
        self._gated = graph
        self.module.recompile()
