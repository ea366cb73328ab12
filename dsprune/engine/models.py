"""Models and tokenizers: where they come from, and how they enter ZeRO."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from dsprune.arch import StackSpec, family_for
from dsprune.consolidate import auto_with_own_head, position_table
from dsprune.engine.ds_config import precision, zero_stage
from dsprune.engine.labelling import label_config, name_labels
from dsprune.engine.loading import AUTO_CLASSES, family_of, first_line, output_module
from dsprune.engine.requirements import quiet_import
from dsprune.engine.source_check import plan_loading
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.tasks import Task

__all__ = [
    "AUTO_CLASSES",
    "announce_tables",
    "attention_modules",
    "check_reads_forward",
    "checkpoint_activations",
    "encoder_layers",
    "from_config",
    "gathered",
    "hidden_states",
    "label_config",
    "layer_stacks",
    "load_model",
    "load_tokenizer",
    "release",
    "resolve_source",
    "whole",
]

PACKAGE_PREFIX = "package:"
NO_COMPLAINTS = {
    "_raise_exceptions_for_missing_entries": False,
    "_raise_exceptions_for_connection_errors": False,
}
"""For `cached_file`, of a file that need not be there."""


def resolve_source(name: str) -> str:
    """A model source that `from_pretrained` understands.

    `package:NAME/SUBFOLDER` is a folder inside an installed Python package; anything else is passed
    through: a folder, or a hub id.

    Raises:
        ConfigError: the package or the folder is not there.
    """
    if name.startswith(PACKAGE_PREFIX):
        package, _, subfolder = name.removeprefix(PACKAGE_PREFIX).partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConfigError(
                f"model '{name}': package '{package}' is not installed (pip install {package.replace('_', '-')})"
            )
        name = str(Path(next(iter(spec.submodule_search_locations))) / subfolder)
    looks_local = name.startswith((".", "/", "~")) or Path(name).exists()
    if looks_local and not (Path(name) / "config.json").is_file():
        raise ConfigError(f"model folder '{name}' has no config.json")
    return name


def load_tokenizer(source: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model source.

    Raises:
        ConfigError: it cannot be found or read.
    """
    try:
        return AutoTokenizer.from_pretrained(resolve_source(source), revision=revision)  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in '{source}': {first_line(error)}") from error


@contextmanager
def _partitioned_loading(ds_config: Mapping[str, Any]) -> Iterator[None]:
    """Under ZeRO-3, let weights go straight into partitions while they are loaded."""
    if zero_stage(ds_config) != 3:
        yield
        return
    keep = HfDeepSpeedConfig(dict(ds_config))
    try:
        yield
    finally:
        del keep
        unset_hf_deepspeed_config()


_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


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
    quiet_import()
    source = resolve_source(source)
    options: dict[str, Any] = {"dtype": _DTYPES[precision(ds_config)] if zero_stage(ds_config) == 3 else torch.float32}
    if from_scratch:
        try:
            config = AutoConfig.from_pretrained(source, revision=revision, **label_config(task))
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load model '{source}': {first_line(error)}") from error
        family_for(config.model_type)
        with _partitioned_loading(ds_config):
            model = from_config(task.head, config, **options)
        settings = cached_file(source, GENERATION_CONFIG_NAME, revision=revision, **NO_COMPLAINTS)
        if settings is not None and model.can_generate():
            # They belong to the folder, go along to what is exported, and hold for figures of the run, too.
            model.generation_config = GenerationConfig.from_pretrained(Path(settings).parent)
        return model
    plan = plan_loading(source, task, revision=revision, fresh_head=fresh_head)
    with _partitioned_loading(ds_config):
        model = plan.load(**options)
    if plan.order is not None:
        _reorder_outputs(model, plan.order)
    name_labels(model.config, task)
    return model


