"""Losses of the tasks: sums over targets, for the caller to divide.

A step's batch is cut into micro-batches with unequal numbers of targets. Only sums, divided by one
count for the whole step, average over the batch whichever way it is cut.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "ENDS",
    "IGNORED",
    "STARTS",
    "binary_cross_entropy",
    "binary_divergence",
    "cross_entropy",
    "divergence",
    "span_cross_entropy",
    "span_divergence",
    "squared_error",
]

IGNORED = -100
"""Label of a position that takes no part in a loss; for spans, of padding."""
STARTS = 1
"""Bit of a span label: the answer starts at this token."""
ENDS = 2
"""Bit of a span label: the answer ends at this token."""


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, summed over targets: [].

    Args:
        logits: [..., classes].
        labels: [...] class indices, `IGNORED` where there is no target.
    """
    return F.cross_entropy(logits.float().flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def binary_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of labels that are on or off, mean over labels, summed over examples: [].

    Args:
        logits: [batch, labels].
        labels: [batch, labels] 1 for on, 0 for off.
    """
    return F.binary_cross_entropy_with_logits(logits.float(), labels.float(), reduction="none").mean(-1).sum()


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Squared error, summed: [].

    Args:
        outputs: [batch, 1].
        targets: [batch].
    """
    return F.mse_loss(outputs.float().squeeze(-1), targets.float(), reduction="sum")


def divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher / T) || softmax(student / T)), summed over rows (Hinton et al. 2015): [].

    Args:
        student: [rows, classes] logits.
        teacher: [rows, classes] logits.
        temperature: T.
    """
    log_student, log_teacher = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student, teacher))
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2


def binary_divergence(student: Tensor, teacher: Tensor, *, temperature: float) -> Tensor:
    """`divergence` of the two probabilities of each label, on and off, mean over labels, summed over rows: [].

    Args:
        student: [rows, labels] logits.
        teacher: [rows, labels] logits.
        temperature: T.
    """
    # sigmoid(x) is the first of softmax(x, 0).
    pairs = (torch.stack([x, torch.zeros_like(x)], dim=-1).flatten(0, 1) for x in (student, teacher))
    return divergence(*pairs, temperature=temperature) / student.shape[-1]


def span_cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Mean of the cross entropies of start and end over the real tokens, summed over features: [].

    Args:
        outputs: [batch, length, 2] start and end logits.
        labels: [batch, length] bits `STARTS` and `ENDS`, `IGNORED` on padding.
    """
    real = labels != IGNORED
    logits = _over_tokens(outputs, real)
    marked = torch.stack([(labels & bit).bool() & real for bit in (STARTS, ENDS)], dim=1)
    return cross_entropy(logits, marked.long().argmax(-1)) / 2


def span_divergence(student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float) -> Tensor:
    """`divergence` of the start and of the end distribution over the real tokens, both added: [].

    Args:
        student: [batch, length, 2] start and end logits.
        teacher: [batch, length, 2].
        labels: [batch, length], `IGNORED` on padding.
        temperature: T.
    """
    real = labels != IGNORED
    # Padding has probability 0 and the logarithm -inf, of which differences are not numbers: with 0 in
    # place of both logarithms it adds nothing, and no gradient passes.
    log_student, log_teacher = (
        F.log_softmax(_over_tokens(x, real) / temperature, dim=-1).masked_fill(~real[:, None], 0.0)
        for x in (student, teacher)
    )
    return F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2


def _over_tokens(outputs: Tensor, real: Tensor) -> Tensor:
    """Start and end logits with the tokens last and padding at -inf: [batch, 2, length] float32."""
    return outputs.float().transpose(1, 2).masked_fill(~real[:, None], -torch.inf)
