"""What a method has to reach, and in how many steps, in one call."""

from __future__ import annotations

from typing import Any

from dsprune.methods import Plan, method_class
from dsprune.structure import Budget, Structure, block_budget, budget_for
from dsprune.structure.latency import LatencyCost, speedup_budget
from tests.speed.formula import formula_table


def plan_for(
    structure: Structure,
    method: str,
    target: float,
    *,
    of: Any = "encoder",
    total: int = 6,
    per_epoch: int = 4,
    length: int = 16,
    **options: Any,
) -> Plan:
    """The plan of a method by name; `options` are the plan's own. Of "time" it counts by a table made by hand."""
    empty = method_class(method).empty
    if of == "time":
        budget: Budget = speedup_budget(LatencyCost(structure, formula_table(structure), empty=empty), 1 / (1 - target))
    else:
        budget = budget_for(structure, target, of=of, empty=empty, length=length)
    return Plan(budget, total, per_epoch, options.pop("seed", 0), **options)


def block_plan_for(structure: Any, target: float, *, total: int = 6, per_epoch: int = 4, seed: int = 0) -> Plan:
    """The same for blocks."""
    return Plan(block_budget(structure, target), total, per_epoch, seed)
