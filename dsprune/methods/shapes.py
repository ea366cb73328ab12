"""Sizes that all layers share: what a run aims at, and constraints that hold learned gates to them.

Targeted structured pruning as in Sheared LLaMA (Xia, Gao, Zeng, Chen, arXiv 2310.06694, section 2.1): beside
the loss stands, for every size of every layer, a Lagrangian of its expected number of units and the number that
is asked for. Where only the sparsity is given, the constraint of a layer is the mean of all layers instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dsprune.config import ShapeConfig
from dsprune.errors import ConfigError
from dsprune.methods.lagrangian import lagrangian
from dsprune.structure import Budget, Structure, shape_gates

__all__ = ["SizeConstraints", "aimed"]

CONTRADICTION = 0.005
"""Difference of sparsity from which a target and a shape that are both given contradict each other."""


def aimed(budget: Budget, structure: Structure, shape: ShapeConfig, *, is_set: bool) -> Budget:
    """The budget that a run aims at: the one that was asked for, or that of the shape which is given instead.

    Args:
        budget: with the target that was asked for, or its default.
        structure: of the dense model.
        shape: sizes that are given, if any.
        is_set: whether the user set the target.

    Raises:
        ConfigError: both are given, and differ.
    """
    if not shape.sizes:
        return budget
    implied = budget.removed(shape_gates(structure, shape.sizes))
    if is_set and abs(implied - budget.target) > CONTRADICTION:
        raise ConfigError(
            f"{budget.asked} contradicts the sizes of [shape], which remove {implied:.4f} of that: leave out one of "
            "the two"
        )
    return replace(budget, target=implied)


class SizeConstraints:
    """Two multipliers, a linear and a quadratic one, for every size of every layer.

    Args:
        groups: by name of a size, how many layers have it (1 for a size of the whole model).
        shares: by name, the share of units to keep; None holds every layer to the mean of all.
    """

    def __init__(self, groups: Mapping[str, int], shares: Mapping[str, float] | None) -> None:
        self.shares = shares
        self.multipliers = {
            f"{order}.{name}": torch.zeros(count, requires_grad=True)
            for name, count in groups.items()
            for order in ("linear", "quadratic")
        }

    def penalty(self, expected: Mapping[str, Tensor], progress: float) -> Tensor:
        """What joins the loss: [].

        Args:
            expected: by name, share of the units that each layer expects to keep, [groups].
            progress: how far the target has warmed up, from 0 to 1.
        """
        total = torch.zeros((), dtype=torch.float64)
        for name, share in expected.items():
            aim = share.mean() if self.shares is None else 1 - (1 - self.shares[name]) * progress
            linear, quadratic = (self.multipliers[f"{order}.{name}"] for order in ("linear", "quadratic"))
            total = total + lagrangian(aim - share, 0.0, linear, quadratic).sum()
        return total
