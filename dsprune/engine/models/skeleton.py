"""A model without weights: its shapes, from its configuration alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from dsprune.engine.models.labelling import label_config
from dsprune.engine.models.load import check_reads_forward, from_config
from dsprune.errors import ArchitectureError
from dsprune.files import first_line
from dsprune.pretrained import read_model_config
from dsprune.tasks import Task

__all__ = ["check_quantization", "compact_facts", "skeleton"]


def compact_facts(source: str) -> dict[str, Any] | None:
    """What the configuration of a compact folder says of its sizes; None for any other model."""
    path = Path(source) / "config.json"
    facts: dict[str, Any] | None = (
        json.loads(path.read_text(encoding="utf-8")).get("dsprune") if path.is_file() else None
    )
    return facts


def skeleton(
    source: str,
    task: Task,
    revision: str | None = None,
    *,
    what: str = "model",
    outputs: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A model with the task's head, on the meta device: shapes without weights.

    Args:
        source: folder or hub id.
        task: decides the head.
        revision: of the hub.
        what: the model's part in what goes wrong: "model" or "teacher".
        outputs: what the configuration is to say of the head, whatever its file says.

    Raises:
        ConfigError: the source cannot be read.
        ArchitectureError: no model for this task, or one whose weights are quantized.
    """
    config = read_model_config(source, revision, what=what, **label_config(task))
    check_quantization(what, source, config)
    for key, value in (outputs or {}).items():
        setattr(config, key, value)
    if task.head == "ForCausalLM":
        check_reads_forward(source, config)
    try:
        with torch.device("meta"):
            return from_config(task.head, config)
    except ValueError as error:
        raise ArchitectureError(f"{what} '{source}': {first_line(error)}") from error


def check_quantization(what: str, source: str, config: PretrainedConfig) -> None:
    """Refuse a model whose weights are stored quantized: nothing of it is a gradient's to change, or ours to cut.

    Args:
        what: "model" or "teacher".
        source: folder or hub id, for the message.
        config: the model's configuration.

    Raises:
        ArchitectureError: naming the kind of quantization.
    """
    found: Any = getattr(config, "quantization_config", None) or getattr(config, "compression_config", None)
    if not found:
        return
    table = found if isinstance(found, dict) else found.to_dict()
    kind = table.get("quant_method", "of unknown kind")
    raise ArchitectureError(
        f"{what} '{source}': its weights are quantized ({kind}): such a model can neither be pruned nor teach here: "
        "give the one that it was made from, or one with its weights restored"
    )
