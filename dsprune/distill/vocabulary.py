"""Losses over a vocabulary without the [tokens, vocabulary] matrices: chunk by chunk, from hidden states and head.

The logits of a chunk of tokens are made, their loss and its gradient taken, and dropped. What is kept for
the backward pass are the gradients of the hidden states, [tokens, width], and of the head's weight, which
the backward pass only scales. So the head's weight is wanted once, which under ZeRO-3 is one gathering.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from dsprune.structure.autocast import autocast_input, without_autocast

__all__ = [
    "RowLoss",
    "TeacherLogits",
    "TeacherStates",
    "TopLogits",
    "chunked_losses",
    "divergence",
    "surprisals",
    "top_logits",
]

RowLoss = Callable[[Tensor, slice], Tensor]
"""Logits [rows, vocabulary] of some tokens, and which these are, to losses summed over them: [parts]."""


def _like(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """A head in the dtype of the hidden states; under autocast they differ."""
    return weight.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)


class _ChunkedLosses(Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        losses: RowLoss,
        shares: Tensor,
        chunk: int,
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor]:
        want_hidden, want_weight = wanted
        wide = torch.promote_types(hidden.dtype, torch.float32)
        parts = torch.zeros_like(shares)
        grad_hidden = torch.empty_like(hidden) if want_hidden else None
        # Sums over chunks are kept in fp32: in bf16 they would lose what later chunks add.
        grad_weight = torch.zeros_like(weight, dtype=wide) if want_weight else None
        grad_bias = torch.zeros_like(bias, dtype=wide) if want_weight and bias is not None else None
        head, head_bias = _like(hidden, weight, bias)
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            logits = F.linear(hidden[rows], head, head_bias).to(wide).requires_grad_(any(wanted))
            with torch.enable_grad():
                values = losses(logits, rows)
                parts += values.detach()
                if not any(wanted):
                    continue
                (grad,) = torch.autograd.grad(values @ shares, logits)
            narrow = grad.to(hidden.dtype)
            if grad_hidden is not None:
                torch.mm(narrow, head, out=grad_hidden[rows])
            if grad_weight is not None:
                grad_weight += narrow.t() @ hidden[rows]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = (weight.dtype, bias.dtype if bias is not None else None)
        total = parts @ shares
        ctx.mark_non_differentiable(parts)
        return total, parts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scale = grads[0]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        weight_dtype, bias_dtype = ctx.dtypes
        scaled = (
            None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype),
            None if grad_weight is None else (grad_weight * scale).to(weight_dtype),
            None if grad_bias is None else (grad_bias * scale).to(bias_dtype),
        )
        return *scaled, None, None, None, None


def chunked_losses(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    losses: RowLoss,
    shares: Tensor,
    *,
    chunk: int,
    frozen: bool = False,
) -> tuple[Tensor, Tensor]:
    """Losses of the logits `hidden @ weight.T + bias`, of which no more than `chunk` rows exist at a time.

    Gradients are exact; they are formed in this pass, where gradients are enabled. Divide by a count
    afterwards: in fp16 gradients of means would vanish, those of sums do not.

    Args:
        hidden: [tokens, width] last hidden states; none at all are fine.
        weight: [vocabulary, width] of the head.
        bias: [vocabulary], or None.
        losses: of some rows; called with logits in fp32 (fp64 for fp64).
        shares: [parts] weight of each part in the total, of the dtype that `losses` gives.
        chunk: rows of logits.
        frozen: give weight and bias no gradients, and save their cost.

    Returns:
        the weighted total, [], which carries the gradients; and the parts, [parts], which carry none.
    """
    hidden = autocast_input(hidden)
    learns = torch.is_grad_enabled()
    wanted = (learns and hidden.requires_grad, learns and weight.requires_grad and not frozen)
    with without_autocast(hidden):
        total, parts = _ChunkedLosses.apply(hidden, weight, bias, losses, shares, chunk, wanted)  # type: ignore[no-untyped-call]
    return total, parts


def divergence(student: Tensor, log_teacher: Tensor) -> Tensor:
    """KL(teacher || student), summed over rows: [].

    Args:
        student: [rows, outcomes] log-probabilities.
        log_teacher: [rows, outcomes] log-probabilities; -inf where an outcome cannot be.
    """
    impossible = log_teacher == -torch.inf
    surprise = (log_teacher - student).masked_fill(impossible, 0.0)
    return (log_teacher.exp() * surprise).sum()


class TeacherLogits(Protocol):
    """What the teacher says about some tokens, in a form smaller than [tokens, vocabulary]."""

    def gathering(self) -> AbstractContextManager[Any]:
        """Held while `divergence` is called. Collective where the teacher is sharded."""

    def divergence(self, logits: Tensor, rows: slice, temperature: float) -> Tensor:
        """KL(softmax(teacher / T) || softmax(student / T)), summed over rows: [].

        Args:
            logits: [rows, vocabulary] of the student.
            rows: which of the tokens these are.
            temperature: T.
        """


@dataclass(frozen=True)
class TeacherStates:
    """All of the teacher's logits, as its last hidden states and its head.

    Attributes:
        hidden: [tokens, width].
        weight: [vocabulary, width].
        bias: [vocabulary], or None.
        gather: makes weight and bias whole, where they are sharded.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    gather: Callable[[], AbstractContextManager[Any]] = nullcontext

    def gathering(self) -> AbstractContextManager[Any]:
        return self.gather()

    def divergence(self, logits: Tensor, rows: slice, temperature: float) -> Tensor:
        with torch.no_grad():
            theirs = F.linear(self.hidden[rows], *_like(self.hidden, self.weight, self.bias)).to(logits.dtype)
            log_teacher = F.log_softmax(theirs / temperature, dim=-1)
        return divergence(F.log_softmax(logits / temperature, dim=-1), log_teacher)


