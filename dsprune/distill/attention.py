"""Attention maps of chosen layers, caught by hooks, and the loss between them.

Only the eager attention of transformers hands its maps out, so models are switched to it where this
loss is wanted, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["AttentionTap", "attention_loss"]


class AttentionTap:
    """Catches the attention maps of some layers of a model during its forward pass.

    Args:
        model: the model, with eager attention.
        paths: modules that give out the maps, alone or second, in the order in which `take` returns them.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str]) -> None:
        self._caught: dict[int, Tensor | None] = {}
        self._count = len(paths)
        for i, path in enumerate(paths):
            model.get_submodule(path).register_forward_hook(self._hook(i))

    def _hook(self, index: int) -> Any:
        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            self._caught[index] = output if isinstance(output, Tensor) else output[-1]

        return catch

    def take(self) -> list[Tensor | None]:
        """The maps of the last forward pass, [batch, heads, length, length] each, and let go of them.

        None for a layer whose attention is gone.
        """
        caught = [self._caught.get(i) for i in range(self._count)]
        self._caught.clear()
        return caught

    def clear(self) -> None:
        """Let go of maps that nobody took."""
        self._caught.clear()


def attention_loss(
    student: Tensor, teacher: Tensor, *, mask: Tensor, heads: Tensor | None, num_pairs: Tensor
) -> Tensor:
    """Mean squared error of attention probabilities over live heads and pairs of real tokens: [].

    MLPruning (arXiv 2105.14636, the code), where padding and masked heads take part in the mean.

    Args:
        student: [batch, heads, length, length] probabilities.
        teacher: the same heads of the teacher.
        mask: [batch, length] 1 for real tokens.
        heads: [heads] 1 for the heads that take part, or [groups] of as many heads each; None for all.
        num_pairs: [] what counts as the number of pairs of real tokens (squared lengths, summed over
            examples). Given from outside, so that ranks and accumulation steps average over the whole batch.
    """
    real = mask.float()
    error = (student.float() - teacher.float()).square() * (real[:, :, None] * real[:, None, :]).unsqueeze(1)
    by_head = error.sum((0, 2, 3))
    live = torch.ones_like(by_head)
    if heads is not None:
        live = (heads != 0).to(by_head.dtype).repeat_interleave(len(by_head) // len(heads))
    return (by_head * live).sum() / (num_pairs * live.sum().clamp(min=1))
