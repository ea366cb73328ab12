"""The steps of all stages that train: fine-tune the teacher, prune, recover.

A step: gates from the method, what it wants to see of the model, a forward and backward pass for every micro-batch,
one flat all-reduce for everything that is replicated, the engine's step, and, if the engine applied it, the
replica's. Where a method trains no weights, a step is what the method sees, and the replica's step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from dsprune.config import OptimConfig
from dsprune.distill import UNMATCHED, draw_layers, match_layers
from dsprune.engine.learning import guard
from dsprune.engine.learning.batches import Batches, MicroBatch
from dsprune.engine.learning.evidence import Seen, Witness, first_trial, named
from dsprune.engine.learning.replica import Reduced, Replica, reduce_flat
from dsprune.engine.learning.student import CONSTANT, PARTS, TeacherSignal
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.ranks.pulse import pulse
from dsprune.engine.ranks.stop import Stop, describe
from dsprune.engine.ranks.world import World
from dsprune.engine.zero.gather import let_go, whole
from dsprune.engine.zero.refusals import refusals
from dsprune.methods import Evidence
from dsprune.methods.noise import stable_seed
from dsprune.methods.parts import ReadsWeights, gates_from
from dsprune.structure import ffn_alive

__all__ = ["LayerMatcher", "StepResult", "Trainer", "learning_rate"]

CALIBRATION_SCALE = 2.0**10
"""What losses are multiplied with under fp16 where no optimizer looks for a factor."""
FINGERPRINT_EVERY = 100
"""Optimizer steps between two checks that all replicas are bitwise equal."""


def learning_rate(config: OptimConfig, step: int, total_steps: int, *, decay_from: int = 0) -> float:
    """Learning rate of one step: linear warm-up, then constant, or decaying linearly to zero.

    Args:
        config: peak rate, warm-up share and schedule.
        step: optimizer step.
        total_steps: length of the stage.
        decay_from: step before which nothing decays (the pre-pruning phase).
    """
    warmup = round(config.warmup * total_steps)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    begin = max(warmup, decay_from)
    return config.lr * min(1.0, (total_steps - step) / max(1, total_steps - begin))


@dataclass
class LayerMatcher:
    """Which student layer learns from which teacher layer, step after step.

    Attributes:
        rule: fixed, free or monotone.
        teacher_layers: that may teach, counted from 1; 0 stands for the embeddings.
        sources: per student layer, the dense layer that it was (from 0).
        stacks: per teacher layer, the stack that it stands in, where there is more than one: layers of an encoder and
            of a decoder are never matched.
        distances: [teacher layers, student layers] of the last step, globally reduced.
        partners: per teacher layer, the dense student layer in its place (from 1), where that is another one.
        student_stacks: as `stacks` for the layers of the dense student, where those are others.
        draw: which of the teacher layers teach at a step: all, random or quarters.
        seed: of the draws.
    """

    rule: Any
    teacher_layers: Sequence[int]
    sources: Sequence[int]
    stacks: Sequence[int] = ()
    distances: Tensor | None = None
    partners: Sequence[int] = ()
    student_stacks: Sequence[int] = ()
    draw: Literal["all", "random", "quarters"] = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        self.partners = self.partners or self.teacher_layers
        self.student_stacks = self.student_stacks or self.stacks

    @property
    def searches(self) -> bool:
        return self.rule != "fixed" and bool(self.teacher_layers)

    def match(self, gates: dict[str, Tensor] | None, step: int = 0) -> list[int]:
        """The match of a step; a layer can learn while its FFN sublayer lives (the paper's rule).

        Teacher layer 0, the embeddings, teaches the student's embeddings, which come after its last layer. Layers that
        do not teach at this step are unmatched.
        """
        live = [True] * len(self.sources)
        if gates is not None and "ffn" in gates and "ffn_dim" in gates:
            live = ffn_alive(gates).tolist()
        match = [UNMATCHED if layer > 0 else len(self.sources) for layer in self.teacher_layers]
        drawn = draw_layers(self.draw, len(match), stable_seed("teacher layers", self.seed, step))
        teaching = [i for i in drawn if self.teacher_layers[i] > 0]
        for stack in sorted(set(self.stacks)) or [0]:
            theirs = [i for i in teaching if _stack(self.stacks, self.teacher_layers[i] - 1) == stack]
            ours = [j for j, source in enumerate(self.sources) if _stack(self.student_stacks, source) == stack]
            found = match_layers(
                self.rule,
                partners=[self.partners[i] for i in theirs],
                live=[live[j] for j in ours],
                sources=[self.sources[j] for j in ours],
                distances=None if self.distances is None else self.distances[theirs][:, ours],
            )
            for i, j in zip(theirs, found, strict=True):
                match[i] = UNMATCHED if j == UNMATCHED else ours[j]
        return match


def _stack(stacks: Sequence[int], layer: int) -> int:
    """Stack of a layer, counted from 0."""
    return stacks[layer] if stacks else 0


@dataclass
class StepResult:
    """What one optimizer step gave, the same on every rank."""

    losses: dict[str, float]
    applied: bool
    match: list[int] = field(default_factory=list)
    stop: str | None = None
    """Why the run was asked to stop meanwhile; None to go on."""


class Trainer:
    """Runs optimizer steps of one stage.

    Args:
        engine: the student's engine.
        batches: training data of this rank.
        optim: learning rate and its schedule.
        total_steps: length of the stage.
        teacher: who teaches; None in the teacher stage.
        matcher: layer matching; None without layerwise distillation.
        replica: a method's state; None outside the prune stage.
        stop: tells whether this rank was asked to stop; None where nobody asks.
    """

    def __init__(
        self,
        *,
        stage: str,
        engine: Any,
        world: World,
        batches: Batches,
        optim: OptimConfig,
        total_steps: int,
        seed: int,
        teacher: Teacher | None = None,
        matcher: LayerMatcher | None = None,
        replica: Replica | None = None,
        stop: Stop | None = None,
    ) -> None:
        self.stage = stage
        self.engine = engine
        self.world = world
        self.batches = batches
        self.optim = optim
        self.total_steps = total_steps
        self.seed = seed
        self.teacher = teacher
        self.matcher = matcher
        self.replica = replica
        self.stop = stop or Stop()
        self.trains_weights = replica is None or replica.method.trains_weights
        self.witness = Witness(engine, batches)
        self.decay_from = gates_from(replica.method) if replica else 0
        self.skipped = 0

    def step(self, step: int) -> StepResult:
        """One optimizer step. Collective: all ranks must call.

        Raises:
            NumericsError: losses or gate gradients that are not finite, or replicas that drifted apart.
            ConfigError: in the engine's first step, where DeepSpeed first meets some of its configuration.
        """
        if self.engine.global_steps > 0:
            return self._step(step)
        with refusals(self.engine.checked_config):
            return self._step(step)

    def _step(self, step: int) -> StepResult:
        self.engine.train(self.trains_weights)
        pulse.at(stage=self.stage, step=step, phase="gates")
        where = f"{self.stage} step {step}"
        gates = self.replica.gates(step, self.world.device) if self.replica else None
        if self.replica is not None:
            guard.check_gates(where, self.replica.current or {}, self.replica.method.parameters())
        wanted: Evidence = self.replica.method.evidence(step) if self.replica and gates is not None else "none"
        match = self.matcher.match(self.replica.current if self.replica else None, step) if self.matcher else []
        self._set_lr(step)
        scale = self._loss_scale()
        sums: dict[str, Tensor] = {}
        accumulation = self.batches.plan.accumulation
        for micro_step in range(accumulation):
            for name, value in self._micro_step(step, micro_step, gates, match, wanted).items():
                sums[name] = sums[name] + value if name in sums else value
            if micro_step < accumulation - 1 and self.trains_weights:
                self.engine.step()
        pulse.at(phase="after backward")
        if wanted in ("gradient", "probe"):
            sums |= self._gate_gradients(gates, scale)
        reduced = reduce_flat(self.world, sums | {"stop": torch.tensor(self.stop.flags())})
        if not reduced.finite and (scale == 1.0 or not self.trains_weights):
            raise guard.not_finite(self.world, where, sums, self.batches.examples(step))
        applied = reduced.finite and (not self.trains_weights or self._step_weights(where, scale))
        self._after(step, reduced, applied, wanted)
        losses = dict(zip(PARTS, reduced.tensors["losses"].tolist(), strict=True))
        return StepResult(losses, applied, match, describe(reduced.tensors["stop"].tolist()))

    def _step_weights(self, where: str, scale: float) -> bool:
        """Let the engine step; whether it applied the step."""
        pulse.at(phase="engine step")
        self.engine.step()
        if scale == 1.0:
            guard.check_norm(where, self.engine.get_global_grad_norm())
        return bool(self.engine.was_step_applied())

    def _micro_step(
        self, step: int, micro_step: int, gates: dict[str, Tensor] | None, match: list[int], wanted: Evidence
    ) -> dict[str, Tensor]:
        """What one micro-batch adds to the sums of a step: losses, distances of layers, and what the method sees."""
        batch = self.batches.micro_batch(step, micro_step)
        pulse.at(phase="teacher forward")
        teacher_signal = self._teacher_signal(batch, match)
        # Dropout is a function of its place in the run, so that a resumed run repeats it exactly.
        seed = stable_seed("dropout", self.stage, self.seed, step, micro_step, self.world.rank)
        torch.manual_seed(seed)
        seen = Seen()
        if gates is not None and (wanted != "gradient" or not self.trains_weights):
            seen = self._witness(wanted, step, micro_step, batch, teacher_signal, gates)
            gates = {kind: gate.detach() for kind, gate in gates.items()}
            gates = first_trial(gates) if wanted == "loss" else gates
        found = {f"gate.{name}": value for name, value in seen.sums.items()}
        accumulation = self.batches.plan.accumulation
        if not self.trains_weights:
            let_go(self.engine)
            parts = torch.zeros(len(PARTS)) if seen.parts is None else seen.parts
            return {"losses": parts / accumulation, **found}
        torch.manual_seed(seed)
        pulse.at(phase="forward")
        # A copy of the dict: ZeRO-3 rewrites the dicts among its arguments, and the leaves must stay ours.
        loss, parts, distances = self.engine(
            batch.inputs, batch.labels, batch.num_targets, gates and dict(gates), teacher_signal
        )
        pulse.at(phase="backward")
        self.engine.backward(loss)
        return {"losses": parts / accumulation, "distances": distances / accumulation, **found}

    def _witness(
        self,
        wanted: Evidence,
        step: int,
        micro_step: int,
        batch: MicroBatch,
        teacher_signal: TeacherSignal | None,
        gates: dict[str, Tensor],
    ) -> Seen:
        """The passes that a method's evidence takes beside the training pass, if any."""
        if wanted == "none":
            return Seen()
        pulse.at(phase=wanted)
        scale = self._loss_scale()
        if wanted == "squares":
            return self.witness.squares(step, micro_step, gates, scale=scale)
        if wanted == "loss":
            return self.witness.trials(batch, gates)
        return self.witness.probe(batch, teacher_signal, gates, scale=scale)

    def _teacher_signal(self, batch: MicroBatch, match: list[int]) -> TeacherSignal | None:
        if self.teacher is None:
            return None
        distill = self.engine.module.distill
        # A decoder beside an encoder reads what it is to write, one place later.
        stacks = max(self.teacher.layer_stacks, default=0) + 1
        index = (batch.token_index, batch.target_index)[:stacks]
        counts = (batch.num_tokens, batch.num_targets)[:stacks]
        taught, hidden, attentions = self.teacher.teach(batch.inputs, batch.labels, index, distill)
        search = self.matcher is not None and self.matcher.searches
        about = (self.teacher.stacks, index, counts, match, search)
        return TeacherSignal(taught, hidden, *about, attentions, batch.num_pairs)

    @staticmethod
    def _gate_gradients(gates: dict[str, Tensor] | None, scale: float) -> dict[str, Tensor]:
        """Gradients that this rank's passes left on the gates, unscaled."""
        return {
            f"gate.{kind}": (gate.grad if gate.grad is not None else torch.zeros_like(gate)) / scale
            for kind, gate in (gates or {}).items()
        }

    def _after(self, step: int, reduced: Reduced, applied: bool, wanted: Evidence) -> None:
        self.skipped = 0 if applied else self.skipped + 1
        guard.check_skipped(f"{self.stage} step {step}", self.skipped, fp16=self.engine.fp16_enabled())
        if self.matcher is not None and self.matcher.searches and reduced.finite:
            self.matcher.distances = reduced.tensors["distances"]
        if self.replica is not None and applied:
            found = {k.removeprefix("gate."): v for k, v in reduced.tensors.items() if k.startswith("gate.")}
            method = self.replica.method
            if isinstance(method, ReadsWeights) and method.wants_weights(step):
                method.weigh(lambda name: whole(self.engine.module.model, name))
            self.replica.step(step, named(wanted, found, self.world.size))
        if self.replica is not None and step % FINGERPRINT_EVERY == 0:
            self.replica.check_equal(self.world, step)

    def lr(self, step: int) -> float:
        return learning_rate(self.optim, step, self.total_steps, decay_from=self.decay_from)

    def _set_lr(self, step: int) -> None:
        if not self.trains_weights:
            return
        for i, group in enumerate(self.engine.basic_optimizer.param_groups):
            group["lr"] = self.optim.lr if i == CONSTANT else self.lr(step)

    def _loss_scale(self) -> float:
        """Factor that losses have while they are differentiated: 1 outside fp16."""
        if not self.engine.fp16_enabled():
            return 1.0
        if not self.trains_weights:
            return CALIBRATION_SCALE
        optimizer = self.engine.optimizer
        scale = optimizer.loss_scale if hasattr(optimizer, "loss_scale") else optimizer.cur_scale
        return float(scale)
