from __future__ import annotations

import pytest
import torch

from dsprune.errors import ArchitectureError
from dsprune.tasks.label_order import has_default_names, label_permutation

MNLI = ("entailment", "neutral", "contradiction")


def test_same_order_needs_nothing() -> None:
    assert label_permutation(dict(enumerate(MNLI)), MNLI) is None


def test_permutation_puts_logits_into_the_order_of_the_task() -> None:
    model = {0: "CONTRADICTION", 1: "ENTAILMENT", 2: "NEUTRAL"}
    permutation = label_permutation(model, MNLI)
    assert permutation == [1, 2, 0]
    logits = torch.tensor([[10.0, 20.0, 30.0]])  # contradiction, entailment, neutral
    assert logits[:, permutation].tolist() == [[20.0, 30.0, 10.0]]


def test_names_are_compared_loosely() -> None:
    assert label_permutation({0: "Not Entailment", 1: "entailment"}, ("entailment", "not_entailment")) == [1, 0]
    assert label_permutation({1: "POSITIVE", 0: "NEGATIVE"}, ("negative", "positive")) is None


def test_names_that_are_the_same_are_not_compared_loosely() -> None:
    assert label_permutation({0: "-1", 1: "0", 2: "1"}, ("-1", "0", "1")) is None
    assert label_permutation({0: "1", 1: "0", 2: "-1"}, ("-1", "0", "1")) == [2, 1, 0]
    assert label_permutation({0: "c", 1: "C"}, ("C", "c")) == [1, 0]
    with pytest.raises(ArchitectureError, match="are not the task's"):
        label_permutation({0: "C", 1: "c"}, ("C", "C "))


def test_default_names_are_believed() -> None:
    names = {0: "LABEL_0", 1: "LABEL_1", 2: "LABEL_2"}
    assert label_permutation(names, MNLI) is None
    assert has_default_names(names)
    assert not has_default_names(dict(enumerate(MNLI)))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({0: "entailment", 1: "contradiction"}, r"the model has 2 labels .* and the task 3"),
        ({0: "yes", 1: "maybe", 2: "no"}, r"\(yes, maybe, no\) are not the task's"),
        ({0: "entailment", 1: "entailment", 2: "neutral"}, "are not the task's"),
    ],
)
def test_other_labels_are_refused(model: dict[int, str], message: str) -> None:
    with pytest.raises(ArchitectureError, match=message):
        label_permutation(model, MNLI)
