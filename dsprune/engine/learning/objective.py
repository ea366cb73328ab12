"""From a model's forward pass to losses and predictions: by its outputs, or by its head where outputs are too many."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from dsprune.config import DistillConfig
from dsprune.distill import TeacherLogits, TeacherStates, TopLogits, VocabularyHead, chunked_losses, top_logits
from dsprune.engine.zero.gather import gathered
from dsprune.tasks import LabelTask, Task, TextTask
from dsprune.tasks.losses import IGNORED

__all__ = ["Objective", "TaskLosses", "TeacherOutputs", "objective_for"]

TeacherOutputs = Tensor | TeacherLogits
"""What a teacher says of one micro-batch: its outputs in the task's order of labels, or logits to be had by chunks."""


@dataclass
class TaskLosses:
    """Losses of the outputs of one micro-batch, [] each; None where a part is not wanted.

    Attributes:
        total: weighted sum of the parts; it alone carries gradients.
        logits: against the teacher's outputs.
        labels: of the task itself.
    """

    total: Tensor
    logits: Tensor | None = None
    labels: Tensor | None = None


class Objective(ABC):
    """What is asked of a model for a task: predictions, what it has to say as a teacher, losses."""

    @abstractmethod
    def predict(self, run: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """What the task's metrics are made of: [batch, ...]. Collective under ZeRO-3.

        Args:
            run: the model, or the engine around it.
            inputs: of a batch.
            labels: of the batch.
        """

    @abstractmethod
    def teacher_outputs(
        self, run: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor, distill: DistillConfig
    ) -> TeacherOutputs:
        """What a teacher has to say for `losses`. Collective under ZeRO-3."""

    @abstractmethod
    def losses(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        count: Tensor,
        taught: TeacherOutputs | None,
        distill: DistillConfig | None,
        *,
        frozen: bool,
    ) -> TaskLosses:
        """Forward pass and losses of a micro-batch. Collective under ZeRO-3.

        Args:
            run: the model.
            inputs: of the micro-batch.
            labels: of the micro-batch.
            count: [] targets of a mean micro-batch of the step.
            taught: by the teacher; None where nobody teaches.
            distill: weights of the parts; None where nobody teaches.
            frozen: the pass is for the gates alone, and weights get no gradients.
        """


class OutputObjective(Objective):
    """Losses from all outputs.

    Args:
        task: whose outputs they are.
    """

    def __init__(self, task: LabelTask) -> None:
        self.task = task

    def predict(self, run: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.task.outputs(run(**inputs))

    def teacher_outputs(
        self, run: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor, distill: DistillConfig
    ) -> TeacherOutputs:
        return self.predict(run, inputs, labels)

    def losses(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        count: Tensor,
        taught: TeacherOutputs | None,
        distill: DistillConfig | None,
        *,
        frozen: bool,
    ) -> TaskLosses:
        outputs = self.task.outputs(run(**inputs)).float()
        if taught is None or distill is None:
            loss = self.task.loss(outputs, labels, count=count)
            return TaskLosses(loss, labels=loss)
        assert isinstance(taught, Tensor)
        temperature = distill.temperature
        by_logits = self.task.logit_loss(outputs, taught.float(), labels, temperature=temperature, count=count)
        # A regression has no temperature.
        if distill.logit_scale == "none" and self.task.problem != "regression":
            by_logits = by_logits / temperature**2
        total = distill.logits * by_logits
        if distill.labels == 0:
            return TaskLosses(total, by_logits)
        by_labels = self.task.loss(outputs, labels, count=count)
        return TaskLosses(total + distill.labels * by_labels, by_logits, by_labels)


class VocabularyObjective(Objective):
    """Losses by chunks of tokens, asked of the model's head.

    Args:
        task: whose labels are tokens.
        model: before it becomes an engine.
    """

    def __init__(self, task: TextTask, model: PreTrainedModel) -> None:
        self.task = task
        self.model = model
        self.head = VocabularyHead(model.get_output_embeddings())

    def predict(self, run: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        return self.task.predict(run, self.head, inputs, labels)

    def teacher_outputs(
        self, run: Callable[..., Any], inputs: Mapping[str, Tensor], labels: Tensor, distill: DistillConfig
    ) -> TeacherOutputs:
        where = labels != IGNORED

        def question(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, ...]:
            states = hidden[where]
            if distill.top_k is None:
                return (states,)
            k, temperature = distill.top_k, distill.temperature
            top = top_logits(states, weight, bias, k=k, temperature=temperature, chunk=self.task.chunk)
            return top.values, top.indices, top.rest

        answer = self.head.ask(question, run, **self.task.arguments(self.model, inputs, labels))
        if distill.top_k is not None:
            return TopLogits(*answer)
        module = self.head.module
        return TeacherStates(answer[0], module.weight, module.bias, lambda: gathered(*module.parameters()))

    def losses(
        self,
        run: Callable[..., Any],
        inputs: Mapping[str, Tensor],
        labels: Tensor,
        count: Tensor,
        taught: TeacherOutputs | None,
        distill: DistillConfig | None,
        *,
        frozen: bool,
    ) -> TaskLosses:
        where = labels != IGNORED
        wanted = labels[where]
        with_labels = taught is None or distill is None or distill.labels > 0
        shares = _shares(taught, distill)

        def parts_of(logits: Tensor, rows: slice) -> Tensor:
            parts = []
            if taught is not None and distill is not None:
                assert not isinstance(taught, Tensor)
                scale = distill.temperature**2 if distill.logit_scale == "temperature" else 1.0
                parts.append(taught.divergence(logits, rows, distill.temperature) * scale)
            if with_labels:
                parts.append(F.cross_entropy(logits, wanted[rows], reduction="sum"))
            return torch.stack(parts)

        def question(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
            weights = torch.tensor(shares, dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
            chunk = self.task.chunk
            with nullcontext() if taught is None or isinstance(taught, Tensor) else taught.gathering():
                return chunked_losses(hidden[where], weight, bias, parts_of, weights, chunk=chunk, frozen=frozen)

        total, parts = self.head.ask(question, run, **self.task.arguments(self.model, inputs, labels))
        named = (parts / count).unbind()
        return TaskLosses(
            total / count,
            logits=None if taught is None else named[0],
            labels=named[-1] if with_labels else None,
        )


def _shares(taught: TeacherOutputs | None, distill: DistillConfig | None) -> list[float]:
    """Weights of the parts of a loss, in the order in which they are made."""
    if taught is None or distill is None:
        return [1.0]
    return [distill.logits, distill.labels] if distill.labels > 0 else [distill.logits]


def objective_for(task: Task, model: PreTrainedModel) -> Objective:
    """What reads a model's answers to a task; made before the model becomes an engine.

    Args:
        task: to be answered.
        model: that answers, its outputs in the task's order.
    """
    if isinstance(task, TextTask):
        return VocabularyObjective(task, model)
    assert isinstance(task, LabelTask)
    return OutputObjective(task)
