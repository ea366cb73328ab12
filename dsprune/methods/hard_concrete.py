"""The hard-concrete distribution: gates that are exactly 0 or 1 with finite probability, and differentiable.

Louizos, Welling and Kingma, "Learning Sparse Neural Networks through L0 Regularization" (2018),
section 2.2; constants as CoFi uses them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["LOG_ALPHA_MAX", "LOG_ALPHA_MIN", "TEMPERATURE", "deterministic_gate", "keep_probability", "sample_gate"]

GAMMA, ZETA = -0.1, 1.1
TEMPERATURE = 2 / 3
"""T: the lower, the more often a gate is exactly 0 or 1."""
EPSILON = 1e-6
LOG_ALPHA_MIN, LOG_ALPHA_MAX = math.log(1e-2), math.log(1e2)


def sample_gate(log_alpha: Tensor, noise: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """One sample per unit: clip(sigmoid((logit(u) + log_alpha) / T) * (zeta - gamma) + gamma, 0, 1).

    Args:
        log_alpha: any shape.
        noise: uniform on (0, 1), of the same shape.
        temperature: T.
    """
    u = noise.clamp(EPSILON, 1 - EPSILON)
    s = torch.sigmoid((u.log() - (1 - u).log() + log_alpha) / temperature)
    return (s * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def keep_probability(log_alpha: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """P(gate != 0) = sigmoid(log_alpha - T log(-gamma / zeta)), in the dtype of `log_alpha`."""
    return torch.sigmoid(log_alpha - temperature * math.log(-GAMMA / ZETA))


def deterministic_gate(log_alpha: Tensor, keep: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Gates without noise: the `keep` largest of each row survive, softly, the rest are 0.

    Survivors have the value sigmoid(0.8 log_alpha / T), as CoFi evaluates and exports them.

    Args:
        log_alpha: [..., n], each row a group of units that compete.
        keep: [...] int64, how many survive in each row.
        temperature: T.

    Returns:
        [..., n].
    """
    rank = log_alpha.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    soft = torch.sigmoid(0.8 * log_alpha / temperature)
    return torch.where(rank < keep.unsqueeze(-1), soft, torch.zeros_like(soft))
