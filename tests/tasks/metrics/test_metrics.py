from __future__ import annotations

import math

import pytest
import torch

from dsprune.errors import NumericsError
from dsprune.tasks.metrics.official import METRICS, score

ALL_OF_CLASSES = ("accuracy", "f1", "mcc")


def as_logits(classes: list[int]) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(classes), 2).float() * 3 - 1


def test_classification_metrics_against_their_formulas() -> None:
    tp, fp, fn, tn = 3, 1, 2, 4
    labels = torch.tensor([1] * tp + [0] * fp + [1] * fn + [0] * tn)
    logits = as_logits([1] * (tp + fp) + [0] * (fn + tn))
    scores = score(logits, labels, ALL_OF_CLASSES)
    assert scores["accuracy"] == pytest.approx((tp + tn) / 10)
    assert scores["f1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))
    mcc = (tp * tn - fp * fn) / math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    assert scores["mcc"] == pytest.approx(mcc)


def test_correlations_against_their_formulas() -> None:
    predictions = torch.tensor([[0.1], [0.9], [0.4], [5.0]])
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scores = score(predictions, labels, ("pearson", "spearman"))
    pearson = torch.corrcoef(torch.stack([predictions.squeeze(-1), labels]))[0, 1]
    ranks = torch.tensor([1.0, 3.0, 2.0, 4.0])
    spearman = torch.corrcoef(torch.stack([ranks, labels]))[0, 1]
    assert scores["pearson"] == pytest.approx(pearson.item(), abs=1e-6)
    assert scores["spearman"] == pytest.approx(spearman.item(), abs=1e-6)


def test_three_classes() -> None:
    logits = torch.eye(3)
    assert score(logits, torch.tensor([0, 1, 1]), ("accuracy",)) == {"accuracy": pytest.approx(2 / 3)}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["f1", "mcc"])
def test_a_model_that_always_answers_the_same_scores_zero(name: str) -> None:
    assert score(as_logits([0] * 4), torch.tensor([0, 1, 0, 1]), (name,)) == {name: 0.0}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_constant_predictions_do_not_correlate(name: str) -> None:
    assert score(torch.ones(4, 1), torch.tensor([0.0, 1.0, 2.0, 3.0]), (name,)) == {name: 0.0}


def test_half_precision_logits_are_scored() -> None:
    logits = as_logits([0, 1]).to(torch.bfloat16)
    assert score(logits, torch.tensor([0, 1]), ("accuracy",)) == {"accuracy": 1.0}


def test_outputs_that_are_not_finite_are_refused() -> None:
    logits = torch.tensor([[0.0, float("nan")], [0.0, 1.0], [float("inf"), 0.0]])
    with pytest.raises(NumericsError, match="2 of 3 examples are not finite"):
        score(logits, torch.tensor([0, 1, 0]), ("accuracy",))


def test_every_metric_is_told_by_python_floats() -> None:
    for name in METRICS:
        values = torch.tensor([0.0, 1.0, 0.0, 1.0])
        outputs = values[:, None] if name in ("pearson", "spearman") else as_logits([0, 1, 0, 1])
        labels = values if name in ("pearson", "spearman") else values.long()
        result = score(outputs, labels, (name,))[name]
        assert type(result) is float
        assert result == pytest.approx(1.0)
