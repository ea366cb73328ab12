"""Groups of units under learnable top-k: scores, thresholds, their optimizer and the adaptive regularisation.

What both steps of MLPruning share (arXiv 2105.14636; see `mlpruning.py` for what is followed).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsprune.methods.noise import uniform_noise
from dsprune.methods.schedules import warmup_and_decay
from dsprune.methods.topk import count_kept, top_k, top_k_mask

__all__ = ["REACH", "TopKGroups", "adaptive_penalty"]

REACH = 40.0
"""Shift of the thresholds beyond which every group is full, or down to one unit."""
SETTLED = 3e-4
"""Squared gap below which the regularisation only holds."""
LEAST, HOLDING = 50.0, 10.0


def adaptive_penalty(remaining: Tensor, tau: float, *, strength: float, two_sided: bool) -> Tensor:
    """lambda * rho, with rho the squared gap to the target and lambda a function of its size: [].

    Args:
        remaining: [] share that is left.
        tau: share to reach.
        strength: lambda_f.
        two_sided: whether a share below the target is pulled up as well.
    """
    gap = remaining - tau
    rho = gap.square() if two_sided else gap.clamp(min=0).square()
    size = float(rho.detach())
    weight = HOLDING if size < SETTLED else max(strength * size / max(1e-12, (1 - tau) ** 2), LEAST)
    return weight * rho


class TopKGroups:
    """Scores [groups, units] and thresholds [groups] by name.

    Args:
        shapes: of the scores.
        lr: peak learning rate of scores and thresholds.
        warmup: share of the steps during which it rises.
        total_steps: length of the stage.
        init: initial threshold, a logit.
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, int]], *, lr: float, warmup: float, total_steps: int, init: float
    ) -> None:
        self.score = {name: torch.zeros(shape, requires_grad=True) for name, shape in shapes.items()}
        self.theta = {name: torch.full(shape[:1], init, requires_grad=True) for name, shape in shapes.items()}
        self.lr, self.warmup, self.total_steps = lr, warmup, total_steps
        self.optimizer = torch.optim.AdamW([*self.score.values(), *self.theta.values()], lr=lr, weight_decay=0.0)

    @torch.no_grad()
    def begin(self, magnitudes: Mapping[str, Tensor]) -> None:
        """Start the scores from magnitudes, standardised within each group."""
        for name, score in self.score.items():
            magnitude = magnitudes[name].float()
            spread = magnitude.std(-1, keepdim=True, correction=0).clamp(min=1e-12)
            score.copy_((magnitude - magnitude.mean(-1, keepdim=True)) / spread)

    @torch.no_grad()
    def draw(self, scale: float, seed: int) -> None:
        """Start the scores from chance, uniform on (-scale, scale); the same for the same seed, everywhere."""
        noise = uniform_noise({f"score.{name}": tuple(s.shape) for name, s in self.score.items()}, seed, -1)
        for name, score in self.score.items():
            score.copy_((2 * noise[f"score.{name}"] - 1) * scale)

    def parameters(self) -> dict[str, Tensor]:
        scores = {f"score.{name}": value for name, value in self.score.items()}
        return scores | {f"theta.{name}": value for name, value in self.theta.items()}

    def gates(self) -> dict[str, Tensor]:
        """Masks with straight-through gradients: as the scores."""
        return {name: top_k(self.score[name], self.theta[name]) for name in self.score}

    def shares(self) -> dict[str, Tensor]:
        """Share that each threshold stands for, of at least one unit: as the scores, fp64, differentiable."""
        return {
            name: torch.sigmoid(theta.double()).clamp(min=1 / score.shape[-1])[:, None].expand(score.shape)
            for (name, theta), score in zip(self.theta.items(), self.score.values(), strict=True)
        }

    @torch.no_grad()
    def hard_gates(self, shift: float = 0.0) -> dict[str, Tensor]:
        """Masks of the top k, with `shift` added to every threshold when units are counted."""
        return {
            name: top_k_mask(score, count_kept(self.theta[name].double() + shift, score.shape[-1]))
            for name, score in self.score.items()
        }

    def set_rate(self, step: int) -> None:
        """Learning rate of a step: linear warm-up, then linear decay to zero."""
        rate = warmup_and_decay(step, total=self.total_steps, warmup=self.warmup)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr * rate
