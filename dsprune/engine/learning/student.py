"""The student: a model with gates, distillation projections and its losses, as one ZeRO-sharded engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsprune.config import DistillConfig
from dsprune.consolidate import verify
from dsprune.distill import UNMATCHED, AttentionTap, HiddenTap, attention_loss, layer_distances, layer_loss
from dsprune.engine.learning.objective import TeacherOutputs, objective_for
from dsprune.engine.models.load import announce_tables
from dsprune.engine.zero.config import DsConfig, calibration_config, dtype_of
from dsprune.engine.zero.engines import adamw, answering_engine, training_engine
from dsprune.structure import BlockGating, Gates, Gating
from dsprune.structure.layout import attention_map_modules, hidden_state_modules, layer_stacks
from dsprune.tasks import Task

__all__ = ["CONSTANT", "PARTS", "Student", "TeacherSignal", "build_calibrated_engine", "build_student_engine"]

PARTS = ("total", "logits", "layers", "attentions", "labels")
"""Order of the loss parts that `Student.forward` returns."""
CONSTANT = 2
"""Place of the optimizer's group that keeps its peak learning rate, if there is one."""


@dataclass
class TeacherSignal:
    """What the teacher says about one micro-batch.

    Attributes:
        taught: what the teacher says of the outputs.
        hidden: [tokens, width] of each teacher layer, or None where no layers teach.
        stacks: for each teacher layer, which stack of layers it stands in.
        token_index: for each stack, [tokens] positions of real tokens in the flattened [batch * length].
        num_tokens: for each stack, [] real tokens of a mean micro-batch of this step.
        match: for each teacher layer the student layer that learns from it, the number of layers for the
            embeddings, or `UNMATCHED`.
        search: whether the distances of all pairs are wanted.
        attentions: maps of the teacher layers that teach, the embeddings apart; None where they are not wanted.
        num_pairs: [] pairs of real tokens of a mean micro-batch of this step.
    """

    taught: TeacherOutputs
    hidden: Sequence[Tensor] | None
    stacks: Sequence[int]
    token_index: Sequence[Tensor]
    num_tokens: Sequence[Tensor]
    match: Sequence[int]
    search: bool
    attentions: Sequence[Tensor | None] | None
    num_pairs: Tensor


