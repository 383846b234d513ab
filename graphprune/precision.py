"""What a precision means in passes.

``int8`` computes in integers what the target's runtime computes in integers, from calibration inputs;
``int8-dynamic`` takes the ranges of activations anew in every call, and needs none; ``int8-weights`` and
``int4-weights`` store weights as integers and compute in float; ``bfloat16`` and ``float16`` are half
precision throughout. With ``max_drop``, ``int8`` leaves in float what costs more accuracy than that.
``+bfloat16`` behind one with integers lets the runtime compute in bfloat16 what is left in float: the graph
stays as it is, and a runtime that has no use for it says so.

>>> suffix("int8", None), suffix("int8", 0.01)
('quantize', 'mixed-precision{max_drop=0.01}')
>>> suffix("int8+bfloat16"), around("int8+bfloat16"), around("int8")
('quantize', 'bfloat16', 'float32')
>>> suffix("int3")  # doctest: +IGNORE_EXCEPTION_DETAIL
Traceback (most recent call last):
graphprune.errors.InputError: unknown precision 'int3'; known: …
"""

from __future__ import annotations

from .errors import InputError, suggestion

PRECISIONS = {
    "int8": "quantize",
    "int8-dynamic": "quantize-dynamic",
    "int8-weights": "quantize-weights{bits=8}",
    "int4-weights": "quantize-weights{bits=4}",
    "bfloat16": "half-precision{dtype=bfloat16}",
    "float16": "half-precision{dtype=float16}",
}
AROUND = "+bfloat16"


def around(precision: str | None) -> str:
    """What a runtime may compute in where the graph has float32: ``float32`` or ``bfloat16``."""
    return "bfloat16" if precision is not None and precision.endswith(AROUND) else "float32"


def suffix(precision: str | None, max_drop: float | None = None) -> str:
    """The passes behind all others that give a precision, as text; empty for float.

    Args:
        precision: a name of :data:`PRECISIONS`, one with integers also with ``+bfloat16`` behind it, or
            ``None``; with ``max_drop`` that is ``int8``.
        max_drop: how much of what ``evaluate`` gives may be lost.

    Raises:
        InputError: the precision is unknown, or does not go with ``max_drop``.
    """
    if precision is None and max_drop is None:
        return ""
    chosen = precision or "int8"
    if chosen.startswith("int"):
        chosen = chosen.removesuffix(AROUND)
    if chosen not in PRECISIONS:
        known = f"{', '.join(sorted(PRECISIONS))}, and {AROUND} behind one with integers"
        raise InputError(f"unknown precision {chosen!r}; known: {known}{suggestion(chosen, PRECISIONS)}")
    if max_drop is None:
        return PRECISIONS[chosen]
    if chosen != "int8":
        raise InputError(f"max_drop searches what stays in float under int8, not under {chosen}")
    if not 0 <= max_drop < 1:
        raise InputError(
            f"max_drop is a share of what `evaluate` gives, at least 0 and below 1, got {max_drop}"
        )
    return f"mixed-precision{{max_drop={max_drop}}}"
