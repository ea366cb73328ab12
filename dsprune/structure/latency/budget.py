"""A budget of measured milliseconds: what a method is held to where a speedup is asked for."""

from __future__ import annotations

from dataclasses import dataclass

from dsprune.structure.budget import Budget
from dsprune.structure.latency.cost import LatencyCost
from dsprune.structure.latency.table import LatencyTable
from dsprune.structure.spaces import Empty, Structure

__all__ = ["SpeedupBudget", "speedup_budget"]


@dataclass(frozen=True)
class SpeedupBudget(Budget):
    """A budget whose target was given as how many times as fast the model is to be."""

    @property
    def speedup(self) -> float:
        """How many times as fast as the dense model."""
        return 1 / self.share

    @property
    def asked(self) -> str:
        return f"{self.setting} = {self.speedup:g} in {self.words}"

    @property
    def goal(self) -> str:
        return f"{self.speedup:g}x in {self.words}"

    def reach(self, share: float) -> str:
        fastest = f"{1 / (1 - share):.1f}x" if share < 1 else "no end of speed"
        return f"{share:.4f}, which makes it {fastest} as fast,"


def speedup_budget(structure: Structure, table: LatencyTable, speedup: float, *, empty: Empty) -> SpeedupBudget:
    """The budget of a speedup: of the dense model's milliseconds, 1 / `speedup` may be left.

    Args:
        structure: of the dense model.
        table: of it.
        speedup: above 1.
        empty: what a sublayer without units computes.

    Raises:
        ConfigError: the table is of a model of other sizes.
    """
    cost, conditions = LatencyCost(structure, table, empty=empty), table.conditions
    return SpeedupBudget(
        target=1 - 1 / speedup,
        cost=cost.milliseconds,
        dense=cost.dense,
        words=f"the milliseconds of a batch of {conditions.batch} at length {conditions.length}",
        shapes=cost.shapes,
        setting="prune.speedup",
        price=cost.price,
    )
