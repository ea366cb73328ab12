"""How learned gates are held to their target: by multipliers that ascend, or by projection.

The target is a share of some cost that is removed. What the cost counts is not known here: it is a function of the
log-alphas, which must not fall where one of them does.

**Ascent**, as published: two multipliers of `lagrangian.py` learn by gradient ascent beside the log-alphas. They follow
as fast as their learning rate lets them: where all log-alphas begin at the clamp's edge, the probability to keep a unit
has a slope of .002 there, nothing moves for a while, and the multipliers go on growing meanwhile.

**Projection** (Rosen, "The gradient projection method for nonlinear programming", 1960 and 1961), with g the gradient
of the loss in the log-alphas and n that of the removed share:

1. g is replaced by g + lambda n, with lambda = -<g, n> / <n, n>. What is left of it changes no cost to first order: it
   says which units are worth more than they cost, lambda being what a share of the cost is worth in loss. At a point
   where nothing is left, g = -lambda n, the condition that the Lagrangian has. Moments of an optimizer see this part
   alone, so that none of them winds up against the target.
2. After the optimizer's step all log-alphas are shifted by one number, clamp included, so that the removed share is
   the target: exactly, whatever the learning rate and the number of steps.

Without the first part units would not be chosen by price: Adam takes the size out of a gradient, all log-alphas would
rise alike, and the shift would take that back. Where the cost is flat, n is 0 and g stays as it is; the second part
needs no gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from scipy.optimize import brentq
from torch import Tensor

from dsprune.methods.hard_concrete import LOG_ALPHA_MAX, LOG_ALPHA_MIN
from dsprune.methods.lagrangian import lagrangian
from dsprune.methods.size_constraints import SizeConstraints, SizeProjection

__all__ = ["Ascent", "Constraint", "ConstraintName", "Expected", "Projection"]

ConstraintName = Literal["project", "ascent"]
Expected = Callable[[Mapping[str, Tensor]], Tensor]
"""Share of the cost that log-alphas (by name) expect to remove: [] float64, differentiable."""

REACH = LOG_ALPHA_MAX - LOG_ALPHA_MIN
"""The shift that carries every log-alpha to the clamp."""
MOST = 0.99
"""How far towards what closed gates remove a target beyond that is followed: at the clamp itself all units are alike,
and which of them should stay would be forgotten."""


class Constraint(ABC):
    """Holds log-alphas to a target while they learn.

    Args:
        log_alpha: the leaves by name.
        expected: what they expect to remove; None where sizes alone are given.
    """

    def __init__(self, log_alpha: Mapping[str, Tensor], expected: Expected | None) -> None:
        self.log_alpha = log_alpha
        self.expected = expected

    @property
    @abstractmethod
    def multipliers(self) -> dict[str, Tensor]:
        """State beside the log-alphas, by name."""

    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers of the multipliers."""
        return []

    def penalty(self, target: float, progress: float) -> Tensor | None:
        """What joins the loss: [] or None.

        Args:
            target: share to remove at this step.
            progress: how far the target has warmed up, from 0 to 1, which sizes follow.
        """
        return None

    def steer(self) -> None:  # noqa: B027 (a penalty has its gradient already)
        """Called when the log-alphas have the gradient of loss and penalty, before they are stepped."""

    @torch.no_grad()
    def restore(self, target: float, progress: float) -> None:
        """Called when the log-alphas were stepped: clamp them, and see that they meet what the next step is to have.

        Args:
            target: share to remove at the next step.
            progress: how far it has warmed up then.
        """
        for log_alpha in self.log_alpha.values():
            log_alpha.clamp_(LOG_ALPHA_MIN, LOG_ALPHA_MAX)


class Ascent(Constraint):
    """Multipliers that learn by gradient ascent: CoFi (arXiv 2204.00408), section 3.2.

    Args:
        log_alpha: as for every constraint.
        expected: as for every constraint.
        sizes: constraints of a shape, which have multipliers of their own; None where there is no shape.
        shares: share of its units that each layer expects to keep, by name, which they hold.
        lr: learning rate of the multipliers (AdamW).
    """

    def __init__(
        self,
        log_alpha: Mapping[str, Tensor],
        expected: Expected | None,
        *,
        sizes: SizeConstraints | None,
        shares: Callable[[], Mapping[str, Tensor]],
        lr: float,
    ) -> None:
        super().__init__(log_alpha, expected)
        self.sizes = sizes
        self.shares = shares
        names = () if expected is None else ("linear", "quadratic")
        self._own = {name: torch.zeros((), requires_grad=True) for name in names}
        self._optimizer = torch.optim.AdamW(self.multipliers.values(), lr=lr, weight_decay=0.0, maximize=True)

    @property
    def multipliers(self) -> dict[str, Tensor]:
        return self._own | ({} if self.sizes is None else self.sizes.multipliers)

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self._optimizer]

    def penalty(self, target: float, progress: float) -> Tensor | None:
        penalty = torch.zeros((), dtype=torch.float64)
        if self.expected is not None:
            penalty = penalty + lagrangian(self.expected(self.log_alpha), target, **self._own)
        if self.sizes is not None:
            penalty = penalty + self.sizes.penalty(self.shares(), progress)
        return penalty


