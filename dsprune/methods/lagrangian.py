"""A sparsity constraint by Lagrange multipliers."""

from __future__ import annotations

from torch import Tensor

__all__ = ["lagrangian"]


def lagrangian(sparsity: Tensor, target: float, linear: Tensor, quadratic: Tensor) -> Tensor:
    """linear * (s - t) + quadratic * (s - t)^2, for descent in s and ascent in the multipliers.

    Wang, Wohlwend and Lei, "Structured Pruning of Large Language Models" (2020), equation 6, as in
    CoFi (arXiv 2204.00408), section 3.2. All arguments are []; the multipliers take either sign.
    """
    gap = sparsity - target
    return linear * gap + quadratic * gap.square()
