"""Models and tokenizers: where they come from, and how they enter ZeRO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from dsprune.arch import family_for
from dsprune.consolidate import auto_with_own_head
from dsprune.engine.models.labelling import label_config, name_labels
from dsprune.engine.models.loading_plan import AUTO_CLASSES
from dsprune.engine.models.source_check import plan_loading
from dsprune.engine.zero.config import dtype_of, zero_stage
from dsprune.engine.zero.gather import gathered, partitioned_loading, register_external
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.files import first_line
from dsprune.pretrained import read_model_config, resolve_source
from dsprune.structure.layout import output_path, position_table
from dsprune.tasks import Task

__all__ = [
    "AUTO_CLASSES",
    "announce_tables",
    "check_reads_forward",
    "checkpoint_activations",
    "from_config",
    "label_config",
    "load_model",
    "load_tokenizer",
]

NO_COMPLAINTS = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
"""For `cached_file`, of a file that need not be there."""


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model source.

    Raises:
        ConfigError: it cannot be found or read.
    """
    folder = resolve_source(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in '{source}': {first_line(error)}") from error
    # Without any of its files transformers makes up one that knows the special tokens, and takes all else for unknown.
    files = sorted({*tokenizer.vocab_files_names.values(), "tokenizer.json"})
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in files):
        raise ConfigError(f"no tokenizer in '{source}': none of {', '.join(files)} is there")
    return tokenizer


def load_model(
    source: str,
    task: Task,
    ds_config: Mapping[str, Any],
    *,
    revision: str | None = None,
    from_scratch: bool = False,
    fresh_head: bool = False,
) -> PreTrainedModel:
    """A model with the task's head, dense or compact, ready to become an engine. Collective under ZeRO-3.

    Its outputs are in the task's order and its configuration names them as the task does. Weights that are random (a
    fresh head) come from torch's seed, which the caller sets. Under ZeRO-3 the weights never stand whole on one rank.

    Args:
        source: folder or hub id.
        task: decides the head.
        ds_config: filled configuration of the engine that the model is for.
        revision: of the hub.
        from_scratch: take the configuration alone, and begin with random weights.
        fresh_head: whether the source may lack the task's head, which then begins with random weights.

    Raises:
        ConfigError: the source cannot be read.
        ArchitectureError: a family that dsprune does not know, or a model that is not complete or does not fit the
            task.
    """
    source = resolve_source(source)
    options: dict[str, Any] = {"dtype": dtype_of(ds_config) if zero_stage(ds_config) == 3 else torch.float32}
    if from_scratch:
        config = read_model_config(source, revision, **label_config(task))
        family_for(config.model_type)
        with partitioned_loading(ds_config):
            model = from_config(task.head, config, **options)
        settings = cached_file(source, GENERATION_CONFIG_NAME, revision=revision, **NO_COMPLAINTS)
        if settings is not None and model.can_generate():
            # They belong to the folder, go along to what is exported, and hold for figures of the run, too.
            model.generation_config = GenerationConfig.from_pretrained(Path(settings).parent)
        return model
    plan = plan_loading(source, task, revision=revision, fresh_head=fresh_head)
    with partitioned_loading(ds_config):
        model = plan.load(**options)
    if plan.order is not None:
        _reorder_outputs(model, plan.order)
    name_labels(model.config, task)
    return model


def _reorder_outputs(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Let output i be what output `order[i]` was. Collective under ZeRO-3."""
    module = model.get_submodule(output_path(model))
    weights = [param for param in (module.weight, module.bias) if param is not None]
    with gathered(*weights, rewritten=True) as writes, torch.no_grad():
        for param in weights if writes else ():
            param.copy_(param[list(order)])


def from_config(head: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A model with random weights, on the device that is the default."""
    auto = AUTO_CLASSES[head]
    model: PreTrainedModel = auto_with_own_head(auto, config, lambda: auto.from_config(config, **options))
    return model


def check_reads_forward(source: str, config: PretrainedConfig) -> None:
    """Refuse, for causal language modelling, a model that sees the token which it is to predict.

    Raises:
        ArchitectureError: an encoder that is not set up as a decoder.
    """
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False):
        raise ArchitectureError(
            f"model '{source}': '{config.model_type}' reads text both ways, and task 'lm' needs a decoder, such "
            "as gpt2 or llama"
        )


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only what enters each layer for the backward pass, and compute the rest of it again.

    Raises:
        ArchitectureError: a model that cannot.
    """
    try:
        # Non-reentrant: gates enter the layers from outside, and the reentrant kind would give them no gradients.
        model.activation_checkpointing_enable({"use_reentrant": False})
    except ValueError as error:
        raise ArchitectureError(f"student.activation_checkpointing: {first_line(error)}") from error


def announce_tables(model: PreTrainedModel) -> None:
    """Tell ZeRO-3 of the table of positions, which is read without a call of the module that owns it.

    What ZeRO-3 gathers are the parameters of the module that is called; it has to be told of others.
    """
    found = position_table(model)
    if found is not None:
        reader, table = found
        register_external(reader, table.weight)
