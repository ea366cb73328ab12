"""Tasks by name: one line each."""

from __future__ import annotations

from collections.abc import Callable

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError
from dsprune.files import did_you_mean
from dsprune.tasks.base import Task
from dsprune.tasks.benchmarks.conll import build_conll
from dsprune.tasks.benchmarks.glue import GLUE, build_glue
from dsprune.tasks.benchmarks.order import build_order
from dsprune.tasks.benchmarks.squad import SQUAD, build_squad
from dsprune.tasks.kinds.causal import build_causal
from dsprune.tasks.kinds.corruption import build_corruption
from dsprune.tasks.kinds.seq2seq import build_seq2seq
from dsprune.tasks.kinds.text_classification import build_text_classification
from dsprune.tasks.kinds.token_classification import build_token_classification

__all__ = ["OWN_LABELS", "TASKS", "build_task", "task_names"]

Builder = Callable[[TaskConfig, DataConfig, int], Task]

OWN_LABELS: dict[str, Builder] = {
    "text_classification": build_text_classification,
    "token_classification": build_token_classification,
}
"""Tasks whose labels are those that the data hold, which have to be read for them."""
ANY_DATA: dict[str, Builder] = {
    **OWN_LABELS,
    "lm": build_causal,
    "seq2seq": build_seq2seq,
    "span_corruption": build_corruption,
}
"""Tasks on whatever data set is named; the others have their own."""
TASKS: dict[str, Builder] = {
    **dict.fromkeys(GLUE, build_glue),
    **dict.fromkeys(SQUAD, build_squad),
    "conll2003": build_conll,
    "order": build_order,
    **ANY_DATA,
}
"""What builds each task, from its name and settings, where its data are, and the seed of generated data."""


def task_names() -> list[str]:
    """All tasks that there are."""
    return list(TASKS)


def build_task(task: TaskConfig, data: DataConfig, *, seed: int) -> Task:
    """A task, ready to load its data.

    Local files are looked up but not yet read. The exception are tasks of `OWN_LABELS`, which read the training
    examples for their labels, from files or from the hub; every rank finds the same.

    Raises:
        ConfigError: unknown task or metric, or contradictory data settings.
        DataError: `data.path` without the files of the task, or training examples without labels.
    """
    if task.name not in TASKS:
        plain = task.name.lower().replace("-", "")
        hint = did_you_mean(plain, TASKS, otherwise=f"there are {', '.join(TASKS)}")
        raise ConfigError(f"task.name = '{task.name}': no such task; {hint}")
    if task.name not in ANY_DATA:
        _refuse_other_data(task.name, data)
    _refuse_other_labels(task)
    return TASKS[task.name](task, data, seed)


def _refuse_other_data(task: str, data: DataConfig) -> None:
    """A task with a data set of its own takes no other.

    Raises:
        ConfigError: keys that it does not read.
    """
    given = [f"data.{key}" for key in ("dataset", "subset", "evals") if key in data.model_fields_set]
    if given:
        raise ConfigError(f"{', '.join(given)}: for tasks {', '.join(ANY_DATA)} only; '{task}' has its own data set")


def _refuse_other_labels(task: TaskConfig) -> None:
    """A task whose labels are known takes no others.

    Raises:
        ConfigError: keys that it does not read.
    """
    of_texts = [f"task.{key}" for key in ("problem", "multi_label", "label_separator") if key in task.model_fields_set]
    if of_texts and task.name != "text_classification":
        raise ConfigError(f"{', '.join(of_texts)}: for task text_classification only, and not for '{task.name}'")
    if "labels" in task.model_fields_set and task.name not in OWN_LABELS:
        raise ConfigError(f"task.labels: for tasks {', '.join(OWN_LABELS)} only; '{task.name}' has its own labels")
