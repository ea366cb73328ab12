"""GRAIN: gradient-based intra-attention pruning (Yang, Cui, Yao, Wang, ACL 2023, arXiv 2212.07634).

Units are single dimensions: of the queries (with their keys), of the values (with their outputs), and
FFN neurons (section 3.1). A unit's importance is the first-order Taylor term of removing it, which is
the gradient of its gate (equation 4). Scores are averaged over time; the density falls from 1 along a
cubic curve while all units stand in one ranking (section 3.2), and the rest of the run recovers.

- Gradient separation (section 3.4): scores come from the logit loss alone, weights learn from the
  hidden-state loss too. The authors run two backward passes through one graph, which breaks
  data-parallel wrappers; here a probe pass of its own differentiates the gates and nothing else.
- Structure regularisation (section 3.3): the importance of a value unit is multiplied by
  tanh(D / alpha), D being the share of its head's value units that are left, so that thin heads empty.
- Where query heads share keys and values, a head below is such a group; under rotary positions a query unit is
  a pair of dimensions, in the queries and in the key.
- `[shape]` ranks whole heads and neurons within each layer, so that all layers end with the same sizes.
- A head without values loses its queries at once, counted in the budget. A head without queries stays
  and averages uniformly. A sublayer without units is its output bias and its norm.

Where paper and code differ, and where neither is followed:

- Gradients are unscaled before they are averaged, and a step that fp16 skips leaves no trace. In the
  code scores are read from scaled gradients, and only NaNs are skipped.
- They are averaged over ranks and accumulation steps before the absolute value: the score of a batch
  does not depend on how it was cut. The code demands one process and no accumulation.
- Prices of units and the target are those of the exported model, biases and norms included, or whatever else the
  budget counts; where units that go together save more or less than their prices say, the prefix is as long as the
  exact cost asks. The code leaves out output biases and norms, and adds prices up.
- The last masks are those of the full target. The code's last update is one step short of it.
- Where units go, the shortest prefix of the ranking goes that meets the density, and steps count from 0. In the code
  it is the longest that does not, and steps count from 1: one unit fewer at the same density (of BERT-base at most
  1,538 parameters of 85 million), and the same density one step sooner. With `prune_every` above 1 units go at the last
  step of the schedule as well.
- Scores by magnitude are read after the optimizer's step, the code's before it, and without what it had masked.
- AdamW's epsilon is 1e-8 and projections train as all weights do. The code has 1e-6, and projections that join the
  optimizer after its schedule was made: constant rate, no decay. `prune.epsilon = 1e-6` and
  `distill.projection_rate = "constant"` are that: 0.982 instead of 0.984 after 40 steps (MiniLM on the task `order`,
  60%, one seed), which is one of 500 examples.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from dsprune.config import Section
from dsprune.errors import ConfigError
from dsprune.methods.base import Method, Plan
from dsprune.methods.evidence import Evidence
from dsprune.methods.noise import uniform_noise
from dsprune.methods.output_weights import Norm, output_scores
from dsprune.methods.parts import Read, ReadsWeights
from dsprune.methods.ranking import Ranking, UnitGroups
from dsprune.methods.schedules import cubic_density
from dsprune.methods.size_constraints import check_factored
from dsprune.methods.topk import top_k_mask
from dsprune.structure import (
    Selection,
    Structure,
    by_head,
    check_shape,
    find_shape,
    gate_shapes,
    head_alive,
    sharable_kinds,
)

__all__ = ["Grain", "GrainOptions"]

UNITS = {"dims": ("qk_dim", "vo_dim", "ffn_dim"), "heads": ("head", "ffn_dim")}


class GrainOptions(Section):
    """Options of GRAIN, beside `method.name`."""

    alpha: float = Field(0.3, ge=0)
    """Strength of the structure regularisation: higher empties thin heads sooner; 0 turns it off."""
    alpha_attention: float = Field(0.0, ge=0)
    """The same by the share of value units left in the layer: higher empties thin attentions sooner; 0 is off."""
    alpha_ffn: float = Field(0.0, ge=0)
    """The same for neurons, by the share of them left in the layer: higher empties thin FFNs sooner; 0 is off."""
    beta: float = Field(0.998, ge=0, lt=1)
    """Decay of the scores' moving average, per optimizer step."""
    start: float = Field(0.2, ge=0, lt=1)
    """Share of prune.duration after which units begin to go."""
    end: float = Field(0.4, gt=0, lt=1)
    """Share of prune.duration at which the target is reached."""
    prune_every: int = Field(1, ge=1)
    """Optimizer steps between two steps at which units go; scores are gathered in between."""
    probe_every: int = Field(1, ge=1)
    """Optimizer steps between two probe passes; more is cheaper and scores are noisier."""
    separation: bool = True
    """Score by the logit loss alone, in a probe pass; otherwise by the whole training loss, at no cost."""
    score: Literal["gradient", "random", "magnitude_sum", "magnitude_l1", "magnitude_linf"] = "gradient"
    """Where scores come from: gradients of gates, chance (the paper's ablation), or, with units = "heads", the size of
    the output weights as they are when units go: absolute sum, sum of absolute values, or largest absolute value."""
    units: Literal["dims", "heads"] = "dims"
    """Single dimensions, or whole heads and neurons, ranked apart (the paper's Heads+FFN baseline)."""
    ranking: Literal["apart", "together"] = "apart"
    """With units = "heads": whether heads and neurons have a ranking each, or one for both."""
    ffn_weight: float = Field(1.0, gt=0)
    """With ranking = "together": what the scores of neurons are multiplied by."""
    attention_density: float | None = Field(None, gt=0, le=1)
    """With units = "heads": share of the heads to keep; by default the same as of the neurons."""
    round_to: int = Field(1, ge=1)
    """Sizes of heads and FFNs to be multiples of this, as far as units remain; 8 or 16 suit most hardware."""


