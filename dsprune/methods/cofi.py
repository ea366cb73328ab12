"""CoFi: coarse- and fine-grained structured pruning with learned masks (Xia, Zhong, Chen, ACL 2022, arXiv 2204.00408).

Five kinds of gates (section 3.1): heads, FFN neurons, whole attention and FFN sublayers, and the
hidden dimensions of the residual stream. Each has a log-alpha; gates are sampled from the
hard-concrete distribution, and the expected sparsity is held to a target that warms up linearly
(section 3.2). A removed sublayer is the identity, its norm included.

Where paper and code differ, and where neither is followed:

- The expected size counts every encoder parameter of the exported model, norms and biases included,
  and a sublayer whose fine units are all gone counts as gone. Paper and code count matrices only,
  and the code's masked and exported models disagree there.
- All five groups start (almost) open. The code starts the FFN neurons at probability one half, which
  halves every FFN activation at the moment when the gates come on.
- The pre-pruning phase is as long as the options say. In the code its length is fixed at 100 steps.
- One noise sample per optimizer step, the same on all ranks and accumulation steps: the code samples
  apart in every process.
- The learning rate of the weights is constant before pruning starts and decays over the rest. The
  code rebuilds optimizer and schedule at that point; here Adam's moments go on.
- The expected sparsity is held to the target by projection (`constraint.py`); paper and code let two multipliers
  ascend, which is `method.constraint = "ascent"`.
- The final gates are landed on the target by their exact count. The code keeps whatever the expected
  value became, 94.3 to 94.5% for its published "95%".
- `[shape]` (Sheared LLaMA, `shapes.py`) gives every layer the same sizes; the sublayers' own gates then take no
  part, and one gate a layer stands for both where the number of layers is given. Rows of a pooler go with the
  hidden dimensions then, which a stock class has as many of.
- The embeddings and their norm train like the rest; in the code no optimizer ever holds them, with or without its
  flag. `prune.freeze_embeddings` and `recover.freeze_embeddings` are that rule.
- The match of student to teacher layers is found on the batch of the step before (`distill/matching.py`), over layers
  whose FFN lives; the code takes the current batch, and asks whether the attention lives.
- Padding takes no part in the layerwise loss, nor in the distributions over tokens that question answering distils.
  The code averages over padding, and gives it probability.
- The last checkpoint is exported. The code's is the best evaluation after the expected sparsity first came within
  `sparsity_epsilon` of the target: `prune.keep_best`, which asks anew at each evaluation.
- Surviving gates are soft (up to 0.996); they are folded into the weights exactly, the hidden gates
  into embeddings, norms and output rows rather than input columns, which would leave the residual
  stream unscaled.

What some of these change, measured once (MiniLM, recipe `demo` under ZeRO-2 on one rank, one seed): with frozen
embeddings accuracy 0.982 instead of 0.990, and an expected sparsity 12 points beyond the target at the end instead of
1. Of 360 matches in 90 steps 8 (2%) were not those of the current batch, whose layerwise loss was then 0.7% above the
least; asking for attention instead of FFNs would have changed 3. Where 32 validation sentences of SST-2, or pairs of
QNLI, are padded to the longest, half of the positions are padding, and the layerwise loss with them is 0.98, or 0.95,
of that without. Of a MiniLM that had seen 30 steps of SQuAD, padded to 384 tokens, 70% of the probability at
temperature 2 lay on padding, and the divergence of a disturbed copy was 14 times that over the tokens alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import Field
from torch import Tensor

from dsprune.config import Duration, DurationField, Section
from dsprune.errors import ConfigError
from dsprune.methods.base import Plan
from dsprune.methods.constraint import Ascent, Constraint, ConstraintName, Projection
from dsprune.methods.evidence import Evidence
from dsprune.methods.hard_concrete import (
    LOG_ALPHA_MAX,
    LOG_ALPHA_MIN,
    TEMPERATURE,
    deterministic_gate,
    keep_probability,
    sample_gate,
)
from dsprune.methods.landing import land
from dsprune.methods.noise import uniform_noise
from dsprune.methods.parts import Learned
from dsprune.methods.schedules import linear_target
from dsprune.methods.size_constraints import SizeConstraints, SizeProjection, check_factored, rows
from dsprune.structure import (
    Selection,
    Structure,
    check_shape,
    find_shape,
    follow_hidden,
    gate_shapes,
    sharable_kinds,
)

__all__ = ["CoFi", "CoFiOptions"]

KINDS = ("head", "attn", "ffn", "ffn_dim", "hidden")
"""The paper's five granularities."""
COARSE = ("attn", "ffn")
"""Kinds whose every unit is a group of its own, kept or not by its own probability."""
LAYER = "layer"
"""One log-alpha for both sublayers of a layer, where the number of whole layers is given."""
SIZE_OF = {"head": "heads", "ffn_dim": "ffn", "hidden": "hidden", LAYER: "layers"}


