"""The nine tasks of GLUE (Wang et al. 2019): official columns, label order and metrics.

The label order is that of `nyu-mll/glue` on the hub; models fine-tuned elsewhere may differ, see
`dsprune.tasks.labels`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError
from dsprune.tasks.base import Splits, Task, choose_metric
from dsprune.tasks.sources import Split, find_files, read_file, read_hub

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
    primary = choose_metric(task.name, facts.metrics, task.metric)
    if data.path is not None and data.revision is not None:
        raise ConfigError("data.revision pins a data set of the hub, and data.path is a local folder: drop one")
    official = ("train", *(split for _, split in facts.evals))
    files = {} if data.path is None else find_files(Path(data.path).expanduser(), task.name, official)

    def read_split(split: str, limit: int | None, progress: bool) -> Split:
        if split in files:
            return read_file(files[split], split, text_columns=facts.columns).first(limit)
        return read_hub(HUB_DATASET, task.name, split, revision=data.revision, progress=progress).first(limit)

    def read(progress: bool) -> Splits:
        evals = {}
        for name, split in facts.evals:
            found = read_split(split, data.max_eval_examples, progress)
            evals[name if found.name == split else found.name] = found
        return Splits(read_split("train", data.max_train_examples, progress), evals)

    return Task(
        name=task.name,
        problem="classification" if facts.labels else "regression",
        labels=facts.labels,
        metrics=facts.metrics,
        primary=primary,
        columns=facts.columns,
        max_length=task.max_length,
        read=read,
        bounds=facts.bounds,
    )
