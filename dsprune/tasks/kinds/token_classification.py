"""A label for each word, on data of one's own: any set of tags."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from sklearn.metrics import f1_score
from torch import Tensor

from dsprune.config import DataConfig, TaskConfig
from dsprune.errors import DataError
from dsprune.tasks.base import Task, choose_metric
from dsprune.tasks.batching import Encoded
from dsprune.tasks.kinds.text_classification import check_label_names
from dsprune.tasks.kinds.tokens import ENTITY_METRICS, OUTSIDE, TaggedWords, TokenTask
from dsprune.tasks.losses import IGNORED
from dsprune.tasks.metrics.official import check_finite
from dsprune.tasks.sources.columns import check_columns, refuse_first
from dsprune.tasks.sources.label_names import as_list, as_number, find_names, listed, name_of
from dsprune.tasks.sources.readers import SplitReader, eval_splits, named_data
from dsprune.tasks.sources.splits import Split

__all__ = ["WORD_METRICS", "WordTask", "are_iob", "build_token_classification"]

logger = logging.getLogger(__name__)

WORDS, TAGS = COLUMNS = ("tokens", "tags")
WORD_METRICS = ("accuracy", "macro_f1")
UNTOLD = -1
"""Prediction for a word without a piece: no tag, and so a wrong one."""


@dataclass(frozen=True, kw_only=True)
class WordTask(TokenTask):
    """Tagging that is scored word by word, not by entities; words that are cut or dropped count as wrong."""

    if_cut: ClassVar[str] = "words beyond count as wrong"

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """Accuracy and macro F1 of all words of a split.

        Args:
            predictions: [sentences, width, labels] logits; anything past each sentence's length.
            data: the split.

        Raises:
            NumericsError: outputs that are not finite.
        """
        assert isinstance(data, TaggedWords)
        check_finite(predictions)
        real = torch.arange(predictions.shape[1]) < data.lengths[:, None]
        said = np.full(len(data.tags), UNTOLD)
        said[data.labelled.numpy()] = predictions[real].argmax(-1)[data.labels != IGNORED].numpy()
        true = data.tags.numpy()
        # To miss a word is no class of its own.
        classes = np.setdiff1d(np.union1d(said, true), [UNTOLD])
        macro = f1_score(true, said, labels=classes, average="macro", zero_division=0.0)
        return dict(zip(WORD_METRICS, (float((said == true).mean()), float(macro)), strict=True))

    def _check_iob2(self, split: Split, tags: Sequence[Sequence[int]]) -> None:
        """Nothing follows from the tag before."""


def build_token_classification(task: TaskConfig, data: DataConfig, seed: int) -> Task:
    """The task; its training examples are read, for the tags that they hold.

    Raises:
        ConfigError: contradictory settings, a metric that the task has not, or no data set.
        DataError: files, columns or tags that cannot be.
    """
    if task.labels is not None:
        check_label_names(task.labels, least=2)
    reader = SplitReader(task.name, data, named_data(task.name, data, None), eval_splits(data), COLUMNS, COLUMNS)
    train = _split_cells(reader.training())
    check_columns(train, COLUMNS, task.name)
    labels = task.labels or _find_tags(train)
    entities = are_iob(labels) and task.metric not in WORD_METRICS
    metrics = ENTITY_METRICS if entities else WORD_METRICS
    make: Callable[..., Task] = TokenTask if entities else WordTask
    scored = "entities are scored" if entities else "words are scored"
    if all(as_number(name) is not None for name in labels):
        scored += ", where names of the tags in task.labels could tell entities"
    logger.info("task %s: %d tags, %s; %s", task.name, len(labels), listed(labels), scored)
    return make(
        name=task.name,
        labels=labels,
        metrics=metrics,
        primary=choose_metric(task.name, metrics, task.metric),
        max_length=task.max_length,
        read=lambda progress: reader(progress).map(_split_cells),
        columns=COLUMNS,
    )


def are_iob(names: Sequence[str]) -> bool:
    """Whether tags are `O`, and `B-` and `I-` of some kinds."""
    return OUTSIDE in names and all(name == OUTSIDE or (name[:2] in ("B-", "I-") and name[2:]) for name in names)


def _split_cells(split: Split) -> Split:
    """The split with lists in place of texts, as csv and tsv have them: words and tags between spaces."""
    there = [name for name in COLUMNS if name in split.columns]
    return split.with_columns(**{name: [as_list(cell, None) for cell in split.columns[name]] for name in there})


def _find_tags(train: Split) -> tuple[str, ...]:
    """Names of the tags of the training examples.

    Raises:
        DataError: tags that can have no name.
    """
    if TAGS in train.class_names:
        return train.class_names[TAGS]
    rows: Sequence[Any] = train.columns[TAGS]
    wrong = (not isinstance(row, list) or any(name_of(tag) is None for tag in row) for row in rows)
    refuse_first(train, TAGS, wrong, "expected a list of tags, or tags between spaces")
    try:
        names = find_names(tag for row in rows for tag in row)
    except DataError as error:
        raise DataError(f"{train.origin}: {error}") from error
    if len(names) < 2:
        there = f"one tag alone, {names[0]}" if names else "no tag"
        raise DataError(f"{train.origin}: column '{train.renamed.get(TAGS, TAGS)}' holds {there}")
    return names