@dataclass(frozen=True)
class TopLogits:
    """The teacher's k largest logits, and all others as one bucket.

    The divergence is that between distributions over k + 1 outcomes: the k tokens, and "another one". It
    never exceeds the divergence over the vocabulary, and vanishes where that does. Renormalising the k
    instead would teach that nothing else can follow, and grow the student's k logits without bound.

    Attributes:
        values: [tokens, k] logits divided by the temperature.
        indices: [tokens, k] int64 their tokens.
        rest: [tokens] logarithm of the summed exponentials of the others.
    """

    values: Tensor
    indices: Tensor
    rest: Tensor

    def gathering(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def divergence(self, logits: Tensor, rows: slice, temperature: float) -> Tensor:
        values, rest = self.values[rows].to(logits.dtype), self.rest[rows].to(logits.dtype)
        log_teacher = F.log_softmax(torch.cat([values, rest[:, None]], dim=-1), dim=-1)
        scaled, chosen = logits / temperature, self.indices[rows]
        others = scaled.scatter(1, chosen, -torch.inf).logsumexp(-1, keepdim=True)
        buckets = torch.cat([scaled.gather(1, chosen), others], dim=-1)
        return divergence(buckets - scaled.logsumexp(-1, keepdim=True), log_teacher)


@torch.no_grad()
def top_logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, *, k: int, temperature: float, chunk: int
) -> TopLogits:
    """The k largest logits of each token, made chunk by chunk.

    Args:
        hidden: [tokens, width] last hidden states of the teacher.
        weight: [vocabulary, width] of its head.
        bias: [vocabulary], or None.
        k: fewer than the vocabulary has.
        temperature: of the loss; the bucket of the others depends on it.
        chunk: rows of logits that exist at a time.
    """
    values = hidden.new_empty((len(hidden), k), dtype=torch.float32)
    indices = torch.empty_like(values, dtype=torch.int64)
    rest = torch.empty_like(values[:, 0])
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = F.linear(hidden[rows], *_like(hidden, weight, bias)).float() / temperature
        values[rows], indices[rows] = logits.topk(k, dim=-1)
        rest[rows] = logits.scatter_(1, indices[rows], -torch.inf).logsumexp(-1)
    return TopLogits(values, indices, rest)


@torch.no_grad()
def surprisals(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *, chunk: int) -> Tensor:
    """-log p(label) of each token, made chunk by chunk: [tokens] fp32.

    Args:
        hidden: [tokens, width] last hidden states.
        weight: [vocabulary, width] of the head.
        bias: [vocabulary], or None.
        labels: [tokens] int64.
        chunk: rows of logits that exist at a time.
    """
    found = hidden.new_empty(len(hidden), dtype=torch.float32)
    for start in range(0, len(hidden), chunk):
        rows = slice(start, start + chunk)
        logits = F.linear(hidden[rows], *_like(hidden, weight, bias)).float()
        found[rows] = F.cross_entropy(logits, labels[rows], reduction="none")
    return found
