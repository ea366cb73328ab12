"""The official metrics of the tasks, by scikit-learn and SciPy, on the logits of a whole split."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from torch import Tensor

from dsprune.errors import NumericsError

__all__ = ["METRICS", "check_finite", "score"]

Metric = Callable[[np.ndarray[Any, Any], np.ndarray[Any, Any]], float]
"""Predictions and labels of a split, [examples] each, to a figure."""


def _accuracy(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    return float(accuracy_score(labels, predictions))


def _f1(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """F1 of class 1; 0 where that class is neither present nor predicted."""
    return float(f1_score(labels, predictions, zero_division=0.0))


def _macro_f1(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Mean of the F1 of all classes that occur, or are predicted; of [examples, labels] of 0 and 1, of all labels."""
    return float(f1_score(labels, predictions, average="macro", zero_division=0.0))


def _micro_f1(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """F1 over all labels of all examples, of [examples, labels] of 0 and 1."""
    return float(f1_score(labels, predictions, average="micro", zero_division=0.0))


def _mcc(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Matthews correlation; 0 where predictions or labels are all the same."""
    return float(matthews_corrcoef(labels, predictions))


def _pearson(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Pearson correlation; 0, as for `mcc`, where predictions or labels are all the same."""
    return float(stats.pearsonr(predictions, labels).statistic) if _varies(predictions, labels) else 0.0


def _spearman(predictions: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> float:
    """Spearman rank correlation; 0, as for `mcc`, where predictions or labels are all the same."""
    return float(stats.spearmanr(predictions, labels).statistic) if _varies(predictions, labels) else 0.0


def _varies(*arrays: np.ndarray[Any, Any]) -> bool:
    return all(len(array) > 1 and bool((array != array[0]).any()) for array in arrays)


METRICS: dict[str, Metric] = {
    "accuracy": _accuracy,
    "f1": _f1,
    "macro_f1": _macro_f1,
    "micro_f1": _micro_f1,
    "mcc": _mcc,
    "pearson": _pearson,
    "spearman": _spearman,
}


def score(logits: Tensor, labels: Tensor, metrics: tuple[str, ...]) -> dict[str, float]:
    """Metrics of a split by name.

    Args:
        logits: [examples, classes], or [examples, 1] for a regression.
        labels: [examples] class indices or target values.
        metrics: keys of `METRICS`.

    Raises:
        NumericsError: logits that are not finite.
    """
    check_finite(logits)
    # float64: a correlation of nearly constant float32 predictions loses its digits.
    outputs = logits.detach().cpu().double()
    predictions = outputs.squeeze(-1) if logits.shape[-1] == 1 else outputs.argmax(-1)
    return {name: METRICS[name](predictions.numpy(), labels.cpu().numpy()) for name in metrics}


def check_finite(outputs: Tensor) -> None:
    """Refuse outputs, [examples, ...], that hold anything but finite numbers.

    Raises:
        NumericsError: for how many examples they do.
    """
    broken = int((~torch.isfinite(outputs)).flatten(1).any(dim=-1).sum())
    if broken:
        raise NumericsError(f"the model's outputs for {broken} of {len(outputs)} examples are not finite numbers")
