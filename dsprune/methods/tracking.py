"""Whether a learned sparsity follows its target, and what landing on the target took where it did not.

Gates that are learned meet a target as far as penalties and multipliers bring them, or exactly where they are
projected onto it (`constraint.py`). What is missing at the last step is cut away at once when the choice is landed on
the target (`landing.py`), and nothing has trained for that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from dsprune.methods.base import AnyMethod
from dsprune.methods.parts import Learned

__all__ = ["LAG", "Landing", "has_reached", "landing_of", "report_lag"]

LAG = 0.05
"""How far the expected sparsity may trail the target when that has warmed up, or pass it by the end, before that is
said. Passing it costs little: landing gives units back, where falling short cuts some away."""
ROUNDING = 1e-7
"""What single precision takes from a sparsity that was set exactly."""
WORDS = {
    "head": "heads",
    "attn": "attention sublayers",
    "ffn": "FFN sublayers",
    "ffn_dim": "neurons",
    "hidden": "hidden dimensions",
    "qk_dim": "query dimensions",
    "vo_dim": "value dimensions",
    "attn_row": "output rows of attention",
    "ffn_row": "output rows of FFNs",
    "block": "blocks",
}
"""What units are called, by their kind."""


@dataclass(frozen=True)
class Landing:
    """How a choice of units came to its target; sparsities are shares of what the target is a share of.

    Attributes:
        target: to reach.
        expected: what the learned gates came to; None where the sparsity is set and not learned.
        before: of the gates that evaluation used, by exact count.
        after: of the choice that is exported, by exact count.
        cut: by kind, how many units evaluation still had and the export has not.
        given_back: by kind, how many it had not and the export has.
    """

    target: float
    expected: float | None
    before: float
    after: float
    cut: Mapping[str, int] = field(default_factory=dict)
    given_back: Mapping[str, int] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far what was learned (or set) is from the target: above 0 it fell short."""
        return self.target - (self.before if self.expected is None else self.expected)

    def missed(self, epsilon: float) -> bool:
        """Whether training fell short of the target by more than this, or a learned sparsity went far beyond it."""
        return self.gap > epsilon or (self.expected is not None and -self.gap > LAG)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with the gap in points of a percent."""
        return {**asdict(self), "gap_points": round(100 * self.gap, 2)}

    def describe(self) -> str:
        """The gap and what landing did about it, in one line."""
        what = "expected" if self.expected is not None else "hard"
        reached = self.before if self.expected is None else self.expected
        side = "short of" if self.gap > 0 else "beyond"
        return (
            f"{what} sparsity ended at {reached:.1%}, {100 * abs(self.gap):.1f} points {side} the target of "
            f"{self.target:.1%}; landing on it took the masked model from {self.before:.1%} to {self.after:.1%}: "
            f"{_counted(self.cut) or 'nothing'} cut away, {_counted(self.given_back) or 'nothing'} given back"
        )


def _counted(units: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {WORDS.get(kind, kind)}" for kind, count in units.items() if count)


@torch.no_grad()
def landing_of(method: AnyMethod, step: int, choice: Mapping[str, Tensor]) -> Landing | None:
    """What landing does to a method's choice at a step; None while gates are not on.

    Args:
        method: as it stands now.
        step: optimizer steps done.
        choice: gates of what it selects now.
    """
    before = method.evaluation_gates(step)
    if before is None:
        return None
    had, has = _effective(before), _effective({kind: choice[kind] for kind in before})
    cut: dict[str, int] = {}
    given_back: dict[str, int] = {}
    for kind in before:
        unit = method.structure.unit_of(kind)
        cut[unit] = cut.get(unit, 0) + int((had[kind] & ~has[kind]).sum())
        given_back[unit] = given_back.get(unit, 0) + int((has[kind] & ~had[kind]).sum())
    return Landing(
        target=method.budget.target,
        expected=method.metrics(step).get("sparsity/expected"),
        before=method.budget.removed(before),
        after=method.budget.removed(choice),
        cut=cut,
        given_back=given_back,
    )


def _effective(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Which units are there, by kind: those of a sublayer whose own gate is off are not."""
    on = {kind: gate != 0 for kind, gate in gates.items()}
    for fine, coarse in (("head", "attn"), ("ffn_dim", "ffn")):
        if fine in on and coarse in on:
            on[fine] = on[fine] & on[coarse][:, None]
    return on


def has_reached(method: AnyMethod, step: int, epsilon: float) -> bool:
    """Whether the learned sparsity (or the set one) has come to the whole target, but for so much.

    CoFi's code, `sparsity_epsilon`, which asks once and never again; here each evaluation is asked for itself.
    """
    if method.evaluation_gates(step) is None:
        return False
    metrics = method.metrics(step)
    reached = metrics.get("sparsity/expected", metrics["sparsity/hard"]) + ROUNDING
    return reached >= method.budget.target - epsilon


def report_lag(method: AnyMethod, step: int) -> str | None:
    """What is to be said when the target has warmed up and the gates have not followed; None where all is well.

    Args:
        method: as it stands now.
        step: optimizer steps done; only the one at which the warm-up ends is looked at.
    """
    if not isinstance(method, Learned) or method.full_target_step is None or step != method.full_target_step:
        return None
    expected = method.metrics(step).get("sparsity/expected")
    if expected is None or method.budget.target - expected <= LAG:
        return None
    return (
        f"the target has warmed up to {method.budget.target:.1%} and the expected sparsity is {expected:.1%}, "
        f"{100 * (method.budget.target - expected):.1f} points behind: {method.catching_up}; what is missing at the "
        "last step is cut away untrained"
    )
