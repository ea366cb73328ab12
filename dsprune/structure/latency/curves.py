"""Piecewise linear functions through measured points, and what makes measured points monotone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import isotonic_regression
from torch import Tensor

__all__ = ["Grid", "monotone", "piecewise"]

Matrix = NDArray[np.float64]
PASSES = 200
"""More than alternating regressions of a table of a few dozen points have ever needed."""


def piecewise(knots: Sequence[float] | Matrix, values: Sequence[float] | Matrix, x: Tensor) -> Tensor:
    """Straight lines between measured points, level outside them; differentiable in x.

    Args:
        knots: ascending places, [K].
        values: at those, [K].
        x: places to read, of any shape.
    """
    return Grid([0.0], knots, np.asarray(values, dtype=np.float64)[None])(torch.zeros_like(x), x)


class Grid:
    """A function of two sizes, bilinear between measured points, level outside them.

    Args:
        rows: ascending places on the first axis, [R].
        columns: ascending places on the second axis, [C].
        values: [R, C].
    """

    def __init__(self, rows: Sequence[float] | Matrix, columns: Sequence[float] | Matrix, values: Matrix) -> None:
        self.rows = torch.as_tensor(np.asarray(rows, dtype=np.float64))
        self.columns = torch.as_tensor(np.asarray(columns, dtype=np.float64))
        self.values = torch.as_tensor(np.asarray(values, dtype=np.float64))
        assert self.values.shape == (len(self.rows), len(self.columns))

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """Values at (x, y), which are of one shape; differentiable in both."""
        rows, columns, values = (part.to(x.device) for part in (self.rows, self.columns, self.values))
        (low, high, share), (left, right, part) = _place(rows, x), _place(columns, y)
        below = values[low, left] * (1 - part) + values[low, right] * part
        above = values[high, left] * (1 - part) + values[high, right] * part
        return below * (1 - share) + above * share


def _place(knots: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Knots on either side of each x, and how far it is from the first to the second, from 0 to 1."""
    high = torch.searchsorted(knots, x.detach().contiguous()).clamp(1, max(1, len(knots) - 1))
    if len(knots) == 1:
        return high - 1, high - 1, torch.zeros_like(x)
    low = high - 1
    return low, high, ((x - knots[low]) / (knots[high] - knots[low])).clamp(0, 1)


def monotone(values: Matrix) -> Matrix:
    """The table that nowhere falls along an axis and is near to the given one: regressions along each axis in turn.

    A table that is monotone is its own; isotonic regression is that of `scipy.optimize`.

    Args:
        values: [R] or [R, C].
    """
    smooth = np.array(values, dtype=np.float64)
    for _ in range(PASSES):
        before = smooth
        for axis in range(smooth.ndim):
            smooth = np.apply_along_axis(lambda line: isotonic_regression(line).x, axis, smooth)
        if np.array_equal(before, smooth):
            return smooth
    for axis in range(smooth.ndim):  # what is left after so many passes is rounding
        smooth = np.maximum.accumulate(smooth, axis)
    return smooth
