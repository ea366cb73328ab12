"""Sizes that all layers share: what a run aims at, and constraints that hold learned gates to them.

Targeted structured pruning as in Sheared LLaMA (Xia, Gao, Zeng, Chen, arXiv 2310.06694, section 2.1): beside
the loss stands, for every size of every layer, a Lagrangian of its expected number of units and the number that
is asked for (`SizeConstraints`). Where only the sparsity is given, the constraint of a layer is the mean of all layers
instead. `SizeProjection` holds the same by projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dsprune.config import ShapeConfig
from dsprune.errors import ConfigError
from dsprune.methods.hard_concrete import LOG_ALPHA_MAX, LOG_ALPHA_MIN
from dsprune.methods.lagrangian import lagrangian
from dsprune.structure import Budget, Structure, shape_gates

__all__ = ["SizeConstraints", "SizeProjection", "aimed", "check_factored", "rows"]

CONTRADICTION = 0.005
"""Difference of sparsity from which a target and a shape that are both given contradict each other."""
BISECTIONS = 50
"""Halvings of the shifts' range that reach the precision of their numbers."""


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


def check_factored(structure: Structure, shape: ShapeConfig) -> None:
    """See that what is to have the same sizes in every layer can be a stock model.

    Raises:
        ConfigError: its word embedding is factored.
    """
    if (shape.uniform or shape.sizes) and structure.embedding_rank is not None:
        raise ConfigError("shape: no stock class has a factored embedding: leave out prune.embedding_rank")


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
            aim = share.mean() if self.shares is None else _share(self.shares[name], progress)
            linear, quadratic = (self.multipliers[f"{order}.{name}"] for order in ("linear", "quadratic"))
            total = total + lagrangian(aim - share, 0.0, linear, quadratic).sum()
        return total


class SizeProjection:
    """Holds every size of every layer exactly, by one shift of the log-alphas that compete for it.

    As `constraint.py` has it: each unit moves at a speed of its own.

    Args:
        keep: probability to keep a unit, of log-alphas; it rises with them.
        shares: by name of a size, the share of units to keep; None holds every layer to the mean of all.
    """

    def __init__(self, keep: Callable[[Tensor], Tensor], shares: Mapping[str, float] | None) -> None:
        self.keep = keep
        self.shares = shares

    def removed(self, log_alpha: Mapping[str, Tensor]) -> Tensor:
        """Shares of all sizes that are expected to go, summed: [] float64."""
        return torch.stack([(1 - self.keep(rows(value)).mean(-1)).sum() for value in log_alpha.values()]).sum()

    def restore(
        self, log_alpha: Mapping[str, Tensor], weights: Mapping[str, Tensor], progress: float
    ) -> dict[str, Tensor]:
        """Log-alphas of the sizes that are to be.

        Args:
            log_alpha: by name, [layers, units] or [units], within the clamp.
            weights: how fast each moves, of the same shapes, above 0.
            progress: how far the target has warmed up, from 0 to 1.
        """
        restored = {}
        for name, value in log_alpha.items():
            share = self.keep(rows(value)).mean(-1)
            aim = share.mean() if self.shares is None else torch.as_tensor(_share(self.shares[name], progress))
            restored[name] = self._shifted(rows(value), rows(weights[name]), aim.to(value.dtype)).view(value.shape)
        return restored

    def _shifted(self, log_alpha: Tensor, weights: Tensor, share: Tensor) -> Tensor:
        """Rows of log-alphas, each shifted so that it keeps a share: by bisection, of all rows at once."""

        def at(shift: Tensor) -> Tensor:
            return (log_alpha + shift.unsqueeze(-1) * weights).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)

        high = (LOG_ALPHA_MAX - LOG_ALPHA_MIN) / weights.amin(-1)
        low = -high
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            too_many = self.keep(at(middle)).mean(-1) > share
            low, high = torch.where(too_many, low, middle), torch.where(too_many, middle, high)
        return at((low + high) / 2)


def rows(value: Tensor) -> Tensor:
    """[layers, units] of what may be [units]."""
    return value.view(-1, value.shape[-1])


def _share(final: float, progress: float) -> float:
    """The share to keep on the way to `final`."""
    return 1 - (1 - final) * progress
