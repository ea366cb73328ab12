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
from dsprune.methods.base import GateSignal, Method, Plan
from dsprune.methods.landing import land
from dsprune.methods.schedules import warmup_and_decay
from dsprune.methods.topk import count_kept, top_k, top_k_mask
from dsprune.structure import Selection, Structure, gate_shapes

__all__ = ["MLPruning", "MLPruningOptions"]

KINDS = ("head", "ffn_dim", "attn_row", "ffn_row")
REACH = 40.0
"""Shift of the thresholds beyond which every group is full, or down to one unit."""


class MLPruningOptions(Section):
    """Options of MLPruning, beside `method.name`."""

    lr: float = Field(0.01, gt=0)
    """Peak learning rate of scores and thresholds (AdamW): linear warm-up, then linear decay to zero."""
    warmup: float = Field(0.1, ge=0, lt=1)
    """Share of prune.duration during which that learning rate rises."""
    init: float = 10.0
    """Initial threshold, a logit: 10 keeps 99.995% of a group."""
    scores: Literal["magnitude", "zero"] = "magnitude"
    """What scores start from: the norm of each unit's weights, or zero, as the authors had it."""
    penalty: float = Field(20000.0, gt=0)
    """lambda_f, the weight of the regularisation at the start."""
    two_sided: bool = True
    """Pull sizes back up when they fall below the target; the authors do not."""
    gates: tuple[str, ...] = KINDS
    """Kinds of units that take part."""


class MLPruning(Method):
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
        self.score = {kind: torch.zeros(shapes[kind], requires_grad=True) for kind in options.gates}
        self.theta = {kind: torch.full((shapes[kind][0],), options.init, requires_grad=True) for kind in options.gates}
        self.check_target()
        parameters = [*self.score.values(), *self.theta.values()]
        self._optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(parameters, lr=options.lr, weight_decay=0.0)]

    @property
    def kinds(self) -> tuple[str, ...]:
        return self.options.gates

    @property
    def start_step(self) -> int:
        return 0

    @property
    def wants_magnitudes(self) -> bool:
        return self.options.scores == "magnitude"

    @torch.no_grad()
    def begin(self, magnitudes: Mapping[str, Tensor]) -> None:
        for kind, score in self.score.items():
            magnitude = magnitudes[kind].float()
            spread = magnitude.std(-1, keepdim=True).clamp(min=1e-12)
            score.copy_((magnitude - magnitude.mean(-1, keepdim=True)) / spread)

    def parameters(self) -> dict[str, Tensor]:
        scores = {f"score.{kind}": value for kind, value in self.score.items()}
        return scores | {f"theta.{kind}": value for kind, value in self.theta.items()}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self._optimizers

    def gates(self, step: int) -> dict[str, Tensor] | None:
        return {kind: top_k(self.score[kind], self.theta[kind]) for kind in self.kinds}

    def signal(self, step: int) -> GateSignal:
        return "training"

    def learn(self, step: int, gates: Mapping[str, Tensor], gradients: Mapping[str, Tensor]) -> None:
        super().learn(step, gates, gradients)
        rate = warmup_and_decay(step, total=self.plan.total_steps, warmup=self.options.warmup)
        for group in self._optimizers[0].param_groups:
            group["lr"] = self.options.lr * rate

    # --- size -------------------------------------------------------------------------------

    def remaining(self) -> Tensor:
        """R: share of the parameters that is left, at the fractional sizes of the thresholds; [] float64."""
        shares = {
            kind: torch.sigmoid(theta.double()).clamp(min=1 / self.score[kind].shape[-1])[:, None]
            for kind, theta in self.theta.items()
        }
        gates = {kind: share.expand(self.score[kind].shape) for kind, share in shares.items()}
        return 1 - self.cost.sparsity(gates, of=self.plan.target_of)

    def penalty(self, step: int) -> Tensor | None:
        tau = 1 - self.plan.target
        gap = self.remaining() - tau
        rho = gap.square() if self.options.two_sided else gap.clamp(min=0).square()
        size = float(rho.detach())
        weight = 10.0 if size < 3e-4 else max(self.options.penalty * size / max(1e-12, (1 - tau) ** 2), 50.0)
        return weight * rho

    @torch.no_grad()
    def hard_gates(self, shift: float = 0.0) -> dict[str, Tensor]:
        """Masks of the top k, with `shift` added to every threshold when units are counted."""
        return {
            kind: top_k_mask(score, count_kept(self.theta[kind].double() + shift, score.shape[-1]))
            for kind, score in self.score.items()
        }

    def deterministic(self, step: int) -> dict[str, Tensor] | None:
        return self.hard_gates()

    def _hard_sparsity(self, gates: Mapping[str, Tensor]) -> float:
        return float(self.cost.sparsity(dict(gates), of=self.plan.target_of))

    def select(self) -> Selection:
        gates = land(
            self.hard_gates,
            self._hard_sparsity,
            {kind: score.detach() for kind, score in self.score.items()},
            self.plan.target,
            reach=REACH,
        )
        return Selection.from_gates(self.structure, gates, empty=self.empty)

    def check_target(self) -> None:
        """Refuse a target below the floor of one unit a group.

        Raises:
            ConfigError: naming what is reachable.
        """
        reachable = self._hard_sparsity(self.hard_gates(-REACH - self.options.init))
        if self.plan.target > reachable:
            raise ConfigError(
                f"prune.target = {self.plan.target:g} of the {self.plan.target_of} is out of reach: MLPruning keeps a "
                f"unit of every group ({', '.join(self.kinds)}; layer by layer), which is {reachable:.4f} at most"
            )

    @torch.no_grad()
    def metrics(self, step: int) -> dict[str, float]:
        return {
            "sparsity/expected": 1 - float(self.remaining()),
            "sparsity/hard": self._hard_sparsity(self.hard_gates()),
            "sparsity/target": self.plan.target,
            **{f"kept/{kind}": float(mask.mean()) for kind, mask in self.hard_gates().items()},
        }
