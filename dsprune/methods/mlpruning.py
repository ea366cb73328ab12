"""MLPruning, step 1: heads and rows by learnable top-k (Yao, Ma, Shen, Keutzer, Mahoney, arXiv 2105.14636).

Heads, FFN neurons (rows of the first FFN matrix) and the output rows of both sublayers each form one
group a layer, with a score for every unit and one threshold (`topk.py`). A pruned output row keeps its
coordinate of the residual stream: the hidden size does not shrink. There is no schedule; an adaptive
regularisation pulls the remaining share R to the target tau:

    rho = (R - tau)^2,  lambda = max(lambda_f * rho / (1 - tau)^2, 50), or 10 where rho < 3e-4

and lambda * rho joins the loss, lambda taken as a constant. At least one unit of each group stays, so
no sublayer ever goes.

Only the abstract of the paper was at hand; formulas are those of the authors' code. Where neither is
followed:

- R is the share of all parameters of the encoder, or of the model, biases and norms included, at the
  fractional sizes that the thresholds stand for. The code counts matrix entries.
- rho pulls from both sides. In the code it is max(R - tau, 0)^2, which lets the sizes fall below the
  target and stay there; `two_sided = false` is that rule.
- Scores start from the magnitude of the units' weights, standardised within each group, instead of
  equal scores of zero, with which the first units to go are those that the sort puts last.
- The mask of a head stands on its context alone. In the code it multiplies queries, keys and values;
  a masked head is the same, the straight-through gradient of an open one is not.
- The mask of a neuron stands after the activation. In the code it multiplies rows of the first FFN matrix, before it;
  a masked neuron is the same, and the straight-through gradient of an open one is sum(dL/dg * g) here and
  sum(dL/dg * g'(h) * h) there, for g the activation of h. Their cosines, layer by layer of a MiniLM on the task
  `order`: 0.77, 0.71, 0.68, 0.75, 0.57, 0.31 as published, 0.96, 0.93, 0.90, 0.95, 0.83, 0.77 after fine-tuning.
- The learning rate of scores and thresholds has a warm-up of its own, `method.warmup`; the code has one schedule, so
  that `method.warmup` is to be `prune.warmup` where its runs are repeated.
- The embeddings and their norm train like the rest; the code freezes them (`prune.freeze_embeddings = true`; what that
  did to a run of CoFi stands in `cofi.py`).
- Padding takes no part in the losses between hidden states and between attention maps; the code averages over it.
- The final sizes are landed on the target by their exact count.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dsprune.config import Section
from dsprune.errors import ConfigError
from dsprune.methods.base import Plan
from dsprune.methods.evidence import Evidence
from dsprune.methods.landing import land
from dsprune.methods.parts import Learned, Read, StartsFromWeights
from dsprune.methods.topk_groups import REACH, TopKGroups, adaptive_penalty
from dsprune.structure import Selection, Structure, gate_shapes, unit_magnitudes

__all__ = ["MLPruning", "MLPruningOptions"]

KINDS = ("head", "ffn_dim", "attn_row", "ffn_row")


class MLPruningOptions(Section):
    """Options of MLPruning, beside `method.name`."""

    lr: float = Field(0.01, gt=0)
    """Peak learning rate of scores and thresholds (AdamW): linear warm-up, then linear decay to zero."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of prune.duration during which that learning rate rises."""
    init: float = 10.0
    """Initial threshold, a logit: 10 keeps 99.995% of a group."""
    scores: Literal["magnitude", "zero", "uniform", "kaiming"] = "magnitude"
    """What scores start from: the norm of each unit's weights, or as in the authors' code: zero (what they used),
    uniform on (-scores_scale, scores_scale), or kaiming, which is uniform on (-1, 1) for scores in one column."""
    scores_scale: float = Field(1.0, gt=0)
    """With scores = "uniform": how far from zero they may start."""
    penalty: float = Field(20000.0, gt=0)
    """lambda_f, the weight of the regularisation at the start."""
    two_sided: bool = True
    """Pull sizes back up when they fall below the target; the authors do not."""
    gates: tuple[str, ...] = KINDS
    """Kinds of units that take part."""


class MLPruning(Learned[Structure], StartsFromWeights):
    """Learnable top-k in groups under an adaptive regularisation; see the module for formulas and sources."""

    Options = MLPruningOptions
    empty = "bias"

    def __init__(self, structure: Structure, options: MLPruningOptions, plan: Plan) -> None:
        super().__init__(structure, options, plan)
        self.options = options
        unknown = sorted(set(options.gates) - set(KINDS))
        if unknown or not options.gates:
            raise ConfigError(f"method.gates: unknown {unknown or 'empty list'}: MLPruning has {', '.join(KINDS)}")
        shapes = gate_shapes(structure.sizes)
        self.groups = TopKGroups(
            {kind: (shapes[kind][0], shapes[kind][-1]) for kind in options.gates},
            lr=options.lr,
            warmup=options.warmup,
            total_steps=plan.total_steps,
            init=options.init,
        )
        if options.scores in ("uniform", "kaiming"):
            self.groups.draw(options.scores_scale if options.scores == "uniform" else 1.0, plan.seed)
        self._check_target()

    @classmethod
    def kinds_of(cls, options: MLPruningOptions) -> tuple[str, ...]:
        return options.gates

    def begin(self, read: Read) -> None:
        if self.options.scores == "magnitude":
            self.groups.begin(unit_magnitudes(self.structure, read))

    def parameters(self) -> dict[str, Tensor]:
        return self.groups.parameters()

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.groups.optimizer]

    def gates(self, step: int) -> dict[str, Tensor] | None:
        return self.groups.gates()

    def evidence(self, step: int) -> Evidence:
        return "gradient"

    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        super().learn(step, gates, seen)
        self.groups.set_rate(step)

    def remaining(self) -> Tensor:
        """R: share that is left of what the budget counts, at the fractional sizes of the thresholds; [] float64."""
        return 1 - self.budget.sparsity(self.groups.shares())

    def penalty(self, step: int) -> Tensor | None:
        return adaptive_penalty(
            self.remaining(), self.budget.share, strength=self.options.penalty, two_sided=self.options.two_sided
        )

    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        return self.groups.hard_gates()

    def select(self) -> Selection:
        gates = land(
            self.groups.hard_gates,
            self.budget,
            {kind: score.detach() for kind, score in self.groups.score.items()},
            reach=REACH,
        )
        return Selection.from_gates(self.structure, gates, empty=self.empty)

    def _check_target(self) -> None:
        floor = self.budget.spent(self.groups.hard_gates(-REACH - self.options.init))
        self.budget.check(
            float(floor),
            f"MLPruning keeps a unit of every group ({', '.join(self.kinds)}; layer by layer), which is {{}} at most",
        )

    @torch.no_grad()
    def metrics(self, step: int) -> dict[str, float]:
        masks = self.groups.hard_gates()
        return {
            "sparsity/expected": 1 - float(self.remaining()),
            "sparsity/hard": self.budget.removed(masks),
            "sparsity/target": self.budget.target,
            **{f"kept/{kind}": float(mask.mean()) for kind, mask in masks.items()},
        }
