"""Losses between teacher and student."""

from __future__ import annotations

import torch
from torch import Tensor

from dsprune.structure.autocast import without_autocast

__all__ = ["layer_distances", "layer_loss"]


def layer_loss(student: Tensor, teacher: Tensor, *, num_tokens: Tensor) -> Tensor:
    """Sum over matched layers of the mean squared error over tokens and width.

    CoFi, equation 5; padding takes no part (their code averages over it).

    Args:
        student: [layers, tokens, width] projected hidden states of the matched student layers.
        teacher: [layers, tokens, width] hidden states of the teacher layers.
        num_tokens: [] what counts as the number of tokens. Given from outside, so that ranks and
            accumulation steps with unequal token counts still average over the whole batch.
    """
    error = (student.float() - teacher.float()).square().sum()
    return error / (num_tokens * student.shape[-1])


@torch.no_grad()
def layer_distances(student: Tensor, teacher: Tensor, *, num_tokens: Tensor) -> Tensor:
    """`layer_loss` of every pair, for the dynamic matches: [teacher layers, student layers].

    Args:
        student: [S, tokens, width] projected hidden states of all student layers.
        teacher: [T, tokens, width].
        num_tokens: as in `layer_loss`.
    """
    s, t = student.float().flatten(1), teacher.float().flatten(1)
    # The three nearly cancel: autocast would make the product in half precision, and noise of the distances.
    with without_autocast(s):
        squares = t.square().sum(1)[:, None] + s.square().sum(1)[None, :] - 2 * (t @ s.T)
    return squares / (num_tokens * student.shape[-1])
