"""Tasks with one label, or one number, for each sentence or pair of sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsprune.tasks import losses, metrics
from dsprune.tasks.base import Head, LabelTask, Problem
from dsprune.tasks.batching import Encoded, Tokeniser, encode
from dsprune.tasks.checks import check_columns, check_text, refuse_first
from dsprune.tasks.sources import Split, Splits

__all__ = ["SequenceTask"]


@dataclass(frozen=True, kw_only=True)
class SequenceTask(LabelTask):
    """Classification, or regression where there are no labels.

    Attributes:
        columns: text columns; two are encoded as a pair.
        bounds: least and greatest target value of a regression.
    """

    columns: tuple[str, ...]
    bounds: tuple[float, float] = (-math.inf, math.inf)

    head: ClassVar[Head] = "ForSequenceClassification"

    @property
    def problem(self) -> Problem:
        """Classification, or regression with one output."""
        return "classification" if self.labels else "regression"

    def loss(self, outputs: Tensor, labels: Tensor, *, count: Tensor) -> Tensor:
        """Cross entropy, or squared error of a regression."""
        total = losses.cross_entropy if self.labels else losses.squared_error
        return total(outputs, labels) / count

    def logit_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, count: Tensor
    ) -> Tensor:
        """As of every task; a single output, of which a softmax says nothing, by its squared error."""
        if not self.labels:
            return losses.squared_error(student, teacher.squeeze(-1)) / count
        return losses.divergence(student, teacher, temperature=temperature) / count

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """The official metrics, of all [examples, classes] logits of a split."""
        return metrics.score(predictions, data.labels, self.metrics)

    def _check(self, splits: Splits) -> Splits:
        for split in splits:
            self._check_split(split)
        return splits

    def _check_split(self, split: Split) -> None:
        check_columns(split, (*self.columns, "label"), self.name)
        check_text(split, self.columns)
        values = split.columns["label"]
        if self.labels:
            top = len(self.labels) - 1
            wanted = f"expected an integer from 0 to {top} ({', '.join(self.labels)})"
            refuse_first(split, "label", (type(v) is not int or not 0 <= v <= top for v in values), wanted)
        else:
            low, high = self.bounds
            wanted = f"expected a number from {low:g} to {high:g}"
            refuse_first(split, "label", (not _is_number(v) or not low <= v <= high for v in values), wanted)

    def _encode(self, split: Split, tokeniser: Tokeniser) -> Encoded:
        labels = torch.tensor(split.columns["label"], dtype=torch.int64 if self.labels else torch.float32)
        return encode(split.name, [split.columns[column] for column in self.columns], labels, tokeniser)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
