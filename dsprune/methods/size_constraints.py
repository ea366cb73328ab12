"""Sizes that all layers share: what a run aims at, and constraints that hold learned gates to them.

Targeted structured pruning as in Sheared LLaMA (Xia, Gao, Zeng, Chen, arXiv 2310.06694, section 2.1): beside
the loss stands, for every size of every layer, a Lagrangian of its expected number of units and the number that
is asked for. Where only the sparsity is given, the constraint of a layer is the mean of all layers instead.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsprune.config import RunConfig
from dsprune.errors import ConfigError
from dsprune.methods.lagrangian import lagrangian
from dsprune.structure import CostModel, Empty, Structure, shape_gates

__all__ = ["SizeConstraints", "aimed_sparsity"]

CONTRADICTION = 0.005
"""Difference of sparsity from which a target and a shape that are both given contradict each other."""


def aimed_sparsity(config: RunConfig, structure: Structure, *, empty: Empty) -> float:
    """The sparsity that a run aims at: `prune.target`, or that of the shape that is given instead.

    Raises:
        ConfigError: both are given, and differ.
    """
    target, of = config.prune.target, config.prune.target_of
    if not config.shape.sizes:
        return target
    implied = float(CostModel(structure, empty=empty).sparsity(shape_gates(structure, config.shape.sizes), of=of))
    if "target" in config.prune.model_fields_set and abs(implied - target) > CONTRADICTION:
        raise ConfigError(
            f"prune.target = {target:g} contradicts the sizes of [shape], which remove {implied:.4f} of the {of}: "
            "leave out one of the two"
        )
    return implied


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
