"""Making the model that a task needs, with weights from files, without any, or of no values at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from dsprune.consolidate import with_own_head
from dsprune.engine.models.weight_files import WeightFiles
from dsprune.errors import ArchitectureError, ConfigError
from dsprune.files import first_line
from dsprune.tasks import Task

__all__ = [
    "AUTO_CLASSES",
    "LoadingPlan",
    "class_for",
    "not_there",
    "unlike_files",
    "without_weights",
]

AUTO_CLASSES: Mapping[str, Any] = {
    "ForSequenceClassification": AutoModelForSequenceClassification,
    "ForQuestionAnswering": AutoModelForQuestionAnswering,
    "ForTokenClassification": AutoModelForTokenClassification,
    "ForCausalLM": AutoModelForCausalLM,
    "ForConditionalGeneration": AutoModelForSeq2SeqLM,
}
"""By the head that a task needs."""


@dataclass(frozen=True)
class LoadingPlan:
    """How the files of a source become a model.

    Attributes:
        source: folder or hub id.
        revision: of the hub.
        cls: class of the model, stock or compact.
        config: of the model; says what is true of the files, and has the task's labels where the head is a fresh one.
        renames: patterns of names in the files, and what stands in their place.
        kept: the tensors that are read, where another task's head of the same names is left out; None reads all.
        fresh: weights that begin at random numbers.
        order: the row of the head for each of the task's labels; None where they are in order.
    """

    source: str
    revision: str | None
    cls: Any
    config: PretrainedConfig
    renames: Mapping[str, str]
    kept: WeightFiles | None
    fresh: frozenset[str]
    order: list[int] | None

    def load(self, **options: Any) -> PreTrainedModel:
        """The model with its weights, its head's rows as in the files. Collective under ZeRO-3.

        Args:
            options: for `from_pretrained`.

        Raises:
            ConfigError: the files cannot be read.
            ArchitectureError: weights are missing after all.
        """
        # Else transformers asks a service of the hub, in the background, to convert what is pickled.
        os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
        source: str | None = self.source
        if self.kept is None:
            options["revision"] = self.revision
        else:
            source, options["state_dict"] = None, {name: self.kept.read(name) for name in self.kept.shapes}
        try:
            model, found = _from_pretrained(self.cls, self.config, source, key_mapping=dict(self.renames), **options)
        except (OSError, ValueError) as error:
            raise ConfigError(f"cannot load model '{self.source}': {first_line(error)}") from error
        if missing := set(found["missing_keys"]) - self.fresh:
            raise ArchitectureError(f"model '{self.source}': {not_there(missing)}")
        return model


def not_there(missing: set[str]) -> str:
    """What to say of missing weights."""
    first = min(missing)
    return f"{len(missing)} weights are not there, the first is {first}"


def class_for(source: str, task: Task, config: PretrainedConfig) -> Any:
    """The class, stock or compact, that a configuration and a task's head make.

    Raises:
        ArchitectureError: there is none.
    """
    known = AUTO_CLASSES[task.head]._model_mapping
    if type(config) not in known:
        raise ArchitectureError(
            f"model '{source}': a '{config.model_type}' has no head for task '{task.name}' ({task.head})"
        )
    return known[type(config)]


def without_weights(cls: Any, config: PretrainedConfig) -> PreTrainedModel:
    """A model without weights."""
    with torch.device("meta"):
        model: PreTrainedModel = with_own_head(cls, config, lambda: cls._from_config(config))
    return model


def _from_pretrained(
    cls: Any, config: PretrainedConfig, source: str | None, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """A model with its weights, and what is to be said of them."""
    found: dict[str, Any] = {}

    def make() -> PreTrainedModel:
        model, info = cls.from_pretrained(source, config=config, output_loading_info=True, **options)
        found.update(info)
        return model  # type: ignore[no-any-return]

    return with_own_head(cls, config, make), found


def unlike_files(
    cls: Any, config: PretrainedConfig, shapes: Mapping[str, tuple[int, ...]], renames: Mapping[str, str]
) -> dict[str, Any]:
    """How a model differs from files with tensors of these shapes, as `from_pretrained` tells it.

    Args:
        cls: of the model.
        config: of the model.
        shapes: of the tensors in the files, by name.
        renames: patterns of names in the files, and what stands in their place.

    Returns:
        `missing_keys` and `unexpected_keys`, sets of names; `mismatched_keys`, a set of a name, the shape in the files
        and that in the model.
    """
    state = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options = {"state_dict": state, "device_map": "meta", "ignore_mismatched_sizes": True, "key_mapping": dict(renames)}
    with _unheard():
        _, found = _from_pretrained(cls, config, None, **options)
    return found


@contextmanager
def _unheard() -> Iterator[None]:
    """Let transformers say nothing, not even how far it is."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()
