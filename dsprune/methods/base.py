"""What every pruning method answers, whatever it does inside.

A method sees plain replicated tensors only: the gates it hands out, and what was seen of them. It is the
same on every rank; whatever is random in it comes from (seed, step). What only some methods need, an optimizer
of their own or the weights, stands in `parts.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from dsprune.config import Section, ShapeConfig
from dsprune.errors import ConfigError
from dsprune.methods.evidence import Evidence
from dsprune.structure import Budget, Choice, Empty, Prunable

__all__ = ["AnyMethod", "Method", "Plan", "load_state", "state_of"]

S = TypeVar("S", bound=Prunable)


@dataclass(frozen=True)
class Plan:
    """What a method has to reach, and in how many optimizer steps."""

    budget: Budget
    """What of the model is to go."""
    total_steps: int
    steps_per_epoch: int
    seed: int
    shape: ShapeConfig = field(default_factory=ShapeConfig)
    """Sizes that are to be the same in every layer, if any."""

    @property
    def is_shaped(self) -> bool:
        """Whether all layers are to end with the same sizes."""
        return self.shape.uniform or bool(self.shape.sizes)


class Method(ABC, Generic[S]):
    """Chooses the gates. Those that a recipe can name are registered in `dsprune.methods.METHODS`.

    Args:
        structure: what is pruned.
        options: the method's own options.
        plan: budget and length of the stage.

    Attributes:
        kinds: of gates that the method chooses.
        budget: what it is held to.

    Raises:
        ConfigError: options or target that this method cannot meet on this model.
    """

    Options: ClassVar[type[Section]]
    """Class of the method's options, checked when the recipe is read."""
    empty: ClassVar[Empty]
    """What a sublayer without units computes, in the masked model, the cost and the export alike."""
    trains_weights: ClassVar[bool] = True
    """Whether weights train beside the gates. Where they do not, there is no optimizer, no teacher and no dropout: a
    step is its evidence, and the student is the fine-tuned dense model."""

    takes_shapes: ClassVar[bool] = False
    """Whether the method can end with the same sizes in every layer."""

    def __init__(self, structure: S, options: Section, plan: Plan) -> None:
        self.structure = structure
        self.plan = plan
        self.budget = plan.budget
        self.kinds = self.kinds_of(options)
        reason = structure.refusal(self.kinds)
        if reason is not None:
            raise ConfigError(f"method.name: {reason} (`dsprune families` lists what goes with what)")
        if plan.is_shaped and not self.takes_shapes:
            raise ConfigError(f"shape: {type(self).__name__} finds a size for every layer: leave out [shape]")

    @classmethod
    @abstractmethod
    def kinds_of(cls, options: Any) -> tuple[str, ...]:
        """Kinds of gates that a method with these options chooses."""

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The replicated leaf tensors that define the method's state, by name."""

    @abstractmethod
    def gates(self, step: int) -> dict[str, Tensor] | None:
        """Gates of the forward passes of this step, attached to the graph of `parameters`; None is the dense model.

        Where the evidence is `loss`, one more axis before all others counts the sets that are tried; the training
        pass, if there is one, has the first.
        """

    @abstractmethod
    def evidence(self, step: int) -> Evidence:
        """What the method wants to see of this step."""

    @abstractmethod
    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        """Take in one applied step.

        Args:
            step: optimizer step.
            gates: what `gates` gave for this step.
            seen: what `Evidence` says of what was asked for; nothing where that was nothing.
        """

    @abstractmethod
    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        """Gates to evaluate with at this step; None is the dense model."""

    @abstractmethod
    def select(self) -> Choice:
        """The final choice, landed on the target as nearly as the units allow."""

    def select_at(self, target: float) -> Choice:
        """What `select` would choose for another target; training stays held to its own.

        Args:
            target: share to remove of what the budget counts.
        """
        trained = self.budget
        self.budget = replace(trained, target=target)
        try:
            return self.select()
        finally:
            self.budget = trained

    @abstractmethod
    def metrics(self, step: int) -> dict[str, float]:
        """What to log: expected and hard sparsity, target, multipliers."""

    def _check_target(self) -> None:
        """Called by methods whose gates can all close.

        Raises:
            ConfigError: a target that they cannot reach, naming what is reachable.
        """
        why = f"gates {', '.join(self.kinds)} can remove at most {{}} (what they do not decide over stays)"
        self.budget.check(self.budget.floor(self.kinds), why)


AnyMethod = Method[Any]
"""A method, whatever it prunes."""


def state_of(method: AnyMethod) -> dict[str, Tensor]:
    """Copies of a method's replicated tensors, for a checkpoint."""
    return {name: value.detach().clone() for name, value in method.parameters().items()}


@torch.no_grad()
def load_state(method: AnyMethod, state: Mapping[str, Tensor]) -> None:
    """Give a method what `state_of` took."""
    for name, value in method.parameters().items():
        value.copy_(state[name])
