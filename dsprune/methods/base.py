"""What every pruning method answers, whatever it does inside.

A method sees plain replicated tensors only: the gates it hands out, and their gradients. It is the
same on every rank; whatever is random in it comes from (seed, step).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from dsprune.config import Section, ShapeConfig
from dsprune.errors import ConfigError
from dsprune.structure import Budget, Empty, Selection, Structure

__all__ = ["GateSignal", "Method", "Plan"]

GateSignal = Literal["training", "probe", "none"]
"""Where the gradients of the gates come from at a step: the training pass, a pass of their own over the
loss without its layerwise part (gradient separation), or nowhere."""


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


class Method(ABC):
    """Chooses the gates. Subclasses are registered in `dsprune.methods.METHODS`.

    Args:
        structure: the prunable structure of the dense model.
        options: the method's own options.
        plan: target and length of the stage.

    Raises:
        ConfigError: options or target that this method cannot meet on this model.
    """

    Options: ClassVar[type[Section]]
    """Class of the method's options, checked when the recipe is read."""
    empty: ClassVar[Empty]
    """What a sublayer without units computes, in the masked model, the cost and the export alike."""

    takes_shapes: ClassVar[bool] = False
    """Whether the method can end with the same sizes in every layer."""
    catching_up: ClassVar[str] = "prune for longer"
    """What helps where a learned sparsity does not follow its target."""

    def __init__(self, structure: Structure, options: Section, plan: Plan) -> None:
        reason = structure.family.refusal(self.kinds_of(options))
        if reason is not None:
            raise ConfigError(f"method.name: {reason} (`dsprune families` lists what goes with what)")
        if plan.is_shaped and not self.takes_shapes:
            raise ConfigError(f"shape: {type(self).__name__} finds a size for every layer: leave out [shape]")
        if plan.is_shaped and structure.embedding_rank is not None:
            raise ConfigError("shape: no stock class has a factored embedding: leave out prune.embedding_rank")
        self.structure = structure
        self.plan = plan

    @property
    def budget(self) -> Budget:
        """What the method is held to."""
        return self.plan.budget

    @classmethod
    @abstractmethod
    def kinds_of(cls, options: Any) -> tuple[str, ...]:
        """Kinds of gates that a method with these options chooses."""

    @property
    @abstractmethod
    def kinds(self) -> tuple[str, ...]:
        """Kinds of gates that this method chooses."""

    @property
    @abstractmethod
    def gates_from(self) -> int:
        """Optimizer step at which gates come on; before it the dense model distils."""

    @property
    def full_target_step(self) -> int | None:
        """Optimizer step from which the target is the whole one, where it warms up and gates learn to follow it."""
        return None

    @property
    def wants_magnitudes(self) -> bool:
        """Whether `begin` is to be called with the size of each unit's weights."""
        return False

    def begin(self, magnitudes: Mapping[str, Tensor]) -> None:  # noqa: B027 (most methods have nothing to do)
        """Called once before the first step of a fresh run, where `wants_magnitudes`.

        Args:
            magnitudes: by kind of gate, the Euclidean norm of each unit's weights.
        """

    @abstractmethod
    def parameters(self) -> dict[str, Tensor]:
        """The replicated leaf tensors that define the method's state, by name."""

    @abstractmethod
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Optimizers over `parameters`, stepped once per applied optimizer step."""

    @abstractmethod
    def gates(self, step: int) -> dict[str, Tensor] | None:
        """Gates of the forward passes of this step, attached to the graph of `parameters`; None is the dense model."""

    @abstractmethod
    def signal(self, step: int) -> GateSignal:
        """Which gradients of its gates the method wants at this step."""

    def wants_weights(self, step: int) -> bool:
        """Whether `weigh` is to be called at this step."""
        return False

    def weigh(self, read: Callable[[str], Tensor]) -> None:  # noqa: B027 (most methods look at gradients alone)
        """Called after an applied step of the weights and before `learn`, where `wants_weights`. Collective.

        Args:
            read: whole value of a parameter by name, fp32, the same on every rank.
        """

    def penalty(self, step: int) -> Tensor | None:
        """What joins the loss on the method's own parameters; it depends on no data. [] or None."""
        return None

    def learn(self, step: int, gates: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        """Take in one applied step, before `optimizers` step.

        By default the gradients go through the graph of the gates, and the penalty's beside them.

        Args:
            step: optimizer step.
            gates: what `gates` gave for this step.
            gradients: of the gates, unscaled, averaged over ranks and accumulation steps; none where
                `signal` wanted none.
        """
        torch.autograd.backward([gates[kind] for kind in gradients], list(gradients.values()))
        penalty = self.penalty(step)
        if penalty is not None:
            penalty.backward()  # type: ignore[no-untyped-call]

    def after_step(self) -> None:  # noqa: B027 (most methods have nothing to do)
        """Called after each applied step of `optimizers`."""

    @abstractmethod
    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        """Gates to evaluate with at this step; None is the dense model."""

    @abstractmethod
    def select(self) -> Selection:
        """The final choice, landed on the target as nearly as the units allow."""

    def select_at(self, target: float) -> Selection:
        """What `select` would choose for another target; training stays held to its own.

        Args:
            target: share to remove of what the budget counts.
        """
        plan = self.plan
        self.plan = replace(plan, budget=replace(plan.budget, target=target))
        try:
            return self.select()
        finally:
            self.plan = plan

    def gates_of(self, selection: Any) -> Mapping[str, Tensor]:
        """Gates of a choice that `select` made, of at least the kinds that `evaluation_gates` gives."""
        gates: Mapping[str, Tensor] = selection.gates
        return gates

    def unit_of(self, kind: str) -> str:
        """What kind of unit the gates of a kind decide over."""
        return kind

    @abstractmethod
    def metrics(self, step: int) -> dict[str, float]:
        """What to log: expected and hard sparsity, target, multipliers."""

    def check_target(self) -> None:
        """Refuse a target that the method's gates cannot reach.

        Raises:
            ConfigError: naming what is reachable.
        """
        why = f"gates {', '.join(self.kinds)} can remove at most {{}} (what they do not decide over stays)"
        self.budget.check(self.budget.floor(self.kinds), why)

    def state_dict(self) -> dict[str, Tensor]:
        """Replicated tensors, for a checkpoint."""
        return {name: value.detach().clone() for name, value in self.parameters().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` gave."""
        with torch.no_grad():
            for name, value in self.parameters().items():
                value.copy_(state[name])