class CoFiOptions(Section):
    """Options of CoFi, beside `method.name`."""

    distill_phase: DurationField = Duration(1, "epochs")
    """Pre-pruning phase: the dense student distils, all gates open."""
    warmup: DurationField = Duration(2, "epochs")
    """How long the target takes from 0 to `prune.target`, from the moment when pruning begins."""
    lr: float = Field(0.01, gt=0)
    """Learning rate of the log-alphas (AdamW, constant)."""
    constraint: ConstraintName = "project"
    """How the expected sparsity is held to the target: "project" moves the log-alphas back onto it after each
    step, "ascent" (the published one) lets Lagrange multipliers learn."""
    multiplier_lr: float | None = Field(None, gt=0)
    """With constraint = "ascent": learning rate of the multipliers; by default 0.01."""
    init: float = Field(LOG_ALPHA_MAX, ge=LOG_ALPHA_MIN, le=LOG_ALPHA_MAX)
    """Initial log-alpha of every gate; the default keeps each with probability 0.998."""
    temperature: float = Field(TEMPERATURE, gt=0)
    """Temperature of the hard-concrete distribution: lower puts more samples at exactly 0 and 1."""
    gates: tuple[str, ...] = KINDS
    """Granularities that take part."""


class CoFi(Learned[Structure]):
    """Learned masks at five granularities under a sparsity constraint; see the module for formulas and sources."""

    Options = CoFiOptions
    empty = "identity"
    takes_shapes = True
    catching_up = (
        'set method.constraint = "project", or raise method.lr and method.multiplier_lr, or make method.warmup and '
        "prune.duration longer"
    )

    def __init__(self, structure: Structure, options: CoFiOptions, plan: Plan) -> None:
        super().__init__(structure, options, plan)
        self.options = options
        self._check_options()
        self._start = options.distill_phase.steps(plan.steps_per_epoch)
        self._warmup = options.warmup.steps(plan.steps_per_epoch)
        self._learned = self._start
        if self._start + self._warmup >= plan.total_steps and plan.total_steps > 0:
            raise ConfigError(
                f"method.distill_phase ({self._start} steps) and method.warmup ({self._warmup}) leave no step of "
                f"prune.duration ({plan.total_steps}): shorten them or prune for longer"
            )
        check_factored(structure, plan.shape)
        check_shape(structure, plan.shape.sizes, options.gates)
        self._groups = self._learned_groups()
        self.kinds = tuple(self._by_kind(dict.fromkeys(self._groups, torch.ones(()))))
        self._check_target()
        shapes = gate_shapes(structure.sizes) | {LAYER: (structure.sizes.num_layers,)}
        noise = uniform_noise({kind: shapes[kind] for kind in self._groups}, plan.seed, -1)
        # A little spread, so that units with equal gradients do not all cross a threshold at once.
        self.log_alpha = {
            kind: (options.init - 0.01 * noise[kind]).clamp(LOG_ALPHA_MIN, LOG_ALPHA_MAX).requires_grad_()
            for kind in self._groups
        }
        optimizer = torch.optim.AdamW(self.log_alpha.values(), lr=options.lr, weight_decay=0.0)
        self.constraint = self._constraint(optimizer)
        self.multipliers = self.constraint.multipliers
        self._optimizers: list[torch.optim.Optimizer] = [optimizer, *self.constraint.optimizers()]

    def _check_options(self) -> None:
        """See that the options go together.

        Raises:
            ConfigError: naming all that do not.
        """
        options, mistakes = self.options, []
        unknown = sorted(set(options.gates) - set(KINDS))
        if unknown or not options.gates:
            mistakes.append(f"method.gates: unknown {unknown or 'empty list'}: CoFi has {', '.join(KINDS)}")
        if options.multiplier_lr is not None and options.constraint != "ascent":
            mistakes.append(
                'method.multiplier_lr is for method.constraint = "ascent": a projection has no multipliers that learn; '
                "leave it out, or set that"
            )
        if mistakes:
            raise ConfigError(*mistakes)

    @classmethod
    def kinds_of(cls, options: CoFiOptions) -> tuple[str, ...]:
        return options.gates

    def _by_kind(self, gates: dict[str, Tensor]) -> dict[str, Tensor]:
        """Gates by kind, from those by learned group: that of a layer stands for both its sublayers, and in a shape
        that of a hidden dimension for a row of the pooler as well."""
        layer = gates.pop(LAYER, None)
        gates = gates if layer is None else gates | dict.fromkeys(COARSE, layer)
        return follow_hidden(self.structure, gates) if self.plan.is_shaped else gates

    def _learned_groups(self) -> tuple[str, ...]:
        """Names of the log-alphas: the kinds of gates, or what a shape leaves of them."""
        shape, gates = self.plan.shape, self.options.gates
        if shape.sizes:
            return tuple(kind for kind, name in SIZE_OF.items() if name in shape.sizes)
        if not shape.uniform:
            return gates
        groups = sharable_kinds(self.structure, gates)
        if not groups:
            raise ConfigError(
                "shape.uniform: none of method.gates has a size that all layers of a stock model can share"
            )
        return groups

    def _constraint(self, optimizer: torch.optim.AdamW) -> Constraint:
        """What holds the log-alphas to the target, or to the sizes of a shape."""
        shape, options = self.plan.shape, self.options
        expected = None if shape.sizes else self.expected_sparsity
        shares = None
        if shape.sizes:
            counts = self._counts(shape.sizes)
            shares = {kind: counts[kind] / alpha.shape[-1] for kind, alpha in self.log_alpha.items()}
        if options.constraint == "project":
            projected = SizeProjection(self._keep, shares) if self.plan.is_shaped else None
            return Projection(self.log_alpha, expected, optimizer=optimizer, sizes=projected)
        groups = {kind: len(share) for kind, share in self._expected_shares().items()}
        sizes = SizeConstraints(groups, shares) if self.plan.is_shaped else None
        lr = 0.01 if options.multiplier_lr is None else options.multiplier_lr
        return Ascent(self.log_alpha, expected, sizes=sizes, shares=self._expected_shares, lr=lr)

    def _counts(self, shape: Mapping[str, int]) -> dict[str, int]:
        """Units to keep of each learned group; heads go in groups that share keys and values."""
        per_unit = {"head": self.structure.sizes.heads_per_group}
        return {
            kind: shape[SIZE_OF[kind]] // per_unit.get(kind, 1) for kind in self.log_alpha if SIZE_OF[kind] in shape
        }

    def _expected_shares(self) -> dict[str, Tensor]:
        """Share of its units that each layer expects to keep, by learned group: [L] or [1] float64."""
        return {kind: self._keep(rows(alpha.double())).mean(-1) for kind, alpha in self.log_alpha.items()}

    @property
    def gates_from(self) -> int:
        return self._start

    @property
    def full_target_step(self) -> int:
        return self._start + self._warmup

    def parameters(self) -> dict[str, Tensor]:
        log_alpha = {f"log_alpha.{kind}": value for kind, value in self.log_alpha.items()}
        return log_alpha | {f"multiplier.{name}": value for name, value in self.multipliers.items()}

    def optimizers(self) -> list[torch.optim.Optimizer]:
        return self._optimizers

    def gates(self, step: int) -> dict[str, Tensor] | None:
        if step < self._start:
            return None
        noise = uniform_noise({kind: tuple(a.shape) for kind, a in self.log_alpha.items()}, self.plan.seed, step)
        return self._by_kind(
            {kind: sample_gate(a, noise[kind], self.options.temperature) for kind, a in self.log_alpha.items()}
        )

    def _keep(self, log_alpha: Tensor) -> Tensor:
        return keep_probability(log_alpha, self.options.temperature)

    def _gate(self, log_alpha: Tensor, keep: Tensor) -> Tensor:
        return deterministic_gate(log_alpha, keep, self.options.temperature)

    def expected_sparsity(self, log_alpha: Mapping[str, Tensor] | None = None) -> Tensor:
        """Expected sparsity of what the budget counts, with the learned log-alphas or others: [] float64."""
        keep = {kind: self._keep(a.double()) for kind, a in (log_alpha or self.log_alpha).items()}
        return self.budget.sparsity(self._by_kind(keep))

    def target_at(self, step: int) -> float:
        return linear_target(step - self._start, target=self.budget.target, warmup_steps=self._warmup)

    def evidence(self, step: int) -> Evidence:
        return "gradient"

    def penalty(self, step: int) -> Tensor | None:
        if step < self._start:
            return None
        return self.constraint.penalty(self.target_at(step), self._progress_at(step))

    def _progress_at(self, step: int) -> float:
        return linear_target(step - self._start, target=1.0, warmup_steps=self._warmup)

    def learn(self, step: int, gates: Mapping[str, Tensor], seen: Mapping[str, Tensor]) -> None:
        super().learn(step, gates, seen)
        self._learned = step + 1

    def after_step(self) -> None:
        self.constraint.restore(self.target_at(self._learned), self._progress_at(self._learned))

    @torch.no_grad()
    def hard_gates(self, shift: float = 0.0, reopen: int = 0) -> dict[str, Tensor]:
        """Deterministic gates.

        Each group (a layer's heads or neurons, the hidden dimensions) keeps as many units as it
        expects to, the likeliest ones; a sublayer is kept if its probability is at least one half.

        Args:
            shift: added to the fine log-alphas when units are counted.
            reopen: how many of the sublayers that would go are kept after all, the likeliest ones.
        """
        gates = {}
        reopened = self._likeliest_removed()[:reopen]
        for kind, log_alpha in self.log_alpha.items():
            if kind in COARSE:
                keep = (self._keep(log_alpha) >= 0.5).long()
                keep[[layer for _, name, layer in reopened if name == kind]] = 1
                gates[kind] = self._gate(log_alpha.unsqueeze(-1), keep).squeeze(-1)
            else:
                expected = self._keep(log_alpha.double() + shift).sum(-1)
                least = 1 if kind in ("hidden", LAYER) else 0
                gates[kind] = self._gate(log_alpha, expected.round().long().clamp(min=least))
        return self._by_kind(gates)

    def _likeliest_removed(self) -> list[tuple[float, str, int]]:
        """Sublayers that the learned gates remove, likeliest first: (log-alpha, kind, layer)."""
        return sorted(
            (
                (value, kind, layer)
                for kind in COARSE
                if kind in self.log_alpha
                for layer, value in enumerate(self.log_alpha[kind].tolist())
                if float(self._keep(torch.tensor(value))) < 0.5
            ),
            reverse=True,
        )

    def evaluation_gates(self, step: int) -> dict[str, Tensor] | None:
        return None if step < self._start else self.hard_gates()

    def _shaped_gates(self) -> dict[str, Tensor]:
        """Deterministic gates of the shape that is given, or of the one nearest to what was learned."""
        shape = self.plan.shape.sizes
        if not shape:
            wanted = {SIZE_OF[kind]: float(share.detach().mean()) for kind, share in self._expected_shares().items()}
            shape = find_shape(self.structure, self.budget, wanted)
        counts = self._counts(shape)
        gates = {}
        for kind, log_alpha in self.log_alpha.items():
            gates[kind] = self._gate(log_alpha.detach(), torch.full(log_alpha.shape[:-1], counts[kind]))
        return self._by_kind(gates)

    def select(self) -> Selection:
        if self.plan.is_shaped:
            return Selection.from_gates(self.structure, self._shaped_gates(), empty=self.empty)
        reach = 3 * (LOG_ALPHA_MAX - LOG_ALPHA_MIN)
        # Sublayers are large. Where those that are left cannot fill what the target allows even with
        # all their units, the likeliest of the others come back.
        reopen, removed = 0, len(self._likeliest_removed())
        while reopen < removed and self.budget.removed(self.hard_gates(reach, reopen)) > self.budget.target:
            reopen += 1
        gates = land(
            lambda shift: self.hard_gates(shift, reopen),
            self.budget,
            {kind: a.detach() for kind, a in self.log_alpha.items()},
            reach=reach,
        )
        return Selection.from_gates(self.structure, gates, empty=self.empty)

    @torch.no_grad()
    def metrics(self, step: int) -> dict[str, float]:
        if step < self._start:
            return {}
        return {
            "sparsity/expected": float(self.expected_sparsity()),
            "sparsity/hard": self.budget.removed(self.hard_gates()),
            "sparsity/target": self.target_at(step),
            **{f"multiplier/{name}": float(value.mean()) for name, value in self.multipliers.items()},
        }
