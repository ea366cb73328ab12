"""What a model's configuration says of its outputs, and how it comes to say what the task says."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from dsprune.config import TaskConfig
from dsprune.errors import ArchitectureError
from dsprune.tasks import Task
from dsprune.tasks.label_order import has_default_names, label_permutation
from dsprune.tasks.registry import OWN_LABELS

__all__ = ["as_model_tells", "label_config", "listed", "name_labels", "output_order"]


def label_config(task: Task) -> dict[str, Any]:
    """What a configuration says about the task's labels."""
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
    kinds = {"regression": "regression", "multi_label": "multi_label_classification"}
    return labels | {"problem_type": kinds.get(task.problem, "single_label_classification")}


def name_labels(config: PretrainedConfig, task: Task) -> None:
    """Let a model's configuration name its outputs as the task does, in the task's order."""
    for key, value in label_config(task).items():
        setattr(config, key, value)


def as_model_tells(settings: TaskConfig, config: PretrainedConfig) -> TaskConfig:
    """Settings of a task whose labels are its data's, with a finished model's where they leave it open.

    A split to evaluate on may lack a label, or hold numbers for names; the model was trained with all of them.

    Args:
        settings: as they were given; what they say stays.
        config: of the model; of labels without names (LABEL_0) it tells nothing.
    """
    if settings.name not in OWN_LABELS:
        return settings
    told: dict[str, Any] = {}
    given, kind = settings.model_fields_set, getattr(config, "problem_type", None)
    if settings.name == "text_classification" and not given & {"problem", "multi_label"}:
        if kind == "multi_label_classification":
            told["multi_label"] = True
        elif "labels" not in given and (kind == "regression" or (kind is None and config.num_labels == 1)):
            told["problem"] = "regression"
    numbers = "regression" in (settings.problem, told.get("problem"))
    if settings.labels is None and not numbers and not has_default_names(config.id2label):
        told["labels"] = _names(config)
    return settings.model_copy(update=told)


def _names(config: PretrainedConfig) -> tuple[str, ...]:
    """A model's label names in the order of its outputs."""
    return tuple(str(config.id2label[i]) for i in sorted(config.id2label))


def listed(config: PretrainedConfig) -> str:
    """A model's label names for a message, in the order of its outputs."""
    return ", ".join(_names(config))


def output_order(source: str, config: PretrainedConfig, task: Task) -> list[int] | None:
    """Which output of a fine-tuned model is which of the task's labels; None where they are in the task's order.

    Args:
        source: folder or hub id, for messages.
        config: of the model.
        task: whose labels they are.

    Raises:
        ArchitectureError: another number of outputs, or names that are not the task's.
    """
    if task.problem == "text":
        return None
    if config.num_labels != task.num_labels:
        ours = f" ({', '.join(task.labels)})" if task.labels else ""
        raise ArchitectureError(
            f"model '{source}' has {config.num_labels} labels ({listed(config)}) and task '{task.name}' has "
            f"{task.num_labels}{ours}"
        )
    if not task.labels:
        return None
    try:
        return label_permutation(config.id2label, task.labels)
    except ArchitectureError as error:
        raise ArchitectureError(f"model '{source}': {error}") from error