def _reorder_outputs(model: PreTrainedModel, order: Sequence[int]) -> None:
    """Let output i be what output `order[i]` was. Collective under ZeRO-3."""
    module = model.get_submodule(output_module(model))
    weights = [param for param in (module.weight, module.bias) if param is not None]
    with _rewritten(*weights) as writes, torch.no_grad():
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


def _stacks(model: PreTrainedModel) -> list[tuple[StackSpec, list[str]]]:
    """The stacks that a dense or compact model has, and the paths of their layers from its root."""
    family = family_of(model.config)
    base = family.base if hasattr(model, family.base) else ""
    found = []
    for stack in family.stacks:
        root = f"{base}.{stack.layers}" if base else stack.layers
        if hasattr(model.get_submodule(base), stack.layers.split(".")[0]):
            count = len(list(model.get_submodule(root).children()))
            found.append((stack, [f"{root}.{i}" for i in range(count)]))
    return found


def encoder_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the layers of a dense or compact model, from its root; stack after stack."""
    return [path for _, paths in _stacks(model) for path in paths]


def layer_stacks(model: PreTrainedModel) -> tuple[int, ...]:
    """For each layer, which stack it stands in: 0 for those that read the inputs, 1 for a decoder beside an encoder."""
    return tuple(i for i, (_, paths) in enumerate(_stacks(model)) for _ in paths)


def hidden_states(model: PreTrainedModel, *, embeddings: bool) -> list[str]:
    """Modules whose outputs are the hidden states: the layers, and after them the embeddings if wanted."""
    family = family_of(model.config)
    base = getattr(model, family.base, model)
    module = family.stacks[0].embedding or family.word_embeddings.split(".")[0]
    if family.embedding_projection is not None and hasattr(base, family.embedding_projection):
        module = family.embedding_projection
    module = family.embedding_output or module
    path = f"{family.base}.{module}" if base is not model else module
    return encoder_layers(model) + ([path] if embeddings else [])


def attention_modules(model: PreTrainedModel) -> list[str]:
    """Modules that hand out attention maps, one a layer: cross attention is not among them."""
    modules = dict(model.named_modules())
    found = []
    for stack, paths in _stacks(model):
        spec = stack.sublayers[0]
        owner = spec.query.rpartition(".")[0]
        # Of an attention that is gone only the place is left, and what stands there gives out no map.
        places = ((f"{layer}.{spec.maps or owner}", f"{layer}.{owner}") for layer in paths)
        found += [maps if maps in modules else place for maps, place in places]
    return found


def announce_tables(model: PreTrainedModel) -> None:
    """Tell ZeRO-3 of the table of positions, which is read without a call of the module that owns it.

    What ZeRO-3 gathers are the parameters of the module that is called; it has to be told of others.
    """
    found = position_table(model)
    if found is not None:
        reader, table = found
        quiet_import().zero.register_external_parameter(reader, table.weight)


@contextmanager
def gathered(*weights: Tensor) -> Iterator[None]:
    """Parameters as a whole, wherever ZeRO-3 keeps their parts. Collective under ZeRO-3."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    with quiet_import().zero.GatheredParameters(list(weights)):
        yield


@contextmanager
def _rewritten(*weights: Tensor) -> Iterator[bool]:
    """The same, to write to: whether this rank is to do it, for all ranks. Collective under ZeRO-3."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield True
        return
    with quiet_import().zero.GatheredParameters(list(weights), modifier_rank=0):
        yield torch.distributed.get_rank() == 0


def whole(model: PreTrainedModel, name: str) -> Tensor:
    """Copy of one parameter on the CPU, fp32. Collective under ZeRO-3."""
    param = model.get_parameter(name)
    with gathered(param):
        value: Tensor = param.detach().float().cpu().clone()
    return value


def release(*objects: Any) -> None:
    """Free what engines hold before the next stage; the caller drops its own references as well."""
    for item in objects:
        if hasattr(item, "destroy"):
            item.destroy()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
