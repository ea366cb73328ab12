"""Diagonal Fisher: heads and neurons of a fine-tuned model, chosen by a look at labelled examples, trained on nothing.

Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (NeurIPS 2022, arXiv 2204.09656). At open gates
the loss that closing unit i adds is, to second order and with the diagonal of the empirical Fisher matrix for the
Hessian, half of

    I_i = sum over examples n of (dL_n / dgate_i)^2

Where paper and code differ, and where neither is followed:

- The gradient is that of one example. The code squares the mean gradient of a batch, so that importance depends on how
  the examples were cut into batches.
- Units go one by one, the least importance per cost first, from one ranking, until the budget is met exactly; any
  budget will do. Paper and code try every number of heads and fill the rest with neurons, for multiply-adds.
- Only this first of the paper's three steps is here: no rearrangement within layers, no rescaling of what stays.
- A sublayer without units is its output bias and its norm, as the paper's masks have it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dsprune.config import Section
from dsprune.methods.base import Method, Plan
from dsprune.methods.evidence import Evidence
from dsprune.methods.ranking import Ranking, UnitGroups
from dsprune.structure import Selection, Structure, ones

__all__ = ["Fisher", "FisherOptions"]

KINDS = ("head", "ffn_dim")


class FisherOptions(Section):
    """Options of `fisher`, beside `method.name`: it has none."""


class Fisher(Method[Structure]):
    """Squared gradients of gates, and one ranking of importance per cost; see the module for formulas and source."""

    Options = FisherOptions
    empty = "bias"
    trains_weights = False

    def __init__(self, structure: Structure, options: FisherOptions, plan: Plan) -> None:
        super().__init__(structure, options, plan)
        self._check_target()
        self._price = self.budget.prices(self.kinds)
        self.importance = {kind: torch.zeros_like(price) for kind, price in self._price.items()}

    @classmethod
    def kinds_of(cls, options: FisherOptions) -> tuple[str, ...]:
        return KINDS

    def parameters(self) -> dict[str, Tensor]:
        return {f"importance.{kind}": value for kind, value in self.importance.items()}

    def gates(self, step: int) -> dict[str, Tensor] | None:
        return ones(self.structure, self.kinds)

    def evidence(self, step: int) -> Evidence:
        return "squares"

    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        for kind, squares in seen.items():
            self.importance[kind] += squares

    def _chosen(self) -> dict[str, Tensor]:
        """Masks that meet the budget with the least importance per cost removed."""
        ranking = Ranking(
            {
                kind: UnitGroups(value / self._price[kind], torch.ones_like(value), self._price[kind])
                for kind, value in self.importance.items()
            }
        )
        excess, dense = self.budget.excess(self.budget.target), float(self.budget.spent({}))
        return ranking.shortest(ranking.prefix(excess), lambda masks: dense - float(self.budget.spent(masks)) >= excess)

    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        return self._chosen() if step > 0 else None

    def select(self) -> Selection:
        return Selection.from_gates(self.structure, self._chosen(), empty=self.empty)

    def metrics(self, step: int) -> dict[str, float]:
        return {"sparsity/hard": self.budget.removed(self._chosen()), "sparsity/target": self.budget.target}
