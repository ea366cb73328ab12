"""A speedup as a budget of milliseconds: what methods that prune for time are held to."""

from __future__ import annotations

from dataclasses import dataclass

from dsprune.errors import ConfigError
from dsprune.structure.budget import Budget
from dsprune.structure.latency.cost import LatencyCost

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
        fastest = f"{1 / (1 - share):.1f}x" if share < 1 else "any number of times"
        return f"{share:.4f}, {fastest} as fast"


def speedup_budget(cost: LatencyCost, speedup: float, *, setting: str = "prune.speedup") -> SpeedupBudget:
    """The budget under which a model is so many times as fast as the dense one.

    Args:
        cost: of the model, in milliseconds.
        speedup: time of the dense model over that of the pruned one.
        setting: what the user set it by.

    Raises:
        ConfigError: a speedup below 1.
    """
    if speedup < 1:
        raise ConfigError(
            f"{setting} = {speedup:g}: a speedup is 1 or more, the dense model's time over the pruned one's"
        )
    where = cost.table.conditions
    words = f"the milliseconds of a batch of {where.batch} at length {where.length} on {where.device} ({where.dtype})"
    return SpeedupBudget(1 - 1 / speedup, cost.milliseconds, cost.dense, words, cost.shapes, setting, cost.price)
