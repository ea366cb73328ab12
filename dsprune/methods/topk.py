"""Learnable top-k: which units of a group are kept is learned by their scores, how many by a threshold.

MLPruning (arXiv 2105.14636, section 3, and its code): of n units the ceil(sigmoid(theta) * n) with the
highest scores are kept, at least one. Backward is straight through: the gradient of a score is that of
its unit's gate, the gradient of theta the sum of those of the kept units, without the slope of the
sigmoid, as published.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

__all__ = ["count_kept", "top_k"]


def count_kept(theta: Tensor, size: int) -> Tensor:
    """Units that a threshold keeps of `size`: as `theta`, int64."""
    return torch.ceil(torch.sigmoid(theta.detach().double()) * size).long().clamp(1, size)


def top_k_mask(scores: Tensor, count: Tensor) -> Tensor:
    """1 for the `count` highest scores of each row, ties by position: [groups, units] fp32."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (rank < count.unsqueeze(-1)).float()


class _TopK(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, theta: Tensor) -> Tensor:
        mask = top_k_mask(scores, count_kept(theta, scores.shape[-1]))
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        (grad,) = grads
        (mask,) = ctx.saved_tensors
        return grad, (grad * mask).sum(-1)


def top_k(scores: Tensor, theta: Tensor) -> Tensor:
    """Gates of the units of several groups, straight through.

    Args:
        scores: [groups, units].
        theta: [groups].

    Returns:
        [groups, units] of 0 and 1.
    """
    return _TopK.apply(scores, theta)  # type: ignore[no-any-return, no-untyped-call]
