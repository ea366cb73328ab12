"""The end of a stage that learned gates: what landing on the target did, told while the weights are still there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from dsprune.engine.learning.trainer import Trainer
from dsprune.methods.tracking import Landing
from dsprune.run_folder import FIGURES, checkpoint_name

__all__ = ["settle", "told"]

Evaluate = Callable[[Mapping[str, Tensor]], dict[str, float]]
"""Metrics of the student under some gates. Collective."""


def settle(
    trainer: Trainer, checkpoint: Path, *, epsilon: float, evaluate: Evaluate, say: Callable[[str], None]
) -> dict[str, Any]:
    """Say how far the chosen checkpoint was from its target, and what the rest of the way costs. Collective.

    Args:
        trainer: with gates, and the weights of its last step.
        checkpoint: that is to be exported.
        epsilon: distance of the sparsity from the target within which that is reached.
        evaluate: called where the target was not reached and the weights are those of the checkpoint.
        say: tells people, once.

    Returns:
        What the report repeats; empty where the checkpoint does not say how it landed.
    """
    assert trainer.replica is not None
    read = json.loads((checkpoint / FIGURES).read_text(encoding="utf-8")) if trainer.world.is_main else None
    figures = trainer.world.broadcast(read)
    if figures.get("landing") is None:
        return {}
    landing = Landing(**{k: v for k, v in figures["landing"].items() if k != "gap_points"})
    missed = landing.missed(epsilon)
    facts = {**landing.to_dict(), "epsilon": epsilon, "missed": missed}
    if "speedup" in figures:
        facts["speedup"] = figures["speedup"]
    if missed and checkpoint.name == checkpoint_name(trainer.total_steps):
        method = trainer.replica.method
        after = evaluate(method.select().gates)
        facts |= {"metrics_before": figures["metric"], "metrics_after": after}
    if missed:
        say(f"warning: {trainer.stage}: {told(facts)}")
    return facts


def told(facts: Mapping[str, Any]) -> str:
    """The line that log and report have of a target which training did not come to."""
    names = Landing.__dataclass_fields__
    line = Landing(**{name: facts[name] for name in names}).describe()
    if "metrics_after" not in facts:
        return line
    before, after = facts["metrics_before"], facts["metrics_after"]
    costs = ", ".join(f"{name} {before[name]:.4f} -> {value:.4f}" for name, value in after.items() if name in before)
    return f"{line}; that took the masked model's {costs}"