class Student(nn.Module):
    """A model, its gates and its projections onto the teacher's width.

    Args:
        model: dense or compact model with a task head.
        task: whose loss on the labels is wanted where `distill.labels` is not 0, or where nobody teaches.
        distill: weights of the losses; None where nobody teaches.
        teacher: width of the teacher's hidden states and the layers that teach (0: the embeddings); the
            projections start as the identity.
        projections: weight [teacher width, width] and bias [teacher width] of each, to start from instead.
        gating: gates of the model, if any.
        head_sources: for each layer, which of the teacher's heads its heads were; None where they are the same.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        *,
        distill: DistillConfig | None = None,
        teacher: tuple[int, Sequence[int]] | None = None,
        projections: Sequence[tuple[Tensor, Tensor]] = (),
        gating: Gating | BlockGating | None = None,
        head_sources: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective_for(task, model)
        self.distill = distill
        self.gating = gating
        self.tap: HiddenTap | None = None
        self.head_sources = head_sources
        self.projections = nn.ModuleList()
        by_layers = distill is not None and (distill.layers > 0 or distill.attentions > 0)
        self.stacks = layer_stacks(model) if by_layers else ()
        self.num_layers = len(self.stacks)
        if distill is not None and distill.layers > 0 and teacher is not None:
            width, layers = teacher
            count = {"separate": len(layers), "shared": 1, "none": 0}[distill.projection]
            self.projections.extend(
                nn.Linear(int(model.config.hidden_size), width, dtype=model.dtype) for _ in range(count)
            )
            self._start_projections(projections)
            with_embeddings = 0 in layers
            stacks = (*self.stacks, 0) if with_embeddings else self.stacks
            self.tap = HiddenTap(model, hidden_state_modules(model, embeddings=with_embeddings), stacks)
        self.attention_tap: AttentionTap | None = None
        if distill is not None and distill.attentions > 0 and teacher is not None:
            model.set_attn_implementation("eager")
            self.attention_tap = AttentionTap(model, attention_map_modules(model))

    def _start_projections(self, start: Sequence[tuple[Tensor, Tensor]]) -> None:
        for i, projection in enumerate(self.projections):
            assert isinstance(projection, nn.Linear)
            if not start:
                nn.init.eye_(projection.weight)
                nn.init.zeros_(projection.bias)
                continue
            with torch.no_grad():
                projection.weight.copy_(start[i][0])
                projection.bias.copy_(start[i][1])

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None,
        num_targets: Tensor | None = None,
        gates: Gates | None = None,
        teacher_signal: TeacherSignal | None = None,
        *,
        probe: bool = False,
        bare: bool = False,
    ) -> tuple[Tensor, ...]:
        """Losses of one micro-batch; without a number of targets, what metrics are made of.

        Args:
            inputs: the model's arguments.
            labels: as the task has them; None where only the model's own outputs are wanted.
            num_targets: [] what losses of the outputs are divided by; see `MicroBatch`.
            gates: of the model; None is the model as it is.
            teacher_signal: what the teacher says; None where nobody teaches.
            probe: leave out the layerwise loss, and give gated weights no gradients.
            bare: give out what the model itself does, `(outputs,)`.

        Returns:
            `(predictions,)`, or `(loss, parts [len(PARTS)], distances)` with distances [teacher layers,
            student layers], empty where none are wanted. Only `loss` carries a gradient.
        """
        if self.gating is not None:
            self.gating.set(gates)
            self.gating.frozen = probe
        if bare or labels is None:
            outputs = verify.outputs(self.model(**inputs))
            self._let_go()
            return (outputs,)
        if num_targets is None:
            predictions = self.objective.predict(self.model, inputs, labels)
            self._let_go()
            return (predictions,)
        taught = teacher_signal.taught if teacher_signal is not None else None
        scored = self.objective.losses(self.model, inputs, labels, num_targets, taught, self.distill, frozen=probe)
        if probe or teacher_signal is None or self.distill is None:
            self._let_go()
            return self._result(scored.total, logits=scored.logits, labels=scored.labels)
        weights, total = self.distill, scored.total
        by_layers, distances = self._layerwise(teacher_signal)
        if by_layers is not None:
            total = total + weights.layers * by_layers
        by_maps = self._by_attentions(teacher_signal, inputs["attention_mask"], gates)
        if by_maps is not None:
            total = total + weights.attentions * by_maps
        parts = {"logits": scored.logits, "layers": by_layers, "attentions": by_maps, "labels": scored.labels}
        return self._result(total, **parts, distances=distances)

    def _let_go(self) -> None:
        if self.tap is not None:
            self.tap.clear()
        if self.attention_tap is not None:
            self.attention_tap.clear()

    def _result(self, total: Tensor, *, distances: Tensor | None = None, **parts: Tensor | None) -> tuple[Tensor, ...]:
        zero = total.new_zeros(())
        named = {"total": total, **parts}
        values = torch.stack([(zero if (part := named.get(name)) is None else part).detach() for name in PARTS])
        return total, values, total.new_zeros(0) if distances is None else distances

    def _project(self, states: Sequence[Tensor], teacher: Sequence[int]) -> Tensor:
        """Student states through the projections of teacher layers (by position): [len(states), tokens, width]."""
        if not self.projections:
            return torch.stack(list(states))
        if len(self.projections) == 1:
            projected: Tensor = self.projections[0](torch.stack(list(states)))
            return projected
        return torch.stack([self.projections[i](state) for i, state in zip(teacher, states, strict=True)])

    @torch.no_grad()
    def _distances(self, states: Sequence[Tensor], teacher_signal: TeacherSignal) -> Tensor:
        """Distance of every student layer to every teacher layer of its stack: [teacher layers, student layers].

        It is 0 between layers of unlike stacks, which nobody reads.
        """
        taught = teacher_signal.hidden
        assert taught is not None
        distances = taught[0].new_zeros((len(taught), len(states)), dtype=torch.float32)
        for stack, num_tokens in enumerate(teacher_signal.num_tokens):
            ours = [j for j, other in enumerate(self.stacks) if other == stack]
            theirs = [i for i, other in enumerate(teacher_signal.stacks) if other == stack]
            # With one projection for all, all teacher layers of a stack are compared at once.
            for rows in [theirs] if len(self.projections) <= 1 else [[i] for i in theirs]:
                if rows and ours:
                    projected = self._project([states[j] for j in ours], rows * len(ours))
                    block = layer_distances(projected, torch.stack([taught[i] for i in rows]), num_tokens=num_tokens)
                    distances[torch.tensor(rows)[:, None], torch.tensor(ours)] = block
        return distances

    def _layerwise(self, teacher_signal: TeacherSignal) -> tuple[Tensor | None, Tensor | None]:
        if self.tap is None or teacher_signal.hidden is None:
            return None, None
        states = self.tap.take(*teacher_signal.token_index)
        layers = [state.detach() for state in states[: self.num_layers]]
        distances = self._distances(layers, teacher_signal) if teacher_signal.search else None
        losses = self._untaught(states[0], teacher_signal.match)
        for stack, num_tokens in enumerate(teacher_signal.num_tokens):
            matched = zip(teacher_signal.match, teacher_signal.stacks, strict=True)
            pairs = [(i, j) for i, (j, other) in enumerate(matched) if j != UNMATCHED and other == stack]
            if pairs:
                learned = self._project([states[j] for _, j in pairs], [i for i, _ in pairs])
                target = torch.stack([teacher_signal.hidden[i] for i, _ in pairs])
                losses.append(layer_loss(learned, target, num_tokens=num_tokens))
        return (torch.stack(losses).sum() if losses else None), distances

    def _untaught(self, state: Tensor, match: Sequence[int]) -> list[Tensor]:
        """Zeros that reach the projections which no pair of layers uses in this step.

        ZeRO-3 applies the last gradient once more to a parameter that a step does not reach.
        """
        if len(self.projections) == 1:
            used = {0} if any(j != UNMATCHED for j in match) else set()
        else:
            used = {i for i, j in enumerate(match) if j != UNMATCHED}
        return [0 * projection(state[:1]).sum() for i, projection in enumerate(self.projections) if i not in used]

    def _by_attentions(self, teacher_signal: TeacherSignal, mask: Tensor, gates: Gates | None) -> Tensor | None:
        """Sum over matched layers of the loss between attention maps, over the heads that are left."""
        if self.attention_tap is None or teacher_signal.attentions is None:
            return None
        maps = self.attention_tap.take()
        losses = []
        match = [j for j in teacher_signal.match if j != self.num_layers]  # the embeddings have no map
        for theirs, j in zip(teacher_signal.attentions, match, strict=True):
            ours = maps[j] if j != UNMATCHED else None
            if ours is None or theirs is None:
                continue
            heads = gates["head"][j] if gates is not None and "head" in gates else None
            theirs = theirs if self.head_sources is None else theirs[:, self.head_sources[j]]
            losses.append(attention_loss(ours, theirs, mask=mask, heads=heads, num_pairs=teacher_signal.num_pairs))
        return torch.stack(losses).sum() if losses else None


def build_calibrated_engine(student: Student, ds_config: DsConfig) -> Any:
    """The student as an engine whose weights stay as they are: no gradients of them, no optimizer, no masters.
    Collective: all ranks must call.

    Args:
        student: its module.
        ds_config: filled configuration of an engine that trains.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    announce_tables(student.model)
    student.requires_grad_(False)
    student.to(dtype_of(ds_config))
    return answering_engine(student, calibration_config(ds_config))


def build_student_engine(
    student: Student,
    ds_config: Mapping[str, Any],
    *,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
) -> Any:
    """The student as a DeepSpeed engine. Collective: all ranks must call.

    Args:
        student: its module.
        ds_config: filled configuration, which the engine keeps as `checked_config`.
        lr: first learning rate.
        weight_decay: of all but biases and norms.
        betas: decay of Adam's two moments.
        epsilon: added to the root of the second moment.

    Raises:
        ConfigError: DeepSpeed refuses the configuration.
    """
    announce_tables(student.model)
    apart = student.distill is not None and student.distill.projection_rate == "constant"
    optimizer = adamw(
        student,
        lr=lr,
        weight_decay=weight_decay,
        ds_config=ds_config,
        betas=betas,
        epsilon=epsilon,
        constant=lambda name: apart and name.startswith("projections."),
    )
    return training_engine(student, optimizer, ds_config)
