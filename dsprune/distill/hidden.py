"""Hidden states of chosen layers, caught by hooks and packed to the tokens that are not padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["HiddenTap"]


class HiddenTap:
    """Catches the outputs of some layers of a model during its forward pass.

    Args:
        model: the model.
        paths: modules to listen to, in the order in which `take` returns them.
        stacks: for each of them, which stack of layers it stands in; by default there is one. The tokens of a
            decoder are not those of its encoder.
    """

    def __init__(self, model: nn.Module, paths: Sequence[str], stacks: Sequence[int] = ()) -> None:
        self._caught: dict[int, Tensor] = {}
        self._stacks = stacks or [0] * len(paths)
        for i, path in enumerate(paths):
            model.get_submodule(path).register_forward_hook(self._hook(i))

    def _hook(self, index: int) -> Any:
        def catch(_module: nn.Module, _args: Any, output: Any) -> None:
            self._caught[index] = output[0] if isinstance(output, tuple) else output

        return catch

    def take(self, *token_index: Tensor) -> list[Tensor]:
        """The states of the last forward pass, [tokens, width] each, and let go of them.

        Args:
            token_index: for each stack, [tokens] int64 positions of real tokens in the flattened [batch * length].
        """
        caught = [(self._caught[i], token_index[stack]) for i, stack in enumerate(self._stacks)]
        self._caught.clear()
        return [torch.index_select(state.flatten(0, 1), 0, index) for state, index in caught]

    def clear(self) -> None:
        """Let go of states that nobody took."""
        self._caught.clear()
