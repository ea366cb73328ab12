"""A sparsity constraint by Lagrange multipliers, and the warm-up of its target."""

from __future__ import annotations

from torch import Tensor

__all__ = ["lagrangian", "linear_target"]


def lagrangian(sparsity: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """linear * (s - t) + quadratic * (s - t)^2, for descent in s and ascent in the multipliers.

    Wang, Wohlwend and Lei, "Structured Pruning of Large Language Models" (2020), equation 6, as in
    CoFi (arXiv 2204.00408), section 3.2. All arguments are []; the multipliers take either sign.
    """
    gap = sparsity - target
    return linear * gap + quadratic * gap.square()


def linear_target(step: int, *, target: float, warmup_steps: int) -> float:
    """Target `step` steps after pruning began: from 0 to `target` in `warmup_steps`, then constant."""
    if warmup_steps <= 0:
        return target
    return target * min(1.0, max(0, step) / warmup_steps)
