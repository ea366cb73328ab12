"""Classification or regression of texts, or of pairs of texts, on data of one's own.

What the data hold decides: label names are found in the training examples, and so is whether the labels are numbers.
Every rank reads the same examples and sorts what it finds, so all find the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import ConfigError, DataError
from dsprune.tasks.base import Task, choose_metric
from dsprune.tasks.kinds.multi_label import MultiLabelTask, labels_of_rows
from dsprune.tasks.kinds.sequence import LABEL, SequenceTask
from dsprune.tasks.sources.columns import check_columns, refuse_first
from dsprune.tasks.sources.label_names import as_number, find_names, listed, name_of
from dsprune.tasks.sources.readers import SplitReader, eval_splits, named_data
from dsprune.tasks.sources.splits import Split

__all__ = ["build_text_classification", "check_label_names"]

logger = logging.getLogger(__name__)

TEXT, PAIR = "text", "text_pair"
COLUMNS = (TEXT, PAIR, LABEL)

OF_CLASSES = ("accuracy", "macro_f1", "mcc")
OF_TWO_CLASSES = ("accuracy", "f1", "macro_f1", "mcc")
OF_NUMBERS = ("pearson", "spearman")
OF_MANY = ("micro_f1", "macro_f1")

FEW = 20
"""So many labels are taken for labels, however few examples there are of each."""


def build_text_classification(task: TaskConfig, data: DataConfig, seed: int) -> Task:
    """The task; its training examples are read, for the labels that they hold.

    Raises:
        ConfigError: contradictory settings, a metric that the task has not, or no data set.
        DataError: files, columns or labels that cannot be.
    """
    if task.multi_label and task.problem is not None:
        raise ConfigError(f"task.multi_label = true and task.problem = '{task.problem}': drop one")
    if task.problem == "regression" and task.labels is not None:
        raise ConfigError("task.labels: the numbers of a regression have no names: drop them")
    if task.labels is not None:
        check_label_names(task.labels, least=1 if task.multi_label else 2)
    reader = SplitReader(task.name, data, named_data(task.name, data, None), eval_splits(data), COLUMNS, COLUMNS)
    train = reader.training()
    texts = (TEXT, PAIR) if PAIR in train.columns else (TEXT,)
    check_columns(train, (*texts, LABEL), task.name)
    labels = () if _is_regression(task, train) else task.labels or _find_labels(task, train)
    metrics = _metrics(task, len(labels))
    make: Callable[..., Task] = SequenceTask
    options: dict[str, Any] = {}
    if task.multi_label:
        make, options = MultiLabelTask, {"separator": task.label_separator}
    _announce(task, train, labels)
    return make(
        name=task.name,
        labels=tuple(labels),
        metrics=metrics,
        primary=choose_metric(task.name, metrics, task.metric),
        columns=texts,
        max_length=task.max_length,
        read=reader,
        **options,
    )


def check_label_names(names: tuple[str, ...], *, least: int) -> None:
    """Refuse names of labels that are too few, or not all different.

    Raises:
        ConfigError: they are.
    """
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"task.labels: '{twice}' is named twice")
    if len(names) < least:
        raise ConfigError(f"task.labels = {list(names)}: name at least {least}, or leave it out")


def _is_regression(task: TaskConfig, train: Split) -> bool:
    """Numbers that are not all whole are measured, unless they are said to be labels."""
    if task.problem is not None or task.labels is not None or task.multi_label or train.class_names.get(LABEL):
        return task.problem == "regression"
    numbers = [as_number(value) for value in train.columns[LABEL]]
    return None not in numbers and any(number != round(number) for number in numbers if number is not None)


def _find_labels(task: TaskConfig, train: Split) -> tuple[str, ...]:
    """Names of the labels of the training examples.

    Raises:
        DataError: a label that can have no name, or so few or so many names that labels are not what the column holds.
    """
    if LABEL in train.class_names:
        return train.class_names[LABEL]
    values = train.columns[LABEL]
    if task.multi_label:
        rows = labels_of_rows(train, task.label_separator)
        wanted = "expected a list of labels, or text with separators"
        refuse_first(train, LABEL, (any(name_of(value) is None for value in row) for row in rows), wanted)
        values = [value for row in rows for value in row]
    refuse_first(
        train, LABEL, (not task.multi_label and name_of(value) is None for value in values), "expected a label"
    )
    try:
        names = find_names(values)
    except DataError as error:
        raise DataError(f"{train.origin}: {error}") from error
    _check_number(task, train, names, len(values))
    return names


def _check_number(task: TaskConfig, train: Split, names: tuple[str, ...], num_labels: int) -> None:
    column = train.renamed.get(LABEL, LABEL)
    if len(names) < (1 if task.multi_label else 2):
        raise DataError(
            f"{train.origin}: column '{column}' holds {f'one label alone, {names[0]}' if names else 'no label'}"
        )
    if len(names) > max(FEW, num_labels // 2):
        raise DataError(
            f"{train.origin}: column '{column}' holds {len(names)} different labels in {len(train)} rows "
            f"({listed(names)}): if they are what is meant, name them in task.labels; if they are numbers to be "
            "predicted, say task.problem = 'regression'"
        )


def _metrics(task: TaskConfig, num_labels: int) -> tuple[str, ...]:
    if task.multi_label:
        return OF_MANY
    return {0: OF_NUMBERS, 2: OF_TWO_CLASSES}.get(num_labels, OF_CLASSES)


def _announce(task: TaskConfig, train: Split, labels: tuple[str, ...]) -> None:
    """Say what was found, on one rank's screen."""
    texts = "pairs of texts" if PAIR in train.columns else "texts"
    many = "any number of " * task.multi_label
    what = f"{many}{len(labels)} labels: {listed(labels)}" if labels else "numbers, a regression"
    logger.info("task %s: %s with %s", task.name, texts, what)
