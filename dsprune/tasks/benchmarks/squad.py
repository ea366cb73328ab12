"""SQuAD v1.1 (Rajpurkar et al. 2016) and v2 (2018): answers to questions about paragraphs of Wikipedia."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError
from dsprune.tasks.base import Task, choose_metric
from dsprune.tasks.kinds.spans import COLUMNS, TEXTS, SpanTask
from dsprune.tasks.metrics.answers import ANSWER_METRICS, OR_NONE_METRICS
from dsprune.tasks.sources.readers import HubData, SplitReader

__all__ = ["SQUAD", "build_squad"]


@dataclass(frozen=True)
class SquadTask:
    """Official facts of one version."""

    hub: HubData
    metrics: tuple[str, ...]
    may_be_unanswerable: bool


SQUAD: Mapping[str, SquadTask] = {
    "squad": SquadTask(HubData("rajpurkar/squad"), ANSWER_METRICS, may_be_unanswerable=False),
    "squad_v2": SquadTask(HubData("rajpurkar/squad_v2"), OR_NONE_METRICS, may_be_unanswerable=True),
}
"""Both versions by the name of their task."""


def build_squad(task: TaskConfig, data: DataConfig, seed: int) -> Task:
    """One of the two, its local files found but not yet read.

    Raises:
        ConfigError: a metric that the task has not, a stride that leaves no room, or contradictory data
            settings.
        DataError: `data.path` without the files of the task.
    """
    facts = SQUAD[task.name]
    primary = choose_metric(task.name, facts.metrics, task.metric)
    if task.stride >= task.max_length:
        raise ConfigError(
            f"task.stride = {task.stride}: windows of task.max_length = {task.max_length} tokens cannot share as many; "
            "the usual values are 128 and 384"
        )
    return SpanTask(
        name=task.name,
        labels=(),
        metrics=facts.metrics,
        primary=primary,
        max_length=task.max_length,
        read=SplitReader(task.name, data, facts.hub, {"validation": "validation"}, COLUMNS, TEXTS),
        stride=task.stride,
        max_answer_length=task.max_answer_length,
        n_best=task.n_best,
        may_be_unanswerable=facts.may_be_unanswerable,
        null_threshold=task.null_threshold,
    )
