"""Pointwise operators, operators that keep their first operand's type, and factories, by the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import strategies as st

from .oracle import Cases, Program, check, oracle, shapes

aten = torch.ops.aten
CASES = Cases()


def _pointwise() -> list[Any]:
    """Every operator that torch tags as pointwise and that writes into no argument."""
    found = []
    for name in dir(aten):
        packet = getattr(aten, name)
        for overload in packet.overloads() if hasattr(packet, "overloads") else ():
            operator = getattr(packet, overload)
            writes = operator._schema.is_mutable or any(a.is_out for a in operator._schema.arguments)
            if torch.Tag.pointwise in operator.tags and not writes:
                found.append(operator)
    return found


POINTWISE = _pointwise()
WHOLE = ("bitwise", "gcd", "lcm", "shift", "__and__", "__or__", "__xor__")


def broadcasting(p: Program, count: int, make: Any) -> list[Any]:
    """Operands whose shapes broadcast together: leading dimensions are missing, others are one."""
    shape = p.draw(shapes())
    operands = []
    for place in range(count):
        drop = 0 if place == 0 else p.draw(st.integers(0, len(shape)))
        ones = p.draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape)))
        operands.append(
            make(*[1 if one and place else s for s, one in list(zip(shape, ones, strict=True))[drop:]])
        )
    return p.draw(st.permutations(operands))


# Arguments that cannot be told from the schema.
ARGUMENTS: dict[Any, Any] = {
    aten.polygamma.default: lambda p: (1, p.operand(4, 3)),
    aten.where.self: lambda p: (p.flag(4, 3), p.operand(2, 1, 3), p.operand(1, 3)),
    aten.masked_fill.Scalar: lambda p: (p.operand(2, 4), p.flag(4), 3.0),
    aten.rrelu.default: lambda p: (p.operand(4, 3), 0.1, 0.3, False),
    aten.threshold.default: lambda p: (p.operand(4, 3), 0.5, 0.1),
    aten.mvlgamma.default: lambda p: (p.operand(4, 3), 2),
    aten.gelu_backward.default: lambda p: (p.operand(4, 3), p.operand(4, 3)),
    aten.native_dropout_backward.default: lambda p: (p.operand(4, 3), p.flag(4, 3), 2.0),
    aten.clamp.default: lambda p: (p.operand(4, 3), -0.5, 0.5),
    aten.clip.default: lambda p: (p.operand(4, 3), -0.5, 0.5),
    aten.clamp.Tensor: lambda p: tuple(broadcasting(p, 3, p.operand)),
    aten.clip.Tensor: lambda p: tuple(broadcasting(p, 3, p.operand)),
    aten.copy.default: lambda p: (p.operand(2, 4, 6), p.operand(4, 6)),
}


def arguments(p: Program, target: Any) -> tuple[list[Any], dict[str, Any]]:
    """Operands for a pointwise operator, from its schema."""
    if target in ARGUMENTS:
        return list(ARGUMENTS[target](p)), {}
    make = p.number if any(mark in str(target) for mark in WHOLE) else p.operand
    schema = [a for a in target._schema.arguments if not a.has_default_value()]
    tensors = iter(broadcasting(p, sum("Tensor" in str(a.type) for a in schema), make))
    values: list[Any] = []
    named: dict[str, Any] = {}
    for argument in schema:
        kind = str(argument.type)
        value: Any
        if "Tensor" in kind:
            value = next(tensors)
        elif kind in ("number", "int"):
            value = 2
        elif kind == "float":
            value = 0.5
        elif "str" in kind:
            value = "floor"
        elif kind == "bool":
            value = False
        else:
            raise NotImplementedError(f"{target} wants a {kind}: name its arguments in ARGUMENTS")
        if argument.kwarg_only:
            named[argument.name] = value
        else:
            values.append(value)
    return values, named


TAGGED = Cases()
"""What torch tags as pointwise, whether or not a rule names it."""


@TAGGED.add(*POINTWISE)
@CASES.of("""log_sigmoid rsub.Tensor multiply.Tensor divide.Tensor subtract.Tensor floor_divide hardswish
             where.ScalarOther where.ScalarSelf where.Scalar masked_fill.Tensor __and__.Tensor __or__.Tensor
             special_expit real imag conj resolve_conj resolve_neg copy rrelu square float_power.Tensor_Scalar
             pow.Tensor_Scalar""")
def pointwise(p: Program, target: Any) -> None:
    values, named = arguments(p, target)
    node = p(target, *values, **named)
    if isinstance(node.meta["val"], tuple):
        p.parts(node)


ARGUMENTS |= {
    aten.where.ScalarOther: lambda p: (p.flag(4, 3), p.operand(4, 3), 2.0),
    aten.where.ScalarSelf: lambda p: (p.flag(4, 3), 2.0, p.operand(3)),
    aten.where.Scalar: lambda p: (p.flag(4, 3), 2.0, 3.0),
    aten.masked_fill.Tensor: lambda p: (p.operand(4, 3), p.flag(4, 3), torch.tensor(2.0)),
    aten.imag.default: lambda p: (p.tensor_of(torch.randn(4, 3, dtype=torch.complex128)),),
}


@CASES.of("fake_quantize_per_tensor_affine")
def fake_quantize(p: Program, target: Any) -> None:
    x = p(aten.to.dtype, p.operand(4, 3), torch.float32)
    p(target, x, 0.1, 0, -128, 127)


@CASES.of("prelu")
def prelu(p: Program, target: Any) -> None:
    shape = p.draw(shapes(1, 3))
    channels = shape[1] if len(shape) > 1 else 1
    p(target, p.operand(*shape), p.operand(p.draw(st.sampled_from((1, channels)))))


@CASES.of("dropout alpha_dropout feature_dropout feature_alpha_dropout")
def dropout(p: Program, target: Any) -> None:
    p(target, p.operand(2, 4, 3), 0.5, False)


@CASES.of("""contiguous detach alias lift_fresh_copy lift_fresh detach_copy zeros_like ones_like
             _to_copy to.dtype_layout""")
def kept(p: Program, target: Any) -> None:
    p(target, p.operand(*p.draw(shapes())))


@CASES.of("empty_like")
def empty_like(p: Program, target: Any) -> None:
    x = p.operand(*p.draw(shapes()))
    p(aten.zeros_like.default, p(target, x))


@CASES.of("to.dtype to.device to.other to.prim_Device type_as full_like fill.Scalar fill.Tensor zero")
def converted(p: Program, target: Any) -> None:
    x = p.operand(*p.draw(shapes()))
    other: dict[Any, tuple] = {
        aten.to.dtype: (torch.float32,),
        aten.to.device: (torch.device("cpu"), torch.float32),
        aten.to.prim_Device: (torch.device("cpu"), torch.float32),
        aten.full_like.default: (3.0,),
        aten.fill.Scalar: (3.0,),
        aten.fill.Tensor: (torch.tensor(3.0),),
        aten.zero.default: (),
    }
    p(target, x, *other.get(target, (p.operand(5),)))


@CASES.of("broadcast_tensors meshgrid meshgrid.indexing")
def spread(p: Program, target: Any) -> None:
    if target is aten.broadcast_tensors.default:
        p.parts(p(target, broadcasting(p, 2, p.operand)))
    else:
        named = {"indexing": "xy"} if target is aten.meshgrid.indexing else {}
        p.parts(p(target, [p.operand(4), p.operand(3)], **named))


@CASES.of("zeros ones full empty.memory_format new_zeros new_ones new_full new_empty")
def filled(p: Program, target: Any) -> None:
    shape = list(p.draw(shapes()))
    first = [p.operand(2)] if "new_" in str(target) else []
    node = p(target, *first, shape, *([2.0] if "full" in str(target) else []))
    if "empty" in str(target):
        node = p(aten.zeros_like.default, node)
    same = p(aten.to.dtype, node, torch.float64)
    p(aten.mul.Tensor, same, p.operand(*shape))


@CASES.of("""arange arange.start arange.start_step linspace eye eye.m scalar_tensor tril_indices
             triu_indices rand randn randint randint.low randperm hann_window""")
def counted(p: Program, target: Any) -> None:
    name = str(target).removeprefix("aten.").removesuffix(".default")
    values: dict[str, tuple] = {
        "arange": (4,), "arange.start": (1, 5), "arange.start_step": (0, 8, 2), "linspace": (0, 1, 4),
        "eye": (4,), "eye.m": (4, 4), "scalar_tensor": (2.0,), "tril_indices": (4, 4),
        "triu_indices": (4, 4), "rand": ([4, 4],), "randn": ([4, 4],), "randint": (3, [4, 4]),
        "randint.low": (1, 3, [4, 4]), "randperm": (4,), "hann_window": (4,),
    }  # fmt: skip
    table = p(aten.to.dtype, p(target, *values[name]), torch.float64)
    p(aten.mul.Tensor, p.operand(3, *table.meta["val"].shape), table)


UNINITIALISED = {aten.empty_like.default, aten.empty.memory_format, aten.new_empty.default}


@pytest.mark.parametrize("target", CASES, ids=str)
@oracle(examples=8)
def test_slices(target: Any, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    CASES[target](program, target)
    check(program, seed, values=target not in UNINITIALISED)


@pytest.mark.parametrize("first", range(0, len(POINTWISE), 16))
@oracle(examples=6)
def test_slices_of_whatever_is_tagged_pointwise(first: int, data: st.DataObject, seed: int) -> None:
    program = Program(data.draw)
    for target in POINTWISE[first : first + 16]:
        TAGGED[target](program, target)
    check(program, seed)
