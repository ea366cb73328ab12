"""How learned gates are held to their target: by multipliers that ascend, or by projection.

The target is a share of some cost that is removed. What the cost counts is not known here: it is a function of the
log-alphas, which must not fall where one of them does.

**Ascent**, as published: two multipliers of `lagrangian.py` learn by gradient ascent beside the log-alphas. They follow
as fast as their learning rate lets them: where all log-alphas begin at the clamp's edge, the probability to keep a unit
has a slope of .002 there, nothing moves for a while, and the multipliers go on growing meanwhile.

**Projection**: the optimizer follows the loss alone, and after each of its steps the log-alphas a go back to where the
removed share is the target: exactly, whatever the learning rate and the number of steps, with nothing that winds up.
Of all ways back it is the shortest in the metric of the optimizer that made the step (scaled gradient projection;
Bertsekas, "Projected Newton methods", 1982, with a diagonal scaling): with n the slope of the removed share and v
Adam's second moment of the loss's gradient,

    a_i <- clamp(a_i + shift * w_i),   w_i = |n_i| / sqrt(v_i),

one number `shift` for all, found by bisection. Step and projection together are one step of Adam along g + lambda n
with the multiplier that the target needs: where they leave a where it was, g = -lambda n, as the Lagrangian has it. So
units go by what they cost over what the loss cares for them. Were all shifted alike, they would not: Adam takes the
size out of a gradient, all log-alphas would rise alike, and the shift would take that back.

A unit without gradient is worth nothing and one that costs nothing has nothing to give, but neither says so for good:
w is held within a factor of `SPAN` of its median. Where the cost is flat and no n is left, all are shifted alike.
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
from dsprune.methods.size_constraints import SizeConstraints, SizeProjection, rows

__all__ = ["Ascent", "Constraint", "ConstraintName", "Expected", "Projection"]

ConstraintName = Literal["project", "ascent"]
Expected = Callable[[Mapping[str, Tensor]], Tensor]
"""Share of the cost that log-alphas (by name) expect to remove: [] float64, differentiable."""

SPAN = 10.0
"""How many times faster or slower than the median unit another one moves at most."""
REACH = SPAN * (LOG_ALPHA_MAX - LOG_ALPHA_MIN)
"""The shift that carries every log-alpha to the clamp."""
TINY = 1e-30
"""In place of the root of a moment that is 0."""
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
    """The shortest way back to the target after each step, in the metric of the optimizer.

    Args:
        log_alpha: as for every constraint.
        expected: as for every constraint.
        optimizer: AdamW over the log-alphas, which sees the loss alone.
        sizes: what holds every layer to its sizes, where there is a shape.
    """

    def __init__(
        self,
        log_alpha: Mapping[str, Tensor],
        expected: Expected | None,
        *,
        optimizer: torch.optim.AdamW,
        sizes: SizeProjection | None,
    ) -> None:
        super().__init__(log_alpha, expected)
        self.optimizer = optimizer
        self.sizes = sizes
        self._range: tuple[float, float] | None = None

    @property
    def multipliers(self) -> dict[str, Tensor]:
        return {}

    def restore(self, target: float, progress: float) -> None:
        super().restore(target, progress)
        start = {name: value.detach().double() for name, value in self.log_alpha.items()}
        weights = self._weights(start)

        def shifted(shift: float) -> dict[str, Tensor]:
            log_alpha = {
                name: (value + shift * weights[name]).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX)
                for name, value in start.items()
            }
            return log_alpha if self.sizes is None else self.sizes.restore(log_alpha, weights, progress)

        with torch.no_grad():
            expected, shift = self.expected, 0.0
            if expected is not None:
                shift = self._shift(lambda by: float(expected(shifted(by))), target)
            for name, value in shifted(shift).items():
                self.log_alpha[name].copy_(value)

    def _weights(self, log_alpha: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """w of the module, of the log-alphas' shapes: one median for all units that compete."""
        leaves = {name: value.clone().requires_grad_() for name, value in log_alpha.items()}
        removed = self.sizes.removed if self.expected is None and self.sizes is not None else self.expected
        assert removed is not None
        slopes = torch.autograd.grad(removed(leaves), list(leaves.values()))
        ratios = {
            name: slope.abs() / self._scale(name).clamp(min=TINY) for (name, slope) in zip(leaves, slopes, strict=True)
        }
        if self.expected is None:
            return {name: relative(rows(ratio)).view(ratio.shape) for name, ratio in ratios.items()}
        joined = relative(torch.cat([ratio.flatten() for ratio in ratios.values()]))
        parts = joined.split([ratio.numel() for ratio in ratios.values()])  # type: ignore[no-untyped-call]
        return {name: part.view(ratio.shape) for (name, ratio), part in zip(ratios.items(), parts, strict=True)}

    def _scale(self, name: str) -> Tensor:
        """Root of Adam's second moment, the bias of its first steps aside, which is the same for all units."""
        state = self.optimizer.state.get(self.log_alpha[name], {})
        moment: Tensor = state.get("exp_avg_sq", torch.zeros_like(self.log_alpha[name]))
        return moment.double().sqrt()

    def _shift(self, removed: Callable[[float], float], target: float) -> float:
        if self._range is None:
            self._range = removed(REACH), removed(-REACH)
        least, most = self._range
        if target <= least:
            return REACH
        return find_shift(removed, target if target <= most else least + MOST * (most - least))


def relative(ratio: Tensor) -> Tensor:
    """Ratios over the median of those above 0 in their row, within a factor of `SPAN` of it: [..., units].

    All 1 where none is above 0.
    """
    median = torch.where(ratio > 0, ratio, torch.nan).nanmedian(-1, keepdim=True).values
    return (ratio / median).nan_to_num(nan=1.0).clamp(1 / SPAN, SPAN)


def find_shift(removed: Callable[[float], float], target: float) -> float:
    """The shift at which `target` is removed.

    Args:
        removed: share that is removed at a shift; it must not rise with it.
        target: share to remove, within what shifts of `REACH` either way remove.
    """
    gap = removed(0.0) - target
    if gap == 0:
        return 0.0
    way = 1.0 if gap > 0 else -1.0
    # The shift of one step is small: look near first.
    near, far = 0.0, REACH / 2**12
    while far < REACH and (removed(way * far) - target) * way > 0:
        near, far = far, 2 * far
    return way * float(brentq(lambda shift: removed(way * shift) - target, near, min(far, REACH), xtol=1e-9))
