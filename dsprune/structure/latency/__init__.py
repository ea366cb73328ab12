"""Milliseconds of any gates, from a table that was measured: the table, its curves, and the cost read from it."""

from dsprune.structure.latency.budget import SpeedupBudget, speedup_budget
from dsprune.structure.latency.cost import LatencyCost
from dsprune.structure.latency.identity import ModelIdentity, part_name, parts_of
from dsprune.structure.latency.table import Conditions, LatencyTable, PartTimes, WidthTime

__all__ = [
    "Conditions",
    "LatencyCost",
    "LatencyTable",
    "ModelIdentity",
    "PartTimes",
    "SpeedupBudget",
    "WidthTime",
    "part_name",
    "parts_of",
    "speedup_budget",
]
