"""A speedup as a budget of milliseconds: what methods that prune for time are held to."""

from __future__ import annotations

from dsprune.errors import ConfigError
from dsprune.structure.budget import Budget
from dsprune.structure.latency.cost import LatencyCost

__all__ = ["SpeedupBudget", "speedup_budget"]


class SpeedupBudget(Budget):
    """A budget that is set, and refused, as a speedup."""

    @property
    def speedup(self) -> float:
        """Time of the dense model over that of the pruned one."""
        return 1 / self.share

    @property
    def asked(self) -> str:
        """What the user asked for, as it was set."""
        return f"{self.setting} = {self.speedup:g} in {self.words}"

    def check(self, floor: float, why: str) -> None:
        """Refuse a speedup that a method cannot reach; see `Budget.check`.

        Raises:
            ConfigError: naming what is reachable.
        """
        reachable = self.dense / floor
        if self.speedup > reachable:
            raise ConfigError(f"{self.asked} is out of reach: {why.format(f'{reachable:.2f}x')}")


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
        raise ConfigError(f"{setting} = {speedup:g}: give 1 or more, the dense model's time over the pruned one's")
    where = cost.table.conditions
    words = f"the milliseconds on {where.device} ({where.dtype}, batch {where.batch}, length {where.length})"
    return SpeedupBudget(1 - 1 / speedup, cost.milliseconds, cost.dense, words, cost.shapes, setting, cost.price)
