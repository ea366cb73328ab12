"""Models and tokenizers: where they come from, and how they enter ZeRO."""

from __future__ import annotations

import gc
import importlib.util
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations import HfDeepSpeedConfig, unset_hf_deepspeed_config
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from dsprune.arch import FamilySpec, StackSpec, family_for
from dsprune.consolidate import auto_with_own_head, load_compact, position_table
from dsprune.engine.ds_config import precision, zero_stage
from dsprune.engine.ds_memory import forget_engine
from dsprune.engine.requirements import quiet_import
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.tasks import Task

__all__ = [
    "AUTO_CLASSES",
    "DTYPES",
    "announce_tables",
    "attention_modules",
    "check_reads_forward",
    "checkpoint_activations",
    "encoder_layers",
    "from_config",
    "gathered",
    "hidden_states",
    "is_compact",
    "layer_stacks",
    "load_model",
    "load_tokenizer",
    "release",
    "resolve_source",
    "whole",
]

logger = logging.getLogger(__name__)
PACKAGE_PREFIX = "package:"
AUTO_CLASSES: Mapping[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForCausalLM": AutoModelForCausalLM,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
}
"""By the head that a task needs."""


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
    folder = resolve_source(source)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, revision=revision)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no tokenizer in '{source}': {_first_line(error)}") from error
    # Without any of its files transformers makes up one that knows the special tokens, and takes all else for unknown.
    files = sorted({*tokenizer.vocab_files_names.values(), "tokenizer.json"})
    if Path(folder).is_dir() and not any((Path(folder) / name).is_file() for name in files):
        raise ConfigError(f"no tokenizer in '{source}': none of {', '.join(files)} is there")
    return tokenizer


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def is_compact(source: str) -> bool:
    """Whether a folder holds a compact model, of sizes that no stock class has."""
    config = Path(source) / "config.json"
    return config.is_file() and '"dsprune' in config.read_text(encoding="utf-8")


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


DTYPES: Mapping[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""By the precision of a DeepSpeed configuration."""


def load_model(
    source: str,
    task: Task,
    ds_config: Mapping[str, Any],
    *,
    revision: str | None = None,
    from_scratch: bool = False,
) -> PreTrainedModel:
    """A model with the task's head, dense or compact, ready to become an engine.

    Weights missing from the source (a fresh task head) are initialised from torch's seed, which the
    caller sets. Under ZeRO-3 the weights never stand whole on one rank.

    Args:
        source: folder or hub id.
        task: decides the head.
        ds_config: filled configuration of the engine that the model is for.
        revision: of the hub.
        from_scratch: take the configuration alone, and begin with random weights.

    Raises:
        ConfigError: the source cannot be read.
        ArchitectureError: a family that dsprune does not know, or that does not fit the task.
    """
    quiet_import()
    source = resolve_source(source)
    options: dict[str, Any] = {"dtype": DTYPES[precision(ds_config)] if zero_stage(ds_config) == 3 else torch.float32}
    with _partitioned_loading(ds_config):
        if is_compact(source):
            return load_compact(source, **options)
        try:
            config = AutoConfig.from_pretrained(source, revision=revision)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load model '{source}': {_first_line(error)}") from error
        family_for(config.model_type)
        if from_scratch:
            config = AutoConfig.from_pretrained(source, revision=revision, **label_config(task))
            return from_config(task.head, config, **options)
        return _load_dense(source, task, config, revision, options)


def _load_dense(
    source: str, task: Task, config: PretrainedConfig, revision: str | None, options: dict[str, Any]
) -> PreTrainedModel:
    trained = any(name.endswith(task.head) for name in config.architectures or [])
    if trained and task.problem != "text" and config.num_labels != task.num_labels:
        raise ArchitectureError(
            f"model '{source}' has {config.num_labels} labels and task '{task.name}' has {task.num_labels}"
        )
    if not trained:
        options |= label_config(task)
    try:
        # Weights that are pickled are refused: opening them could run whatever they hold.
        model, found = _with_info(
            AUTO_CLASSES[task.head], config, source, revision=revision, use_safetensors=True, **options
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot load model '{source}': {_first_line(error)}{_scratch_hint(error)}") from error
    missing = sorted(found["missing_keys"])
    if task.problem == "text" and missing:
        raise ArchitectureError(
            f"model '{source}' was not trained for task '{task.name}': {len(missing)} weights are not there, the first "
            f"is {missing[0]}"
        )
    return model  # type: ignore[no-any-return]


def from_config(head: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel:
    """A model with random weights, on the device that is the default."""
    auto = AUTO_CLASSES[head]
    model: PreTrainedModel = auto_with_own_head(auto, config, lambda: auto.from_config(config, **options))
    return model


def _with_info(
    auto: Any, config: PretrainedConfig, source: str, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, and what is to be said of them."""
    found: dict[str, Any] = {}

    def make() -> PreTrainedModel:
        model, info = auto.from_pretrained(source, output_loading_info=True, **options)
        found.update(info)
        return model  # type: ignore[no-any-return]

    return auto_with_own_head(auto, config, make), found


def _scratch_hint(error: Exception) -> str:
    return "; to begin with random weights, say model.from_scratch=true" if "no file named" in str(error) else ""


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
        raise ArchitectureError(f"student.activation_checkpointing: {_first_line(error)}") from error


def label_config(task: Task) -> dict[str, Any]:
    """What a fresh head's configuration says about its labels."""
    if task.problem == "text":
        return {}
    if task.problem == "spans":
        return {"num_labels": task.num_labels}
    names = task.labels or ("score",)
    labels = {
        "num_labels": task.num_labels,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }
    if task.problem == "tokens":
        return labels
    regression = task.problem == "regression"
    return labels | {"problem_type": "regression" if regression else "single_label_classification"}


def _stacks(model: PreTrainedModel) -> list[tuple[StackSpec, list[str]]]:
    """The stacks that a dense or compact model has, and the paths of their layers from its root."""
    family = _family(model)
    base = family.base if hasattr(model, family.base) else ""
    found = []
    for stack in family.stacks:
        root = f"{base}.{stack.layers}" if base else stack.layers
        if hasattr(model.get_submodule(base), stack.layers.split(".")[0]):
            count = len(list(model.get_submodule(root).children()))
            found.append((stack, [f"{root}.{i}" for i in range(count)]))
    return found


def _family(model: PreTrainedModel) -> FamilySpec:
    return family_for(str(model.config.model_type).removeprefix("dsprune_"))


def encoder_layers(model: PreTrainedModel) -> list[str]:
    """Paths of the layers of a dense or compact model, from its root; stack after stack."""
    return [path for _, paths in _stacks(model) for path in paths]


def layer_stacks(model: PreTrainedModel) -> tuple[int, ...]:
    """For each layer, which stack it stands in: 0 for those that read the inputs, 1 for a decoder beside an encoder."""
    return tuple(i for i, (_, paths) in enumerate(_stacks(model)) for _ in paths)


def hidden_states(model: PreTrainedModel, *, embeddings: bool) -> list[str]:
    """Modules whose outputs are the hidden states: the layers, and after them the embeddings if wanted."""
    family = _family(model)
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
            forget_engine(item)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
