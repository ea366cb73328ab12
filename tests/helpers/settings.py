"""One row per method: every shared test (trajectory, replicas, resume, export) runs every row.

Adding a method without a row fails `test_every_method_has_a_row`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class MethodRow:
    name: str
    options: dict[str, Any] = field(default_factory=dict)
    target: float = 0.5
    steps: int = 6
    distill: dict[str, Any] = field(default_factory=dict)
    teacher_layers: tuple[int, ...] | None = (1, 2)
    trains: bool = True
    """Whether weights train beside the gates."""


BLOCKS = MethodRow("blocks", {"scores_lr": 0.3, "init": 2.0, "penalty": 200.0}, distill={"match": "fixed"})
"""Step 2 of MLPruning, which is a stage of its own and no method that a recipe names."""

ROWS = [
    MethodRow(
        "cofi",
        {"distill_phase": "1 steps", "warmup": "3 steps", "lr": 0.05},
        distill={"match": "monotone"},
    ),
    MethodRow(
        "grain",
        {"start": 0.2, "end": 0.5},
        distill={"match": "fixed", "projection": "separate", "logit_scale": "none", "temperature": 8.0},
        teacher_layers=(0, 1, 2),
    ),
    MethodRow(
        "mlpruning",
        {"lr": 0.3, "init": 2.0, "penalty": 200.0},
        distill={"match": "fixed", "projection": "none", "attentions": 0.9},
        teacher_layers=(0, 1, 2),
    ),
    MethodRow("fisher", steps=3, trains=False),
]
TRAINED = [row for row in ROWS if row.trains]
"""Rows of methods that train weights; they come first in `ROWS`, so that places in one are places in the other."""
