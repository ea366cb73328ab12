"""The student: a model with gates, distillation projections and its losses, as one ZeRO-sharded engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsprune.config import DistillConfig
from dsprune.distill import UNMATCHED, HiddenTap, layer_distances, layer_loss, logit_loss
from dsprune.engine.ds_config import zero_stage
from dsprune.engine.models import encoder_layers
from dsprune.engine.requirements import quiet_import
from dsprune.structure import Gates, Gating
from dsprune.tasks import Task

deepspeed = quiet_import()

__all__ = ["PARTS", "Lesson", "Student", "adamw", "build_student_engine"]

PARTS = ("total", "logits", "layers", "labels")
"""Order of the loss parts that `Student.forward` returns."""


@dataclass
class Lesson:
    """What the teacher says about one micro-batch.

    Attributes:
        logits: [batch, classes].
        hidden: [teacher layers, tokens, width], or None where no layers teach.
        token_index: [tokens] positions of real tokens in the flattened [batch * length].
        num_tokens: [] real tokens of a mean micro-batch of this step.
        match: for each teacher layer the student layer that learns from it, or `UNMATCHED`.
        search: whether the distances of all pairs are wanted.
    """

    logits: Tensor
    hidden: Tensor | None
    token_index: Tensor
    num_tokens: Tensor
    match: Sequence[int]
    search: bool


class Student(nn.Module):
    """A model, its gates and its projection onto the teacher's width.

    Args:
        model: dense or compact model with a task head.
        task: whose loss on the labels is wanted where `distill.labels` is not 0, or where nobody teaches.
        distill: weights of the losses; None where nobody teaches.
        teacher_width: width of the teacher's hidden states; the projection starts as the identity.
        projection: weight [teacher width, width] and bias [teacher width] to start from instead.
        gating: gates of the model, if any.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        task: Task,
        *,
        distill: DistillConfig | None = None,
        teacher_width: int | None = None,
        projection: tuple[Tensor, Tensor] | None = None,
        gating: Gating | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.task = task
        self.distill = distill
        self.gating = gating
        self.tap: HiddenTap | None = None
        self.projection: nn.Linear | None = None
        if distill is not None and distill.layers > 0 and teacher_width is not None:
            width = int(model.config.hidden_size)
            self.projection = nn.Linear(width, teacher_width)
            self._start_projection(projection)
            self.tap = HiddenTap(model, encoder_layers(model))

    def _start_projection(self, start: tuple[Tensor, Tensor] | None) -> None:
        assert self.projection is not None
        if start is None:
            nn.init.eye_(self.projection.weight)
            nn.init.zeros_(self.projection.bias)
            return
        with torch.no_grad():
            self.projection.weight.copy_(start[0])
            self.projection.bias.copy_(start[1])

    def forward(
        self,
        inputs: Mapping[str, Tensor],
        labels: Tensor | None = None,
        gates: Gates | None = None,
        lesson: Lesson | None = None,
    ) -> tuple[Tensor, ...]:
        """Losses of one micro-batch; without labels, the logits.

        Returns:
            `(logits,)`, or `(loss, parts [len(PARTS)], distances)` with distances [teacher layers,
            student layers], empty where none are wanted. Only `loss` carries a gradient.
        """
        if self.gating is not None:
            self.gating.set(gates)
        logits = self.model(**inputs).logits
        if labels is None:
            if self.tap is not None:
                self.tap.clear()
            return (logits,)
        if lesson is None or self.distill is None:
            loss = self.task.loss(logits.float(), labels)
            return self._result(loss, labels=loss)
        weights = self.distill
        by_logits = logit_loss(logits, lesson.logits, temperature=weights.temperature)
        total = weights.logits * by_logits
        by_layers, distances = self._layerwise(lesson)
        if by_layers is not None:
            total = total + weights.layers * by_layers
        by_labels = self.task.loss(logits.float(), labels) if weights.labels > 0 else None
        if by_labels is not None:
            total = total + weights.labels * by_labels
        return self._result(total, logits=by_logits, layers=by_layers, labels=by_labels, distances=distances)

    def _result(self, total: Tensor, *, distances: Tensor | None = None, **parts: Tensor | None) -> tuple[Tensor, ...]:
        zero = total.new_zeros(())
        named = {"total": total, **parts}
        values = torch.stack([(zero if (part := named.get(name)) is None else part).detach() for name in PARTS])
        return total, values, total.new_zeros(0) if distances is None else distances

    def _layerwise(self, lesson: Lesson) -> tuple[Tensor | None, Tensor | None]:
        if self.tap is None or self.projection is None or lesson.hidden is None:
            return None, None
        states = self.tap.take(lesson.token_index)
        teacher = lesson.hidden
        distances = None
        if lesson.search:
            with torch.no_grad():
                projected = self.projection(torch.stack([state.detach() for state in states]))
                distances = layer_distances(projected, teacher, num_tokens=lesson.num_tokens)
        pairs = [(i, j) for i, j in enumerate(lesson.match) if j != UNMATCHED]
        if not pairs:
            return None, distances
        learned = self.projection(torch.stack([states[j] for _, j in pairs]))
        target = teacher[[i for i, _ in pairs]]
        return layer_loss(learned, target, num_tokens=lesson.num_tokens), distances


def adamw(student: nn.Module, *, lr: float, weight_decay: float, ds_config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """AdamW over a student's parameters, decay kept off biases and norms.

    Where ZeRO offloads the optimizer, DeepSpeed's CPU Adam; else torch's fused one, ten times as fast as the
    unfused on CPU, too.
    """
    named = [(name, p) for name, p in student.named_parameters() if p.requires_grad]
    decayed = [p for name, p in named if not name.endswith("bias") and "norm" not in name.lower()]
    plain = [p for name, p in named if name.endswith("bias") or "norm" in name.lower()]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
    if ds_config.get("zero_optimization", {}).get("offload_optimizer", {}).get("device", "none") != "none":
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, lr=lr, adamw_mode=True)  # type: ignore[no-any-return]
    return torch.optim.AdamW(groups, lr=lr, fused=True)


def build_student_engine(student: Student, ds_config: Mapping[str, Any], *, lr: float, weight_decay: float) -> Any:
    """The student as a DeepSpeed engine. Collective: all ranks must call."""
    optimizer = adamw(student, lr=lr, weight_decay=weight_decay, ds_config=ds_config)
    engine, *_ = deepspeed.initialize(model=student, optimizer=optimizer, config=dict(ds_config))
    assert engine.zero_optimization_stage() == zero_stage(ds_config)
    return engine
