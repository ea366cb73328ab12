"""CoNLL-2003 (Tjong Kim Sang and De Meulder 2003): named entities in English newswire."""

from __future__ import annotations

from dsprune.config import DataConfig, TaskConfig
from dsprune.tasks.base import Task, choose_metric
from dsprune.tasks.kinds.tokens import COLUMNS, ENTITY_METRICS, TokenTask
from dsprune.tasks.sources.readers import HubData, SplitReader

__all__ = ["CONLL", "TAG_NAMES", "build_conll"]

# The data set itself is a loading script, which `datasets` no longer runs; the hub converts it.
CONLL = HubData("eriktks/conll2003", revision="refs/convert/parquet")

TAG_NAMES = ("O", "B-PER", "I-PER", "B-ORG", "I-ORG", "B-LOC", "I-LOC", "B-MISC", "I-MISC")
"""Tags in the order of the ids on the hub."""


def build_conll(task: TaskConfig, data: DataConfig, seed: int) -> Task:
    """The task, its local files found but not yet read.

    Raises:
        ConfigError: a metric that the task has not, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    return TokenTask(
        name=task.name,
        labels=TAG_NAMES,
        metrics=ENTITY_METRICS,
        primary=choose_metric(task.name, ENTITY_METRICS, task.metric),
        max_length=task.max_length,
        read=SplitReader(task.name, data, CONLL, {"validation": "validation", "test": "test"}, COLUMNS),
    )