class Grain(Method[Structure], ReadsWeights):
    """Moving averages of gate gradients and one global ranking; see the module for formulas and sources."""

    Options = GrainOptions
    empty = "bias"
    takes_shapes = True

    def __init__(self, structure: Structure, options: GrainOptions, plan: Plan) -> None:
        super().__init__(structure, options, plan)
        self.options = options
        self._start = round(options.start * plan.total_steps)
        self._end = round(options.end * plan.total_steps)
        self._target = plan.budget.target
        if options.start >= options.end or (plan.total_steps > 0 and self._end >= plan.total_steps):
            raise ConfigError(
                f"method.start = {options.start:g} and method.end = {options.end:g} must be shares of prune.duration "
                f"({plan.total_steps} steps) with start < end < 1, and leave a step after the end"
            )
        self._check_options()
        self._check_target()
        self.counts = self._shape_counts()
        shapes = {kind: gate_shapes(structure.sizes)[kind] for kind in self.kinds}
        self.mask = {kind: torch.ones(shape) for kind, shape in shapes.items()}
        self.importance = {kind: torch.zeros(shape) for kind, shape in shapes.items()}
        if options.score == "random":
            self.importance = uniform_noise(shapes, plan.seed, -1)
        self._price = self.budget.prices(self.kinds)
        self._check_split()

    @classmethod
    def kinds_of(cls, options: GrainOptions) -> tuple[str, ...]:
        return UNITS[options.units]

    def _check_options(self) -> None:
        """Options that single dimensions and whole heads do not both have.

        Raises:
            ConfigError: naming all that do not go together.
        """
        options, mistakes = self.options, []
        if options.units == "dims":
            if options.score.startswith("magnitude"):
                mistakes.append(f'method.score = "{options.score}" goes with method.units = "heads"')
            if options.ranking == "together":
                mistakes.append('method.ranking is for method.units = "heads": dimensions share one ranking anyway')
        elif options.alpha_attention or options.alpha_ffn:
            mistakes.append('method.alpha_attention and method.alpha_ffn go with method.units = "dims"')
        if options.ranking == "apart" and options.ffn_weight != 1:
            mistakes.append('method.ffn_weight goes with method.ranking = "together"')
        if options.ranking == "together" and options.attention_density is not None:
            mistakes.append('method.attention_density goes with method.ranking = "apart"')
        if mistakes:
            raise ConfigError(*mistakes)

    def parameters(self) -> dict[str, Tensor]:
        masks = {f"mask.{kind}": value for kind, value in self.mask.items()}
        return masks | {f"importance.{kind}": value for kind, value in self.importance.items()}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return []

    def gates(self, step: int) -> dict[str, Tensor] | None:
        return self.mask

    def evidence(self, step: int) -> Evidence:
        if self.options.score != "gradient" or step > self._end or step % self.options.probe_every:
            return "none"
        return "probe" if self.options.separation else "gradient"

    # --- importance -------------------------------------------------------------------------

    @torch.no_grad()
    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        if seen:
            self._observe(seen)
        if self._prunes(step):
            self.mask = self._pruned(self.sparsity_at(step))

    def _prunes(self, step: int) -> bool:
        """Whether units go at a step; at the end of the schedule they do whatever `prune_every` says."""
        return step >= self._start and (step % self.options.prune_every == 0 or step >= self._end)

    def wants_weights(self, step: int) -> bool:
        return self.options.score.startswith("magnitude") and self._prunes(step) and step <= self._end

    @torch.no_grad()
    def weigh(self, read: Read) -> None:
        norm: Norm = self.options.score.removeprefix("magnitude_")  # type: ignore[assignment]
        self.importance = output_scores(self.structure, read, norm)

    def _observe(self, gradients: Mapping[str, Tensor]) -> None:
        """S <- beta * S + (1 - beta) * I, over `probe_every` steps at once."""
        beta = self.options.beta**self.options.probe_every
        for kind, gradient in gradients.items():
            importance = gradient.abs()
            for factor in self._regularisation(kind):
                importance = importance * factor
            self.importance[kind] = beta * self.importance[kind] + (1 - beta) * importance

    def _regularisation(self, kind: str) -> list[Tensor]:
        """What multiplies the importance of units of a kind: tanh(D / alpha), as the gates or wide enough for them.

        D is the share of units left in the unit's head (the paper), and in its whole attention or FFN (the code).
        """
        options, mask = self.options, self.mask[kind]
        factors = []
        if kind == "vo_dim" and options.alpha > 0:
            left = by_head(mask, self.structure.sizes.num_groups)
            density = left.mean(-1, keepdim=True)
            factors.append(torch.tanh(density / options.alpha).expand_as(left).flatten(-2))
        alpha = {"vo_dim": options.alpha_attention, "ffn_dim": options.alpha_ffn}.get(kind, 0.0)
        if alpha > 0:
            factors.append(torch.tanh(mask.mean(-1, keepdim=True) / alpha))
        return factors

    # --- selection --------------------------------------------------------------------------

    def sparsity_at(self, step: int) -> float:
        """Target sparsity at a step."""
        density = cubic_density(step, start=self._start, end=self._end, final=self.budget.share)
        return 1 - density

    def _reopened(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Scores and masks with which units that are gone come back, by score, and none that is left goes."""
        weight = {"ffn_dim": self.options.ffn_weight}
        above = 2 * max(float(score.max()) * weight.get(kind, 1.0) for kind, score in self.importance.items())
        above = above or 1.0  # nothing was scored yet
        scores = {
            kind: score + above / weight.get(kind, 1.0) * self.mask[kind] for kind, score in self.importance.items()
        }
        return scores, {kind: torch.ones_like(mask) for kind, mask in self.mask.items()}

    def _groups(self, *, reopen: bool = False) -> dict[str, UnitGroups]:
        """Units grouped by what is rounded together: dimensions by head, neurons by layer, heads alone."""
        groups, round_to = self.structure.sizes.num_groups, self.options.round_to
        scores, masks = self._reopened() if reopen else (self.importance, self.mask)

        def grouped(kind: str, value: Tensor) -> Tensor:
            return by_head(value, groups).flatten(0, 1) if kind in ("qk_dim", "vo_dim") else value

        return {
            kind: UnitGroups(
                grouped(kind, scores[kind] * (self.options.ffn_weight if kind == "ffn_dim" else 1.0)),
                grouped(kind, masks[kind]),
                grouped(kind, self._price[kind]),
                1 if kind == "head" else round_to,
            )
            for kind in self.kinds
        }

    def _pruned(self, sparsity: float, *, reopen: bool = False) -> dict[str, Tensor]:
        """Masks at a sparsity: what is gone, and the lowest-scored units beside it.

        Args:
            sparsity: to come to.
            reopen: less than what is gone already: the highest-scored of these units come back.
        """
        if self.counts is not None:
            return self._shaped(self.counts, sparsity / self.budget.target if self.budget.target > 0 else 1.0)
        groups, masks = self._groups(reopen=reopen), {}
        excess = cost_to_go = self.budget.excess(sparsity)
        if self.options.units == "heads" and self.options.ranking == "apart":
            shares = self._split(excess)
            heads = Ranking({"head": groups.pop("head")})
            masks, cost_to_go = heads.masks(heads.prefix(shares["head"])), shares["ffn_dim"]
        ranking = Ranking(groups, tied=("qk_dim", "vo_dim"))
        dense = float(self.budget.spent({}))

        def meets(chosen: Mapping[str, Tensor]) -> bool:
            return dense - float(self.budget.spent(self._by_layer({**masks, **chosen}))) >= excess

        return self._by_layer({**masks, **ranking.shortest(ranking.prefix(cost_to_go), meets)})

    def _by_layer(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Masks of groups of units, as gates."""
        return {kind: mask.view(self.mask[kind].shape) for kind, mask in masks.items()}

    def _shape_counts(self) -> dict[str, int] | None:
        """Heads (or groups) and neurons that every layer is to end with; None where layers may differ.

        Raises:
            ConfigError: a shape that single dimensions, or a stock class, cannot have.
        """
        plan, sizes = self.plan, self.structure.sizes
        if not plan.is_shaped:
            return None
        if self.options.units != "heads":
            raise ConfigError('shape: a stock model has whole heads: GRAIN needs method.units = "heads" for it')
        if self.options.attention_density is not None:
            raise ConfigError("shape: method.attention_density says how many heads to keep as well: leave it out")
        check_factored(self.structure, plan.shape)
        check_shape(self.structure, plan.shape.sizes, self.kinds)
        shape = plan.shape.sizes
        if plan.shape.uniform:
            sharable = sharable_kinds(self.structure, self.kinds)
            even = {
                name: self.budget.share for name, kind in (("heads", "head"), ("ffn", "ffn_dim")) if kind in sharable
            }
            shape = find_shape(self.structure, self.budget, even)
        heads = shape.get("heads", sizes.num_heads) // sizes.heads_per_group
        return {"head": heads, "ffn_dim": shape.get("ffn", sizes.ffn_dim)}

    def _shaped(self, counts: Mapping[str, int], progress: float) -> dict[str, Tensor]:
        """Masks on the way to a shape: in every layer the units of the highest scores, as many in each."""
        masks = {}
        for kind, mask in self.mask.items():
            left = torch.where(mask != 0, self.importance[kind], -torch.inf)
            count = round(mask.shape[1] - (mask.shape[1] - counts[kind]) * progress)
            masks[kind] = top_k_mask(left, torch.full((len(mask),), count))
        return masks

    def _split(self, budget: float) -> dict[str, float]:
        """Cost to remove from heads and from neurons, which are ranked apart."""
        heads, neurons = (float(self._price[kind].sum()) for kind in ("head", "ffn_dim"))
        from_heads = budget * heads / (heads + neurons)
        if self.options.attention_density is not None:
            # On the way to the target both shrink in proportion.
            final = self.budget.excess(self.budget.target)
            from_heads = (1 - self.options.attention_density) * heads * min(1.0, budget / final if final > 0 else 0.0)
        return {"head": from_heads, "ffn_dim": budget - from_heads}

    def _check_split(self) -> None:
        if self.options.attention_density is None:
            return
        if self.options.units != "heads":
            raise ConfigError('method.attention_density goes with method.units = "heads": dimensions share one ranking')
        share = self._split(self.budget.excess(self.budget.target))["ffn_dim"]
        most = float(self._price["ffn_dim"].sum())
        if not 0 <= share <= most:
            raise ConfigError(
                f"method.attention_density = {self.options.attention_density:g} does not go with {self.budget.asked}: "
                f"{share:,.0f} would have to go from FFNs that have {most:,.0f}"
            )

    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        return None if step <= self._start else self.mask

    def select(self) -> Selection:
        target = self.budget.target
        reopen = target < self._target and self.budget.removed(self.mask) > target
        return Selection.from_gates(self.structure, self._pruned(target, reopen=reopen), empty=self.empty)

    def metrics(self, step: int) -> dict[str, float]:
        full = {kind: torch.ones(shape) for kind, shape in gate_shapes(self.structure.sizes).items()} | self.mask
        return {
            "sparsity/hard": self.budget.removed(self.mask),
            "sparsity/target": self.sparsity_at(step),
            "structure/heads": float(head_alive(full).sum()),
            **{f"structure/{kind}": float(mask.sum()) for kind, mask in self.mask.items()},
        }
