"""A speedup as a budget of milliseconds: what methods that prune for time are held to."""

from __future__ import annotations

from dsprune.errors import ConfigError
from dsprune.structure.budget import Budget
from dsprune.structure.latency.cost import LatencyCost

__all__ = ["speedup_budget"]


def speedup_budget(cost: LatencyCost, speedup: float, *, setting: str = "prune.speedup") -> Budget:
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
    words = f"the milliseconds on {where.device} ({where.dtype}, batch {where.batch}, length {where.length})"
    return Budget(1 - 1 / speedup, cost.milliseconds, cost.dense, words, cost.shapes, setting, cost.price)
