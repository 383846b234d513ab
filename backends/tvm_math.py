"""Exponentials in arithmetic that vectorizes: LLVM calls the C library for each element otherwise.

    exp(x)     = 2^n e^r,  n = round(x / ln 2),  r = x - n ln 2,  with e^r by its Taylor series up to r⁶
    sigmoid(x) = 1 / (1 + e^-x),   tanh(x) = 1 - 2 / (e^2x + 1)
    erf(x)     = sign(x) (1 - (a₁t + a₂t² + … + a₅t⁵) e^-x²),  t = 1 / (1 + p|x|)

The last is formula 7.1.26 of Abramowitz and Stegun, *Handbook of Mathematical Functions* (1964), within
1.5e-7. The relative error of the exponential is below 3e-7; what would be smaller than e^-87 is that, and
beyond e^88 it stays there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call
from tvm.tirx import PrimFunc

_LN2_HIGH, _LN2_LOW = (
    0.693359375,
    -2.12194440e-4,
)  # their sum; the first has few bits, so that n·high is exact
_SERIES = (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0)
_ERF_P, _ERF = 0.3275911, (1.061405429, -1.453152027, 1.421413741, -0.284496736, 0.254829592, 0.0)


def _number(value: float) -> Any:
    return tirx.const(value, "float32")


def _polynomial(x: Any, coefficients: tuple[float, ...]) -> Any:
    """Horner's scheme, the highest power first."""
    result = _number(coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + _number(coefficient)
    return result


def exp(x: Any) -> Any:
    """e to the power of a float32 expression."""
    x = tirx.max(tirx.min(x, _number(88.0)), _number(-87.0))
    n = tirx.floor(x * _number(1.4426950408889634) + _number(0.5))
    rest = x - n * _number(_LN2_HIGH) - n * _number(_LN2_LOW)
    power = tirx.reinterpret("float32", (n.astype("int32") + 127) << 23)
    return _polynomial(rest, _SERIES) * power


def sigmoid(x: Any) -> Any:
    """Of a float32 expression."""
    return _number(1.0) / (_number(1.0) + exp(_number(0.0) - x))


def tanh(x: Any) -> Any:
    """Of a float32 expression."""
    return _number(1.0) - _number(2.0) / (exp(x * _number(2.0)) + _number(1.0))


def erf(x: Any) -> Any:
    """Of a float32 expression."""
    size = tirx.max(x, _number(0.0) - x)
    t = _number(1.0) / (_number(1.0) + _number(_ERF_P) * size)
    found = _number(1.0) - _polynomial(t, _ERF) * exp(_number(0.0) - size * size)
    return tirx.Select(x < _number(0.0), _number(0.0) - found, found)


def _is_float32(call: Any) -> bool:
    return str(getattr(call.ty, "dtype", "")) == "float32"


_FORMS: dict[str, Callable[[Any], Any]] = {
    "tirx.exp": exp, "tirx.sigmoid": sigmoid, "tirx.tanh": tanh, "tirx.erf": erf,
}  # fmt: skip


@tvm.transform.module_pass(opt_level=0, name="Exponentials")
def exponentials(module: tvm.IRModule, context: Any) -> tvm.IRModule:
    """Every call of such a function on float32 in the module's functions, written out."""

    def written(call: Any) -> Any:
        form = _FORMS.get(getattr(call.op, "name", ""))
        return form(call.args[0]) if form is not None and _is_float32(call) else call

    made = dict(module.functions)
    for var, function in module.functions.items():
        if isinstance(function, PrimFunc):
            body = tvm_ffi.structural_map(function.body, (Call, written))
            made[var] = function.with_body(body)
    return tvm.IRModule(made, attrs=module.attrs)
