"""The nine tasks of GLUE (Wang et al. 2019): official columns, label order and metrics.

The label order is that of `nyu-mll/glue` on the hub; models fine-tuned elsewhere may differ, see
`dsprune.tasks.label_order`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from dsprune.config import DataConfig, TaskConfig
from dsprune.tasks.base import Task, choose_metric
from dsprune.tasks.kinds.sequence import LABEL, SequenceTask
from dsprune.tasks.sources.readers import HubData, SplitReader

__all__ = ["GLUE", "HUB_DATASET", "build_glue"]

HUB_DATASET = "nyu-mll/glue"


@dataclass(frozen=True)
class GlueTask:
    """Official facts of one task; `evals` maps a split's name in figures to its name in the data set."""

    columns: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    evals: tuple[tuple[str, str], ...] = (("validation", "validation"),)
    bounds: tuple[float, float] = (-math.inf, math.inf)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")

GLUE: Mapping[str, GlueTask] = {
    "cola": GlueTask(("sentence",), ("unacceptable", "acceptable"), ("mcc",)),
    "sst2": GlueTask(("sentence",), ("negative", "positive"), ("accuracy",)),
    "mrpc": GlueTask(_PAIR, ("not_equivalent", "equivalent"), ("f1", "accuracy")),
    "stsb": GlueTask(_PAIR, (), ("pearson", "spearman"), bounds=(0.0, 5.0)),
    "qqp": GlueTask(("question1", "question2"), ("not_duplicate", "duplicate"), ("f1", "accuracy")),
    "mnli": GlueTask(
        ("premise", "hypothesis"),
        ("entailment", "neutral", "contradiction"),
        ("accuracy",),
        evals=(("matched", "validation_matched"), ("mismatched", "validation_mismatched")),
    ),
    "qnli": GlueTask(("question", "sentence"), _ENTAILMENT, ("accuracy",)),
    "rte": GlueTask(_PAIR, _ENTAILMENT, ("accuracy",)),
    "wnli": GlueTask(_PAIR, _ENTAILMENT[::-1], ("accuracy",)),
}
"""All nine, in the order of the paper's table."""


def build_glue(task: TaskConfig, data: DataConfig, seed: int) -> Task:
    """One of the nine, its local files found but not yet read.

    Raises:
        ConfigError: a metric that the task has not, or contradictory data settings.
        DataError: `data.path` without the files of the task.
    """
    facts = GLUE[task.name]
    columns = (*facts.columns, LABEL)
    return SequenceTask(
        name=task.name,
        labels=facts.labels,
        metrics=facts.metrics,
        primary=choose_metric(task.name, facts.metrics, task.metric),
        columns=facts.columns,
        max_length=task.max_length,
        read=SplitReader(task.name, data, HubData(HUB_DATASET, task.name), dict(facts.evals), columns, columns),
        bounds=facts.bounds,
    )
