"""Where the models that stages train, and learn from, come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from transformers import PreTrainedModel

from dsprune.config import RunConfig
from dsprune.engine.learning.teacher import Teacher
from dsprune.engine.models.load import checkpoint_activations, load_model
from dsprune.run.preflight import Preflight

__all__ = ["ModelSource", "StoredModels"]


class ModelSource(Protocol):
    """Loads models. Loading is collective: all ranks must call."""

    def student(self, source: str | None, ds_config: Mapping[str, Any]) -> PreTrainedModel:
        """A model that is to be trained.

        Args:
            source: what an earlier stage left; None is the configured model, which may lack the task's head.
            ds_config: filled configuration of the engine that it is for.
        """

    def teacher(self, source: str, layers: Sequence[int] = (), *, attentions: bool = False) -> Teacher:
        """The engine of a model that only answers.

        Args:
            source: of it.
            layers: whose hidden states are wanted, counted from 1; 0 stands for the embeddings.
            attentions: whether their attention maps are wanted as well.
        """


class StoredModels:
    """Models with the weights that their folders hold.

    Args:
        config: of the run.
        findings: what `preflight` found.
    """

    def __init__(self, config: RunConfig, findings: Preflight) -> None:
        self.config = config
        self.findings = findings

    def student(self, source: str | None, ds_config: Mapping[str, Any]) -> PreTrainedModel:
        config, task = self.config.model, self.findings.task
        if source is not None:
            model = load_model(source, task, ds_config)
        else:
            model = load_model(
                config.name,
                task,
                ds_config,
                revision=config.revision,
                from_scratch=config.from_scratch,
                fresh_head=True,
            )
        if self.config.student.activation_checkpointing:
            checkpoint_activations(model)
        return model

    def teacher(self, source: str, layers: Sequence[int] = (), *, attentions: bool = False) -> Teacher:
        return Teacher(source, self.findings.task, self.findings.teacher_ds, layers, attentions=attentions)
