"""What a task is: text columns, labels, a loss and metrics, and where its examples come from."""

from __future__ import annotations

import difflib
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dsprune.errors import ConfigError, DataError
from dsprune.tasks import metrics
from dsprune.tasks.batching import Encoded, encode
from dsprune.tasks.sources import Split

__all__ = ["Problem", "Splits", "Task", "TaskData", "choose_metric"]

logger = logging.getLogger(__name__)

Problem = Literal["classification", "regression"]


@dataclass(frozen=True)
class Splits:
    """Training and evaluation examples as text."""

    train: Split
    evals: Mapping[str, Split]


@dataclass
class TaskData:
    """Training and evaluation examples as token ids.

    Attributes:
        train: training examples.
        evals: evaluation examples by name; for MNLI `matched` and `mismatched`. A file that is not an
            official split goes by its own name.
        notes: sentences that have to stand beside every figure: partial files, first so many examples.
    """

    train: Encoded
    evals: dict[str, Encoded]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task, ready to read its data.

    Attributes:
        name: as in `task.name`.
        problem: classification, or regression with one output.
        labels: class names in the order of the label ids; empty for a regression.
        metrics: official metrics.
        primary: the metric that picks the best model.
        columns: text columns; two are encoded as a pair.
        max_length: tokens at which examples are cut.
        read: gets the examples; its argument says whether progress may be shown.
        bounds: least and greatest target value of a regression.
    """

    name: str
    problem: Problem
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    primary: str
    columns: tuple[str, ...]
    max_length: int
    read: Callable[[bool], Splits] = field(repr=False)
    bounds: tuple[float, float] = (-math.inf, math.inf)

    @property
    def num_labels(self) -> int:
        """Outputs of the head: classes, or 1 for a regression."""
        return len(self.labels) or 1

    def load(
        self, tokenizer: PreTrainedTokenizerBase, *, vocab_size: int | None = None, progress: bool = False
    ) -> TaskData:
        """Read, check and tokenise all splits, in memory.

        Args:
            tokenizer: of the model.
            vocab_size: embeddings that the model has, to check token ids against.
            progress: show progress bars where it takes long; say so on one rank only.

        Raises:
            DataError: missing files or columns, empty splits, labels or texts that cannot be.
            ArchitectureError: a tokenizer that does not fit.
        """
        splits = self.read(progress)
        checked = {split.name: self._check(split) for split in (splits.train, *splits.evals.values())}

        def encoded(split: Split) -> Encoded:
            texts, labels = checked[split.name]
            return encode(
                split.name,
                texts,
                labels,
                tokenizer,
                max_length=self.max_length,
                vocab_size=vocab_size,
                progress=progress,
            )

        notes = (*splits.train.notes, *(note for split in splits.evals.values() for note in split.notes))
        for note in notes:
            logger.warning("task %s: %s", self.name, note)
        evals = {name: encoded(split) for name, split in splits.evals.items()}
        return TaskData(encoded(splits.train), evals, notes)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy, or mean squared error of a regression; mean over examples: [].

        Args:
            logits: [batch, classes], or [batch, 1] for a regression.
            labels: [batch].
        """
        if self.problem == "regression":
            return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
        return F.cross_entropy(logits, labels)

    def score(self, predictions: Tensor, labels: Tensor) -> dict[str, float]:
        """The official metrics by name, of all logits of a split.

        Args:
            predictions: [examples, classes] logits, or [examples, 1] for a regression.
            labels: [examples].

        Raises:
            NumericsError: logits that are not finite.
        """
        return metrics.score(predictions, labels, self.metrics)

    def _check(self, split: Split) -> tuple[list[Sequence[str]], Tensor]:
        """Texts and labels of a split, once they are known to be good."""
        if len(split) == 0:
            raise DataError(f"{split.origin}: the split is empty")
        for column in (*self.columns, "label"):
            if column not in split.columns:
                there = ", ".join(split.columns)
                raise DataError(f"{split.origin}: no column '{column}' of task '{self.name}'; there is {there}")
        for column in self.columns:
            _refuse(split, column, (not isinstance(v, str) for v in split.columns[column]), "expected text")
        values = split.columns["label"]
        if self.problem == "regression":
            low, high = self.bounds
            wanted = f"expected a number from {low:g} to {high:g}"
            _refuse(split, "label", (not _is_number(v) or not low <= v <= high for v in values), wanted)
            return [split.columns[column] for column in self.columns], torch.tensor(values, dtype=torch.float32)
        top = self.num_labels - 1
        wanted = f"expected an integer from 0 to {top} ({', '.join(self.labels)})"
        _refuse(split, "label", (type(v) is not int or not 0 <= v <= top for v in values), wanted)
        return [split.columns[column] for column in self.columns], torch.tensor(values, dtype=torch.int64)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _refuse(split: Split, column: str, wrong: Iterable[bool], wanted: str) -> None:
    """Stop at the first wrong value of a column."""
    row = next((row for row, is_wrong in enumerate(wrong) if is_wrong), None)
    if row is not None:
        found = repr(split.columns[column][row])
        raise DataError(f"{split.origin}: row {row} (from 0), column '{column}': {wanted}, found {found[:60]}")


def choose_metric(task: str, official: tuple[str, ...], asked: str | None) -> str:
    """The metric that picks the best model: the one asked for, or the first of the official ones.

    Raises:
        ConfigError: a metric that the task has not.
    """
    if asked is None:
        return official[0]
    if asked not in official:
        near = difflib.get_close_matches(asked, official, n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(official)}"
        raise ConfigError(f"task.metric = '{asked}': task '{task}' has no such metric; {hint}")
    return asked
