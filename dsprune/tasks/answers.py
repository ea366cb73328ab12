"""Answers to questions: the best span by its logits, and the official SQuAD scores of its text.

Rajpurkar et al. 2016 (v1.1) and 2018 (v2).
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Spans", "best_spans", "exact", "f1", "f1_or_none", "normalise", "score_answers", "score_or_none"]

CHUNK = 1024
"""Features whose spans are compared at a time: every one has the square of `n_best` spans."""

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Spans(NamedTuple):
    """The best span of each feature.

    `scores`: [features] sum of its logits, -inf where no span is possible; `starts` and `ends`: [features]
    its first and last token.
    """

    scores: Tensor
    starts: Tensor
    ends: Tensor


def best_spans(outputs: Tensor, allowed: Tensor, *, n_best: int, max_length: int) -> Spans:
    """The span of greatest start and end logit, among the most likely starts and ends of each feature.

    Args:
        outputs: [features, length, 2] start and end logits.
        allowed: [features, length] tokens that an answer may hold.
        n_best: how many starts, and how many ends, are combined.
        max_length: longest span in tokens.
    """
    parts = zip(torch.split(outputs, CHUNK), torch.split(allowed, CHUNK), strict=True)
    found = [_best_spans(*part, min(n_best, outputs.shape[1]), max_length) for part in parts]
    return Spans(*(torch.cat(values) for values in zip(*found, strict=True)))


def _best_spans(outputs: Tensor, allowed: Tensor, count: int, max_length: int) -> Spans:
    logits = outputs.float().masked_fill(~allowed[..., None], -torch.inf)
    (start_logits, starts), (end_logits, ends) = (logits[..., side].topk(count, dim=1) for side in (0, 1))
    extra = ends[:, None, :] - starts[:, :, None]  # [features, starts, ends] tokens beyond the first
    scores = start_logits[:, :, None] + end_logits[:, None, :]
    best = scores.masked_fill((extra < 0) | (extra >= max_length), -torch.inf).flatten(1).max(dim=1)
    row = torch.arange(len(outputs))
    return Spans(best.values, starts[row, best.indices // count], ends[row, best.indices % count])


# --- scores -------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, and with single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact(predicted: str, true: str) -> float:
    """1 where both answers are the same once normalised, else 0."""
    return float(normalise(predicted) == normalise(true))


def f1(predicted: str, true: str) -> float:
    """F1 of the words of two answers once normalised, each as often as it occurs; 0 where they share none."""
    ours, theirs = normalise(predicted).split(), normalise(true).split()
    shared = (Counter(ours) & Counter(theirs)).total()
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def f1_or_none(predicted: str, true: str) -> float:
    """As `f1`, and 1 where both answers are empty once normalised."""
    return f1(predicted, true) if normalise(predicted) and normalise(true) else exact(predicted, true)


def score_answers(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD v1.1: mean over questions of the best `f1` and `exact` over the true answers, fractions of 1.

    Args:
        predicted: [questions] answers.
        true: [questions] the answers that count as right, at least one each.
    """
    return {"f1": fmean(_best(f1, predicted, true)), "exact": fmean(_best(exact, predicted, true))}


def score_or_none(predicted: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float]:
    """SQuAD v2: as v1.1, where "" answers a question that has no answer; besides, F1 of either kind of questions.

    Args:
        predicted: [questions] answers, "" for none.
        true: [questions] the answers that count as right; of a question without any, none.

    Returns:
        `f1`, `exact`, and `has_answer_f1` and `no_answer_f1` where there are such questions.
    """
    # A true answer of nothing but punctuation and articles does not count.
    worthy = [[answer for answer in answers if normalise(answer)] or [""] for answers in true]
    by_words = _best(f1_or_none, predicted, worthy)
    scores = {"f1": fmean(by_words), "exact": fmean(_best(exact, predicted, worthy))}
    for name, answerable in (("has_answer_f1", True), ("no_answer_f1", False)):
        chosen = [value for value, answers in zip(by_words, true, strict=True) if bool(answers) is answerable]
        if chosen:
            scores[name] = fmean(chosen)
    return scores


def _best(metric: Callable[[str, str], float], predicted: Sequence[str], true: Sequence[Sequence[str]]) -> list[float]:
    return [max(metric(ours, one) for one in answers) for ours, answers in zip(predicted, true, strict=True)]
