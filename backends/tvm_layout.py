"""Rewrites a Relax function so that convolutions, linears and what stands between them work on blocked
channels.

Every convolution and linear with constant weights becomes a call of a tensor expression of
:mod:`graphprune.backends.tvm_operators`, its weights packed into a constant. Elementwise operators, pools and
concatenations stay in the blocked form, and only what has no such form (a flatten, an attention) reads
``[n, c, h, w]`` again; packing and unpacking stand at these edges alone. Which operator is fused into which
is decided later, by Relax.

A channel that only fills the last block holds some finite number: its weights are zero in whatever sums over
channels, and unpacking leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax

from . import tvm_operators as operators
from .tvm_constants import Constants
from .tvm_packing import lanes, pack_dense, pack_depthwise, pack_filters, per_channel
from .tvm_tiles import padded_extent

FUSABLE = {"op_pattern": 4}  # Relax's kOutEWiseFusable: elementwise operators behind it become part of it

# What gives finite numbers for those in the channels that only fill a block, so nothing has to mask them.
_UNARY = frozenset({
    "relax.nn.relu", "relax.clip", "relax.sigmoid", "relax.tanh", "relax.nn.silu", "relax.nn.gelu",
    "relax.nn.gelu_tanh", "relax.negative", "relax.abs", "relax.erf", "relax.nn.leakyrelu", "relax.square",
})  # fmt: skip
_BINARY = frozenset({
    "relax.add", "relax.subtract", "relax.multiply", "relax.divide", "relax.maximum", "relax.minimum",
})  # fmt: skip


def blocked(module: tvm.IRModule, v: int, tile: int) -> tvm.IRModule:
    """``main`` of ``module`` in the blocked layout.

    Args:
        v: channels in a block.
        tile: how many positions the registers hold sums of; awkward sizes are computed in multiples.
    """
    function = module["main"]
    blocks = function.body.blocks
    if not all(isinstance(block, relax.DataflowBlock) for block in blocks):
        return module  # control flow: nothing here is sure to be computed
    made = _Rewriter(v, tile).run(function)
    others = {var: f for var, f in module.functions.items() if var.name_hint != "main"}
    made.update(tvm.IRModule(others))
    return made


class _Rewriter:
    """One walk over the bindings, in order.

    Attributes:
        plain: old variable → its value in the new function, as it was.
        packed: old variable → the same in blocks; either is made of the other when first needed.
    """

    def __init__(self, v: int, tile: int):
        self.v, self.tile = v, tile
        self.builder = relax.BlockBuilder()
        self.constants = Constants()
        self.plain: dict[Any, Any] = {}
        self.packed: dict[Any, Any] = {}
        self.rules: dict[str, Callable[[Any, Any], bool]] = {
            "relax.nn.conv2d": self._convolution, "relax.matmul": self._linear,
            "relax.nn.max_pool2d": self._pool, "relax.nn.avg_pool2d": self._pool,
            "relax.nn.adaptive_avg_pool2d": self._global_average, "relax.mean": self._mean,
            "relax.concat": self._concat, "relax.take": self._take,
        }  # fmt: skip
        self.rules |= dict.fromkeys(_UNARY, self._elementwise) | dict.fromkeys(_BINARY, self._elementwise)

    def run(self, function: Any) -> tvm.IRModule:
        params = [
            relax.Var(p.name_hint if hasattr(p, "name_hint") else p.name, p.ty) for p in function.params
        ]
        self.plain.update(zip(function.params, params, strict=True))
        with self.builder.function("main", params):
            with self.builder.dataflow():
                for block in function.body.blocks:
                    for binding in block.bindings:
                        self._bind(binding.var, binding.value)
                result = self.builder.emit_output(self._new(function.body.body))
            self.builder.emit_func_output(result)
        return self.builder.get()

    def _bind(self, var: Any, value: Any) -> None:
        if self.constants.learn(var, value):
            return
        if isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.Op):
            rule = self.rules.get(value.op.name)
            if rule is not None and _static(var) and rule(var, value):
                return
        self.plain[var] = self.builder.emit(self._new(value))

    # -- values -----------------------------------------------------------------------------------------

    def _new(self, value: Any) -> Any:
        """An expression with the variables of the new function."""
        if isinstance(value, relax.Var):
            return self._plain(value)
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._new(field) for field in value.fields])
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self._new(value.tuple_value), value.index)
        if isinstance(value, relax.Call):
            return relax.Call(value.op, [self._new(a) for a in value.args], value.attrs, value.ty_args)
        return value

    def _plain(self, var: Any) -> Any:
        if var not in self.plain:
            known = self.constants.get(var)
            if known is not None:
                self.plain[var] = relax.const(known)
            else:
                channels = _shape(var)[1]
                self.plain[var] = self._call(operators.unpack, self.packed[var], channels, name="unpack")
        return self.plain[var]

    def _blocks(self, var: Any) -> Any:
        if var not in self.packed:
            self.packed[var] = self._call(operators.pack, self._plain(var), self.v, name="pack")
        return self.packed[var]

    def _call(self, expression: Callable[..., Any], *args: Any, name: str, fusable: bool = False) -> Any:
        options: dict[str, Any] = {"primfunc_name_hint": name}
        if fusable:
            options["primfunc_attrs"] = FUSABLE
        return self.builder.emit_te(expression, *args, **options)

    # -- operators --------------------------------------------------------------------------------------

    def _convolution(self, var: Any, call: Any) -> bool:
        weight = self.constants.get(call.args[1])
        attrs = call.attrs
        usual = (str(attrs.data_layout), str(attrs.kernel_layout)) == ("NCHW", "OIHW")
        if weight is None or not usual or weight.dtype != np.float32 or len(_shape(var)) != 4:
            return False
        source, groups = call.args[0], int(attrs.groups)
        strides, padding, dilation = _ints(attrs.strides), _ints(attrs.padding), _ints(attrs.dilation)
        channels, columns = _shape(source)[1], _shape(var)[3]
        wide = padded_extent(columns, self.tile)
        if groups == channels == weight.shape[0] and groups > 1:
            packed = relax.const(pack_depthwise(weight, self.v))
            self.packed[var] = self._call(
                operators.depthwise, self._blocks(source), packed, strides, padding, dilation, wide,
                name="depthwise", fusable=True,
            )  # fmt: skip
            return True
        few = groups == 1 and channels < self.v and source not in self.packed
        filters, groups = pack_filters(weight, groups, self.v, channels if few else self.v)
        data = self._plain(source) if few else self._blocks(source)
        self.packed[var] = self._call(
            operators.convolution, data, relax.const(filters), strides, padding, dilation, groups, wide,
            name="conv", fusable=True,
        )  # fmt: skip
        return True

    def _linear(self, var: Any, call: Any) -> bool:
        weight = self.constants.get(call.args[1])
        shape = _shape(call.args[0])
        if weight is None:
            return self._product(var, call)
        if weight.ndim != 2 or weight.dtype != np.float32 or len(shape) < 2:
            return False
        packed = relax.const(pack_dense(weight, self.v))
        rows = padded_extent(shape[-2], self.tile)
        self.plain[var] = self._call(
            operators.dense,
            self._plain(call.args[0]),
            packed,
            weight.shape[1],
            rows,
            name="dense",
            fusable=True,
        )
        return True

    def _product(self, var: Any, call: Any) -> bool:
        """Of two activations, as in attention."""
        left, right = (_shape(argument) for argument in call.args)
        fits = len(left) == len(right) >= 2 and left[:-2] == right[:-2]
        if not fits or str(var.ty.dtype) != "float32":
            return False
        self.plain[var] = self._call(
            operators.matmul, self._plain(call.args[0]), self._plain(call.args[1]), lanes(right[-1], self.v),
            padded_extent(left[-2], self.tile), name="matmul", fusable=True,
        )  # fmt: skip
        return True

    def _pool(self, var: Any, call: Any) -> bool:
        attrs = call.attrs
        if call.args[0] not in self.packed or str(attrs.layout) != "NCHW":
            return False
        kind = "max" if "max" in call.op.name else "average"
        self.packed[var] = self._call(
            operators.pool, self.packed[call.args[0]], kind, _ints(attrs.pool_size), _ints(attrs.strides),
            _ints(attrs.padding), _ints(attrs.dilation), _shape(var)[2:], bool(attrs.count_include_pad),
            name=f"{kind}_pool",
        )  # fmt: skip
        return True

    def _global_average(self, var: Any, call: Any) -> bool:
        if call.args[0] not in self.packed or _shape(var)[2:] != [1, 1]:
            return False
        self.packed[var] = self._call(operators.mean, self.packed[call.args[0]], name="mean")
        return True

    def _mean(self, var: Any, call: Any) -> bool:
        axes = {axis % 4 for axis in _ints(call.attrs.axis or [])}
        if call.args[0] not in self.packed or axes != {2, 3}:
            return False
        made = self._call(operators.mean, self.packed[call.args[0]], name="mean")
        if call.attrs.keepdims:
            self.packed[var] = made
        else:
            flat = self._call(operators.unpack, made, _shape(var)[1], name="unpack")
            self.plain[var] = self.builder.emit(relax.op.reshape(flat, _shape(var)))
        return True

    def _concat(self, var: Any, call: Any) -> bool:
        parts = list(call.args[0].fields) if isinstance(call.args[0], relax.Tuple) else []
        whole = all(p in self.packed and _shape(p)[1] % self.v == 0 for p in parts)
        if not parts or not whole or int(call.attrs.axis) != 1:
            return False
        self.packed[var] = self.builder.emit(relax.op.concat([self.packed[p] for p in parts], axis=1))
        return True

    def _take(self, var: Any, call: Any) -> bool:
        """An index beyond the end reads the last entry: as it is imported, it would end the process."""
        source, index = (self._new(argument) for argument in call.args)
        axis = call.attrs.axis
        axis = None if axis is None else int(axis)
        self.plain[var] = self.builder.emit(relax.op.take(source, index, axis, mode="clip"))
        return True

    def _elementwise(self, var: Any, call: Any) -> bool:
        """Blocked where any operand is and the others fit, so that it fuses into the product before it."""
        tensors = [a for a in call.args if isinstance(a, relax.Var) and self.constants.get(a) is None]
        if len(_shape(var)) != 4 or not any(t in self.packed for t in tensors):
            return False
        divisor = call.args[1] if call.op.name == "relax.divide" else None
        if divisor is not None and self.constants.get(divisor) is None:
            return False
        channels = _shape(var)[1]
        operands = []
        for argument in call.args:
            known = self.constants.get(argument)
            if known is not None:
                operand = per_channel(known, channels, self.v, 1.0 if argument is divisor else 0.0)
                if operand is None:
                    return False
                operands.append(relax.const(operand))
            elif isinstance(argument, relax.Var):
                fits = len(_shape(argument)) == 4 and _shape(argument)[1] == channels
                if not fits or str(argument.ty.dtype) != "float32":
                    return False
                operands.append(argument)
            else:
                operands.append(argument)  # an attribute, such as the bounds of a clip
        given = [self._blocks(o) if isinstance(o, relax.Var) else o for o in operands]
        self.packed[var] = self.builder.emit(relax.Call(call.op, given, call.attrs, call.ty_args))
        return True


def _shape(var: Any) -> list[int]:
    return [int(size) for size in var.ty.shape]


def _static(var: Any) -> bool:
    ty = var.ty
    if not isinstance(ty, relax.TensorType) or ty.shape is None:
        return False
    return all(isinstance(size, tvm.tirx.IntImm) for size in ty.shape)


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]
