"""The teacher: a dense model under its own ZeRO engine, forward only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from dsprune.config import DistillConfig
from dsprune.distill import AttentionTap, HiddenTap
from dsprune.engine.learning.objective import TeacherOutputs, objective_for
from dsprune.engine.models.load import announce_tables, load_model
from dsprune.engine.zero.config import dtype_of
from dsprune.engine.zero.engines import answering_engine
from dsprune.structure.layout import attention_map_modules, hidden_state_modules, layer_stacks
from dsprune.tasks import Task

__all__ = ["Teacher"]


def _tapped(model: PreTrainedModel, layers: Sequence[int]) -> list[str]:
    """Modules whose outputs are held: those of the layers that teach, and no others."""
    if not layers:
        return []
    *paths, embeddings = hidden_state_modules(model, embeddings=True)
    return [paths[i - 1] if i > 0 else embeddings for i in layers]


class Teacher:
    """A fine-tuned dense model that only answers. Building one is collective: all ranks must call.

    Args:
        source: folder or hub id of the fine-tuned model.
        task: decides the head, and the order of its outputs.
        ds_config: filled teacher configuration, ZeRO stage 0 or 3.
        layers: layers whose hidden states are wanted, counted from 1; 0 stands for the embeddings.
        attentions: whether their attention maps are wanted as well.
        from_scratch: take the configuration alone; such a teacher knows nothing.

    Attributes:
        layer_stacks: for each layer, which stack it stands in.
        stacks: for each layer that teaches, which stack it stands in.

    Raises:
        ArchitectureError: the model's labels are not the task's, or weights of it are missing.
        ConfigError: DeepSpeed refuses the configuration.
    """

    def __init__(
        self,
        source: str,
        task: Task,
        ds_config: Mapping[str, Any],
        layers: Sequence[int] = (),
        *,
        attentions: bool = False,
        from_scratch: bool = False,
    ) -> None:
        model = load_model(source, task, ds_config, from_scratch=from_scratch)
        self.width = int(model.config.hidden_size)
        self.objective = objective_for(task, model)
        model.to(dtype_of(ds_config))
        self.layer_stacks = layer_stacks(model)
        self.stacks = tuple(self.layer_stacks[i - 1] if i > 0 else 0 for i in layers)
        self.has_taps = bool(layers)
        self.tap = HiddenTap(model, _tapped(model, layers), self.stacks)
        self.attention_tap: AttentionTap | None = None
        if attentions:
            model.set_attn_implementation("eager")
            modules = attention_map_modules(model)
            self.attention_tap = AttentionTap(model, [modules[i - 1] for i in layers if i > 0])
        announce_tables(model)
        self.engine = answering_engine(model, ds_config)

    @torch.no_grad()
    def predict(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """What the task's metrics are made of: [batch, ...]. Collective under ZeRO-3."""
        return self.objective.predict(self.engine, inputs, labels)

    def answer(self, inputs: Mapping[str, Tensor], labels: Tensor) -> Tensor:
        """What `predict` gives, with nothing held of the pass."""
        outputs = self.predict(inputs, labels)
        self.let_go()
        return outputs

    @torch.no_grad()
    def teach(
        self, inputs: Mapping[str, Tensor], labels: Tensor, token_index: Sequence[Tensor], distill: DistillConfig
    ) -> tuple[TeacherOutputs, list[Tensor] | None, list[Tensor | None] | None]:
        """What is wanted of the teacher. Collective under ZeRO-3.

        Returns:
            What it says of the outputs; the hidden states of the chosen layers, [tokens, width] each, or None; their
            attention maps (embeddings have none), [batch, heads, length, length] each, or None.
        """
        taught = self.objective.teacher_outputs(self.engine, inputs, labels, distill)
        hidden = self.tap.take(*token_index) if self.has_taps else None
        return taught, hidden, self.attention_tap.take() if self.attention_tap else None

    def let_go(self) -> None:
        """Drop hidden states and maps of a forward pass that nobody took."""
        self.tap.clear()
        if self.attention_tap is not None:
            self.attention_tap.clear()
