"""No rule without an oracle: every operator that a rule is registered for has a case, or a reason."""

from __future__ import annotations

import operator
from typing import Any

import torch

from graphprune.axes.typing import RULES, _rules

from . import (
    test_rules_elementwise,
    test_rules_positions,
    test_rules_products,
    test_rules_reductions,
    test_rules_shapes,
    test_rules_written,
)

FAMILIES = (
    test_rules_elementwise,
    test_rules_positions,
    test_rules_products,
    test_rules_reductions,
    test_rules_shapes,
    test_rules_written,
)

EXEMPT: dict[Any, str] = {
    operator.getitem: "takes one of several results: Program.parts applies it after every such operator",
    torch.ops.aten.sym_size.int: "a number; dynamic graphs are pruned in test_rewrite.py",
}


def ruled() -> list[Any]:
    """The operators that a rule file names; arithmetic on sizes has no tensor to slice."""
    from graphprune.axes.rules.elementwise import elementwise
    from graphprune.axes.rules.factories import _numbers

    found = []
    for target, function in _rules().items():
        tagged = function is elementwise and torch.Tag.pointwise in getattr(target, "tags", ())
        if (
            function.__module__.startswith("graphprune.axes.rules")
            and function is not _numbers
            and not tagged
        ):
            found.append(target)
    return found


def test_every_ruled_operator_has_a_case() -> None:
    covered = {target for family in FAMILIES for target in family.CASES}
    missing = [str(t) for t in ruled() if t not in covered and t not in EXEMPT]
    assert not missing, f"write a case for {missing}, or exempt them with a reason"


def test_no_case_is_for_an_operator_without_a_rule() -> None:
    """A case of an operator that freezes everything would pass whatever the rule did."""
    _rules()
    idle = [str(t) for family in FAMILIES for t in family.CASES if t not in RULES]
    assert not idle, f"no rule is registered for {idle}"


def test_exemptions_are_needed() -> None:
    assert set(EXEMPT) <= set(ruled())
