"""Tasks with one label, or one number, for each sentence or pair of sentences."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dsprune.tasks import losses
from dsprune.tasks.base import Head, LabelTask, Problem
from dsprune.tasks.batching import Encoded, Tokeniser, encode
from dsprune.tasks.metrics import official
from dsprune.tasks.sources.columns import blank_texts, check_columns, check_text, refuse_first
from dsprune.tasks.sources.label_names import as_number, label_reader, labels_there, wanted_label
from dsprune.tasks.sources.splits import Split, Splits

__all__ = ["LABEL", "SequenceTask"]

LABEL = "label"
"""Column of the labels, as data sets name it."""


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
        return official.score(predictions, data.labels, self.metrics)

    def _check(self, splits: Splits) -> Splits:
        return splits.map(self._check_split)

    def _check_split(self, split: Split) -> Split:
        """The split with its labels as class indices or numbers, once all is known to be good."""
        check_columns(split, (*self.columns, LABEL), self.name)
        check_text(split, self.columns)
        notes = (*split.notes, *blank_texts(split, self.columns))
        return replace(split.with_columns(**{LABEL: self._read_labels(split)}), notes=notes)

    def _read_labels(self, split: Split) -> list[Any]:
        """[examples] class indices or target values, or whatever else a row of the labels' tensor is."""
        if self.labels:
            read = label_reader(self.labels)
            found = [read(value) for value in split.columns[LABEL]]
            hint = labels_there(split.columns[LABEL]) if None in found else ""
            refuse_first(split, LABEL, (label is None for label in found), wanted_label(self.labels), hint=hint)
            return found
        low, high = self.bounds
        numbers = [as_number(value) for value in split.columns[LABEL]]
        wanted = f"expected a number from {low:g} to {high:g}" if math.isfinite(high - low) else "expected a number"
        refuse_first(split, LABEL, (number is None or not low <= number <= high for number in numbers), wanted)
        return numbers

    def _encode(self, split: Split, tokeniser: Tokeniser) -> Encoded:
        kind = torch.int64 if self.problem == "classification" else torch.float32
        labels = torch.tensor(split.columns[LABEL], dtype=kind)
        return encode(split.name, [split.columns[column] for column in self.columns], labels, tokeniser)
