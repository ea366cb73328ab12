"""Tasks by name: one line each."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError
from dsprune.tasks.base import Task
from dsprune.tasks.causal import build_causal
from dsprune.tasks.conll import build_conll
from dsprune.tasks.corruption import build_corruption
from dsprune.tasks.glue import GLUE, build_glue
from dsprune.tasks.order import build_order
from dsprune.tasks.seq2seq import build_seq2seq
from dsprune.tasks.squad import SQUAD, build_squad

__all__ = ["TASKS", "build_task", "task_names"]

Builder = Callable[[TaskConfig, DataConfig, int], Task]

ANY_DATA: dict[str, Builder] = {
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
    """A task, ready to load its data; local files are looked up but not yet read.

    Raises:
        ConfigError: unknown task or metric, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    if task.name not in TASKS:
        near = difflib.get_close_matches(task.name.lower().replace("-", ""), TASKS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(TASKS)}"
        raise ConfigError(f"task.name = '{task.name}': no such task; {hint}")
    if task.name not in ANY_DATA:
        _refuse_other_data(task.name, data)
    return TASKS[task.name](task, data, seed)


def _refuse_other_data(task: str, data: DataConfig) -> None:
    """A task with a data set of its own takes no other.

    Raises:
        ConfigError: keys that it does not read.
    """
    given = [f"data.{key}" for key in ("dataset", "subset", "evals") if key in data.model_fields_set]
    if given:
        raise ConfigError(f"{', '.join(given)}: for tasks {', '.join(ANY_DATA)} only; '{task}' has its own data set")