class Projection(Constraint):
    """Gradients along the constraint, and one shift of all log-alphas back onto it after each step.

    Args:
        log_alpha: as for every constraint.
        expected: as for every constraint.
        sizes: what holds every layer to its sizes, where there is a shape.
    """

    def __init__(
        self, log_alpha: Mapping[str, Tensor], expected: Expected | None, *, sizes: SizeProjection | None
    ) -> None:
        super().__init__(log_alpha, expected)
        self.sizes = sizes
        self._price = {} if expected is None else {"price": torch.zeros((), dtype=torch.float64)}
        self._range: tuple[float, float] | None = None

    @property
    def multipliers(self) -> dict[str, Tensor]:
        """The price of the last step: what all of the cost would be worth in loss at its rate."""
        return self._price

    def steer(self) -> None:
        wide = {name: value.detach().double().requires_grad_() for name, value in self.log_alpha.items()}
        gradient = {
            name: torch.zeros_like(wide[name]) if value.grad is None else value.grad.double()
            for name, value in self.log_alpha.items()
        }
        gradient = self._along_sizes(wide, gradient)
        if self.expected is not None:
            slopes = torch.autograd.grad(self.expected(wide), list(wide.values()))
            normal = self._along_sizes(wide, dict(zip(wide, slopes, strict=True)))
            price = _price(gradient, normal)
            self._price["price"].copy_(price)
            gradient = {name: gradient[name] + price * normal[name] for name in gradient}
        for name, value in self.log_alpha.items():
            value.grad = gradient[name].to(value.dtype)

    def _along_sizes(self, log_alpha: Mapping[str, Tensor], vector: dict[str, Tensor]) -> dict[str, Tensor]:
        return vector if self.sizes is None else self.sizes.tangent(log_alpha, vector)

    @torch.no_grad()
    def restore(self, target: float, progress: float) -> None:
        start = {name: value.detach().double() for name, value in self.log_alpha.items()}

        def shifted(shift: float) -> dict[str, Tensor]:
            log_alpha = {name: (value + shift).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX) for name, value in start.items()}
            return log_alpha if self.sizes is None else self.sizes.restore(log_alpha, progress)

        shift = 0.0
        if self.expected is not None:
            expected = self.expected
            shift = self._shift(lambda by: float(expected(shifted(by))), target)
        for name, value in shifted(shift).items():
            self.log_alpha[name].copy_(value)

    def _shift(self, removed: Callable[[float], float], target: float) -> float:
        if self._range is None:
            self._range = removed(REACH), removed(-REACH)
        least, most = self._range
        if target <= least:
            return REACH
        return find_shift(removed, target if target <= most else least + MOST * (most - least))


def _price(gradient: Mapping[str, Tensor], normal: Mapping[str, Tensor]) -> Tensor:
    """lambda = -<g, n> / <n, n>: [] float64; 0 where the cost is flat."""
    size = torch.stack([value.square().sum() for value in normal.values()]).sum()
    along = torch.stack([(gradient[name] * value).sum() for name, value in normal.items()]).sum()
    return -along / size if float(size) > 0 else torch.zeros_like(size)


def find_shift(removed: Callable[[float], float], target: float) -> float:
    """The shift of all log-alphas at which `target` is removed.

    Args:
        removed: share that is removed at a shift; it must not rise with it.
        target: share to remove, within what shifts of `REACH` either way remove.
    """
    gap = removed(0.0) - target
    if gap == 0:
        return 0.0
    way = 1.0 if gap > 0 else -1.0
    # The shift of one step is small: look near first.
    near, far = 0.0, REACH / 256
    while far < REACH and (removed(way * far) - target) * way > 0:
        near, far = far, 2 * far
    return way * float(brentq(lambda shift: removed(way * shift) - target, near, min(far, REACH), xtol=1e-9))
