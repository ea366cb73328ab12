"""Tasks with any number of labels for each sentence or pair of sentences, each of them on or off."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsprune.tasks import losses
from dsprune.tasks.base import Problem
from dsprune.tasks.batching import Encoded
from dsprune.tasks.kinds.sequence import LABEL, SequenceTask
from dsprune.tasks.metrics.official import METRICS, check_finite
from dsprune.tasks.sources.columns import refuse_first
from dsprune.tasks.sources.label_names import as_list, label_reader, labels_there, wanted_label
from dsprune.tasks.sources.splits import Split

__all__ = ["MultiLabelTask", "labels_of_rows"]


@dataclass(frozen=True, kw_only=True)
class MultiLabelTask(SequenceTask):
    """Classification into labels that do not exclude one another: a logit above 0 says yes.

    Attributes:
        separator: between the labels of a text, where they are not a list.
    """

    separator: str

    @property
    def problem(self) -> Problem:
        """A label is on or off."""
        return "multi_label"

    def loss(self, outputs: Tensor, labels: Tensor, *, count: Tensor) -> Tensor:
        """Binary cross entropy, mean over labels."""
        return losses.binary_cross_entropy(outputs, labels) / count

    def logit_loss(
        self, student: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float, count: Tensor
    ) -> Tensor:
        """As of every task, of the two probabilities of each label, mean over labels."""
        return losses.binary_divergence(student, teacher, temperature=temperature) / count

    def score(self, predictions: Tensor, data: Encoded) -> dict[str, float]:
        """Metrics of all [examples, labels] logits of a split.

        Raises:
            NumericsError: logits that are not finite.
        """
        check_finite(predictions)
        said, true = ((values > 0).cpu().numpy().astype(int) for values in (predictions, data.labels))
        return {name: METRICS[name](said, true) for name in self.metrics}

    def _read_labels(self, split: Split) -> list[Any]:
        """[examples] lists of [labels] 0.0 or 1.0."""
        read = label_reader(self.labels)
        rows = labels_of_rows(split, self.separator)
        places = [[read(value) for value in row] for row in rows]
        there = labels_there(value for row in rows for value in row) if any(None in row for row in places) else ""
        refuse_first(
            split, LABEL, (None in row for row in places), f"{wanted_label(self.labels)}, or several", hint=there
        )
        table = torch.zeros(len(rows), len(self.labels))
        for row, places_of_row in enumerate(places):
            table[row, places_of_row] = 1.0
        return table.tolist()


def labels_of_rows(split: Split, separator: str) -> list[list[Any]]:
    """The labels of each row, as they were read.

    Raises:
        DataError: a row that holds no list of labels, nor text.
    """
    rows = [as_list(cell, separator) for cell in split.columns[LABEL]]
    refuse_first(split, LABEL, (not isinstance(row, list) for row in rows), "expected a list of labels, [] for none")
    return rows
