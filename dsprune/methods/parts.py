"""What some methods have beside `Method`: an optimizer of their own, or a look at the weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsprune.methods.base import AnyMethod, Method, S

__all__ = ["Learned", "Read", "ReadsWeights", "StartsFromWeights", "gates_from", "optimizers_of"]

Read = Callable[[str], Tensor]
"""The whole value of a parameter by name, fp32 on the CPU, the same on every rank. Collective under ZeRO-3."""


class Learned(Method[S]):
    """A method whose gates are a function of leaves that optimizers step, once per applied optimizer step."""

    catching_up = "prune for longer"
    """What helps where the learned sparsity does not follow its target."""

    @property
    def gates_from(self) -> int:
        """Optimizer step at which gates come on; before it the dense model distils."""
        return 0

    @property
    def full_target_step(self) -> int | None:
        """Optimizer step from which the target is the whole one; None where it does not warm up."""
        return None

    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers over `parameters`."""

    def penalty(self, step: int) -> Tensor | None:
        """What joins the loss on the method's own parameters; it depends on no data. [] or None."""
        return None

    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        """Let the gradients go through the graph of the gates, and the penalty's beside them; the steps follow."""
        torch.autograd.backward([gates[kind] for kind in seen], list(seen.values()))
        penalty = self.penalty(step)
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]

    def after_step(self) -> None:
        """Called after each applied step of the optimizers."""


class StartsFromWeights(ABC):
    """A method that looks at the weights once, before its first step."""

    @abstractmethod
    def begin(self, read: Read) -> None:
        """Called once before the first step of a fresh run. Collective, as far as it reads."""


class ReadsWeights(ABC):
    """A method that looks at the weights while they train."""

    @abstractmethod
    def wants_weights(self, step: int) -> bool:
        """Whether `weigh` is to be called at this step."""

    @abstractmethod
    def weigh(self, read: Read) -> None:
        """Called after an applied step of the weights and before `learn`, where wanted. Collective."""


def optimizers_of(method: AnyMethod) -> list[torch.optim.Optimizer]:
    """A method's optimizers; none where it does not learn by any."""
    return method.optimizers() if isinstance(method, Learned) else []


def gates_from(method: AnyMethod) -> int:
    """Optimizer step at which a method's gates come on."""
    return method.gates_from if isinstance(method, Learned) else 0
